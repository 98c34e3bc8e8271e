/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KUF_END_POISON raises one event a call, however many runs and slots it poisons: that of the slot, or that of the handle. It
 * says how many bytes were lost. A call that poisons nothing raises none.
 */
#include "harness.h"

#define LOW UINT64_C(0x10000000)
#define HIGH UINT64_C(0x20000000)
enum { PAGES = 64 };

static struct source source = SOURCE_INIT;
static size_t page, length;
static char low_name, high_name;
static struct kuf *_Atomic opened;
static atomic_int wrong;

/* Events are raised when the state has changed, and while the handle is still known. */
static void event(void *opaque, const struct kuf_event *event)
{
    if (event->kuf != atomic_load(&opened))
        atomic_fetch_add(&wrong, 1);
    source_event(opaque, event);
}

static void add_named(struct kuf *kuf, uint64_t gpa, unsigned char *ram, int fd, void *name)
{
    struct kuf_memory slot = {
        .size = sizeof(slot), .gpa = gpa, .len = length, .hva = (uintptr_t)ram, .fd = fd, .opaque = name};
    must(kuf_add_memory(kuf, &slot) == 0, "kuf_add_memory: %s", kuf_error());
}

/* Fills every other page, so that each of the rest is a run of its own. */
static uint64_t fill_half(unsigned char *ram, uint64_t gpa)
{
    bool good = true;
    for (int i = 0; i < PAGES; i += 2)
        good = holds_content(ram + i * page, gpa + i * page, page, 1) && good;
    ok(good, "every other page is filled");
    return length / 2;
}

static void is_told(int before, uint64_t gpa, uint64_t len, const void *name, uint64_t bytes, const char *what)
{
    struct kuf_event event = last_event(&source, poison_event());
    char number[32];
    snprintf(number, sizeof(number), "%" PRIu64 " bytes ", bytes);
    is(atomic_load(&source.events[poison_event()]) - before, 1, "%s: one event", what);
    is(event.error, -ECANCELED, "%s: its error", what);
    ok(event.gpa == gpa && event.len == len, "%s: its range", what);
    ok(event.memory_opaque == name, "%s: its slot", what);
    ok(strncmp(event.text, number, strlen(number)) == 0, "%s: it says how much (%s)", what, event.text);
}

static void go(bool shared)
{
    const char *kind = kind_of(shared);
    unsigned char *ram[2];
    int fd[2];
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = source_fill, .event = event, .release = source_release, .opaque = &source, .demand_run = page});
    atomic_store(&opened, kuf);
    for (int i = 0; i < 2; i++)
        ram[i] = map_kind(shared, length, &fd[i]);
    add_named(kuf, LOW, ram[0], fd[0], &low_name);
    add_named(kuf, HIGH, ram[1], fd[1], &high_name);
    int before = atomic_load(&source.events[poison_event()]);
    uint64_t lost = fill_half(ram[0], LOW);
    int got;
    while ((got = kuf_remove_memory(kuf, LOW, KUF_END_POISON)) == -EBUSY)
        is(atomic_load(&source.events[poison_event()]), before, "%s: a call that is refused raises nothing", kind);
    is(got, 0, "%s: a slot is removed", kind);
    is_told(before, LOW, length, &low_name, lost, "kuf_remove_memory");

    /* Two slots, one of them with a page that was poisoned before: it is not counted again. */
    must(madvise(ram[0], length, MADV_DONTNEED) == 0 && (!shared || ftruncate(fd[0], 0) == 0), "drops the memory");
    if (poison_event() == KUF_EVENT_INACCESSIBLE)
        must(mprotect(ram[0], length, PROT_READ | PROT_WRITE) == 0, "gives it its rights back");
    must(!shared || ftruncate(fd[0], (off_t)length) == 0, "an empty file");
    add_named(kuf, LOW, ram[0], fd[0], &low_name);
    lost = fill_half(ram[0], LOW) + fill_half(ram[1], HIGH);
    is(kuf_resolve(kuf, HIGH + page, NULL, page, KUF_RESOLVE_POISON), page, "%s: a page is poisoned before", kind);
    before = atomic_load(&source.events[poison_event()]);
    close_with(kuf, KUF_END_POISON);
    is_told(before, 0, 0, NULL, lost - page, "kuf_close");
    for (int i = 0; i < 2; i++)
        close(fd[i]);

    /* Nothing to poison. */
    kuf = open_with((struct kuf_options){.fill = source_fill, .event = event, .opaque = &source, .demand_run = page});
    atomic_store(&opened, kuf);
    for (int i = 0; i < 2; i++) {
        ram[i] = map_kind(shared, length, &fd[i]);
        add_kind(kuf, i ? HIGH : LOW, ram[i], length, fd[i]);
    }
    before = atomic_load(&source.events[poison_event()]);
    is(kuf_ensure(kuf, LOW, length, -1), 0, "%s: a slot is filled", kind);
    is(remove_patiently(kuf, LOW), 0, "%s: and removed", kind);
    close_with(kuf, KUF_END_POISON | KUF_END_POPULATE);
    is(atomic_load(&source.events[poison_event()]), before, "%s: where nothing is poisoned, no event says so", kind);
    for (int i = 0; i < 2; i++)
        close(fd[i]);
    is(atomic_load(&wrong), 0, "%s: events had their handle", kind);
}

/* A handle that the caller drives, with faults that were not answered. */
static void caller_driven(void)
{
    struct kuf *kuf = open_with((struct kuf_options){.event = event, .opaque = &source});
    atomic_store(&opened, kuf);
    unsigned char *ram = map_anonymous(length);
    add_named(kuf, LOW, ram, 0, &low_name);
    int before = atomic_load(&source.events[poison_event()]);
    unsigned char *bytes = map_anonymous(page);
    write_content(bytes, LOW, page, 1);
    is(kuf_resolve(kuf, LOW, bytes, page, 0), page, "a page is resolved");
    close_with(kuf, KUF_END_POISON);
    is_told(before, 0, 0, NULL, length - page, "a caller-driven handle");
}

int main(void)
{
    begin();
    page = page_size();
    length = PAGES * page;
    go(false);
    if (has_feature(KUF_FEATURE_MINOR))
        go(true);
    else
        skip_part("no minor faults on shared memory");
    caller_driven();
    return done();
}
