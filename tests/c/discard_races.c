/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kuf_discard against everything that can be late: faults of threads that other threads have woken, the REMOVE events
 * that it causes itself, and populate. After it returns no thread reads earlier bytes, and none reads zeroes.
 */
#include "seeded.h"

#define BASE UINT64_C(0x70000000)
enum { PAGES = 16, TOUCHERS = 3 };

static struct source source = SOURCE_INIT;
/* For each page: the generation that the source gives, and the oldest one that a thread may still read. */
static _Atomic uint64_t newest[PAGES], oldest[PAGES];
static atomic_bool stop;
static atomic_int stale, zero, strange;
static _Atomic uint64_t looks;

static int fill(void *opaque, struct kuf_fill *fill)
{
    size_t page = page_size();
    (void)opaque;
    for (uint64_t at = 0; at < fill->len; at += page) {
        uint64_t generation = atomic_load(&newest[(fill->gpa + at - BASE) / page]);
        uint64_t *words = (uint64_t *)((char *)fill->buf + at);
        for (size_t i = 0; i < page / 8; i++)
            words[i] = (fill->gpa + at) << 20 | generation;
    }
    return KUF_FILL_DONE;
}

static void *toucher(void *argument)
{
    const unsigned char *ram = argument;
    size_t page = page_size();
    uint64_t random = (uint64_t)syscall(SYS_gettid);
    while (!atomic_load(&stop)) {
        uint64_t i = next_random(&random) % PAGES;
        uint64_t from = atomic_load(&oldest[i]);
        uint64_t word = *(const volatile uint64_t *)(ram + i * page + next_random(&random) % (page / 8) * 8);
        uint64_t to = atomic_load(&newest[i]);
        atomic_fetch_add(&looks, 1);
        if (word == 0)
            atomic_fetch_add(&zero, 1);
        else if (word >> 20 != BASE + i * page || (word & 0xfffff) > to)
            atomic_fetch_add(&strange, 1);
        else if ((word & 0xfffff) < from)
            atomic_fetch_add(&stale, 1);
    }
    return NULL;
}

static void go(bool shared, long ms)
{
    const char *kind = kind_of(shared);
    size_t page = page_size(), length = PAGES * page;
    int fd;
    unsigned char *ram = map_kind(shared, length, &fd);
    struct kuf *kuf = watch(open_with((struct kuf_options){.fill = fill, .event = source_event, .opaque = &source,
                                                           .demand_run = 2 * page}));
    atomic_store(&stop, false);
    atomic_store(&stale, 0);
    atomic_store(&zero, 0);
    atomic_store(&strange, 0);
    for (int i = 0; i < PAGES; i++) {
        atomic_store(&newest[i], 1);
        atomic_store(&oldest[i], 1);
    }
    add_kind(kuf, BASE, ram, length, fd);
    pthread_t thread[TOUCHERS];
    for (int i = 0; i < TOUCHERS; i++)
        thread[i] = start(toucher, ram);
    uint64_t random = 4711, rounds = 0;
    for (uint64_t end = now_ns() + (uint64_t)ms * 1000000; now_ns() < end; rounds++) {
        uint64_t i = next_random(&random) % PAGES, n = 1 + next_random(&random) % 2;
        if (i + n > PAGES)
            n = 1;
        for (uint64_t k = i; k < i + n; k++)
            atomic_fetch_add(&newest[k], 1);
        must(kuf_discard(kuf, BASE + i * page, n * page, KUF_DISCARD_REFILL) == 0, "kuf_discard: %s", kuf_error());
        for (uint64_t k = i; k < i + n; k++)
            atomic_store(&oldest[k], atomic_load(&newest[k]));
        if (rounds % 16 == 0) {
            struct kuf_populate_request request = {.size = sizeof(request), .gpa = BASE, .len = length};
            must(kuf_populate(kuf, &request) == 0, "kuf_populate: %s", kuf_error());
        }
    }
    atomic_store(&stop, true);
    for (int i = 0; i < TOUCHERS; i++)
        pthread_join(thread[i], NULL);
    struct kuf_stats_info stats = stats_of(kuf);
    printf("# %s: %" PRIu64 " discards, %" PRIu64 " looks, %" PRIu64 " faults, late %" PRIu64 ", joined %" PRIu64
           ", events %" PRIu64 ", again %" PRIu64 "\n",
           kind, rounds, atomic_load(&looks), stats.faults, stats.faults_late, stats.faults_joined,
           stats.events_remove, stats.install_again);
    is(atomic_load(&stale), 0, "%s: no thread reads discarded bytes", kind);
    is(atomic_load(&zero), 0, "%s: no thread reads zeroes in their place", kind);
    is(atomic_load(&strange), 0, "%s: no thread reads foreign bytes", kind);
    is(progress_of(kuf, BASE).removed, 0, "%s: no discarded page counts as given back", kind);
    close_watched(kuf, KUF_END_POPULATE);
    munmap(ram, length);
    close(fd);
}

int main(void)
{
    begin_watched(30);
    go(false, 4000);
    go(true, 4000);
    return done();
}
