/* Owns softmax(q k^T * scale) v for one head; everything but the cached rows is float. */
#include "attention.h"

#include <math.h>
#include <string.h>

#include "kernels/kernels.h"

size_t attention_scratch(int context, int head_dim) {
    size_t bytes = (size_t)context * sizeof(float) + (size_t)head_dim * sizeof(uint16_t);
    return (bytes + 63) / 64 * 64;
}

/* In place: x <- exp(x - max) / sum. */
static void softmax(float *x, int n) {
    float largest = x[0];
    for (int i = 1; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    double sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] = expf(x[i] - largest);
    float inverse = (float)(1.0 / sum);
    for (int i = 0; i < n; i++) x[i] *= inverse;
}

void attention_head(const struct kv *kv, int slot, int kv_head, int count, float scale, const float *query, float *out,
                    void *scratch) {
    const struct kernels *kernels = kernels_current();
    int64_t dim = kv->head_dim;
    float *scores = scratch; /* (count) */
    memset(out, 0, (size_t)dim * sizeof *out);
    if (kv->half) {
        const uint16_t *keys = kv_keys(kv, slot, kv_head), *values = kv_values(kv, slot, kv_head);
        uint16_t *rounded = (uint16_t *)(scores + kv->context); /* llama.cpp rounds the query too */
        for (int64_t i = 0; i < dim; i++) rounded[i] = float_to_half(query[i]);
        for (int p = 0; p < count; p++) scores[p] = kernels->dot_f16(rounded, keys + p * dim, dim) * scale;
        softmax(scores, count);
        /* So does it with the weights of the values: with both, quantized logits agree with it to the last bits
         * until a rounding of activations tips over; without, they only agree within the error of that rounding. */
        for (int p = 0; p < count; p++)
            kernels->axpy_f16(out, half_to_float(float_to_half(scores[p])), values + p * dim, dim);
    } else {
        const float *keys = kv_keys(kv, slot, kv_head), *values = kv_values(kv, slot, kv_head);
        for (int p = 0; p < count; p++) scores[p] = kernels->dot_f32(query, keys + p * dim, dim) * scale;
        softmax(scores, count);
        for (int p = 0; p < count; p++) kernels->axpy_f32(out, scores[p], values + p * dim, dim);
    }
}
