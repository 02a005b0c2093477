/* Blocks of 32 with one scale (Q8_0, Q4_0, Q5_0, IQ4_NL) or a scale and an offset (Q4_1, Q5_1), eight blocks at a time. */
#include "encode.h"
#include "kernels/kernels.h"
#include "search.h"

#include <math.h>
#include <string.h>

#define SIZE 32
#define ROUNDS 2 /* of refit and rounding to the stored half; kept only where the error falls */

/* The grids: small enough divisors that the largest weight may be clipped by nearly half where others weigh more. */
static const struct levels q8_0 = {-127, 127, 0, 0, 125.5f, 0.5f, 5, 0, 0};
static const struct levels q5_0 = {-16, 15, 0, 0, 14.0f, 0.5f, 7, 1, 1};
static const struct levels q4_0 = {-8, 7, 0, 0, 6.0f, 0.5f, 9, 1, 1};
static const struct levels iq4_nl = {0, 15, 0, iq4_table, 100.0f, 5.0f, 13, 1, 0};
static const struct ranges q4_1 = {-0.06f, 0.024f, 7}, q5_1 = {-0.03f, 0.012f, 7};

/* Eight blocks, columns across: x[i][l] is column i of block l. Lanes past `blocks` hold `rest`. */
INLINE void load_blocks(const float *from, int blocks, float rest, vec *x) {
    float whole_lanes[LANES * SIZE];
    if (blocks < LANES) {
        for (int i = 0; i < LANES * SIZE; i++) whole_lanes[i] = i < blocks * SIZE ? from[i] : rest;
        from = whole_lanes;
    }
    load_lanes(from, SIZE, SIZE, x);
}

/* The nearest offset that a half can store. */
INLINE vec to_stored_offset(vec wish) {
    vec near = to_stored(wish);
    return pick(magnitude(wish) <= 0.5f * HALF_LEAST, splat(0), near);
}

/* Choose: the stored scale of every lane. */
INLINE vec choose_scale(const vec *x, const vec *w, const struct levels levels) {
    vec best = to_stored(search_scale(x, w, SIZE, levels)), xq, qq;
    vec error = scale_error(x, w, SIZE, levels, best);
    for (int round = 0; round < ROUNDS; round++) {
        project(x, w, SIZE, levels, best, &xq, &qq);
        vec refit = to_stored(ratio(xq, qq));
        vec other = scale_error(x, w, SIZE, levels, refit);
        best = pick(other < error, refit, best);
        error = lesser(other, error);
    }
    /* IQ4_NL has no level at zero: weights below the smallest half are nearer to a scale of none */
    return pick(scale_error(x, w, SIZE, levels, splat(0)) < error, splat(0), best);
}

/* Choose: the stored scale and offset of every lane. */
INLINE void choose_affine(const vec *x, const vec *w, float top, const struct ranges ranges, vec *t, vec *u) {
    struct moments m;
    vec refit_t, refit_u;
    search_affine(x, w, SIZE, top, ranges, 0, &m, t, u);
    *t = to_stored(*t);
    *u = to_stored_offset(*u);
    vec error = affine_error(x, w, SIZE, top, *t, *u);
    for (int round = 0; round < ROUNDS; round++) {
        code_moments(x, w, SIZE, top, *t, *u, &m);
        refit_affine(&m, 0, &refit_t, &refit_u);
        refit_t = to_stored(refit_t);
        /* the offset that fits the scale as it is stored */
        refit_u = to_stored_offset(ratio(m.x - refit_t * m.q, m.w));
        /* the scale that fits the offset where that ends at the largest half */
        vec beside = to_stored(ratio(m.xq - refit_u * m.q, m.qq));
        refit_t = pick(magnitude(refit_u) >= HALF_MAX, beside, refit_t);
        vec other = affine_error(x, w, SIZE, top, refit_t, refit_u);
        *t = pick(other < error, refit_t, *t);
        *u = pick(other < error, refit_u, *u);
        error = lesser(other, error);
    }
}

/* The stored scale (and offset) of every lane times its gain. */
INLINE void store_gain(vec *t, vec *u, vec xx, vec xq, int biased) {
    if (biased) return;
    vec gain = splat(1);
    for (int l = 0; l < LANES; l++)
        if (fine_enough((*t)[l]) && fine_enough((*u)[l])) gain[l] = unbiased_gain(xx[l], xq[l]);
    *t = to_stored(*t * gain);
    *u = to_stored(*u * gain);
}

/* Round: codes of every lane from its scale, which then takes its gain; `zero` is the code of level 0. */
INLINE void round_levels(const vec *x, const vec *w, const struct levels levels, vec *scale, float zero, int biased,
                         uint8_t codes[LANES][SIZE]) {
    vec inv = inverse(*scale), xx = splat(0), xq = splat(0), none = splat(0), four[4];
    for (int i = 0; i < SIZE; i++) {
        vec level = nearest_level(levels, x[i] * inv), wx = w[i] * x[i];
        xx += wx * x[i];
        xq += wx * (*scale * level);
        four[i % 4] = levels.table ? table_code(levels.table, level) : level + zero;
        if (i % 4 == 3) store_codes(four, SIZE, &codes[0][i - 3]);
    }
    store_gain(scale, &none, xx, xq, biased);
}

INLINE void round_affine(const vec *x, const vec *w, float top, vec *t, vec *u, int biased, uint8_t codes[LANES][SIZE]) {
    vec inv = inverse(*t), xx = splat(0), xq = splat(0), four[4];
    for (int i = 0; i < SIZE; i++) {
        vec q = whole_within((x[i] - *u) * inv, 0, top), wx = w[i] * x[i];
        xx += wx * x[i];
        xq += wx * (*t * q + *u);
        four[i % 4] = q;
        if (i % 4 == 3) store_codes(four, SIZE, &codes[0][i - 3]);
    }
    store_gain(t, u, xx, xq, biased);
}

INLINE void encode_levels(const vec *x, const vec *w, const struct levels levels, float zero, int biased, vec *scale,
                          uint8_t codes[LANES][SIZE]) {
    *scale = choose_scale(x, w, levels);
    round_levels(x, w, levels, scale, zero, biased, codes);
}

INLINE void encode_ranges(const vec *x, const vec *w, float top, const struct ranges ranges, int biased, vec *scale,
                          vec *offset, uint8_t codes[LANES][SIZE]) {
    choose_affine(x, w, top, ranges, scale, offset);
    round_affine(x, w, top, scale, offset, biased, codes);
}

INLINE void encode_lanes(int format, const vec *x, const vec *w, int biased, vec *scale, vec *offset,
                         uint8_t codes[LANES][SIZE]) {
    switch (format) {
    case FMT_Q8_0: encode_levels(x, w, q8_0, 0, biased, scale, codes); break;
    case FMT_Q5_0: encode_levels(x, w, q5_0, 16, biased, scale, codes); break;
    case FMT_Q4_0: encode_levels(x, w, q4_0, 8, biased, scale, codes); break;
    case FMT_IQ4_NL: encode_levels(x, w, iq4_nl, 0, biased, scale, codes); break;
    case FMT_Q4_1: encode_ranges(x, w, 15, q4_1, biased, scale, offset, codes); break;
    default: encode_ranges(x, w, 31, q5_1, biased, scale, offset, codes); break;
    }
}

/* Rows within columns: the importance goes across the lanes once for all rows. */
void THIS_COPY(encode_blocks)(const struct encode_task *task, int64_t first, int64_t last) {
    int bytes = format_table[task->format].bytes;
    int64_t per_row = task->cols / SIZE;
    for (int64_t at = 0; at < per_row; at += LANES) {
        int blocks = per_row - at < LANES ? (int)(per_row - at) : LANES;
        vec x[SIZE], w[SIZE];
        load_blocks(task->importance + at * SIZE, blocks, 1, w);
        for (int64_t row = first; row < last; row++) {
            vec scale = splat(0), offset = splat(0);
            uint8_t codes[LANES][SIZE];
            load_blocks(task->weights + row * task->cols + at * SIZE, blocks, 0, x);
            encode_lanes(task->format, x, w, task->biased, &scale, &offset, codes);
            for (int l = 0; l < blocks; l++)
                pack_block(task->format, codes[l], scale[l], offset[l], task->packed + ((row * per_row + at + l) * bytes));
        }
    }
}
