/* Owns the step from kernels to linear layers: preparation of inputs, scale and bias. */
#include "linear.h"

#include "kernels/kernels.h"

static enum activation preparation(const struct linear *linear) { return format_table[linear->weights.format].activation; }

struct linear_group linear_group_of(const struct linear *linears, int count, uint8_t *const *buffers) {
    struct linear_group group = {.linear = linears, .count = count};
    for (int i = 0; i < count; i++) {
        int same = 0;
        while (preparation(&linears[same]) != preparation(&linears[i])) same++;
        group.packed[i] = buffers[same];
    }
    return group;
}

void linear_pack(const struct linear_group *group, int index, const float *x) {
    for (int i = 0; i < group->count; i++) {
        int done = 0;
        for (int j = 0; j < i; j++) done |= group->packed[j] == group->packed[i];
        if (done) continue;
        enum activation kind = preparation(&group->linear[i]);
        int64_t cols = group->linear[i].weights.cols;
        kernels_current()->pack[kind](x, cols, group->packed[i] + (size_t)index * activation_bytes(kind, cols));
    }
}

void linear_rows(const struct linear_group *group, int index, int64_t first, int64_t last, int n, float *out,
                 int64_t stride) {
    const struct linear *linear = &group->linear[index];
    matmul_rows(&linear->weights, first, last, group->packed[index], n, out, stride);
    if (linear->scale == 1.0f && !linear->bias) return;
    for (int token = 0; token < n; token++)
        for (int64_t row = first; row < last; row++) {
            float *value = out + token * stride + row;
            *value = *value * linear->scale + (linear->bias ? linear->bias[row] : 0.0f);
        }
}

uint64_t linear_bytes(const struct linear *linear) {
    uint64_t vectors = linear->bias ? 4 * (uint64_t)linear->weights.rows : 0;
    return (uint64_t)format_bytes(linear->weights.format, linear->weights.rows, linear->weights.cols) + vectors;
}
