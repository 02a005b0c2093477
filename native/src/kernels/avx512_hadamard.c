/* The Hadamard transform for AVX-512: vectors of sixteen floats; what is narrower is AVX2's. */
#ifdef RONDEL_X86
#include <string.h>

#include "x86.h"

#define LANES 16
#define GROUP 16
typedef __m512 lanes;

static inline lanes load(const float *x) { return _mm512_loadu_ps(x); }
static inline void store(float *y, lanes v) { _mm512_storeu_ps(y, v); }
static inline lanes fused(lanes a, lanes b, lanes c) { return _mm512_fmadd_ps(a, b, c); }
static inline lanes spread(float x) { return _mm512_set1_ps(x); }

/* Minus where bit `shift` + lane of the word at `bits` is set. */
static inline lanes flip(lanes v, const uint8_t *bits, int shift) {
    int32_t word;
    memcpy(&word, bits, sizeof word);
    const __m512i last = _mm512_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16);
    __m512i up = _mm512_sllv_epi32(_mm512_set1_epi32(word), _mm512_sub_epi32(last, _mm512_set1_epi32(shift)));
    enum { XOR_OF_AND = 0x78 };
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_castps_si512(v), up, _mm512_set1_epi32(INT32_MIN), XOR_OF_AND));
}

/* The stage of lanes `distance` apart. The product with 1 or -1 is exact: the sum is rounded once. */
static inline lanes across(lanes v, int distance) {
    const __m512 eights = _mm512_setr_ps(1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m512 fours = _mm512_setr_ps(1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1);
    const __m512 twos = _mm512_setr_ps(1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1);
    const __m512 ones = _mm512_setr_ps(1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1);
    if (distance == 8) return fused(v, eights, _mm512_shuffle_f32x4(v, v, 0x4e));
    if (distance == 4) return fused(v, fours, _mm512_shuffle_f32x4(v, v, 0xb1));
    if (distance == 2) return fused(v, twos, _mm512_permute_ps(v, 0x4e));
    return fused(v, ones, _mm512_permute_ps(v, 0xb1));
}

#include "hadamard_lanes.h"
#include "hadamard_sums.h"

void avx512_sylvester(const float *x, float *y, int64_t count, int64_t length, const uint8_t *bits, int64_t first,
                      float scale) {
    sylvester(x, y, count, length, bits, first, scale);
}

void avx512_signed_sums(const struct signed_sums *base, int64_t count, const float *x, float *y, float scale) {
    if (base->inner < 8) avx2_narrow_sums(base, count, x, y, scale, avx512_signed_sums);
    else if (base->inner < LANES) avx2_signed_sums(base, count, x, y, scale);
    else wide_sums(base, count, x, y, scale);
}
#endif
