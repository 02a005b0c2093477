/* The Hadamard transform, scalar: the order of additions is the specification. */
#include <string.h>

#include "scalar.h"

void scalar_sylvester(const float *x, float *y, int64_t count, int64_t length, const uint8_t *bits, int64_t first,
                      float scale) {
    for (int64_t i = 0; i < count * length; i++) y[i] = bits && bits[(first + i) / 8] >> (first + i) % 8 & 1 ? -x[i] : x[i];
    for (int64_t half = length / 2; half >= 1; half /= 2)
        for (int64_t start = 0; start < count * length; start += 2 * half) {
            float *restrict a = y + start, *restrict b = a + half;
            for (int64_t i = 0; i < half; i++) {
                float sum = a[i] + b[i], difference = a[i] - b[i];
                a[i] = sum;
                b[i] = difference;
            }
        }
    for (int64_t i = 0; i < count * length; i++) y[i] *= scale;
}

enum { SUMS = 32 }; /* in registers while a column of the matrix after the other is added */

/* One row of a base, its signs four apart: sums in ascending order of j, from zero. */
static void row_sums(const float *signs, int order, const float *x, int64_t inner, float *y, float scale) {
    for (int64_t first = 0; first < inner; first += SUMS) {
        int64_t last = first + SUMS < inner ? first + SUMS : inner;
        float sums[SUMS] = {0};
        for (int j = 0; j < order; j++)
            for (int64_t i = first; i < last; i++) sums[i - first] += signs[4 * j] * x[j * inner + i];
        for (int64_t i = first; i < last; i++) y[i] = sums[i - first] * scale;
    }
}

static void narrow_sums(const float *coefficients, int order, int64_t inner, const float *x, float *y, float scale) {
    memset(y, 0, (size_t)(order * inner) * sizeof *y);
    for (int j = 0; j < order; j++, x += inner)
        for (int row = 0; row < order; row++, coefficients += inner)
            for (int64_t i = 0; i < inner; i++) y[row * inner + i] += coefficients[i] * x[i];
    for (int64_t i = 0; i < order * inner; i++) y[i] *= scale;
}

void scalar_signed_sums(const float *coefficients, int order, int64_t inner, const float *x, float *y, float scale) {
    if (inner < HADAMARD_WIDE) narrow_sums(coefficients, order, inner, x, y, scale);
    else
        for (int row = 0; row < order; row++)
            row_sums(coefficients + row / 4 * 4 * order + row % 4, order, x, inner, y + row * inner, scale);
}
