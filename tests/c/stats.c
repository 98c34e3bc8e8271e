/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Counters and histograms count what was done, no more and no less. */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 64 };

static struct source source = SOURCE_INIT;

static void check_histogram(const struct kuf_histogram *histogram, const char *name)
{
    uint64_t sum = 0;
    int highest = -1;
    for (int i = 0; i < KUF_HISTOGRAM_BUCKETS; i++) {
        sum += histogram->bucket[i];
        if (histogram->bucket[i] > 0)
            highest = i;
    }
    is(sum, histogram->count, "%s: the buckets sum up", name);
    if (histogram->count == 0)
        return;
    ok(histogram->sum_ns >= histogram->max_ns && histogram->max_ns * histogram->count >= histogram->sum_ns,
       "%s: sum and maximum fit", name);
    ok(highest == KUF_HISTOGRAM_BUCKETS - 1 || histogram->max_ns >> highest <= 1, "%s: the maximum is in the highest bucket",
       name);
}

static void check_histograms(const struct kuf_stats_info *stats)
{
    check_histogram(&stats->queueing, "queueing");
    check_histogram(&stats->filling, "filling");
    check_histogram(&stats->installing, "installing");
    check_histogram(&stats->blocked, "blocked");
}

static void *write_a_page(void *memory)
{
    *(volatile unsigned char *)memory = 1;
    return NULL;
}

int main(void)
{
    begin();
    size_t page = page_size();
    unsigned char *ram = map_anonymous(PAGES * page), *bytes = map_anonymous(PAGES * page);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page});
    struct kuf_stats_info stats = stats_of(kuf), zero = {.size = sizeof(zero)};
    is(stats.size, sizeof(stats), "size is as it was set");
    ok(memcmp(&stats, &zero, sizeof(stats)) == 0, "everything is 0 at first");
    add(kuf, BASE, ram, PAGES * page);

    ok(holds_content(ram, BASE, 8 * page, 1), "eight pages are read");
    write_a_page(ram + 8 * page);
    write_a_page(ram + 9 * page);
    comes_to(stats_of(kuf).blocked.count, 10, "ten waits are over");
    wait_until(stats_of(kuf).installing.count >= 10);
    stats = stats_of(kuf);
    is(stats.faults, 10, "ten faults");
    is(stats.faults_write, 2, "two of them writes");
    is(stats.faults_minor, 0, "none of them minor");
    is(stats.fills, 10, "ten fills");
    is(stats.fills_failed + stats.fills_deferred, 0, "which went well");
    is(stats.bytes_copied, 10 * page, "ten pages are copied");
    is(stats.bytes_in_place + stats.bytes_zeroed + stats.bytes_poisoned + stats.bytes_populated, 0, "and nothing else");
    is(stats.queueing.count, 10, "ten waits in the queue");
    is(stats.filling.count, 10, "ten times in the callback");
    check_histograms(&stats);

    atomic_store(&source.answer, KUF_FILL_ZERO);
    ok(holds_zeroes(ram + 10 * page, 2 * page), "two pages of zeroes");
    comes_to(stats_of(kuf).bytes_zeroed, 2 * page, "are counted");
    atomic_store(&source.answer, -EIO);
    is(touch(ram + 12 * page), poison_signal(), "a page that cannot be filled");
    comes_to(stats_of(kuf).bytes_poisoned, page, "is poisoned");
    is(stats_of(kuf).fills_failed, 1, "is counted");
    atomic_store(&source.answer, 0);

    write_content(bytes, BASE + 16 * page, 4 * page, 1);
    is(kuf_resolve(kuf, BASE + 16 * page, bytes, 4 * page, 0), 4 * page, "four pages by hand");
    is(stats_of(kuf).bytes_copied, 14 * page, "are counted");
    is(kuf_resolve(kuf, BASE + 16 * page, bytes, 4 * page, 0), 0, "a second time");
    is(stats_of(kuf).bytes_copied, 14 * page, "are not");
    is(kuf_discard(kuf, BASE + 16 * page, 2 * page, KUF_DISCARD_REFILL), 0, "two pages are dropped");
    is(stats_of(kuf).bytes_discarded, 2 * page, "and counted");
    is(kuf_discard(kuf, BASE + 18 * page, page, KUF_DISCARD_ZERO), 0, "one is given back");
    is(stats_of(kuf).bytes_removed, page, "and counted");

    /* Two threads at one page. */
    uint64_t faults = stats_of(kuf).faults;
    atomic_store(&source.hold, true);
    pthread_t one = start(write_a_page, ram + 30 * page), two = start(write_a_page, ram + 30 * page);
    /* A fault is counted when it is read, and as joined when a thread takes it up. */
    wait_until(stats_of(kuf).faults == faults + 2 && stats_of(kuf).faults_joined == 1);
    atomic_store(&source.hold, false);
    pthread_join(one, NULL);
    pthread_join(two, NULL);
    comes_to(stats_of(kuf).faults_joined, 1, "the second thread joined the first");
    is(stats_of(kuf).faults_late, 0, "and no fault came late");

    struct kuf_populate_request rest = {.size = sizeof(rest), .gpa = BASE + 40 * page, .len = 20 * page};
    is(kuf_populate(kuf, &rest), 0, "twenty pages behind demand");
    wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) == 1);
    is(stats_of(kuf).bytes_populated, 20 * page, "are counted as populated");
    is(kuf_ensure(kuf, BASE + 60 * page, 2 * page, -1), 0, "two ensured");
    is(stats_of(kuf).bytes_populated, 20 * page, "are not");
    /* 10 filled, 4 by hand, 1 with two threads, 20 behind demand, 2 ensured */
    is(stats_of(kuf).bytes_copied, 37 * page, "everything copied is counted once");

    if (has_feature(KUF_FEATURE_THREAD_ID)) {
        struct kuf_block_time times[16];
        ssize_t n = kuf_block_times(kuf, times, 16);
        ok(n >= 1 && n <= 16, "threads that were kept waiting are known");
        bool self = false, ordered = true, sane = true;
        for (ssize_t i = 0; i < n && i < 16; i++) {
            self = self || (times[i].thread == (uint32_t)gettid() && times[i].faults >= 10);
            ordered = ordered && (i == 0 || times[i - 1].total_ns >= times[i].total_ns);
            sane = sane && times[i].faults > 0 && times[i].total_ns >= times[i].max_ns;
        }
        ok(self, "this thread with its faults");
        ok(ordered, "longest sum first");
        ok(sane, "each with a sum and a maximum");
        is(kuf_block_times(kuf, NULL, 0), n, "their number without room for them");
    } else {
        is(kuf_block_times(kuf, NULL, 0), 0, "no thread is named by this kernel");
        skip_part("this kernel does not name the faulting thread");
    }
    stats = stats_of(kuf);
    check_histograms(&stats);
    close_with(kuf, KUF_END_POISON);

    if (!has_feature(KUF_FEATURE_MINOR)) {
        skip_part("no minor faults on shared memory");
        return done();
    }
    int fd;
    unsigned char *shared = map_shared(PAGES * page, &fd);
    atomic_store(&source.answer, 0);
    kuf = open_with((struct kuf_options){.fill = source_fill, .opaque = &source, .demand_run = page});
    add_shared(kuf, BASE, shared, PAGES * page, fd, 0);
    ok(holds_content(shared, BASE, 8 * page, 1), "shared memory: eight pages are read");
    comes_to(stats_of(kuf).blocked.count, 8, "shared memory: eight waits are over");
    stats = stats_of(kuf);
    is(stats.faults, 8, "shared memory: eight faults");
    is(stats.bytes_in_place, 8 * page, "shared memory: in place");
    is(stats.bytes_copied, 0, "shared memory: nothing copied");
    check_histograms(&stats);
    close_with(kuf, KUF_END_POISON);
    close(fd);
    return done();
}
