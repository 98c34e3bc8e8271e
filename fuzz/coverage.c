/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What libFuzzer is told of code that gcc has compiled: gcc calls a function at each branch, libFuzzer looks at counters. So
 * the function counts, by where it was called from (build.rs has the linker put it in place of the sanitizer's own, which
 * does nothing). Itself compiled without any of this.
 */
#include <stdint.h>

/* More than the code has branches: two that meet are one to the fuzzer. */
enum { PLACES = 1 << 12 };

static uint8_t counters[PLACES];
static struct {
    uintptr_t place, flags;
} places[PLACES];

void __sanitizer_cov_8bit_counters_init(uint8_t *start, uint8_t *stop);
void __sanitizer_cov_pcs_init(const uintptr_t *start, const uintptr_t *stop);
void __wrap___sanitizer_cov_trace_pc(void);

void __wrap___sanitizer_cov_trace_pc(void)
{
    uintptr_t from = (uintptr_t)__builtin_return_address(0);
    uint8_t *counter = &counters[from % PLACES];
    *counter += *counter < UINT8_MAX;
}

__attribute__((constructor)) static void register_counters(void)
{
    for (int i = 0; i < PLACES; i++)
        places[i].place = (uintptr_t)__wrap___sanitizer_cov_trace_pc + 1 + (uintptr_t)i;
    __sanitizer_cov_8bit_counters_init(counters, counters + PLACES);
    __sanitizer_cov_pcs_init(&places[0].place, &places[0].place + 2 * PLACES);
}
