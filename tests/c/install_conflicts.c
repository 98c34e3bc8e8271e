/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Installs with conflicts: EAGAIN while an event is unread, EEXIST where the page is present already and its waiters
 * still sleep, mappings that move (REMAP) and are unmapped (UNMAP).
 */
#include "in_thread.h"
#include "touches.h"
#include "uffd.h"
#include "watched.h"

#define BASE UINT64_C(0xa0000000)
enum { PAGES = 16 };

static struct source source = SOURCE_INIT;

static void add_adopted(struct kuf *kuf, const void *memory, uint64_t length, int file, int uffd)
{
    /* Pages that appear by themselves are the guest's. */
    struct kuf_memory slot = {.size = sizeof(slot), .flags = KUF_MEMORY_POPULATED, .gpa = BASE,
                              .len = length, .hva = (uintptr_t)memory, .fd = file, .uffd = uffd};
    int got = kuf_add_memory(kuf, &slot);
    must(got == 0, "kuf_add_memory with a userfaultfd: %s", got ? kuf_error() : "adds");
}

/* ---- EAGAIN --------------------------------------------------------------------------------------------------------- */

/* Only kuf_read reads the userfaultfd: an event stays unread for as long as the test needs. */
static void again_for_certain(void)
{
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length), *bytes = map_anonymous(length);
    int uffd = own_userfaultfd(UFFD_FEATURE_EVENT_REMOVE);
    struct kuf *kuf = watch(open_with((struct kuf_options){.flags = KUF_OPEN_DIRECT | KUF_OPEN_ADOPT_ONLY}));
    add_adopted(kuf, ram, length, -1, uffd);
    write_content(bytes, BASE, length, 1);
    is(kuf_resolve(kuf, BASE, bytes, 4 * page, 0), 4 * page, "four pages are resolved");
    is(stats_of(kuf).install_again, 0, "with no event in the way");
    struct giving giving;
    start_giving(&giving, ram + page, page, MADV_DONTNEED);
    wait_until(atomic_load(&giving.tid) != 0 && waits_in(atomic_load(&giving.tid), "userfaultfd"));
    ok(!atomic_load(&giving.returned), "madvise waits for its event to be read");
    /* The pages 2 and 3 are present, 4 to 7 are not. */
    is(kuf_resolve(kuf, BASE + 2 * page, bytes + 2 * page, 6 * page, 0), 4 * page, "pages are resolved all the same");
    pthread_join(giving.thread, NULL);
    struct kuf_stats_info stats = stats_of(kuf);
    ok(stats.install_again > 0, "the kernel refused with EAGAIN (%" PRIu64 " times)", stats.install_again);
    is(stats.events_remove, 1, "the event was read on the way");
    is(progress_of(kuf, BASE).removed, page, "the page is given back");
    ok(holds_content(ram + 2 * page, BASE + 2 * page, 6 * page, 1), "the others hold their bytes");
    is(kuf_resolve(kuf, BASE, bytes, 2 * page, 0), 0, "the page that was given back is not filled again");
    close_watched(kuf, KUF_END_POISON);
    ok(holds_zeroes(ram + page, page), "and reads as zero");
    close(uffd);
    munmap(ram, length);
    munmap(bytes, length);
}

struct rounds {
    struct kuf *kuf;
    unsigned char *ram, *bytes;
    atomic_bool *stop;
};

static void *give_over_and_over(void *argument)
{
    struct rounds *rounds = argument;
    while (!atomic_load(rounds->stop))
        must(madvise(rounds->ram, page_size(), MADV_DONTNEED) == 0, "madvise: %s", strerror(errno));
    return NULL;
}

/* The same with a service thread that reads at once. EAGAIN may or may not come; the bytes must be right. */
static void again_by_chance(void)
{
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length), *bytes = map_anonymous(length);
    struct kuf *kuf = watch(open_driven(NULL));
    add(kuf, BASE, ram, length);
    write_content(bytes, BASE, length, 1);
    atomic_bool stop = false;
    struct rounds rounds = {kuf, ram, bytes, &stop};
    pthread_t thread = start(give_over_and_over, &rounds);
    int bad = 0, round = 0;
    uint64_t end = now_ns() + UINT64_C(3000000000);
    for (; round < 20000 && now_ns() < end && (round < 200 || stats_of(kuf).install_again == 0); round++) {
        bad += kuf_resolve(kuf, BASE + 8 * page, bytes + 8 * page, 4 * page, 0) != (ssize_t)(4 * page);
        bad += !holds_content(ram + 8 * page, BASE + 8 * page, 4 * page, 1);
        bad += kuf_discard(kuf, BASE + 8 * page, 4 * page, KUF_DISCARD_REFILL) != 0;
    }
    atomic_store(&stop, true);
    pthread_join(thread, NULL);
    is(bad, 0, "pages are resolved and dropped while another thread gives one back over and over");
    struct kuf_stats_info stats = stats_of(kuf);
    ok(stats.events_remove > 0, "the kernel has reported %" PRIu64 " removals", stats.events_remove);
    printf("# EAGAIN %" PRIu64 " times in %d rounds\n", stats.install_again, round);
    close_watched(kuf, KUF_END_POISON);
    munmap(ram, length);
    munmap(bytes, length);
}

/* ---- EEXIST --------------------------------------------------------------------------------------------------------- */

/* Makes pages present without the library, and wakes no thread. */
static void present_unseen(int uffd, bool shared, unsigned char *at, unsigned char *alias, const unsigned char *bytes)
{
    size_t page = page_size();
    if (shared) {
        memcpy(alias, bytes, page);
        struct uffdio_continue cont = {.range = {(uintptr_t)at, page}, .mode = UFFDIO_CONTINUE_MODE_DONTWAKE};
        must(ioctl(uffd, UFFDIO_CONTINUE, &cont) == 0, "UFFDIO_CONTINUE: %s", strerror(errno));
    } else {
        struct uffdio_copy copy = {.dst = (uintptr_t)at, .src = (uintptr_t)bytes, .len = page,
                                   .mode = UFFDIO_COPY_MODE_DONTWAKE};
        must(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY: %s", strerror(errno));
    }
}

/* Page 1 is touched and pending; pages 1, 3 and 4 appear by themselves; then the caller resolves all of them. */
static void exists(bool shared, bool serviced)
{
    const char *kind = kind_of(shared);
    size_t page = page_size(), length = PAGES * page;
    int file;
    unsigned char *ram = map_kind(shared, length, &file), *bytes = map_anonymous(length);
    unsigned char *alias = shared ? mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0) : NULL;
    must(alias != MAP_FAILED, "a second mapping");
    int uffd = own_userfaultfd(shared ? UFFD_FEATURE_MINOR_SHMEM : 0);
    struct kuf *kuf = watch(serviced ? open_serviced(&source) : open_driven(NULL));
    atomic_store(&source.answer, KUF_FILL_DEFERRED);
    add_adopted(kuf, ram, length, file, uffd);
    write_content(bytes, BASE, length, 1);
    struct one_touch touch;
    touch_in_thread(&touch, ram + page);
    wait_until(kuf_pending(kuf, NULL, 0) == 1);
    wait_until(waits_in(atomic_load(&touch.tid), "userfault"));
    static const int there[] = {1, 3, 4};
    for (int i = 0; i < 3; i++) {
        size_t at = (size_t)there[i] * page;
        present_unseen(uffd, shared, ram + at, shared ? alias + at : NULL, bytes + at);
    }
    sleep_ms(20);
    ok(!atomic_load(&touch.finished), "%s: a page turns up by itself, and its toucher sleeps on", kind);
    is(kuf_resolve(kuf, BASE, bytes, 8 * page, 0), 5 * page, "%s: pages that were present already are not counted", kind);
    pthread_join(touch.thread, NULL);
    is(touch.raised, 0, "%s: the toucher goes on", kind);
    ok(touch.word == word_of(BASE + page, 1), "%s: with the right bytes", kind);
    is(stats_of(kuf).install_exists, 3, "%s: the kernel said EEXIST for the three pages", kind);
    ok(holds_content(ram, BASE, 8 * page, 1), "%s: the run goes on behind each of them", kind);
    is(progress_of(kuf, BASE).present, 8 * page, "%s: all of it is present", kind);
    is(kuf_pending(kuf, NULL, 0), 0, "%s: nothing is owed any more", kind);
    atomic_store(&source.answer, 0);
    close_watched(kuf, KUF_END_POISON);
    close(uffd);
    close(file);
    munmap(ram, length);
    munmap(bytes, length);
    if (shared)
        munmap(alias, length);
}

/* The same in the middle of a run that the callback fills. */
static void exists_in_a_fill(void)
{
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length), *bytes = map_anonymous(length);
    int uffd = own_userfaultfd(0);
    struct kuf *kuf = watch(open_serviced(&source));
    add_adopted(kuf, ram, length, -1, uffd);
    write_content(bytes, BASE, length, 1);
    atomic_store(&source.hold, true);
    struct kuf_populate_request all = {.size = sizeof(all), .gpa = KUF_ALL};
    is(kuf_populate(kuf, &all), 0, "populate begins");
    wait_until(atomic_load(&source.inside) == 1);
    struct one_touch touch;
    touch_in_thread(&touch, ram + 5 * page);
    wait_until(stats_of(kuf).faults_joined == 1);
    present_unseen(uffd, false, ram + 5 * page, NULL, bytes + 5 * page);
    present_unseen(uffd, false, ram + 15 * page, NULL, bytes + 15 * page);
    atomic_store(&source.hold, false);
    pthread_join(touch.thread, NULL);
    ok(touch.raised == 0 && touch.word == word_of(BASE + 5 * page, 1), "a thread that waits for a page in the run goes on");
    wait_until(progress_of(kuf, BASE).flags & KUF_PROGRESS_COMPLETE);
    ok(holds_content(ram, BASE, length, 1), "the whole run is there");
    is(stats_of(kuf).install_exists, 2, "two of its pages were there before");
    close_watched(kuf, 0);
    close(uffd);
    munmap(ram, length);
    munmap(bytes, length);
}

/* ---- REMAP and UNMAP ------------------------------------------------------------------------------------------------ */

struct around {
    const unsigned char *ram;
    int from, to, good;
};

/* Touches pages that stay where they are. */
static void *touch_around(void *argument)
{
    struct around *around = argument;
    size_t page = page_size();
    for (int i = around->from; i < around->to; i++) {
        around->good += holds_content(around->ram + (size_t)i * page, BASE + (uint64_t)i * page, page, 1);
        sleep_ms(1);
    }
    return NULL;
}

static void moves(bool shared)
{
    const char *kind = kind_of(shared);
    size_t page = page_size(), length = PAGES * page;
    int file;
    unsigned char *ram = map_kind(shared, length, &file);
    unsigned char *elsewhere = map_anonymous(length), *bytes = map_anonymous(length);
    write_content(bytes, BASE, length, 1);
    struct kuf *kuf = watch(open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page}));
    add_kind(kuf, BASE, ram, length, file);
    ok(holds_content(ram + 4 * page, BASE + 4 * page, page, 1), "%s: a page is touched before it moves", kind);
    comes_to(progress_of(kuf, BASE).present, page, "%s: and only that one", kind);
    struct around around = {ram, 8, PAGES, 0};
    pthread_t thread = start(touch_around, &around);
    int how = MREMAP_MAYMOVE | MREMAP_FIXED;
    unsigned char *moved = mremap(ram + 4 * page, 4 * page, 4 * page, how, elsewhere + 8 * page);
    must(moved == elsewhere + 8 * page, "mremap: %s", strerror(errno));
    ok(holds_content(moved, BASE + 4 * page, 2 * page, 1), "%s: touches there get the bytes of their gpa", kind);
    is(kuf_resolve(kuf, BASE + 6 * page, bytes + 6 * page, page, 0), page, "%s: a page there is resolved unasked", kind);
    is(kuf_ensure(kuf, BASE + 7 * page, page, -1), 0, "%s: and one ensured", kind);
    pthread_join(thread, NULL);
    is(around.good, PAGES - 8, "%s: pages that stayed are served meanwhile", kind);
    ok(stats_of(kuf).events_remap > 0, "%s: the kernel has reported the move", kind);
    ok(holds_content(moved, BASE + 4 * page, 4 * page, 1), "%s: all that moved holds its bytes", kind);
    is(touch(ram + 4 * page), SIGSEGV, "%s: nothing is left at the old address", kind);
    /* Back and forth once more: a piece of the piece, dropped there and filled again. */
    unsigned char *again = mremap(moved + page, page, page, how, elsewhere);
    must(again == elsewhere, "mremap: %s", strerror(errno));
    atomic_store(&source.generation, 2);
    is(kuf_discard(kuf, BASE + 4 * page, 4 * page, KUF_DISCARD_REFILL), 0, "%s: the moved pages are dropped", kind);
    ok(holds_content(again, BASE + 5 * page, page, 2), "%s: and filled again where it is now", kind);
    ok(holds_content(moved, BASE + 4 * page, page, 2) && holds_content(moved + 2 * page, BASE + 6 * page, 2 * page, 2),
       "%s: each piece", kind);
    atomic_store(&source.generation, 1);
    ok(holds_content(ram, BASE, 4 * page, 1), "%s: the first pages are served where they were", kind);
    comes_to(progress_of(kuf, BASE).present, length, "%s: the slot is complete", kind);
    is(progress_of(kuf, BASE).removed, 0, "%s: with nothing lost", kind);
    close_watched(kuf, 0);
    ok(!is_registered(moved) && !is_registered(again) && !is_registered(ram), "%s: no piece stays registered", kind);
    munmap(ram, length);
    munmap(elsewhere, length);
    munmap(bytes, length);
    close(file);
}

static void unmapped(bool shared)
{
    const char *kind = kind_of(shared);
    size_t page = page_size(), length = PAGES * page;
    int file;
    unsigned char *ram = map_kind(shared, length, &file), *bytes = map_anonymous(length);
    write_content(bytes, BASE, length, 1);
    struct kuf *kuf = watch(open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page}));
    add_kind(kuf, BASE, ram, length, file);
    ok(holds_content(ram + 4 * page, BASE + 4 * page, page, 1), "%s: a page is touched before it goes", kind);
    struct around around = {ram, 8, PAGES, 0};
    pthread_t thread = start(touch_around, &around);
    must(munmap(ram + 4 * page, 4 * page) == 0, "munmap: %s", strerror(errno));
    comes_to(progress_of(kuf, BASE).removed, 4 * page, "%s: four pages are removed", kind);
    ok(stats_of(kuf).events_unmap > 0, "%s: the kernel has reported it", kind);
    is(kuf_resolve(kuf, BASE + 3 * page, bytes + 3 * page, 4 * page, 0), page, "%s: kuf_resolve skips what is gone", kind);
    is(kuf_ensure(kuf, BASE + 4 * page, 4 * page, -1), 0, "%s: kuf_ensure does not wait for it", kind);
    /* Other memory is at the address now. */
    unsigned char *other = mmap(ram + 4 * page, 4 * page, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    /* It may be a thread's of this process already: a buffer, or malloc's. */
    bool taken = other == MAP_FAILED && errno == EEXIST;
    must(taken || other == ram + 4 * page, "the hole is mapped again: %s", strerror(errno));
    struct kuf_populate_request all = {.size = sizeof(all), .gpa = KUF_ALL};
    int populated = atomic_load(&source.events[KUF_EVENT_POPULATED]);
    is(kuf_populate(kuf, &all), 0, "%s: the rest is populated", kind);
    wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) > populated);
    is(last_event(&source, KUF_EVENT_POPULATED).error, 0, "%s: with no error", kind);
    pthread_join(thread, NULL);
    is(around.good, PAGES - 8, "%s: pages around are served meanwhile", kind);
    ok(holds_content(ram, BASE, 4 * page, 1) && holds_content(ram + 8 * page, BASE + 8 * page, 8 * page, 1),
       "%s: all that is left holds its bytes", kind);
    ok(taken || holds_zeroes(other, 4 * page), "%s: the new mapping in the hole is left alone", kind);
    struct kuf_progress_info progress = progress_of(kuf, BASE);
    is(progress.removed, 4 * page, "%s: kuf_progress shows what was removed", kind);
    comes_to(progress_of(kuf, BASE).present, length - 4 * page, "%s: and what is present", kind);
    ok(progress_of(kuf, BASE).flags & KUF_PROGRESS_COMPLETE, "%s: which is everything", kind);
    close_watched(kuf, 0);
    munmap(ram, 4 * page);
    munmap(ram + 8 * page, length - 8 * page);
    if (!taken)
        munmap(other, 4 * page);
    munmap(bytes, length);
    close(file);
}

/* A page is unmapped while a thread waits for it: the touch fails as it does without the library. */
static void waits_where_it_goes(bool moved)
{
    const char *kind = moved ? "moved away" : "unmapped";
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length), *elsewhere = map_anonymous(length), *bytes = map_anonymous(length);
    write_content(bytes, BASE, length, 1);
    struct kuf *kuf = watch(open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page}));
    add(kuf, BASE, ram, length);
    atomic_store(&source.answer, KUF_FILL_DEFERRED);
    struct one_touch touch;
    touch_in_thread(&touch, ram + 4 * page);
    wait_until(kuf_pending(kuf, NULL, 0) == 1);
    if (moved) {
        void *to = mremap(ram + 4 * page, 4 * page, 4 * page, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere);
        must(to == elsewhere, "mremap: %s", strerror(errno));
        is(kuf_resolve(kuf, BASE + 4 * page, bytes + 4 * page, page, 0), page, "a page that is owed is resolved there");
        ok(holds_content(elsewhere, BASE + 4 * page, page, 1), "and holds its bytes there");
    } else {
        must(munmap(ram + 4 * page, 4 * page) == 0, "munmap: %s", strerror(errno));
    }
    for (int tries = 0; tries < 5000 && !atomic_load(&touch.finished); tries++)
        sleep_ms(1);
    ok(atomic_load(&touch.finished), "a thread that waits for a page that is %s goes on", kind);
    atomic_store(&source.answer, 0);
    close_watched(kuf, KUF_END_POISON);
    pthread_join(touch.thread, NULL);
    is(touch.raised, SIGSEGV, "and finds nothing there (%s)", kind);
    munmap(ram, length);
    munmap(elsewhere, length);
    munmap(bytes, length);
}

int main(void)
{
    begin_watched(40);
    catch_touches();
    again_for_certain();
    again_by_chance();
    bool minor = has_feature(KUF_FEATURE_MINOR);
    for (int shared = 0; shared < 2; shared++) {
        if (shared && !minor) {
            skip_part("this kernel cannot fill shared memory in place");
            break;
        }
        exists(shared, false);
        exists(shared, true);
    }
    exists_in_a_fill();
    for (int shared = 0; shared < 2; shared++) {
        moves(shared);
        unmapped(shared);
    }
    waits_where_it_goes(false);
    waits_where_it_goes(true);
    return done();
}
