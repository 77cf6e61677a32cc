// Picks the instruction-set level at run time.
#include "table.h"

#include <stddef.h>
#include <string.h>

extern const kernel_table engine_level_scalar, engine_level_avx2, engine_level_avx512, engine_level_avx512_vbmi;

static int cpu_runs_scalar(void) { return 1; }
#ifdef ENGINE_HAS_AVX2
static int cpu_runs_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2");
}
#endif
#ifdef ENGINE_HAS_AVX512
static int cpu_runs_avx512(void) {
    return cpu_runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif
#ifdef ENGINE_HAS_AVX512_VBMI
static int cpu_runs_avx512_vbmi(void) {
    return cpu_runs_avx512() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
}
#endif

static const struct {
    const kernel_table *table;
    int (*cpu_runs)(void);
} levels[] = {
    {&engine_level_scalar, cpu_runs_scalar},
#ifdef ENGINE_HAS_AVX2
    {&engine_level_avx2, cpu_runs_avx2},
#endif
#ifdef ENGINE_HAS_AVX512
    {&engine_level_avx512, cpu_runs_avx512},
#endif
#ifdef ENGINE_HAS_AVX512_VBMI
    {&engine_level_avx512_vbmi, cpu_runs_avx512_vbmi},
#endif
};

const kernel_table *engine_kernels(const char *isa) {
    const kernel_table *best = NULL;
    for (size_t i = 0; i < sizeof levels / sizeof *levels; i++)
        if ((!isa || !strcmp(isa, levels[i].table->name)) && levels[i].cpu_runs())
            best = levels[i].table;
    return best;
}

int engine_levels(const char *names[N_LEVELS]) {
    int n = 0;
    for (size_t i = 0; i < sizeof levels / sizeof *levels; i++)
        if (levels[i].cpu_runs())
            names[n++] = levels[i].table->name;
    return n;
}
