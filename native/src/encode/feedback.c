/* rondel_encode_feedback: one block of columns, rounded in turn, every error passed on to the columns after it.
 *
 * With H^-1 = U^T U, U upper triangular, rounding column j to q_j leaves e_j = (w_j - q_j) / U_jj; taking e_j U_jk from
 * every later column k keeps the output error at sum e_j^2, the least that is left to have (Frantar et al. 2023, GPTQ;
 * Chee et al. 2023, QuIP: LDLQ). Scales are searched on the given weights first, without the gain of search.h: later
 * columns take out the bias that it is for. But columns that take errors of others spread wider than the weights did, and
 * levels must reach them: every row then tries wider scales, each with its feedback, and keeps those that cost least. */
#include "encode.h"
#include "error.h"
#include "rondel.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#define WIDENINGS 5      /* trials of wider scales; one more finds less than 1 % */
#define FIRST_STEP 1.22f /* the factor of the first */
#define OCTAVE 2.0f      /* MXFP4's, whose scales are powers of two */

EXPORT int32_t rondel_format_feeds_back(const char *format) {
    int index = format_find(format);
    return index >= 0 && encoder_of(index) && format_table[index].columns > 1;
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

static int round_codes(const struct feedback_task *task) {
    if (encoder_of(task->format) == encode_codebooks) return feed_back_codebooks(task);
    feed_back_levels(task);
    return 0;
}

static double cost_of(const struct feedback_task *task, int64_t row) {
    double cost = 0;
    for (int j = 0; j < task->block; j++) {
        double error = task->errors[row * task->block + j];
        cost += error * error;
    }
    return cost;
}

/* A row's search for the factor of its scales: steps go on while they gain, else they turn round and halve, but octaves. */
struct widening {
    float best, step; /* factors */
    double cost;
};

static void widen_row(const float *from, int count, float factor, float most, float *to) {
    for (int i = 0; i < count; i++) {
        to[i] = from[i] * factor;
        if (fabsf(to[i]) > most) to[i] = copysignf(most, to[i]);
    }
}

/* Codes and errors under the best scales found for every row, which are those in `packed` times one factor a row. */
static int round_widening(const struct feedback_task *task) {
    int64_t rows = task->rows;
    int count = scales_of(task->format), octaves = task->format == FMT_MXFP4;
    struct widening *search = malloc((size_t)rows * sizeof *search);
    float *scales = malloc((size_t)rows * (size_t)count * 2 * sizeof *scales), *trial = scales + rows * count;
    int code = search && scales ? 0 : set_error("no memory for the scales of %lld rows", (long long)rows);
    if (!code) read_scales(task, scales);
    for (int pass = 0; pass <= WIDENINGS + 1 && !code; pass++) {
        for (int64_t row = 0; row < rows && pass > 0; row++)
            widen_row(scales + row * count, count, search[row].best * (pass <= WIDENINGS ? search[row].step : 1),
                      octaves ? FLT_MAX : HALF_MAX, trial + row * count);
        if (pass > 0) write_scales(task, trial);
        code = round_codes(task);
        for (int64_t row = 0; row < rows && !code && pass <= WIDENINGS; row++) {
            struct widening *of = &search[row];
            double cost = cost_of(task, row);
            if (pass == 0)
                *of = (struct widening){1, octaves ? OCTAVE : FIRST_STEP, cost};
            else if (cost < of->cost)
                of->best *= of->step, of->cost = cost;
            else
                of->step = 1 / (octaves ? of->step : sqrtf(of->step));
        }
    }
    free(search);
    free(scales);
    return code;
}

EXPORT int32_t rondel_encode_feedback(const char *format, const float *weights, const float *importance, const float *upper,
                                      int64_t rows, int64_t block, void *packed, float *errors) {
    float prepared[MOST_FEEDBACK];
    struct encode_task task = {format_find(format), weights, prepared, rows, block, packed, 1};
    if (task.format < 0) return -1;
    if (!rondel_format_feeds_back(format)) return set_error("rondel does not write %s with error feedback", format);
    int columns = format_table[task.format].columns;
    if (rows < 1 || block != columns || format_bytes(task.format, rows, block) < 0)
        return set_error("error feedback in %s takes rows of one block of %d columns, got %lld rows of %lld columns", format,
                         columns, (long long)rows, (long long)block);
    if (check_weights(format, task.format, weights, rows, block) || check_upper(upper, columns)) return -1;
    if (prepare_importance(importance, block, prepared)) return -1;
    encoder_of(task.format)(&task, 0, rows);
    struct feedback_task feedback = {task.format, weights, upper, rows, columns, packed, errors};
    return round_widening(&feedback) ? -1 : check_errors(&feedback);
}
