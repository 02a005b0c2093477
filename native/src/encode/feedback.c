/* rondel_encode_feedback: one block of columns, rounded in turn, every error passed on to the columns after it.
 *
 * With H^-1 = U^T U, U upper triangular, rounding column j to q_j leaves e_j = (w_j - q_j) / U_jj; taking e_j U_jk from
 * every later column k keeps the output error at sum e_j^2, the least that is left to have (Frantar et al. 2023, GPTQ;
 * Chee et al. 2023, QuIP: LDLQ). Scales are searched on the given weights first and stay; only codes react. They take no
 * gain (search.h): later columns take out the bias that it is for. */
#include "encode.h"
#include "error.h"
#include "rondel.h"

#include <math.h>

EXPORT int32_t rondel_format_feeds_back(const char *format) {
    int index = format_find(format);
    return index >= 0 && encoder_of(index) != NULL && format_table[index].columns > 1;
}

static int check_upper(const float *upper, int block) {
    for (int i = 0; i < block; i++)
        for (int j = i; j < block; j++) {
            float value = upper[i * block + j];
            if (!isfinite(value) || (i == j && !(value > 0)))
                return set_error("the factor of the inverse second moment is %g at row %d, column %d; expected finite numbers, "
                                 "positive on the diagonal", (double)value, i, j);
        }
    return 0;
}

static int check_errors(const struct feedback_task *task) {
    for (int64_t r = 0; r < task->rows; r++)
        for (int c = 0; c < task->block; c++)
            if (!isfinite(task->errors[r * task->block + c]))
                return set_error("error feedback leaves float32's range at row %lld, column %d: the factor of the inverse second "
                                 "moment is too badly conditioned, dampen it", (long long)r, c);
    return 0;
}

EXPORT int32_t rondel_encode_feedback(const char *format, const float *weights, const float *importance, const float *upper,
                                      int64_t rows, int64_t block, int32_t keep_scales, void *packed, float *errors) {
    struct encode_task task = {format_find(format), weights, NULL, rows, block, packed, 1};
    float prepared[MOST_FEEDBACK];
    if (task.format < 0) return -1;
    if (!rondel_format_feeds_back(format)) return set_error("rondel does not write %s with error feedback", format);
    int columns = format_table[task.format].columns;
    if (rows < 1 || block != columns || format_bytes(task.format, rows, block) < 0)
        return set_error("error feedback in %s takes rows of one block of %d columns, got %lld rows of %lld columns", format,
                         columns, (long long)rows, (long long)block);
    if (check_weights(format, task.format, weights, rows, block) || check_upper(upper, columns)) return -1;
    if (!keep_scales) {
        if (prepare_importance(importance, block, prepared)) return -1;
        task.importance = prepared;
        encoder_of(task.format)(&task, 0, rows);
    }
    struct feedback_task feedback = {task.format, weights, upper, rows, columns, packed, errors};
    if (encoder_of(task.format) == encode_codebooks) {
        if (feed_back_codebooks(&feedback)) return -1;
    } else {
        feed_back_levels(&feedback);
    }
    return check_errors(&feedback);
}
