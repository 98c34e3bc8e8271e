/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* kuf_discard: dropped pages refill from the source, removed ones read as zero, poisoned ones become ordinary again. */
#include "harness.h"

#define BASE UINT64_C(0x70000000)
enum { PAGES = 32 };

static struct source source = SOURCE_INIT;
static atomic_bool hold;
static atomic_int written;

/* Writes first and waits then: what it has written is old when the page is dropped meanwhile. */
static int fill(void *opaque, struct kuf_fill *fill)
{
    int answer = source_fill(opaque, fill);
    atomic_fetch_add(&written, 1);
    while (atomic_load(&hold))
        sleep_ms(1);
    return answer;
}

static void go(bool shared)
{
    const char *kind = shared ? "shared" : "anonymous";
    size_t page = page_size();
    int fd = -1;
    unsigned char *ram = shared ? map_shared(PAGES * page, &fd) : map_anonymous(PAGES * page);
    atomic_store(&source.generation, 1);
    atomic_store(&source.events[poison_event()], 0);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = fill, .event = source_event, .opaque = &source, .demand_run = page});
    if (shared)
        add_shared(kuf, BASE, ram, PAGES * page, fd, 0);
    else
        add(kuf, BASE, ram, PAGES * page);

    ok(holds_content(ram, BASE, 8 * page, 1), "%s: filled", kind);
    atomic_store(&source.generation, 2);
    is(kuf_discard(kuf, BASE + 2 * page, 3 * page, 0), 0, "%s: three pages are dropped", kind);
    comes_to(progress_of(kuf, BASE).present, 5 * page, "%s: they are no longer present", kind);
    ok(holds_content(ram + 2 * page, BASE + 2 * page, 3 * page, 2), "%s: they refill from the source", kind);
    ok(holds_content(ram, BASE, 2 * page, 1) && holds_content(ram + 5 * page, BASE + 5 * page, 3 * page, 1),
       "%s: their neighbours stay", kind);
    is(stats_of(kuf).bytes_discarded, 3 * page, "%s: counted", kind);

    is(kuf_discard(kuf, BASE + page, 2 * page, KUF_DISCARD_REMOVED), 0, "%s: present pages are given back", kind);
    is(kuf_discard(kuf, BASE + 20 * page, page, KUF_DISCARD_REMOVED), 0, "%s: so is an absent one", kind);
    is(progress_of(kuf, BASE).removed, 3 * page, "%s: progress counts them", kind);
    ok(holds_zeroes(ram + page, 2 * page) && holds_zeroes(ram + 20 * page, page), "%s: they read as zero", kind);
    ram[page] = 7;
    is(ram[page], 7, "%s: and can be written", kind);
    is(kuf_resolve(kuf, BASE + 20 * page, ram, page, 0), 0, "%s: a late answer does not bring them back", kind);
    ok(holds_zeroes(ram + 20 * page, page), "%s: they still read as zero", kind);
    is(kuf_discard(kuf, BASE + 20 * page, page, 0), 0, "%s: dropped without the flag", kind);
    ok(holds_content(ram + 20 * page, BASE + 20 * page, page, 2), "%s: they refill from the source again", kind);

    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.bad_gpa, BASE + 10 * page);
    is(touch(ram + 10 * page), poison_signal(), "%s: a page that cannot be filled is poisoned", kind);
    comes_to(progress_of(kuf, BASE).poisoned, page, "%s: and counted", kind);
    atomic_store(&source.bad_gpa, NO_GPA);
    is(kuf_discard(kuf, BASE + 10 * page, page, 0), 0, "%s: it is dropped", kind);
    is(progress_of(kuf, BASE).poisoned, 0, "%s: and no longer poisoned", kind);
    ok(holds_content(ram + 10 * page, BASE + 10 * page, page, 2), "%s: and refills", kind);
    is(kuf_resolve(kuf, BASE + 11 * page, NULL, page, KUF_RESOLVE_POISON), page, "%s: another is poisoned by hand", kind);
    is(kuf_discard(kuf, BASE + 11 * page, page, KUF_DISCARD_REMOVED), 0, "%s: and given back", kind);
    ok(holds_zeroes(ram + 11 * page, page), "%s: it reads as zero", kind);

    /* A fill that is running when its page is dropped has old data: it must not be used. */
    atomic_store(&written, 0);
    atomic_store(&hold, true);
    struct toucher toucher = {.memory = ram + 15 * page, .gpa = BASE + 15 * page, .length = page, .generation = 3};
    start_toucher(&toucher);
    wait_until(atomic_load(&written) == 1);
    atomic_store(&source.generation, 3);
    is(kuf_discard(kuf, BASE + 15 * page, page, 0), 0, "%s: a page is dropped while it is being filled", kind);
    atomic_store(&hold, false);
    ok(join_toucher(&toucher), "%s: the toucher gets the new bytes", kind);
    is(atomic_load(&written), 2, "%s: it was asked for again", kind);
    close_with(kuf, KUF_CLOSE_POPULATE);
    close(fd);
}

int main(void)
{
    begin();
    go(false);
    go(true);
    return done();
}
