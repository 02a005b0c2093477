/* The specification of ggml's block formats: integer sums within a scale, floats between scales. */
#include "codebooks.h"
#include "scalar.h"

static inline int32_t dot_codes(const int8_t *a, const int8_t *b, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* sum over blocks of (d dx) * sum(q x) + m * (dx sum(x)); the second term only for formats with a minimum. */
static inline float dot_blocks_of_32(const uint8_t *row, const void *packed, int64_t cols, int bytes, int with_min,
                                     void (*unpack)(const void *, struct unpacked_32 *)) {
    const int8_t *quants = packed;
    const float *scales = q8_scales(packed, cols), *sums = q8_sums(packed, cols);
    struct unpacked_32 block;
    float total = 0;
    for (int64_t i = 0; i < cols / 32; i++, row += bytes, quants += 32) {
        unpack(row, &block);
        total += block.scale * scales[i] * (float)dot_codes(block.codes, quants, 32);
        if (with_min) total -= block.offset * sums[i];
    }
    return total;
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

/* sum over blocks of (d dx) * sum_s scale_s sum(q x) - (dmin dx) * sum_s min_s sum(x), both sums in integers:
 * |sum| <= 256 * 63 * 31 * 127 for Q5_K, 256 * 128 * 32 * 127 for Q6_K, 256 * 32 * 127 * 127 for IQ4_XS: below 2^31. */
static inline float dot_blocks_of_256(const uint8_t *row, const struct q8_k *x, int64_t cols, int bytes,
                                      void (*unpack)(const void *, struct unpacked_256 *)) {
    struct unpacked_256 block;
    float total = 0;
    for (int64_t i = 0; i < cols / 256; i++, row += bytes, x++) {
        unpack(row, &block);
        int32_t products = 0, mins = 0;
        for (int s = 0; s < 16; s++) {
            products += block.scales[s] * dot_codes(block.codes + 16 * s, x->quants + 16 * s, 16);
            mins += block.mins[s] * x->sums[s];
        }
        total += block.scale * x->scale * (float)products - block.min * x->scale * (float)mins;
    }
    return total;
}

#define DOT_256(name)                                                                      \
    float scalar_dot_##name(const void *row, const void *packed, int64_t cols) {           \
        return dot_blocks_of_256(row, packed, cols, sizeof(struct name), unpack_##name);   \
    }
DOT_256(q2_k)
DOT_256(q3_k)
DOT_256(q4_k)
DOT_256(q5_k)
DOT_256(q6_k)
DOT_256(iq4_xs)
DOT_256(tq1_0)
DOT_256(tq2_0)
DOT_256(iq1_s)
DOT_256(iq1_m)
DOT_256(iq2_xxs)
DOT_256(iq2_xs)
DOT_256(iq2_s)
DOT_256(iq3_xxs)
DOT_256(iq3_s)
