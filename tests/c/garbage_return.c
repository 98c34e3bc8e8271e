/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A callback that returns a wrong value, or writes wrong values into its run, is a failed fill with -EPROTO: poison,
 * never wrong bytes.
 */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 16 };

static struct source source = SOURCE_INIT;
static _Atomic uint64_t filled;
static atomic_int answer;

static int fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    memset(fill->buf, 0xee, fill->len);
    if (atomic_load(&filled) != 1)
        fill->filled = atomic_load(&filled);
    return atomic_load(&answer);
}

int main(void)
{
    begin();
    static const struct {
        int answer;
        uint64_t filled; /* 1: not changed */
        const char *what;
    } cases[] = {
        {77, 1, "an unknown value"},
        {3, 1, "the value after KUF_FILL_DEFERRED"},
        {INT32_MAX, 1, "the largest value"},
        {KUF_FILL_DONE, 0, "KUF_FILL_DONE of nothing"},
        {KUF_FILL_DONE, 100, "KUF_FILL_DONE of a part of a page"},
        {KUF_FILL_DONE, 1 << 30, "KUF_FILL_DONE of more than was asked for"},
        {KUF_FILL_ZERO, 1 << 30, "KUF_FILL_ZERO of more than was asked for"},
    };
    enum { CASES = sizeof(cases) / sizeof(cases[0]) };
    size_t page = page_size();
    unsigned char *ram = map_anonymous(PAGES * page);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = fill, .event = source_event, .opaque = &source, .demand_run = page});
    add(kuf, BASE, ram, PAGES * page);
    for (int i = 0; i < CASES; i++) {
        atomic_store(&answer, cases[i].answer);
        atomic_store(&filled, cases[i].filled);
        is(touch(ram + i * page), poison_signal(), "%s: the page is poisoned", cases[i].what);
        wait_until(atomic_load(&source.events[poison_event()]) == i + 1);
        struct kuf_event event = last_event(&source, poison_event());
        is(event.error, -EPROTO, "%s: it is a protocol error", cases[i].what);
        is(event.gpa, BASE + i * page, "%s: of that page", cases[i].what);
    }
    static const int errors[] = {-EIO, -1, INT32_MIN, -4096};
    for (int i = 0; i < 4; i++) {
        atomic_store(&answer, errors[i]);
        atomic_store(&filled, 1);
        is(touch(ram + (CASES + i) * page), poison_signal(), "%d: the page is poisoned", errors[i]);
        wait_until(atomic_load(&source.events[poison_event()]) == CASES + i + 1);
        ok(last_event(&source, poison_event()).error < 0, "%d: the event has an error", errors[i]);
    }
    close_with(kuf, KUF_END_POISON);
    return done();
}
