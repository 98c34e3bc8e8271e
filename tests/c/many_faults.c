/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * However many threads wait for a page, the library reads the kernel's queue to its end: it also reads the events among
 * the faults, and loses no fault.
 */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { TOUCHERS = 48, EACH = 8 };

static struct toucher touchers[TOUCHERS];

static void start_all(unsigned char *ram)
{
    size_t length = EACH * page_size();
    for (int i = 0; i < TOUCHERS; i++) {
        touchers[i] = (struct toucher){.memory = ram + i * length, .gpa = BASE + i * length, .length = length, .generation = 1};
        start_toucher(&touchers[i]);
    }
}

static bool join_all(void)
{
    bool good = true;
    for (int i = 0; i < TOUCHERS; i++)
        good = join_toucher(&touchers[i]) && good;
    return good;
}

/* Gives back a page that no other thread touches. The kernel blocks the thread until the library has read the event. */
static void *give_back(void *page)
{
    must(madvise(page, page_size(), MADV_DONTNEED) == 0, "madvise");
    return NULL;
}

/* The only callback that may run blocks until memory has been given back, while all the other faults wait for their turn. */
static void serviced(void)
{
    size_t page = page_size(), length = TOUCHERS * EACH * page;
    static struct source source = SOURCE_INIT;
    unsigned char *ram = map_anonymous(length + page);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = source_fill, .opaque = &source, .fill_threads = 1, .demand_run = page});
    add(kuf, BASE, ram, length + page);
    atomic_store(&source.hold, true);
    start_all(ram);
    wait_until(stats_of(kuf).faults == TOUCHERS);
    ok(true, "all faults are read while one of them is filled");
    pthread_join(start(give_back, ram + length), NULL);
    is(atomic_load(&source.calls), 1, "memory is given back while a callback is blocked and many faults wait");
    comes_to(progress_of(kuf, BASE).removed, page, "and the library knows");
    atomic_store(&source.hold, false);
    ok(join_all(), "serviced: every thread gets every page");
    comes_to(stats_of(kuf).fills, TOUCHERS * EACH, "each page is filled once");
    close_with(kuf, 0);
    munmap(ram, length + page);
}

static void caller_driven(uint32_t flags)
{
    size_t page = page_size(), length = TOUCHERS * EACH * page;
    unsigned char *ram = map_anonymous(length);
    struct kuf *kuf = open_with((struct kuf_options){.flags = flags});
    add(kuf, BASE, ram, length);
    start_all(ram);
    unsigned char *bytes = malloc(page);
    long bad = 0;
    for (int i = 0; i < TOUCHERS * EACH; i++) {
        struct kuf_fault fault;
        ssize_t got;
        while ((got = kuf_read(kuf, &fault, 1)) == -EAGAIN)
            bad += kuf_poll(kuf, -1) != 1;
        write_content(bytes, fault.gpa, page, 1);
        bad += got != 1 || kuf_resolve(kuf, fault.gpa, bytes, page, 0) != (ssize_t)page;
    }
    is(bad, 0, "caller-driven: every page is given once and resolved");
    ok(join_all(), "caller-driven: every thread gets every page");
    free(bytes);
    close_with(kuf, 0);
    munmap(ram, length);
}

int main(void)
{
    begin();
    serviced();
    caller_driven(0);
    caller_driven(KUF_OPEN_DIRECT);
    return done();
}
