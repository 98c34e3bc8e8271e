/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Calls kuf_discard on its own thread. kuf_discard waits in madvise(2) until its event is read, as the guest's own
 * madvise does; if the userfaultfd cannot be read any more, it continues only when the handle is closed.
 */
#include "guest.h"

static struct {
    struct region *region;
    int from, count;
    uint32_t flags;
    long got;
    atomic_bool done, running;
    pthread_t thread;
} discard;

static void *do_discard(void *unused)
{
    (void)unused;
    mark_place(false, "discarding");
    uint64_t gpa = discard.region->gpa + (uint64_t)discard.from * page_size();
    discard.got = TRY(kuf_discard(kuf, gpa, (uint64_t)discard.count * page_size(), discard.flags));
    atomic_store(&discard.done, true);
    return NULL;
}

void drop(struct region *region, int from, int count, uint32_t flags)
{
    if (!atomic_load(&region->served) || stopped())
        return;
    bool removed = (flags & KUF_DISCARD_ZERO) != 0;
    set_pages(region, from, count, removed ? MAY_BE_ZERO : MAY_BE_NEW | MAY_BE_OLD);
    discard.region = region;
    discard.from = from;
    discard.count = count;
    discard.flags = flags;
    atomic_store(&discard.done, false);
    atomic_store(&discard.running, true);
    discard.thread = start(do_discard, NULL);
    if (!comes(atomic_load(&discard.done) || stopped()))
        end_with(SILENT, "kuf_discard does not return, and no event reported why");
    if (!atomic_load(&discard.done))
        return;
    end_discard();
    if (discard.got != 0)
        return;
    for (int page = from; page < from + count; page++)
        atomic_store(&region->poisoned[page], false);
    set_pages(region, from, count, removed ? IS_ZERO : MAY_BE_NEW);
}

void end_discard(void)
{
    if (!atomic_load(&discard.running))
        return;
    if (!comes(atomic_load(&discard.done)))
        end_with(SILENT, "kuf_close returned, but kuf_discard did not");
    pthread_join(discard.thread, NULL);
    atomic_store(&discard.running, false);
}
