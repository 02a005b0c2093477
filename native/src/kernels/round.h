/* Roundings of activations that every instruction set must repeat to the bit. */
#ifndef RONDEL_ROUND_H
#define RONDEL_ROUND_H
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Below this magnitude 127 / maximum overflows; ggml's half scale is already zero there, so the block is zero. */
#define Q8_SMALLEST 1e-30f

/* |x| as an integer: the order of magnitudes, with infinity and then NaN on top, so that neither gets lost. */
static inline int32_t magnitude_bits(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffff;
}

static inline float float_of_bits(int32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* 127 / maximum; 0, which means "all quants are zero", where the block is zero or holds an infinity or a NaN. */
static inline float q8_factor(float maximum) {
    return maximum >= Q8_SMALLEST && maximum < INFINITY ? 127.0f / maximum : 0.0f;
}

/* The scale of a Q8_K block, where factor is +-q8_factor(maximum): not finite stays so, zero and next to it is 0. */
static inline float q8_k_scale(float maximum, float factor) {
    return factor != 0 ? 1.0f / factor : maximum < Q8_SMALLEST ? 0.0f : maximum;
}

/* To nearest even for |value| <= 127.5, by pushing the integer into the low bits of 1.5 x 2^23. */
static inline int8_t nearest_int8(float value) {
    float shifted = value + 12582912.0f;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    return (int8_t)bits;
}

static inline uint16_t float_to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64); /* NaN, quiet */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float bfloat_to_float(uint16_t bfloat) {
    uint32_t bits = (uint32_t)bfloat << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

#endif
