/* The best codes of a few weights at every scale at once.
 *
 * A codeword q leaves sum w (x - t q)^2 = sum w x^2 - t (2 b - t a) with a = sum w q^2 and b = sum w x q, which do not
 * depend on the scale t. So at scale t the nearest codeword is the one whose line 2 b - t a is highest: the upper
 * envelope of those lines lists the exact nearest codewords for all t, and there are a dozen of them, not 256 or 2048.
 * Only scales from half to twice the usual one are searched so; beyond, one vertex stands for several.
 * Envelopes add: at every scale the best codes of a sub-block are the best codes of its parts. */
#ifndef RONDEL_ENCODE_CURVE_H
#define RONDEL_ENCODE_CURVE_H
#include "encode.h"
#include "lanes.h"

#define UNIT_PIECES 96 /* kept of an envelope of eight weights; about 12 are usual, more would lose large scales */

/* Best for scales above the last piece's `until`, up to its own. */
struct piece {
    float until, a, b;
    uint32_t code;
};

/* Points above the polygon of a few vertices of the envelope, which hold all its vertices. */
struct points {
    int count;
    struct piece at[1024];
};

INLINE void add_point(struct points *to, float a, float b, uint32_t code) {
    if (to->count < 1024) to->at[to->count++] = (struct piece){0, a, b, code};
}

INLINE int any_set(mask m) {
    typedef int64_t quads __attribute__((vector_size(32)));
    quads q = (quads)m;
    return (q[0] | q[1] | q[2] | q[3]) != 0;
}

#define VERTICES 6
#define CHORDS (VERTICES - 3)

/* Adds the codewords that may be best at some scale: six that are, at scale 0, around `near`, and at infinity, and those
 * above the chords of the middle four. Nothing is lost from half of `near` to twice it; beyond, one vertex stands for
 * several. `count` is a multiple of the lanes. */
INLINE void add_candidates(const vec *a, const vec *b, int count, float near, uint32_t tag, struct points *to) {
    const mask lane = {0, 1, 2, 3, 4, 5, 6, 7};
    const vec scale[VERTICES] = {splat(0),           splat(0.5f * near), splat(0.85f * near),
                                 splat(1.3f * near), splat(2 * near),    splat(INFINITY)};
    vec best[VERTICES];
    mask which[VERTICES];
#pragma GCC unroll 6
    for (int k = 0; k < VERTICES; k++) best[k] = splat(-INFINITY), which[k] = lane;
    for (int i = 0; i < count / LANES; i++) {
        vec up = b[i] + b[i], down = a[i];
        mask here = lane + i * LANES;
#pragma GCC unroll 6
        for (int k = 0; k < VERTICES; k++) {
            vec height = k == VERTICES - 1 ? -down : k == 0 ? up : up - scale[k] * down;
            mask higher = height > best[k];
            best[k] = pick(higher, height, best[k]);
            which[k] = (higher & here) | (~higher & which[k]);
        }
    }
    vec slope[CHORDS], start[CHORDS];
    float last_a = 0, last_b = 0;
    for (int k = 0; k < VERTICES; k++) {
        int top = 0;
        for (int l = 1; l < LANES; l++)
            if (best[k][l] > best[k][top]) top = l;
        int code = which[k][top];
        float at = a[code / LANES][code % LANES], height = b[code / LANES][code % LANES];
        add_point(to, at, height, (uint32_t)code | tag);
        if (k > 1 && k < VERTICES - 1) {
            float s = last_a > at ? (last_b - height) / (last_a - at) : 0;
            slope[k - 2] = splat(s);
            start[k - 2] = splat(last_a > at ? height - s * at : INFINITY);
        }
        last_a = at;
        last_b = height;
    }
    for (int i = 0; i < count / LANES; i++) {
        mask above = (b[i] > slope[0] * a[i] + start[0]) | (b[i] > slope[1] * a[i] + start[1]) |
                     (b[i] > slope[2] * a[i] + start[2]);
        if (!any_set(above)) continue;
        for (int l = 0; l < LANES; l++)
            if (above[l]) add_point(to, a[i][l], b[i][l], (uint32_t)(i * LANES + l) | tag);
    }
}

/* Adds to `to` what the envelope needs of `at` between two of its lines, steepest first: the point farthest above the
 * chord, and on either side of it the same again (the quickhull of Barber, Dobkin and Huhdanpaa 1996, in the plane). */
static void add_between(struct piece *at, int count, struct piece from, struct piece until, struct points *to) {
    if (count == 0 || !(from.a > until.a)) return;
    float slope = (from.b - until.b) / (from.a - until.a), highest = until.b - slope * until.a;
    int top = -1, left = 0;
    for (int i = 0; i < count; i++) {
        float height = at[i].b - slope * at[i].a;
        if (height > highest) highest = height, top = i;
    }
    if (top < 0) return;
    struct piece middle = at[top];
    float rise = (from.b - middle.b) / (from.a - middle.a), start = middle.b - rise * middle.a;
    for (int i = 0; i < count; i++)
        if (at[i].a > middle.a && at[i].b > start + rise * at[i].a) {
            struct piece kept = at[i];
            at[i] = at[left];
            at[left++] = kept;
        }
    int right = left;
    rise = (middle.b - until.b) / (middle.a - until.a);
    start = until.b - rise * until.a;
    for (int i = left; i < count; i++)
        if (at[i].a < middle.a && at[i].b > start + rise * at[i].a) {
            struct piece kept = at[i];
            at[i] = at[right];
            at[right++] = kept;
        }
    add_between(at, left, from, middle, to);
    add_point(to, middle.a, middle.b, middle.code);
    add_between(at + left, right - left, middle, until, to);
}

/* The upper envelope of the points' lines, in order of rising scale; returns its number of pieces. */
static inline int envelope(struct points *from, struct piece *to) {
    struct points kept;
    kept.count = 0;
    struct piece first = from->at[0], last = first, *at = kept.at;
    for (int i = 1; i < from->count; i++) {
        struct piece p = from->at[i];
        if (p.b > first.b || (p.b == first.b && p.a < first.a)) first = p;
        if (p.a < last.a || (p.a == last.a && p.b > last.b)) last = p;
    }
    add_point(&kept, first.a, first.b, first.code);
    add_between(from->at, from->count, first, last, &kept);
    add_point(&kept, last.a, last.b, last.code);
    int n = 0;
    for (int i = 0; i < kept.count; i++) { /* breaks must rise, whatever was rounded */
        struct piece next = at[i];
        if (n > 0 && (at[n - 1].a <= next.a || at[n - 1].b <= next.b)) continue;
        while (n > 1 && 2 * (at[n - 1].b - next.b) / (at[n - 1].a - next.a) <= at[n - 2].until) n--;
        if (n > 0) at[n - 1].until = 2 * (at[n - 1].b - next.b) / (at[n - 1].a - next.a);
        at[n++] = next;
    }
    n = n < UNIT_PIECES ? n : UNIT_PIECES;
    for (int i = 0; i < n; i++) to[i] = at[i];
    to[n - 1].until = INFINITY;
    return n;
}

/* The sum of `parts` (up to 8) envelopes; codes of the first two are joined, the second in the upper half. */
static inline int add_curves(const struct piece *const *parts, int count, struct piece *to) {
    const struct piece *now[8];
    for (int i = 0; i < count; i++) now[i] = parts[i];
    for (int n = 0;; n++) {
        float until = INFINITY, a = 0, b = 0;
        for (int i = 0; i < count; i++) {
            until = now[i]->until < until ? now[i]->until : until;
            a += now[i]->a;
            b += now[i]->b;
        }
        to[n] = (struct piece){until, a, b, now[0]->code | (count > 1 ? now[1]->code << 16 : 0)};
        if (until == INFINITY) return n + 1;
        for (int i = 0; i < count; i++) now[i] += now[i]->until <= until;
    }
}

/* The piece that holds scale t > 0. */
INLINE const struct piece *piece_at(const struct piece *curve, int count, float t) {
    int first = 0;
    while (count > 1) {
        int half = count / 2;
        first += curve[first + half - 1].until < t ? half : 0;
        count -= half;
    }
    return curve + first;
}

/* By how much codes of a piece at scale t lower the error of zeros. */
INLINE float lowered(const struct piece *piece, float t) { return t * (2 * piece->b - t * piece->a); }

#endif
