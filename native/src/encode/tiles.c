/* U2, U4, U8: panels of 16 rows with one half a row and G columns; the lanes are rows. */
#include "encode.h"
#include "kernels/kernels.h"
#include "search.h"

#include <string.h>

#define MOST_COLUMNS 256
#define ROUNDS 2

static const struct levels u2 = {0, 3, -1.5f, 0, 0.9f, 0.1f, 16, 0, 0};
static const struct levels u4 = {-8, 7, 0, 0, 5.5f, 0.25f, 20, 1, 0};
static const struct levels u8 = {-127, 127, 0, 0, 125.5f, 0.5f, 5, 0, 0};

static void load_rows(const struct encode_task *task, int64_t row, int64_t column, int columns, vec *x, vec *w) {
    for (int l = 0; l < LANES; l++)
        for (int i = 0; i < columns; i++) {
            x[i][l] = row + l < task->rows ? task->weights[(row + l) * task->cols + column + i] : 0;
            w[i][l] = task->importance[column + i];
        }
}

INLINE vec choose_scale(const vec *x, const vec *w, int columns, const struct levels levels) {
    vec best = search_scale(x, w, columns, levels), xq, qq;
    for (int l = 0; l < LANES; l++) best[l] = half_to_float(scale_to_half(best[l]));
    vec error = scale_error(x, w, columns, levels, best);
    for (int round = 0; round < ROUNDS; round++) {
        project(x, w, columns, levels, best, &xq, &qq);
        vec refit = ratio(xq, qq);
        for (int l = 0; l < LANES; l++) refit[l] = half_to_float(scale_to_half(refit[l]));
        vec other = scale_error(x, w, columns, levels, refit);
        best = pick(other < error, refit, best);
        error = lesser(other, error);
    }
    /* U2 has no level at zero: weights below the smallest half are nearer to a scale of none */
    return pick(scale_error(x, w, columns, levels, splat(0)) < error, splat(0), best);
}

/* Codes as the tile stores them: q of s (q - 1.5), s (q - 8), or s q with q signed. The scale then takes its gain. */
INLINE void round_levels(const vec *x, const vec *w, int columns, const struct levels levels, float zero, int biased, vec *scale,
                         uint8_t (*codes)[PANEL], int half) {
    vec inv = inverse(*scale), xx = splat(0), xq = splat(0);
    for (int i = 0; i < columns; i++) {
        vec level = nearest_level(levels, x[i] * inv), wx = w[i] * x[i];
        xx += wx * x[i];
        xq += wx * (*scale * level);
        for (int l = 0; l < LANES; l++) codes[i][half * LANES + l] = (uint8_t)(int)(level[l] + zero);
    }
    for (int l = 0; l < LANES && !biased; l++)
        if (fine_enough((*scale)[l])) (*scale)[l] = half_to_float(scale_to_half((*scale)[l] * unbiased_gain(xx[l], xq[l])));
}

INLINE vec encode_half_panel(const vec *x, const vec *w, int columns, int bits, int biased, uint8_t (*codes)[PANEL],
                            int half) {
    vec scale;
    if (bits == 2) {
        scale = choose_scale(x, w, columns, u2);
        round_levels(x, w, columns, u2, 1.5f, biased, &scale, codes, half);
    } else if (bits == 4) {
        scale = choose_scale(x, w, columns, u4);
        round_levels(x, w, columns, u4, 8, biased, &scale, codes, half);
    } else {
        scale = choose_scale(x, w, columns, u8);
        round_levels(x, w, columns, u8, 0, biased, &scale, codes, half);
    }
    return scale;
}

void THIS_COPY(encode_tiles)(const struct encode_task *task, int64_t first, int64_t last) {
    const struct format_traits *traits = &format_table[task->format];
    int columns = traits->columns, bits = tile_bits(task->format);
    uint8_t *to = task->packed + first / PANEL * (task->cols / columns) * traits->bytes;
    vec x[MOST_COLUMNS], w[MOST_COLUMNS];
    uint8_t codes[MOST_COLUMNS][PANEL];
    for (int64_t row = first; row < last; row += PANEL)
        for (int64_t column = 0; column < task->cols; column += columns) {
            uint16_t scales[PANEL];
            for (int half = 0; half < 2; half++) {
                load_rows(task, row + half * LANES, column, columns, x, w);
                vec scale = encode_half_panel(x, w, columns, bits, task->biased, codes, half);
                for (int l = 0; l < LANES; l++) scales[half * LANES + l] = float_to_half(scale[l]);
            }
            to = pack_tiles(codes, columns, bits, to);
            memcpy(to, scales, sizeof scales);
            to += sizeof scales;
        }
}
