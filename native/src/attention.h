/* Causal attention of grouped queries over a KV slot. */
#ifndef RONDEL_ATTENTION_H
#define RONDEL_ATTENTION_H
#include <stddef.h>
#include <stdint.h>

#include "kv.h"

/* Bytes of scratch that one thread needs. */
size_t attention_scratch(int context, int head_dim);
/* One query head over positions 0 .. count-1: query, out (head_dim). */
void attention_head(const struct kv *kv, int slot, int kv_head, int count, float scale, const float *query, float *out,
                    void *scratch);

#endif
