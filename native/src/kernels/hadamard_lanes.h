/* The Hadamard kernels on vectors of LANES floats: included once by the file of an instruction set, which has defined `lanes`,
 * LANES, GROUP (the vectors of a transform that stay in registers, 8 or 16), and the functions load, store, fused, spread, flip and across. Every element goes through the additions of
 * scalar_hadamard.c in their order; only what lies in registers between them differs. */
#include <stdint.h>

#include "kernels.h"
#include "scalar.h"

#define INLINE static inline __attribute__((always_inline))

enum { LEAF = GROUP * LANES };

/* Signs of neighbouring elements: bit `shift` of bits[0] is the first one's; bits NULL: all plus. */
struct signs {
    const uint8_t *bits;
    int shift;
};

INLINE struct signs after(struct signs signs, int64_t elements) { /* a multiple of 8 */
    return (struct signs){signs.bits ? signs.bits + elements / 8 : NULL, signs.shift};
}

/* The vector at x, the first one of the signs. `flipped` is known where this is compiled: no test remains in a loop. */
INLINE lanes fetch(const float *x, struct signs signs, int flipped) {
    lanes v = load(x);
    return flipped ? flip(v, signs.bits, signs.shift) : v;
}

INLINE void butterfly(lanes *a, lanes *b) {
    lanes difference = *a - *b;
    *a += *b;
    *b = difference;
}

/* The stages among `radix` vectors, those of the largest distance first. */
INLINE void butterflies(lanes v[GROUP], int radix) {
    for (int k = 0; radix == 16 && k < 8; k++) butterfly(&v[k], &v[k + 8]);
    for (int k = 0; radix >= 8 && k < radix; k += 8)
        for (int i = k; i < k + 4; i++) butterfly(&v[i], &v[i + 4]);
    for (int k = 0; radix >= 4 && k < radix; k += 4) {
        butterfly(&v[k], &v[k + 2]);
        butterfly(&v[k + 1], &v[k + 3]);
    }
    for (int k = 0; radix >= 2 && k < radix; k += 2) butterfly(&v[k], &v[k + 1]);
}

/* The first stages of radix * stride floats, those of distances from `stride` up. */
INLINE void pass(const float *x, float *y, int64_t stride, int radix, struct signs signs, int flipped) {
    struct signs here = signs;
    for (int64_t i = 0; i < stride; i += LANES, here = after(here, LANES)) {
        lanes v[GROUP];
        for (int k = 0; k < radix; k++) v[k] = fetch(x + k * stride + i, after(here, k * stride), flipped);
        butterflies(v, radix);
        for (int k = 0; k < radix; k++) store(y + k * stride + i, v[k]);
    }
}

/* Calls `function` with a radix, and with or without signs, that the compiler knows. */
#define WITH_RADIX(radix, function, ...)                                     \
    case radix:                                                              \
        if (signs.bits) function(x, y, __VA_ARGS__, radix, signs, 1);        \
        else function(x, y, __VA_ARGS__, radix, signs, 0);                   \
        break

static void any_pass(const float *x, float *y, int64_t stride, int radix, struct signs signs) {
    switch (radix) {
        WITH_RADIX(8, pass, stride);
        WITH_RADIX(4, pass, stride);
        WITH_RADIX(2, pass, stride);
    }
}

/* All stages of transforms of radix * LANES floats, `total` floats of them. */
INLINE void leaves(const float *x, float *y, int64_t total, float scale, int radix, struct signs signs, int flipped) {
    for (int64_t i = 0; i < total; i += radix * LANES, signs = after(signs, radix * LANES)) {
        lanes v[GROUP];
        for (int k = 0; k < radix; k++) v[k] = fetch(x + i + k * LANES, after(signs, k * LANES), flipped);
        butterflies(v, radix);
        for (int distance = LANES / 2; distance >= 1; distance /= 2) /* side by side: the chains of one vector are long */
            for (int k = 0; k < radix; k++) v[k] = across(v[k], distance);
        for (int k = 0; k < radix; k++) store(y + i + k * LANES, v[k] * spread(scale));
    }
}

static void any_leaves(const float *x, float *y, int64_t total, int radix, struct signs signs, float scale) {
    switch (radix) {
#if GROUP == 16 /* AVX2 has no registers for it */
        WITH_RADIX(16, leaves, total, scale);
#endif
        WITH_RADIX(8, leaves, total, scale);
        WITH_RADIX(4, leaves, total, scale);
        WITH_RADIX(2, leaves, total, scale);
        WITH_RADIX(1, leaves, total, scale);
    }
}

/* Depth first: what a pass has made small enough for a cache is finished there. */
static void descend(const float *x, float *y, int64_t length, struct signs signs, float scale) {
    static const int radices[3] = {8, 2, 4}; /* the small one first, where it is applied in long loops */
    int radix = radices[__builtin_ctzll((uint64_t)(length / LEAF)) % 3];
    int64_t stride = length / radix;
    any_pass(x, y, stride, radix, signs);
    if (stride == LEAF) {
        any_leaves(y, y, length, GROUP, (struct signs){0}, scale);
        return;
    }
    for (int k = 0; k < radix; k++) descend(y + k * stride, y + k * stride, stride, (struct signs){0}, scale);
}

/* Transforms of fewer floats than a vector has lanes; those that fill no vector are left to the scalar one. */
static void short_transforms(const float *x, float *y, int64_t total, int64_t length, struct signs signs, float scale) {
    int64_t done = 0;
    for (; done + LANES <= total; done += LANES) {
        lanes v = signs.bits ? fetch(x + done, signs, 1) : load(x + done);
        for (int distance = LANES / 2; distance >= 1; distance /= 2)
            if (distance < length) v = across(v, distance);
        store(y + done, v * spread(scale));
        signs = after(signs, LANES);
    }
    scalar_sylvester(x + done, y + done, (total - done) / length, length, signs.bits, signs.shift, scale);
}

static void sylvester(const float *x, float *y, int64_t count, int64_t length, const uint8_t *bits, int64_t first,
                      float scale) {
    struct signs signs = {bits ? bits + first / 8 : NULL, (int)(first % 8)};
    if (length < LANES) short_transforms(x, y, count * length, length, signs, scale);
    else if (length <= LEAF) any_leaves(x, y, count * length, (int)(length / LANES), signs, scale);
    else
        for (int64_t i = 0; i < count * length; i += length) descend(x + i, y + i, length, after(signs, i), scale);
}
