/* Feeds hostile bytes to the GGUF reader and to the model loader: whatever they are, the answer is a sentence.
 *
 * With libFuzzer (clang), from the root of the repository:
 *     clang -g -O1 -std=gnu11 -fsanitize=fuzzer,address,undefined -Inative/include -Inative/src \
 *         native/fuzz/fuzz_gguf.c $(find native/src -name '*.c' ! -name 'avx*.c') -lm -lpthread -o fuzz_gguf
 *     ./fuzz_gguf corpus/
 * With gcc: the same command with -fsanitize=address,undefined -DREPLAY. That program replays the files it is given, and
 * then FUZZ_ROUNDS (environment, default 0) variants of each with a few bytes changed or the end cut off:
 *     FUZZ_ROUNDS=10000 ./fuzz_gguf model.gguf
 * No RONDEL_X86 is defined, so only the scalar kernels are built. Linux only: files are made in memory. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "rondel.h"

static uint64_t checksum; /* of everything that was read, so that the reads happen */

static void touch(const void *data, uint64_t bytes) {
    const uint8_t *byte = data;
    for (uint64_t i = 0; i < bytes; i++) checksum = checksum * 31 + byte[i];
}

static void read_file(const rondel_file *file) {
    uint64_t bytes, offset, shape[4];
    for (int64_t i = 0; i < rondel_file_key_count(file); i++) {
        const void *name = rondel_file_key_name(file, i, &bytes);
        touch(name, bytes);
        const void *value = rondel_file_key_data(file, i, &bytes);
        touch(value, bytes);
    }
    for (int64_t i = 0; i < rondel_file_tensor_count(file); i++) {
        const void *data = rondel_file_tensor_data(file, i, &bytes, &offset);
        touch(data, bytes);
        checksum += (uint64_t)rondel_file_tensor_shape(file, i, shape) + strlen(rondel_file_tensor_name(file, i)) +
                    strlen(rondel_file_tensor_format(file, i)) + (uint64_t)rondel_file_tensor_check(file, i);
    }
}

static void run_model(const char *path) {
    rondel_model *model = rondel_model_open(path);
    if (!model) return;
    read_file(rondel_model_file(model));
    for (int replication = 0; replication < 2; replication++) {
        rondel_session *session = rondel_session_new(model, 4, 3, 1, "auto", replication);
        const int32_t tokens[3] = {0, 1, 0};
        int32_t vocabulary = rondel_model_vocabulary(model);
        float *logits = vocabulary < 1 << 20 ? malloc((size_t)vocabulary * sizeof *logits) : NULL;
        if (session) rondel_session_eval(session, tokens, vocabulary > 1 ? 3 : 1, 0, 0, logits);
        free(logits);
        rondel_session_free(session);
    }
    rondel_model_close(model);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char path[64];
    int file = memfd_create("fuzz.gguf", 0);
    if (file < 0 || write(file, data, size) != (ssize_t)size) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    rondel_file *opened = rondel_file_open(path);
    if (opened) read_file(opened);
    rondel_file_close(opened);
    run_model(path);
    close(file);
    return 0;
}

#ifdef REPLAY
static uint32_t next_random(uint64_t *state) {
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(*state >> 33);
}

/* Up to eight bytes, mostly of the first half where the header is, become extreme or random; sometimes the end is cut. */
static size_t mutate(uint8_t *data, size_t size, uint64_t *state) {
    static const uint8_t extremes[] = {0, 1, 0x7f, 0x80, 0xff, 8, 9, 24};
    for (uint32_t count = 1 + next_random(state) % 8; count > 0; count--) {
        size_t at = next_random(state) % (next_random(state) % 4 ? size / 2 + 1 : size);
        data[at] = next_random(state) % 2 ? extremes[next_random(state) % sizeof extremes] : (uint8_t)next_random(state);
    }
    return next_random(state) % 16 ? size : next_random(state) % size;
}

int main(int count, char **paths) {
    const char *text = getenv("FUZZ_ROUNDS");
    long rounds = text ? atol(text) : 0;
    uint64_t state = 1;
    for (int i = 1; i < count; i++) {
        FILE *file = fopen(paths[i], "rb");
        if (!file) return perror(paths[i]), 1;
        fseek(file, 0, SEEK_END);
        size_t size = (size_t)ftell(file);
        rewind(file);
        uint8_t *good = malloc(size + 1), *bad = malloc(size + 1);
        if (!good || !bad || fread(good, 1, size, file) != size) return 1;
        fclose(file);
        LLVMFuzzerTestOneInput(good, size);
        for (long round = 0; round < rounds && size > 0; round++) {
            memcpy(bad, good, size);
            LLVMFuzzerTestOneInput(bad, mutate(bad, size, &state));
        }
        free(good);
        free(bad);
    }
    printf("%d files, %ld variants of each, checksum %016llx\n", count - 1, rounds, (unsigned long long)checksum);
    return 0;
}
#endif
