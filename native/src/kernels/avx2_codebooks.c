/* AVX2 dot products of the codebook and ternary formats: codewords are unpacked to bytes first, by the
 * same functions as for decoding; the integer sums are scalar_blocks.c's. */
#ifdef RONDEL_X86
#include "codebooks.h"
#include "x86.h"

/* 32 codes that are places in a table of 16 levels. */
static inline __m256i levels_32(const uint8_t codes[16], const int8_t levels[16]) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_128(levels)), nibbles_32(codes));
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
            __m256i products = signed_pairs(load_256(block.codes + 16 * s), x->quants + 16 * s);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(scales, products));
        }
        total = add_scaled(total, block.scale * x->scale, sum);
    }
    return sum_of_floats(total);
}

#define DOT_256(name)                                                                    \
    float avx2_dot_##name(const void *row, const void *packed, int64_t cols) {           \
        return dot_blocks_of_256(row, packed, cols, sizeof(struct name), unpack_##name); \
    }
DOT_256(tq1_0)
DOT_256(iq1_s)
DOT_256(iq1_m)
DOT_256(iq2_xxs)
DOT_256(iq2_xs)
DOT_256(iq2_s)
DOT_256(iq3_xxs)
DOT_256(iq3_s)

float avx2_dot_iq4_xs(const void *row, const void *packed, int64_t cols) {
    const struct iq4_xs *w = row;
    const struct q8_k *x = packed;
    __m256 total = _mm256_setzero_ps();
    for (const struct iq4_xs *end = w + cols / 256; w < end; w++, x++) {
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < 8; i++) {
            int low = w->scales_low[i / 2] >> i % 2 * 4 & 15, high = word_at(w->scales_high) >> 2 * i & 3;
            __m256i products = signed_pairs(levels_32(w->codes + 16 * i, iq4_levels), x->quants + 32 * i);
            __m256i scale = _mm256_set1_epi16((short)((low | high << 4) - 32));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(scale, products));
        }
        total = add_scaled(total, load_half(w->scale) * x->scale, sum);
    }
    return sum_of_floats(total);
}

/* With u = q + 1 in 0..3: sum(q x) = sum(u x) - sum(x); 8 x 3 x 127 x 2 < 2^15. */
float avx2_dot_tq2_0(const void *row, const void *packed, int64_t cols) {
    const struct tq2_0 *w = row;
    const struct q8_k *x = packed;
    const __m256i three = _mm256_set1_epi8(3);
    __m256 total = _mm256_setzero_ps();
    for (const struct tq2_0 *end = w + cols / 256; w < end; w++, x++) {
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < 8; i++) {
            __m256i fields = _mm256_srl_epi16(load_256(w->codes + i / 4 * 32), _mm_cvtsi32_si128(i % 4 * 2));
            fields = _mm256_and_si256(fields, three);
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(fields, load_256(x->quants + 32 * i)));
        }
        sum = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
        sum = _mm256_sub_epi32(sum, dot_sums(x->sums, _mm256_set1_epi16(1)));
        total = add_scaled(total, load_half(w->scale) * x->scale, sum);
    }
    return sum_of_floats(total);
}

/* Columns 32 part .. of a block as bytes. */
static inline __m256i codes_mxfp4(const void *block, int part) {
    return levels_32(((const struct mxfp4 *)block)->codes + 16 * part, mxfp4_levels);
}

static inline __m256i codes_q1_0(const void *block, int part) {
    __m256i twice = _mm256_srli_epi16(fifth_bits_32(((const struct q1_0 *)block)->codes + 4 * part), 3);
    return _mm256_sub_epi8(twice, _mm256_set1_epi8(1));
}

static inline __m256i codes_q2_0(const void *block, int part) {
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6,
                                            6, 7, 7, 7, 7);
    int64_t bytes;
    memcpy(&bytes, ((const struct q2_0 *)block)->codes + 8 * part, 8);
    __m256i four = _mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), spread);
    __m256i codes = _mm256_and_si256(four, _mm256_set1_epi32(3));
    codes = _mm256_or_si256(codes, _mm256_and_si256(_mm256_srli_epi16(four, 2), _mm256_set1_epi32(3 << 8)));
    codes = _mm256_or_si256(codes, _mm256_and_si256(_mm256_srli_epi16(four, 4), _mm256_set1_epi32(3 << 16)));
    codes = _mm256_or_si256(codes, _mm256_and_si256(_mm256_srli_epi16(four, 6), _mm256_set1_epi32(3 << 24)));
    return _mm256_sub_epi8(codes, _mm256_set1_epi8(1));
}

static inline float scale_mxfp4(const void *block) { return mxfp4_scale(((const struct mxfp4 *)block)->exponent); }
static inline float scale_q1_0(const void *block) { return load_half(((const struct q1_0 *)block)->scale); }
static inline float scale_q2_0(const void *block) { return load_half(((const struct q2_0 *)block)->scale); }

/* Blocks of 32, 64 or 128 columns beside activations in blocks of 32: each part of 32 has the scale of its block. */
static inline float dot_parts(const uint8_t *row, const void *packed, int64_t cols, int columns, int bytes,
                              float (*scale)(const void *), __m256i (*codes)(const void *, int)) {
    const int8_t *quants = packed;
    const float *scales = q8_scales(packed, cols);
    __m256 total = _mm256_setzero_ps();
    for (int64_t i = 0; i < cols; i += 32) {
        const uint8_t *block = row + i / columns * bytes;
        __m256i sum = signed_fours(codes(block, (int)(i % columns / 32)), quants + i);
        total = add_scaled(total, scale(block) * scales[i / 32], sum);
    }
    return sum_of_floats(total);
}

#define DOT_PARTS(name, columns)                                                                       \
    float avx2_dot_##name(const void *row, const void *packed, int64_t cols) {                         \
        return dot_parts(row, packed, cols, columns, sizeof(struct name), scale_##name, codes_##name); \
    }
DOT_PARTS(mxfp4, 32)
DOT_PARTS(q1_0, 128)
DOT_PARTS(q2_0, 64)
#endif
