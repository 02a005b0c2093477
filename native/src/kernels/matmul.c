/* Rows of a weight matrix times prepared activations, and the whole product for callers outside the runtime. */
#include <stdlib.h>

#include "blocks.h"
#include "error.h"
#include "kernels.h"
#include "pool.h"
#include "rondel.h"

size_t activation_bytes(enum activation kind, int64_t cols) {
    size_t n = (size_t)cols, bytes = 0;
    switch (kind) {
    case ACT_F32: bytes = 4 * n; break;
    case ACT_F16:
    case ACT_BF16: bytes = 2 * n; break;
    case ACT_Q8_0: bytes = (size_t)q8_quants(cols) + n / 32 * 4; break;
    case ACT_Q8_1: bytes = (size_t)q8_quants(cols) + n / 32 * 8; break;
    case ACT_Q8_K: bytes = n / 256 * sizeof(struct q8_k); break;
    case ACT_TILE_64: bytes = n + n / 64 * 8; break;
    case ACT_TILE_128: bytes = n + n / 128 * 8; break;
    case ACT_TILE_256: bytes = n + n / 256 * 8; break;
    case ACT_COUNT: break;
    }
    return (bytes + 63) / 64 * 64;
}

/* Weight rows that stay in the first-level cache while the activation rows pass. */
enum { ROWS_AT_ONCE = 16 };

void matmul_rows(const struct matrix *weights, int64_t first, int64_t last, const void *packed, int64_t n, float *out,
                 int64_t stride) {
    const struct format_traits *traits = &format_table[weights->format];
    const struct kernels *kernels = kernels_current();
    int64_t row_bytes = weights->cols / traits->columns * traits->bytes;
    size_t step = activation_bytes(traits->activation, weights->cols);
    for (int64_t begin = first; begin < last; begin += ROWS_AT_ONCE) {
        int64_t end = begin + ROWS_AT_ONCE < last ? begin + ROWS_AT_ONCE : last;
        for (int64_t i = 0; i < n; i++) {
            const uint8_t *x = (const uint8_t *)packed + (size_t)i * step;
            if (traits->rows == 1) {
                const uint8_t *row = weights->data + begin * row_bytes;
                for (int64_t r = begin; r < end; r++, row += row_bytes)
                    out[i * stride + r] = kernels->dot[weights->format](row, x, weights->cols);
            } else {
                float sums[16];
                kernels->panel[weights->format](weights->data + begin / 16 * row_bytes, x, weights->cols, sums);
                for (int64_t r = begin; r < end; r++) out[i * stride + r] = sums[r - begin];
            }
        }
    }
}

struct product {
    struct matrix weights;
    const float *inputs;
    uint8_t *packed;
    float *outputs;
    int64_t n;
};

static void pack_inputs(void *argument, int thread, int threads) {
    const struct product *product = argument;
    enum activation kind = format_table[product->weights.format].activation;
    int64_t cols = product->weights.cols, first, last;
    pool_share(product->n, 1, thread, threads, &first, &last);
    for (int64_t i = first; i < last; i++)
        kernels_current()->pack[kind](product->inputs + i * cols, cols,
                                      product->packed + (size_t)i * activation_bytes(kind, cols));
}

static void multiply(void *argument, int thread, int threads) {
    const struct product *product = argument;
    int64_t rows = product->weights.rows, first, last;
    pool_share(rows, ROWS_AT_ONCE, thread, threads, &first, &last);
    matmul_rows(&product->weights, first, last, product->packed, product->n, product->outputs, rows);
}

EXPORT int32_t rondel_matmul(const char *format, const void *packed, int64_t rows, int64_t cols, const float *inputs,
                             int64_t n, int32_t threads, float *outputs) {
    int index = format_find(format);
    if (index < 0 || rondel_format_bytes(format, rows, cols) < 0) return -1;
    if (n < 0 || threads < 1)
        return set_error("matmul needs n >= 0 and threads >= 1, got %lld and %d", (long long)n, threads);
    size_t step = activation_bytes(format_table[index].activation, cols);
    size_t bytes;
    if (__builtin_mul_overflow(step, (size_t)n, &bytes)) return set_error("too many activations for this machine");
    if (rows == 0 || n == 0) return 0;
    struct pool *pool = pool_new(threads);
    if (!pool) return -1;
    uint8_t *memory = aligned_alloc(64, bytes ? bytes : 64);
    if (memory) {
        struct product product = {{packed, index, rows, cols}, inputs, memory, outputs, n};
        pool_run(pool, pack_inputs, &product);
        pool_run(pool, multiply, &product);
    }
    pool_free(pool);
    free(memory);
    return memory ? 0 : set_error("out of memory: %zu bytes for %lld prepared activations", bytes, (long long)n);
}
