/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Whichever threads count, and however many threads wait: no count is lost, and none goes to another handle. */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { WAITERS = 150, PAGES = 1024, TOUCHERS = 4 };

static atomic_int gate;

static void *touch_when_all_are_there(void *memory)
{
    atomic_fetch_add(&gate, 1);
    wait_until(atomic_load(&gate) == WAITERS);
    (void)*(volatile unsigned char *)memory;
    return NULL;
}

/* More threads than a table of fixed size is likely to hold. */
static void every_thread_has_its_time(void)
{
    static struct source source = SOURCE_INIT;
    size_t page = page_size();
    unsigned char *ram = map_anonymous(WAITERS * page);
    struct kuf *kuf = open_with((struct kuf_options){.fill = source_fill, .opaque = &source, .demand_run = page});
    add(kuf, BASE, ram, WAITERS * page);
    pthread_t threads[WAITERS];
    for (int n = 0; n < WAITERS; n++)
        threads[n] = start(touch_when_all_are_there, ram + (size_t)n * page);
    for (int n = 0; n < WAITERS; n++)
        pthread_join(threads[n], NULL);
    comes_to(stats_of(kuf).blocked.count, WAITERS, "every wait is over");
    is(stats_of(kuf).faults, WAITERS, "and was for a fault");
    if (has_feature(KUF_FEATURE_THREAD_ID)) {
        static struct kuf_block_time times[2 * WAITERS];
        comes_to(kuf_block_times(kuf, times, 2 * WAITERS), WAITERS, "each thread is named");
        uint64_t faults = 0, total = 0, longest = 0;
        bool apart = true;
        for (int n = 0; n < WAITERS; n++) {
            faults += times[n].faults;
            total += times[n].total_ns;
            longest = times[n].max_ns > longest ? times[n].max_ns : longest;
            for (int other = 0; other < n; other++)
                apart = apart && times[n].thread != times[other].thread;
        }
        struct kuf_stats_info stats = stats_of(kuf);
        ok(apart, "and once only");
        is(faults, WAITERS, "the faults of all threads are all faults");
        is(total, stats.blocked.sum_ns, "and their waits");
        is(longest, stats.blocked.max_ns, "and the longest of them");
    } else {
        skip_part("this kernel does not name the faulting thread");
    }
    close_with(kuf, KUF_END_POISON);
}

/*
 * A handle whose callback also resolves a page of the other one: there its threads have no shard, and count all the
 * same.
 */
struct side {
    struct kuf *kuf, *other;
    unsigned char *ram;
};

static int fill_and_bring(void *opaque, struct kuf_fill *fill)
{
    struct side *side = opaque;
    unsigned char bytes[1 << 16];
    must(fill->len <= sizeof(bytes), "a page of %zu bytes", (size_t)fill->len);
    uint64_t gpa = fill->gpa + PAGES * fill->len;
    write_content(bytes, gpa, fill->len, 1);
    must(kuf_resolve(side->other, gpa, bytes, fill->len, 0) == (ssize_t)fill->len, "kuf_resolve: %s", kuf_error());
    write_content(fill->buf, fill->gpa, fill->len, 1);
    return KUF_FILL_DONE;
}

static void *touch_a_part(void *memory)
{
    for (size_t n = 0; n < PAGES; n += TOUCHERS)
        (void)*(volatile unsigned char *)((unsigned char *)memory + n * page_size());
    return NULL;
}

static void handles_that_call_each_other(void)
{
    static struct side sides[2];
    size_t page = page_size();
    for (int n = 0; n < 2; n++) {
        sides[n].ram = map_anonymous(2 * PAGES * page);
        sides[n].kuf = open_with((struct kuf_options){
            .fill = fill_and_bring, .opaque = &sides[n], .demand_run = page, .fill_threads = TOUCHERS});
    }
    for (int n = 0; n < 2; n++) {
        sides[n].other = sides[1 - n].kuf;
        add(sides[n].kuf, BASE, sides[n].ram, 2 * PAGES * page);
    }
    pthread_t threads[2 * TOUCHERS];
    for (size_t n = 0; n < 2 * TOUCHERS; n++)
        threads[n] = start(touch_a_part, sides[n % 2].ram + n / 2 * page);
    for (int n = 0; n < 2 * TOUCHERS; n++)
        pthread_join(threads[n], NULL);
    for (int n = 0; n < 2; n++) {
        struct kuf *kuf = sides[n].kuf;
        comes_to(stats_of(kuf).blocked.count, PAGES, "handle %d: every wait is over", n);
        comes_to(stats_of(kuf).installing.count, 2 * PAGES, "handle %d: every page is opened", n);
        struct kuf_stats_info stats = stats_of(kuf);
        is(stats.faults, PAGES, "handle %d: faults", n);
        is(stats.fills, PAGES, "handle %d: fills", n);
        is(stats.filling.count, PAGES, "handle %d: how long they took", n);
        is(stats.bytes_copied, 2 * PAGES * page, "handle %d: its own pages and those that the other's threads resolved", n);
        ok(holds_content(sides[n].ram, BASE, 2 * PAGES * page, 1), "handle %d: every byte", n);
    }
    for (int n = 0; n < 2; n++)
        close_with(sides[n].kuf, KUF_END_POISON);
}

int main(void)
{
    begin();
    every_thread_has_its_time();
    handles_that_call_each_other();
    return done();
}
