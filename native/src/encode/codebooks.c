/* IQ1, IQ2 and IQ3: eight (or four) weights are one codeword of a codebook, with signs beside it (IQ2, IQ3) or a shift
 * of all weights by an eighth (IQ1); sub-blocks of 16 or 32 have odd whole scales 2 s + 1 under the half d of 256.
 *
 * Choice: the nearest codewords of every sub-block at a few scales around the usual one (codebook_search.h) say by how much
 * any scale would lower its error, so d and all s follow from look-ups: d from a grid of stored halves, refitted in closed
 * form. Then codes are searched at the chosen scale, d is refitted to them, and takes the gain that search.h explains. */
#include "codebook_search.h"
#include "search.h"

#define COLUMNS 256
#define UNITS 32
#define SUBS 16  /* sub-blocks, at most */
#define GRID 28  /* candidates of d */
#define ROUNDS 3 /* of refit */
#define LEAST_WEIGHT 9.0e-13f /* 2^-40: below it every weight is nearer to zero than to the smallest scale */

/* The scales at which a sub-block is searched, in root mean squares of its weights over that of the levels: around the
 * usual best ones. Last comes the best scale for the codes found so far. */
#define SAMPLES 4 /* at most; one more is the codeword of least levels, the best one at large scales */
static const float three_levels[] = {0.9f, 1.3f}, eight_levels[] = {0.95f, 1.25f, 1.6f};

/* of the largest; a sub-block of smaller weights gets the smallest scale anyhow */
#define SMALLEST 0.025f

/* Eight weights: their sums by half codewords, and the best codewords at the scale searched last. */
struct unit {
    struct half halves[2][2]; /* IQ1: [shift down][half]; IQ2: [0][half]; IQ3: [codeword][half] */
    struct pair best[2][2];   /* IQ1: [shift down][0]; IQ2: [0][0]; IQ3: [codeword][one sign is wrong] */
    int odd;                  /* EVEN_SIGNS: one weight has to take the wrong sign */
};

/* Codes of eight weights at one scale. */
struct codes {
    float a, b, height;
    uint16_t index[2];
    uint8_t down, second; /* the shift of IQ1; the wrong sign is in the second codeword */
};

/* Sub-blocks of a superblock, one a lane: sums of a and b at every sampled scale, for both shifts of IQ1_S. */
struct samples {
    vec a[2 * SAMPLES + 1][SUBS / LANES], b[2 * SAMPLES + 1][SUBS / LANES];
    int count;
    vec wish[SUBS / LANES]; /* the best scale, free of the other sub-blocks */
};

struct choice {
    float d; /* as it is stored, times the fraction, for the weights as they are scaled here */
    vec scale[SUBS / LANES];
    double lowered, above, below; /* of the error; the best d for these codes is above / below */
};

static int minus_signs(const float *x) {
    int signs = 0;
    for (int j = 0; j < 8; j++) signs |= (x[j] < 0) << j;
    return signs;
}

INLINE int samples_of(const struct book *book) { return book->width == 8 ? 3 : 4; }

INLINE void load_unit(const struct book *book, const struct dictionary *dictionary, const float *x, const float *w,
                      struct unit *to) {
    int odd = book->beside == EVEN_SIGNS && __builtin_popcount((unsigned)minus_signs(x)) % 2, width = book->width;
    to->odd = odd;
    for (int k = 0; k < (width == 4 ? 2 : shifts_of(book)); k++)
        for (int h = 0; h < 2; h++) {
            int from = width == 4 ? 4 * k + 2 * h : 4 * h;
            if (width == 4)
                sum_half(book, 2, dictionary, 0, x + from, w + from, odd, &to->halves[k][h]);
            else
                sum_half(book, 4, dictionary, k, x + from, w + from, odd, &to->halves[k][h]);
            to->best[k][h].height = -INFINITY;
        }
}

INLINE void add_pair(const struct dictionary *dictionary, const struct half *halves, const struct pair *pair, int at,
                     struct codes *to) {
    to->a += pair_a(halves, pair);
    to->b += pair_b(halves, pair);
    to->height += pair->height;
    to->index[at] = dictionary->index[pair->left][pair->right];
}

/* The best codes at scale t; IQ1_S asks for one shift, IQ1_M takes the better. */
INLINE struct codes codes_at(const struct book *book, const struct dictionary *dictionary, struct unit *unit, float t,
                             int shift) {
    struct codes codes = {0, 0, 0, {0, 0}, (uint8_t)shift, 0};
    if (book->width == 4) {
        for (int c = 0; c < 2; c++) {
            nearest_pair(book, dictionary, unit->halves[c], 0, t, -INFINITY, &unit->best[c][0]);
            if (unit->odd) nearest_pair(book, dictionary, unit->halves[c], 1, t, -INFINITY, &unit->best[c][1]);
        }
        codes.second = unit->odd && unit->best[0][0].height + unit->best[1][1].height >
                                        unit->best[0][1].height + unit->best[1][0].height;
        add_pair(dictionary, unit->halves[0], &unit->best[0][unit->odd && !codes.second], 0, &codes);
        add_pair(dictionary, unit->halves[1], &unit->best[1][codes.second], 1, &codes);
        return codes;
    }
    for (int k = 0; k < shifts_of(book); k++) {
        if (book->beside == SHIFT_OF_32 && k != shift) continue;
        float bar = book->beside == SHIFT_OF_8 && k ? unit->best[0][0].height : -INFINITY;
        nearest_pair(book, dictionary, unit->halves[k], unit->odd, t, bar, &unit->best[k][0]);
    }
    if (book->beside == SHIFT_OF_8) codes.down = unit->best[1][0].height > unit->best[0][0].height;
    add_pair(dictionary, unit->halves[codes.down], &unit->best[codes.down][0], 0, &codes);
    return codes;
}

/* The sums of a sub-block if all of its levels are the least one. */
INLINE void least_levels(const struct book *book, const float *x, const float *w, float *a, float *b) {
    float level = book->levels[0];
    for (int from = 0; from < book->depth; from += 8) {
        float weights = 0, pull = 0, least = INFINITY;
        for (int j = from; j < from + 8; j++) {
            weights += w[j];
            pull += w[j] * fabsf(x[j]);
            least = fminf(least, w[j] * fabsf(x[j]));
        }
        int odd = book->beside == EVEN_SIGNS && __builtin_popcount((unsigned)minus_signs(x + from)) % 2;
        *a += level * level * weights;
        *b += level * (odd ? pull - 2 * least : pull);
    }
}

/* Choose, first part: what the sampled scales leave of every sub-block. */
INLINE void sample_scales(const struct book *book, const struct dictionary *dictionary, const float *x, const float *w,
                          struct samples *to) {
    int subs = COLUMNS / book->depth, per_sub = book->depth / 8;
    int shifts = book->beside == SHIFT_OF_32 ? 2 : 1;
    float near[SUBS], largest = 0;
    memset(to, 0, sizeof *to);
    int count = samples_of(book);
    to->count = count * shifts;
    for (int s = 0; s < subs; s++) {
        float squares = 0, weights = 0;
        for (int i = s * book->depth; i < (s + 1) * book->depth; i++) {
            squares += w[i] * x[i] * x[i];
            weights += w[i];
        }
        near[s] = sqrtf(squares / weights) / dictionary->typical;
        largest = fmaxf(largest, near[s]);
    }
    const float *given = book->width == 8 ? three_levels : eight_levels;
    for (int s = 0; s < subs; s++) {
        struct unit units[4];
        for (int u = 0; u < per_sub; u++) {
            int at = s * book->depth + 8 * u;
            load_unit(book, dictionary, x + at, w + at, &units[u]);
        }
        for (int shift = 0; shift < shifts; shift++) {
            float wish = 0, best = 0;
            for (int i = 0; i < count; i++) {
                float t = i < count - 1 || wish == 0 ? given[i % (count - 1)] * fmaxf(near[s], largest * SMALLEST) : wish;
                float a = 0, b = 0;
                for (int u = 0; u < per_sub; u++) {
                    struct codes codes = codes_at(book, dictionary, &units[u], t, shift);
                    a += codes.a;
                    b += codes.b;
                }
                if (b > 0 && b * b > best * a) best = b * b / a, wish = b / a;
                ((float *)to->a[shift * count + i])[s] = a;
                ((float *)to->b[shift * count + i])[s] = b;
            }
        }
    }
    if (shifts_of(book) == 1) {
        for (int s = 0; s < subs; s++)
            least_levels(book, x + s * book->depth, w + s * book->depth, (float *)to->a[count] + s, (float *)to->b[count] + s);
        to->count++;
    }
    vec best[2] = {splat(0), splat(0)};
    for (int i = 0; i < to->count; i++)
        for (int v = 0; v < SUBS / LANES; v++) {
            vec t = ratio(greater(to->b[i][v], splat(0)), to->a[i][v]), gained = t * to->b[i][v];
            to->wish[v] = pick(gained > best[v], t, to->wish[v]);
            best[v] = greater(gained, best[v]);
        }
}

/* Choose, second part: the best whole scales under d. */
INLINE void settle(const struct book *book, const struct samples *samples, struct choice *c) {
    vec lowered_all = splat(0), above = splat(0), below = splat(0);
    for (int v = 0; v < COLUMNS / book->depth / LANES; v++) {
        vec wish = whole_within(samples->wish[v] / (2.0f * c->d) - 0.5f, 0, (float)book->most);
        vec best = splat(-INFINITY), scale = splat(0), a = splat(0), b = splat(0);
        for (int step = -1; step <= 1; step++) {
            vec s = lesser(greater(wish + (float)step, splat(0)), splat((float)book->most)), odd = 2.0f * s + 1.0f;
            vec t = c->d * odd;
            for (int i = 0; i < samples->count; i++) {
                vec lowered = t * (2.0f * samples->b[i][v] - t * samples->a[i][v]);
                mask better = lowered > best;
                best = pick(better, lowered, best);
                scale = pick(better, s, scale);
                a = pick(better, samples->a[i][v], a);
                b = pick(better, samples->b[i][v], b);
            }
        }
        vec odd = 2.0f * scale + 1.0f;
        c->scale[v] = scale;
        lowered_all += best;
        above += odd * b;
        below += odd * odd * a;
    }
    c->lowered = sum(lowered_all);
    c->above = sum(above);
    c->below = sum(below);
}

/* d as a half would hold it: `unit` turns the numbers here into the stored ones. */
static float stored(double wish, float unit) { return half_to_float(scale_to_half((float)(wish * unit))) / unit; }

/* Choose: d and the whole scales of a superblock; no d (0) where zeros are nearer than anything. */
INLINE struct choice choose_scales(const struct book *book, const struct samples *samples, float unit) {
    struct choice best = {.lowered = 0}, next = {.d = 0};
    float largest = fmaxf(highest(samples->wish[0]), highest(samples->wish[1])), last = 0;
    for (int i = 0; i < GRID + ROUNDS && largest > 0; i++) {
        float divisor = (float)(2 * book->most + 1) * (1.12f - 0.75f / GRID * (float)i);
        if (i >= GRID && best.below == 0) break;
        next.d = stored(i < GRID ? (double)(largest / divisor) : best.above / best.below, unit);
        if (next.d == last) continue;
        last = next.d;
        settle(book, samples, &next);
        if (next.lowered > best.lowered) best = next;
    }
    return best;
}

/* Signs of eight weights with an even number of minuses: the wrong one is where it costs least, among weights [from, to). */
static int even_minus_signs(const float *x, const float *w, const float *levels, int from, int to) {
    int signs = minus_signs(x), wrong = from;
    if (__builtin_popcount((unsigned)signs) % 2 == 0) return signs;
    for (int j = from + 1; j < to; j++)
        if (w[j] * fabsf(x[j]) * levels[j] < w[wrong] * fabsf(x[wrong]) * levels[wrong]) wrong = j;
    return signs ^ 1 << wrong;
}

/* The stored form of the codes of unit u. */
INLINE void keep_codes(const struct book *book, const struct codes *codes, const float *x, const float *w, int u,
                        struct codewords *to) {
    int bits = 16 / book->width, per_unit = 8 / book->width, from = codes->second ? 4 : 0;
    float levels[8];
    for (int j = 0; j < 8; j++) {
        int word = book->words[codes->index[j / book->width]];
        levels[j] = book->levels[word >> bits * (j % book->width) & ((1 << bits) - 1)];
    }
    for (int c = 0; c < per_unit; c++) to->index[u * per_unit + c] = codes->index[c];
    to->down[u] = codes->down;
    to->signs[u] =
        (uint8_t)(book->beside == EVEN_SIGNS ? even_minus_signs(x, w, levels, from, from + book->width) : minus_signs(x));
}

/* Round: the best codes of sub-block s at scale t; a and b are their sums. */
INLINE void round_sub(const struct book *book, const struct dictionary *dictionary, const float *x, const float *w, float t,
                      int s, double *a, double *b, struct codewords *to) {
    int shifts = book->beside == SHIFT_OF_32 ? 2 : 1, per_sub = book->depth / 8, first = s * per_sub, down = 0;
    struct codes codes[2][4];
    float height[2] = {0, 0};
    for (int u = 0; u < per_sub; u++) {
        struct unit unit;
        int at = 8 * (first + u);
        load_unit(book, dictionary, x + at, w + at, &unit);
        for (int shift = 0; shift < shifts; shift++) {
            codes[shift][u] = codes_at(book, dictionary, &unit, t, shift);
            height[shift] += codes[shift][u].height;
        }
    }
    down = shifts == 2 && height[1] > height[0];
    *a = *b = 0;
    for (int u = 0; u < per_sub; u++) {
        int at = 8 * (first + u);
        *a += codes[down][u].a;
        *b += codes[down][u].b;
        keep_codes(book, &codes[down][u], x + at, w + at, first + u, to);
    }
}

/* One superblock. Weights are scaled by a power of two, so that neither tiny nor huge ones leave float32's range. */
INLINE void encode_superblock(const struct book *book, const struct dictionary *dictionary, const float *from,
                              const float *w, int biased, struct codewords *to) {
    struct samples samples;
    float x[COLUMNS], largest = 0;
    int exponent;
    memset(to, 0, sizeof *to);
    for (int i = 0; i < COLUMNS; i++) largest = fmaxf(largest, fabsf(from[i]));
    if (largest < LEAST_WEIGHT) return;
    frexpf(largest, &exponent);
    float whole = 0, unit = ldexpf(1 / book->fraction, exponent);
    for (int i = 0; i < COLUMNS; i++) {
        x[i] = ldexpf(from[i], -exponent);
        whole += w[i] * x[i] * x[i];
    }
    sample_scales(book, dictionary, x, w, &samples);
    struct choice choice = choose_scales(book, &samples, unit);
    if (choice.d == 0) return;
    double above = 0, below = 0, a, b;
    for (int s = 0; s < COLUMNS / book->depth; s++) {
        float scale = ((const float *)choice.scale)[s], odd = 2 * scale + 1;
        to->scale[s] = (uint8_t)scale;
        round_sub(book, dictionary, x, w, choice.d * odd, s, &a, &b, to);
        above += odd * b;
        below += odd * odd * a;
    }
    float d = choice.d, refit = stored(above / below, unit);
    if (refit * (2 * above - refit * below) > d * (2 * above - d * below)) d = refit;
    float stored_d = d * unit, along = (float)(d * above);
    to->d = scale_to_half(fine_enough(stored_d) && !biased ? stored_d * unbiased_gain(whole, along) : stored_d);
}

typedef void (*pack_codewords)(const struct codewords *, uint8_t *);

static const struct book *book_of(int format, pack_codewords *pack) {
    switch (format) {
    case FMT_IQ1_S: *pack = pack_iq1_s; return &iq1_s;
    case FMT_IQ1_M: *pack = pack_iq1_m; return &iq1_m;
    case FMT_IQ2_XXS: *pack = pack_iq2_xxs; return &iq2_xxs;
    case FMT_IQ2_XS: *pack = pack_iq2_xs; return &iq2_xs;
    case FMT_IQ2_S: *pack = pack_iq2_s; return &iq2_s;
    case FMT_IQ3_XXS: *pack = pack_iq3_xxs; return &iq3_xxs;
    default: *pack = pack_iq3_s; return &iq3_s;
    }
}

void THIS_COPY(encode_codebooks)(const struct encode_task *task, int64_t first, int64_t last) {
    int bytes = format_table[task->format].bytes;
    pack_codewords pack;
    const struct book *book = book_of(task->format, &pack);
    struct dictionary dictionary;
    load_dictionary(book, &dictionary);
    for (int64_t at = first * task->cols; at < last * task->cols; at += COLUMNS) {
        struct codewords codewords;
        encode_superblock(book, &dictionary, task->weights + at, task->importance + at % task->cols, task->biased,
                          &codewords);
        pack(&codewords, task->packed + at / COLUMNS * bytes);
    }
}
