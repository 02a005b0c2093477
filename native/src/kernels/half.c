/* Half precision in plain C, for every machine: exact widening, narrowing to nearest even. */
#include <string.h>

#include "kernels.h"

float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3ff, bits;
    if (exponent == 0) {
        float value = (float)mantissa * 0x1p-24f; /* zero and subnormals, exact */
        memcpy(&bits, &value, 4);
        bits |= sign;
    } else if (exponent == 31) {
        bits = sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0); /* NaN comes out quiet */
    } else {
        bits = sign | (exponent + 112) << 23 | mantissa << 13;
    }
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00 | (bits >> 13 & 0x3ff); /* NaN keeps its payload, quiet */
    if (bits >= 0x477ff000) return sign | 0x7c00;                       /* 65520 and above round to infinity */
    if (bits < 0x38800000) {                                            /* below 2^-14: a subnormal half */
        if (bits <= 0x33000000) return sign;                            /* 2^-25 ties to zero */
        uint32_t shift = 126 - (bits >> 23), mantissa = (bits & 0x7fffff) | 0x800000;
        uint32_t half = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), middle = 1u << (shift - 1);
        return sign | (half + (rest > middle || (rest == middle && half & 1)));
    }
    bits -= 112u << 23;
    return sign | ((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}
