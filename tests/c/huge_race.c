/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Stretches are filled on huge pages while the guest reads and writes them and gives pages back, and the caller
 * resolves and discards: at random, round after round on new memory. No byte may be lost, and none may come back.
 */
#include "seeded.h"

#define BASE UINT64_C(0x40000000)
#define HUGE (UINT64_C(2) << 20)
/* Pages of the first half are written and never dropped; those of the second are dropped and never written. */
enum { STRETCHES = 4, PAGES = STRETCHES * 512, KEPT = PAGES / 2, TOUCHERS = 2, TOUCHES = 1500 };

static struct kuf *kuf;
static unsigned char *memory, *image;
static struct source events = SOURCE_INIT;
static atomic_bool given_back[PAGES], round_over;

static uint64_t gpa_of(uint64_t page)
{
    return BASE + page * page_size();
}

static unsigned char *at(uint64_t page)
{
    return memory + page * page_size();
}

static int fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    const unsigned char *bytes = image + (fill->gpa - BASE);
    if (below(8) == 0)
        sched_yield();
    switch (below(8)) {
    case 0:
        fill->filled = fill->len / 2 / fill->page_size * fill->page_size;
        if (fill->filled == 0)
            fill->filled = fill->len;
        memcpy(fill->buf, bytes, fill->filled);
        return KUF_FILL_DONE;
    case 1:
        fill->src = bytes;
        return KUF_FILL_DONE;
    case 2:
        /* In two pieces; another thread may be faster for one of them. */
        kuf_resolve(kuf, fill->gpa, bytes, fill->page_size, 0);
        if (fill->len > fill->page_size)
            kuf_resolve(kuf, fill->gpa + fill->page_size, bytes + fill->page_size, fill->len - fill->page_size, 0);
        return KUF_FILL_DEFERRED;
    }
    memcpy(fill->buf, bytes, fill->len);
    return KUF_FILL_DONE;
}

/* The last word of a page, where a toucher writes its mark. */
static volatile uint64_t *mark_of(uint64_t page)
{
    return (volatile uint64_t *)(void *)(at(page) + page_size() - 8);
}

/* Word by word: the page may be dropped, and filled again, during the read. */
static bool good(uint64_t page)
{
    const volatile uint64_t *words = (const volatile uint64_t *)(const void *)at(page);
    uint64_t count = page_size() / 8 - (page < KEPT);
    for (uint64_t n = 0; n < count; n++) {
        uint64_t word = words[n];
        if (word != word_of(gpa_of(page) + n * 8, 1) && (word != 0 || page < KEPT || !atomic_load(&given_back[page]))) {
            printf("# page %" PRIu64 " word %" PRIu64 " is %#" PRIx64 "\n", page, n, word);
            return false;
        }
    }
    return true;
}

static void *toucher(void *argument)
{
    uint64_t mine = (uintptr_t)argument, bad = 0, written[PAGES] = {0};
    for (uint64_t n = 1; n <= TOUCHES; n++) {
        uint64_t page = below(PAGES) / TOUCHERS * TOUCHERS + mine;
        bad += !good(page);
        if (page < KEPT) {
            bad += written[page] != 0 && *mark_of(page) != written[page];
            *mark_of(page) = written[page] = n;
        }
        if (below(16) == 0)
            sched_yield();
    }
    for (uint64_t page = mine; page < KEPT; page += TOUCHERS)
        bad += !good(page) || (written[page] != 0 && *mark_of(page) != written[page]);
    return (void *)(uintptr_t)bad;
}

static void *dropper(void *argument)
{
    uint64_t bad = 0;
    (void)argument;
    while (!atomic_load(&round_over)) {
        uint64_t page = KEPT + below(PAGES - KEPT), count = 1 + below(4);
        if (below(8) == 0)
            page = KEPT + below(2) * 512, count = 512;
        if (page + count > PAGES)
            continue;
        if (below(3) == 0) {
            for (uint64_t n = page; n < page + count; n++)
                atomic_store(&given_back[n], true);
            bad += madvise(at(page), count * page_size(), MADV_DONTNEED) != 0;
        } else {
            bad += kuf_discard(kuf, gpa_of(page), count * page_size(), KUF_DISCARD_REFILL) != 0;
        }
        if (below(4) == 0)
            sched_yield();
    }
    return (void *)(uintptr_t)bad;
}

static void *resolver(void *argument)
{
    uint64_t bad = 0;
    (void)argument;
    while (!atomic_load(&round_over)) {
        uint64_t page = below(PAGES), count = 1 + below(8);
        if (below(16) == 0)
            page = page / 512 * 512, count = 512;
        if (page + count > PAGES)
            continue;
        bad += kuf_resolve(kuf, gpa_of(page), image + page * page_size(), count * page_size(), 0) < 0;
        nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
    }
    return (void *)(uintptr_t)bad;
}

static uint64_t one_round(void)
{
    unsigned char *room = mmap(NULL, PAGES * page_size() + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(room != MAP_FAILED, "guest memory");
    memory = room + (-(uintptr_t)room & (HUGE - 1));
    madvise(memory, PAGES * page_size(), below(2) ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    for (unsigned page = 0; page < PAGES; page++)
        atomic_store(&given_back[page], false);
    atomic_store(&round_over, false);
    struct kuf_memory slot = {.size = sizeof(slot), .flags = KUF_MEMORY_HUGE, .gpa = BASE, .len = PAGES * page_size(),
                              .hva = (uintptr_t)memory};
    int got = kuf_add_memory(kuf, &slot);
    must(got == 0, "kuf_add_memory: %s", got ? kuf_error() : "adds");

    pthread_t touchers[TOUCHERS], drops, resolves;
    for (uintptr_t n = 0; n < TOUCHERS; n++)
        touchers[n] = start(toucher, (void *)n);
    drops = start(dropper, NULL);
    resolves = start(resolver, NULL);
    for (unsigned n = 0; n < 4; n++) {
        struct kuf_populate_request all = {.size = sizeof(all), .gpa = KUF_ALL};
        int before = atomic_load(&events.events[KUF_EVENT_POPULATED]);
        must(kuf_populate(kuf, &all) == 0, "kuf_populate");
        wait_until(atomic_load(&events.events[KUF_EVENT_POPULATED]) > before);
        if (below(2) == 0)
            must(kuf_ensure(kuf, BASE + KEPT * page_size(), KEPT * page_size(), -1) == 0, "kuf_ensure");
    }
    void *bad;
    uint64_t all_bad = 0;
    for (unsigned n = 0; n < TOUCHERS; n++) {
        pthread_join(touchers[n], &bad);
        all_bad += (uintptr_t)bad;
    }
    atomic_store(&round_over, true);
    pthread_join(drops, &bad);
    all_bad += (uintptr_t)bad;
    pthread_join(resolves, &bad);
    all_bad += (uintptr_t)bad;
    must(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE) == 0, "kuf_remove_memory");
    for (uint64_t page = 0; page < PAGES; page++)
        all_bad += !good(page) || (page >= KEPT && !holds_zeroes(at(page), page_size()) &&
                                   !holds_content(at(page), gpa_of(page), page_size(), 1));
    munmap(room, PAGES * page_size() + HUGE);
    return all_bad;
}

int main(void)
{
    uint64_t seconds = begin_seeded(2, 60), rounds = 0, bad = 0;
    needs_feature(KUF_FEATURE_HUGE, "huge page to move (UFFDIO_MOVE)");
    image = map_anonymous(PAGES * page_size());
    write_content(image, BASE, PAGES * page_size(), 1);
    kuf = open_with((struct kuf_options){.fill = fill, .event = source_event, .opaque = &events});
    for (uint64_t until = now_ns() + seconds * 1000000000u; rounds == 0 || (now_ns() < until && bad == 0); rounds++)
        bad += one_round();
    is(bad, 0, "no page is wrong in %" PRIu64 " rounds", rounds);
    close_with(kuf, 0);
    return done();
}
