/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kuf_resolve: from any thread, asked for or not, twice, in any order and pieces, as data, zeroes, in place or poison.
 */
#include "harness.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 64 };

static struct source source = SOURCE_INIT;
static struct kuf *kuf;
static unsigned char *ram, *bytes;

static uint64_t gpa_of(int page)
{
    return BASE + (uint64_t)page * page_size();
}

/* Resolves pages first..first+count with their own bytes. */
static ssize_t resolve(int first, int count, uint64_t generation)
{
    write_content(bytes, gpa_of(first), count * page_size(), generation);
    return kuf_resolve(kuf, gpa_of(first), bytes, count * page_size(), 0);
}

static void *resolve_page_4(void *unused)
{
    (void)unused;
    return (void *)resolve(4, 1, 1);
}

static void start_on(struct toucher *toucher, int first, int count)
{
    *toucher = (struct toucher){.memory = ram + first * page_size(), .gpa = gpa_of(first), .length = count * page_size(),
                                .generation = 1};
    start_toucher(toucher);
}

int main(void)
{
    begin();
    size_t page = page_size();
    struct kuf_fault faults[16];
    ram = map_anonymous(PAGES * page);
    bytes = map_anonymous(PAGES * page);
    kuf = open_driven(&source);
    add(kuf, BASE, ram, PAGES * page);
    is(kuf_read(kuf, faults, 16), -EAGAIN, "nothing to read at first");
    is(kuf_poll(kuf, 0), 0, "nothing to poll for at first");

    is(resolve(0, 1, 1), page, "a page becomes present before it is touched");
    ok(holds_content(ram, BASE, page, 1), "with its bytes");
    is(resolve(0, 1, 2), 0, "a second time makes nothing present");
    ok(holds_content(ram, BASE, page, 1), "and the bytes stay");
    is(kuf_read(kuf, faults, 16), -EAGAIN, "and nothing was to be read");

    is(kuf_resolve(kuf, gpa_of(1), (void *)(0 - 2 * page - 8), 2 * page, 0), -EFAULT, "nothing is at the end of all addresses");

    /* Asked for: one fault however many wait, answered by another thread. */
    struct toucher two[2];
    start_on(&two[0], 4, 1);
    start_on(&two[1], 4, 1);
    is(kuf_poll(kuf, -1), 1, "a fault to read");
    wait_until(stats_of(kuf).faults >= 2);
    is(kuf_read(kuf, faults, 16), 1, "one fault for two threads that wait");
    is(faults[0].gpa, gpa_of(4), "it names the page");
    is(faults[0].len, page, "and its length");
    is(faults[0].memory_offset, 4 * page, "and its offset");
    ok(faults[0].flags & KUF_FAULT_DEMAND, "a thread waits");
    ok(!(faults[0].flags & (KUF_FAULT_WRITE | KUF_FAULT_MINOR | KUF_FAULT_FORKED)), "a plain read of missing memory");
    ok(faults[0].place == NULL, "anonymous memory is not filled in place");
    is(kuf_read(kuf, faults, 16), -EAGAIN, "and it is given once");
    is(kuf_pending(kuf, faults, 16), 1, "it is owed");
    ok(faults[0].gpa == gpa_of(4) && faults[0].len == page, "and listed");
    is(progress_of(kuf, BASE).deferred, page, "and counted");
    void *got;
    pthread_join(start(resolve_page_4, NULL), &got);
    is((long)got, page, "another thread resolves it");
    ok(join_toucher(&two[0]) && join_toucher(&two[1]), "both threads read its bytes");
    is(kuf_pending(kuf, NULL, 0), 0, "and nothing is owed");

    /* Out of order. */
    struct toucher four[4];
    for (int i = 0; i < 4; i++)
        start_on(&four[i], 8 + i, 1);
    wait_until(stats_of(kuf).faults >= 6);
    int taken = 0;
    while (taken < 4) {
        ssize_t n = kuf_read(kuf, faults, 1);
        taken += n > 0 ? (int)n : 0;
    }
    is(kuf_pending(kuf, NULL, 0) >= 1, 1, "four pages are owed");
    for (int i = 3; i >= 0; i--)
        is(resolve(8 + i, 1, 1), page, "page %d is resolved, last first", 8 + i);
    bool good = true;
    for (int i = 0; i < 4; i++)
        good = join_toucher(&four[i]) && good;
    ok(good, "each thread reads its own page");

    /* Taken by kuf_read or not: a resolve before the fault is read answers it as well. */
    start_on(&two[0], 12, 1);
    is(kuf_poll(kuf, -1), 1, "a fault to read");
    is(resolve(12, 1, 1), page, "resolved before it is read");
    ok(join_toucher(&two[0]), "the thread goes on");
    is(kuf_read(kuf, faults, 16), -EAGAIN, "a page that is present is never given");

    /* Runs over pages that are present, and from an address of any alignment. */
    is(resolve(20, 1, 1), page, "a page in the middle");
    is(resolve(16, 16, 2), 15 * page, "a run round it counts what it made present");
    ok(holds_content(ram + 20 * page, gpa_of(20), page, 1), "the page in the middle keeps its bytes");
    ok(holds_content(ram + 16 * page, gpa_of(16), 4 * page, 2) && holds_content(ram + 21 * page, gpa_of(21), 11 * page, 2),
       "the others get theirs");
    unsigned char *odd = malloc(2 * page + 8);
    write_content(bytes, gpa_of(32), 2 * page, 1);
    memcpy(odd + 3, bytes, 2 * page);
    is(kuf_resolve(kuf, gpa_of(32), odd + 3, 2 * page, 0), 2 * page, "src of any alignment");
    ok(holds_content(ram + 32 * page, gpa_of(32), 2 * page, 1), "arrives whole");
    free(odd);

    is(kuf_resolve(kuf, gpa_of(40), NULL, 4 * page, KUF_RESOLVE_ZERO), 4 * page, "zeroes");
    ok(holds_zeroes(ram + 40 * page, 4 * page), "read as zeroes");
    is(kuf_resolve(kuf, gpa_of(40), NULL, 4 * page, KUF_RESOLVE_ZERO), 0, "a second time makes nothing present");

    /* Poison, before a touch and while a thread waits. */
    is(kuf_resolve(kuf, gpa_of(50), NULL, page, KUF_RESOLVE_POISON), page, "a page is poisoned");
    is(touch(ram + 50 * page), poison_signal(), "touching it raises the signal");
    wait_until(atomic_load(&source.events[poison_event()]) == 1);
    struct kuf_event event = last_event(&source, poison_event());
    ok(event.gpa == gpa_of(50) && event.len == page, "the event names the page");
    is(progress_of(kuf, BASE).poisoned, page, "and progress counts it");
    is(kuf_resolve(kuf, gpa_of(50), NULL, page, KUF_RESOLVE_POISON), 0, "a second time poisons nothing");
    is(resolve(49, 1, 1), page, "its neighbour is resolved");
    is(touch(ram + 49 * page), 0, "and read");
    close_with(kuf, KUF_END_POISON);

    /* In place: the caller writes through kuf_fault.place. */
    if (!has_feature(KUF_FEATURE_MINOR)) {
        skip_part("no minor faults on shared memory: nothing is filled in place");
        return done();
    }
    int fd;
    kuf = open_driven(NULL);
    ram = map_shared(PAGES * page, &fd);
    add_shared(kuf, BASE, ram, PAGES * page, fd, 0);
    start_on(&two[0], 3, 1);
    is(kuf_poll(kuf, -1), 1, "shared memory: a fault to read");
    is(kuf_read(kuf, faults, 16), 1, "it is read");
    must(faults[0].place != NULL, "it says where the page may be written");
    write_content(faults[0].place, gpa_of(3), page, 1);
    is(kuf_resolve(kuf, gpa_of(3), NULL, page, KUF_RESOLVE_IN_PLACE), page, "it is resolved in place");
    ok(join_toucher(&two[0]), "the thread reads what was written there");
    write_content(bytes, gpa_of(5), page, 1);
    must(pwrite(fd, bytes, page, (off_t)(5 * page)) == (ssize_t)page, "writes the file");
    is(kuf_resolve(kuf, gpa_of(5), NULL, page, KUF_RESOLVE_IN_PLACE), page, "bytes written to the file are published");
    ok(holds_content(ram + 5 * page, gpa_of(5), page, 1), "and read");
    is(resolve(6, 2, 1), 2 * page, "data from a buffer");
    ok(holds_content(ram + 6 * page, gpa_of(6), 2 * page, 1), "and read");
    is(kuf_resolve(kuf, gpa_of(8), NULL, page, KUF_RESOLVE_ZERO), page, "zeroes");
    ok(holds_zeroes(ram + 8 * page, page), "and read");
    close_with(kuf, KUF_END_POISON);
    close(fd);
    return done();
}
