/* A block of W + up · down, summed up in registers. Included once for each set of instructions, which these macros stand for:
 * TARGET, NAMED(function), HEIGHT (rows of a block), VECTOR and SPAN (a register of numbers, and how many it holds), ZERO,
 * LOAD, SPREAD (one number to all lanes), ADD, ADD_PRODUCT(x, y, sum), WIDEN and NARROW (numbers of a type from and to
 * memory), LARGER (of the magnitudes so far, as bits, and those of a register), and ALL_FINITE (whether they are, in a type).
 */

/* What is known when the code is compiled, `vectors` and types, decides which of it stays; loops are unrolled, so that
 * sums stay in registers. */
#define INLINED TARGET static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define EACH_SUM(row, i) UNROLL for (int row = 0; row < HEIGHT; row++) UNROLL for (int i = 0; i < vectors; i++)

INLINED void NAMED(add_weight)(VECTOR sum[HEIGHT][ACROSS], const Block *block, int vectors, Type type) {
    EACH_SUM(row, i) {
        const char *weight = block->weight + row * block->weight_step + i * SPAN * SIZE[type];
        sum[row][i] = ADD(WIDEN(weight, type), sum[row][i]);
    }
}

INLINED void NAMED(round_off)(VECTOR sum[HEIGHT][ACROSS], const Block *block, int vectors, Type type) {
    EACH_SUM(row, i) NARROW(sum[row][i], block->out + row * block->out_step + i * SPAN * SIZE[type], type);
}

INLINED int NAMED(block_of)(const float *up, const float *down, size_t rank, const Block *block, Ahead ahead, int vectors) {
    UNROLL for (int row = 0; row < HEIGHT; row++) {
        _mm_prefetch(block->weight + row * block->weight_step, _MM_HINT_T0);
        _mm_prefetch(block->weight + row * block->weight_step + LINE, _MM_HINT_T0);
    }
    VECTOR sum[HEIGHT][ACROSS];
    EACH_SUM(row, i) sum[row][i] = ZERO();
    for (size_t k = 0; k < rank; k++, up += HEIGHT, down += ACROSS * SPAN, ahead.at += ahead.step) {
        VECTOR right[ACROSS];
        _mm_prefetch(ahead.at, _MM_HINT_T1);
        UNROLL for (int i = 0; i < vectors; i++) right[i] = LOAD(down + SPAN * i);
        UNROLL for (int row = 0; row < HEIGHT; row++) {
            const VECTOR left = SPREAD(up[row]);
            UNROLL for (int i = 0; i < vectors; i++) sum[row][i] = ADD_PRODUCT(left, right[i], sum[row][i]);
        }
    }
    switch (block->weight_type) {
        case FLOAT16: NAMED(add_weight)(sum, block, vectors, FLOAT16); break;
        case BFLOAT16: NAMED(add_weight)(sum, block, vectors, BFLOAT16); break;
        default: NAMED(add_weight)(sum, block, vectors, FLOAT32);
    }
    VECTOR largest = ZERO();
    EACH_SUM(row, i) largest = LARGER(largest, sum[row][i]);
    switch (block->out_type) {
        case FLOAT16: NAMED(round_off)(sum, block, vectors, FLOAT16); break;
        case BFLOAT16: NAMED(round_off)(sum, block, vectors, BFLOAT16); break;
        default: NAMED(round_off)(sum, block, vectors, FLOAT32);
    }
    return ALL_FINITE(largest, block->out_type);
}

/* Make a block of `vectors` registers in a row; return whether all of it is finite. */
TARGET static int NAMED(make)(
    const float *up, const float *down, size_t rank, const Block *block, Ahead ahead, size_t vectors) {
    switch (vectors) {
        case 1: return NAMED(block_of)(up, down, rank, block, ahead, 1);
        case 2: return NAMED(block_of)(up, down, rank, block, ahead, 2);
        default: return NAMED(block_of)(up, down, rank, block, ahead, 3);
    }
}

#undef INLINED
#undef UNROLL
#undef EACH_SUM
#undef TARGET
#undef NAMED
#undef HEIGHT
#undef VECTOR
#undef SPAN
#undef ZERO
#undef LOAD
#undef SPREAD
#undef ADD
#undef ADD_PRODUCT
#undef WIDEN
#undef NARROW
#undef LARGER
#undef ALL_FINITE
