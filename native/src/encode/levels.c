/* The table of the formats whose columns have a level each. */
#include "levels.h"

#include "encode.h"

static const struct grid grids[] = {
    {FMT_Q8_0, {.lo = -127, .hi = 127}, 0, 0, unpack_q8_0, 0, 0},
    {FMT_Q5_0, {.lo = -16, .hi = 15}, 16, 0, unpack_q5_0, 0, 0},
    {FMT_Q5_1, {.lo = 0, .hi = 31}, 0, 1, unpack_q5_1, 0, 0},
    {FMT_Q4_0, {.lo = -8, .hi = 7}, 8, 0, unpack_q4_0, 0, 0},
    {FMT_Q4_1, {.lo = 0, .hi = 15}, 0, 1, unpack_q4_1, 0, 0},
    {FMT_IQ4_NL, {.table = iq4_table}, 0, 0, unpack_iq4_nl, 0, 0},
    {FMT_IQ4_XS, {.table = iq4_table}, 0, 0, 0, unpack_iq4_xs, pack_iq4_xs},
    {FMT_Q2_K, {.lo = 0, .hi = 3}, 0, 1, 0, unpack_q2_k, pack_q2_k},
    {FMT_Q3_K, {.lo = -4, .hi = 3}, 4, 0, 0, unpack_q3_k, pack_q3_k},
    {FMT_Q4_K, {.lo = 0, .hi = 15}, 0, 1, 0, unpack_q4_k, pack_q4_k},
    {FMT_Q5_K, {.lo = 0, .hi = 31}, 0, 1, 0, unpack_q5_k, pack_q5_k},
    {FMT_Q6_K, {.lo = -32, .hi = 31}, 32, 0, 0, unpack_q6_k, pack_q6_k},
};
static const struct grid tile_grids[3] = {
    {-1, {.lo = 0, .hi = 3, .offset = -1.5f}, 1.5f, 0, 0, 0, 0},
    {-1, {.lo = -8, .hi = 7}, 8, 0, 0, 0, 0},
    {-1, {.lo = -127, .hi = 127}, 0, 0, 0, 0, 0},
};

const struct grid *grid_of(int format) {
    if (format_table[format].rows > 1) return &tile_grids[tile_bits(format) / 4];
    for (unsigned i = 0; i < sizeof grids / sizeof *grids; i++)
        if (grids[i].format == format) return &grids[i];
    return NULL;
}

/* Packs codes of a superblock under new d and dmin; its small scales and mins stay. */
void repack_superblock(const struct grid *grid, const uint8_t *codes, float d, float dmin, uint8_t *block) {
    struct unpacked_256 old;
    struct superblock new = {.d = float_to_half(d), .dmin = float_to_half(dmin)};
    int depth = grid->format == FMT_Q4_K || grid->format == FMT_Q5_K || grid->format == FMT_IQ4_XS ? 32 : 16;
    grid->unpack_256(block, &old);
    for (int s = 0; s < 256 / depth; s++) {
        new.scale[s] = (int8_t)old.scales[s * depth / 16];
        new.min[s] = (uint8_t)old.mins[s * depth / 16];
    }
    memcpy(new.codes, codes, sizeof new.codes);
    grid->pack(&new, block);
}
