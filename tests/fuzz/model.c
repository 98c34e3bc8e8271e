/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The model of a page: a set of possible states. An operation in progress may take effect at any moment between its
 * begin and its end, in any order with the others: the set holds every state that some order leads to (the
 * linearisations of the operations so far). When an operation ends with a result, the states that contradict it are
 * removed. If none is left, no order of the calls explains the result: the library or this model has a defect.
 *
 * A call over several pages is one operation for each page: no call promises to be one step for all its pages.
 */
#include "fuzz.h"

static void complain(unsigned page, const char *text)
{
    fail("page %u: %s", page, text);
}

void (*model_complains)(unsigned, const char *) = complain;

static const char *const kind_names[] = {"absent", "source", "zero", "poisoned", "nowhere", "fresh"};
static const char *const effect_names[] = {"read", "write", "discard", "discard removed", "resolve", "resolve zero",
                                           "resolve poison", "ensure", "give back", "unmap shared", "MADV_FREE", "unmap",
                                           "remove or close", "add", "map anew"};

static const char *const outcome_names[] = {"done", "made it present", "changed nothing", "failed half-way", "saw", "saw several"};

/* Threads of this process that hold a page's lock. When the process is to be killed, none may hold one. */
static atomic_int inside;
static atomic_bool stopped;

static void lock(struct page *page)
{
    atomic_fetch_add(&inside, 1);
    if (atomic_load(&stopped)) {
        atomic_fetch_sub(&inside, 1);
        for (;;)
            sleep_us(1000000);
    }
    for (unsigned n = 0; atomic_exchange_explicit(&page->lock, 1, memory_order_acquire); n++)
        if (n > 64)
            sched_yield();
}

static void unlock(struct page *page)
{
    atomic_store_explicit(&page->lock, 0, memory_order_release);
    atomic_fetch_sub(&inside, 1);
}

void model_stop_here(void)
{
    atomic_store(&stopped, true);
    while (atomic_load(&inside) != 0)
        sched_yield();
}

static void remember(struct page *page, uint8_t what, bool end, uint32_t argument, int result)
{
    const struct history *last = &page->history[(page->history_count - 1) % HISTORY_LENGTH];
    if (end && result == OUTCOME_REFUSED && page->history_count > 0 && !last->end && last->what == what &&
        last->trace == trace_index) {
        page->history_count--;
        return;
    }
    page->history[page->history_count++ % HISTORY_LENGTH] =
        (struct history){what, (uint8_t)trace_index, end, result, argument, now_ns()};
}

/* ---- States -------------------------------------------------------------------------------------------------------- */

static bool readable(const struct state *state)
{
    return state->kind == KIND_SOURCE || state->kind == KIND_ZERO;
}

/* Absent, or marked as poisoned in another process and absent to the library: a fill takes the mark's place. */
static bool waits_for_fill(const struct state *state)
{
    return state->kind == KIND_ABSENT || (state->kind == KIND_POISONED && state->flags & STATE_LAZY);
}

static bool has_value(const struct state *state)
{
    return readable(state) || state->kind == KIND_POISONED || state->kind == KIND_NOWHERE;
}

static struct value value_of(const struct state *state)
{
    return (struct value){state->kind, state->kind == KIND_SOURCE ? state->version : 0, readable(state) ? state->written : 0};
}

static bool same_value(const struct value *a, const struct value *b)
{
    return a->kind == b->kind && a->version == b->version && a->written == b->written;
}

static bool same_place(const struct state *a, const struct state *b)
{
    return a->kind == b->kind && a->flags == b->flags && a->version == b->version && a->written == b->written;
}

static bool looks(uint8_t effect)
{
    return effect == EFFECT_READ || effect == EFFECT_ENSURE || effect == EFFECT_WRITE;
}

static void saw(struct pending *pending, const struct state *state)
{
    struct value value = value_of(state);
    if (!has_value(state) || pending->seen_all)
        return;
    for (unsigned i = 0; i < pending->seen_count; i++)
        if (same_value(&pending->seen[i], &value))
            return;
    if (pending->seen_count == SEEN)
        pending->seen_all = true;
    else
        pending->seen[pending->seen_count++] = value;
}

static void insert(struct page *page, struct state state)
{
    if (page->lost)
        return;
    for (unsigned i = 0; i < page->count; i++)
        if (memcmp(&page->states[i], &state, sizeof(state)) == 0)
            return;
    if (page->count == STATES) {
        page->lost = true;
        atomic_fetch_add(&world->lossy, 1);
        return;
    }
    page->states[page->count++] = state;
}

/* Adds a state that `from` became. */
static void became(struct page *page, const struct state *from, struct state to)
{
    if (!same_place(from, &to))
        for (unsigned i = 0; i < PENDING; i++)
            if (page->pending[i].used && looks(page->pending[i].effect))
                to.moved |= (uint16_t)(1u << i);
    insert(page, to);
}

static void content(struct state *state, enum kind kind, uint32_t version)
{
    state->kind = (uint8_t)kind;
    state->version = version;
    state->written = 0;
    state->flags &= (uint8_t)~(STATE_LAZY | STATE_UNMARKED | STATE_NO_ROOM | STATE_FORGOTTEN);
}

/* The page holds the source's bytes of a version, which may be zeroes. */
static void holds_version(unsigned number, struct state *state, uint32_t version)
{
    bool zero = content_of(number, version) == CONTENT_ZERO;
    content(state, zero ? KIND_ZERO : KIND_SOURCE, zero ? 0 : version);
}

/*
 * The changes that need no call: a fill, a failed fill, the kernel taking a page after MADV_FREE, and a touch of
 * given-back memory that finds no room for the page of zeroes.
 */
static void by_itself(struct page *page, unsigned number, const struct state *from)
{
    if (from->kind == KIND_ZERO && from->written == 0 && atomic_load(&world->shortage)) {
        struct state to = *from;
        content(&to, KIND_POISONED, 0);
        to.flags |= world->plan.small_file_system ? STATE_NO_ROOM : 0;
        became(page, from, to);
    }
    if (from->kind == KIND_POISONED && from->flags & STATE_NO_ROOM && from->flags & STATE_FREE) {
        /* Outside slots only the kernel raises SIGBUS, as long as there is no room. */
        struct state to = *from;
        content(&to, KIND_ZERO, 0);
        became(page, from, to);
    }
    if (from->flags & STATE_FORGOTTEN && !(from->flags & STATE_FREE)) {
        struct state to = *from;
        content(&to, KIND_ABSENT, from->version);
        became(page, from, to);
    }
    if (from->kind == KIND_POISONED && from->flags & STATE_UNMARKED && world->plan.mode == MODE_REMOTE) {
        /* The page was given back, in memory of another process that the library cannot know to be shared. The mark is
         * still in the page table, until the library zeroes the page together with a neighbour. */
        struct state to = *from;
        content(&to, KIND_ZERO, 0);
        became(page, from, to);
    }
    if (from->flags & STATE_LAZY && from->kind != KIND_POISONED) {
        struct state to = *from;
        content(&to, KIND_ZERO, 0);
        became(page, from, to);
    }
    if (!waits_for_fill(from) || from->flags & STATE_FREE)
        return;
    bool fixed = slot_of(number)->fixed;
    uint32_t first = fixed ? 1 : from->version, last = fixed ? 1 : atomic_load(&page->version);
    bool may_fail = atomic_load(&world->shortage);
    for (uint32_t version = first; version <= last; version++) {
        struct state to = *from;
        if (content_of(number, version) == CONTENT_BAD) {
            may_fail = true;
            continue;
        }
        holds_version(number, &to, version);
        became(page, from, to);
    }
    if (may_fail) {
        struct state to = *from;
        content(&to, KIND_POISONED, 0);
        became(page, from, to);
    }
}

/* A kuf_resolve: it makes an absent page present, or its bytes are kept until the fill that is running has ended. */
static void resolved(struct page *page, const struct state *from, struct state to, uint16_t bit, enum kind kind,
                     uint32_t version, unsigned number)
{
    to.applied |= bit;
    if (from->kind == KIND_NOWHERE) {
        /* A page of a shared file may be filled although no thread of this process can see it. */
        struct state unseen = to;
        unseen.made |= bit;
        became(page, from, unseen);
    }
    if (from->kind == KIND_POISONED && kind == KIND_POISONED) {
        /* The end of the slot may have poisoned it a second time. */
        struct state twice = to;
        twice.made |= bit;
        became(page, from, twice);
    }
    if (!waits_for_fill(from) || from->flags & STATE_FREE) {
        became(page, from, to);
        return;
    }
    struct state later = to;
    if (kind == KIND_SOURCE && version < later.version)
        later.version = version;
    became(page, from, later);
    to.made |= bit;
    if (kind == KIND_SOURCE)
        holds_version(number, &to, version);
    else
        content(&to, kind, 0);
    became(page, from, to);
}

/* The mark of poison in another process cannot be taken away from here. */
static void stays_poisoned(struct page *page, const struct state *from, uint16_t bit, uint32_t version)
{
    struct state to = *from;
    if (from->kind != KIND_POISONED || world->plan.mode != MODE_REMOTE)
        return;
    to.applied |= bit;
    if (version != 0) {
        to.flags |= STATE_LAZY;
        to.version = version;
    }
    became(page, from, to);
}

static bool is_filled_in_place(unsigned number)
{
    uint8_t backing = slot_of(number)->backing;
    return backing == BACKING_SHARED || backing == BACKING_HUGE_SHARED;
}

/* Besides what the operation makes of it, a poisoned page may stay poisoned: its mark may be put back. */
static void may_keep_mark(struct page *page, const struct state *from, struct state stays, uint16_t bit, uint8_t flags)
{
    stays.flags |= flags;
    stays.applied |= bit;
    became(page, from, stays);
}

/* Applies a pending operation to a state. Some operations may take effect more than once. */
static void take_effect(struct page *page, unsigned number, const struct state *from, unsigned i)
{
    struct pending *pending = &page->pending[i];
    uint16_t bit = (uint16_t)(1u << i);
    bool again = from->applied & bit, free = from->flags & STATE_FREE;
    struct state to = *from;
    switch ((enum effect)pending->effect) {
    case EFFECT_READ:
    case EFFECT_ENSURE:
        return;
    case EFFECT_WRITE:
        if (again || !readable(from))
            return;
        to.written = pending->argument;
        to.flags &= (uint8_t)~STATE_LAZY;
        break;
    case EFFECT_DISCARD:
        if (free)
            return;
        stays_poisoned(page, from, bit, pending->argument);
        if (from->kind != KIND_NOWHERE)
            content(&to, KIND_ABSENT, pending->argument);
        break;
    case EFFECT_DISCARD_REMOVED:
        if (free)
            return;
        stays_poisoned(page, from, bit, 0);
        if (from->kind != KIND_NOWHERE)
            content(&to, KIND_ZERO, 0);
        break;
    case EFFECT_RESOLVE:
        if (!again)
            resolved(page, from, to, bit, KIND_SOURCE, pending->argument, number);
        return;
    case EFFECT_RESOLVE_ZERO:
        if (!again)
            resolved(page, from, to, bit, KIND_ZERO, 0, number);
        return;
    case EFFECT_RESOLVE_POISON:
        if (!again)
            resolved(page, from, to, bit, KIND_POISONED, 0, number);
        return;
    case EFFECT_GIVE_BACK:
        if (from->kind == KIND_NOWHERE)
            break;
        if (from->kind == KIND_POISONED)
            may_keep_mark(page, from, to, bit, free ? 0 : STATE_UNMARKED);
        content(&to, KIND_ZERO, 0);
        break;
    case EFFECT_UNMAP_SHARED:
        if (from->kind == KIND_ABSENT && !free)
            content(&to, KIND_ZERO, 0);
        if (from->kind == KIND_POISONED) {
            may_keep_mark(page, from, to, bit, free ? 0 : STATE_UNMARKED);
            content(&to, KIND_ZERO, 0);
        }
        break;
    case EFFECT_LAZY:
        if (from->kind == KIND_ABSENT && !free)
            content(&to, KIND_ZERO, 0);
        else if (from->kind == KIND_POISONED) {
            may_keep_mark(page, from, to, bit, 0);
            content(&to, KIND_ZERO, 0);
        } else if (readable(from))
            to.flags |= STATE_LAZY;
        break;
    case EFFECT_CUT:
        content(&to, KIND_NOWHERE, 0);
        break;
    case EFFECT_END:
        if (free && !(pending->flags & ENDS_HANDLE))
            return;
        if (from->kind == KIND_ABSENT && !(pending->flags & (KUF_END_POISON | KUF_END_HANDOVER)))
            return;
        if (from->kind == KIND_ZERO && from->written == 0 && pending->flags & KUF_END_POISON && is_filled_in_place(number)) {
            /* The page was given back while a callback was still writing to the page itself. */
            struct state poisoned = to;
            content(&poisoned, KIND_POISONED, 0);
            became(page, from, poisoned);
        }
        if (from->kind == KIND_ABSENT && pending->flags & KUF_END_POISON) {
            content(&to, KIND_POISONED, 0);
            /* The end poisons pages before it is done, and may fail after that. */
            became(page, from, to);
        }
        if (from->kind == KIND_POISONED && from->flags & STATE_UNMARKED) {
            struct state dropped = to;
            content(&dropped, KIND_ZERO, 0);
            dropped.flags |= STATE_FREE;
            dropped.applied |= bit;
            became(page, from, dropped);
        }
        to.flags |= STATE_FREE;
        break;
    case EFFECT_ADD:
        if (again || !free)
            return;
        if (from->kind == KIND_POISONED && !(from->flags & STATE_NO_ROOM) && !(pending->flags & FILLS_ALL) &&
            world->plan.mode != MODE_REMOTE)
            /* The library refuses memory that has a mark in its page table. */
            return;
        if (from->kind == KIND_ZERO && (from->written == 0 || pending->flags & ADDED_ANEW)) {
            /* The removed slot, or the last handler, knew that the page had been given back; the new one does not. */
            struct state forgotten = to;
            content(&forgotten, KIND_ABSENT, 1);
            forgotten.flags &= (uint8_t)~STATE_FREE;
            forgotten.applied |= bit;
            became(page, from, forgotten);
        }
        if (pending->flags & FILLS_ALL && from->kind != KIND_NOWHERE && from->kind != KIND_FRESH) {
            struct state emptied = to;
            content(&emptied, KIND_ABSENT, pending->argument);
            emptied.flags &= (uint8_t)~STATE_FREE;
            emptied.applied |= bit;
            became(page, from, emptied);
            if (from->kind == KIND_POISONED && world->plan.mode != MODE_REMOTE)
                return;
        }
        if (from->kind == KIND_FRESH)
            content(&to, KIND_ABSENT, pending->argument);
        to.flags &= (uint8_t)~STATE_FREE;
        if (from->kind == KIND_POISONED && world->plan.mode == MODE_REMOTE) {
            /* The mark stays; the next handler takes the page for absent. */
            to.flags |= STATE_LAZY;
            to.version = pending->argument;
        }
        if (pending->flags & FILLS_ALL && world->plan.mode == MODE_REMOTE && readable(from)) {
            to.flags |= STATE_FORGOTTEN;
            to.version = from->kind == KIND_ZERO ? pending->argument : from->version;
        }
        break;
    case EFFECT_RESET:
        content(&to, KIND_FRESH, 0);
        to.flags = STATE_FREE;
        break;
    }
    to.applied |= bit;
    became(page, from, to);
}

/* Adds every state that may have been reached, and shows them to the reads in progress. */
static void close_over(struct page *page, unsigned number)
{
    for (unsigned n = 0; n < page->count && !page->lost; n++) {
        struct state from = page->states[n];
        by_itself(page, number, &from);
        for (unsigned i = 0; i < PENDING; i++)
            if (page->pending[i].used)
                take_effect(page, number, &from, i);
    }
    for (unsigned i = 0; i < PENDING; i++)
        if (page->pending[i].used && looks(page->pending[i].effect))
            for (unsigned n = 0; n < page->count; n++)
                saw(&page->pending[i], &page->states[n]);
}

/* ---- Operations ---------------------------------------------------------------------------------------------------- */

void model_reset(void)
{
    for (unsigned number = 0; number < PAGES; number++) {
        struct page *page = &world->pages[number];
        memset(page, 0, sizeof(*page));
        atomic_store(&page->version, 1);
        page->count = 1;
        page->states[0] = (struct state){.kind = KIND_FRESH, .flags = STATE_FREE};
    }
}

uint32_t model_new_version(unsigned number)
{
    return atomic_load(&world->pages[number].version);
}

int model_begin(unsigned number, enum effect effect, uint32_t argument, uint32_t flags)
{
    struct page *page = &world->pages[number];
    int found = NOT_TRACKED;
    lock(page);
    for (int i = 0; i < PENDING && found == NOT_TRACKED; i++)
        if (!page->pending[i].used)
            found = i;
    if (effect == EFFECT_DISCARD)
        argument = atomic_fetch_add(&page->version, 1) + 1;
    if (effect == EFFECT_ADD)
        argument = atomic_load(&page->version);
    remember(page, (uint8_t)effect, false, argument, 0);
    if (found == NOT_TRACKED) {
        page->lost = true;
        atomic_fetch_add(&world->lossy, 1);
    } else {
        struct pending *pending = &page->pending[found];
        pending->used = true;
        pending->seen_all = false;
        pending->effect = (uint8_t)effect;
        pending->seen_count = 0;
        pending->argument = argument;
        pending->flags = flags;
        pending->process = getpid();
        pending->changes = page->changes += effect != EFFECT_READ && effect != EFFECT_ENSURE;
        pending->began_with = 0;
        for (unsigned i = 0; i < PENDING; i++)
            pending->began_with += page->pending[i].used && page->pending[i].effect != EFFECT_READ &&
                                   page->pending[i].effect != EFFECT_ENSURE;
        close_over(page, number);
    }
    unlock(page);
    return found;
}

static bool was_seen(const struct pending *pending, const struct value *value, bool whole)
{
    if (pending->seen_all)
        return true;
    for (unsigned i = 0; i < pending->seen_count; i++) {
        const struct value *seen = &pending->seen[i];
        if (whole ? same_value(seen, value)
                  : (value->written != 0 ? seen->written == value->written
                                         : seen->kind == value->kind && seen->version == value->version))
            return true;
    }
    return false;
}

/* Whether a madvise has begun: the library may know of it before the kernel has dropped a page. */
static bool is_given_back(const struct page *page)
{
    bool found = false;
    for (unsigned i = 0; i < PENDING; i++)
        found = found || (page->pending[i].used && (page->pending[i].effect == EFFECT_GIVE_BACK || page->pending[i].effect == EFFECT_LAZY));
    return found;
}

static bool agrees(const struct page *page, const struct pending *pending, const struct state *state, uint16_t bit,
                   enum outcome outcome, const struct value *value)
{
    switch (outcome) {
    case OUTCOME_DONE:
        if (pending->effect == EFFECT_ENSURE)
            return readable(state) || state->kind == KIND_NOWHERE || state->moved & bit ||
                   (state->kind == KIND_POISONED && (world->plan.mode == MODE_REMOTE || is_given_back(page)));
        return state->applied & bit;
    case OUTCOME_MADE:
        return state->made & bit;
    case OUTCOME_REFUSED:
        return !(state->applied & bit);
    case OUTCOME_VALUE: {
        struct value here = value_of(state);
        if (pending->effect == EFFECT_WRITE && state->applied & bit)
            return false;
        return (has_value(state) && same_value(&here, value)) || state->moved & bit;
    }
    case OUTCOME_UNKNOWN:
    case OUTCOME_MIXED:
        return true;
    }
    return true;
}

/* Whether every value read from the page was possible, whatever its present state. */
static bool looks_right(const struct page *page, const struct pending *pending, enum outcome outcome,
                        const struct value *values, unsigned count)
{
    bool filled_again = false;
    for (unsigned i = 0; i < page->count; i++)
        filled_again = filled_again || page->states[i].flags & STATE_FORGOTTEN;
    if (outcome == OUTCOME_MIXED && count > 1 && pending->began_with == 0 && page->changes == pending->changes &&
        !pending->seen_all && !filled_again)
        return false;
    if (outcome != OUTCOME_MIXED && outcome != OUTCOME_VALUE)
        return true;
    for (unsigned i = 0; i < count; i++)
        if (!was_seen(pending, &values[i], outcome == OUTCOME_VALUE))
            return false;
    return true;
}

void model_end(unsigned number, int index, enum outcome outcome, const struct value *values, unsigned count)
{
    struct page *page = &world->pages[number];
    if (index == NOT_TRACKED)
        return;
    lock(page);
    struct pending *pending = &page->pending[index];
    uint16_t bit = (uint16_t)(1u << index);
    bool right = page->lost || looks_right(page, pending, outcome, values, count);
    unsigned kept = 0;
    for (unsigned n = 0; n < page->count && right; n++)
        kept += agrees(page, pending, &page->states[n], bit, outcome, values);
    remember(page, pending->effect, true, count > 0 ? (uint32_t)values[0].kind << 24 | (values[0].version & 0xfff) << 12 | (values[0].written & 0xfff)
                                                        : pending->argument,
             (int)outcome);
    if (!page->lost && (!right || kept == 0)) {
        /* Leave the page as it is, to describe it. */
        char text[512];
        int at = snprintf(text, sizeof(text), "no order of the calls explains that '%s' %s", effect_names[pending->effect],
                          outcome_names[outcome]);
        for (unsigned i = 0; i < count && outcome != OUTCOME_UNKNOWN && at < 400; i++)
            at += snprintf(text + at, sizeof(text) - (size_t)at, "%s %s, version %u, written %u", i ? "," : "",
                           kind_names[values[i].kind], values[i].version, values[i].written);
        unlock(page);
        model_complains(number, text);
        return;
    }
    struct state old[STATES];
    unsigned n_old = page->count;
    memcpy(old, page->states, sizeof(old[0]) * n_old);
    page->count = 0;
    bool alone = true;
    for (int i = 0; i < PENDING; i++)
        alone = alone && (i == index || !page->pending[i].used);
    if (page->lost && alone && pending->effect == EFFECT_RESET) {
        page->lost = false;
        insert(page, (struct state){.kind = KIND_FRESH, .flags = STATE_FREE});
    } else {
        for (unsigned n = 0; n < n_old; n++)
            if (page->lost || agrees(page, pending, &old[n], bit, outcome, values)) {
                old[n].applied &= (uint16_t)~bit;
                old[n].made &= (uint16_t)~bit;
                old[n].moved &= (uint16_t)~bit;
                insert(page, old[n]);
            }
    }
    pending->used = false;
    unlock(page);
}

/* A process was killed: the operations that it had begun may have happened or not, and will not happen any more. */
void model_forget(pid_t process)
{
    for (unsigned number = 0; number < PAGES; number++)
        for (int i = 0; i < PENDING; i++) {
            struct page *page = &world->pages[number];
            /* A thread that lives may be about to use what the process has had before. */
            lock(page);
            bool its = page->pending[i].used && page->pending[i].process == process;
            unlock(page);
            if (its)
                model_end(number, i, OUTCOME_UNKNOWN, NULL, 0);
        }
}

bool model_may_be(unsigned number, enum kind kind)
{
    struct page *page = &world->pages[number];
    bool may = page->lost;
    lock(page);
    for (unsigned n = 0; n < page->count; n++)
        may = may || page->states[n].kind == kind;
    unlock(page);
    return may;
}

void model_describe(unsigned number)
{
    struct page *page = &world->pages[number];
    printf("    page %u (gpa %#" PRIx64 ") may be, of source version %u%s:\n", number, gpa_of(number),
           atomic_load(&page->version), page->lost ? ", NOT CHECKED" : "");
    for (unsigned n = 0; n < page->count && n < 24; n++)
        printf("        %s version %u written %u%s%s applied %#x moved %#x\n", kind_names[page->states[n].kind],
               page->states[n].version, page->states[n].written, page->states[n].flags & STATE_FREE ? " free" : "",
               page->states[n].flags & STATE_LAZY ? " lazy" : "", page->states[n].applied, page->states[n].moved);
    for (unsigned i = 0; i < PENDING; i++)
        if (page->pending[i].used)
            printf("        under way (bit %u): %s %u flags %#x\n", i, effect_names[page->pending[i].effect],
                   page->pending[i].argument, page->pending[i].flags);
    for (unsigned n = page->history_count > HISTORY_LENGTH ? page->history_count - HISTORY_LENGTH : 0;
         n < page->history_count; n++) {
        struct history *entry = &page->history[n % HISTORY_LENGTH];
        printf("        %" PRIu64 " us, thread %u: %s of %s, %#x%s%s\n", entry->at_ns / 1000, entry->trace,
               entry->end ? "end" : "begin", effect_names[entry->what], entry->argument, entry->end ? ", " : "",
               entry->end ? outcome_names[entry->result] : "");
    }
}
