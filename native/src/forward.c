/* Owns the forward pass: embed, groups of steps, norm, head.
 *
 * Every token's arithmetic is the same in a batch of any size, beside any other lanes and on any number of threads: the
 * same bits come out. */
#include <string.h>

#include "kernels/kernels.h"
#include "norm.h"
#include "pass.h"
#include "rope.h"

/* ---- groups of steps ---- */

/* The residual stream (n, width) of a member: the first one's is the group's own. */
static float *member_stream(const struct pass *pass, int member) {
    struct rondel_session *session = pass->session;
    size_t size = (size_t)pass->n * (size_t)pass->numbers->width;
    return member == 0 ? session->x : session->branches + (size_t)(member - 1) * size;
}

/* Makes lanes of the members that run this part of this layer, those that write keys and values first. */
static void take_lanes(struct pass *pass, const struct step *group, const struct layer *layer, enum part part) {
    struct lane *lanes = pass->session->lanes;
    int count = 0, writers = 0;
    for (int writes = 1; writes >= 0; writes--) {
        for (int i = 0; i < group->members; i++)
            if (group[i].layer == layer && group[i].writes_kv == writes && group[i].parts >> part & 1)
                lanes[count++] = (struct lane){&group[i], member_stream(pass, i)};
        if (writes) writers = count;
    }
    pass->layer = layer;
    pass->part = part;
    pass->lanes = lanes;
    pass->rows = count * pass->n;
    pass->kv_rows = writers * pass->n;
}

/* Members of a parallel group read the group's input. Those of one layer run at once, as columns of its matrices' products:
 * the weights pass by once. The first member runs on the stream itself and the others add what they changed about the
 * input, so members whose gates are closed leave no trace, not even a rounding. */
static void run_group(struct pass *pass, const struct step *group) {
    struct rondel_session *session = pass->session;
    size_t count = (size_t)pass->n * (size_t)pass->numbers->width;
    float *x = session->x, *input = session->input;
    if (group->members > 1) memcpy(input, x, count * sizeof *x);
    for (int i = 1; i < group->members; i++) memcpy(member_stream(pass, i), input, count * sizeof *x);
    for (int i = 0; i < group->members; i++) {
        if (!group[i].leads) continue;
        take_lanes(pass, group, group[i].layer, ATTENTION);
        if (pass->rows > 0) run_attention(pass);
        take_lanes(pass, group, group[i].layer, FFN);
        if (pass->rows > 0) run_ffn(pass);
    }
    for (int i = 1; i < group->members; i++) {
        const float *branch = member_stream(pass, i);
        for (size_t at = 0; at < count; at++) x[at] += branch[at] - input[at];
    }
    if (group->merge != MERGE_MEAN || group->members == 1) return;
    float share = 1.0f / (float)group->members;
    for (size_t at = 0; at < count; at++) x[at] = input[at] + (x[at] - input[at]) * share;
}

/* ---- ends ---- */

static void embed(struct pass *pass, int token, int thread) {
    struct rondel_session *session = pass->session;
    const struct hyperparameters *numbers = pass->numbers;
    float *x = session->x + (int64_t)token * numbers->width;
    matrix_row(&session->model->embedding, pass->tokens[token], x);
    pass_rotate(pass, session->model->boundary[0], x, 1, thread);
    rope_table(numbers, session->model->rope_factors, pass->position + token,
               session->rope + (int64_t)token * numbers->head_dim);
}

static void norm_output(struct pass *pass, int token, int thread) {
    if (token < pass->first) return;
    int64_t at = (int64_t)token * pass->numbers->width;
    float *x = pass->session->x + at, *normed = pass->session->normed + at;
    pass_rotate(pass, pass->session->model->boundary[1], x, 1, thread);
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
    pass_each(&pass, n, embed);
    for (int i = 0; i < session->plan->count; i += session->plan->steps[i].members) run_group(&pass, &session->plan->steps[i]);
    if (!logits) return;
    pass.group = linear_group_of(&session->model->head, 1, session->packed);
    pass_each(&pass, n, norm_output);
    pool_run(session->pool, project_logits, &pass);
}
