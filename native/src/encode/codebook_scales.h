/* The choice of d and of all whole scales of a codebook superblock.
 *
 * The nearest codewords of every sub-block at a few scales around the usual one (codebook_search.h) say by how much any scale
 * would lower its error, so d and all s follow from look-ups: d from a grid of stored halves, refitted in closed form. */
#ifndef RONDEL_CODEBOOK_SCALES_H
#define RONDEL_CODEBOOK_SCALES_H
#include "codebook_search.h"
#include "kernels/kernels.h"

#define SUBS 2   /* vectors of sub-blocks, at most */
#define GRID 28  /* candidates of d */
#define ROUNDS 3 /* of refit */

/* The scales at which a sub-block is searched, in root mean squares of its weights over that of the levels: around the
 * usual best ones. Last comes the best scale for the codes found so far. */
#define SAMPLES 4 /* at most; then comes the codeword of least levels, the best one at large scales */
static const float three_levels[] = {0.9f, 1.3f}, eight_levels[] = {0.95f, 1.25f, 1.6f};

/* of the largest; a sub-block of smaller weights gets the smallest scale anyhow */
#define SMALLEST 0.025f

/* Sums of a and b of sub-blocks at every sampled scale, for both shifts of IQ1_S. */
struct samples {
    vec a[2 * SAMPLES][SUBS], b[2 * SAMPLES][SUBS];
    mask down[2 * SAMPLES][SUBS];
    int count;
    vec wish[SUBS], gained[SUBS]; /* the best scale, free of the other sub-blocks, and by how much it lowers the error */
    mask wish_down[SUBS];
};

struct choice {
    float d; /* as it is stored, times the fraction, for the weights as they are scaled here */
    vec scale[SUBS];
    mask down[SUBS];
    double lowered, above, below; /* of the error; the best d for these codes is above / below */
};

INLINE int samples_of(const struct book *book) { return book->width == 8 ? 3 : 4; }
INLINE int subs_of(const struct book *book) { return COLUMNS / LANES / book->depth; }  /* vectors of sub-blocks */
INLINE int units_of(const struct book *book) { return book->depth / 8; }               /* in a sub-block */

INLINE float largest_of(const vec *from, int count) {
    float most = 0;
    for (int i = 0; i < count; i++)
        for (int l = 0; l < LANES; l++) most = fmaxf(most, from[i][l]);
    return most;
}

/* Sums over the units of every sub-block. */
INLINE void sum_units(const struct book *book, const vec *from, vec *to) {
    for (int i = 0; i < subs_of(book); i++) to[i] = splat(0);
    for (int v = 0; v < WIDE; v++) to[v / units_of(book)] += from[v];
}

/* The usual scale of every sub-block. */
INLINE void usual_scales(const struct book *book, const struct dictionary *dictionary, const struct columns *columns,
                         vec *to) {
    for (int i = 0; i < subs_of(book); i++) {
        vec squares = splat(0), weights = splat(0);
        for (int j = i * book->depth; j < (i + 1) * book->depth; j++) {
            squares += columns->w[j] * columns->x[j] * columns->x[j];
            weights += columns->w[j];
        }
        squares = squares / weights;
        for (int l = 0; l < LANES; l++) to[i][l] = sqrtf(squares[l]) / dictionary->typical;
    }
    float largest = largest_of(to, subs_of(book));
    for (int i = 0; i < subs_of(book); i++) to[i] = greater(to[i], splat(largest * SMALLEST));
}

/* The sums of sub-blocks all of whose levels are the least one. */
INLINE void least_levels(const struct book *book, const struct columns *columns, vec *a, vec *b) {
    float level = book->levels[0];
    vec weights[WIDE], pulls[WIDE];
    for (int v = 0; v < WIDE; v++) {
        vec least = splat(INFINITY);
        weights[v] = pulls[v] = splat(0);
        for (int j = 8 * v; j < 8 * v + 8; j++) {
            weights[v] += level * level * columns->w[j];
            pulls[v] += level * columns->pull[j];
            least = lesser(least, level * columns->pull[j]);
        }
        if (book->beside == EVEN_SIGNS) pulls[v] = pick(columns->odd[v], pulls[v] - 2.0f * least, pulls[v]);
    }
    sum_units(book, weights, a);
    sum_units(book, pulls, b);
}

/* Counts the sample whose sums have been written, in the wish too. */
INLINE void count_sample(const struct book *book, struct samples *to) {
    int i = to->count++;
    for (int s = 0; s < subs_of(book); s++) {
        vec fit = ratio(greater(to->b[i][s], splat(0)), to->a[i][s]), gained = fit * to->b[i][s];
        mask better = gained > to->gained[s];
        to->wish[s] = pick(better, fit, to->wish[s]);
        to->wish_down[s] = pick_whole(better, to->down[i][s], to->wish_down[s]);
        to->gained[s] = greater(gained, to->gained[s]);
    }
}

/* What the sampled scales leave of every sub-block. */
INLINE void sample_scales(const struct book *book, const struct dictionary *dictionary, const struct columns *columns,
                          struct samples *to) {
    int shifts = book->beside == SHIFT_OF_32 ? 2 : 1, given_count = samples_of(book) - 1;
    const float *given = book->width == 8 ? three_levels : eight_levels;
    vec usual[SUBS], t[WIDE];
    memset(to, 0, sizeof *to);
    usual_scales(book, dictionary, columns, usual);
    for (int i = 0; i <= given_count * shifts; i++) {
        struct codes codes;
        mask down[WIDE];
        for (int v = 0; v < WIDE; v++) {
            int s = v / units_of(book), last = i == given_count * shifts;
            t[v] = given[i / shifts % given_count] * usual[s];
            if (last) t[v] = pick(to->wish[s] > 0.0f, to->wish[s], t[v]);
            to->down[i][s] = down[v] = last ? to->wish_down[s] : (mask){0} - i % shifts;
        }
        codes_at(book, dictionary, columns, t, down, &codes);
        sum_units(book, codes.a, to->a[i]);
        sum_units(book, codes.b, to->b[i]);
        count_sample(book, to);
    }
    if (shifts_of(book) == 2) return;
    least_levels(book, columns, to->a[to->count], to->b[to->count]);
    count_sample(book, to);
}

/* The best whole scales under d. */
INLINE void settle(const struct book *book, const struct samples *samples, struct choice *c) {
    vec lowered_all = splat(0), above = splat(0), below = splat(0);
    for (int v = 0; v < subs_of(book); v++) {
        vec wish = whole_within(samples->wish[v] / (2.0f * c->d) - 0.5f, 0, (float)book->most);
        vec best = splat(-INFINITY), scale = splat(0), a = splat(0), b = splat(0);
        mask down = {0};
        for (int step = -1; step <= 1; step++) {
            vec s = lesser(greater(wish + (float)step, splat(0)), splat((float)book->most)), odd = 2.0f * s + 1.0f;
            vec t = c->d * odd;
            for (int i = 0; i < samples->count; i++) {
                vec lowered = t * (2.0f * samples->b[i][v] - t * samples->a[i][v]);
                mask better = lowered > best;
                best = pick(better, lowered, best);
                scale = pick(better, s, scale);
                a = pick(better, samples->a[i][v], a);
                b = pick(better, samples->b[i][v], b);
                if (book->beside == SHIFT_OF_32) down = pick_whole(better, samples->down[i][v], down);
            }
        }
        vec odd = 2.0f * scale + 1.0f;
        c->scale[v] = scale;
        c->down[v] = down;
        lowered_all += best;
        above += odd * b;
        below += odd * odd * a;
    }
    c->lowered = sum(lowered_all);
    c->above = sum(above);
    c->below = sum(below);
}

/* d as a half would hold it: `unit` turns the numbers here into the stored ones. */
static float stored(double wish, float unit) { return half_to_float(scale_to_half((float)(wish * unit))) / unit; }

/* d and the whole scales of a superblock; no d (0) where zeros are nearer than anything. */
INLINE struct choice choose_scales(const struct book *book, const struct samples *samples, float unit) {
    struct choice best = {.lowered = 0}, next = {.d = 0};
    float largest = largest_of(samples->wish, subs_of(book)), last = 0;
    for (int i = 0; i < GRID + ROUNDS && largest > 0; i++) {
        float divisor = (float)(2 * book->most + 1) * (1.12f - 0.75f / GRID * (float)i);
        if (i >= GRID && best.below == 0) break;
        next.d = stored(i < GRID ? (double)(largest / divisor) : best.above / best.below, unit);
        if (next.d == last) continue;
        last = next.d;
        settle(book, samples, &next);
        if (next.lowered > best.lowered) best = next;
    }
    return best;
}
#endif
