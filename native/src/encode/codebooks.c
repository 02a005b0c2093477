/* IQ1, IQ2 and IQ3: eight (or four) weights are one codeword of a codebook, with signs beside it (IQ2, IQ3) or a shift
 * of all weights by an eighth (IQ1); sub-blocks of 16 or 32 have odd whole scales 2 s + 1 under the half d of 256.
 *
 * Scales are chosen first (codebook_scales.h). Then codes are searched at the chosen scales, d is refitted to them, and takes
 * the gain that search.h explains. */
#include "codebook_scales.h"
#include "search.h"

#define LEAST_WEIGHT 9.0e-13f /* 2^-40: below it every weight is nearer to zero than to the smallest scale */

/* Weights across the lanes, times a power of two, so that neither tiny nor huge ones leave float32's range. */
INLINE void load_columns(const struct book *book, const float *from, float factor, struct columns *to) {
    int signs = shifts_of(book) == 1;
    for (int g = 0; g < subs_of(book); g++)
        load_lanes(from + g * book->depth * LANES, book->depth, book->depth, to->x + g * book->depth);
    for (int v = 0; v < WIDE; v++) {
        to->odd[v] = (mask){0};
        for (int j = 8 * v; j < 8 * v + 8; j++) {
            to->x[j] *= factor;
            to->pull[j] = to->w[j] * (signs ? magnitude(to->x[j]) : to->x[j]);
            to->odd[v] ^= to->x[j] < 0.0f;
        }
    }
}

static int minus_signs(const float *x) {
    int signs = 0;
    for (int j = 0; j < 8; j++) signs |= (x[j] < 0) << j;
    return signs;
}

/* Signs of eight weights with an even number of minuses: the wrong one is where it costs least. */
static int even_minus_signs(const float *x, const float *w, const float *levels) {
    int signs = minus_signs(x), wrong = 0;
    if (__builtin_popcount((unsigned)signs) % 2 == 0) return signs;
    for (int j = 1; j < 8; j++)
        if (w[j] * fabsf(x[j]) * levels[j] < w[wrong] * fabsf(x[wrong]) * levels[wrong]) wrong = j;
    return signs ^ 1 << wrong;
}

/* The stored form of codes. */
INLINE void keep_codes(const struct book *book, const struct dictionary *dictionary, const struct codes *codes, const float *x,
                       const float *w, struct codewords *to) {
    int per_unit = 8 / book->width, half = book->width / 2, units = units_of(book);
    for (int i = 0; i < WIDE * LANES; i++) {
        int v = i / LANES, l = i % LANES, u = (v / units * LANES + l) * units + v % units;
        float levels[8];
        for (int c = 0; c < per_unit; c++) {
            int left = codes->left[c][v][l], right = codes->right[c][v][l];
            to->index[u * per_unit + c] = dictionary->index[left][right];
            for (int j = 0; j < half; j++) {
                levels[c * 4 + j] = dictionary->level[left][j];
                levels[c * 4 + half + j] = dictionary->level[right][j];
            }
        }
        to->down[u] = codes->down[v][l] != 0;
        to->signs[u] = (uint8_t)(book->beside == EVEN_SIGNS ? even_minus_signs(x + 8 * u, w + 8 * u, levels)
                                                             : minus_signs(x + 8 * u));
    }
}

/* The best codes under a choice. */
INLINE void round_codes(const struct book *book, const struct dictionary *dictionary, const struct columns *columns,
                        const struct choice *choice, struct codes *to) {
    vec t[WIDE];
    mask down[WIDE];
    for (int v = 0; v < WIDE; v++) {
        int s = v / units_of(book);
        t[v] = choice->d * (2.0f * choice->scale[s] + 1.0f);
        down[v] = choice->down[s];
    }
    codes_at(book, dictionary, columns, t, down, to);
}

/* One superblock; columns->w is loaded. */
INLINE void encode_superblock(const struct book *book, const struct dictionary *dictionary, const float *x, const float *w,
                              int biased, struct columns *columns, struct codewords *to) {
    struct samples samples;
    struct codes codes;
    float largest = 0;
    int exponent;
    memset(to, 0, sizeof *to);
    for (int i = 0; i < COLUMNS; i++) largest = fmaxf(largest, fabsf(x[i]));
    if (largest < LEAST_WEIGHT) return;
    frexpf(largest, &exponent);
    float unit = ldexpf(1 / book->fraction, exponent);
    load_columns(book, x, ldexpf(1, -exponent), columns);
    sample_scales(book, dictionary, columns, &samples);
    struct choice choice = choose_scales(book, &samples, unit);
    if (choice.d == 0) return;
    round_codes(book, dictionary, columns, &choice, &codes);
    keep_codes(book, dictionary, &codes, x, w, to);
    vec whole_all = splat(0), above_all = splat(0), below_all = splat(0);
    for (int v = 0; v < WIDE; v++) {
        vec odd = 2.0f * choice.scale[v / units_of(book)] + 1.0f;
        above_all += odd * codes.b[v];
        below_all += odd * odd * codes.a[v];
        for (int j = 8 * v; j < 8 * v + 8; j++) whole_all += columns->w[j] * columns->x[j] * columns->x[j];
    }
    for (int s = 0; s < subs_of(book) * LANES; s++) to->scale[s] = (uint8_t)choice.scale[s / LANES][s % LANES];
    double above = sum(above_all), below = sum(below_all);
    float d = choice.d, refit = stored(above / below, unit);
    if (refit * (2 * above - refit * below) > d * (2 * above - d * below)) d = refit;
    float stored_d = d * unit, along = (float)(d * above);
    to->d = scale_to_half(fine_enough(stored_d) && !biased ? stored_d * unbiased_gain(sum(whole_all), along) : stored_d);
}

/* Rows within columns: the importance goes across the lanes once for all rows. */
INLINE void encode_rows_of(const struct encode_task *task, const struct book *book,
                           void (*pack)(const struct codewords *, uint8_t *), int64_t first, int64_t last) {
    int bytes = format_table[task->format].bytes;
    struct dictionary dictionary;
    struct columns columns;
    load_dictionary(book, &dictionary);
    for (int64_t column = 0; column < task->cols; column += COLUMNS) {
        const float *w = task->importance + column;
        for (int g = 0; g < subs_of(book); g++)
            load_lanes(w + g * book->depth * LANES, book->depth, book->depth, columns.w + g * book->depth);
        for (int64_t row = first; row < last; row++) {
            int64_t at = row * task->cols + column;
            struct codewords codewords;
            encode_superblock(book, &dictionary, task->weights + at, w, task->biased, &columns, &codewords);
            pack(&codewords, task->packed + at / COLUMNS * bytes);
        }
    }
}

void THIS_COPY(encode_codebooks)(const struct encode_task *task, int64_t first, int64_t last) {
    switch (task->format) {
    case FMT_IQ1_S: encode_rows_of(task, &iq1_s, pack_iq1_s, first, last); break;
    case FMT_IQ1_M: encode_rows_of(task, &iq1_m, pack_iq1_m, first, last); break;
    case FMT_IQ2_XXS: encode_rows_of(task, &iq2_xxs, pack_iq2_xxs, first, last); break;
    case FMT_IQ2_XS: encode_rows_of(task, &iq2_xs, pack_iq2_xs, first, last); break;
    case FMT_IQ2_S: encode_rows_of(task, &iq2_s, pack_iq2_s, first, last); break;
    case FMT_IQ3_XXS: encode_rows_of(task, &iq3_xxs, pack_iq3_xxs, first, last); break;
    default: encode_rows_of(task, &iq3_s, pack_iq3_s, first, last); break;
    }
}
