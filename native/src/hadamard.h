/* Owns the fast Hadamard transform of online rotations; quant/hadamard.py derives the same plan and order of axes. */
#ifndef RONDEL_HADAMARD_H
#define RONDEL_HADAMARD_H
#include <stdint.h>

/* x <- H (s o x) / sqrt(block) on each block of `size` channels. Read-only once made: any number of threads may use it. */
struct hadamard;

/* signs: (size + 7) / 8 bytes, one bit a channel, least significant first, 1 = minus; copied. NULL: set_error. */
struct hadamard *hadamard_new(int64_t size, int64_t block, const uint8_t *signs);
void hadamard_free(struct hadamard *hadamard);
/* In place on (n, size); `scratch` holds `block` floats (`size` is always enough), one per thread. */
void hadamard_rows(const struct hadamard *hadamard, float *x, int64_t n, float *scratch);

#endif
