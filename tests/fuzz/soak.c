/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The soak: serves faults and checks the bytes of each, for KUF_SOAK_SECONDS seconds; no resource may grow.
 *
 * A cycle opens a handle, adds slots, touches for some seconds, removes and closes. Each toucher has pages of its own.
 * It discards them, which makes the source's bytes of the next generation due, and touches each once: a fault fills
 * only one page, so each of these touches is a fault. It then checks every word. Between cycles memory, descriptors,
 * threads and mappings are counted; they may not grow after the first cycles.
 */
#include "../c/seeded.h"
#include <malloc.h>

enum { TOUCHERS = 8, SLOT_PAGES = 4096, CHUNK = 256, CYCLE_MS = 5000, WARM_CYCLES = 3, PATIENCE_S = 120 };
enum { RSS_SLACK_KB = 8192, MAPPINGS_SLACK = 16 };

struct part {
    unsigned char *memory;
    uint64_t gpa, faults, generation;
    pthread_t thread;
};

struct size {
    long rss_kb, descriptors, threads, mappings;
};

static struct kuf *handle;
static size_t page_bytes;
static atomic_bool stop, over;
static _Atomic uint64_t verified, wrong;
/* The source's generation of each chunk of each part. */
static _Atomic uint64_t generations[TOUCHERS][SLOT_PAGES / CHUNK];

/* ---- Source -------------------------------------------------------------------------------------------------------- */

static uint64_t gpa_of_part(unsigned part)
{
    return (uint64_t)(part + 1) << 32;
}

static int fill(void *opaque, struct kuf_fill *run)
{
    (void)opaque;
    unsigned part = (unsigned)(run->gpa >> 32) - 1;
    for (uint64_t at = 0; at < run->len; at += page_bytes) {
        uint64_t page = (run->gpa + at - gpa_of_part(part)) / page_bytes;
        write_content((char *)run->buf + at, run->gpa + at, page_bytes, atomic_load(&generations[part][page / CHUNK]));
    }
    return KUF_FILL_DONE;
}

static void event(void *opaque, const struct kuf_event *what)
{
    (void)opaque;
    bool ending = what->kind == KUF_EVENT_POISONED && atomic_load(&stop);
    must(what->kind == KUF_EVENT_COMPLETE || ending, "event %u: %s", what->kind, what->text);
}

/* ---- Touchers ------------------------------------------------------------------------------------------------------ */

static void say_wrong(const struct part *part, unsigned page, uint64_t generation)
{
    atomic_fetch_add(&wrong, 1);
    const uint64_t *words = (const uint64_t *)(part->memory + page * page_bytes);
    must(false, "gpa %#" PRIx64 ": wrong bytes; generation %" PRIu64 ", first word %#" PRIx64 ", last %#" PRIx64,
         part->gpa + page * page_bytes, generation, words[0], words[page_bytes / 8 - 1]);
}

static bool page_holds(const struct part *part, unsigned page, uint64_t generation)
{
    const unsigned char *at = part->memory + page * page_bytes;
    return generation == 0 ? holds_zeroes(at, page_bytes)
                           : holds_content(at, part->gpa + page * page_bytes, page_bytes, generation);
}

/* Drops a chunk, by the library or as a balloon does. Returns the generation that is due, 0 for zeroes. */
static uint64_t drop_chunk(struct part *part, unsigned chunk, unsigned index)
{
    uint64_t gpa = part->gpa + chunk * CHUNK * page_bytes, generation = ++part->generation;
    unsigned char *at = part->memory + chunk * CHUNK * page_bytes;
    atomic_store(&generations[index][chunk], generation);
    int got = kuf_discard(handle, gpa, CHUNK * page_bytes, KUF_DISCARD_REFILL);
    must(got == 0, "kuf_discard: %d", got);
    if (below(8) != 0)
        return generation;
    got = index % 2 ? madvise(at, CHUNK * page_bytes, MADV_REMOVE) : madvise(at, CHUNK * page_bytes, MADV_DONTNEED);
    must(got == 0, "madvise: %s", strerror(errno));
    return 0;
}

/* Touches each page of a chunk once, up or down or in leaps. */
static void touch_chunk(struct part *part, unsigned chunk, uint64_t generation)
{
    static const unsigned steps[] = {1, CHUNK - 1, 37, 101};
    unsigned step = steps[below(4)], at = (unsigned)below(CHUNK);
    for (unsigned n = 0; n < CHUNK; n++, at = (at + step) % CHUNK)
        if (!page_holds(part, chunk * CHUNK + at, generation))
            say_wrong(part, chunk * CHUNK + at, generation);
    /* One fault in given-back memory may zero its neighbours too. */
    if (generation == 0)
        return;
    atomic_fetch_add(&verified, CHUNK);
    part->faults += CHUNK;
}

static struct part parts[TOUCHERS];

static void *toucher(void *argument)
{
    struct part *part = argument;
    unsigned index = (unsigned)(part - parts);
    while (!atomic_load(&stop)) {
        unsigned chunk = (unsigned)below(SLOT_PAGES / CHUNK);
        touch_chunk(part, chunk, drop_chunk(part, chunk, index));
    }
    return NULL;
}

/* ---- A cycle ------------------------------------------------------------------------------------------------------- */

static void add_part(unsigned index, int *fd)
{
    struct part *part = &parts[index];
    size_t length = SLOT_PAGES * page_bytes;
    part->gpa = gpa_of_part(index);
    part->faults = 0;
    *fd = -1;
    if (index % 2) {
        part->memory = map_shared(length, fd);
        add_shared(handle, part->gpa, part->memory, length, *fd, 0);
    } else {
        part->memory = map_anonymous(length);
        add(handle, part->gpa, part->memory, length);
    }
}

static void remove_part(unsigned index, int fd)
{
    int got = remove_patiently(handle, parts[index].gpa);
    must(got == 0, "kuf_remove_memory: %d", got);
    munmap(parts[index].memory, SLOT_PAGES * page_bytes);
    if (fd >= 0)
        close(fd);
}

static void cycle(uint64_t until)
{
    int fd[TOUCHERS];
    handle = open_with((struct kuf_options){
        .fill = fill, .event = event, .demand_run = page_bytes, .fill_threads = (uint32_t)below(5),
        .userfaultfds = (uint32_t)below(3), .spin_us = below(2) ? 50 : 0});
    for (unsigned i = 0; i < TOUCHERS; i++)
        add_part(i, &fd[i]);
    atomic_store(&stop, false);
    for (unsigned i = 0; i < TOUCHERS; i++)
        parts[i].thread = start(toucher, &parts[i]);
    while (now_ns() < until)
        sleep_ms(5);
    atomic_store(&stop, true);
    uint64_t touched = 0;
    for (unsigned i = 0; i < TOUCHERS; i++) {
        pthread_join(parts[i].thread, NULL);
        touched += parts[i].faults;
    }
    uint64_t read = stats_of(handle).faults;
    must(read >= touched, "each touch was a fault: %" PRIu64 " faults were read, %" PRIu64 " pages touched", read, touched);
    for (unsigned i = 0; i < TOUCHERS; i++)
        remove_part(i, fd[i]);
    int got = kuf_close(&handle, 0);
    must(got == 0, "kuf_close: %d, %s", got, kuf_error());
}

/* ---- Growth -------------------------------------------------------------------------------------------------------- */

static long status_line(const char *name)
{
    char line[256];
    long value = -1;
    FILE *file = fopen("/proc/self/status", "r");
    while (file != NULL && fgets(line, sizeof(line), file) != NULL)
        if (strncmp(line, name, strlen(name)) == 0)
            value = atol(line + strlen(name));
    if (file != NULL)
        fclose(file);
    return value;
}

static long lines_of(const char *path)
{
    long lines = 0;
    FILE *file = fopen(path, "r");
    for (int c; file != NULL && (c = getc(file)) != EOF;)
        lines += c == '\n';
    if (file != NULL)
        fclose(file);
    return lines;
}

/* Threads that have been joined may be counted for a moment still. */
static struct size measure(void)
{
    malloc_trim(0);
    for (int n = 0; n < 2000 && threads_named("kuf-") != 0; n++)
        sleep_ms(1);
    return (struct size){status_line("VmRSS:"), open_descriptors(), status_line("Threads:"), lines_of("/proc/self/maps")};
}

static void compare(struct size first, struct size now)
{
    must(now.descriptors <= first.descriptors, "descriptors grow: %ld, then %ld", first.descriptors, now.descriptors);
    must(now.threads <= first.threads, "threads grow: %ld, then %ld", first.threads, now.threads);
    must(now.mappings <= first.mappings + MAPPINGS_SLACK, "mappings grow: %ld, then %ld", first.mappings, now.mappings);
    must(now.rss_kb <= first.rss_kb + RSS_SLACK_KB, "memory grows: %ld kB, then %ld kB", first.rss_kb, now.rss_kb);
}

/* Ends the program after a long while without a fault, and prints the state. */
static void *watch_main(void *unused)
{
    (void)unused;
    uint64_t last = 0, since = now_ns();
    while (!atomic_load(&over)) {
        uint64_t sum = atomic_load(&verified);
        if (sum != last) {
            last = sum;
            since = now_ns();
        } else if (now_ns() - since > (uint64_t)PATIENCE_S * 1000000000) {
            watchdog(10);
            printf("    HANG: no page for %d s, seed %" PRIu64 "\n", PATIENCE_S, seed);
            dump_handle(handle);
            raise(SIGALRM);
        }
        sleep_ms(100);
    }
    return NULL;
}

int main(void)
{
    begin();
    uint64_t seconds = setting("KUF_SOAK_SECONDS", 60);
    char text[32];
    snprintf(text, sizeof(text), "%" PRIu64, seconds);
    setenv("KUF_STRESS_SECONDS", text, 1);
    begin_seeded(seconds, 10 * PATIENCE_S);
    page_bytes = page_size();
    pthread_t watcher = start(watch_main, NULL);
    struct size first = {0}, now = {0};
    uint64_t begun = now_ns(), end = begun + seconds * 1000000000;
    unsigned cycles = 0;
    for (; cycles <= WARM_CYCLES || now_ns() < end; cycles++) {
        /* The first cycles are short, for the comparison needs their sizes. */
        uint64_t long_enough = now_ns() + (cycles < WARM_CYCLES ? 200 : CYCLE_MS) * UINT64_C(1000000);
        cycle(long_enough < end || cycles <= WARM_CYCLES ? long_enough : end);
        now = measure();
        if (cycles == WARM_CYCLES)
            first = now;
        if (cycles >= WARM_CYCLES)
            compare(first, now);
        if (cycles % 12 == 0)
            printf("# %" PRIu64 " s: %" PRIu64 " verified faults; %ld kB, %ld descriptors, %ld threads, %ld mappings\n",
                   (now_ns() - begun) / 1000000000, atomic_load(&verified), now.rss_kb, now.descriptors, now.threads,
                   now.mappings);
    }
    atomic_store(&over, true);
    pthread_join(watcher, NULL);
    uint64_t took = now_ns() - begun;
    printf("# memory %ld kB, then %ld kB; descriptors %ld, %ld; threads %ld, %ld; mappings %ld, %ld\n", first.rss_kb,
           now.rss_kb, first.descriptors, now.descriptors, first.threads, now.threads, first.mappings, now.mappings);
    ok(atomic_load(&wrong) == 0, "%" PRIu64 " verified faults in %" PRIu64 " s and %u cycles, 0 wrong, 0 hung, nothing grew",
       atomic_load(&verified), took / 1000000000, cycles);
    return done();
}
