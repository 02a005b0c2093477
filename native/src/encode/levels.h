/* Formats whose columns have a level each: what the levels are, and how a row's block of them is read and written. */
#ifndef RONDEL_ENCODE_LEVELS_H
#define RONDEL_ENCODE_LEVELS_H
#include "kernels/codebooks.h"
#include "kernels/kernels.h"
#include "search.h"

#include <float.h>

/* How a format's codes are stored: level + zero, or the place of a level in the table of so many. */
struct grid {
    int format;
    struct levels levels;
    float zero;
    int in_table, with_min;
    void (*unpack_32)(const void *block, struct unpacked_32 *out);
    void (*unpack_part)(const void *block, int part, struct unpacked_32 *out);
    void (*unpack_256)(const void *block, struct unpacked_256 *out);
    void (*pack)(const struct superblock *from, uint8_t *block);
};

const struct grid *grid_of(int format);

/* One block of a row: weight = d k[s] level - dmin m[s], s = column / depth. */
struct leveled {
    float d, dmin;
    int depth;
    int16_t k[16], m[16];
    float level[MOST_FEEDBACK];
};

/* The block of a row in a column of blocks. New codes are written under new d and dmin, which are values that the format
 * can store; small scales and mins stay. */
void read_levels(int format, const uint8_t *packed, int64_t row, struct leveled *to);
void write_levels(int format, const uint8_t *codes, float d, float dmin, int64_t row, uint8_t *packed);

/* 1 / a, finite for MXFP4's least scales too: a weight of zero stays a number. */
INLINE vec finite_inverse(vec a) { return lesser(inverse(a), splat(FLT_MAX)); }

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
    for (int i = 1; i < grid->in_table; i++) {
        mask above = v > 0.5f * (table[i - 1] + table[i]);
        level += (vec)((mask)splat(table[i] - table[i - 1]) & above);
        *code -= above;
    }
    return level;
}

#endif
