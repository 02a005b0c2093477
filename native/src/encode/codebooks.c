/* IQ1, IQ2 and IQ3: eight (or four) weights are one codeword of a codebook, with signs beside it (IQ2, IQ3) or a shift
 * of all weights by an eighth (IQ1); sub-blocks of 16 or 32 have odd whole scales 2 s + 1 under the half d of 256.
 *
 * Choice: curve.h gives the exact best codes of every unit of eight weights at every scale, so a sub-block's best scale
 * follows without a search, and what any d and s would leave is one look-up. d comes from a grid of stored halves and is
 * refitted in closed form. Codes are then rounded against the choice, and d takes the gain that search.h explains. */
#include "books.h"
#include "encode.h"

#include <math.h>

#include "curve.h"
#include "search.h"

#define COLUMNS 256
#define UNITS 32
#define GRID 28  /* candidates of d */
#define ROUNDS 3 /* of refit */
#define LEAST_WEIGHT 9.0e-13f /* 2^-40: below it every weight is nearer to zero than to the smallest scale */

/* What one call works in: the codebook with codewords across lanes, and the sums a, b of every codeword. */
struct workspace {
    vec levels[2048 / LANES * 8]; /* [codeword / 8][weight of the codeword] */
    float typical;                /* root mean square of the levels */
    vec a[2048 / LANES], b[2048 / LANES], shifted_a[2048 / LANES], shifted_b[2048 / LANES];
    struct points points;
    struct piece units[2][UNITS * UNIT_PIECES], sums[2][UNITS * UNIT_PIECES]; /* [1]: IQ1_S with the shift down */
};

/* The envelopes of a superblock: of unit u (first u of it), and of sub-block s (from its first unit on). */
struct curves {
    const struct piece *unit[2][UNITS], *sub[2][UNITS];
    int unit_count[2][UNITS], sub_count[2][UNITS], variants;
    float wish[UNITS]; /* the best scale of a sub-block, free of the others */
};

struct choice {
    float d; /* as it is stored, times the fraction, for the weights as they are scaled here */
    uint8_t scale[16], variant[16];
    double lowered;
};

static void load_levels(const struct book *book, struct workspace *work) {
    int bits = 16 / book->width;
    float squares = 0;
    for (int c = 0; c < book->entries; c++)
        for (int j = 0; j < book->width; j++) {
            float level = book->levels[book->words[c] >> bits * j & ((1 << bits) - 1)];
            work->levels[c / LANES * book->width + j][c % LANES] = level;
            squares += level * level;
        }
    work->typical = sqrtf(squares / (float)(book->entries * book->width));
}

/* a and b of every codeword for magnitudes; with `odd`, one weight has to take the wrong sign: the one that costs least. */
INLINE void sum_codewords(const struct book book, struct workspace *work, const float *x, const float *w, int odd) {
    vec weight[8], pull[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        weight[j] = splat(j < book.width ? w[j] : 0);
        pull[j] = splat(j < book.width ? w[j] * fabsf(x[j]) : 0);
    }
    for (int i = 0; i < book.entries / LANES; i++) {
        const vec *level = work->levels + i * book.width;
        vec a = splat(0), b = splat(0), least = splat(INFINITY);
#pragma GCC unroll 8
        for (int j = 0; j < book.width; j++) {
            vec product = level[j] * pull[j];
            a += level[j] * level[j] * weight[j];
            b += product;
            if (odd) least = lesser(product, least);
        }
        work->a[i] = a;
        work->b[i] = odd ? b - 2.0f * least : b;
    }
}

/* The same for signed weights and both shifts of IQ1: up in a and b, down in shifted_a and shifted_b. */
INLINE void sum_shifted(const struct book book, struct workspace *work, const float *x, const float *w) {
    float all_w = 0, all_x = 0;
    vec weight[8], pull[8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
        weight[j] = splat(w[j]);
        pull[j] = splat(w[j] * x[j]);
        all_w += w[j];
        all_x += w[j] * x[j];
    }
    for (int i = 0; i < book.entries / LANES; i++) {
        const vec *level = work->levels + i * 8;
        vec a = splat(all_w), b = splat(0), cross = splat(0);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            vec weighted = level[j] * weight[j];
            a += weighted * level[j];
            b += level[j] * pull[j];
            cross += weighted;
        }
        work->a[i] = a + 2.0f * cross;
        work->b[i] = b + all_x;
        work->shifted_a[i] = a - 2.0f * cross;
        work->shifted_b[i] = b - all_x;
    }
}

static int minus_signs(const float *x) {
    int signs = 0;
    for (int j = 0; j < 8; j++) signs |= (x[j] < 0) << j;
    return signs;
}

/* Two codewords of four weights; where one of the eight must take the wrong sign it is in the first or in the second. */
INLINE int pair_curve(const struct book book, struct workspace *work, const float *x, const float *w, float near, int odd,
                      struct piece *to) {
    struct piece half[2][2][UNIT_PIECES], joined[2 * UNIT_PIECES];
    for (int wrong = 0; wrong <= odd; wrong++)
        for (int h = 0; h < 2; h++) {
            work->points.count = 0;
            sum_codewords(book, work, x + 4 * h, w + 4 * h, wrong);
            add_candidates(work->a, work->b, book.entries, near, 0, &work->points);
            envelope(&work->points, half[wrong][h]);
        }
    work->points.count = 0;
    for (int second = 0; second <= odd; second++) {
        int count = add_curves((const struct piece *[]){half[odd && !second][0], half[second][1]}, 2, joined);
        for (int i = 0; i < count; i++)
            add_point(&work->points, joined[i].a, joined[i].b, joined[i].code | (uint32_t)second << 31);
    }
    return envelope(&work->points, to);
}

/* The envelope of unit u, and of its other variant. Bit 15 of a code: the shift of IQ1 is down. Bit 31: the wrong sign
 * is in the second codeword. */
INLINE void unit_curves(const struct book book, struct workspace *work, const float *x, const float *w, float near, int u,
                        struct curves *to) {
    struct piece *first = work->units[0] + u * UNIT_PIECES, *second = work->units[1] + u * UNIT_PIECES;
    int odd = book.beside == EVEN_SIGNS && __builtin_popcount((unsigned)minus_signs(x)) % 2;
    to->unit[0][u] = first;
    to->unit[1][u] = second;
    if (book.width == 4) {
        to->unit_count[0][u] = pair_curve(book, work, x, w, near, odd, first);
        return;
    }
    work->points.count = 0;
    if (book.beside == SHIFT_OF_8 || book.beside == SHIFT_OF_32)
        sum_shifted(book, work, x, w);
    else if (odd)
        sum_codewords(book, work, x, w, 1);
    else
        sum_codewords(book, work, x, w, 0);
    add_candidates(work->a, work->b, book.entries, near, 0, &work->points);
    if (book.beside == SHIFT_OF_8)
        add_candidates(work->shifted_a, work->shifted_b, book.entries, near, 1 << 15, &work->points);
    to->unit_count[0][u] = envelope(&work->points, first);
    if (book.beside != SHIFT_OF_32) return;
    work->points.count = 0;
    add_candidates(work->shifted_a, work->shifted_b, book.entries, near, 1 << 15, &work->points);
    to->unit_count[1][u] = envelope(&work->points, second);
}

/* Choose, first part: all envelopes of a superblock, and the scale that every sub-block would like. */
INLINE void superblock_curves(const struct book book, struct workspace *work, const float *x, const float *w,
                              struct curves *to) {
    int per_sub = book.depth / 8;
    to->variants = book.beside == SHIFT_OF_32 ? 2 : 1;
    for (int s = 0; s < UNITS / per_sub; s++) {
        float squares = 0, weights = 0, best = 0;
        for (int i = s * book.depth; i < (s + 1) * book.depth; i++) {
            squares += w[i] * x[i] * x[i];
            weights += w[i];
        }
        float near = sqrtf(squares / weights) / work->typical;
        for (int u = s * per_sub; u < (s + 1) * per_sub; u++)
            unit_curves(book, work, x + 8 * u, w + 8 * u, near, u, to);
        to->wish[s] = 0;
        for (int v = 0; v < to->variants; v++) {
            struct piece *sum = work->sums[v] + s * per_sub * UNIT_PIECES;
            int count = add_curves(to->unit[v] + s * per_sub, per_sub, sum);
            to->sub[v][s] = sum;
            to->sub_count[v][s] = count;
            for (int i = 0; i < count; i++)
                if (sum[i].b > 0 && sum[i].b * sum[i].b > best * sum[i].a) {
                    best = sum[i].b * sum[i].b / sum[i].a;
                    to->wish[s] = sum[i].b / sum[i].a;
                }
        }
    }
}

/* Choose, second part: the best whole scales under d, and in `above` and `below` the sums that refit it. */
static void settle(const struct book *book, const struct curves *curves, struct choice *c, double *above, double *below) {
    c->lowered = *above = *below = 0;
    for (int s = 0; s < COLUMNS / book->depth; s++) {
        int wish = (int)fminf(curves->wish[s] / c->d * 0.5f, (float)book->most);
        float best = -INFINITY, best_a = 0, best_b = 0;
        for (int k = wish - 1; k <= wish + 1; k++) {
            if (k < 0 || k > book->most) continue;
            float t = c->d * (float)(2 * k + 1);
            for (int v = 0; v < curves->variants; v++) {
                const struct piece *piece = piece_at(curves->sub[v][s], curves->sub_count[v][s], t);
                float gained = lowered(piece, t);
                if (!(gained > best)) continue;
                best = gained;
                c->scale[s] = (uint8_t)k;
                c->variant[s] = (uint8_t)v;
                best_a = piece->a;
                best_b = piece->b;
            }
        }
        double k = 2 * c->scale[s] + 1;
        c->lowered += best;
        *above += k * best_b;
        *below += k * k * best_a;
    }
}

/* d as a half would hold it: `unit` turns the numbers here into the stored ones. */
static float stored(double wish, float unit) { return half_to_float(scale_to_half((float)(wish * unit))) / unit; }

/* Choose: d and the whole scales of a superblock; no d (0) where zeros are nearer than anything. */
static struct choice choose_scales(const struct book *book, const struct curves *curves, float unit) {
    struct choice best = {.lowered = 0}, next = {.d = 0};
    float largest = 0, last = 0;
    double above = 0, below = 0, above_best = 0, below_best = 0;
    for (int s = 0; s < COLUMNS / book->depth; s++) largest = fmaxf(largest, curves->wish[s]);
    for (int i = 0; i < GRID + ROUNDS && largest > 0; i++) {
        float divisor = (float)(2 * book->most + 1) * (1.12f - 0.75f / GRID * (float)i);
        if (i >= GRID && below_best == 0) break;
        next.d = stored(i < GRID ? (double)(largest / divisor) : above_best / below_best, unit);
        if (next.d == last) continue;
        last = next.d;
        settle(book, curves, &next, &above, &below);
        if (next.lowered > best.lowered) {
            best = next;
            above_best = above;
            below_best = below;
        }
    }
    return best;
}

/* Signs of eight weights with an even number of minuses: the wrong one is where it costs least, among weights [from, to). */
static int even_minus_signs(const float *x, const float *w, const float *levels, int from, int to) {
    int signs = minus_signs(x), wrong = from;
    if (__builtin_popcount((unsigned)signs) % 2 == 0) return signs;
    for (int j = from + 1; j < to; j++)
        if (w[j] * fabsf(x[j]) * levels[j] < w[wrong] * fabsf(x[wrong]) * levels[wrong]) wrong = j;
    return signs ^ 1 << wrong;
}

/* Round: codes of every unit for a choice; returns sum w x (decoded weight), in the numbers here. */
static double round_codes(const struct book *book, const struct workspace *work, const struct curves *curves, const float *x,
                          const float *w, const struct choice *c, struct codewords *to) {
    double along = 0;
    for (int u = 0; u < UNITS; u++) {
        int s = u * 8 / book->depth, v = c->variant[s], second = 0;
        float t = c->d * (float)(2 * c->scale[s] + 1), levels[8];
        const struct piece *piece = piece_at(curves->unit[v][u], curves->unit_count[v][u], t);
        along += (double)t * piece->b;
        to->scale[s] = c->scale[s];
        if (book->width == 4) {
            to->index[2 * u] = piece->code & 0x7fff;
            to->index[2 * u + 1] = piece->code >> 16 & 0x7fff;
            second = (int)(piece->code >> 31);
        } else {
            to->index[u] = piece->code & 0x7fff;
            to->down[u] = piece->code >> 15 & 1;
        }
        for (int j = 0; j < 8; j++) {
            int code = to->index[u * 8 / book->width + j / book->width];
            levels[j] = work->levels[code / LANES * book->width + j % book->width][code % LANES];
        }
        int from = second ? 4 : 0;
        to->signs[u] = (uint8_t)(book->beside == EVEN_SIGNS ? even_minus_signs(x + 8 * u, w + 8 * u, levels, from, from + book->width)
                                                            : minus_signs(x + 8 * u));
    }
    return along;
}

/* One superblock. Weights are scaled by a power of two, so that neither tiny nor huge ones leave float32's range. */
INLINE void encode_superblock(const struct book book, struct workspace *work, const float *from, const float *w, int biased,
                              struct codewords *to) {
    struct curves curves;
    float x[COLUMNS], largest = 0;
    int exponent;
    memset(to, 0, sizeof *to);
    for (int i = 0; i < COLUMNS; i++) largest = fmaxf(largest, fabsf(from[i]));
    if (largest < LEAST_WEIGHT) return;
    frexpf(largest, &exponent);
    float whole = 0, unit = ldexpf(1 / book.fraction, exponent);
    for (int i = 0; i < COLUMNS; i++) {
        x[i] = ldexpf(from[i], -exponent);
        whole += w[i] * x[i] * x[i];
    }
    superblock_curves(book, work, x, w, &curves);
    struct choice choice = choose_scales(&book, &curves, unit);
    if (choice.d == 0) return;
    double along = round_codes(&book, work, &curves, x, w, &choice, to);
    float d = choice.d * unit;
    to->d = scale_to_half(fine_enough(d) && !biased ? d * unbiased_gain(whole, (float)along) : d);
}

INLINE void encode_rows_of(const struct encode_task *task, const struct book book,
                           void (*pack)(const struct codewords *, uint8_t *), int64_t first, int64_t last) {
    int bytes = format_table[task->format].bytes;
    struct workspace work;
    load_levels(&book, &work);
    for (int64_t at = first * task->cols; at < last * task->cols; at += COLUMNS) {
        struct codewords codewords;
        encode_superblock(book, &work, task->weights + at, task->importance + at % task->cols, task->biased, &codewords);
        pack(&codewords, task->packed + at / COLUMNS * bytes);
    }
}

CLONES void encode_codebooks(const struct encode_task *task, int64_t first, int64_t last) {
    switch (task->format) {
    case FMT_IQ1_S: encode_rows_of(task, iq1_s, pack_iq1_s, first, last); break;
    case FMT_IQ1_M: encode_rows_of(task, iq1_m, pack_iq1_m, first, last); break;
    case FMT_IQ2_XXS: encode_rows_of(task, iq2_xxs, pack_iq2_xxs, first, last); break;
    case FMT_IQ2_XS: encode_rows_of(task, iq2_xs, pack_iq2_xs, first, last); break;
    case FMT_IQ2_S: encode_rows_of(task, iq2_s, pack_iq2_s, first, last); break;
    case FMT_IQ3_XXS: encode_rows_of(task, iq3_xxs, pack_iq3_xxs, first, last); break;
    default: encode_rows_of(task, iq3_s, pack_iq3_s, first, last); break;
    }
}
