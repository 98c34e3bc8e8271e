/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * After kuf_remove_memory has returned 0 no event of the slot comes and no callback has its memory_opaque, whichever thread
 * completes or poisons its last page at that moment: populate, demand, kuf_resolve, or a second kuf_remove_memory.
 */
#include "harness.h"
#include "seeded.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 8, ROUNDS = 20000 };

/* The opaque of a slot; a round's is marked when its slot has gone. */
static struct name {
    atomic_bool gone;
} names[ROUNDS];

static atomic_uint late_events, late_fills, foreign, completes, lost, removals;
static struct kuf *kuf;
static unsigned char *ram;

static bool is_late(const void *memory_opaque)
{
    const struct name *name = memory_opaque;
    if (name < names || name >= names + ROUNDS) {
        atomic_fetch_add(&foreign, 1);
        return false;
    }
    return atomic_load(&name->gone);
}

static int fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    atomic_fetch_add(&late_fills, is_late(fill->memory_opaque));
    write_content(fill->buf, fill->gpa, fill->len, 1);
    sched_yield();
    atomic_fetch_add(&late_fills, is_late(fill->memory_opaque));
    return KUF_FILL_DONE;
}

static void event(void *opaque, const struct kuf_event *event)
{
    (void)opaque;
    if (event->kind == KUF_EVENT_POPULATED)
        return;
    atomic_fetch_add(&late_events, is_late(event->memory_opaque));
    atomic_fetch_add(event->kind == KUF_EVENT_COMPLETE ? &completes : &lost, 1);
    sched_yield();
    atomic_fetch_add(&late_events, is_late(event->memory_opaque));
}

struct remover {
    struct name *name;
    uint32_t flags;
};

/* Removes the slot, or finds that another thread has. */
static void *remove_slot(void *argument)
{
    struct remover *remover = argument;
    int got;
    while ((got = kuf_remove_memory(kuf, BASE, remover->flags)) == -EBUSY)
        sched_yield();
    if (got == 0) {
        atomic_store(&remover->name->gone, true);
        atomic_fetch_add(&removals, 1);
    } else {
        must(got == -ENOENT, "another thread has removed it: %s", kuf_error());
    }
    return NULL;
}

int main(void)
{
    begin();
    size_t page = page_size(), length = PAGES * page;
    uint64_t until = now_ns() + begin_seeded(3, 60) * 1000000000;
    unsigned round;
    unsigned char *bytes = malloc(length);
    write_content(bytes, BASE, length, 1);
    kuf = open_with((struct kuf_options){.fill = fill, .event = event, .fill_threads = 2});
    ram = map_anonymous(length);
    for (round = 0; round < ROUNDS && now_ns() < until; round++) {
        struct kuf_memory slot = {
            .size = sizeof(slot), .gpa = BASE, .len = length, .hva = (uintptr_t)ram, .opaque = &names[round]};
        int got;
        while ((got = kuf_add_memory(kuf, &slot)) == -EAGAIN)
            ;
        must(got == 0, "round %u: a slot is added: %s", round, got ? kuf_error() : "");
        uint32_t flags = below(2) ? KUF_END_POISON : 0;
        struct remover remover[2] = {{&names[round], flags}, {&names[round], flags}};
        struct kuf_populate_request request = {.size = sizeof(request), .gpa = BASE, .len = length};
        must(kuf_populate(kuf, &request) == 0, "round %u: populate", round);
        struct toucher toucher = {.memory = ram, .gpa = BASE, .length = page, .generation = 1};
        bool touches = below(2), twice = below(4) == 0;
        if (touches && flags == 0)
            start_toucher(&toucher);
        pthread_t second = 0;
        for (uint64_t yields = below(40); yields > 0; yields--)
            sched_yield();
        if (below(2))
            kuf_resolve(kuf, BASE, bytes, length, 0);
        if (twice)
            second = start(remove_slot, &remover[1]);
        remove_slot(&remover[0]);
        if (twice)
            pthread_join(second, NULL);
        if (touches && flags == 0)
            must(join_toucher(&toucher), "round %u: a touch reads the bytes", round);
        empty_again(ram, length);
    }
    is(atomic_load(&removals), round, "each slot is removed once");
    is(atomic_load(&late_events), 0, "no event of a slot came after its removal had returned 0");
    is(atomic_load(&late_fills), 0, "and no fill had its memory_opaque");
    is(atomic_load(&foreign), 0, "every callback had the name of a slot");
    ok(atomic_load(&completes) > 0, "slots became complete meanwhile (%u), and %u runs were lost", atomic_load(&completes),
       atomic_load(&lost));
    close_with(kuf, KUF_END_POISON);
    free(bytes);
    return done();
}
