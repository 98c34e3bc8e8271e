/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kuf_options.end_timeout_ms: an end with KUF_END_POPULATE does not wait longer for runs that are not answered. The slot or the
 * handle goes on, or with KUF_END_POISON too, the rest is poisoned.
 */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 64, BAD = 40, SHORT_MS = 100 };

static struct source source = SOURCE_INIT;
static size_t page, length;
static atomic_bool stuck;
static atomic_int inside;

/* The run that holds the page BAD is never answered, or blocks in its callback. */
static int fill(void *opaque, struct kuf_fill *fill)
{
    uint64_t bad = BASE + BAD * page;
    if (fill->gpa <= bad && bad < fill->gpa + fill->len) {
        if (!atomic_load(&stuck))
            return KUF_FILL_DEFERRED;
        atomic_fetch_add(&inside, 1);
        while (atomic_load(&stuck))
            sleep_ms(1);
        atomic_fetch_sub(&inside, 1);
    }
    return source_fill(opaque, fill);
}

static struct kuf *open_slot(unsigned char **ram, uint32_t timeout)
{
    struct kuf *kuf = open_with((struct kuf_options){.fill = fill, .event = source_event, .opaque = &source,
                                                     .demand_run = page, .populate_run = page, .end_timeout_ms = timeout});
    *ram = map_anonymous(length);
    add(kuf, BASE, *ram, length);
    return kuf;
}

static void never_answered(void)
{
    unsigned char *ram;
    struct kuf *kuf = open_slot(&ram, SHORT_MS), *same = kuf;
    uint64_t begun = now_ns();
    is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE), -ETIMEDOUT, "a run is deferred and never resolved: the slot stays");
    ok(now_ns() - begun >= SHORT_MS * UINT64_C(1000000), "after the time, not before");
    ok(strstr(kuf_error(), "end_timeout_ms, 100") != NULL, "the text names the option: %s", kuf_error());
    is(kuf_close(&same, KUF_END_POPULATE), -ETIMEDOUT, "and so does the handle");
    ok(same == kuf, "which is not closed");
    is(progress_of(kuf, BASE).present, length - page, "all other pages are filled");
    is(progress_of(kuf, BASE).deferred, page, "one is owed still");
    is(atomic_load(&source.events[poison_event()]), 0, "nothing is poisoned");
    unsigned char *bytes = map_anonymous(page);
    write_content(bytes, BASE + BAD * page, page, 1);
    is(kuf_resolve(kuf, BASE + BAD * page, bytes, page, 0), page, "it is resolved afterwards");
    is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE), 0, "then the slot is removed");
    ok(holds_content(ram, BASE, length, 1), "with all its bytes");
    close_with(kuf, 0);

    for (int remove = 0; remove < 2; remove++) {
        const char *call = remove ? "kuf_remove_memory" : "kuf_close";
        int before = atomic_load(&source.events[poison_event()]);
        kuf = open_slot(&ram, SHORT_MS);
        if (remove)
            is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE | KUF_END_POISON), 0, "%s succeeds with KUF_END_POISON too", call);
        close_with(kuf, KUF_END_POPULATE | KUF_END_POISON);
        is(touch(ram + BAD * page), poison_signal(), "%s: the page is poisoned", call);
        is(atomic_load(&source.events[poison_event()]) - before, 1, "%s: and it is said", call);
        ok(holds_content(ram, BASE, BAD * page, 1), "%s: the others are filled", call);
    }
}

static void *touch_bad(void *ram)
{
    return (void *)(intptr_t)holds_content((unsigned char *)ram + BAD * page, BASE + BAD * page, page, 1);
}

/* A callback of a demand fault blocks on a service thread. */
static void stuck_elsewhere(void)
{
    unsigned char *ram;
    struct kuf *kuf = open_slot(&ram, SHORT_MS), *same = kuf;
    void *good;
    atomic_store(&stuck, true);
    pthread_t toucher = start(touch_bad, ram);
    wait_until(atomic_load(&inside) == 1);
    is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE), -ETIMEDOUT, "a callback on another thread blocks: the slot stays");
    is(kuf_close(&same, KUF_END_POPULATE), -ETIMEDOUT, "and the handle");
    atomic_store(&stuck, false);
    pthread_join(toucher, &good);
    ok(good != NULL, "which serve on");
    is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE), 0, "then the slot is removed");
    close_with(kuf, 0);
}

static void *wake(void *unused)
{
    (void)unused;
    wait_until(atomic_load(&inside) == 1);
    sleep_ms(10);
    atomic_store(&stuck, false);
    return NULL;
}

/* One that blocks in the call itself is looked at when it returns. */
static void stuck_here(void)
{
    unsigned char *ram;
    struct kuf *kuf = open_slot(&ram, 1);
    is(kuf_discard(kuf, BASE, BAD * page, KUF_DISCARD_ZERO), 0, "the first page to be filled is the one that blocks");
    atomic_store(&stuck, true);
    struct kuf *closed = kuf;
    pthread_t waker = start(wake, NULL);
    is(kuf_close(&closed, KUF_END_POPULATE), -ETIMEDOUT, "the time ran out in the callback");
    pthread_join(waker, NULL);
    is(progress_of(kuf, BASE).present, page, "the page that it has brought is present");
    close_with(kuf, KUF_END_POISON);
}

/* Without a limit it waits for the answer. */
static void *resolve_later(void *kuf)
{
    unsigned char *bytes = map_anonymous(page);
    struct kuf_fault fault;
    write_content(bytes, BASE + BAD * page, page, 1);
    wait_until(kuf_pending(kuf, &fault, 1) == 1 && fault.gpa == BASE + BAD * page && progress_of(kuf, BASE).absent == 0);
    ok(kuf_resolve(kuf, BASE + BAD * page, bytes, page, 0) > 0, "the owed run is resolved during the call");
    munmap(bytes, page);
    return NULL;
}

static void waited_for(uint32_t timeout, const char *what)
{
    unsigned char *ram;
    struct kuf *kuf = open_slot(&ram, timeout);
    pthread_t thread = start(resolve_later, kuf);
    is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE), 0, "%s: a run is waited for", what);
    pthread_join(thread, NULL);
    ok(holds_content(ram, BASE, length, 1), "%s: and all bytes are there", what);
    close_with(kuf, 0);
}

int main(void)
{
    begin();
    page = page_size();
    length = PAGES * page;
    never_answered();
    stuck_elsewhere();
    stuck_here();
    waited_for(0, "the default");
    waited_for(UINT32_MAX, "no limit");
    return done();
}
