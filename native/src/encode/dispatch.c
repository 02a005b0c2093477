/* Which copy of the scale searches runs: AVX2's, unless the kernels were told to use none of the processor's extras. */
#include "encode.h"
#include "kernels/kernels.h"

#define DECLARE(isa)                                                                                              \
    void encode_blocks_##isa(const struct encode_task *task, int64_t first, int64_t last);                        \
    void encode_superblocks_##isa(const struct encode_task *task, int64_t first, int64_t last);                   \
    void encode_codebooks_##isa(const struct encode_task *task, int64_t first, int64_t last);                     \
    void encode_tiles_##isa(const struct encode_task *task, int64_t first, int64_t last);                         \
    void feed_back_levels_##isa(const struct feedback_task *task);                                                \
    int feed_back_codebooks_##isa(const struct feedback_task *task);                                              \
    void polish_levels_##isa(const struct polish_task *task);                                                     \
    int polish_codebooks_##isa(const struct polish_task *task);
DECLARE(scalar)
#ifdef RONDEL_X86
DECLARE(avx2)
#define BEST(name) (kernels_current() == &kernels_scalar ? name##_scalar : name##_avx2)
#else
#define BEST(name) name##_scalar
#endif

void encode_blocks(const struct encode_task *task, int64_t first, int64_t last) { BEST(encode_blocks)(task, first, last); }

void encode_superblocks(const struct encode_task *task, int64_t first, int64_t last) {
    BEST(encode_superblocks)(task, first, last);
}

void encode_codebooks(const struct encode_task *task, int64_t first, int64_t last) {
    BEST(encode_codebooks)(task, first, last);
}

void encode_tiles(const struct encode_task *task, int64_t first, int64_t last) { BEST(encode_tiles)(task, first, last); }

void feed_back_levels(const struct feedback_task *task) { BEST(feed_back_levels)(task); }

int feed_back_codebooks(const struct feedback_task *task) { return BEST(feed_back_codebooks)(task); }

void polish_levels(const struct polish_task *task) { BEST(polish_levels)(task); }

int polish_codebooks(const struct polish_task *task) { return BEST(polish_codebooks)(task); }
