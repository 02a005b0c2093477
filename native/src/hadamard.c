/* H = H_b1 (x) H_b2 (x) ... (x) Sylvester 2^k: the bases are Paley's matrices over primes, and the plan is the one with the
 * fewest additions an element (sum of the bases + k; ties: fewer bases, then the lexicographically first). */
#include "hadamard.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "rondel.h"

enum {
    MAX_BASE_ORDER = 256, /* as in quant/hadamard.py; part of the format */
    MAX_BASES = 8,        /* 12^9 > 2^31 */
    INNER_TILE = 32       /* floats of the output kept in registers while a base is applied */
};

struct plan {
    int count, additions;
    int bases[MAX_BASES];
};

struct hadamard {
    int64_t size, block;
    struct plan plan;
    float *matrices[MAX_BASES]; /* (order, order) of +1 and -1 */
    float *signs;               /* (size) */
    float scale;
};

static int is_prime(int number) {
    if (number < 2) return 0;
    for (int divisor = 2; divisor * divisor <= number; divisor++)
        if (number % divisor == 0) return 0;
    return 1;
}

static int is_power_of_two(int64_t number) { return number > 0 && (number & (number - 1)) == 0; }

/* q of Paley I (q = order - 1 = 3 mod 4), else of Paley II (q = order/2 - 1 = 1 mod 4), else 0. */
static int paley_prime(int order) {
    if (order % 4 != 0) return 0;
    if (is_prime(order - 1)) return order - 1;
    int half = order / 2 - 1;
    return half % 4 == 1 && is_prime(half) ? half : 0;
}

/* Bases are tried in ascending order, so among equal costs and counts the first found is the lexicographically first. */
static void search(int64_t rest, int first, struct plan *chosen, struct plan *best) {
    if (is_power_of_two(rest)) {
        struct plan found = *chosen;
        for (; rest > 1; rest /= 2) found.additions++;
        if (best->additions < 0 || found.additions < best->additions ||
            (found.additions == best->additions && found.count < best->count))
            *best = found;
        return;
    }
    if (chosen->count == MAX_BASES) return;
    for (int order = first; order <= MAX_BASE_ORDER; order += 4) {
        if (rest % order != 0 || is_power_of_two(order) || !paley_prime(order)) continue;
        chosen->bases[chosen->count++] = order;
        chosen->additions += order;
        search(rest / order, order, chosen, best);
        chosen->additions -= order;
        chosen->count--;
    }
}

/* Q[i][j] = chi(i - j) mod q. Paley I: I + [[0, 1], [-1, Q]]. Paley II: [[1, -1], [-1, -1]] for the zeros of
 * [[0, 1], [1, Q]], +-[[1, 1], [1, -1]] for the rest. */
static void fill_base(int order, float *matrix) {
    int q = paley_prime(order), type1 = q == order - 1;
    signed char chi[MAX_BASE_ORDER];
    memset(chi, -1, sizeof chi);
    chi[0] = 0;
    for (int i = 1; i < q; i++) chi[i * i % q] = 1;
    for (int i = 0; i <= q; i++)
        for (int j = 0; j <= q; j++) {
            int core = i == 0 ? j != 0 : j == 0 ? (type1 ? -1 : 1) : chi[(i - j + q) % q];
            if (type1) {
                matrix[i * order + j] = (float)(core + (i == j));
                continue;
            }
            for (int r = 0; r < 2; r++)
                for (int c = 0; c < 2; c++) {
                    int value = i == j ? (r || c ? -1 : 1) : (r && c ? -core : core);
                    matrix[(2 * i + r) * order + 2 * j + c] = (float)value;
                }
        }
}

void hadamard_free(struct hadamard *hadamard) {
    if (!hadamard) return;
    for (int i = 0; i < MAX_BASES; i++) free(hadamard->matrices[i]);
    free(hadamard->signs);
    free(hadamard);
}

static int make_plan(int64_t size, int64_t block, struct plan *plan) {
    if (size < 1 || size > INT32_MAX || block < 1 || block > size || size % block != 0)
        return set_error("a Hadamard block must divide its channels; got blocks of %lld on %lld", (long long)block,
                         (long long)size);
    struct plan chosen = {0};
    plan->additions = -1;
    search(block, 4, &chosen, plan);
    if (plan->additions < 0)
        return set_error("there is no Hadamard matrix of order %lld here (Sylvester and Paley over primes up to %d); "
                         "the rotation needs smaller blocks", (long long)block, MAX_BASE_ORDER);
    return 0;
}

struct hadamard *hadamard_new(int64_t size, int64_t block, const uint8_t *signs) {
    struct plan plan = {0};
    if (make_plan(size, block, &plan) < 0) return NULL;
    struct hadamard *made = calloc(1, sizeof *made);
    if (!made) goto no_memory;
    made->size = size;
    made->block = block;
    made->plan = plan;
    made->scale = (float)(1.0 / sqrt((double)block));
    if (!(made->signs = malloc((size_t)size * sizeof *made->signs))) goto no_memory;
    for (int64_t i = 0; i < size; i++) made->signs[i] = signs[i / 8] >> i % 8 & 1 ? -1.0f : 1.0f;
    for (int i = 0; i < plan.count; i++) {
        size_t order = (size_t)plan.bases[i];
        if (!(made->matrices[i] = malloc(order * order * sizeof(float)))) goto no_memory;
        fill_base(plan.bases[i], made->matrices[i]);
    }
    return made;
no_memory:
    hadamard_free(made);
    set_error("no memory for a Hadamard transform of %lld channels", (long long)size);
    return NULL;
}

/* y (order, inner) = matrix (order, order) times x (order, inner); sums run in ascending order of j. */
static void apply_base(const float *matrix, int order, int64_t inner, const float *x, float *y) {
    for (int i = 0; i < order; i++)
        for (int64_t first = 0; first < inner; first += INNER_TILE) {
            int64_t width = inner - first < INNER_TILE ? inner - first : INNER_TILE;
            float sum[INNER_TILE] = {0};
            for (int j = 0; j < order; j++) {
                const float sign = matrix[i * order + j], *row = x + j * inner + first;
                if (width == INNER_TILE)
                    for (int t = 0; t < INNER_TILE; t++) sum[t] += sign * row[t];
                else
                    for (int64_t t = 0; t < width; t++) sum[t] += sign * row[t];
            }
            memcpy(y + i * inner + first, sum, (size_t)width * sizeof *y);
        }
}

static void sylvester(float *x, int64_t length) {
    for (int64_t half = length / 2; half >= 1; half /= 2)
        for (int64_t start = 0; start < length; start += 2 * half) {
            float *restrict a = x + start, *restrict b = a + half;
            for (int64_t i = 0; i < half; i++) {
                float sum = a[i] + b[i], difference = a[i] - b[i];
                a[i] = sum;
                b[i] = difference;
            }
        }
}

static void transform_block(const struct hadamard *hadamard, float *x, float *scratch) {
    int64_t inner = hadamard->block;
    for (int i = 0; i < hadamard->plan.count; i++) {
        int order = hadamard->plan.bases[i];
        int64_t outer = inner;
        inner /= order;
        for (int64_t start = 0; start < hadamard->block; start += outer)
            apply_base(hadamard->matrices[i], order, inner, x + start, scratch + start);
        memcpy(x, scratch, (size_t)hadamard->block * sizeof *x);
    }
    for (int64_t start = 0; start < hadamard->block; start += inner) sylvester(x + start, inner);
    for (int64_t i = 0; i < hadamard->block; i++) x[i] *= hadamard->scale;
}

void hadamard_rows(const struct hadamard *hadamard, float *x, int64_t n, float *scratch) {
    for (int64_t row = 0; row < n; row++) {
        float *channels = x + row * hadamard->size;
        for (int64_t i = 0; i < hadamard->size; i++) channels[i] *= hadamard->signs[i];
        for (int64_t start = 0; start < hadamard->size; start += hadamard->block)
            transform_block(hadamard, channels + start, scratch);
    }
}

EXPORT int32_t rondel_hadamard(float *x, int64_t n, int64_t size, int64_t block, const uint8_t *signs) {
    struct hadamard *hadamard = hadamard_new(size, block, signs);
    if (!hadamard) return -1;
    float *scratch = malloc((size_t)block * sizeof *scratch);
    if (scratch)
        hadamard_rows(hadamard, x, n, scratch);
    else
        set_error("no memory for a Hadamard transform of %lld channels", (long long)size);
    hadamard_free(hadamard);
    int32_t code = scratch ? 0 : -1;
    free(scratch);
    return code;
}
