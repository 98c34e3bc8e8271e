/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kuf_remove_memory: a complete slot is removed without a trace; one that is not is refused, poisoned or filled first.
 */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
#define OTHER UINT64_C(0x20000000)
enum { PAGES = 32 };

static struct source source = SOURCE_INIT;
static struct kuf *_Atomic in_event;
static atomic_int event_got = 1;

static void event(void *opaque, const struct kuf_event *event)
{
    struct kuf *kuf = atomic_load(&in_event);
    if (kuf != NULL && event->kind == KUF_EVENT_COMPLETE)
        atomic_store(&event_got, kuf_remove_memory(kuf, event->gpa, 0));
    source_event(opaque, event);
}

static void go(bool shared)
{
    const char *kind = kind_of(shared);
    size_t page = page_size(), length = PAGES * page;
    int fd;
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = source_fill, .event = event, .opaque = &source, .demand_run = page});
    unsigned char *ram = map_kind(shared, length, &fd);
    unsigned char *other = map_anonymous(length);
    add(kuf, OTHER, other, length);

    for (int round = 0; round < 2; round++) {
        if (shared)
            add_shared(kuf, BASE, ram, length, fd, KUF_MEMORY_FILL_ALL);
        else
            add_populated(kuf, BASE, ram, length);
        ok(is_registered(ram), "%s: a slot is registered", kind);
        if (round == 0) {
            ok(holds_content(ram, BASE, 3 * page, 1), "%s: some pages are touched", kind);
            is(kuf_remove_memory(kuf, BASE, 0), -EBUSY, "%s: a slot with absent pages is not let go", kind);
            ok(is_registered(ram), "%s: it is still registered", kind);
            ok(holds_content(ram, BASE, length, 1), "%s: and still served", kind);
            is(kuf_remove_memory(kuf, BASE, 0), 0, "%s: a complete one is let go", kind);
        } else {
            is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE), 0, "%s: added again, filled and let go", kind);
        }
        ok(!is_registered(ram), "%s: no registration is left", kind);
        ok(holds_content(ram, BASE, length, 1), "%s: its bytes stay", kind);
        struct kuf_progress_info progress = {.size = sizeof(progress)};
        is(kuf_progress(kuf, BASE, &progress), -ENOENT, "%s: the library does not know it any more", kind);
        is(kuf_remove_memory(kuf, BASE, 0), -ENOENT, "%s: nor lets it go twice", kind);
    }
    unsigned before = atomic_load(&source.calls);
    must(shared ? fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)length) == 0
                : madvise(ram, length, MADV_DONTNEED) == 0,
         "the caller drops its pages");
    ok(holds_zeroes(ram, length), "%s: it is ordinary memory: dropped pages read as zero", kind);
    is(atomic_load(&source.calls), before, "%s: without asking the source", kind);

    /* Poison: present pages stay, the others are poisoned. */
    if (shared)
        must(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)length) == 0, "an empty file");
    else
        must(madvise(ram, length, MADV_DONTNEED) == 0, "empty memory");
    add_kind(kuf, BASE, ram, length, fd);
    ok(holds_content(ram + 4 * page, BASE + 4 * page, 2 * page, 1), "%s: two pages are touched", kind);
    is(remove_patiently(kuf, BASE), 0, "%s: an incomplete slot is poisoned and let go", kind);
    ok(!is_registered(ram + 4 * page), "%s: no registration is left", kind);
    ok(holds_content(ram + 4 * page, BASE + 4 * page, 2 * page, 1), "%s: filled pages stay", kind);
    int raised = 0;
    for (int i = 0; i < PAGES; i++)
        raised += i != 4 && i != 5 && touch(ram + i * page) != 0;
    is(raised, PAGES - 2, "%s: every other page raises a signal", kind);
    ok(holds_content(other, OTHER, length, 1), "%s: the other slot is served all the while", kind);

    /* A source that fails: refused, or poisoned when told so. */
    unsigned char *third = map_anonymous(length);
    add(kuf, BASE, third, length);
    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.bad_gpa, BASE + 7 * page);
    is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE), -EIO, "%s: a page cannot be filled", kind);
    ok(is_registered(third + 7 * page), "%s: the slot goes on", kind);
    is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE | KUF_END_POISON), 0, "%s: filled where possible", kind);
    is(touch(third + 7 * page), poison_signal(), "%s: and poisoned where not", kind);
    ok(holds_content(third, BASE, 7 * page, 1) && holds_content(third + 8 * page, BASE + 8 * page, (PAGES - 8) * page, 1),
       "%s: all other pages have their bytes", kind);
    atomic_store(&source.bad_gpa, NO_GPA);

    /* A fill that is running holds its slot. */
    unsigned char *fourth = map_anonymous(length);
    add(kuf, BASE, fourth, length);
    atomic_store(&source.hold, true);
    struct toucher toucher = {.memory = fourth, .gpa = BASE, .length = page, .generation = 1};
    start_toucher(&toucher);
    wait_until(atomic_load(&source.inside) == 1);
    is(kuf_remove_memory(kuf, BASE, KUF_END_POISON), -EBUSY, "%s: not while a fill of it runs", kind);
    atomic_store(&source.hold, false);
    ok(join_toucher(&toucher), "%s: which ends as it should", kind);
    is(remove_patiently(kuf, BASE), 0, "%s: then it is let go", kind);

    /* Also when the caller has resolved its page, or the guest has given it back: the callback is still running. */
    unsigned char *bytes = map_anonymous(page), *again = map_anonymous(length);
    write_content(bytes, BASE, page, 1);
    for (int given_back = 0; given_back < 2 && !shared; given_back++) {
        const char *how = given_back ? "given back" : "resolved";
        add(kuf, BASE, again, length);
        atomic_store(&source.hold, true);
        toucher = (struct toucher){.memory = again, .gpa = BASE, .length = page, .generation = 1};
        start_toucher(&toucher);
        wait_until(atomic_load(&source.inside) == 1);
        if (given_back)
            is(madvise(again, page, MADV_DONTNEED), 0, "a page is given back while its fill runs");
        else
            is(kuf_resolve(kuf, BASE, bytes, page, 0), page, "a page is resolved while its fill runs");
        is(join_toucher(&toucher), !given_back, "%s: its toucher goes on", how);
        is(kuf_remove_memory(kuf, BASE, KUF_END_POISON), -EBUSY, "%s: the fill that runs on holds its slot", how);
        is(kuf_discard(kuf, BASE + page, (PAGES - 1) * page, KUF_DISCARD_ZERO), 0, "%s: the rest is given back", how);
        is(kuf_remove_memory(kuf, BASE, 0), -EBUSY, "%s: also when nothing of it is unresolved", how);
        atomic_store(&source.hold, false);
        is(remove_patiently(kuf, BASE), 0, "%s: it is let go when the fill has ended", how);
        is(atomic_load(&source.inside), 0, "%s: and not before", how);
        must(madvise(again, length, MADV_DONTNEED) == 0, "empty memory");
    }

    /* From the event that says it is complete. */
    unsigned char *fifth = map_anonymous(length);
    add(kuf, BASE, fifth, length);
    atomic_store(&event_got, 1);
    atomic_store(&in_event, kuf);
    ok(holds_content(fifth, BASE, length, 1), "%s: a slot is filled", kind);
    wait_until(atomic_load(&event_got) != 1);
    is(atomic_load(&event_got), 0, "%s: and let go by the event callback", kind);
    ok(!is_registered(fifth), "%s: no registration is left", kind);
    atomic_store(&in_event, NULL);
    close_with(kuf, 0);
    close(fd);
}

/* ---- Twice at once ------------------------------------------------------------------------------------------------- */

struct remover {
    struct kuf *kuf;
    unsigned char *ram;
    uint64_t gpa, next;
    atomic_int *begun;
    int got;
};

/* The thread that has removed the slot uses its memory for another one at once. */
static void *remove_one(void *argument)
{
    struct remover *remover = argument;
    atomic_fetch_add(remover->begun, 1);
    remover->got = remove_patiently(remover->kuf, remover->gpa);
    if (remover->got == 0)
        add_populated(remover->kuf, remover->next, remover->ram, page_size());
    return NULL;
}

static void twice_at_once(void)
{
    enum { ROUNDS = 100 };
    static struct source twice = SOURCE_INIT;
    size_t page = page_size();
    struct kuf *kuf = open_serviced(&twice);
    unsigned char *ram = map_anonymous(page);
    int removed = 0, refused = 0, registered = 0, served = 0;
    uint64_t gpa = BASE;
    add(kuf, gpa, ram, page);
    for (int round = 0; round < ROUNDS; round++, gpa ^= BASE ^ OTHER) {
        /* Both know the slot, and wait for the fill of its page. */
        atomic_int begun = 0;
        struct remover removers[2];
        pthread_t threads[2];
        struct toucher toucher = {.memory = ram, .gpa = gpa, .length = page, .generation = 1};
        atomic_store(&twice.hold, true);
        start_toucher(&toucher);
        wait_until(atomic_load(&twice.inside) == 1);
        for (int i = 0; i < 2; i++) {
            removers[i] = (struct remover){
                .kuf = kuf, .ram = ram, .gpa = gpa, .next = gpa ^ BASE ^ OTHER, .begun = &begun, .got = 1};
            threads[i] = start(remove_one, &removers[i]);
        }
        wait_until(atomic_load(&begun) == 2);
        sleep_ms(2);
        atomic_store(&twice.hold, false);
        served += join_toucher(&toucher);
        for (int i = 0; i < 2; i++)
            pthread_join(threads[i], NULL);
        removed += (removers[0].got == 0) + (removers[1].got == 0);
        refused += (removers[0].got == -ENOENT) + (removers[1].got == -ENOENT);
        registered += is_registered(ram);
        must(madvise(ram, page, MADV_DONTNEED) == 0, "the caller drops the page");
        must(kuf_discard(kuf, gpa ^ BASE ^ OTHER, page, KUF_DISCARD_REFILL) == 0, "which is absent in the new slot");
    }
    is(removed, ROUNDS, "twice at once: one call removes the slot");
    is(refused, ROUNDS, "twice at once: for the other there is none");
    is(registered, ROUNDS, "twice at once: the slot that has its memory next is left alone");
    is(served, ROUNDS, "twice at once: and served");
    close_with(kuf, KUF_END_POISON);
    munmap(ram, page);
}

int main(void)
{
    begin();
    go(false);
    twice_at_once();
    if (has_feature(KUF_FEATURE_MINOR))
        go(true);
    else
        skip_part("no minor faults on shared memory");
    return done();
}
