/* Low-rank terms of linears: y += left (right x). */
#ifndef RONDEL_LOW_RANK_H
#define RONDEL_LOW_RANK_H
#include <stdint.h>

struct low_rank {
    const float *left;  /* (rows, rank) */
    const float *right; /* (rank, cols) */
    int rank;           /* 0: none */
};

/* reduced (rank) <- right x (cols) */
void low_rank_reduce(const struct low_rank *term, const float *x, int64_t cols, float *reduced);
/* y[first .. last-1] += left reduced */
void low_rank_add(const struct low_rank *term, const float *reduced, int64_t first, int64_t last, float *y);

#endif
