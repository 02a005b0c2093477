/* Blocks of one scale and few levels: TQ1_0 and TQ2_0 (-1 to 1), Q2_0 (-1 to 2, of either sign), Q1_0 (-1 and 1), MXFP4.
 *
 * The codes for scale t change only at a few t per weight. Sums b = w x q and a = w q q over the block, kept up to date
 * from the largest of these t down, give every set of codes that is the nearest for some t, and b b / a says by how much
 * the scale b / a, the best for the set, lowers the error: the best scale of all is found without a grid. */
#include "encode.h"
#include "kernels/kernels.h"
#include "search.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MOST_COLUMNS 256

/* Below t the code of a weight has one more step away from zero. */
struct jump {
    float t, a, b; /* and this is what it adds to the sums */
};

static int falling(const void *one, const void *other) {
    const struct jump *a = one, *b = other;
    return a->t < b->t ? 1 : a->t > b->t ? -1 : 0;
}

/* The best scale for levels -1, 0, .. top; raises `gain` to what it wins, or returns 0. */
static double best_step(const float *x, const float *w, int columns, int top, double *gain) {
    struct jump jumps[2 * MOST_COLUMNS];
    int count = 0;
    double a = 0, b = 0, best = 0;
    for (int i = 0; i < columns; i++) {
        float size = fabsf(x[i]);
        for (int q = 1; q <= (x[i] > 0 ? top : 1) && size > 0; q++)
            jumps[count++] = (struct jump){size / ((float)q - 0.5f), w[i] * (float)(2 * q - 1), w[i] * size};
    }
    qsort(jumps, (size_t)count, sizeof *jumps, falling);
    for (int i = 0; i < count; i++) {
        a += jumps[i].a;
        b += jumps[i].b;
        if (b * b > *gain * a) *gain = b * b / a, best = b / a;
    }
    return best;
}

/* The scale of a block, before it is stored. */
static float choose_scale(int format, const float *x, const float *w, int columns) {
    double gain = 0, above = 0, below = 0;
    float turned[MOST_COLUMNS];
    switch (format) {
    case FMT_Q1_0:
        for (int i = 0; i < columns; i++) {
            above += (double)w[i] * fabsf(x[i]);
            below += w[i];
        }
        return (float)(above / below);
    case FMT_Q2_0:
        for (int i = 0; i < columns; i++) turned[i] = -x[i];
        above = best_step(x, w, columns, 2, &gain);
        below = best_step(turned, w, columns, 2, &gain);
        return (float)(below > 0 ? -below : above);
    default: return (float)best_step(x, w, columns, 1, &gain);
    }
}

/* Codes of a block under its stored scale, and with them the scale as it is stored at last. Q1_0 takes no gain: it loses a
 * third of the energy of most blocks, and more of it than any other format. */
static uint16_t round_block(int format, const float *x, const float *w, int columns, float d, int biased,
                            uint8_t *codes) {
    float stored = half_to_float(scale_to_half(d)), top = format == FMT_Q2_0 ? 2 : 1;
    double whole = 0, along = 0;
    if (format == FMT_Q1_0 && stored > 2 * d) stored = 0; /* no level is zero: nothing is nearer than the smallest half */
    for (int i = 0; i < columns; i++) {
        float level = stored == 0 ? 0 : fminf(fmaxf(rintf(x[i] / stored), -1), top);
        codes[i] = format == FMT_Q1_0 ? x[i] >= 0 : (uint8_t)(level + 1);
        whole += (double)w[i] * x[i] * x[i];
        along += (double)w[i] * x[i] * stored * level;
    }
    if (format == FMT_Q1_0 || biased || !fine_enough(stored)) return scale_to_half(stored);
    return scale_to_half(stored * unbiased_gain((float)whole, (float)along));
}

static void encode_rows_of(const struct encode_task *task, int64_t first, int64_t last) {
    int columns = format_table[task->format].columns, bytes = format_table[task->format].bytes;
    for (int64_t at = first * task->cols; at < last * task->cols; at += columns) {
        const float *x = task->weights + at, *w = task->importance + at % task->cols;
        uint8_t codes[MOST_COLUMNS], *block = task->packed + at / columns * bytes;
        float d = choose_scale(task->format, x, w, columns);
        uint16_t half = round_block(task->format, x, w, columns, d, task->biased, codes);
        pack_few_levels(task->format, codes, half, block);
    }
}

/* MXFP4: the scale is a power of two, so a few exponents are tried. */
#define EXPONENTS 4

/* The level of mxfp4_levels nearest to v >= 0, as its code. */
INLINE vec fp4_level(vec v, vec *code) {
    static const float levels[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    vec level = splat(0);
    *code = splat(0);
    for (int i = 1; i < 8; i++) {
        mask above = v > 0.5f * (levels[i - 1] + levels[i]);
        level += pick(above, splat(levels[i] - levels[i - 1]), splat(0));
        *code += pick(above, splat(1), splat(0));
    }
    return level;
}

static void encode_mxfp4(const float *x, const float *w, uint8_t *block) {
    float largest = 0, least = INFINITY;
    uint8_t codes[32];
    int exponent, chosen = 0;
    for (int i = 0; i < 32; i++) largest = fmaxf(largest, fabsf(x[i]));
    frexpf(largest, &exponent);
    for (int e = exponent - 4; e < exponent - 4 + EXPONENTS && largest > 0; e++) {
        /* twelve steps of 2^e reach from 0.75 to 6 times the largest weight; e is stored 128 higher */
        int stored = e + 128 < 0 ? 0 : e + 128 > 254 ? 254 : e + 128;
        vec error = splat(0), code;
        uint8_t rounded[32];
        for (int i = 0; i < 32; i += LANES) {
            vec v, weight;
            memcpy(&weight, w + i, sizeof weight);
            for (int l = 0; l < LANES; l++) v[l] = ldexpf(fabsf(x[i + l]), -exponent);
            float step = ldexpf(1, stored - 128 - exponent);
            vec off = v - step * fp4_level(v / step, &code);
            error += weight * off * off;
            for (int l = 0; l < LANES; l++) rounded[i + l] = (uint8_t)((int)code[l] | (x[i + l] < 0) << 3);
        }
        if (!(sum(error) < least)) continue;
        least = sum(error);
        chosen = stored;
        memcpy(codes, rounded, sizeof codes);
    }
    if (largest == 0) memset(codes, 0, sizeof codes);
    block[0] = (uint8_t)chosen;
    pack_nibbles(codes, block + 1);
}

void encode_few_levels(const struct encode_task *task, int64_t first, int64_t last) {
    if (task->format != FMT_MXFP4) {
        encode_rows_of(task, first, last);
        return;
    }
    for (int64_t at = first * task->cols; at < last * task->cols; at += 32)
        encode_mxfp4(task->weights + at, task->importance + at % task->cols, task->packed + at / 32 * 17);
}
