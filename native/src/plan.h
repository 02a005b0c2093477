/* A plan: the layer executions of one token in order. Replication (formats.md, replication keys) is resolved in it. */
#ifndef RONDEL_PLAN_H
#define RONDEL_PLAN_H
#include <stdint.h>

#include "model.h"

/* What one execution changes about its layer; NULL is identity (gain 1, bias 0). */
struct parameters {
    float gate_attn, gate_ffn;            /* of what attention and FFN add to the residual stream */
    const float *attn_norm_gain, *ffn_norm_gain; /* (width), after the norm's own weight */
    const float *attn_out_gain, *ffn_out_gain;   /* (width) */
    const float *attn_out_bias, *ffn_out_bias;   /* (width) */
    const float *q_head_gain;             /* (heads) */
    const float *hidden_gain;             /* (hidden), on silu(gate) * up */
};

enum merge { MERGE_NONE, MERGE_SUM, MERGE_MEAN, MERGE_WEIGHTED_SUM };

struct step {
    const struct layer *layer;
    struct parameters parameters;
    int attention, ffn;        /* which parts run */
    int slot;                  /* KV slot, -1 without attention */
    const rondel_hadamard *head_rotation; /* of the keys in the slot, so of the queries too; or NULL */
    int writes_kv;             /* 0: attends to the keys that an earlier step wrote into its slot */
    int member, members;       /* place in its parallel group, and size of the group; 0 of 1 for a serial step */
    enum merge merge;          /* of the group */
};

struct plan {
    int count, slots;
    struct step *steps;   /* (count) */
    float *values;        /* all parameters of all sets, pointed into by the steps */
};

/* Fills model->base and model->plan (or plan_error); -1 with set_error where the file may not run at all. */
int plans_build(struct rondel_model *model);
void plan_free(struct plan *plan);

/* ---- parameter sets (plan_parameters.c) ---- */
enum { KIND_MAX = 10 }; /* kinds 1..10 are executed */

struct parameter_set {
    const float *value[KIND_MAX + 1]; /* by kind; NULL: not set */
};

struct parameter_sets {
    uint64_t count;
    struct parameter_set *set; /* (count + 1), set 0 is empty */
    float *values;
};

int parameter_sets_read(struct parameter_sets *sets, const struct rondel_model *model);
/* Copy, then layer, then identity; `pass` >= 1 must have its gates. -1 with set_error. */
int parameters_resolve(struct parameters *parameters, const struct parameter_set *copy, const struct parameter_set *layer,
                       int pass, int attention, int ffn);

#endif
