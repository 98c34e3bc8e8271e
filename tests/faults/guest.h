/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A small guest and its VMM: memory, threads that touch it, and the checks that hold whichever call fails. */
#ifndef KUF_FAULTS_GUEST_H
#define KUF_FAULTS_GUEST_H

#include "faults.h"

#include "../c/open_uffd.h"
#include "../c/touches.h"

enum { PAGES = 24, PAGES_MAX = 1536, REGIONS = 4, TOUCHERS = 2 };

/* The permitted content of a page; without a flag it is generation 1. */
enum {
    /* Zeroes are permitted too. */
    MAY_BE_ZERO = 1 << 0,
    /* Generation 2 instead of 1. */
    MAY_BE_NEW = 1 << 1,
    /* With MAY_BE_NEW: generation 1 is permitted too. */
    MAY_BE_OLD = 1 << 2,
    /* No generation, only zeroes. */
    IS_ZERO = 1 << 3,
};

struct region {
    unsigned char *memory;
    uint64_t gpa;
    int fd, pages;
    /* The region is a slot: kuf_add_memory succeeded, and the slot was not closed or removed. */
    atomic_bool served;
    /* KUF_END_POISON is ending the slot, so that poison needs no event any more. */
    atomic_bool ended;
    atomic_uchar may_be[PAGES_MAX];
    /* An event reported that the page is poisoned. */
    atomic_bool poisoned[PAGES_MAX];
};

/* Shared with the process that has the guest's memory, if that is another one. */
struct guest {
    struct region regions[REGIONS];
    struct toucher_of {
        struct region *region;
        int from, to, step;
        atomic_int at;
        atomic_bool finished;
        pthread_t thread;
    } touchers[TOUCHERS];
    _Atomic uint64_t progress_at;
    /* The command for the other process, a letter; the numbers of commands sent and executed. */
    atomic_int command, region, asked, answered;
};

extern struct guest *guest;
extern struct kuf *kuf;
extern atomic_int events[HARNESS_EVENTS], last_error[HARNESS_EVENTS];
/* A call told the thread of the test that resolves pages that it cannot, so that waiting threads are expected. */
extern atomic_bool gave_up;
/* The guest's memory is in another process. */
extern bool is_remote;

_Noreturn void end_with(enum verdict verdict, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Records that the run has made progress. */
void progress(void);
bool keep_waiting(void);
/* Waits until the condition holds. Returns false if it does not hold after a long time without progress. */
#define comes(condition)                                                                                                 \
    ({                                                                                                                    \
        bool comes_now;                                                                                                   \
        progress();                                                                                                       \
        while (!(comes_now = (condition)) && keep_waiting())                                                              \
            ;                                                                                                             \
        comes_now;                                                                                                        \
    })

/* Whether the fault occurs only once, and has occurred. */
bool fault_is_over(void);
/* Checks the result of a call. Returns whether the call failed and must be repeated. */
bool failed(const char *call, long got, int tries);
/* Whether an error is right although the fault is over, because an event reported a lasting consequence. */
bool is_aftermath(long got);

/* Repeats a call until it succeeds, three times at most. Yields the last result. */
#define TRY(call)                                                                                                        \
    ({                                                                                                                    \
        long try_got;                                                                                                     \
        int try_count = 0;                                                                                                \
        bool try_over;                                                                                                    \
        do {                                                                                                              \
            try_over = fault_is_over();                                                                                   \
            try_got = (long)LIB(call);                                                                                    \
        } while (failed(#call, try_got, ++try_count));                                                                    \
        if (try_got < 0 && try_over && !is_aftermath(try_got))                                                            \
            end_with(BROKEN, "%s: %ld after the fault is over: %s", #call, try_got, kuf_error());                         \
        try_got;                                                                                                          \
    })

size_t length_of(const struct region *region);
/*
 * The service has stopped, or it cannot read the kernel's queue, or the thread that resolves pages has given up: waiting
 * threads continue only when the handle is closed.
 */
bool stopped(void);
/* An event reported pages of another process that could be neither filled nor poisoned: their threads keep waiting. */
bool left_closed(void);

/* Callbacks, which do not use opaque. */
void on_event(void *opaque, const struct kuf_event *event);
int on_fill(void *opaque, struct kuf_fill *fill);
void fill_content(void *to, uint64_t gpa, uint64_t length);

struct region *new_region(int r, bool is_shared);
struct region *new_region_of(int r, unsigned char *memory, int fd, int pages);
void set_pages(struct region *region, int from, int count, unsigned may_be);
bool add_region(struct region *region, struct kuf_memory memory);
/* Touches a page of a slot, and ends the run if the page is wrong. Returns false if the page is poisoned. */
bool look_at(struct region *region, int page);
void look_at_all(struct region *region);
/* Touches each page from several threads. Returns false if the service has stopped, so that they may still wait. */
bool touch_region(struct region *region);
void touch_here(struct region *region);
bool touchers_are_through(void);
void join_touchers(void);
/* Ends the run with SILENT and names a thread that waits. */
_Noreturn void end_silent(const char *what);
/*
 * Runs an operation of the VMM on guest memory on a separate thread, because it waits for the library. Returns false if
 * the service has stopped, so that it may still wait.
 */
bool by_itself(void *(*body)(void *), void *argument);
/* Sends a command to the other process; the functions in _there also wait for it. */
void ask(int command, struct region *region);
bool by_itself_there(int command, struct region *region);
bool touch_there(struct region *region);

bool open_handle(struct kuf_options options);
/* Closes with `flags`. If that fails, closes without further faults and with KUF_END_POISON, which must work. */
void close_handle(uint32_t flags);
/* Calls kuf_discard for pages of a region, if the region is a slot. */
void drop(struct region *region, int from, int count, uint32_t flags);
/* Joins a kuf_discard that was left waiting, after the handle is closed. */
void end_discard(void);
void begin_run(void);
/* The service has reported that it stopped, and the process can only be killed. */
_Noreturn void end_run_stopped(void);
_Noreturn void finish_run(void);

#endif
