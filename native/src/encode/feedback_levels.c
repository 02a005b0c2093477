/* Error feedback where every column has a level of its own: all but codebooks. Eight rows are lanes. */
#include "encode.h"
#include "levels.h"

/* Eight rows of a block: weight = scale[s] level - offset[s], s = column / depth, which are multiples of d and dmin. */
struct lanes {
    vec d, dmin;
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
        vec level = round_level(grid, (x + offset) * finite_inverse(scale), &code);
        vec error = (x - (scale * level - offset)) / u[j];
        rows->left[j] = error;
        for (int l = 0; l < LANES; l++) rows->codes[l][j] = (uint8_t)code[l];
        for (int k = j + 1; k < block; k++) rows->left[k] -= error * u[k];
    }
}

static void load_rows(const struct feedback_task *task, int64_t row, struct lanes *to) {
    struct leveled block;
    memset(to, 0, sizeof *to);
    to->depth = task->block;
    for (int l = 0; l < LANES && row + l < task->rows; l++) {
        read_levels(task->format, task->packed, row + l, &block);
        to->depth = block.depth;
        to->d[l] = block.d;
        to->dmin[l] = block.dmin;
        for (int s = 0; s < task->block / block.depth; s++) {
            to->scale[s][l] = block.d * block.k[s];
            to->offset[s][l] = block.dmin * block.m[s];
        }
        for (int j = 0; j < task->block; j++) to->left[j][l] = task->weights[(row + l) * task->block + j];
    }
}

static void store_rows(const struct feedback_task *task, int64_t row, const struct lanes *from) {
    for (int l = 0; l < LANES && row + l < task->rows; l++) {
        write_levels(task->format, from->codes[l], from->d[l], from->dmin[l], row + l, task->packed);
        for (int j = 0; j < task->block; j++) task->errors[(row + l) * task->block + j] = from->left[j][l];
    }
}

void THIS_COPY(feed_back_levels)(const struct feedback_task *task) {
    const struct grid *grid = grid_of(task->format);
    struct lanes rows;
    for (int64_t row = 0; row < task->rows; row += LANES) {
        load_rows(task, row, &rows);
        round_columns(grid, task->upper, task->block, &rows);
        store_rows(task, row, &rows);
    }
}
