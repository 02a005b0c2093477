/* Rotary position embedding: a table of cosines and sines for each token, then turns of pairs of channels. */
#ifndef RONDEL_ROPE_H
#define RONDEL_ROPE_H

/* table: (pairs, 2) cosine and sine of position * frequencies[i], times magnitude. */
void rope_table(const float *frequencies, int pairs, int position, float magnitude, float *table);
/* x: (heads, 2 * pairs) in place; pairs are (i, i + pairs) where `half`, else (2i, 2i + 1). */
void rope_turn(const float *table, int pairs, int half, float *x, int heads);

#endif
