/* W + up · down, rounded once: the factors' product is added to the weight while it is in the first-level cache.
 *
 * Factors are packed first: widened to float32, the up times its scale, and laid out in the order in which they are
 * multiplied. A panel of the up is some of its rows, a panel of the down some of its columns; in both, what belongs to one
 * rank lies together, and what is beyond the matrix is 0. Panels of the down that fit into the second-level cache are
 * multiplied with one panel of the up after the other.
 *
 * There are two sets of instructions: AVX2, and AVX-512 where `wide`. packed.py asks torch which there are.
 */
#include "native.h"

enum { ACROSS = 3 };                    /* registers in a row of a block */
enum { UNIT = 96, MOST_COLUMNS = 960 }; /* whole panels of either set */
enum { CACHED = 1 << 17 };              /* numbers of the down that stay in the second-level cache */
enum { LINE = 64 };                     /* bytes that come from memory together */

/* A part of the result: where its weight is, and where it goes; rows are so many bytes apart. */
typedef struct {
    const char *weight;
    char *out;
    size_t weight_step, out_step;
    Type weight_type, out_type;
} Block;

/* What is needed next: a little of it is asked for with each step of a multiplication, so that it is there in time. */
typedef struct {
    const char *at;
    size_t step;
} Ahead;

INLINE __m256 larger_8(__m256 so_far, __m256 value) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(so_far), magnitudes(value)));
}

INLINE int all_finite_8(__m256 largest, Type type) { return all_finite(_mm256_castps_si256(largest), type); }

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define NAMED(function) function##_avx2
#define HEIGHT 4
#define VECTOR __m256
#define SPAN 8
#define ZERO _mm256_setzero_ps
#define LOAD _mm256_loadu_ps
#define SPREAD _mm256_set1_ps
#define ADD _mm256_add_ps
#define ADD_PRODUCT _mm256_fmadd_ps
#define WIDEN widen
#define NARROW narrow
#define LARGER larger_8
#define ALL_FINITE all_finite_8
#include "packed_block.h"

#define WIDE __attribute__((target("avx512f"), always_inline)) static inline

WIDE __m512 widen_16(const char *at, Type type) {
    if (type == FLOAT32) return _mm512_loadu_ps(at);
    const __m256i halves = _mm256_loadu_si256((const __m256i *)at);
    if (type == FLOAT16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

WIDE void narrow_16(__m512 value, char *at, Type type) {
    if (type == FLOAT32) {
        _mm512_storeu_ps(at, value);
        return;
    }
    __m256i halves;
    if (type == FLOAT16) {
        halves = _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    } else { /* as to_bfloat16 */
        const __m512i bits = _mm512_castps_si512(value);
        const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
        const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        const __m512i kept = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
        halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
    }
    _mm256_storeu_si256((__m256i *)at, halves);
}

WIDE __m512 larger_16(__m512 so_far, __m512 value) {
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(so_far), magnitude));
}

WIDE int all_finite_16(__m512 largest, Type type) {
    return !_mm512_cmpgt_epi32_mask(_mm512_castps_si512(largest), _mm512_set1_epi32(TOO_LARGE[type] - 1));
}

#define TARGET __attribute__((target("avx512f")))
#define NAMED(function) function##_avx512
#define HEIGHT 8
#define VECTOR __m512
#define SPAN 16
#define ZERO _mm512_setzero_ps
#define LOAD _mm512_loadu_ps
#define SPREAD _mm512_set1_ps
#define ADD _mm512_add_ps
#define ADD_PRODUCT _mm512_fmadd_ps
#define WIDEN widen_16
#define NARROW narrow_16
#define LARGER larger_16
#define ALL_FINITE all_finite_16
#include "packed_block.h"

/* The sizes of blocks and registers, and what makes a block. */
typedef struct {
    size_t height, span;
    int (*make)(const float *up, const float *down, size_t rank, const Block *block, Ahead ahead, size_t vectors);
} Set;
static const Set SETS[] = {{4, 8, make_avx2}, {8, 16, make_avx512}};
enum { TALLEST = 8, WIDEST = ACROSS * 16 };

/* How many rows of an up, or columns of a down, are in a panel. */
size_t sdkernels_panel(int of_down, int wide) { return of_down ? ACROSS * SETS[wide].span : SETS[wide].height; }

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

/* Widen `count` numbers of a row, times `scale`. */
static void widen_row(const Matrix *from, size_t row, size_t column, size_t count, float scale, float *to) {
    const __m256 times = _mm256_set1_ps(scale);
    const Type type = (Type)from->type;
    for (; count >= LANES; count -= LANES, column += LANES, to += LANES)
        _mm256_storeu_ps(to, _mm256_mul_ps(times, widen(place(from, row, column), type)));
    if (!count) return;
    char padded[LANES * sizeof(float)] = {0};
    float widened[LANES];
    memcpy(padded, place(from, row, column), count * SIZE[type]);
    _mm256_storeu_ps(widened, _mm256_mul_ps(times, widen(padded, type)));
    memcpy(to, widened, count * sizeof(float));
}

/* Pack `ranks` columns of an up, times `scale`, as the ranks from `first` on of `all`. */
void sdkernels_pack_up(const Matrix *up, size_t rows, size_t ranks, double scale, float *to, size_t first, size_t all, int wide) {
    enum { PIECE = 64 };
    const size_t height = SETS[wide].height;
    float piece[TALLEST][PIECE];
    for (size_t row = 0; row < rows; row += height, to += height * all)
        for (size_t rank = 0; rank < ranks; rank += PIECE) {
            const size_t here = least(PIECE, ranks - rank);
            memset(piece, 0, sizeof piece);
            for (size_t i = 0; i < least(height, rows - row); i++)
                widen_row(up, row + i, rank, here, (float)scale, piece[i]);
            float *out = to + (first + rank) * height;
            for (size_t k = 0; k < here; k++)
                for (size_t i = 0; i < height; i++) *out++ = piece[i][k];
        }
}

/* Pack a down's rows as the ranks from `first` on of `all`. */
void sdkernels_pack_down(const Matrix *down, size_t ranks, size_t columns, float *to, size_t first, size_t all, int wide) {
    enum { TOGETHER = 8 }; /* panels: what is read of a row at a time is longer than one panel */
    const size_t width = ACROSS * SETS[wide].span, panel = width * all;
    for (size_t start = 0; start < columns; start += TOGETHER * width, to += TOGETHER * panel)
        for (size_t rank = 0; rank < ranks; rank++) {
            float *out = to + (first + rank) * width;
            for (size_t column = start; column < least(start + TOGETHER * width, columns); column += width, out += panel) {
                const size_t here = least(width, columns - column);
                widen_row(down, rank, column, here, 1, out);
                memset(out + here, 0, (width - here) * sizeof(float));
            }
        }
}

/* Packed factors. */
typedef struct {
    const float *up, *down;
    size_t rank, columns;
} Factors;

static size_t parts(size_t all, size_t each) { return (all + each - 1) / each; }

/* Make a block of which only some rows and columns are there: in memory of its own, around which there is nothing. */
static int make_part(
    const float *up, const float *down, size_t rank, const Block *part, size_t above, size_t rows, size_t columns, const Set *set) {
    char weight[TALLEST * WIDEST * sizeof(float)] = {0}, out[TALLEST * WIDEST * sizeof(float)];
    const size_t width = ACROSS * set->span, in = SIZE[part->weight_type], to = SIZE[part->out_type];
    for (size_t i = 0; i < rows; i++)
        memcpy(weight + (above + i) * width * in, part->weight + i * part->weight_step, columns * in);
    const Block block = {weight, out, width * in, width * to, part->weight_type, part->out_type};
    const int finite = set->make(up, down, rank, &block, (Ahead){(const char *)up, 0}, ACROSS);
    for (size_t i = 0; i < rows; i++)
        memcpy(part->out + i * part->out_step, out + (above + i) * width * to, columns * to);
    return finite;
}

/* Add the product's rows from `first` on to those of a weight, and round them to `out`; return whether all is finite. It may
 * say no where only other rows, of the same panels, are not. */
int sdkernels_add_product(const Factors *factors, size_t first, size_t rows, const Matrix *weight, const Matrix *out, int wide) {
    const Set *set = SETS + wide;
    const size_t rank = factors->rank, width = ACROSS * set->span, height = set->height;
    const size_t fit = CACHED / rank / UNIT * UNIT, most = least(fit ? fit : UNIT, MOST_COLUMNS);
    int finite = 1;
    for (size_t start = 0, end; start < factors->columns; start = end) {
        end = least(start + most, factors->columns);
        const size_t steps = parts(rows, height) * parts(end - start, width) * rank;
        const size_t next = least(most, factors->columns - end) * rank * sizeof(float);
        Ahead ahead = {(const char *)(factors->down + end * rank), parts(next, steps)};
        for (size_t row = first, here; row < first + rows; row += here) {
            const size_t above = row % height;
            here = least(height - above, first + rows - row);
            const float *up = factors->up + row / height * height * rank;
            for (size_t column = start; column < end; column += width, ahead.at += rank * ahead.step) {
                const size_t columns = least(width, end - column);
                const float *down = factors->down + column * rank;
                const Block block = {
                    place(weight, row - first, column),
                    place(out, row - first, column),
                    weight->stride * SIZE[weight->type],
                    out->stride * SIZE[out->type],
                    weight->type,
                    out->type,
                };
                if (here == height && columns % set->span == 0)
                    finite &= set->make(up, down, rank, &block, ahead, columns / set->span);
                else
                    finite &= make_part(up, down, rank, &block, above, here, columns, set);
            }
        }
    }
    return finite;
}
