/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* KUF_MEMORY_HUGE: fills ahead of demand end on huge pages; if something prevents that, no byte changes. */
#include "harness.h"

#include <sys/prctl.h>
#include <sys/syscall.h>

#define BASE UINT64_C(0x40000000)
#define HUGE (UINT64_C(2) << 20)
enum { STRETCHES = 4, LENGTH = STRETCHES * (2 << 20) };

/* The callback's action for a run that has the page `special`; it fills other runs. */
enum { FILLS, HALF, ZERO, DEFERS, FAILS, LENDS, RESOLVES, DISCARDS, REMOVES };

static atomic_int how, calls, huge_calls;
static _Atomic uint64_t special, generation;
static struct kuf *kuf;
static unsigned char *image;
static struct source events = SOURCE_INIT;

static int fill(void *opaque, struct kuf_fill *fill)
{
    uint64_t page = page_size(), at = atomic_load(&special), now = atomic_load(&generation);
    (void)opaque;
    atomic_fetch_add(&calls, 1);
    atomic_fetch_add(&huge_calls, fill->len == HUGE);
    bool here = at >= fill->gpa && at - fill->gpa < fill->len;
    switch (here ? atomic_load(&how) : FILLS) {
    case HALF:
        fill->filled = fill->len > page ? fill->len / 2 : fill->len;
        write_content(fill->buf, fill->gpa, fill->filled, now);
        return KUF_FILL_DONE;
    case ZERO:
        return KUF_FILL_ZERO;
    case DEFERS:
        return KUF_FILL_DEFERRED;
    case FAILS:
        return -EIO;
    case LENDS:
        write_content(image, fill->gpa, fill->len, now);
        fill->src = image;
        return KUF_FILL_DONE;
    case RESOLVES:
        /* Only once: a run that is asked for again is filled. */
        atomic_store(&special, NO_GPA);
        write_content(image, at, page, now + 1);
        if (kuf_resolve(kuf, at, image, page, 0) != (ssize_t)page)
            return -EIO;
        break;
    case DISCARDS:
    case REMOVES:
        atomic_store(&special, NO_GPA);
        write_content(fill->buf, fill->gpa, fill->len, now + 7);
        if (kuf_discard(kuf, at, page, atomic_load(&how) == REMOVES ? KUF_DISCARD_ZERO : KUF_DISCARD_REFILL) < 0)
            return -EIO;
        break;
    }
    write_content(fill->buf, fill->gpa, fill->len, now);
    return KUF_FILL_DONE;
}

/* Memory that starts `beyond` bytes after a multiple of 2 MiB, in a mapping of its own: smaps has lines for it alone. */
static unsigned char *map_at(uint64_t beyond, uint64_t length)
{
    unsigned char *room = mmap(NULL, length + 3 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(room != MAP_FAILED, "room for guest memory");
    unsigned char *memory = room + HUGE + (-(uintptr_t)room & (HUGE - 1)) + beyond;
    must(mprotect(memory, length, PROT_READ | PROT_WRITE) == 0, "guest memory");
    madvise(memory, length, MADV_NOHUGEPAGE);
    return memory;
}

/* How many bytes of it are on huge pages. */
static uint64_t on_huge_pages(const unsigned char *memory, uint64_t length)
{
    FILE *smaps = fopen("/proc/self/smaps", "re");
    must(smaps != NULL, "/proc/self/smaps");
    char line[512];
    uint64_t bytes = 0;
    unsigned long start, end, kib;
    bool within = false;
    while (fgets(line, sizeof(line), smaps) != NULL)
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            within = start < (uintptr_t)memory + length && end > (uintptr_t)memory;
        else if (within && sscanf(line, "AnonHugePages: %lu kB", &kib) == 1)
            bytes += kib * 1024;
    fclose(smaps);
    return bytes;
}

static void begin_with(int what, uint64_t page)
{
    atomic_store(&how, what);
    atomic_store(&special, page);
    atomic_store(&calls, 0);
    atomic_store(&huge_calls, 0);
    atomic_store(&generation, 1);
}

static void add_huge(unsigned char *memory, uint64_t length, uint32_t flags)
{
    struct kuf_memory slot = {.size = sizeof(slot), .flags = KUF_MEMORY_HUGE | flags, .gpa = BASE, .len = length,
                              .hva = (uintptr_t)memory};
    int got = kuf_add_memory(kuf, &slot);
    must(got == 0, "kuf_add_memory: %s", got ? kuf_error() : "adds");
}

static unsigned char *open_at(uint64_t beyond, uint64_t length, uint32_t flags)
{
    unsigned char *memory = map_at(beyond, length);
    kuf = open_with((struct kuf_options){.flags = flags, .fill = fill, .event = source_event, .opaque = &events});
    add_huge(memory, length, 0);
    return memory;
}

/* Fills everything; returns the error of the request. */
static int populate(void)
{
    struct kuf_populate_request all = {.size = sizeof(all), .gpa = KUF_ALL};
    int before = atomic_load(&events.events[KUF_EVENT_POPULATED]);
    must(kuf_populate(kuf, &all) == 0, "kuf_populate is taken");
    wait_until(atomic_load(&events.events[KUF_EVENT_POPULATED]) > before);
    return last_event(&events, KUF_EVENT_POPULATED).error;
}

static void whole(void)
{
    begin_with(FILLS, NO_GPA);
    unsigned char *memory = open_at(0, LENGTH, 0);
    is(populate(), 0, "populate");
    is(atomic_load(&calls), STRETCHES, "a stretch is asked for at once");
    is(on_huge_pages(memory, LENGTH), LENGTH, "and all of it is on huge pages");
    ok(holds_content(memory, BASE, LENGTH, 1), "with its bytes");
    is(stats_of(kuf).faults, 0, "without a fault");
    is(stats_of(kuf).bytes_copied, LENGTH, "counted as copied");
    is(progress_of(kuf, BASE).present, LENGTH, "and present");

    /* A discard of all pages, and of one, which splits its huge page. */
    atomic_store(&generation, 2);
    is(kuf_discard(kuf, BASE, LENGTH, KUF_DISCARD_REFILL), 0, "everything is dropped");
    is(populate(), 0, "and filled again");
    is(on_huge_pages(memory, LENGTH), LENGTH, "on huge pages");
    ok(holds_content(memory, BASE, LENGTH, 2), "with its new bytes");
    atomic_store(&generation, 3);
    is(kuf_discard(kuf, BASE + page_size(), page_size(), KUF_DISCARD_REFILL), 0, "a page is dropped");
    ok(holds_content(memory + page_size(), BASE + page_size(), page_size(), 3), "and filled for who touches it");
    madvise(memory + 2 * page_size(), page_size(), MADV_DONTNEED);
    ok(holds_zeroes(memory + 2 * page_size(), page_size()), "a page that was given back reads as zero");
    ok(holds_content(memory + 3 * page_size(), BASE + 3 * page_size(), LENGTH - 3 * page_size(), 2), "the others stay");
    /* Its page table may still be there, and then a whole stretch does not become a huge page. */
    is(kuf_discard(kuf, BASE, HUGE, KUF_DISCARD_REFILL), 0, "that stretch is dropped");
    is(populate(), 0, "and filled again");
    ok(holds_content(memory, BASE, HUGE, 3), "with its new bytes");
    ok(on_huge_pages(memory, LENGTH) >= LENGTH - HUGE, "and the other stretches are still on huge pages");
    close_with(kuf, 0);
}

static void touched_first(void)
{
    begin_with(FILLS, NO_GPA);
    unsigned char *memory = open_at(0, LENGTH, 0);
    uint64_t at = HUGE + 17 * page_size();
    ok(holds_content(memory + at, BASE + at, page_size(), 1), "a page is touched first");
    is(atomic_load(&huge_calls), 0, "which is filled for itself");
    is(populate(), 0, "populate");
    is(on_huge_pages(memory, LENGTH), LENGTH - HUGE, "every stretch but its own is on a huge page");
    ok(holds_content(memory, BASE, LENGTH, 1), "with its bytes");
    close_with(kuf, 0);
}

static void odd_edges(void)
{
    begin_with(FILLS, NO_GPA);
    uint64_t beyond = 3 * page_size();
    unsigned char *memory = open_at(beyond, LENGTH, 0);
    is(populate(), 0, "populate of memory that is not aligned");
    is(on_huge_pages(memory, LENGTH), LENGTH - HUGE, "whole stretches are on huge pages, the edges are not");
    is(atomic_load(&huge_calls), STRETCHES - 1, "and asked for whole");
    ok(holds_content(memory, BASE, LENGTH, 1), "with its bytes");
    close_with(kuf, 0);

    begin_with(FILLS, NO_GPA);
    memory = open_at(0, HUGE - page_size(), 0);
    is(populate(), 0, "populate of less than a stretch");
    ok(holds_content(memory, BASE, HUGE - page_size(), 1), "with its bytes");
    is(on_huge_pages(memory, HUGE - page_size()), 0, "on single pages");
    close_with(kuf, 0);
}

static void answers(void)
{
    uint64_t at = HUGE + 5 * page_size();
    begin_with(HALF, BASE + at);
    unsigned char *memory = open_at(0, LENGTH, 0);
    is(populate(), 0, "populate by a callback that fills half of what it is asked for");
    ok(holds_content(memory, BASE, LENGTH, 1), "has the bytes");
    is(on_huge_pages(memory, LENGTH), LENGTH - HUGE, "stretches that were filled whole are on huge pages");
    close_with(kuf, 0);

    begin_with(ZERO, BASE + at);
    memory = open_at(0, LENGTH, 0);
    is(populate(), 0, "populate by a callback that says zero");
    ok(holds_content(memory, BASE, HUGE, 1) && holds_zeroes(memory + HUGE, HUGE) &&
           holds_content(memory + 2 * HUGE, BASE + 2 * HUGE, LENGTH - 2 * HUGE, 1), "has zeroes there");
    is(on_huge_pages(memory, LENGTH), LENGTH - HUGE, "which take no huge page");
    close_with(kuf, 0);

    begin_with(FAILS, BASE + at);
    memory = open_at(0, LENGTH, 0);
    is(populate(), -EIO, "populate ends at a fill that fails");
    is(touch(memory + at), poison_signal(), "a touch of the page raises a signal");
    ok(holds_content(memory + at - page_size(), BASE + at - page_size(), page_size(), 1), "its neighbour is filled");
    ok(holds_content(memory, BASE, HUGE, 1), "the pages before it are present");
    close_with(kuf, KUF_END_POPULATE);

    begin_with(DEFERS, BASE + at);
    memory = open_at(0, LENGTH, 0);
    struct kuf_populate_request all = {.size = sizeof(all), .gpa = KUF_ALL};
    int before = atomic_load(&events.events[KUF_EVENT_POPULATED]);
    is(kuf_populate(kuf, &all), 0, "populate by a callback that defers");
    wait_until(progress_of(kuf, BASE).deferred == HUGE);
    write_content(image, BASE + HUGE, HUGE, 1);
    is(kuf_resolve(kuf, BASE + HUGE, image, HUGE / 2, 0), HUGE / 2, "half of the stretch is resolved");
    is(kuf_resolve(kuf, BASE + HUGE + HUGE / 2, image + HUGE / 2, HUGE / 2, 0), HUGE / 2, "and the other half");
    wait_until(atomic_load(&events.events[KUF_EVENT_POPULATED]) > before);
    ok(holds_content(memory, BASE, LENGTH, 1), "the bytes are there");
    close_with(kuf, 0);

    begin_with(LENDS, BASE + at);
    memory = open_at(0, LENGTH, 0);
    is(populate(), 0, "populate by a callback that has the bytes elsewhere");
    ok(holds_content(memory, BASE, LENGTH, 1), "has the bytes");
    is(on_huge_pages(memory, LENGTH), LENGTH, "on huge pages too");
    close_with(kuf, 0);
}

static bool others_hold_content(unsigned char *memory, uint64_t at)
{
    uint64_t next = at + page_size();
    return holds_content(memory, BASE, at, 1) && holds_content(memory + next, BASE + next, LENGTH - next, 1);
}

/* A page is touched, resolved or dropped while its stretch is being filled. */
static void meanwhile(void)
{
    uint64_t at = HUGE + 5 * page_size(), page = page_size();
    begin_with(RESOLVES, BASE + at);
    unsigned char *memory = open_at(0, LENGTH, 0);
    is(populate(), 0, "populate by a callback that resolves a page of its run");
    ok(holds_content(memory + at, BASE + at, page, 2), "which keeps those bytes");
    ok(others_hold_content(memory, at), "the others have the run's");
    close_with(kuf, 0);

    begin_with(REMOVES, BASE + at);
    memory = open_at(0, LENGTH, 0);
    is(populate(), 0, "populate with a page given back meanwhile");
    ok(holds_zeroes(memory + at, page), "which is zero");
    ok(others_hold_content(memory, at), "the others have their bytes");
    close_with(kuf, 0);

    begin_with(DISCARDS, BASE + at);
    memory = open_at(0, LENGTH, 0);
    is(populate(), 0, "populate with a page discarded meanwhile");
    ok(holds_content(memory, BASE, LENGTH, 1), "which is asked for again");
    close_with(kuf, 0);
}

static void other_ways_in(void)
{
    begin_with(FILLS, NO_GPA);
    unsigned char *memory = open_at(0, LENGTH, 0);
    is(kuf_ensure(kuf, BASE, LENGTH, -1), 0, "kuf_ensure of everything");
    is(on_huge_pages(memory, LENGTH), LENGTH, "is on huge pages");
    ok(holds_content(memory, BASE, LENGTH, 1), "with its bytes");
    close_with(kuf, 0);

    begin_with(FILLS, NO_GPA);
    memory = open_at(0, LENGTH, 0);
    close_with(kuf, KUF_END_POPULATE);
    is(on_huge_pages(memory, LENGTH), LENGTH, "KUF_END_POPULATE fills on huge pages");
    ok(holds_content(memory, BASE, LENGTH, 1), "with its bytes");

    begin_with(FILLS, NO_GPA);
    memory = map_at(0, LENGTH);
    kuf = open_with((struct kuf_options){.flags = KUF_OPEN_SOURCES, .event = source_event, .opaque = &events});
    unsigned char *bytes = map_anonymous(LENGTH);
    write_content(bytes, BASE, LENGTH, 1);
    struct kuf_source source = {.size = sizeof(source), .kind = KUF_SOURCE_MEMORY, .addr = bytes, .len = LENGTH};
    struct kuf_memory slot = {.size = sizeof(slot), .flags = KUF_MEMORY_HUGE, .gpa = BASE, .len = LENGTH,
                              .hva = (uintptr_t)memory, .source = &source};
    must(kuf_add_memory(kuf, &slot) == 0, "a slot with memory as its source: %s", kuf_error());
    is(populate(), 0, "populate from memory");
    is(on_huge_pages(memory, LENGTH), LENGTH, "is on huge pages");
    ok(holds_content(memory, BASE, LENGTH, 1), "with its bytes");
    close_with(kuf, 0);
}

static void with_zeroes(void)
{
    begin_with(FILLS, NO_GPA);
    unsigned char *memory = map_at(0, LENGTH);
    kuf = open_with((struct kuf_options){
        .flags = KUF_OPEN_SOURCES | KUF_OPEN_DETECT_ZERO, .event = source_event, .opaque = &events});
    unsigned char *bytes = map_anonymous(LENGTH);
    uint64_t at = HUGE + 5 * page_size();
    write_content(bytes, BASE, LENGTH, 1);
    memset(bytes + at, 0, page_size());
    struct kuf_source source = {.size = sizeof(source), .kind = KUF_SOURCE_MEMORY, .addr = bytes, .len = LENGTH};
    struct kuf_memory slot = {.size = sizeof(slot), .flags = KUF_MEMORY_HUGE, .gpa = BASE, .len = LENGTH,
                              .hva = (uintptr_t)memory, .source = &source};
    must(kuf_add_memory(kuf, &slot) == 0, "a slot with memory as its source: %s", kuf_error());
    is(populate(), 0, "populate that finds a page of zeroes");
    ok(memcmp(memory, bytes, LENGTH) == 0, "has the bytes");
    is(on_huge_pages(memory, LENGTH), LENGTH - HUGE, "on huge pages where there is none");
    is(stats_of(kuf).bytes_zeroed, page_size(), "and that page takes no memory");
    close_with(kuf, 0);
}

/* Memory that stays on single pages. */
static void refused(void)
{
    begin_with(FILLS, NO_GPA);
    unsigned char *memory = open_at(0, LENGTH, 0);
    must(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0, "PR_SET_THP_DISABLE");
    is(populate(), 0, "populate without huge pages for this process");
    ok(!has_feature(KUF_FEATURE_HUGE), "which kuf_probe says");
    must(prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0) == 0, "PR_SET_THP_DISABLE");
    is(on_huge_pages(memory, LENGTH), 0, "there are none");
    ok(holds_content(memory, BASE, LENGTH, 1), "with its bytes");
    close_with(kuf, 0);

    begin_with(FILLS, NO_GPA);
    memory = map_at(0, LENGTH);
    kuf = open_with((struct kuf_options){.fill = fill, .event = source_event, .opaque = &events});
    if (mlock2(memory, LENGTH, MLOCK_ONFAULT) == 0) {
        add_huge(memory, LENGTH, 0);
        is(populate(), 0, "populate of locked memory");
        is(on_huge_pages(memory, LENGTH), 0, "which cannot be moved to");
        ok(holds_content(memory, BASE, LENGTH, 1), "with its bytes");
    }
    close_with(kuf, 0);

    enum { BIND = 2, INTERLEAVE = 3 };
    unsigned long node = 1;
    for (int policy = BIND; policy <= INTERLEAVE; policy++) {
        begin_with(FILLS, NO_GPA);
        memory = map_at(0, LENGTH);
        kuf = open_with((struct kuf_options){.fill = fill, .event = source_event, .opaque = &events});
        if (syscall(SYS_mbind, memory, (unsigned long)LENGTH, policy, &node, 64ul, 0u) == 0) {
            add_huge(memory, LENGTH, 0);
            is(populate(), 0, "populate under NUMA policy %d", policy);
            is(on_huge_pages(memory, LENGTH), policy == BIND ? LENGTH : 0, "is on the pages that it allows");
            ok(holds_content(memory, BASE, LENGTH, 1), "with its bytes");
        }
        close_with(kuf, 0);
    }

    begin_with(FILLS, NO_GPA);
    int fd;
    memory = map_shared(LENGTH, &fd);
    kuf = open_with((struct kuf_options){.fill = fill, .event = source_event, .opaque = &events});
    add_shared(kuf, BASE, memory, LENGTH, fd, KUF_MEMORY_HUGE);
    is(populate(), 0, "populate of shared memory");
    is(atomic_load(&huge_calls), 0, "is as without the flag");
    ok(holds_content(memory, BASE, LENGTH, 1), "with its bytes");
    close_with(kuf, 0);
    close(fd);
}

int main(void)
{
    begin();
    needs_feature(KUF_FEATURE_HUGE, "huge page to move (UFFDIO_MOVE)");
    image = map_anonymous(HUGE);
    whole();
    touched_first();
    odd_edges();
    answers();
    meanwhile();
    other_ways_in();
    with_zeroes();
    refused();
    return done();
}
