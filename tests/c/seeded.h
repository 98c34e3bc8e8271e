/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * For programs with random operations: a seed that can be given again, and random numbers from it for each thread.
 */
#ifndef KUF_TESTS_SEEDED_H
#define KUF_TESTS_SEEDED_H

#include "watched.h"

/* A random number generator that needs no lock: each thread has its own state, not 0. */
static inline uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state * UINT64_C(0x2545f4914f6cdd1d);
}

static uint64_t seed;
static atomic_ulong threads_seeded;
static _Thread_local uint64_t thread_random;

static inline uint64_t mix(uint64_t x)
{
    x ^= x >> 31;
    x *= UINT64_C(0x7fb5d329728ea185);
    x ^= x >> 27;
    x *= UINT64_C(0x81dadef4bc2dd44d);
    return x ^ x >> 33;
}

static inline uint64_t chance(void)
{
    if (thread_random == 0)
        thread_random = mix(seed + 1000 + atomic_fetch_add(&threads_seeded, 1)) | 1;
    return next_random(&thread_random) >> 16;
}

static inline uint64_t below(uint64_t n)
{
    return chance() % n;
}

/* The content of a page as a number: zeroes, a generation of the source, or with CODE_WRITTEN a write of the guest's. */
#define CODE_ZERO 0
#define CODE_WRITTEN (UINT64_C(1) << 48)

/* Of the source's pages some are zero. */
static inline uint64_t source_code(unsigned page, uint64_t generation)
{
    return mix(page * UINT64_C(0x10001) + generation) % 8 == 0 ? CODE_ZERO : generation;
}

static inline void write_code(void *buffer, uint64_t gpa, uint64_t length, uint64_t code)
{
    if (code == CODE_ZERO)
        memset(buffer, 0, length);
    else
        write_content(buffer, gpa, length, code);
}

static inline uint64_t setting(const char *name, uint64_t otherwise)
{
    const char *text = getenv(name);
    return text != NULL && *text != 0 ? strtoull(text, NULL, 0) : otherwise;
}

/* Takes the seed from KUF_STRESS_SEED or the clock, prints it, and returns the duration. `slack`: the watchdog's. */
static inline uint64_t begin_seeded(uint64_t seconds_otherwise, unsigned slack)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = setting("KUF_STRESS_SEED", (uint64_t)now.tv_sec * 1000003 + (uint64_t)now.tv_nsec);
    uint64_t seconds = setting("KUF_STRESS_SECONDS", seconds_otherwise);
    watchdog((unsigned)seconds + slack);
    printf("# seed %" PRIu64 " (KUF_STRESS_SEED), %" PRIu64 " s (KUF_STRESS_SECONDS)\n", seed, seconds);
    return seconds;
}

#endif
