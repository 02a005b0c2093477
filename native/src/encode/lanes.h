/* Eight floats at a time, one per sub-block (or per row of a tile): the arithmetic that every scale search shares.
 *
 * A lane is a sub-block, so sums over its weights need no horizontal step, and the result of a lane depends neither
 * on its neighbours nor on the instruction set: every operation below is one IEEE operation an element, never fused.
 * What the compiler does not find by itself is written for AVX2 too, with the same results. */
#ifndef RONDEL_ENCODE_LANES_H
#define RONDEL_ENCODE_LANES_H
#include <stdint.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define LANES 8

typedef float vec __attribute__((vector_size(32)));
typedef int32_t mask __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec splat(float value) { return (vec){value, value, value, value, value, value, value, value}; }

#ifdef __AVX2__
INLINE vec pick(mask where, vec yes, vec no) { return (vec)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)where); }

INLINE vec lesser(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); } /* b where one is NaN */

INLINE vec greater(vec a, vec b) { return (vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
INLINE vec pick(mask where, vec yes, vec no) { return (vec)(((mask)yes & where) | ((mask)no & ~where)); }

INLINE vec lesser(vec a, vec b) { return pick(a < b, a, b); }

INLINE vec greater(vec a, vec b) { return pick(a > b, a, b); }
#endif

INLINE vec magnitude(vec a) { return (vec)((mask)a & 0x7fffffff); }

/* Nearest whole number, ties to even; |a| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction. */
INLINE vec whole(vec a) { return (a + 12582912.0f) - 12582912.0f; }

/* The whole number in [lo, hi] nearest to a. */
INLINE vec whole_within(vec a, float lo, float hi) { return whole(lesser(greater(a, splat(lo)), splat(hi))); }

/* 1 / a, and 0 where a is 0: a scale of zero sends every weight to the middle code. */
INLINE vec inverse(vec a) { return pick(a == 0.0f, splat(0.0f), 1.0f / pick(a == 0.0f, splat(1.0f), a)); }

INLINE vec ratio(vec a, vec b) { return pick(b == 0.0f, splat(0.0f), a / pick(b == 0.0f, splat(1.0f), b)); }

INLINE float sum(vec a) { return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7])); }

#ifdef __AVX2__
/* Rows of eight become columns. */
INLINE void transpose(const __m256 from[LANES], vec to[LANES]) {
    __m256 pairs[LANES], quads[LANES];
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(from[i], from[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(from[i], from[i + 1]);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
            quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        to[i] = (vec)_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
        to[i + 4] = (vec)_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
}
#endif

/* Eight rows of `count` floats, `stride` apart, one a lane: to[i][l] = from[l * stride + i]. `count` is a multiple of 8. */
INLINE void load_lanes(const float *from, int64_t stride, int count, vec *to) {
#ifdef __AVX2__
    for (int i = 0; i < count; i += LANES) {
        __m256 rows[LANES];
#pragma GCC unroll 8
        for (int l = 0; l < LANES; l++) rows[l] = _mm256_loadu_ps(from + l * stride + i);
        transpose(rows, to + i);
    }
#else
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < count; i++) to[i][l] = from[l * stride + i];
#endif
}

/* The way back for four columns of whole numbers: their low bytes go to[l * stride ...] of every lane. */
INLINE void store_codes(const vec columns[4], int64_t stride, uint8_t *to) {
    mask four = {0};
    for (int i = 0; i < 4; i++) four |= (__builtin_convertvector(columns[i], mask) & 255) << 8 * i;
    for (int l = 0; l < LANES; l++) {
        int32_t lane = four[l];
        memcpy(to + l * stride, &lane, 4); /* little-endian, as the formats are */
    }
}

#endif
