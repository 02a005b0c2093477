/* A session: one inference timeline on a model, with its KV cache, threads and scratch. */
#ifndef RONDEL_SESSION_H
#define RONDEL_SESSION_H
#include <stdint.h>

#include "kv.h"
#include "linear.h"
#include "model.h"
#include "plan.h"
#include "pool.h"

struct lane;

struct rondel_session {
    const struct rondel_model *model;
    const struct plan *plan;
    struct pool *pool;
    struct kv kv;
    int context, batch, length;
    uint64_t bytes_read, memory;
    /* Scratch for `batch` tokens at a time, in `rows` rows: each token once for each member of the widest group. */
    int rows;
    float *x, *input;               /* (batch, width): the residual stream, and that which a parallel group read */
    float *branches;                /* (rows, width): the streams of its members beyond the first */
    struct lane *lanes;             /* (widest) */
    float *normed;                  /* (rows, width) */
    float *update;                  /* (rows, width): what attention or FFN will add to the residual streams */
    float *q, *heads;               /* (rows, heads * head_dim): queries, and what attention makes of them */
    float *k, *v;                   /* (rows, kv_heads * head_dim) */
    float *gate, *up;               /* (rows, hidden) */
    float *reduced;                 /* (rows, LINEARS_MAX, largest rank): inputs of low-rank terms */
    float *rope;                    /* (batch, head_dim): cosines and sines of each token's position */
    uint8_t *packed[LINEARS_MAX];   /* (rows, prepared for a matmul), one for each kind of preparation */
    uint8_t *thread_scratch;        /* (threads, thread_bytes) */
    size_t thread_bytes;
};

/* Runs tokens[0..n) (n <= batch) at `position`; the caller has checked both. logits: of the last token, or of all. */
void forward(struct rondel_session *session, const int32_t *tokens, int n, int position, int all, float *logits);

#endif
