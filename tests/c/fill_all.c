/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KUF_MEMORY_FILL_ALL: old bytes of the mapping never count as a filled page, the file keeps its bytes, and a call that
 * is refused has changed nothing.
 */
#include "uffd.h"

#define BASE UINT64_C(0x10000000)
#define OTHER UINT64_C(0x90000000)
enum { PAGES = 8 };

static struct source source = SOURCE_INIT;

static int try_add(struct kuf *kuf, uint64_t gpa, void *memory, int fd, int uffd)
{
    struct kuf_memory slot = {.size = sizeof(slot), .flags = KUF_MEMORY_FILL_ALL, .gpa = gpa,
                              .len = PAGES * page_size(), .hva = (uintptr_t)memory, .fd = fd, .uffd = uffd};
    return kuf_add_memory(kuf, &slot);
}

static struct kuf *open_small(uint32_t flags)
{
    return open_with((struct kuf_options){.flags = flags, .fill = source_fill, .event = source_event, .opaque = &source,
                                          .demand_run = page_size()});
}

/* The memory is another slot's already. */
static void refused(void)
{
    size_t page = page_size(), length = PAGES * page;
    int fd;
    unsigned char *ram = map_shared(length, &fd);
    struct kuf *kuf = open_small(0), *other = open_small(0);
    must(try_add(kuf, BASE, ram, fd, -1) == 0, "a slot is added: %s", kuf_error());
    ok(holds_content(ram, BASE, page, 1), "its first page is filled");
    ram[0] ^= 0xff;
    uint64_t removals = stats_of(kuf).events_remove;
    is(try_add(kuf, OTHER, ram, fd, -1), -EEXIST, "the memory cannot be added twice");
    is(try_add(other, BASE, ram, fd, -1), -EBUSY, "nor by another handle");
    is(progress_of(kuf, BASE).absent, length - page, "absent pages stay absent");
    is(progress_of(kuf, BASE).removed, 0, "nothing counts as given back");
    is(stats_of(kuf).events_remove, removals, "nothing was dropped");
    ram[0] ^= 0xff;
    ok(holds_content(ram, BASE, length, 1), "the guest's writes stay, and the rest is filled");
    close_with(other, 0);
    close_with(kuf, 0);
    close(fd);
}

/*
 * A userfaultfd that reports removals also reports the library's own madvise. Pages 0 to 3 are in the file, as an
 * earlier handler has left them; 0 and 1 are known to be whole.
 */
static void adopted(bool events, bool registered)
{
    const char *how = events ? registered ? "events, registered before" : "events" : "no events";
    size_t page = page_size(), length = PAGES * page;
    int uffd = own_userfaultfd(UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM |
                               (events ? UFFD_FEATURE_EVENT_REMOVE : 0));
    int fd;
    unsigned char *ram = map_shared(length, &fd);
    unsigned char *before = malloc(4 * page);
    write_content(before, BASE, 4 * page, 2);
    must(pwrite(fd, before, 4 * page, 0) == (ssize_t)(4 * page), "the file holds four pages");
    ok(holds_content(ram, BASE, 4 * page, 2), "%s: they are mapped", how);
    struct uffdio_register range = {.range = {(uintptr_t)ram, length},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR};
    must(!registered || ioctl(uffd, UFFDIO_REGISTER, &range) == 0, "the memory is registered");
    struct kuf *kuf = open_small(KUF_OPEN_ADOPT_ONLY);
    must(try_add(kuf, BASE, ram, fd, uffd) == 0, "the slot is added: %s", kuf_error());
    is(progress_of(kuf, BASE).absent, length, "%s: every page is absent", how);
    is(kuf_resolve(kuf, BASE, NULL, 2 * page, KUF_RESOLVE_IN_PLACE), 2 * page, "%s: two are known to be whole", how);
    ok(holds_content(ram, BASE, 2 * page, 2), "%s: they have the bytes of the file", how);
    ok(holds_content(ram + 2 * page, BASE + 2 * page, length - 2 * page, 1), "%s: all others come from the source", how);
    close_with(kuf, 0);
    free(before);
    close(uffd);
    close(fd);
}

/* An earlier handler has left the file half filled; it is mapped, and locked. */
static void locked(void)
{
    size_t page = page_size(), length = PAGES * page;
    int fd;
    unsigned char *ram = map_shared(length, &fd);
    memset(ram, 0x11, length);
    if (mlock(ram, length) < 0) {
        skip_part("mlock: %s", strerror(errno));
        return;
    }
    struct kuf *kuf = open_small(0);
    int got = try_add(kuf, BASE, ram, fd, -1);
    if (got == -EBUSY) {
        ok(ram[0] == 0x11 && !is_registered(ram), "memory that cannot be dropped is refused: %s", kuf_error());
    } else {
        is(got, 0, "locked memory is added");
        ok(holds_content(ram, BASE, length, 1), "and filled from the source");
    }
    close_with(kuf, KUF_END_POISON);
    close(fd);
}

int main(void)
{
    begin();
    locked();
    refused();
    adopted(false, false);
    adopted(true, false);
    adopted(true, true);
    return done();
}
