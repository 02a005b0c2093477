/* AVX-512 dot products of ggml's block formats: the integer sums of scalar_blocks.c, sixteen partial sums at a time. */
#ifdef RONDEL_X86
#include "x86.h"

static inline __m512i join(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* ---- blocks of 32: unsigned codes u = q + zero, two blocks a vector ---- */

static inline __m256i codes_q4_0(const void *block) { return nibbles_32(((const struct q4_0 *)block)->codes); }
static inline __m256i codes_q4_1(const void *block) { return nibbles_32(((const struct q4_1 *)block)->codes); }
static inline __m256i codes_q5_0(const void *block) {
    const struct q5_0 *q = block;
    return fives_32(q->codes, q->high);
}
static inline __m256i codes_q5_1(const void *block) {
    const struct q5_1 *q = block;
    return fives_32(q->codes, q->high);
}
static inline __m256i codes_q8_0(const void *block) {
    return _mm256_xor_si256(load_256(((const struct q8_0 *)block)->codes), _mm256_set1_epi8((char)128));
}
static inline __m256i codes_iq4_nl(const void *block) {
    __m128i levels = _mm_xor_si128(load_128(iq4_levels), _mm_set1_epi8((char)128));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), nibbles_32(((const struct iq4_nl *)block)->codes));
}

/* sum(q x) = sum(u x) - sum(zero x), each by vpdpbusd. */
static inline __m512 sums_of_codes(__m512i codes, __m512i x, int zero) {
    __m512i none = _mm512_setzero_si512(), sum = _mm512_dpbusd_epi32(none, codes, x);
    if (zero) sum = _mm512_sub_epi32(sum, _mm512_dpbusd_epi32(none, _mm512_set1_epi8((char)zero), x));
    return _mm512_cvtepi32_ps(sum);
}

/* Eight blocks at a time, whose scales are converted together and of which two share a vector until their sums are
 * floats, which are added block after block; then what is left, one by one beside zeros. A minimum follows the scale. */
static inline float dot_blocks_of_32(const uint8_t *row, const void *packed, int64_t cols, int bytes, int zero,
                                     int with_min, __m256i (*codes)(const void *block)) {
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
        for (int j = 0; j < 8; j += 2, row += 2 * bytes, quants += 64) {
            __m512 sum = sums_of_codes(join(codes(row), codes(row + bytes)), _mm512_loadu_si512(quants), zero);
            total = _mm256_fmadd_ps(_mm256_broadcast_ss(scale + j), _mm512_castps512_ps256(sum), total);
            total = _mm256_fmadd_ps(_mm256_broadcast_ss(scale + j + 1), _mm512_extractf32x8_ps(sum, 1), total);
        }
        for (int j = 0; with_min && j < 8; j++) mins = fmaf(min[j], sums[i + j], mins);
    }
    for (; i < blocks; i++, row += bytes, quants += 32) {
        __m512 sum = sums_of_codes(_mm512_zextsi256_si512(codes(row)), _mm512_zextsi256_si512(load_256(quants)), zero);
        total = _mm256_fmadd_ps(_mm256_set1_ps(load_half(row) * scales[i]), _mm512_castps512_ps256(sum), total);
        if (with_min) mins = fmaf(load_half(row + 2), sums[i], mins);
    }
    return sum_of_floats(total) + mins;
}

#define DOT_32(name, zero, with_min)                                                                   \
    float avx512_dot_##name(const void *row, const void *packed, int64_t cols) {                       \
        return dot_blocks_of_32(row, packed, cols, sizeof(struct name), zero, with_min, codes_##name); \
    }
DOT_32(q4_0, 8, 0)
DOT_32(q4_1, 0, 1)
DOT_32(q5_0, 16, 0)
DOT_32(q5_1, 0, 1)
DOT_32(q8_0, 128, 0)
DOT_32(iq4_nl, 128, 0)

/* ---- blocks of 256: maddubs of unsigned codes <= 63, then vpdpwssd with 16-bit scales; 4 x 64 codes ---- */

/* Word i of `table` where `index` says i. */
static inline __m512i spread(__m256i table, __m512i index) {
    return _mm512_permutexvar_epi16(index, _mm512_castsi256_si512(table));
}

/* Four times eight words: first + a, first + b, first + c, first + d. */
static inline __m512i indices(int a, int b, int c, int d, int first) {
    __m256i low = _mm256_set_m128i(_mm_set1_epi16((short)(b + first)), _mm_set1_epi16((short)(a + first)));
    __m256i high = _mm256_set_m128i(_mm_set1_epi16((short)(d + first)), _mm_set1_epi16((short)(c + first)));
    return join(low, high);
}

/* 32 bytes of the low half of a vector and 32 of the high half, each the `value`. */
static inline __m512i halves(int low, int high) {
    return join(_mm256_set1_epi8((char)low), _mm256_set1_epi8((char)high));
}

static inline __m512i accumulate(__m512i sum, __m512i scales, __m512i codes, __m512i x) {
    return _mm512_dpwssd_epi32(sum, _mm512_maddubs_epi16(codes, x), scales);
}

/* Q2, Q3, Q6: field t of both runs of 32 bytes, which is elements 32 t.. and 128 + 32 t... */
static inline __m512i quants_of_field(const struct q8_k *x, int t) {
    return join(load_256(x->quants + 32 * t), load_256(x->quants + 128 + 32 * t));
}
static inline __m512i scales_of_field(__m256i scales, int t) { return spread(scales, indices(0, 1, 8, 9, 2 * t)); }
static inline __m512i fields_2(__m512i bytes, int t) {
    return _mm512_and_si512(_mm512_srl_epi16(bytes, _mm_cvtsi32_si128(2 * t)), _mm512_set1_epi8(3));
}

/* Sixteen sums are those of eight lanes, twice. */
static inline __m256i lanes(__m512i sums) {
    return _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
}

float avx512_dot_q2_k(const void *row, const void *packed, int64_t cols) {
    const struct q2_k *w = row;
    const struct q8_k *x = packed;
    __m256 total = _mm256_setzero_ps();
    for (const struct q2_k *end = w + cols / 256; w < end; w++, x++) {
        __m128i both = load_128(w->scales), four = _mm_set1_epi8(15);
        __m256i scales = _mm256_cvtepi8_epi16(_mm_and_si128(both, four));
        __m256i mins = _mm256_cvtepi8_epi16(_mm_and_si128(_mm_srli_epi16(both, 4), four));
        __m512i codes = _mm512_loadu_si512(w->codes), sum = _mm512_setzero_si512();
        for (int t = 0; t < 4; t++)
            sum = accumulate(sum, scales_of_field(scales, t), fields_2(codes, t), quants_of_field(x, t));
        total = add_scaled(total, -(load_half(w->min) * x->scale), dot_sums(x->sums, mins));
        total = add_scaled(total, load_half(w->scale) * x->scale, lanes(sum));
    }
    return sum_of_floats(total);
}

/* With u = q + 4 in 0..7: q x = u x - 4 x, lane by lane. */
float avx512_dot_q3_k(const void *row, const void *packed, int64_t cols) {
    const struct q3_k *w = row;
    const struct q8_k *x = packed;
    __m256 total = _mm256_setzero_ps();
    for (const struct q3_k *end = w + cols / 256; w < end; w++, x++) {
        __m256i scales = _mm256_cvtepi8_epi16(_mm_sub_epi8(scales_q3_k(w->scales), _mm_set1_epi8(32)));
        __m512i sum = _mm512_setzero_si512(), four = _mm512_set1_epi8(4);
        __m512i codes = _mm512_loadu_si512(w->codes), high = _mm512_broadcast_i64x4(load_256(w->high));
        for (int t = 0; t < 4; t++) {
            __mmask64 set = _mm512_test_epi8_mask(high, halves(1 << t, 16 << t));
            __m512i u = fields_2(codes, t), quants = quants_of_field(x, t);
            u = _mm512_mask_add_epi8(u, set, u, four);
            __m512i pairs = _mm512_sub_epi16(_mm512_maddubs_epi16(u, quants), _mm512_maddubs_epi16(four, quants));
            sum = _mm512_dpwssd_epi32(sum, pairs, scales_of_field(scales, t));
        }
        total = add_scaled(total, load_half(w->scale) * x->scale, lanes(sum));
    }
    return sum_of_floats(total);
}

/* With u = q + 32 in 0..63: sum of s (q x) = sum of s (u x) - 32 sum of s sum(x). */
float avx512_dot_q6_k(const void *row, const void *packed, int64_t cols) {
    const struct q6_k *w = row;
    const struct q8_k *x = packed;
    __m256 total = _mm256_setzero_ps();
    for (const struct q6_k *end = w + cols / 256; w < end; w++, x++) {
        __m256i scales = _mm256_cvtepi8_epi16(load_128(w->scales));
        __m512i sum = _mm512_setzero_si512();
        __m512i first = _mm512_loadu_si512(w->low), second = _mm512_loadu_si512(w->low + 64);
        __m512i high = _mm512_loadu_si512(w->high), nibble = _mm512_set1_epi8(15);
        /* The run of 32 low bytes that fields 0 and 2 use, of both halves, and the run of fields 1 and 3. */
        __m512i low[2] = {_mm512_shuffle_i64x2(first, second, 0x44), _mm512_shuffle_i64x2(first, second, 0xee)};
        for (int t = 0; t < 4; t++) {
            __m512i four = t < 2 ? low[t] : _mm512_srli_epi16(low[t - 2], 4);
            __m512i u = _mm512_or_si512(_mm512_and_si512(four, nibble), _mm512_slli_epi16(fields_2(high, t), 4));
            sum = accumulate(sum, scales_of_field(scales, t), u, quants_of_field(x, t));
        }
        __m256i signed_sum = _mm256_sub_epi32(lanes(sum), _mm256_slli_epi32(dot_sums(x->sums, scales), 5));
        total = add_scaled(total, load_half(w->scale) * x->scale, signed_sum);
    }
    return sum_of_floats(total);
}

/* Vector v of 64 code bytes holds in its low nibbles the sub-blocks 4 v and 4 v + 2, in its high nibbles 4 v + 1 and
 * 4 v + 3. */
static inline __m256i q4_k_products(__m256i factors, const uint8_t *codes, const uint8_t *high, const struct q8_k *x) {
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < 4; i++) {
        int first = i / 2 * 4 + i % 2; /* the lower of the two sub-blocks */
        __m512i bytes = _mm512_loadu_si512(codes + i / 2 * 64);
        __m512i u = _mm512_and_si512(i % 2 ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
        if (high) {
            __m512i bits = _mm512_broadcast_i64x4(load_256(high));
            __mmask64 set = _mm512_test_epi8_mask(bits, halves(1 << first, 4 << first));
            u = _mm512_mask_add_epi8(u, set, u, _mm512_set1_epi8(16));
        }
        __m512i quants = join(load_256(x->quants + 32 * first), load_256(x->quants + 32 * first + 64));
        sum = accumulate(sum, spread(factors, indices(0, 0, 2, 2, first)), u, quants);
    }
    return lanes(sum);
}

float avx512_dot_q4_k(const void *row, const void *packed, int64_t cols) {
    return dot_q4_k(row, packed, cols, q4_k_products);
}

float avx512_dot_q5_k(const void *row, const void *packed, int64_t cols) {
    return dot_q5_k(row, packed, cols, q4_k_products);
}
#endif
