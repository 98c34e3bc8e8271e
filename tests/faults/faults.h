/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Fault injection from outside the library: each of its allocations and system calls fails in turn, and a small workload
 * checks the consequences.
 *
 * A run is one child process that executes one scenario (scenarios.c) with one injected fault. It writes its verdict to
 * memory that it shares with its parent (main.c). The child itself fails allocations (alloc.c); the parent fails system
 * calls by seccomp user notification (calls.c). Both fail only requests of the library: each thread has a mark that is
 * set while the thread is inside the library.
 */
#ifndef KUF_FAULTS_H
#define KUF_FAULTS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MARKS = 512, TEXT = 1000 };

/* A thread of the child. */
struct mark {
    atomic_int tid;
    atomic_bool inside;
    /* The library's function that it calls, or its activity. A string literal, so that the parent can read it. */
    const char *_Atomic what;
};

/* The verdict of a run. Those from WRONG_FROM on are failures of the test. */
enum verdict {
    /* The run did not make the call that was to fail. */
    NOT_REACHED,
    /* All pages hold the right bytes, and no call failed. */
    RECOVERED,
    /* A call returned -errno, and all pages hold the right bytes. */
    CLEAN_ERROR,
    /* A page was poisoned or made inaccessible, and an event reported it. */
    POISONED,
    /* The service stopped with KUF_EVENT_FATAL, and kuf_close released the waiting threads. */
    STOPPED,
    WRONG_FROM,
    /* A page holds wrong bytes. */
    WRONG_BYTES = WRONG_FROM,
    /* A thread waits for a page, and no event and no call reported why. */
    SILENT,
    /* A call of the library does not return. */
    STUCK,
    /* The process died, or the library printed something. */
    ABORTED,
    /* Memory, descriptors, threads or mappings are left over. */
    LEAKED,
    /* Another promise of kuf.h is broken: a handle is unusable after an error, or poison has no event. */
    BROKEN,
    VERDICTS
};

enum kind { KIND_NONE, KIND_ALLOC, KIND_CALL };

struct shared {
    /* The fault: occurrence number `first` fails while `armed`, and all later ones too if `good` (for good). */
    enum kind kind;
    bool good;
    long first;
    /* Whether open_handle sets `armed`; otherwise it is set from the start. */
    bool after_open;
    atomic_bool armed;
    atomic_long occurrences;
    atomic_long injected;
    /* The number of occurrences of each call, by its index in the table (calls.c). */
    atomic_long counted[256];

    struct mark marks[MARKS];
    atomic_int marks_used;

    /* The workload's findings. */
    atomic_int verdict;
    atomic_bool error_seen, poison_seen, fatal_seen;
    char problem[TEXT];
    char first_error[200];
    /* The resources left over at the end. */
    long allocations, allocated, descriptors, threads, mapped;
    bool finished;
    /* The size of the mappings at the end of a run without a fault, if known. */
    long usually_mapped;
    /* A page of another process could not be poisoned, so that the library keeps its userfaultfd. */
    bool left_closed;
    /* The child's descriptor of the filter's notifications, or -1. */
    atomic_int listener;
    /* The return addresses of the allocation that failed. */
    void *stack[24];
    int depth;
};

extern struct shared *shared;

/* marks.c */
/* Returns the calling thread's mark, or NULL if it has none yet and so is outside the library. */
struct mark *own_mark(void);
struct place {
    bool inside;
    const char *what;
};
/* Sets the calling thread's place. Returns the previous one, for mark_back. */
struct place mark_place(bool inside, const char *what);
void mark_back(struct place before);
/* Call it in a forked child. */
void mark_anew(void);

/* Calls the library. */
#define LIB(call)                                                                                                        \
    ({                                                                                                                    \
        struct place lib_before = mark_place(true, #call);                                                                \
        __auto_type lib_got = (call);                                                                                     \
        mark_back(lib_before);                                                                                            \
        lib_got;                                                                                                          \
    })

/* alloc.c: the library's allocations that are not freed. */
void allocations_left(long *count, long *bytes);
/* Prints the stack of each of them. */
void print_allocations(void);

/* scenarios.c */
struct scenario {
    const char *name;
    void (*body)(void);
    /* The guest's memory is in another process, so that the library cannot read it. */
    bool remote;
};
extern const struct scenario scenarios[];
extern const int scenario_count;
/* Runs in the child. Never returns. */
_Noreturn void run_scenario(const struct scenario *scenario);

/* calls.c: the system calls that can fail. `nr` and the argument are those of the architecture. */
struct call {
    const char *name;
    long nr;
    /* The argument that must equal `value`, or -1. */
    int argument;
    uint64_t value;
    /* Terminated by 0. */
    int errnos[14];
    /* The offset in the struct at args[2] where the negative errno is stored too, or 0. */
    int result_at;
};
extern const struct call calls[];
extern const int call_count;
/* Runs in the child: from now on each call of the table goes to the parent. Returns false if the machine cannot do it. */
bool install_filter(void);
/*
 * Runs in the parent: answers until the child has ended. Returns false at the deadline, a time of CLOCK_MONOTONIC in
 * nanoseconds.
 */
bool answer_calls(int child_fd, const struct call *call, int error, uint64_t deadline);

#endif
