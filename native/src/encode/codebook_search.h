/* The nearest codewords of a superblock's 32 units of eight weights, exactly, for one scale a sub-block.
 *
 * A codeword q leaves sum w (x - t q)^2 = sum w x^2 - 2 t (b - t a / 2) with a = sum w q^2 and b = sum w x q, so the nearest
 * one is that of the greatest height b - t a / 2. Heights add: a codeword is a left and a right half, each one of 81
 * patterns (four weights of three levels) or 64 (two of eight), and a codebook is the set of pairs that it allows. So the
 * greatest height takes one comparison a codeword: the best right half beside every left one, then the best left one.
 * A unit is a lane, and a sub-block too: nothing goes across lanes, and one look at a codeword serves all 32 units. */
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

/* A codebook by halves. */
struct dictionary {
    int lefts;                 /* left patterns that codewords have; those with most codewords come first */
    uint8_t left[PATTERNS];
    uint16_t first[PATTERNS + 1]; /* of the right patterns beside every left one */
    uint8_t right[ENTRIES];
    float level[PATTERNS][4];  /* of the weights of a half */
    uint16_t index[PATTERNS][PATTERNS];
    float typical;             /* root mean square of the levels */
};

INLINE int shifts_of(const struct book *book) { return book->beside == SHIFT_OF_32 || book->beside == SHIFT_OF_8 ? 2 : 1; }
INLINE int side_of(const struct book *book) { return book->width == 8 ? SIDE : 8; }
INLINE int fields_of(const struct book *book) { return book->width == 8 ? 3 : 8; }

static void load_dictionary(const struct book *book, struct dictionary *to) {
    int bits = 16 / book->width, half = book->width / 2, patterns = side_of(book) * side_of(book), fields = fields_of(book);
    int rights[PATTERNS] = {0};
    double squares = 0;
    memset(to, 0, sizeof *to);
    memset(to->index, 255, sizeof to->index);
    for (int p = 0; p < patterns; p++)
        for (int j = 0, rest = p; j < half; j++, rest /= fields) to->level[p][j] = book->levels[rest % fields];
    for (int c = 0; c < book->entries; c++) {
        int pattern[2] = {0, 0};
        for (int j = book->width - 1; j >= 0; j--) {
            int field = book->words[c] >> bits * j & ((1 << bits) - 1);
            pattern[j / half] = pattern[j / half] * fields + field;
            squares += book->levels[field] * book->levels[field];
        }
        rights[pattern[0]]++;
        to->index[pattern[0]][pattern[1]] = (uint16_t)c;
    }
    to->typical = sqrtf((float)(squares / (book->entries * book->width)));
    int entries = 0;
    for (int count = patterns; count > 0; count--) /* equal counts beside each other: a loop that ends as the last one did */
        for (int p = 0; p < patterns; p++) {
            if (rights[p] != count) continue;
            to->left[to->lefts++] = (uint8_t)p;
            for (int r = 0; r < patterns; r++)
                if (to->index[p][r] < book->entries) to->right[entries++] = (uint8_t)r;
            to->first[to->lefts] = (uint16_t)entries;
        }
}

/* Weights of a superblock, units across the lanes: weight j of unit (v, l) is [8 v + j][l]. A sub-block is a lane of its
 * 2 or 4 successive vectors. */
struct columns {
    vec x[COLUMNS / LANES], w[COLUMNS / LANES];
    vec pull[COLUMNS / LANES]; /* w x; IQ2 and IQ3: w |x| */
    mask odd[WIDE];            /* EVEN_SIGNS: one weight of the unit has to take the wrong sign */
};

/* The best codewords of one place in all units. */
struct found {
    vec height[WIDE], beside[WIDE]; /* ... of which that of the right half */
    mask left[WIDE];                /* place in the dictionary's order; once finished, the pattern */
    mask right[WIDE];               /* 1: the wrong sign is in the right half; once finished, the pattern */
};

typedef vec heights[PATTERNS][WIDE];

/* Heights of the patterns of half a codeword, `from` in the unit, in units of `book`'s levels plus `shift`; `wrong`: with
 * the wrong sign where that costs least. */
INLINE void half_heights(const struct book *book, const struct columns *columns, int from, const vec *t, float shift,
                         vec (*to)[WIDE], vec (*wrong)[WIDE]) {
    int side = side_of(book), fields = fields_of(book), weights = book->width / 4; /* of a quarter */
    for (int v = 0; v < WIDE; v++) {
        vec height[2][SIDE], least[2][SIDE];
        for (int quarter = 0; quarter < 2; quarter++) {
            vec each[2][8], product[2][8];
            for (int j = 0; j < weights; j++) {
                int at = 8 * v + from + quarter * weights + j;
                vec bend = 0.5f * t[v] * columns->w[at];
                for (int k = 0; k < fields; k++) {
                    float level = book->levels[k] + shift;
                    product[j][k] = level * columns->pull[at];
                    each[j][k] = product[j][k] - level * level * bend;
                }
            }
            for (int p = 0; p < side; p++) {
                height[quarter][p] = weights == 1 ? each[0][p] : each[0][p % 3] + each[1][p / 3];
                least[quarter][p] = weights == 1 ? product[0][p] : lesser(product[0][p % 3], product[1][p / 3]);
            }
        }
        for (int high = 0; high < side; high++)
            for (int low = 0; low < side; low++) {
                vec sum = height[0][low] + height[1][high];
                to[high * side + low][v] = sum;
                if (wrong) wrong[high * side + low][v] = sum - 2.0f * lesser(least[0][low], least[1][high]);
            }
    }
}

INLINE mask pick_whole(mask where, mask yes, mask no) { return (mask)pick(where, (vec)yes, (vec)no); }

/* Raises `best` to the highest codewords; `in_right` is kept with them. */
INLINE void climb(const struct dictionary *dictionary, const vec (*left)[WIDE], const vec (*right)[WIDE], int in_right,
                  struct found *best) {
    for (int place = 0; place < dictionary->lefts; place++) {
        const uint8_t *at = dictionary->right + dictionary->first[place], *end = dictionary->right + dictionary->first[place + 1];
        const vec *beside = left[dictionary->left[place]];
        vec a = right[*at][0], b = right[*at][1], c = right[*at][2], d = right[*at][3]; /* an array would not stay in registers */
        while (++at < end) {
            const vec *other = right[*at];
            a = greater(a, other[0]);
            b = greater(b, other[1]);
            c = greater(c, other[2]);
            d = greater(d, other[3]);
        }
        const vec top[WIDE] = {a, b, c, d};
#pragma GCC unroll 4
        for (int v = 0; v < WIDE; v++) {
            vec height = beside[v] + top[v];
            mask better = height > best->height[v];
            best->height[v] = pick(better, height, best->height[v]);
            best->beside[v] = pick(better, top[v], best->beside[v]);
            best->left[v] = pick_whole(better, (mask){0} + place, best->left[v]);
            if (in_right) best->right[v] |= better;
        }
    }
}

/* Patterns from what `climb` left: the right half is the one of its height. */
INLINE void finish(const struct dictionary *dictionary, const vec (*right)[WIDE], const vec (*wrong)[WIDE],
                   struct found *best) {
    for (int v = 0; v < WIDE; v++)
        for (int l = 0; l < LANES; l++) {
            int place = best->left[v][l], at = dictionary->first[place], last = dictionary->first[place + 1] - 1;
            const vec (*heights)[WIDE] = best->right[v][l] ? wrong : right;
            float height = best->beside[v][l];
            while (at < last && heights[dictionary->right[at]][v][l] != height) at++;
            best->left[v][l] = dictionary->left[place];
            best->right[v][l] = dictionary->right[at];
        }
}

/* The best codewords `from` in all units at scales t; `wrong`, unless NULL: with one wrong sign. */
INLINE void find_codewords(const struct book *book, const struct dictionary *dictionary, const struct columns *columns,
                           int from, const vec *t, float shift, struct found *best, struct found *wrong) {
    vec left[PATTERNS][WIDE], right[PATTERNS][WIDE], wrong_left[PATTERNS][WIDE], wrong_right[PATTERNS][WIDE];
    half_heights(book, columns, from, t, shift, left, wrong ? wrong_left : NULL);
    half_heights(book, columns, from + book->width / 2, t, shift, right, wrong ? wrong_right : NULL);
    for (int v = 0; v < WIDE; v++) best->height[v] = splat(-INFINITY), best->left[v] = best->right[v] = (mask){0};
    if (wrong) *wrong = *best;
    climb(dictionary, left, right, 0, best);
    finish(dictionary, right, NULL, best);
    if (!wrong) return;
    climb(dictionary, wrong_left, right, 0, wrong);
    climb(dictionary, left, wrong_right, 1, wrong);
    finish(dictionary, right, wrong_right, wrong);
}

/* Codes of all units at one scale a sub-block, and their sums. */
struct codes {
    mask left[2][WIDE], right[2][WIDE]; /* patterns of the codewords of a unit: one, or two */
    mask down[WIDE];                    /* IQ1: -1 where the levels are shifted down */
    vec height[WIDE], a[WIDE], b[WIDE];
};

INLINE void choose_between(mask where, const struct found *yes, const struct found *no, int v, int codeword,
                           struct codes *to) {
    to->left[codeword][v] = pick_whole(where, yes->left[v], no->left[v]);
    to->right[codeword][v] = pick_whole(where, yes->right[v], no->right[v]);
    to->height[v] += pick(where, yes->height[v], no->height[v]);
}

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

/* The best codes at scales t, one a vector of units; IQ1_S asks for one shift, IQ1_M takes the better in every unit. */
INLINE void codes_at(const struct book *book, const struct dictionary *dictionary, const struct columns *columns,
                     const vec *t, int shift, struct codes *to) {
    struct found found[2], wrong[2];
    int even = book->beside == EVEN_SIGNS;
    for (int v = 0; v < WIDE; v++) to->height[v] = splat(0), to->down[v] = (mask){0} - shift;
    if (book->width == 4) {
        for (int c = 0; c < 2; c++)
            find_codewords(book, dictionary, columns, 4 * c, t, 0, &found[c], even ? &wrong[c] : NULL);
        for (int v = 0; v < WIDE; v++) {
            mask first = {0}, second = {0};
            if (even) {
                second = found[0].height[v] + wrong[1].height[v] > wrong[0].height[v] + found[1].height[v];
                first = columns->odd[v] & ~second;
                second &= columns->odd[v];
            }
            choose_between(first, even ? &wrong[0] : &found[0], &found[0], v, 0, to);
            choose_between(second, even ? &wrong[1] : &found[1], &found[1], v, 1, to);
        }
    } else if (shifts_of(book) == 1) {
        find_codewords(book, dictionary, columns, 0, t, 0, &found[0], even ? &wrong[0] : NULL);
        for (int v = 0; v < WIDE; v++)
            choose_between(even ? columns->odd[v] : (mask){0}, even ? &wrong[0] : &found[0], &found[0], v, 0, to);
    } else {
        int both = book->beside == SHIFT_OF_8;
        for (int k = both ? 0 : shift; k <= (both ? 1 : shift); k++)
            find_codewords(book, dictionary, columns, 0, t, k ? -1 : 1, &found[k], NULL);
        for (int v = 0; v < WIDE; v++) {
            if (both) to->down[v] = found[1].height[v] > found[0].height[v];
            choose_between(to->down[v], &found[both ? 1 : shift], &found[both ? 0 : shift], v, 0, to);
        }
    }
    sum_codes(book, dictionary, columns, to);
}
#endif
