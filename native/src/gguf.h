/* A GGUF file, parsed and mapped: shards, keys and tensors. Everything that leaves this unit is checked. */
#ifndef RONDEL_GGUF_H
#define RONDEL_GGUF_H
#include <stddef.h>
#include <stdint.h>

#include "rondel.h"

enum gguf_type {
    GGUF_U8, GGUF_I8, GGUF_U16, GGUF_I16, GGUF_U32, GGUF_I32, GGUF_F32, GGUF_BOOL, GGUF_STRING, GGUF_ARRAY, GGUF_U64,
    GGUF_I64, GGUF_F64, GGUF_TYPE_COUNT
};

struct ggml_type {
    const char *name;
    uint32_t block, bytes; /* elements and bytes of a block */
};
const struct ggml_type *ggml_type_find(uint32_t type); /* NULL: unknown or removed */

/* Value of one key, in place. Strings are u64 length and bytes; an array of strings is a sequence of them. */
struct gguf_key {
    const char *name; /* not terminated */
    uint64_t name_length;
    int type, element;     /* enum gguf_type; `element` is the type of an array's elements, else `type` */
    uint64_t count;        /* elements of an array, else 1 */
    const uint8_t *data;   /* first element: little endian, not aligned */
    uint64_t bytes;
};

enum { GGUF_NAME_BYTES = 64, GGUF_DIMS = 4 };

struct gguf_tensor {
    char name[GGUF_NAME_BYTES];
    int32_t type;              /* ggml type number as stored */
    int dims;
    uint64_t shape[GGUF_DIMS]; /* ne0 first, padded with 1; of the matrix itself for an extended tensor */
    const uint8_t *data;
    uint64_t bytes, offset;    /* offset in the shard's file */
    int shard;
    int format;                /* enum format, or -1: the runtime cannot compute with it */
    const char *format_name;
};

struct gguf_shard {
    char *path;
    const uint8_t *map;
    uint64_t size; /* of the file, bytes */
    uint32_t version;
    uint64_t alignment;
    uint64_t key_count, tensor_count;
    struct gguf_key *keys;
    struct gguf_tensor *tensors;
};

/* Maps and parses one file; 0, or -1 with set_error and everything released. */
int gguf_shard_open(struct gguf_shard *shard, const char *path, int number);
void gguf_shard_close(struct gguf_shard *shard);
const struct gguf_key *gguf_shard_key(const struct gguf_shard *shard, const char *name);

struct rondel_file {
    struct gguf_shard *shards; /* keys are those of the first one */
    int shard_count;
    struct gguf_tensor *tensors; /* of all shards, in the order of the files */
    int64_t tensor_count;
    struct gguf_tensor **by_name; /* sorted */
};

const struct gguf_tensor *gguf_tensor_find(const rondel_file *file, const char *name);

/* ---- typed reading of keys: 1 = found, 0 = absent, -1 = set_error (wrong type or out of range) ---- */
const struct gguf_key *gguf_key_find(const rondel_file *file, const char *name);
uint64_t gguf_integer_at(const struct gguf_key *key, uint64_t index, int *negative); /* of an integer or bool key */
int gguf_get_u32(const rondel_file *file, const char *name, uint32_t *value);        /* any integer type that fits */
int gguf_get_f32(const rondel_file *file, const char *name, float *value);           /* f32 or f64, finite */
int gguf_get_bool(const rondel_file *file, const char *name, int *value);
int gguf_get_string(const rondel_file *file, const char *name, const char **text, uint64_t *length); /* in place */
/* An array of integers, each in [low, high], copied to a new array (free it); *count = 0 and NULL where absent. */
int gguf_get_integers(const rondel_file *file, const char *name, int64_t low, int64_t high, int64_t **values,
                      uint64_t *count);
/* The n-th string of a string array, from the first one on: *cursor starts at 0. */
const char *gguf_next_string(const struct gguf_key *key, uint64_t *cursor, uint64_t *length);

#endif
