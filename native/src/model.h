/* A model: hyperparameters as facts, tensors bound to fields. Nothing behind this header asks for an architecture. */
#ifndef RONDEL_MODEL_H
#define RONDEL_MODEL_H
#include <stdint.h>

#include "formats.h"
#include "gguf.h"
#include "hadamard.h"

/* y = scale * (W x) + bias */
struct linear {
    struct matrix weights; /* (rows, cols) */
    const float *bias;     /* (rows) or NULL */
    float scale;           /* of the whole tensor, 1 unless the file has NAME.scale */
};

enum part { ATTENTION, FFN, PARTS }; /* of a layer */

/* The linears of a layer; those that read one input stand together. */
enum role {
    ROLE_Q,      /* (heads * head_dim, width) */
    ROLE_K,      /* (kv_heads * head_dim, width) */
    ROLE_V,      /* as K */
    ROLE_OUTPUT, /* (width, heads * head_dim) */
    ROLE_GATE,   /* (hidden, width) */
    ROLE_UP,     /* as gate */
    ROLE_DOWN,   /* (width, hidden) */
    ROLES
};

struct layer {
    const float *norm[PARTS];           /* (width) */
    const float *q_norm, *k_norm;       /* (head_dim), or NULL */
    struct linear linear[ROLES];
    const rondel_hadamard *hidden_rotation; /* online, on the input of `down`; or NULL */
    const rondel_hadamard *head_rotation;   /* online, on each head of q and k behind RoPE; or NULL */
};

struct hyperparameters {
    char architecture[32];
    int32_t layers, width, hidden, heads, kv_heads, head_dim, context, vocabulary;
    float norm_epsilon;
    float attention_scale;  /* of q k, 1 / sqrt(head_dim) unless the file says otherwise */
    float rope_base;
    float rope_scale;       /* positions are multiplied by it: 1 / factor of linear scaling */
    float rope_magnitude;   /* of the turned vectors, 1 unless the file says otherwise */
    int rope_half;          /* pairs (i, i + head_dim / 2), else (2i, 2i + 1) */
    int head_norms;         /* q and k are normed per head */
};

struct plan;
enum { MODEL_WARNINGS = 8 };

struct rondel_model {
    rondel_file *file;
    struct hyperparameters numbers;
    struct matrix embedding;      /* (vocabulary, width) */
    struct linear head;           /* (vocabulary, width); the embedding itself where the file has no output.weight */
    const float *output_norm;     /* (width) */
    const float *rope_factors;    /* (head_dim / 2): angles are divided by them; or NULL */
    struct layer *layer;          /* (layers) */
    const rondel_hadamard *boundary[2]; /* online: behind the lookup, its transpose before the output norm; or NULL */
    rondel_hadamard **rotations;  /* all online ones, (rotation_count) */
    int rotation_count;
    int all_f32;                  /* every matrix is F32 */
    struct plan *base, *plan;     /* without and with replication; `plan` is NULL where it cannot be executed */
    char *plan_error;             /* why `plan` is NULL */
    char *warnings[MODEL_WARNINGS];
    int warning_count;
};

int hyperparameters_read(struct hyperparameters *numbers, const rondel_file *file);
int rotations_read(struct rondel_model *model);
void model_warn(struct rondel_model *model, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
