/* Owns RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467). */
#include "norm.h"

#include <math.h>

void rms_norm(const float *x, const float *weight, const float *gain, float epsilon, int n, float *out) {
    /* Squares in float, as llama.cpp takes them; their sum in double, where the order does not reach the float that
     * comes out, so eight sums, which the compiler can keep in vector registers. */
    double sums[8] = {0}, sum = 0;
    int i = 0;
    for (; i + 8 <= n; i += 8)
        for (int lane = 0; lane < 8; lane++) sums[lane] += (double)(x[i + lane] * x[i + lane]);
    for (; i < n; i++) sum += (double)(x[i] * x[i]);
    for (int lane = 0; lane < 8; lane++) sum += sums[lane];
    float scale = 1.0f / sqrtf((float)(sum / n) + epsilon);
    for (i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
    if (gain)
        for (i = 0; i < n; i++) out[i] *= gain[i];
}
