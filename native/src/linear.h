/* Linear layers on prepared activations: pack an input row once, multiply it with rows of every matrix that reads it. */
#ifndef RONDEL_LINEAR_H
#define RONDEL_LINEAR_H
#include <stdint.h>

#include "model.h"

enum { LINEARS_MAX = 3 }; /* that share one input: q, k, v */

/* Linears that read the same input, and where each one's preparation of it lies. */
struct linear_group {
    const struct linear *linear; /* (count) */
    int count;
    uint8_t *packed[LINEARS_MAX]; /* (inputs, activation_bytes); linears that prepare alike share the first one's */
};

/* buffers: one for each linear. */
struct linear_group linear_group_of(const struct linear *linears, int count, uint8_t *const *buffers);
/* Prepares the input x (cols), the `index`-th, for every linear of the group. */
void linear_pack(const struct linear_group *group, int index, const float *x);
/* Rows [first, last) of one linear of the group for n inputs: out[input * stride + row], scale and bias applied. */
void linear_rows(const struct linear_group *group, int index, int64_t first, int64_t last, int n, float *out,
                 int64_t stride);
uint64_t linear_bytes(const struct linear *linear); /* read by one pass over it */

#endif
