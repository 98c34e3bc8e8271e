/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memory that holds pages when it is added: they would never be asked for. Such memory is refused and left as it was, unless
 * the caller says with KUF_MEMORY_POPULATED that these pages are the guest's own; then they are present.
 */
#include "uffd.h"

#include <sys/resource.h>
#include <sys/stat.h>

#define BASE UINT64_C(0x40000000)
#define HUGE (UINT64_C(2) << 20)
enum { PAGES = 1024 };

static struct source source = SOURCE_INIT;
static size_t page, length;

static struct kuf_memory slot_of(const unsigned char *ram, int fd, uint32_t flags)
{
    return (struct kuf_memory){.size = sizeof(struct kuf_memory), .flags = flags, .gpa = BASE,
                               .len = length, .hva = (uintptr_t)ram, .fd = fd};
}

/* Refused with a text that has the number of pages and the remedy; with the flag that number is present. */
static void holds(const char *what, unsigned char *ram, int fd, uint64_t pages)
{
    struct kuf *kuf = open_serviced(&source);
    struct kuf_memory slot = slot_of(ram, fd, 0);
    is(kuf_add_memory(kuf, &slot), -EBUSY, "%s: refused", what);
    char count[32];
    snprintf(count, sizeof(count), "%" PRIu64 " of %d pages", pages, PAGES);
    const char *text = kuf_error();
    ok(strstr(text, count) != NULL && strstr(text, "KUF_MEMORY_POPULATED") != NULL, "%s: with a text that says why: %s", what,
       text);
    ok(!is_registered(ram), "%s: and not registered", what);
    is(progress_of(kuf, KUF_ALL).total, 0, "%s: there is no slot", what);
    slot.flags |= KUF_MEMORY_POPULATED;
    is(kuf_add_memory(kuf, &slot), 0, "%s: taken with KUF_MEMORY_POPULATED", what);
    is(progress_of(kuf, BASE).present, pages * page, "%s: its pages are present", what);
    is(progress_of(kuf, BASE).absent, (PAGES - pages) * page, "%s: the rest is absent", what);
    is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE), 0, "%s: and is filled", what);
    close_with(kuf, 0);
}

static bool all_is_served(const char *what, unsigned char *ram, int fd, uint32_t flags)
{
    struct kuf *kuf = open_serviced(&source);
    struct kuf_memory slot = slot_of(ram, fd, flags);
    int got = kuf_add_memory(kuf, &slot);
    must(got == 0, "%s: kuf_add_memory: %s", what, got ? kuf_error() : "adds");
    is(progress_of(kuf, BASE).absent, length, "%s: all is absent", what);
    bool good = holds_content(ram, BASE, length, 1);
    close_with(kuf, KUF_END_POISON);
    return good;
}

/*
 * Whether mlock(2) is the kernel's: those of the sanitizers do nothing, because all of their own memory is mapped too.
 */
static bool locks_memory(void)
{
    unsigned char *ram = map_anonymous(page), there = 0;
    must(mlock(ram, page) == 0, "mlock: %s", strerror(errno));
    must(mincore(ram, page, &there) == 0, "mincore");
    munmap(ram, page);
    return there & 1;
}

static void private_memory(void)
{
    unsigned char *ram = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    must(ram != MAP_FAILED, "memory");
    holds("MAP_POPULATE", ram, -1, PAGES);
    munmap(ram, length);

    ram = map_anonymous(length);
    ok(holds_zeroes(ram + 7 * page, page), "a page is read");
    ram[9 * page] = 1;
    ram[9 * page + page] = 1;
    holds("a page that was read and two that were written", ram, -1, 3);
    ok(ram[9 * page] == 1 && holds_zeroes(ram + 7 * page, page), "they keep their bytes");
    ok(holds_content(ram + 11 * page, BASE + 11 * page, length - 11 * page, 1), "the others have their source's");
    munmap(ram, length);

    ram = map_anonymous(length);
    ram[length - 1] = 1;
    must(madvise(ram + length - page, page, MADV_DONTNEED) == 0, "madvise");
    ok(all_is_served("memory that was dropped", ram, -1, 0), "every page has its bytes");
    munmap(ram, length);
}

static void locked_pages(void)
{
    unsigned char *ram = map_anonymous(length);
    must(mlock(ram, 4 * page) == 0, "mlock: %s", strerror(errno));
    holds("mlock", ram, -1, 4);
    munmap(ram, length);
}

/* One touch makes 512 pages. */
static void huge_page(void)
{
    unsigned char *room = mmap(NULL, length + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(room != MAP_FAILED, "memory");
    unsigned char *ram = (unsigned char *)(((uintptr_t)room + HUGE - 1) & ~(HUGE - 1));
    madvise(ram, length, MADV_HUGEPAGE);
    ram[HUGE] = 1;
    unsigned char there[HUGE / 4096];
    must(mincore(ram + HUGE, HUGE, there) == 0, "mincore");
    if (there[HUGE / page - 1] & 1)
        holds("one touch of a huge page", ram, -1, HUGE / page);
    else
        skip_part("no huge page is to be had");
    munmap(room, length + HUGE);
}

/*
 * Refused while an earlier slot's poison is there, and accepted after it was dropped. `fd`: for memory that is filled
 * in place.
 */
static void marked(const char *what, unsigned char *ram, int fd)
{
    struct kuf *kuf = open_serviced(&source);
    struct kuf_memory slot = slot_of(ram, fd, 0);
    must(kuf_add_memory(kuf, &slot) == 0, "%s: kuf_add_memory", what);
    is(kuf_remove_memory(kuf, BASE, KUF_END_POISON), 0, "%s: removed and poisoned", what);
    is(kuf_add_memory(kuf, &slot), -EBUSY, "%s: poison that an earlier slot has left is refused", what);
    ok(strstr(kuf_error(), "MADV_DONTNEED") != NULL, "%s: with a text that says what to do: %s", what, kuf_error());
    slot.flags |= KUF_MEMORY_POPULATED;
    is(kuf_add_memory(kuf, &slot), 0, "%s: taken with KUF_MEMORY_POPULATED", what);
    is(progress_of(kuf, BASE).present, length, "%s: poison counts as present then", what);
    ok(touch(ram) == SIGBUS, "%s: and raises SIGBUS", what);
    is(kuf_discard(kuf, BASE, page, KUF_DISCARD_REFILL), 0, "%s: kuf_discard takes it away", what);
    ok(holds_content(ram, BASE, page, 1), "%s: the page is filled then", what);
    is(kuf_remove_memory(kuf, BASE, 0), 0, "%s: removed", what);
    slot.flags &= ~(uint32_t)KUF_MEMORY_POPULATED;
    if (fd >= 0) {
        slot.flags |= KUF_MEMORY_FILL_ALL;
        is(kuf_add_memory(kuf, &slot), 0, "%s: KUF_MEMORY_FILL_ALL drops the poison", what);
    } else {
        must(madvise(ram, length, MADV_DONTNEED) == 0, "madvise");
        must(madvise(ram, length, MADV_REMOVE) == 0 || errno == EINVAL, "madvise");
        is(kuf_add_memory(kuf, &slot), 0, "%s: taken when it was dropped", what);
    }
    ok(holds_content(ram, BASE, length, 1), "%s: every page has its bytes", what);
    close_with(kuf, 0);
}

/* Poison marks stay when a slot has ended, and are no pages to be filled. */
static void poison_marks(void)
{
    if (!has_feature(KUF_FEATURE_POISON)) {
        skip_part("this kernel has no UFFDIO_POISON, so there are no marks");
        return;
    }
    unsigned char *ram = map_anonymous(length);
    marked("private memory", ram, -1);
    munmap(ram, length);
    int fd;
    ram = map_shared(length, &fd);
    marked("shared memory without its descriptor", ram, -1);
    munmap(ram, length);
    close(fd);
    if (!has_feature(KUF_FEATURE_MINOR)) {
        skip_part("this kernel fills no shared memory in place");
        return;
    }
    ram = map_shared(length, &fd);
    marked("shared memory", ram, fd);
    munmap(ram, length);
    close(fd);
}

static void shared_memory(void)
{
    int fd;
    unsigned char *ram = map_shared(length, &fd), *bytes = map_anonymous(page);
    write_content(bytes, BASE + 5 * page, page, 1);
    must(pwrite(fd, bytes, page, (off_t)(5 * page)) == (ssize_t)page, "pwrite");
    holds("a page of a file", ram, fd, 1);
    ok(holds_content(ram, BASE, length, 1), "every page has its bytes");
    atomic_store(&source.generation, 2);
    /* The file is full now. */
    struct kuf *kuf = open_serviced(&source);
    struct kuf_memory slot = slot_of(ram, fd, KUF_MEMORY_FILL_ALL | KUF_MEMORY_POPULATED);
    is(kuf_add_memory(kuf, &slot), -EINVAL, "KUF_MEMORY_FILL_ALL and KUF_MEMORY_POPULATED are refused");
    if (has_feature(KUF_FEATURE_MINOR)) {
        slot.flags = KUF_MEMORY_FILL_ALL;
        is(kuf_add_memory(kuf, &slot), 0, "KUF_MEMORY_FILL_ALL takes what the file holds");
        ok(holds_content(ram, BASE, length, 2), "and asks for all of it");
    }
    close_with(kuf, KUF_END_POISON);
    atomic_store(&source.generation, 1);
    munmap(ram, length);
    close(fd);

    /* Filled by copy: without the file's descriptor. Not mapped here. */
    ram = map_shared(length, &fd);
    must(pwrite(fd, bytes, page, (off_t)(5 * page)) == (ssize_t)page, "pwrite");
    holds("a page of a file that is not named", ram, -1, 1);
    ok(holds_content(ram, BASE, length, 1), "every page has its bytes");
    munmap(ram, length);
    close(fd);
    munmap(bytes, page);
}

/* The caller fills pages of its own, of memory that it has registered itself. */
static void adopted(void)
{
    int uffd = own_userfaultfd(0);
    unsigned char *ram = map_anonymous(length);
    struct uffdio_register range = {.range = {(uintptr_t)ram, length}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    must(ioctl(uffd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER");
    unsigned char *bytes = map_anonymous(page);
    write_content(bytes, BASE, page, 7);
    struct uffdio_copy copy = {.dst = (uintptr_t)ram, .src = (uintptr_t)bytes, .len = page};
    must(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
    struct kuf *kuf = open_serviced(&source);
    struct kuf_memory slot = slot_of(ram, -1, 0);
    slot.uffd = uffd;
    is(kuf_add_memory(kuf, &slot), -EBUSY, "an adopted userfaultfd: a page that the caller has filled is refused");
    ok(is_registered(ram), "and the memory stays as the caller has registered it");
    slot.flags |= KUF_MEMORY_POPULATED;
    is(kuf_add_memory(kuf, &slot), 0, "or taken with the flag");
    is(progress_of(kuf, BASE).present, page, "as present");
    ok(holds_content(ram, BASE, page, 7) && holds_content(ram + page, BASE + page, length - page, 1), "it keeps its bytes");
    close_with(kuf, 0);
    close(uffd);
    munmap(ram, length);
    munmap(bytes, page);
}

/* A page that the caller writes later counts as the guest's only if the caller has set the flag. */
static void put_there_later(bool populated)
{
    int uffd = own_userfaultfd(0), poisoned = atomic_load(&source.events[poison_event()]);
    unsigned char *ram = map_anonymous(length), *bytes = map_anonymous(page);
    struct kuf *kuf = open_serviced(&source);
    struct kuf_memory slot = slot_of(ram, -1, populated ? KUF_MEMORY_POPULATED : 0);
    slot.uffd = uffd;
    must(kuf_add_memory(kuf, &slot) == 0, "kuf_add_memory: %s", kuf_error());
    write_content(bytes, BASE + 3 * page, page, 7);
    struct uffdio_copy copy = {.dst = (uintptr_t)ram + 3 * page, .src = (uintptr_t)bytes, .len = page};
    must(ioctl(uffd, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
    is(kuf_ensure(kuf, BASE, 8 * page, -1), populated ? 0 : -EHWPOISON, "kuf_ensure over a page that was put there");
    is(progress_of(kuf, BASE).poisoned, populated ? 0 : page, "so many bytes are lost");
    comes_to(atomic_load(&source.events[poison_event()]) - poisoned, !populated, "so many events say so");
    if (populated)
        ok(holds_content(ram + 3 * page, BASE + 3 * page, page, 7), "it keeps its bytes");
    else
        is(touch(ram + 3 * page), SIGSEGV, "the file's bytes are not shown");
    ok(holds_content(ram + 4 * page, BASE + 4 * page, page, 1), "its neighbour has the source's");
    close_with(kuf, KUF_END_POISON);
    close(uffd);
    munmap(ram, length);
    munmap(bytes, page);
}

/* In a child each, because it locks all of its memory. */
static int locked(int flags, bool before, bool shared)
{
    begin_child();
    struct rlimit no_limit = {RLIM_INFINITY, RLIM_INFINITY};
    setrlimit(RLIMIT_MEMLOCK, &no_limit);
    const char *what = shared ? "mlockall, a file" : "mlockall, private memory";
    int fd = -1;
    if (before && mlockall(flags) != 0)
        skip("mlockall: %s", strerror(errno));
    unsigned char *ram = shared ? map_shared(length, &fd) : mmap(NULL, length, PROT_READ | PROT_WRITE,
                                                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(ram != MAP_FAILED, "memory");
    if (!before && mlockall(flags) != 0)
        skip("mlockall: %s", strerror(errno));
    if (before && !(flags & MCL_ONFAULT)) {
        holds(what, ram, fd, PAGES);
        return done();
    }
    ok(all_is_served(what, ram, fd, 0), "%s: every page has its bytes", what);
    return done();
}

static void locked_memory(void)
{
    static const struct {
        int flags;
        bool before;
    } ways[] = {{MCL_FUTURE, false}, {MCL_FUTURE | MCL_ONFAULT, true}, {MCL_FUTURE, true}};
    for (int i = 0; i < 6; i++) {
        pid_t child = fork();
        if (child == 0)
            exit(locked(ways[i / 2].flags, ways[i / 2].before, i % 2));
        int status = end_of(child);
        if (status == 77)
            continue;
        is(status, 0, "mlockall %#x %s the mapping", ways[i / 2].flags, ways[i / 2].before ? "before" : "after");
    }
}

/* A file source is not read as a whole where mappings are locked. */
static void locked_source(void)
{
    pid_t child = fork();
    if (child == 0) {
        begin_child();
        struct rlimit no_limit = {RLIM_INFINITY, RLIM_INFINITY};
        setrlimit(RLIMIT_MEMLOCK, &no_limit);
        int file = memfd_create("image", MFD_CLOEXEC);
        must(file >= 0 && ftruncate(file, (off_t)length) == 0, "an image");
        unsigned char *ram = map_anonymous(length);
        if (mlockall(MCL_FUTURE) != 0)
            skip("mlockall: %s", strerror(errno));
        struct kuf *kuf = open_with((struct kuf_options){.flags = KUF_OPEN_SOURCES});
        struct kuf_source from = {.size = sizeof(from), .kind = KUF_SOURCE_FILE, .fd = file};
        struct kuf_memory slot = slot_of(ram, -1, 0);
        slot.source = &from;
        must(kuf_add_memory(kuf, &slot) == 0, "kuf_add_memory: %s", kuf_error());
        struct stat stat;
        must(fstat(file, &stat) == 0, "fstat");
        is(stat.st_blocks, 0, "mlockall, a file source: none of it is read when the slot is added");
        close_with(kuf, KUF_END_POISON);
        exit(done());
    }
    int status = end_of(child);
    ok(status == 0 || status == 77, "status %d", status);
}

int main(void)
{
    begin();
    page = page_size();
    length = PAGES * page;
    private_memory();
    huge_page();
    poison_marks();
    shared_memory();
    adopted();
    put_there_later(true);
    put_there_later(false);
    if (locks_memory()) {
        locked_pages();
        locked_memory();
        locked_source();
    } else {
        skip_part("mlock does nothing here: it is a sanitizer's");
    }
    return done();
}
