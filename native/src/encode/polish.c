/* rondel_polish: one sweep of coordinate descent over a block of columns that is rounded already. */
#include "encode.h"
#include "error.h"
#include "rondel.h"

#include <math.h>

static int check_moments(const float *moments, int block) {
    for (int i = 0; i < block; i++)
        for (int j = 0; j < block; j++) {
            float value = moments[i * block + j];
            if (!isfinite(value) || (i == j && !(value > 0)))
                return set_error("the second moment is %g at row %d, column %d; expected finite numbers, positive on the diagonal",
                                 (double)value, i, j);
        }
    return 0;
}

EXPORT int32_t rondel_polish(const char *format, const float *gradient, const float *moments, int64_t rows, int64_t block,
                             void *packed) {
    int index = format_find(format);
    if (index < 0) return -1;
    if (!rondel_format_feeds_back(format)) return set_error("rondel does not polish %s", format);
    int columns = format_table[index].columns;
    if (rows < 1 || block != columns || format_bytes(index, rows, block) < 0)
        return set_error("%s is polished in rows of one block of %d columns, got %lld rows of %lld columns", format, columns,
                         (long long)rows, (long long)block);
    if (check_moments(moments, columns)) return -1;
    for (int64_t i = 0; i < rows * block; i++)
        if (!isfinite(gradient[i]))
            return set_error("the gradient is not finite at row %lld, column %lld", (long long)(i / block), (long long)(i % block));
    struct polish_task task = {index, gradient, moments, rows, columns, packed};
    if (encoder_of(index) == encode_codebooks) return polish_codebooks(&task);
    polish_levels(&task);
    return 0;
}
