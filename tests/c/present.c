/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* KUF_RESOLVE_PRESENT: pages that hold their bytes already are found, those that do not are left alone. */
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

static void fill_pages(unsigned char *ram, uint64_t first, uint64_t count)
{
    write_content(ram + first * page_size(), gpa_of(first), count * page_size(), 1);
}

/* Memory that was filled before it was added, and has holes. */
static void filled_before(void)
{
    ssize_t page = (ssize_t)page_size();
    unsigned char *ram = map_anonymous(PAGES * page_size());
    fill_pages(ram, 0, 100);
    fill_pages(ram, 510, 4);
    fill_pages(ram, 1024, 512);
    ok(holds_zeroes(ram + 1000 * page, page), "a page is read and not written");
    must(madvise(ram + 50 * page, page, MADV_DONTNEED) == 0, "madvise");
    kuf = open_driven(&source);
    add(kuf, BASE, ram, PAGES * page_size());
    is(progress_of(kuf, BASE).absent, PAGES * page, "all is absent at first");
    is(present(200, 100), 0, "where nothing is, nothing is found");
    is(present(0, 10), 10 * page, "pages that are there are found");
    is(present(0, 10), 0, "and found once");
    is(present(0, PAGES), (90 - 1 + 4 + 1 + 512) * page, "all of them, the one that was only read too");
    struct kuf_progress progress = progress_of(kuf, BASE);
    is(progress.present, (100 - 1 + 4 + 1 + 512) * page, "they are present");
    is(progress.absent + progress.present, PAGES * page, "and the others absent");
    ok(holds_content(ram, BASE, 50 * page_size(), 1) && holds_content(ram + 1024 * page, gpa_of(1024), 512 * page_size(), 1),
       "they keep their bytes");
    is(kuf_pending(kuf, NULL, 0), 0, "nobody was asked for anything");

    /* A page that is not there is asked for when it is touched, and stays asked for. */
    struct kuf_fault fault;
    struct toucher toucher = {.memory = ram + 50 * page, .gpa = gpa_of(50), .length = page_size(), .generation = 1};
    start_toucher(&toucher);
    is(kuf_poll(kuf, -1), 1, "a page that was dropped before is asked for");
    is(kuf_read(kuf, &fault, 1), 1, "and read");
    is(present(0, PAGES), 0, "it is not found");
    is(kuf_pending(kuf, &fault, 1), 1, "and still owed");
    is(fault.gpa, gpa_of(50), "the same page");
    unsigned char *bytes = map_anonymous(page_size());
    write_content(bytes, gpa_of(50), page_size(), 1);
    is(kuf_resolve(kuf, gpa_of(50), bytes, page_size(), 0), page, "it is resolved");
    ok(join_toucher(&toucher), "with its bytes");

    /* What the guest gives back is not found: neither before its event is read nor after. */
    must(madvise(ram + 1024 * page, 8 * page_size(), MADV_DONTNEED) == 0, "madvise");
    is(present(1024, 512), 0, "pages that were given back are not found");
    is(kuf_discard(kuf, gpa_of(1040), 8 * page_size(), 0), 0, "kuf_discard");
    is(present(1024, 512), 0, "nor those that were discarded");
    is(progress_of(kuf, BASE).removed, 8 * page, "they are removed");
    close_with(kuf, KUF_CLOSE_POISON);
    munmap(ram, PAGES * page_size());
    munmap(bytes, page_size());
}

/* The host fills pages by its own UFFDIO_COPY, and somebody waits. */
static void filled_by_the_host(void)
{
    ssize_t page = (ssize_t)page_size();
    int uffd = own_userfaultfd(0);
    unsigned char *ram = map_anonymous(8 * page_size()), *bytes = map_anonymous(page_size());
    kuf = open_driven(&source);
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = 8 * page_size(), .hva = (uintptr_t)ram,
                                .flags = KUF_MEMORY_UFFD, .uffd = uffd};
    must(kuf_add_memory(kuf, &memory) == 0, "kuf_add_memory: %s", kuf_error());
    struct toucher toucher = {.memory = ram + 3 * page, .gpa = gpa_of(3), .length = page_size(), .generation = 1};
    struct kuf_fault fault;
    start_toucher(&toucher);
    is(kuf_poll(kuf, -1), 1, "a page is asked for");
    is(kuf_read(kuf, &fault, 1), 1, "and read");
    write_content(bytes, gpa_of(3), page_size(), 1);
    struct uffdio_copy copy = {.dst = (uintptr_t)ram + 3 * page_size(), .src = (uintptr_t)bytes, .len = page_size(),
                               .mode = UFFDIO_COPY_MODE_DONTWAKE};
    must(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
    is(present(0, 8), page, "what the host has copied is found");
    ok(join_toucher(&toucher), "and who waited reads it");
    is(kuf_pending(kuf, NULL, 0), 0, "nothing is owed");
    close_with(kuf, KUF_CLOSE_POISON);
    close(uffd);
    munmap(ram, 8 * page_size());
    munmap(bytes, page_size());
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
                                .flags = KUF_MEMORY_UFFD, .uffd = uffd};
    must(kuf_add_memory(kuf, &memory) == 0, "kuf_add_memory: %s", kuf_error());
    is(present(0, 8), (ssize_t)page_size(), "a mark is no page");
    close_with(kuf, KUF_CLOSE_POISON);
    close(uffd);
    munmap(ram, 8 * page_size());
}

/* Shared memory whose file the library was not given: what is in the file is there, mapped or not. */
static void shared(void)
{
    int fd;
    unsigned char *ram = map_shared(8 * page_size(), &fd), *bytes = map_anonymous(page_size());
    write_content(bytes, gpa_of(2), page_size(), 1);
    must(pwrite(fd, bytes, page_size(), (off_t)(2 * page_size())) == (ssize_t)page_size(), "pwrite");
    kuf = open_driven(&source);
    add(kuf, BASE, ram, 8 * page_size());
    is(present(0, 8), (ssize_t)page_size(), "a page of a shared file is found, though nobody has mapped it");
    ok(holds_content(ram + 2 * page_size(), gpa_of(2), page_size(), 1), "and read");
    close_with(kuf, KUF_CLOSE_POISON);
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
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = 4 * size, .hva = (uintptr_t)ram};
    must(kuf_add_memory(kuf, &memory) == 0, "kuf_add_memory: %s", kuf_error());
    is(kuf_resolve(kuf, BASE, NULL, 4 * size, KUF_RESOLVE_PRESENT), (ssize_t)size, "a huge page that is there is found");
    ok(holds_content(ram + size, BASE + size, size, 1), "and keeps its bytes");
    close_with(kuf, KUF_CLOSE_POISON);
    munmap(ram, 4 * size);
}

/* Neighbours that are there are found from inside the callback that was asked for them. */
static int fill_round_neighbours(void *opaque, struct kuf_fill *fill)
{
    struct kuf **handle = opaque;
    /* Declined, which poisons nothing. Deferred, it would be owed, and not asked for again by who touches it. */
    if (!(fill->flags & KUF_FILL_DEMAND))
        return -EAGAIN;
    must(kuf_resolve(*handle, fill->gpa, NULL, fill->len, KUF_RESOLVE_PRESENT) >= 0, "a callback may: %s", kuf_error());
    return source_fill(&source, fill) == 0 ? KUF_FILLED : -EIO;
}

static void inside_a_callback(void)
{
    unsigned char *ram = map_anonymous(64 * page_size());
    static struct kuf *handle;
    for (int i = 1; i < 64; i += 2)
        fill_pages(ram, i, 1);
    /* Only what was there before is of the first generation. */
    atomic_store(&source.generation, 2);
    handle = kuf = open_with((struct kuf_options){.fill = fill_round_neighbours, .opaque = &handle});
    add(kuf, BASE, ram, 64 * page_size());
    bool good = true;
    for (int i = 0; i < 64; i++)
        good = holds_content(ram + i * page_size(), gpa_of(i), page_size(), i % 2 ? 1 : 2) && good;
    ok(good, "pages that were there keep their bytes, the others are filled");
    ok(present(0, 64) >= 0, "what was not touched is found at the end");
    close_with(kuf, 0);
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
        must(kuf_discard(kuf, gpa_of(round % 32), 32 * page_size(), 0) == 0, "kuf_discard: %s", kuf_error());
    }
    good = holds_content(ram, BASE, 64 * page_size(), 1) && good;
    must(madvise(ram, 8 * page_size(), MADV_DONTNEED) == 0, "madvise");
    good = holds_zeroes(ram, 8 * page_size()) && good;
    atomic_store(&over, true);
    pthread_join(lookers[0], NULL);
    pthread_join(lookers[1], NULL);
    ok(good, "what is dropped meanwhile comes from the source again");
    close_with(kuf, KUF_CLOSE_POISON);
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
