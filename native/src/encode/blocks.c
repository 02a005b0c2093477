/* Blocks of 32 with one scale (Q8_0, Q4_0, Q5_0, IQ4_NL) or a scale and an offset (Q4_1, Q5_1), eight blocks at a time. */
#include "encode.h"
#include "kernels/kernels.h"
#include "search.h"

#include <math.h>
#include <string.h>

#define SIZE 32
#define ROUNDS 2 /* of refit and rounding to the stored half; kept only where the error falls */

/* The grids: small enough divisors that the largest weight may be clipped by nearly half where others weigh more. */
static const struct levels q8_0 = {-127, 127, 0, 0, 125.5f, 0.5f, 5, 0};
static const struct levels q5_0 = {-16, 15, 0, 0, 14.0f, 0.25f, 14, 1};
static const struct levels q4_0 = {-8, 7, 0, 0, 6.0f, 0.25f, 18, 1};
static const struct levels iq4_nl = {0, 15, 0, iq4_table, 100.0f, 5.0f, 13, 1};
static const struct ranges q4_1 = {-0.02f, 0.03f, 6}, q5_1 = {-0.01f, 0.02f, 5};

/* Eight blocks, columns across: x[i][l] is column i of block l. Lanes past `blocks` are zero. */
static void load_blocks(const float *from, const float *importance, int blocks, vec *x, vec *w) {
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < SIZE; i++) {
            x[i][l] = l < blocks ? from[l * SIZE + i] : 0;
            w[i][l] = l < blocks ? importance[l * SIZE + i] : 1;
        }
}

/* The nearest values that a half can store, as floats. */
static void to_stored(vec *value) {
    for (int l = 0; l < LANES; l++) (*value)[l] = half_to_float(scale_to_half((*value)[l]));
}

static void to_stored_offset(vec *value) {
    for (int l = 0; l < LANES; l++) (*value)[l] = half_to_float(float_to_half(fminf(fmaxf((*value)[l], -HALF_MAX), HALF_MAX)));
}

/* Choose: the stored scale of every lane. */
INLINE vec choose_scale(const vec *x, const vec *w, const struct levels levels) {
    vec best = search_scale(x, w, SIZE, levels), xq, qq;
    to_stored(&best);
    vec error = scale_error(x, w, SIZE, levels, best);
    for (int round = 0; round < ROUNDS; round++) {
        project(x, w, SIZE, levels, best, &xq, &qq);
        vec refit = ratio(xq, qq);
        to_stored(&refit);
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
    to_stored(t);
    to_stored_offset(u);
    vec error = affine_error(x, w, SIZE, top, *t, *u);
    for (int round = 0; round < ROUNDS; round++) {
        code_moments(x, w, SIZE, top, *t, *u, &m);
        refit_affine(&m, 0, &refit_t, &refit_u);
        to_stored(&refit_t);
        /* the offset that fits the scale as it is stored */
        refit_u = ratio(m.x - refit_t * m.q, m.w);
        to_stored_offset(&refit_u);
        vec other = affine_error(x, w, SIZE, top, refit_t, refit_u);
        *t = pick(other < error, refit_t, *t);
        *u = pick(other < error, refit_u, *u);
        error = lesser(other, error);
    }
}

/* The stored scale (and offset) of every lane times its gain. */
INLINE void store_gain(vec *t, vec *u, vec xx, vec xq, int biased) {
    if (biased) return;
    for (int l = 0; l < LANES; l++) {
        float gain = fine_enough((*t)[l]) && fine_enough((*u)[l]) ? unbiased_gain(xx[l], xq[l]) : 1;
        (*t)[l] = half_to_float(scale_to_half((*t)[l] * gain));
        (*u)[l] = half_to_float(scale_to_half((*u)[l] * gain));
    }
}

/* Round: codes of every lane from its scale, which then takes its gain; `zero` is the code of level 0. */
INLINE void round_levels(const vec *x, const vec *w, const struct levels levels, vec *scale, float zero, int biased,
                         uint8_t codes[LANES][SIZE]) {
    vec inv = inverse(*scale), xx = splat(0), xq = splat(0);
    for (int i = 0; i < SIZE; i++) {
        vec level = nearest_level(levels, x[i] * inv), wx = w[i] * x[i];
        xx += wx * x[i];
        xq += wx * (*scale * level);
        for (int l = 0; l < LANES; l++) {
            int code = 0;
            if (levels.table)
                code = table_code(levels.table, level[l]);
            else
                code = (int)(level[l] + zero);
            codes[l][i] = (uint8_t)code;
        }
    }
    vec none = splat(0);
    store_gain(scale, &none, xx, xq, biased);
}

INLINE void round_affine(const vec *x, const vec *w, float top, vec *t, vec *u, int biased, uint8_t codes[LANES][SIZE]) {
    vec inv = inverse(*t), xx = splat(0), xq = splat(0);
    for (int i = 0; i < SIZE; i++) {
        vec q = whole_within((x[i] - *u) * inv, 0, top), wx = w[i] * x[i];
        xx += wx * x[i];
        xq += wx * (*t * q + *u);
        for (int l = 0; l < LANES; l++) codes[l][i] = (uint8_t)q[l];
    }
    store_gain(t, u, xx, xq, biased);
}

void pack_block(int format, const uint8_t *codes, float scale, float offset, uint8_t *block) {
    uint16_t d = float_to_half(scale), m = float_to_half(offset);
    if (format == FMT_Q8_0) {
        pack_q8_0(codes, d, block);
        return;
    }
    int affine = format == FMT_Q4_1 || format == FMT_Q5_1, fifth = format == FMT_Q5_0 || format == FMT_Q5_1;
    memcpy(block, &d, 2);
    block += 2;
    if (affine) {
        memcpy(block, &m, 2);
        block += 2;
    }
    if (fifth) {
        pack_fifth_bits(codes, block);
        block += 4;
    }
    pack_nibbles(codes, block);
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

CLONES void encode_blocks(const struct encode_task *task, int64_t first, int64_t last) {
    int bytes = format_table[task->format].bytes;
    int64_t per_row = task->cols / SIZE;
    int biased = task->biased;
    for (int64_t row = first; row < last; row++)
        for (int64_t at = 0; at < per_row; at += LANES) {
            vec x[SIZE], w[SIZE], scale = splat(0), offset = splat(0);
            uint8_t codes[LANES][SIZE];
            int blocks = per_row - at < LANES ? (int)(per_row - at) : LANES;
            load_blocks(task->weights + row * task->cols + at * SIZE, task->importance + at * SIZE, blocks, x, w);
            switch (task->format) {
            case FMT_Q8_0: encode_levels(x, w, q8_0, 0, biased, &scale, codes); break;
            case FMT_Q5_0: encode_levels(x, w, q5_0, 16, biased, &scale, codes); break;
            case FMT_Q4_0: encode_levels(x, w, q4_0, 8, biased, &scale, codes); break;
            case FMT_IQ4_NL: encode_levels(x, w, iq4_nl, 0, biased, &scale, codes); break;
            case FMT_Q4_1: encode_ranges(x, w, 15, q4_1, biased, &scale, &offset, codes); break;
            default: encode_ranges(x, w, 31, q5_1, biased, &scale, &offset, codes); break;
            }
            for (int l = 0; l < blocks; l++)
                pack_block(task->format, codes[l], scale[l], offset[l],
                           task->packed + ((row * per_row + at + l) * bytes));
        }
}
