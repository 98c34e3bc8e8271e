/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Threads that touch one page each and survive SIGBUS and SIGSEGV.
 */
#ifndef KUF_TESTS_TOUCHES_H
#define KUF_TESTS_TOUCHES_H

#include "harness.h"

/* try_touch() reads a byte: 0, or the signal that this raised. Any number of threads may call it once catch_touches() was. */
static _Thread_local sigjmp_buf *volatile touching_here;

static inline void end_touch(int signal_number)
{
    if (touching_here == NULL) {
        signal(signal_number, SIG_DFL);
        return;
    }
    siglongjmp(*touching_here, signal_number);
}

static inline void catch_touches(void)
{
    struct sigaction action = {.sa_handler = end_touch, .sa_flags = SA_NODEFER};
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
}

static inline int try_touch(const volatile void *address)
{
    sigjmp_buf here;
    int raised = sigsetjmp(here, 1);
    if (raised == 0) {
        touching_here = &here;
        (void)*(const volatile unsigned char *)address;
    }
    touching_here = NULL;
    return raised;
}

/* A thread that touches one page, and the first word that it read. */
struct one_touch {
    const volatile unsigned char *at;
    atomic_bool begun, finished;
    atomic_int tid;
    int raised;
    uint64_t word;
    pthread_t thread;
};

static inline void *one_touch_body(void *argument)
{
    struct one_touch *one = argument;
    atomic_store(&one->tid, (int)syscall(SYS_gettid));
    atomic_store(&one->begun, true);
    one->raised = try_touch(one->at);
    if (one->raised == 0)
        one->word = *(const volatile uint64_t *)one->at;
    atomic_store(&one->finished, true);
    return NULL;
}

static inline void touch_in_thread(struct one_touch *one, const volatile void *at)
{
    *one = (struct one_touch){.at = at};
    one->thread = start(one_touch_body, one);
}

/* Whether a thread sleeps in the kernel for a page fault or an event of a userfaultfd. */
static inline bool waits_in(int tid, const char *where)
{
    char path[64], line[128] = "";
    snprintf(path, sizeof(path), "/proc/self/task/%d/wchan", tid);
    FILE *file = fopen(path, "r");
    if (file == NULL)
        return false;
    if (fgets(line, sizeof(line), file) == NULL)
        line[0] = 0;
    fclose(file);
    return strstr(line, where) != NULL;
}

#endif
