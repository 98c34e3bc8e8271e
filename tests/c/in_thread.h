/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Calls that a test makes on a thread of their own, because they wait: kuf_ensure, and madvise(2) of the guest.
 */
#ifndef KUF_TESTS_IN_THREAD_H
#define KUF_TESTS_IN_THREAD_H

#include "harness.h"

struct ensuring {
    struct kuf *kuf;
    uint64_t gpa, length;
    int got;
    atomic_int tid;
    atomic_bool returned;
    pthread_t thread;
};

static inline void *ensuring_body(void *argument)
{
    struct ensuring *ensuring = argument;
    atomic_store(&ensuring->tid, (int)syscall(SYS_gettid));
    ensuring->got = kuf_ensure(ensuring->kuf, ensuring->gpa, ensuring->length, -1);
    atomic_store(&ensuring->returned, true);
    return NULL;
}

/* Calls kuf_ensure without a timeout. */
static inline void start_ensuring(struct ensuring *ensuring, struct kuf *kuf, uint64_t gpa, uint64_t length)
{
    *ensuring = (struct ensuring){.kuf = kuf, .gpa = gpa, .length = length};
    ensuring->thread = start(ensuring_body, ensuring);
}

/* Returns the call's result. */
static inline int join_ensuring(struct ensuring *ensuring)
{
    pthread_join(ensuring->thread, NULL);
    return ensuring->got;
}

struct giving {
    unsigned char *at;
    size_t length;
    int advice;
    atomic_int tid;
    atomic_bool returned;
    pthread_t thread;
};

static inline void *giving_body(void *argument)
{
    struct giving *giving = argument;
    atomic_store(&giving->tid, (int)syscall(SYS_gettid));
    must(madvise(giving->at, giving->length, giving->advice) == 0, "madvise: %s", strerror(errno));
    atomic_store(&giving->returned, true);
    return NULL;
}

/* Gives memory back: MADV_DONTNEED or MADV_REMOVE. The thread to join is giving->thread. */
static inline void start_giving(struct giving *giving, unsigned char *at, size_t length, int advice)
{
    *giving = (struct giving){.at = at, .length = length, .advice = advice};
    giving->thread = start(giving_body, giving);
}

#endif
