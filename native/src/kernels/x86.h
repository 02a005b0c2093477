/* What the AVX2 and AVX-512 files share: the functions behind their tables, and small pieces of AVX2. Included only by
 * files compiled with at least -mavx2 -mfma -mf16c. */
#ifndef RONDEL_X86_H
#define RONDEL_X86_H
#include <immintrin.h>
#include <math.h>

#include "blocks.h"
#include "declare.h"

int avx2_usable(void);   /* dispatch.c, which is compiled for every processor */
int avx512_usable(void);

/* The AVX2 functions that the AVX-512 table takes over, or uses for what is left at the end of a row. */
void avx2_pack_f32(const float *x, int64_t cols, void *packed);
void avx2_pack_f16(const float *x, int64_t cols, void *packed);
void avx2_pack_bf16(const float *x, int64_t cols, void *packed);
void avx2_pack_q8_0(const float *x, int64_t cols, void *packed);
void avx2_pack_q8_1(const float *x, int64_t cols, void *packed);
void avx2_pack_q8_k(const float *x, int64_t cols, void *packed);
void avx2_pack_tile_64(const float *x, int64_t cols, void *packed);
void avx2_pack_tile_128(const float *x, int64_t cols, void *packed);
void avx2_pack_tile_256(const float *x, int64_t cols, void *packed);
void avx2_swiglu(float *gate, const float *up, int64_t n);
void avx2_turn(float *a, float *b, const float *cosines, const float *sines, int64_t pairs, int64_t step);
typedef void hadamard_sums(const struct signed_sums *base, int64_t count, const float *x, float *y, float scale);
void avx2_narrow_sums(const struct signed_sums *base, int64_t count, const float *x, float *y, float scale,
                      hadamard_sums *wide);

DECLARE_BLOCKS(avx2)
DECLARE_CODEBOOKS(avx2)
DECLARE_TILES(avx2)
DECLARE_HADAMARD(avx2)
DECLARE_BLOCKS(avx512)
DECLARE_TILES(avx512)
DECLARE_HADAMARD(avx512)

static inline float load_half(const uint8_t bytes[2]) {
    uint16_t half;
    memcpy(&half, bytes, 2);
    return _cvtsh_ss(half);
}

static inline __m256i load_256(const void *p) { return _mm256_loadu_si256(p); }
static inline __m128i load_128(const void *p) { return _mm_loadu_si128(p); }

static inline int32_t dword_of(const void *p) {
    int32_t dword;
    memcpy(&dword, p, 4);
    return dword;
}
static inline __m256i broadcast_dword(const void *p) { return _mm256_set1_epi32(dword_of(p)); }

static inline float sum_of_floats(__m256 x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

/* Neighbour with neighbour: the last step of dot products of float rows. */
static inline float fold(__m256 x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_hadd_ps(four, four);
    return _mm_cvtss_f32(_mm_hadd_ps(four, four));
}

static inline int32_t sum_of_ints(__m256i x) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

/* total + scale * sums */
static inline __m256 add_scaled(__m256 total, float scale, __m256i sums) {
    return _mm256_fmadd_ps(_mm256_set1_ps(scale), _mm256_cvtepi32_ps(sums), total);
}

/* Sums of two products of signed codes and activation quants: |q| * (x sign(q)), 128 x 127 x 2 < 2^15. */
static inline __m256i signed_pairs(__m256i codes, const int8_t *x) {
    return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(load_256(x), codes));
}
static inline __m256i signed_fours(__m256i codes, const int8_t *x) {
    return _mm256_madd_epi16(signed_pairs(codes, x), _mm256_set1_epi16(1));
}

/* The first two halves of eight blocks of 32, `bytes` apart, as dwords: the scale below, where there is one the minimum
 * above. */
static inline __m256i heads_of_8(const uint8_t *blocks, int bytes) { /* eight loads are faster than a gather */
    const uint8_t *half = blocks + 4 * bytes;
    return _mm256_setr_epi32(dword_of(blocks), dword_of(blocks + bytes), dword_of(blocks + 2 * bytes),
                             dword_of(blocks + 3 * bytes), dword_of(half), dword_of(half + bytes),
                             dword_of(half + 2 * bytes), dword_of(half + 3 * bytes));
}
static inline __m256 floats_of_heads(__m256i low_words) {
    __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(low_words), _mm256_extracti128_si256(low_words, 1));
    return _mm256_cvtph_ps(halves);
}
static inline __m256 scales_of_8(__m256i heads) {
    return floats_of_heads(_mm256_and_si256(heads, _mm256_set1_epi32(0xffff)));
}
static inline __m256 mins_of_8(__m256i heads) { return floats_of_heads(_mm256_srli_epi32(heads, 16)); }

/* The 32 codes of a 32-block as bytes, offsets not yet subtracted. */
static inline __m256i nibbles_32(const uint8_t codes[16]) {
    __m128i bytes = load_128(codes);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15));
}

/* 0x10 in byte j where bit j of `high` is set: byte j / 8 into every byte, then the bit j % 8 alone. */
static inline __m256i fifth_bits_32(const uint8_t high[4]) {
    const __m256i spread = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    __m256i bytes = _mm256_shuffle_epi8(broadcast_dword(high), spread);
    bytes = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    return _mm256_and_si256(bytes, _mm256_set1_epi8(16));
}

static inline __m256i fives_32(const uint8_t codes[16], const uint8_t high[4]) {
    return _mm256_or_si256(nibbles_32(codes), fifth_bits_32(high));
}

/* The sixteen 6-bit scales of Q3_K, still with their offset of 32 (unpack.h draws them). */
static inline __m128i scales_q3_k(const uint8_t bytes[12]) {
    uint32_t w[3];
    memcpy(w, bytes, 12);
    const uint32_t low = 0x0f0f0f0f, high = 0x30303030;
    return _mm_setr_epi32((int)((w[0] & low) | (w[2] << 4 & high)), (int)((w[1] & low) | (w[2] << 2 & high)),
                          (int)((w[0] >> 4 & low) | (w[2] & high)), (int)((w[1] >> 4 & low) | (w[2] >> 2 & high)));
}

/* The 8 scales (low qword) and 8 mins (high qword) of Q4_K and Q5_K (unpack.h draws them). */
static inline __m128i scales_q4_k(const uint8_t bytes[12]) {
    uint32_t w[3];
    memcpy(w, bytes, 12);
    const uint32_t six = 0x3f3f3f3f, low = 0x0f0f0f0f, high = 0x30303030;
    return _mm_setr_epi32((int)(w[0] & six), (int)((w[2] & low) | (w[0] >> 2 & high)), (int)(w[1] & six),
                          (int)((w[2] >> 4 & low) | (w[1] >> 2 & high)));
}

/* Each minimum of Q4_K and Q5_K, the upper eight words of `factors`, twice: it serves two sums of 16. */
static inline __m256i mins_twice(__m256i factors) {
    __m128i mins = _mm256_extracti128_si256(factors, 1);
    return _mm256_set_m128i(_mm_unpackhi_epi16(mins, mins), _mm_unpacklo_epi16(mins, mins));
}

/* Q4_K's two running sums, of products and of minima, in the lowest two floats: += d dx * products, dmin dx * mins. */
static inline __m128 add_totals(__m128 totals, const struct q4_k *w, const struct q8_k *x, __m256i products, __m256i mins) {
    __m256i sums = _mm256_hadd_epi32(products, mins);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    four = _mm_hadd_epi32(four, four);
    __m128 scales = _mm_cvtph_ps(_mm_cvtsi32_si128(dword_of(w->scale))); /* the minimum follows the scale */
    return _mm_fmadd_ps(_mm_cvtepi32_ps(four), _mm_mul_ps(scales, _mm_set1_ps(x->scale)), totals);
}
static inline float difference(__m128 totals) { return _mm_cvtss_f32(_mm_sub_ss(totals, _mm_movehdup_ps(totals))); }

/* Q5_K's running sum of minima: += dmin dx * mins. */
static inline float add_mins(float total, const struct q5_k *w, const struct q8_k *x, __m256i mins) {
    return fmaf((float)sum_of_ints(mins), load_half(w->min) * x->scale, total);
}

/* sum over the 16 sub-blocks of factor x (sum of 16 quants), as eight partial sums. */
static inline __m256i dot_sums(const int16_t sums[16], __m256i factors) {
    return _mm256_madd_epi16(load_256(sums), factors);
}

/* Q4_K's and Q5_K's products of one block, as eight partial sums of scale x code x quant. `factors`: eight scales, then
 * eight minima. Bit i of a byte of `high` (NULL for Q4_K) belongs to sub-block i. */
typedef __m256i products_q4_k(__m256i factors, const uint8_t *codes, const uint8_t *high, const struct q8_k *x);

static inline float dot_q4_k(const struct q4_k *w, const struct q8_k *x, int64_t cols, products_q4_k *products) {
    __m128 totals = _mm_setzero_ps();
    for (const struct q4_k *end = w + cols / 256; w < end; w++, x++) {
        __m256i factors = _mm256_cvtepu8_epi16(scales_q4_k(w->scales));
        __m256i sum = products(factors, w->codes, NULL, x);
        totals = add_totals(totals, w, x, sum, dot_sums(x->sums, mins_twice(factors)));
    }
    return difference(totals);
}

static inline float dot_q5_k(const struct q5_k *w, const struct q8_k *x, int64_t cols, products_q4_k *products) {
    __m256 total = _mm256_setzero_ps();
    float mins = 0;
    for (const struct q5_k *end = w + cols / 256; w < end; w++, x++) {
        __m256i factors = _mm256_cvtepu8_epi16(scales_q4_k(w->scales));
        total = add_scaled(total, load_half(w->scale) * x->scale, products(factors, w->codes, w->high, x));
        mins = add_mins(mins, w, x, dot_sums(x->sums, mins_twice(factors)));
    }
    return sum_of_floats(total) - mins;
}

#endif
