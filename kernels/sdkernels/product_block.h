/* A block of a product, summed up in registers. Included once for each set of instructions, which these macros stand for:
 * TARGET, NAMED(function), HEIGHT (rows of the block), VECTOR and SPAN (a register of numbers, and how many it holds),
 * ZERO, LOAD, STORE, SPREAD (one number to all lanes) and ADD_PRODUCT(x, y, sum).
 */

/* Multiply a panel of `up` with the first `vectors` registers of each row of a panel of `down`; rows of `to` are `stride`
 * numbers apart. The loops over a block's rows and registers are unrolled, so that its sums stay in registers. */
#define UNROLL _Pragma("GCC unroll 8")
#define MULTIPLY(VECTORS)                                                                            \
    {                                                                                                \
        VECTOR sum[HEIGHT][VECTORS];                                                                 \
        UNROLL for (int row = 0; row < HEIGHT; row++)                                                \
            UNROLL for (int i = 0; i < VECTORS; i++) sum[row][i] = ZERO();                           \
        for (size_t k = 0; k < rank; k++, up += HEIGHT, down += ACROSS * SPAN, ahead += step) {      \
            _mm_prefetch(ahead, _MM_HINT_T1);                                                        \
            VECTOR right[VECTORS];                                                                   \
            UNROLL for (int i = 0; i < VECTORS; i++) right[i] = LOAD(down + SPAN * i);               \
            UNROLL for (int row = 0; row < HEIGHT; row++) {                                          \
                const VECTOR left = SPREAD(up[row]);                                                 \
                UNROLL for (int i = 0; i < VECTORS; i++)                                             \
                    sum[row][i] = ADD_PRODUCT(left, right[i], sum[row][i]);                          \
            }                                                                                        \
        }                                                                                            \
        UNROLL for (int row = 0; row < HEIGHT; row++)                                                \
            UNROLL for (int i = 0; i < VECTORS; i++) STORE(to + row * stride + SPAN * i, sum[row][i]); \
        return;                                                                                      \
    }

TARGET static void NAMED(multiply)(const float *up, const float *down, size_t rank, float *to, size_t stride, size_t vectors, const char *ahead, size_t step) {
    switch (vectors) {
        case 1: MULTIPLY(1)
        case 2: MULTIPLY(2)
        default: MULTIPLY(3)
    }
}

#undef MULTIPLY
#undef UNROLL
#undef TARGET
#undef NAMED
#undef HEIGHT
#undef VECTOR
#undef SPAN
#undef ZERO
#undef LOAD
#undef STORE
#undef SPREAD
#undef ADD_PRODUCT
