/* Packed weights back to floats, bit for bit as ggml's own reference decodes them. */
#include <string.h>

#include "codebooks.h"
#include "error.h"
#include "rondel.h"

typedef void (*unpack_32)(const void *block, struct unpacked_32 *out);
typedef void (*unpack_256)(const void *block, struct unpacked_256 *out);

static const unpack_32 blocks_of_32[FMT_COUNT] = {
    [FMT_Q4_0] = unpack_q4_0, [FMT_Q4_1] = unpack_q4_1, [FMT_Q5_0] = unpack_q5_0,
    [FMT_Q5_1] = unpack_q5_1, [FMT_Q8_0] = unpack_q8_0, [FMT_IQ4_NL] = unpack_iq4_nl,
    [FMT_MXFP4] = unpack_mxfp4,
};
static const unpack_256 blocks_of_256[FMT_COUNT] = {
    [FMT_Q2_K] = unpack_q2_k, [FMT_Q3_K] = unpack_q3_k, [FMT_Q4_K] = unpack_q4_k,
    [FMT_Q5_K] = unpack_q5_k, [FMT_Q6_K] = unpack_q6_k, [FMT_IQ4_XS] = unpack_iq4_xs,
    [FMT_TQ1_0] = unpack_tq1_0, [FMT_TQ2_0] = unpack_tq2_0, [FMT_IQ1_S] = unpack_iq1_s,
    [FMT_IQ1_M] = unpack_iq1_m, [FMT_IQ2_XXS] = unpack_iq2_xxs, [FMT_IQ2_XS] = unpack_iq2_xs,
    [FMT_IQ2_S] = unpack_iq2_s, [FMT_IQ3_XXS] = unpack_iq3_xxs, [FMT_IQ3_S] = unpack_iq3_s,
};

typedef void (*unpack_part)(const void *block, int part, struct unpacked_32 *out);
static const unpack_part blocks_of_parts[FMT_COUNT] = {[FMT_Q1_0] = unpack_q1_0, [FMT_Q2_0] = unpack_q2_0};

static void decode_floats(int format, const uint8_t *row, int64_t cols, float *out) {
    if (format == FMT_F32) {
        memcpy(out, row, (size_t)cols * 4);
        return;
    }
    for (int64_t i = 0; i < cols; i++) {
        uint16_t half;
        memcpy(&half, row + 2 * i, 2);
        uint32_t widened = (uint32_t)half << 16;
        if (format == FMT_F16)
            out[i] = half_to_float(half);
        else
            memcpy(&out[i], &widened, 4);
    }
}

static void decode_blocks_of_32(unpack_32 unpack, const uint8_t *row, int64_t cols, int bytes, float *out) {
    struct unpacked_32 block;
    for (int64_t i = 0; i < cols / 32; i++, row += bytes) {
        unpack(row, &block);
        for (int j = 0; j < 32; j++) *out++ = block.scale * block.codes[j] - block.offset;
    }
}

static void decode_parts(unpack_part unpack, const uint8_t *row, int64_t cols, int columns, int bytes, float *out) {
    struct unpacked_32 part;
    for (int64_t i = 0; i < cols; i += 32) {
        unpack(row + i / columns * bytes, (int)(i % columns / 32), &part);
        for (int j = 0; j < 32; j++) *out++ = part.scale * part.codes[j];
    }
}

static void decode_blocks_of_256(unpack_256 unpack, const uint8_t *row, int64_t cols, int bytes, float *out) {
    struct unpacked_256 block;
    for (int64_t i = 0; i < cols / 256; i++, row += bytes) {
        unpack(row, &block);
        for (int s = 0; s < 16; s++) {
            float scale = block.scale * block.scales[s], offset = block.min * block.mins[s];
            for (int j = 0; j < 16; j++) *out++ = scale * block.codes[16 * s + j] - offset;
        }
    }
}

/* Row r (0..15) of a panel. */
static void decode_tile_row(const struct format_traits *traits, const uint8_t *panel, int64_t cols, int r, float *out) {
    int bits = (traits->bytes - 32) * 8 / (16 * traits->columns);
    float zero = bits == 2 ? 1.5f : bits == 4 ? 8.0f : 0.0f;
    for (int64_t group = 0; group < cols / traits->columns; group++, panel += traits->bytes) {
        uint16_t half;
        memcpy(&half, panel + traits->bytes - 32 + 2 * r, 2);
        float scale = half_to_float(half);
        for (int c = 0; c < traits->columns; c++) *out++ = scale * ((float)tile_code(panel, bits, r, c) - zero);
    }
}

void matrix_row(const struct matrix *weights, int64_t row, float *out) {
    const struct format_traits *traits = &format_table[weights->format];
    const uint8_t *data = weights->data + row / traits->rows * (weights->cols / traits->columns * traits->bytes);
    if (traits->rows > 1)
        decode_tile_row(traits, data, weights->cols, (int)(row % traits->rows), out);
    else if (blocks_of_32[weights->format])
        decode_blocks_of_32(blocks_of_32[weights->format], data, weights->cols, traits->bytes, out);
    else if (blocks_of_parts[weights->format])
        decode_parts(blocks_of_parts[weights->format], data, weights->cols, traits->columns, traits->bytes, out);
    else if (blocks_of_256[weights->format])
        decode_blocks_of_256(blocks_of_256[weights->format], data, weights->cols, traits->bytes, out);
    else
        decode_floats(weights->format, data, weights->cols, out);
}

EXPORT int32_t rondel_decode(const char *format, const void *packed, int64_t rows, int64_t cols, float *weights) {
    int index = format_find(format);
    if (index < 0 || rondel_format_bytes(format, rows, cols) < 0) return -1;
    struct matrix matrix = {packed, index, rows, cols};
    for (int64_t row = 0; row < rows; row++) matrix_row(&matrix, row, weights + row * cols);
    return 0;
}
