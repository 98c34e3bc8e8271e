/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KUF_FILL_LATER: a run that no thread is blocked on stays absent. Populate, replay and readahead go on without it, and do not
 * ask again; a thread that touches it, also meanwhile, has it asked for as demand.
 */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 64 };

static size_t page, length;
static struct source source = SOURCE_INIT;
/* How often each page was asked for, without and with KUF_RUN_DEMAND. */
static atomic_int asked[PAGES], demanded[PAGES];
/* Runs that begin at these pages are left for later. */
static atomic_bool later[PAGES];
static atomic_bool hold;
static atomic_int held;

static int fill(void *opaque, struct kuf_fill *fill)
{
    bool demand = fill->flags & KUF_RUN_DEMAND;
    size_t first = fill->memory_offset / page;
    for (size_t i = 0; i < fill->len / page; i++)
        atomic_fetch_add(demand ? &demanded[first + i] : &asked[first + i], 1);
    if (!demand && atomic_load(&hold)) {
        atomic_fetch_add(&held, 1);
        while (atomic_load(&hold))
            sleep_ms(1);
    }
    if (!demand && atomic_load(&later[first]))
        return KUF_FILL_LATER;
    return source_fill(opaque, fill);
}

static void set_later(int first, int end, bool to)
{
    atomic_store(&source.events[poison_event()], 0);
    for (int i = 0; i < PAGES; i++) {
        atomic_store(&later[i], first <= i && i < end && to);
        atomic_store(&asked[i], 0);
        atomic_store(&demanded[i], 0);
    }
}

static int sum(atomic_int *counts)
{
    int all = 0;
    for (int i = 0; i < PAGES; i++)
        all += atomic_load(&counts[i]);
    return all;
}

/* A handle that fills a page at a time. */
static struct kuf *open_slot(bool shared, unsigned char **ram, int *fd, uint64_t demand_run)
{
    struct kuf *kuf = open_with((struct kuf_options){.fill = fill, .event = source_event, .opaque = &source,
                                                     .demand_run = demand_run, .populate_run = page});
    *ram = map_kind(shared, length, fd);
    add_kind(kuf, BASE, *ram, length, *fd);
    return kuf;
}

/* Populates all, and returns the error with which that ends. */
static int populate(struct kuf *kuf)
{
    int before = atomic_load(&source.events[KUF_EVENT_POPULATED]);
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = BASE, .len = length};
    must(kuf_populate(kuf, &request) == 0, "a request is taken");
    wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) > before);
    return last_event(&source, KUF_EVENT_POPULATED).error;
}

static void populated(bool shared)
{
    const char *kind = kind_of(shared);
    unsigned char *ram;
    int fd;
    struct kuf *kuf = open_slot(shared, &ram, &fd, page);
    set_later(8, 24, true);
    is(populate(kuf), -EAGAIN, "%s: a request that had to leave pages ends with -EAGAIN", kind);
    ok(strstr(last_event(&source, KUF_EVENT_POPULATED).text, "KUF_FILL_LATER") != NULL, "%s: and names the value", kind);
    struct kuf_progress_info progress = progress_of(kuf, BASE);
    is(progress.absent, 16 * page, "%s: these pages are absent", kind);
    is(progress.present, (PAGES - 16) * page, "%s: it went on with the others", kind);
    is(sum(asked), PAGES, "%s: no page was asked for twice", kind);
    is(sum(demanded), 0, "%s: or as demand", kind);
    is(stats_of(kuf).fills_failed, 0, "%s: no fill has failed", kind);
    if (shared) {
        struct stat stat;
        must(fstat(fd, &stat) == 0, "fstat");
        is(stat.st_blocks * 512, (PAGES - 16) * page, "%s: the absent pages take no memory", kind);
    }
    ok(holds_content(ram + 8 * page, BASE + 8 * page, page, 1), "%s: a touch has one of them filled", kind);
    is(atomic_load(&demanded[8]), 1, "%s: as demand", kind);
    is(populate(kuf), -EAGAIN, "%s: another request asks again", kind);
    is(sum(asked), PAGES + 15, "%s: for what is absent", kind);
    set_later(0, 0, false);
    is(populate(kuf), 0, "%s: until the source has it", kind);
    ok(holds_content(ram, BASE, length, 1), "%s: all bytes are there", kind);
    is(atomic_load(&source.events[poison_event()]), 0, "%s: nothing was poisoned", kind);
    close_with(kuf, 0);
    close(fd);
}

static void *ensure_page(void *kuf)
{
    return (void *)(intptr_t)kuf_ensure(kuf, BASE, page, -1);
}

/* A thread comes to the run while the callback has it. */
static void touched_meanwhile(bool shared)
{
    const char *kind = kind_of(shared);
    for (int ensures = 0; ensures < 2; ensures++) {
        const char *how = ensures ? "kuf_ensure" : "a touch";
        unsigned char *ram;
        int fd;
        struct kuf *kuf = open_slot(shared, &ram, &fd, page);
        struct toucher toucher = {.memory = ram, .gpa = BASE, .length = page, .generation = 1};
        pthread_t ensurer = 0;
        set_later(0, 1, true);
        atomic_store(&hold, true);
        int before = atomic_load(&held), ended = atomic_load(&source.events[KUF_EVENT_POPULATED]);
        struct kuf_populate_request request = {.size = sizeof(request), .gpa = BASE, .len = page};
        must(kuf_populate(kuf, &request) == 0, "a request is taken");
        wait_until(atomic_load(&held) == before + 1);
        if (ensures)
            ensurer = start(ensure_page, kuf);
        else
            start_toucher(&toucher);
        struct kuf_fault fault;
        wait_until(kuf_pending(kuf, &fault, 1) == 1 && fault.flags & KUF_FAULT_DEMAND);
        atomic_store(&hold, false);
        void *got = NULL;
        if (ensures)
            pthread_join(ensurer, &got);
        ok(ensures ? got == NULL : join_toucher(&toucher), "%s: %s during the callback is served", kind, how);
        is(atomic_load(&demanded[0]), 1, "%s: %s: it is asked for again as demand", kind, how);
        wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) > ended);
        ok(holds_content(ram, BASE, page, 1), "%s: %s: the bytes are there", kind, how);
        close_with(kuf, KUF_END_POISON);
        close(fd);
    }
}

/* Bytes that kuf_resolve brings while the callback has the run. */
static void resolved_meanwhile(bool shared)
{
    const char *kind = kind_of(shared);
    unsigned char *ram, *bytes = malloc(page);
    int fd;
    struct kuf *kuf = open_slot(shared, &ram, &fd, page);
    set_later(0, 2, true);
    atomic_store(&hold, true);
    int before = atomic_load(&held), ended = atomic_load(&source.events[KUF_EVENT_POPULATED]);
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = BASE, .len = 2 * page};
    must(kuf_populate(kuf, &request) == 0, "a request is taken");
    wait_until(atomic_load(&held) == before + 1);
    write_content(bytes, BASE, page, 2);
    ok(kuf_resolve(kuf, BASE, bytes, page, 0) >= 0, "%s: a page is resolved during its callback", kind);
    atomic_store(&hold, false);
    wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) > ended);
    is(last_event(&source, KUF_EVENT_POPULATED).error, -EAGAIN, "%s: the other is left", kind);
    comes_to(progress_of(kuf, BASE).present, page, "%s: the resolved page is present", kind);
    ok(holds_content(ram, BASE, page, 2), "%s: with its bytes", kind);
    close_with(kuf, KUF_END_POISON);
    close(fd);
    free(bytes);
}

static void replayed(void)
{
    unsigned char *ram;
    int none, recording = memfd_create("recording", MFD_CLOEXEC);
    struct kuf *kuf = open_slot(false, &ram, &none, page);
    set_later(0, 0, false);
    is(kuf_record_start(kuf, 0), 0, "a recording begins");
    ok(holds_content(ram, BASE, 32 * page, 1), "a working set is touched");
    is(kuf_record_stop(kuf, recording), 0, "and written");
    close_with(kuf, KUF_END_POISON);
    kuf = open_slot(false, &ram, &none, page);
    set_later(4, 6, true);
    must(lseek(recording, 0, SEEK_SET) == 0, "the recording is rewound");
    is(kuf_replay(kuf, recording, 0), 0, "it is replayed");
    wait_until(atomic_load(&source.events[KUF_EVENT_REPLAYED]) == 1);
    is(last_event(&source, KUF_EVENT_REPLAYED).error, -EAGAIN, "a replay that had to leave pages says so");
    is(progress_of(kuf, BASE).present, 30 * page, "and has filled the others");
    is(sum(asked), 32, "each was asked for once");
    close_with(kuf, KUF_END_POISON);
    close(recording);
}

/* Readahead leaves them to the thread that comes to them. */
static void ahead(void)
{
    unsigned char *ram;
    int none;
    struct kuf *kuf = open_slot(false, &ram, &none, 0);
    set_later(0, PAGES, true);
    struct toucher toucher = {.memory = ram, .gpa = BASE, .length = length, .generation = 1};
    start_toucher(&toucher);
    ok(join_toucher(&toucher), "a thread goes through memory that cannot be filled ahead of it");
    is(atomic_load(&source.events[poison_event()]), 0, "nothing is poisoned");
    is(stats_of(kuf).fills_failed, 0, "no fill has failed");
    comes_to(progress_of(kuf, BASE).present, length, "all is present");
    close_with(kuf, 0);
}

static void at_the_end(void)
{
    unsigned char *ram;
    int none;
    struct kuf *kuf = open_slot(false, &ram, &none, page), *same = kuf;
    set_later(8, 24, true);
    is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE), -EIO, "a slot that cannot be filled now is not removed");
    ok(strstr(kuf_error(), "KUF_FILL_LATER") != NULL, "the text names the value: %s", kuf_error());
    is(sum(asked), PAGES, "each page was asked for once");
    is(kuf_close(&same, KUF_END_POPULATE), -EIO, "nor its handle closed");
    ok(strstr(kuf_error(), "KUF_FILL_LATER") != NULL, "with the same words");
    ok(holds_content(ram + 8 * page, BASE + 8 * page, page, 1), "both go on");
    int before = atomic_load(&source.events[poison_event()]);
    close_with(kuf, KUF_END_POPULATE | KUF_END_POISON);
    is(touch(ram + 9 * page), poison_signal(), "with KUF_END_POISON too, it is poisoned");
    ok(holds_content(ram + 24 * page, BASE + 24 * page, (PAGES - 24) * page, 1), "the others are filled");
    ok(atomic_load(&source.events[poison_event()]) > before, "and that is said");
}

int main(void)
{
    begin();
    page = page_size();
    length = PAGES * page;
    bool minor = has_feature(KUF_FEATURE_MINOR);
    if (!minor)
        skip_part("no minor faults on shared memory: nothing is filled in place");
    for (int shared = 0; shared < 1 + minor; shared++) {
        populated(shared);
        touched_meanwhile(shared);
        resolved_meanwhile(shared);
    }
    replayed();
    ahead();
    at_the_end();
    return done();
}
