/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Several userfaultfds share a slot: every page has its own bytes whichever userfaultfd it is under, and an operation
 * across the border of two affects both sides.
 */
#include "seeded.h"
#include "touches.h"

#define BASE UINT64_C(0x40000000)
#define WIDE (5 * STRIPE)
enum { PAGES = 64, HALF = PAGES / 2, TOUCHERS = 8, TOUCHES = 1500 };

static struct source source;

static struct kuf *open_several(uint32_t userfaultfds, struct kuf_options options)
{
    source = (struct source)SOURCE_INIT;
    options.userfaultfds = userfaultfds;
    options.event = source_event;
    options.release = source_release;
    options.opaque = &source;
    return watch(open_with(options));
}

static struct kuf *open_filled(uint32_t userfaultfds)
{
    return open_several(userfaultfds, (struct kuf_options){.fill = source_fill});
}

/* The mappings that have a part of the range. */
static int mappings_in(const void *memory, size_t length)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[1024];
    int count = 0;
    while (maps != NULL && fgets(line, sizeof(line), maps) != NULL) {
        unsigned long from, to;
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
            count += from < (uintptr_t)memory + length && (uintptr_t)memory < to;
    }
    if (maps != NULL)
        fclose(maps);
    return count;
}

/* ---- Touching ---------------------------------------------------------------------------------------------------- */

struct wanderer {
    unsigned char *memory;
    uint64_t seed;
    bool good;
    pthread_t thread;
};

static void *wander(void *argument)
{
    struct wanderer *wanderer = argument;
    size_t page = page_size();
    uint64_t x = wanderer->seed;
    wanderer->good = true;
    for (unsigned i = 0; i < TOUCHES; i++) {
        uint64_t at = (next_random(&x) >> 20) % (WIDE / page) * page;
        if (!holds_content(wanderer->memory + at, BASE + at, page, 1))
            wanderer->good = false;
    }
    return NULL;
}

/* Threads that touch a wide slot all over, and others that go through its borders in order. */
static void touched(uint32_t userfaultfds)
{
    size_t page = page_size();
    unsigned char *ram = map_across(WIDE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    must(ram != MAP_FAILED, "a wide mapping");
    madvise(ram, WIDE, MADV_NOHUGEPAGE);
    int fds_before = open_descriptors();
    struct kuf *kuf = open_filled(userfaultfds);
    int opened = open_descriptors() - fds_before;
    add(kuf, BASE, ram, WIDE);
    int pieces = mappings_in(ram, WIDE);
    /* The first and the last are shorter. */
    is(pieces, userfaultfds == 1 ? 1 : WIDE / STRIPE + 1, "%u userfaultfds: so many mappings", userfaultfds);
    struct wanderer wanderers[TOUCHERS];
    for (unsigned i = 0; i < TOUCHERS; i++) {
        wanderers[i] = (struct wanderer){.memory = ram, .seed = i * 977 + userfaultfds};
        wanderers[i].thread = start(wander, &wanderers[i]);
    }
    uintptr_t border = ((uintptr_t)ram + STRIPE - 1) / STRIPE * STRIPE;
    struct toucher walkers[WIDE / STRIPE];
    for (unsigned i = 0; i < WIDE / STRIPE; i++, border += STRIPE) {
        unsigned char *from = (unsigned char *)border - HALF * page;
        walkers[i] = (struct toucher){.memory = from, .gpa = BASE + (uint64_t)(from - ram), .length = PAGES * page,
                                      .generation = 1};
        start_toucher(&walkers[i]);
    }
    bool good = true;
    for (unsigned i = 0; i < TOUCHERS; i++) {
        pthread_join(wanderers[i].thread, NULL);
        good = wanderers[i].good && good;
    }
    ok(good, "random touchers find each page's bytes");
    good = true;
    for (unsigned i = 0; i < WIDE / STRIPE; i++)
        good = join_toucher(&walkers[i]) && good;
    ok(good, "so do those that cross the borders in order");
    is(remove_patiently(kuf, BASE), 0, "the slot ends");
    good = true;
    for (uint64_t at = 0; at < WIDE; at += STRIPE / 2)
        good = !is_registered(ram + at) && good;
    ok(good, "no part of it is under a userfaultfd any more");
    add_populated(kuf, BASE, ram, WIDE);
    close_watched(kuf, KUF_END_POISON);
    is(open_descriptors(), fds_before, "every userfaultfd is closed (%d descriptors were open)", opened);
    munmap(ram, WIDE);
}

/* ---- Calls across a border --------------------------------------------------------------------------------------- */

static bool range_holds(const unsigned char *ram, unsigned from, unsigned pages, uint64_t generation)
{
    size_t page = page_size();
    if (generation == 0)
        return holds_zeroes(ram + from * page, pages * page);
    return holds_content(ram + from * page, BASE + from * page, pages * page, generation);
}

static void called(uint32_t userfaultfds, bool shared)
{
    size_t page = page_size(), length = PAGES * page;
    int fd;
    unsigned char *ram = map_kind(shared, length, &fd), *bytes = malloc(length);
    must(((uintptr_t)ram + HALF * page) % STRIPE == 0, "a border is in the middle");
    struct kuf *kuf = open_filled(userfaultfds);
    add_kind(kuf, BASE, ram, length, fd);
    is(kuf_ensure(kuf, BASE + (HALF - 4) * page, 8 * page, -1), 0, "%u, %s: kuf_ensure across", userfaultfds,
       shared ? "shared" : "private");
    ok(range_holds(ram, HALF - 4, 8, 1), "has filled both sides");
    write_content(bytes, BASE, length, 2);
    is(kuf_resolve(kuf, BASE + (HALF - 12) * page, bytes + (HALF - 12) * page, 24 * page, 0), 16 * page,
       "kuf_resolve across opens what is absent");
    ok(range_holds(ram, HALF - 12, 8, 2) && range_holds(ram, HALF + 4, 8, 2) && range_holds(ram, HALF - 4, 8, 1),
       "and nothing else");
    is(kuf_resolve(kuf, BASE + (HALF - 14) * page, NULL, 28 * page, KUF_RESOLVE_ZERO), 4 * page, "zeroes likewise");
    ok(range_holds(ram, HALF - 14, 2, 0) && range_holds(ram, HALF + 12, 2, 0), "on both sides");
    atomic_store(&source.generation, 3);
    is(kuf_discard(kuf, BASE + (HALF - 2) * page, 4 * page, KUF_DISCARD_REFILL), 0, "kuf_discard across");
    ok(range_holds(ram, HALF - 2, 4, 3), "is refilled on both sides");
    is(kuf_discard(kuf, BASE + (HALF - 2) * page, 4 * page, KUF_DISCARD_ZERO), 0, "as given back");
    ok(range_holds(ram, HALF - 2, 4, 0), "it is zero on both sides");
    is(kuf_resolve(kuf, BASE + (HALF - 16) * page, NULL, 32 * page, KUF_RESOLVE_POISON), 4 * page, "poison across");
    is(try_touch(ram + (HALF - 15) * page), poison_signal(), "is there before the border");
    is(try_touch(ram + (HALF + 15) * page), poison_signal(), "and behind it");
    is(kuf_discard(kuf, BASE + (HALF - 16) * page, 32 * page, KUF_DISCARD_REFILL), 0, "a discard takes it away");
    ok(range_holds(ram, HALF - 16, 32, 3), "on both sides");
    struct kuf_populate_request all = {.size = sizeof(all), .gpa = BASE, .len = length};
    is(kuf_populate(kuf, &all), 0, "kuf_populate of it all");
    wait_until(atomic_load(&source.events[KUF_EVENT_COMPLETE]) > 0);
    ok(range_holds(ram, 0, PAGES, 3), "fills all of it");
    close_watched(kuf, 0);
    ok(range_holds(ram, 0, PAGES, 3), "which stays after kuf_close");
    free(bytes);
    munmap(ram, length);
    if (fd >= 0)
        close(fd);
}

/* ---- The caller changes the mapping -------------------------------------------------------------------------------- */

static void given_back(uint32_t userfaultfds)
{
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length);
    struct kuf *kuf = open_filled(userfaultfds);
    add(kuf, BASE, ram, length);
    ok(range_holds(ram, HALF - 8, 16, 1), "%u: touched across", userfaultfds);
    is(madvise(ram + (HALF - 10) * page, 20 * page, MADV_DONTNEED), 0, "madvise across");
    ok(range_holds(ram, HALF - 10, 20, 0), "pages that were present or absent are zero on both sides");
    comes_to(stats_of(kuf).events_remove, userfaultfds == 1 ? 1 : 2, "each userfaultfd has reported its own part");
    ok(range_holds(ram, 0, HALF - 10, 1) && range_holds(ram, HALF + 10, HALF - 10, 1), "the rest is what it was");
    close_watched(kuf, 0);
    munmap(ram, length);

    int fd;
    ram = map_shared(length, &fd);
    kuf = open_filled(userfaultfds);
    add_shared(kuf, BASE, ram, length, fd, 0);
    ok(range_holds(ram, HALF - 8, 16, 1), "shared: touched across");
    is(madvise(ram + (HALF - 10) * page, 20 * page, MADV_REMOVE), 0, "MADV_REMOVE across");
    ok(range_holds(ram, HALF - 10, 20, 0), "is zero on both sides");
    close_watched(kuf, KUF_END_POISON);
    munmap(ram, length);
    close(fd);
}

static void unmapped(uint32_t userfaultfds)
{
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length);
    struct kuf *kuf = open_filled(userfaultfds);
    add(kuf, BASE, ram, length);
    is(munmap(ram + (HALF - 4) * page, 8 * page), 0, "%u: munmap across", userfaultfds);
    comes_to(stats_of(kuf).events_unmap, userfaultfds == 1 ? 1 : 2, "each userfaultfd has reported it");
    comes_to(progress_of(kuf, BASE).removed, 8 * page, "the pages are gone");
    ok(range_holds(ram, 0, HALF - 4, 1) && range_holds(ram, HALF + 4, HALF - 4, 1), "the others are served");
    /* Other memory at the same place is not changed. */
    unsigned char *other = mmap(ram + (HALF - 4) * page, 8 * page, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    must(other != MAP_FAILED, "another mapping there");
    ok(holds_zeroes(other, 8 * page), "is not served");
    is(kuf_discard(kuf, BASE, length, KUF_DISCARD_REFILL), 0, "a discard leaves it out");
    ok(!is_registered(other) && is_registered(ram) && is_registered(ram + length - page), "and the rest under both");
    is(munmap(ram, length), 0, "munmap of it all");
    comes_to(progress_of(kuf, BASE).removed, length - 8 * page, "all is gone but what was discarded where nothing is");
    close_watched(kuf, KUF_END_POISON);
}

static void moved(uint32_t userfaultfds)
{
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length), *room = map_anonymous(length);
    struct kuf *kuf = open_filled(userfaultfds);
    add(kuf, BASE, ram, length);
    ok(range_holds(ram, HALF, 2, 1), "%u: touched", userfaultfds);
    if (userfaultfds > 1) {
        void *to = mremap(ram, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, room);
        ok(to == MAP_FAILED && errno == EFAULT, "mremap across a border is refused by the kernel, as documented");
        /* Linux 6.17 finds out only after it has unmapped the memory at the new place. */
    }
    /* To addresses that would stand for another userfaultfd. */
    unsigned char *at = mremap(ram + HALF * page, HALF * page, HALF * page, MREMAP_MAYMOVE | MREMAP_FIXED, room);
    must(at == room, "mremap of what is behind the border: %s", strerror(errno));
    ok(holds_content(room, BASE + HALF * page, HALF * page, 1), "it is served where it is now");
    is(kuf_resolve(kuf, BASE, NULL, 4 * page, KUF_RESOLVE_ZERO), 4 * page, "pages that did not move are resolved");
    is(kuf_discard(kuf, BASE + (HALF - 4) * page, 8 * page, KUF_DISCARD_REFILL), 0, "a discard across");
    atomic_store(&source.generation, 2);
    ok(holds_content(room, BASE + HALF * page, 4 * page, 2) && range_holds(ram, HALF - 4, 4, 2), "arms both places");
    is(kuf_discard(kuf, BASE + HALF * page, page, KUF_DISCARD_REFILL), 0, "one more");
    is(kuf_resolve(kuf, BASE + HALF * page, NULL, page, KUF_RESOLVE_POISON), page, "poison where it has moved");
    is(try_touch(room), poison_signal(), "is met there");
    is(remove_patiently(kuf, BASE), 0, "the slot ends");
    ok(!is_registered(room + page) && !is_registered(ram), "at both places");
    close_watched(kuf, 0);
    munmap(ram, HALF * page);
    munmap(room, length);
}

/* ---- The end ----------------------------------------------------------------------------------------------------- */

struct stuck {
    unsigned char *at;
    int signal;
    pthread_t thread;
};

static void *be_stuck(void *argument)
{
    struct stuck *stuck = argument;
    stuck->signal = try_touch(stuck->at);
    return NULL;
}

static void closed(uint32_t userfaultfds)
{
    enum { WAITING = WIDE / STRIPE };
    unsigned char *ram = map_across(WIDE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    must(ram != MAP_FAILED, "a wide mapping");
    struct kuf *kuf = open_several(userfaultfds, (struct kuf_options){.fill_threads = 1});
    add(kuf, BASE, ram, WIDE);
    struct stuck stuck[WAITING];
    for (unsigned i = 0; i < WAITING; i++) {
        stuck[i] = (struct stuck){.at = ram + i * STRIPE};
        stuck[i].thread = start(be_stuck, &stuck[i]);
    }
    wait_until(kuf_pending(kuf, NULL, 0) == WAITING);
    ok(true, "%u: a thread waits in each stripe", userfaultfds);
    close_watched(kuf, KUF_END_POISON);
    bool all = true;
    for (unsigned i = 0; i < WAITING; i++) {
        pthread_join(stuck[i].thread, NULL);
        all = stuck[i].signal == poison_signal() && all;
    }
    ok(all, "the end wakes and refuses each");
    munmap(ram, WIDE);
}

/* The caller reads: through the service's threads, or the kernel itself. */
static void driven(uint32_t userfaultfds, uint32_t flags)
{
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length), *bytes = malloc(length);
    struct kuf *kuf = open_several(userfaultfds, (struct kuf_options){.flags = flags});
    add(kuf, BASE, ram, length);
    write_content(bytes, BASE, length, 1);
    struct toucher halves[2];
    for (unsigned i = 0; i < 2; i++) {
        halves[i] = (struct toucher){.memory = ram + i * HALF * page, .gpa = BASE + i * HALF * page,
                                     .length = HALF * page, .generation = 1};
        start_toucher(&halves[i]);
    }
    for (unsigned resolved = 0; resolved < PAGES;) {
        struct kuf_fault faults[4];
        ssize_t n = kuf_poll(kuf, -1) == 1 ? kuf_read(kuf, faults, 4) : 0;
        for (ssize_t i = 0; i < n; i++) {
            uint64_t at = faults[i].gpa - BASE;
            resolved += kuf_resolve(kuf, faults[i].gpa, bytes + at, page, 0) == (ssize_t)page;
        }
    }
    bool good = join_toucher(&halves[0]);
    ok(join_toucher(&halves[1]) && good, "%u: a caller that reads the faults serves both sides%s", userfaultfds,
       flags ? ", from the kernel itself" : "");
    close_watched(kuf, 0);
    free(bytes);
    munmap(ram, length);
}

/* ---- No more mappings -------------------------------------------------------------------------------------------- */

static void without_mappings(void)
{
    enum { MOST = 100000, SPARE = 40 };
    size_t page = page_size(), length = (size_t)1 << 30, count = 0;
    long limit = number_in("/proc/sys/vm/max_map_count", "");
    if (limit <= 0 || limit > MOST) {
        skip_part("vm.max_map_count is too large to be reached");
        return;
    }
    unsigned char *ram = map_across(length, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    must(ram != MAP_FAILED, "a wide mapping");
    madvise(ram, length, MADV_NOHUGEPAGE);
    struct kuf *kuf = open_filled(4);
    /* Every second page of it is a mapping of its own, and so are the pages between. */
    unsigned char *many =
        mmap(NULL, (size_t)limit * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    must(many != MAP_FAILED, "room for many mappings");
    while (mprotect(many + (2 * count + 1) * page, page, PROT_READ) == 0)
        count++;
    for (size_t i = 0; i < SPARE / 2; i++)
        mprotect(many + (2 * (count - 1 - i) + 1) * page, page, PROT_NONE);
    add(kuf, BASE, ram, length);
    bool good = true;
    for (uint64_t at = 0; at < length; at += STRIPE / 4)
        good = holds_content(ram + at, BASE + at, page, 1) && good;
    munmap(many, (size_t)limit * page);
    ok(good, "without mappings to divide it a slot is served undivided");
    is(mappings_in(ram, length), 1, "and is one mapping");
    close_watched(kuf, KUF_END_POISON);
    munmap(ram, length);
}

int main(void)
{
    begin_watched(120);
    catch_touches();
    static const uint32_t numbers[] = {1, 2, 4, KUF_USERFAULTFDS_MAX};
    for (unsigned i = 0; i < sizeof(numbers) / sizeof(*numbers); i++) {
        uint32_t n = numbers[i];
        touched(n);
        called(n, false);
        if (has_feature(KUF_FEATURE_MINOR))
            called(n, true);
        given_back(n);
        unmapped(n);
        moved(n);
        closed(n);
        driven(n, 0);
        driven(n, KUF_OPEN_DIRECT);
    }
    without_mappings();
    return done();
}
