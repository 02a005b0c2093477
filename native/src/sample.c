/* Owns sampling: repetition penalty, temperature, top-k, top-p, min-p, and a random generator with a seed.
 * The same logits, settings and seed choose the same token on every machine. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "rondel.h"

struct candidate {
    int32_t token;
    float logit;
    double probability;
};

struct rondel_sampler {
    float temperature, top_p, min_p, repeat_penalty;
    int32_t top_k, repeat_last;
    uint64_t state;                /* of the generator */
    int32_t *history;              /* ring of the last repeat_last tokens */
    int32_t held, next;
    struct candidate *candidates;  /* (capacity) */
    int32_t capacity;
};

/* PCG32 (O'Neill 2014), as a double in [0, 1). */
static uint32_t pcg_next(uint64_t *state) {
    uint64_t old = *state;
    *state = old * 6364136223846793005ull + 1442695040888963407ull;
    uint32_t mixed = (uint32_t)(((old >> 18) ^ old) >> 27), turn = (uint32_t)(old >> 59);
    return mixed >> turn | mixed << (-turn & 31);
}

static double pcg_uniform(uint64_t *state) {
    uint64_t high = pcg_next(state), low = pcg_next(state);
    return (double)((high << 32 | low) >> 11) * 0x1p-53;
}

EXPORT rondel_sampler *rondel_sampler_new(float temperature, int32_t top_k, float top_p, float min_p, float repeat_penalty,
                                          int32_t repeat_last, uint64_t seed) {
    if (!isfinite(temperature) || !(top_p > 0 && top_p <= 1) || !(min_p >= 0 && min_p <= 1) || !(repeat_penalty > 0) ||
        !isfinite(repeat_penalty) || repeat_last < 0 || repeat_last > 1 << 20) {
        set_error("sampling needs a finite temperature, top_p in (0, 1], min_p in [0, 1], a repetition penalty above 0 and a "
                  "window of 0 to %d tokens", 1 << 20);
        return NULL;
    }
    struct rondel_sampler *sampler = calloc(1, sizeof *sampler);
    if (sampler) sampler->history = calloc((size_t)repeat_last + 1, sizeof *sampler->history);
    if (!sampler || !sampler->history) {
        free(sampler);
        set_error("out of memory for a sampler");
        return NULL;
    }
    sampler->temperature = temperature;
    sampler->top_k = top_k;
    sampler->top_p = top_p;
    sampler->min_p = min_p;
    sampler->repeat_penalty = repeat_penalty;
    sampler->repeat_last = repeat_last;
    sampler->state = seed + 1442695040888963407ull;
    pcg_next(&sampler->state);
    return sampler;
}

EXPORT void rondel_sampler_free(rondel_sampler *sampler) {
    if (!sampler) return;
    free(sampler->history);
    free(sampler->candidates);
    free(sampler);
}

EXPORT void rondel_sampler_accept(rondel_sampler *sampler, int32_t token) {
    if (sampler->repeat_last == 0) return;
    sampler->history[sampler->next] = token;
    sampler->next = (sampler->next + 1) % sampler->repeat_last;
    if (sampler->held < sampler->repeat_last) sampler->held++;
}

/* Higher logit first; the lower token where they are equal. */
static int compare_candidates(const void *a, const void *b) {
    const struct candidate *left = a, *right = b;
    if (left->logit != right->logit) return left->logit > right->logit ? -1 : 1;
    return (left->token > right->token) - (left->token < right->token);
}

/* Divides positive and multiplies negative logits of recent tokens (Keskar et al. 2019, arXiv 1909.05858), each once. */
static void penalize(const struct rondel_sampler *sampler, int32_t vocabulary) {
    if (sampler->repeat_penalty == 1.0f) return;
    for (int32_t i = 0; i < sampler->held; i++) {
        int32_t token = sampler->history[i];
        int seen = token < 0 || token >= vocabulary;
        for (int32_t j = 0; j < i && !seen; j++) seen = sampler->history[j] == token;
        if (seen) continue;
        float *logit = &sampler->candidates[token].logit;
        *logit = *logit > 0 ? *logit / sampler->repeat_penalty : *logit * sampler->repeat_penalty;
    }
}

/* Keeps the k best at the front, sorted: sorts everything only where most of it may be needed. */
static int32_t keep_best(struct candidate *candidates, int32_t count, int32_t k) {
    if (k <= 0 || k >= count) {
        qsort(candidates, (size_t)count, sizeof *candidates, compare_candidates);
        return count;
    }
    /* a heap of the k best so far, its worst at the root */
    qsort(candidates, (size_t)k, sizeof *candidates, compare_candidates);
    for (int32_t left = 0, right = k - 1; left < right; left++, right--) {
        struct candidate swap = candidates[left];
        candidates[left] = candidates[right];
        candidates[right] = swap;
    }
    for (int32_t i = k; i < count; i++) {
        if (compare_candidates(&candidates[i], &candidates[0]) >= 0) continue;
        struct candidate item = candidates[i];
        int32_t hole = 0;
        for (int32_t child; (child = 2 * hole + 1) < k; hole = child) {
            if (child + 1 < k && compare_candidates(&candidates[child + 1], &candidates[child]) > 0) child++;
            if (compare_candidates(&candidates[child], &item) <= 0) break;
            candidates[hole] = candidates[child];
        }
        candidates[hole] = item;
    }
    qsort(candidates, (size_t)k, sizeof *candidates, compare_candidates);
    return k;
}

/* Of sorted candidates: how many stay after top-p and min-p; their probabilities are filled in. */
static int32_t truncate_tail(const struct rondel_sampler *sampler, struct candidate *candidates, int32_t count) {
    double sum = 0, kept = 0;
    for (int32_t i = 0; i < count; i++)
        sum += candidates[i].probability = exp((double)(candidates[i].logit - candidates[0].logit) / sampler->temperature);
    int32_t last = 0;
    while (last < count && (last == 0 || kept < sampler->top_p * sum)) kept += candidates[last++].probability;
    int32_t enough = 1; /* the best one's probability is 1 before dividing by the sum */
    while (enough < last && candidates[enough].probability >= sampler->min_p) enough++;
    return enough;
}

EXPORT int32_t rondel_sampler_next(rondel_sampler *sampler, const float *logits, int32_t vocabulary) {
    if (vocabulary < 1) return set_error("sampling needs at least one logit, got %d", vocabulary);
    if (vocabulary > sampler->capacity) {
        struct candidate *grown = realloc(sampler->candidates, (size_t)vocabulary * sizeof *grown);
        if (!grown) return set_error("out of memory for %d candidates", vocabulary);
        sampler->candidates = grown;
        sampler->capacity = vocabulary;
    }
    struct candidate *candidates = sampler->candidates;
    for (int32_t i = 0; i < vocabulary; i++) {
        if (isnan(logits[i])) return set_error("the logit of token %d is not a number: the model is damaged", i);
        candidates[i] = (struct candidate){i, logits[i], 0};
    }
    penalize(sampler, vocabulary);
    int32_t count = keep_best(candidates, vocabulary, sampler->temperature <= 0 ? 1 : sampler->top_k);
    if (sampler->temperature <= 0 || count == 1) return candidates[0].token;
    count = truncate_tail(sampler, candidates, count);
    double sum = 0, threshold;
    for (int32_t i = 0; i < count; i++) sum += candidates[i].probability;
    threshold = pcg_uniform(&sampler->state) * sum;
    for (int32_t i = 0; i < count - 1; i++)
        if ((threshold -= candidates[i].probability) < 0) return candidates[i].token;
    return candidates[count - 1].token;
}
