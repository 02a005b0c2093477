/* The functions that one instruction set defines in several files, declared and put into its table. */
#ifndef RONDEL_DECLARE_H
#define RONDEL_DECLARE_H
#include "kernels.h"

#define DECLARE_DOT(isa, name) float isa##_dot_##name(const void *row, const void *packed, int64_t cols);
#define DECLARE_PANEL(isa, name) \
    void isa##_panel_##name(const void *tiles, const void *packed, int64_t cols, float out[16]);

#define DECLARE_BLOCKS(isa)                                                                                   \
    DECLARE_DOT(isa, q4_0) DECLARE_DOT(isa, q4_1) DECLARE_DOT(isa, q5_0) DECLARE_DOT(isa, q5_1)               \
    DECLARE_DOT(isa, q8_0) DECLARE_DOT(isa, iq4_nl) DECLARE_DOT(isa, q2_k) DECLARE_DOT(isa, q3_k)             \
    DECLARE_DOT(isa, q4_k) DECLARE_DOT(isa, q5_k) DECLARE_DOT(isa, q6_k)
#define DECLARE_CODEBOOKS(isa)                                                                                \
    DECLARE_DOT(isa, iq4_xs) DECLARE_DOT(isa, mxfp4) DECLARE_DOT(isa, tq1_0) DECLARE_DOT(isa, tq2_0)          \
    DECLARE_DOT(isa, iq1_s) DECLARE_DOT(isa, iq1_m) DECLARE_DOT(isa, iq2_xxs) DECLARE_DOT(isa, iq2_xs)        \
    DECLARE_DOT(isa, iq2_s) DECLARE_DOT(isa, iq3_xxs) DECLARE_DOT(isa, iq3_s) DECLARE_DOT(isa, q1_0)          \
    DECLARE_DOT(isa, q2_0)
#define DECLARE_TILES(isa)                                                                                    \
    DECLARE_PANEL(isa, u2_64) DECLARE_PANEL(isa, u2_128) DECLARE_PANEL(isa, u2_256) DECLARE_PANEL(isa, u4_64) \
    DECLARE_PANEL(isa, u4_128) DECLARE_PANEL(isa, u4_256) DECLARE_PANEL(isa, u8_64)                           \
    DECLARE_PANEL(isa, u8_128) DECLARE_PANEL(isa, u8_256)
#define DECLARE_HADAMARD(isa)                                                                                 \
    void isa##_sylvester(const float *x, float *y, int64_t count, int64_t length, const uint8_t *signs,       \
                         int64_t first, float scale);                                                         \
    void isa##_signed_sums(const struct signed_sums *base, int64_t count, const float *x, float *y, float scale);

/* Columns of a table. */
#define BLOCK_DOTS(isa)                                                                                       \
    [FMT_Q4_0] = isa##_dot_q4_0, [FMT_Q4_1] = isa##_dot_q4_1, [FMT_Q5_0] = isa##_dot_q5_0,                    \
    [FMT_Q5_1] = isa##_dot_q5_1, [FMT_Q8_0] = isa##_dot_q8_0, [FMT_IQ4_NL] = isa##_dot_iq4_nl,                \
    [FMT_Q2_K] = isa##_dot_q2_k, [FMT_Q3_K] = isa##_dot_q3_k, [FMT_Q4_K] = isa##_dot_q4_k,                    \
    [FMT_Q5_K] = isa##_dot_q5_k, [FMT_Q6_K] = isa##_dot_q6_k
#define CODEBOOK_DOTS(isa)                                                                                    \
    [FMT_IQ4_XS] = isa##_dot_iq4_xs, [FMT_MXFP4] = isa##_dot_mxfp4, [FMT_TQ1_0] = isa##_dot_tq1_0,            \
    [FMT_TQ2_0] = isa##_dot_tq2_0, [FMT_IQ1_S] = isa##_dot_iq1_s, [FMT_IQ1_M] = isa##_dot_iq1_m,              \
    [FMT_IQ2_XXS] = isa##_dot_iq2_xxs, [FMT_IQ2_XS] = isa##_dot_iq2_xs, [FMT_IQ2_S] = isa##_dot_iq2_s,        \
    [FMT_IQ3_XXS] = isa##_dot_iq3_xxs, [FMT_IQ3_S] = isa##_dot_iq3_s, [FMT_Q1_0] = isa##_dot_q1_0,            \
    [FMT_Q2_0] = isa##_dot_q2_0
#define TILE_PANELS(isa)                                                                                      \
    [FMT_U2_64] = isa##_panel_u2_64, [FMT_U2_128] = isa##_panel_u2_128, [FMT_U2_256] = isa##_panel_u2_256,    \
    [FMT_U4_64] = isa##_panel_u4_64, [FMT_U4_128] = isa##_panel_u4_128, [FMT_U4_256] = isa##_panel_u4_256,    \
    [FMT_U8_64] = isa##_panel_u8_64, [FMT_U8_128] = isa##_panel_u8_128, [FMT_U8_256] = isa##_panel_u8_256

#endif
