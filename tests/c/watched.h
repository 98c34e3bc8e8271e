/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A watchdog that prints the state of a handle before it ends the program: begin_watched(), watch(), close_watched().
 */
#ifndef KUF_TESTS_WATCHED_H
#define KUF_TESTS_WATCHED_H

#include "harness.h"

/* The handle that the watchdog describes. The lock is for ThreadSanitizer, which does not see atomics of the tests. */
static struct kuf *_Atomic watched;
static pthread_mutex_t watched_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned watch_seconds;

static inline void dump_handle(struct kuf *kuf)
{
    if (kuf == NULL)
        return;
    struct kuf_progress_info p = {.size = sizeof(p)};
    struct kuf_stats_info s = {.size = sizeof(s)};
    if (kuf_progress(kuf, KUF_ALL, &p) == 0)
        printf("    progress: total %#" PRIx64 " present %#" PRIx64 " removed %#" PRIx64 " absent %#" PRIx64
               " filling %#" PRIx64 " deferred %#" PRIx64 " poisoned %#" PRIx64 " flags %#x\n",
               p.total, p.present, p.removed, p.absent, p.filling, p.deferred, p.poisoned, p.flags);
    if (kuf_stats(kuf, &s) == 0)
        printf("    stats: faults %" PRIu64 " joined %" PRIu64 " late %" PRIu64 " unknown %" PRIu64 " fills %" PRIu64
               " failed %" PRIu64 " deferred %" PRIu64 " remove %" PRIu64 " unmap %" PRIu64 " remap %" PRIu64
               " fork %" PRIu64 " again %" PRIu64 " exists %" PRIu64 " no_memory %" PRIu64 "\n",
               s.faults, s.faults_joined, s.faults_late, s.faults_unknown, s.fills, s.fills_failed, s.fills_deferred,
               s.events_remove, s.events_unmap, s.events_remap, s.events_fork, s.install_again, s.install_exists,
               s.install_no_memory);
    struct kuf_fault owed[32];
    ssize_t n = kuf_pending(kuf, owed, 32);
    for (ssize_t i = 0; i < n && i < 32; i++)
        printf("    pending: %#" PRIx64 "+%#" PRIx64 " flags %#x age %" PRIu64 " ms\n", owed[i].gpa, owed[i].len,
               owed[i].flags, owed[i].age_ns / 1000000);
    fflush(stdout);
}

/* ---- A watchdog over work that the program counts itself: for programs that run for a set time --------------------------- */

struct progress_watch {
    uint64_t (*work)(void);
    /* Prints the state of the program; may be NULL. */
    void (*describe)(void);
    unsigned patience_s;
    atomic_bool over;
    pthread_t thread;
};

static inline void *progress_watch_body(void *argument)
{
    struct progress_watch *watch = argument;
    uint64_t last = 0, since = now_ns();
    for (; !atomic_load(&watch->over); sleep_ms(100)) {
        uint64_t work = watch->work();
        if (work != last) {
            last = work;
            since = now_ns();
        } else if (now_ns() - since > (uint64_t)watch->patience_s * 1000000000) {
            /* If the library cannot even report its state, the alarm ends the program. */
            watchdog(10);
            printf("    HANG: nothing was done for %u s\n", watch->patience_s);
            if (watch->describe != NULL)
                watch->describe();
            raise(SIGALRM);
        }
    }
    return NULL;
}

static inline void start_progress_watch(struct progress_watch *watch)
{
    watch->thread = start(progress_watch_body, watch);
}

static inline void end_progress_watch(struct progress_watch *watch)
{
    atomic_store(&watch->over, true);
    pthread_join(watch->thread, NULL);
}

/* ---- A watchdog over the library's counters of the handle ----------------------------------------------------------- */

/* A count that grows while the test makes progress. It leaves out refused installs. */
static inline uint64_t watched_work(void)
{
    struct kuf_stats_info s = {.size = sizeof(s)};
    pthread_mutex_lock(&watched_lock);
    struct kuf *kuf = atomic_load(&watched);
    pthread_mutex_unlock(&watched_lock);
    uint64_t checks = (uint64_t)atomic_load(&harness_checks);
    if (kuf == NULL || kuf_stats(kuf, &s) != 0)
        return checks;
    return checks + s.bytes_copied + s.bytes_zeroed + s.bytes_in_place + s.bytes_discarded + s.events_remove;
}

static inline void *watch_body(void *unused)
{
    (void)unused;
    uint64_t patience = (uint64_t)watch_seconds * 1000000000, last = 0, end = now_ns() + patience;
    /* It is no hang while there is progress, up to this time: the machine may be slow. */
    uint64_t limit = now_ns() + 10 * patience;
    for (; now_ns() < end && now_ns() < limit; sleep_ms(50)) {
        uint64_t work = watched_work();
        if (work != last) {
            last = work;
            end = now_ns() + patience;
            alarm(watch_seconds + 60);
        }
    }
    /* If the library cannot even report its state, the alarm ends the program. */
    watchdog(10);
    printf("    HANG: %s\n", now_ns() < limit ? "nothing was done" : "it does not end");
    fflush(stdout);
    dump_handle(atomic_load(&watched));
    raise(SIGALRM);
    return NULL;
}

/* begin(), with a watchdog that prints the state of `watched` first. */
static inline void begin_watched(unsigned seconds)
{
    begin();
    watchdog(seconds + 60);
    watch_seconds = seconds;
    pthread_detach(start(watch_body, NULL));
}

static inline struct kuf *watch(struct kuf *kuf)
{
    pthread_mutex_lock(&watched_lock);
    atomic_store(&watched, kuf);
    pthread_mutex_unlock(&watched_lock);
    return kuf;
}

static inline void close_watched(struct kuf *kuf, uint32_t flags)
{
    atomic_store(&watched, NULL);
    close_with(kuf, flags);
}

#endif
