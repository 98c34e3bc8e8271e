/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A fuzzer of the C ABI on the kernel that runs here: threads make random calls on the same few pages, and a model says
 * for each page which contents a touch may show.
 *
 * The driver (main.c) starts one process for each round. plan.c turns a seed into a round: the mode, the slots, and a list
 * of operations for each thread. round.c runs it; calls.c, touches.c and source.c do the operations and tell the model
 * (model.c) when each begins and ends. Everything that the driver has to see after a crash is in one shared mapping,
 * struct world.
 */
#ifndef KUF_FUZZ_H
#define KUF_FUZZ_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <kuf-kvm.h>

enum {
    SLOTS = 3,
    SLOT_PAGES = 64,
    PAGES = SLOTS * SLOT_PAGES,
    /* Handlers of one round, one after the other (MODE_REMOTE). */
    HANDLERS = 3,
    THREADS = 6,
    OPERATIONS = 400,
    SERVERS = 2,
    /* Threads of a round that keep a trace: the operating ones, the servers, callbacks together, the round itself. */
    TRACES = THREADS + SERVERS + 2,
    TRACE_CALLBACKS = THREADS + SERVERS,
    TRACE_ROUND = THREADS + SERVERS + 1,
    TRACE_LENGTH = 32,
    HISTORY_LENGTH = 64,
    /* Calls and touches that may be under way on one page at once. */
    PENDING = 16,
    STATES = 256,
    SEEN = 48,
    SMALL_PAGE = 4096,
    HUGE_PAGE = 2 << 20,
    /* The word of a page that guest writes go to. */
    WRITE_WORD = 100,
};

/* ---- Model --------------------------------------------------------------------------------------------------------- */

enum kind {
    /* Not filled: a touch waits for a fill. */
    KIND_ABSENT,
    /* Bytes of the source, in a version. */
    KIND_SOURCE,
    KIND_ZERO,
    KIND_POISONED,
    /* Nothing is mapped there. */
    KIND_NOWHERE,
    /* Memory just mapped, not yet added. */
    KIND_FRESH,
};

enum {
    /* No slot has the page: the library neither fills nor poisons it. */
    STATE_FREE = 1,
    /* MADV_FREE: the kernel may drop it until it is written. Of a poisoned page: a fill may take the mark's place. */
    STATE_LAZY = 2,
    /* A poisoned page whose mark was dropped: it is put back when the page is touched, by a library that is there. */
    STATE_UNMARKED = 4,
    /* A page that was given back, and no room in the file system for the page of zeroes that a touch takes. */
    STATE_NO_ROOM = 8,
    /* KUF_MEMORY_FILL_ALL of another process's memory: absent to the library, but what is mapped is still to be seen. */
    STATE_FORGOTTEN = 16,
};

/* One thing that a page may be. The masks have a bit for each pending operation. */
struct state {
    /* KIND_ABSENT, or forgotten zeroes: the oldest version that a fill may use. KIND_SOURCE: the version. */
    uint32_t version;
    /* The number of the last guest write, or 0. */
    uint32_t written;
    /* The operation has taken effect; it was this one that made the page present; the page has changed since it began. */
    uint16_t applied, made, moved;
    uint8_t kind, flags;
};

struct value {
    uint8_t kind;
    uint32_t version, written;
};

/* Flags of EFFECT_END and EFFECT_ADD, besides the library's. */
#define ENDS_HANDLE (UINT32_C(1) << 31)
#define ADDED_ANEW (UINT32_C(1) << 30)
/* KUF_MEMORY_FILL_ALL: present pages may be dropped. */
#define FILLS_ALL (UINT32_C(1) << 29)

enum effect {
    EFFECT_READ,
    EFFECT_WRITE,
    EFFECT_DISCARD,
    EFFECT_DISCARD_REMOVED,
    EFFECT_RESOLVE,
    EFFECT_RESOLVE_ZERO,
    EFFECT_RESOLVE_POISON,
    EFFECT_ENSURE,
    /* madvise that drops the bytes; one that only unmaps those of a shared file; MADV_FREE. */
    EFFECT_GIVE_BACK,
    EFFECT_UNMAP_SHARED,
    EFFECT_LAZY,
    EFFECT_CUT,
    EFFECT_END,
    EFFECT_ADD,
    EFFECT_RESET,
};

enum outcome {
    OUTCOME_DONE,
    /* Done, and this call made the page present. */
    OUTCOME_MADE,
    /* It changed nothing. */
    OUTCOME_REFUSED,
    /* Either: a call that failed half-way. */
    OUTCOME_UNKNOWN,
    /* A read saw a value; one that saw several, each of which must have been possible meanwhile. */
    OUTCOME_VALUE,
    OUTCOME_MIXED,
};

struct pending {
    bool used, seen_all;
    uint8_t effect;
    uint16_t seen_count;
    uint32_t argument, flags, changes, began_with;
    pid_t process;
    struct value seen[SEEN];
};

struct history {
    uint8_t what, trace, end;
    int32_t result;
    uint32_t argument;
    uint64_t at_ns;
};

struct page {
    atomic_uint lock;
    /* The version that the source has now; it grows with each discard. */
    _Atomic uint32_t version;
    _Atomic uint32_t writes;
    /* Too much was possible at once: not checked any further until the page is mapped anew. */
    bool lost;
    /* Changes by operations that are more than looks, so far. */
    uint32_t changes, history_count;
    uint16_t count;
    struct state states[STATES];
    struct pending pending[PENDING];
    struct history history[HISTORY_LENGTH];
};

/* ---- Plan ---------------------------------------------------------------------------------------------------------- */

enum mode { MODE_SERVICED, MODE_SOURCES, MODE_DRIVEN, MODE_DIRECT, MODE_ADOPTED, MODE_FORKING, MODE_REMOTE, MODES };

enum backing { BACKING_PRIVATE, BACKING_SHARED, BACKING_SHARED_NO_FD, BACKING_HUGE_PRIVATE, BACKING_HUGE_SHARED, BACKINGS };

enum operation {
    OP_READ,
    OP_WRITE,
    OP_DISCARD,
    OP_DISCARD_REMOVED,
    OP_RESOLVE,
    OP_RESOLVE_ZERO,
    OP_RESOLVE_POISON,
    OP_RESOLVE_PRESENT,
    OP_ENSURE,
    OP_VCPU_FAULT,
    OP_POPULATE,
    OP_POPULATE_STOP,
    OP_DONTNEED,
    OP_MADV_REMOVE,
    OP_MADV_FREE,
    OP_REMOVE_MEMORY,
    OP_ADD_MEMORY,
    OP_ADD_AGAIN,
    OP_UNMAP,
    OP_MREMAP,
    OP_FORK,
    OP_BAD_ARGUMENT,
    OP_QUERY,
    OP_RECORD,
    OP_REPLAY,
    OP_CLOSE,
    OP_HAND_OVER,
    OP_PAUSE,
    OP_KINDS,
};

/* A bit in what make_plan leaves out, beside those of operations. */
#define WITHOUT_BACKING(backing) (UINT64_C(1) << (48 + (backing)))

struct operation_entry {
    uint8_t kind, slot;
    uint16_t page, count;
    uint32_t argument;
};

struct slot_plan {
    uint8_t backing, source;
    uint16_t pages;
    bool huge_wish, layers;
};

struct plan {
    uint64_t seed;
    uint8_t mode, slots, threads, operations;
    bool detect_zero, failing_source, defers, blocks, signals, few_descriptors, small_file_system;
    uint16_t close_flags;
    struct kuf_options options;
    struct slot_plan slot[SLOTS];
    uint16_t lengths[THREADS];
    uint8_t restarts;
    struct operation_entry list[THREADS][OPERATIONS];
    /* Taken out by minimisation. */
    bool left_out[THREADS][OPERATIONS];
};

/* ---- World --------------------------------------------------------------------------------------------------------- */

struct trace_entry {
    struct operation_entry operation;
    uint64_t begun_ns, ended_ns;
    int64_t result;
};

struct trace {
    _Atomic uint32_t count;
    pid_t thread;
    struct trace_entry entry[TRACE_LENGTH];
};

struct slot {
    uint8_t *_Atomic memory;
    size_t page_size, length;
    uint16_t pages, first;
    uint64_t gpa;
    int fd, source_fd;
    uint8_t *source_memory;
    /* The layer below the file, and which small pages the file has. NULL: the file has all. */
    uint8_t *base_memory, *bitmap;
    uint8_t backing, source;
    bool layers, fixed;
    /* Readers touch, writers map anew and move. */
    pthread_rwlock_t layout;
    /* Held to look whether it is live. */
    pthread_mutex_t living;
    /* Under a slot of the library, as far as the threads here know; removals and additions so far, and under way. */
    atomic_bool live;
    atomic_uint ends, adds, changing;
};

struct world {
    struct plan plan;
    struct page pages[PAGES];
    struct slot slot[SLOTS];
    struct trace trace[TRACES];
    atomic_bool failed, stop_serving, closed, shortage, process_gone, taking_over, dump, dumped;
    atomic_int closing, close_calls;
    atomic_uint moves, moving, poisonings;
    /* Calls that may end a slot or the handle, or add a slot while it ends; and forks. */
    atomic_uint end_calls;
    _Atomic uint64_t operations, touches, faults, lossy, callbacks;
    _Atomic uint64_t pair[OP_KINDS][OP_KINDS];
    _Atomic uint64_t kinds[OP_KINDS];
    /* MODE_REMOTE: whose turn it is, how the present handler is to end, which operation each thread does next. */
    atomic_uint turn;
    atomic_int leave, handler;
    atomic_bool guest_done, ready, ended;
    _Atomic uint32_t next[THREADS];
    /* The version in which a handler's callback has written the whole page, for the handler that comes after it. */
    _Atomic uint32_t whole[PAGES];
    /* How often it was dropped: bytes that were written before may have been dropped too. */
    _Atomic uint32_t drops[PAGES];
    char message[2048];
};

enum { LEAVE_NOT, LEAVE_HAND_OVER, LEAVE_KILLED };

extern struct world *world;
extern struct kuf *_Atomic fuzz_handle;
extern _Thread_local unsigned trace_index;

/* model.c */
enum { NOT_TRACKED = -1 };
void model_reset(void);
int model_begin(unsigned page, enum effect effect, uint32_t argument, uint32_t flags);
void model_end(unsigned page, int pending, enum outcome outcome, const struct value *values, unsigned count);
uint32_t model_new_version(unsigned page);
void model_forget(pid_t process);
void model_stop_here(void);
bool model_may_be(unsigned page, enum kind kind);
void model_describe(unsigned page);
extern void (*model_complains)(unsigned page, const char *text);

/* bytes.c */
enum content { CONTENT_DATA, CONTENT_ZERO, CONTENT_BAD };
enum content content_of(unsigned page, uint32_t version);
uint64_t word_at(unsigned page, uint32_t version, unsigned index);
uint64_t written_word(unsigned page, uint32_t number);
void put_page(void *buffer, unsigned page, uint32_t version, size_t length);
bool decode(unsigned page, unsigned index, uint64_t word, struct value *value);
void describe_word(char *text, size_t room, uint64_t word);
uint64_t mix(uint64_t x);

/* plan.c */
void make_plan(struct plan *plan, uint64_t seed, int mode, uint64_t without);
extern const char *const operation_names[], *const mode_names[], *const backing_names[];
void describe_plan(const struct plan *plan);
void describe_operation(const struct operation_entry *operation);

/* report.c */
__attribute__((format(printf, 1, 2), noreturn)) void fail(const char *format, ...);
extern unsigned trace_shown;
void report_traces(void);
void report_history(unsigned page);
void report_threads(pid_t process);
void report_handle(void);

/* calls.c */
long perform(const struct operation_entry *operation);
bool errno_is_documented(const char *call, int error);
void check_errno(const char *call, int error, bool allowed, const char *why);
int close_handle(uint32_t flags);
unsigned closes_seen(void);
bool close_explains(unsigned before);

/* touches.c */
long touch_page(unsigned page, bool write);
bool read_word(const uint8_t *at, uint64_t *word);
void catch_signals(void);
long kernel_event(const struct operation_entry *operation);

/* source.c */
int fuzz_fill(void *opaque, struct kuf_fill *fill);
void fuzz_event(void *opaque, const struct kuf_event *event);
void fuzz_release(void *opaque);
void fuzz_log(void *opaque, uint32_t level, const char *text);
void *serve(void *argument);
void leave_places(void);
void note_named(unsigned page);
void note_dropped(unsigned page);
extern atomic_int released;
extern atomic_bool fatal_seen;
extern _Atomic uint64_t poison_events;

/* slots.c */
void mount_small_file_system(void);
bool map_slot(struct slot *slot);
int add_slot(struct slot *slot, uint32_t flags);
void unmap_slot(struct slot *slot);
long move_slot(struct slot *slot, bool leave_old);
long cut_slot(struct slot *slot, unsigned first, unsigned count);
bool huge_pages_can_be_had(void);

int uffd_to_adopt(void);

/* remote.c */
bool here(unsigned thread, const struct operation_entry *operation);
void run_remote_round(void);

/* round.c */
void open_handle(void);
void *operate(void *thread);
void start_thread(pthread_t *thread, void *(*body)(void *), uintptr_t argument);
void end_handle(uint32_t flags);
int run_round(void);

/* Small things. */
static inline struct slot *slot_of(unsigned page)
{
    return &world->slot[page / SLOT_PAGES];
}

static inline uint64_t gpa_of(unsigned page)
{
    struct slot *slot = slot_of(page);
    return slot->gpa + (uint64_t)(page % SLOT_PAGES) * slot->page_size;
}

static inline uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static inline void sleep_us(long us)
{
    nanosleep(&(struct timespec){.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000}, NULL);
}

static inline uint64_t next_random(uint64_t *state)
{
    *state += UINT64_C(0x9e3779b97f4a7c15);
    return mix(*state);
}

static inline uint64_t below(uint64_t *state, uint64_t n)
{
    return (next_random(state) >> 16) % n;
}

#endif
