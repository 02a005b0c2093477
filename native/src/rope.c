/* Owns RoPE (Su et al. 2021, arXiv 2104.09864). */
#include "rope.h"

#include <math.h>

#include "kernels/kernels.h"

/* The angles come one from the other in float, as llama.cpp's do, for the sake of the same bits. At position 131071 and
 * base 500000 they end up to 0.0042 away from the exact ones; a float product for each would be 0.0028 away. */
void rope_table(const struct hyperparameters *numbers, const float *factors, int position, float *table) {
    int pairs = numbers->head_dim / 2;
    float angle = (float)position, step = powf(numbers->rope_base, -2.0f / (float)numbers->head_dim);
    for (int i = 0; i < pairs; i++) {
        float turned = numbers->rope_scale * (factors ? angle / factors[i] : angle);
        table[i] = cosf(turned) * numbers->rope_magnitude;
        table[pairs + i] = sinf(turned) * numbers->rope_magnitude;
        angle *= step;
    }
}

void rope_turn(const float *table, int pairs, int half, float *x, int heads) {
    const struct kernels *kernels = kernels_current();
    int step = half ? 1 : 2, distance = half ? pairs : 1;
    for (int head = 0; head < heads; head++, x += 2 * pairs)
        kernels->turn(x, x + distance, table, table + pairs, pairs, step);
}
