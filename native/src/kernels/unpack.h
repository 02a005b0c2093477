/* One weight block as small integers and float scales: what decoding and the scalar dot products both start from. */
#ifndef RONDEL_UNPACK_H
#define RONDEL_UNPACK_H
#include "blocks.h"
#include "kernels.h"

/* weight[j] = scale * codes[j] - offset */
struct unpacked_32 {
    float scale, offset;
    int8_t codes[32];
};

/* weight[j] = (scale * scales[j / 16]) * codes[j] - min * mins[j / 16] */
struct unpacked_256 {
    float scale, min;
    int16_t scales[16], mins[16];
    int8_t codes[256];
};

static inline float half_at(const uint8_t bytes[2]) { return half_to_float(bytes[0] | bytes[1] << 8); }

/* Code of a row (0..15) and column in one group of a panel: dword `row` of each 64-byte tile is the row's, and field f of
 * its byte b is column 4 f + b. */
static inline int tile_code(const uint8_t *group, int bits, int row, int column) {
    int across = 32 / bits, field = column % across / 4;
    uint8_t byte = group[64 * (column / across) + 4 * row + column % 4];
    return bits == 8 ? (int8_t)byte : byte >> field * bits & ((1 << bits) - 1);
}

static inline void unpack_nibbles(const uint8_t bytes[16], int8_t codes[32]) {
    for (int j = 0; j < 16; j++) {
        codes[j] = bytes[j] & 15;
        codes[j + 16] = bytes[j] >> 4;
    }
}

static inline void add_fifth_bits(const uint8_t high[4], int8_t codes[32]) {
    for (int j = 0; j < 32; j++) codes[j] |= (high[j / 8] >> j % 8 & 1) << 4;
}

static inline void unpack_q4_0(const void *block, struct unpacked_32 *out) {
    const struct q4_0 *q = block;
    out->scale = half_at(q->scale);
    out->offset = 0;
    unpack_nibbles(q->codes, out->codes);
    for (int j = 0; j < 32; j++) out->codes[j] -= 8;
}

static inline void unpack_q4_1(const void *block, struct unpacked_32 *out) {
    const struct q4_1 *q = block;
    out->scale = half_at(q->scale);
    out->offset = -half_at(q->min);
    unpack_nibbles(q->codes, out->codes);
}

static inline void unpack_q5_0(const void *block, struct unpacked_32 *out) {
    const struct q5_0 *q = block;
    out->scale = half_at(q->scale);
    out->offset = 0;
    unpack_nibbles(q->codes, out->codes);
    add_fifth_bits(q->high, out->codes);
    for (int j = 0; j < 32; j++) out->codes[j] -= 16;
}

static inline void unpack_q5_1(const void *block, struct unpacked_32 *out) {
    const struct q5_1 *q = block;
    out->scale = half_at(q->scale);
    out->offset = -half_at(q->min);
    unpack_nibbles(q->codes, out->codes);
    add_fifth_bits(q->high, out->codes);
}

static inline void unpack_q8_0(const void *block, struct unpacked_32 *out) {
    const struct q8_0 *q = block;
    out->scale = half_at(q->scale);
    out->offset = 0;
    memcpy(out->codes, q->codes, 32);
}

static inline void unpack_iq4_nl(const void *block, struct unpacked_32 *out) {
    const struct iq4_nl *q = block;
    out->scale = half_at(q->scale);
    out->offset = 0;
    unpack_nibbles(q->codes, out->codes);
    for (int j = 0; j < 32; j++) out->codes[j] = iq4_levels[out->codes[j]];
}

/* Element j of the 2-bit fields that Q2_K and Q3_K share. */
static inline int field_2(const uint8_t codes[64], int j) {
    return codes[j / 128 * 32 + j % 32] >> j % 128 / 32 * 2 & 3;
}

static inline void unpack_q2_k(const void *block, struct unpacked_256 *out) {
    const struct q2_k *q = block;
    out->scale = half_at(q->scale);
    out->min = half_at(q->min);
    for (int i = 0; i < 16; i++) {
        out->scales[i] = q->scales[i] & 15;
        out->mins[i] = q->scales[i] >> 4;
    }
    for (int j = 0; j < 256; j++) out->codes[j] = field_2(q->codes, j);
}

/* The sixteen 6-bit scales of Q3_K, A to P, in 12 bytes: bytes 0..7 hold the low nibbles, A..H below I..P, bytes
 * 8..11 the high bit pairs: byte 8 = MMIIEEAA, byte 9 = NNJJFFBB, 10 = OOKKGGCC, 11 = PPLLHHDD. */
static inline void unpack_scales_q3_k(const uint8_t bytes[12], int16_t scales[16]) {
    for (int i = 0; i < 16; i++) {
        int low = i < 8 ? bytes[i] & 15 : bytes[i - 8] >> 4, high = bytes[8 + i % 4] >> i / 4 * 2 & 3;
        scales[i] = (low | high << 4) - 32;
    }
}

static inline void unpack_q3_k(const void *block, struct unpacked_256 *out) {
    const struct q3_k *q = block;
    out->scale = half_at(q->scale);
    out->min = 0;
    memset(out->mins, 0, sizeof out->mins);
    unpack_scales_q3_k(q->scales, out->scales);
    for (int j = 0; j < 256; j++) /* the high bit is stored inverted: set means no offset */
        out->codes[j] = field_2(q->codes, j) - (q->high[j % 32] >> j / 32 & 1 ? 0 : 4);
}

/* Eight pairs of 6-bit scale and min in 12 bytes: 0..3 = EEAAAAAA (scale A, top of E), 4..7 = eeaaaaaa (mins),
 * 8..11 = eeeeEEEE (low nibbles of the second four). */
static inline void unpack_scales_q4_k(const uint8_t bytes[12], uint8_t scales[8], uint8_t mins[8]) {
    uint32_t words[3]; /* four bytes at a time */
    memcpy(words, bytes, 12);
    uint32_t low = words[0] & 0x3f3f3f3f, high = (words[2] & 0x0f0f0f0f) | (words[0] >> 2 & 0x30303030);
    memcpy(scales, &low, 4);
    memcpy(scales + 4, &high, 4);
    low = words[1] & 0x3f3f3f3f, high = (words[2] >> 4 & 0x0f0f0f0f) | (words[1] >> 2 & 0x30303030);
    memcpy(mins, &low, 4);
    memcpy(mins + 4, &high, 4);
}

static inline void unpack_pairs_q4_k(const uint8_t bytes[12], struct unpacked_256 *out) {
    uint8_t scales[8], mins[8];
    unpack_scales_q4_k(bytes, scales, mins);
    for (int i = 0; i < 16; i++) {
        out->scales[i] = scales[i / 2];
        out->mins[i] = mins[i / 2];
    }
}

static inline int nibble(const uint8_t codes[128], int j) {
    return codes[j / 64 * 32 + j % 32] >> j % 64 / 32 * 4 & 15;
}

static inline void unpack_q4_k(const void *block, struct unpacked_256 *out) {
    const struct q4_k *q = block;
    out->scale = half_at(q->scale);
    out->min = half_at(q->min);
    unpack_pairs_q4_k(q->scales, out);
    for (int j = 0; j < 256; j++) out->codes[j] = nibble(q->codes, j);
}

static inline void unpack_q5_k(const void *block, struct unpacked_256 *out) {
    const struct q5_k *q = block;
    out->scale = half_at(q->scale);
    out->min = half_at(q->min);
    unpack_pairs_q4_k(q->scales, out);
    for (int j = 0; j < 256; j++) out->codes[j] = nibble(q->codes, j) | (q->high[j % 32] >> j / 32 & 1) << 4;
}

static inline void unpack_q6_k(const void *block, struct unpacked_256 *out) {
    const struct q6_k *q = block;
    out->scale = half_at(q->scale);
    out->min = 0;
    memset(out->mins, 0, sizeof out->mins);
    for (int i = 0; i < 16; i++) out->scales[i] = q->scales[i];
    for (int j = 0; j < 256; j++) {
        int half = j / 128, t = j % 128 / 32, l = j % 32;
        int low = q->low[half * 64 + t % 2 * 32 + l] >> t / 2 * 4 & 15, high = q->high[half * 32 + l] >> t * 2 & 3;
        out->codes[j] = (low | high << 4) - 32;
    }
}

#endif
