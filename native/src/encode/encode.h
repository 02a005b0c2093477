/* What the encoders share: the task, and the three steps of every format: choose scales, round codes, pack bits.
 *
 * The error that is made least is sum over columns of importance * (weight - decoded weight)^2, with the scales as
 * they are stored; a last gain on the scales then takes out the bias that this leaves (unbiased_gain in search.h). With no
 * importance every column counts the same. */
#ifndef RONDEL_ENCODE_H
#define RONDEL_ENCODE_H
#include "formats.h"

#define HALF_MAX 65504.0f
#define HALF_LEAST 5.9604644775390625e-8f /* 2^-24, the smallest subnormal */

struct encode_task {
    int format;
    const float *weights;    /* (rows, cols), all finite and within encode_limit(format) */
    const float *importance; /* (cols,), positive, mean 1 */
    int64_t rows, cols;
    uint8_t *packed;
    int biased; /* scales stay at least squares, without the last gain */
};

/* The scale as it is stored: nearest half, finite, and not zero unless the wish is. */
uint16_t scale_to_half(float wish);
float storable_scale(int format, float wish); /* the same as a number; of MXFP4 the nearest power of two */
uint8_t mxfp4_exponent(float scale);

/* Encodes rows [first, last) of a task; `first` is a multiple of the format's rows. */
void encode_floats(const struct encode_task *task, int64_t first, int64_t last);      /* F32, F16, BF16 */
void encode_blocks(const struct encode_task *task, int64_t first, int64_t last);      /* blocks of 32 */
void encode_superblocks(const struct encode_task *task, int64_t first, int64_t last); /* K types and IQ4_XS, 256 */
void encode_codebooks(const struct encode_task *task, int64_t first, int64_t last);   /* IQ1, IQ2, IQ3 */
void encode_few_levels(const struct encode_task *task, int64_t first, int64_t last);  /* TQ1_0, TQ2_0, Q2_0, Q1_0, MXFP4 */
void encode_tiles(const struct encode_task *task, int64_t first, int64_t last);       /* U2, U4, U8 */

/* The files with scale searches are compiled for two instruction sets, under names that end in them; dispatch.c calls the
 * better copy. Both write the same bytes. */
#ifndef ENCODE_ISA
#define ENCODE_ISA scalar
#endif
#define COPY_OF(name, isa) name##_##isa
#define COPY_FOR(name, isa) COPY_OF(name, isa)
#define THIS_COPY(name) COPY_FOR(name, ENCODE_ISA)

/* What an encoder is given: which one (NULL: the format is decoded and run, not written), and checks with set_error. */
typedef void (*encode_rows)(const struct encode_task *task, int64_t first, int64_t last);
encode_rows encoder_of(int format);
int check_weights(const char *name, int format, const float *weights, int64_t rows, int64_t cols);
int prepare_importance(const float *from, int64_t cols, float *to); /* NULL: all ones */

/* One block of columns with chosen scales, whose codes are rounded with feedback. */
struct feedback_task {
    int format;
    const float *weights; /* (rows, block) */
    const float *upper;   /* (block, block), U on and above the diagonal */
    int64_t rows;
    int block;
    uint8_t *packed;      /* scales are read, codes written */
    float *errors;        /* (rows, block) */
};
#define MOST_FEEDBACK 256 /* columns of the largest block */

/* The scales of its packed block, (rows, scales_of(format)), as they are stored; written ones are rounded. */
int scales_of(int format); /* 1 (d) or 2 (d, dmin or m) */
void read_scales(const struct feedback_task *task, float *scales);
void write_scales(const struct feedback_task *task, const float *scales);

void feed_back_levels(const struct feedback_task *task);    /* every column by itself */
int feed_back_codebooks(const struct feedback_task *task);  /* codeword after codeword; -1: no memory */

/* One block of columns that is rounded already, and whose codes and scales are moved for the better. */
struct polish_task {
    int format;
    const float *gradient; /* (rows, block): (weights - decoded) times the whole second moment, at these columns */
    const float *moments;  /* (block, block): the second moment among these columns */
    int64_t rows;
    int block;
    uint8_t *packed;
};
void polish_levels(const struct polish_task *task);
int polish_codebooks(const struct polish_task *task); /* -1: no memory */

/* Bits of one block from its codes, in column order, and its stored scales. */
void pack_q8_0(const uint8_t *codes, uint16_t d, uint8_t *block);
void pack_nibbles(const uint8_t *codes, uint8_t *block);                   /* 32 codes of 4 bits: 16 bytes */
void pack_fifth_bits(const uint8_t *codes, uint8_t *bits);                 /* bit 4 of 32 codes: 4 bytes */

void pack_block(int format, const uint8_t *codes, float scale, float offset, uint8_t *block);

/* Codes -1, 0, .. as 0, 1, .. (Q1_0: 0 and 1) of one block of TQ1_0, TQ2_0, Q2_0 or Q1_0. */
void pack_few_levels(int format, const uint8_t *codes, uint16_t d, uint8_t *block);

/* A panel of 16 rows of U2, U4 or U8 without its scales, or one row of it; returns the end of what it wrote. */
#define PANEL 16
int tile_bits(int format);
void pack_tile_row(const uint8_t *codes, int columns, int bits, int row, uint8_t *panel);
uint8_t *pack_tiles(uint8_t (*codes)[PANEL], int columns, int bits, uint8_t *to);

/* A K type's superblock between choice and packing: scales and mins are small whole numbers. */
struct superblock {
    uint16_t d, dmin;
    int8_t scale[16];
    uint8_t min[16];
    uint8_t codes[256];
};
void pack_q2_k(const struct superblock *from, uint8_t *block);
void pack_q3_k(const struct superblock *from, uint8_t *block);
void pack_q4_k(const struct superblock *from, uint8_t *block);
void pack_q5_k(const struct superblock *from, uint8_t *block);
void pack_q6_k(const struct superblock *from, uint8_t *block);
void pack_iq4_xs(const struct superblock *from, uint8_t *block);

/* A codebook type's 256 columns between choice and packing; unused fields are zero. */
struct codewords {
    uint16_t d;
    uint8_t scale[16];  /* s of every sub-block */
    uint16_t index[64]; /* of every codeword of eight (or four) weights */
    uint8_t signs[32];  /* bit j: weight j of eight is negative */
    uint8_t down[32];   /* IQ1: eight weights are shifted down, not up */
};
void pack_iq1_s(const struct codewords *from, uint8_t *block);
void pack_iq1_m(const struct codewords *from, uint8_t *block);
void pack_iq2_xxs(const struct codewords *from, uint8_t *block);
void pack_iq2_xs(const struct codewords *from, uint8_t *block);
void pack_iq2_s(const struct codewords *from, uint8_t *block);
void pack_iq3_xxs(const struct codewords *from, uint8_t *block);
void pack_iq3_s(const struct codewords *from, uint8_t *block);

#endif
