/* The scalar instruction set, which is the specification: activations, float rows, and the table. */
#include <math.h>
#include <string.h>

#include "blocks.h"
#include "kernels.h"
#include "round.h"
#include "scalar.h"

static int usable(void) { return 1; }

static void pack_f32(const float *x, int64_t cols, void *packed) { memcpy(packed, x, (size_t)cols * 4); }

static void pack_f16(const float *x, int64_t cols, void *packed) {
    uint16_t *halves = packed;
    for (int64_t i = 0; i < cols; i++) halves[i] = float_to_half(x[i]);
}

static void pack_bf16(const float *x, int64_t cols, void *packed) {
    uint16_t *out = packed;
    for (int64_t i = 0; i < cols; i++) out[i] = float_to_bfloat(x[i]);
}

static float absolute_maximum(const float *x, int64_t n) {
    int32_t maximum = 0;
    for (int64_t i = 0; i < n; i++) maximum = magnitude_bits(x[i]) > maximum ? magnitude_bits(x[i]) : maximum;
    return float_of_bits(maximum);
}

/* quants[i] = x[i] * factor to nearest even, in -127..127, or all zero for a zero factor; returns their sum. */
static int32_t quantize(const float *x, int64_t n, float factor, int8_t *quants) {
    memset(quants, 0, (size_t)n);
    if (factor == 0) return 0;
    int32_t sum = 0;
    for (int64_t i = 0; i < n; i++) {
        quants[i] = nearest_int8(x[i] * factor);
        sum += quants[i];
    }
    return sum;
}

/* ggml's rounding on x86 and Arm: factor 127 / maximum, nearest even; its portable fallback rounds ties away. */
static void pack_q8(const float *x, int64_t cols, void *packed, int with_sums) {
    int8_t *quants = packed;
    float *scales = (float *)q8_scales(packed, cols), *sums = (float *)q8_sums(packed, cols);
    memset(quants + cols, 0, (size_t)(q8_quants(cols) - cols));
    for (int64_t i = 0; i < cols / 32; i++) {
        float maximum = absolute_maximum(x + 32 * i, 32), scale = maximum / 127.0f;
        int32_t sum = quantize(x + 32 * i, 32, q8_factor(maximum), quants + 32 * i);
        scales[i] = half_to_float(float_to_half(scale));
        if (with_sums) sums[i] = half_to_float(float_to_half(scale * (float)sum));
    }
}

static void pack_q8_0(const float *x, int64_t cols, void *packed) { pack_q8(x, cols, packed, 0); }
static void pack_q8_1(const float *x, int64_t cols, void *packed) { pack_q8(x, cols, packed, 1); }

/* The value of largest magnitude, the first of equals, becomes -127. */
static void pack_q8_k(const float *x, int64_t cols, void *packed) {
    struct q8_k *out = packed;
    for (int64_t block = 0; block < cols / 256; block++, x += 256, out++) {
        float maximum = absolute_maximum(x, 256), factor = q8_factor(maximum);
        int first = 0;
        while (magnitude_bits(x[first]) != magnitude_bits(maximum)) first++;
        if (x[first] > 0) factor = -factor;
        memset(out, 0, sizeof *out);
        for (int i = 0; i < 16; i++) out->sums[i] = (int16_t)quantize(x + 16 * i, 16, factor, out->quants + 16 * i);
        out->scale = q8_k_scale(maximum, factor);
    }
}

static void pack_tile(const float *x, int64_t cols, void *packed, int group) {
    int8_t *quants = packed;
    float *scales = (float *)tile_scales(packed, cols);
    int32_t *sums = (int32_t *)tile_sums(packed, cols, group);
    for (int64_t g = 0; g < cols / group; g++, x += group, quants += group) {
        float maximum = absolute_maximum(x, group);
        sums[g] = quantize(x, group, q8_factor(maximum), quants);
        scales[g] = maximum / 127.0f;
    }
}

static void pack_tile_64(const float *x, int64_t cols, void *packed) { pack_tile(x, cols, packed, 64); }
static void pack_tile_128(const float *x, int64_t cols, void *packed) { pack_tile(x, cols, packed, 128); }
static void pack_tile_256(const float *x, int64_t cols, void *packed) { pack_tile(x, cols, packed, 256); }

/* Float rows in the order of llama.cpp's AVX2 kernels too (scalar_blocks.c says why): 32 running sums, element i in
 * sum i % 32, each step fused; they are folded as four vectors of eight, then neighbour with neighbour; what is left
 * of a row follows one by one in double. */
static float fold(const float sums[32]) {
    float eight[8], four[4];
    for (int j = 0; j < 8; j++) eight[j] = (sums[j] + sums[16 + j]) + (sums[8 + j] + sums[24 + j]);
    for (int j = 0; j < 4; j++) four[j] = eight[j] + eight[4 + j];
    return (four[0] + four[1]) + (four[2] + four[3]);
}

/* sum of ONE(a) ONE(b). */
#define DOT(ONE)                                                                             \
    float sums[32] = {0};                                                                    \
    int64_t i = 0;                                                                           \
    for (; i + 32 <= n; i += 32)                                                             \
        for (int j = 0; j < 32; j++) sums[j] = fmaf(ONE(a[i + j]), ONE(b[i + j]), sums[j]);  \
    double total = fold(sums);                                                               \
    for (; i < n; i++) total += (double)(ONE(a[i]) * ONE(b[i]));                             \
    return (float)total

static float dot_f32(const float *a, const float *b, int64_t n) { DOT(); }
static float dot_f16(const uint16_t *a, const uint16_t *b, int64_t n) { DOT(half_to_float); }
static float dot_bf16(const uint16_t *a, const uint16_t *b, int64_t n) { DOT(bfloat_to_float); }

static float dot_row_f32(const void *row, const void *packed, int64_t cols) { return dot_f32(row, packed, cols); }
static float dot_row_f16(const void *row, const void *packed, int64_t cols) { return dot_f16(row, packed, cols); }
static float dot_row_bf16(const void *row, const void *packed, int64_t cols) { return dot_bf16(row, packed, cols); }

static void axpy_f32(float *y, float scale, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += scale * x[i];
}

static void fma_f16(uint16_t *y, float scale, const uint16_t *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = float_to_half(fmaf(scale, half_to_float(x[i]), half_to_float(y[i])));
}

/* exp(x) = 2^n exp(b) with x = n log 2 + b, by the polynomial of Arm's optimized routines: 2 units in the last place, and
 * what llama.cpp's vectors compute. Beyond |n| = 126 the power of two is made of two factors. */
static float exponential(float x) {
    float shifted = fmaf(x, 0x1.715476p+0f, 0x1.8p23f), n = shifted - 0x1.8p23f;
    float b = fmaf(-n, 0x1.7f7d1cp-20f, fmaf(-n, 0x1.62e4p-1f, x)), square = b * b;
    float high = fmaf(0x1.0e4020p-7f, b, 0x1.573e2ep-5f), low = fmaf(0x1.555e66p-3f, b, 0x1.fffdb6p-2f);
    float rest = fmaf(fmaf(high, square, low), square, 0x1.ffffecp-1f * b); /* exp(b) - 1 */
    uint32_t bits, split = n <= 0 ? 0x82000000u : 0;
    memcpy(&bits, &shifted, 4);
    bits <<= 23;
    float power = float_of_bits((int32_t)(bits + 0x3f800000u)), first = float_of_bits((int32_t)(split + 0x7f000000u));
    if (fabsf(n) > 192) return first * first;
    if (!(fabsf(n) > 126)) return fmaf(power, rest, power);
    power = float_of_bits((int32_t)(bits - split));
    return fmaf(power, rest, power) * first;
}

/* Whole eights by the polynomial, the rest by libm, as llama.cpp does. */
static void swiglu(float *gate, const float *up, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float power = i < n / 8 * 8 ? exponential(-gate[i]) : expf(-gate[i]);
        gate[i] = gate[i] / (1.0f + power) * up[i];
    }
}

static void turn(float *a, float *b, const float *cosines, const float *sines, int64_t pairs, int64_t step) {
    for (int64_t i = 0; i < pairs; i++) {
        float first = a[i * step], second = b[i * step];
        a[i * step] = fmaf(first, cosines[i], -(second * sines[i]));
        b[i * step] = fmaf(first, sines[i], second * cosines[i]);
    }
}

const struct kernels kernels_scalar = {
    .name = "scalar",
    .usable = usable,
    .pack = {[ACT_F32] = pack_f32, [ACT_F16] = pack_f16, [ACT_BF16] = pack_bf16, [ACT_Q8_0] = pack_q8_0,
             [ACT_Q8_1] = pack_q8_1, [ACT_Q8_K] = pack_q8_k, [ACT_TILE_64] = pack_tile_64,
             [ACT_TILE_128] = pack_tile_128, [ACT_TILE_256] = pack_tile_256},
    .dot = {[FMT_F32] = dot_row_f32, [FMT_F16] = dot_row_f16, [FMT_BF16] = dot_row_bf16, BLOCK_DOTS(scalar),
            CODEBOOK_DOTS(scalar)},
    .panel = {TILE_PANELS(scalar)},
    .dot_f32 = dot_f32,
    .dot_f16 = dot_f16,
    .axpy_f32 = axpy_f32,
    .fma_f16 = fma_f16,
    .sylvester = scalar_sylvester,
    .signed_sums = scalar_signed_sums,
    .swiglu = swiglu,
    .turn = turn,
};
