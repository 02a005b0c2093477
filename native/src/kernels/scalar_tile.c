/* The specification of the tile formats U2, U4 and U8: sixteen dot products from one panel.
 *
 * Per group and row, with codes q, activation quants x, weight scale s and activation scale d:
 *     U2  s (d / 2) (2 sum(q x) - 3 sum(x))      weight = s (q - 3/2)
 *     U4  s  d      (sum(q x) - 8 sum(x))        weight = s (q - 8)
 *     U8  s  d       sum(q x)                    q signed
 * The bracket is an exact integer below 2^24. Every instruction set multiplies d by the bracket, then by s, and adds
 * to the row's float, group after group and without a fused multiply-add: all of them give the same bits. */
#include "blocks.h"
#include "kernels.h"
#include "scalar.h"

static inline void panel(const uint8_t *tiles, const void *packed, int64_t cols, int bits, int group, float out[16]) {
    const int8_t *quants = packed;
    const float *scales = tile_scales(packed, cols);
    const int32_t *sums = tile_sums(packed, cols, group);
    int fields = 8 / bits, width = 4 * fields, mask = (1 << bits) - 1;
    for (int r = 0; r < 16; r++) out[r] = 0;
    for (int64_t g = 0; g < cols / group; g++) {
        int32_t products[16] = {0};
        for (int column = 0; column < group; column += width, tiles += 64, quants += width)
            for (int r = 0; r < 16; r++)
                for (int b = 0; b < 4; b++) {
                    uint8_t byte = tiles[4 * r + b];
                    for (int f = 0; f < fields; f++) {
                        int code = bits == 8 ? (int8_t)byte : byte >> f * bits & mask;
                        products[r] += code * quants[4 * f + b];
                    }
                }
        for (int r = 0; r < 16; r++, tiles += 2) {
            int32_t sum = products[r];
            if (bits == 2) sum = 2 * sum - 3 * sums[g];
            if (bits == 4) sum -= 8 * sums[g];
            float scale = half_to_float(tiles[0] | tiles[1] << 8);
            out[r] += (float)sum * (bits == 2 ? 0.5f * scales[g] : scales[g]) * scale;
        }
    }
}

#define PANEL(bits, group)                                                                                  \
    void scalar_panel_u##bits##_##group(const void *tiles, const void *packed, int64_t cols, float out[16]) { \
        panel(tiles, packed, cols, bits, group, out);                                                       \
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
