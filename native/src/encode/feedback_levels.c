/* Error feedback where every column has a level of its own: legacy blocks, K types, IQ4_XS, tiles. Eight rows are lanes. */
#include "encode.h"
#include "levels.h"

/* Eight rows of a block: weight = scale[s] level - offset[s], s = column / depth. */
struct lanes {
    vec left[MOST_FEEDBACK]; /* weights, less the errors of the columns before; in the end the errors */
    vec scale[16], offset[16];
    int depth;
    uint8_t codes[LANES][MOST_FEEDBACK];
};

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

INLINE void feed_back_superblocks(const struct feedback_task *task, const struct grid *grid, struct lanes *rows) {
    int bytes = format_table[task->format].bytes;
    float d[LANES], dmin[LANES];
    rows->depth = 16;
    for (int64_t row = 0; row < task->rows; row += LANES) {
        load_rows(task, row, rows);
        for (int l = 0; l < LANES && row + l < task->rows; l++) {
            struct unpacked_256 block;
            grid->unpack_256(task->packed + (row + l) * bytes, &block);
            d[l] = block.scale;
            dmin[l] = block.min;
            for (int s = 0; s < 16; s++) {
                rows->scale[s][l] = block.scale * block.scales[s];
                rows->offset[s][l] = block.min * block.mins[s];
            }
        }
        round_columns(grid, task->upper, task->block, rows);
        store_errors(task, row, rows);
        for (int l = 0; l < LANES && row + l < task->rows; l++)
            repack_superblock(grid, rows->codes[l], d[l], dmin[l], task->packed + (row + l) * bytes);
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

void THIS_COPY(feed_back_levels)(const struct feedback_task *task) {
    const struct grid *grid = grid_of(task->format);
    struct lanes rows;
    if (format_table[task->format].rows > 1)
        feed_back_tiles(task, grid, &rows);
    else if (grid->unpack_32)
        feed_back_blocks(task, grid, &rows);
    else
        feed_back_superblocks(task, grid, &rows);
}
