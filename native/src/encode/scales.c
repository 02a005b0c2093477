/* The half-precision scales of packed weights, read and written in place: d, and where there is one dmin or m. */
#include "error.h"
#include "kernels/codebooks.h"
#include "rondel.h"

#include <math.h>
#include <stddef.h>

#define NONE (-1)
#define SPREAD (-2) /* IQ1_M keeps d in the top nibbles of four words */

static const int16_t first_scale[FMT_COUNT] = {
    [FMT_F32] = NONE,
    [FMT_F16] = NONE,
    [FMT_BF16] = NONE,
    [FMT_MXFP4] = NONE,
    [FMT_IQ1_M] = SPREAD,
    [FMT_Q2_K] = offsetof(struct q2_k, scale),
    [FMT_Q3_K] = offsetof(struct q3_k, scale),
    [FMT_Q6_K] = offsetof(struct q6_k, scale),
    [FMT_TQ1_0] = offsetof(struct tq1_0, scale),
    [FMT_TQ2_0] = offsetof(struct tq2_0, scale),
}; /* of the others d comes first */

/* Where a scale lies in a block; for tiles in a panel's group, by row. */
static int place_of(int format, int64_t row) {
    const struct format_traits *traits = &format_table[format];
    if (traits->rows > 1) return traits->bytes - 2 * traits->rows + 2 * (int)(row % traits->rows);
    return first_scale[format];
}

static int scales_of(int format) {
    switch (format) {
    case FMT_Q4_1:
    case FMT_Q5_1:
    case FMT_Q2_K:
    case FMT_Q4_K:
    case FMT_Q5_K: return 2; /* the second lies behind the first */
    default: return place_of(format, 0) != NONE;
    }
}

static uint16_t read_half(const uint8_t *block, int place) {
    if (place != SPREAD) return word_at(block + place);
    const struct iq1_m *q = (const struct iq1_m *)block;
    uint16_t half = 0;
    for (int i = 0; i < 4; i++) half |= (uint16_t)(q->scales[2 * i + 1] >> 4 << 4 * i);
    return half;
}

static void write_half(uint8_t *block, int place, uint16_t half) {
    if (place != SPREAD) {
        block[place] = (uint8_t)half;
        block[place + 1] = (uint8_t)(half >> 8);
        return;
    }
    struct iq1_m *q = (struct iq1_m *)block;
    for (int i = 0; i < 4; i++) q->scales[2 * i + 1] = (uint8_t)((q->scales[2 * i + 1] & 15) | (half >> 4 * i & 15) << 4);
}

EXPORT int32_t rondel_format_scales(const char *format) {
    int index = format_find(format);
    return index < 0 ? -1 : scales_of(index);
}

/* The block of a row and column block of a packed matrix. */
static int64_t block_at(int format, int64_t blocks, int64_t row, int64_t block) {
    const struct format_traits *traits = &format_table[format];
    return (row / traits->rows * blocks + block) * traits->bytes;
}

static int check_scales(const char *format, int64_t rows, int64_t cols) {
    int index = format_find(format);
    if (index < 0 || rondel_format_bytes(format, rows, cols) < 0) return -1;
    return scales_of(index) ? index : set_error("%s has no half-precision scales", format);
}

EXPORT int32_t rondel_read_scales(const char *format, const void *packed, int64_t rows, int64_t cols, float *scales) {
    int index = check_scales(format, rows, cols);
    if (index < 0) return -1;
    int count = scales_of(index);
    int64_t blocks = cols / format_table[index].columns;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t block = 0; block < blocks; block++)
            for (int i = 0; i < count; i++)
                *scales++ = half_to_float(
                    read_half((const uint8_t *)packed + block_at(index, blocks, row, block), place_of(index, row) + 2 * i));
    return 0;
}

EXPORT int32_t rondel_write_scales(const char *format, const float *scales, int64_t rows, int64_t cols, void *packed) {
    int index = check_scales(format, rows, cols);
    if (index < 0) return -1;
    int count = scales_of(index);
    int64_t blocks = cols / format_table[index].columns;
    for (int64_t i = 0; i < rows * blocks * count; i++)
        if (!isfinite(half_to_float(float_to_half(scales[i]))))
            return set_error("the scale of row %lld, block %lld is %g, which no half-precision number holds",
                             (long long)(i / count / blocks), (long long)(i / count % blocks), (double)scales[i]);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t block = 0; block < blocks; block++)
            for (int i = 0; i < count; i++)
                write_half((uint8_t *)packed + block_at(index, blocks, row, block), place_of(index, row) + 2 * i,
                           float_to_half(*scales++));
    return 0;
}
