/* Error feedback where eight (or four) weights are one codeword: IQ1, IQ2, IQ3. Rows are rounded one after another. */
#include "codewords.h"
#include "error.h"

#include <stdlib.h>

#define CHUNK 32 /* columns with one scale, and one shift in IQ1_S */

/* Takes errors [from, to) times U from columns [to, until). */
INLINE void pass_on(struct workspace *work, const float *upper, int from, int to, int until) {
    for (int k = to; k < until; k += LANES) {
        vec left, u;
        memcpy(&left, work->left + k, sizeof left);
        for (int j = from; j < to; j++) {
            memcpy(&u, upper + j * COLUMNS + k, sizeof u);
            left -= work->errors[j] * u;
        }
        memcpy(work->left + k, &left, sizeof left);
    }
}

INLINE float round_chunk(const struct book book, struct workspace *work, const float *upper, int first, const float *t,
                         int shift) {
    float cost = 0;
    for (int column = first; column < first + CHUNK; column += 8) {
        cost += round_unit(book, work, upper, column / 8, t[column / 16], shift);
        pass_on(work, upper, column, column + 8, first + CHUNK);
    }
    return cost;
}

/* Codes of a row under the scales t of every 16 columns. */
INLINE void round_row(const struct book book, struct workspace *work, const float *upper, const float *t) {
    for (int first = 0; first < COLUMNS; first += CHUNK) {
        if (book.beside == SHIFT_OF_32) {
            float kept[CHUNK];
            memcpy(kept, work->left + first, sizeof kept);
            float down = round_chunk(book, work, upper, first, t, -1);
            memcpy(work->left + first, kept, sizeof kept);
            if (!(round_chunk(book, work, upper, first, t, 1) <= down)) {
                memcpy(work->left + first, kept, sizeof kept);
                round_chunk(book, work, upper, first, t, -1);
            }
        } else {
            round_chunk(book, work, upper, first, t, 0);
        }
        pass_on(work, upper, first, first + CHUNK, COLUMNS);
    }
}

INLINE void round_rows(const struct feedback_task *task, struct workspace *work, const struct book book,
                       void (*unpack)(const void *, struct unpacked_256 *), void (*pack)(const struct codewords *, uint8_t *)) {
    uint8_t *block = task->packed;
    load_levels(&book, work);
    load_factor(&book, work, task->upper);
    for (int64_t row = 0; row < task->rows; row++, block += format_table[task->format].bytes) {
        struct unpacked_256 old;
        float t[16];
        unpack(block, &old);
        memset(&work->codes, 0, sizeof work->codes);
        work->codes.d = float_to_half(old.scale / book.fraction);
        for (int s = 0; s < 16; s++) {
            t[s] = old.scale * old.scales[s];
            work->codes.scale[s * 16 / book.depth] = (uint8_t)(old.scales[s] / 2);
        }
        memcpy(work->left, task->weights + row * COLUMNS, sizeof work->left);
        round_row(book, work, task->upper, t);
        memcpy(task->errors + row * COLUMNS, work->errors, sizeof work->errors);
        pack(&work->codes, block);
    }
}

static void round_task(const struct feedback_task *task, struct workspace *work) {
    switch (task->format) {
    case FMT_IQ1_S: round_rows(task, work, iq1_s, unpack_iq1_s, pack_iq1_s); break;
    case FMT_IQ1_M: round_rows(task, work, iq1_m, unpack_iq1_m, pack_iq1_m); break;
    case FMT_IQ2_XXS: round_rows(task, work, iq2_xxs, unpack_iq2_xxs, pack_iq2_xxs); break;
    case FMT_IQ2_XS: round_rows(task, work, iq2_xs, unpack_iq2_xs, pack_iq2_xs); break;
    case FMT_IQ2_S: round_rows(task, work, iq2_s, unpack_iq2_s, pack_iq2_s); break;
    case FMT_IQ3_XXS: round_rows(task, work, iq3_xxs, unpack_iq3_xxs, pack_iq3_xxs); break;
    default: round_rows(task, work, iq3_s, unpack_iq3_s, pack_iq3_s); break;
    }
}

int THIS_COPY(feed_back_codebooks)(const struct feedback_task *task) {
    struct workspace *work = aligned_alloc(32, (sizeof *work + 31) / 32 * 32);
    if (!work) return set_error("no memory for error feedback");
    round_task(task, work);
    free(work);
    return 0;
}
