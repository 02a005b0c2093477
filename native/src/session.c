/* Owns sessions: their memory, the bounds of every call, and the count of bytes that an eval reads. */
#include "session.h"

#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "error.h"
#include "kernels/kernels.h"
#include "pass.h"
#include "rondel.h"

enum { CONTEXT_MAX = 1 << 24, BATCH_MAX = 1 << 16 };
enum { LANES_AT_FULL_BATCH = 8 }; /* beyond, batches have fewer tokens, so that scratch does not grow with a plan's copies */

/* Zeroed, aligned for every kernel, counted. */
static void *allocate(struct rondel_session *session, uint64_t bytes) {
    void *memory = NULL;
    bytes = (bytes + 64) / 64 * 64;
    if (bytes > SIZE_MAX / 2 || posix_memalign(&memory, 64, bytes) != 0) return NULL;
    memset(memory, 0, bytes);
    session->memory += bytes;
    return memory;
}

/* Bytes of one prepared row, the largest over all matrices of the model. */
static uint64_t packed_row_bytes(const struct rondel_model *model) {
    uint64_t largest = 0;
    for (int i = -1; i < model->numbers.layers; i++) {
        const struct linear *linears = i < 0 ? &model->head : model->layer[i].linear;
        for (int j = 0; j < (i < 0 ? 1 : ROLES); j++) {
            const struct matrix *weights = &linears[j].weights;
            uint64_t bytes = activation_bytes(format_table[weights->format].activation, weights->cols);
            largest = bytes > largest ? bytes : largest;
        }
    }
    return largest;
}

/* The tokens that a batch has room for, and the rows that they take: one for each member of the widest group. */
static void choose_rows(struct rondel_session *session, int batch) {
    int widest = session->plan->widest;
    session->batch = batch < session->context ? batch : session->context;
    session->rows = session->batch * (widest < LANES_AT_FULL_BATCH ? widest : LANES_AT_FULL_BATCH);
    if (session->rows < widest) session->rows = widest;
    session->batch = session->rows / widest;
}

static int allocate_scratch(struct rondel_session *session) {
    const struct hyperparameters *numbers = &session->model->numbers;
    uint64_t batch = (uint64_t)session->batch, rows = (uint64_t)session->rows, width = (uint64_t)numbers->width;
    uint64_t hidden = (uint64_t)numbers->hidden, head_dim = (uint64_t)numbers->head_dim;
    uint64_t queries = (uint64_t)numbers->heads * head_dim, keys = (uint64_t)numbers->kv_heads * head_dim;
    uint64_t parallel = session->plan->widest > 1; /* a buffer that nobody needs stays empty */
    struct {
        float **field;
        uint64_t size;
    } buffers[] = {{&session->x, batch * width},
                   {&session->input, parallel * batch * width},
                   {&session->branches, parallel * (rows - batch) * width},
                   {&session->normed, rows * width},
                   {&session->update, rows * width},
                   {&session->q, rows * queries},
                   {&session->heads, rows * queries},
                   {&session->k, rows * keys},
                   {&session->v, rows * keys},
                   {&session->gate, rows * hidden},
                   {&session->up, rows * hidden},
                   {&session->reduced, rows * LINEARS_MAX * (uint64_t)session->plan->rank},
                   {&session->rope, batch * head_dim}};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (!(*buffers[i].field = allocate(session, buffers[i].size * sizeof(float)))) return -1;
    if (!(session->lanes = allocate(session, (uint64_t)session->plan->widest * sizeof *session->lanes))) return -1;
    uint64_t row = packed_row_bytes(session->model);
    for (int i = 0; i < LINEARS_MAX; i++)
        if (!(session->packed[i] = allocate(session, rows * row))) return -1;
    uint64_t attention = attention_scratch(session->context, numbers->head_dim);
    uint64_t channels = (uint64_t)(numbers->hidden > numbers->width ? numbers->hidden : numbers->width);
    if (channels < (uint64_t)numbers->head_dim) channels = (uint64_t)numbers->head_dim;
    uint64_t rotation = channels * sizeof(float);
    session->thread_bytes = ((attention > rotation ? attention : rotation) + 63) / 64 * 64;
    session->thread_scratch = allocate(session, session->thread_bytes * (uint64_t)pool_threads(session->pool));
    return session->thread_scratch ? 0 : -1;
}

static int choose_kv(const struct rondel_model *model, const char *kv, int *half) {
    if (strcmp(kv, "auto") == 0) *half = !model->all_f32;
    else if (strcmp(kv, "F16") == 0) *half = 1;
    else if (strcmp(kv, "F32") == 0) *half = 0;
    else return set_error("the KV cache must be auto, F16 or F32, got '%.20s'", kv);
    return 0;
}

static int session_init(struct rondel_session *session, int32_t context, int32_t batch, int32_t threads, const char *kv,
                        int32_t replication) {
    const struct rondel_model *model = session->model;
    int half = 0;
    if (context < 1 || context > CONTEXT_MAX)
        return set_error("the context must be 1 to %d tokens, got %d", CONTEXT_MAX, context);
    if (batch < 1 || batch > BATCH_MAX) return set_error("the batch must be 1 to %d tokens, got %d", BATCH_MAX, batch);
    if (choose_kv(model, kv, &half)) return -1;
    session->plan = replication ? model->plan : model->base;
    if (!session->plan)
        return set_error("%s: run it without replication for the base path",
                         model->plan_error ? model->plan_error : "the replication plan cannot be executed");
    session->context = context;
    choose_rows(session, batch);
    session->pool = pool_new(threads);
    if (!session->pool) return -1;
    if (kv_init(&session->kv, half, session->plan->slots, model->numbers.kv_heads, model->numbers.head_dim, context)) return -1;
    session->memory = kv_memory(&session->kv);
    if (allocate_scratch(session))
        return set_error("out of memory for a session with %d tokens of context and batches of %d", context, session->batch);
    return 0;
}

EXPORT rondel_session *rondel_session_new(const rondel_model *model, int32_t context, int32_t batch, int32_t threads,
                                          const char *kv, int32_t replication) {
    struct rondel_session *session = calloc(1, sizeof *session);
    if (!session) {
        set_error("out of memory");
        return NULL;
    }
    session->model = model;
    if (session_init(session, context, batch, threads, kv, replication) == 0) return session;
    rondel_session_free(session);
    return NULL;
}

EXPORT void rondel_session_free(rondel_session *session) {
    if (!session) return;
    pool_free(session->pool);
    kv_release(&session->kv);
    float *buffers[] = {session->x, session->input, session->branches, session->normed, session->update, session->q,
                        session->heads, session->k, session->v, session->gate, session->up, session->reduced,
                        session->rope};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    for (int i = 0; i < LINEARS_MAX; i++) free(session->packed[i]);
    free(session->lanes);
    free(session->thread_scratch);
    free(session);
}

static uint64_t linears_bytes(const struct layer *layer, enum role first, int count) {
    uint64_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += linear_bytes(&layer->linear[first + i]);
    return bytes;
}

static uint64_t low_rank_bytes(const struct step *step) {
    uint64_t bytes = 0;
    for (int role = 0; role < ROLES; role++) {
        const struct matrix *weights = &step->layer->linear[role].weights;
        bytes += 4 * (uint64_t)step->parameters.low_rank[role].rank * (uint64_t)(weights->rows + weights->cols);
    }
    return bytes;
}

/* What the members of a group with the layer of its member `leader` read: weights once, every KV slot once, and each one's
 * low-rank terms. */
static uint64_t bytes_of_members(const struct rondel_session *session, const struct step *group, int leader, int positions) {
    const struct layer *layer = group[leader].layer;
    uint64_t norm = 4 * (uint64_t)session->model->numbers.width, bytes = 0;
    int parts = 0, writes_kv = 0;
    for (int i = leader; i < group->members; i++) {
        if (group[i].layer != layer) continue;
        parts |= group[i].parts;
        writes_kv |= group[i].writes_kv;
        bytes += low_rank_bytes(&group[i]);
        if (group[i].leads_slot) bytes += kv_bytes_of(&session->kv, positions);
    }
    if (parts >> ATTENTION & 1) bytes += norm + linears_bytes(layer, ROLE_Q, 1) + linears_bytes(layer, ROLE_OUTPUT, 1);
    if (writes_kv) bytes += linears_bytes(layer, ROLE_K, 2);
    if (parts >> FFN & 1) bytes += norm + linears_bytes(layer, ROLE_GATE, 3);
    return bytes;
}

/* What one forward pass over n tokens reads: the weights of every step or parallel group once, and cached positions. */
static uint64_t bytes_of_pass(const struct rondel_session *session, int n, int position, int head) {
    const struct rondel_model *model = session->model;
    uint64_t width = (uint64_t)model->numbers.width;
    uint64_t bytes = linear_bytes(&(struct linear){model->embedding, NULL, 1.0f}) / (uint64_t)model->embedding.rows * (uint64_t)n;
    for (int i = 0; i < session->plan->count; i++) {
        const struct step *step = &session->plan->steps[i];
        if (step->leads) bytes += bytes_of_members(session, step - step->member, step->member, position + n);
    }
    return bytes + (head ? 4 * width + linear_bytes(&model->head) : 0);
}

static int check_eval(const struct rondel_session *session, const int32_t *tokens, int32_t n, int32_t position) {
    if (position < 0 || position > session->length)
        return set_error("cannot evaluate at position %d: the session holds %d tokens", position, session->length);
    if (n < 1) return set_error("an eval needs at least one token, got %d", n);
    if (n > session->context - position)
        return set_error("%d tokens at position %d do not fit into the context of %d tokens", n, position, session->context);
    for (int32_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= session->model->numbers.vocabulary)
            return set_error("token %d is outside the vocabulary of %d tokens", tokens[i], session->model->numbers.vocabulary);
    return 0;
}

EXPORT int32_t rondel_session_eval(rondel_session *session, const int32_t *tokens, int32_t n, int32_t position, int32_t all,
                                   float *logits) {
    if (check_eval(session, tokens, n, position)) return -1;
    session->bytes_read = 0;
    for (int32_t done = 0; done < n;) {
        int count = n - done < session->batch ? n - done : session->batch;
        int wanted = logits && (all || done + count == n);
        float *out = !wanted ? NULL : all ? logits + (int64_t)done * session->model->numbers.vocabulary : logits;
        forward(session, tokens + done, count, position + done, all, out);
        session->bytes_read += bytes_of_pass(session, count, position + done, wanted);
        done += count;
        session->length = position + done;
    }
    return 0;
}

EXPORT int32_t rondel_session_length(const rondel_session *session) { return session->length; }
EXPORT uint64_t rondel_session_bytes_read(const rondel_session *session) { return session->bytes_read; }
EXPORT uint64_t rondel_session_memory(const rondel_session *session) { return session->memory; }
