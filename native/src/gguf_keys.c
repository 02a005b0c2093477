/* Owns the typed reading of a file's keys: every value is checked for its type and range on the way out. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "gguf.h"

const struct gguf_key *gguf_key_find(const rondel_file *file, const char *name) {
    return gguf_shard_key(&file->shards[0], name);
}

static int wrong_type(const rondel_file *file, const char *name, const char *expected) {
    return set_error("%s: the key %s must be %s", file->shards[0].path, name, expected);
}

static int is_integer(int type) {
    return type != GGUF_F32 && type != GGUF_F64 && type != GGUF_STRING && type != GGUF_ARRAY;
}

uint64_t gguf_integer_at(const struct gguf_key *key, uint64_t index, int *negative) {
    const uint8_t *data = key->data;
    int64_t value = 0;
    switch (key->element) {
        case GGUF_U8: case GGUF_BOOL: value = data[index]; break;
        case GGUF_I8: value = (int8_t)data[index]; break;
        case GGUF_U16: { uint16_t v; memcpy(&v, data + 2 * index, 2); value = v; break; }
        case GGUF_I16: { int16_t v; memcpy(&v, data + 2 * index, 2); value = v; break; }
        case GGUF_U32: { uint32_t v; memcpy(&v, data + 4 * index, 4); value = v; break; }
        case GGUF_I32: { int32_t v; memcpy(&v, data + 4 * index, 4); value = v; break; }
        case GGUF_I64: memcpy(&value, data + 8 * index, 8); break;
        case GGUF_U64: { uint64_t v; memcpy(&v, data + 8 * index, 8); *negative = 0; return v; }
        default: break;
    }
    *negative = value < 0;
    return (uint64_t)value;
}

int gguf_get_u32(const rondel_file *file, const char *name, uint32_t *value) {
    const struct gguf_key *key = gguf_key_find(file, name);
    if (!key) return 0;
    if (!is_integer(key->type)) return wrong_type(file, name, "an integer");
    int negative;
    uint64_t wide = gguf_integer_at(key, 0, &negative);
    if (negative || wide > UINT32_MAX) return wrong_type(file, name, "an integer between 0 and 4294967295");
    *value = (uint32_t)wide;
    return 1;
}

int gguf_get_f32(const rondel_file *file, const char *name, float *value) {
    const struct gguf_key *key = gguf_key_find(file, name);
    if (!key) return 0;
    if (key->type == GGUF_F32) {
        memcpy(value, key->data, 4);
    } else if (key->type == GGUF_F64) {
        double wide;
        memcpy(&wide, key->data, 8);
        *value = (float)wide;
    } else {
        return wrong_type(file, name, "a float");
    }
    return isfinite(*value) ? 1 : wrong_type(file, name, "a finite number");
}

int gguf_get_bool(const rondel_file *file, const char *name, int *value) {
    const struct gguf_key *key = gguf_key_find(file, name);
    if (!key) return 0;
    if (key->type != GGUF_BOOL) return wrong_type(file, name, "a bool");
    *value = key->data[0] != 0;
    return 1;
}

int gguf_get_string(const rondel_file *file, const char *name, const char **text, uint64_t *length) {
    const struct gguf_key *key = gguf_key_find(file, name);
    if (!key) return 0;
    if (key->type != GGUF_STRING) return wrong_type(file, name, "a string");
    *length = key->bytes - 8;
    *text = (const char *)key->data + 8;
    return 1;
}

int gguf_get_integers(const rondel_file *file, const char *name, int64_t low, int64_t high, int64_t **values,
                      uint64_t *count) {
    *values = NULL;
    *count = 0;
    const struct gguf_key *key = gguf_key_find(file, name);
    if (!key) return 0;
    if (key->type != GGUF_ARRAY || !is_integer(key->element)) return wrong_type(file, name, "an array of integers");
    int64_t *copy = calloc(key->count + 1, sizeof *copy);
    if (!copy) return set_error("%s: out of memory for the key %s", file->shards[0].path, name);
    for (uint64_t i = 0; i < key->count; i++) {
        int negative;
        uint64_t bits = gguf_integer_at(key, i, &negative);
        copy[i] = (int64_t)bits;
        if ((!negative && bits > INT64_MAX) || copy[i] < low || copy[i] > high) {
            free(copy);
            return set_error("%s: element %llu of the key %s is outside %lld to %lld", file->shards[0].path,
                             (unsigned long long)i, name, (long long)low, (long long)high);
        }
    }
    *values = copy;
    *count = key->count;
    return 1;
}

const char *gguf_next_string(const struct gguf_key *key, uint64_t *cursor, uint64_t *length) {
    memcpy(length, key->data + *cursor, 8); /* lengths were checked when the file was parsed */
    const char *text = (const char *)key->data + *cursor + 8;
    *cursor += 8 + *length;
    return text;
}
