/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * What the tests of hard cases share: a watchdog that says where the library stands, and touchers that survive SIGBUS.
 */
#ifndef KUF_TESTS_TRAP_H
#define KUF_TESTS_TRAP_H

#include "harness.h"

/* The handle that the watchdog describes. */
static struct kuf *_Atomic watched;
static unsigned watch_seconds;

static inline void dump_handle(struct kuf *kuf)
{
    if (kuf == NULL)
        return;
    struct kuf_progress p = {.size = sizeof(p)};
    struct kuf_stats s = {.size = sizeof(s)};
    if (kuf_progress(kuf, KUF_ALL, &p) == 0)
        printf("    progress: total %#" PRIx64 " present %#" PRIx64 " removed %#" PRIx64 " absent %#" PRIx64
               " filling %#" PRIx64 " deferred %#" PRIx64 " poisoned %#" PRIx64 " flags %#x\n",
               p.total, p.present, p.removed, p.absent, p.filling, p.deferred, p.poisoned, p.flags);
    if (kuf_stats(kuf, &s) == 0)
        printf("    stats: faults %" PRIu64 " joined %" PRIu64 " late %" PRIu64 " unknown %" PRIu64 " fills %" PRIu64
               " failed %" PRIu64 " deferred %" PRIu64 " remove %" PRIu64 " unmap %" PRIu64 " remap %" PRIu64
               " fork %" PRIu64 " again %" PRIu64 " exists %" PRIu64 " no_memory %" PRIu64 " queue_full %" PRIu64 "\n",
               s.faults, s.faults_joined, s.faults_late, s.faults_unknown, s.fills, s.fills_failed, s.fills_deferred,
               s.events_remove, s.events_unmap, s.events_remap, s.events_fork, s.install_again, s.install_exists,
               s.install_no_memory, s.queue_full);
    struct kuf_fault owed[32];
    ssize_t n = kuf_pending(kuf, owed, 32);
    for (ssize_t i = 0; i < n && i < 32; i++)
        printf("    pending: %#" PRIx64 "+%#" PRIx64 " flags %#x age %" PRIu64 " ms\n", owed[i].gpa, owed[i].len,
               owed[i].flags, owed[i].age_ns / 1000000);
    fflush(stdout);
}

static inline void *watch_body(void *unused)
{
    (void)unused;
    uint64_t end = now_ns() + (uint64_t)watch_seconds * 1000000000;
    while (now_ns() < end)
        sleep_ms(50);
    /* If the library is so stuck that it does not even say how far it is, the alarm ends the program. */
    watchdog(10);
    printf("    HANG after %u s\n", watch_seconds);
    fflush(stdout);
    dump_handle(atomic_load(&watched));
    raise(SIGALRM);
    return NULL;
}

/* begin(), with a watchdog that describes `watched` first. */
static inline void begin_watched(unsigned seconds)
{
    begin();
    watchdog(seconds + 60);
    watch_seconds = seconds;
    pthread_detach(start(watch_body, NULL));
}

static inline struct kuf *watch(struct kuf *kuf)
{
    atomic_store(&watched, kuf);
    return kuf;
}

static inline void close_watched(struct kuf *kuf, uint32_t flags)
{
    atomic_store(&watched, NULL);
    close_with(kuf, flags);
}

/* Reading a byte from any number of threads at once: 0, or the signal that it raised. Handlers are set once for all. */
static _Thread_local sigjmp_buf *volatile trap_touching;

static inline void trap_touched(int signal_number)
{
    if (trap_touching == NULL) {
        signal(signal_number, SIG_DFL);
        return;
    }
    siglongjmp(*trap_touching, signal_number);
}

static inline void catch_touches(void)
{
    struct sigaction action = {.sa_handler = trap_touched, .sa_flags = SA_NODEFER};
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
}

static inline int try_touch(const volatile void *address)
{
    sigjmp_buf here;
    int raised = sigsetjmp(here, 1);
    if (raised == 0) {
        trap_touching = &here;
        (void)*(const volatile unsigned char *)address;
    }
    trap_touching = NULL;
    return raised;
}

/* A thread that touches one page: what it saw. */
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

/* A random number generator that needs no lock: each thread has its own state, not 0. */
static inline uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state * UINT64_C(0x2545f4914f6cdd1d);
}

#endif
