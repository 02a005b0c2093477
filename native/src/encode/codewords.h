/* The codeword of eight (or four) weights that costs least when each one's error is felt by those after it.
 *
 * A codeword q leaves e by forward substitution, e_j = (w_j - q_j - sum over i < j of e_i U_ij) / U_jj, and what it costs
 * is exactly sum e_j^2: the errors of columns after it are what the next codewords see. Every codeword is tried with the
 * sign of each weight chosen in turn; for the few that then cost least, the best signs are searched exactly, depth first
 * (Schnorr and Euchner 1994), with an even number of minuses where the format has no eighth sign. */
#ifndef RONDEL_ENCODE_CODEWORDS_H
#define RONDEL_ENCODE_CODEWORDS_H
#include "books.h"
#include "encode.h"
#include "lanes.h"

#include <math.h>

#define COLUMNS 256
#define CANDIDATES 6 /* codewords whose signs are searched */
#define ANY_PARITY (-1)

struct workspace {
    vec levels[2048 / LANES * 8]; /* [codeword / 8][weight of the codeword] */
    vec cost[2048 / LANES];
    float ratio[COLUMNS][8];      /* U_ij / U_jj, i of the same eight columns as j: [j][i % 8] */
    float basis[COLUMNS][8];      /* IQ1: what level 1 of a column takes from the errors of its eight, scale 1 */
    vec square[COLUMNS / 8][2048 / LANES]; /* IQ1: what the codewords of eight columns alone would cost, scale 1 */
    float left[COLUMNS], errors[COLUMNS];
    struct codewords codes;
};

/* The columns of one codeword: e_j = target_j - gain_j level_j - sum over i < j of e_i ratio[j][i]. */
struct group {
    int width, unit;
    float scale, target[8], gain[8], ratio[8][8];
};

struct found {
    float cost;
    int index;
    unsigned signs;
};

static void load_levels(const struct book *book, struct workspace *work) {
    int bits = 16 / book->width;
    for (int c = 0; c < book->entries; c++)
        for (int j = 0; j < book->width; j++)
            work->levels[c / LANES * book->width + j][c % LANES] = book->levels[book->words[c] >> bits * j & ((1 << bits) - 1)];
}

INLINE int any_set(mask m) {
    typedef int64_t quads __attribute__((vector_size(32)));
    quads q = (quads)m;
    return (q[0] | q[1] | q[2] | q[3]) != 0;
}

INLINE float level_at(const struct workspace *work, int width, int index, int j) {
    return work->levels[index / LANES * width + j][index % LANES];
}

/* What every codeword costs with signs chosen in turn; where their parity is odd and must not be, one more sign is wrong. */
INLINE void score_codewords(const struct book book, const struct group *group, int parity, struct workspace *work) {
    const mask sign = (mask)splat(-0.0f);
    mask wanted = (mask)splat(parity == 1 ? -0.0f : 0.0f);
    for (int c = 0; c < book.entries / LANES; c++) {
        const vec *level = work->levels + c * book.width;
        vec error[8], cost = splat(0), flip = splat(INFINITY);
        mask minus = (mask)splat(0);
#pragma GCC unroll 8
        for (int j = 0; j < book.width; j++) {
            vec rest = splat(group->target[j]), step = magnitude(level[j] * group->gain[j]);
#pragma GCC unroll 8
            for (int i = 0; i < j; i++) rest -= error[i] * group->ratio[j][i];
            flip = lesser(flip, magnitude(rest) * step);
            minus ^= (mask)rest;
            step = (vec)((mask)step | ((mask)rest & sign));
            error[j] = rest - step;
            cost += error[j] * error[j];
        }
        if (parity != ANY_PARITY) cost = pick(((minus ^ wanted) & sign) != 0, cost + 4.0f * flip, cost);
        work->cost[c] = cost;
    }
}

/* The same for IQ1, whose codewords have no signs: errors are linear in the levels, so costs are quadratic. */
INLINE float score_shifted(const struct book book, const struct group *group, struct workspace *work) {
    float error[8], cost = 0, square = group->scale * group->scale;
    vec pull[8];
    for (int j = 0; j < 8; j++) {
        error[j] = group->target[j];
        for (int i = 0; i < j; i++) error[j] -= error[i] * group->ratio[j][i];
        cost += error[j] * error[j];
    }
    for (int k = 0; k < 8; k++) {
        float sum = 0;
        for (int j = k; j < 8; j++) sum += error[j] * work->basis[8 * group->unit + k][j];
        pull[k] = splat(2 * group->scale * sum);
    }
    for (int c = 0; c < book.entries / LANES; c++) {
        const vec *level = work->levels + c * 8;
        vec a = pull[0] * level[0], b = pull[1] * level[1];
#pragma GCC unroll 8
        for (int k = 2; k < 8; k += 2) {
            a += pull[k] * level[k];
            b += pull[k + 1] * level[k + 1];
        }
        work->cost[c] = square * work->square[group->unit][c] - (a + b);
    }
    return cost;
}

/* The `most` codewords with the least cost, in rising order; returns how many there are. */
INLINE int cheapest(const struct workspace *work, int entries, int most, int *index) {
    float cost[CANDIDATES], bar = INFINITY;
    int count = 0;
    for (int c = 0; c < entries / LANES; c++) {
        if (!any_set(work->cost[c] < bar)) continue;
        for (int l = 0; l < LANES; l++) {
            float here = work->cost[c][l];
            if (!(here < bar)) continue;
            int at = count < most ? count++ : most - 1;
            for (; at > 0 && cost[at - 1] > here; at--) cost[at] = cost[at - 1], index[at] = index[at - 1];
            cost[at] = here;
            index[at] = c * LANES + l;
            if (count == most) bar = cost[most - 1];
        }
    }
    return count;
}

/* Depth-first search of the signs of one codeword. */
struct walk {
    const struct group *group;
    float level[8], error[8], best;
    int parity;
    unsigned signs;
};

static void descend(struct walk *walk, int j, float cost, unsigned signs) {
    const struct group *group = walk->group;
    if (j == group->width) {
        walk->best = cost;
        walk->signs = signs;
        return;
    }
    float rest = group->target[j], step = group->gain[j] * walk->level[j];
    for (int i = 0; i < j; i++) rest -= walk->error[i] * group->ratio[j][i];
    unsigned near = (rest < 0) != (step < 0);
    for (unsigned other = 0; other < 2; other++) {
        unsigned minus = near ^ other, next = signs | minus << j;
        if (walk->parity != ANY_PARITY && j == group->width - 1 && __builtin_parity(next) != walk->parity) continue;
        float error = rest - (minus ? -step : step), sum = cost + error * error;
        if (!(sum < walk->best)) return;
        walk->error[j] = error;
        descend(walk, j + 1, sum, next);
    }
}

/* The best codeword and signs of a group that costs less than to->cost, if there is one. */
INLINE void find_codeword(const struct book book, struct workspace *work, const struct group *group, int parity,
                          struct found *to) {
    int index[CANDIDATES];
    if (book.beside == SHIFT_OF_8 || book.beside == SHIFT_OF_32) {
        float cost = score_shifted(book, group, work);
        if (!cheapest(work, book.entries, 1, index)) return;
        cost += work->cost[index[0] / LANES][index[0] % LANES];
        if (cost < to->cost) *to = (struct found){cost, index[0], 0};
        return;
    }
    score_codewords(book, group, parity, work);
    int count = cheapest(work, book.entries, CANDIDATES, index);
    struct walk walk = {.group = group, .best = to->cost, .parity = parity};
    for (int k = 0; k < count; k++) {
        float before = walk.best;
        for (int j = 0; j < book.width; j++) walk.level[j] = level_at(work, book.width, index[k], j);
        descend(&walk, 0, 0, 0);
        if (walk.best < before) *to = (struct found){walk.best, index[k], walk.signs};
    }
}

/* The group of columns first .. first + width under scale t, with `error` of the columns before it of the same eight. */
INLINE void load_group(const struct workspace *work, const float *upper, int first, int width, float t, float shift,
                       const float *error, struct group *to) {
    int inside = first % 8;
    to->width = width;
    to->unit = first / 8;
    to->scale = t;
    for (int j = 0; j < width; j++) {
        int column = first + j;
        float over = upper[column * COLUMNS + column];
        to->gain[j] = t / over;
        to->target[j] = work->left[column] / over - shift * to->gain[j];
        for (int i = 0; i < inside; i++) to->target[j] -= error[i] * work->ratio[column][i];
        for (int i = 0; i < width; i++) to->ratio[j][i] = work->ratio[column][inside + i];
    }
}

/* Errors of a found codeword; returns their sum of squares. */
INLINE float errors_of(const struct workspace *work, const struct group *group, const struct found *found, float *error) {
    float cost = 0;
    for (int j = 0; j < group->width; j++) {
        float level = level_at(work, group->width, found->index, j), rest = group->target[j];
        for (int i = 0; i < j; i++) rest -= error[i] * group->ratio[j][i];
        error[j] = rest - group->gain[j] * (found->signs >> j & 1 ? -level : level);
        cost += error[j] * error[j];
    }
    return cost;
}

/* Chooses the codes of unit u, eight columns, under scale t; shift is that of IQ1_S, 0 where the unit may choose. */
INLINE float round_unit(const struct book book, struct workspace *work, const float *upper, int u, float t, int shift) {
    struct group group;
    struct codewords *codes = &work->codes;
    float *error = work->errors + 8 * u;
    struct found best = {INFINITY, 0, 0};
    if (book.width == 8) {
        int from = book.beside == SHIFT_OF_8 ? -1 : shift, to = book.beside == SHIFT_OF_8 ? 1 : shift, chosen = shift;
        for (int s = from; s <= to; s += 2) {
            float before = best.cost;
            load_group(work, upper, 8 * u, 8, t, (float)s, NULL, &group);
            find_codeword(book, work, &group, book.beside == EVEN_SIGNS ? 0 : ANY_PARITY, &best);
            if (best.cost < before) chosen = s;
        }
        load_group(work, upper, 8 * u, 8, t, (float)chosen, NULL, &group);
        codes->index[u] = (uint16_t)best.index;
        codes->signs[u] = (uint8_t)best.signs;
        codes->down[u] = chosen < 0;
        return errors_of(work, &group, &best, error);
    }
    for (int parity = book.beside == EVEN_SIGNS ? 0 : ANY_PARITY; parity < (book.beside == EVEN_SIGNS ? 2 : 0); parity++) {
        struct found half[2] = {{INFINITY, 0, parity == 1}, {INFINITY, 0, parity == 1}};
        float trial[8], cost = 0;
        for (int h = 0; h < 2; h++) {
            load_group(work, upper, 8 * u + 4 * h, 4, t, 0, trial, &group);
            find_codeword(book, work, &group, parity, &half[h]);
            cost += errors_of(work, &group, &half[h], trial + 4 * h);
        }
        if (!(cost < best.cost) && parity > 0) continue;
        best.cost = cost;
        codes->index[2 * u] = (uint16_t)half[0].index;
        codes->index[2 * u + 1] = (uint16_t)half[1].index;
        codes->signs[u] = (uint8_t)(half[0].signs | half[1].signs << 4);
        memcpy(error, trial, sizeof trial);
    }
    return best.cost;
}

/* What the factor means for every eight columns: ratios for load_group, and for IQ1 what codewords cost. */
INLINE void load_factor(const struct book *book, struct workspace *work, const float *upper) {
    for (int j = 0; j < COLUMNS; j++)
        for (int i = j / 8 * 8; i < j; i++) work->ratio[j][i % 8] = upper[i * COLUMNS + j] / upper[j * COLUMNS + j];
    if (book->beside != SHIFT_OF_8 && book->beside != SHIFT_OF_32) return;
    for (int k = 0; k < COLUMNS; k++)
        for (int j = 0; j < 8; j++) {
            int column = k / 8 * 8 + j;
            float sum = column == k ? 1 / upper[k * COLUMNS + k] : 0;
            for (int i = k % 8; i < j; i++) sum -= work->basis[k][i] * work->ratio[column][i];
            work->basis[k][j] = sum;
        }
    for (int u = 0; u < COLUMNS / 8; u++)
        for (int c = 0; c < book->entries / LANES; c++) {
            vec total = splat(0);
            for (int j = 0; j < 8; j++) {
                vec error = splat(0);
                for (int k = 0; k <= j; k++) error += work->levels[c * 8 + k] * work->basis[8 * u + k][j];
                total += error * error;
            }
            work->square[u][c] = total;
        }
}

#endif
