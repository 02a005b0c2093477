/* K types and IQ4_XS: 256 columns share d (and dmin), sub-blocks of 16 or 32 have small whole scales (and mins).
 *
 * Choice, in three steps that each look at the error of the weights, never at that of the scales:
 *   1. every sub-block finds the scale (and offset) it would like, free of the others (search.h);
 *   2. d (and dmin) come from a grid; with codes fixed the error is a quadratic in the scale, so a candidate is cheap;
 *   3. against d as it is stored, every sub-block tries the neighbouring whole scales with its codes rounded anew; then
 *      d is refitted in closed form, and the round is kept where the error falls.
 * Codes are rounded against that choice; last, d and dmin are stored with the gain that undoes least squares' shrinking. */
#include "encode.h"
#include "kernels/kernels.h"
#include "search.h"

#include <math.h>

#define COLUMNS 256
#define ROUNDS 3 /* of step 3 */

struct traits {
    int depth;            /* columns of a sub-block */
    float top;            /* affine: codes 0..top; else 0 */
    float scale_lo, scale_hi, min_hi;
    struct ranges ranges; /* affine */
    struct levels levels; /* scale alone */
};

static const struct traits q2_k = {.depth = 16, .top = 3, .scale_hi = 15, .min_hi = 15, .ranges = {-0.05f, 0.08f, 6}};
static const struct traits q4_k = {.depth = 32, .top = 15, .scale_hi = 63, .min_hi = 63, .ranges = {-0.06f, 0.03f, 6}};
static const struct traits q5_k = {.depth = 32, .top = 31, .scale_hi = 63, .min_hi = 63, .ranges = {-0.03f, 0.015f, 6}};
static const struct traits q3_k = {
    .depth = 16, .scale_lo = -32, .scale_hi = 31, .levels = {-4, 3, 0, 0, 2.0f, 0.2f, 14, 1, 0}};
static const struct traits q6_k = {
    .depth = 16, .scale_lo = -128, .scale_hi = 127, .levels = {-32, 31, 0, 0, 29.0f, 1.0f, 5, 1, 1}};

static const struct traits iq4_xs = {
    .depth = 32, .scale_lo = -32, .scale_hi = 31, .levels = {0, 15, 0, iq4_table, 90.0f, 6.0f, 11, 1, 0}};

/* 256 weights with sub-blocks across the lanes: x[g * depth + i][l] is column i of sub-block 8 g + l. */
struct block {
    vec x[COLUMNS / LANES], w[COLUMNS / LANES];
};

/* A choice for all sub-blocks: whole scales and mins in lanes, stored d and dmin as floats. weight = d k q + u m. */
struct choice {
    float d, u; /* u = -dmin */
    vec k[2], m[2];
    float error;
};

INLINE void load_block(const float *from, int depth, vec *to) {
    for (int g = 0; g * depth * LANES < COLUMNS; g++) load_lanes(from + g * depth * LANES, depth, depth, to + g * depth);
}

static float stored(double wish) { return half_to_float(scale_to_half((float)wish)); }

INLINE float lane_max(vec a) {
    float most = 0;
    for (int l = 0; l < LANES; l++) most = fabsf(a[l]) > most ? fabsf(a[l]) : most;
    return most;
}

/* ---- a scale alone: Q3_K, Q6_K, IQ4_XS ---- */

/* Step 2: d from the wishes t and the curvature qq of every sub-block; here the candidates are the lanes. */
INLINE float grid_scale(const struct traits traits, int groups, const vec *t, const vec *xq, const vec *qq) {
    float largest = 0, best_d = 0, best = INFINITY;
    for (int g = 0; g < groups; g++) largest = fmaxf(largest, lane_max(t[g]));
    if (largest == 0) return 0;
    for (int i = 0; i < 24; i += LANES / 2) {
        vec share = (1.04f - 0.02f * (float)i) - 0.02f * (vec){0, 0, 1, 1, 2, 2, 3, 3};
        vec d = to_stored(largest / (share * (vec){1, -1, 1, -1, 1, -1, 1, -1} * -traits.scale_lo));
        vec inv = inverse(d), error = splat(0);
        for (int s = 0; s < groups * LANES; s++) {
            vec scale = d * whole_within(t[s / LANES][s % LANES] * inv, traits.scale_lo, traits.scale_hi);
            error += scale * (scale * qq[s / LANES][s % LANES] - 2.0f * xq[s / LANES][s % LANES]);
        }
        for (int l = 0; l < LANES; l++)
            if (error[l] < best) best = error[l], best_d = d[l];
    }
    return best_d;
}

/* Step 3, first half: the whole scales for a stored d, and the error that they leave. */
INLINE void settle_scales(const struct block *b, const struct traits traits, int groups, const vec *t, struct choice *c) {
    vec inv = inverse(splat(c->d)), total = splat(0);
    for (int g = 0; g < groups; g++) {
        const vec *x = b->x + g * traits.depth, *w = b->w + g * traits.depth;
        vec start = whole_within(t[g] * inv, traits.scale_lo, traits.scale_hi), best = start;
        vec least = scale_error(x, w, traits.depth, traits.levels, c->d * best);
        for (int i = 0; i < 3; i++) { /* one lower, one higher, the other sign */
            vec k = whole_within(i == 2 ? -start : start + (float)(2 * i - 1), traits.scale_lo, traits.scale_hi);
            vec error = scale_error(x, w, traits.depth, traits.levels, c->d * k);
            best = pick(error < least, k, best);
            least = lesser(error, least);
        }
        c->k[g] = best;
        total += least;
    }
    c->error = sum(total);
}

INLINE void choose_scales(const struct block *b, const struct traits traits, struct choice *best) {
    int groups = COLUMNS / LANES / traits.depth;
    vec t[2], xq[2], qq[2];
    for (int g = 0; g < groups; g++) {
        const vec *x = b->x + g * traits.depth, *w = b->w + g * traits.depth;
        t[g] = search_scale(x, w, traits.depth, traits.levels);
        project(x, w, traits.depth, traits.levels, t[g], &xq[g], &qq[g]);
    }
    best->error = INFINITY;
    struct choice next = {.d = grid_scale(traits, groups, t, xq, qq)};
    for (int round = 0; round <= ROUNDS; round++) {
        settle_scales(b, traits, groups, t, &next);
        if (!(next.error < best->error)) break;
        *best = next;
        double above = 0, below = 0;
        for (int g = 0; g < groups; g++) {
            project(b->x + g * traits.depth, b->w + g * traits.depth, traits.depth, traits.levels, best->d * best->k[g],
                    &xq[g], &qq[g]);
            above += sum(best->k[g] * xq[g]);
            below += sum(best->k[g] * best->k[g] * qq[g]);
            t[g] = ratio(xq[g], qq[g]);
        }
        next = (struct choice){.d = below > 0 ? stored(above / below) : 0};
    }
}

/* ---- a scale and a min: Q2_K, Q4_K, Q5_K ---- */

/* For fixed codes: whole scale and, given it, whole min that leave the least error; returns that error. */
INLINE vec whole_pair(const struct traits traits, const struct moments *m, vec t, float d, float u, vec *k, vec *n) {
    *k = whole_within(t * inverse(splat(d)), traits.scale_lo, traits.scale_hi);
    vec s = d * *k, offset = (m->x - s * m->q) / m->w;
    *n = whole_within(offset * inverse(splat(u)), 0, traits.min_hi);
    return moments_error(m, s, u * *n);
}

/* Step 2: d and dmin from a grid of clipped or loosened largest scale and min; here candidates of dmin are the lanes. */
INLINE void grid_pair(const struct traits traits, int groups, const struct moments *m, const vec *t, const vec *o, int sign,
                      struct choice *c) {
    const vec steps = {0, 1, 2, 3, 4, 5, 6, 7};
    float largest = 0, deepest = 0, best = INFINITY;
    for (int g = 0; g < groups; g++) {
        largest = fmaxf(largest, lane_max(t[g]));
        deepest = fmaxf(deepest, lane_max(o[g]));
    }
    vec u[2], inv[2];
    for (int half = 0; half < 2; half++) {
        u[half] = to_stored((sign < 0 ? -deepest : deepest) / (traits.min_hi * (1.03f - 0.03f * (steps + (float)(8 * half)))));
        inv[half] = inverse(u[half]);
    }
    c->d = c->u = 0;
    for (int i = 0; i < 12; i++) {
        float d = stored(largest / (traits.scale_hi * (1.03f - 0.04f * (float)i)));
        vec error[2] = {splat(0), splat(0)};
        for (int g = 0; g < groups; g++) {
            vec s = d * whole_within(t[g] * inverse(splat(d)), traits.scale_lo, traits.scale_hi);
            vec pull = m[g].x - s * m[g].q, wish = pull / m[g].w, rest = m[g].xx + s * (s * m[g].qq - 2.0f * m[g].xq);
            for (int l = 0; l < LANES; l++)
                for (int half = 0; half < 2; half++) {
                    vec offset = u[half] * whole_within(wish[l] * inv[half], 0, traits.min_hi);
                    error[half] += rest[l] + offset * (offset * m[g].w[l] - 2.0f * pull[l]);
                }
        }
        for (int l = 0; l < 2 * LANES; l++)
            if (error[l / LANES][l % LANES] < best) best = error[l / LANES][l % LANES], c->d = d, c->u = u[l / LANES][l % LANES];
    }
}

/* Step 3, first half: whole scales and mins around the best ones for fixed codes, with codes rounded anew. */
INLINE void settle_pairs(const struct block *b, const struct traits traits, int groups, const struct moments *m, const vec *t,
                         struct choice *c) {
    vec total = splat(0);
    for (int g = 0; g < groups; g++) {
        const vec *x = b->x + g * traits.depth, *w = b->w + g * traits.depth;
        vec start_k, start_n, best_k, best_n;
        whole_pair(traits, &m[g], t[g], c->d, c->u, &start_k, &start_n);
        best_k = start_k;
        best_n = start_n;
        vec least = affine_error(x, w, traits.depth, traits.top, c->d * best_k, c->u * best_n);
        for (int i = 0; i < 9; i++) {
            vec k = whole_within(start_k + (float)(i % 3 - 1), traits.scale_lo, traits.scale_hi);
            vec n = whole_within(start_n + (float)(i / 3 - 1), 0, traits.min_hi);
            if (i == 4) continue;
            vec error = affine_error(x, w, traits.depth, traits.top, c->d * k, c->u * n);
            best_k = pick(error < least, k, best_k);
            best_n = pick(error < least, n, best_n);
            least = lesser(error, least);
        }
        c->k[g] = best_k;
        c->m[g] = best_n;
        total += least;
    }
    c->error = sum(total);
}

/* Step 3, second half: d and dmin that fit the codes of a choice best, jointly. */
INLINE struct choice refit_pair(const struct block *b, const struct traits traits, int groups, const struct choice *from,
                                struct moments *m, vec *t) {
    double kk = 0, kn = 0, nn = 0, kx = 0, nx = 0;
    for (int g = 0; g < groups; g++) {
        vec k = from->k[g], n = from->m[g];
        code_moments(b->x + g * traits.depth, b->w + g * traits.depth, traits.depth, traits.top, from->d * k, from->u * n,
                     &m[g]);
        t[g] = from->d * k;
        kk += sum(k * k * m[g].qq);
        kn += sum(k * n * m[g].q);
        nn += sum(n * n * m[g].w);
        kx += sum(k * m[g].xq);
        nx += sum(n * m[g].x);
    }
    double determinant = kk * nn - kn * kn;
    struct choice to = {.d = from->d, .u = from->u};
    if (determinant > 1e-9 * kk * nn) {
        to.d = stored((kx * nn - nx * kn) / determinant);
        to.u = stored((nx - (double)to.d * kn) / nn); /* given d as it is stored */
    } else if (kk > 0) {
        to.d = stored(kx / kk);
    } else if (nn > 0) {
        to.u = stored(nx / nn);
    }
    return to;
}

INLINE void choose_pairs_signed(const struct block *b, const struct traits traits, int sign, struct choice *best) {
    int groups = COLUMNS / LANES / traits.depth;
    struct moments m[2];
    vec t[2], o[2];
    for (int g = 0; g < groups; g++)
        search_affine(b->x + g * traits.depth, b->w + g * traits.depth, traits.depth, traits.top, traits.ranges, sign, &m[g],
                      &t[g], &o[g]);
    struct choice next;
    grid_pair(traits, groups, m, t, o, sign, &next);
    best->error = INFINITY;
    for (int round = 0; round <= ROUNDS; round++) {
        settle_pairs(b, traits, groups, m, t, &next);
        if (!(next.error < best->error)) break;
        *best = next;
        next = refit_pair(b, traits, groups, best, m, t);
    }
}

/* Mins are usually subtracted; a superblock with a sub-block of positive weights alone also tries to add them. */
INLINE void choose_pairs(const struct block *b, const struct traits traits, struct choice *best) {
    int positive = 0;
    for (int g = 0; g * traits.depth * LANES < COLUMNS; g++) {
        vec least = b->x[g * traits.depth];
        for (int i = 1; i < traits.depth; i++) least = lesser(least, b->x[g * traits.depth + i]);
        for (int l = 0; l < LANES; l++) positive |= least[l] > 0;
    }
    best->error = INFINITY;
    for (int sign = -1; sign <= positive; sign += 2) {
        struct choice other;
        choose_pairs_signed(b, traits, sign, &other);
        if (other.error < best->error) *best = other;
    }
}

/* ---- round and pack ---- */

INLINE void round_codes(const struct block *b, const struct traits traits, const struct choice *c, int biased,
                        struct superblock *to) {
    vec xx = splat(0), xq = splat(0), four[4];
    for (int g = 0; g * traits.depth * LANES < COLUMNS; g++) {
        vec scale = c->d * c->k[g], offset = traits.top > 0 ? c->u * c->m[g] : splat(0), inv = inverse(scale);
        for (int l = 0; l < LANES; l++) {
            to->scale[g * LANES + l] = (int8_t)c->k[g][l];
            to->min[g * LANES + l] = traits.top > 0 ? (uint8_t)c->m[g][l] : 0;
        }
        for (int i = 0; i < traits.depth; i++) {
            vec x = b->x[g * traits.depth + i], q, code;
            if (traits.top > 0)
                code = q = whole_within((x - offset) * inv, 0, traits.top);
            else
                q = nearest_level(traits.levels, x * inv), code = level_code(traits.levels, q);
            four[i % 4] = code;
            if (i % 4 == 3) store_codes(four, traits.depth, to->codes + g * LANES * traits.depth + i - 3);
            vec wx = b->w[g * traits.depth + i] * x;
            xx += wx * x;
            xq += wx * (scale * q + offset);
        }
    }
    float gain = fine_enough(c->d) && fine_enough(c->u) && !biased ? unbiased_gain(sum(xx), sum(xq)) : 1;
    to->d = scale_to_half(c->d * gain);
    to->dmin = scale_to_half(-c->u * gain);
}

INLINE void encode_rows_of(const struct encode_task *task, const struct traits traits,
                           void (*pack)(const struct superblock *, uint8_t *), int64_t first, int64_t last) {
    int bytes = format_table[task->format].bytes;
    struct block b;
    for (int64_t column = 0; column < task->cols; column += COLUMNS) {
        load_block(task->importance + column, traits.depth, b.w); /* once for all rows */
        for (int64_t row = first; row < last; row++) {
            int64_t at = row * task->cols + column;
            struct choice c;
            struct superblock to;
            load_block(task->weights + at, traits.depth, b.x);
            if (traits.top > 0)
                choose_pairs(&b, traits, &c);
            else
                choose_scales(&b, traits, &c);
            round_codes(&b, traits, &c, task->biased, &to);
            pack(&to, task->packed + at / COLUMNS * bytes);
        }
    }
}

void THIS_COPY(encode_superblocks)(const struct encode_task *task, int64_t first, int64_t last) {
    switch (task->format) {
    case FMT_Q2_K: encode_rows_of(task, q2_k, pack_q2_k, first, last); break;
    case FMT_Q3_K: encode_rows_of(task, q3_k, pack_q3_k, first, last); break;
    case FMT_Q4_K: encode_rows_of(task, q4_k, pack_q4_k, first, last); break;
    case FMT_Q5_K: encode_rows_of(task, q5_k, pack_q5_k, first, last); break;
    case FMT_Q6_K: encode_rows_of(task, q6_k, pack_q6_k, first, last); break;
    default: encode_rows_of(task, iq4_xs, pack_iq4_xs, first, last); break;
    }
}
