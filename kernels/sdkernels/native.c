/* Linear combinations of tensors in one pass over a CPU's memory: rounded once, looked through for what is not finite, and
 * read from files where they are not in memory yet.
 *
 * A torch expression makes a pass over the block for each widening, each sum and the rounding. Here 32 elements at a time
 * are widened, added up and rounded in registers. Every operation is the one that linear.py's `reference` does, in its
 * order, so the bits are the same: float32, differences first, each term after the first with a fused multiply-add, one
 * rounding to nearest even at the end.
 *
 * It needs AVX2, FMA and F16C (Intel since 2013, AMD since 2015); native.py asks torch whether they are there. Nothing here
 * allocates, or reads or writes outside of the matrices.
 */
#include "native.h"

#include <errno.h>
#include <unistd.h>

/* The types of the first term, of the others, and of the sum. */
typedef struct {
    Type first, others, sum;
} Types;

/* Add up at most a group; return its largest magnitudes, lane by lane, as bits. */
INLINE __m256i sum(const Term *terms, size_t length, const Matrix *out, size_t row, size_t column, size_t count, Types types) {
    Group total = value_of(terms, row, column, count, types.first);
    if (terms->weight != 1) EACH(i) total.v[i] = _mm256_mul_ps(_mm256_set1_ps((float)terms->weight), total.v[i]);
    for (const Term *term = terms + 1; term < terms + length; term++) {
        const Group value = value_of(term, row, column, count, types.others);
        const __m256 weight = _mm256_set1_ps((float)term->weight);
        EACH(i) total.v[i] = _mm256_fmadd_ps(weight, value.v[i], total.v[i]);
    }
    store(total, out, row, column, count, types.sum);
    __m256i largest = _mm256_setzero_si256();
    EACH(i) largest = _mm256_max_epi32(largest, magnitudes(total.v[i]));
    return largest;
}

/* Each call of this with constant types is a loop of its own, without a look at types in it. */
INLINE int combine_row(const Term *terms, size_t length, const Matrix *out, size_t row, size_t columns, Types types) {
    __m256i largest = _mm256_setzero_si256();
    size_t column = 0;
    for (; column + GROUP <= columns; column += GROUP)
        largest = _mm256_max_epi32(largest, sum(terms, length, out, row, column, GROUP, types));
    if (column < columns)
        largest = _mm256_max_epi32(largest, sum(terms, length, out, row, column, columns - column, types));
    return all_finite(largest, (Type)out->type);
}

/* The type that both of a term's matrices have, or MIXED. */
static Type type_of(const Term *term) {
    return !term->y.data || term->y.type == term->x.type ? (Type)term->x.type : MIXED;
}

void sdkernels_add_up(Sum *to, size_t row, size_t columns) {
    const Term *const end = to->terms + to->length;
    Type others = to->length > 1 ? type_of(to->terms + 1) : type_of(to->terms);
    for (const Term *term = to->terms + 1; term < end; term++)
        if (type_of(term) != others) others = MIXED;
    const Types types = {type_of(to->terms), others, (Type)to->out.type};
#define CASE(x, y, z)                                                                                     \
    if (types.first == x && types.others == y && types.sum == z) {                                        \
        to->finite &= combine_row(to->terms, to->length, &to->out, row, columns, (Types){x, y, z});       \
        return;                                                                                           \
    }
    CASE(FLOAT16, FLOAT16, FLOAT16)
    CASE(BFLOAT16, BFLOAT16, BFLOAT16)
    CASE(FLOAT16, FLOAT32, FLOAT16) /* a weight, and what is added to it */
    CASE(BFLOAT16, FLOAT32, BFLOAT16)
#undef CASE
    to->finite &= combine_row(to->terms, to->length, &to->out, row, columns, (Types){MIXED, MIXED, MIXED});
}

/* A part of a file, and the memory of `size` bytes for a row of it at a time. */
typedef struct {
    int64_t descriptor;
    int64_t offset;
    char *data;
    size_t size;
} Part;

static int read_row(const Part *part, size_t row, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
        const ssize_t got = pread(part->descriptor, part->data + done, bytes - done, part->offset + row * part->size + done);
        if (got > 0) done += got;
        else if (got == 0 || errno != EINTR) return 0;
    }
    return 1;
}

/* Make sums of matrices with rows of `columns` elements, `count` elements in all: the last row may be shorter. The rows of
 * each part are read before they are used. Return whether all could be read. */
int sdkernels_combine(Sum *sums, size_t many, const Part *parts, size_t files, size_t count, size_t columns) {
    for (size_t i = 0; i < many; i++) sums[i].finite = 1;
    for (size_t row = 0, left = count; left; row++) {
        const size_t here = left < columns ? left : columns;
        for (const Part *part = parts; part < parts + files; part++)
            if (!read_row(part, row, part->size / columns * here)) return 0;
        for (size_t i = 0; i < many; i++) sdkernels_add_up(sums + i, row, here);
        left -= here;
    }
    return 1;
}

/* Whether no element is NaN or infinite: none has an exponent of ones alone. */
int sdkernels_finite(const void *data, size_t count, int64_t type) {
    const uint16_t ones16 = type == FLOAT16 ? 0x7c00 : 0x7f80;
    const uint32_t ones32 = 0x7f800000;
    uint16_t bad16 = 0; /* as wide as the elements: then whole vectors are compared */
    uint32_t bad32 = 0;
    if (type == FLOAT32)
        for (size_t i = 0; i < count; i++) bad32 |= (((const uint32_t *)data)[i] & ones32) == ones32;
    else
        for (size_t i = 0; i < count; i++) bad16 |= (((const uint16_t *)data)[i] & ones16) == ones16;
    return !bad16 && !bad32;
}
