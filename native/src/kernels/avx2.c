/* The AVX2 instruction set: activations, float rows, and the table. */
#ifdef RONDEL_X86
#include <math.h>

#include "kernels.h"
#include "round.h"
#include "x86.h"

void avx2_pack_f32(const float *x, int64_t cols, void *packed) { memcpy(packed, x, (size_t)cols * 4); }

void avx2_pack_f16(const float *x, int64_t cols, void *packed) {
    uint16_t *out = packed;
    int64_t i = 0;
    for (; i + 8 <= cols; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < cols; i++) out[i] = float_to_half(x[i]);
}

void avx2_pack_bf16(const float *x, int64_t cols, void *packed) {
    uint16_t *out = packed;
    for (int64_t i = 0; i < cols; i++) out[i] = float_to_bfloat(x[i]); /* integer arithmetic: the compiler vectorizes */
}

static inline __m256i magnitudes(const float *x) {
    return _mm256_and_si256(load_256(x), _mm256_set1_epi32(0x7fffffff));
}

static inline float absolute_maximum(const float *x, int64_t n) {
    __m256i maximum = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8) maximum = _mm256_max_epi32(maximum, magnitudes(x + i));
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(maximum), _mm256_extracti128_si256(maximum, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return float_of_bits(_mm_cvtsi128_si32(four));
}

/* 32 floats to int8, nearest even. A zero factor makes zeros even of infinity and NaN. */
static inline __m256i quantize_32(const float *x, float factor) {
    if (factor == 0) return _mm256_setzero_si256();
    __m256 scale = _mm256_set1_ps(factor);
    __m256i q[4];
    for (int i = 0; i < 4; i++) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), scale));
    /* The two packs work within 128-bit lanes: dwords come out as 0 8 16 24 4 12 20 28 in units of four. */
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

/* Eight dwords, each the sum of four of the 32 int8. */
static inline __m256i sums_of_4(__m256i bytes) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes), _mm256_set1_epi16(1));
}

static inline void pack_q8(const float *x, int64_t cols, void *packed, int with_sums) {
    int8_t *quants = packed;
    float *scales = (float *)q8_scales(packed, cols), *sums = (float *)q8_sums(packed, cols);
    memset(quants + cols, 0, (size_t)(q8_quants(cols) - cols));
    for (int64_t i = 0; i < cols / 32; i++) {
        float maximum = absolute_maximum(x + 32 * i, 32), scale = maximum / 127.0f;
        __m256i bytes = quantize_32(x + 32 * i, q8_factor(maximum));
        _mm256_storeu_si256((__m256i *)(quants + 32 * i), bytes);
        scales[i] = _cvtsh_ss(_cvtss_sh(scale, _MM_FROUND_TO_NEAREST_INT));
        if (!with_sums) continue;
        float sum = scale * (float)sum_of_ints(sums_of_4(bytes));
        sums[i] = _cvtsh_ss(_cvtss_sh(sum, _MM_FROUND_TO_NEAREST_INT));
    }
}

void avx2_pack_q8_0(const float *x, int64_t cols, void *packed) { pack_q8(x, cols, packed, 0); }
void avx2_pack_q8_1(const float *x, int64_t cols, void *packed) { pack_q8(x, cols, packed, 1); }

static inline int first_of_magnitude(const float *x, int32_t bits) {
    for (int i = 0;; i += 8) { /* ends: `bits` is the magnitude of one of them */
        __m256i equal = _mm256_cmpeq_epi32(magnitudes(x + i), _mm256_set1_epi32(bits));
        int mask = _mm256_movemask_ps(_mm256_castsi256_ps(equal));
        if (mask) return i + __builtin_ctz((unsigned)mask);
    }
}

void avx2_pack_q8_k(const float *x, int64_t cols, void *packed) {
    struct q8_k *out = packed;
    for (int64_t block = 0; block < cols / 256; block++, x += 256, out++) {
        float maximum = absolute_maximum(x, 256), factor = q8_factor(maximum);
        if (x[first_of_magnitude(x, magnitude_bits(maximum))] > 0) factor = -factor;
        for (int i = 0; i < 8; i++) {
            __m256i bytes = quantize_32(x + 32 * i, factor), sums = sums_of_4(bytes);
            _mm256_storeu_si256((__m256i *)(out->quants + 32 * i), bytes);
            sums = _mm256_hadd_epi32(sums, sums);
            sums = _mm256_hadd_epi32(sums, sums);
            out->sums[2 * i] = (int16_t)_mm256_extract_epi32(sums, 0);
            out->sums[2 * i + 1] = (int16_t)_mm256_extract_epi32(sums, 4);
        }
        out->scale = q8_k_scale(maximum, factor);
        memset(out->padding, 0, sizeof out->padding);
    }
}

static inline void pack_tile(const float *x, int64_t cols, void *packed, int group) {
    int8_t *quants = packed;
    float *scales = (float *)tile_scales(packed, cols);
    int32_t *sums = (int32_t *)tile_sums(packed, cols, group);
    for (int64_t g = 0; g < cols / group; g++, x += group, quants += group) {
        float maximum = absolute_maximum(x, group);
        __m256i sum = _mm256_setzero_si256();
        for (int i = 0; i < group; i += 32) {
            __m256i bytes = quantize_32(x + i, q8_factor(maximum));
            _mm256_storeu_si256((__m256i *)(quants + i), bytes);
            sum = _mm256_add_epi32(sum, sums_of_4(bytes));
        }
        sums[g] = sum_of_ints(sum);
        scales[g] = maximum / 127.0f;
    }
}

void avx2_pack_tile_64(const float *x, int64_t cols, void *packed) { pack_tile(x, cols, packed, 64); }
void avx2_pack_tile_128(const float *x, int64_t cols, void *packed) { pack_tile(x, cols, packed, 128); }
void avx2_pack_tile_256(const float *x, int64_t cols, void *packed) { pack_tile(x, cols, packed, 256); }

static inline __m256 load_halves(const uint16_t *x) { return _mm256_cvtph_ps(load_128(x)); }
static inline __m256 load_bfloats(const uint16_t *x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(x)), 16));
}

/* sum of LOAD(a) LOAD(b) in four running vectors; ONE converts what is left of the row. */
#define DOT(LOAD, ONE)                                                                           \
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()}; \
    int64_t i = 0;                                                                               \
    for (; i + 32 <= n; i += 32)                                                                 \
        for (int j = 0; j < 4; j++) sums[j] = _mm256_fmadd_ps(LOAD(a + i + 8 * j), LOAD(b + i + 8 * j), sums[j]); \
    double total = fold(_mm256_add_ps(_mm256_add_ps(sums[0], sums[2]), _mm256_add_ps(sums[1], sums[3]))); \
    for (; i < n; i++) total += (double)(ONE(a[i]) * ONE(b[i]));                                 \
    return (float)total

static float dot_f32(const float *a, const float *b, int64_t n) { DOT(_mm256_loadu_ps, ); }
static float dot_f16(const uint16_t *a, const uint16_t *b, int64_t n) { DOT(load_halves, _cvtsh_ss); }
static float dot_bf16(const uint16_t *a, const uint16_t *b, int64_t n) { DOT(load_bfloats, bfloat_to_float); }

static float dot_row_f32(const void *row, const void *packed, int64_t cols) { return dot_f32(row, packed, cols); }
static float dot_row_f16(const void *row, const void *packed, int64_t cols) { return dot_f16(row, packed, cols); }
static float dot_row_bf16(const void *row, const void *packed, int64_t cols) { return dot_bf16(row, packed, cols); }

static void axpy_f32(float *y, float scale, const float *x, int64_t n) {
    __m256 factor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, _mm256_fmadd_ps(factor, _mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
    for (; i < n; i++) y[i] += scale * x[i];
}

static void fma_f16(uint16_t *y, float scale, const uint16_t *x, int64_t n) {
    __m256 factor = _mm256_set1_ps(scale);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 sum = _mm256_fmadd_ps(factor, load_halves(x + i), load_halves(y + i));
        _mm_storeu_si128((__m128i *)(y + i), _mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
    }
    for (; i < n; i++) y[i] = float_to_half(fmaf(scale, _cvtsh_ss(x[i]), _cvtsh_ss(y[i])));
}

static inline __m256 exponential(__m256 x) {
    const __m256 shift = _mm256_set1_ps(0x1.8p23f), magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(0x1.715476p+0f), shift), n = _mm256_sub_ps(shifted, shift);
    __m256 b = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.62e4p-1f), x), size = _mm256_and_ps(n, magnitude);
    b = _mm256_fnmadd_ps(n, _mm256_set1_ps(0x1.7f7d1cp-20f), b);
    __m256 square = _mm256_mul_ps(b, b);
    __m256 high = _mm256_fmadd_ps(_mm256_set1_ps(0x1.0e4020p-7f), b, _mm256_set1_ps(0x1.573e2ep-5f));
    __m256 low = _mm256_fmadd_ps(_mm256_set1_ps(0x1.555e66p-3f), b, _mm256_set1_ps(0x1.fffdb6p-2f));
    __m256 rest = _mm256_mul_ps(_mm256_set1_ps(0x1.ffffecp-1f), b);
    rest = _mm256_fmadd_ps(_mm256_fmadd_ps(high, square, low), square, rest);
    __m256i bits = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    __m256 power = _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(0x3f800000)));
    __m256 result = _mm256_fmadd_ps(power, rest, power), large = _mm256_cmp_ps(size, _mm256_set1_ps(126), _CMP_GT_OQ);
    if (_mm256_testz_ps(large, large)) return result;
    __m256i split = _mm256_castps_si256(_mm256_cmp_ps(n, _mm256_setzero_ps(), _CMP_LE_OQ));
    split = _mm256_and_si256(split, _mm256_set1_epi32((int32_t)0x82000000));
    __m256 first = _mm256_castsi256_ps(_mm256_add_epi32(split, _mm256_set1_epi32(0x7f000000)));
    power = _mm256_castsi256_ps(_mm256_sub_epi32(bits, split));
    __m256 scaled = _mm256_mul_ps(_mm256_fmadd_ps(power, rest, power), first);
    __m256 beyond = _mm256_cmp_ps(size, _mm256_set1_ps(192), _CMP_GT_OQ);
    return _mm256_blendv_ps(_mm256_blendv_ps(result, scaled, large), _mm256_mul_ps(first, first), beyond);
}

void avx2_swiglu(float *gate, const float *up, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __m256 x = _mm256_loadu_ps(gate + i), power = exponential(_mm256_sub_ps(_mm256_setzero_ps(), x));
        __m256 silu = _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1), power));
        _mm256_storeu_ps(gate + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
    }
    for (; i < n; i++) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

void avx2_turn(float *a, float *b, const float *cosines, const float *sines, int64_t pairs, int64_t step) {
    int64_t i = 0;
    for (; step == 1 && i + 8 <= pairs; i += 8) {
        __m256 cosine = _mm256_loadu_ps(cosines + i), sine = _mm256_loadu_ps(sines + i);
        __m256 first = _mm256_loadu_ps(a + i), second = _mm256_loadu_ps(b + i);
        _mm256_storeu_ps(a + i, _mm256_fmsub_ps(first, cosine, _mm256_mul_ps(second, sine)));
        _mm256_storeu_ps(b + i, _mm256_fmadd_ps(first, sine, _mm256_mul_ps(second, cosine)));
    }
    for (; i < pairs; i++) {
        float first = a[i * step], second = b[i * step];
        a[i * step] = fmaf(first, cosines[i], -(second * sines[i]));
        b[i * step] = fmaf(first, sines[i], second * cosines[i]);
    }
}

const struct kernels kernels_avx2 = {
    .name = "avx2",
    .usable = avx2_usable,
    .pack = {[ACT_F32] = avx2_pack_f32, [ACT_F16] = avx2_pack_f16, [ACT_BF16] = avx2_pack_bf16,
             [ACT_Q8_0] = avx2_pack_q8_0, [ACT_Q8_1] = avx2_pack_q8_1, [ACT_Q8_K] = avx2_pack_q8_k,
             [ACT_TILE_64] = avx2_pack_tile_64, [ACT_TILE_128] = avx2_pack_tile_128,
             [ACT_TILE_256] = avx2_pack_tile_256},
    .dot = {[FMT_F32] = dot_row_f32, [FMT_F16] = dot_row_f16, [FMT_BF16] = dot_row_bf16, BLOCK_DOTS(avx2),
            CODEBOOK_DOTS(avx2)},
    .panel = {TILE_PANELS(avx2)},
    .dot_f32 = dot_f32,
    .dot_f16 = dot_f16,
    .axpy_f32 = axpy_f32,
    .fma_f16 = fma_f16,
    .sylvester = avx2_sylvester,
    .signed_sums = avx2_signed_sums,
    .swiglu = avx2_swiglu,
    .turn = avx2_turn,
};
#endif
