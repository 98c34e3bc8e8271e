/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pages without a callback that writes them: built-in sources (a file, a block device, memory, zero), and a callback
 * that sets kuf_fill.src. A page whose source has become unreadable is poisoned, never zero, and raises a signal in its
 * touchers only.
 */
#include "harness.h"

#include <sys/stat.h>

#define BASE UINT64_C(0x40000000)
#define OTHER UINT64_C(0x80000000)
enum { PAGES = 256 };

static struct source callback = SOURCE_INIT;
static size_t page, length;

/* A file whose page n, counted from `offset`, is the page at BASE + n; with a hole in it if wanted. */
static int make_file(uint64_t offset, bool hole)
{
    char path[] = "/var/tmp/kuf-test-XXXXXX";
    int fd = mkstemp(path);
    must(fd >= 0, "a file in /var/tmp");
    unlink(path);
    unsigned char *bytes = malloc(length);
    write_content(bytes, BASE, length, 1);
    must(pwrite(fd, bytes, length, (off_t)offset) == (ssize_t)length, "writes the file");
    if (hole) {
        memset(bytes, 0, length);
        if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(offset + 64 * page), (off_t)(64 * page)) != 0)
            must(pwrite(fd, bytes, 64 * page, (off_t)(offset + 64 * page)) == (ssize_t)(64 * page), "writes zeroes");
    }
    free(bytes);
    return fd;
}

static struct kuf_source of_file(int fd, uint64_t offset)
{
    return (struct kuf_source){.size = sizeof(struct kuf_source), .kind = KUF_SOURCE_FILE, .fd = fd, .offset = offset};
}

static struct kuf_source of_memory(const void *memory, uint64_t len)
{
    return (struct kuf_source){.size = sizeof(struct kuf_source), .kind = KUF_SOURCE_MEMORY, .addr = memory, .len = len};
}

static int add_with(struct kuf *kuf, unsigned char *ram, int fd, const struct kuf_source *source)
{
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = length, .hva = (uintptr_t)ram, .fd = fd,
                              .source = source};
    return kuf_add_memory(kuf, &slot);
}

/* A handle without a fill callback. */
static struct kuf *open_sources(uint32_t flags)
{
    return open_with((struct kuf_options){.flags = KUF_OPEN_SOURCES | flags, .event = source_event, .opaque = &callback});
}

/* A handle with a slot whose pages come from the source. NULL, with a SKIP, where the file allows no direct I/O. */
static struct kuf *open_with_source(const char *what, unsigned char *ram, int fd, const struct kuf_source *source,
                                    uint32_t flags)
{
    struct kuf *kuf = open_sources(flags);
    int got = add_with(kuf, ram, fd, source);
    if (got == -ENOTSUP && source->flags & KUF_SOURCE_DIRECT_IO) {
        skip_part("%s: %s", what, kuf_error());
        close_with(kuf, 0);
        return NULL;
    }
    is(got, 0, "%s: added: %s", what, got ? kuf_error() : "-");
    return kuf;
}

static bool populate(struct kuf *kuf, int *error)
{
    int before = atomic_load(&callback.events[KUF_EVENT_POPULATED]);
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = KUF_ALL};
    if (kuf_populate(kuf, &request) != 0)
        return false;
    wait_until(atomic_load(&callback.events[KUF_EVENT_POPULATED]) > before);
    *error = last_event(&callback, KUF_EVENT_POPULATED).error;
    return true;
}

/* Every way to ask for pages, over a slot whose pages are content, but for `zero` pages from 64 on. */
static void serves(const char *what, struct kuf_source source, uint32_t flags, bool shared, int zero)
{
    int fd = -1, error = 1;
    unsigned char *ram = map_kind(shared, length, &fd);
    struct kuf *kuf = open_with_source(what, ram, fd, &source, flags);
    if (kuf == NULL)
        return;
    memset(&source, 0xff, sizeof(source));
    is(kuf_read(kuf, NULL, 0), -EINVAL, "%s: kuf_read is refused", what);
    is(kuf_fd(kuf), -ENOTSUP, "%s: and kuf_fd", what);
    struct toucher toucher = {.memory = ram + 16 * page, .gpa = BASE + 16 * page, .length = 32 * page, .generation = 1};
    start_toucher(&toucher);
    ok(join_toucher(&toucher), "%s: on demand, in order", what);
    ok(holds_content(ram + 200 * page, BASE + 200 * page, page, 1), "%s: on demand, anywhere", what);
    is(kuf_ensure(kuf, BASE + 130 * page, 20 * page, -1), 0, "%s: kuf_ensure", what);
    is(kuf_vcpu_fault(kuf, BASE + 3 * page, page, 0), 0, "%s: kuf_vcpu_fault", what);
    if (zero > 0)
        ok(holds_zeroes(ram + 70 * page, page), "%s: zero on demand", what);
    ok(populate(kuf, &error) && error == 0, "%s: kuf_populate", what);
    ok(progress_of(kuf, BASE).flags & KUF_PROGRESS_COMPLETE, "%s: all is there", what);
    ok(holds_content(ram, BASE, 64 * page, 1) && holds_zeroes(ram + 64 * page, zero * page) &&
           holds_content(ram + (64 + zero) * page, BASE + (64 + zero) * page, (PAGES - 64 - zero) * page, 1),
       "%s: each page is the source's", what);
    is(stats_of(kuf).bytes_populated > 0, 1, "%s: counted as populated", what);
    is(kuf_discard(kuf, BASE, 4 * page, KUF_DISCARD_REFILL), 0, "%s: pages are dropped", what);
    ok(holds_content(ram, BASE, 4 * page, 1), "%s: and come again", what);
    close_with(kuf, 0);
    munmap(ram, length);
    close(fd);
}

/*
 * Pages from `bad` on are lost while the slot exists: the file is truncated, `part` bytes after the last whole page, or the
 * memory is unmapped.
 */
static void loses(const char *what, struct kuf_source source, uint32_t flags, bool shared, int bad, int truncated,
                  uint64_t part, void *lost)
{
    int fd = -1, error = 0, poisoned = atomic_load(&callback.events[poison_event()]);
    unsigned char *ram = map_kind(shared, length, &fd);
    struct kuf *kuf = open_with_source(what, ram, fd, &source, flags);
    if (kuf == NULL)
        return;
    if (truncated >= 0)
        must(ftruncate(truncated, (off_t)(source.offset + bad * page + part)) == 0, "truncates the file");
    if (lost != NULL)
        must(mprotect((unsigned char *)lost + bad * page, (PAGES - bad) * page, PROT_NONE) == 0, "takes the memory away");
    char words[128];
    if (truncated >= 0)
        snprintf(words, sizeof(words), "the file is now %" PRIu64 " bytes, the page needs bytes up to %" PRIu64,
                 source.offset + bad * page + part, source.offset + PAGES * page);
    else
        snprintf(words, sizeof(words), "is not readable");
    int wanted = truncated >= 0 ? -EIO : -EFAULT;
    ok(populate(kuf, &error), "%s: populate ends", what);
    is(error, wanted, "%s: with an error", what);
    const char *text = last_event(&callback, KUF_EVENT_POPULATED).text;
    ok(strstr(text, truncated >= 0 ? "the file is now" : words) != NULL, "%s: and why: %s", what, text);
    is(progress_of(kuf, BASE).poisoned, 0, "%s: and poisons nothing", what);
    ok(progress_of(kuf, BASE).absent >= (PAGES - bad) * page, "%s: lost pages are absent", what);
    is(touch(ram + bad * page), poison_signal(), "%s: touching the first that is lost is a memory error", what);
    is(touch(ram + (PAGES - 1) * page), poison_signal(), "%s: and the last", what);
    comes_to(atomic_load(&callback.events[poison_event()]) - poisoned, 2, "%s: one event for each", what);
    is(last_event(&callback, poison_event()).error, wanted, "%s: that says why", what);
    text = last_event(&callback, poison_event()).text;
    ok(strstr(text, words) != NULL, "%s: in words: %s", what, text);
    is(kuf_ensure(kuf, BASE + (bad + 20) * page, page, -1), -EHWPOISON, "%s: kuf_ensure says so", what);
    ok(strstr(kuf_error(), truncated >= 0 ? "the file is now" : words) != NULL, "%s: and why: %s", what, kuf_error());
    ok(holds_content(ram, BASE, bad * page, 1), "%s: the others are served", what);
    close_with(kuf, KUF_END_POISON);
    munmap(ram, length);
    close(fd);
}

/* A callback that sets kuf_fill.src as it is told. */
static struct {
    const unsigned char *from;
    atomic_int calls;
} handed;

static int hand_over(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    atomic_fetch_add(&handed.calls, 1);
    ok(fill->src == NULL, "src is NULL at the start");
    fill->src = handed.from + fill->memory_offset;
    return KUF_FILL_DONE;
}

static struct kuf *open_handing(uint32_t flags)
{
    return open_with((struct kuf_options){.flags = flags, .fill = hand_over, .event = source_event, .opaque = &callback});
}

static void hands_over(uint32_t flags, bool shared)
{
    const char *kind = shared ? "in place" : "by copy";
    int fd = -1, poisoned = atomic_load(&callback.events[poison_event()]);
    unsigned char *ram = map_kind(shared, length, &fd);
    unsigned char *image = map_anonymous(length + page) + 8;
    write_content(image, BASE, length, 1);
    must(mprotect(image - 8 + 128 * page, 64 * page, PROT_NONE) == 0, "takes part of it away");
    handed.from = image;
    struct kuf *kuf = open_handing(flags);
    must(add_with(kuf, ram, fd, NULL) == 0, "%s", kuf_error());
    struct toucher toucher = {.memory = ram, .gpa = BASE, .length = 100 * page, .generation = 1};
    start_toucher(&toucher);
    ok(join_toucher(&toucher), "%s: pages from memory that the callback handed over, at any alignment", kind);
    is(touch(ram + 140 * page), poison_signal(), "%s: an unreadable page there is a failed fill", kind);
    comes_to(atomic_load(&callback.events[poison_event()]) - poisoned, 1, "%s: with an event", kind);
    is(last_event(&callback, poison_event()).error, -EFAULT, "%s: that says why", kind);
    ok(holds_content(ram + 200 * page, BASE + 200 * page, 56 * page, 1), "%s: the rest is served", kind);

    /* The thread that has to fill unresolved guest memory would wait for it. */
    unsigned char *closed = map_anonymous(length);
    add(kuf, OTHER, closed, length);
    handed.from = closed;
    is(kuf_ensure(kuf, BASE + 150 * page, page, 1000), -EHWPOISON, "%s: unresolved guest memory is refused", kind);
    is(last_event(&callback, poison_event()).error, -EDEADLK, "%s: as a deadlock", kind);
    close_with(kuf, KUF_END_POISON);
    munmap(ram, length);
    close(fd);
}

/* ---- A slow source ------------------- */

static atomic_bool hold;
static atomic_int reading;

/* The memory from which the other handle's first page is copied. */
static int fill_far(void *opaque, struct kuf_fill *fill)
{
    atomic_fetch_add(&reading, 1);
    while (atomic_load(&hold))
        sleep_ms(1);
    return source_fill(opaque, fill);
}

static int hand_over_far(void *opaque, struct kuf_fill *fill)
{
    if (fill->memory_offset != 0)
        return source_fill(opaque, fill);
    fill->src = handed.from;
    return KUF_FILL_DONE;
}

/* Reading from kuf_fill.src may take as long as a disk does: the slot's other pages do not wait for it. */
static void reads_slowly(void)
{
    unsigned char *ram = map_anonymous(length), *far = map_anonymous(page);
    handed.from = far;
    atomic_store(&hold, true);
    struct kuf *slow = open_with((struct kuf_options){.fill = fill_far, .event = source_event, .opaque = &callback});
    add(slow, BASE, far, page);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = hand_over_far, .event = source_event, .opaque = &callback, .demand_run = page,
        .flags = KUF_OPEN_DETECT_ZERO});
    add(kuf, BASE, ram, length);
    struct toucher first = {.memory = ram, .gpa = BASE, .length = page, .generation = 1};
    start_toucher(&first);
    wait_until(atomic_load(&reading) == 1);
    ok(holds_content(ram + 40 * page, BASE + 40 * page, page, 1), "another page is served while one is read slowly");
    comes_to(progress_of(kuf, BASE).present, page, "and there is an answer to how far it is");
    atomic_store(&hold, false);
    ok(join_toucher(&first), "the slow one comes, too");
    close_with(kuf, KUF_END_POISON);
    close_with(slow, 0);
    munmap(ram, length);
    munmap(far, page);
}

/* A slot with a source does not ask the callback; one without does. */
static void both(void)
{
    unsigned char *ram = map_anonymous(length), *other = map_anonymous(length);
    struct kuf_source zero = {.size = sizeof(zero), .kind = KUF_SOURCE_ZERO};
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &callback});
    must(add_with(kuf, ram, -1, &zero) == 0, "%s", kuf_error());
    add(kuf, OTHER, other, length);
    unsigned calls = atomic_load(&callback.calls);
    ok(holds_zeroes(ram, length), "a slot with a source is its source's");
    is(atomic_load(&callback.calls), calls, "and the callback is not called for it");
    ok(holds_content(other, OTHER, length, 1), "a slot without one is the callback's");
    close_with(kuf, 0);
}

/* The first block device that can be read, or -1. */
static int some_device(void)
{
    DIR *devices = opendir("/sys/class/block");
    int fd = -1;
    for (struct dirent *entry; fd < 0 && devices != NULL && (entry = readdir(devices)) != NULL;) {
        char path[300];
        snprintf(path, sizeof(path), "/dev/%s", entry->d_name);
        fd = open(path, O_RDONLY | O_CLOEXEC);
        struct stat stat;
        if (fd >= 0 && (fstat(fd, &stat) != 0 || !S_ISBLK(stat.st_mode) || lseek(fd, 0, SEEK_END) < (off_t)length)) {
            close(fd);
            fd = -1;
        }
    }
    if (devices != NULL)
        closedir(devices);
    return fd;
}

static void device(void)
{
    int fd = some_device();
    if (fd < 0) {
        skip_part("no block device that can be read");
        return;
    }
    unsigned char *ram = map_anonymous(length), *bytes = malloc(length);
    struct kuf_source source = of_file(fd, 0);
    struct kuf *kuf = open_sources(KUF_OPEN_DETECT_ZERO);
    must(add_with(kuf, ram, -1, &source) == 0, "a block device: %s", kuf_error());
    ok(pread(fd, bytes, length, 0) == (ssize_t)length && memcmp(ram, bytes, length) == 0, "a block device's bytes");
    close_with(kuf, 0);
    source.offset = (uint64_t)lseek(fd, 0, SEEK_END) - length + page;
    kuf = open_sources(0);
    is(add_with(kuf, map_anonymous(length), -1, &source), -EINVAL, "a block device that ends before the slot");
    close_with(kuf, 0);
    free(bytes);
    close(fd);
}

int main(void)
{
    begin();
    page = page_size();
    length = PAGES * page;
    bool minor = has_feature(KUF_FEATURE_MINOR);
    if (!minor)
        skip_part("no minor faults: nothing is filled in place");

    int whole = make_file(0, false), odd = make_file(4 * page + 24, false), holes = make_file(page, true);
    unsigned char *memory = map_anonymous(length);
    write_content(memory, BASE, length, 1);
    for (int shared = 0; shared <= minor; shared++) {
        for (int detect = 0; detect <= 1; detect++) {
            uint32_t flags = detect ? KUF_OPEN_DETECT_ZERO : 0;
            char what[64];
#define NAMED(name) (snprintf(what, sizeof(what), "%s, %s%s", name, shared ? "in place" : "by copy", detect ? ", looking for zeroes" : ""), what)
            serves(NAMED("a file"), of_file(whole, 0), flags, shared, 0);
            serves(NAMED("a file at an odd offset"), of_file(odd, 4 * page + 24), flags, shared, 0);
            serves(NAMED("a file with a hole"), of_file(holes, page), flags, shared, 64);
            struct kuf_source direct = of_file(whole, 0);
            direct.flags = KUF_SOURCE_DIRECT_IO;
            serves(NAMED("direct I/O"), direct, flags, shared, 0);
            serves(NAMED("memory"), of_memory(memory, length), flags, shared, 0);
            for (uint64_t part = 0; part < page; part += page / 2 - 1) {
                int cut = make_file(0, false);
                loses(NAMED("a truncated file"), of_file(cut, 0), flags, shared, 100, cut, part, NULL);
                close(cut);
                cut = make_file(page, true);
                loses(NAMED("a truncated file with an offset"), of_file(cut, page), flags, shared, 64, cut, part, NULL);
                close(cut);
                cut = make_file(0, false);
                struct kuf_source direct = of_file(cut, 0);
                direct.flags = KUF_SOURCE_DIRECT_IO;
                loses(NAMED("a truncated file, direct I/O"), direct, flags, shared, 100, cut, part, NULL);
                close(cut);
            }
            unsigned char *lost = map_anonymous(length);
            write_content(lost, BASE, length, 1);
            loses(NAMED("memory that is lost"), of_memory(lost, length), flags, shared, 100, -1, 0, lost);
            munmap(lost, length);
            hands_over(flags, shared);
        }
    }
    reads_slowly();
    both();
    device();

    /* The library releases a source with its slot. */
    struct kuf *kuf = open_sources(0);
    struct kuf_source source = of_memory(memory, length);
    unsigned char *ram = map_anonymous(length);
    /* The first slot opens descriptors that the library keeps for all slots. */
    must(add_with(kuf, ram, -1, &source) == 0 && remove_patiently(kuf, BASE) == 0, "%s", kuf_error());
    must(madvise(ram, length, MADV_DONTNEED) == 0, "madvise");
    int before = open_descriptors();
    source = of_file(whole, 0);
    must(add_with(kuf, ram, -1, &source) == 0, "%s", kuf_error());
    is(open_descriptors() > before, 1, "a source keeps a descriptor of its own");
    is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE), 0, "the slot is filled and taken off");
    comes_to(open_descriptors(), before, "the descriptor goes with it");
    ok(holds_content(ram, BASE, length, 1), "the memory is the caller's");
    must(add_with(kuf, map_anonymous(length), -1, &source) == 0, "%s", kuf_error());
    close_with(kuf, KUF_END_POPULATE);
    return done();
}
