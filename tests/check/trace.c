/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * For tests/check/trace.sh: has pages filled in each way that a fill can end, by touches and in the background, and prints
 * what kuf_stats has counted, one count a line.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <kuf.h>

#define BASE UINT64_C(0x100000000)
#define APART (UINT64_C(1) << 20)
#define PAGES 32

static int ends[2];

/* Says zero, defers, fails or writes, by the number of the page. */
static int fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    switch ((fill->gpa - BASE) / APART % 4) {
    case 0:
        return KUF_FILL_ZERO;
    case 1:
        if (write(ends[1], &fill->gpa, sizeof(fill->gpa)) != sizeof(fill->gpa))
            return -5;
        return KUF_FILL_DEFERRED;
    case 2:
        return -5;
    default:
        memset(fill->buf, 1, fill->len);
        return KUF_FILL_DONE;
    }
}

static void event(void *opaque, const struct kuf_event *event)
{
    (void)opaque;
    uint64_t none = 0;
    if (event->kind == KUF_EVENT_POPULATED && write(ends[1], &none, sizeof(none)) != sizeof(none))
        _exit(3);
}

int main(void)
{
    uint64_t len = PAGES * APART, gpa;
    unsigned char page[4096], *ram = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kuf_options options = {.size = sizeof(options), .flags = KUF_OPEN_USER_MODE_ONLY, .fill = fill, .event = event,
                                  .demand_run = sizeof(page)};
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = len, .hva = (uintptr_t)ram};
    struct kuf_stats_info stats = {.size = sizeof(stats)};
    struct kuf *kuf;
    if (pipe(ends) < 0 || ram == MAP_FAILED)
        return 1;
    if (kuf_open(&options, &kuf) < 0) {
        printf("SKIP: %s\n", kuf_error());
        return 77;
    }
    if (kuf_add_memory(kuf, &memory) < 0)
        return fprintf(stderr, "%s\n", kuf_error()), 1;

    memset(page, 2, sizeof(page));
    for (unsigned i = 0; i < PAGES; i++) {
        if (i % 4 == 0 && ram[i * APART] != 0)
            return 1;
        if (i % 4 == 3 && ram[i * APART] != 1)
            return 1;
        if (i % 4 == 0 || i % 4 == 3)
            continue;
        /* Not touched: the caller supplies these bytes, or there are none. */
        struct kuf_populate_request request = {.size = sizeof(request), .gpa = BASE + i * APART, .len = sizeof(page)};
        if (kuf_populate(kuf, &request) < 0)
            return fprintf(stderr, "%s\n", kuf_error()), 1;
        do {
            if (read(ends[0], &gpa, sizeof(gpa)) != sizeof(gpa))
                return 1;
            if (gpa != 0 && kuf_resolve(kuf, gpa, page, sizeof(page), 0) != sizeof(page))
                return fprintf(stderr, "%s\n", kuf_error()), 1;
        } while (gpa != 0);
    }
    /* A touch goes on before its page is counted. */
    if (kuf_ensure(kuf, BASE + len - APART, sizeof(page), -1) < 0 || kuf_stats(kuf, &stats) < 0 ||
        kuf_close(&kuf, KUF_END_POISON) < 0)
        return fprintf(stderr, "%s\n", kuf_error()), 1;
    printf("pid %d\n", getpid());
    printf("faults %llu\n", (unsigned long long)(stats.faults - stats.faults_unknown));
    printf("fills %llu\n", (unsigned long long)stats.fills);
    printf("failed %llu\n", (unsigned long long)stats.fills_failed);
    printf("deferred %llu\n", (unsigned long long)stats.fills_deferred);
    printf("copied %llu\n", (unsigned long long)stats.bytes_copied);
    printf("zeroed %llu\n", (unsigned long long)stats.bytes_zeroed);
    printf("touched %d\n", PAGES / 2);
    return 0;
}
