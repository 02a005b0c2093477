/* The Hadamard transform, scalar: the order of additions is the specification. */
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

/* Sums of `width` outputs, in ascending order of j, from zero: y <- scale sum_j signs[j * step] x[j * inner ..]. */
static void row_sums(const float *signs, int order, int64_t step, const float *x, int64_t inner, int64_t width, float *y,
                     float scale) {
    for (int64_t first = 0; first < width; first += SUMS) {
        int64_t last = first + SUMS < width ? first + SUMS : width;
        float sums[SUMS] = {0};
        for (int j = 0; j < order; j++)
            for (int64_t i = first; i < last; i++) sums[i - first] += signs[j * step] * x[j * inner + i];
        for (int64_t i = first; i < last; i++) y[i] = sums[i - first] * scale;
    }
}

void scalar_signed_sums(const float *coefficients, int order, int64_t inner, const float *x, float *y, float scale) {
    int wide = inner >= HADAMARD_WIDE;
    for (int64_t row = 0; row < order; row++)
        row_sums(coefficients + (wide ? row / 4 * 4 * order + row % 4 : row * inner), order, wide ? 4 : order * inner, x, inner,
                 inner, y + row * inner, scale);
}
