/* Owns the constructions of Hadamard matrices and the plan of a size.
 *
 * H = H_b1 (x) H_b2 (x) ... (x) Sylvester 2^k: the bases are Paley's matrices over primes and squares of primes and
 * Williamson's of order 172, and the plan is the one with the fewest additions an element (sum of the bases + k; ties: fewer
 * bases, then the lexicographically first). */
#include "hadamard.h"

#include <string.h>

#include "error.h"

enum {
    MAX_BASE_ORDER = 256, /* as in quant/hadamard.py; part of the format */
    WILLIAMSON_ORDER = 172,
    WILLIAMSON_CLASSES = 7
};

static int is_prime(int number) {
    if (number < 2) return 0;
    for (int divisor = 2; divisor * divisor <= number; divisor++)
        if (number % divisor == 0) return 0;
    return 1;
}

static int is_power_of_two(int64_t number) { return number > 0 && (number & (number - 1)) == 0; }

/* The prime p with p = number or p^2 = number, else 0. */
static int prime_of_field(int number) {
    if (is_prime(number)) return number;
    for (int p = 2; p * p <= number; p++)
        if (p * p == number && is_prime(p)) return p;
    return 0;
}

/* The size q of the field of Paley I (q = order - 1 = 3 mod 4, prime), else of Paley II (q = order/2 - 1 = 1 mod 4, a prime
 * or the square of one), else 0. */
static int paley_field(int order) {
    if (order % 4 != 0) return 0;
    if (is_prime(order - 1)) return order - 1;
    int half = order / 2 - 1;
    return half % 4 == 1 && prime_of_field(half) ? half : 0;
}

/* Bases are tried in ascending order, so among equal costs and counts the first found is the lexicographically first. */
static void search(int64_t rest, int first, struct hadamard_plan *chosen, struct hadamard_plan *best) {
    if (is_power_of_two(rest)) {
        struct hadamard_plan found = *chosen;
        for (; rest > 1; rest /= 2) found.additions++;
        if (best->additions < 0 || found.additions < best->additions ||
            (found.additions == best->additions && found.count < best->count))
            *best = found;
        return;
    }
    if (chosen->count == HADAMARD_BASES) return;
    for (int order = first; order <= MAX_BASE_ORDER; order += 4) {
        if (rest % order != 0 || is_power_of_two(order) || (order != WILLIAMSON_ORDER && !paley_field(order))) continue;
        chosen->bases[chosen->count++] = order;
        chosen->additions += order;
        search(rest / order, order, chosen, best);
        chosen->additions -= order;
        chosen->count--;
    }
}

/* chi[i] of the residues of a prime: 0 for 0, 1 for squares, -1 for the rest; the least non-square is returned. */
static int characters(int p, signed char *chi) {
    memset(chi, -1, (size_t)p);
    chi[0] = 0;
    for (int i = 1; i < p; i++) chi[i * i % p] = 1;
    int rest = 2;
    while (rest < p && chi[rest] == 1) rest++;
    return rest;
}

/* Q[i][j] = chi(i - j) in GF(q). Of GF(p^2), i stands for a + b sqrt(r), i = p a + b, r the least non-square of p; it is a
 * square where its norm a^2 - r b^2 is one of p. Paley I: I + [[0, 1], [-1, Q]]. Paley II: [[1, -1], [-1, -1]] for the zeros
 * of [[0, 1], [1, Q]], +-[[1, 1], [1, -1]] for the rest. */
static void fill_paley(int order, float *matrix) {
    int q = paley_field(order), p = prime_of_field(q), type1 = q == order - 1;
    signed char chi[MAX_BASE_ORDER];
    int r = characters(p, chi);
    for (int i = 0; i <= q; i++)
        for (int j = 0; j <= q; j++) {
            int core = i == 0 ? j != 0 : type1 ? -1 : 1;
            if (i > 0 && j > 0) {
                int a = (i - 1) / p - (j - 1) / p, b = (i - 1) % p - (j - 1) % p;
                int norm = p == q ? b : a * a - r * b * b;
                core = chi[(norm % p + p) % p];
            }
            if (type1) {
                matrix[i * order + j] = (float)(core + (i == j));
                continue;
            }
            for (int row = 0; row < 2; row++)
                for (int col = 0; col < 2; col++) {
                    int value = i == j ? (row || col ? -1 : 1) : (row && col ? -core : core);
                    matrix[(2 * i + row) * order + 2 * j + col] = (float)value;
                }
        }
}

/* Williamson's array of four symmetric circulant matrices with A^2 + B^2 + C^2 + D^2 = 172 I. Their first rows are 1 at 0 and
 * constant on the seven classes {3^k : k = i mod 7} of 43; bit i of a mask says -1 on class i. */
static void fill_williamson(float *matrix) {
    static const int masks[4] = {7, 25, 44, 77};
    static const signed char array[4][4] = {{1, 1, 1, 1}, {-1, 1, -1, 1}, {-1, 1, 1, -1}, {-1, -1, 1, 1}};
    enum { P = WILLIAMSON_ORDER / 4 };
    signed char first[4][P];
    for (int which = 0; which < 4; which++) {
        first[which][0] = 1;
        for (int k = 0, power = 1; k < P - 1; k++, power = power * 3 % P)
            first[which][power] = masks[which] >> k % WILLIAMSON_CLASSES & 1 ? -1 : 1;
    }
    for (int i = 0; i < WILLIAMSON_ORDER; i++)
        for (int j = 0; j < WILLIAMSON_ORDER; j++) {
            int row = i / P, col = j / P, shift = (i % P - j % P + P) % P;
            matrix[i * WILLIAMSON_ORDER + j] = (float)(array[row][col] * first[row ^ col][shift]);
        }
}

void hadamard_base(int order, float *matrix) {
    if (order == WILLIAMSON_ORDER)
        fill_williamson(matrix);
    else
        fill_paley(order, matrix);
}

int hadamard_plan_make(int64_t size, int64_t block, struct hadamard_plan *plan) {
    if (size < 1 || size > INT32_MAX || block < 1 || block > size || size % block != 0)
        return set_error("a Hadamard block must divide its channels; got blocks of %lld on %lld", (long long)block,
                         (long long)size);
    struct hadamard_plan chosen = {0};
    plan->additions = -1;
    search(block, 4, &chosen, plan);
    if (plan->additions < 0)
        return set_error("there is no Hadamard matrix of order %lld here (Sylvester, Paley and Williamson up to %d); "
                         "the rotation needs smaller blocks", (long long)block, MAX_BASE_ORDER);
    return 0;
}
