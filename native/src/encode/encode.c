/* rondel_encode: checks what comes in, prepares the importance, and splits rows over threads. */
#include "encode.h"

#include "error.h"
#include "kernels/kernels.h"
#include "lanes.h"
#include "pool.h"
#include "rondel.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

/* A column that the statistics never saw still gets this share of the mean importance: its weights then follow from
 * themselves, where a zero would leave them undefined. */
#define IMPORTANCE_FLOOR 1e-6

encode_rows encoder_of(int format) {
    switch (format) {
    case FMT_F32:
    case FMT_F16:
    case FMT_BF16: return encode_floats;
    case FMT_Q2_K:
    case FMT_Q3_K:
    case FMT_Q4_K:
    case FMT_Q5_K:
    case FMT_Q6_K:
    case FMT_IQ4_XS: return encode_superblocks;
    case FMT_IQ1_S:
    case FMT_IQ1_M:
    case FMT_IQ2_XXS:
    case FMT_IQ2_XS:
    case FMT_IQ2_S:
    case FMT_IQ3_XXS:
    case FMT_IQ3_S: return encode_codebooks;
    case FMT_Q4_0:
    case FMT_Q4_1:
    case FMT_Q5_0:
    case FMT_Q5_1:
    case FMT_Q8_0:
    case FMT_IQ4_NL: return encode_blocks;
    case FMT_MXFP4:
    case FMT_TQ1_0:
    case FMT_TQ2_0:
    case FMT_Q1_0:
    case FMT_Q2_0: return encode_few_levels;
    default: return format_table[format].rows > 1 ? encode_tiles : NULL; /* NULL: decoded and run, not written */
    }
}

/* The largest weight whose scale is a finite half. */
static float limit_of(int format) {
    switch (format) {
    case FMT_F32: return FLT_MAX;
    case FMT_BF16: return 3.38e38f;
    case FMT_MXFP4: return FLT_MAX / 2;
    case FMT_F16: return HALF_MAX;
    case FMT_TQ1_0:
    case FMT_TQ2_0:
    case FMT_Q1_0:
    case FMT_Q2_0:
    case FMT_U2_64:
    case FMT_U2_128:
    case FMT_U2_256: return HALF_MAX * 1.5f;
    default: return HALF_MAX * 7;
    }
}

/* Whether all magnitudes are at most `limit`, which NaN's is not. Eight at a time: all weights pass through here. */
static int within(const float *row, int64_t cols, float limit) {
    mask beyond = {0};
    int64_t c = 0;
    for (; c + LANES <= cols; c += LANES) {
        vec values;
        memcpy(&values, row + c, sizeof values);
        beyond |= ~(magnitude(values) <= limit);
    }
    int any = 0;
    for (int l = 0; l < LANES; l++) any |= beyond[l];
    for (; c < cols; c++) any |= !(fabsf(row[c]) <= limit);
    return !any;
}

int check_weights(const char *name, int format, const float *weights, int64_t rows, int64_t cols) {
    float limit = limit_of(format);
    for (int64_t r = 0; r < rows; r++) {
        if (within(weights + r * cols, cols, limit)) continue;
        for (int64_t c = 0; c < cols; c++) {
            float value = weights[r * cols + c];
            if (fabsf(value) <= limit) continue;
            if (!isfinite(value)) return set_error("the weight at row %lld, column %lld is not finite", (long long)r, (long long)c);
            return set_error("the weight at row %lld, column %lld is %g, beyond what %s can hold (%g)", (long long)r,
                             (long long)c, (double)value, name, (double)limit);
        }
    }
    return 0;
}

/* Positive, with mean 1; all ones where nothing is given or nothing was seen. */
int prepare_importance(const float *from, int64_t cols, float *to) {
    double total = 0;
    for (int64_t c = 0; from && c < cols; c++) {
        if (!isfinite(from[c]) || from[c] < 0)
            return set_error("the importance of column %lld is %g, expected a finite number of at least 0", (long long)c,
                             (double)from[c]);
        total += from[c];
    }
    double mean = total / (double)cols;
    for (int64_t c = 0; c < cols; c++) {
        double share = from && total > 0 ? from[c] / mean : 1.0;
        to[c] = (float)(share > IMPORTANCE_FLOOR ? share : IMPORTANCE_FLOOR);
    }
    return 0;
}

static void encode_share(void *argument, int thread, int threads) {
    const struct encode_task *task = argument;
    int64_t first, last;
    pool_share(task->rows, format_table[task->format].rows, thread, threads, &first, &last);
    if (first < last) encoder_of(task->format)(task, first, last);
}

uint16_t scale_to_half(float wish) {
    if (wish == 0) return 0;
    float size = fabsf(wish);
    size = size > HALF_MAX ? HALF_MAX : size < HALF_LEAST ? HALF_LEAST : size;
    return float_to_half(copysignf(size, wish));
}

EXPORT int32_t rondel_format_encodes(const char *format) {
    int index = format_find(format);
    return index >= 0 && encoder_of(index) != NULL;
}

EXPORT int32_t rondel_encode(const char *format, const float *weights, const float *importance, int64_t rows, int64_t cols,
                             int32_t threads, void *packed) {
    struct encode_task task = {format_find(format), weights, NULL, rows, cols, packed, 0};
    if (task.format < 0) return -1;
    if (!encoder_of(task.format))
        return set_error("rondel runs %s but does not write it: choose another format", format);
    if (rows < 1 || cols < 1 || format_bytes(task.format, rows, cols) < 0)
        return set_error("a matrix of %lld rows and %lld columns does not fit %s, whose rows are multiples of %d columns",
                         (long long)rows, (long long)cols, format, (int)format_table[task.format].columns);
    if (check_weights(format, task.format, weights, rows, cols)) return -1;
    float *prepared = malloc((size_t)cols * sizeof *prepared);
    struct pool *pool = prepared ? pool_new(threads < 1 ? 1 : threads) : NULL;
    int code = prepared ? pool ? 0 : -1 : set_error("no memory for the importance of %lld columns", (long long)cols);
    if (!code) code = prepare_importance(importance, cols, prepared);
    if (!code) {
        task.importance = prepared;
        pool_run(pool, encode_share, &task);
    }
    if (pool) pool_free(pool);
    free(prepared);
    return code;
}
