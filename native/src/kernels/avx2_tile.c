/* AVX2 panels of the tile formats: sixteen rows as two vectors of eight dwords, the same bits as scalar_tile.c. */
#ifdef RONDEL_X86
#include "x86.h"

/* y += ((integer * activation scale) * weight scale), the order of scalar_tile.c. */
static inline __m256 scale_group(__m256 y, __m256i sum, float activation, const uint8_t *scales) {
    __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(activation));
    return _mm256_add_ps(y, _mm256_mul_ps(product, _mm256_cvtph_ps(load_128(scales))));
}

/* Sums of pairs for one half tile: fields of `bits`, each times its four activations. U2: 4 x 3 x 127 x 2 = 3048,
 * U4: 2 x 15 x 127 x 2 = 7620, so four tiles fit 16 bits. */
static inline __m256i half_tile(const uint8_t *bytes, const int8_t *x, int bits) {
    __m256i codes = load_256(bytes), mask = _mm256_set1_epi8((char)((1 << bits) - 1)), pairs = _mm256_setzero_si256();
    for (int f = 0; f < 8 / bits; f++) {
        __m256i field = _mm256_and_si256(codes, mask);
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(field, broadcast_dword(x + 4 * f)));
        codes = _mm256_srli_epi16(codes, bits);
    }
    return pairs;
}

static inline __m256i half_group(const uint8_t *tiles, const int8_t *x, int bits, int group) {
    __m256i sum = _mm256_setzero_si256();
    int width = 32 / bits;
    for (int column = 0; column < group; column += 4 * width) {
        __m256i pairs = _mm256_setzero_si256();
        for (int i = 0; i < 4; i++, tiles += 64, x += width) pairs = _mm256_add_epi16(pairs, half_tile(tiles, x, bits));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sum;
}

/* Signed codes: |q| * (x sign(q)), 128 x 127 x 2 < 2^15. */
static inline __m256i half_group_u8(const uint8_t *tiles, const int8_t *x, int group) {
    __m256i sum = _mm256_setzero_si256();
    for (int column = 0; column < group; column += 4, tiles += 64, x += 4) {
        __m256i codes = load_256(tiles);
        __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(broadcast_dword(x), codes));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sum;
}

static inline void panel(const uint8_t *tiles, const void *packed, int64_t cols, int bits, int group, float out[16]) {
    const int8_t *quants = packed;
    const float *scales = tile_scales(packed, cols);
    const int32_t *sums = tile_sums(packed, cols, group);
    __m256 y[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t g = 0; g < cols / group; g++, quants += group) {
        const uint8_t *ends = tiles + 2 * group * bits;
        for (int half = 0; half < 2; half++) {
            __m256i sum = bits == 8 ? half_group_u8(tiles + 32 * half, quants, group)
                                    : half_group(tiles + 32 * half, quants, bits, group);
            if (bits == 2) sum = _mm256_sub_epi32(_mm256_add_epi32(sum, sum), _mm256_set1_epi32(3 * sums[g]));
            if (bits == 4) sum = _mm256_sub_epi32(sum, _mm256_set1_epi32(8 * sums[g]));
            y[half] = scale_group(y[half], sum, bits == 2 ? 0.5f * scales[g] : scales[g], ends + 16 * half);
        }
        tiles = ends + 32;
    }
    _mm256_storeu_ps(out, y[0]);
    _mm256_storeu_ps(out + 8, y[1]);
}

#define PANEL(bits, group)                                                                                   \
    void avx2_panel_u##bits##_##group(const void *tiles, const void *packed, int64_t cols, float out[16]) {  \
        panel(tiles, packed, cols, bits, group, out);                                                        \
    }
PANEL(2, 64)
PANEL(2, 128)
PANEL(2, 256)
PANEL(4, 64)
PANEL(4, 128)
PANEL(4, 256)
PANEL(8, 64)
PANEL(8, 128)
PANEL(8, 256)
#endif
