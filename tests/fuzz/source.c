/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The callbacks of a handle, and the threads that resolve deferred runs and faults read with kuf_read.
 */
#include "fuzz.h"
#include <poll.h>

atomic_int released;
atomic_bool fatal_seen;
_Atomic uint64_t poison_events;

/*
 * place: where the bytes are to be written, for a run that is resolved in place. early: it was deferred before all
 * pages had been named that the last handler has filled. Such pages are the guest's by now, and are not written to.
 */
struct ticket {
    unsigned first, pages;
    uint8_t *place;
    bool early;
};

static pthread_mutex_t tickets_lock = PTHREAD_MUTEX_INITIALIZER;
static struct ticket tickets[16384];
static unsigned ticket_count;
static _Atomic uint64_t callback_count;

static uint64_t *callback_random(void)
{
    static _Thread_local uint64_t state;
    if (state == 0)
        state = mix(world->plan.seed ^ (atomic_fetch_add(&callback_count, 1) + 1) << 40) | 1;
    return &state;
}

static bool push_ticket(unsigned first, unsigned pages, uint8_t *place, bool early)
{
    pthread_mutex_lock(&tickets_lock);
    bool room = ticket_count < sizeof(tickets) / sizeof(tickets[0]);
    if (room)
        tickets[ticket_count++] = (struct ticket){first, pages, place, early};
    pthread_mutex_unlock(&tickets_lock);
    return room;
}

static bool pop_ticket(struct ticket *ticket)
{
    pthread_mutex_lock(&tickets_lock);
    bool any = ticket_count > 0;
    if (any)
        *ticket = tickets[--ticket_count];
    pthread_mutex_unlock(&tickets_lock);
    return any;
}

/* ---- The fill callback --------------------------------------------------------------------------------------------- */

static unsigned page_of(const struct slot *slot, uint64_t gpa)
{
    return slot->first + (unsigned)((gpa - slot->gpa) / slot->page_size);
}

static void check_run(const struct kuf_fill *run, const struct slot *slot)
{
    if (run->size < sizeof(*run) || run->page_size != slot->page_size || run->gpa < slot->gpa || run->len == 0 ||
        run->gpa % slot->page_size != 0 || run->len % slot->page_size != 0 ||
        run->gpa + run->len > slot->gpa + slot->length || run->memory_offset != run->gpa - slot->gpa ||
        run->filled != run->len || run->src != NULL || run->buf == NULL)
        fail("the fill callback is given gpa %#" PRIx64 " len %#" PRIx64 " filled %#" PRIx64 " granule %" PRIu64, run->gpa,
             run->len, run->filled, run->page_size);
}

/* Calls that a fill callback may make. */
static void call_from_callback(uint64_t *random, unsigned page)
{
    struct kuf *kuf = atomic_load(&fuzz_handle);
    struct kuf_stats_info stats = {.size = sizeof(stats)};
    struct kuf_progress_info progress = {.size = sizeof(progress)};
    struct kuf_fault owed[4];
    int got;
    switch (below(random, 4)) {
    case 0:
        (void)kuf_stats(kuf, &stats);
        break;
    case 1:
        (void)kuf_progress(kuf, KUF_ALL, &progress);
        break;
    case 2:
        (void)kuf_pending(kuf, owed, 4);
        break;
    default:
        got = kuf_ensure(kuf, gpa_of(page), slot_of(page)->page_size, 0);
        if (got != -EDEADLK && got != -EBADF && got != -ECANCELED)
            fail("kuf_ensure in a fill callback: %d", got);
    }
}

/* Writes the run up to the first page whose source fails. Returns the pages written. */
static unsigned write_run(struct kuf_fill *run, const struct slot *slot, unsigned first, unsigned pages, uint32_t *versions,
                          bool *all_zero)
{
    unsigned n = 0;
    *all_zero = true;
    for (; n < pages; n++) {
        uint32_t version = versions[n] = model_new_version(first + n);
        enum content content = content_of(first + n, version);
        if (content == CONTENT_BAD)
            break;
        *all_zero = *all_zero && content == CONTENT_ZERO;
        put_page((uint8_t *)run->buf + n * slot->page_size, first + n, version, slot->page_size);
    }
    return n;
}

/* A page of a shared file is whole for the next handler when a callback has written it, and not before. */
static bool names_whole_pages(const struct slot *slot)
{
    return world->plan.mode == MODE_REMOTE && slot->fd >= 0 && slot->backing != BACKING_SHARED_NO_FD;
}

/* Notes that a page is whole, unless it was dropped since `drops`. */
static void note_whole(unsigned page, uint32_t version, uint32_t drops)
{
    atomic_store(&world->whole[page], version);
    if (atomic_load(&world->drops[page]) != drops)
        atomic_store(&world->whole[page], 0);
}

void note_dropped(unsigned page)
{
    atomic_fetch_add(&world->drops[page], 1);
    atomic_store(&world->whole[page], 0);
}

int fuzz_fill(void *opaque, struct kuf_fill *run)
{
    const struct slot *slot = run->memory_opaque;
    uint64_t *random = callback_random();
    if (opaque != world)
        fail("the fill callback's opaque is %p", opaque);
    if (run->kuf != atomic_load(&fuzz_handle))
        fail("the fill callback's handle is %p", (void *)run->kuf);
    check_run(run, slot);
    atomic_fetch_add(&world->callbacks, 1);
    unsigned first = page_of(slot, run->gpa), pages = (unsigned)(run->len / slot->page_size);
    /* First: pages that are discarded later are asked for again, and the bytes that this call writes there are not used. */
    uint32_t versions[SLOT_PAGES], drops[SLOT_PAGES];
    for (unsigned i = 0; i < pages; i++)
        drops[i] = atomic_load(&world->drops[first + i]);
    if (below(random, 16) == 0)
        call_from_callback(random, first);
    /* Pages that the last handler has filled are named first. */
    if (atomic_load(&world->taking_over))
        return push_ticket(first, pages, names_whole_pages(slot) ? run->buf : NULL, true) ? KUF_FILL_DEFERRED : -EIO;
    if (world->plan.blocks && below(random, 8) == 0)
        sleep_us((long)below(random, 3000));
    if (!(run->flags & KUF_RUN_DEMAND) && below(random, 16) == 0) {
        if (below(random, 2))
            return -EAGAIN;
        /* The library may drop what an earlier fill has left there. */
        for (unsigned i = 0; i < pages; i++)
            note_dropped(first + i);
        return KUF_FILL_LATER;
    }
    if (world->plan.defers && below(random, 3) == 0 &&
        push_ticket(first, pages, names_whole_pages(slot) ? run->buf : NULL, false))
        return KUF_FILL_DEFERRED;
    bool zero;
    unsigned written = write_run(run, slot, first, pages, versions, &zero);
    if (below(random, 8) == 0)
        sched_yield();
    for (unsigned i = 0; i < written; i++)
        note_whole(first + i, versions[i], drops[i]);
    if (written == 0)
        return -EIO;
    if (written < pages)
        run->filled = written * slot->page_size;
    else if (pages > 1 && below(random, 8) == 0)
        run->filled = (1 + below(random, pages)) * slot->page_size;
    if (zero && run->filled == run->len && below(random, 2))
        return KUF_FILL_ZERO;
    return KUF_FILL_DONE;
}

/*
 * One event of each kind for each call that ends a slot or the handle, and for each slot that is added or forked while the
 * handle ends.
 */
static void check_end(const struct kuf_event *event)
{
    static atomic_uint count[2];
    const struct slot *slot = event->memory_opaque;
    bool whole = slot == NULL ? event->gpa == 0 && event->len == 0 : event->gpa == slot->gpa && event->len == slot->length;
    if (!whole)
        fail("an end is reported for %#" PRIx64 "+%#" PRIx64 ": %s", event->gpa, event->len, event->text);
    unsigned events = atomic_fetch_add(&count[event->kind == KUF_EVENT_POISONED], 1) + 1;
    if (events > atomic_load(&world->end_calls))
        fail("%u events of %u ends: %s", events, atomic_load(&world->end_calls), event->text);
}

void fuzz_event(void *opaque, const struct kuf_event *event)
{
    if (opaque != world || event->text == NULL || event->size < sizeof(*event))
        fail("the event callback is given %p, kind %u", opaque, event->kind);
    if (event->kind == KUF_EVENT_FATAL) {
        atomic_store(&fatal_seen, true);
        fail("KUF_EVENT_FATAL: %s", event->text);
    }
    /* After a failure the process of the memory ends. */
    if (event->kind == KUF_EVENT_GONE && !atomic_load(&world->failed))
        fail("KUF_EVENT_GONE while the memory's process lives: %s", event->text);
    bool lost = event->kind == KUF_EVENT_POISONED || event->kind == KUF_EVENT_INACCESSIBLE;
    if ((lost || event->kind == KUF_EVENT_COMPLETE) && event->len != 0) {
        const struct slot *slot = event->memory_opaque;
        if (slot < world->slot || slot >= world->slot + SLOTS || event->gpa < slot->gpa ||
            event->gpa + event->len > slot->gpa + slot->length)
            fail("event %u of %p is about %#" PRIx64 "+%#" PRIx64, event->kind, (const void *)slot, event->gpa, event->len);
    }
    if (lost && event->error == -ECANCELED)
        check_end(event);
    if (event->kind == KUF_EVENT_POISONED)
        atomic_fetch_add(&poison_events, 1);
}

void fuzz_release(void *opaque)
{
    (void)opaque;
    atomic_fetch_add(&released, 1);
}

void fuzz_log(void *opaque, uint32_t level, const char *text)
{
    if (opaque != world || level == 0 || level > KUF_LOG_DEBUG || text == NULL || strchr(text, '\n') != NULL)
        fail("the log callback is given level %u, %s", level, text ? text : "NULL");
}

/* ---- Threads that resolve ------------------------------------------------------------------------------------------ */

static void resolve_here(unsigned first, unsigned pages, uint64_t *random)
{
    struct operation_entry operation = {.kind = OP_RESOLVE, .slot = (uint8_t)(first / SLOT_PAGES),
                                        .page = (uint16_t)(first % SLOT_PAGES), .count = (uint16_t)pages,
                                        .argument = (uint32_t)next_random(random)};
    if (world->plan.failing_source && below(random, 16) == 0)
        operation.kind = OP_RESOLVE_POISON;
    if (perform(&operation) == -ENOMEM) {
        /* A thread that owes a page and cannot resolve it has to report that, or the touching thread waits. */
        sleep_us(1000);
        operation.kind = OP_RESOLVE_POISON;
        perform(&operation);
    }
}

static pthread_rwlock_t places = PTHREAD_RWLOCK_INITIALIZER;
static bool places_gone;

/* Writes the bytes in place, notes that the page is whole, and only then makes it present. */
static void resolve_in_place(unsigned first, unsigned pages, uint8_t *place)
{
    struct slot *slot = slot_of(first);
    pthread_rwlock_rdlock(&places);
    for (unsigned i = 0; i < pages && !places_gone; i++) {
        uint32_t drops = atomic_load(&world->drops[first + i]), version = model_new_version(first + i);
        int pending = model_begin(first + i, EFFECT_RESOLVE, version, 0);
        put_page(place + i * slot->page_size, first + i, version, slot->page_size);
        note_whole(first + i, version, drops);
        ssize_t got = kuf_resolve(atomic_load(&fuzz_handle), gpa_of(first + i), NULL, slot->page_size, KUF_RESOLVE_IN_PLACE);
        if (got < 0 && !atomic_load(&world->closed) && atomic_load(&world->closing) == 0)
            fail("page %u: KUF_RESOLVE_IN_PLACE of a deferred page: %zd, %s", first + i, got, kuf_error());
        model_end(first + i, pending, got > 0 ? OUTCOME_MADE : got == 0 ? OUTCOME_DONE : OUTCOME_UNKNOWN, NULL, 0);
    }
    pthread_rwlock_unlock(&places);
}

/* Stops writes in place before the end of a handle, which takes the places of deferred pages away. */
void leave_places(void)
{
    pthread_rwlock_wrlock(&places);
    places_gone = true;
    pthread_rwlock_unlock(&places);
}

static bool named[PAGES];

void note_named(unsigned page)
{
    named[page] = true;
}

/* Puts a part of a ticket back. */
static void push_part(const struct ticket *ticket, unsigned from, unsigned count)
{
    size_t size = slot_of(ticket->first)->page_size;
    if (count > 0)
        push_ticket(ticket->first + from, count, ticket->place ? ticket->place + from * size : NULL, ticket->early);
}

static void serve_ticket(struct ticket ticket, uint64_t *random)
{
    unsigned from = ticket.early ? 0 : (unsigned)below(random, ticket.pages);
    unsigned count = ticket.early ? 1 : 1 + (unsigned)below(random, ticket.pages - from);
    push_part(&ticket, 0, from);
    push_part(&ticket, from + count, ticket.pages - from - count);
    if (ticket.early && named[ticket.first])
        return;
    if (ticket.place != NULL)
        resolve_in_place(ticket.first + from, count, ticket.place + from * slot_of(ticket.first)->page_size);
    else
        resolve_here(ticket.first + from, count, random);
}

static unsigned page_at(uint64_t gpa)
{
    for (unsigned i = 0; i < world->plan.slots; i++) {
        struct slot *slot = &world->slot[i];
        if (gpa >= slot->gpa && gpa < slot->gpa + slot->length)
            return page_of(slot, gpa);
    }
    fail("kuf_read gives gpa %#" PRIx64 ", in no slot", gpa);
}

/* Waits for faults in one of the ways there are. */
static void wait_for_faults(struct kuf *kuf, uint64_t *random)
{
    unsigned before = closes_seen();
    if (below(random, 2)) {
        int got = kuf_poll(kuf, 5);
        if (got < 0)
            check_errno("kuf_poll", -got, (got == -EBADF || got == -ECANCELED) && close_explains(before), "kuf_poll");
        return;
    }
    int fd = kuf_fd(kuf);
    if (fd < 0)
        check_errno("kuf_fd", -fd, fd == -EBADF && close_explains(before), "kuf_fd");
    else
        poll(&(struct pollfd){.fd = fd, .events = POLLIN}, 1, 5);
}

static void read_faults(struct kuf *kuf, uint64_t *random)
{
    struct kuf_fault faults[8];
    unsigned before = closes_seen(), room = 1 + (unsigned)below(random, 8);
    ssize_t got = kuf_read(kuf, faults, room);
    if (got < 0)
        check_errno("kuf_read", (int)-got,
                    got == -EAGAIN || ((got == -EBADF || got == -ECANCELED) && close_explains(before)), "kuf_read");
    if (got > (ssize_t)room)
        fail("kuf_read returns %zd, of at most %u", got, room);
    for (ssize_t i = 0; i < got; i++) {
        unsigned page = page_at(faults[i].gpa);
        if (faults[i].len != slot_of(page)->page_size || faults[i].memory_opaque != slot_of(page) ||
            faults[i].memory_offset != faults[i].gpa - slot_of(page)->gpa)
            fail("page %u: kuf_read gives len %#" PRIx64 ", opaque %p", page, faults[i].len, faults[i].memory_opaque);
        if (below(random, 3) || !push_ticket(page, 1, NULL, false))
            resolve_here(page, 1, random);
    }
}

void *serve(void *argument)
{
    trace_index = THREADS + (unsigned)(uintptr_t)argument;
    uint64_t random = mix(world->plan.seed + 77 * trace_index);
    bool driven = world->plan.mode == MODE_DRIVEN || world->plan.mode == MODE_DIRECT;
    while (!atomic_load(&world->stop_serving)) {
        struct ticket ticket;
        struct kuf *kuf = atomic_load(&fuzz_handle);
        bool any = pop_ticket(&ticket);
        if (any)
            serve_ticket(ticket, &random);
        if (any && atomic_load(&world->taking_over))
            sleep_us(100);
        if (driven && kuf != NULL) {
            if (!any)
                wait_for_faults(kuf, &random);
            read_faults(kuf, &random);
        }
        if (!any && (!driven || atomic_load(&world->closed)))
            sleep_us(300);
    }
    return NULL;
}
