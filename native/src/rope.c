/* Owns RoPE (Su et al. 2021, arXiv 2104.09864). */
#include "rope.h"

#include <math.h>

void rope_table(const float *frequencies, int pairs, int position, float magnitude, float *table) {
    for (int i = 0; i < pairs; i++) {
        float angle = (float)position * frequencies[i];
        table[2 * i] = cosf(angle) * magnitude;
        table[2 * i + 1] = sinf(angle) * magnitude;
    }
}

void rope_turn(const float *table, int pairs, int half, float *x, int heads) {
    int step = half ? 1 : 2, distance = half ? pairs : 1;
    for (int head = 0; head < heads; head++, x += 2 * pairs)
        for (int i = 0; i < pairs; i++) {
            float *a = x + i * step, *b = a + distance;
            float cosine = table[2 * i], sine = table[2 * i + 1], first = *a, second = *b;
            *a = first * cosine - second * sine;
            *b = first * sine + second * cosine;
        }
}
