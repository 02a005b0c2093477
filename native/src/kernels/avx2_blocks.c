/* AVX2 dot products of ggml's block formats: the integer sums of scalar_blocks.c, eight partial sums at a time. */
#ifdef RONDEL_X86
#include "x86.h"

/* Sums of two products of unsigned codes <= 63 (127 x 63 x 2 < 2^15) and activation quants. */
static inline __m256i products(__m256i codes, const int8_t *x) { return _mm256_maddubs_epi16(codes, load_256(x)); }

static inline __m256i codes_q4_0(const void *block) {
    return _mm256_sub_epi8(nibbles_32(((const struct q4_0 *)block)->codes), _mm256_set1_epi8(8));
}
static inline __m256i codes_q4_1(const void *block) { return nibbles_32(((const struct q4_1 *)block)->codes); }
static inline __m256i codes_q5_0(const void *block) {
    const struct q5_0 *q = block;
    return _mm256_sub_epi8(fives_32(q->codes, q->high), _mm256_set1_epi8(16));
}
static inline __m256i codes_q5_1(const void *block) {
    const struct q5_1 *q = block;
    return fives_32(q->codes, q->high);
}
static inline __m256i codes_q8_0(const void *block) { return load_256(((const struct q8_0 *)block)->codes); }
static inline __m256i codes_iq4_nl(const void *block) {
    __m256i levels = _mm256_broadcastsi128_si256(load_128(iq4_levels));
    return _mm256_shuffle_epi8(levels, nibbles_32(((const struct iq4_nl *)block)->codes));
}

/* Eight blocks at a time, whose scales are converted together; then what is left. A minimum follows the scale. */
static inline float dot_blocks_of_32(const uint8_t *row, const void *packed, int64_t cols, int bytes, int with_min,
                                     __m256i (*codes)(const void *block)) {
    const int8_t *quants = packed;
    const float *scales = q8_scales(packed, cols), *sums = q8_sums(packed, cols);
    __m256 total = _mm256_setzero_ps();
    float mins = 0;
    int64_t blocks = cols / 32, i = 0;
    for (; i + 8 <= blocks; i += 8) {
        __m256i heads = heads_of_8(row, bytes);
        float scale[8], min[8];
        _mm256_storeu_ps(scale, _mm256_mul_ps(scales_of_8(heads), _mm256_loadu_ps(scales + i)));
        if (with_min) _mm256_storeu_ps(min, mins_of_8(heads));
        for (int j = 0; j < 8; j++, row += bytes, quants += 32) {
            total = add_scaled(total, scale[j], signed_fours(codes(row), quants));
            if (with_min) mins = fmaf(min[j], sums[i + j], mins);
        }
    }
    for (; i < blocks; i++, row += bytes, quants += 32) {
        total = add_scaled(total, load_half(row) * scales[i], signed_fours(codes(row), quants));
        if (with_min) mins = fmaf(load_half(row + 2), sums[i], mins);
    }
    return sum_of_floats(total) + mins;
}

#define DOT_32(name, with_min)                                                                        \
    float avx2_dot_##name(const void *row, const void *packed, int64_t cols) {                        \
        return dot_blocks_of_32(row, packed, cols, sizeof(struct name), with_min, codes_##name);      \
    }
DOT_32(q4_0, 0)
DOT_32(q4_1, 1)
DOT_32(q5_0, 0)
DOT_32(q5_1, 1)
DOT_32(q8_0, 0)
DOT_32(iq4_nl, 0)

/* Lanes 0..7 hold scale 2 i, lanes 8..15 scale 2 i + 1 of sixteen signed bytes. */
static inline __m256i scale_pair(__m128i scales, int i) {
    const __m128i spread = _mm_set_epi64x(0x0101010101010101, 0);
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(scales, _mm_add_epi8(spread, _mm_set1_epi8((char)(2 * i)))));
}

/* 32 of the 2-bit fields of Q2_K and Q3_K, field f of the run of 32 bytes. */
static inline __m256i fields_2(__m256i bytes, int f) {
    return _mm256_and_si256(_mm256_srl_epi16(bytes, _mm_cvtsi32_si128(2 * f)), _mm256_set1_epi8(3));
}

float avx2_dot_q2_k(const void *row, const void *packed, int64_t cols) {
    const struct q2_k *w = row;
    const struct q8_k *x = packed;
    __m256 total = _mm256_setzero_ps();
    for (const struct q2_k *end = w + cols / 256; w < end; w++, x++) {
        __m128i both = load_128(w->scales), four = _mm_set1_epi8(15);
        __m128i scales = _mm_and_si128(both, four), mins = _mm_and_si128(_mm_srli_epi16(both, 4), four);
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < 8; i++) {
            __m256i pairs = products(fields_2(load_256(w->codes + i / 4 * 32), i % 4), x->quants + 32 * i);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(scale_pair(scales, i), pairs));
        }
        total = add_scaled(total, -(load_half(w->min) * x->scale), dot_sums(x->sums, _mm256_cvtepi8_epi16(mins)));
        total = add_scaled(total, load_half(w->scale) * x->scale, sum);
    }
    return sum_of_floats(total);
}

/* With u = q + 4 in 0..7: q x = u x - 4 x, lane by lane. */
float avx2_dot_q3_k(const void *row, const void *packed, int64_t cols) {
    const struct q3_k *w = row;
    const struct q8_k *x = packed;
    __m256 total = _mm256_setzero_ps();
    for (const struct q3_k *end = w + cols / 256; w < end; w++, x++) {
        __m128i scales = _mm_sub_epi8(scales_q3_k(w->scales), _mm_set1_epi8(32));
        __m256i sum = _mm256_setzero_si256(), high = load_256(w->high), four = _mm256_set1_epi8(4);
        for (int i = 0; i < 8; i++) {
            __m256i bit = _mm256_set1_epi8((char)(1 << i));
            __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(high, bit), bit);
            __m256i codes = _mm256_or_si256(fields_2(load_256(w->codes + i / 4 * 32), i % 4), _mm256_and_si256(set, four));
            __m256i pairs = _mm256_sub_epi16(products(codes, x->quants + 32 * i), products(four, x->quants + 32 * i));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(scale_pair(scales, i), pairs));
        }
        total = add_scaled(total, load_half(w->scale) * x->scale, sum);
    }
    return sum_of_floats(total);
}

static inline __m256i q4_k_products(__m256i factors, const uint8_t *codes, const uint8_t *high, const struct q8_k *x) {
    __m256i sum = _mm256_setzero_si256(), nibble = _mm256_set1_epi8(15);
    int16_t scales[16];
    _mm256_storeu_si256((__m256i *)scales, factors); /* eight scales, then eight mins */
    for (int i = 0; i < 8; i++) {
        __m256i bytes = load_256(codes + i / 2 * 32);
        __m256i q = _mm256_and_si256(i % 2 ? _mm256_srli_epi16(bytes, 4) : bytes, nibble);
        if (high) {
            __m256i bit = _mm256_set1_epi8((char)(1 << i));
            __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(load_256(high), bit), bit);
            q = _mm256_or_si256(q, _mm256_and_si256(set, _mm256_set1_epi8(16)));
        }
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_set1_epi16(scales[i]), products(q, x->quants + 32 * i)));
    }
    return sum;
}

float avx2_dot_q4_k(const void *row, const void *packed, int64_t cols) {
    return dot_q4_k(row, packed, cols, q4_k_products);
}

float avx2_dot_q5_k(const void *row, const void *packed, int64_t cols) {
    return dot_q5_k(row, packed, cols, q4_k_products);
}

/* With u = q + 32 in 0..63: sum of s (q x) = sum of s (u x) - 32 sum of s sum(x). */
float avx2_dot_q6_k(const void *row, const void *packed, int64_t cols) {
    const struct q6_k *w = row;
    const struct q8_k *x = packed;
    __m256 total = _mm256_setzero_ps();
    for (const struct q6_k *end = w + cols / 256; w < end; w++, x++) {
        __m128i scales = load_128(w->scales);
        __m256i sum = _mm256_slli_epi32(dot_sums(x->sums, _mm256_cvtepi8_epi16(scales)), 5);
        sum = _mm256_sub_epi32(_mm256_setzero_si256(), sum);
        for (int i = 0; i < 8; i++) {
            int t = i % 4;
            __m256i low = load_256(w->low + i / 4 * 64 + t % 2 * 32), high = load_256(w->high + i / 4 * 32);
            low = _mm256_and_si256(t < 2 ? low : _mm256_srli_epi16(low, 4), _mm256_set1_epi8(15));
            __m256i codes = _mm256_or_si256(low, _mm256_slli_epi16(fields_2(high, t), 4));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(scale_pair(scales, i), products(codes, x->quants + 32 * i)));
        }
        total = add_scaled(total, load_half(w->scale) * x->scale, sum);
    }
    return sum_of_floats(total);
}
#endif
