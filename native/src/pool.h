/* A pool of threads that spin, then sleep. Work is split into static ranges, so results do not depend on timing. */
#ifndef RONDEL_POOL_H
#define RONDEL_POOL_H
#include <stdint.h>

struct pool;
typedef void (*pool_task)(void *argument, int thread, int threads);

struct pool *pool_new(int threads); /* threads >= 1, the caller included; NULL: set_error */
void pool_free(struct pool *pool);
int pool_threads(const struct pool *pool);
void pool_run(struct pool *pool, pool_task task, void *argument); /* returns when every thread has finished */

/* The share [*first, *last) of `count` items in multiples of `granule` that belongs to `thread`. */
static inline void pool_share(int64_t count, int64_t granule, int thread, int threads, int64_t *first, int64_t *last) {
    int64_t units = (count + granule - 1) / granule;
    int64_t begin = units * thread / threads * granule, end = units * (thread + 1) / threads * granule;
    *first = begin < count ? begin : count;
    *last = end < count ? end : count;
}

#endif
