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

struct q1_0 { uint8_t scale[2], codes[16]; };               /* 128: d (2 q - 1), q of column j in bit j */
struct q2_0 { uint8_t scale[2], codes[16]; };               /* 64: d (q - 1), two bits a column in order */

static const int8_t mxfp4_levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static inline uint16_t word_at(const uint8_t *bytes) { return (uint16_t)(bytes[0] | bytes[1] << 8); }
static inline uint32_t dword_at(const uint8_t *bytes) { return word_at(bytes) | (uint32_t)word_at(bytes + 2) << 16; }

static inline int even_signs(int seven) { return seven | (__builtin_popcount((unsigned)seven) & 1) << 7; }

/* Eight bytes at once in a 64-bit word, byte j for weight j; no step below carries from one byte into the next. */
#define EACH(byte) (UINT64_C(0x0101010101010101) * (byte))

/* Eight codes of 1..127, negated where a bit of `signs` is set. */
static inline void store_signed(uint64_t codes, int signs, int8_t out[8]) {
    uint64_t bit = EACH((uint64_t)signs) & UINT64_C(0x8040201008040201);
    uint64_t set = ((bit + EACH(127)) | bit) >> 7 & EACH(1); /* 1 where the bit of this byte was set */
    codes = (codes ^ set * 255) + set;
    memcpy(out, &codes, 8);
}

/* The eight 2-bit fields of a word, one a byte. */
static inline uint64_t fields_of_2(uint64_t word) {
    word = (word | word << 24) & UINT64_C(0x000000ff000000ff);
    word = (word | word << 12) & UINT64_C(0x000f000f000f000f);
    return (word | word << 6) & EACH(3);
}

/* The four 4-bit fields of each of two words. */
static inline uint64_t fields_of_4(uint64_t first, uint64_t second) {
    uint64_t word = first | second << 32;
    word = (word | word << 8) & UINT64_C(0x00ff00ff00ff00ff);
    return (word | word << 4) & EACH(15);
}

/* Fields 0, 1, 2 are the levels 8, 25, 43. */
static inline void codeword_iq2(uint16_t word, int signs, int8_t codes[8]) {
    uint64_t fields = fields_of_2(word);
    store_signed(fields * 17 + (fields >> 1 & EACH(1)) + EACH(8), signs, codes);
}

/* Eight times the weight's multiple of the scale: field 0, 1, 2 is -1, 0, 1; an eighth up or down moves all of them.
 * Computed 128 too high, which keeps bytes positive until their top bit is flipped. */
static inline void codeword_iq1(uint16_t word, int down, int8_t codes[8]) {
    uint64_t bytes = (fields_of_2(word) * 8 + EACH(down ? 119 : 121)) ^ EACH(128);
    memcpy(codes, &bytes, 8);
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

/* Fields 0..7 are the levels 4, 12, .. 52 and 62. */
static inline void unpack_iq3_xxs(const void *block, struct unpacked_256 *out) {
    const struct iq3_xxs *q = block;
    start(out, half_at(q->scale) * 0.25f);
    for (int i = 0; i < 8; i++) {
        uint32_t rest = dword_at(q->signs + 4 * i);
        out->scales[2 * i] = out->scales[2 * i + 1] = (int16_t)(2 * (rest >> 28) + 1);
        for (int g = 0; g < 4; g++) {
            const uint8_t *indices = q->codes + 8 * i + 2 * g;
            uint64_t fields = fields_of_4(iq3_xxs_codebook[indices[0]], iq3_xxs_codebook[indices[1]]);
            uint64_t last = fields & fields >> 1 & fields >> 2 & EACH(1);
            store_signed(fields * 8 + last * 2 + EACH(4), even_signs(rest >> 7 * g & 127), out->codes + 32 * i + 8 * g);
        }
    }
}

/* Fields 0..7 are the levels 1, 3, .. 15. */
static inline void unpack_iq3_s(const void *block, struct unpacked_256 *out) {
    const struct iq3_s *q = block;
    start(out, half_at(q->scale));
    for (int i = 0; i < 16; i++) out->scales[i] = 2 * (q->scales[i / 4] >> i / 2 % 2 * 4 & 15) + 1;
    for (int g = 0; g < 32; g++) {
        int high = q->high[g / 4] >> g % 4 * 2;
        uint16_t first = iq3_s_codebook[q->codes[2 * g] | (high & 1) << 8];
        uint16_t second = iq3_s_codebook[q->codes[2 * g + 1] | (high >> 1 & 1) << 8];
        store_signed(fields_of_4(first, second) * 2 + EACH(1), q->signs[g], out->codes + 8 * g);
    }
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

/* A power of two; the levels are doubled, so the scale is halved. Exponents 0 and 1 are subnormal. */
static inline float mxfp4_scale(uint8_t exponent) {
    uint32_t bits = exponent < 2 ? 0x00200000u << exponent : (uint32_t)(exponent - 1) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return scale;
}

static inline void unpack_mxfp4(const void *block, struct unpacked_32 *out) {
    const struct mxfp4 *q = block;
    out->scale = mxfp4_scale(q->exponent);
    out->offset = 0;
    unpack_nibbles(q->codes, out->codes);
    for (int j = 0; j < 32; j++) out->codes[j] = mxfp4_levels[out->codes[j]];
}

/* Columns 32 part .. of a block of 128 (Q1_0) or 64 (Q2_0). */
static inline void unpack_q1_0(const void *block, int part, struct unpacked_32 *out) {
    const struct q1_0 *q = block;
    out->scale = half_at(q->scale);
    out->offset = 0;
    for (int j = 0; j < 32; j++) out->codes[j] = (int8_t)(2 * (q->codes[4 * part + j / 8] >> j % 8 & 1) - 1);
}

static inline void unpack_q2_0(const void *block, int part, struct unpacked_32 *out) {
    const struct q2_0 *q = block;
    out->scale = half_at(q->scale);
    out->offset = 0;
    for (int j = 0; j < 32; j++) out->codes[j] = (int8_t)((q->codes[8 * part + j / 4] >> j % 4 * 2 & 3) - 1);
}

#endif
