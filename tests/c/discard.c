/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* kuf_discard: dropped pages refill from the source, removed ones read as zero, poisoned ones become ordinary again. */
#include "uffd.h"

#define BASE UINT64_C(0x70000000)
enum { PAGES = 32 };

static struct source source = SOURCE_INIT;
static atomic_bool hold;
static atomic_int written;

/* Writes first and waits then. If the page is dropped meanwhile, these bytes are old. */
static int fill(void *opaque, struct kuf_fill *fill)
{
    int answer = source_fill(opaque, fill);
    atomic_fetch_add(&written, 1);
    while (atomic_load(&hold))
        sleep_ms(1);
    return answer;
}

static void go(bool shared)
{
    const char *kind = kind_of(shared);
    size_t page = page_size();
    int fd;
    unsigned char *ram = map_kind(shared, PAGES * page, &fd);
    atomic_store(&source.generation, 1);
    atomic_store(&source.events[poison_event()], 0);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = fill, .event = source_event, .opaque = &source, .demand_run = page});
    add_kind(kuf, BASE, ram, PAGES * page, fd);

    ok(holds_content(ram, BASE, 8 * page, 1), "%s: filled", kind);
    atomic_store(&source.generation, 2);
    is(kuf_discard(kuf, BASE + 2 * page, 3 * page, KUF_DISCARD_REFILL), 0, "%s: three pages are dropped", kind);
    comes_to(progress_of(kuf, BASE).present, 5 * page, "%s: they are no longer present", kind);
    ok(holds_content(ram + 2 * page, BASE + 2 * page, 3 * page, 2), "%s: they refill from the source", kind);
    ok(holds_content(ram, BASE, 2 * page, 1) && holds_content(ram + 5 * page, BASE + 5 * page, 3 * page, 1),
       "%s: their neighbours stay", kind);
    is(stats_of(kuf).bytes_discarded, 3 * page, "%s: counted", kind);

    is(kuf_discard(kuf, BASE + page, 2 * page, KUF_DISCARD_ZERO), 0, "%s: present pages are given back", kind);
    is(kuf_discard(kuf, BASE + 20 * page, page, KUF_DISCARD_ZERO), 0, "%s: so is an absent one", kind);
    is(progress_of(kuf, BASE).removed, 3 * page, "%s: progress counts them", kind);
    ok(holds_zeroes(ram + page, 2 * page) && holds_zeroes(ram + 20 * page, page), "%s: they read as zero", kind);
    ram[page] = 7;
    is(ram[page], 7, "%s: and can be written", kind);
    is(kuf_resolve(kuf, BASE + 20 * page, ram, page, 0), 0, "%s: a late answer does not bring them back", kind);
    ok(holds_zeroes(ram + 20 * page, page), "%s: they still read as zero", kind);
    is(kuf_discard(kuf, BASE + 20 * page, page, KUF_DISCARD_REFILL), 0, "%s: dropped without the flag", kind);
    ok(holds_content(ram + 20 * page, BASE + 20 * page, page, 2), "%s: they refill from the source again", kind);

    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.bad_gpa, BASE + 10 * page);
    is(touch(ram + 10 * page), poison_signal(), "%s: a page that cannot be filled is poisoned", kind);
    comes_to(progress_of(kuf, BASE).poisoned, page, "%s: and counted", kind);
    atomic_store(&source.bad_gpa, NO_GPA);
    is(kuf_discard(kuf, BASE + 10 * page, page, KUF_DISCARD_REFILL), 0, "%s: it is dropped", kind);
    is(progress_of(kuf, BASE).poisoned, 0, "%s: and no longer poisoned", kind);
    ok(holds_content(ram + 10 * page, BASE + 10 * page, page, 2), "%s: and refills", kind);
    is(kuf_resolve(kuf, BASE + 11 * page, NULL, page, KUF_RESOLVE_POISON), page, "%s: another is poisoned by hand", kind);
    is(kuf_discard(kuf, BASE + 11 * page, page, KUF_DISCARD_ZERO), 0, "%s: and given back", kind);
    ok(holds_zeroes(ram + 11 * page, page), "%s: it reads as zero", kind);

    /* A fill that is running when its page is dropped has old data, which must not be used. */
    atomic_store(&written, 0);
    atomic_store(&hold, true);
    struct toucher toucher = {.memory = ram + 15 * page, .gpa = BASE + 15 * page, .length = page, .generation = 3};
    start_toucher(&toucher);
    wait_until(atomic_load(&written) == 1);
    atomic_store(&source.generation, 3);
    is(kuf_discard(kuf, BASE + 15 * page, page, KUF_DISCARD_REFILL), 0, "%s: a page is dropped while it is being filled", kind);
    atomic_store(&hold, false);
    ok(join_toucher(&toucher), "%s: the toucher gets the new bytes", kind);
    is(atomic_load(&written), 2, "%s: it was asked for again", kind);
    close_with(kuf, KUF_END_POPULATE);
    close(fd);
}

/* Pages that hold bytes although they do not count as present. */
enum { FREED, UNMAPPED, COPIED, LOCKED, LOCKED_SHARED, KINDS };

static const char *const kinds[KINDS] = {"MADV_FREE", "MADV_DONTNEED of shared memory", "UFFDIO_COPY of the caller's own",
                                         "locked", "locked shared memory"};

static void keeps_nothing(int kind, uint32_t flags)
{
    const char *what = kinds[kind], *how = flags == KUF_DISCARD_ZERO ? "removed" : "refilled";
    size_t page = page_size(), length = 4 * page;
    bool adopt = kind == COPIED, shared = kind == UNMAPPED || kind == LOCKED_SHARED, locked = kind == LOCKED || kind == LOCKED_SHARED;
    int uffd = adopt ? own_userfaultfd(0) : -1;
    unsigned char *ram = shared ? mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)
                                : map_anonymous(length);
    must(ram != MAP_FAILED, "memory");
    atomic_store(&source.generation, 1);
    struct kuf *kuf = open_with((struct kuf_options){.flags = adopt ? KUF_OPEN_ADOPT_ONLY : 0, .fill = source_fill,
                                                     .event = source_event, .opaque = &source, .demand_run = page});
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = length,
                              .hva = (uintptr_t)ram, .uffd = uffd};
    must(kuf_add_memory(kuf, &slot) == 0, "the slot is added: %s", kuf_error());
    if (adopt) {
        unsigned char *old = map_anonymous(page);
        memset(old, 0x11, page);
        struct uffdio_copy copy = {.dst = (uintptr_t)ram, .src = (uintptr_t)old, .len = page};
        must(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "the caller fills a page itself");
    } else {
        memset(ram, 0x11, page);
    }
    if (kind == FREED)
        must(madvise(ram, page, MADV_FREE) == 0, "MADV_FREE");
    if (kind == UNMAPPED)
        must(madvise(ram, page, MADV_DONTNEED) == 0, "MADV_DONTNEED");
    if (locked && mlock(ram, page) < 0) {
        skip_part("mlock: %s", strerror(errno));
        close_with(kuf, KUF_END_POISON);
        return;
    }
    int got = kuf_discard(kuf, BASE, page, flags);
    if (locked && got == -EBUSY) {
        is(ram[0], 0x11, "%s, %s: refused, and the page is what it was: %s", what, how, kuf_error());
    } else {
        is(got, 0, "%s, %s: the page is dropped", what, how);
        ok(flags == KUF_DISCARD_ZERO ? holds_zeroes(ram, page) : holds_content(ram, BASE, page, 1), "%s, %s: nothing of it is left", what, how);
    }
    close_with(kuf, KUF_END_POISON);
    if (adopt)
        close(uffd);
}

/* The bytes of a callback whose page was dropped meanwhile are not used: the page is asked for again at once. */
static void asked_anew(void)
{
    size_t page = page_size();
    unsigned char *ram = map_anonymous(PAGES * page);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = fill, .event = source_event, .opaque = &source, .demand_run = page, .fill_threads = 2});
    add(kuf, BASE, ram, PAGES * page);
    atomic_store(&source.generation, 1);
    atomic_store(&written, 0);
    atomic_store(&hold, true);
    struct toucher toucher = {.memory = ram, .gpa = BASE, .length = page, .generation = 2};
    start_toucher(&toucher);
    wait_until(atomic_load(&written) == 1);
    atomic_store(&source.generation, 2);
    is(kuf_discard(kuf, BASE, page, KUF_DISCARD_REFILL), 0, "a page is dropped while a callback writes its bytes to a buffer");
    wait_until(atomic_load(&written) == 2);
    ok(true, "it is asked for again before that callback returns");
    atomic_store(&hold, false);
    ok(join_toucher(&toucher), "its toucher gets the new bytes");
    close_with(kuf, KUF_END_POISON);
}

static int late_answer;

/* Writes old bytes to the page itself, waits, and answers. */
static int fill_late(void *opaque, struct kuf_fill *fill)
{
    source_fill(opaque, fill);
    int written_before = atomic_fetch_add(&written, 1);
    while (written_before == 0 && atomic_load(&hold))
        sleep_ms(1);
    return written_before == 0 ? late_answer : KUF_FILL_DONE;
}

/* The page gets the bytes of a kuf_resolve after a discard, while a callback still writes to the page itself. */
static void resolved_since(int answer, const char *how)
{
    size_t page = page_size();
    int fd;
    unsigned char *ram = map_kind(true, PAGES * page, &fd), *bytes = map_anonymous(2 * page);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = fill_late, .event = source_event, .opaque = &source, .demand_run = page});
    add_kind(kuf, BASE, ram, PAGES * page, fd);
    late_answer = answer;
    atomic_store(&source.generation, 1);
    atomic_store(&written, 0);
    atomic_store(&hold, true);
    struct toucher toucher = {.memory = ram, .gpa = BASE, .length = page, .generation = 3};
    start_toucher(&toucher);
    wait_until(atomic_load(&written) == 1);
    write_content(bytes, BASE, page, 2);
    is(kuf_resolve(kuf, BASE, bytes, page, 0), 0, "%s: bytes are kept until the callback is done", how);
    is(kuf_discard(kuf, BASE, page, KUF_DISCARD_REFILL), 0, "%s: and dropped with the page", how);
    write_content(bytes, BASE, page, 3);
    is(kuf_resolve(kuf, BASE, bytes, page, 0), 0, "%s: newer bytes are kept", how);
    atomic_store(&hold, false);
    ok(join_toucher(&toucher), "%s: the toucher gets the newer bytes", how);
    is(atomic_load(&written), 1, "%s: the page was not asked for again", how);
    close_with(kuf, KUF_END_POISON);
    munmap(bytes, 2 * page);
    close(fd);
}

int main(void)
{
    begin();
    go(false);
    go(true);
    for (int kind = 0; kind < KINDS; kind++) {
        keeps_nothing(kind, KUF_DISCARD_REFILL);
        keeps_nothing(kind, KUF_DISCARD_ZERO);
    }
    asked_anew();
    resolved_since(KUF_FILL_DONE, "the callback fills");
    resolved_since(KUF_FILL_ZERO, "the callback says zero");
    resolved_since(KUF_FILL_DEFERRED, "the callback defers");
    resolved_since(-EIO, "the callback fails");
    return done();
}
