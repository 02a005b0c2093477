/* Owns the threads: spin, then sleep. The caller of pool_run is thread 0. */
#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "error.h"

/* About 20 us of polling: longer than the gap between two tasks of one token, far shorter than a token. */
enum { SPINS = 3000 };

struct pool {
    int threads;                 /* the caller included */
    pthread_t *workers;          /* (threads - 1) */
    pool_task task;
    void *argument;
    atomic_uint generation;      /* one more for each task handed out */
    atomic_int running;          /* workers that have not finished the current task */
    atomic_int sleepers;         /* workers that wait for `wake`, or are about to */
    atomic_int caller_sleeps;
    atomic_int stop;
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
};

struct worker_start {
    struct pool *pool;
    int thread;
};

static inline void cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Returns the generation that follows `seen`. A sleeper announces itself before it looks again, and pool_run looks for
 * sleepers after it has published a task (both sequentially consistent), so no wake-up can be lost. */
static unsigned wait_for_task(struct pool *pool, unsigned seen) {
    for (int spin = 0; spin < SPINS; spin++) {
        unsigned now = atomic_load_explicit(&pool->generation, memory_order_acquire);
        if (now != seen) return now;
        cpu_relax();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    unsigned now;
    while ((now = atomic_load(&pool->generation)) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
    return now;
}

static void *worker(void *argument) {
    struct worker_start start = *(struct worker_start *)argument;
    free(argument);
    struct pool *pool = start.pool;
    unsigned seen = 0;
    for (;;) {
        seen = wait_for_task(pool, seen);
        if (atomic_load(&pool->stop)) return NULL;
        pool->task(pool->argument, start.thread, pool->threads);
        if (atomic_fetch_sub(&pool->running, 1) == 1 && atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
}

static void publish(struct pool *pool) {
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
}

void pool_run(struct pool *pool, pool_task task, void *argument) {
    if (pool->threads == 1) {
        task(argument, 0, 1);
        return;
    }
    pool->task = task;
    pool->argument = argument;
    atomic_store(&pool->running, pool->threads - 1);
    publish(pool);
    task(argument, 0, pool->threads);
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load_explicit(&pool->running, memory_order_acquire) == 0) return;
        cpu_relax();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->caller_sleeps, 1);
    while (atomic_load(&pool->running) != 0) pthread_cond_wait(&pool->done, &pool->mutex);
    atomic_store(&pool->caller_sleeps, 0);
    pthread_mutex_unlock(&pool->mutex);
}

/* Stops and joins the first `count` workers and frees everything. */
static void destroy(struct pool *pool, int count) {
    atomic_store(&pool->stop, 1);
    publish(pool);
    for (int i = 0; i < count; i++) pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_cond_destroy(&pool->done);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->workers);
    free(pool);
}

struct pool *pool_new(int threads) {
    if (threads < 1 || threads > 1024) {
        set_error("the number of threads must be between 1 and 1024, got %d", threads);
        return NULL;
    }
    struct pool *pool = calloc(1, sizeof *pool);
    if (!pool || !(pool->workers = calloc((size_t)threads, sizeof *pool->workers))) {
        free(pool);
        set_error("out of memory for %d threads", threads);
        return NULL;
    }
    pool->threads = threads;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    for (int i = 0; i < threads - 1; i++) {
        struct worker_start *start = malloc(sizeof *start);
        if (start) *start = (struct worker_start){pool, i + 1};
        if (!start || pthread_create(&pool->workers[i], NULL, worker, start) != 0) {
            free(start);
            destroy(pool, i);
            set_error("cannot start thread %d of %d: use fewer threads", i + 2, threads);
            return NULL;
        }
    }
    return pool;
}

void pool_free(struct pool *pool) {
    if (pool) destroy(pool, pool->threads - 1);
}

int pool_threads(const struct pool *pool) { return pool->threads; }
