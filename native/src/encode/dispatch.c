/* Which copy of the scale searches runs: AVX2's, unless the kernels were told to use none of the processor's extras. */
#include "encode.h"
#include "kernels/kernels.h"

#define DECLARE(isa)                                                                                              \
    void encode_blocks_##isa(const struct encode_task *task, int64_t first, int64_t last);                        \
    void encode_superblocks_##isa(const struct encode_task *task, int64_t first, int64_t last);
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
