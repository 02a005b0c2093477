/* The Hadamard transform for AVX2: vectors of eight floats. */
#ifdef RONDEL_X86
#include <string.h>

#include "x86.h"

#define LANES 8
#define GROUP 8
typedef __m256 lanes;

static inline lanes load(const float *x) { return _mm256_loadu_ps(x); }
static inline void store(float *y, lanes v) { _mm256_storeu_ps(y, v); }
static inline lanes fused(lanes a, lanes b, lanes c) { return _mm256_fmadd_ps(a, b, c); }
static inline lanes spread(float x) { return _mm256_set1_ps(x); }

/* Minus where bit `shift` + lane of the word at `bits` is set. */
static inline lanes flip(lanes v, const uint8_t *bits, int shift) {
    int32_t word;
    memcpy(&word, bits, sizeof word);
    __m256i up = _mm256_sub_epi32(_mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24), _mm256_set1_epi32(shift));
    __m256i minus = _mm256_and_si256(_mm256_sllv_epi32(_mm256_set1_epi32(word), up), _mm256_set1_epi32(INT32_MIN));
    return _mm256_xor_ps(v, _mm256_castsi256_ps(minus));
}

/* The stage of lanes `distance` apart. The product with 1 or -1 is exact: the sum is rounded once. */
static inline lanes across(lanes v, int distance) {
    if (distance == 4) return fused(v, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), _mm256_permute2f128_ps(v, v, 1));
    if (distance == 2) return fused(v, _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1), _mm256_permute_ps(v, 0x4e));
    return fused(v, _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), _mm256_permute_ps(v, 0xb1));
}

#include "hadamard_lanes.h"
#include "hadamard_sums.h"

void avx2_sylvester(const float *x, float *y, int64_t count, int64_t length, const uint8_t *bits, int64_t first,
                    float scale) {
    sylvester(x, y, count, length, bits, first, scale);
}

/* (8, 8) at x, rows `from` apart, to its transpose at y, rows `to` apart. */
INLINE void transpose(const float *x, int64_t from, float *y, int64_t to) {
    __m256 a[8], b[8];
    for (int k = 0; k < 4; k++) { /* rows k and k + 4 side by side, columns 0..3 and 4..7 */
        a[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x + k * from)), _mm_loadu_ps(x + (k + 4) * from), 1);
        a[k + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x + k * from + 4)),
                                        _mm_loadu_ps(x + (k + 4) * from + 4), 1);
    }
    for (int k = 0; k < 8; k += 4) {
        b[k] = _mm256_unpacklo_ps(a[k], a[k + 1]);
        b[k + 1] = _mm256_unpackhi_ps(a[k], a[k + 1]);
        b[k + 2] = _mm256_unpacklo_ps(a[k + 2], a[k + 3]);
        b[k + 3] = _mm256_unpackhi_ps(a[k + 2], a[k + 3]);
    }
    for (int k = 0; k < 8; k += 4) {
        store(y + k * to, _mm256_shuffle_ps(b[k], b[k + 2], 0x44));
        store(y + (k + 1) * to, _mm256_shuffle_ps(b[k], b[k + 2], 0xee));
        store(y + (k + 2) * to, _mm256_shuffle_ps(b[k + 1], b[k + 3], 0x44));
        store(y + (k + 3) * to, _mm256_shuffle_ps(b[k + 1], b[k + 3], 0xee));
    }
}

/* (rows, cols), each at least 8, to its transpose; the last rows and columns twice where 8 does not divide them. */
static void turn_over(const float *x, int64_t rows, int64_t cols, float *y) {
    for (int64_t row = 0; row < rows; row += 8)
        for (int64_t col = 0; col < cols; col += 8) {
            int64_t i = row + 8 <= rows ? row : rows - 8, j = col + 8 <= cols ? col : cols - 8;
            transpose(x + i * cols + j, cols, y + j * rows + i, rows);
        }
}

/* Fewer rows than 8, with zeros beside them where they are fewer than `beside`. */
static void turn_over_few(const float *x, int64_t rows, int64_t cols, float *y, int64_t beside) {
    for (int64_t j = 0; j < cols; j++)
        for (int64_t i = 0; i < beside; i++) y[j * beside + i] = i < rows ? x[i * cols + j] : 0;
}

enum { BESIDE = 8192 }; /* floats side by side: eight of the largest matrices, of order 256 and inner 4 */

/* inner < 8: some of the count side by side make it wide enough. */
void avx2_narrow_sums(const struct signed_sums *base, int64_t count, const float *x, float *y, float scale,
                      hadamard_sums *wide) {
    float from[BESIDE] __attribute__((aligned(64))), to[BESIDE] __attribute__((aligned(64)));
    int64_t chunk = base->order * base->inner, fill = (LANES + base->inner - 1) / base->inner;
    int64_t beside = count < 8 ? fill : chunk * 16 <= BESIDE && count >= 16 ? 16 : 8;
    struct signed_sums many = *base;
    many.inner *= beside;
    for (int64_t next = 0; count < 8 && next < count; next += beside) {
        int64_t rows = next + beside <= count ? beside : count - next;
        turn_over_few(x + next * chunk, rows, chunk, from, beside);
        wide(&many, 1, from, to, scale);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < chunk; j++) y[(next + i) * chunk + j] = to[j * beside + i];
    }
    for (int64_t next = 0; count >= 8 && next < count; next += beside) {
        int64_t first = next + beside <= count ? next : count - beside;
        turn_over(x + first * chunk, beside, chunk, from);
        wide(&many, 1, from, to, scale);
        turn_over(to, chunk, beside, y + first * chunk);
    }
}

void avx2_signed_sums(const struct signed_sums *base, int64_t count, const float *x, float *y, float scale) {
    if (base->inner < LANES) avx2_narrow_sums(base, count, x, y, scale, wide_sums);
    else wide_sums(base, count, x, y, scale);
}
#endif
