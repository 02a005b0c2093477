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

enum { CACHED = 4096 };    /* floats that stay in a first-level cache with their copy while factor follows factor */

struct rondel_hadamard {
    int64_t size, block, sylvester; /* channels, of a block, of its factor 2^k */
    int transposed, count;
    struct signed_sums bases[HADAMARD_BASES]; /* (count), the outermost first */
    uint8_t *signs;
    float scale;
};

static void release(struct signed_sums *base) {
    free((void *)base->terms);
    free((void *)base->signs);
}

void hadamard_free(rondel_hadamard *hadamard) {
    if (!hadamard) return;
    for (int i = 0; i < hadamard->count; i++) release(&hadamard->bases[i]);
    free(hadamard->signs);
    free(hadamard);
}

static int choice_of(const float four[4]) {
    return SUM_B * (four[0] != four[1]) + SUM_D * (four[2] != four[3]) + SUM_CD * (four[0] != four[2]);
}

static int base_init(struct signed_sums *base, int order, int64_t inner, int transposed) {
    size_t entries = (size_t)order * (size_t)order;
    float *matrix = malloc(entries * sizeof *matrix), *signs = malloc((size_t)order * sizeof *signs);
    uint16_t *terms = malloc(entries / 4 * sizeof *terms);
    *base = (struct signed_sums){order, transposed, inner, terms, signs};
    int failed = !matrix || !signs || !terms ? -1 : 0;
    if (!failed) hadamard_base(order, matrix);
    for (int i = 0; !failed && i < order; i++) {
        signs[i] = matrix[transposed ? i : i * order];
        for (int j = 0; j < order; j += 4) {
            float four[4];
            for (int k = 0; k < 4; k++) four[k] = matrix[transposed ? (j + k) * order + i : i * order + j + k];
            int choice = choice_of(four) + SUM_MINUS * (four[0] != signs[i]);
            terms[signed_sums_at(order, i, j / 4)] = (uint16_t)(16 * (16 * (j / 4 % SUM_GROUPS) + choice));
        }
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

/* The bases from `level` in, and Sylvester's factor, of `count` chunks at x, whose signs begin at bit `first`, to `to`: one
 * of x and scratch, `other` being the other. What can stay in its place does: half as much goes through the caches. */
static void transform_chunks(const rondel_hadamard *hadamard, int level, int64_t count, float *x, float *to, float *other,
                             int64_t first) {
    const struct signed_sums *base = &hadamard->bases[level];
    int in_place = signed_sums_in_place(base);
    float *from = in_place ? to : other, *rest = in_place ? other : to;
    int64_t inner = base->inner, chunks = count * base->order;
    if (level + 1 == hadamard->count)
        kernels_current()->sylvester(x, from, chunks * inner / hadamard->sylvester, hadamard->sylvester,
                                     hadamard->transposed ? NULL : hadamard->signs, first, 1.0f);
    else
        for (int64_t i = 0, many = inner < CACHED ? CACHED / inner : 1; i < chunks; i += many)
            transform_chunks(hadamard, level + 1, many < chunks - i ? many : chunks - i, x + i * inner,
                             from + i * inner, rest + i * inner, first + i * inner);
    kernels_current()->signed_sums(base, count, from, to, level == 0 ? hadamard->scale : 1.0f);
}

static void transform(const rondel_hadamard *hadamard, float *x, float *scratch) {
    const uint8_t *signs = hadamard->transposed ? NULL : hadamard->signs;
    int64_t block = hadamard->block, blocks = hadamard->size / block, many = block < CACHED ? CACHED / block : 1;
    if (hadamard->count == 0) kernels_current()->sylvester(x, x, blocks, block, signs, 0, hadamard->scale);
    else
        for (int64_t i = 0; i < blocks; i += many)
            transform_chunks(hadamard, 0, many < blocks - i ? many : blocks - i, x + i * block, x + i * block, scratch,
                             i * block);
}

static void apply_signs(const rondel_hadamard *hadamard, float *x) {
    for (int64_t i = 0; i < hadamard->size; i++)
        if (hadamard->signs[i / 8] >> i % 8 & 1) x[i] = -x[i];
}

void hadamard_rows(const rondel_hadamard *hadamard, float *x, int64_t n, float *scratch) {
    for (float *row = x; row < x + n * hadamard->size; row += hadamard->size) {
        transform(hadamard, row, scratch);
        if (hadamard->transposed) apply_signs(hadamard, row);
    }
}

EXPORT rondel_hadamard *rondel_hadamard_new(int64_t size, int64_t block, const uint8_t *signs, int32_t transposed) {
    return hadamard_new(size, block, signs, transposed);
}

EXPORT void rondel_hadamard_free(rondel_hadamard *hadamard) { hadamard_free(hadamard); }

EXPORT int32_t rondel_hadamard_rows(const rondel_hadamard *hadamard, float *x, int64_t n) {
    void *scratch = NULL; /* aligned for every kernel: half of what is not takes two lines of a cache */
    if (posix_memalign(&scratch, 64, (size_t)hadamard->size * sizeof(float)) != 0)
        return set_error("no memory for a Hadamard transform of %lld channels", (long long)hadamard->size);
    hadamard_rows(hadamard, x, n, scratch);
    free(scratch);
    return 0;
}
