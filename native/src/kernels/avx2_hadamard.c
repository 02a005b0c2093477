/* The Hadamard transform for AVX2: vectors of eight floats. */
#ifdef RONDEL_X86
#include <string.h>

#include "x86.h"

#define LANES 8
#define GROUP 8
#define TILE 2
typedef __m256 lanes;

static inline lanes load(const float *x) { return _mm256_loadu_ps(x); }
static inline void store(float *y, lanes v) { _mm256_storeu_ps(y, v); }
static inline lanes fused(lanes a, lanes b, lanes c) { return _mm256_fmadd_ps(a, b, c); }
static inline lanes spread(float x) { return _mm256_set1_ps(x); }

/* Minus where bit `shift` + lane of the word at `bits` is set. */
static inline lanes flip(lanes v, const uint8_t *bits, int shift) {
    int32_t word;
    memcpy(&word, bits, sizeof word);
    __m256i up = _mm256_sub_epi32(_mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24), _mm256_set1_epi32(shift));
    __m256i minus = _mm256_and_si256(_mm256_sllv_epi32(_mm256_set1_epi32(word), up), _mm256_set1_epi32(INT32_MIN));
    return _mm256_xor_ps(v, _mm256_castsi256_ps(minus));
}

/* The stage of lanes `distance` apart. The product with 1 or -1 is exact: the sum is rounded once. */
static inline lanes across(lanes v, int distance) {
    if (distance == 4) return fused(v, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(v, v, 1));
    if (distance == 2) return fused(v, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(v, 0x4e));
    return fused(v, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(v, 0xb1));
}

#include "hadamard_lanes.h"

void avx2_sylvester(const float *x, float *y, int64_t count, int64_t length, const uint8_t *bits, int64_t first,
                    float scale) {
    sylvester(x, y, count, length, bits, first, scale);
}

/* x[0 .. inner) again and again. */
static inline lanes repeat(const float *x, int64_t inner) {
    if (inner == 4) return _mm256_broadcast_ps((const __m128 *)x);
    if (inner == 1) return _mm256_broadcast_ss(x);
    double two;
    memcpy(&two, x, sizeof two);
    return _mm256_castpd_ps(_mm256_set1_pd(two));
}

/* `vectors` vectors of outputs. coefficients: (order, total), those of the first output first. */
INLINE void narrow_tile(const float *coefficients, int order, int64_t inner, const float *x, float *y, int vectors,
                        float scale) {
    lanes sums[8];
    for (int v = 0; v < vectors; v++) sums[v] = spread(0);
    for (int j = 0; j < order; j++, coefficients += order * inner) {
        lanes repeated = repeat(x + j * inner, inner);
        for (int v = 0; v < vectors; v++) sums[v] = fused(load(coefficients + v * LANES), repeated, sums[v]);
    }
    for (int v = 0; v < vectors; v++) store(y + v * LANES, sums[v] * spread(scale));
}

/* The last tile overlaps the one before where tiles do not divide the outputs; `inner` divides where it begins. */
INLINE void narrow_sums(const float *coefficients, int order, int64_t inner, const float *x, float *y, float scale) {
    int64_t total = order * inner, vectors = total >= 8 * LANES ? 8 : total >= 4 * LANES ? 4 : 1;
    for (int64_t next = 0; next < total; next += vectors * LANES) {
        int64_t out = next + vectors * LANES <= total ? next : total - vectors * LANES;
        if (vectors == 8) narrow_tile(coefficients + out, order, inner, x, y + out, 8, scale);
        else if (vectors == 4) narrow_tile(coefficients + out, order, inner, x, y + out, 4, scale);
        else narrow_tile(coefficients + out, order, inner, x, y + out, 1, scale);
    }
}

void avx2_signed_sums(const float *coefficients, int order, int64_t inner, const float *x, float *y, float scale) {
    if (inner == 1) narrow_sums(coefficients, order, 1, x, y, scale);
    else if (inner == 2) narrow_sums(coefficients, order, 2, x, y, scale);
    else if (inner == 4) narrow_sums(coefficients, order, 4, x, y, scale);
    else wide_sums(coefficients, order, inner, x, y, scale);
}
#endif
