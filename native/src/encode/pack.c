/* Codes and stored scales to the bytes of ggml's blocks; nothing here chooses anything. */
#include "encode.h"
#include "kernels/kernels.h"

#include <string.h>

static void put_half(uint8_t *to, uint16_t half) {
    to[0] = (uint8_t)half;
    to[1] = (uint8_t)(half >> 8);
}

/* d, then 32 int8 */
void pack_q8_0(const uint8_t *codes, uint16_t d, uint8_t *block) {
    put_half(block, d);
    memcpy(block + 2, codes, 32);
}

/* byte j = code j | code (j + 16) << 4 */
void pack_nibbles(const uint8_t *codes, uint8_t *block) {
    for (int j = 0; j < 16; j++) block[j] = (uint8_t)((codes[j] & 15) | (codes[j + 16] & 15) << 4);
}

/* bit j of a little-endian word = bit 4 of code j */
void pack_fifth_bits(const uint8_t *codes, uint8_t *bits) {
    memset(bits, 0, 4);
    for (int j = 0; j < 32; j++) bits[j / 8] |= (uint8_t)((codes[j] >> 4 & 1) << j % 8);
}

/* One block of 32: scale, offset where there is one, fifth bits where there are, nibbles; or Q8_0. */
void pack_block(int format, const uint8_t *codes, float scale, float offset, uint8_t *block) {
    uint16_t d = float_to_half(scale), m = float_to_half(offset);
    if (format == FMT_Q8_0) {
        pack_q8_0(codes, d, block);
        return;
    }
    int affine = format == FMT_Q4_1 || format == FMT_Q5_1, fifth = format == FMT_Q5_0 || format == FMT_Q5_1;
    memcpy(block, &d, 2);
    block += 2;
    if (affine) {
        memcpy(block, &m, 2);
        block += 2;
    }
    if (fifth) {
        pack_fifth_bits(codes, block);
        block += 4;
    }
    pack_nibbles(codes, block);
}

/* Eight codes at a time, for layouts that take the same bits of codes some columns apart: what is shifted out of a byte
 * has been masked away before. */
static uint64_t eight(const uint8_t *codes) {
    uint64_t word;
    memcpy(&word, codes, 8);
    return word;
}

static uint64_t each(uint8_t byte) { return byte * 0x0101010101010101u; }

/* Four planes of 2 bits per 128 columns: byte l of 32 holds columns l, l + 32, l + 64, l + 96. */
static void pack_two_bits(const uint8_t *codes, uint8_t *to) {
    for (int j = 0; j < 256; j += 128)
        for (int l = 0; l < 32; l += 8) {
            uint64_t word = 0;
            for (int k = 0; k < 4; k++) word |= (eight(codes + j + l + 32 * k) & each(3)) << 2 * k;
            memcpy(to + j / 4 + l, &word, 8);
        }
}

/* Bit c / 32 of byte c % 32 = bit `bit` of code c, for 256 codes. */
static void pack_single_bits(const uint8_t *codes, int bit, uint8_t *to) {
    for (int l = 0; l < 32; l += 8) {
        uint64_t word = 0;
        for (int k = 0; k < 8; k++) word |= (eight(codes + l + 32 * k) >> bit & each(1)) << k;
        memcpy(to + l, &word, 8);
    }
}

/* Base-3 digits of `count` columns, `apart` apart, as the fraction x / 256 that holds the first digit on top. */
static uint8_t pack_trits(const uint8_t *codes, int apart, int count) {
    int number = 0;
    for (int n = 0; n < 5; n++) number = 3 * number + (n < count ? codes[n * apart] : 0);
    return (uint8_t)((number * 256 + 242) / 243);
}

/* 32 bytes of columns l, l + 32, .. 128 + l; 16 of 160 + l, .. 224 + l; 4 of 240 + l, .. 252 + l; d */
static void pack_tq1_0(const uint8_t *codes, uint16_t d, uint8_t *block) {
    for (int l = 0; l < 32; l++) block[l] = pack_trits(codes + l, 32, 5);
    for (int l = 0; l < 16; l++) block[32 + l] = pack_trits(codes + 160 + l, 16, 5);
    for (int l = 0; l < 4; l++) block[48 + l] = pack_trits(codes + 240 + l, 4, 4);
    put_half(block + 52, d);
}

/* d, then the codes of 1 or 2 bits one after another */
static void pack_in_order(const uint8_t *codes, int columns, int bits, uint16_t d, uint8_t *block) {
    put_half(block, d);
    memset(block + 2, 0, (size_t)(columns * bits / 8));
    for (int c = 0; c < columns; c++) block[2 + c * bits / 8] |= (uint8_t)(codes[c] << c * bits % 8);
}

void pack_few_levels(int format, const uint8_t *codes, uint16_t d, uint8_t *block) {
    switch (format) {
    case FMT_TQ1_0: pack_tq1_0(codes, d, block); break;
    case FMT_TQ2_0:
        pack_two_bits(codes, block);
        put_half(block + 64, d);
        break;
    default: pack_in_order(codes, format_table[format].columns, format == FMT_Q1_0 ? 1 : 2, d, block); break;
    }
}

/* 16 bytes (scale | min << 4), 64 bytes of codes, d, dmin */
void pack_q2_k(const struct superblock *from, uint8_t *block) {
    for (int s = 0; s < 16; s++) block[s] = (uint8_t)(from->scale[s] | from->min[s] << 4);
    pack_two_bits(from->codes, block + 16);
    put_half(block + 80, from->d);
    put_half(block + 82, from->dmin);
}

/* 32 bytes of third bits (bit c / 32 of byte c % 32 for column c), 64 of the lower two, 12 of scales + 32, d.
 * Scale bytes: low nibbles of 0..7, high nibbles of them for 8..15; then bits 4 and 5 of s at 2 (s / 4) of byte 8 + s % 4. */
void pack_q3_k(const struct superblock *from, uint8_t *block) {
    uint8_t *scales = block + 96;
    memset(scales, 0, 12);
    pack_single_bits(from->codes, 2, block);
    pack_two_bits(from->codes, block + 32);
    for (int s = 0; s < 16; s++) {
        int stored = from->scale[s] + 32;
        scales[s % 8] |= (uint8_t)((stored & 15) << 4 * (s / 8));
        scales[8 + s % 4] |= (uint8_t)((stored >> 4) << 2 * (s / 4));
    }
    put_half(block + 108, from->d);
}

/* Eight 6-bit scales and mins in 12 bytes: bytes 0..3 scales and 4..7 mins of 0..3 in the low six bits; bytes 8..11
 * low nibbles of 4..7 (scale | min << 4), whose upper two bits lie on top of bytes 0..3 and 4..7. */
static void pack_six_bits(const struct superblock *from, uint8_t *to) {
    for (int s = 0; s < 4; s++) {
        to[s] = (uint8_t)(from->scale[s] | (from->scale[s + 4] >> 4) << 6);
        to[s + 4] = (uint8_t)(from->min[s] | (from->min[s + 4] >> 4) << 6);
        to[s + 8] = (uint8_t)((from->scale[s + 4] & 15) | (from->min[s + 4] & 15) << 4);
    }
}

/* Per 64 columns 32 bytes: low nibble column l, high nibble column l + 32. */
static void pack_nibble_pairs(const uint8_t *codes, uint8_t *to) {
    for (int j = 0; j < 256; j += 64)
        for (int l = 0; l < 32; l++)
            to[j / 2 + l] = (uint8_t)((codes[j + l] & 15) | (codes[j + l + 32] & 15) << 4);
}

/* d, dmin, 12 bytes of scales, 128 of codes */
void pack_q4_k(const struct superblock *from, uint8_t *block) {
    put_half(block, from->d);
    put_half(block + 2, from->dmin);
    pack_six_bits(from, block + 4);
    pack_nibble_pairs(from->codes, block + 16);
}

/* d, dmin, 12 bytes of scales, 32 of fifth bits (bit c / 32 of byte c % 32), 128 of low nibbles */
void pack_q5_k(const struct superblock *from, uint8_t *block) {
    put_half(block, from->d);
    put_half(block + 2, from->dmin);
    pack_six_bits(from, block + 4);
    pack_single_bits(from->codes, 4, block + 16);
    pack_nibble_pairs(from->codes, block + 48);
}

/* Per 128 columns 64 bytes of low nibbles (byte l of 64: columns l and l + 64) and 32 of upper two bits (columns l,
 * l + 32, l + 64, l + 96); all low nibbles first; then 16 int8 scales and d. */
void pack_q6_k(const struct superblock *from, uint8_t *block) {
    for (int j = 0; j < 256; j += 128) {
        const uint8_t *c = from->codes + j;
        for (int l = 0; l < 64; l++) block[j / 2 + l] = (uint8_t)((c[l] & 15) | (c[l + 64] & 15) << 4);
        for (int l = 0; l < 32; l++)
            block[128 + j / 4 + l] = (uint8_t)(c[l] >> 4 | (c[l + 32] >> 4) << 2 | (c[l + 64] >> 4) << 4 | (c[l + 96] >> 4) << 6);
    }
    memcpy(block + 192, from->scale, 16);
    put_half(block + 208, from->d);
}

/* d, upper two bits of eight scales + 32 in a word, low nibbles in four bytes, then nibbles of 32 columns after another */
void pack_iq4_xs(const struct superblock *from, uint8_t *block) {
    unsigned high = 0;
    put_half(block, from->d);
    memset(block + 4, 0, 4);
    for (int s = 0; s < 8; s++) {
        unsigned stored = (unsigned)(from->scale[s] + 32);
        high |= stored >> 4 << 2 * s;
        block[4 + s / 2] |= (uint8_t)((stored & 15) << s % 2 * 4);
        pack_nibbles(from->codes + 32 * s, block + 8 + 16 * s);
    }
    put_half(block + 2, (uint16_t)high);
}

/* 64 bytes are 16 dwords, one a row; byte b of a dword holds 8 / bits fields, field f is column 4 f + b of the tile. */
void pack_tile_row(const uint8_t *codes, int columns, int bits, int row, uint8_t *panel) {
    int fields = 8 / bits;
    for (int at = 0; at < columns; at += 4 * fields, panel += 64)
        for (int b = 0; b < 4; b++) {
            unsigned byte = 0;
            for (int f = 0; f < fields; f++) byte |= (unsigned)codes[at + 4 * f + b] << bits * f;
            panel[4 * row + b] = (uint8_t)byte;
        }
}

uint8_t *pack_tiles(uint8_t (*codes)[PANEL], int columns, int bits, uint8_t *to) {
    uint8_t row[MOST_FEEDBACK];
    for (int r = 0; r < PANEL; r++) {
        for (int c = 0; c < columns; c++) row[c] = codes[c][r];
        pack_tile_row(row, columns, bits, r, to);
    }
    return to + PANEL * columns * bits / 8;
}

int tile_bits(int format) {
    switch (format) {
    case FMT_U2_64:
    case FMT_U2_128:
    case FMT_U2_256: return 2;
    case FMT_U4_64:
    case FMT_U4_128:
    case FMT_U4_256: return 4;
    default: return 8;
    }
}
