/* F32, F16, BF16: one rounding to nearest even a weight. */
#include "encode.h"
#include "kernels/kernels.h"

#include <string.h>

static uint16_t to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void encode_floats(const struct encode_task *task, int64_t first, int64_t last) {
    int64_t begin = first * task->cols, count = (last - first) * task->cols;
    const float *from = task->weights + begin;
    if (task->format == FMT_F32) {
        memcpy(task->packed + begin * 4, from, (size_t)count * 4);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        uint16_t bits = task->format == FMT_F16 ? float_to_half(from[i]) : to_bfloat(from[i]);
        memcpy(task->packed + (begin + i) * 2, &bits, 2);
    }
}
