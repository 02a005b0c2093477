/* The table of the formats whose columns have a level each, and their blocks as numbers. */
#include "levels.h"

#include "encode.h"

static const float signs_table[2] = {-1, 1};
static const float fp4_table[15] = {-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12};

static const struct grid grids[] = {
    {FMT_Q8_0, {.lo = -127, .hi = 127}, 0, 0, 0, unpack_q8_0, 0, 0, 0},
    {FMT_Q5_0, {.lo = -16, .hi = 15}, 16, 0, 0, unpack_q5_0, 0, 0, 0},
    {FMT_Q5_1, {.lo = 0, .hi = 31}, 0, 0, 1, unpack_q5_1, 0, 0, 0},
    {FMT_Q4_0, {.lo = -8, .hi = 7}, 8, 0, 0, unpack_q4_0, 0, 0, 0},
    {FMT_Q4_1, {.lo = 0, .hi = 15}, 0, 0, 1, unpack_q4_1, 0, 0, 0},
    {FMT_IQ4_NL, {.table = iq4_table}, 0, 16, 0, unpack_iq4_nl, 0, 0, 0},
    {FMT_MXFP4, {.table = fp4_table}, 0, 15, 0, unpack_mxfp4, 0, 0, 0},
    {FMT_Q1_0, {.table = signs_table}, 0, 2, 0, 0, unpack_q1_0, 0, 0},
    {FMT_Q2_0, {.lo = -1, .hi = 2}, 1, 0, 0, 0, unpack_q2_0, 0, 0},
    {FMT_TQ1_0, {.lo = -1, .hi = 1}, 1, 0, 0, 0, 0, unpack_tq1_0, 0},
    {FMT_TQ2_0, {.lo = -1, .hi = 1}, 1, 0, 0, 0, 0, unpack_tq2_0, 0},
    {FMT_IQ4_XS, {.table = iq4_table}, 0, 16, 0, 0, 0, unpack_iq4_xs, pack_iq4_xs},
    {FMT_Q2_K, {.lo = 0, .hi = 3}, 0, 0, 1, 0, 0, unpack_q2_k, pack_q2_k},
    {FMT_Q3_K, {.lo = -4, .hi = 3}, 4, 0, 0, 0, 0, unpack_q3_k, pack_q3_k},
    {FMT_Q4_K, {.lo = 0, .hi = 15}, 0, 0, 1, 0, 0, unpack_q4_k, pack_q4_k},
    {FMT_Q5_K, {.lo = 0, .hi = 31}, 0, 0, 1, 0, 0, unpack_q5_k, pack_q5_k},
    {FMT_Q6_K, {.lo = -32, .hi = 31}, 32, 0, 0, 0, 0, unpack_q6_k, pack_q6_k},
};
static const struct grid tile_grids[3] = {
    {-1, {.lo = 0, .hi = 3, .offset = -1.5f}, 1.5f, 0, 0, 0, 0, 0, 0},
    {-1, {.lo = -8, .hi = 7}, 8, 0, 0, 0, 0, 0, 0},
    {-1, {.lo = -127, .hi = 127}, 0, 0, 0, 0, 0, 0, 0},
};

const struct grid *grid_of(int format) {
    if (format_table[format].rows > 1) return &tile_grids[tile_bits(format) / 4];
    for (unsigned i = 0; i < sizeof grids / sizeof *grids; i++)
        if (grids[i].format == format) return &grids[i];
    return NULL;
}

static void read_32(const struct unpacked_32 *block, float *level, struct leveled *to) {
    to->d = block->scale;
    to->dmin = block->offset;
    for (int j = 0; j < 32; j++) level[j] = block->codes[j];
}

static void read_256(const struct unpacked_256 *block, struct leveled *to) {
    to->d = block->scale;
    to->dmin = block->min;
    to->depth = 16;
    memcpy(to->k, block->scales, sizeof to->k);
    memcpy(to->m, block->mins, sizeof to->m);
    for (int j = 0; j < 256; j++) to->level[j] = block->codes[j];
}

static void read_tile_row(const struct grid *grid, int format, const uint8_t *panel, int row, struct leveled *to) {
    const struct format_traits *traits = &format_table[format];
    int bits = tile_bits(format);
    to->d = half_at(panel + traits->bytes - 2 * PANEL + 2 * row);
    to->dmin = 0;
    for (int j = 0; j < traits->columns; j++) to->level[j] = (float)tile_code(panel, bits, row, j) - grid->zero;
}

/* Where the block of a row stands: a panel holds sixteen of them. */
static int64_t place_of(int format, int64_t row) {
    return row / format_table[format].rows * format_table[format].bytes;
}

void read_levels(int format, const uint8_t *packed, int64_t row, struct leveled *to) {
    const struct grid *grid = grid_of(format);
    const uint8_t *block = packed + place_of(format, row);
    struct unpacked_256 whole;
    struct unpacked_32 part;
    to->depth = format_table[format].columns;
    to->k[0] = to->m[0] = 1;
    if (grid->unpack_32) {
        grid->unpack_32(block, &part);
        read_32(&part, to->level, to);
    } else if (grid->unpack_part) {
        for (int i = 0; i < to->depth / 32; i++) {
            grid->unpack_part(block, i, &part);
            read_32(&part, to->level + 32 * i, to);
        }
    } else if (grid->unpack_256) {
        grid->unpack_256(block, &whole);
        read_256(&whole, to);
    } else {
        read_tile_row(grid, format, block, (int)(row % PANEL), to);
    }
}

/* Codes of a superblock under new d and dmin; its small scales and mins stay. */
static void write_superblock(const struct grid *grid, const uint8_t *codes, float d, float dmin, uint8_t *block) {
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

/* Places in fp4_table to codes of magnitude and sign, and a power of two to its exponent. */
static void write_mxfp4(const uint8_t *places, float d, uint8_t *block) {
    uint8_t codes[32];
    for (int j = 0; j < 32; j++) codes[j] = places[j] < 7 ? 15 - places[j] : places[j] - 7;
    block[0] = mxfp4_exponent(d);
    pack_nibbles(codes, block + 1);
}

void write_levels(int format, const uint8_t *codes, float d, float dmin, int64_t row, uint8_t *packed) {
    const struct grid *grid = grid_of(format);
    uint8_t *block = packed + place_of(format, row);
    if (format_table[format].rows > 1) {
        uint16_t half = float_to_half(d);
        pack_tile_row(codes, format_table[format].columns, tile_bits(format), (int)(row % PANEL), block);
        memcpy(block + format_table[format].bytes - 2 * PANEL + 2 * (row % PANEL), &half, sizeof half);
    } else if (grid->pack) {
        write_superblock(grid, codes, d, dmin, block);
    } else if (format == FMT_MXFP4) {
        write_mxfp4(codes, d, block);
    } else if (grid->unpack_32) {
        pack_block(format, codes, d, -dmin, block);
    } else {
        pack_few_levels(format, codes, float_to_half(d), block);
    }
}
