/* Rotary position embedding: a table of cosines and sines for each token, then turns of pairs of channels. */
#ifndef RONDEL_ROPE_H
#define RONDEL_ROPE_H

#include "model.h"

/* table: (2, head_dim / 2), the cosines and the sines of position * scale * base^(-2 i / head_dim) / factors[i], times
 * magnitude; `factors` may be NULL. */
void rope_table(const struct hyperparameters *numbers, const float *factors, int position, float *table);
/* x: (heads, 2 * pairs) in place; pairs are (i, i + pairs) where `half`, else (2i, 2i + 1). */
void rope_turn(const float *table, int pairs, int half, float *x, int heads);

#endif
