/* Activations rounded to a grid per row and back: what quant/activation_rounding.py says, in float. */
#ifndef RONDEL_ACTIVATION_ROUNDING_H
#define RONDEL_ACTIVATION_ROUNDING_H
#include <stdint.h>

struct activation_rounding {
    int bits;      /* 2 to 16; 0: none */
    float scale;   /* of a row's largest magnitude */
    int seed;      /* of stochastic rounding; 0: nearest, ties to even */
    int rotation;  /* seed of the basis in which the row is rounded; 0: its own */
};

/* Where a row stands, which the dither depends on: in which layer, before which linears, at which position. */
struct activation_place {
    int layer, input, position;
};

/* In place on one row. */
void round_activations(const struct activation_rounding *rounding, struct activation_place place, float *x, int64_t channels);

#endif
