/* Owns softmax(q k^T * scale) v for one head.
 *
 * Beside an F32 cache everything is float. Beside an F16 cache it is computed as llama.cpp's default does it token by
 * token: the query is rounded to half, the softmax is taken on the fly, and the values are summed in half. Activations
 * are rounded to int8 right after, which would blow any other rounding up to about one percent of the logits, so only
 * the same bits give the same text from the same quantized file. They are the same up to SPAN positions, and up to twice
 * as many where llama.cpp runs on two threads: from there on it shares the positions out among its threads. */
#include "attention.h"

#include <math.h>
#include <string.h>

#include "kernels/kernels.h"

/* Positions summed in half before the sum goes to float: longer sums in half would lose what small weights add. */
enum { SPAN = 256 };

size_t attention_scratch(int context, int head_dim) {
    size_t scores = (size_t)context * sizeof(float), halves = 2 * (size_t)head_dim * sizeof(uint16_t);
    return ((scores > halves ? scores : halves) + 63) / 64 * 64;
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

static void attend_f32(const float *keys, const float *values, int count, int64_t dim, float scale, const float *query,
                       float *out, float *scores /* (count) */) {
    const struct kernels *kernels = kernels_current();
    for (int p = 0; p < count; p++) scores[p] = kernels->dot_f32(query, keys + p * dim, dim) * scale;
    softmax(scores, count);
    memset(out, 0, (size_t)dim * sizeof *out);
    for (int p = 0; p < count; p++) kernels->axpy_f32(out, scores[p], values + p * dim, dim);
}

/* Of one span: sum <- sum_p exp(s_p - largest) v_p (dim) in half, *total <- sum_p exp(s_p - largest); returns largest. */
static float attend_span(const uint16_t *keys, const uint16_t *values, int count, int64_t dim, float scale,
                         const uint16_t *query, uint16_t *sum, float *total) {
    const struct kernels *kernels = kernels_current();
    float largest = -INFINITY;
    *total = 0;
    memset(sum, 0, (size_t)dim * sizeof *sum);
    for (int p = 0; p < count; p++) {
        float score = kernels->dot_f16(query, keys + p * dim, dim) * scale, weight = 1;
        if (score > largest) { /* what is there was relative to a smaller one */
            float shrink = expf(largest - score);
            for (int64_t i = 0; i < dim; i++) sum[i] = float_to_half(half_to_float(sum[i]) * shrink);
            *total *= shrink;
            largest = score;
        } else {
            weight = expf(score - largest);
        }
        kernels->fma_f16(sum, weight, values + p * dim, dim);
        *total += weight;
    }
    return largest;
}

static void attend_f16(const uint16_t *keys, const uint16_t *values, int count, int64_t dim, float scale,
                       const float *query, float *out, uint16_t *halves /* (2, dim) */) {
    uint16_t *rounded = halves, *sum = halves + dim;
    float largest = -INFINITY, total = 0;
    for (int64_t i = 0; i < dim; i++) rounded[i] = float_to_half(query[i]);
    memset(out, 0, (size_t)dim * sizeof *out);
    for (int first = 0; first < count; first += SPAN) {
        int length = count - first < SPAN ? count - first : SPAN;
        float part, top = attend_span(keys + first * dim, values + first * dim, length, dim, scale, rounded, sum, &part);
        float both = top > largest ? top : largest, before = expf(largest - both), now = expf(top - both);
        for (int64_t i = 0; i < dim; i++) out[i] = fmaf(out[i], before, half_to_float(sum[i]) * now);
        total = fmaf(total, before, part * now);
        largest = both;
    }
    float inverse = 1 / total;
    for (int64_t i = 0; i < dim; i++) out[i] *= inverse;
}

void attention_head(const struct kv *kv, int slot, int kv_head, int count, float scale, const float *query, float *out,
                    void *scratch) {
    const void *keys = kv_keys(kv, slot, kv_head), *values = kv_values(kv, slot, kv_head);
    if (kv->half)
        attend_f16(keys, values, count, kv->head_dim, scale, query, out, scratch);
    else
        attend_f32(keys, values, count, kv->head_dim, scale, query, out, scratch);
}
