/* Byte layouts: ggml's weight blocks as they lie in a file, and activations as `pack` prepares them.
 * Weight blocks have byte alignment (a file's tensor may start anywhere its alignment allows); all numbers are
 * little-endian, as is every machine this runs on. */
#ifndef RONDEL_BLOCKS_H
#define RONDEL_BLOCKS_H
#include <stdint.h>
#include <string.h>

/* Blocks of 32 weights. Element j < 16 is the low nibble of codes[j], element j + 16 the high one;
 * `high` holds the fifth bit of element j in bit j. */
struct q4_0 { uint8_t scale[2], codes[16]; };            /* d (q - 8) */
struct q4_1 { uint8_t scale[2], min[2], codes[16]; };    /* d q + m */
struct q5_0 { uint8_t scale[2], high[4], codes[16]; };   /* d (q - 16) */
struct q5_1 { uint8_t scale[2], min[2], high[4], codes[16]; };
struct q8_0 { uint8_t scale[2]; int8_t codes[32]; };     /* d q */
struct iq4_nl { uint8_t scale[2], codes[16]; };          /* d iq4_levels[q] */

/* Blocks of 256 weights; a "sub-block" is 16 (Q2, Q3, Q6) or 32 (Q4, Q5) of them with a scale of its own.
 * Q2, Q3: byte l of a run of 32 bytes holds elements l, 32 + l, 64 + l, 96 + l, lowest bits first.
 * Q4, Q5: byte l of a run of 32 bytes holds elements l (low nibble) and 32 + l. */
struct q2_k { uint8_t scales[16], codes[64], scale[2], min[2]; };             /* d s q - dmin m; byte = m << 4 | s */
struct q3_k { uint8_t high[32], codes[64], scales[12], scale[2]; };           /* d (s - 32) (q - 4) */
struct q4_k { uint8_t scale[2], min[2], scales[12], codes[128]; };            /* d s q - dmin m */
struct q5_k { uint8_t scale[2], min[2], scales[12], high[32], codes[128]; };
/* Q6: element 32 t + l of a half of 128: nibble (t / 2) of low[32 (t % 2) + l], two bits 2 t of high[l]. */
struct q6_k { uint8_t low[128], high[64]; int8_t scales[16]; uint8_t scale[2]; }; /* d s (q - 32) */

static const int8_t iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* Activations Q8_0, Q8_1: cols quants, padded to a multiple of 64, then the float scale of each 32 columns, for
 * Q8_1 then scale x sum of quants. Scales have passed through a half, as ggml's do. */
static inline int64_t q8_quants(int64_t cols) { return (cols + 63) / 64 * 64; }
static inline const float *q8_scales(const void *packed, int64_t cols) {
    return (const float *)((const int8_t *)packed + q8_quants(cols));
}
static inline const float *q8_sums(const void *packed, int64_t cols) { return q8_scales(packed, cols) + cols / 32; }

/* Activations Q8_K: 256 quants, their sums by 16, one scale; a whole number of cache lines. */
struct q8_k {
    int8_t quants[256];
    int16_t sums[16];
    float scale;
    uint8_t padding[28];
};

/* Activations TILE_G: cols quants, then the float scale of each G columns, then their int32 sum of quants (which
 * pays for the zero point of U2 and U4 in integers). */
static inline const float *tile_scales(const void *packed, int64_t cols) {
    return (const float *)((const int8_t *)packed + cols);
}
static inline const int32_t *tile_sums(const void *packed, int64_t cols, int64_t group) {
    return (const int32_t *)(tile_scales(packed, cols) + cols / group);
}

#endif
