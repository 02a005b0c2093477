/* Owns the forward pass: embed, steps, norm, head. A phase runs on all threads and ends in a barrier; what is done row
 * by row of a matrix is split by rows, what is done token by token is split by tokens (and needs no threads for one).
 *
 * Every token's arithmetic is the same in a batch of any size and on any number of threads: the same bits come out. */
#include <string.h>

#include "attention.h"
#include "kernels/kernels.h"
#include "linear.h"
#include "norm.h"
#include "rope.h"
#include "session.h"

enum { ROW_GRANULE = 16 }; /* rows are shared out in multiples of it, so panels stay whole */

/* What the phases of one step share. */
struct pass {
    struct rondel_session *session;
    const struct hyperparameters *numbers;
    const struct step *step;
    const int32_t *tokens; /* (n) */
    int n, position;       /* position of the first token */
    float *x;              /* (n, width): the residual stream that the step reads and writes */
    struct linear_group group; /* the matrices of the current phase */
    int first;                 /* the head computes tokens first .. n-1 */
    float *logits;
    void (*each)(struct pass *pass, int token, int thread);
};

static void token_share(void *argument, int thread, int threads) {
    struct pass *pass = argument;
    int64_t first, last;
    pool_share(pass->n, 1, thread, threads, &first, &last);
    for (int64_t token = first; token < last; token++) pass->each(pass, (int)token, thread);
}

static void each_token(struct pass *pass, void (*each)(struct pass *, int, int)) {
    pass->each = each;
    if (pass->n == 1) each(pass, 0, 0); /* a barrier would cost more than the work */
    else pool_run(pass->session->pool, token_share, pass);
}

/* R(x) on n rows of the rotation's site; nothing where there is none. */
static void rotate(const struct pass *pass, const rondel_hadamard *rotation, float *x, int n, int thread) {
    struct rondel_session *session = pass->session;
    float *scratch = (float *)(void *)(session->thread_scratch + (size_t)thread * session->thread_bytes);
    if (rotation) hadamard_rows(rotation, x, n, scratch);
}

static void group_linears(struct pass *pass, const struct linear *a, const struct linear *b, const struct linear *c) {
    const struct linear *linears[LINEARS_MAX] = {a, b, c};
    pass->group = linear_group_of(linears, c ? 3 : b ? 2 : 1, pass->session->packed);
}

/* ---- attention ---- */

static void norm_attention(struct pass *pass, int token, int thread) {
    int64_t at = (int64_t)token * pass->numbers->width;
    float *normed = pass->session->normed + at;
    rms_norm(pass->x + at, pass->step->layer->attn_norm, pass->step->parameters.attn_norm_gain, pass->numbers->norm_epsilon,
             pass->numbers->width, normed);
    linear_pack(&pass->group, token, normed);
}

static void project_heads(void *argument, int thread, int threads) {
    struct pass *pass = argument;
    float *outputs[LINEARS_MAX] = {pass->session->q, pass->session->k, pass->session->v};
    for (int i = 0; i < pass->group.count; i++) {
        int64_t rows = pass->group.linear[i]->weights.rows, first, last;
        pool_share(rows, ROW_GRANULE, thread, threads, &first, &last);
        linear_rows(&pass->group, i, first, last, pass->n, outputs[i], rows);
    }
}

/* Norms and turns the heads of x (heads, head_dim). */
static void place_heads(const struct pass *pass, const float *norm, int token, int heads, float *x) {
    const struct hyperparameters *numbers = pass->numbers;
    for (int head = 0; norm && head < heads; head++) {
        float *row = x + (int64_t)head * numbers->head_dim;
        rms_norm(row, norm, NULL, numbers->norm_epsilon, numbers->head_dim, row);
    }
    const float *table = pass->session->rope + (int64_t)token * numbers->head_dim;
    rope_turn(table, numbers->head_dim / 2, numbers->rope_half, x, heads);
}

static void place_token(struct pass *pass, int token, int thread) {
    struct rondel_session *session = pass->session;
    const struct hyperparameters *numbers = pass->numbers;
    const struct layer *layer = pass->step->layer;
    const float *gain = pass->step->parameters.q_head_gain;
    float *q = session->q + (int64_t)token * numbers->heads * numbers->head_dim;
    place_heads(pass, layer->q_norm, token, numbers->heads, q);
    for (int64_t i = 0; gain && i < (int64_t)numbers->heads * numbers->head_dim; i++) q[i] *= gain[i / numbers->head_dim];
    rotate(pass, pass->step->head_rotation, q, numbers->heads, thread);
    if (!pass->step->writes_kv) return;
    float *k = session->k + (int64_t)token * numbers->kv_heads * numbers->head_dim;
    place_heads(pass, layer->k_norm, token, numbers->kv_heads, k);
    rotate(pass, pass->step->head_rotation, k, numbers->kv_heads, thread);
    kv_store(&session->kv, pass->step->slot, pass->position + token, k,
             session->v + (int64_t)token * numbers->kv_heads * numbers->head_dim);
}

/* Items are (head, token), head by head, so that the triangle of prompt lengths is shared out evenly. */
static void attend(void *argument, int thread, int threads) {
    struct pass *pass = argument;
    struct rondel_session *session = pass->session;
    const struct hyperparameters *numbers = pass->numbers;
    int64_t first, last;
    int queries_per_key = numbers->heads / numbers->kv_heads;
    pool_share((int64_t)numbers->heads * pass->n, 1, thread, threads, &first, &last);
    for (int64_t item = first; item < last; item++) {
        int head = (int)(item / pass->n), token = (int)(item % pass->n);
        int64_t at = ((int64_t)token * numbers->heads + head) * numbers->head_dim;
        attention_head(&session->kv, pass->step->slot, head / queries_per_key, pass->position + token + 1,
                       numbers->attention_scale, session->q + at, session->heads + at,
                       session->thread_scratch + (size_t)thread * session->thread_bytes);
    }
}

static void pack_heads(struct pass *pass, int token, int thread) {
    linear_pack(&pass->group, token,
                pass->session->heads + (int64_t)token * pass->numbers->heads * pass->numbers->head_dim);
}

/* x[row] += gate * (gain[row] * (W y)[row] + bias[row]) for this thread's rows. */
static void add_to_residual(struct pass *pass, float gate, const float *gain, const float *bias, int thread, int threads) {
    int64_t width = pass->numbers->width, first, last;
    float *update = pass->session->update;
    pool_share(width, ROW_GRANULE, thread, threads, &first, &last);
    linear_rows(&pass->group, 0, first, last, pass->n, update, width);
    for (int token = 0; token < pass->n; token++)
        for (int64_t i = token * width + first; i < token * width + last; i++) {
            float value = update[i];
            if (gain) value *= gain[i - token * width];
            if (bias) value += bias[i - token * width];
            pass->x[i] += gate * value;
        }
}

static void project_attention(void *argument, int thread, int threads) {
    struct pass *pass = argument;
    const struct parameters *parameters = &pass->step->parameters;
    add_to_residual(pass, parameters->gate_attn, parameters->attn_out_gain, parameters->attn_out_bias, thread, threads);
}

static void run_attention(struct pass *pass) {
    const struct layer *layer = pass->step->layer;
    struct pool *pool = pass->session->pool;
    if (pass->step->writes_kv) group_linears(pass, &layer->q, &layer->k, &layer->v);
    else group_linears(pass, &layer->q, NULL, NULL);
    each_token(pass, norm_attention);
    pool_run(pool, project_heads, pass);
    each_token(pass, place_token);
    pool_run(pool, attend, pass);
    group_linears(pass, &layer->output, NULL, NULL);
    each_token(pass, pack_heads);
    pool_run(pool, project_attention, pass);
}

/* ---- feed-forward: down(silu(gate) o up) ---- */

static void norm_ffn(struct pass *pass, int token, int thread) {
    int64_t at = (int64_t)token * pass->numbers->width;
    float *normed = pass->session->normed + at;
    rms_norm(pass->x + at, pass->step->layer->ffn_norm, pass->step->parameters.ffn_norm_gain, pass->numbers->norm_epsilon,
             pass->numbers->width, normed);
    linear_pack(&pass->group, token, normed);
}

static void project_hidden(void *argument, int thread, int threads) {
    struct pass *pass = argument;
    float *gate = pass->session->gate, *up = pass->session->up;
    const float *gain = pass->step->parameters.hidden_gain;
    int64_t hidden = pass->numbers->hidden, first, last;
    pool_share(hidden, ROW_GRANULE, thread, threads, &first, &last);
    linear_rows(&pass->group, 0, first, last, pass->n, gate, hidden);
    linear_rows(&pass->group, 1, first, last, pass->n, up, hidden);
    for (int token = 0; token < pass->n; token++) {
        int64_t at = token * hidden;
        kernels_current()->swiglu(gate + at + first, up + at + first, last - first);
        for (int64_t i = first; gain && i < last; i++) gate[at + i] *= gain[i];
    }
}

static void pack_hidden(struct pass *pass, int token, int thread) {
    float *hidden = pass->session->gate + (int64_t)token * pass->numbers->hidden;
    rotate(pass, pass->step->layer->hidden_rotation, hidden, 1, thread);
    linear_pack(&pass->group, token, hidden);
}

static void project_ffn(void *argument, int thread, int threads) {
    struct pass *pass = argument;
    const struct parameters *parameters = &pass->step->parameters;
    add_to_residual(pass, parameters->gate_ffn, parameters->ffn_out_gain, parameters->ffn_out_bias, thread, threads);
}

static void run_ffn(struct pass *pass) {
    const struct layer *layer = pass->step->layer;
    group_linears(pass, &layer->gate, &layer->up, NULL);
    each_token(pass, norm_ffn);
    pool_run(pass->session->pool, project_hidden, pass);
    group_linears(pass, &layer->down, NULL, NULL);
    each_token(pass, pack_hidden);
    pool_run(pass->session->pool, project_ffn, pass);
}

/* ---- steps ---- */

static void run_parts(struct pass *pass) {
    if (pass->step->attention) run_attention(pass);
    if (pass->step->ffn) run_ffn(pass);
}

/* A member of a parallel group reads the group's input and adds what it changed about it. The first member runs on the
 * stream itself, so members whose gates are closed leave no trace, not even a rounding. */
static void run_step(struct pass *pass, float *x) {
    struct rondel_session *session = pass->session;
    size_t count = (size_t)pass->n * (size_t)pass->numbers->width, bytes = count * sizeof *x;
    const struct step *step = pass->step;
    pass->x = x;
    if (step->members > 1 && step->member == 0) memcpy(session->input, x, bytes);
    if (step->member > 0) {
        memcpy(session->branch, session->input, bytes);
        pass->x = session->branch;
    }
    run_parts(pass);
    if (step->member > 0)
        for (size_t i = 0; i < count; i++) x[i] += session->branch[i] - session->input[i];
    if (step->merge == MERGE_MEAN && step->member == step->members - 1 && step->members > 1) {
        float share = 1.0f / (float)step->members;
        for (size_t i = 0; i < count; i++) x[i] = session->input[i] + (x[i] - session->input[i]) * share;
    }
}

/* ---- ends ---- */

static void embed(struct pass *pass, int token, int thread) {
    struct rondel_session *session = pass->session;
    const struct hyperparameters *numbers = pass->numbers;
    float *x = session->x + (int64_t)token * numbers->width;
    matrix_row(&session->model->embedding, pass->tokens[token], x);
    rotate(pass, session->model->boundary[0], x, 1, thread);
    rope_table(numbers, session->model->rope_factors, pass->position + token,
               session->rope + (int64_t)token * numbers->head_dim);
}

static void norm_output(struct pass *pass, int token, int thread) {
    if (token < pass->first) return;
    int64_t at = (int64_t)token * pass->numbers->width;
    float *x = pass->session->x + at, *normed = pass->session->normed + at;
    rotate(pass, pass->session->model->boundary[1], x, 1, thread);
    rms_norm(x, pass->session->model->output_norm, NULL, pass->numbers->norm_epsilon,
             pass->numbers->width, normed);
    linear_pack(&pass->group, token - pass->first, normed);
}

static void project_logits(void *argument, int thread, int threads) {
    struct pass *pass = argument;
    int64_t rows = pass->numbers->vocabulary, first, last;
    pool_share(rows, ROW_GRANULE, thread, threads, &first, &last);
    linear_rows(&pass->group, 0, first, last, pass->n - pass->first, pass->logits, rows);
}

void forward(struct rondel_session *session, const int32_t *tokens, int n, int position, int all, float *logits) {
    struct pass pass = {.session = session, .numbers = &session->model->numbers, .tokens = tokens, .n = n,
                        .position = position, .first = all ? 0 : n - 1, .logits = logits};
    each_token(&pass, embed);
    for (int i = 0; i < session->plan->count; i++) {
        pass.step = &session->plan->steps[i];
        run_step(&pass, session->x);
    }
    if (!logits) return;
    group_linears(&pass, &session->model->head, NULL, NULL);
    each_token(&pass, norm_output);
    pool_run(session->pool, project_logits, &pass);
}
