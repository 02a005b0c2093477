/* Owns the fast Hadamard transform of rows: Sylvester's factor first, along adjacent channels and with the signs, then the
 * bases from the innermost out, the last with the scale. Each factor of a chunk is applied while the chunk is in a cache. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "hadamard.h"
#include "kernels/kernels.h"
#include "rondel.h"

enum { SIGN_PADDING = 3 }; /* bytes that the kernels may read past the last sign */

/* Acts on (order, inner). */
struct base {
    int order;
    int64_t inner;
    float *coefficients; /* as the kernel `signed_sums` wants them */
};

struct rondel_hadamard {
    int64_t size, block, sylvester; /* channels, of a block, of its factor 2^k */
    int transposed, count;
    struct base bases[HADAMARD_BASES]; /* (count), the outermost first */
    uint8_t *signs;
    float scale;
};

void hadamard_free(rondel_hadamard *hadamard) {
    if (!hadamard) return;
    for (int i = 0; i < hadamard->count; i++) free(hadamard->bases[i].coefficients);
    free(hadamard->signs);
    free(hadamard);
}

static void arrange(const struct base *base, const float *matrix /* (order, order) */, int transposed) {
    int order = base->order, repeats = base->inner < HADAMARD_WIDE ? (int)base->inner : 1;
    for (int i = 0; i < order; i++)
        for (int j = 0; j < order; j++)
            for (int t = 0; t < repeats; t++) {
                int64_t wide = ((int64_t)(i / 4) * order + j) * 4 + i % 4;
                int64_t narrow = ((int64_t)j * order + i) * repeats + t;
                base->coefficients[base->inner < HADAMARD_WIDE ? narrow : wide] =
                    transposed ? matrix[j * order + i] : matrix[i * order + j];
            }
}

static int base_init(struct base *base, int order, int64_t inner, int transposed) {
    size_t bytes = (size_t)order * (size_t)order * sizeof(float);
    float *matrix = malloc(bytes);
    *base = (struct base){order, inner, malloc(bytes * (inner < HADAMARD_WIDE ? (size_t)inner : 1))};
    int failed = !matrix || !base->coefficients ? -1 : 0;
    if (!failed) {
        hadamard_base(order, matrix);
        arrange(base, matrix, transposed);
    }
    free(matrix);
    return failed;
}

rondel_hadamard *hadamard_new(int64_t size, int64_t block, const uint8_t *signs, int transposed) {
    struct hadamard_plan plan = {0};
    if (hadamard_plan_make(size, block, &plan) < 0) return NULL;
    rondel_hadamard *made = calloc(1, sizeof *made);
    size_t bytes = ((size_t)size + 7) / 8;
    int failed = !made || !(made->signs = calloc(bytes + SIGN_PADDING, 1));
    int64_t inner = block;
    for (int i = 0; !failed && i < plan.count; i++) {
        inner /= plan.bases[i];
        made->count++;
        failed = base_init(&made->bases[i], plan.bases[i], inner, transposed);
    }
    if (failed) {
        hadamard_free(made);
        set_error("no memory for a Hadamard transform of %lld channels", (long long)size);
        return NULL;
    }
    memcpy(made->signs, signs, bytes);
    made->size = size;
    made->block = block;
    made->sylvester = inner;
    made->transposed = transposed;
    made->scale = (float)(1.0 / sqrt((double)block));
    return made;
}

/* The bases from `level` in, and Sylvester's factor, of the chunk at x, whose signs begin at bit `first`. A base reads one
 * of x and scratch and writes the other, so that the outermost writes x. */
static void transform_chunk(const rondel_hadamard *hadamard, int level, float *x, float *scratch, int64_t first) {
    const struct base *base = &hadamard->bases[level];
    float *from = level % 2 == 0 ? scratch : x, *to = level % 2 == 0 ? x : scratch;
    if (level + 1 == hadamard->count)
        kernels_current()->sylvester(x, from, base->order * base->inner / hadamard->sylvester, hadamard->sylvester,
                                     hadamard->transposed ? NULL : hadamard->signs, first, 1.0f);
    else
        for (int64_t i = 0; i < base->order * base->inner; i += base->inner)
            transform_chunk(hadamard, level + 1, x + i, scratch + i, first + i);
    kernels_current()->signed_sums(base->coefficients, base->order, base->inner, from, to, level == 0 ? hadamard->scale : 1.0f);
}

static void apply_signs(const rondel_hadamard *hadamard, float *x) {
    for (int64_t i = 0; i < hadamard->size; i++)
        if (hadamard->signs[i / 8] >> i % 8 & 1) x[i] = -x[i];
}

void hadamard_rows(const rondel_hadamard *hadamard, float *x, int64_t n, float *scratch) {
    for (float *row = x; row < x + n * hadamard->size; row += hadamard->size) {
        if (hadamard->count == 0)
            kernels_current()->sylvester(row, row, hadamard->size / hadamard->block, hadamard->block,
                                         hadamard->transposed ? NULL : hadamard->signs, 0, hadamard->scale);
        else
            for (int64_t start = 0; start < hadamard->size; start += hadamard->block)
                transform_chunk(hadamard, 0, row + start, scratch, start);
        if (hadamard->transposed) apply_signs(hadamard, row);
    }
}

EXPORT rondel_hadamard *rondel_hadamard_new(int64_t size, int64_t block, const uint8_t *signs, int32_t transposed) {
    return hadamard_new(size, block, signs, transposed);
}

EXPORT void rondel_hadamard_free(rondel_hadamard *hadamard) { hadamard_free(hadamard); }

EXPORT int32_t rondel_hadamard_rows(const rondel_hadamard *hadamard, float *x, int64_t n) {
    float *scratch = malloc((size_t)hadamard->block * sizeof *scratch);
    if (!scratch) return set_error("no memory for a Hadamard transform of %lld channels", (long long)hadamard->size);
    hadamard_rows(hadamard, x, n, scratch);
    free(scratch);
    return 0;
}
