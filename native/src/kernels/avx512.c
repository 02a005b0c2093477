/* The AVX-512 instruction set (F, BW, DQ, VL and VNNI): float rows and the table. Activations are packed by AVX2, which
 * is bound by memory already. */
#ifdef RONDEL_X86
#include "kernels.h"
#include "round.h"
#include "x86.h"

/* The first n lanes. */
static inline __mmask16 lanes(int64_t n) { return (__mmask16)((1u << n) - 1); }

static inline __m512 load_floats(const float *x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
static inline __m512 load_halves(const uint16_t *x, __mmask16 mask) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
}
static inline __m512 load_bfloats(const uint16_t *x, __mmask16 mask) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline __m256 sum_of_halves(__m512 x) {
    return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
}

/* sum of LOAD(a) LOAD(b) in four running halves of vectors; ONE converts what is left of the row. */
#define DOT(LOAD, ONE)                                                                                       \
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};                                             \
    int64_t i = 0;                                                                                           \
    for (; i + 32 <= n; i += 32)                                                                             \
        for (int j = 0; j < 2; j++)                                                                          \
            sums[j] = _mm512_fmadd_ps(LOAD(a + i + 16 * j, 0xffff), LOAD(b + i + 16 * j, 0xffff), sums[j]);  \
    double total = fold(sum_of_halves(_mm512_add_ps(sums[0], sums[1])));                                     \
    for (; i < n; i++) total += (double)(ONE(a[i]) * ONE(b[i]));                                             \
    return (float)total

static float dot_f32(const float *a, const float *b, int64_t n) { DOT(load_floats, ); }
static float dot_f16(const uint16_t *a, const uint16_t *b, int64_t n) { DOT(load_halves, _cvtsh_ss); }
static float dot_bf16(const uint16_t *a, const uint16_t *b, int64_t n) { DOT(load_bfloats, bfloat_to_float); }

static float dot_row_f32(const void *row, const void *packed, int64_t cols) { return dot_f32(row, packed, cols); }
static float dot_row_f16(const void *row, const void *packed, int64_t cols) { return dot_f16(row, packed, cols); }
static float dot_row_bf16(const void *row, const void *packed, int64_t cols) { return dot_bf16(row, packed, cols); }

static void axpy_f32(float *y, float scale, const float *x, int64_t n) {
    __m512 factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 mask = n - i < 16 ? lanes(n - i) : 0xffff;
        __m512 sum = _mm512_fmadd_ps(factor, load_floats(x + i, mask), load_floats(y + i, mask));
        _mm512_mask_storeu_ps(y + i, mask, sum);
    }
}

static void fma_f16(uint16_t *y, float scale, const uint16_t *x, int64_t n) {
    __m512 factor = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 mask = n - i < 16 ? lanes(n - i) : 0xffff;
        __m512 sum = _mm512_fmadd_ps(factor, load_halves(x + i, mask), load_halves(y + i, mask));
        _mm256_mask_storeu_epi16(y + i, mask, _mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
    }
}

const struct kernels kernels_avx512 = {
    .name = "avx512",
    .usable = avx512_usable,
    .pack = {[ACT_F32] = avx2_pack_f32, [ACT_F16] = avx2_pack_f16, [ACT_BF16] = avx2_pack_bf16,
             [ACT_Q8_0] = avx2_pack_q8_0, [ACT_Q8_1] = avx2_pack_q8_1, [ACT_Q8_K] = avx2_pack_q8_k,
             [ACT_TILE_64] = avx2_pack_tile_64, [ACT_TILE_128] = avx2_pack_tile_128,
             [ACT_TILE_256] = avx2_pack_tile_256},
    .dot = {[FMT_F32] = dot_row_f32, [FMT_F16] = dot_row_f16, [FMT_BF16] = dot_row_bf16, BLOCK_DOTS(avx512),
            CODEBOOK_DOTS(avx2)},
    .panel = {TILE_PANELS(avx512)},
    .dot_f32 = dot_f32,
    .dot_f16 = dot_f16,
    .axpy_f32 = axpy_f32,
    .fma_f16 = fma_f16,
    .sylvester = avx512_sylvester,
    .signed_sums = avx512_signed_sums,
    .swiglu = avx2_swiglu,
    .turn = avx2_turn,
};
#endif
