/* The scales of one packed block of columns, read and written in place: d, and where there is one dmin or m. */
#include "encode.h"
#include "kernels/codebooks.h"

#include <math.h>
#include <stddef.h>

#define SPREAD (-1) /* IQ1_M keeps d in the top nibbles of four words */

static const int16_t first_scale[FMT_COUNT] = {
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

/* A stored power of two is 2^(e - 128); 255 is no number. */
#define EXPONENT_BIAS 128
#define MOST_EXPONENT 254

uint8_t mxfp4_exponent(float scale) {
    int exponent;
    float share = frexpf(scale, &exponent); /* in [0.5, 1): below 0.75 the lower power of two is nearer */
    exponent += EXPONENT_BIAS - (share < 0.75f);
    return (uint8_t)(scale <= 0 || exponent < 0 ? 0 : exponent > MOST_EXPONENT ? MOST_EXPONENT : exponent);
}

float storable_scale(int format, float wish) {
    return format == FMT_MXFP4 ? mxfp4_scale(mxfp4_exponent(wish)) : half_to_float(scale_to_half(wish));
}

static uint8_t *block_at(const struct feedback_task *task, int64_t row) {
    const struct format_traits *traits = &format_table[task->format];
    return task->packed + row / traits->rows * traits->bytes;
}

int scales_of(int format) {
    switch (format) {
    case FMT_Q4_1:
    case FMT_Q5_1:
    case FMT_Q2_K:
    case FMT_Q4_K:
    case FMT_Q5_K: return 2; /* the second lies behind the first */
    default: return 1;
    }
}

void read_scales(const struct feedback_task *task, float *scales) {
    int count = scales_of(task->format);
    for (int64_t row = 0; row < task->rows; row++) {
        const uint8_t *block = block_at(task, row);
        for (int i = 0; i < count; i++)
            *scales++ = task->format == FMT_MXFP4 ? mxfp4_scale(*block)
                                                  : half_to_float(read_half(block, place_of(task->format, row) + 2 * i));
    }
}

void write_scales(const struct feedback_task *task, const float *scales) {
    int count = scales_of(task->format);
    for (int64_t row = 0; row < task->rows; row++) {
        uint8_t *block = block_at(task, row);
        for (int i = 0; i < count; i++, scales++)
            if (task->format == FMT_MXFP4)
                *block = mxfp4_exponent(*scales);
            else
                write_half(block, place_of(task->format, row) + 2 * i, float_to_half(*scales));
    }
}
