/* W + up · down, rounded once: the factors' product is added to the weight while it is in the first-level cache.
 *
 * Factors are packed first: widened to float32, the up times its scale, and laid out in the order in which they are
 * multiplied. A panel of the up is some of its rows, a panel of the down some of its columns; in both, what belongs to one
 * rank lies together, and what is beyond the matrix is 0. Panels of the down that fit into the second-level cache are
 * multiplied with one panel of the up after the other.
 *
 * There are two sets of instructions: AVX2, and AVX-512 where `wide`. product.py asks torch which there are.
 */
#include "native.h"

enum { ACROSS = 3 };                      /* registers of a panel of the down */
enum { UNIT = 96, MOST_COLUMNS = 960 };   /* whole panels of either kind, and whole groups of a sum */
enum { CACHED = 1 << 17 };                /* numbers of the down that stay in the second-level cache */

#define TARGET __attribute__((target("avx2,fma")))
#define NAMED(function) function##_avx2
#define HEIGHT 4
#define VECTOR __m256
#define SPAN 8
#define ZERO _mm256_setzero_ps
#define LOAD _mm256_loadu_ps
#define STORE _mm256_storeu_ps
#define SPREAD _mm256_set1_ps
#define ADD_PRODUCT _mm256_fmadd_ps
#include "product_block.h"

#define TARGET __attribute__((target("avx512f")))
#define NAMED(function) function##_avx512
#define HEIGHT 8
#define VECTOR __m512
#define SPAN 16
#define ZERO _mm512_setzero_ps
#define LOAD _mm512_loadu_ps
#define STORE _mm512_storeu_ps
#define SPREAD _mm512_set1_ps
#define ADD_PRODUCT _mm512_fmadd_ps
#include "product_block.h"

/* The sizes of panels and registers, and what multiplies them. */
typedef struct {
    size_t height, span;
    void (*multiply)(const float *up, const float *down, size_t rank, float *to, size_t stride, size_t vectors, const char *ahead, size_t step);
} Set;
static const Set SETS[] = {{4, 8, multiply_avx2}, {8, 16, multiply_avx512}};
enum { TALLEST = 8 };

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

/* What is needed next: a little of it is asked for with each step of a multiplication, so that it is there in time. */
typedef struct {
    const char *at;
    size_t step;
} Ahead;

/* Multiply a panel of the up with `columns` columns from `column` on, which panels begin with; rows are MOST_COLUMNS apart. */
static void multiply(const Factors *factors, size_t panel, size_t column, size_t columns, float *to, const Set *set, Ahead *next) {
    const size_t width = ACROSS * set->span, rank = factors->rank;
    const float *up = factors->up + panel * set->height * rank, *down = factors->down + column * rank;
    for (size_t done = 0; done < columns; done += width, down += width * rank) {
        const size_t vectors = parts(least(width, columns - done), set->span);
        set->multiply(up, down, rank, to + done, MOST_COLUMNS, vectors, next->at, next->step);
        next->at += rank * next->step;
    }
}

/* Add the product's rows from `first` on to those of a weight, and round them to `out`; return whether all is finite. */
int sdkernels_add_product(const Factors *factors, size_t first, size_t rows, const Matrix *weight, const Matrix *out, int wide) {
    const Set *set = SETS + wide;
    const size_t fit = CACHED / factors->rank / UNIT * UNIT, block = least(fit ? fit : UNIT, MOST_COLUMNS);
    float product[TALLEST * MOST_COLUMNS];
    Term terms[] = {{1, *weight, {0}}, {1, {(char *)product, MOST_COLUMNS, FLOAT32}, {0}}};
    Sum sum = {terms, 2, *out, 1};
    for (size_t column = 0; column < factors->columns; column += block) {
        const size_t columns = least(block, factors->columns - column), after = factors->columns - column - columns;
        const size_t blocks = parts(rows, set->height) * parts(columns, ACROSS * set->span);
        Ahead next = {
            (const char *)(factors->down + (column + columns) * factors->rank),
            parts(least(block, after) * sizeof(float), blocks),
        };
        for (size_t row = first, end = first + rows; row < end;) {
            const size_t above = row % set->height, here = least(set->height - above, end - row);
            multiply(factors, row / set->height, column, columns, product, set, &next);
            terms[0].x.data = place(weight, row - first, column);
            terms[1].x.data = (char *)(product + above * MOST_COLUMNS);
            sum.out.data = place(out, row - first, column);
            for (size_t i = 0; i < here; i++) sdkernels_add_up(&sum, i, columns);
            row += here;
        }
    }
    return (int)sum.finite;
}
