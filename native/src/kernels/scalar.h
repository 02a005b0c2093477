/* The scalar table's dot products by kind of format; scalar.c assembles them. */
#ifndef RONDEL_SCALAR_H
#define RONDEL_SCALAR_H
#include <stdint.h>

float scalar_dot_q4_0(const void *row, const void *packed, int64_t cols);
float scalar_dot_q4_1(const void *row, const void *packed, int64_t cols);
float scalar_dot_q5_0(const void *row, const void *packed, int64_t cols);
float scalar_dot_q5_1(const void *row, const void *packed, int64_t cols);
float scalar_dot_q8_0(const void *row, const void *packed, int64_t cols);
float scalar_dot_iq4_nl(const void *row, const void *packed, int64_t cols);
float scalar_dot_q2_k(const void *row, const void *packed, int64_t cols);
float scalar_dot_q3_k(const void *row, const void *packed, int64_t cols);
float scalar_dot_q4_k(const void *row, const void *packed, int64_t cols);
float scalar_dot_q5_k(const void *row, const void *packed, int64_t cols);
float scalar_dot_q6_k(const void *row, const void *packed, int64_t cols);

void scalar_panel_u2_64(const void *panel, const void *packed, int64_t cols, float out[16]);
void scalar_panel_u2_128(const void *panel, const void *packed, int64_t cols, float out[16]);
void scalar_panel_u2_256(const void *panel, const void *packed, int64_t cols, float out[16]);
void scalar_panel_u4_64(const void *panel, const void *packed, int64_t cols, float out[16]);
void scalar_panel_u4_128(const void *panel, const void *packed, int64_t cols, float out[16]);
void scalar_panel_u4_256(const void *panel, const void *packed, int64_t cols, float out[16]);
void scalar_panel_u8_64(const void *panel, const void *packed, int64_t cols, float out[16]);
void scalar_panel_u8_128(const void *panel, const void *packed, int64_t cols, float out[16]);
void scalar_panel_u8_256(const void *panel, const void *packed, int64_t cols, float out[16]);

#endif
