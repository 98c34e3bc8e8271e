/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Shared memory is filled in place: the callback's buffer is the page, nothing is copied, and the file holds the bytes. */
#include "harness.h"

#define BASE UINT64_C(0x80000000)
enum { PAGES = 64, OLD = 9 };

static bool file_holds(int fd, uint64_t offset, uint64_t gpa, size_t length, uint64_t generation)
{
    unsigned char *bytes = malloc(length);
    bool good = pread(fd, bytes, length, (off_t)offset) == (ssize_t)length && holds_content(bytes, gpa, length, generation);
    free(bytes);
    return good;
}

int main(void)
{
    begin();
    needs_feature(KUF_FEATURE_MINOR, "minor faults on shared memory");
    size_t page = page_size();
    static struct source source = SOURCE_INIT, again = SOURCE_INIT;
    struct kuf *kuf = open_serviced(&source);

    int fd;
    unsigned char *ram = map_shared(PAGES * page, &fd);
    unsigned char old[4096];
    memset(old, 0x5a, sizeof(old));
    must(pwrite(fd, old, sizeof(old), (off_t)(OLD * page)) == (ssize_t)sizeof(old), "old data in the file");
    add_shared(kuf, BASE, ram, PAGES * page, fd, KUF_MEMORY_POPULATED);

    struct kuf_progress_info progress = progress_of(kuf, BASE);
    is(progress.present, page, "a page that the file holds counts as present");
    is(progress.absent, (PAGES - 1) * page, "the others are absent");

    struct toucher first = {.memory = ram, .gpa = BASE, .length = OLD * page, .generation = 1};
    struct toucher second = {.memory = ram + (OLD + 1) * page, .gpa = BASE + (OLD + 1) * page,
                             .length = (PAGES - OLD - 1) * page, .generation = 1};
    start_toucher(&first);
    start_toucher(&second);
    ok(join_toucher(&first) && join_toucher(&second), "every absent page reads as its source's bytes");
    ok(ram[OLD * page] == 0x5a && ram[OLD * page + 4095] == 0x5a, "the page that the file held keeps its bytes");

    ok(atomic_load(&source.flags_seen) & KUF_RUN_IN_PLACE, "the callback's buffer is the page");
    is(atomic_load(&source.bytes), (PAGES - 1) * page, "each page is filled once");
    comes_to(stats_of(kuf).bytes_in_place, (PAGES - 1) * page, "all of it in place");
    is(stats_of(kuf).bytes_copied, 0, "nothing is copied");
    ok(file_holds(fd, 0, BASE, OLD * page, 1), "the file holds the bytes");
    wait_until(atomic_load(&source.events[KUF_EVENT_COMPLETE]) == 1);
    close_with(kuf, 0);
    ok(holds_content(ram, BASE, OLD * page, 1), "the memory is the caller's afterwards");

    /* A handler that died may have left a half-filled page: then every page is asked for again. */
    atomic_store(&again.generation, 2);
    kuf = open_serviced(&again);
    add_shared(kuf, BASE, ram, PAGES * page, fd, KUF_MEMORY_FILL_ALL);
    progress = progress_of(kuf, BASE);
    is(progress.absent, PAGES * page, "KUF_MEMORY_FILL_ALL: nothing counts as present");
    is(kuf_resolve(kuf, BASE + 2 * page, NULL, page, KUF_RESOLVE_IN_PLACE), page, "a page known to be whole is marked so");
    struct toucher all = {.memory = ram + 3 * page, .gpa = BASE + 3 * page, .length = (PAGES - 3) * page, .generation = 2};
    start_toucher(&all);
    ok(join_toucher(&all), "KUF_MEMORY_FILL_ALL: pages come from the source");
    ok(holds_content(ram + 2 * page, BASE + 2 * page, page, 1), "the page that was marked whole keeps its bytes");
    close_with(kuf, KUF_END_POPULATE);
    ok(holds_content(ram, BASE, 2 * page, 2), "closing filled the rest");

    /* A file mapped at an offset, at another place. */
    unsigned char *window = mmap(NULL, 8 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)(16 * page));
    must(window != MAP_FAILED, "maps a window");
    atomic_store(&again.generation, 3);
    kuf = open_serviced(&again);
    struct kuf_memory memory = {.size = sizeof(memory), .flags = KUF_MEMORY_FILL_ALL, .gpa = BASE,
                                .len = 8 * page, .hva = (uintptr_t)window, .fd = fd, .fd_offset = 16 * page};
    is(kuf_add_memory(kuf, &memory), 0, "a window of the file is added");
    struct toucher some = {.memory = window, .gpa = BASE, .length = 8 * page, .generation = 3};
    start_toucher(&some);
    ok(join_toucher(&some), "the window is filled");
    ok(file_holds(fd, 16 * page, BASE, 8 * page, 3), "at its offset of the file");
    close_with(kuf, 0);
    close(fd);
    return done();
}
