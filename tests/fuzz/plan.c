/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Turns a seed into a round: only the seed decides the operations of each thread and their order. The scheduler decides
 * which of them meet.
 */
#include "fuzz.h"

const char *const mode_names[] = {"serviced", "sources", "caller-driven", "direct", "adopted", "forking", "remote"};
const char *const backing_names[] = {"private", "shared", "shared without its descriptor", "huge private", "huge shared"};
const char *const operation_names[] = {
    "read", "write", "discard", "discard removed", "resolve", "resolve zero", "resolve poison", "resolve present",
    "ensure", "vcpu_fault", "populate", "populate stop", "MADV_DONTNEED", "MADV_REMOVE", "MADV_FREE", "remove_memory",
    "add_memory", "add again", "unmap", "mremap", "fork", "bad argument", "query", "record", "replay", "close", "hand over", "pause",
};

/* The frequency of each operation, and the modes it may come in, a bit each. */
#define EVERY ((1 << MODES) - 1)
#define WITH_EVENTS (EVERY & ~(1 << MODE_DIRECT))
#define ONE_PROCESS (EVERY & ~(1 << MODE_REMOTE))
static const struct {
    uint8_t weight, modes;
} table[OP_KINDS] = {
    [OP_READ] = {30, EVERY},
    [OP_WRITE] = {14, EVERY},
    [OP_DISCARD] = {8, EVERY},
    [OP_DISCARD_REMOVED] = {5, EVERY},
    [OP_RESOLVE] = {6, EVERY},
    [OP_RESOLVE_ZERO] = {2, EVERY},
    [OP_RESOLVE_POISON] = {1, EVERY},
    [OP_RESOLVE_PRESENT] = {1, EVERY},
    [OP_ENSURE] = {5, EVERY},
    [OP_VCPU_FAULT] = {1, EVERY},
    [OP_POPULATE] = {3, EVERY},
    [OP_POPULATE_STOP] = {1, EVERY},
    [OP_DONTNEED] = {5, WITH_EVENTS},
    [OP_MADV_REMOVE] = {3, WITH_EVENTS},
    [OP_MADV_FREE] = {1, WITH_EVENTS},
    [OP_REMOVE_MEMORY] = {2, ONE_PROCESS},
    [OP_ADD_MEMORY] = {4, ONE_PROCESS},
    [OP_ADD_AGAIN] = {1, ONE_PROCESS},
    [OP_UNMAP] = {1, WITH_EVENTS & ONE_PROCESS & ~(1 << MODE_FORKING)},
    [OP_MREMAP] = {1, WITH_EVENTS & ONE_PROCESS & ~(1 << MODE_FORKING)},
    [OP_FORK] = {1, ONE_PROCESS},
    [OP_BAD_ARGUMENT] = {3, EVERY},
    [OP_QUERY] = {4, EVERY},
    [OP_RECORD] = {1, EVERY},
    [OP_REPLAY] = {1, EVERY},
    [OP_CLOSE] = {0, ONE_PROCESS},
    [OP_HAND_OVER] = {2, 1 << MODE_REMOTE},
    [OP_PAUSE] = {3, EVERY},
};

/* Whether an operation takes long or costs a round much. */
static bool rare(unsigned kind)
{
    return kind == OP_FORK || kind == OP_UNMAP || kind == OP_HAND_OVER || kind == OP_MREMAP;
}

static unsigned choose(const struct plan *plan, uint64_t *random, const unsigned favourites[2], bool calm)
{
    for (;;) {
        unsigned kind = (unsigned)below(random, OP_KINDS);
        if (below(random, 10) < 4)
            kind = favourites[below(random, 2)];
        else if (below(random, 30) >= table[kind].weight)
            continue;
        if (rare(kind) && below(random, 6) != 0)
            continue;
        if (calm && (kind == OP_UNMAP || kind == OP_CLOSE))
            continue;
        if (table[kind].modes & 1 << plan->mode)
            return kind;
    }
}

static void plan_slots(struct plan *plan, uint64_t *random, uint64_t without)
{
    plan->slots = (uint8_t)(1 + below(random, SLOTS));
    for (unsigned i = 0; i < plan->slots; i++) {
        struct slot_plan *slot = &plan->slot[i];
        uint64_t kind = below(random, 20);
        slot->backing = kind < 9 ? BACKING_PRIVATE : kind < 16 ? BACKING_SHARED : kind < 18 ? BACKING_SHARED_NO_FD
                        : kind < 19 ? BACKING_HUGE_PRIVATE : BACKING_HUGE_SHARED;
        if (without & WITHOUT_BACKING(slot->backing))
            slot->backing = BACKING_PRIVATE;
        bool huge = slot->backing >= BACKING_HUGE_PRIVATE;
        slot->pages = (uint16_t)(huge ? 2 + below(random, 4) : 2 + below(random, below(random, 3) ? 12 : SLOT_PAGES - 1));
        /* The library waits two seconds for each page that finds no room. */
        if (plan->small_file_system && slot->pages > 8)
            slot->pages = 8;
        slot->source = plan->mode == MODE_SOURCES || (plan->mode == MODE_SERVICED && below(random, 6) == 0)
                           ? (uint8_t)(KUF_SOURCE_FILE + below(random, 3)) : 0;
        slot->huge_wish = slot->backing == BACKING_PRIVATE && below(random, 8) == 0;
        slot->layers = slot->source == KUF_SOURCE_FILE && below(random, 2) == 0;
    }
}

static void plan_options(struct plan *plan, uint64_t *random)
{
    struct kuf_options *options = &plan->options;
    options->size = sizeof(*options);
    options->log_level = KUF_LOG_DEBUG;
    bool serviced = plan->mode == MODE_SERVICED || plan->mode == MODE_SOURCES || plan->mode == MODE_ADOPTED ||
                    plan->mode == MODE_FORKING || plan->mode == MODE_REMOTE;
    if (serviced) {
        options->fill_threads = (uint32_t)below(random, 5);
        options->demand_run = below(random, 3) ? SMALL_PAGE << below(random, 10) : 0;
        options->populate_run = below(random, 3) ? SMALL_PAGE << below(random, 7) : 0;
    }
    static const uint32_t timeouts[] = {0, 0, 1, 30, UINT32_MAX};
    options->end_timeout_ms = timeouts[below(random, 5)];
    if (plan->mode != MODE_DIRECT && below(random, 4) == 0)
        options->spin_us = (uint32_t)below(random, 200);
    if (plan->mode < MODE_DIRECT)
        options->userfaultfds = (uint32_t)below(random, 4);
    if (plan->mode == MODE_DIRECT)
        options->flags |= KUF_OPEN_DIRECT;
    if (plan->mode == MODE_DRIVEN)
        options->flags |= KUF_OPEN_CALLER_DRIVEN;
    if (plan->mode == MODE_SOURCES)
        options->flags |= KUF_OPEN_SOURCES;
    if (plan->mode == MODE_FORKING)
        options->flags |= KUF_OPEN_FOLLOW_FORK;
    if (plan->mode == MODE_ADOPTED || plan->mode == MODE_REMOTE)
        options->flags |= KUF_OPEN_ADOPT_ONLY;
    if (plan->detect_zero)
        options->flags |= KUF_OPEN_DETECT_ZERO;
}

static struct operation_entry plan_operation(struct plan *plan, uint64_t *random, const unsigned favourites[2], bool calm)
{
    struct operation_entry operation = {.kind = (uint8_t)choose(plan, random, favourites, calm)};
    operation.slot = (uint8_t)below(random, plan->slots);
    unsigned pages = plan->slot[operation.slot].pages;
    operation.page = (uint16_t)below(random, below(random, 2) || pages < 4 ? pages : 4);
    unsigned left = pages - operation.page;
    operation.count = (uint16_t)(below(random, 2) ? 1 : 1 + below(random, below(random, 4) && left > 8 ? 8 : left));
    operation.argument = (uint32_t)next_random(random);
    return operation;
}

/* `without`: kinds of operations, a bit for each, that are left out. */
void make_plan(struct plan *plan, uint64_t seed, int mode, uint64_t without)
{
    uint64_t random = mix(seed ^ 0x5eed);
    memset(plan, 0, sizeof(*plan));
    plan->seed = seed;
    uint64_t number = below(&random, 18);
    plan->mode = (uint8_t)(number < 6 ? MODE_SERVICED : number < 8 ? MODE_SOURCES : number < 10 ? MODE_DRIVEN
                           : number < 12 ? MODE_DIRECT : number < 15 ? MODE_ADOPTED
                           : number < 16 ? MODE_FORKING : MODE_REMOTE);
    if (mode >= 0)
        plan->mode = (uint8_t)mode;
    plan->detect_zero = below(&random, 4) == 0;
    plan->failing_source = below(&random, 3) == 0;
    plan->defers = below(&random, 3) == 0;
    plan->blocks = below(&random, 3) == 0;
    plan->signals = below(&random, 4) == 0;
    plan->few_descriptors = below(&random, 12) == 0;
    plan->small_file_system = below(&random, 24) == 0;
    plan->restarts = (uint8_t)below(&random, HANDLERS);
    if (plan->mode == MODE_REMOTE)
        plan->detect_zero = plan->few_descriptors = plan->small_file_system = false;
    plan->close_flags = (uint16_t)below(&random, 8);
    plan_slots(plan, &random, without);
    plan_options(plan, &random);
    plan->threads = (uint8_t)(2 + below(&random, THREADS - 1));
    plan->operations = 0;
    bool calm = below(&random, 3) != 0, one_thread_ends = below(&random, 4) == 0;
    unsigned favourites[2];
    for (unsigned i = 0; i < 2; i++)
        do
            favourites[i] = (unsigned)below(&random, OP_KINDS);
        while (!(table[favourites[i]].modes & 1 << plan->mode));
    uint16_t length = (uint16_t)(20 + below(&random, OPERATIONS - 19));
    for (unsigned thread = 0; thread < plan->threads; thread++) {
        plan->lengths[thread] = length;
        for (unsigned i = 0; i < length; i++)
            plan->list[thread][i] = plan_operation(plan, &random, favourites, calm);
    }
    /* Every op that ends the handle stands near the end of a list. */
    for (unsigned thread = 0; thread < plan->threads; thread++)
        for (unsigned i = 0; i < length; i++)
            if (plan->list[thread][i].kind == OP_CLOSE && i < length * 3u / 4)
                plan->list[thread][i].kind = OP_READ;
    if (one_thread_ends)
        plan->list[0][length - 1].kind = OP_CLOSE;
    for (unsigned thread = 0; thread < plan->threads; thread++)
        for (unsigned i = 0; i < length; i++)
            if (without & UINT64_C(1) << plan->list[thread][i].kind)
                plan->left_out[thread][i] = true;
}

void describe_operation(const struct operation_entry *operation)
{
    printf("%s slot %u pages %u+%u argument %#x", operation_names[operation->kind], operation->slot, operation->page,
           operation->count, operation->argument);
}

void describe_plan(const struct plan *plan)
{
    const struct kuf_options *o = &plan->options;
    printf("# seed %" PRIu64 ": %s, %u threads of %u operations%s%s%s%s%s%s%s; fill_threads %u demand_run %" PRIu64
           " populate_run %" PRIu64 " spin %u userfaultfds %u flags %#" PRIx32 "\n",
           plan->seed, mode_names[plan->mode], plan->threads, plan->lengths[0], plan->detect_zero ? ", looks for zeroes" : "",
           plan->failing_source ? ", source fails" : "", plan->defers ? ", defers" : "", plan->blocks ? ", blocks" : "",
           plan->signals ? ", signals" : "", plan->few_descriptors ? ", few descriptors" : "",
           plan->small_file_system ? ", small file system" : "", o->fill_threads, o->demand_run, o->populate_run,
           o->spin_us, o->userfaultfds, o->flags);
    for (unsigned i = 0; i < plan->slots; i++)
        printf("#     slot %u: %u pages, %s%s%s%s\n", i, plan->slot[i].pages, backing_names[plan->slot[i].backing],
               plan->slot[i].huge_wish ? ", huge pages wanted" : "",
               plan->slot[i].source == KUF_SOURCE_FILE ? ", source: file" : plan->slot[i].source == KUF_SOURCE_MEMORY
               ? ", source: memory" : plan->slot[i].source == KUF_SOURCE_ZERO ? ", source: zeroes" : "",
               plan->slot[i].layers ? " over memory" : "");
}
