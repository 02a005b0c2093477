/* Owns low-rank terms: two thin products in float, beside the linear's own. */
#include "low_rank.h"

#include "kernels/kernels.h"

void low_rank_reduce(const struct low_rank *term, const float *x, int64_t cols, float *reduced) {
    for (int i = 0; i < term->rank; i++) reduced[i] = kernels_current()->dot_f32(term->right + i * cols, x, cols);
}

void low_rank_add(const struct low_rank *term, const float *reduced, int64_t first, int64_t last, float *y) {
    for (int64_t row = first; row < last; row++)
        y[row] += kernels_current()->dot_f32(term->left + row * term->rank, reduced, term->rank);
}
