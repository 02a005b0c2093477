/* Owns the cache of keys and values. */
#include "kv.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "kernels/kernels.h"

static uint64_t element_bytes(const struct kv *kv) { return kv->half ? 2 : 4; }

static uint64_t head_elements(const struct kv *kv) { return (uint64_t)kv->context * (uint64_t)kv->head_dim; }

int kv_init(struct kv *kv, int half, int slots, int heads, int head_dim, int context) {
    *kv = (struct kv){half, slots, heads, head_dim, context, NULL, NULL};
    uint64_t bytes;
    int overflow = __builtin_mul_overflow(head_elements(kv) * element_bytes(kv), (uint64_t)slots * (uint64_t)heads, &bytes);
    /* calloc: pages are only touched, and counted by the system, when positions are stored */
    if (!overflow) kv->keys = calloc(bytes, 1), kv->values = calloc(bytes, 1);
    if (kv->keys && kv->values) return 0;
    kv_release(kv);
    return set_error("out of memory for a KV cache of %d positions: use a smaller context", context);
}

void kv_release(struct kv *kv) {
    free(kv->keys);
    free(kv->values);
    kv->keys = kv->values = NULL;
}

uint64_t kv_memory(const struct kv *kv) { return (uint64_t)kv->slots * kv_bytes_of(kv, kv->context); }

uint64_t kv_bytes_of(const struct kv *kv, int64_t positions) {
    return 2 * (uint64_t)kv->heads * (uint64_t)kv->head_dim * (uint64_t)positions * element_bytes(kv);
}

static uint64_t offset(const struct kv *kv, int slot, int head) {
    return ((uint64_t)slot * (uint64_t)kv->heads + (uint64_t)head) * head_elements(kv) * element_bytes(kv);
}

const void *kv_keys(const struct kv *kv, int slot, int head) { return (const uint8_t *)kv->keys + offset(kv, slot, head); }

const void *kv_values(const struct kv *kv, int slot, int head) {
    return (const uint8_t *)kv->values + offset(kv, slot, head);
}

static void store(const struct kv *kv, void *to, int position, const float *from) {
    if (!kv->half) {
        memcpy((float *)to + (int64_t)position * kv->head_dim, from, (size_t)kv->head_dim * sizeof *from);
        return;
    }
    uint16_t *halves = (uint16_t *)to + (int64_t)position * kv->head_dim;
    for (int i = 0; i < kv->head_dim; i++) halves[i] = float_to_half(from[i]);
}

void kv_store(struct kv *kv, int slot, int position, const float *keys, const float *values) {
    for (int head = 0; head < kv->heads; head++) {
        store(kv, (uint8_t *)kv->keys + offset(kv, slot, head), position, keys + (int64_t)head * kv->head_dim);
        store(kv, (uint8_t *)kv->values + offset(kv, slot, head), position, values + (int64_t)head * kv->head_dim);
    }
}
