/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A fill that fails for good poisons its page, reports to the caller which page and why, and does not harm its
 * neighbours.
 */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 64, BAD = 7 };

static void go(bool shared)
{
    const char *kind = kind_of(shared);
    static struct source sources[2] = {SOURCE_INIT, SOURCE_INIT};
    struct source *source = &sources[shared];
    size_t page = page_size();
    int fd;
    unsigned char *ram = map_kind(shared, PAGES * page, &fd);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = source, .demand_run = 16 * page});
    add_kind(kuf, BASE, ram, PAGES * page, fd);

    atomic_store(&source->bad_answer, -ENODATA);
    atomic_store(&source->bad_gpa, BASE + BAD * page);
    /* The first touch asks for a run that holds the bad page, for which no thread waits yet. */
    is(touch(ram), 0, "%s: a page beside the bad one is served", kind);
    is(atomic_load(&source->events[poison_event()]), 0, "%s: no thread waited for the bad one: nothing is poisoned", kind);
    is(touch(ram + BAD * page), poison_signal(), "%s: touching the bad one raises the signal", kind);
    is(touch(ram + BAD * page + page - 1), poison_signal(), "%s: again, anywhere in it", kind);
    wait_until(atomic_load(&source->events[poison_event()]) == 1);
    struct kuf_event event = last_event(source, poison_event());
    ok(event.gpa == BASE + BAD * page && event.len == page, "%s: the event names the page", kind);
    is(event.error, -ENODATA, "%s: and says why", kind);
    is(kuf_ensure(kuf, BASE + BAD * page, page, -1), -EHWPOISON, "%s: kuf_ensure knows it", kind);

    struct toucher before = {.memory = ram, .gpa = BASE, .length = BAD * page, .generation = 1};
    struct toucher after = {.memory = ram + (BAD + 1) * page, .gpa = BASE + (BAD + 1) * page,
                            .length = (PAGES - BAD - 1) * page, .generation = 1};
    start_toucher(&before);
    start_toucher(&after);
    ok(join_toucher(&before) && join_toucher(&after), "%s: every other page has its bytes", kind);

    comes_to(progress_of(kuf, BASE).present, (PAGES - 1) * page, "%s: the others are present", kind);
    struct kuf_progress_info progress = progress_of(kuf, BASE);
    is(progress.poisoned, page, "%s: one page is poisoned", kind);
    ok(!(progress.flags & KUF_PROGRESS_COMPLETE), "%s: the slot is not complete", kind);
    struct kuf_stats_info stats = stats_of(kuf);
    is(stats.bytes_poisoned, page, "%s: counted", kind);
    ok(stats.fills_failed >= 1, "%s: failed fills are counted", kind);
    is(atomic_load(&source->events[poison_event()]), 1, "%s: told once", kind);
    close_with(kuf, KUF_END_POISON);
    close(fd);
}

int main(void)
{
    begin();
    go(false);
    go(true);
    return done();
}
