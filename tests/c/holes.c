/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* A slot of which the caller has unmapped a part: pages after the hole are treated like those before it. */
#include "uffd.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 64, HOLE = 24 };

static size_t page;

static void add_adopted(struct kuf *kuf, const unsigned char *ram, int uffd)
{
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = PAGES * page,
                                .hva = (uintptr_t)ram, .uffd = uffd};
    int got = kuf_add_memory(kuf, &memory);
    must(got == 0, "kuf_add_memory: %s", got ? kuf_error() : "adds");
}

/* Long runs are not poisoned at the end but made inaccessible: on both sides. */
static void closed(bool remove)
{
    const char *how = remove ? "kuf_remove_memory" : "kuf_close";
    const size_t length = (size_t)3 << 30, hole = (size_t)1 << 30;
    struct source source = SOURCE_INIT;
    struct kuf *kuf = open_serviced(&source);
    unsigned char *ram =
        mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    must(ram != MAP_FAILED, "3 GiB of address space");
    add(kuf, BASE, ram, length);
    must(munmap(ram + hole, page) == 0, "a page in the middle is unmapped");
    is(kuf_discard(kuf, BASE, length, KUF_DISCARD_REFILL), 0, "%s: all of it is to be asked for anew, as one run", how);
    if (remove)
        is(remove_patiently(kuf, BASE), 0, "%s", how);
    close_with(kuf, KUF_END_POISON);
    ok(touch(ram) != 0, "%s: the start shows no zeroes", how);
    ok(touch(ram + hole - page) != 0, "%s: nor does what is in front of the hole", how);
    ok(touch(ram + hole + page) != 0, "%s: nor what is behind it", how);
    ok(touch(ram + length - page) != 0, "%s: nor the end", how);
    munmap(ram, length);
}

/* A fault that was read and not served is delivered again to the next handler. */
static void handed_over(void)
{
    int uffd = own_userfaultfd(UFFD_FEATURE_EVENT_UNMAP);
    struct kuf *kuf = open_with((struct kuf_options){.flags = KUF_OPEN_ADOPT_ONLY});
    unsigned char *ram = map_anonymous(PAGES * page), *bytes = map_anonymous(page);
    add_adopted(kuf, ram, uffd);
    uint64_t gpa = BASE + (PAGES - 1) * page;
    struct toucher toucher = {.memory = ram + (PAGES - 1) * page, .gpa = gpa, .length = page, .generation = 1};
    struct kuf_fault fault;
    start_toucher(&toucher);
    is(kuf_poll(kuf, -1), 1, "handover: a page is asked for");
    is(kuf_read(kuf, &fault, 1), 1, "handover: and read");
    must(munmap(ram + HOLE * page, page) == 0, "a page in front of it is unmapped");
    close_with(kuf, KUF_END_HANDOVER);
    struct uffd_msg message = {0};
    while (read(uffd, &message, sizeof(message)) != (ssize_t)sizeof(message))
        sleep_ms(1);
    is(message.event, UFFD_EVENT_PAGEFAULT, "handover: the fault behind the hole comes to the next handler");
    write_content(bytes, gpa, page, 1);
    struct uffdio_copy copy = {.dst = (uintptr_t)toucher.memory, .src = (uintptr_t)bytes, .len = page};
    is(ioctl(uffd, UFFDIO_COPY, &copy), 0, "handover: which can answer");
    ok(join_toucher(&toucher), "handover: and the toucher goes on");
    close(uffd);
    munmap(ram, PAGES * page);
    munmap(bytes, page);
}

/* KUF_RESOLVE_PRESENT finds the pages on both sides. */
static void found(void)
{
    int uffd = own_userfaultfd(UFFD_FEATURE_EVENT_UNMAP);
    struct kuf *kuf = open_with((struct kuf_options){.flags = KUF_OPEN_ADOPT_ONLY});
    unsigned char *ram = map_anonymous(PAGES * page), *bytes = map_anonymous(PAGES * page);
    write_content(bytes, BASE, PAGES * page, 1);
    add_adopted(kuf, ram, uffd);
    /* The caller fills it. */
    struct uffdio_copy copy = {.dst = (uintptr_t)ram, .src = (uintptr_t)bytes, .len = PAGES * page};
    must(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
    must(munmap(ram + HOLE * page, page) == 0, "a page is unmapped");
    is(kuf_resolve(kuf, BASE, NULL, PAGES * page, KUF_RESOLVE_PRESENT), (PAGES - 1) * page,
       "pages that are there are found, on both sides of the hole");
    close_with(kuf, 0);
    close(uffd);
    munmap(ram, PAGES * page);
    munmap(bytes, PAGES * page);
}

int main(void)
{
    begin();
    page = page_size();
    closed(false);
    closed(true);
    handed_over();
    found();
    return done();
}
