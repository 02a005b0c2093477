/* What the codebooks of IQ1, IQ2 and IQ3 mean: levels of a codeword's fields, what stands beside it, and its scale. */
#ifndef RONDEL_ENCODE_BOOKS_H
#define RONDEL_ENCODE_BOOKS_H
#include "kernels/codebooks.h"

enum beside { EVEN_SIGNS, FREE_SIGNS, SHIFT_OF_32, SHIFT_OF_8 };

struct book {
    const uint16_t *words;
    int entries, width, depth; /* weights of a codeword; columns of a scale */
    int most;                  /* largest s */
    enum beside beside;
    float fraction;            /* weight = d fraction (2 s + 1) level */
    float levels[8];           /* of a field of a word; those of IQ1 are in steps of its eighth */
};

#define LEVELS_2 {8, 25, 43}
#define LEVELS_1 {-8, 0, 8}
static const struct book iq1_s = {iq1_codebook, 2048, 8, 32, 7, SHIFT_OF_32, 0.125f, LEVELS_1};
static const struct book iq1_m = {iq1_codebook, 2048, 8, 16, 7, SHIFT_OF_8, 0.125f, LEVELS_1};
static const struct book iq2_xxs = {iq2_xxs_codebook, 256, 8, 32, 15, EVEN_SIGNS, 0.125f, LEVELS_2};
static const struct book iq2_xs = {iq2_xs_codebook, 512, 8, 16, 15, EVEN_SIGNS, 0.125f, LEVELS_2};
static const struct book iq2_s = {iq2_s_codebook, 1024, 8, 16, 15, FREE_SIGNS, 0.125f, LEVELS_2};
static const struct book iq3_xxs = {
    iq3_xxs_codebook, 256, 4, 32, 15, EVEN_SIGNS, 0.25f, {4, 12, 20, 28, 36, 44, 52, 62}};
static const struct book iq3_s = {iq3_s_codebook, 512, 4, 32, 15, FREE_SIGNS, 1, {1, 3, 5, 7, 9, 11, 13, 15}};

#endif
