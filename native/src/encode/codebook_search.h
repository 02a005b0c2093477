/* The nearest codewords of a superblock's 32 units of eight weights for one scale a sub-block.
 *
 * A codeword q leaves sum w (x - t q)^2 = sum w x^2 - 2 t (b - t a / 2) with a = sum w q^2 and b = sum w x q, so the nearest
 * one is that of the greatest height b - t a / 2. Heights add: a codeword is a left and a right half, each one of 81
 * patterns (four weights of three levels) or 64 (two of eight), and a codebook is the set of pairs that it allows. So what
 * is sought is the highest right half beside every left one, and then the highest sum.
 *
 * A unit is a lane, and a sub-block too: nothing goes across lanes, and one look at a codeword serves all 32 units.
 * Heights are whole numbers of 18 bits, finer than it could matter, with the patterns in the 14 bits below: the greatest
 * word says which codeword it is. Groups of right halves that many left ones allow are compared once for all of them. */
#ifndef RONDEL_CODEBOOK_SEARCH_H
#define RONDEL_CODEBOOK_SEARCH_H
#include "books.h"
#include "encode.h"

#include <math.h>

#include "lanes.h"

#define COLUMNS 256
#define WIDE 4        /* vectors of units */
#define PATTERNS 81   /* of a half, at most */
#define SIDE 9        /* of a quarter, at most: a half is two quarters */
#define ENTRIES 2048  /* of a codebook, at most */
#define GROUPS 81     /* of right patterns */
#define NO_CODEWORD 0xffff
#define LEAST_SHARED 3 /* left patterns that share a group */

/* A codebook by halves. A node is a right pattern or a group of them: two nodes before it. */
struct dictionary {
    int lefts, patterns, nodes;
    uint8_t left[PATTERNS];       /* the left patterns that codewords have */
    uint16_t first[PATTERNS + 1]; /* of the nodes beside every one */
    uint8_t right[ENTRIES];       /* nodes */
    uint8_t group[GROUPS][2];
    float level[PATTERNS][4];     /* of the weights of a half */
    uint16_t index[PATTERNS][PATTERNS];
    float typical;                /* root mean square of the levels */
};

INLINE int shifts_of(const struct book *book) { return book->beside == SHIFT_OF_32 || book->beside == SHIFT_OF_8 ? 2 : 1; }
INLINE int side_of(const struct book *book) { return book->width == 8 ? SIDE : 8; }
INLINE int fields_of(const struct book *book) { return book->width == 8 ? 3 : 8; }

/* The left patterns that a node stands beside. */
struct column {
    uint64_t bits[2];
};

static struct column both_of(struct column a, struct column b) {
    return (struct column){{a.bits[0] & b.bits[0], a.bits[1] & b.bits[1]}};
}

static int shared_by(struct column a, struct column b) {
    struct column both = both_of(a, b);
    return __builtin_popcountll(both.bits[0]) + __builtin_popcountll(both.bits[1]);
}

/* Lists the nodes beside every left pattern. Again and again the two nodes that most left patterns share become a group:
 * that takes away more than half of all comparisons. */
static void list_nodes(struct dictionary *to) {
    struct column column[PATTERNS + GROUPS] = {{{0, 0}}};
    uint8_t shared[PATTERNS + GROUPS][PATTERNS + GROUPS] = {{0}};
    for (int p = 0; p < to->patterns; p++)
        for (int r = 0; r < to->patterns; r++)
            if (to->index[p][r] != NO_CODEWORD) column[r].bits[p / 64] |= (uint64_t)1 << p % 64;
    for (int i = 0; i < to->patterns; i++)
        for (int j = 0; j < i; j++) shared[i][j] = (uint8_t)shared_by(column[i], column[j]);
    for (to->nodes = to->patterns; to->nodes < to->patterns + GROUPS; to->nodes++) {
        int most = LEAST_SHARED - 1, pair[2] = {0, 0}, n = to->nodes;
        for (int i = 0; i < n; i++)
            for (int j = 0; j < i; j++)
                if (shared[i][j] > most) most = shared[i][j], pair[0] = i, pair[1] = j;
        if (most < LEAST_SHARED) break;
        column[n] = both_of(column[pair[0]], column[pair[1]]);
        for (int k = 0; k < 2; k++) {
            to->group[n - to->patterns][k] = (uint8_t)pair[k];
            for (int half = 0; half < 2; half++) column[pair[k]].bits[half] &= ~column[n].bits[half];
        }
        int changed[3] = {pair[0], pair[1], n};
        for (int k = 0; k < 3; k++)
            for (int i = 0, c = changed[k]; i <= n; i++)
                if (i != c) shared[i > c ? i : c][i > c ? c : i] = (uint8_t)shared_by(column[i], column[c]);
    }
    int count = 0;
    for (int p = 0; p < to->patterns; p++) {
        int before = count;
        for (int n = 0; n < to->nodes; n++)
            if (column[n].bits[p / 64] >> p % 64 & 1) to->right[count++] = (uint8_t)n;
        if (count == before) continue;
        to->left[to->lefts++] = (uint8_t)p;
        to->first[to->lefts] = (uint16_t)count;
    }
}

static void load_dictionary(const struct book *book, struct dictionary *to) {
    int bits = 16 / book->width, half = book->width / 2, patterns = side_of(book) * side_of(book), fields = fields_of(book);
    double squares = 0;
    memset(to, 0, sizeof *to);
    memset(to->index, 255, sizeof to->index);
    to->patterns = patterns;
    for (int p = 0; p < patterns; p++)
        for (int j = 0, rest = p; j < half; j++, rest /= fields) to->level[p][j] = book->levels[rest % fields];
    for (int c = 0; c < book->entries; c++) {
        int pattern[2] = {0, 0};
        for (int j = book->width - 1; j >= 0; j--) {
            int field = book->words[c] >> bits * j & ((1 << bits) - 1);
            pattern[j / half] = pattern[j / half] * fields + field;
            squares += book->levels[field] * book->levels[field];
        }
        to->index[pattern[0]][pattern[1]] = (uint16_t)c;
    }
    to->typical = sqrtf((float)(squares / (book->entries * book->width)));
    list_nodes(to);
}

/* Weights of a superblock, units across the lanes: weight j of unit (v, l) is [8 v + j][l]. A sub-block is a lane of its
 * 2 or 4 successive vectors. */
struct columns {
    vec x[COLUMNS / LANES], w[COLUMNS / LANES];
    vec pull[COLUMNS / LANES]; /* w x; IQ2 and IQ3: w |x| */
    mask odd[WIDE];            /* EVEN_SIGNS: one weight of the unit has to take the wrong sign */
};

/* Bits of a word of height and patterns. */
#define PATTERN_BITS 7
#define HEIGHT_SHIFT (2 * PATTERN_BITS)
#define HIGHEST 131000.0f /* of 2^17: roundings of four quarters stay below it */

INLINE mask pick_whole(mask where, mask yes, mask no) { return (mask)pick(where, (vec)yes, (vec)no); }

#ifdef __AVX2__
INLINE mask larger(mask a, mask b) { return (mask)_mm256_max_epi32((__m256i)a, (__m256i)b); }
INLINE mask smaller(mask a, mask b) { return (mask)_mm256_min_epi32((__m256i)a, (__m256i)b); }
#else
INLINE mask larger(mask a, mask b) { return pick_whole(a > b, a, b); }
INLINE mask smaller(mask a, mask b) { return pick_whole(a < b, a, b); }
#endif

/* How much a height is that is 1 in a word: no height at scale t, of levels up to `top`, is larger than HIGHEST of these. */
INLINE vec step_of(const struct columns *columns, int at, int width, float top, vec t) {
    vec bound = splat(0);
    for (int j = at; j < at + width; j++)
        bound += top * (magnitude(columns->pull[j]) + 0.5f * top * t * columns->w[j]);
    return bound * (1 / HIGHEST);
}

/* Words of the patterns of half a codeword whose first weight is `at`, in vector v; `wrong`: with the wrong sign where that
 * costs least. `place`: the bit that pattern numbers begin at. */
INLINE void half_words(const struct book *book, const struct columns *columns, int at, vec t, vec inverse_step, vec shift,
                       int place, int v, mask (*to)[WIDE], mask (*wrong)[WIDE]) {
    int side = side_of(book), fields = fields_of(book), weights = book->width / 4; /* of a quarter */
    mask word[2][SIDE], least[2][SIDE];
    for (int quarter = 0; quarter < 2; quarter++) {
        vec height[2][8], product[2][8];
        for (int j = 0; j < weights; j++) {
            vec pull = columns->pull[at] * inverse_step, bend = 0.5f * t * columns->w[at] * inverse_step;
            at++;
            for (int k = 0; k < fields; k++) {
                vec level = book->levels[k] + shift;
                product[j][k] = level * pull;
                height[j][k] = product[j][k] - level * level * bend;
            }
        }
        for (int p = 0; p < side; p++) {
            vec sum = weights == 1 ? height[0][p] : height[0][p % 3] + height[1][p / 3];
            word[quarter][p] = __builtin_convertvector(whole(sum), mask) * (1 << HEIGHT_SHIFT);
            word[quarter][p] += (quarter ? side * p : p) << place;
            if (!wrong) continue;
            vec lost = 2.0f * (weights == 1 ? product[0][p] : lesser(product[0][p % 3], product[1][p / 3]));
            lost = lesser(lost, splat(HIGHEST)); /* the least of two is below it anyhow */
            least[quarter][p] = __builtin_convertvector(whole(lost), mask) * (1 << HEIGHT_SHIFT);
        }
    }
    for (int high = 0; high < side; high++)
        for (int low = 0; low < side; low++) {
            mask sum = word[0][low] + word[1][high];
            to[high * side + low][v] = sum;
            if (wrong) wrong[high * side + low][v] = sum - smaller(least[0][low], least[1][high]);
        }
}

/* Raises `best` to the highest words; `right` gets its groups. */
INLINE void climb(const struct dictionary *dictionary, const mask (*left)[WIDE], mask (*right)[WIDE], mask *best) {
    for (int n = dictionary->patterns; n < dictionary->nodes; n++) {
        const uint8_t *group = dictionary->group[n - dictionary->patterns];
        for (int v = 0; v < WIDE; v++) right[n][v] = larger(right[group[0]][v], right[group[1]][v]);
    }
    for (int place = 0; place < dictionary->lefts; place++) {
        const uint8_t *at = dictionary->right + dictionary->first[place], *end = dictionary->right + dictionary->first[place + 1];
        const mask *beside = left[dictionary->left[place]], *other = right[*at];
        mask a = other[0], b = other[1], c = other[2], d = other[3]; /* an array would not stay in registers */
        while (++at < end) {
            other = right[*at];
            a = larger(a, other[0]);
            b = larger(b, other[1]);
            c = larger(c, other[2]);
            d = larger(d, other[3]);
        }
        best[0] = larger(best[0], a + beside[0]);
        best[1] = larger(best[1], b + beside[1]);
        best[2] = larger(best[2], c + beside[2]);
        best[3] = larger(best[3], d + beside[3]);
    }
}

/* The best codewords of one place in all units, as words, and what a height of 1 is. */
struct found {
    mask word[WIDE];
    vec step[WIDE];
};

INLINE vec height_of(const struct found *found, int v) {
    return found->step[v] * __builtin_convertvector(found->word[v] >> HEIGHT_SHIFT, vec);
}

/* The best codewords `from` in all units at scales t; `down`: IQ1's shifts; `wrong`, unless NULL: with one wrong sign. */
INLINE void find_codewords(const struct book *book, const struct dictionary *dictionary, const struct columns *columns,
                           int from, const vec *t, const mask *down, struct found *best, struct found *wrong) {
    mask left[PATTERNS][WIDE], wrong_left[PATTERNS][WIDE];
    mask right[PATTERNS + GROUPS][WIDE], wrong_right[PATTERNS + GROUPS][WIDE];
    float top = shifts_of(book) == 2 ? 9 : book->levels[fields_of(book) - 1];
    for (int v = 0; v < WIDE; v++) {
        int at = 8 * v + from, half = book->width / 2;
        vec step = step_of(columns, at, book->width, top, t[v]), inverse_step = inverse(step);
        vec shift = down ? pick(down[v], splat(-1), splat(1)) : splat(0);
        best->word[v] = (mask){0} + INT32_MIN;
        best->step[v] = step;
        half_words(book, columns, at, t[v], inverse_step, shift, PATTERN_BITS, v, left, wrong ? wrong_left : NULL);
        half_words(book, columns, at + half, t[v], inverse_step, shift, 0, v, right, wrong ? wrong_right : NULL);
    }
    if (wrong) *wrong = *best;
    climb(dictionary, left, right, best->word);
    if (!wrong) return;
    climb(dictionary, wrong_left, right, wrong->word);
    climb(dictionary, left, wrong_right, wrong->word);
}

/* Codes of all units at one scale a sub-block, and their sums. */
struct codes {
    mask left[2][WIDE], right[2][WIDE]; /* patterns of the codewords of a unit: one, or two */
    mask down[WIDE];                    /* IQ1: -1 where the levels are shifted down */
    vec a[WIDE], b[WIDE];
};

/* a and b of codes, from the weights themselves. */
INLINE void sum_codes(const struct book *book, const struct dictionary *dictionary, const struct columns *columns,
                      struct codes *codes) {
    int half = book->width / 2;
    for (int v = 0; v < WIDE; v++) {
        vec a = splat(0), b = splat(0), least = splat(INFINITY);
        vec shift = shifts_of(book) == 2 ? pick(codes->down[v], splat(-1), splat(1)) : splat(0);
        for (int j = 0; j < 8; j++) {
            int codeword = j / book->width, inside = j % book->width;
            mask pattern = inside < half ? codes->left[codeword][v] : codes->right[codeword][v];
            vec level;
            for (int l = 0; l < LANES; l++) level[l] = dictionary->level[pattern[l]][inside % half];
            level += shift;
            vec product = level * columns->pull[8 * v + j];
            a += level * level * columns->w[8 * v + j];
            b += product;
            least = lesser(product, least);
        }
        codes->a[v] = a;
        codes->b[v] = book->beside == EVEN_SIGNS ? pick(columns->odd[v], b - 2.0f * least, b) : b;
    }
}

/* The best codes at scales t, one a vector of units; IQ1_S is told the shifts, IQ1_M takes the better in every unit. */
INLINE void codes_at(const struct book *book, const struct dictionary *dictionary, const struct columns *columns,
                     const vec *t, const mask *down, struct codes *to) {
    int words = 8 / book->width, even = book->beside == EVEN_SIGNS;
    struct found found[2], other[2]; /* other: with a wrong sign, or shifted down */
    for (int c = 0; c < words; c++) {
        if (book->beside != SHIFT_OF_8)
            find_codewords(book, dictionary, columns, 4 * c, t, shifts_of(book) == 2 ? down : NULL, &found[c],
                           even ? &other[c] : NULL);
        for (int k = 0; k < 2 && book->beside == SHIFT_OF_8; k++) {
            mask shift[WIDE];
            for (int v = 0; v < WIDE; v++) shift[v] = (mask){0} - k;
            find_codewords(book, dictionary, columns, 0, t, shift, k ? &other[0] : &found[0], NULL);
        }
    }
    for (int v = 0; v < WIDE; v++) {
        mask take[2] = {{0}, {0}}; /* the other one */
        to->down[v] = down[v];
        if (book->beside == SHIFT_OF_8) to->down[v] = take[0] = height_of(&other[0], v) > height_of(&found[0], v);
        if (even) take[0] = columns->odd[v];
        if (even && words == 2) {
            take[1] = height_of(&found[0], v) + height_of(&other[1], v) > height_of(&other[0], v) + height_of(&found[1], v);
            take[0] = columns->odd[v] & ~take[1];
            take[1] &= columns->odd[v];
        }
        for (int c = 0; c < words; c++) {
            mask word = found[c].word[v];
            if (even || book->beside == SHIFT_OF_8) word = pick_whole(take[c], other[c].word[v], word);
            to->left[c][v] = word >> PATTERN_BITS & ((1 << PATTERN_BITS) - 1);
            to->right[c][v] = word & ((1 << PATTERN_BITS) - 1);
        }
    }
    sum_codes(book, dictionary, columns, to);
}
#endif
