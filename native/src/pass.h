/* One forward pass: the rows that its phases work on, and how threads share them.
 *
 * A phase runs on all threads and ends in a barrier; what is done row by row of a matrix is split by its rows, what is
 * done token by token is split by tokens (and needs no threads for one). */
#ifndef RONDEL_PASS_H
#define RONDEL_PASS_H
#include "linear.h"
#include "session.h"

enum { ROW_GRANULE = 16 }; /* rows are shared out in multiples of it, so panels stay whole */

/* One of the executions of a layer that run at once, on a residual stream of its own. */
struct lane {
    const struct step *step;
    float *x; /* (n, width) */
};

struct pass {
    struct rondel_session *session;
    const struct hyperparameters *numbers;
    const int32_t *tokens; /* (n) */
    int n, position;       /* position of the first token */
    /* The part of a layer that runs. Row lane * n + token is one token of one lane: a column of the matrix products. */
    const struct layer *layer;
    enum part part;
    const struct lane *lanes;
    int rows;
    int kv_rows;               /* the first of them: lanes that write keys and values come first */
    struct linear_group group; /* the matrices of the current phase, from the role `reads` on */
    enum role reads;
    int first;                 /* the head computes tokens first .. n-1 */
    float *logits;
    int items;                 /* that `each` is called for */
    void (*each)(struct pass *pass, int item, int thread);
};

/* Calls `each` for 0 .. items-1, shared out among the threads. */
void pass_each(struct pass *pass, int items, void (*each)(struct pass *, int, int));
/* R(x) on n rows of the rotation's site, in place; nothing where there is none. */
void pass_rotate(const struct pass *pass, const rondel_hadamard *rotation, float *x, int n, int thread);

/* The next phases read the linears `role` .. role + count - 1 of the layer. */
void pass_reads(struct pass *pass, enum role role, int count);
/* Prepares one input row of those linears; x may be rounded in place. */
void pass_input(struct pass *pass, int row, float *x);
/* This thread's share of rows [*first, *last) of linear `role`, of the input rows 0 .. rows-1: out[row * stride + ...]. */
void pass_linear(struct pass *pass, enum role role, int rows, float *out, int thread, int threads, int64_t *first,
                 int64_t *last);

/* ---- what attention and FFN have in common: their first and their last phase ---- */
void norm_stream(struct pass *pass, int row, int thread);             /* the normed stream as the next linears' input */
void add_to_stream(void *pass, int thread, int threads);              /* x += gate * (gain o (W y) + bias) */

/* ---- the parts, on pass->lanes (attention_part.c, ffn_part.c) ---- */
void run_attention(struct pass *pass);
void run_ffn(struct pass *pass);

static inline const struct lane *lane_of(const struct pass *pass, int row) { return &pass->lanes[row / pass->n]; }
static inline const struct parameters *parameters_of(const struct pass *pass, int row) {
    return &lane_of(pass, row)->step->parameters;
}
static inline float *stream_of(const struct pass *pass, int row) {
    return lane_of(pass, row)->x + (int64_t)(row % pass->n) * pass->numbers->width;
}

#endif
