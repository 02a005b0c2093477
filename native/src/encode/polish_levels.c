/* Coordinate descent where every column has a level of its own. Eight rows are lanes.
 *
 * With G = (W - Q) H, moving column j of Q by s changes the output error tr((W - Q) H (W - Q)^T) by s^2 H_jj - 2 s G_j, so
 * the best level lies nearest to q_j + G_j / H_jj; G then falls by s times row j of H (Behdin et al. 2023, QuantEase). For
 * fixed codes the error is quadratic in d and dmin, too, and has its least where a 2 x 2 system says. */
#include "encode.h"
#include "levels.h"

struct state {
    vec gradient[MOST_FEEDBACK], level[MOST_FEEDBACK];
    vec d, dmin, k[16], m[16]; /* weight = d k[s] level - dmin m[s], s = column / depth */
    int depth, block;
    const float *moments;
};

/* A direction in which all columns move together, and what it does to the gradient. */
struct direction {
    vec step[MOST_FEEDBACK], fall[MOST_FEEDBACK];
};

static int is_zero(vec a) {
    mask bits = a != 0.0f;
    int any = 0;
    for (int l = 0; l < LANES; l++) any |= bits[l];
    return !any;
}

INLINE void sweep_codes(const struct grid *grid, struct state *rows) {
    for (int j = 0; j < rows->block; j++) {
        const float *h = rows->moments + (int64_t)j * rows->block;
        int s = j / rows->depth;
        vec scale = rows->d * rows->k[s];
        mask code;
        vec wish = rows->level[j] + rows->gradient[j] * finite_inverse(scale * h[j]);
        vec level = round_level(grid, wish, &code), step = scale * (level - rows->level[j]);
        if (is_zero(step)) continue;
        rows->level[j] = level;
        for (int i = 0; i < rows->block; i++) rows->gradient[i] -= step * h[i];
    }
}

INLINE void follow(const struct state *rows, struct direction *to) {
    for (int i = 0; i < rows->block; i++) to->fall[i] = splat(0);
    for (int j = 0; j < rows->block; j++) {
        const float *h = rows->moments + (int64_t)j * rows->block;
        for (int i = 0; i < rows->block; i++) to->fall[i] += to->step[j] * h[i];
    }
}

INLINE vec along(const struct state *rows, const vec *a, const vec *b) {
    vec total = splat(0);
    for (int i = 0; i < rows->block; i++) total += a[i] * b[i];
    return total;
}

/* The stored numbers nearest to d and dmin with their best changes; lanes that would not gain keep what they have. */
INLINE void refit_scales(int format, struct state *rows, int with_min, struct direction *a, struct direction *b) {
    vec aa, ab = splat(0), bb = splat(0), ga, gb = splat(0), to_d, to_min = splat(0);
    for (int j = 0; j < rows->block; j++) a->step[j] = rows->k[j / rows->depth] * rows->level[j];
    follow(rows, a);
    aa = along(rows, a->step, a->fall);
    ga = along(rows, a->step, rows->gradient);
    if (with_min) {
        for (int j = 0; j < rows->block; j++) b->step[j] = -rows->m[j / rows->depth];
        follow(rows, b);
        bb = along(rows, b->step, b->fall);
        ab = along(rows, a->step, b->fall);
        gb = along(rows, b->step, rows->gradient);
    }
    vec determinant = aa * bb - ab * ab;
    mask joint = determinant > 1e-4f * aa * bb;
    to_d = pick(joint, ratio(ga * bb - gb * ab, determinant), ratio(ga, aa));
    to_min = pick(joint, ratio(gb * aa - ga * ab, determinant), splat(0));
    for (int l = 0; l < LANES; l++) {
        to_d[l] = storable_scale(format, rows->d[l] + to_d[l]) - rows->d[l];
        to_min[l] = with_min ? storable_scale(format, rows->dmin[l] + to_min[l]) - rows->dmin[l] : 0;
    }
    vec change = to_d * (to_d * aa + 2.0f * to_min * ab - 2.0f * ga) + to_min * (to_min * bb - 2.0f * gb);
    to_d = pick(change < 0.0f, to_d, splat(0));
    to_min = pick(change < 0.0f, to_min, splat(0));
    rows->d += to_d;
    rows->dmin += to_min;
    for (int i = 0; i < rows->block; i++)
        rows->gradient[i] -= to_d * a->fall[i] + (with_min ? to_min * b->fall[i] : splat(0));
}

static void load_rows(const struct polish_task *task, int64_t row, struct state *to) {
    struct leveled block;
    to->d = to->dmin = splat(0);
    for (int s = 0; s < 16; s++) to->k[s] = to->m[s] = splat(0);
    for (int j = 0; j < task->block; j++) to->level[j] = to->gradient[j] = splat(0);
    for (int l = 0; l < LANES && row + l < task->rows; l++) {
        read_levels(task->format, task->packed, row + l, &block);
        to->depth = block.depth;
        to->d[l] = block.d;
        to->dmin[l] = block.dmin;
        for (int s = 0; s < task->block / block.depth; s++) {
            to->k[s][l] = block.k[s];
            to->m[s][l] = block.m[s];
        }
        for (int j = 0; j < task->block; j++) {
            to->level[j][l] = block.level[j];
            to->gradient[j][l] = task->gradient[(row + l) * task->block + j];
        }
    }
}

static void store_rows(const struct polish_task *task, const struct grid *grid, int64_t row, const struct state *from) {
    uint8_t codes[LANES][MOST_FEEDBACK];
    for (int j = 0; j < task->block; j++) {
        mask code;
        round_level(grid, from->level[j], &code);
        for (int l = 0; l < LANES; l++) codes[l][j] = (uint8_t)code[l];
    }
    for (int l = 0; l < LANES && row + l < task->rows; l++)
        write_levels(task->format, codes[l], from->d[l], from->dmin[l], row + l, task->packed);
}

void THIS_COPY(polish_levels)(const struct polish_task *task) {
    const struct grid *grid = grid_of(task->format);
    struct state rows = {.block = task->block, .moments = task->moments};
    struct direction a, b;
    for (int64_t row = 0; row < task->rows; row += LANES) {
        load_rows(task, row, &rows);
        sweep_codes(grid, &rows);
        refit_scales(task->format, &rows, grid->with_min, &a, &b);
        store_rows(task, grid, row, &rows);
    }
}
