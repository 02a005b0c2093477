/* Eight floats at a time, one per sub-block (or per row of a tile): the arithmetic that every scale search shares.
 *
 * A lane is a sub-block, so sums over its weights need no horizontal step, and the result of a lane depends neither
 * on its neighbours nor on the instruction set: every operation below is one IEEE operation an element. */
#ifndef RONDEL_ENCODE_LANES_H
#define RONDEL_ENCODE_LANES_H
#include <stdint.h>

#define LANES 8

typedef float vec __attribute__((vector_size(32)));
typedef int32_t mask __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

/* The encoders are compiled twice on x86, for SSE2 and for AVX2 (without fused operations, so bytes are the same). */
#if defined(RONDEL_X86) && defined(__GLIBC__) && (defined(__GNUC__) && !defined(__clang__))
#define CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CLONES
#endif

INLINE vec splat(float value) { return (vec){value, value, value, value, value, value, value, value}; }

INLINE vec pick(mask where, vec yes, vec no) { return (vec)(((mask)yes & where) | ((mask)no & ~where)); }

INLINE vec lesser(vec a, vec b) { return pick(a < b, a, b); }

INLINE vec greater(vec a, vec b) { return pick(a > b, a, b); }

INLINE vec magnitude(vec a) { return (vec)((mask)a & 0x7fffffff); }

/* Nearest whole number, ties to even; |a| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction. */
INLINE vec whole(vec a) { return (a + 12582912.0f) - 12582912.0f; }

/* The whole number in [lo, hi] nearest to a. */
INLINE vec whole_within(vec a, float lo, float hi) { return whole(lesser(greater(a, splat(lo)), splat(hi))); }

/* 1 / a, and 0 where a is 0: a scale of zero sends every weight to the middle code. */
INLINE vec inverse(vec a) { return pick(a == 0.0f, splat(0.0f), 1.0f / pick(a == 0.0f, splat(1.0f), a)); }

INLINE vec ratio(vec a, vec b) { return pick(b == 0.0f, splat(0.0f), a / pick(b == 0.0f, splat(1.0f), b)); }

INLINE float sum(vec a) { return ((a[0] + a[1]) + (a[2] + a[3])) + ((a[4] + a[5]) + (a[6] + a[7])); }

#endif
