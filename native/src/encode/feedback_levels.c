/* Error feedback where every column has a level of its own: legacy blocks, K types, IQ4_XS, tiles. Eight rows are lanes. */
#include "encode.h"
#include "kernels/codebooks.h"
#include "kernels/kernels.h"
#include "search.h"

/* How a format's codes are stored: level + zero, or the index of a level of the table. */
struct grid {
    int format;
    struct levels levels;
    float zero;
    void (*unpack_32)(const void *block, struct unpacked_32 *out);
    void (*unpack_256)(const void *block, struct unpacked_256 *out);
    void (*pack)(const struct superblock *from, uint8_t *block);
};

static const struct grid grids[] = {
    {FMT_Q8_0, {.lo = -127, .hi = 127}, 0, unpack_q8_0, 0, 0},
    {FMT_Q5_0, {.lo = -16, .hi = 15}, 16, unpack_q5_0, 0, 0},
    {FMT_Q5_1, {.lo = 0, .hi = 31}, 0, unpack_q5_1, 0, 0},
    {FMT_Q4_0, {.lo = -8, .hi = 7}, 8, unpack_q4_0, 0, 0},
    {FMT_Q4_1, {.lo = 0, .hi = 15}, 0, unpack_q4_1, 0, 0},
    {FMT_IQ4_NL, {.table = iq4_table}, 0, unpack_iq4_nl, 0, 0},
    {FMT_IQ4_XS, {.table = iq4_table}, 0, 0, unpack_iq4_xs, pack_iq4_xs},
    {FMT_Q2_K, {.lo = 0, .hi = 3}, 0, 0, unpack_q2_k, pack_q2_k},
    {FMT_Q3_K, {.lo = -4, .hi = 3}, 4, 0, unpack_q3_k, pack_q3_k},
    {FMT_Q4_K, {.lo = 0, .hi = 15}, 0, 0, unpack_q4_k, pack_q4_k},
    {FMT_Q5_K, {.lo = 0, .hi = 31}, 0, 0, unpack_q5_k, pack_q5_k},
    {FMT_Q6_K, {.lo = -32, .hi = 31}, 32, 0, unpack_q6_k, pack_q6_k},
};
static const struct grid tile_grids[3] = {
    {-1, {.lo = 0, .hi = 3, .offset = -1.5f}, 1.5f, 0, 0, 0},
    {-1, {.lo = -8, .hi = 7}, 8, 0, 0, 0},
    {-1, {.lo = -127, .hi = 127}, 0, 0, 0, 0},
};

static const struct grid *grid_of(int format) {
    if (format_table[format].rows > 1) return &tile_grids[tile_bits(format) / 4];
    for (unsigned i = 0; i < sizeof grids / sizeof *grids; i++)
        if (grids[i].format == format) return &grids[i];
    return NULL;
}

/* Eight rows of a block: weight = scale[s] level - offset[s], s = column / depth. */
struct lanes {
    vec left[MOST_FEEDBACK]; /* weights, less the errors of the columns before; in the end the errors */
    vec scale[16], offset[16];
    int depth;
    uint8_t codes[LANES][MOST_FEEDBACK];
};

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

INLINE void round_columns(const struct grid *grid, const float *upper, int block, struct lanes *rows) {
    for (int j = 0; j < block; j++) {
        const float *u = upper + (int64_t)j * block;
        vec scale = rows->scale[j / rows->depth], offset = rows->offset[j / rows->depth], x = rows->left[j];
        mask code;
        vec level = round_level(grid, (x + offset) * inverse(scale), &code);
        vec error = (x - (scale * level - offset)) / u[j];
        rows->left[j] = error;
        for (int l = 0; l < LANES; l++) rows->codes[l][j] = (uint8_t)code[l];
        for (int k = j + 1; k < block; k++) rows->left[k] -= error * u[k];
    }
}

static void load_rows(const struct feedback_task *task, int64_t row, struct lanes *to) {
    for (int l = 0; l < LANES; l++)
        for (int j = 0; j < task->block; j++)
            to->left[j][l] = row + l < task->rows ? task->weights[(row + l) * task->block + j] : 0;
    for (int s = 0; s < 16; s++) to->scale[s] = to->offset[s] = splat(0);
}

static void store_errors(const struct feedback_task *task, int64_t row, const struct lanes *from) {
    for (int l = 0; l < LANES && row + l < task->rows; l++)
        for (int j = 0; j < task->block; j++) task->errors[(row + l) * task->block + j] = from->left[j][l];
}

INLINE void feed_back_blocks(const struct feedback_task *task, const struct grid *grid, struct lanes *rows) {
    int bytes = format_table[task->format].bytes;
    rows->depth = task->block;
    for (int64_t row = 0; row < task->rows; row += LANES) {
        load_rows(task, row, rows);
        for (int l = 0; l < LANES && row + l < task->rows; l++) {
            struct unpacked_32 block;
            grid->unpack_32(task->packed + (row + l) * bytes, &block);
            rows->scale[0][l] = block.scale;
            rows->offset[0][l] = block.offset;
        }
        round_columns(grid, task->upper, task->block, rows);
        store_errors(task, row, rows);
        for (int l = 0; l < LANES && row + l < task->rows; l++)
            pack_block(task->format, rows->codes[l], rows->scale[0][l], -rows->offset[0][l], task->packed + (row + l) * bytes);
    }
}

/* Packs codes under the scales that the block has. */
static void repack_superblock(const struct grid *grid, const uint8_t *codes, uint8_t *block) {
    struct unpacked_256 old;
    struct superblock new = {.d = 0};
    int depth = grid->format == FMT_Q4_K || grid->format == FMT_Q5_K || grid->format == FMT_IQ4_XS ? 32 : 16;
    grid->unpack_256(block, &old);
    new.d = float_to_half(old.scale);
    new.dmin = float_to_half(old.min);
    for (int s = 0; s < 256 / depth; s++) {
        new.scale[s] = (int8_t)old.scales[s * depth / 16];
        new.min[s] = (uint8_t)old.mins[s * depth / 16];
    }
    memcpy(new.codes, codes, sizeof new.codes);
    grid->pack(&new, block);
}

INLINE void feed_back_superblocks(const struct feedback_task *task, const struct grid *grid, struct lanes *rows) {
    int bytes = format_table[task->format].bytes;
    rows->depth = 16;
    for (int64_t row = 0; row < task->rows; row += LANES) {
        load_rows(task, row, rows);
        for (int l = 0; l < LANES && row + l < task->rows; l++) {
            struct unpacked_256 block;
            grid->unpack_256(task->packed + (row + l) * bytes, &block);
            for (int s = 0; s < 16; s++) {
                rows->scale[s][l] = block.scale * block.scales[s];
                rows->offset[s][l] = block.min * block.mins[s];
            }
        }
        round_columns(grid, task->upper, task->block, rows);
        store_errors(task, row, rows);
        for (int l = 0; l < LANES && row + l < task->rows; l++)
            repack_superblock(grid, rows->codes[l], task->packed + (row + l) * bytes);
    }
}

INLINE void feed_back_tiles(const struct feedback_task *task, const struct grid *grid, struct lanes *rows) {
    int bytes = format_table[task->format].bytes, bits = tile_bits(task->format);
    uint8_t codes[MOST_FEEDBACK][PANEL], *panel = task->packed;
    rows->depth = task->block;
    for (int64_t row = 0; row < task->rows; row += PANEL, panel += bytes) {
        for (int half = 0; half < PANEL; half += LANES) {
            load_rows(task, row + half, rows);
            for (int l = 0; l < LANES; l++) rows->scale[0][l] = half_at(panel + bytes - 2 * PANEL + 2 * (half + l));
            round_columns(grid, task->upper, task->block, rows);
            store_errors(task, row + half, rows);
            for (int l = 0; l < LANES; l++)
                for (int j = 0; j < task->block; j++) codes[j][half + l] = rows->codes[l][j];
        }
        pack_tiles(codes, task->block, bits, panel);
    }
}

CLONES void feed_back_levels(const struct feedback_task *task) {
    const struct grid *grid = grid_of(task->format);
    struct lanes rows;
    if (format_table[task->format].rows > 1)
        feed_back_tiles(task, grid, &rows);
    else if (grid->unpack_32)
        feed_back_blocks(task, grid, &rows);
    else
        feed_back_superblocks(task, grid, &rows);
}
