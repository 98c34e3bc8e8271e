/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Checks, memory and handles for every test here. A test is one program about one behaviour: it calls begin(), checks
 * with ok() and is(), calls skip() if this machine cannot run it, and returns done(). A hang is a failure: when there
 * was no check for a minute, the watchdog prints where each thread is and ends the program. Nothing else is decided by
 * time.
 *
 * The bytes of a page contain its own guest physical address and a generation, so a page in a wrong place, an old one
 * and a half-filled one can all be detected.
 */
#ifndef KUF_TESTS_HARNESS_H
#define KUF_TESTS_HARNESS_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
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
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <kuf-kvm.h>

/* ---- Checks -------------------------------------------------------------------------------------------------------- */

static atomic_int harness_checks, harness_failures;
/* Seconds without a check after which the watchdog ends the program; 0: no limit. */
static atomic_uint harness_patience;

/* Checks that the condition holds; the rest is the message, as for printf. */
#define ok(condition, ...) harness_ok((condition), __FILE__, __LINE__, __VA_ARGS__)

/* Checks that an integer has the wanted value, and prints both when it has not. */
#define is(got, want, ...) harness_is((long long)(got), (long long)(want), __FILE__, __LINE__, __VA_ARGS__)

/*
 * As is(), for a count that another thread may still be updating: the kernel lets a toucher continue before the thread
 * that filled its page has counted it. Checks again for a long while before it fails.
 */
#define comes_to(got, want, ...)                                                                                         \
    do {                                                                                                                  \
        for (int harness_tries = 0; harness_tries < 10000 && (long long)(got) != (long long)(want); harness_tries++)     \
            sleep_ms(1);                                                                                                  \
        is(got, want, __VA_ARGS__);                                                                                       \
    } while (0)

/*
 * Ends the program, failed, when the condition does not hold: for conditions that all later checks need. Prints nothing
 * if it holds.
 */
#define must(condition, ...)                                                                                             \
    do {                                                                                                                  \
        if (!(condition)) {                                                                                               \
            ok(false, __VA_ARGS__);                                                                                       \
            _exit(1);                                                                                                     \
        }                                                                                                                 \
    } while (0)

__attribute__((format(printf, 4, 0))) static inline bool harness_say(bool good, const char *file, int line,
                                                                     const char *format, va_list arguments)
{
    char text[512];
    vsnprintf(text, sizeof(text), format, arguments);
    atomic_fetch_add(&harness_checks, 1);
    if (atomic_load(&harness_patience) != 0)
        alarm(atomic_load(&harness_patience));
    if (!good) {
        atomic_fetch_add(&harness_failures, 1);
        printf("not ok - %s (%s:%d)\n", text, file, line);
    } else {
        printf("ok - %s\n", text);
    }
    fflush(stdout);
    return good;
}

__attribute__((format(printf, 4, 5))) static inline bool harness_ok(bool good, const char *file, int line,
                                                                    const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    harness_say(good, file, line, format, arguments);
    va_end(arguments);
    return good;
}

__attribute__((format(printf, 5, 6))) static inline bool harness_is(long long got, long long want, const char *file,
                                                                    int line, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    harness_say(got == want, file, line, format, arguments);
    va_end(arguments);
    if (got != want)
        printf("    got %lld (%s), wanted %lld (%s)\n", got, got < 0 ? strerror((int)-got) : "-", want,
               want < 0 ? strerror((int)-want) : "-");
    fflush(stdout);
    return got == want;
}

/* Reports a part of the program that this machine cannot run; the program continues. */
__attribute__((format(printf, 1, 2))) static inline void skip_part(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("SKIP: ");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
}

/* As skip_part(), and ends the program: this machine cannot run the test. */
#define skip(...) (skip_part(__VA_ARGS__), harness_skip())

__attribute__((noreturn)) static inline void harness_skip(void)
{
    exit(atomic_load(&harness_failures) ? 1 : 77);
}

/* The exit status. */
static inline int done(void)
{
    int failures = atomic_load(&harness_failures);
    printf("%d checks, %d failed\n", atomic_load(&harness_checks), failures);
    return failures != 0;
}

/* ---- Watchdog ------------------------------------------------------------------------------------------------------ */

/* Only functions that a signal handler may call: no stdio, no allocation. */
static inline void harness_hang(int signal_number)
{
    (void)signal_number;
    static const char what[] = "not ok - HANG: the watchdog ended the program; its threads and where they wait:\n";
    (void)!write(STDOUT_FILENO, what, sizeof(what) - 1);
    int tasks = open("/proc/self/task", O_RDONLY | O_DIRECTORY);
    char entries[4096];
    long length;
    while (tasks >= 0 && (length = syscall(SYS_getdents64, tasks, entries, sizeof(entries))) > 0) {
        for (long at = 0; at < length;) {
            const char *entry = entries + at;
            unsigned short record;
            memcpy(&record, entry + 16, sizeof(record));
            const char *name = entry + 19;
            for (int i = 0; name[0] != '.' && i < 3; i++) {
                char path[64] = "", line[256];
                strncat(path, name, 16);
                strcat(path, i == 0 ? "/comm" : i == 1 ? "/wchan" : "/syscall");
                int fd = openat(tasks, path, O_RDONLY);
                ssize_t got = fd < 0 ? 0 : read(fd, line, sizeof(line));
                while (got > 0 && line[got - 1] == '\n')
                    got--;
                (void)!write(STDOUT_FILENO, i == 0 ? "    " : " ", i == 0 ? 4 : 1);
                (void)!write(STDOUT_FILENO, line, got > 0 ? (size_t)got : 0);
                close(fd);
            }
            if (name[0] != '.')
                (void)!write(STDOUT_FILENO, "\n", 1);
            at += record;
        }
    }
    _exit(1);
}

/*
 * Turns a hang into a failure. Its limit is a time without a check, because a machine may be slow; KUF_TEST_PATIENCE=N
 * multiplies it. Call it again in a forked child: alarms are not inherited.
 */
static inline void watchdog(unsigned seconds)
{
    struct sigaction action = {.sa_handler = harness_hang};
    const char *times = getenv("KUF_TEST_PATIENCE");
    if (times != NULL && atoi(times) > 0)
        seconds *= (unsigned)atoi(times);
    sigaction(SIGALRM, &action, NULL);
    atomic_store(&harness_patience, seconds);
    alarm(seconds);
}

/* A page that is poisoned although a test reads it directly: prints that before the program ends. */
static inline void harness_bus(int signal_number)
{
    (void)signal_number;
    static const char what[] = "not ok - SIGBUS: a page is poisoned that should have been readable\n";
    (void)!write(STDOUT_FILENO, what, sizeof(what) - 1);
    _exit(1);
}

/*
 * In a forked child, memory to which only the parent's other threads point looks leaked. The leak checker looks for
 * this name when the process ends.
 */
static pid_t harness_process;
__attribute__((weak)) int __lsan_is_turned_off(void);
int __lsan_is_turned_off(void)
{
    return getpid() != harness_process;
}

static inline void begin(void)
{
    struct sigaction action = {.sa_handler = harness_bus};
    harness_process = getpid();
    sigaction(SIGBUS, &action, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    watchdog(60);
}

/* In a forked child, which reports its failures by its exit status: the count begins at 0. */
static inline void begin_child(void)
{
    atomic_store(&harness_failures, 0);
    watchdog(60);
}

/* ---- Small things -------------------------------------------------------------------------------------------------- */

static inline size_t page_size(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

static inline uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static inline void sleep_ms(long ms)
{
    struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000};
    while (nanosleep(&left, &left) < 0 && errno == EINTR)
        ;
}

/* Waits for an act of another thread; if it never happens, the watchdog ends the program. */
#define wait_until(condition)                                                                                            \
    do {                                                                                                                  \
        while (!(condition))                                                                                              \
            sleep_ms(1);                                                                                                  \
    } while (0)

static inline pthread_t start(void *(*body)(void *), void *argument)
{
    pthread_t thread;
    must(pthread_create(&thread, NULL, body, argument) == 0, "a thread starts");
    return thread;
}

/* Waits for a child process to end: its exit status, or the signal that ended it as a negative number. */
static inline int end_of(pid_t child)
{
    int status = 0;
    must(waitpid(child, &status, 0) == child, "a child ends: %s", strerror(errno));
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/*
 * The number after a name at the start of a line, in a file of /proc or /sys; "" is the first line. -1: there is none.
 */
static inline long number_in(const char *path, const char *name)
{
    char line[256], *end;
    long value = -1;
    FILE *file = fopen(path, "r");
    while (value < 0 && file != NULL && fgets(line, sizeof(line), file) != NULL) {
        if (strncmp(line, name, strlen(name)) != 0)
            continue;
        value = strtol(line + strlen(name), &end, 10);
        if (end == line + strlen(name))
            value = -1;
    }
    if (file != NULL)
        fclose(file);
    return value;
}

/*
 * How many of this process's threads have a name that begins with this. A thread that has just been joined may still be
 * listed.
 */
static inline int threads_named(const char *prefix)
{
    int count = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *entry; tasks != NULL && (entry = readdir(tasks)) != NULL;) {
        char path[300], comm[64] = "";
        snprintf(path, sizeof(path), "/proc/self/task/%s/comm", entry->d_name);
        FILE *file = fopen(path, "r");
        if (file == NULL)
            continue;
        if (fgets(comm, sizeof(comm), file) != NULL && strncmp(comm, prefix, strlen(prefix)) == 0)
            count++;
        fclose(file);
    }
    if (tasks != NULL)
        closedir(tasks);
    return count;
}

static inline int open_descriptors(void)
{
    int count = 0;
    DIR *fds = opendir("/proc/self/fd");
    while (fds != NULL && readdir(fds) != NULL)
        count++;
    if (fds != NULL)
        closedir(fds);
    return count;
}

/* Whether a userfaultfd has the mapping that holds the address (VmFlags um: missing, ui: minor, uw: write-protect). */
static inline bool is_registered(const void *address)
{
    FILE *maps = fopen("/proc/self/smaps", "r");
    char line[1024];
    bool here = false, registered = false;
    while (maps != NULL && fgets(line, sizeof(line), maps) != NULL) {
        unsigned long from, to;
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
            here = from <= (uintptr_t)address && (uintptr_t)address < to;
        if (here && strncmp(line, "VmFlags:", 8) == 0)
            registered = strstr(line, " um") != NULL || strstr(line, " ui") != NULL || strstr(line, " uw") != NULL;
    }
    if (maps != NULL)
        fclose(maps);
    return registered;
}

/*
 * Where several userfaultfds share memory, they alternate in stripes of at least this size, with borders at multiples
 * of it.
 */
#define STRIPE ((uintptr_t)16 << 20)

/* As mmap(2), at such an address that the middle of the mapping is at that border. */
static inline void *map_across(size_t length, int flags, int fd)
{
    size_t page = page_size(), half = length / 2 / page * page, all = length + STRIPE;
    char *room = mmap(NULL, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return room;
    char *at = (char *)(((uintptr_t)room + half + STRIPE - 1) / STRIPE * STRIPE - half);
    char *end = at + (length + page - 1) / page * page;
    if (at != room)
        munmap(room, (size_t)(at - room));
    if (end < room + all)
        munmap(end, (size_t)(room + all - end));
    return mmap(at, length, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
}

/* Anonymous private memory without huge pages, which would make one fault of many. */
static inline unsigned char *map_anonymous(size_t length)
{
    void *memory = map_across(length, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    must(memory != MAP_FAILED, "%zu bytes of anonymous memory", length);
    madvise(memory, length, MADV_NOHUGEPAGE);
    return memory;
}

/* A shared file in memory, mapped; *fd is its descriptor. */
static inline unsigned char *map_shared(size_t length, int *fd)
{
    *fd = memfd_create("guest", MFD_CLOEXEC);
    must(*fd >= 0 && ftruncate(*fd, (off_t)length) == 0, "a memfd of %zu bytes", length);
    void *memory = map_across(length, MAP_SHARED, *fd);
    must(memory != MAP_FAILED, "maps the memfd");
    return memory;
}

/* For tests of both kinds of memory. *fd is -1 for anonymous memory; close(2) of it does no harm. */
static inline unsigned char *map_kind(bool of_file, size_t length, int *fd)
{
    *fd = -1;
    return of_file ? map_shared(length, fd) : map_anonymous(length);
}

static inline const char *kind_of(bool of_file)
{
    return of_file ? "shared" : "anonymous";
}

/* ---- The bytes of a page ------------------------------------------------------------------------------------------- */

static inline uint64_t word_of(uint64_t address, uint64_t generation)
{
    return (address | 1) * 0x9e3779b97f4a7c15u + generation * 0xc2b2ae3d27d4eb4fu;
}

static inline void write_content(void *buffer, uint64_t gpa, uint64_t length, uint64_t generation)
{
    uint64_t *words = buffer;
    for (uint64_t i = 0; i < length / 8; i++)
        words[i] = word_of(gpa + i * 8, generation);
}

static inline bool holds_content(const void *memory, uint64_t gpa, uint64_t length, uint64_t generation)
{
    const volatile uint64_t *words = memory;
    for (uint64_t i = 0; i < length / 8; i++)
        if (words[i] != word_of(gpa + i * 8, generation))
            return false;
    return true;
}

static inline bool holds_zeroes(const void *memory, uint64_t length)
{
    const volatile uint64_t *words = memory;
    for (uint64_t i = 0; i < length / 8; i++)
        if (words[i] != 0)
            return false;
    return true;
}

static sigjmp_buf harness_touch;

static inline void harness_touched(int signal_number)
{
    siglongjmp(harness_touch, signal_number);
}

/* Reads a byte: 0, or the signal that this raised. For one thread at a time. */
static inline int touch(const volatile void *address)
{
    struct sigaction action = {.sa_handler = harness_touched}, old_bus, old_segv;
    sigaction(SIGBUS, &action, &old_bus);
    sigaction(SIGSEGV, &action, &old_segv);
    int raised = sigsetjmp(harness_touch, 1);
    if (raised == 0)
        (void)*(const volatile unsigned char *)address;
    sigaction(SIGBUS, &old_bus, NULL);
    sigaction(SIGSEGV, &old_segv, NULL);
    return raised;
}

/* A thread that touches every page of a range, in order, and checks the bytes. */
struct toucher {
    const unsigned char *memory;
    uint64_t gpa, length, generation;
    atomic_bool finished;
    bool good;
    pthread_t thread;
};

static inline void *toucher_body(void *argument)
{
    struct toucher *toucher = argument;
    toucher->good = true;
    for (uint64_t at = 0; at < toucher->length; at += page_size())
        if (!holds_content(toucher->memory + at, toucher->gpa + at, page_size(), toucher->generation))
            toucher->good = false;
    atomic_store(&toucher->finished, true);
    return NULL;
}

static inline void start_toucher(struct toucher *toucher)
{
    toucher->thread = start(toucher_body, toucher);
}

static inline bool join_toucher(struct toucher *toucher)
{
    pthread_join(toucher->thread, NULL);
    return toucher->good;
}

/* ---- A handle for tests -------------------------------------------------------------------------------------------- */

/* The number of event kinds, from 0, that are counted. */
enum { HARNESS_EVENTS = 64 };

/*
 * A source of pages that counts its calls. It is the opaque of a handle, with source_fill and source_event as its
 * callbacks.
 */
struct source {
    _Atomic uint64_t generation;
    atomic_uint calls, flags_seen;
    _Atomic uint64_t bytes;
    /*
     * The next fills return this instead of filling: -errno, KUF_FILL_ZERO, KUF_FILL_DEFERRED or a wrong value. 0:
     * fill.
     */
    atomic_int answer;
    /* The same for one page only: a run that holds it fails. */
    _Atomic uint64_t bad_gpa;
    atomic_int bad_answer;
    /* Fills wait here while it is set. */
    atomic_bool hold;
    atomic_int inside;
    atomic_int released;
    /* For each KUF_EVENT_*: the number of events, and the last one with its text. */
    atomic_int events[HARNESS_EVENTS];
    struct kuf_event last[HARNESS_EVENTS];
    char text[HARNESS_EVENTS][512];
    pthread_mutex_t lock;
};

#define NO_GPA UINT64_MAX
#define SOURCE_INIT {.generation = 1, .bad_gpa = NO_GPA, .lock = PTHREAD_MUTEX_INITIALIZER}

static inline int source_fill(void *opaque, struct kuf_fill *fill)
{
    struct source *source = opaque;
    atomic_fetch_add(&source->inside, 1);
    atomic_fetch_add(&source->calls, 1);
    atomic_fetch_or(&source->flags_seen, fill->flags);
    while (atomic_load(&source->hold))
        sleep_ms(1);
    int answer = atomic_load(&source->answer);
    uint64_t bad = atomic_load(&source->bad_gpa);
    if (bad != NO_GPA && fill->gpa <= bad && bad - fill->gpa < fill->len)
        answer = atomic_load(&source->bad_answer);
    if (answer == 0) {
        write_content(fill->buf, fill->gpa, fill->len, atomic_load(&source->generation));
        atomic_fetch_add(&source->bytes, fill->len);
    }
    atomic_fetch_sub(&source->inside, 1);
    return answer;
}

static inline void source_event(void *opaque, const struct kuf_event *event)
{
    struct source *source = opaque;
    if (event->kind >= HARNESS_EVENTS)
        return;
    pthread_mutex_lock(&source->lock);
    source->last[event->kind] = *event;
    source->last[event->kind].text = source->text[event->kind];
    snprintf(source->text[event->kind], sizeof(source->text[0]), "%s", event->text);
    pthread_mutex_unlock(&source->lock);
    atomic_fetch_add(&source->events[event->kind], 1);
}

static inline void source_release(void *opaque)
{
    struct source *source = opaque;
    atomic_fetch_add(&source->released, 1);
}

static inline struct kuf_event last_event(struct source *source, unsigned kind)
{
    pthread_mutex_lock(&source->lock);
    struct kuf_event event = source->last[kind];
    pthread_mutex_unlock(&source->lock);
    return event;
}

#ifndef HARNESS_WITHOUT_LIBRARY

/*
 * Opens with the caller's options, in the best way that this machine allows; skips the test when there is none. With
 * KUF_TEST_USERFAULTFDS=N every handle that may have several userfaultfds has N, to run all tests with them; tests that
 * move memory with mremap then fail.
 */
static inline struct kuf *open_with(struct kuf_options options)
{
    struct kuf *kuf = NULL;
    const char *several = getenv("KUF_TEST_USERFAULTFDS");
    options.size = sizeof(options);
    if (options.fill == NULL && !(options.flags & (KUF_OPEN_SOURCES | KUF_OPEN_DIRECT)))
        options.flags |= KUF_OPEN_CALLER_DRIVEN;
    if (several != NULL && options.userfaultfds == 0 && options.mechanism != KUF_MECHANISM_KVM_ASYNC &&
        !(options.flags & (KUF_OPEN_ADOPT_ONLY | KUF_OPEN_FOLLOW_FORK)))
        options.userfaultfds = (uint32_t)atoi(several);
    int got = kuf_open(&options, &kuf);
    if (got == -EPERM && !(options.flags & KUF_OPEN_FOLLOW_FORK)) {
        /* The tests touch memory from user mode only, so they need no more than this. */
        options.flags |= KUF_OPEN_USER_MODE_ONLY;
        got = kuf_open(&options, &kuf);
    }
    if (got == -EPERM || got == -ENOSYS || got == -ENOTSUP)
        skip("kuf_open: %s", kuf_error());
    must(got == 0 && kuf != NULL, "kuf_open: %s", got ? kuf_error() : "opens");
    return kuf;
}

/* A handle whose pages come from the source. */
static inline struct kuf *open_serviced(struct source *source)
{
    return open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .release = source_release, .opaque = source});
}

/* A handle that the test drives with kuf_read; source may be NULL, else it gets events. */
static inline struct kuf *open_driven(struct source *source)
{
    return open_with((struct kuf_options){.event = source ? source_event : NULL,
                                          .release = source ? source_release : NULL,
                                          .opaque = source});
}

static inline void add_with_flags(struct kuf *kuf, uint64_t gpa, const void *memory, uint64_t length, uint32_t flags)
{
    struct kuf_memory slot = {.size = sizeof(slot), .flags = flags, .gpa = gpa, .len = length, .hva = (uintptr_t)memory};
    int got = kuf_add_memory(kuf, &slot);
    must(got == 0, "kuf_add_memory %#" PRIx64 "+%#" PRIx64 ": %s", gpa, length, got ? kuf_error() : "adds");
}

static inline void add(struct kuf *kuf, uint64_t gpa, const void *memory, uint64_t length)
{
    add_with_flags(kuf, gpa, memory, length, 0);
}

/* Memory of which some pages exist and are the guest's. */
static inline void add_populated(struct kuf *kuf, uint64_t gpa, const void *memory, uint64_t length)
{
    add_with_flags(kuf, gpa, memory, length, KUF_MEMORY_POPULATED);
}

/*
 * Fills may still be running although no thread waits for them. On a busy machine the library may not wait long enough
 * for such fills.
 */
static inline int remove_patiently(struct kuf *kuf, uint64_t gpa)
{
    int got;
    while ((got = kuf_remove_memory(kuf, gpa, KUF_END_POISON)) == -EBUSY)
        sleep_ms(1);
    return got;
}

static inline void add_shared(struct kuf *kuf, uint64_t gpa, const void *memory, uint64_t length, int fd, uint32_t flags)
{
    struct kuf_memory slot = {.size = sizeof(slot), .flags = flags, .gpa = gpa, .len = length,
                              .hva = (uintptr_t)memory, .fd = fd};
    int got = kuf_add_memory(kuf, &slot);
    must(got == 0, "kuf_add_memory %#" PRIx64 "+%#" PRIx64 " of a file: %s", gpa, length, got ? kuf_error() : "adds");
}

/* Adds what map_kind() has mapped. */
static inline void add_kind(struct kuf *kuf, uint64_t gpa, const void *memory, uint64_t length, int fd)
{
    if (fd >= 0)
        add_shared(kuf, gpa, memory, length, fd, 0);
    else
        add(kuf, gpa, memory, length);
}

static inline struct kuf_progress_info progress_of(struct kuf *kuf, uint64_t gpa)
{
    struct kuf_progress_info progress = {.size = sizeof(progress)};
    must(kuf_progress(kuf, gpa, &progress) == 0, "kuf_progress answers");
    return progress;
}

static inline struct kuf_stats_info stats_of(struct kuf *kuf)
{
    struct kuf_stats_info stats = {.size = sizeof(stats)};
    must(kuf_stats(kuf, &stats) == 0, "kuf_stats answers");
    return stats;
}

/* Closes and checks that the pointer was cleared. */
static inline void close_with(struct kuf *kuf, uint32_t flags)
{
    int got = kuf_close(&kuf, flags);
    must(got == 0, "kuf_close with %#x: %s", flags, got ? kuf_error() : "closes");
    ok(kuf == NULL, "kuf_close clears the pointer");
}

/* Whether a feature (KUF_FEATURE_*) works here. */
static inline bool has_feature(uint32_t feature)
{
    struct kuf_probe_info probe = {.size = sizeof(probe)};
    must(kuf_probe(-1, &probe) == 0, "kuf_probe: %s", kuf_error());
    return probe.features & feature;
}

/* Skips the test unless a feature (KUF_FEATURE_*) works here. */
static inline void needs_feature(uint32_t feature, const char *what)
{
    if (!has_feature(feature))
        skip("this kernel has no %s", what);
}

/* The signal that a touch of a page that could not be filled raises, and the event that reports it. */
static inline int poison_signal(void)
{
    return has_feature(KUF_FEATURE_POISON) ? SIGBUS : SIGSEGV;
}

static inline unsigned poison_event(void)
{
    return has_feature(KUF_FEATURE_POISON) ? KUF_EVENT_POISONED : KUF_EVENT_INACCESSIBLE;
}

/*
 * Makes memory usable again after KUF_END_POISON: drops its pages, and restores the access rights where the kernel has no
 * poison.
 */
static inline void empty_again(void *memory, size_t length)
{
    must(madvise(memory, length, MADV_DONTNEED) == 0, "drops the pages");
    if (poison_event() == KUF_EVENT_INACCESSIBLE)
        must(mprotect(memory, length, PROT_READ | PROT_WRITE) == 0, "gives them their rights back");
}

#endif /* HARNESS_WITHOUT_LIBRARY */

#endif
