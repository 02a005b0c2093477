/* Owns a loaded model: binds tensor names to fields once and checks every shape; afterwards nobody looks up a string. */
#include "model.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "plan.h"

/* The binding of one model: which tensors of the file have been claimed. */
struct binder {
    struct rondel_model *model;
    const char *path;
    uint8_t *claimed; /* (tensors) */
};

static const struct gguf_tensor *claim(struct binder *binder, const char *name) {
    const struct gguf_tensor *tensor = gguf_tensor_find(binder->model->file, name);
    if (tensor) binder->claimed[tensor - binder->model->file->tensors] = 1;
    return tensor;
}

static int missing(const struct binder *binder, const char *name) {
    return set_error("%s: the tensor %s is missing, which a %s model needs", binder->path, name,
                     binder->model->numbers.architecture);
}

/* A vector of floats in place, or NULL without an error where it is absent and not required. */
static int bind_vector(struct binder *binder, const char *name, int64_t size, int required, const float **vector) {
    const struct gguf_tensor *tensor = claim(binder, name);
    *vector = NULL;
    if (!tensor) return required ? missing(binder, name) : 0;
    if (tensor->format != FMT_F32)
        return set_error("%s: tensor %s has the type %s, expected F32", binder->path, name, tensor->format_name);
    if (tensor->shape[0] != (uint64_t)size || tensor->bytes != 4 * (uint64_t)size)
        return set_error("%s: tensor %s has %llu values, expected %lld", binder->path, name,
                         (unsigned long long)tensor->bytes / 4, (long long)size);
    *vector = (const float *)(const void *)tensor->data; /* aligned: general.alignment is at least 8 */
    return 0;
}

/* `rows` < 0: whatever the file has. */
static int bind_matrix(struct binder *binder, const char *name, int64_t rows, int64_t cols, struct matrix *matrix) {
    const struct gguf_tensor *tensor = claim(binder, name);
    if (!tensor) return missing(binder, name);
    if (tensor->format < 0)
        return set_error("%s: tensor %s has the type %s, which this runtime cannot compute with", binder->path, name,
                         tensor->format_name);
    if (rows < 0) rows = (int64_t)tensor->shape[1];
    if (tensor->shape[0] != (uint64_t)cols || tensor->shape[1] != (uint64_t)rows || tensor->shape[2] != 1 ||
        tensor->shape[3] != 1)
        return set_error("%s: tensor %s has the shape (%llu, %llu), expected (%lld, %lld)", binder->path, name,
                         (unsigned long long)tensor->shape[1], (unsigned long long)tensor->shape[0], (long long)rows,
                         (long long)cols);
    *matrix = (struct matrix){tensor->data, tensor->format, rows, cols};
    if (tensor->format != FMT_F32) binder->model->all_f32 = 0;
    return 0;
}

/* The tensors PREFIX.weight, .bias and .scale. */
static int bind_linear(struct binder *binder, const char *prefix, int64_t rows, int64_t cols, struct linear *linear) {
    char name[GGUF_NAME_BYTES + 16];
    const float *scale;
    linear->scale = 1.0f;
    snprintf(name, sizeof name, "%s.weight", prefix);
    if (bind_matrix(binder, name, rows, cols, &linear->weights)) return -1;
    snprintf(name, sizeof name, "%s.bias", prefix);
    if (bind_vector(binder, name, linear->weights.rows, 0, &linear->bias)) return -1;
    snprintf(name, sizeof name, "%s.scale", prefix);
    if (bind_vector(binder, name, 1, 0, &scale)) return -1;
    if (scale) linear->scale = *scale;
    return 0;
}

static const char *layer_tensor(int index, const char *role, char name[GGUF_NAME_BYTES]) {
    snprintf(name, GGUF_NAME_BYTES, "blk.%d.%s", index, role);
    return name;
}

static int bind_linears(struct binder *binder, int index, struct linear linear[ROLES]) {
    const struct hyperparameters *numbers = &binder->model->numbers;
    int64_t width = numbers->width, hidden = numbers->hidden, head_dim = numbers->head_dim;
    int64_t queries = numbers->heads * head_dim, keys = numbers->kv_heads * head_dim;
    struct {
        const char *name;
        int64_t rows, cols;
    } roles[ROLES] = {[ROLE_Q] = {"attn_q", queries, width},          [ROLE_K] = {"attn_k", keys, width},
                      [ROLE_V] = {"attn_v", keys, width},             [ROLE_OUTPUT] = {"attn_output", width, queries},
                      [ROLE_GATE] = {"ffn_gate", hidden, width},      [ROLE_UP] = {"ffn_up", hidden, width},
                      [ROLE_DOWN] = {"ffn_down", width, hidden}};
    char name[GGUF_NAME_BYTES];
    for (int role = 0; role < ROLES; role++)
        if (bind_linear(binder, layer_tensor(index, roles[role].name, name), roles[role].rows, roles[role].cols, &linear[role]))
            return -1;
    return 0;
}

static int bind_layer(struct binder *binder, int index, struct layer *layer) {
    const struct hyperparameters *numbers = &binder->model->numbers;
    int64_t width = numbers->width, head_dim = numbers->head_dim;
    int norms = numbers->head_norms;
    char name[GGUF_NAME_BYTES];
    return bind_vector(binder, layer_tensor(index, "attn_norm.weight", name), width, 1, &layer->norm[ATTENTION]) ||
           bind_vector(binder, layer_tensor(index, "ffn_norm.weight", name), width, 1, &layer->norm[FFN]) ||
           (norms && bind_vector(binder, layer_tensor(index, "attn_q_norm.weight", name), head_dim, 1, &layer->q_norm)) ||
           (norms && bind_vector(binder, layer_tensor(index, "attn_k_norm.weight", name), head_dim, 1, &layer->k_norm)) ||
           bind_linears(binder, index, layer->linear);
}

static int bind_rope(struct binder *binder) {
    struct rondel_model *model = binder->model;
    int pairs = model->numbers.head_dim / 2;
    if (bind_vector(binder, "rope_freqs.weight", pairs, 0, &model->rope_factors)) return -1;
    for (int i = 0; model->rope_factors && i < pairs; i++)
        if (!isfinite(1 / model->rope_factors[i])) return set_error("%s: rope_freqs.weight holds a zero", binder->path);
    return 0;
}

/* A tensor that nothing computes with would change the result if it were ignored: name it and refuse. */
static int check_all_claimed(const struct binder *binder) {
    const rondel_file *file = binder->model->file;
    for (int64_t i = 0; i < file->tensor_count; i++)
        if (!binder->claimed[i] && strncmp(file->tensors[i].name, "rondel.rotation.", 16) != 0)
            return set_error("%s: the tensor %s does not belong to a %s model as this runtime knows it", binder->path,
                             file->tensors[i].name, binder->model->numbers.architecture);
    return 0;
}

static int bind(struct binder *binder) {
    struct rondel_model *model = binder->model;
    struct hyperparameters *numbers = &model->numbers;
    const float *scale;
    if (numbers->layers > model->file->tensor_count)
        return set_error("%s: %d layers, but only %lld tensors", binder->path, numbers->layers,
                         (long long)model->file->tensor_count);
    model->layer = calloc((size_t)numbers->layers, sizeof *model->layer);
    if (!model->layer) return set_error("out of memory for %d layers", numbers->layers);
    model->all_f32 = 1;
    if (bind_matrix(binder, "token_embd.weight", -1, numbers->width, &model->embedding)) return -1;
    if (model->embedding.rows < 1 || model->embedding.rows > INT32_MAX)
        return set_error("%s: token_embd.weight has %lld rows", binder->path, (long long)model->embedding.rows);
    numbers->vocabulary = (int32_t)model->embedding.rows;
    if (bind_vector(binder, "output_norm.weight", numbers->width, 1, &model->output_norm)) return -1;
    model->head = (struct linear){model->embedding, NULL, 1.0f};
    if (gguf_tensor_find(model->file, "output.weight")) {
        if (bind_linear(binder, "output", numbers->vocabulary, numbers->width, &model->head)) return -1;
    } else {
        if (bind_vector(binder, "output.scale", 1, 0, &scale)) return -1;
        if (scale) model->head.scale = *scale;
    }
    for (int i = 0; i < numbers->layers; i++)
        if (bind_layer(binder, i, &model->layer[i])) return -1;
    return bind_rope(binder) || check_all_claimed(binder) ? -1 : 0;
}

void model_warn(struct rondel_model *model, const char *format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (model->warning_count < MODEL_WARNINGS && (model->warnings[model->warning_count] = strdup(text)))
        model->warning_count++;
}

EXPORT rondel_model *rondel_model_open(const char *path) {
    struct rondel_model *model = calloc(1, sizeof *model);
    if (!model) {
        set_error("out of memory");
        return NULL;
    }
    struct binder binder = {model, path, NULL};
    int failed = !(model->file = rondel_file_open(path)) || hyperparameters_read(&model->numbers, model->file);
    if (!failed && !(binder.claimed = calloc((size_t)model->file->tensor_count + 1, 1)))
        failed = set_error("out of memory for %lld tensors", (long long)model->file->tensor_count);
    failed = failed || bind(&binder) || rotations_read(model) || plans_build(model);
    free(binder.claimed);
    if (failed) {
        rondel_model_close(model);
        return NULL;
    }
    return model;
}

EXPORT void rondel_model_close(rondel_model *model) {
    if (!model) return;
    plan_free(model->base);
    plan_free(model->plan);
    for (int i = 0; i < model->rotation_count; i++) hadamard_free(model->rotations[i]);
    for (int i = 0; i < model->warning_count; i++) free(model->warnings[i]);
    free(model->rotations);
    free(model->layer);
    free(model->plan_error);
    rondel_file_close(model->file);
    free(model);
}

EXPORT const rondel_file *rondel_model_file(const rondel_model *model) { return model->file; }

EXPORT const char *rondel_model_warning(const rondel_model *model, int32_t index) {
    return index >= 0 && index < model->warning_count ? model->warnings[index] : NULL;
}

EXPORT int32_t rondel_model_vocabulary(const rondel_model *model) { return model->numbers.vocabulary; }
EXPORT int32_t rondel_model_width(const rondel_model *model) { return model->numbers.width; }
EXPORT int32_t rondel_model_context(const rondel_model *model) { return model->numbers.context; }
EXPORT int32_t rondel_model_layers(const rondel_model *model) { return model->numbers.layers; }

EXPORT int32_t rondel_model_steps(const rondel_model *model, int32_t replication) {
    return replication && model->plan ? model->plan->count : model->base->count;
}
