/* Owns the hyperparameters: which keys hold them, their bounds, and what each architecture means as facts. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "model.h"

/* Adding an architecture whose graph is the same is one row. */
static const struct {
    const char *name;
    int rope_half, head_norms;
} architectures[] = {{"llama", 0, 0}, {"qwen2", 1, 0}, {"qwen3", 1, 1}};
enum { ARCHITECTURES = sizeof architectures / sizeof architectures[0] };

/* Largest sizes that are believed; they keep every product of two of them inside 64 bits. */
enum { SIZE_MAX_BELIEVED = 1 << 24, HEAD_DIM_MAX = 4096 };

static int read_architecture(struct hyperparameters *numbers, const rondel_file *file) {
    const char *path = file->shards[0].path, *text = NULL;
    uint64_t length = 0;
    int found = gguf_get_string(file, "general.architecture", &text, &length);
    if (found == 1 && length == 6 && memcmp(text, "rondel", 6) == 0)
        found = gguf_get_string(file, "rondel.architecture", &text, &length);
    if (found < 0) return -1;
    if (found == 0) return set_error("%s: the key general.architecture (or rondel.architecture) is missing", path);
    for (int i = 0; i < ARCHITECTURES; i++)
        if (strlen(architectures[i].name) == length && memcmp(architectures[i].name, text, length) == 0) {
            snprintf(numbers->architecture, sizeof numbers->architecture, "%s", architectures[i].name);
            numbers->rope_half = architectures[i].rope_half;
            numbers->head_norms = architectures[i].head_norms;
            return 0;
        }
    return set_error("%s: the architecture '%.*s' is not supported; this runtime executes llama, qwen2 and qwen3", path,
                     (int)(length < 40 ? length : 40), text);
}

static const char *key_name(const struct hyperparameters *numbers, const char *suffix, char name[96]) {
    snprintf(name, 96, "%s.%s", numbers->architecture, suffix);
    return name;
}

/* A count in [1, high]; an array with one entry a layer is accepted where all entries are equal.
 * `fallback` < 0: the key must be there. */
static int read_count(const struct hyperparameters *numbers, const rondel_file *file, const char *suffix, int64_t fallback,
                      int64_t high, int32_t *value) {
    char name[96];
    const char *path = file->shards[0].path;
    const struct gguf_key *key = gguf_key_find(file, key_name(numbers, suffix, name));
    int64_t number = fallback;
    if (!key && fallback < 0) return set_error("%s: the key %s is missing", path, name);
    if (key && key->type == GGUF_ARRAY) {
        int64_t *values;
        uint64_t count;
        if (gguf_get_integers(file, name, 0, INT32_MAX, &values, &count) < 0) return -1;
        int equal = count > 0;
        for (uint64_t i = 1; i < count; i++) equal &= values[i] == values[0];
        if (equal) number = values[0];
        free(values);
        if (!equal) return set_error("%s: the key %s differs between layers, which is not supported", path, name);
    } else if (key) {
        uint32_t wide;
        if (gguf_get_u32(file, name, &wide) < 0) return -1;
        number = wide;
    }
    if (number < 1 || number > high)
        return set_error("%s: the key %s is %lld, expected 1 to %lld", path, name, (long long)number, (long long)high);
    *value = (int32_t)number;
    return 0;
}

static int read_float(const struct hyperparameters *numbers, const rondel_file *file, const char *suffix, float fallback,
                      float *value) {
    char name[96];
    *value = fallback;
    return gguf_get_f32(file, key_name(numbers, suffix, name), value) < 0 ? -1 : 0;
}

static int read_rope(struct hyperparameters *numbers, const rondel_file *file) {
    const char *path = file->shards[0].path, *text;
    char name[96];
    uint64_t length;
    int32_t turned;
    float factor, old_factor;
    if (read_count(numbers, file, "rope.dimension_count", numbers->head_dim, HEAD_DIM_MAX, &turned)) return -1;
    if (turned != numbers->head_dim)
        return set_error("%s: RoPE on %d of %d channels of a head is not supported", path, turned, numbers->head_dim);
    if (read_float(numbers, file, "rope.freq_base", 10000.0f, &numbers->rope_base) ||
        read_float(numbers, file, "rope.scale_linear", 1.0f, &old_factor) ||
        read_float(numbers, file, "rope.scaling.factor", old_factor, &factor) ||
        read_float(numbers, file, "rope.scaling.attn_factor", 1.0f, &numbers->rope_magnitude))
        return -1;
    int found = gguf_get_string(file, key_name(numbers, "rope.scaling.type", name), &text, &length);
    if (found < 0) return -1;
    int linear = !found || (length == 6 && memcmp(text, "linear", 6) == 0);
    int none = found && length == 4 && memcmp(text, "none", 4) == 0;
    if (!linear && !none)
        return set_error("%s: the RoPE scaling '%.*s' is not supported (none and linear are)", path,
                         (int)(length < 40 ? length : 40), text);
    if (!(numbers->rope_base > 0) || factor < 0) return set_error("%s: a RoPE parameter is not positive", path);
    numbers->rope_scale = linear && factor > 0 ? 1.0f / factor : 1.0f;
    return 0;
}

static int refuse_unsupported(const struct hyperparameters *numbers, const rondel_file *file) {
    char name[96];
    uint32_t experts = 0;
    int causal = 1;
    if (gguf_get_u32(file, key_name(numbers, "expert_count", name), &experts) < 0) return -1;
    if (experts > 0)
        return set_error("%s: a mixture of %u experts, which is not supported yet", file->shards[0].path, experts);
    if (gguf_get_bool(file, key_name(numbers, "attention.causal", name), &causal) < 0) return -1;
    if (!causal) return set_error("%s: attention is not causal: this is no text generator", file->shards[0].path);
    return 0;
}

int hyperparameters_read(struct hyperparameters *numbers, const rondel_file *file) {
    const char *path = file->shards[0].path;
    int32_t value_length;
    if (read_architecture(numbers, file)) return -1;
    if (read_count(numbers, file, "block_count", -1, 65536, &numbers->layers) ||
        read_count(numbers, file, "context_length", -1, INT32_MAX, &numbers->context) ||
        read_count(numbers, file, "embedding_length", -1, SIZE_MAX_BELIEVED, &numbers->width) ||
        read_count(numbers, file, "feed_forward_length", -1, SIZE_MAX_BELIEVED, &numbers->hidden) ||
        read_count(numbers, file, "attention.head_count", -1, 65536, &numbers->heads) ||
        read_count(numbers, file, "attention.head_count_kv", numbers->heads, 65536, &numbers->kv_heads) ||
        read_count(numbers, file, "attention.key_length", numbers->width / numbers->heads, HEAD_DIM_MAX,
                   &numbers->head_dim) ||
        read_count(numbers, file, "attention.value_length", numbers->head_dim, HEAD_DIM_MAX, &value_length))
        return -1;
    if (value_length != numbers->head_dim || numbers->head_dim % 2 != 0 || numbers->heads % numbers->kv_heads != 0)
        return set_error("%s: %d heads, %d key heads, %d channels a key and %d a value do not fit each other", path,
                         numbers->heads, numbers->kv_heads, numbers->head_dim, value_length);
    char name[96];
    int found = gguf_get_f32(file, key_name(numbers, "attention.layer_norm_rms_epsilon", name), &numbers->norm_epsilon);
    if (found < 0) return -1;
    if (!found || numbers->norm_epsilon < 0) return set_error("%s: the key %s is missing or negative", path, name);
    if (read_float(numbers, file, "attention.scale", 0.0f, &numbers->attention_scale)) return -1;
    if (numbers->attention_scale == 0.0f) numbers->attention_scale = 1.0f / sqrtf((float)numbers->head_dim);
    if (read_rope(numbers, file)) return -1;
    return refuse_unsupported(numbers, file);
}
