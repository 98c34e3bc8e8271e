/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * No room for a page: a full tmpfs, no free huge page. Writing there would raise SIGBUS in the library. Instead it
 * waits a while for room, then gives up the one page and reports why. Everything else continues.
 */
#include "touches.h"
#include "watched.h"
#include <sys/mount.h>
#include <sys/vfs.h>

#define BASE UINT64_C(0xc0000000)
#define OTHER UINT64_C(0xd0000000)
enum { PAGES = 16, ROOM = 8 };

static struct source source = SOURCE_INIT;

/* A file of PAGES pages on a file system that has room for ROOM. The mount is in a namespace of this process. */
static int file_with_little_room(void)
{
    char directory[] = "/tmp/kuf-test-XXXXXX", options[64];
    if (mkdtemp(directory) == NULL)
        skip("no directory to mount on: %s", strerror(errno));
    snprintf(options, sizeof(options), "size=%zu", ROOM * page_size());
    int error = 0, fd = -1;
    if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0
        || mount("tmpfs", directory, "tmpfs", 0, options) < 0) {
        error = errno;
    } else {
        fd = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
        error = errno;
        /* The descriptor keeps it. */
        umount2(directory, MNT_DETACH);
    }
    rmdir(directory);
    if (fd < 0)
        skip("no tmpfs of its own size can be mounted: %s", strerror(error));
    struct statfs room;
    must(fstatfs(fd, &room) == 0 && room.f_blocks * (uint64_t)room.f_bsize == ROOM * page_size(), "room for %d pages", ROOM);
    must(ftruncate(fd, (off_t)(PAGES * page_size())) == 0, "ftruncate");
    return fd;
}

static void empty(int fd)
{
    int how = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    must(fallocate(fd, how, 0, (off_t)(PAGES * page_size())) == 0, "the file is emptied");
}

static unsigned char *map_file(int fd)
{
    void *ram = mmap(NULL, PAGES * page_size(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    must(ram != MAP_FAILED, "maps the file");
    return ram;
}

static bool no_room(int error)
{
    return error == -ENOSPC || error == -ENOMEM;
}

/* The ninth page has no room. */
static void serviced(int fd)
{
    size_t page = page_size(), length = PAGES * page;
    empty(fd);
    unsigned char *ram = map_file(fd), *other = map_anonymous(length), *bytes = map_anonymous(length);
    struct kuf *kuf = watch(open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page}));
    add_shared(kuf, BASE, ram, length, fd, 0);
    add(kuf, OTHER, other, length);
    ok(holds_content(ram, BASE, ROOM * page, 1), "pages for which there is room are filled in place");
    comes_to(stats_of(kuf).bytes_in_place, ROOM * page, "all of them");
    is(stats_of(kuf).install_no_memory, 0, "with room to spare");
    write_content(bytes, BASE, length, 1);
    is(kuf_resolve(kuf, BASE + 12 * page, bytes + 12 * page, page, 0), -ENOMEM, "kuf_resolve of a page without room");
    is(kuf_resolve(kuf, BASE + 12 * page, NULL, page, KUF_RESOLVE_ZERO), -ENOMEM, "with zeroes as well");
    is(progress_of(kuf, BASE).absent, length - ROOM * page, "leaves it as it was");

    /* Room becomes free in time. */
    struct one_touch touch;
    touch_in_thread(&touch, ram + ROOM * page);
    wait_until(stats_of(kuf).install_no_memory > 0);
    ok(!atomic_load(&touch.finished), "a page without room waits for it");
    ok(holds_content(other, OTHER, length, 1), "pages of another slot are served meanwhile");
    ok(holds_content(ram, BASE, ROOM * page, 1), "and those that are present stay");
    is(kuf_discard(kuf, BASE, page, KUF_DISCARD_REFILL), 0, "another page is dropped");
    pthread_join(touch.thread, NULL);
    is(touch.raised, 0, "then there is room for it");
    ok(touch.word == word_of(BASE + ROOM * page, 1), "and it is filled");
    comes_to(stats_of(kuf).bytes_in_place, (ROOM + 1) * page, "in place");
    is(stats_of(kuf).bytes_poisoned, 0, "nothing was lost");

    /* No room becomes free. */
    int events = atomic_load(&source.events[poison_event()]);
    uint64_t tries = stats_of(kuf).install_no_memory;
    touch_in_thread(&touch, ram + 10 * page);
    pthread_join(touch.thread, NULL);
    is(touch.raised, poison_signal(), "a page for which no room comes is poisoned");
    ok(stats_of(kuf).install_no_memory > tries, "after it was tried for a while");
    comes_to(atomic_load(&source.events[poison_event()]), events + 1, "the caller is told");
    struct kuf_event event = last_event(&source, poison_event());
    ok(no_room(event.error), "of the reason: %s", strerror(-event.error));
    is(event.gpa, BASE + 10 * page, "and which page it is");
    is(event.len, page, "which is one");
    is(stats_of(kuf).bytes_poisoned, page, "no other is poisoned");
    is(kuf_ensure(kuf, BASE + 10 * page, page, -1), -EHWPOISON, "kuf_ensure says so");
    ok(holds_content(ram + page, BASE + page, ROOM * page, 1), "pages that are present go on");

    /* No thread waits for these pages: none is poisoned. */
    struct kuf_populate_request rest = {.size = sizeof(rest), .gpa = BASE + 12 * page, .len = 4 * page};
    is(kuf_populate(kuf, &rest), 0, "populate where there is no room");
    wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) == 1);
    ok(no_room(last_event(&source, KUF_EVENT_POPULATED).error), "ends and says why");
    is(progress_of(kuf, BASE).absent, length - (ROOM + 2) * page + page, "the pages are absent still");
    is(progress_of(kuf, BASE).poisoned, page, "and not poisoned");
    is(kuf_discard(kuf, BASE + page, 2 * page, KUF_DISCARD_ZERO), 0, "the guest gives pages back");
    is(kuf_resolve(kuf, BASE + 12 * page, bytes + 12 * page, page, 0), page, "now there is room to resolve one");
    ok(holds_content(ram + 13 * page, BASE + 13 * page, page, 1), "and to fill one");
    close_watched(kuf, KUF_END_POISON);
    munmap(ram, length);
    munmap(other, length);
    munmap(bytes, length);
}

/* The caller's own loop learns of it from kuf_fault.place and kuf_resolve, and the library gives up no page. */
static void caller_driven(int fd)
{
    size_t page = page_size(), length = PAGES * page;
    empty(fd);
    unsigned char *ram = map_file(fd), *bytes = map_anonymous(length);
    struct kuf *kuf = watch(open_driven(NULL));
    add_shared(kuf, BASE, ram, length, fd, 0);
    write_content(bytes, BASE, length, 1);
    is(kuf_resolve(kuf, BASE, bytes, ROOM * page, 0), ROOM * page, "as many pages as there is room for are resolved");
    struct one_touch touch;
    touch_in_thread(&touch, ram + ROOM * page);
    is(kuf_poll(kuf, -1), 1, "one more is touched");
    struct kuf_fault fault;
    is(kuf_read(kuf, &fault, 1), 1, "and read");
    ok(fault.place == NULL, "with no place to write its bytes to");
    is(kuf_resolve(kuf, fault.gpa, bytes + ROOM * page, page, 0), -ENOMEM, "it cannot be resolved now");
    is(kuf_pending(kuf, NULL, 0), 1, "and is still owed");
    ok(!atomic_load(&touch.finished), "its toucher waits on");
    is(kuf_discard(kuf, BASE, page, KUF_DISCARD_REFILL), 0, "a page is dropped");
    is(kuf_resolve(kuf, fault.gpa, bytes + ROOM * page, page, 0), page, "then it is resolved");
    pthread_join(touch.thread, NULL);
    ok(touch.raised == 0 && touch.word == word_of(BASE + ROOM * page, 1), "and the toucher has its bytes");
    close_watched(kuf, KUF_END_POISON);
    munmap(ram, length);
    munmap(bytes, length);
}

/* ---- Huge pages ------------------------------------------------------------------------------------------------------- */

static struct kuf *resolved_by;
static unsigned char *resolved_from;

/* Resolves its own run, and fills its buffer if that fails. */
static int resolving_fill(void *opaque, struct kuf_fill *fill)
{
    if (fill->gpa >= OTHER)
        return source_fill(opaque, fill);
    write_content(resolved_from, fill->gpa, fill->len, 1);
    if (kuf_resolve(resolved_by, fill->gpa, resolved_from, fill->len, 0) >= 0)
        return KUF_FILL_DEFERRED;
    return source_fill(opaque, fill);
}

/* There is none: mapped without a reservation, each touch fails. `resolves`: the callback resolves its own run. */
static void huge(bool shared, bool resolves)
{
    const char *kind = resolves ? "huge pages that the callback resolves" : shared ? "huge pages of a file" : "anonymous huge pages";
    static const char sys[] = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    size_t size = (size_t)2 << 20;
    char path[128];
    long there[2];
    for (int i = 0; i < 2; i++) {
        snprintf(path, sizeof(path), "%s/%s", sys, i == 0 ? "free_hugepages" : "nr_overcommit_hugepages");
        there[i] = number_in(path, "");
    }
    if (there[0] != 0 || there[1] != 0) {
        skip_part("%s: this machine has none, or has some to spare (%ld free, %ld more allowed)", kind, there[0], there[1]);
        return;
    }
    int fd = shared ? memfd_create("guest", MFD_CLOEXEC | MFD_HUGETLB | (21U << 26)) : -1;
    if (shared && (fd < 0 || ftruncate(fd, (off_t)(2 * size)) < 0)) {
        skip_part("%s: %s", kind, strerror(errno));
        return;
    }
    int flags = MAP_NORESERVE | (shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (21 << 26));
    unsigned char *ram = mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (ram == MAP_FAILED) {
        skip_part("%s: %s", kind, strerror(errno));
        return;
    }
    unsigned char *bytes = map_anonymous(size), *other = map_anonymous(PAGES * page_size());
    struct kuf *kuf = watch(open_with((struct kuf_options){.fill = resolves ? resolving_fill : source_fill,
                                                           .event = source_event, .opaque = &source}));
    resolved_by = kuf;
    resolved_from = map_anonymous(2 * size);
    add_kind(kuf, BASE, ram, 2 * size, fd);
    add(kuf, OTHER, other, PAGES * page_size());
    int events = atomic_load(&source.events[poison_event()]);
    struct one_touch touch;
    touch_in_thread(&touch, ram + page_size());
    /*
     * Some kernels return EEXIST where they mean ENOMEM. If the library believed it, the toucher would fault for ever.
     */
    for (int tries = 0; tries < 10000 && stats_of(kuf).install_no_memory == 0; tries++)
        sleep_ms(1);
    must(stats_of(kuf).install_no_memory > 0, "%s: the want of memory is seen (EEXIST: %" PRIu64 ")", kind,
         stats_of(kuf).install_exists);
    ok(holds_content(other, OTHER, PAGES * page_size(), 1), "%s: other pages are served meanwhile", kind);
    is(kuf_resolve(kuf, BASE + size, bytes, size, 0), -ENOMEM, "%s: kuf_resolve of the other one", kind);
    pthread_join(touch.thread, NULL);
    is(touch.raised, poison_signal(), "%s: one for which there is no memory is poisoned", kind);
    comes_to(atomic_load(&source.events[poison_event()]), events + 1, "%s: the caller is told", kind);
    struct kuf_event event = last_event(&source, poison_event());
    ok(no_room(event.error) && event.gpa == BASE && event.len == size, "%s: of which and why: %s", kind,
       strerror(-event.error));
    is(progress_of(kuf, BASE).absent, size, "%s: the other one is absent still", kind);
    close_watched(kuf, KUF_END_POISON);
    munmap(ram, 2 * size);
    munmap(bytes, size);
    munmap(resolved_from, 2 * size);
    munmap(other, PAGES * page_size());
    close(fd);
}

int main(void)
{
    begin();
    int fd = file_with_little_room();
    begin_watched(40);
    catch_touches();
    needs_feature(KUF_FEATURE_MINOR, "minor faults: shared memory is filled by copy");
    serviced(fd);
    caller_driven(fd);
    huge(true, false);
    huge(false, false);
    huge(false, true);
    return done();
}
