/* Indices, signs and stored scales to the bytes of ggml's codebook blocks (kernels/codebooks.h draws them). */
#include "kernels/codebooks.h"
#include "encode.h"

static void put_word(uint8_t *to, unsigned word) {
    to[0] = (uint8_t)word;
    to[1] = (uint8_t)(word >> 8);
}

static void put_dword(uint8_t *to, uint32_t dword) {
    put_word(to, dword & 0xffff);
    put_word(to + 2, dword >> 16);
}

static void pack_scale_nibbles(const struct codewords *from, int count, uint8_t *to) {
    for (int s = 0; s < count; s += 2) to[s / 2] = (uint8_t)(from->scale[s] | from->scale[s + 1] << 4);
}

/* The four times seven signs and the scale of 32 columns. */
static uint32_t signs_and_scale(const struct codewords *from, int i) {
    uint32_t word = (uint32_t)from->scale[i] << 28;
    for (int g = 0; g < 4; g++) word |= (uint32_t)(from->signs[4 * i + g] & 127) << 7 * g;
    return word;
}

void pack_iq2_xxs(const struct codewords *from, uint8_t *block) {
    struct iq2_xxs *to = (struct iq2_xxs *)block;
    put_word(to->scale, from->d);
    for (int i = 0; i < 8; i++) {
        for (int g = 0; g < 4; g++) to->codes[8 * i + g] = (uint8_t)from->index[4 * i + g];
        put_dword(to->codes + 8 * i + 4, signs_and_scale(from, i));
    }
}

void pack_iq2_xs(const struct codewords *from, uint8_t *block) {
    struct iq2_xs *to = (struct iq2_xs *)block;
    put_word(to->scale, from->d);
    for (int u = 0; u < 32; u++) put_word(to->codes + 2 * u, from->index[u] | (unsigned)(from->signs[u] & 127) << 9);
    pack_scale_nibbles(from, 16, to->scales);
}

void pack_iq2_s(const struct codewords *from, uint8_t *block) {
    struct iq2_s *to = (struct iq2_s *)block;
    memset(to, 0, sizeof *to);
    put_word(to->scale, from->d);
    for (int u = 0; u < 32; u++) {
        to->codes[u] = (uint8_t)from->index[u];
        to->high[u / 4] |= (uint8_t)(from->index[u] >> 8 << u % 4 * 2);
        to->signs[u] = from->signs[u];
    }
    pack_scale_nibbles(from, 16, to->scales);
}

void pack_iq3_xxs(const struct codewords *from, uint8_t *block) {
    struct iq3_xxs *to = (struct iq3_xxs *)block;
    put_word(to->scale, from->d);
    for (int c = 0; c < 64; c++) to->codes[c] = (uint8_t)from->index[c];
    for (int i = 0; i < 8; i++) put_dword(to->signs + 4 * i, signs_and_scale(from, i));
}

void pack_iq3_s(const struct codewords *from, uint8_t *block) {
    struct iq3_s *to = (struct iq3_s *)block;
    memset(to, 0, sizeof *to);
    put_word(to->scale, from->d);
    for (int c = 0; c < 64; c++) {
        to->codes[c] = (uint8_t)from->index[c];
        to->high[c / 8] |= (uint8_t)(from->index[c] >> 8 << c % 8);
    }
    memcpy(to->signs, from->signs, 32);
    pack_scale_nibbles(from, 8, to->scales);
}

void pack_iq1_s(const struct codewords *from, uint8_t *block) {
    struct iq1_s *to = (struct iq1_s *)block;
    put_word(to->scale, from->d);
    for (int i = 0; i < 8; i++) {
        unsigned rest = (unsigned)from->scale[i] << 12 | (unsigned)from->down[4 * i] << 15;
        for (int g = 0; g < 4; g++) {
            to->codes[4 * i + g] = (uint8_t)from->index[4 * i + g];
            rest |= (unsigned)(from->index[4 * i + g] >> 8) << 3 * g;
        }
        put_word(to->high + 2 * i, rest);
    }
}

void pack_iq1_m(const struct codewords *from, uint8_t *block) {
    struct iq1_m *to = (struct iq1_m *)block;
    memset(to, 0, sizeof *to);
    for (int u = 0; u < 32; u++) {
        to->codes[u] = (uint8_t)from->index[u];
        to->high[u / 2] |= (uint8_t)((from->index[u] >> 8 | from->down[u] << 3) << u % 2 * 4);
    }
    for (int i = 0; i < 4; i++) {
        unsigned word = (unsigned)(from->d >> 4 * i & 15) << 12;
        for (int s = 0; s < 4; s++) word |= (unsigned)from->scale[4 * i + s] << 3 * s;
        put_word(to->scales + 2 * i, word);
    }
}
