/* Chooses the instruction set: the best usable one at first use, or what the caller asks for. */
#include <stdatomic.h>
#include <string.h>

#include "error.h"
#include "kernels.h"
#include "rondel.h"

#ifdef RONDEL_X86
#include <cpuid.h>

/* The compiler's predicates also ask whether the operating system saves the wide registers; F16C needs only AVX's. */
int avx2_usable(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma");
}

int avx512_usable(void) {
    return avx2_usable() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

static const struct kernels *const instruction_sets[] = {
#ifdef RONDEL_X86
    &kernels_avx512,
    &kernels_avx2,
#endif
    &kernels_scalar,
};
enum { COUNT = sizeof instruction_sets / sizeof instruction_sets[0] };

static _Atomic(const struct kernels *) current;

const struct kernels *kernels_current(void) {
    const struct kernels *chosen = atomic_load_explicit(&current, memory_order_acquire);
    for (int i = 0; !chosen; i++) /* ends: scalar is always usable; two threads may do this and agree */
        if (instruction_sets[i]->usable()) {
            chosen = instruction_sets[i];
            atomic_store_explicit(&current, chosen, memory_order_release);
        }
    return chosen;
}

EXPORT int32_t rondel_isa_count(void) { return COUNT; }

EXPORT const char *rondel_isa_name(int32_t index) {
    return index >= 0 && index < COUNT ? instruction_sets[index]->name : NULL;
}

EXPORT int32_t rondel_isa_usable(int32_t index) {
    return index >= 0 && index < COUNT && instruction_sets[index]->usable();
}

EXPORT const char *rondel_isa_current(void) { return kernels_current()->name; }

EXPORT int32_t rondel_isa_use(const char *name) {
    for (int i = 0; i < COUNT; i++) {
        if (strcmp(instruction_sets[i]->name, name)) continue;
        if (!instruction_sets[i]->usable()) return set_error("this processor has no %s", name);
        atomic_store_explicit(&current, instruction_sets[i], memory_order_release);
        return 0;
    }
    return set_error("unknown instruction set '%s': rondel_isa_name() lists those of this build", name);
}
