/* AVX2 dot products of the codebook and ternary formats: blocks are unpacked to bytes first, so that every instruction
 * set shares one reading of their layouts; the integer sums are scalar_blocks.c's. */
#ifdef RONDEL_X86
#include <immintrin.h>

#include "codebooks.h"
#include "declare.h"

DECLARE_CODEBOOKS(avx2)

static inline float sum_of_floats(__m256 x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* Sums of two products of signed codes and activation quants: |q| * (x sign(q)), 127 x 127 x 2 < 2^15. */
static inline __m256i pairs(const int8_t *codes, const int8_t *x) {
    __m256i q = _mm256_loadu_si256((const __m256i *)codes);
    return _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(_mm256_loadu_si256((const __m256i *)x), q));
}

static inline float dot_blocks_of_256(const uint8_t *row, const struct q8_k *x, int64_t cols, int bytes,
                                      void (*unpack)(const void *, struct unpacked_256 *)) {
    struct unpacked_256 block;
    __m256 total = _mm256_setzero_ps();
    for (int64_t i = 0; i < cols / 256; i++, row += bytes, x++) {
        unpack(row, &block);
        __m256i sum = _mm256_setzero_si256();
        for (int s = 0; s < 16; s += 2) {
            __m256i scales = _mm256_set_m128i(_mm_set1_epi16(block.scales[s + 1]), _mm_set1_epi16(block.scales[s]));
            __m256i products = pairs(block.codes + 16 * s, x->quants + 16 * s);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(scales, products));
        }
        total = _mm256_fmadd_ps(_mm256_set1_ps(block.scale * x->scale), _mm256_cvtepi32_ps(sum), total);
    }
    return sum_of_floats(total);
}

#define DOT_256(name)                                                                    \
    float avx2_dot_##name(const void *row, const void *packed, int64_t cols) {           \
        return dot_blocks_of_256(row, packed, cols, sizeof(struct name), unpack_##name); \
    }
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

float avx2_dot_mxfp4(const void *row, const void *packed, int64_t cols) {
    const struct mxfp4 *w = row;
    const int8_t *quants = packed;
    const float *scales = q8_scales(packed, cols);
    struct unpacked_32 block;
    __m256 total = _mm256_setzero_ps();
    for (int64_t i = 0; i < cols / 32; i++) {
        unpack_mxfp4(w + i, &block);
        __m256i sum = _mm256_madd_epi16(pairs(block.codes, quants + 32 * i), _mm256_set1_epi16(1));
        total = _mm256_fmadd_ps(_mm256_set1_ps(block.scale * scales[i]), _mm256_cvtepi32_ps(sum), total);
    }
    return sum_of_floats(total);
}
#endif
