/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * REMOVE before the faults that were read with it, and before fills that are under way: a page that the guest gave back
 * never shows the source's bytes again until kuf_discard, whichever call was filling it.
 */
#include "in_thread.h"
#include "seeded.h"

#define BASE UINT64_C(0x60000000)
enum { PAGES = 64 };

static struct source source = SOURCE_INIT;
static _Atomic uint64_t lower_to;
static atomic_int slow_us;

/* Writes at once and returns later, so that its bytes are old if the page is given back meanwhile. */
static int fill(void *opaque, struct kuf_fill *fill)
{
    write_content(fill->buf, fill->gpa, fill->len, 1);
    int answer = source_fill(opaque, fill);
    if (atomic_load(&lower_to) != 0)
        fill->filled = atomic_load(&lower_to);
    if (atomic_load(&slow_us) != 0)
        usleep((useconds_t)atomic_load(&slow_us));
    return answer;
}

/* In the middle of a run that is being filled a page is given back; then the run is short, fails, or is discarded. */
static void during_a_run(bool shared, const char *what)
{
    const char *kind = kind_of(shared);
    size_t page = page_size(), length = PAGES * page;
    int fd;
    unsigned char *ram = map_kind(shared, length, &fd);
    struct kuf *kuf = watch(open_with((struct kuf_options){.fill = fill, .event = source_event, .opaque = &source,
                                                           .demand_run = 4 * page, .fill_threads = 2}));
    add_kind(kuf, BASE, ram, length, fd);
    bool refills = strcmp(what, "is discarded") == 0;
    atomic_store(&source.hold, true);
    struct ensuring ensuring;
    start_ensuring(&ensuring, kuf, BASE, 4 * page);
    wait_until(atomic_load(&source.inside) == 1);
    struct giving giving;
    start_giving(&giving, ram + 2 * page, page, shared ? MADV_REMOVE : MADV_DONTNEED);
    pthread_join(giving.thread, NULL);
    if (strcmp(what, "comes short") == 0)
        atomic_store(&lower_to, page);
    if (strcmp(what, "fails") == 0) {
        atomic_store(&source.bad_answer, -EIO);
        atomic_store(&source.bad_gpa, BASE + 3 * page);
    }
    if (refills)
        is(kuf_discard(kuf, BASE + 2 * page, page, KUF_DISCARD_REFILL), 0, "%s: the page is discarded after that", kind);
    atomic_store(&source.hold, false);
    join_ensuring(&ensuring);
    atomic_store(&lower_to, 0);
    if (refills)
        ok(holds_content(ram + 2 * page, BASE + 2 * page, page, 1),
           "%s: a page given back in a run that %s refills from the source", kind, what);
    else
        ok(holds_zeroes(ram + 2 * page, page), "%s: a page given back in a run that %s reads as zero", kind, what);
    ok(holds_content(ram, BASE, 2 * page, 1), "%s: the pages before it are whole", kind);
    ok(stats_of(kuf).events_remove > 0, "%s: the kernel has reported it", kind);
    atomic_store(&source.bad_gpa, NO_GPA);
    close_watched(kuf, KUF_END_POPULATE | KUF_END_POISON);
    munmap(ram, length);
    close(fd);
}

/* Everything at once, for a while. Each giver owns the pages that it gives back; touchers read all of them. */
static atomic_bool stop;
static atomic_int stale, strange;
static atomic_int given[PAGES];

struct field {
    unsigned char *ram;
    struct kuf *kuf;
    bool shared;
    int number;
};

/* A page shows its source's bytes, or zeroes; zeroes only from the moment when it was given back. */
static void look(struct field *field, int i)
{
    size_t page = page_size();
    const unsigned char *at = field->ram + (size_t)i * page;
    int before = atomic_load(&given[i]);
    uint64_t word = *(const volatile uint64_t *)at;
    if (word != 0 && word != word_of(BASE + (uint64_t)i * page, 1) && word != word_of(BASE + (uint64_t)i * page, 50))
        atomic_fetch_add(&strange, 1);
    if (word == word_of(BASE + (uint64_t)i * page, 1) && before > 0)
        atomic_fetch_add(&stale, 1);
    if (word == 0 && atomic_load(&given[i]) == 0 && before == 0)
        atomic_fetch_add(&strange, 1);
}

static void *toucher(void *argument)
{
    struct field *field = argument;
    uint64_t random = (uint64_t)field->number * 77 + 5;
    while (!atomic_load(&stop))
        look(field, (int)(next_random(&random) % PAGES));
    return NULL;
}

/* given: -1 while madvise runs, positive when it has returned. */
static void *giver(void *argument)
{
    struct field *field = argument;
    size_t page = page_size();
    uint64_t random = (uint64_t)field->number * 99 + 3;
    while (!atomic_load(&stop)) {
        int i = (int)(next_random(&random) % (PAGES / 2)) * 2 + field->number % 2;
        int expected = 0;
        if (!atomic_compare_exchange_strong(&given[i], &expected, -1) && expected < 0)
            continue;
        int advice = field->shared ? MADV_REMOVE : MADV_DONTNEED;
        must(madvise(field->ram + (size_t)i * page, page, advice) == 0, "madvise: %s", strerror(errno));
        atomic_store(&given[i], 1);
        if (next_random(&random) % 4 == 0)
            ((volatile uint64_t *)(field->ram + (size_t)i * page))[0] = word_of(BASE + (uint64_t)i * page, 50);
    }
    return NULL;
}

static void everything_at_once(bool shared, uint32_t threads)
{
    const char *kind = kind_of(shared);
    size_t page = page_size(), length = PAGES * page;
    uint64_t removes = 0, again = 0;
    atomic_store(&stale, 0);
    atomic_store(&strange, 0);
    atomic_store(&slow_us, 200);
    for (int round = 0; round < 30; round++) {
        int fd;
        unsigned char *ram = map_kind(shared, length, &fd);
        for (int i = 0; i < PAGES; i++)
            atomic_store(&given[i], 0);
        atomic_store(&stop, false);
        struct kuf *kuf = watch(open_with((struct kuf_options){
            .fill = fill, .event = source_event, .opaque = &source, .fill_threads = threads}));
        add_kind(kuf, BASE, ram, length, fd);
        struct field field[4];
        pthread_t thread[4];
        for (int i = 0; i < 4; i++) {
            field[i] = (struct field){ram, kuf, shared, i};
            thread[i] = start(i < 2 ? toucher : giver, &field[i]);
        }
        sleep_ms(40);
        atomic_store(&stop, true);
        for (int i = 0; i < 4; i++)
            pthread_join(thread[i], NULL);
        struct kuf_stats_info stats = stats_of(kuf);
        removes += stats.events_remove;
        again += stats.install_again;
        close_watched(kuf, KUF_END_POPULATE);
        munmap(ram, length);
        close(fd);
    }
    atomic_store(&slow_us, 0);
    is(atomic_load(&stale), 0, "%s, %u threads: no page that was given back shows old bytes", kind, threads);
    is(atomic_load(&strange), 0, "%s, %u threads: no page shows foreign bytes", kind, threads);
    ok(removes > 0, "%s, %u threads: the kernel has reported %" PRIu64 " removals", kind, threads, removes);
    printf("# installs put off because an event was unread: %" PRIu64 "\n", again);
}

int main(void)
{
    begin_watched(50);
    for (int shared = 0; shared < 2; shared++) {
        during_a_run(shared, "arrives");
        during_a_run(shared, "comes short");
        during_a_run(shared, "fails");
        during_a_run(shared, "is discarded");
    }
    for (int shared = 0; shared < 2; shared++) {
        everything_at_once(shared, 1);
        everything_at_once(shared, 2);
    }
    return done();
}
