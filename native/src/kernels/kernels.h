/* One table of functions per instruction set; scalar.c is the specification that every other is tested against, bit for
 * bit: the order of float operations belongs to it. */
#ifndef RONDEL_KERNELS_H
#define RONDEL_KERNELS_H
#include "formats.h"

/* A matrix of 1 and -1, its columns in groups of four. A row adds, for every group in turn, one of the eight sums of its four
 * inputs that begin with +: (a +- b) +- (c +- d). */
struct signed_sums {
    int order, transposed; /* a multiple of 4; of hadamard_base(order) */
    int64_t inner;
    /* Of SUM_GROUPS groups after the other, (order, as many groups): 16 (16 (group mod SUM_GROUPS) + choice); bits of a
     * choice: SUM_*. */
    const uint16_t *terms;
    const float *signs;    /* (order): of the row's first column; its terms are those of the row times that */
};
enum { SUM_B = 4, SUM_D = 2, SUM_CD = 1, SUM_MINUS = 8 }; /* - before b, before d, before (c +- d), before the whole sum */
enum { SUM_GROUPS = 8 };                                  /* their sums for a tile of columns fit a first-level cache */

/* Do the kernels read all of a column before they write it, and no column twice? Then y may be x. */
static inline int signed_sums_in_place(const struct signed_sums *base) {
    return (base->order == 12 || base->order == 20 || base->order == 28 || base->order == 44) && base->inner % 16 == 0;
}

/* Where among the terms. */
static inline int signed_sums_at(int order, int row, int group) {
    int first = group / SUM_GROUPS * SUM_GROUPS, rest = order / 4 - first;
    return first * order + row * (rest < SUM_GROUPS ? rest : SUM_GROUPS) + group - first;
}

struct kernels {
    const char *name;
    int (*usable)(void);
    /* Prepare one activation row of `cols` floats; `packed` holds activation_bytes(kind, cols). */
    void (*pack[ACT_COUNT])(const float *x, int64_t cols, void *packed);
    /* Formats stored row by row: dot product of one weight row with one prepared activation row. */
    float (*dot[FMT_COUNT])(const void *row, const void *packed, int64_t cols);
    /* Tile formats: 16 dot products of one panel with one prepared activation row. */
    void (*panel[FMT_COUNT])(const void *panel, const void *packed, int64_t cols, float out[16]);
    /* Float rows of attention and of the norms. */
    float (*dot_f32)(const float *a, const float *b, int64_t n);
    float (*dot_f16)(const uint16_t *a, const uint16_t *b, int64_t n);
    void (*axpy_f32)(float *y, float scale, const float *x, int64_t n);
    void (*fma_f16)(uint16_t *y, float scale, const uint16_t *x, int64_t n); /* y <- half(scale x + y), rounded once */
    /* `count` Sylvester matrices of order `length`, side by side, times signs: y <- scale H (s o x); y may be x. Bit `first` of
     * `signs` (least significant first, 1 = minus) belongs to x[0]; 3 bytes past the last must be readable; NULL: all plus. */
    void (*sylvester)(const float *x, float *y, int64_t count, int64_t length, const uint8_t *signs, int64_t first, float scale);
    /* Another factor of a Hadamard matrix: y <- scale M x, M acting on the middle axis of (count, order, inner); y is x
     * only where signed_sums_in_place. */
    void (*signed_sums)(const struct signed_sums *base, int64_t count, const float *x, float *y, float scale);
    void (*swiglu)(float *gate, const float *up, int64_t n); /* gate <- silu(gate) o up */
    /* `pairs` pairs (a, b), neighbours `step` apart: a, b <- a cos - b sin, a sin + b cos. */
    void (*turn)(float *a, float *b, const float *cosines, const float *sines, int64_t pairs, int64_t step);
};

extern const struct kernels kernels_scalar, kernels_avx2, kernels_avx512;
const struct kernels *kernels_current(void);

size_t activation_bytes(enum activation kind, int64_t cols); /* a multiple of 64 */
/* Rows [first, last) of `weights` times `n` prepared rows (activation_bytes apart); out[i * stride + row].
 * `first` is a multiple of the format's rows. */
void matmul_rows(const struct matrix *weights, int64_t first, int64_t last, const void *packed, int64_t n, float *out,
                 int64_t stride);
/* Row `row` as floats (embedding lookup, verify). */
void matrix_row(const struct matrix *weights, int64_t row, float *out);

float half_to_float(uint16_t half);
uint16_t float_to_half(float value); /* nearest even */

#endif
