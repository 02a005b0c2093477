/* Hadamard matrices and their transforms: quant/hadamard.py derives the same plan and the same order of axes. */
#ifndef RONDEL_HADAMARD_H
#define RONDEL_HADAMARD_H
#include <stdint.h>

enum { HADAMARD_BASES = 8 }; /* of one plan: 12^9 > 2^31 */

/* ---- constructions (hadamard.c) ---- */
struct hadamard_plan {
    int count, additions;      /* bases; additions an element */
    int bases[HADAMARD_BASES]; /* orders, ascending; the rest of a block is Sylvester's */
};

/* -1 with set_error where `block` does not divide `size`, or has no matrix. */
int hadamard_plan_make(int64_t size, int64_t block, struct hadamard_plan *plan);
void hadamard_base(int order, float *matrix); /* (order, order) of 1 and -1, for an order of a plan */

/* ---- transforms (hadamard_rows.c) ---- */
/* R: x <- H (s o x) / sqrt(block) on each block of `size` channels, or its transpose. Read-only once made: any number of
 * threads may use it. */
typedef struct rondel_hadamard rondel_hadamard;

/* signs: (size + 7) / 8 bytes, one bit a channel, least significant first, 1 = minus; copied. NULL: set_error. */
rondel_hadamard *hadamard_new(int64_t size, int64_t block, const uint8_t *signs, int transposed);
void hadamard_free(rondel_hadamard *hadamard);
/* In place on (n, size); `scratch` holds `size` floats, one per thread. */
void hadamard_rows(const rondel_hadamard *hadamard, float *x, int64_t n, float *scratch);

#endif
