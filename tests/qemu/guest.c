/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The only process of the migrated guest: it keeps memory under load and verifies each byte.
 *
 * Each page of a large array is a function of its number and its generation. One half never changes, so that its hash is
 * the same before and after the migration. One thread for each processor checks and rewrites the pages of the other half
 * in random order. A separate table holds the generation of each page, so that the check detects a page that is older or
 * newer than its entry, mixed or empty.
 *
 * Kernel command line: kuf.mib=MIB is the size of the array, kuf.step=N writes and checks only each Nth word of a page.
 * Commands, one on each line of the console: "check" stops the load, checks all memory, prints one line that starts with
 * CHECK, and continues the load.
 */
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define WORDS (4096 / sizeof(uint64_t))
#define THREADS_MAX 8

static uint64_t *array;
static uint64_t pages, step = 1;
static uint32_t *generation;

static struct worker {
    pthread_t thread;
    unsigned int id;
    /* Held while a page and its entry in the table differ. */
    pthread_mutex_t lock;
    _Atomic uint64_t writes, bad, slowest_us;
} workers[THREADS_MAX];
static unsigned int threads;

static uint64_t seed(uint64_t page, uint64_t gen)
{
    return (page * UINT64_C(0x9e3779b97f4a7c15) ^ gen * UINT64_C(0xd6e8feb86659fd93)) | 1;
}

static void fill(uint64_t page, uint64_t gen)
{
    uint64_t *at = array + page * WORDS, s = seed(page, gen);

    for (uint64_t i = 0; i < WORDS; i += step)
        at[i] = s * (2 * i + 1);
}

/* Checks a page. Returns the sum of its words, or 0 if one of them is wrong. */
static uint64_t look(uint64_t page, uint64_t gen)
{
    const uint64_t *at = array + page * WORDS;
    uint64_t s = seed(page, gen), sum = 0, wrong = 0;

    for (uint64_t i = 0; i < WORDS; i += step) {
        wrong |= at[i] ^ s * (2 * i + 1);
        sum += at[i];
    }
    return wrong ? 0 : sum | 1;
}

static uint64_t now_us(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void *work(void *arg)
{
    struct worker *me = arg;
    uint64_t half = pages / 2, random = seed(me->id, 1);

    for (;;) {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        /* Each worker owns the pages of the second half whose number modulo `threads` is its id. */
        uint64_t still = random % half;
        uint64_t page = half + (random >> 32) % (half / threads) * threads + me->id;
        uint64_t before = now_us();

        pthread_mutex_lock(&me->lock);
        if (!look(still, 0))
            me->bad++;
        if (!look(page, generation[page]))
            me->bad++;
        fill(page, ++generation[page]);
        me->writes++;
        pthread_mutex_unlock(&me->lock);
        uint64_t took = now_us() - before;
        if (took > me->slowest_us)
            me->slowest_us = took;
    }
    return NULL;
}

static void check(void)
{
    uint64_t bad = 0, early = 0, writes = 0, generations = 0, still = 0, moving = 0, slowest = 0;
    unsigned int i;

    for (i = 0; i < threads; i++)
        pthread_mutex_lock(&workers[i].lock);
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t sum = look(page, generation[page]);

        if (!sum && bad++ < 4)
            printf("BAD page %" PRIu64 " of %" PRIu64 ", generation %" PRIu32 "\n", page, pages, generation[page]);
        generations += generation[page];
        if (page < pages / 2)
            still = still * 31 + sum;
        else
            moving = moving * 31 + sum;
    }
    for (i = 0; i < threads; i++) {
        early += workers[i].bad;
        writes += workers[i].writes;
        if (workers[i].slowest_us > slowest)
            slowest = workers[i].slowest_us;
        workers[i].slowest_us = 0;
    }
    printf("CHECK bad=%" PRIu64 " early=%" PRIu64 " lost=%" PRId64 " writes=%" PRIu64 " slowest_us=%" PRIu64
           " still=%016" PRIx64 " moving=%016" PRIx64 "\n",
           bad, early, (int64_t)(writes - generations), writes, slowest, still, moving);
    for (i = 0; i < threads; i++)
        pthread_mutex_unlock(&workers[i].lock);
}

static uint64_t option(const char *name, uint64_t otherwise)
{
    static char line[4096];
    const char *at;

    if (!*line) {
        int fd = open("/proc/cmdline", O_RDONLY);

        if (fd < 0 || read(fd, line, sizeof(line) - 1) <= 0)
            return otherwise;
        close(fd);
    }
    at = strstr(line, name);
    return at ? strtoull(at + strlen(name), NULL, 0) : otherwise;
}

int main(void)
{
    struct termios tty;
    char line[64];
    size_t have = 0;
    int beat = 0;

    setvbuf(stdout, NULL, _IOLBF, 0);
    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    if (tcgetattr(0, &tty) == 0) {
        tty.c_lflag &= ~(tcflag_t)(ECHO | ICANON);
        tcsetattr(0, TCSANOW, &tty);
    }
    step = option("kuf.step=", 1);
    pages = option("kuf.mib=", 64) << 8;
    threads = (unsigned int)get_nprocs();
    if (threads > THREADS_MAX)
        threads = THREADS_MAX;
    array = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    generation = calloc(pages, sizeof(*generation));
    if (array == MAP_FAILED || !generation) {
        printf("FAIL no memory\n");
        pause();
    }
    for (uint64_t page = 0; page < pages; page++)
        fill(page, 0);
    for (unsigned int i = 0; i < threads; i++) {
        workers[i].id = i;
        pthread_mutex_init(&workers[i].lock, NULL);
        pthread_create(&workers[i].thread, NULL, work, &workers[i]);
    }
    printf("READY pages=%" PRIu64 " threads=%u\n", pages, threads);

    for (;;) {
        struct pollfd in = { .fd = 0, .events = POLLIN };
        ssize_t n;

        if (poll(&in, 1, 100) <= 0) {
            uint64_t writes = 0;

            for (unsigned int i = 0; i < threads; i++)
                writes += workers[i].writes;
            printf("BEAT %d writes=%" PRIu64 "\n", ++beat, writes);
            continue;
        }
        n = read(0, line + have, sizeof(line) - 1 - have);
        if (n <= 0)
            continue;
        have += (size_t)n;
        line[have] = '\0';
        if (strchr(line, '\n') || have == sizeof(line) - 1) {
            if (strstr(line, "check"))
                check();
            have = 0;
        }
    }
}
