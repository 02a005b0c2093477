/* The nearest codeword of a codebook, exactly, for one scale.
 *
 * A codeword q leaves sum w (x - t q)^2 = sum w x^2 - 2 t (b - t a / 2) with a = sum w q^2 and b = sum w x q, so the nearest
 * one is that of the greatest height b - t a / 2. Heights add: a codeword is a left and a right half, each one of 81
 * patterns (four of three levels) or 64 (two of eight levels), and a codebook is the set of pairs that it allows. A left
 * half is looked at only if beside the best right half of all it would beat the best pair so far; a few are. */
#ifndef RONDEL_CODEBOOK_SEARCH_H
#define RONDEL_CODEBOOK_SEARCH_H
#include "books.h"
#include "encode.h"

#include <math.h>

#include "lanes.h"

#define PATTERNS 96 /* of a half, rounded up to four vectors */
#define VECTORS (PATTERNS / LANES)

#ifdef __clang__
#define SWAP(a, ...) __builtin_shufflevector(a, a, __VA_ARGS__)
#else
#define SWAP(a, ...) __builtin_shuffle(a, (mask){__VA_ARGS__})
#endif

/* A codebook by halves. Shifts: IQ1 has its levels up ([0]) and down ([1]). */
struct dictionary {
    vec level[2][VECTORS][4];       /* [shift][pattern][weight of the half] */
    vec barred[PATTERNS][VECTORS];  /* [left pattern][right pattern]: 0 where the pair is a codeword, else -infinity */
    uint16_t index[PATTERNS][PATTERNS];
    float typical;                  /* root mean square of the levels */
};

/* Sums of every pattern over the weights of a half; `wrong`: b with the wrong sign where that costs least. */
struct half {
    vec a[VECTORS], b[VECTORS], wrong[VECTORS];
};

INLINE int shifts_of(const struct book *book) { return book->beside == SHIFT_OF_32 || book->beside == SHIFT_OF_8 ? 2 : 1; }
INLINE int patterns_of(const struct book *book) { return book->width == 8 ? 81 : 64; }
INLINE int vectors_of(const struct book *book) { return book->width == 8 ? VECTORS : 8; }

/* Field `at` of a pattern, which is a number of base 3 or 8. */
static int field_of(const struct book *book, int pattern, int at) {
    static const int powers[4] = {1, 3, 9, 27};
    return book->width == 8 ? pattern / powers[at] % 3 : pattern >> 3 * at & 7;
}

static void load_dictionary(const struct book *book, struct dictionary *to) {
    int bits = 16 / book->width, half = book->width / 2, patterns = patterns_of(book);
    double squares = 0;
    memset(to, 0, sizeof *to);
    for (int p = 0; p < PATTERNS; p++) {
        for (int i = 0; i < VECTORS; i++) to->barred[p][i] = splat(-INFINITY);
        for (int j = 0; j < half && p < patterns; j++) {
            float level = book->levels[field_of(book, p, j)];
            to->level[0][p / LANES][j][p % LANES] = shifts_of(book) == 2 ? level + 1 : level;
            to->level[1][p / LANES][j][p % LANES] = level - 1;
        }
    }
    for (int c = 0; c < book->entries; c++) {
        int pattern[2] = {0, 0};
        for (int j = book->width - 1; j >= 0; j--) {
            int field = book->words[c] >> bits * j & ((1 << bits) - 1);
            pattern[j / half] = pattern[j / half] * (book->width == 8 ? 3 : 8) + field;
            squares += book->levels[field] * book->levels[field];
        }
        to->barred[pattern[0]][pattern[1] / LANES][pattern[1] % LANES] = 0;
        to->index[pattern[0]][pattern[1]] = (uint16_t)c;
    }
    to->typical = sqrtf((float)(squares / (book->entries * book->width)));
}

/* The sums of one half of `n` weights, 2 or 4. IQ1 rounds signed weights; the others magnitudes. With `odd` one of these
 * takes the wrong sign. */
INLINE void sum_half(const struct book *book, int n, const struct dictionary *dictionary, int shift, const float *x,
                     const float *w, int odd, struct half *to) {
    vec weight[4], pull[4];
    int patterns = patterns_of(book);
    for (int j = 0; j < n; j++) {
        weight[j] = splat(w[j]);
        pull[j] = splat(w[j] * (shifts_of(book) == 2 ? x[j] : fabsf(x[j])));
    }
    for (int i = 0; i < vectors_of(book); i++) {
        const vec *level = dictionary->level[shift][i];
        vec a = splat(0), b = splat(0), least = splat(INFINITY);
#pragma GCC unroll 4
        for (int j = 0; j < n; j++) {
            vec product = level[j] * pull[j];
            a += level[j] * level[j] * weight[j];
            b += product;
            least = lesser(product, least);
        }
        to->a[i] = a;
        to->b[i] = b;
        if (odd) to->wrong[i] = b - 2.0f * least;
    }
    for (int p = patterns; p < LANES * vectors_of(book); p++)
        to->b[p / LANES][p % LANES] = to->wrong[p / LANES][p % LANES] = -INFINITY;
}

/* The largest of a vector. */
INLINE float highest(vec a) {
    a = greater(a, SWAP(a, 4, 5, 6, 7, 0, 1, 2, 3));
    a = greater(a, SWAP(a, 2, 3, 0, 1, 6, 7, 4, 5));
    a = greater(a, SWAP(a, 1, 0, 3, 2, 5, 4, 7, 6));
    return a[0];
}

/* Patterns as bits: bit i of lane l is pattern i LANES + l. */
struct set {
    uint64_t words[LANES / 2];
};

INLINE struct set not_below(int vectors, const vec *heights, float bar) {
    mask found[2] = {{0, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0, 0}};
    struct set set;
    for (int i = 0; i < vectors; i += 2)
        for (int k = 0; k < 2; k++) found[k] |= (heights[i + k] >= bar) & (1 << (i + k));
    found[0] |= found[1];
    memcpy(&set, &found[0], sizeof set);
    return set;
}

/* Takes a pattern out of word q. */
INLINE int next_of(struct set *set, int q) {
    int bit = __builtin_ctzll(set->words[q]);
    set->words[q] &= set->words[q] - 1;
    return bit % 32 * LANES + 2 * q + bit / 32;
}

/* The pattern of the greatest height. */
INLINE int place_of(int vectors, const vec *heights, float height) {
    struct set set = not_below(vectors, heights, height);
    int q = 0;
    while (q < 3 && !set.words[q]) q++;
    return next_of(&set, q);
}

INLINE float largest_of(int vectors, const vec *heights) {
    vec top[4] = {heights[0], heights[1], heights[2], heights[3]}; /* four chains: one would wait for itself */
    for (int i = 4; i < vectors; i += 4)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) top[k] = greater(top[k], heights[i + k]);
    return highest(greater(greater(top[0], top[1]), greater(top[2], top[3])));
}

/* The greatest height of a right pattern beside a left one; `to` gets all. */
INLINE float beside_left(const struct dictionary *dictionary, int vectors, const vec *right, int left, vec *to) {
    for (int i = 0; i < vectors; i += 4)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) to[i + k] = right[i + k] + dictionary->barred[left][i + k];
    return largest_of(vectors, to);
}

/* The best pair of a codeword so far; nothing is known where `height` is -infinity. */
struct pair {
    float height;
    int left, right;
    int wrong; /* the wrong sign is in the left half (1) or in the right one (2) */
};

INLINE float pair_a(const struct half *halves, const struct pair *pair) {
    return ((const float *)halves[0].a)[pair->left] + ((const float *)halves[1].a)[pair->right];
}

INLINE float pair_b(const struct half *halves, const struct pair *pair) {
    const vec *left = pair->wrong == 1 ? halves[0].wrong : halves[0].b;
    const vec *right = pair->wrong == 2 ? halves[1].wrong : halves[1].b;
    return ((const float *)left)[pair->left] + ((const float *)right)[pair->right];
}

/* The heights of the patterns of a half at half a scale; returns the greatest. */
INLINE float heights_of(int vectors, const vec *a, const vec *b, float t, vec *to) {
    vec top[2] = {splat(-INFINITY), splat(-INFINITY)}; /* two chains: one would wait for itself */
    for (int i = 0; i < vectors; i += 2)
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            to[i + k] = b[i + k] - t * a[i + k];
            top[k] = greater(top[k], to[i + k]);
        }
    return highest(greater(top[0], top[1]));
}

/* Raises `best` to the highest pair, where that is higher. `rest` is the greatest height of a right pattern. */
INLINE void climb(const struct dictionary *dictionary, int vectors, const vec *left, const vec *right, float rest,
                  int wrong, struct pair *best) {
    vec sums[VECTORS];
    float beside = 0;
    int found = -1;
    struct set worth = not_below(vectors, left, best->height - rest);
    for (int q = 0; q < LANES / 2; q++)
        while (worth.words[q]) {
            int at = next_of(&worth, q);
            float height = ((const float *)left)[at];
            if (!(height + rest > best->height)) continue;
            float other = beside_left(dictionary, vectors, right, at, sums);
            if (!(height + other > best->height)) continue;
            best->height = height + other;
            beside = other;
            found = at;
        }
    if (found < 0) return;
    beside_left(dictionary, vectors, right, found, sums);
    best->left = found;
    best->right = place_of(vectors, sums, beside);
    best->wrong = wrong;
}

/* The highest pair of two halves at scale t, where it is higher than `bar`. `best` comes with the one of another scale; its
 * first time with height -infinity, and then the best left pattern makes the start. */
INLINE void nearest_pair(const struct book *book, const struct dictionary *dictionary, const struct half *halves, int odd,
                         float t, float bar, struct pair *best) {
    int vectors = vectors_of(book), first = best->height == -INFINITY;
    vec left[VECTORS], right[VECTORS], sums[VECTORS];
    const vec *left_b = odd ? halves[0].wrong : halves[0].b;
    float top = heights_of(vectors, halves[0].a, left_b, 0.5f * t, left);
    float rest = heights_of(vectors, halves[1].a, halves[1].b, 0.5f * t, right);
    if (first) {
        best->left = place_of(vectors, left, top);
        float beside = beside_left(dictionary, vectors, right, best->left, sums);
        best->right = place_of(vectors, sums, beside);
        best->wrong = odd;
        first = beside == -INFINITY; /* no codeword has this left half */
    }
    if (!first) best->height = pair_b(halves, best) - 0.5f * t * pair_a(halves, best);
    if (best->height < bar) best->height = bar;
    if (top + rest > best->height) climb(dictionary, vectors, left, right, rest, odd, best);
    if (!odd) return;
    heights_of(vectors, halves[0].a, halves[0].b, 0.5f * t, left);
    rest = heights_of(vectors, halves[1].a, halves[1].wrong, 0.5f * t, right);
    climb(dictionary, vectors, left, right, rest, 2, best);
}
#endif
