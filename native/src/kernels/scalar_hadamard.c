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

/* What a row adds for a group, the first of whose inputs is at x, the others `inner` apart. */
static float sum_of_four(const float *x, int64_t inner, int choice) {
    float ab = choice & SUM_B ? x[0] - x[inner] : x[0] + x[inner];
    float cd = choice & SUM_D ? x[2 * inner] - x[3 * inner] : x[2 * inner] + x[3 * inner];
    return choice & SUM_CD ? ab - cd : ab + cd;
}

enum { SUMS = 32, ORDER = 256 }; /* columns whose sums are in registers; the largest order */

static void row_sums(const struct signed_sums *base, int row, const float *x, int many, float sums[SUMS]) {
    for (int g = 0; g < base->order / 4; g++) {
        int choice = base->terms[signed_sums_at(base->order, row, g)] / 16 % 16;
        for (int i = 0; i < many; i++) {
            float term = sum_of_four(x + 4 * g * base->inner + i, base->inner, choice);
            sums[i] = g == 0 ? term : choice & SUM_MINUS ? sums[i] - term : sums[i] + term;
        }
    }
}

/* All rows of some columns before any is written: y may be x. */
void scalar_signed_sums(const struct signed_sums *base, int64_t count, const float *x, float *y, float scale) {
    int64_t inner = base->inner, chunk = base->order * inner;
    float sums[ORDER][SUMS];
    for (; count > 0; count--, x += chunk, y += chunk)
        for (int64_t first = 0; first < inner; first += SUMS) {
            int many = (int)(first + SUMS < inner ? SUMS : inner - first);
            for (int row = 0; row < base->order; row++) row_sums(base, row, x + first, many, sums[row]);
            for (int row = 0; row < base->order; row++)
                for (int i = 0; i < many; i++) y[row * inner + first + i] = sums[row][i] * (scale * base->signs[row]);
        }
}
