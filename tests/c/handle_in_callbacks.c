/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Callbacks get the handle that kuf_open returns, and events the kuf_memory.opaque of the slot that they are about. */
#include "harness.h"

#define LOW UINT64_C(0x10000000)
#define HIGH UINT64_C(0x20000000)
enum { PAGES = 16 };

static struct source source = SOURCE_INIT;
static struct kuf *_Atomic opened;
static atomic_int foreign;
static char low_name, high_name;

/* Knows the handle from its argument only. */
static int fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    if (fill->gpa == LOW + page_size())
        return -EIO;
    unsigned char *bytes = malloc(fill->len);
    write_content(bytes, fill->gpa, fill->len, 1);
    ssize_t got = kuf_resolve(fill->kuf, fill->gpa, bytes, fill->len, 0);
    free(bytes);
    if (fill->kuf != atomic_load(&opened) || got != (ssize_t)fill->len)
        atomic_fetch_add(&foreign, 1);
    return KUF_FILL_DEFERRED;
}

static void event(void *opaque, const struct kuf_event *event)
{
    struct kuf_progress_info progress = {.size = sizeof(progress)};
    if (event->kuf != atomic_load(&opened) || kuf_progress(event->kuf, KUF_ALL, &progress) != 0)
        atomic_fetch_add(&foreign, 1);
    source_event(opaque, event);
}

/* Events of a request are the handle's, those of a slot name it. */
static void other_slot(void)
{
    size_t page = page_size(), length = PAGES * page;
    unsigned char *high = map_anonymous(length);
    struct kuf_memory slot = {
        .size = sizeof(slot), .gpa = HIGH, .len = length, .hva = (uintptr_t)high, .opaque = &high_name};
    struct kuf *kuf = atomic_load(&opened);
    is(kuf_add_memory(kuf, &slot), 0, "a second slot is added");
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = HIGH, .len = length};
    is(kuf_populate(kuf, &request), 0, "and filled");
    wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) == 1);
    ok(last_event(&source, KUF_EVENT_POPULATED).memory_opaque == NULL, "a request is the handle's: no slot is named");
    wait_until(atomic_load(&source.events[KUF_EVENT_COMPLETE]) == 1);
    ok(last_event(&source, KUF_EVENT_COMPLETE).memory_opaque == &high_name, "KUF_EVENT_COMPLETE names its slot");
}

int main(void)
{
    begin();
    size_t page = page_size(), length = PAGES * page;
    unsigned char *low = map_anonymous(length);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = fill, .event = event, .release = source_release, .opaque = &source, .demand_run = page});
    atomic_store(&opened, kuf);
    struct kuf_memory slot = {
        .size = sizeof(slot), .gpa = LOW, .len = length, .hva = (uintptr_t)low, .opaque = &low_name};
    is(kuf_add_memory(kuf, &slot), 0, "a slot is added");
    ok(holds_content(low, LOW, page, 1), "a callback resolves its run with fill->kuf");
    is(touch(low + page), poison_signal(), "a page fails");
    wait_until(atomic_load(&source.events[poison_event()]) == 1);
    ok(last_event(&source, poison_event()).memory_opaque == &low_name, "the event of a poisoned page names its slot");
    is(kuf_resolve(kuf, LOW + 2 * page, NULL, page, KUF_RESOLVE_POISON), page, "another is poisoned by kuf_resolve");
    is(atomic_load(&source.events[poison_event()]), 2, "with an event");
    ok(last_event(&source, poison_event()).memory_opaque == &low_name, "which names its slot too");
    other_slot();
    is(atomic_load(&foreign), 0, "every callback has had the handle, and calls with it work");
    close_with(kuf, KUF_END_POISON | KUF_END_POPULATE);
    is(kuf_pending(kuf, NULL, 0), -EBADF, "a callback that kept the handle gets -EBADF after kuf_close");
    return done();
}
