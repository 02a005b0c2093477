/* The signed sums of a Hadamard matrix's bases on vectors of LANES floats: included behind hadamard_lanes.h. All eight sums of
 * four inputs take 12 additions, then a row takes one a group: order / 4 + 3 additions an element. Bases of the common sizes are
 * written out, so that a term is one instruction; the others follow the table of terms. */

enum { TILE = 32 / LANES }; /* vectors of columns that share the address of a term */

#define UNROLL _Pragma("GCC unroll 64")

/* Is M[i][j] = -1? As hadamard_base fills the orders that are written out; known where this is compiled. */
INLINE int is_minus(int order, int i, int j) {
    const uint64_t squares_11 = 0x23a, squares_13 = 0x161a, squares_19 = 0x30af2, squares_43 = 0x35883a3ee52; /* as bits */
    uint64_t squares = order == 12 ? squares_11 : order == 20 ? squares_19 : order == 28 ? squares_13 : squares_43;
    int q = order == 28 ? 13 : order - 1;
    int row = order == 28 ? i / 2 : i, col = order == 28 ? j / 2 : j;
    int core = row == 0 || col == 0 || squares >> (row - col + q) % q & 1; /* +1 beside the diagonal */
    if (order == 28) return row == col ? i % 2 || j % 2 : (i % 2 && j % 2) == core;
    return i > 0 && (j == 0 || (i != j && !core));
}

/* The eight sums of four inputs, at their choices. */
INLINE void combine(lanes a, lanes b, lanes c, lanes d, lanes sums[8]) {
    lanes ab = a + b, cd = c + d, a_b = a - b, c_d = c - d;
    sums[0] = ab + cd;
    sums[SUM_CD] = ab - cd;
    sums[SUM_D] = ab + c_d;
    sums[SUM_D + SUM_CD] = ab - c_d;
    sums[SUM_B] = a_b + cd;
    sums[SUM_B + SUM_CD] = a_b - cd;
    sums[SUM_B + SUM_D] = a_b + c_d;
    sums[SUM_B + SUM_D + SUM_CD] = a_b - c_d;
}

/* One vector of columns of a base that is known where this is compiled. */
INLINE void known_column(int order, int64_t inner, const float *x, float *y, float scale, int transposed) {
    lanes sums[11][8];
    UNROLL for (int g = 0; g < order / 4; g++) {
        const float *four = x + 4 * g * inner;
        combine(load(four), load(four + inner), load(four + 2 * inner), load(four + 3 * inner), sums[g]);
    }
    UNROLL for (int i = 0; i < order; i++) {
        lanes sum = spread(0);
        int first = transposed ? is_minus(order, 0, i) : is_minus(order, i, 0);
        UNROLL for (int g = 0; g < order / 4; g++) {
            int minus[4];
            UNROLL for (int k = 0; k < 4; k++)
                minus[k] = transposed ? is_minus(order, 4 * g + k, i) : is_minus(order, i, 4 * g + k);
            lanes term = sums[g][SUM_B * (minus[0] != minus[1]) + SUM_D * (minus[2] != minus[3]) +
                                 SUM_CD * (minus[0] != minus[2])];
            if (g == 0) sum = term;
            else if (minus[0] != first) sum -= term;
            else sum += term;
        }
        store(y + i * inner, sum * spread(first ? -scale : scale));
    }
}

/* Columns in vectors of LANES, the last of which overlaps the one before where LANES does not divide them. */
#define KNOWN_BASE(name, order, transposed)                                                        \
    static void name(int64_t inner, const float *x, float *y, float scale) {                       \
        for (int64_t column = 0; column < inner; column += LANES) {                                \
            int64_t at = column + LANES <= inner ? column : inner - LANES;                         \
            known_column(order, inner, x + at, y + at, scale, transposed);                         \
        }                                                                                          \
    }
KNOWN_BASE(base_12, 12, 0)
KNOWN_BASE(base_12_transposed, 12, 1)
KNOWN_BASE(base_20, 20, 0)
KNOWN_BASE(base_20_transposed, 20, 1)
KNOWN_BASE(base_28, 28, 0) /* symmetric */
KNOWN_BASE(base_44, 44, 0)
KNOWN_BASE(base_44_transposed, 44, 1)

/* All sums of some groups for a tile of columns, negated ones too: a term is then one addition whatever its sign. */
INLINE void fill_sums(int groups, int64_t inner, const float *x, float *sums, int vectors) {
    for (int g = 0; g < groups; g++, x += 4 * inner, sums += 16 * vectors * LANES)
        for (int v = 0; v < vectors; v++) {
            const float *four = x + v * LANES;
            lanes positive[8];
            combine(load(four), load(four + inner), load(four + 2 * inner), load(four + 3 * inner), positive);
            for (int choice = 0; choice < 8; choice++) {
                store(sums + (choice * vectors + v) * LANES, positive[choice]);
                store(sums + ((choice + SUM_MINUS) * vectors + v) * LANES, -positive[choice]);
            }
        }
}

/* Every row's terms of `groups` groups from `first` on, added to those before them. */
INLINE void add_terms(const struct signed_sums *base, int first, int groups, const float *sums, float *y, float scale,
                      int vectors) {
    int all = base->order / 4, last = first + groups == all;
    const uint16_t *terms = base->terms + first * base->order;
    for (int row = 0; row < base->order; row++, terms += groups, y += base->inner) {
        lanes sum[TILE];
        for (int v = 0; v < vectors; v++) sum[v] = first ? load(y + v * LANES) : spread(0);
        UNROLL for (int g = 0; g < groups; g++) {
            const char *term = (const char *)sums + (size_t)terms[g] * (vectors * LANES / 4); /* a factor of an address */
            __asm__("" : "+r"(term)); /* one address for all vectors: an indexed addition would take two instructions */
            for (int v = 0; v < vectors; v++) {
                lanes value = load((const float *)(const void *)term + v * LANES);
                if (first || g) sum[v] += value;
                else sum[v] = value;
            }
        }
        for (int v = 0; v < vectors; v++) store(y + v * LANES, sum[v] * spread(last ? scale * base->signs[row] : 1));
    }
}

#define WITH_GROUPS(groups)                                                               \
    case groups:                                                                          \
        if (first) add_terms(base, first, groups, sums, y, scale, vectors);               \
        else add_terms(base, 0, groups, sums, y, scale, vectors);                         \
        break

INLINE void tile(const struct signed_sums *base, const float *x, float *y, float scale, int vectors) {
    float sums[SUM_GROUPS * 16 * TILE * LANES] __attribute__((aligned(64)));
    int groups = base->order / 4;
    for (int first = 0; first < groups; first += SUM_GROUPS) {
        int many = groups - first < SUM_GROUPS ? groups - first : SUM_GROUPS;
        fill_sums(many, base->inner, x + 4 * first * base->inner, sums, vectors);
        switch (many) {
            WITH_GROUPS(1);
            WITH_GROUPS(2);
            WITH_GROUPS(3);
            WITH_GROUPS(4);
            WITH_GROUPS(5);
            WITH_GROUPS(6);
            WITH_GROUPS(7);
            WITH_GROUPS(8);
        }
    }
}

static void any_base(const struct signed_sums *base, const float *x, float *y, float scale) {
    for (int64_t column = 0; column < base->inner;) {
        int many = column + TILE * LANES <= base->inner;
        if (!many && column + LANES > base->inner) column = base->inner - LANES;
        if (many) tile(base, x + column, y + column, scale, TILE);
        else tile(base, x + column, y + column, scale, 1);
        column += many ? TILE * LANES : LANES;
    }
}

/* inner >= LANES */
static void wide_sums(const struct signed_sums *base, int64_t count, const float *x, float *y, float scale) {
    int64_t inner = base->inner, chunk = base->order * inner;
    for (; count > 0; count--, x += chunk, y += chunk) {
        if (base->order == 12) (base->transposed ? base_12_transposed : base_12)(inner, x, y, scale);
        else if (base->order == 20) (base->transposed ? base_20_transposed : base_20)(inner, x, y, scale);
        else if (base->order == 28) base_28(inner, x, y, scale);
        else if (base->order == 44) (base->transposed ? base_44_transposed : base_44)(inner, x, y, scale);
        else any_base(base, x, y, scale);
    }
}
