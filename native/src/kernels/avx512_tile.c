/* AVX-512 VNNI panels of the tile formats: sixteen rows are the sixteen dwords of a vector, the same bits as
 * scalar_tile.c. One AND and one vpdpbusd per field, no shift: field f is left in place, its sum is 2^(bits f) times
 * too large, and one exact shift per group puts that right. */
#ifdef RONDEL_X86
#include "x86.h"

static inline __m512i broadcast(const int8_t *x) {
    int32_t dword;
    memcpy(&dword, x, 4);
    return _mm512_set1_epi32(dword);
}

static inline __m512i group_of_fields(const uint8_t *tiles, const int8_t *x, int bits, int group) {
    int fields = 8 / bits, width = 4 * fields;
    __m512i sums[4], masks[4];
    for (int f = 0; f < fields; f++) {
        sums[f] = _mm512_setzero_si512();
        masks[f] = _mm512_set1_epi8((char)(((1 << bits) - 1) << (bits * f)));
    }
    for (int column = 0; column < group; column += width, tiles += 64, x += width) {
        __m512i codes = _mm512_loadu_si512(tiles);
        for (int f = 0; f < fields; f++)
            sums[f] = _mm512_dpbusd_epi32(sums[f], _mm512_and_si512(codes, masks[f]), broadcast(x + 4 * f));
    }
    for (int f = 1; f < fields; f++)
        sums[0] = _mm512_add_epi32(sums[0], _mm512_sra_epi32(sums[f], _mm_cvtsi32_si128(bits * f)));
    return sums[0];
}

/* Signed codes made unsigned: sum(q x) = sum((q + 128) x) - 128 sum(x). */
static inline __m512i group_of_bytes(const uint8_t *tiles, const int8_t *x, int group, int32_t sum_of_x) {
    __m512i sums[2] = {_mm512_set1_epi32(-128 * sum_of_x), _mm512_setzero_si512()}, flip = _mm512_set1_epi8((char)128);
    for (int column = 0; column < group; column += 8, tiles += 128, x += 8)
        for (int i = 0; i < 2; i++) {
            __m512i codes = _mm512_xor_si512(_mm512_loadu_si512(tiles + 64 * i), flip);
            sums[i] = _mm512_dpbusd_epi32(sums[i], codes, broadcast(x + 4 * i));
        }
    return _mm512_add_epi32(sums[0], sums[1]);
}

static inline void panel(const uint8_t *tiles, const void *packed, int64_t cols, int bits, int group, float out[16]) {
    const int8_t *quants = packed;
    const float *scales = tile_scales(packed, cols);
    const int32_t *sums = tile_sums(packed, cols, group);
    __m512 y = _mm512_setzero_ps();
    for (int64_t g = 0; g < cols / group; g++, quants += group) {
        const uint8_t *ends = tiles + 2 * group * bits;
        __m512i sum = bits == 8 ? group_of_bytes(tiles, quants, group, sums[g])
                                : group_of_fields(tiles, quants, bits, group);
        if (bits == 2) sum = _mm512_sub_epi32(_mm512_add_epi32(sum, sum), _mm512_set1_epi32(3 * sums[g]));
        if (bits == 4) sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(8 * sums[g]));
        float activation = bits == 2 ? 0.5f * scales[g] : scales[g];
        __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(activation));
        y = _mm512_add_ps(y, _mm512_mul_ps(product, _mm512_cvtph_ps(load_256(ends))));
        tiles = ends + 32;
    }
    _mm512_storeu_ps(out, y);
}

#define PANEL(bits, group)                                                                                    \
    void avx512_panel_u##bits##_##group(const void *tiles, const void *packed, int64_t cols, float out[16]) { \
        panel(tiles, packed, cols, bits, group, out);                                                         \
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
