/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * bench.h - code shared by all programs of the bench
 *
 * `PROGRAM SIDE [KEY=VALUE]...` runs one side of one workload once, in its own process, and prints the measurements as
 * one line of JSON. It exits with 0, with 77 and {"skip": "reason"} where the side cannot run, or with 1 and the reason
 * on standard error. run.py interleaves the sides, compares them and draws the plots.
 *
 * One program contains both sides of a comparison, with the same memory, image, touchers, clock and placement. Only the
 * server of the faults differs: libkuf, or one of the loops in baseline.h.
 */
#ifndef KUF_BENCH_H
#define KUF_BENCH_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <kuf.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <x86intrin.h>
#endif

enum { PAGE = 4096, WORDS = PAGE / 8, EXIT_SKIP = 77, TOUCHERS_MAX = 256 };

#define MIB (UINT64_C(1) << 20)
#define RUN (2 * MIB)

/* ---- How a program ends ------------------------------------------------------------------------------------------ */

/* Uses _exit because other threads may be blocked in faults that are never served. */
__attribute__((format(printf, 1, 2))) static inline _Noreturn void fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s: ", program_invocation_short_name);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    _exit(EXIT_FAILURE);
}

__attribute__((format(printf, 1, 2))) static inline _Noreturn void skip(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    printf("{\"skip\": \"");
    vprintf(format, arguments);
    printf("\"}\n");
    va_end(arguments);
    fflush(stdout);
    _exit(EXIT_SKIP);
}

#define must(condition, what)                                                                                         \
    do {                                                                                                              \
        if (!(condition))                                                                                             \
            fail("%s: %s", what, strerror(errno));                                                                    \
    } while (0)

static inline void *must_map(size_t length, int prot, int flags, int fd, const char *what)
{
    void *at = mmap(NULL, length, prot, flags, fd, 0);
    if (at == MAP_FAILED)
        fail("%s: mmap of %zu bytes: %s", what, length, strerror(errno));
    return at;
}

/* ---- Arguments --------------------------------------------------------------------------------------------------- */

static char **arguments;
static unsigned arguments_used; /* bit n: the program has read argument n */

static inline const char *text_argument(const char *key, const char *otherwise)
{
    size_t length = strlen(key);
    for (int n = 0; arguments[n] != NULL; n++)
        if (strncmp(arguments[n], key, length) == 0 && arguments[n][length] == '=') {
            arguments_used |= 1u << n;
            return arguments[n] + length + 1;
        }
    return otherwise;
}

/* Returns a number; a suffix K, M, G or T multiplies it by a power of 1024. */
static inline uint64_t argument(const char *key, uint64_t otherwise)
{
    static const char units[] = "KMGT";
    const char *text = text_argument(key, NULL);
    if (text == NULL)
        return otherwise;
    char *end;
    uint64_t value = strtoull(text, &end, 0);
    const char *unit = *end != '\0' ? strchr(units, *end) : NULL;
    if (unit != NULL) {
        value <<= 10 * (unit - units + 1);
        end++;
    }
    if (end == text || *end != '\0')
        fail("%s=%s: not a number", key, text);
    return value;
}

/* Call it after reading the last argument: it rejects a misspelt key, which would otherwise mean the default. */
static inline void no_more_arguments(void)
{
    for (int n = 0; arguments[n] != NULL; n++)
        if (!(arguments_used & 1u << n))
            fail("unknown argument %s", arguments[n]);
}

static inline void bench_hang(int number)
{
    (void)number;
    static const char text[] = "bench: the side exceeded its time limit\n";
    (void)!write(STDERR_FILENO, text, sizeof(text) - 1);
    _exit(EXIT_FAILURE);
}

static inline void bench_bus(int number)
{
    (void)number;
    static const char text[] = "bench: SIGBUS: a page was poisoned instead of filled\n";
    (void)!write(STDERR_FILENO, text, sizeof(text) - 1);
    _exit(EXIT_FAILURE);
}

/* The CPUs this process may use, in order. */
static cpu_set_t cpus_allowed;

/* main calls this first. Returns the side. */
static inline const char *begin(int argc, char **argv)
{
    if (argc < 2)
        fail("usage: %s SIDE [KEY=VALUE]...", argv[0]);
    arguments = argv + 2;
    if (sysconf(_SC_PAGESIZE) != PAGE)
        skip("written for pages of %d bytes", PAGE);
    sched_getaffinity(0, sizeof(cpus_allowed), &cpus_allowed);
    signal(SIGALRM, bench_hang);
    signal(SIGBUS, bench_bus);
    alarm((unsigned)argument("timeout", 120));
    return argv[1];
}

/* ---- The result -------------------------------------------------------------------------------------------------- */

static bool result_begun;

static inline void result_key(const char *key)
{
    printf("%s\"%s\": ", result_begun ? ", " : "{", key);
    result_begun = true;
}

static inline void put_text(const char *key, const char *value)
{
    result_key(key);
    printf("\"%s\"", value);
}

static inline void put_count(const char *key, uint64_t value)
{
    result_key(key);
    printf("%" PRIu64, value);
}

static inline void put_number(const char *key, double value)
{
    result_key(key);
    printf("%.9g", value);
}

/* Ends the program by _exit, because the set-up needs no tear-down. */
static inline _Noreturn void end_result(void)
{
    printf("}\n");
    fflush(stdout);
    _exit(EXIT_SUCCESS);
}

/* ---- Clocks ------------------------------------------------------------------------------------------------------ */

static inline uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static inline double seconds(uint64_t ns)
{
    return (double)ns / 1e9;
}

static inline void sleep_until(uint64_t ns)
{
    struct timespec at = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR)
        ;
}

/*
 * Times a single touch at a third of the cost of clock_gettime, which matters where most touches do not fault. The read
 * is ordered after the preceding load. The bench uses only differences within one thread and scales them by the
 * monotonic clock.
 */
static inline uint64_t ticks(void)
{
#if defined(__x86_64__)
    _mm_lfence();
    return __rdtsc();
#else
    return now_ns();
#endif
}

/* ---- Placement --------------------------------------------------------------------------------------------------- */

enum pin { PIN_NONE, PIN_SPLIT, PIN_SAME };

static inline enum pin pin_argument(void)
{
    const char *pin = text_argument("pin", "none");
    if (strcmp(pin, "none") == 0)
        return PIN_NONE;
    if (strcmp(pin, "same") == 0)
        return PIN_SAME;
    if (strcmp(pin, "split") != 0)
        fail("pin=%s: none, split or same", pin);
    if (CPU_COUNT(&cpus_allowed) < 2)
        skip("needs two CPUs");
    return PIN_SPLIT;
}

static inline void run_on(int nth)
{
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &cpus_allowed) && nth-- == 0) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            must(sched_setaffinity(0, sizeof(one), &one) == 0, "sched_setaffinity");
            return;
        }
}

/*
 * Call it on the main thread before the service starts: the threads of libkuf and of the baseline inherit the
 * placement. With PIN_SPLIT the touchers run on the first CPU and the service on the second.
 */
static inline void place_service(enum pin pin)
{
    if (pin != PIN_NONE)
        run_on(pin == PIN_SPLIT ? 1 : 0);
}

static inline void place_toucher(enum pin pin)
{
    if (pin != PIN_NONE)
        run_on(0);
}

/* ---- The image: the expected content of guest memory ------------------------------------------------------------- */

/*
 * Each word is derived from its own offset, so that verification detects misplaced and half-filled pages. About `zero`
 * percent of the clusters of pages are zero.
 */
struct image {
    const uint8_t *bytes;
    uint64_t size;
    uint64_t zero;    /* percent */
    uint64_t cluster; /* pages */
};

static inline uint64_t mix(uint64_t value)
{
    value ^= value >> 32;
    value *= UINT64_C(0xd6e8feb86659fd93);
    value ^= value >> 32;
    value *= UINT64_C(0xd6e8feb86659fd93);
    return value ^ value >> 32;
}

static inline uint64_t image_word(uint64_t word)
{
    return (word + 1) * UINT64_C(0x9e3779b97f4a7c15);
}

static inline bool image_page_is_zero(uint64_t page, uint64_t zero, uint64_t cluster)
{
    return mix(page / cluster + 12345) % 100 < zero;
}

/* Returns the expected value of a word of a page. */
static inline uint64_t image_has(const struct image *image, uint64_t page, unsigned word)
{
    page %= image->size / PAGE;
    if (image->zero != 0 && image_page_is_zero(page, image->zero, image->cluster))
        return 0;
    return image_word(page * WORDS + word);
}

static inline uint64_t resident(const void *at, uint64_t length)
{
    unsigned char map[4096];
    uint64_t pages = 0;
    for (uint64_t from = 0; from < length; from += sizeof(map) * PAGE) {
        uint64_t part = length - from < sizeof(map) * PAGE ? length - from : sizeof(map) * PAGE;
        must(mincore((uint8_t *)(uintptr_t)at + from, part, map) == 0, "mincore");
        for (uint64_t n = 0; n < part / PAGE; n++)
            pages += map[n] & 1;
    }
    return pages * PAGE;
}

/*
 * Maps a file made by the program `image`. The file is in the page cache and the page tables are populated, so that no
 * side pays for reading it. corrupt=PAGE falsifies a byte of that page in this process only; verification must detect
 * it.
 */
static inline struct image map_image(void)
{
    const char *path = text_argument("image", NULL);
    if (path == NULL)
        fail("image=FILE is needed");
    struct image image = {.zero = argument("zero", 0), .cluster = argument("cluster", 1)};
    uint64_t corrupt = argument("corrupt", UINT64_MAX);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat stat;
    if (fd < 0 || fstat(fd, &stat) != 0)
        fail("%s: %s", path, strerror(errno));
    image.size = (uint64_t)stat.st_size;
    if (image.size == 0 || image.size % RUN != 0)
        fail("%s: the image's size is not a multiple of 2 MiB", path);
    int writable = corrupt != UINT64_MAX ? PROT_WRITE : 0, kind = writable ? MAP_PRIVATE : MAP_SHARED;
    uint8_t *bytes = must_map(image.size, PROT_READ | writable, kind | MAP_POPULATE, fd, path);
    close(fd);
    if (corrupt != UINT64_MAX)
        bytes[corrupt * PAGE] ^= 1;
    image.bytes = bytes;
    if (resident(bytes, image.size) != image.size)
        fail("%s: not completely in the page cache: too little memory?", path);
    return image;
}

static inline const uint8_t *image_at(const struct image *image, uint64_t offset)
{
    return image->bytes + offset % image->size;
}

/* Checks a page after the measurement: all of its words, or a few that are far apart. */
static inline bool page_is_good(const struct image *image, const uint8_t *at, uint64_t page, bool all)
{
    const volatile uint64_t *words = (const volatile uint64_t *)(const volatile void *)at;
    for (unsigned word = 0; word < WORDS; word += all ? 1 : 73)
        if (words[word] != image_has(image, page, word))
            return false;
    return words[WORDS - 1] == image_has(image, page, WORDS - 1);
}

static inline bool verify_argument(void)
{
    return strcmp(text_argument("verify", "quick"), "full") == 0;
}

static inline void verify_all(const struct image *image, const uint8_t *memory, uint64_t size, bool all)
{
    for (uint64_t page = 0; page < size / PAGE; page++)
        if (!page_is_good(image, memory + page * PAGE, page, all))
            fail("page %" PRIu64 " holds wrong bytes", page);
}

/* ---- Guest memory ------------------------------------------------------------------------------------------------ */

/*
 * The hypervisor under this machine may reclaim free memory (free page reporting does so after two seconds), and
 * returning it takes several times as long as the work measured here. So each side allocates the memory it needs and
 * frees it right before the measurement: the kernel reuses the memory freed last. It allocates huge pages where the
 * side wants huge pages, because freed small pages do not merge into huge ones soon.
 */
static inline void warm_memory(uint64_t size, bool huge)
{
    uint64_t length = size > 4096 * MIB ? 1024 * MIB : size; /* no side touches all of a larger slot */
    uint8_t *at = must_map(length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, "warming");
    madvise(at, length, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    if (madvise(at, length, MADV_POPULATE_WRITE) != 0)
        memset(at, 1, length);
    munmap(at, length);
}

/* Maps private anonymous memory with 4 KiB pages, or with MADV_HUGEPAGE. */
static inline uint8_t *guest_memory(uint64_t size, bool huge)
{
    warm_memory(size, huge);
    uint64_t room = size + RUN;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    uint8_t *at = must_map(room, PROT_READ | PROT_WRITE, flags, -1, "guest memory");
    at = (uint8_t *)(((uintptr_t)at + RUN - 1) & ~(uintptr_t)(RUN - 1));
    madvise(at, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    return at;
}

struct memory_use {
    uint64_t resident; /* bytes; the kernel's zero page does not count */
    uint64_t huge;
};

/* Reads the memory use of the mappings within the range from smaps. */
static inline struct memory_use memory_use(const void *at, uint64_t length)
{
    struct memory_use use = {0};
    char line[512];
    bool within = false;
    FILE *maps = fopen("/proc/self/smaps", "re");
    must(maps != NULL, "/proc/self/smaps");
    while (fgets(line, sizeof(line), maps) != NULL) {
        unsigned long from, to, kib;
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
            within = (uintptr_t)at < to && from < (uintptr_t)at + length;
        else if (within && sscanf(line, "Rss: %lu kB", &kib) == 1)
            use.resident += kib * 1024;
        else if (within && sscanf(line, "AnonHugePages: %lu kB", &kib) == 1)
            use.huge += kib * 1024;
    }
    fclose(maps);
    return use;
}

/* Private memory of the process outside the guest. The difference of two calls is the memory that serving takes. */
static inline double own_memory(const void *guest, uint64_t length)
{
    char line[512];
    unsigned long kib = 0;
    FILE *rollup = fopen("/proc/self/smaps_rollup", "re");
    must(rollup != NULL, "/proc/self/smaps_rollup");
    while (fgets(line, sizeof(line), rollup) != NULL)
        if (sscanf(line, "Anonymous: %lu kB", &kib) == 1)
            break;
    fclose(rollup);
    return (double)kib * 1024 - (double)memory_use(guest, length).resident;
}

/* ---- Cost of serving --------------------------------------------------------------------------------------------- */

/* CPU time and context switches of the threads that serve: libkuf's (kuf-*) or the baseline's (bench-serve). */
struct service_use {
    uint64_t cpu_ns, waits, preemptions, threads;
};

static inline struct service_use service_use(void)
{
    struct service_use use = {0};
    DIR *tasks = opendir("/proc/self/task");
    must(tasks != NULL, "/proc/self/task");
    for (struct dirent *entry; (entry = readdir(tasks)) != NULL;) {
        char path[300], line[256];
        snprintf(path, sizeof(path), "/proc/self/task/%s/status", entry->d_name);
        FILE *status = fopen(path, "re");
        bool serves = false;
        while (status != NULL && fgets(line, sizeof(line), status) != NULL) {
            unsigned long count;
            if (strncmp(line, "Name:\tkuf-", 10) == 0 || strncmp(line, "Name:\tbench-serve", 17) == 0)
                serves = true;
            else if (serves && sscanf(line, "voluntary_ctxt_switches: %lu", &count) == 1)
                use.waits += count;
            else if (serves && sscanf(line, "nonvoluntary_ctxt_switches: %lu", &count) == 1)
                use.preemptions += count;
        }
        if (status != NULL)
            fclose(status);
        if (!serves)
            continue;
        /* Compute the thread's CPU clock as pthread_getcpuclockid does. That function needs libkuf's pthread_t. */
        clockid_t clock = (clockid_t)(~(unsigned)atoi(entry->d_name) << 3 | 6);
        struct timespec used;
        if (clock_gettime(clock, &used) == 0)
            use.cpu_ns += (uint64_t)used.tv_sec * 1000000000 + (uint64_t)used.tv_nsec;
        use.threads++;
    }
    closedir(tasks);
    return use;
}

static inline void put_service_use(struct service_use before, struct service_use after, uint64_t pages)
{
    put_number("service_cpu_seconds", seconds(after.cpu_ns - before.cpu_ns));
    put_number("service_cpu_us_per_page", (double)(after.cpu_ns - before.cpu_ns) / 1e3 / (double)pages);
    put_count("service_waits", after.waits - before.waits);
    put_count("service_preemptions", after.preemptions - before.preemptions);
    put_count("service_threads", after.threads);
}

/* ---- Touchers ---------------------------------------------------------------------------------------------------- */

static uint64_t random_state;

static inline uint64_t random_number(void)
{
    return mix(random_state += UINT64_C(0x9e3779b97f4a7c15));
}

/*
 * Returns `count` different pages of first..first+window, spread evenly, in sequence or in a random order that depends
 * on the seed only.
 */
static inline uint32_t *make_order(uint64_t first, uint64_t window, uint64_t count, bool sequential, uint64_t seed)
{
    if (count == 0 || count > window || first + window > UINT32_MAX)
        fail("cannot touch %" PRIu64 " pages of %" PRIu64, count, window);
    uint32_t *order = calloc(count, sizeof(*order));
    must(order != NULL, "memory for the order");
    uint64_t stride = window / count;
    random_state = seed;
    for (uint64_t n = 0; n < count; n++)
        order[n] = (uint32_t)(first + n * stride + (stride > 1 ? random_number() % stride : 0));
    for (uint64_t n = count - 1; !sequential && n > 0; n--) {
        uint64_t other = random_number() % (n + 1);
        uint32_t page = order[n];
        order[n] = order[other];
        order[other] = page;
    }
    return order;
}

/* Threads in place of vCPUs. Each touches its part of the order once. */
struct touchers {
    const struct image *image;
    const uint8_t *memory;
    const uint32_t *order;
    uint64_t count;
    unsigned threads;
    enum pin pin;
    uint64_t interval_ns; /* between two touches; 0: no pause */
    atomic_bool stop;     /* ends the touching early */
    pthread_barrier_t ready;
    uint32_t *took; /* ticks */
    struct toucher {
        struct touchers *all;
        pthread_t thread;
        uint64_t from, to, touched;
        uint64_t began_ns, ended_ns, began_ticks, ended_ticks;
    } each[TOUCHERS_MAX];
};

static inline void *toucher_body(void *argument)
{
    struct toucher *me = argument;
    struct touchers *all = me->all;
    const struct image *image = all->image;
    uint64_t wrong = UINT64_MAX;
    pthread_setname_np(pthread_self(), "bench-touch");
    place_toucher(all->pin);
    prctl(PR_SET_TIMERSLACK, 1);
    pthread_barrier_wait(&all->ready);
    me->began_ns = now_ns();
    me->began_ticks = ticks();
    uint64_t n = me->from;
    for (; n < me->to && !atomic_load_explicit(&all->stop, memory_order_relaxed); n++) {
        if (all->interval_ns != 0)
            sleep_until(me->began_ns + (n - me->from + 1) * all->interval_ns);
        uint64_t page = all->order[n];
        const volatile uint64_t *word = (const volatile uint64_t *)(const volatile void *)(all->memory + page * PAGE);
        uint64_t before = ticks();
        uint64_t value = *word;
        uint64_t took = ticks() - before;
        all->took[n] = took < UINT32_MAX ? (uint32_t)took : UINT32_MAX;
        if (value != image_has(image, page, 0))
            wrong = page;
    }
    me->ended_ticks = ticks();
    me->ended_ns = now_ns();
    me->touched = n - me->from;
    if (wrong != UINT64_MAX)
        fail("page %" PRIu64 " holds wrong bytes", wrong);
    return NULL;
}

static inline void start_touchers(struct touchers *all)
{
    if (all->threads == 0 || all->threads > TOUCHERS_MAX || all->count < all->threads)
        fail("cannot divide %" PRIu64 " pages among %u touchers", all->count, all->threads);
    /* Write to it now, so that its own page faults are not measured. */
    all->took = malloc(all->count * sizeof(*all->took));
    must(all->took != NULL, "memory for the latencies");
    memset(all->took, 1, all->count * sizeof(*all->took));
    pthread_barrier_init(&all->ready, NULL, all->threads + 1);
    for (unsigned n = 0; n < all->threads; n++) {
        struct toucher *each = &all->each[n];
        each->all = all;
        each->from = all->count * n / all->threads;
        each->to = all->count * (n + 1) / all->threads;
        if (pthread_create(&each->thread, NULL, toucher_body, each) != 0)
            fail("cannot start a toucher's thread");
    }
}

/* Starts the touching. */
static inline void release_touchers(struct touchers *all)
{
    pthread_barrier_wait(&all->ready);
}

/* Returns the nanoseconds from the start of the first toucher to the end of the last. */
static inline uint64_t join_touchers(struct touchers *all)
{
    uint64_t began = UINT64_MAX, ended = 0;
    for (unsigned n = 0; n < all->threads; n++) {
        pthread_join(all->each[n].thread, NULL);
        began = all->each[n].began_ns < began ? all->each[n].began_ns : began;
        ended = all->each[n].ended_ns > ended ? all->each[n].ended_ns : ended;
    }
    return ended - began;
}

/* Verifies the touched pages after the measurement; a touch itself checks only one word. */
static inline void verify_touched(const struct touchers *all, bool thorough)
{
    for (unsigned n = 0; n < all->threads; n++) {
        const struct toucher *each = &all->each[n];
        for (uint64_t i = each->from; i < each->from + each->touched; i++)
            if (!page_is_good(all->image, all->memory + (uint64_t)all->order[i] * PAGE, all->order[i], thorough))
                fail("page %u holds wrong bytes", all->order[i]);
    }
}

static inline int compare_latencies(const void *a, const void *b)
{
    uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;
    return (left > right) - (left < right);
}

/* Eight buckets for each power of two: fine enough for a curve, small enough for a line of JSON. */
static inline unsigned bucket_of(uint64_t ns)
{
    if (ns < 8)
        return (unsigned)ns;
    unsigned power = 63 - (unsigned)__builtin_clzll(ns);
    return power * 8 + (unsigned)(ns >> (power - 3) & 7);
}

static inline uint64_t bucket_end(unsigned bucket)
{
    if (bucket < 8)
        return bucket + 1;
    return (UINT64_C(9) + bucket % 8) << (bucket / 8 - 3);
}

static inline void put_latencies(const struct touchers *all)
{
    static const struct {
        const char *key;
        double part;
    } points[] = {{"p50_us", .5}, {"p90_us", .9}, {"p99_us", .99}, {"p999_us", .999}, {"max_us", 1}};
    uint64_t count = 0;
    uint32_t *ns = malloc(all->count * sizeof(*ns));
    must(ns != NULL, "memory for the latencies");
    double sum = 0;
    for (unsigned n = 0; n < all->threads; n++) {
        const struct toucher *each = &all->each[n];
        double scale = (double)(each->ended_ns - each->began_ns) / (double)(each->ended_ticks - each->began_ticks);
        for (uint64_t i = each->from; i < each->from + each->touched; i++) {
            ns[count] = (uint32_t)((double)all->took[i] * scale);
            sum += ns[count++];
        }
    }
    if (count == 0)
        fail("no page was touched");
    qsort(ns, count, sizeof(*ns), compare_latencies);
    put_count("pages", count);
    put_number("mean_us", sum / 1e3 / (double)count);
    for (size_t n = 0; n < sizeof(points) / sizeof(points[0]); n++) {
        uint64_t at = (uint64_t)(points[n].part * (double)count);
        put_number(points[n].key, ns[at < count ? at : count - 1] / 1e3);
    }
    result_key("histogram"); /* [upper end in ns, touches] */
    bool first = true;
    for (uint64_t i = 0; i < count;) {
        unsigned bucket = bucket_of(ns[i]);
        uint64_t from = i;
        while (i < count && bucket_of(ns[i]) == bucket)
            i++;
        printf("%s[%" PRIu64 ", %" PRIu64 "]", first ? "[" : ", ", bucket_end(bucket), i - from);
        first = false;
    }
    printf("]");
    free(ns);
}

/* ---- libkuf ------------------------------------------------------------------------------------------------------ */

/* The opaque of a handle whose pages come from the image. */
struct guest {
    const struct image *image;
    struct kuf *kuf;
    /* The fill callback calls this first, if it is set. */
    void (*before_fill)(void *);
    void *before_fill_argument;
    /* Set when no thread touches the guest any more: a fill then answers with poison. */
    atomic_bool closing;
    bool leave_open;
    /* The time at which the populate request ended, or 0. */
    _Atomic uint64_t populated_ns;
    atomic_int populate_error;
};

/*
 * Returns how many bytes of the rest of a run are contiguous in the image, and their offset there. Memory larger than
 * the image repeats it.
 */
static inline uint64_t image_part(const struct guest *guest, const struct kuf_fill *run, uint64_t done, uint64_t *at)
{
    *at = (run->memory_offset + done) % guest->image->size;
    uint64_t rest = run->len - done, piece = guest->image->size - *at;
    return rest < piece ? rest : piece;
}

/*
 * copy:    the callback copies into the library's buffer, and the library installs from there: two copies.
 * resolve: the callback passes the image to kuf_resolve: one copy, as in a hand-written loop.
 * src:     the callback sets kuf_fill.src to the image: one copy.
 */
static inline int fill_by_copy(void *opaque, struct kuf_fill *run)
{
    struct guest *guest = opaque;
    if (guest->before_fill != NULL)
        guest->before_fill(guest->before_fill_argument);
    for (uint64_t done = 0; done < run->len;) {
        uint64_t at, part = image_part(guest, run, done, &at);
        memcpy((uint8_t *)run->buf + done, guest->image->bytes + at, part);
        done += part;
    }
    return KUF_FILL_DONE;
}

static inline int fill_by_resolve(void *opaque, struct kuf_fill *run)
{
    struct guest *guest = opaque;
    if (guest->before_fill != NULL)
        guest->before_fill(guest->before_fill_argument);
    for (uint64_t done = 0; done < run->len;) {
        uint64_t at, part = image_part(guest, run, done, &at);
        if (kuf_resolve(guest->kuf, run->gpa + done, guest->image->bytes + at, part, 0) < 0)
            fail("kuf_resolve: %s", kuf_error());
        done += part;
    }
    return KUF_FILL_DEFERRED;
}

static inline int fill_by_src(void *opaque, struct kuf_fill *run)
{
    struct guest *guest = opaque;
    if (guest->before_fill != NULL)
        guest->before_fill(guest->before_fill_argument);
    uint64_t at;
    run->filled = image_part(guest, run, 0, &at);
    run->src = guest->image->bytes + at;
    return KUF_FILL_DONE;
}

static inline void guest_event(void *opaque, const struct kuf_event *event)
{
    struct guest *guest = opaque;
    if (event->kind == KUF_EVENT_POPULATED) {
        atomic_store(&guest->populate_error, event->error);
        atomic_store(&guest->populated_ns, now_ns());
#ifdef KUF_RECORD_VERSION
    } else if (event->kind == KUF_EVENT_REPLAYED && event->error == 0) {
        return;
#endif
    } else if (event->kind != KUF_EVENT_COMPLETE && !atomic_load(&guest->closing)) {
        fail("event %u: %s", event->kind, event->text);
    }
}

/*
 * Opens the handle with the options from the arguments fill=copy|resolve|src, fill_threads, demand_run, populate_run,
 * spin (us) and uffds. A fill callback in `options` overrides fill=. close=0 exits without kuf_close, which would
 * poison each untouched page.
 */
static inline void open_kuf(struct guest *guest, struct kuf_options options)
{
    options.size = sizeof(options);
    /* The touchers fault in user mode, so that the bench needs no privilege. */
    options.flags |= KUF_OPEN_USER_MODE_ONLY;
    options.fill_threads = (uint32_t)argument("fill_threads", options.fill_threads);
    options.demand_run = argument("demand_run", options.demand_run);
    options.populate_run = argument("populate_run", options.populate_run);
    guest->leave_open = argument("close", 1) == 0;
    options.event = guest_event;
    options.opaque = guest;
    const char *how = text_argument("fill", "copy");
    if (options.fill == NULL)
        options.fill = strcmp(how, "resolve") == 0 ? fill_by_resolve
                       : strcmp(how, "src") == 0   ? fill_by_src
                                                   : fill_by_copy;
    uint64_t spin = argument("spin", 0);
    if (spin != 0) {
#ifdef KUF_SPIN_MAX
        options.spin_us = (uint32_t)spin;
        if (CPU_COUNT(&cpus_allowed) < 2)
            skip("spinning needs two CPUs");
#else
        skip("this kuf.h has no kuf_options.spin_us");
#endif
    }
    uint64_t uffds = argument("uffds", 0);
    if (uffds != 0) {
#ifdef KUF_USERFAULTFDS_MAX
        options.userfaultfds = (uint32_t)uffds;
#else
        skip("this kuf.h has no kuf_options.userfaultfds");
#endif
    }
    int got = kuf_open(&options, &guest->kuf);
    if (got == -EPERM || got == -ENOSYS || got == -ENOTSUP)
        skip("userfaultfd is not available here");
    if (got < 0)
        fail("kuf_open: %s", kuf_error());
}

static inline void add_guest(struct guest *guest, uint64_t gpa, const void *memory, uint64_t size, uint32_t flags,
                             int fd)
{
    struct kuf_memory slot = {.size = sizeof(slot), .flags = flags, .gpa = gpa, .len = size,
                              .hva = (uintptr_t)memory, .fd = fd};
    if (kuf_add_memory(guest->kuf, &slot) < 0)
        fail("kuf_add_memory: %s", kuf_error());
}

static inline void populate_guest(struct guest *guest, uint64_t gpa, uint64_t size)
{
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = gpa, .len = size};
    if (kuf_populate(guest->kuf, &request) < 0)
        fail("kuf_populate: %s", kuf_error());
}

/* Returns the time at which the request ended. */
static inline uint64_t wait_populated(struct guest *guest)
{
    while (atomic_load(&guest->populated_ns) == 0)
        sleep_until(now_ns() + 500000);
    if (atomic_load(&guest->populate_error) != 0)
        fail("populate: %s", strerror(-atomic_load(&guest->populate_error)));
    return atomic_load(&guest->populated_ns);
}

static inline void close_kuf(struct guest *guest)
{
    if (guest->leave_open)
        return;
    atomic_store(&guest->closing, true);
    if (kuf_close(&guest->kuf, KUF_END_POISON) < 0)
        fail("kuf_close: %s", kuf_error());
}

static inline void put_kuf_stats(struct kuf *kuf)
{
    struct kuf_stats_info stats = {.size = sizeof(stats)};
    if (kuf_stats(kuf, &stats) < 0)
        fail("kuf_stats: %s", kuf_error());
    put_count("faults", stats.faults);
    put_count("fills", stats.fills);
    put_count("bytes_copied", stats.bytes_copied);
    put_count("bytes_zeroed", stats.bytes_zeroed);
    put_count("bytes_in_place", stats.bytes_in_place);
}

#endif
