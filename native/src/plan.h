/* A plan: the layer executions of one token in order. Replication (formats.md, replication keys) is resolved in it. */
#ifndef RONDEL_PLAN_H
#define RONDEL_PLAN_H
#include <stdint.h>

#include "activation_rounding.h"
#include "low_rank.h"
#include "model.h"

/* What one execution changes about its layer; NULL is identity (gain 1, bias 0). */
struct parameters {
    float gate[PARTS];             /* of what the part adds to the residual stream */
    const float *norm_gain[PARTS]; /* (width), after the norm's own weight */
    const float *out_gain[PARTS];  /* (width) */
    const float *out_bias[PARTS];  /* (width) */
    const float *q_head_gain;      /* (heads) */
    const float *hidden_gain;      /* (hidden), on silu(gate) * up */
    struct activation_rounding rounding; /* of the inputs of all linears */
    struct low_rank low_rank[ROLES];
};

enum merge { MERGE_NONE, MERGE_SUM, MERGE_MEAN, MERGE_WEIGHTED_SUM };

struct step {
    const struct layer *layer;
    struct parameters parameters;
    int parts;                 /* which run: bits, 1 << part */
    int slot;                  /* KV slot, -1 without attention */
    int writes_kv;             /* 0: attends to the keys that an earlier step of the layer wrote into its slot */
    int member, members;       /* place in its parallel group, and size of the group; 0 of 1 for a serial step */
    int leads;                 /* first of its group with this layer: those with the same layer run with it, at once */
    int leads_slot;            /* first of its group with this KV slot: the others find it in a cache */
    enum merge merge;          /* of the group */
};

struct plan {
    int count, slots, widest; /* steps, KV caches, members of the largest group */
    int rank;                 /* the largest of all low-rank terms */
    struct step *steps;   /* (count) */
    float *values;        /* all parameters of all sets, pointed into by the steps */
};

/* Fills model->base and model->plan (or plan_error); -1 with set_error where the file may not run at all. */
int plans_build(struct rondel_model *model);
void plan_free(struct plan *plan);

/* ---- parameter sets (plan_parameters.c) ---- */
enum { KIND_MAX = 45 };

struct parameter_set {
    const float *value[KIND_MAX + 1]; /* by kind; NULL: not set */
    int rank[KIND_MAX + 1];           /* of low-rank terms */
};

struct parameter_sets {
    uint64_t count;
    struct parameter_set *set; /* (count + 1), set 0 is empty */
    float *values;
};

int parameter_sets_read(struct parameter_sets *sets, const struct rondel_model *model);
/* Copy, then layer, then identity; `pass` >= 1 must have its gates. -1 with set_error. */
int parameters_resolve(struct parameters *parameters, const struct parameter_set *copy, const struct parameter_set *layer,
                       int pass, int parts);

#endif
