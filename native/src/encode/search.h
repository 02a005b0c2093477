/* The scale search of one sub-block a lane: candidates on a grid, each refitted in closed form, then alternation.
 *
 * For fixed codes the best scale (and offset) is a weighted least-squares solution; for fixed scales the best codes
 * are the nearest levels. A grid of ranges finds the basin, alternating the two finds its bottom. */
#ifndef RONDEL_ENCODE_SEARCH_H
#define RONDEL_ENCODE_SEARCH_H
#include "encode.h"
#include "kernels/kernels.h"
#include "lanes.h"

#define ALTERNATIONS 3 /* of refit and rounding after the grid; more change nothing that can be measured */

/* The levels of a format with a scale alone: weight = scale * level. Uniform: level = code + offset with code a whole
 * number in [lo, hi]. `table`, where set, holds 16 levels in rising order. */
struct levels {
    float lo, hi, offset;
    const float *table;
    float first, step; /* the grid: scale = largest magnitude / (first + i * step) */
    int count, both_signs;
    int fine; /* halvings of the step around the best */
};

/* The levels of IQ4_NL and IQ4_XS. */
static const float iq4_table[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* The place of a level in its table. */
INLINE vec table_code(const float *table, vec level) {
    mask code = {0};
    for (int i = 0; i < 15; i++) code -= level > table[i];
    return __builtin_convertvector(code, vec);
}

/* The level of a table nearest to v: its place is the number of edges below v, an edge being the middle of two levels. */
INLINE vec nearest_in_table(const float *t, vec v) {
#define EDGE(i) (0.5f * (t[i] + t[(i) + 1]))
#ifdef __AVX2__
    /* Four halvings of the sixteen places. Comparisons are 0 or -1, and a permutation reads the lowest three bits. */
    const __m256 quarters = {EDGE(1), EDGE(5), EDGE(9), EDGE(13)};
    const __m256 pairs = {EDGE(0), EDGE(2), EDGE(4), EDGE(6), EDGE(8), EDGE(10), EDGE(12), EDGE(14)};
    const __m256 lower = {t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7]};
    const __m256 upper = {t[8], t[9], t[10], t[11], t[12], t[13], t[14], t[15]};
    mask high = v > EDGE(7);
    mask place = (high & 2) - (v > pick(high, splat(EDGE(11)), splat(EDGE(3))));
    place = place + place - (v > (vec)_mm256_permutevar8x32_ps(quarters, (__m256i)place));
    place = place + place - (v > (vec)_mm256_permutevar8x32_ps(pairs, (__m256i)place));
    return pick(high, (vec)_mm256_permutevar8x32_ps(upper, (__m256i)place),
                (vec)_mm256_permutevar8x32_ps(lower, (__m256i)place));
#else
    vec level = splat(t[0]);
    for (int i = 0; i < 15; i++) {
        vec jump = splat(t[i + 1] - t[i]);
        level += (vec)((mask)jump & (v > EDGE(i)));
    }
    return level;
#endif
#undef EDGE
}

/* The level nearest to v. */
INLINE vec nearest_level(const struct levels levels, vec v) {
    if (levels.table) return nearest_in_table(levels.table, v);
    if (levels.offset == 0) return whole_within(v, levels.lo, levels.hi); /* saves an addition that changes nothing */
    return whole_within(v - levels.offset, levels.lo, levels.hi) + levels.offset;
}

/* The code that stores a level. */
INLINE vec level_code(const struct levels levels, vec level) {
    return levels.table ? table_code(levels.table, level) : level - levels.lo;
}

/* Sums over a lane for codes rounded with the scale whose inverse is given: w x q and w q q. */
INLINE void project_inverse(const vec *x, const vec *w, int depth, const struct levels levels, vec inv, vec *xq, vec *qq) {
    vec a = splat(0), b = splat(0);
    for (int i = 0; i < depth; i++) {
        vec q = nearest_level(levels, x[i] * inv), wq = w[i] * q;
        a += wq * x[i];
        b += wq * q;
    }
    *xq = a;
    *qq = b;
}

INLINE void project(const vec *x, const vec *w, int depth, const struct levels levels, vec scale, vec *xq, vec *qq) {
    project_inverse(x, w, depth, levels, inverse(scale), xq, qq);
}

/* Weighted squared error of a lane for codes rounded with `scale`. */
INLINE vec scale_error(const vec *x, const vec *w, int depth, const struct levels levels, vec scale) {
    vec inv = inverse(scale), error = splat(0);
    for (int i = 0; i < depth; i++) {
        vec e = x[i] - scale * nearest_level(levels, x[i] * inv);
        error += w[i] * e * e;
    }
    return error;
}

/* A lane's best scale so far, the divisor of the grid that led to it, and by how much it lowers the error of zeros. */
struct lead {
    vec scale, divisor, gain;
};

/* Codes with the sums xq and qq lead to the scale xq / qq, whose error is sum w x x - (w x q)^2 / (w q q). */
INLINE void consider(vec xq, vec qq, vec divisor, struct lead *lead) {
    vec refit = ratio(xq, qq), gain = xq * refit;
    mask better = gain > lead->gain;
    lead->scale = pick(better, refit, lead->scale);
    lead->divisor = pick(better, divisor, lead->divisor);
    lead->gain = greater(gain, lead->gain);
}

INLINE void try_scale(const vec *x, const vec *w, int depth, const struct levels levels, vec inv, vec divisor,
                      struct lead *lead) {
    vec xq, qq;
    project_inverse(x, w, depth, levels, inv, &xq, &qq);
    consider(xq, qq, divisor, lead);
}

/* Both signs of a scale at once: whole levels -lo..-hi of the negative one are the same numbers, clipped elsewhere. */
INLINE void try_both_signs(const vec *x, const vec *w, int depth, const struct levels levels, vec inv, vec divisor,
                           struct lead *lead) {
    vec xp = splat(0), pp = splat(0), xn = splat(0), nn = splat(0);
    for (int i = 0; i < depth; i++) {
        vec q = whole(x[i] * inv), p = lesser(greater(q, splat(levels.lo)), splat(levels.hi)), wp = w[i] * p;
        vec n = lesser(greater(q, splat(-levels.hi)), splat(-levels.lo)), wn = w[i] * n;
        xp += wp * x[i];
        pp += wp * p;
        xn += wn * x[i];
        nn += wn * n;
    }
    consider(xp, pp, divisor, lead);
    consider(-xn, nn, -divisor, lead);
}

/* The scale of every lane: the grid, then halves of its step around the best (`fine` times), then alternation. */
INLINE vec search_scale(const vec *x, const vec *w, int depth, const struct levels levels) {
    vec largest = splat(0);
    for (int i = 0; i < depth; i++) largest = greater(largest, magnitude(x[i]));
    vec unit = inverse(largest);
    struct lead lead = {splat(0), splat(0), splat(0)};
    for (int i = 0; i < levels.count; i++) {
        vec divisor = splat(levels.first + (float)i * levels.step);
        if (levels.both_signs && !levels.table) {
            try_both_signs(x, w, depth, levels, divisor * unit, divisor, &lead);
            continue;
        }
        try_scale(x, w, depth, levels, divisor * unit, divisor, &lead);
        if (levels.both_signs) try_scale(x, w, depth, levels, -divisor * unit, -divisor, &lead);
    }
    float step = levels.step;
    for (int i = 0; i < levels.fine; i++) {
        vec from = lead.divisor;
        step *= 0.5f;
        for (int side = -1; side <= 1; side += 2) {
            vec divisor = from + (float)side * step;
            try_scale(x, w, depth, levels, divisor * unit, divisor, &lead);
        }
    }
    for (int i = 0; i < ALTERNATIONS; i++) try_scale(x, w, depth, levels, inverse(lead.scale), lead.divisor, &lead);
    return lead.scale;
}

/* The factor that makes rounded weights unbiased: sum w x (g q) = sum w x x for the codes q that were chosen.
 *
 * Least squares shrinks: a block that loses a share e of its energy answers e too weakly, and unlike rounding noise that
 * adds up over channels and layers. Scales multiplied by g = 1 / (1 - e) answer at full strength and raise the squared
 * error to e / (1 - e) only (Vargaftik et al. 2021, DRIVE). Where half of the energy is lost, or so little less that the
 * rounding of a scale of 64 steps of a half decides whether dropping all weights would lose less, g stays 1. */
INLINE float unbiased_gain(float xx, float xq) { return xq > 0.51f * xx && xx > 0 ? xx / xq : 1; }

/* The nearest values that a half can store as a scale: finite, and not zero unless the wish is. */
INLINE vec to_stored(vec wish) {
#ifdef __AVX2__
    vec size = lesser(greater(magnitude(wish), splat(HALF_LEAST)), splat(HALF_MAX));
    vec near = (vec)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)size, _MM_FROUND_TO_NEAREST_INT));
    return pick(wish == 0.0f, splat(0), (vec)((mask)near | ((mask)wish & INT32_MIN)));
#else
    for (int l = 0; l < LANES; l++) wish[l] = half_to_float(scale_to_half(wish[l]));
    return wish;
#endif
}

/* Whether a stored scale can be multiplied by a gain of at most 2: below 64 steps of a half it would move by a whole
 * step, above half of the largest half it could leave the range. */
INLINE int fine_enough(float scale) {
    float size = scale < 0 ? -scale : scale;
    return size == 0 || (size >= 64 * HALF_LEAST && size <= HALF_MAX / 2);
}

/* Sums of a lane that give the error of any scale t and offset u (weight = t q + u) for fixed codes. */
struct moments {
    vec w, x, xx, q, qq, xq; /* each weighted: sum w, sum w x, sum w x x, ... */
};

INLINE void fixed_moments(const vec *x, const vec *w, int depth, struct moments *m) {
    m->w = m->x = m->xx = splat(0);
    for (int i = 0; i < depth; i++) {
        vec wx = w[i] * x[i];
        m->w += w[i];
        m->x += wx;
        m->xx += wx * x[i];
    }
}

INLINE void code_moments(const vec *x, const vec *w, int depth, float top, vec t, vec u, struct moments *m) {
    vec inv = inverse(t), sq = splat(0), sqq = splat(0), sxq = splat(0);
    for (int i = 0; i < depth; i++) {
        vec q = whole_within((x[i] - u) * inv, 0, top), wq = w[i] * q;
        sq += wq;
        sqq += wq * q;
        sxq += wq * x[i];
    }
    m->q = sq;
    m->qq = sqq;
    m->xq = sxq;
}

INLINE vec moments_error(const struct moments *m, vec t, vec u) {
    vec error = m->xx + t * (t * m->qq - 2.0f * m->xq) + u * (u * m->w - 2.0f * m->x) + 2.0f * t * u * m->q;
    return greater(error, splat(0));
}

/* Weighted squared error of a lane with codes rounded for scale t and offset u. */
INLINE vec affine_error(const vec *x, const vec *w, int depth, float top, vec t, vec u) {
    vec inv = inverse(t), error = splat(0);
    for (int i = 0; i < depth; i++) {
        vec e = (x[i] - u) - t * whole_within((x[i] - u) * inv, 0, top);
        error += w[i] * e * e;
    }
    return error;
}

/* Best t and u for fixed codes; sign < 0 keeps u <= 0, sign > 0 keeps u >= 0, 0 leaves it free. */
INLINE void refit_affine(const struct moments *m, int sign, vec *t, vec *u) {
    vec determinant = m->w * m->qq - m->q * m->q;
    mask flat = determinant <= 1e-6f * m->w * m->qq; /* one code alone: no slope in the data */
    vec fit_t = ratio(m->w * m->xq - m->q * m->x, determinant), fit_u = ratio(m->x - fit_t * m->q, m->w);
    mask refused = sign == 0 ? flat : (sign < 0 ? (flat | (fit_u > 0.0f)) : (flat | (fit_u < 0.0f)));
    *t = pick(refused, ratio(m->xq, m->qq), fit_t);
    *u = pick(refused, splat(0), fit_u);
}

/* Ranges tried: both ends of [least, largest] move inwards (or outwards) by i * step of it, i = first ... */
struct ranges {
    float first, step;
    int count;
};

/* The scale and offset of every lane: weight = t q + u with q in 0..top. */
INLINE void search_affine(const vec *x, const vec *w, int depth, float top, const struct ranges ranges, int sign,
                          struct moments *m, vec *best_t, vec *best_u) {
    vec least = x[0], most = x[0], t, u;
    for (int i = 1; i < depth; i++) {
        least = lesser(least, x[i]);
        most = greater(most, x[i]);
    }
    if (sign < 0) least = lesser(least, splat(0));
    if (sign > 0) least = greater(least, splat(0));
    vec width = most - least;
    fixed_moments(x, w, depth, m);
    *best_t = width / top;
    *best_u = least;
    vec best = affine_error(x, w, depth, top, *best_t, *best_u);
    int grid = ranges.count * ranges.count;
    for (int i = 0; i < grid + ALTERNATIONS; i++) {
        float low = ranges.first + (float)(i / ranges.count) * ranges.step;
        float high = ranges.first + (float)(i % ranges.count) * ranges.step;
        t = i < grid ? width * ((1.0f - low - high) / top) : *best_t;
        u = i < grid ? least + width * low : *best_u;
        code_moments(x, w, depth, top, t, u, m);
        refit_affine(m, sign, &t, &u);
        vec error = moments_error(m, t, u);
        mask better = error < best;
        *best_t = pick(better, t, *best_t);
        *best_u = pick(better, u, *best_u);
        best = pick(better, error, best);
    }
    code_moments(x, w, depth, top, *best_t, *best_u, m);
}

#endif
