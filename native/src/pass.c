/* Owns what the phases of a forward pass share: the split among threads, prepared inputs, the residual streams. */
#include "pass.h"

#include "norm.h"

static void item_share(void *argument, int thread, int threads) {
    struct pass *pass = argument;
    int64_t first, last;
    pool_share(pass->items, 1, thread, threads, &first, &last);
    for (int64_t item = first; item < last; item++) pass->each(pass, (int)item, thread);
}

void pass_each(struct pass *pass, int items, void (*each)(struct pass *, int, int)) {
    pass->each = each;
    pass->items = items;
    if (items == 1) each(pass, 0, 0); /* a barrier would cost more than the work */
    else pool_run(pass->session->pool, item_share, pass);
}

void pass_rotate(const struct pass *pass, const rondel_hadamard *rotation, float *x, int n, int thread) {
    struct rondel_session *session = pass->session;
    float *scratch = (float *)(void *)(session->thread_scratch + (size_t)thread * session->thread_bytes);
    if (rotation) hadamard_rows(rotation, x, n, scratch);
}

void pass_reads(struct pass *pass, enum role role, int count) {
    pass->reads = role;
    pass->group = linear_group_of(pass->layer->linear + role, count, pass->session->packed);
}

/* The reduced input of the low-rank term of a linear of the group. */
static float *reduced_input(const struct pass *pass, int row, int index) {
    return pass->session->reduced + ((int64_t)row * LINEARS_MAX + index) * pass->session->plan->rank;
}

void pass_input(struct pass *pass, int row, float *x) {
    const struct parameters *parameters = parameters_of(pass, row);
    static const int inputs[ROLES] = {[ROLE_Q] = 0, [ROLE_OUTPUT] = 1, [ROLE_GATE] = 2, [ROLE_DOWN] = 3};
    int64_t cols = pass->group.linear[0].weights.cols;
    if (parameters->rounding.bits) {
        struct activation_place place = {(int)(pass->layer - pass->session->model->layer), inputs[pass->reads],
                                         pass->position + row % pass->n};
        round_activations(&parameters->rounding, place, x, cols);
    }
    for (int i = 0; i < pass->group.count; i++)
        low_rank_reduce(&parameters->low_rank[(int)pass->reads + i], x, cols, reduced_input(pass, row, i));
    linear_pack(&pass->group, row, x);
}

void pass_linear(struct pass *pass, enum role role, int rows, float *out, int thread, int threads, int64_t *first,
                 int64_t *last) {
    int index = (int)(role - pass->reads);
    int64_t stride = pass->group.linear[index].weights.rows;
    pool_share(stride, ROW_GRANULE, thread, threads, first, last);
    linear_rows(&pass->group, index, *first, *last, rows, out, stride);
    for (int row = 0; row < rows; row++) {
        const struct low_rank *term = &parameters_of(pass, row)->low_rank[role];
        if (term->rank) low_rank_add(term, reduced_input(pass, row, index), *first, *last, out + row * stride);
    }
}

void norm_stream(struct pass *pass, int row, int thread) {
    float *normed = pass->session->normed + (int64_t)row * pass->numbers->width;
    rms_norm(stream_of(pass, row), pass->layer->norm[pass->part], parameters_of(pass, row)->norm_gain[pass->part],
             pass->numbers->norm_epsilon, pass->numbers->width, normed);
    pass_input(pass, row, normed);
}

void add_to_stream(void *argument, int thread, int threads) {
    struct pass *pass = argument;
    int64_t width = pass->numbers->width, first, last;
    pass_linear(pass, pass->reads, pass->rows, pass->session->update, thread, threads, &first, &last);
    for (int row = 0; row < pass->rows; row++) {
        const struct parameters *parameters = parameters_of(pass, row);
        float gate = parameters->gate[pass->part], *x = stream_of(pass, row);
        const float *gain = parameters->out_gain[pass->part], *bias = parameters->out_bias[pass->part];
        const float *update = pass->session->update + row * width;
        for (int64_t i = first; i < last; i++) {
            float value = update[i];
            if (gain) value *= gain[i];
            if (bias) value += bias[i];
            x[i] += gate * value;
        }
    }
}
