/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kuf_ensure: the page is present when it returns. It fills on the caller's own thread, and waits for others no longer
 * than its timeout.
 */
#include "in_thread.h"

#define BASE UINT64_C(0x60000000)
enum { PAGES = 64 };

static struct source source = SOURCE_INIT;
static atomic_int own_thread, calls;

static int fill(void *opaque, struct kuf_fill *fill)
{
    atomic_fetch_add(&calls, 1);
    if (gettid() == getpid())
        atomic_fetch_add(&own_thread, 1);
    return source_fill(opaque, fill);
}

int main(void)
{
    begin();
    size_t page = page_size();
    unsigned char *ram = map_anonymous(PAGES * page);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = fill, .event = source_event, .opaque = &source, .demand_run = 4 * page});
    add(kuf, BASE, ram, PAGES * page);

    is(kuf_ensure(kuf, BASE + 100, 2 * page, -1), 0, "a range of any alignment");
    is(progress_of(kuf, BASE).present >= 3 * page, 1, "covers every page it touches");
    ok(atomic_load(&own_thread) == atomic_load(&calls), "the callback runs on the calling thread");
    ok(holds_content(ram, BASE, 3 * page, 1), "the bytes are there");
    int before = atomic_load(&calls);
    is(kuf_ensure(kuf, BASE, 3 * page, -1), 0, "again");
    is(atomic_load(&calls), before, "asks for nothing");
    is(kuf_ensure(kuf, BASE, PAGES * page, 0), 0, "a timeout of 0 still fills pages that no thread is filling");
    is(progress_of(kuf, BASE).present, PAGES * page, "all of it");
    ok(holds_content(ram, BASE, PAGES * page, 1), "with its bytes");

    /* The call waits for a page that another thread is filling, for as long as its timeout. */
    is(kuf_discard(kuf, BASE, PAGES * page, KUF_DISCARD_REFILL), 0, "pages are dropped");
    atomic_store(&source.hold, true);
    struct toucher toucher = {.memory = ram, .gpa = BASE, .length = page, .generation = 1};
    start_toucher(&toucher);
    wait_until(atomic_load(&source.inside) == 1);
    is(kuf_ensure(kuf, BASE, page, 0), -ETIMEDOUT, "no wait for another thread's fill with a timeout of 0");
    is(kuf_ensure(kuf, BASE, page, 20), -ETIMEDOUT, "not longer than told");
    struct ensuring ensuring;
    start_ensuring(&ensuring, kuf, BASE, page);
    atomic_store(&source.hold, false);
    is(join_ensuring(&ensuring), 0, "or until it is there");
    ok(join_toucher(&toucher), "the toucher reads its page");

    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.bad_gpa, BASE + 10 * page);
    is(kuf_ensure(kuf, BASE + 10 * page, page, -1), -EHWPOISON, "a page that cannot be filled");
    is(kuf_ensure(kuf, BASE + 8 * page, 4 * page, -1), -EHWPOISON, "a range with such a page");
    is(kuf_ensure(kuf, BASE + 12 * page, 4 * page, -1), 0, "its neighbours are served");

    is(kuf_discard(kuf, BASE + 20 * page, page, KUF_DISCARD_ZERO), 0, "a page is given back");
    before = atomic_load(&calls);
    is(kuf_ensure(kuf, BASE + 20 * page, page, -1), 0, "a page that the guest gave back is as good as present");
    is(atomic_load(&calls), before, "and asks for nothing");
    close_with(kuf, KUF_END_POISON);

    /* Caller-driven: it is a fault to read like any other. */
    struct kuf_fault fault;
    unsigned char *bytes = malloc(page);
    kuf = open_driven(NULL);
    ram = map_anonymous(PAGES * page);
    add(kuf, BASE, ram, PAGES * page);
    is(kuf_ensure(kuf, BASE, page, 0), -ETIMEDOUT, "caller-driven: does not wait with a timeout of 0");
    start_ensuring(&ensuring, kuf, BASE + 7 * page, page);
    bool seen = false;
    while (!seen) {
        is(kuf_poll(kuf, -1), 1, "caller-driven: something to read");
        while (kuf_read(kuf, &fault, 1) == 1) {
            seen = seen || (fault.gpa == BASE + 7 * page && (fault.flags & KUF_FAULT_DEMAND));
            write_content(bytes, fault.gpa, page, 1);
            is(kuf_resolve(kuf, fault.gpa, bytes, page, 0), page, "caller-driven: a page is resolved");
        }
    }
    is(join_ensuring(&ensuring), 0, "caller-driven: the waiting thread goes on");
    ok(holds_content(ram + 7 * page, BASE + 7 * page, page, 1), "caller-driven: with the page's bytes");
    free(bytes);
    close_with(kuf, KUF_END_POISON);
    return done();
}
