/* Owns the rounding of activations that copies may have, its counter hash and its turns. */
#include "activation_rounding.h"

#include <math.h>

#include "error.h"
#include "kernels/kernels.h"
#include "rondel.h"

/* One more word into the hash: SplitMix64's step and finalizer (Steele, Lea and Flood 2014). */
static uint64_t hash_word(uint64_t h, uint64_t word) {
    h += word + 0x9e3779b97f4a7c15u;
    h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9u;
    h = (h ^ h >> 27) * 0x94d049bb133111ebu;
    return h ^ h >> 31;
}

/* Signs from the seed and Sylvester's matrix on the largest blocks of 2^k that fit, or that undone. */
static void turn(int seed, float *x, int64_t channels, int back) {
    int64_t block = channels & -channels;
    uint64_t h = hash_word(0, (uint64_t)seed);
    float scale = (float)(1.0 / sqrt((double)block));
    if (back) kernels_current()->sylvester(x, x, channels / block, block, NULL, 0, scale);
    for (int64_t i = 0; i < channels; i++)
        if (hash_word(h, (uint64_t)i) & 1) x[i] = -x[i];
    if (!back) kernels_current()->sylvester(x, x, channels / block, block, NULL, 0, scale);
}

static float clamp(float code, float levels) { return code < -levels ? -levels : code > levels ? levels : code; }

static void round_row(const struct activation_rounding *rounding, struct activation_place place, float *x, int64_t channels) {
    float levels = (float)((1 << (rounding->bits - 1)) - 1), largest = 0;
    for (int64_t i = 0; i < channels; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    float step = rounding->scale * largest / levels;
    if (!(step > 0)) return;
    if (!rounding->seed) {
        for (int64_t i = 0; i < channels; i++) x[i] = clamp(rintf(x[i] / step), levels) * step;
        return;
    }
    uint64_t h = hash_word(hash_word(0, (uint64_t)rounding->seed), (uint64_t)place.layer);
    h = hash_word(hash_word(h, (uint64_t)place.input), (uint64_t)place.position);
    for (int64_t i = 0; i < channels; i++) {
        float uniform = (float)(hash_word(h, (uint64_t)i) >> 40) * 0x1p-24f;
        x[i] = clamp(floorf(x[i] / step + uniform), levels) * step;
    }
}

void round_activations(const struct activation_rounding *rounding, struct activation_place place, float *x, int64_t channels) {
    if (rounding->rotation) turn(rounding->rotation, x, channels, 0);
    round_row(rounding, place, x, channels);
    if (rounding->rotation) turn(rounding->rotation, x, channels, 1);
}

EXPORT int32_t rondel_round_activations(float *x, int64_t n, int64_t channels, int32_t bits, float scale, int32_t seed,
                                        int32_t rotation, int32_t layer, int32_t input, int32_t position) {
    if (bits < 2 || bits > 16 || seed < 0 || rotation < 0 || n < 0 || channels < 1)
        return set_error("activations are rounded to 2 to 16 bits with seeds of 0 or more, got %d, %d and %d", bits, seed,
                         rotation);
    struct activation_rounding rounding = {bits, scale, seed, rotation};
    for (int64_t row = 0; row < n; row++)
        round_activations(&rounding, (struct activation_place){layer, input, position + (int)row}, x + row * channels, channels);
    return 0;
}
