/* The cache of keys and values: per slot and head one contiguous run of positions, in float or half. */
#ifndef RONDEL_KV_H
#define RONDEL_KV_H
#include <stdint.h>

struct kv {
    int half;                       /* uint16_t halves, else floats */
    int slots, heads, head_dim, context;
    void *keys, *values;            /* (slots, heads, context, head_dim) */
};

int kv_init(struct kv *kv, int half, int slots, int heads, int head_dim, int context); /* -1 with set_error */
void kv_release(struct kv *kv);
uint64_t kv_memory(const struct kv *kv);
uint64_t kv_bytes_of(const struct kv *kv, int64_t positions); /* keys and values of one slot up to there */
/* keys, values: (heads, head_dim) of one position. */
void kv_store(struct kv *kv, int slot, int position, const float *keys, const float *values);
/* The first position of one head: rows of head_dim elements follow. */
const void *kv_keys(const struct kv *kv, int slot, int head);
const void *kv_values(const struct kv *kv, int slot, int head);

#endif
