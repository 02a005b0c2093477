/* Owns an open model file: its shards, its names, what of it is rondel's extension, and the C interface to all that. */
#include "gguf.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "formats.h"
#include "kernels/kernels.h"

typedef unsigned long long ull;

/* What this reader can do with a file, see formats.md; a name that is not here is refused. */
static const char *const known_features[] = {"tile-1", "hadamard-1", "replication-1"};
enum { RONDEL_MAJOR = 1 };

static int compare_names(const void *a, const void *b) {
    return strcmp((*(struct gguf_tensor *const *)a)->name, (*(struct gguf_tensor *const *)b)->name);
}

const struct gguf_tensor *gguf_tensor_find(const rondel_file *file, const char *name) {
    int64_t low = 0, high = file->tensor_count;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        int order = strcmp(file->by_name[middle]->name, name);
        if (order == 0) return file->by_name[middle];
        if (order < 0) low = middle + 1;
        else high = middle;
    }
    return NULL;
}

/* ---- shards ---- */

/* An integer key of one shard into *value; -1 where it is there but no integer. */
static int shard_integer(const struct gguf_shard *shard, const char *name, uint64_t *value) {
    const struct gguf_key *key = gguf_shard_key(shard, name);
    if (!key) return 0;
    int negative = 0;
    if (key->type != GGUF_U16 && key->type != GGUF_I32 && key->type != GGUF_U32 && key->type != GGUF_U64)
        return set_error("%s: the key %s must be an integer", shard->path, name);
    *value = gguf_integer_at(key, 0, &negative);
    return negative ? set_error("%s: the key %s is negative", shard->path, name) : 1;
}

/* Opens the other shards of a split: `first` is the one that was named, any of them. */
static int open_shards(rondel_file *file, struct gguf_shard *first) {
    uint64_t count = 1, number = 0, tensors = 0, total = 0;
    int has_count = shard_integer(first, "split.count", &count);
    if (has_count < 0 || shard_integer(first, "split.no", &number) < 0) return -1;
    if (count <= 1) count = 1, number = 0;
    if (count > 65535 || number >= count)
        return set_error("%s: split.no %llu and split.count %llu do not fit", first->path, (ull)number, (ull)count);
    file->shards = calloc(count, sizeof *file->shards);
    if (!file->shards) return set_error("%s: out of memory for %llu shards", first->path, (ull)count);
    file->shard_count = (int)count;
    char suffix[32];
    snprintf(suffix, sizeof suffix, "-%05d-of-%05d.gguf", (int)number + 1, (int)count);
    size_t length = strlen(first->path), tail = strlen(suffix);
    if (count > 1 && (length < tail || strcmp(first->path + length - tail, suffix) != 0))
        return set_error("%s: shard %d of %d must be called ...%s, so that the others can be found", first->path,
                         (int)number + 1, (int)count, suffix);
    file->shards[number] = *first;
    char *path = strdup(first->path);
    memset(first, 0, sizeof *first);
    if (!path) return set_error("out of memory");
    int result = 0;
    for (uint64_t i = 0; i < count && !result; i++) {
        if (i == number) continue;
        snprintf(path + length - tail, tail + 1, "-%05d-of-%05d.gguf", (int)i + 1, (int)count);
        result = gguf_shard_open(&file->shards[i], path, (int)i);
    }
    free(path);
    for (uint64_t i = 0; i < count && !result; i++) {
        const struct gguf_shard *shard = &file->shards[i];
        uint64_t no = 0, of = 1;
        if (shard_integer(shard, "split.no", &no) < 0 || shard_integer(shard, "split.count", &of) < 0) return -1;
        if (count > 1 && (no != i || of != count))
            return set_error("%s: it says that it is shard %llu of %llu, expected %llu of %llu", shard->path,
                             (ull)no + 1, (ull)of, (ull)i + 1, (ull)count);
        for (uint64_t t = 0; t < shard->tensor_count; t++) shard->tensors[t].shard = (int)i;
        tensors += shard->tensor_count;
    }
    if (result) return -1;
    int has_total = shard_integer(&file->shards[0], "split.tensors.count", &total);
    if (has_total < 0) return -1;
    if (has_total && count > 1 && total != tensors)
        return set_error("%s: the shards hold %llu tensors, split.tensors.count says %llu", file->shards[0].path,
                         (ull)tensors, (ull)total);
    return 0;
}

/* One list of all tensors, and the same sorted by name. */
static int index_tensors(rondel_file *file) {
    uint64_t count = 0;
    for (int i = 0; i < file->shard_count; i++) count += file->shards[i].tensor_count;
    file->tensors = calloc(count + 1, sizeof *file->tensors);
    file->by_name = calloc(count + 1, sizeof *file->by_name);
    if (!file->tensors || !file->by_name) return set_error("%s: out of memory", file->shards[0].path);
    for (int i = 0; i < file->shard_count; i++)
        for (uint64_t t = 0; t < file->shards[i].tensor_count; t++)
            file->tensors[file->tensor_count++] = file->shards[i].tensors[t];
    for (uint64_t t = 0; t < count; t++) file->by_name[t] = &file->tensors[t];
    qsort(file->by_name, count, sizeof *file->by_name, compare_names);
    for (uint64_t t = 1; t < count; t++)
        if (compare_names(&file->by_name[t - 1], &file->by_name[t]) == 0)
            return set_error("%s: the tensor %s is there twice", file->shards[file->by_name[t]->shard].path,
                             file->by_name[t]->name);
    return 0;
}

/* ---- rondel's extension ---- */

static int check_requires(const rondel_file *file) {
    const char *path = file->shards[0].path;
    int64_t *version;
    uint64_t parts;
    if (gguf_get_integers(file, "rondel.version", 0, UINT32_MAX, &version, &parts) < 0) return -1;
    char writer[64] = "(version not recorded)";
    if (parts == 3) snprintf(writer, sizeof writer, "%" PRId64 ".%" PRId64 ".%" PRId64, version[0], version[1], version[2]);
    int newer = parts > 0 && version[0] > RONDEL_MAJOR;
    free(version);
    const struct gguf_key *key = gguf_key_find(file, "rondel.requires");
    if (key && (key->type != GGUF_ARRAY || key->element != GGUF_STRING))
        return set_error("%s: the key rondel.requires must be an array of strings", path);
    uint64_t cursor = 0, length;
    for (uint64_t i = 0; key && i < key->count; i++) {
        const char *name = gguf_next_string(key, &cursor, &length);
        int known = 0;
        for (size_t f = 0; f < sizeof known_features / sizeof *known_features; f++)
            known |= strlen(known_features[f]) == length && memcmp(known_features[f], name, length) == 0;
        if (!known)
            return set_error("%s: it needs the feature '%.*s', which this rondel does not have; rondel %s wrote the "
                             "file: use that version or a newer one", path, (int)(length < 64 ? length : 64), name, writer);
    }
    if (newer) return set_error("%s: rondel %s wrote it, this reader knows major version %d: use a newer rondel", path,
                                writer, RONDEL_MAJOR);
    return 0;
}

/* One row of the arrays rondel.tensor.*: an I8 tensor of bytes becomes a matrix in one of our formats. */
static int resolve_extended(rondel_file *file, const char *name, const char *format_name, const int64_t shape[4]) {
    const char *path = file->shards[0].path;
    struct gguf_tensor *tensor = (struct gguf_tensor *)gguf_tensor_find(file, name);
    if (!tensor) return set_error("%s: rondel.tensor.name lists %s, which the file does not hold", path, name);
    int format = format_find(format_name);
    if (format < 0 || format_table[format].ggml_type >= 0)
        return set_error("%s: tensor %s has the format '%s', which is no extended format that this rondel knows", path,
                         name, format_name);
    if (strcmp(tensor->format_name, "I8") != 0 || tensor->dims != 1)
        return set_error("%s: the extended tensor %s must be stored as I8 of one dimension", path, name);
    if (shape[2] != 1 || shape[3] != 1)
        return set_error("%s: the extended tensor %s has more than two dimensions", path, name);
    int64_t bytes = format_bytes(format, shape[1], shape[0]);
    if (bytes < 0 || (uint64_t)bytes != tensor->bytes)
        return set_error("%s: tensor %s holds %llu bytes, %s of shape (%lld, %lld) needs %lld", path, name,
                         (ull)tensor->bytes, format_name, (long long)shape[1], (long long)shape[0], (long long)bytes);
    if (tensor->offset % 64 != 0)
        return set_error("%s: the extended tensor %s is not aligned to 64 bytes (general.alignment must be 64)", path, name);
    tensor->format = format;
    tensor->format_name = format_table[format].name;
    tensor->dims = 2;
    for (int i = 0; i < 4; i++) tensor->shape[i] = (uint64_t)shape[i];
    return 0;
}

static int copy_string(const struct gguf_key *key, uint64_t *cursor, char out[GGUF_NAME_BYTES]) {
    uint64_t length;
    const char *text = gguf_next_string(key, cursor, &length);
    if (length >= GGUF_NAME_BYTES) return -1;
    memcpy(out, text, length);
    out[length] = 0;
    return 0;
}

static int resolve_all_extended(rondel_file *file) {
    const struct gguf_key *names = gguf_key_find(file, "rondel.tensor.name");
    const struct gguf_key *formats = gguf_key_find(file, "rondel.tensor.format");
    int64_t *shapes = NULL;
    uint64_t numbers;
    if (gguf_get_integers(file, "rondel.tensor.shape", 0, INT64_MAX, &shapes, &numbers) < 0) return -1;
    int result = 0;
    if (names || formats || shapes) {
        int well_formed = names && formats && shapes && names->type == GGUF_ARRAY && names->element == GGUF_STRING &&
                          formats->type == GGUF_ARRAY && formats->element == GGUF_STRING &&
                          names->count == formats->count && numbers == 4 * names->count;
        if (!well_formed)
            result = set_error("%s: rondel.tensor.name, .format and .shape must be two arrays of strings and one of "
                               "integers, of n, n and 4n elements", file->shards[0].path);
    }
    uint64_t at_name = 0, at_format = 0;
    for (uint64_t i = 0; names && i < names->count && !result; i++) {
        char name[GGUF_NAME_BYTES], format[GGUF_NAME_BYTES];
        if (copy_string(names, &at_name, name) || copy_string(formats, &at_format, format))
            result = set_error("%s: element %llu of rondel.tensor.name or .format is too long", file->shards[0].path, (ull)i);
        else
            result = resolve_extended(file, name, format, shapes + 4 * i);
    }
    free(shapes);
    return result;
}

/* ---- the interface ---- */

EXPORT rondel_file *rondel_file_open(const char *path) {
    rondel_file *file = calloc(1, sizeof *file);
    if (!file) {
        set_error("%s: out of memory", path);
        return NULL;
    }
    struct gguf_shard first;
    if (gguf_shard_open(&first, path, 0) != 0) {
        free(file);
        return NULL;
    }
    int failed = open_shards(file, &first);
    gguf_shard_close(&first); /* empty once it has moved into file->shards */
    if (failed || index_tensors(file) || check_requires(file) || resolve_all_extended(file)) {
        rondel_file_close(file);
        return NULL;
    }
    return file;
}

EXPORT void rondel_file_close(rondel_file *file) {
    if (!file) return;
    for (int i = 0; file->shards && i < file->shard_count; i++) gguf_shard_close(&file->shards[i]);
    free(file->shards);
    free(file->tensors);
    free(file->by_name);
    free(file);
}

EXPORT uint32_t rondel_file_version(const rondel_file *file) { return file->shards[0].version; }
EXPORT uint64_t rondel_file_alignment(const rondel_file *file) { return file->shards[0].alignment; }
EXPORT int32_t rondel_file_shard_count(const rondel_file *file) { return file->shard_count; }
EXPORT const char *rondel_file_shard_path(const rondel_file *file, int32_t shard) { return file->shards[shard].path; }
EXPORT int64_t rondel_file_key_count(const rondel_file *file) { return (int64_t)file->shards[0].key_count; }

EXPORT const char *rondel_file_key_name(const rondel_file *file, int64_t index, uint64_t *length) {
    *length = file->shards[0].keys[index].name_length;
    return file->shards[0].keys[index].name;
}

EXPORT int32_t rondel_file_key_type(const rondel_file *file, int64_t index) { return file->shards[0].keys[index].type; }

EXPORT int32_t rondel_file_key_element_type(const rondel_file *file, int64_t index) {
    return file->shards[0].keys[index].element;
}

EXPORT uint64_t rondel_file_key_count_of(const rondel_file *file, int64_t index) {
    return file->shards[0].keys[index].count;
}

EXPORT const void *rondel_file_key_data(const rondel_file *file, int64_t index, uint64_t *bytes) {
    *bytes = file->shards[0].keys[index].bytes;
    return file->shards[0].keys[index].data;
}

EXPORT int64_t rondel_file_tensor_count(const rondel_file *file) { return file->tensor_count; }
EXPORT const char *rondel_file_tensor_name(const rondel_file *file, int64_t index) { return file->tensors[index].name; }
EXPORT int32_t rondel_file_tensor_type(const rondel_file *file, int64_t index) { return file->tensors[index].type; }
EXPORT int32_t rondel_file_tensor_shard(const rondel_file *file, int64_t index) { return file->tensors[index].shard; }

EXPORT const char *rondel_file_tensor_format(const rondel_file *file, int64_t index) {
    return file->tensors[index].format_name;
}

EXPORT int32_t rondel_file_tensor_shape(const rondel_file *file, int64_t index, uint64_t shape[4]) {
    memcpy(shape, file->tensors[index].shape, sizeof file->tensors[index].shape);
    return file->tensors[index].dims;
}

EXPORT const void *rondel_file_tensor_data(const rondel_file *file, int64_t index, uint64_t *bytes, uint64_t *offset) {
    *bytes = file->tensors[index].bytes;
    *offset = file->tensors[index].offset;
    return file->tensors[index].data;
}

EXPORT int32_t rondel_file_tensor_check(const rondel_file *file, int64_t index) {
    const struct gguf_tensor *tensor = &file->tensors[index];
    if (tensor->format < 0)
        return set_error("tensor %s has the type %s, which this rondel cannot decode", tensor->name, tensor->format_name);
    if (tensor->bytes == 0) return 0;
    struct matrix matrix = {tensor->data, tensor->format, 1, (int64_t)tensor->shape[0]};
    for (int i = 1; i < GGUF_DIMS; i++) matrix.rows *= (int64_t)tensor->shape[i];
    float *row = malloc((size_t)matrix.cols * sizeof *row);
    if (!row) return set_error("out of memory for a row of tensor %s", tensor->name);
    int result = 0;
    for (int64_t r = 0; r < matrix.rows && !result; r++) {
        matrix_row(&matrix, r, row);
        for (int64_t c = 0; c < matrix.cols && !result; c++)
            if (!isfinite(row[c])) {
                set_error("tensor %s: row %lld, block %lld (%s) holds a value that is not finite: its scale is damaged",
                          tensor->name, (long long)r, (long long)(c / format_table[tensor->format].columns),
                          tensor->format_name);
                result = 1;
            }
    }
    free(row);
    return result;
}
