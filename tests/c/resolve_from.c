/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* kuf_resolve from memory that is not present yet: while that memory is filled, everything else continues. */
#include "harness.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 64 };

/* The source bytes are in another handle's memory, whose source is slow, as a disk is. */
static struct source near = SOURCE_INIT, distant = SOURCE_INIT;
static size_t page;
static struct kuf *kuf;

struct resolving {
    const void *src;
    size_t length;
    ssize_t got;
};

static void *resolve(void *argument)
{
    struct resolving *resolving = argument;
    resolving->got = kuf_resolve(kuf, BASE, resolving->src, resolving->length, 0);
    return NULL;
}

static void from(size_t pages)
{
    const size_t length = pages * page;
    unsigned char *ram = map_anonymous(PAGES * page), *far = map_anonymous(length);
    kuf = open_with((struct kuf_options){.fill = source_fill, .opaque = &near, .demand_run = page, .fill_threads = 2});
    struct kuf *other = open_with((struct kuf_options){.fill = source_fill, .opaque = &distant, .demand_run = page});
    add(kuf, BASE, ram, PAGES * page);
    add(other, BASE, far, length);

    struct resolving resolving = {.src = far, .length = length};
    atomic_store(&distant.hold, true);
    pthread_t thread = start(resolve, &resolving);
    wait_until(atomic_load(&distant.inside) == 1);
    struct toucher toucher = {.memory = ram + 40 * page, .gpa = BASE + 40 * page, .length = page, .generation = 1};
    start_toucher(&toucher);
    ok(join_toucher(&toucher), "%zu pages: another page is served while their bytes come", pages);
    is(madvise(ram + 40 * page, page, MADV_DONTNEED), 0, "%zu pages: and given back", pages);
    atomic_store(&distant.hold, false);
    pthread_join(thread, NULL);
    is(resolving.got, length, "%zu pages: then they are resolved", pages);
    ok(holds_content(ram, BASE, length, 1), "%zu pages: with their bytes", pages);
    close_with(kuf, KUF_END_POISON);
    close_with(other, KUF_END_POISON);
    munmap(ram, PAGES * page);
    munmap(far, length);
}

/* Linux 5.14 */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

int main(void)
{
    begin();
    page = page_size();
    unsigned char *probe = map_anonymous(page);
    if (madvise(probe, page, MADV_POPULATE_READ) != 0)
        skip("this kernel has no MADV_POPULATE_READ");
    struct kuf_options options = {.size = sizeof(options)};
    if (kuf_open(&options, &kuf) == -EPERM)
        skip("only faults from user mode are served for this process, and the kernel reads the source");
    close_with(kuf, 0);
    from(1);
    from(2);
    return done();
}
