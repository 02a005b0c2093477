/* ggml's codebook formats IQ1 to IQ3, the ternary TQ1_0 and TQ2_0, IQ4_XS and MXFP4: layouts and unpacking.
 *
 * A codeword is eight (IQ1, IQ2) or four (IQ3) weights; its index is split over a low byte and high bits elsewhere.
 * "Seven signs" code eight: the eighth makes the number of minus signs even. Scales are odd multiples (2 s + 1) of a
 * fraction of d, so every product up to the weight itself is exact in float32 and its order does not matter. */
#ifndef RONDEL_CODEBOOKS_H
#define RONDEL_CODEBOOKS_H
#include "unpack.h"

extern const uint16_t iq1_codebook[2048], iq2_xxs_codebook[256], iq2_xs_codebook[512], iq2_s_codebook[1024],
    iq3_xxs_codebook[256], iq3_s_codebook[512];

struct iq4_xs { uint8_t scale[2], scales_high[2], scales_low[4], codes[128]; }; /* per 32: d (s - 32) iq4_levels[q] */
struct tq1_0 { uint8_t codes[48], tail[4], scale[2]; };     /* d (q - 1), five base-3 digits a byte */
struct tq2_0 { uint8_t codes[64], scale[2]; };              /* d (q - 1), fields as Q2_K's */
struct mxfp4 { uint8_t exponent, codes[16]; };              /* 2^(e - 128) mxfp4_levels[q] */
struct iq2_xxs { uint8_t scale[2], codes[64]; };            /* per 32: 4 indices, then s << 28 | 4 x seven signs */
struct iq2_xs { uint8_t scale[2], codes[64], scales[8]; };  /* per 8: seven signs << 9 | index; per 16: s, 4 bits */
struct iq2_s { uint8_t scale[2], codes[32], signs[32], high[8], scales[8]; };
struct iq3_xxs { uint8_t scale[2], codes[64], signs[32]; }; /* per 32: 8 indices; s << 28 | 4 x seven signs */
struct iq3_s { uint8_t scale[2], codes[64], high[8], signs[32], scales[4]; };
struct iq1_s { uint8_t scale[2], codes[32], high[16]; };    /* per 32: delta << 15 | s << 12 | 4 x 3 high bits */
struct iq1_m { uint8_t codes[32], high[16], scales[8]; };   /* per 8: delta << 3 | 3 high bits; per 16: s, 3 bits */

static const int8_t mxfp4_levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
static const int8_t iq2_levels[4] = {8, 25, 43, 0};

static inline uint16_t word_at(const uint8_t *bytes) { return (uint16_t)(bytes[0] | bytes[1] << 8); }
static inline uint32_t dword_at(const uint8_t *bytes) { return word_at(bytes) | (uint32_t)word_at(bytes + 2) << 16; }

static inline int even_signs(int seven) { return seven | (__builtin_popcount((unsigned)seven) & 1) << 7; }

static inline void add_signs(int8_t *codes, int n, int signs) {
    for (int j = 0; j < n; j++)
        if (signs >> j & 1) codes[j] = (int8_t)-codes[j];
}

static inline void codeword_iq2(uint16_t word, int signs, int8_t codes[8]) {
    for (int j = 0; j < 8; j++) codes[j] = iq2_levels[word >> 2 * j & 3];
    add_signs(codes, 8, signs);
}

/* Eight times the weight's multiple of the scale: field 0, 1, 2 is -1, 0, 1; an eighth up or down moves all of them. */
static inline void codeword_iq1(uint16_t word, int down, int8_t codes[8]) {
    for (int j = 0; j < 8; j++) codes[j] = (int8_t)(8 * ((word >> 2 * j & 3) - 1) + (down ? -1 : 1));
}

static inline void start(struct unpacked_256 *out, float scale) {
    out->scale = scale;
    out->min = 0;
    memset(out->mins, 0, sizeof out->mins);
}

static inline void unpack_iq4_xs(const void *block, struct unpacked_256 *out) {
    const struct iq4_xs *q = block;
    start(out, half_at(q->scale));
    for (int i = 0; i < 8; i++) {
        int low = q->scales_low[i / 2] >> i % 2 * 4 & 15, high = word_at(q->scales_high) >> 2 * i & 3;
        out->scales[2 * i] = out->scales[2 * i + 1] = (int16_t)((low | high << 4) - 32);
        unpack_nibbles(q->codes + 16 * i, out->codes + 32 * i);
    }
    for (int j = 0; j < 256; j++) out->codes[j] = iq4_levels[out->codes[j]];
}

static inline void unpack_iq2_xxs(const void *block, struct unpacked_256 *out) {
    const struct iq2_xxs *q = block;
    start(out, half_at(q->scale) * 0.125f);
    for (int i = 0; i < 8; i++) {
        const uint8_t *indices = q->codes + 8 * i;
        uint32_t rest = dword_at(indices + 4);
        out->scales[2 * i] = out->scales[2 * i + 1] = (int16_t)(2 * (rest >> 28) + 1);
        for (int g = 0; g < 4; g++)
            codeword_iq2(iq2_xxs_codebook[indices[g]], even_signs(rest >> 7 * g & 127), out->codes + 32 * i + 8 * g);
    }
}

static inline void unpack_iq2_xs(const void *block, struct unpacked_256 *out) {
    const struct iq2_xs *q = block;
    start(out, half_at(q->scale) * 0.125f);
    for (int i = 0; i < 16; i++) out->scales[i] = 2 * (q->scales[i / 2] >> i % 2 * 4 & 15) + 1;
    for (int g = 0; g < 32; g++) {
        uint16_t code = word_at(q->codes + 2 * g);
        codeword_iq2(iq2_xs_codebook[code & 511], even_signs(code >> 9), out->codes + 8 * g);
    }
}

static inline void unpack_iq2_s(const void *block, struct unpacked_256 *out) {
    const struct iq2_s *q = block;
    start(out, half_at(q->scale) * 0.125f);
    for (int i = 0; i < 16; i++) out->scales[i] = 2 * (q->scales[i / 2] >> i % 2 * 4 & 15) + 1;
    for (int g = 0; g < 32; g++) {
        int index = q->codes[g] | (q->high[g / 4] >> g % 4 * 2 & 3) << 8;
        codeword_iq2(iq2_s_codebook[index], q->signs[g], out->codes + 8 * g);
    }
}

static inline void unpack_iq3_xxs(const void *block, struct unpacked_256 *out) {
    static const int8_t levels[8] = {4, 12, 20, 28, 36, 44, 52, 62};
    const struct iq3_xxs *q = block;
    start(out, half_at(q->scale) * 0.25f);
    for (int j = 0; j < 256; j++) out->codes[j] = levels[iq3_xxs_codebook[q->codes[j / 4]] >> j % 4 * 4 & 7];
    for (int i = 0; i < 8; i++) {
        uint32_t rest = dword_at(q->signs + 4 * i);
        out->scales[2 * i] = out->scales[2 * i + 1] = (int16_t)(2 * (rest >> 28) + 1);
        for (int g = 0; g < 4; g++) add_signs(out->codes + 32 * i + 8 * g, 8, even_signs(rest >> 7 * g & 127));
    }
}

static inline void unpack_iq3_s(const void *block, struct unpacked_256 *out) {
    const struct iq3_s *q = block;
    start(out, half_at(q->scale));
    for (int i = 0; i < 16; i++) out->scales[i] = 2 * (q->scales[i / 4] >> i / 2 % 2 * 4 & 15) + 1;
    for (int g = 0; g < 64; g++) {
        uint16_t word = iq3_s_codebook[q->codes[g] | (q->high[g / 8] >> g % 8 & 1) << 8];
        for (int j = 0; j < 4; j++) out->codes[4 * g + j] = 2 * (word >> 4 * j & 7) + 1;
    }
    for (int g = 0; g < 32; g++) add_signs(out->codes + 8 * g, 8, q->signs[g]);
}

static inline void unpack_iq1_s(const void *block, struct unpacked_256 *out) {
    const struct iq1_s *q = block;
    start(out, half_at(q->scale) * 0.125f);
    for (int g = 0; g < 32; g++) {
        uint16_t rest = word_at(q->high + g / 4 * 2);
        out->scales[g / 2] = 2 * (rest >> 12 & 7) + 1;
        codeword_iq1(iq1_codebook[q->codes[g] | (rest >> g % 4 * 3 & 7) << 8], rest >> 15, out->codes + 8 * g);
    }
}

/* The half d is spread over the top nibbles of the four scale words, lowest first; below them 4 x 3 bits of scales. */
static inline void unpack_iq1_m(const void *block, struct unpacked_256 *out) {
    const struct iq1_m *q = block;
    uint16_t half = 0;
    for (int i = 0; i < 4; i++) half |= (uint16_t)(word_at(q->scales + 2 * i) >> 12 << 4 * i);
    start(out, half_to_float(half) * 0.125f);
    for (int i = 0; i < 16; i++) out->scales[i] = 2 * (word_at(q->scales + i / 4 * 2) >> i % 4 * 3 & 7) + 1;
    for (int g = 0; g < 32; g++) {
        int rest = q->high[g / 2] >> g % 2 * 4;
        codeword_iq1(iq1_codebook[q->codes[g] | (rest & 7) << 8], rest >> 3 & 1, out->codes + 8 * g);
    }
}

/* A byte is the fraction x / 256 of five base-3 digits, first digit first: multiply by 3^n, take the digit on top. */
static inline int8_t trit(uint8_t byte, int n) {
    static const uint8_t powers[5] = {1, 3, 9, 27, 81};
    return (int8_t)(((uint8_t)(byte * powers[n]) * 3 >> 8) - 1);
}

static inline void unpack_tq1_0(const void *block, struct unpacked_256 *out) {
    const struct tq1_0 *q = block;
    start(out, half_at(q->scale));
    for (int i = 0; i < 16; i++) out->scales[i] = 1;
    for (int j = 0; j < 160; j++) out->codes[j] = trit(q->codes[j % 32], j / 32);
    for (int j = 0; j < 80; j++) out->codes[160 + j] = trit(q->codes[32 + j % 16], j / 16);
    for (int j = 0; j < 16; j++) out->codes[240 + j] = trit(q->tail[j % 4], j / 4);
}

static inline void unpack_tq2_0(const void *block, struct unpacked_256 *out) {
    const struct tq2_0 *q = block;
    start(out, half_at(q->scale));
    for (int i = 0; i < 16; i++) out->scales[i] = 1;
    for (int j = 0; j < 256; j++) out->codes[j] = (int8_t)(field_2(q->codes, j) - 1);
}

/* The exponent of a power of two; the levels are doubled, so the scale is halved. Exponents 0 and 1 are subnormal. */
static inline void unpack_mxfp4(const void *block, struct unpacked_32 *out) {
    const struct mxfp4 *q = block;
    uint32_t bits = q->exponent < 2 ? 0x00200000u << q->exponent : (uint32_t)(q->exponent - 1) << 23;
    memcpy(&out->scale, &bits, 4);
    out->offset = 0;
    unpack_nibbles(q->codes, out->codes);
    for (int j = 0; j < 32; j++) out->codes[j] = mxfp4_levels[out->codes[j]];
}

#endif
