/* Owns what rondel knows about the machine: usable cores, their clock, and how fast memory can be read. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "error.h"
#include "pool.h"
#include "rondel.h"

/* Whole cores that the control group's quota allows, or `cores` where there is none (Linux, cgroup version 2). */
static int32_t quota(int32_t cores) {
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "r");
    double allowed, period;
    if (file) {
        if (fscanf(file, "%lf %lf", &allowed, &period) == 2 && period > 0 && allowed / period < cores)
            cores = allowed / period < 1 ? 1 : (int32_t)(allowed / period + 0.5);
        fclose(file);
    }
    return cores;
}

EXPORT int32_t rondel_cpu_count(void) {
    int32_t cores = (int32_t)sysconf(_SC_NPROCESSORS_ONLN);
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) cores = CPU_COUNT(&set);
    cores = quota(cores);
#endif
    return cores < 1 ? 1 : cores;
}

struct sweep {
    const uint64_t *data;
    int64_t words;
    uint64_t sums[1024]; /* one a thread; only there so that the reads have a use */
};

static void read_share(void *argument, int thread, int threads) {
    struct sweep *sweep = argument;
    int64_t first, last;
    pool_share(sweep->words, 4096, thread, threads, &first, &last);
    uint64_t lanes[16] = {0};
    for (int64_t i = first; i + 16 <= last; i += 16)
        for (int lane = 0; lane < 16; lane++) lanes[lane] += sweep->data[i + lane];
    uint64_t sum = 0;
    for (int lane = 0; lane < 16; lane++) sum += lanes[lane];
    sweep->sums[thread] = sum;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

EXPORT double rondel_read_bandwidth(int32_t threads, uint64_t bytes) {
    enum { PASSES = 5 };
    uint64_t size = (bytes + 4095) / 4096 * 4096;
    struct pool *pool = pool_new(threads);
    struct sweep *sweep = calloc(1, sizeof *sweep);
    void *data = NULL;
    double best = -1;
    if (!pool) goto end;
    if (!sweep || size == 0 || posix_memalign(&data, 4096, size) != 0) {
        set_error("out of memory for a bandwidth test of %llu bytes", (unsigned long long)bytes);
        goto end;
    }
    memset(data, 1, size); /* touched, so that every page is real */
    sweep->data = data;
    sweep->words = (int64_t)(size / 8);
    for (int pass = 0; pass < PASSES; pass++) {
        double begin = seconds();
        pool_run(pool, read_share, sweep);
        double rate = (double)size / (seconds() - begin);
        best = rate > best ? rate : best;
    }
end:
    free(data);
    free(sweep);
    pool_free(pool);
    return best;
}

/* Of additions that wait for each other every processor does one a cycle, whatever else its core does. */
EXPORT double rondel_clock_rate(void) {
    enum { ADDITIONS = 1 << 18, UNROLLED = 8 };
    uint64_t sum = 1;
    double begin = seconds();
    for (int i = 0; i < ADDITIONS / UNROLLED; i++)
        for (int j = 0; j < UNROLLED; j++) {
            sum += sum;
            __asm__ volatile("" : "+r"(sum)); /* keeps the compiler from knowing the sum */
        }
    return ADDITIONS / (seconds() - begin);
}
