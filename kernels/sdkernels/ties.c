/* TIES over a CPU's memory: what select.py and ties.py say in torch, in one pass each, with the same bits.
 *
 * See native.h for what it needs.
 */
#include "native.h"

enum { MOST_MODELS = 16 };

/* How many magnitudes are larger than a bound, or not smaller, as bits; and the memory for those strictly between both. */
typedef struct {
    int64_t above_low, from_low, above_high, from_high;
    int32_t *between;
    size_t room, found;
} Inside;

static int64_t counted(__m256i minus) {
    int32_t lanes[LANES];
    int64_t sum = 0;
    _mm256_storeu_si256((__m256i *)lanes, minus);
    for (int i = 0; i < LANES; i++) sum -= lanes[i];
    return sum;
}

/* Keep the lanes of a mask; return whether there was room. */
static int keep(Inside *inside, __m256i bits, int mask) {
    int32_t lanes[LANES];
    _mm256_storeu_si256((__m256i *)lanes, bits);
    for (; mask; mask &= mask - 1) {
        if (inside->found == inside->room) return 0;
        inside->between[inside->found++] = lanes[__builtin_ctz(mask)];
    }
    return 1;
}

/* Count |x|, or |x − y|, of `count` elements, 2³⁴ at most; return whether there was room. */
int sdkernels_inside(const Term *of, size_t count, int32_t low, int32_t high, Inside *inside) {
    const __m256i first = _mm256_set1_epi32(low), last = _mm256_set1_epi32(high);
    const Type type = of->y.data && of->y.type != of->x.type ? MIXED : (Type)of->x.type;
    __m256i above_low = _mm256_setzero_si256(), at_low = above_low, above_high = above_low, at_high = above_low;
    for (size_t column = 0; column < count; column += GROUP) {
        const size_t here = count - column < GROUP ? count - column : GROUP;
        Group value;
        switch (type) { /* a loop of its own for the usual type */
            case FLOAT16: value = value_of(of, 0, column, here, FLOAT16); break;
            default: value = value_of(of, 0, column, here, MIXED);
        }
        EACH(i) {
            const int left = (int)here - i * LANES;
            if (left <= 0) break;
            __m256i bits = magnitudes(value.v[i]), there = _mm256_set1_epi32(-1);
            if (left < LANES) there = _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            const __m256i over_low = _mm256_and_si256(there, _mm256_cmpgt_epi32(bits, first));
            const __m256i over_high = _mm256_and_si256(there, _mm256_cmpgt_epi32(bits, last));
            const __m256i is_high = _mm256_and_si256(there, _mm256_cmpeq_epi32(bits, last));
            above_low = _mm256_add_epi32(above_low, over_low);
            above_high = _mm256_add_epi32(above_high, over_high);
            at_low = _mm256_add_epi32(at_low, _mm256_and_si256(there, _mm256_cmpeq_epi32(bits, first)));
            at_high = _mm256_add_epi32(at_high, is_high);
            const __m256i kept = _mm256_andnot_si256(_mm256_or_si256(over_high, is_high), over_low);
            const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(kept));
            if (mask && !keep(inside, bits, mask)) return 0;
        }
    }
    inside->above_low = counted(above_low);
    inside->from_low = inside->above_low + counted(at_low);
    inside->above_high = counted(above_high);
    inside->from_high = inside->above_high + counted(at_high);
    return 1;
}

/* A model, its share, and the largest change that does not count. */
typedef struct {
    Matrix x;
    double weight, edge;
} Model;

/* One election: `many` models, at most MOST_MODELS. */
typedef struct {
    Matrix base, out;
    const Model *models;
    size_t many;
    double scale;
    int64_t normalize, by_count;
} Election;

/* A model's change where it counts, else 0, times its share. */
INLINE __m256 change_of(__m256 x, __m256 origin, const Model *model) {
    const __m256 change = _mm256_sub_ps(x, origin), sign = _mm256_set1_ps(-0.0f);
    const __m256 counts = _mm256_cmp_ps(_mm256_andnot_ps(sign, change), _mm256_set1_ps((float)model->edge), _CMP_NLE_UQ);
    return _mm256_mul_ps(_mm256_and_ps(change, counts), _mm256_set1_ps((float)model->weight));
}

INLINE __m256 sign_of(__m256 value) {
    const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1);
    const __m256 up = _mm256_and_ps(_mm256_cmp_ps(value, zero, _CMP_GT_OQ), one);
    return _mm256_sub_ps(up, _mm256_and_ps(_mm256_cmp_ps(value, zero, _CMP_LT_OQ), one));
}

/* Elect a sign for each lane, and return the change of those that have it. */
INLINE __m256 held(const Election *of, __m256 changes[]) {
    const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1);
    __m256 total = zero, divisor = zero;
    for (size_t i = 0; i < of->many; i++)
        total = _mm256_add_ps(total, of->by_count ? sign_of(changes[i]) : changes[i]);
    const __m256 up = _mm256_cmp_ps(total, zero, _CMP_GE_OQ);
    const __m256 turned = _mm256_andnot_ps(up, _mm256_set1_ps(-0.0f)); /* the sign bit where − is elected */
    total = zero;
    for (size_t i = 0; i < of->many; i++) {
        const __m256 share = _mm256_max_ps(zero, _mm256_xor_ps(changes[i], turned)); /* NaN stays */
        const __m256 counts = _mm256_cmp_ps(share, zero, _CMP_GT_OQ);
        total = _mm256_add_ps(total, share);
        divisor = _mm256_add_ps(divisor, _mm256_and_ps(counts, _mm256_set1_ps((float)of->models[i].weight)));
    }
    total = _mm256_xor_ps(total, turned);
    if (!of->normalize) return total;
    return _mm256_div_ps(total, _mm256_add_ps(divisor, _mm256_and_ps(_mm256_cmp_ps(divisor, zero, _CMP_EQ_OQ), one)));
}

/* Merge `count` elements. */
void sdkernels_elect(const Election *of, size_t count) {
    for (size_t column = 0; column < count; column += GROUP) {
        const size_t here = count - column < GROUP ? count - column : GROUP;
        Group origin = load(&of->base, 0, column, here, MIXED), result;
        __m256 changes[VECTORS][MOST_MODELS];
        for (size_t i = 0; i < of->many; i++) {
            const Group x = load(&of->models[i].x, 0, column, here, MIXED);
            EACH(v) changes[v][i] = change_of(x.v[v], origin.v[v], of->models + i);
        }
        EACH(v) result.v[v] = _mm256_fmadd_ps(held(of, changes[v]), _mm256_set1_ps((float)of->scale), origin.v[v]);
        store(result, &of->out, 0, column, here, MIXED);
    }
}
