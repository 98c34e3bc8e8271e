/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Runs that cannot be done in one piece: present pages are skipped and keep their bytes, and a source that returns a
 * run in parts is asked for the rest.
 */
#include "uffd.h"
#include "watched.h"

#define BASE UINT64_C(0x50000000)
enum { PAGES = 96 };

static struct source source = SOURCE_INIT;
static atomic_bool stingy;

/* Fills only one page of the run. */
static int fill(void *opaque, struct kuf_fill *fill)
{
    int answer = source_fill(opaque, fill);
    if (atomic_load(&stingy))
        fill->filled = fill->page_size;
    return answer;
}

static struct kuf *open_here(void)
{
    return watch(open_with((struct kuf_options){.fill = fill, .event = source_event, .opaque = &source,
                                                .populate_run = 1 << 20, .demand_run = 1 << 20}));
}

static void ended(int before)
{
    wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) > before);
}

/* Pages that the library does not know of: the caller has written them itself, after the slot was added. */
static void skips_present(bool by_resolve)
{
    const char *how = by_resolve ? "resolve" : "populate";
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length);
    int uffd = own_userfaultfd(0);
    struct kuf *kuf = open_here();
    struct kuf_memory slot = {.size = sizeof(slot), .flags = KUF_MEMORY_POPULATED, .gpa = BASE,
                              .len = length, .hva = (uintptr_t)ram, .uffd = uffd};
    must(kuf_add_memory(kuf, &slot) == 0, "kuf_add_memory: %s", kuf_error());
    unsigned char *own = map_anonymous(page);
    for (size_t i = 0; i < PAGES; i += 5) {
        write_content(own, i, page, 77);
        struct uffdio_copy copy = {.dst = (uintptr_t)ram + i * page, .src = (uintptr_t)own, .len = page};
        must(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
    }
    munmap(own, page);
    if (by_resolve) {
        unsigned char *bytes = map_anonymous(length);
        write_content(bytes, BASE, length, 1);
        ssize_t got = kuf_resolve(kuf, BASE, bytes, length, 0);
        is(got, (PAGES - (PAGES + 4) / 5) * page, "%s: counts the pages that it has opened", how);
        munmap(bytes, length);
    } else {
        int before = atomic_load(&source.events[KUF_EVENT_POPULATED]);
        struct kuf_populate_request request = {.size = sizeof(request), .gpa = BASE, .len = length};
        is(kuf_populate(kuf, &request), 0, "%s: is asked for", how);
        ended(before);
        is(last_event(&source, KUF_EVENT_POPULATED).error, 0, "%s: ends without an error", how);
    }
    bool kept = true, filled = true;
    for (size_t i = 0; i < PAGES; i++) {
        if (i % 5 == 0)
            kept = kept && holds_content(ram + i * page, i, page, 77);
        else
            filled = filled && holds_content(ram + i * page, BASE + i * page, page, 1);
    }
    ok(kept, "%s: present pages keep their bytes", how);
    ok(filled, "%s: all else is filled", how);
    is(stats_of(kuf).install_exists, (PAGES + 4) / 5, "%s: each page that was there was come across", how);
    is(stats_of(kuf).faults, 0, "%s: no thread had to wait for it", how);
    ok(progress_of(kuf, BASE).flags & KUF_PROGRESS_COMPLETE, "%s: the slot is complete", how);
    close_watched(kuf, 0);
    close(uffd);
    munmap(ram, length);
}

/* A run over the border of two mappings, which one kernel call does not cross. */
static void crosses_mappings(void)
{
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length);
    must(madvise(ram + 7 * page, 30 * page, MADV_DONTDUMP) == 0, "a mapping is split");
    struct kuf *kuf = open_here();
    add(kuf, BASE, ram, length);
    unsigned char *bytes = map_anonymous(length);
    write_content(bytes, BASE, length, 1);
    is(kuf_resolve(kuf, BASE, bytes, length, 0), length, "one resolve fills three mappings");
    ok(holds_content(ram, BASE, length, 1), "with the right bytes");
    is(stats_of(kuf).bytes_removed, 0, "nothing is taken for unmapped");
    close_watched(kuf, 0);
    munmap(bytes, length);
    munmap(ram, length);
}

static void given_in_parts(bool shared)
{
    const char *kind = kind_of(shared);
    size_t page = page_size(), length = PAGES * page;
    int fd;
    unsigned char *ram = map_kind(shared, length, &fd);
    struct kuf *kuf = open_here();
    add_kind(kuf, BASE, ram, length, fd);
    atomic_store(&stingy, true);
    int before = atomic_load(&source.events[KUF_EVENT_POPULATED]);
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = BASE, .len = length / 2};
    is(kuf_populate(kuf, &request), 0, "%s: populate from a source that gives a page at a time", kind);
    ended(before);
    is(last_event(&source, KUF_EVENT_POPULATED).error, 0, "%s: ends without an error", kind);
    is(progress_of(kuf, BASE).present, length / 2, "%s: and has filled the whole range", kind);
    is(kuf_ensure(kuf, BASE, length * 3 / 4, -1), 0, "%s: kuf_ensure from such a source", kind);
    is(progress_of(kuf, BASE).present, length * 3 / 4, "%s: has filled its range", kind);
    int got = kuf_close(&kuf, KUF_END_POPULATE);
    atomic_store(&watched, NULL);
    is(got, 0, "%s: closing populates from such a source", kind);
    if (got < 0)
        must(kuf_close(&kuf, KUF_END_POISON) == 0, "closes");
    else
        ok(holds_content(ram, BASE, length, 1), "%s: every page has its bytes", kind);
    atomic_store(&stingy, false);
    munmap(ram, length);
    close(fd);
}

int main(void)
{
    begin_watched(60);
    skips_present(true);
    skips_present(false);
    crosses_mappings();
    given_in_parts(false);
    given_in_parts(true);
    return done();
}
