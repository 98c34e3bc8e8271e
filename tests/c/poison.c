/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * UFFDIO_POISON: every thread that touches a page that could not be filled gets SIGBUS, however many threads there are
 * and however late their faults are read; other threads continue; kuf_discard makes the page usable again. And a source
 * that fails costs no page that the caller has resolved meanwhile.
 */
#include "touches.h"
#include "watched.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 64, TOUCHERS = 6 };

static struct source source = SOURCE_INIT;

static struct kuf *open_here(size_t page, uint32_t threads)
{
    return watch(open_with((struct kuf_options){.fill = source_fill, .event = source_event, .opaque = &source,
                                                .demand_run = page, .fill_threads = threads}));
}

/* A handle with one slot at BASE. */
struct served {
    struct kuf *kuf;
    unsigned char *ram;
    size_t length;
    int fd;
};

static struct kuf *serve(struct served *served, bool shared, size_t pages, uint32_t threads)
{
    served->length = pages * page_size();
    served->ram = map_kind(shared, served->length, &served->fd);
    served->kuf = open_here(page_size(), threads);
    add_kind(served->kuf, BASE, served->ram, served->length, served->fd);
    return served->kuf;
}

static void end_served(struct served *served)
{
    close_watched(served->kuf, KUF_END_POPULATE);
    close(served->fd);
    munmap(served->ram, served->length);
}

static void every_toucher_gets_the_signal(bool shared)
{
    const char *kind = kind_of(shared);
    const size_t page = page_size();
    struct served served;
    /* One worker: the faults of the others wait in the library while it is with the first. */
    struct kuf *kuf = serve(&served, shared, PAGES, 1);
    unsigned char *ram = served.ram;
    atomic_store(&source.bad_gpa, BASE + 3 * page);
    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.hold, true);
    struct one_touch touch[TOUCHERS];
    for (int i = 0; i < TOUCHERS; i++)
        touch_in_thread(&touch[i], ram + 3 * page);
    wait_until(stats_of(kuf).faults >= TOUCHERS);
    atomic_store(&source.hold, false);
    int bus = 0;
    for (int i = 0; i < TOUCHERS; i++) {
        pthread_join(touch[i].thread, NULL);
        bus += touch[i].raised == poison_signal();
    }
    is(bus, TOUCHERS, "%s: every toucher gets the signal", kind);
    /* Faults that are read late find the mark in place. */
    struct one_touch other;
    touch_in_thread(&other, ram + 20 * page);
    pthread_join(other.thread, NULL);
    is(other.raised, 0, "%s: another page is served", kind);
    is(try_touch(ram + 3 * page), poison_signal(), "%s: a later touch gets the signal too", kind);
    is(try_touch(ram + 4 * page), 0, "%s: the neighbour is served", kind);
    is(stats_of(kuf).bytes_poisoned, page, "%s: one page is poisoned", kind);
    is(progress_of(kuf, BASE).poisoned, page, "%s: and stays so", kind);
    atomic_store(&source.bad_gpa, NO_GPA);
    is(kuf_discard(kuf, BASE + 3 * page, page, KUF_DISCARD_REFILL), 0, "%s: discard heals it", kind);
    is(try_touch(ram + 3 * page), 0, "%s: it can be touched", kind);
    ok(try_touch(ram + 3 * page) == 0 && holds_content(ram + 3 * page, BASE + 3 * page, page, 1), "%s: it holds its bytes", kind);
    end_served(&served);
}

/* The caller resolves a page while its callback is about to fail for it: the page stays present. */
static void brought_meanwhile(bool shared)
{
    const char *kind = kind_of(shared);
    const size_t page = page_size();
    struct served served;
    struct kuf *kuf = serve(&served, shared, PAGES, 2);
    unsigned char *ram = served.ram;
    unsigned char *bytes = map_anonymous(page);
    write_content(bytes, BASE + 7 * page, page, 9);
    atomic_store(&source.bad_gpa, BASE + 7 * page);
    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.hold, true);
    struct one_touch touch;
    touch_in_thread(&touch, ram + 7 * page);
    wait_until(atomic_load(&source.inside) == 1);
    ok(kuf_resolve(kuf, BASE + 7 * page, bytes, page, 0) >= 0, "%s: a page is resolved while its callback runs", kind);
    atomic_store(&source.hold, false);
    pthread_join(touch.thread, NULL);
    is(touch.raised, 0, "%s: the toucher goes on although the callback failed", kind);
    wait_until(atomic_load(&source.inside) == 0 && progress_of(kuf, BASE).filling == 0);
    sleep_ms(20);
    is(try_touch(ram + 7 * page), 0, "%s: the page is not poisoned", kind);
    ok(try_touch(ram + 7 * page) == 0 && holds_content(ram + 7 * page, BASE + 7 * page, page, 9),
       "%s: and still holds the resolved bytes", kind);
    is(atomic_load(&source.events[poison_event()]), 0, "%s: no event says it was lost", kind);
    atomic_store(&source.bad_gpa, NO_GPA);
    end_served(&served);
    munmap(bytes, page);
}

/* Poisoned by the caller while no thread waits: the mark has to be gone for the next touch to fault at all. */
static void heals(bool shared)
{
    const char *kind = kind_of(shared);
    const size_t page = page_size();
    struct served served;
    struct kuf *kuf = serve(&served, shared, PAGES, 2);
    unsigned char *ram = served.ram;
    is(kuf_resolve(kuf, BASE, NULL, 2 * page, KUF_RESOLVE_POISON), 2 * page, "%s: two pages are poisoned by hand", kind);
    is(try_touch(ram), poison_signal(), "%s: touching one raises the signal", kind);
    is(kuf_discard(kuf, BASE, page, KUF_DISCARD_REFILL), 0, "%s: one is discarded", kind);
    is(try_touch(ram), 0, "%s: it can be touched", kind);
    ok(try_touch(ram) == 0 && holds_content(ram, BASE, page, 1), "%s: and is filled", kind);
    is(kuf_discard(kuf, BASE + page, page, KUF_DISCARD_ZERO), 0, "%s: the other is given back", kind);
    is(try_touch(ram + page), 0, "%s: it can be touched", kind);
    ok(try_touch(ram + page) == 0 && holds_zeroes(ram + page, page), "%s: and is zero", kind);
    end_served(&served);
}

/* The mark of a page of a shared file stays when the page is given back, and the library reports it as poisoned. */
static void given_back(int advice, const char *what)
{
    size_t page = page_size();
    int fd;
    unsigned char *ram = map_shared(4 * page, &fd);
    struct kuf *kuf = open_here(page, 1);
    add_shared(kuf, BASE, ram, 4 * page, fd, 0);
    is(kuf_resolve(kuf, BASE + page, NULL, page, KUF_RESOLVE_POISON), page, "%s: a page is poisoned", what);
    is(madvise(ram, 3 * page, advice), 0, "%s: it is given back", what);
    is(kuf_ensure(kuf, BASE + page, page, -1), -EHWPOISON, "%s: kuf_ensure says that it is poisoned", what);
    is(progress_of(kuf, BASE).poisoned, page, "%s: and so does kuf_progress", what);
    is(try_touch(ram + page), poison_signal(), "%s: touching it raises the signal", what);
    ok(holds_zeroes(ram, page) && holds_zeroes(ram + 2 * page, page), "%s: its neighbours are zero", what);
    is(kuf_discard(kuf, BASE + page, page, KUF_DISCARD_REFILL), 0, "%s: kuf_discard heals it", what);
    ok(holds_content(ram + page, BASE + page, page, 1), "%s: it has the source's bytes", what);
    close_watched(kuf, KUF_END_POISON);
    munmap(ram, 4 * page);
    close(fd);
}

/* A pending page that the caller has poisoned is settled: bytes for a range around it do not change the mark. */
static void owed_before(bool shared)
{
    const char *kind = kind_of(shared);
    const size_t page = page_size();
    struct served served;
    struct kuf *kuf = serve(&served, shared, 4, 1);
    unsigned char *ram = served.ram;
    unsigned char *bytes = map_anonymous(4 * page);
    write_content(bytes, BASE, 4 * page, 9);
    atomic_store(&source.bad_gpa, BASE + page);
    atomic_store(&source.bad_answer, KUF_FILL_DEFERRED);
    struct one_touch touch;
    touch_in_thread(&touch, ram + page);
    wait_until(progress_of(kuf, BASE).deferred == page);
    is(kuf_resolve(kuf, BASE + page, NULL, page, KUF_RESOLVE_POISON), page, "%s: a page that is owed is poisoned", kind);
    pthread_join(touch.thread, NULL);
    is(touch.raised, poison_signal(), "%s: the toucher gets the signal", kind);
    is(progress_of(kuf, BASE).deferred, 0, "%s: the page is not owed any more", kind);
    is(progress_of(kuf, BASE).poisoned, page, "%s: it is poisoned", kind);
    is(kuf_resolve(kuf, BASE, bytes, 4 * page, 0), 3 * page, "%s: its neighbours are resolved", kind);
    is(try_touch(ram + page), poison_signal(), "%s: it is still poisoned", kind);
    ok(holds_content(ram, BASE, page, 9) && holds_content(ram + 2 * page, BASE + 2 * page, 2 * page, 9),
       "%s: the neighbours hold their bytes", kind);
    atomic_store(&source.bad_gpa, NO_GPA);
    end_served(&served);
    munmap(bytes, 4 * page);
}

int main(void)
{
    begin_watched(60);
    catch_touches();
    for (int shared = 0; shared < 2; shared++) {
        every_toucher_gets_the_signal(shared);
        atomic_store(&source.events[poison_event()], 0);
        brought_meanwhile(shared);
        heals(shared);
        owed_before(shared);
    }
    atomic_store(&source.bad_gpa, NO_GPA);
    given_back(MADV_REMOVE, "MADV_REMOVE");
    given_back(MADV_DONTNEED, "MADV_DONTNEED");
    return done();
}
