/* Owns the bytes of one GGUF file: maps it and parses its header. The file is hostile until every length is checked.
 *
 *     "GGUF" | u32 version | u64 tensors | u64 keys | key... | tensor info... | pad | data
 *     key    = string name | u32 type | value;   string = u64 length | bytes;   array = u32 type | u64 count | values
 *     info   = string name | u32 dims | u64 ne[dims] | u32 type | u64 offset from the start of the data
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"
#include "formats.h"
#include "gguf.h"

typedef unsigned long long ull;

/* The shortest possible encodings bound the counts before anything is allocated for them. */
enum { HEADER_BYTES = 24, KEY_BYTES_MIN = 8 + 1 + 4 + 1, INFO_BYTES_MIN = 8 + 4 + 4 + 8 };
/* ggml's own limits for one string and one array. */
static const uint64_t string_max = 1ull << 30, array_max = 1ull << 30;

static const uint8_t scalar_bytes[GGUF_TYPE_COUNT] = {
    [GGUF_U8] = 1,  [GGUF_I8] = 1,  [GGUF_U16] = 2, [GGUF_I16] = 2, [GGUF_U32] = 4, [GGUF_I32] = 4,
    [GGUF_F32] = 4, [GGUF_BOOL] = 1, [GGUF_U64] = 8, [GGUF_I64] = 8, [GGUF_F64] = 8};

/* Where we are in a file; `at` <= `size` always holds. */
struct cursor {
    const struct gguf_shard *shard;
    uint64_t at, size;
};

static int truncated(const struct cursor *cursor, const char *what) {
    return set_error("%s: %s at byte %llu runs past the end of the file (%llu bytes): the file is damaged or incomplete",
                     cursor->shard->path, what, (ull)cursor->at, (ull)cursor->size);
}

static int take(struct cursor *cursor, const char *what, void *out, uint64_t bytes) {
    if (cursor->size - cursor->at < bytes) return truncated(cursor, what);
    memcpy(out, cursor->shard->map + cursor->at, bytes);
    cursor->at += bytes;
    return 0;
}

static int skip(struct cursor *cursor, const char *what, uint64_t bytes) {
    if (cursor->size - cursor->at < bytes) return truncated(cursor, what);
    cursor->at += bytes;
    return 0;
}

static int take_string(struct cursor *cursor, const char *what, const char **text, uint64_t *length) {
    if (take(cursor, what, length, 8)) return -1;
    if (*length > string_max) return truncated(cursor, what);
    *text = (const char *)cursor->shard->map + cursor->at;
    return skip(cursor, what, *length);
}

static int value_type(const struct cursor *cursor, uint32_t type, int in_array) {
    if (type < GGUF_TYPE_COUNT && !(in_array && type == GGUF_ARRAY)) return 0;
    return set_error("%s: a key before byte %llu has the %s type %u, which GGUF readers do not accept",
                     cursor->shard->path, (ull)cursor->at, in_array ? "element" : "value", type);
}

/* Values of `type`, `count` of them: only walks over them, strings one by one. */
static int skip_values(struct cursor *cursor, int type, uint64_t count) {
    if (type != GGUF_STRING) {
        if (count > (cursor->size - cursor->at) / scalar_bytes[type]) return truncated(cursor, "a value");
        return skip(cursor, "a value", count * scalar_bytes[type]);
    }
    for (uint64_t i = 0; i < count; i++) {
        const char *text;
        uint64_t length;
        if (take_string(cursor, "a string", &text, &length)) return -1;
    }
    return 0;
}

static int parse_key(struct cursor *cursor, struct gguf_key *key) {
    uint32_t type;
    if (take_string(cursor, "the name of a key", &key->name, &key->name_length)) return -1;
    if (key->name_length == 0)
        return set_error("%s: the key at byte %llu has an empty name", cursor->shard->path, (ull)cursor->at);
    if (take(cursor, "the type of a key", &type, 4) || value_type(cursor, type, 0)) return -1;
    key->type = key->element = (int)type;
    key->count = 1;
    if (type == GGUF_ARRAY) {
        uint32_t element;
        if (take(cursor, "the type of an array", &element, 4) || value_type(cursor, element, 1)) return -1;
        if (take(cursor, "the length of an array", &key->count, 8)) return -1;
        if (key->count > array_max) return truncated(cursor, "an array");
        key->element = (int)element;
    }
    key->data = cursor->shard->map + cursor->at;
    uint64_t begin = cursor->at;
    if (skip_values(cursor, key->element, key->count)) return -1;
    key->bytes = cursor->at - begin;
    return 0;
}

/* Bytes of a tensor of this shape and type into tensor->bytes. */
static int tensor_size(const struct gguf_shard *shard, struct gguf_tensor *tensor, const struct ggml_type *type) {
    uint64_t elements = 1;
    int overflow = 0;
    for (int i = 0; i < tensor->dims; i++)
        overflow |= tensor->shape[i] > INT64_MAX || __builtin_mul_overflow(elements, tensor->shape[i], &elements);
    if (overflow || elements > INT64_MAX)
        return set_error("%s: the shape of tensor %s is too large", shard->path, tensor->name);
    if (tensor->shape[0] % type->block != 0)
        return set_error("%s: tensor %s has rows of %llu values, type %s needs a multiple of %u", shard->path,
                         tensor->name, (ull)tensor->shape[0], type->name, type->block);
    if (__builtin_mul_overflow(elements / type->block, (uint64_t)type->bytes, &tensor->bytes))
        return set_error("%s: the size of tensor %s overflows", shard->path, tensor->name);
    return 0;
}

/* Reads one tensor info; `expected` is where its data must start, and is moved past it. */
static int parse_info(struct cursor *cursor, struct gguf_tensor *tensor, uint64_t *expected) {
    const struct gguf_shard *shard = cursor->shard;
    const char *name;
    uint64_t length;
    uint32_t dims, type;
    if (take_string(cursor, "the name of a tensor", &name, &length)) return -1;
    if (length == 0 || length >= GGUF_NAME_BYTES || memchr(name, 0, length))
        return set_error("%s: the tensor name before byte %llu is empty, longer than %d bytes or holds a zero byte",
                         shard->path, (ull)cursor->at, GGUF_NAME_BYTES - 1);
    memcpy(tensor->name, name, length);
    if (take(cursor, "a tensor's dimensions", &dims, 4)) return -1;
    if (dims > GGUF_DIMS)
        return set_error("%s: tensor %s has %u dimensions, at most %d are allowed", shard->path, tensor->name, dims,
                         GGUF_DIMS);
    tensor->dims = (int)dims;
    for (int i = 0; i < GGUF_DIMS; i++) tensor->shape[i] = 1;
    for (uint32_t i = 0; i < dims; i++)
        if (take(cursor, "a tensor's shape", &tensor->shape[i], 8)) return -1;
    if (take(cursor, "a tensor's type", &type, 4) || take(cursor, "a tensor's offset", &tensor->offset, 8)) return -1;
    const struct ggml_type *traits = ggml_type_find(type);
    if (!traits)
        return set_error("%s: tensor %s has the unknown type %u: the file is damaged or newer than this reader",
                         shard->path, tensor->name, type);
    tensor->type = (int32_t)type;
    tensor->format_name = traits->name;
    tensor->format = format_of_ggml_type((int32_t)type);
    if (tensor_size(shard, tensor, traits)) return -1;
    if (tensor->offset != *expected)
        return set_error("%s: the data of tensor %s starts at offset %llu, expected %llu: tensors must follow each other",
                         shard->path, tensor->name, (ull)tensor->offset, (ull)*expected);
    uint64_t padded;
    if (__builtin_add_overflow(tensor->bytes, shard->alignment - 1, &padded) ||
        __builtin_add_overflow(*expected, padded & ~(shard->alignment - 1), expected))
        return set_error("%s: the size of tensor %s overflows", shard->path, tensor->name);
    return 0;
}

/* Lays the tensors, whose offsets count from `data`, over the map. */
static int place_tensors(struct gguf_shard *shard, uint64_t data) {
    for (uint64_t i = 0; i < shard->tensor_count; i++) {
        struct gguf_tensor *tensor = &shard->tensors[i];
        uint64_t begin, end;
        if (__builtin_add_overflow(tensor->offset, data, &begin) ||
            __builtin_add_overflow(begin, tensor->bytes, &end) || end > shard->size) {
            if (tensor->bytes == 0) begin = 0; /* nothing is read from it */
            else
                return set_error("%s: the data of tensor %s runs past the end of the file (%llu bytes): "
                                 "the file is incomplete", shard->path, tensor->name, (ull)shard->size);
        }
        tensor->offset = begin;
        tensor->data = shard->map + begin;
    }
    return 0;
}

static int compare_keys(const void *a, const void *b) {
    const struct gguf_key *left = *(const struct gguf_key *const *)a, *right = *(const struct gguf_key *const *)b;
    uint64_t shorter = left->name_length < right->name_length ? left->name_length : right->name_length;
    int order = memcmp(left->name, right->name, shorter);
    return order ? order : (left->name_length > right->name_length) - (left->name_length < right->name_length);
}

static int check_duplicate_keys(const struct gguf_shard *shard) {
    const struct gguf_key **sorted = calloc(shard->key_count + 1, sizeof *sorted);
    if (!sorted) return set_error("%s: out of memory for %llu keys", shard->path, (ull)shard->key_count);
    for (uint64_t i = 0; i < shard->key_count; i++) sorted[i] = &shard->keys[i];
    qsort(sorted, shard->key_count, sizeof *sorted, compare_keys);
    int result = 0;
    for (uint64_t i = 1; i < shard->key_count && !result; i++)
        if (compare_keys(&sorted[i - 1], &sorted[i]) == 0)
            result = set_error("%s: the key %.*s is there twice", shard->path,
                               (int)(sorted[i]->name_length < 200 ? sorted[i]->name_length : 200), sorted[i]->name);
    free(sorted);
    return result;
}

static int find_alignment(struct gguf_shard *shard) {
    const struct gguf_key *key = gguf_shard_key(shard, "general.alignment");
    shard->alignment = 32;
    if (!key) return 0;
    uint32_t value = 0;
    if (key->type == GGUF_U32) memcpy(&value, key->data, 4);
    /* 8 is the smallest that GGUF allows, and what keeps scalars of every type aligned */
    if (value < 8 || (value & (value - 1)) != 0)
        return set_error("%s: general.alignment must be a u32 and a power of two of at least 8", shard->path);
    shard->alignment = value;
    return 0;
}

static int parse(struct gguf_shard *shard, int number) {
    struct cursor cursor = {shard, 0, shard->size};
    char magic[4] = {0};
    if (shard->size < HEADER_BYTES || take(&cursor, "the magic", magic, 4) || memcmp(magic, "GGUF", 4) != 0)
        return set_error("%s: not a GGUF file (it does not start with the letters GGUF and a header)", shard->path);
    take(&cursor, "the version", &shard->version, 4);
    take(&cursor, "the tensor count", &shard->tensor_count, 8);
    take(&cursor, "the key count", &shard->key_count, 8);
    if ((shard->version & 0xffff) == 0) return set_error("%s: a big-endian GGUF file, which is not supported", shard->path);
    if (shard->version < 2 || shard->version > 3)
        return set_error("%s: GGUF version %u, expected 2 or 3", shard->path, shard->version);
    if (shard->key_count > (cursor.size - cursor.at) / KEY_BYTES_MIN ||
        shard->tensor_count > (cursor.size - cursor.at) / INFO_BYTES_MIN)
        return set_error("%s: the header announces %llu keys and %llu tensors, more than %llu bytes can hold: "
                         "the file is damaged or incomplete", shard->path, (ull)shard->key_count,
                         (ull)shard->tensor_count, (ull)shard->size);
    shard->keys = calloc(shard->key_count + 1, sizeof *shard->keys);
    shard->tensors = calloc(shard->tensor_count + 1, sizeof *shard->tensors);
    if (!shard->keys || !shard->tensors) return set_error("%s: out of memory for its header", shard->path);
    for (uint64_t i = 0; i < shard->key_count; i++)
        if (parse_key(&cursor, &shard->keys[i])) return -1;
    if (check_duplicate_keys(shard) || find_alignment(shard)) return -1;
    uint64_t expected = 0;
    for (uint64_t i = 0; i < shard->tensor_count; i++) {
        shard->tensors[i].shard = number;
        if (parse_info(&cursor, &shard->tensors[i], &expected)) return -1;
    }
    /* cursor.at is below 2^63, so this sum cannot overflow */
    return place_tensors(shard, (cursor.at + shard->alignment - 1) & ~(shard->alignment - 1));
}

static int map_file(struct gguf_shard *shard) {
    int file = open(shard->path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return set_error("%s: cannot open the file: %s", shard->path, strerror(errno));
    struct stat status;
    if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode) || status.st_size < HEADER_BYTES) {
        close(file);
        return set_error("%s: not a GGUF file (a regular file of at least %d bytes)", shard->path, HEADER_BYTES);
    }
    shard->size = (uint64_t)status.st_size;
    void *map = mmap(NULL, shard->size, PROT_READ, MAP_SHARED, file, 0);
    int failure = errno;
    close(file);
    if (map == MAP_FAILED) return set_error("%s: cannot map the file: %s", shard->path, strerror(failure));
    shard->map = map;
    return 0;
}

int gguf_shard_open(struct gguf_shard *shard, const char *path, int number) {
    memset(shard, 0, sizeof *shard);
    shard->path = strdup(path);
    if (!shard->path) return set_error("%s: out of memory", path);
    if (map_file(shard) == 0 && parse(shard, number) == 0) return 0;
    gguf_shard_close(shard);
    return -1;
}

void gguf_shard_close(struct gguf_shard *shard) {
    if (shard->map) munmap((void *)shard->map, shard->size);
    free(shard->keys);
    free(shard->tensors);
    free(shard->path);
    memset(shard, 0, sizeof *shard);
}

const struct gguf_key *gguf_shard_key(const struct gguf_shard *shard, const char *name) {
    uint64_t length = strlen(name);
    for (uint64_t i = 0; i < shard->key_count; i++)
        if (shard->keys[i].name_length == length && memcmp(shard->keys[i].name, name, length) == 0)
            return &shard->keys[i];
    return NULL;
}
