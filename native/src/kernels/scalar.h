/* The scalar functions behind the table that scalar.c assembles. */
#ifndef RONDEL_SCALAR_H
#define RONDEL_SCALAR_H
#include "declare.h"

DECLARE_BLOCKS(scalar)
DECLARE_CODEBOOKS(scalar)
DECLARE_TILES(scalar)
DECLARE_HADAMARD(scalar)

/* In the order of two halves added to each other again and again. */
static inline float sum_of_lanes(const float lanes[8]) {
    return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

#endif
