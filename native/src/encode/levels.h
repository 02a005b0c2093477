/* Formats whose columns have a level each: what the levels are, how codes are stored, and how bits are read and written. */
#ifndef RONDEL_ENCODE_LEVELS_H
#define RONDEL_ENCODE_LEVELS_H
#include "kernels/codebooks.h"
#include "kernels/kernels.h"
#include "search.h"

/* How a format's codes are stored: level + zero, or the index of a level of the table. */
struct grid {
    int format;
    struct levels levels;
    float zero;
    int with_min;
    void (*unpack_32)(const void *block, struct unpacked_32 *out);
    void (*unpack_256)(const void *block, struct unpacked_256 *out);
    void (*pack)(const struct superblock *from, uint8_t *block);
};

const struct grid *grid_of(int format);
void repack_superblock(const struct grid *grid, const uint8_t *codes, float d, float dmin, uint8_t *block);

/* Level of every lane nearest to v, and its code. */
INLINE vec round_level(const struct grid *grid, vec v, mask *code) {
    if (!grid->levels.table) {
        vec level = nearest_level(grid->levels, v);
        *code = __builtin_convertvector(level + grid->zero, mask);
        return level;
    }
    const float *table = grid->levels.table;
    vec level = splat(table[0]);
    *code = (mask)splat(0);
    for (int i = 1; i < 16; i++) {
        mask above = v > 0.5f * (table[i - 1] + table[i]);
        level += (vec)((mask)splat(table[i] - table[i - 1]) & above);
        *code -= above;
    }
    return level;
}

#endif
