/* The traits table of weight formats and the questions that need nothing else: names, ggml types, sizes. */
#include "formats.h"

#include <string.h>

#include "error.h"
#include "rondel.h"

/* Bytes of 16 rows x G columns of a tile format: `bits` per code, then one half per row. */
#define TILE_BYTES(bits, group) (16 * (group) * (bits) / 8 + 32)
#define TILE(bits, group) {"U" #bits "-" #group, -1, group, TILE_BYTES(bits, group), 16, ACT_TILE_##group}

const struct format_traits format_table[FMT_COUNT] = {
    [FMT_F32] = {"F32", 0, 1, 4, 1, ACT_F32},
    [FMT_F16] = {"F16", 1, 1, 2, 1, ACT_F16},
    [FMT_BF16] = {"BF16", 30, 1, 2, 1, ACT_BF16},
    [FMT_Q4_0] = {"Q4_0", 2, 32, 18, 1, ACT_Q8_0},
    [FMT_Q4_1] = {"Q4_1", 3, 32, 20, 1, ACT_Q8_1},
    [FMT_Q5_0] = {"Q5_0", 6, 32, 22, 1, ACT_Q8_0},
    [FMT_Q5_1] = {"Q5_1", 7, 32, 24, 1, ACT_Q8_1},
    [FMT_Q8_0] = {"Q8_0", 8, 32, 34, 1, ACT_Q8_0},
    [FMT_Q2_K] = {"Q2_K", 10, 256, 84, 1, ACT_Q8_K},
    [FMT_Q3_K] = {"Q3_K", 11, 256, 110, 1, ACT_Q8_K},
    [FMT_Q4_K] = {"Q4_K", 12, 256, 144, 1, ACT_Q8_K},
    [FMT_Q5_K] = {"Q5_K", 13, 256, 176, 1, ACT_Q8_K},
    [FMT_Q6_K] = {"Q6_K", 14, 256, 210, 1, ACT_Q8_K},
    [FMT_IQ4_NL] = {"IQ4_NL", 20, 32, 18, 1, ACT_Q8_0},
    [FMT_IQ4_XS] = {"IQ4_XS", 23, 256, 136, 1, ACT_Q8_K},
    [FMT_MXFP4] = {"MXFP4", 39, 32, 17, 1, ACT_Q8_0},
    [FMT_TQ1_0] = {"TQ1_0", 34, 256, 54, 1, ACT_Q8_K},
    [FMT_TQ2_0] = {"TQ2_0", 35, 256, 66, 1, ACT_Q8_K},
    [FMT_Q1_0] = {"Q1_0", 41, 128, 18, 1, ACT_Q8_0},
    [FMT_Q2_0] = {"Q2_0", 42, 64, 18, 1, ACT_Q8_0},
    [FMT_IQ1_S] = {"IQ1_S", 19, 256, 50, 1, ACT_Q8_K},
    [FMT_IQ1_M] = {"IQ1_M", 29, 256, 56, 1, ACT_Q8_K},
    [FMT_IQ2_XXS] = {"IQ2_XXS", 16, 256, 66, 1, ACT_Q8_K},
    [FMT_IQ2_XS] = {"IQ2_XS", 17, 256, 74, 1, ACT_Q8_K},
    [FMT_IQ2_S] = {"IQ2_S", 22, 256, 82, 1, ACT_Q8_K},
    [FMT_IQ3_XXS] = {"IQ3_XXS", 18, 256, 98, 1, ACT_Q8_K},
    [FMT_IQ3_S] = {"IQ3_S", 21, 256, 110, 1, ACT_Q8_K},
    [FMT_U2_64] = TILE(2, 64),
    [FMT_U2_128] = TILE(2, 128),
    [FMT_U2_256] = TILE(2, 256),
    [FMT_U4_64] = TILE(4, 64),
    [FMT_U4_128] = TILE(4, 128),
    [FMT_U4_256] = TILE(4, 256),
    [FMT_U8_64] = TILE(8, 64),
    [FMT_U8_128] = TILE(8, 128),
    [FMT_U8_256] = TILE(8, 256),
};

int format_find(const char *name) {
    for (int i = 0; i < FMT_COUNT; i++)
        if (strcmp(format_table[i].name, name) == 0) return i;
    return set_error("unknown weight format '%s': this build knows F32, F16, BF16, ggml's Q, K, IQ and TQ types, "
                     "MXFP4, and U2, U4, U8 with groups of 64, 128 or 256",
                     name);
}

int format_of_ggml_type(int32_t type) {
    for (int i = 0; i < FMT_COUNT; i++)
        if (type >= 0 && format_table[i].ggml_type == type) return i;
    return -1;
}

int64_t format_bytes(int format, int64_t rows, int64_t cols) {
    const struct format_traits *traits = &format_table[format];
    if (rows < 0 || cols < 0 || cols % traits->columns) return -1;
    int64_t panels = rows / traits->rows + (rows % traits->rows != 0), bytes;
    if (__builtin_mul_overflow(cols / traits->columns, (int64_t)traits->bytes, &bytes)) return -1;
    if (__builtin_mul_overflow(bytes, panels, &bytes)) return -1;
    return bytes;
}

EXPORT int32_t rondel_format_count(void) {
    return FMT_COUNT;
}

EXPORT const char *rondel_format_name(int32_t index) {
    return index >= 0 && index < FMT_COUNT ? format_table[index].name : NULL;
}

EXPORT int32_t rondel_format_ggml_type(const char *format) {
    int index = format_find(format);
    return index < 0 ? -1 : format_table[index].ggml_type;
}

EXPORT int64_t rondel_format_block(const char *format) {
    int index = format_find(format);
    return index < 0 ? -1 : format_table[index].columns;
}

EXPORT int64_t rondel_format_bytes(const char *format, int64_t rows, int64_t cols) {
    int index = format_find(format);
    if (index < 0) return -1;
    int64_t bytes = format_bytes(index, rows, cols);
    if (bytes < 0)
        set_error("a matrix of %lld x %lld does not fit %s: columns must be a multiple of %d", (long long)rows,
                  (long long)cols, format, (int)format_table[index].columns);
    return bytes;
}
