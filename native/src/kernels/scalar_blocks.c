/* The specification of ggml's block formats: integer sums within a scale, floats between scales.
 *
 * The order of the float operations is that of llama.cpp's AVX2 kernels (its decoding path), so that one file gives the
 * same bits in both programs: the next layer rounds activations to int8, and there the last bit of a sum matters. Eight
 * lanes run through a row, lane j with the elements 4 j .. 4 j + 3 of every 32; each block is one fused multiply-add. */
#include <math.h>

#include "codebooks.h"
#include "scalar.h"

static inline int32_t dot_codes(const int8_t *a, const int8_t *b, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* lanes += factor * sums; the result of a row is the sum of its lanes. */
static inline void add_lanes(float lanes[8], float factor, const int32_t sums[8]) {
    for (int j = 0; j < 8; j++) lanes[j] = fmaf(factor, (float)sums[j], lanes[j]);
}

/* sum over blocks of (d dx) * sum(q x) + m * (dx sum(x)); the second term only for formats with a minimum. */
static inline float dot_blocks_of_32(const uint8_t *row, const void *packed, int64_t cols, int bytes, int with_min,
                                     void (*unpack)(const void *, struct unpacked_32 *)) {
    const int8_t *quants = packed;
    const float *scales = q8_scales(packed, cols), *sums = q8_sums(packed, cols);
    struct unpacked_32 block;
    float lanes[8] = {0}, mins = 0;
    for (int64_t i = 0; i < cols / 32; i++, row += bytes, quants += 32) {
        int32_t products[8];
        unpack(row, &block);
        for (int j = 0; j < 8; j++) products[j] = dot_codes(block.codes + 4 * j, quants + 4 * j, 4);
        add_lanes(lanes, block.scale * scales[i], products);
        if (with_min) mins = fmaf(-block.offset, sums[i], mins);
    }
    return sum_of_lanes(lanes) + mins;
}

#define DOT_32(name, with_min)                                                               \
    float scalar_dot_##name(const void *row, const void *packed, int64_t cols) {             \
        return dot_blocks_of_32(row, packed, cols, sizeof(struct name), with_min, unpack_##name); \
    }
DOT_32(q4_0, 0)
DOT_32(q4_1, 1)
DOT_32(q5_0, 0)
DOT_32(q5_1, 1)
DOT_32(q8_0, 0)
DOT_32(iq4_nl, 0)
DOT_32(mxfp4, 0)

/* Blocks of 64 or 128 beside activations in blocks of 32: each part of 32 is a block of its own with the same scale. */
static inline float dot_parts(const uint8_t *row, const void *packed, int64_t cols, int columns, int bytes,
                              void (*unpack)(const void *, int, struct unpacked_32 *)) {
    const int8_t *quants = packed;
    const float *scales = q8_scales(packed, cols);
    struct unpacked_32 part;
    float lanes[8] = {0};
    for (int64_t i = 0; i < cols; i += 32) {
        int32_t products[8];
        unpack(row + i / columns * bytes, (int)(i % columns / 32), &part);
        for (int j = 0; j < 8; j++) products[j] = dot_codes(part.codes + 4 * j, quants + i + 4 * j, 4);
        add_lanes(lanes, part.scale * scales[i / 32], products);
    }
    return sum_of_lanes(lanes);
}

float scalar_dot_q1_0(const void *row, const void *packed, int64_t cols) {
    return dot_parts(row, packed, cols, 128, sizeof(struct q1_0), unpack_q1_0);
}

float scalar_dot_q2_0(const void *row, const void *packed, int64_t cols) {
    return dot_parts(row, packed, cols, 64, sizeof(struct q2_0), unpack_q2_0);
}

/* Each lane's share of sum_s scale_s sum(q x). All sums of lanes are below 2^31:
 * 256 * 63 * 31 * 127 for Q5_K, 256 * 128 * 32 * 127 for Q6_K, 256 * 32 * 127 * 127 for IQ4_XS. */
static inline void lane_products(const struct unpacked_256 *block, const struct q8_k *x, int32_t lanes[8]) {
    memset(lanes, 0, 8 * sizeof *lanes);
    for (int i = 0; i < 64; i++)
        lanes[i % 8] += block->scales[i / 4] * dot_codes(block->codes + 4 * i, x->quants + 4 * i, 4);
}

/* sum_s factor_s sum(x): lane j has the sub-blocks 2 j and 2 j + 1. */
static inline void lane_sums(const int16_t factors[16], const struct q8_k *x, int32_t lanes[8]) {
    for (int j = 0; j < 8; j++) lanes[j] = factors[2 * j] * x->sums[2 * j] + factors[2 * j + 1] * x->sums[2 * j + 1];
}

static inline int32_t total_of(const int32_t lanes[8]) {
    int32_t sum = 0;
    for (int j = 0; j < 8; j++) sum += lanes[j];
    return sum;
}

/* sum over blocks of (d dx) * sum_s scale_s sum(q x). Where codes are u = q + zero on their way to a product, a lane
 * has sum(u x) of its elements and zero * sum(x) of its two sub-blocks. */
static inline float dot_blocks_of_256(const uint8_t *row, const struct q8_k *x, int64_t cols, int bytes, int zero,
                                      void (*unpack)(const void *, struct unpacked_256 *)) {
    struct unpacked_256 block;
    float lanes[8] = {0};
    for (int64_t i = 0; i < cols / 256; i++, row += bytes, x++) {
        int32_t products[8], zeros[8];
        unpack(row, &block);
        for (int j = 0; j < 256; j++) block.codes[j] = (int8_t)(block.codes[j] + zero);
        lane_products(&block, x, products);
        lane_sums(block.scales, x, zeros);
        for (int j = 0; j < 8; j++) products[j] -= zero * zeros[j];
        add_lanes(lanes, block.scale * x->scale, products);
    }
    return sum_of_lanes(lanes);
}

#define DOT_256(name, zero)                                                                    \
    float scalar_dot_##name(const void *row, const void *packed, int64_t cols) {               \
        return dot_blocks_of_256(row, packed, cols, sizeof(struct name), zero, unpack_##name); \
    }
DOT_256(q3_k, 0)
DOT_256(q6_k, 32)
DOT_256(iq4_xs, 0)
DOT_256(tq1_0, 0)
DOT_256(tq2_0, 1)
DOT_256(iq1_s, 0)
DOT_256(iq1_m, 0)
DOT_256(iq2_xxs, 0)
DOT_256(iq2_xs, 0)
DOT_256(iq2_s, 0)
DOT_256(iq3_xxs, 0)
DOT_256(iq3_s, 0)

/* Minima, -(dmin dx) * sum_s min_s sum(x), go into the lanes. */
float scalar_dot_q2_k(const void *row, const void *packed, int64_t cols) {
    const struct q2_k *w = row;
    const struct q8_k *x = packed;
    struct unpacked_256 block;
    float lanes[8] = {0};
    for (int64_t i = 0; i < cols / 256; i++, x++) {
        int32_t products[8], mins[8];
        unpack_q2_k(w + i, &block);
        lane_sums(block.mins, x, mins);
        lane_products(&block, x, products);
        add_lanes(lanes, -(block.min * x->scale), mins);
        add_lanes(lanes, block.scale * x->scale, products);
    }
    return sum_of_lanes(lanes);
}

/* llama.cpp interleaves eight rows of Q4_K, one in each lane: to one row, lanes do not exist. */
float scalar_dot_q4_k(const void *row, const void *packed, int64_t cols) {
    const struct q4_k *w = row;
    const struct q8_k *x = packed;
    struct unpacked_256 block;
    float total = 0, subtracted = 0;
    for (int64_t i = 0; i < cols / 256; i++, x++) {
        int32_t products[8], mins[8];
        unpack_q4_k(w + i, &block);
        lane_products(&block, x, products);
        lane_sums(block.mins, x, mins);
        total = fmaf((float)total_of(products), block.scale * x->scale, total);
        subtracted = fmaf((float)total_of(mins), block.min * x->scale, subtracted);
    }
    return total - subtracted;
}

/* Products in lanes, minima in one sum. */
float scalar_dot_q5_k(const void *row, const void *packed, int64_t cols) {
    const struct q5_k *w = row;
    const struct q8_k *x = packed;
    struct unpacked_256 block;
    float lanes[8] = {0}, subtracted = 0;
    for (int64_t i = 0; i < cols / 256; i++, x++) {
        int32_t products[8], mins[8];
        unpack_q5_k(w + i, &block);
        lane_products(&block, x, products);
        lane_sums(block.mins, x, mins);
        add_lanes(lanes, block.scale * x->scale, products);
        subtracted = fmaf((float)total_of(mins), block.min * x->scale, subtracted);
    }
    return sum_of_lanes(lanes) - subtracted;
}
