/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Every pair of calls on one slot, on two threads at once. In whatever order: each call returns a documented result;
 * every page ends with bytes of the source, or zero where a call gave it back, or poisoned where a call poisoned it.
 * Memory that kuf_remove_memory has released is the caller's alone, and no event of it comes any more.
 */
#include "harness.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 64, ROUNDS = 8 };

static struct source source = SOURCE_INIT;
static struct kuf *_Atomic kuf;
static unsigned char *ram, *bytes;
static size_t page, length;
static int fd, recording;
static bool shared;
static atomic_bool let_go, discards, adds;
static atomic_int late, early;
static pthread_barrier_t both;

/* ---- The calls. Each returns the library's result. ------------------------------------------------------------------- */

static int resolve(void)
{
    ssize_t got = kuf_resolve(kuf, BASE, bytes, length, 0);
    return got > 0 ? 0 : (int)got;
}

static int resolve_zero(void)
{
    ssize_t got = kuf_resolve(kuf, BASE + length / 2, NULL, length / 2, KUF_RESOLVE_ZERO);
    return got > 0 ? 0 : (int)got;
}

static int discard(void)
{
    return kuf_discard(kuf, BASE + length / 4, length / 2, KUF_DISCARD_REFILL);
}

static int discard_removed(void)
{
    return kuf_discard(kuf, BASE + length / 4, length / 2, KUF_DISCARD_ZERO);
}

static int ensure(void)
{
    return kuf_ensure(kuf, BASE, length, -1);
}

static int populate(void)
{
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = BASE, .len = length};
    return kuf_populate(kuf, &request);
}

static int replay(void)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", recording);
    int from = open(path, O_RDONLY | O_CLOEXEC);
    int got = kuf_replay(kuf, from, 0);
    close(from);
    return got;
}

static int remove_settled(void)
{
    int got = kuf_remove_memory(kuf, BASE, 0);
    if (got == 0)
        atomic_store(&let_go, true);
    return got;
}

static int remove_poisoned(void)
{
    int got = kuf_remove_memory(kuf, BASE, KUF_END_POISON);
    if (got == 0)
        atomic_store(&let_go, true);
    return got;
}

static int close_settled(void)
{
    struct kuf *handle = kuf;
    return kuf_close(&handle, 0);
}

static int close_poisoned(void)
{
    struct kuf *handle = kuf;
    return kuf_close(&handle, KUF_END_POISON);
}

/* All pages of a file are filled again, which shows whether the new slot is served. */
static int add_again(void)
{
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = length, .hva = (uintptr_t)ram};
    if (shared) {
        slot.flags = KUF_MEMORY_FILL_ALL;
        slot.fd = fd;
    }
    return kuf_add_memory(kuf, &slot);
}

enum { CLOSES = 1, REMOVES = 2, POISONS = 4, ZEROES = 8, DISCARDS = 16, ADDS = 32 };

static const struct call {
    const char *name;
    int (*make)(void);
    unsigned does;
    int answers[3];
} calls[] = {
    {"kuf_resolve", resolve, 0, {0}},
    {"kuf_resolve of zeroes", resolve_zero, ZEROES, {0}},
    {"kuf_discard", discard, DISCARDS, {0}},
    {"kuf_discard as removed", discard_removed, ZEROES | DISCARDS, {0}},
    {"kuf_ensure", ensure, 0, {-EHWPOISON}},
    {"kuf_populate", populate, 0, {0}},
    {"kuf_replay", replay, 0, {0}},
    {"kuf_remove_memory", remove_settled, REMOVES, {-EBUSY}},
    {"kuf_remove_memory with poison", remove_poisoned, REMOVES | POISONS, {-EBUSY}},
    {"kuf_close", close_settled, CLOSES, {-EBUSY}},
    {"kuf_close with poison", close_poisoned, CLOSES | POISONS, {0}},
    {"kuf_add_memory", add_again, ADDS, {-EEXIST, -EBUSY}},
};
enum { CALLS = sizeof(calls) / sizeof(calls[0]) };

/* Whether `one` may return this result when `other` is made at the same time. */
static bool may_answer(const struct call *one, const struct call *other, int got)
{
    if (got == 0)
        return true;
    for (int i = 0; i < 3; i++)
        if (one->answers[i] != 0 && got == one->answers[i])
            return got != -EHWPOISON || other->does & POISONS;
    if (other->does & CLOSES)
        return got == -EBADF || got == -ECANCELED;
    return other->does & REMOVES && got == -ENOENT;
}

/* ---- A round --------------------------------------------------------------------------------------------------------- */

struct side {
    const struct call *call;
    unsigned delay;
    bool scribbles;
    int got;
};

static void *make_call(void *argument)
{
    struct side *side = argument;
    pthread_barrier_wait(&both);
    for (volatile unsigned i = 0; i < side->delay; i++)
        ;
    side->got = side->call->make();
    /* The memory is this thread's alone now. */
    if (side->scribbles && side->got == 0)
        memset(ram, 0x55, length);
    return NULL;
}

static void event(void *opaque, const struct kuf_event *event)
{
    bool gone = atomic_load(&let_go) && !atomic_load(&adds);
    source_event(opaque, event);
    if (event->kind == KUF_EVENT_POPULATED || event->kind == KUF_EVENT_REPLAYED)
        return;
    atomic_fetch_add(&late, gone);
    struct kuf_progress_info progress = {.size = sizeof(progress)};
    if (event->kind == KUF_EVENT_COMPLETE && !atomic_load(&discards) && kuf_progress(kuf, BASE, &progress) == 0)
        atomic_fetch_add(&early, progress.absent + progress.filling != 0);
}

static bool is_filled_with(const unsigned char *memory, unsigned char value)
{
    for (size_t i = 0; i < page; i++)
        if (memory[i] != value)
            return false;
    return true;
}

/* The number of pages with wrong contents. */
static int wrong_pages(const struct side *one, const struct side *other, bool scribbled)
{
    unsigned does = one->call->does | other->call->does;
    int wrong = 0;
    for (size_t i = 0; i < PAGES; i++) {
        const unsigned char *at = ram + i * page;
        uint64_t gpa = BASE + i * page;
        if (touch(at) != 0)
            wrong += !(does & POISONS);
        else if (scribbled)
            wrong += !is_filled_with(at, 0x55);
        else
            wrong += !holds_content(at, gpa, page, 1) && !holds_content(at, gpa, page, 2) &&
                     !(does & ZEROES && holds_zeroes(at, page));
    }
    return wrong;
}

static void round_of(const struct call *first, const struct call *second, bool full, unsigned seed, int *bad, int *wrong)
{
    atomic_store(&source.generation, 1);
    atomic_store(&let_go, false);
    atomic_store(&adds, (first->does | second->does) & ADDS);
    atomic_store(&discards, (first->does | second->does) & (DISCARDS | ADDS));
    ram = map_kind(shared, length, &fd);
    atomic_store(&kuf, open_with((struct kuf_options){.fill = source_fill, .event = event, .opaque = &source}));
    if (shared)
        add_shared(kuf, BASE, ram, length, fd, KUF_MEMORY_FILL_ALL);
    else
        add(kuf, BASE, ram, length);
    must(kuf_ensure(kuf, BASE, full ? length : length / 2, -1) == 0, "pages are filled: %s", kuf_error());
    atomic_store(&source.generation, 2);

    unsigned does = first->does | second->does;
    /* With a poisoned page the memory cannot be written as a whole, and a slot that was added again has such a page. */
    bool may_scribble = !(does & (POISONS | ADDS));
    struct side sides[2] = {{.call = first, .delay = seed % 3 == 0 ? seed % 4000 : 0},
                            {.call = second, .delay = seed % 3 == 1 ? seed % 4000 : 0}};
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        sides[i].scribbles = may_scribble && sides[i].call->does & REMOVES;
        threads[i] = start(make_call, &sides[i]);
    }
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);

    bool closed = false, removed = false, added = false;
    for (int i = 0; i < 2; i++) {
        const struct side *side = &sides[i];
        if (!may_answer(side->call, sides[!i].call, side->got)) {
            printf("    %s: %d (%s)\n", side->call->name, side->got, strerror(-side->got));
            ++*bad;
        }
        closed |= side->got == 0 && side->call->does & CLOSES;
        removed |= side->got == 0 && side->call->does & REMOVES;
        added |= side->got == 0 && side->call->does & ADDS;
    }
    if (!closed && (!removed || added)) {
        int got = kuf_ensure(kuf, BASE, length, -1);
        *bad += got != 0 && !(got == -EHWPOISON && does & POISONS) && !(got == -ENOENT && removed);
    }
    *wrong += wrong_pages(&sides[0], &sides[1], may_scribble && removed);
    struct kuf *handle = kuf;
    if (!closed)
        must(kuf_close(&handle, KUF_END_POISON) == 0, "the handle closes: %s", kuf_error());
    munmap(ram, length);
    if (shared)
        close(fd);
}

static void pairs(void)
{
    const char *kind = kind_of(shared);
    unsigned seed = 12345;
    for (int i = 0; i < CALLS; i++)
        for (int j = i; j < CALLS; j++) {
            int bad = 0, wrong = 0;
            for (int n = 0; n < 2 * ROUNDS; n++) {
                seed = seed * 1103515245 + 12345;
                round_of(&calls[i], &calls[j], n % 2, seed >> 8, &bad, &wrong);
            }
            ok(bad == 0 && wrong == 0, "%s: %s and %s: %d wrong answers, %d wrong pages", kind, calls[i].name,
               calls[j].name, bad, wrong);
        }
}

/* A replay of the slot needs a recording. */
static void make_recording(void)
{
    recording = memfd_create("recording", MFD_CLOEXEC);
    ram = map_anonymous(length);
    atomic_store(&kuf, open_with((struct kuf_options){.fill = source_fill, .opaque = &source}));
    add(kuf, BASE, ram, length);
    must(kuf_record_start(kuf, 0) == 0 && kuf_ensure(kuf, BASE, length, -1) == 0 && kuf_record_stop(kuf, recording) == 0,
         "a recording is made: %s", kuf_error());
    close_with(kuf, 0);
    munmap(ram, length);
}

int main(void)
{
    begin();
    /* Some thousand handles. */
    watchdog(600);
    page = page_size();
    length = PAGES * page;
    bytes = malloc(length);
    write_content(bytes, BASE, length, 2);
    pthread_barrier_init(&both, NULL, 2);
    make_recording();
    for (int i = 0; i < 2; i++) {
        shared = i;
        pairs();
    }
    is(atomic_load(&late), 0, "no event of a slot came after kuf_remove_memory had returned");
    is(atomic_load(&early), 0, "no slot was said to be complete that was not");
    free(bytes);
    return done();
}
