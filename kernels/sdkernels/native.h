/* What the files of this library share: matrices, numbers in registers, and sums. */
#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef enum { FLOAT16, BFLOAT16, FLOAT32, MIXED } Type;
static const size_t SIZE[] = {2, 2, 4};

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
