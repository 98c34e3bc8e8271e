/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* More faults than the library may hold: the rest waits in the kernel, and none is lost. */
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

int main(void)
{
    begin();
    size_t page = page_size(), length = TOUCHERS * EACH * page;
    static struct source source = SOURCE_INIT;
    unsigned char *ram = map_anonymous(length);
    struct kuf *kuf = open_with((struct kuf_options){.fill = source_fill, .opaque = &source, .fill_threads = 1,
                                                     .queue_max = 2, .demand_run = page});
    add(kuf, BASE, ram, length);
    atomic_store(&source.hold, true);
    start_all(ram);
    wait_until(stats_of(kuf).queue_full > 0);
    ok(stats_of(kuf).faults < TOUCHERS, "reading stops while many wait");
    atomic_store(&source.hold, false);
    ok(join_all(), "serviced: every thread gets every page");
    comes_to(stats_of(kuf).fills, TOUCHERS * EACH, "each page is filled once");
    close_with(kuf, 0);

    ram = map_anonymous(length);
    kuf = open_with((struct kuf_options){.queue_max = 1});
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
    return done();
}
