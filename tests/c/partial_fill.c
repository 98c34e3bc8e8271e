/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A callback that got only part of a run: the rest is asked for again. A page of zeroes is zero. */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 64 };

static atomic_int calls, answer;

static int fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    atomic_fetch_add(&calls, 1);
    fill->filled = fill->page_size;
    if (atomic_load(&answer) == KUF_FILL_DONE)
        write_content(fill->buf, fill->gpa, fill->page_size, 1);
    return atomic_load(&answer);
}

static void go(bool shared)
{
    const char *kind = kind_of(shared);
    size_t page = page_size();
    int fd;
    unsigned char *ram = map_kind(shared, PAGES * page, &fd);
    struct kuf *kuf = open_with((struct kuf_options){.fill = fill, .demand_run = 64 << 10});
    add_kind(kuf, BASE, ram, PAGES * page, fd);
    atomic_store(&answer, KUF_FILL_DONE);
    atomic_store(&calls, 0);
    struct toucher half = {.memory = ram, .gpa = BASE, .length = PAGES / 2 * page, .generation = 1};
    start_toucher(&half);
    ok(join_toucher(&half), "%s: one page a callback, and each page arrives", kind);
    is(atomic_load(&calls), PAGES / 2, "%s: each was asked for again", kind);
    comes_to(progress_of(kuf, BASE).present, PAGES / 2 * page, "%s: only what was filled is present", kind);

    atomic_store(&answer, KUF_FILL_ZERO);
    ok(holds_zeroes(ram + PAGES / 2 * page, PAGES / 2 * page), "%s: pages of zeroes", kind);
    comes_to(stats_of(kuf).bytes_zeroed, PAGES / 2 * page, "%s: counted as zeroes", kind);
    close_with(kuf, 0);
    close(fd);
}

int main(void)
{
    begin();
    go(false);
    go(true);
    return done();
}
