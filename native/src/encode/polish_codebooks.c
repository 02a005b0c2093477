/* Coordinate descent where eight (or four) weights are one codeword: IQ1, IQ2, IQ3.
 *
 * With all other columns as they are, the output error of a codeword q of eight columns is (t - q)^T H (t - q) with H their
 * part of the second moment and t = q_old + H^-1 G: what error feedback minimises with U of H^-1 = U^T U, for eight columns
 * by themselves. d is fitted again as in polish_levels.c. */
#include "codewords.h"
#include "error.h"

#include <stdlib.h>

struct polishing {
    struct workspace work;
    float upper[COLUMNS * COLUMNS]; /* U of the inverse of every eight columns' moments; elsewhere zero */
    uint16_t index_of[1 << 16];     /* the codeword with a word of fields */
    float gradient[COLUMNS], level[COLUMNS];
};

/* U (8, 8) on the diagonal of `upper` for the moments H of columns first .. first + 7: H = R R^T from the last column up,
 * U = R^-1; returns whether H is positive definite. */
static int factor_eight(const float *moments, int first, float *upper) {
    double r[8][8] = {{0}}, u[8][8] = {{0}};
    for (int j = 7; j >= 0; j--)
        for (int i = j; i >= 0; i--) {
            double rest = moments[(first + i) * COLUMNS + first + j];
            for (int k = j + 1; k < 8; k++) rest -= r[i][k] * r[j][k];
            if (i == j && !(rest > 0)) return 0;
            r[i][j] = i == j ? sqrt(rest) : rest / r[j][j];
        }
    for (int j = 0; j < 8; j++)
        for (int i = j; i >= 0; i--) {
            double rest = i == j;
            for (int k = i + 1; k <= j; k++) rest -= r[i][k] * u[k][j];
            u[i][j] = rest / r[i][i];
            upper[(first + i) * COLUMNS + first + j] = (float)u[i][j];
        }
    return 1;
}

static void load_polishing(const struct book *book, struct polishing *to) {
    load_levels(book, &to->work);
    load_factor(book, &to->work, to->upper);
    for (int c = 0; c < book->entries; c++) to->index_of[book->words[c]] = (uint16_t)c;
}

/* The shift of IQ1's levels, 8 (-1, 0, 1) + shift; 0 where a format has none. */
INLINE int shift_of(const struct book book, int level) {
    if (book.beside != SHIFT_OF_8 && book.beside != SHIFT_OF_32) return 0;
    return (level & 7) == 1 ? 1 : -1;
}

/* The codes of a unit from its levels. */
INLINE void restore_unit(const struct book book, struct polishing *state, int u) {
    struct codewords *codes = &state->work.codes;
    int bits = 16 / book.width, shift = shift_of(book, (int)state->level[8 * u]);
    unsigned signs = 0;
    for (int at = 0; at < 8; at += book.width) {
        unsigned word = 0;
        for (int j = 0; j < book.width; j++) {
            float level = state->level[8 * u + at + j] - (float)shift;
            if (shift == 0 && level < 0) {
                signs |= 1u << (at + j);
                level = -level;
            }
            unsigned field = 0;
            while (field < 7 && book.levels[field] != level) field++;
            word |= field << bits * j;
        }
        codes->index[(8 * u + at) / book.width] = state->index_of[word];
    }
    codes->signs[u] = (uint8_t)signs;
    codes->down[u] = shift < 0;
}

/* The level of column j of unit u as its codes have it. */
INLINE float coded_level(const struct book book, const struct workspace *work, int u, int j) {
    const struct codewords *codes = &work->codes;
    float level = level_at(work, book.width, codes->index[(8 * u + j) / book.width], j % book.width);
    if (book.beside == SHIFT_OF_8 || book.beside == SHIFT_OF_32) return level + (codes->down[u] ? -1.0f : 1.0f);
    return codes->signs[u] >> j & 1 ? -level : level;
}

INLINE void move_unit(const struct book book, struct polishing *state, const float *moments, int u, float t) {
    for (int j = 0; j < 8; j++) {
        int column = 8 * u + j;
        float level = coded_level(book, &state->work, u, j), step = t * (level - state->level[column]);
        const float *h = moments + column * COLUMNS;
        state->level[column] = level;
        if (step != 0)
            for (int k = 0; k < COLUMNS; k++) state->gradient[k] -= step * h[k];
    }
}

INLINE void polish_unit(const struct book book, struct polishing *state, const float *moments, int u, float t) {
    const float *upper = state->upper + 8 * u * COLUMNS + 8 * u;
    float error[8], now = 0;
    for (int i = 0; i < 8; i++) {
        error[i] = 0;
        for (int k = i; k < 8; k++) error[i] += upper[i * COLUMNS + k] * state->gradient[8 * u + k];
        now += error[i] * error[i];
    }
    for (int j = 0; j < 8; j++) {
        float step = 0;
        for (int i = 0; i <= j; i++) step += upper[i * COLUMNS + j] * error[i];
        state->work.left[8 * u + j] = t * state->level[8 * u + j] + step;
    }
    int shift = book.beside == SHIFT_OF_32 ? shift_of(book, (int)state->level[8 * u]) : 0;
    float cost = round_unit(book, &state->work, state->upper, u, t, shift);
    if (cost < 0.9999f * now) /* less is lost in the rounding of the sums */
        move_unit(book, state, moments, u, t);
    else
        restore_unit(book, state, u);
}

/* The scale with its best change, as a half of d. */
INLINE float refit_scale(const struct book book, const struct polishing *state, const float *moments, const int16_t *scales,
                         float scale) {
    float fall[COLUMNS] = {0}, aa = 0, ga = 0;
    for (int j = 0; j < COLUMNS; j++) {
        const float *h = moments + j * COLUMNS;
        float step = scales[j / 16] * state->level[j];
        for (int k = 0; k < COLUMNS; k++) fall[k] += step * h[k];
        ga += step * state->gradient[j];
    }
    for (int j = 0; j < COLUMNS; j++) aa += scales[j / 16] * state->level[j] * fall[j];
    if (!(aa > 0)) return scale;
    float next = half_to_float(scale_to_half((scale + ga / aa) / book.fraction)) * book.fraction, step = next - scale;
    return step * (step * aa - 2 * ga) < 0 ? next : scale;
}

INLINE void polish_rows(const struct polish_task *task, struct polishing *state, const struct book book,
                        void (*unpack)(const void *, struct unpacked_256 *),
                        void (*pack)(const struct codewords *, uint8_t *)) {
    uint8_t *block = task->packed;
    struct codewords *codes = &state->work.codes;
    load_polishing(&book, state);
    for (int64_t row = 0; row < task->rows; row++, block += format_table[task->format].bytes) {
        struct unpacked_256 old;
        unpack(block, &old);
        memset(codes, 0, sizeof *codes);
        for (int s = 0; s < 16; s++) codes->scale[s * 16 / book.depth] = (uint8_t)(old.scales[s] / 2);
        for (int j = 0; j < COLUMNS; j++) state->level[j] = old.codes[j];
        memcpy(state->gradient, task->gradient + row * COLUMNS, sizeof state->gradient);
        for (int u = 0; u < COLUMNS / 8; u++) polish_unit(book, state, task->moments, u, old.scale * old.scales[u / 2]);
        codes->d = float_to_half(refit_scale(book, state, task->moments, old.scales, old.scale) / book.fraction);
        pack(codes, block);
    }
}

static void polish_task_rows(const struct polish_task *task, struct polishing *state) {
    switch (task->format) {
    case FMT_IQ1_S: polish_rows(task, state, iq1_s, unpack_iq1_s, pack_iq1_s); break;
    case FMT_IQ1_M: polish_rows(task, state, iq1_m, unpack_iq1_m, pack_iq1_m); break;
    case FMT_IQ2_XXS: polish_rows(task, state, iq2_xxs, unpack_iq2_xxs, pack_iq2_xxs); break;
    case FMT_IQ2_XS: polish_rows(task, state, iq2_xs, unpack_iq2_xs, pack_iq2_xs); break;
    case FMT_IQ2_S: polish_rows(task, state, iq2_s, unpack_iq2_s, pack_iq2_s); break;
    case FMT_IQ3_XXS: polish_rows(task, state, iq3_xxs, unpack_iq3_xxs, pack_iq3_xxs); break;
    default: polish_rows(task, state, iq3_s, unpack_iq3_s, pack_iq3_s); break;
    }
}

int THIS_COPY(polish_codebooks)(const struct polish_task *task) {
    struct polishing *state = aligned_alloc(32, (sizeof *state + 31) / 32 * 32);
    int failed = 0;
    if (!state) return set_error("no memory for coordinate descent");
    memset(state->upper, 0, sizeof state->upper);
    for (int first = 0; first < COLUMNS && !failed; first += 8) failed = !factor_eight(task->moments, first, state->upper);
    if (failed)
        set_error("the second moment is not positive definite: dampen it");
    else
        polish_task_rows(task, state);
    free(state);
    return failed ? -1 : 0;
}
