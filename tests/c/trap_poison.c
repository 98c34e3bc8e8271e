/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * UFFDIO_POISON: everybody who touches a page that could not be filled gets SIGBUS, however many they are and however
 * late their fault is read; others go on; kuf_discard heals it. And a source that fails costs no page that the host has
 * brought meanwhile.
 */
#include "trap.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 64, TOUCHERS = 6 };

static struct source source = SOURCE_INIT;

static struct kuf *open_here(size_t page, uint32_t threads)
{
    return watch(open_with((struct kuf_options){.fill = source_fill, .event = source_event, .opaque = &source,
                                                .demand_run = page, .fill_threads = threads}));
}

static void add_here(struct kuf *kuf, unsigned char **ram, size_t length, int *fd)
{
    *fd = -1;
    if (ram[1] != NULL) {
        ram[0] = map_shared(length, fd);
        add_shared(kuf, BASE, ram[0], length, *fd, 0);
    } else {
        ram[0] = map_anonymous(length);
        add(kuf, BASE, ram[0], length);
    }
}

static void everybody_gets_it(bool shared)
{
    const char *kind = shared ? "shared" : "anonymous";
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram[2] = {NULL, shared ? (unsigned char *)1 : NULL};
    int fd;
    /* One worker: the faults of the others wait in the library while it is with the first. */
    struct kuf *kuf = open_here(page, 1);
    add_here(kuf, ram, length, &fd);
    atomic_store(&source.bad_gpa, BASE + 3 * page);
    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.hold, true);
    struct one_touch touch[TOUCHERS];
    for (int i = 0; i < TOUCHERS; i++)
        touch_in_thread(&touch[i], ram[0] + 3 * page);
    wait_until(stats_of(kuf).faults >= TOUCHERS);
    atomic_store(&source.hold, false);
    int bus = 0;
    for (int i = 0; i < TOUCHERS; i++) {
        pthread_join(touch[i].thread, NULL);
        bus += touch[i].raised == poison_signal();
    }
    is(bus, TOUCHERS, "%s: every toucher gets the signal", kind);
    /* Faults that were read too late to be told find the mark in place. */
    struct one_touch other;
    touch_in_thread(&other, ram[0] + 20 * page);
    pthread_join(other.thread, NULL);
    is(other.raised, 0, "%s: another page is served", kind);
    is(try_touch(ram[0] + 3 * page), poison_signal(), "%s: and so does who comes later", kind);
    is(try_touch(ram[0] + 4 * page), 0, "%s: the neighbour is served", kind);
    is(stats_of(kuf).bytes_poisoned, page, "%s: one page is poisoned", kind);
    is(progress_of(kuf, BASE).poisoned, page, "%s: and stays so", kind);
    atomic_store(&source.bad_gpa, NO_GPA);
    is(kuf_discard(kuf, BASE + 3 * page, page, 0), 0, "%s: discard heals it", kind);
    is(try_touch(ram[0] + 3 * page), 0, "%s: it can be touched", kind);
    ok(try_touch(ram[0] + 3 * page) == 0 && holds_content(ram[0] + 3 * page, BASE + 3 * page, page, 1), "%s: it holds its bytes", kind);
    close_watched(kuf, KUF_CLOSE_POPULATE);
    close(fd);
    munmap(ram[0], length);
}

/* The host brings a page while its callback is busy failing for it: what counts is that it was brought. */
static void brought_meanwhile(bool shared)
{
    const char *kind = shared ? "shared" : "anonymous";
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram[2] = {NULL, shared ? (unsigned char *)1 : NULL};
    int fd;
    struct kuf *kuf = open_here(page, 2);
    add_here(kuf, ram, length, &fd);
    unsigned char *bytes = map_anonymous(page);
    write_content(bytes, BASE + 7 * page, page, 9);
    atomic_store(&source.bad_gpa, BASE + 7 * page);
    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.hold, true);
    struct one_touch touch;
    touch_in_thread(&touch, ram[0] + 7 * page);
    wait_until(atomic_load(&source.inside) == 1);
    ok(kuf_resolve(kuf, BASE + 7 * page, bytes, page, 0) >= 0, "%s: a page is brought while its callback runs", kind);
    atomic_store(&source.hold, false);
    pthread_join(touch.thread, NULL);
    is(touch.raised, 0, "%s: the toucher goes on although the callback failed", kind);
    wait_until(atomic_load(&source.inside) == 0 && progress_of(kuf, BASE).filling == 0);
    sleep_ms(20);
    is(try_touch(ram[0] + 7 * page), 0, "%s: the page is not poisoned", kind);
    ok(try_touch(ram[0] + 7 * page) == 0 && holds_content(ram[0] + 7 * page, BASE + 7 * page, page, 9),
       "%s: and still holds the bytes that were brought", kind);
    is(atomic_load(&source.events[poison_event()]), 0, "%s: no event says it was lost", kind);
    atomic_store(&source.bad_gpa, NO_GPA);
    close_watched(kuf, KUF_CLOSE_POPULATE);
    munmap(bytes, page);
    close(fd);
    munmap(ram[0], length);
}

/* Poisoned by hand, with nobody who waits: the mark has to be gone for the next touch to fault at all. */
static void heals(bool shared)
{
    const char *kind = shared ? "shared" : "anonymous";
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram[2] = {NULL, shared ? (unsigned char *)1 : NULL};
    int fd;
    struct kuf *kuf = open_here(page, 2);
    add_here(kuf, ram, length, &fd);
    is(kuf_resolve(kuf, BASE, NULL, 2 * page, KUF_RESOLVE_POISON), 2 * page, "%s: two pages are poisoned by hand", kind);
    is(try_touch(ram[0]), poison_signal(), "%s: touching one raises the signal", kind);
    is(kuf_discard(kuf, BASE, page, 0), 0, "%s: one is discarded", kind);
    is(try_touch(ram[0]), 0, "%s: it can be touched", kind);
    ok(try_touch(ram[0]) == 0 && holds_content(ram[0], BASE, page, 1), "%s: and is filled", kind);
    is(kuf_discard(kuf, BASE + page, page, KUF_DISCARD_REMOVED), 0, "%s: the other is given back", kind);
    is(try_touch(ram[0] + page), 0, "%s: it can be touched", kind);
    ok(try_touch(ram[0] + page) == 0 && holds_zeroes(ram[0] + page, page), "%s: and is zero", kind);
    close_watched(kuf, KUF_CLOSE_POPULATE);
    close(fd);
    munmap(ram[0], length);
}

int main(void)
{
    begin_watched(60);
    catch_touches();
    for (int shared = 0; shared < 2; shared++) {
        everybody_gets_it(shared);
        atomic_store(&source.events[poison_event()], 0);
        brought_meanwhile(shared);
        heals(shared);
    }
    return done();
}
