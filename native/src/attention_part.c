/* Owns the attention part of a layer: queries, keys and values, the cache, and the projection of the heads. */
#include "attention.h"
#include "norm.h"
#include "pass.h"
#include "rope.h"

static void project_heads(void *argument, int thread, int threads) {
    struct pass *pass = argument;
    int64_t first, last;
    pass_linear(pass, ROLE_Q, pass->rows, pass->session->q, thread, threads, &first, &last);
    if (pass->kv_rows == 0) return;
    pass_linear(pass, ROLE_K, pass->kv_rows, pass->session->k, thread, threads, &first, &last);
    pass_linear(pass, ROLE_V, pass->kv_rows, pass->session->v, thread, threads, &first, &last);
}

/* Norms and turns the heads of x (heads, head_dim), which is one row's. */
static void place_heads(const struct pass *pass, const float *norm, int row, int heads, float *x) {
    const struct hyperparameters *numbers = pass->numbers;
    for (int head = 0; norm && head < heads; head++) {
        float *each = x + (int64_t)head * numbers->head_dim;
        rms_norm(each, norm, NULL, numbers->norm_epsilon, numbers->head_dim, each);
    }
    const float *table = pass->session->rope + (int64_t)(row % pass->n) * numbers->head_dim;
    rope_turn(table, numbers->head_dim / 2, numbers->rope_half, x, heads);
}

static void place_row(struct pass *pass, int row, int thread) {
    struct rondel_session *session = pass->session;
    const struct hyperparameters *numbers = pass->numbers;
    const struct layer *layer = pass->layer;
    const float *gain = parameters_of(pass, row)->q_head_gain;
    float *q = session->q + (int64_t)row * numbers->heads * numbers->head_dim;
    place_heads(pass, layer->q_norm, row, numbers->heads, q);
    for (int64_t i = 0; gain && i < (int64_t)numbers->heads * numbers->head_dim; i++) q[i] *= gain[i / numbers->head_dim];
    pass_rotate(pass, layer->head_rotation, q, numbers->heads, thread);
    if (row >= pass->kv_rows) return;
    int64_t at = (int64_t)row * numbers->kv_heads * numbers->head_dim;
    place_heads(pass, layer->k_norm, row, numbers->kv_heads, session->k + at);
    pass_rotate(pass, layer->head_rotation, session->k + at, numbers->kv_heads, thread);
    kv_store(&session->kv, lane_of(pass, row)->step->slot, pass->position + row % pass->n, session->k + at, session->v + at);
}

/* Items are (head, row), head by head, so that the triangle of prompt lengths is shared out evenly, and that lanes with
 * one slot find its keys and values in a cache. */
static void attend(void *argument, int thread, int threads) {
    struct pass *pass = argument;
    struct rondel_session *session = pass->session;
    const struct hyperparameters *numbers = pass->numbers;
    int64_t first, last;
    int queries_per_key = numbers->heads / numbers->kv_heads;
    pool_share((int64_t)numbers->heads * pass->rows, 1, thread, threads, &first, &last);
    for (int64_t item = first; item < last; item++) {
        int head = (int)(item / pass->rows), row = (int)(item % pass->rows);
        int64_t at = ((int64_t)row * numbers->heads + head) * numbers->head_dim;
        attention_head(&session->kv, lane_of(pass, row)->step->slot, head / queries_per_key,
                       pass->position + row % pass->n + 1, numbers->attention_scale, session->q + at, session->heads + at,
                       session->thread_scratch + (size_t)thread * session->thread_bytes);
    }
}

static void read_heads(struct pass *pass, int row, int thread) {
    pass_input(pass, row, pass->session->heads + (int64_t)row * pass->numbers->heads * pass->numbers->head_dim);
}

void run_attention(struct pass *pass) {
    struct pool *pool = pass->session->pool;
    pass_reads(pass, ROLE_Q, pass->kv_rows > 0 ? 3 : 1);
    pass_each(pass, pass->rows, norm_stream);
    pool_run(pool, project_heads, pass);
    pass_each(pass, pass->rows, place_row);
    pool_run(pool, attend, pass);
    pass_reads(pass, ROLE_OUTPUT, 1);
    pass_each(pass, pass->rows, read_heads);
    pool_run(pool, add_to_stream, pass);
}
