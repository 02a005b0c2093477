/* Roundings of activations that every instruction set must repeat to the bit. */
#ifndef RONDEL_ROUND_H
#define RONDEL_ROUND_H
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Below this magnitude 127 / maximum overflows; ggml's half scale is already zero there, so the block is zero. */
#define Q8_SMALLEST 1e-30f

static inline float q8_factor(float maximum) {
    float magnitude = fabsf(maximum);
    return magnitude >= Q8_SMALLEST && magnitude <= 3e38f ? 127.0f / magnitude : 0.0f;
}

/* To nearest even for |value| <= 127.5, by pushing the integer into the low bits of 1.5 x 2^23; never undefined. */
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
