/* What the files of this library share: matrices, numbers in registers, and sums. */
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum { FLOAT16, BFLOAT16, FLOAT32, MIXED } Type;
static const size_t SIZE[] = {2, 2, 4};
/* The first magnitude that rounds to infinity, as the bits of a float32; those of NaN are larger, all others smaller. */
static const int32_t TOO_LARGE[] = {0x477ff000, 0x7f7f8000, 0x7f800000};

/* Rows of contiguous elements, `stride` elements apart: 0 where one row's memory serves for all. A vector is one row. */
typedef struct {
    char *data;
    int64_t stride;
    int64_t type;
} Matrix;

/* weight · x, or weight · (x − y) where y has data. */
typedef struct {
    double weight;
    Matrix x, y;
} Term;

/* A sum of `length` terms (one or more), and whether all of it is finite so far. */
typedef struct {
    const Term *terms;
    size_t length;
    Matrix out;
    int64_t finite;
} Sum;

/* Make some elements of a row: `columns` from the first. */
void sdkernels_add_up(Sum *to, size_t row, size_t columns);

#define INLINE static inline __attribute__((always_inline))
enum { LANES = 8 };

static inline char *place(const Matrix *matrix, size_t row, size_t column) {
    return matrix->data + (row * matrix->stride + column) * SIZE[matrix->type];
}

/* Widen the eight numbers at `at`. */
INLINE __m256 widen(const char *at, Type type) {
    if (type == FLOAT32) return _mm256_loadu_ps((const float *)at);
    const __m128i halves = _mm_loadu_si128((const __m128i *)at);
    if (type == FLOAT16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/* Round to bfloat16: add half a step, less one where the last bit that stays is 0 (ties to even), and cut. NaN stays NaN. */
INLINE __m128i to_bfloat16(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i cut = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(cut), _mm256_extracti128_si256(cut, 1));
}

/* Round eight numbers to the place `at`. */
INLINE void narrow(__m256 value, char *at, Type type) {
    if (type == FLOAT32)
        _mm256_storeu_ps((float *)at, value);
    else if (type == FLOAT16)
        _mm_storeu_si128((__m128i *)at, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    else
        _mm_storeu_si128((__m128i *)at, to_bfloat16(value));
}

/* Magnitudes as bits: those of NaN are larger than any other. */
INLINE __m256i magnitudes(__m256 value) {
    return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
}

/* Whether magnitudes, as bits, are all finite once they are rounded to a type. */
INLINE int all_finite(__m256i largest, Type type) {
    const __m256i bad = _mm256_cmpgt_epi32(largest, _mm256_set1_epi32(TOO_LARGE[type] - 1));
    return _mm256_testz_si256(bad, bad);
}

enum { VECTORS = 4, GROUP = LANES * VECTORS };
typedef struct {
    __m256 v[VECTORS];
} Group; /* 32 numbers in four registers */

#define EACH(i) for (int i = 0; i < VECTORS; i++)

/* Widen a group, or the `count` elements that are left of a row. Where `type` is MIXED, the matrix's own counts. */
INLINE Group load(const Matrix *matrix, size_t row, size_t column, size_t count, Type type) {
    const char *at = place(matrix, row, column);
    char padded[GROUP * sizeof(float)];
    if (count < GROUP) {
        memset(padded, 0, sizeof padded);
        at = memcpy(padded, at, count * SIZE[matrix->type]);
    }
    Group to;
    switch (type == MIXED ? (Type)matrix->type : type) {
        case FLOAT16: EACH(i) to.v[i] = widen(at + 2 * LANES * i, FLOAT16); break;
        case BFLOAT16: EACH(i) to.v[i] = widen(at + 2 * LANES * i, BFLOAT16); break;
        default: EACH(i) to.v[i] = widen(at + 4 * LANES * i, FLOAT32);
    }
    return to;
}

/* Round a group into place, or the `count` elements that are left of a row. */
INLINE void store(Group from, const Matrix *matrix, size_t row, size_t column, size_t count, Type type) {
    char *out = place(matrix, row, column), padded[GROUP * sizeof(float)];
    char *at = count < GROUP ? padded : out;
    switch (type == MIXED ? (Type)matrix->type : type) {
        case FLOAT16: EACH(i) narrow(from.v[i], at + 2 * LANES * i, FLOAT16); break;
        case BFLOAT16: EACH(i) narrow(from.v[i], at + 2 * LANES * i, BFLOAT16); break;
        default: EACH(i) narrow(from.v[i], at + 4 * LANES * i, FLOAT32);
    }
    if (count < GROUP) memcpy(out, padded, count * SIZE[matrix->type]);
}

/* Load x, or x − y. */
INLINE Group value_of(const Term *term, size_t row, size_t column, size_t count, Type type) {
    Group value = load(&term->x, row, column, count, type);
    if (term->y.data) {
        const Group y = load(&term->y, row, column, count, type);
        EACH(i) value.v[i] = _mm256_sub_ps(value.v[i], y.v[i]);
    }
    return value;
}
