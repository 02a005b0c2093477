/* The traits table: one row per weight format. Adding a format is one row here, its decoder and its dot products. */
#ifndef RONDEL_FORMATS_H
#define RONDEL_FORMATS_H
#include <stddef.h>
#include <stdint.h>

/* How activations are prepared for a dot product with a format. F16 and BF16 round, Q8 are int8 with scales;
 * the block sizes and roundings are ggml's, so that both runtimes compute with the same integers. TILE_G is int8
 * with one float scale per G columns, the group of the weights it meets. kernels/blocks.h draws the layouts. */
enum activation {
    ACT_F32, ACT_F16, ACT_BF16, ACT_Q8_0, ACT_Q8_1, ACT_Q8_K, ACT_TILE_64, ACT_TILE_128, ACT_TILE_256, ACT_COUNT
};

enum format {
    FMT_F32, FMT_F16, FMT_BF16, FMT_Q4_0, FMT_Q4_1, FMT_Q5_0, FMT_Q5_1, FMT_Q8_0, FMT_Q2_K, FMT_Q3_K, FMT_Q4_K,
    FMT_Q5_K, FMT_Q6_K, FMT_IQ4_NL, FMT_IQ4_XS, FMT_MXFP4, FMT_TQ1_0, FMT_TQ2_0, FMT_Q1_0, FMT_Q2_0, FMT_IQ1_S, FMT_IQ1_M, FMT_IQ2_XXS,
    FMT_IQ2_XS, FMT_IQ2_S, FMT_IQ3_XXS, FMT_IQ3_S, FMT_U2_64, FMT_U2_128, FMT_U2_256, FMT_U4_64, FMT_U4_128, FMT_U4_256,
    FMT_U8_64, FMT_U8_128, FMT_U8_256, FMT_COUNT
};

struct format_traits {
    const char *name;
    int32_t ggml_type; /* -1: one of ours, stored as I8 */
    int32_t columns;   /* columns of a block, or of a scale group G of a tile format */
    int32_t bytes;     /* of a block; of 16 rows x G columns with their scales for a tile format */
    int32_t rows;      /* rows stored together: 1, or the panel of a tile format */
    enum activation activation;
};

extern const struct format_traits format_table[FMT_COUNT];

int format_find(const char *name);            /* index, or -1 with set_error */
int format_of_ggml_type(int32_t type);        /* index, or -1 without an error */
/* Bytes of a (rows, cols) matrix, rows padded to whole panels; -1 where cols does not fit or the product overflows. */
int64_t format_bytes(int format, int64_t rows, int64_t cols);

/* A weight matrix in place. */
struct matrix {
    const uint8_t *data;
    int format;
    int64_t rows, cols;
};

#endif
