/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* KUF_RESOLVE_PRESENT: finds pages that hold their bytes already, and does not change the others. */
#include "uffd.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 2048 };

static struct source source = SOURCE_INIT;
static struct kuf *kuf;

static uint64_t gpa_of(uint64_t page)
{
    return BASE + page * page_size();
}

static ssize_t present(uint64_t first, uint64_t count)
{
    return kuf_resolve(kuf, gpa_of(first), NULL, count * page_size(), KUF_RESOLVE_PRESENT);
}

/* Memory whose userfaultfd is the test's. */
static unsigned char *add_own(int uffd, uint64_t pages)
{
    unsigned char *ram = map_anonymous(pages * page_size());
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = pages * page_size(), .hva = (uintptr_t)ram,
                                .uffd = uffd};
    must(kuf_add_memory(kuf, &memory) == 0, "kuf_add_memory: %s", kuf_error());
    return ram;
}

/* Fills pages without the library. */
static void fill_pages(int uffd, unsigned char *ram, uint64_t first, uint64_t count)
{
    unsigned char *bytes = map_anonymous(count * page_size());
    write_content(bytes, gpa_of(first), count * page_size(), 1);
    struct uffdio_copy copy = {.dst = (uintptr_t)ram + first * page_size(), .src = (uintptr_t)bytes,
                               .len = count * page_size(), .mode = UFFDIO_COPY_MODE_DONTWAKE};
    must(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
    munmap(bytes, count * page_size());
}

/* Memory that the caller fills, with holes. */
static void filled_before(void)
{
    ssize_t page = (ssize_t)page_size();
    int uffd = own_userfaultfd(UFFD_FEATURE_EVENT_REMOVE);
    kuf = open_driven(&source);
    unsigned char *ram = add_own(uffd, PAGES);
    fill_pages(uffd, ram, 0, 50);
    fill_pages(uffd, ram, 51, 49);
    fill_pages(uffd, ram, 510, 4);
    fill_pages(uffd, ram, 1024, 512);
    struct uffdio_zeropage zero = {.range = {(uintptr_t)ram + 1000 * page_size(), page_size()}};
    must(ioctl(uffd, UFFDIO_ZEROPAGE, &zero) == 0, "UFFDIO_ZEROPAGE");
    is(progress_of(kuf, BASE).absent, PAGES * page, "all is absent at first");
    is(present(200, 100), 0, "where nothing is, nothing is found");
    is(present(0, 10), 10 * page, "pages that are there are found");
    is(present(0, 10), 0, "and found once");
    is(present(0, PAGES), (90 - 1 + 4 + 1 + 512) * page, "all of them, the zero page too");
    struct kuf_progress_info progress = progress_of(kuf, BASE);
    is(progress.present, (100 - 1 + 4 + 1 + 512) * page, "they are present");
    is(progress.absent + progress.present, PAGES * page, "and the others absent");
    ok(holds_content(ram, BASE, 50 * page_size(), 1) && holds_content(ram + 1024 * page, gpa_of(1024), 512 * page_size(), 1),
       "they keep their bytes");
    is(kuf_pending(kuf, NULL, 0), 0, "the caller was not asked for anything");

    /* A page that does not exist is asked for when it is touched, and stays pending. */
    struct kuf_fault fault;
    struct toucher toucher = {.memory = ram + 50 * page, .gpa = gpa_of(50), .length = page_size(), .generation = 1};
    start_toucher(&toucher);
    is(kuf_poll(kuf, -1), 1, "a page that was left out is asked for");
    is(kuf_read(kuf, &fault, 1), 1, "and read");
    is(present(0, PAGES), 0, "it is not found");
    is(kuf_pending(kuf, &fault, 1), 1, "and still owed");
    is(fault.gpa, gpa_of(50), "the same page");
    unsigned char *bytes = map_anonymous(page_size());
    write_content(bytes, gpa_of(50), page_size(), 1);
    is(kuf_resolve(kuf, gpa_of(50), bytes, page_size(), 0), page, "it is resolved");
    ok(join_toucher(&toucher), "with its bytes");

    /* Pages that the guest gives back are not found: neither before their event is read nor after. */
    must(madvise(ram + 1024 * page, 8 * page_size(), MADV_DONTNEED) == 0, "madvise");
    is(present(1024, 512), 0, "pages that were given back are not found");
    is(kuf_discard(kuf, gpa_of(1040), 8 * page_size(), KUF_DISCARD_REFILL), 0, "kuf_discard");
    is(present(1024, 512), 0, "nor those that were discarded");
    is(progress_of(kuf, BASE).removed, 8 * page, "they are removed");
    close_with(kuf, KUF_END_POISON);
    close(uffd);
    munmap(ram, PAGES * page_size());
    munmap(bytes, page_size());
}

/* The caller fills pages by its own UFFDIO_COPY, and a thread waits. */
static void filled_by_the_host(void)
{
    ssize_t page = (ssize_t)page_size();
    int uffd = own_userfaultfd(0);
    kuf = open_driven(&source);
    unsigned char *ram = add_own(uffd, 8);
    struct toucher toucher = {.memory = ram + 3 * page, .gpa = gpa_of(3), .length = page_size(), .generation = 1};
    struct kuf_fault fault;
    start_toucher(&toucher);
    is(kuf_poll(kuf, -1), 1, "a page is asked for");
    is(kuf_read(kuf, &fault, 1), 1, "and read");
    fill_pages(uffd, ram, 3, 1);
    is(present(0, 8), page, "pages that the caller has copied are found");
    ok(join_toucher(&toucher), "and who waited reads it");
    is(kuf_pending(kuf, NULL, 0), 0, "nothing is owed");
    close_with(kuf, KUF_END_POISON);
    close(uffd);
    munmap(ram, 8 * page_size());
}

#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif

/* Write protection leaves marks where there is no page. */
static void marks(void)
{
    int uffd = open_uffd();
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_WP_UNPOPULATED};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0) {
        skip_part("no write protection of pages that are not there: no marks");
        return;
    }
    unsigned char *ram = map_anonymous(8 * page_size());
    struct uffdio_register range = {.range = {(uintptr_t)ram, 8 * page_size()}, .mode = UFFDIO_REGISTER_MODE_WP};
    must(ioctl(uffd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER");
    write_content(ram + page_size(), gpa_of(1), page_size(), 1);
    struct uffdio_writeprotect protect = {.range = {(uintptr_t)ram, 8 * page_size()}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    must(ioctl(uffd, UFFDIO_WRITEPROTECT, &protect) == 0, "UFFDIO_WRITEPROTECT");
    kuf = open_driven(&source);
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = 8 * page_size(), .hva = (uintptr_t)ram,
                                .flags = KUF_MEMORY_POPULATED, .uffd = uffd};
    must(kuf_add_memory(kuf, &memory) == 0, "kuf_add_memory: %s", kuf_error());
    is(progress_of(kuf, BASE).present, page_size(), "a mark is no page when a slot is added");
    is(kuf_discard(kuf, BASE, page_size(), KUF_DISCARD_REFILL), 0, "nor afterwards");
    is(present(0, 8), 0, "when the pages are looked for");
    close_with(kuf, KUF_END_POISON);
    close(uffd);
    munmap(ram, 8 * page_size());
}

/* Shared memory whose file the library was not given: the file's pages are present, mapped or not. */
static void shared(void)
{
    int fd;
    unsigned char *ram = map_shared(8 * page_size(), &fd), *bytes = map_anonymous(page_size());
    kuf = open_driven(&source);
    add(kuf, BASE, ram, 8 * page_size());
    write_content(bytes, gpa_of(2), page_size(), 1);
    must(pwrite(fd, bytes, page_size(), (off_t)(2 * page_size())) == (ssize_t)page_size(), "pwrite");
    is(present(0, 8), (ssize_t)page_size(), "a page of a shared file is found that is not mapped");
    ok(holds_content(ram + 2 * page_size(), gpa_of(2), page_size(), 1), "and read");
    close_with(kuf, KUF_END_POISON);
    munmap(ram, 8 * page_size());
    munmap(bytes, page_size());
    close(fd);
}

static void huge(void)
{
    const size_t size = 2 << 20;
    unsigned char *ram = mmap(NULL, 4 * size, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (21 << 26), -1, 0);
    if (ram == MAP_FAILED) {
        skip_part("no huge pages of 2 MiB");
        return;
    }
    write_content(ram + size, BASE + size, size, 1);
    kuf = open_driven(&source);
    add_populated(kuf, BASE, ram, 4 * size);
    is(progress_of(kuf, BASE).present, size, "a huge page that is there is found when the slot is added");
    is(kuf_resolve(kuf, BASE, NULL, 4 * size, KUF_RESOLVE_PRESENT), 0, "and no other");
    ok(holds_content(ram + size, BASE + size, size, 1), "and keeps its bytes");
    close_with(kuf, KUF_END_POISON);
    munmap(ram, 4 * size);
}

/* Neighbours that are there are found from inside the callback that was asked for them. */
static int fill_round_neighbours(void *opaque, struct kuf_fill *fill)
{
    struct kuf **handle = opaque;
    /* Declined, which poisons nothing. A deferred run would be pending, and a touch would not ask for it again. */
    if (!(fill->flags & KUF_RUN_DEMAND))
        return -EAGAIN;
    must(kuf_resolve(*handle, fill->gpa, NULL, fill->len, KUF_RESOLVE_PRESENT) >= 0, "a callback may: %s", kuf_error());
    return source_fill(&source, fill) == 0 ? KUF_FILL_DONE : -EIO;
}

static void inside_a_callback(void)
{
    int uffd = own_userfaultfd(0);
    static struct kuf *handle;
    handle = kuf = open_with((struct kuf_options){.fill = fill_round_neighbours, .opaque = &handle});
    unsigned char *ram = add_own(uffd, 64);
    /* Only what the caller fills is of the first generation. */
    atomic_store(&source.generation, 2);
    for (int i = 1; i < 64; i += 2)
        fill_pages(uffd, ram, i, 1);
    bool good = true;
    for (int i = 0; i < 64; i++)
        good = holds_content(ram + i * page_size(), gpa_of(i), page_size(), i % 2 ? 1 : 2) && good;
    ok(good, "pages that were there keep their bytes, the others are filled");
    ok(present(0, 64) >= 0, "pages that were not touched are found at the end");
    close_with(kuf, 0);
    close(uffd);
    atomic_store(&source.generation, 1);
    munmap(ram, 64 * page_size());
}

/* Looking and dropping at the same time: no page is booked that is not there. */
static atomic_bool over;

static void *look(void *unused)
{
    (void)unused;
    while (!atomic_load(&over))
        if (present(0, 64) < 0)
            must(false, "KUF_RESOLVE_PRESENT: %s", kuf_error());
    return NULL;
}

static void races(void)
{
    unsigned char *ram = map_anonymous(64 * page_size());
    kuf = open_serviced(&source);
    add(kuf, BASE, ram, 64 * page_size());
    pthread_t lookers[2] = {start(look, NULL), start(look, NULL)};
    bool good = true;
    for (int round = 0; round < 300; round++) {
        good = holds_content(ram, BASE, 64 * page_size(), 1) && good;
        must(kuf_discard(kuf, gpa_of(round % 32), 32 * page_size(), KUF_DISCARD_REFILL) == 0, "kuf_discard: %s", kuf_error());
    }
    good = holds_content(ram, BASE, 64 * page_size(), 1) && good;
    must(madvise(ram, 8 * page_size(), MADV_DONTNEED) == 0, "madvise");
    good = holds_zeroes(ram, 8 * page_size()) && good;
    atomic_store(&over, true);
    pthread_join(lookers[0], NULL);
    pthread_join(lookers[1], NULL);
    ok(good, "pages that are dropped meanwhile come from the source again");
    close_with(kuf, KUF_END_POISON);
    munmap(ram, 64 * page_size());
}

int main(void)
{
    begin();
    filled_before();
    filled_by_the_host();
    marks();
    shared();
    huge();
    inside_a_callback();
    races();
    return done();
}
