/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A source made of layers: differences over a base, a file with a bitmap, parts of a slot from several files. Each page is
 * that of the uppermost layer that has it, and zero if none does.
 */
#include "harness.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 256, BITMAP = PAGES / 8 };

static struct source callback = SOURCE_INIT;
static size_t page, length;

/* The generation of each page's bytes; 0: zeroes. */
static unsigned generation_of[PAGES];

static int empty_file(void)
{
    char path[] = "/var/tmp/kuf-test-XXXXXX";
    int fd = mkstemp(path);
    must(fd >= 0 && unlink(path) == 0 && ftruncate(fd, (off_t)length) == 0, "a file in /var/tmp");
    return fd;
}

/* Writes `n` pages from `first` on, of the given generation. */
static void write_pages(int fd, unsigned first, unsigned n, unsigned generation)
{
    unsigned char *bytes = malloc(n * page);
    write_content(bytes, BASE + first * page, n * page, generation);
    must(pwrite(fd, bytes, n * page, (off_t)(first * page)) == (ssize_t)(n * page), "writes the file");
    free(bytes);
}

static void expect(unsigned first, unsigned n, unsigned generation)
{
    for (unsigned i = first; i < first + n; i++)
        generation_of[i] = generation;
}

static bool holds(const unsigned char *ram, unsigned i)
{
    const unsigned char *at = ram + i * page;
    return generation_of[i] == 0 ? holds_zeroes(at, page) : holds_content(at, BASE + i * page, page, generation_of[i]);
}

/* The first page that is not as expected, or PAGES. */
static unsigned first_wrong(const unsigned char *ram)
{
    unsigned i = 0;
    while (i < PAGES && holds(ram, i))
        i++;
    return i;
}

static struct kuf_source file(int fd)
{
    return (struct kuf_source){.size = sizeof(struct kuf_source), .kind = KUF_SOURCE_FILE, .fd = fd};
}

static int add_with(struct kuf *kuf, unsigned char *ram, int fd, const struct kuf_source *source)
{
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = length, .hva = (uintptr_t)ram, .fd = fd,
                              .source = source};
    return kuf_add_memory(kuf, &slot);
}

static struct kuf *open_sources(uint32_t flags)
{
    return open_with((struct kuf_options){.flags = KUF_OPEN_SOURCES | flags, .event = source_event, .opaque = &callback});
}

static void populate(struct kuf *kuf)
{
    int before = atomic_load(&callback.events[KUF_EVENT_POPULATED]);
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = KUF_ALL};
    must(kuf_populate(kuf, &request) == 0, "%s", kuf_error());
    wait_until(atomic_load(&callback.events[KUF_EVENT_POPULATED]) > before);
}

/* On demand page by page, backwards, and by populate. */
static void serves(const char *what, const struct kuf_source *source, bool shared, uint32_t flags)
{
    const char *how = shared ? "in place" : "by copy";
    for (int ahead = 0; ahead <= 1; ahead++) {
        int fd = -1;
        unsigned char *ram = map_kind(shared, length, &fd);
        struct kuf *kuf = open_sources(flags);
        int got = add_with(kuf, ram, fd, source);
        if (got == -ENOTSUP && source->flags & KUF_SOURCE_DIRECT_IO) {
            skip_part("%s: %s", what, kuf_error());
        } else {
            is(got, 0, "%s, %s: added: %s", what, how, got ? kuf_error() : "-");
            unsigned wrong = PAGES;
            if (ahead)
                populate(kuf);
            else
                for (unsigned i = PAGES; wrong == PAGES && i-- > 0;)
                    wrong = holds(ram, i) ? wrong : i;
            is(wrong, PAGES, "%s, %s: page by page", what, how);
            is(first_wrong(ram), PAGES, "%s, %s%s: each page is that of its layer", what, how, ahead ? ", populated" : "");
            is(kuf_discard(kuf, BASE, length, KUF_DISCARD_REFILL), 0, "%s, %s: dropped", what, how);
            is(first_wrong(ram), PAGES, "%s, %s: and filled again", what, how);
        }
        close_with(kuf, KUF_END_POISON);
        munmap(ram, length);
        close(fd);
    }
}

/* A base, a difference of which pages are holes, and a newer one. */
static void differences(bool shared, uint32_t flags, uint32_t direct)
{
    int base = empty_file(), older = empty_file(), newer = empty_file();
    write_pages(base, 0, PAGES - 16, 1);
    write_pages(older, 8, 64, 2);
    write_pages(older, 200, 1, 2);
    write_pages(newer, 16, 1, 3);
    write_pages(newer, 70, 4, 3);
    write_pages(newer, 255, 1, 3);
    /* A page of zeroes that was written is no hole; blocks that were never written are one. */
    unsigned char *zeroes = calloc(1, page);
    must(pwrite(newer, zeroes, page, (off_t)(100 * page)) == (ssize_t)page, "writes zeroes");
    free(zeroes);
    bool reserves = fallocate(newer, 0, (off_t)(120 * page), (off_t)(8 * page)) == 0;
    if (!reserves)
        skip_part("the file system cannot reserve blocks");
    expect(0, PAGES - 16, 1);
    expect(PAGES - 16, 16, 0);
    expect(8, 64, 2);
    expect(200, 1, 2);
    expect(16, 1, 3);
    expect(70, 4, 3);
    expect(255, 1, 3);
    expect(100, 1, 0);
    struct kuf_source lowest = file(base), middle = file(older), top = file(newer);
    middle.base = &lowest;
    top.base = &middle;
    top.flags = middle.flags = lowest.flags = direct;
    serves(direct ? "two differences, direct I/O" : "two differences", &top, shared, flags);
    close(base);
    close(older);
    close(newer);
}

/* The file holds old bytes where the bit is clear; the last page that it has is its end. */
static void bitmap(bool shared, uint32_t flags)
{
    int fd = empty_file(), below = empty_file();
    unsigned char bits[BITMAP] = {0};
    write_pages(fd, 0, PAGES, 1);
    write_pages(below, 0, PAGES, 2);
    expect(0, PAGES, 0);
    for (unsigned i = 3; i < 200; i += i % 7 + 1) {
        bits[i / 8] |= (unsigned char)(1 << i % 8);
        expect(i, 1, 1);
    }
    bits[100 / 8] |= 1 << 100 % 8;
    must(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(100 * page), (off_t)page) == 0, "a hole");
    expect(100, 1, 0);
    must(ftruncate(fd, (off_t)(200 * page)) == 0, "cuts the file");
    struct kuf_source source = file(fd), base = file(below);
    source.bitmap = bits;
    source.bitmap_size = sizeof(bits);
    source.bitmap_page_size = page;
    serves("a file with a bitmap", &source, shared, flags);
    for (unsigned i = 0; i < PAGES; i++)
        if (!(bits[i / 8] >> i % 8 & 1))
            expect(i, 1, 2);
    source.base = &base;
    serves("a bitmap over a base", &source, shared, flags);
    close(fd);
    close(below);
}

/* A slot from parts of two files and of memory, the rest zero. */
static void parts(bool shared, uint32_t flags)
{
    int one = empty_file(), two = empty_file();
    unsigned char *memory = map_anonymous(8 * page);
    write_pages(one, 0, PAGES, 1);
    write_pages(two, 0, PAGES, 2);
    write_content(memory, BASE + 40 * page, 8 * page, 3);
    struct kuf_source first = file(one), second = file(two), zero = file(0);
    struct kuf_source third = {.size = sizeof(third), .kind = KUF_SOURCE_MEMORY, .addr = memory, .len = 8 * page};
    first.offset = first.slot_offset = 10 * page;
    first.slot_len = 100 * page;
    second.offset = second.slot_offset = 90 * page;
    third.slot_offset = 40 * page;
    third.slot_len = 8 * page;
    zero.kind = KUF_SOURCE_ZERO;
    zero.slot_offset = 60 * page;
    zero.slot_len = page;
    zero.base = &third;
    third.base = &first;
    first.base = &second;
    expect(0, 10, 0);
    expect(90, PAGES - 90, 2);
    expect(10, 100, 1);
    expect(40, 8, 3);
    expect(60, 1, 0);
    serves("parts of a slot", &zero, shared, flags);
    munmap(memory, 8 * page);
    close(one);
    close(two);
}

/* What a layer has lost is poisoned; the pages of others are served. */
static void loses(bool shared)
{
    const char *how = shared ? "in place" : "by copy";
    int base = empty_file(), difference = empty_file(), fd = -1;
    write_pages(base, 0, PAGES, 1);
    write_pages(difference, 32, 32, 2);
    write_pages(difference, 250, 1, 2);
    struct kuf_source lowest = file(base), top = file(difference);
    top.base = &lowest;
    unsigned char *ram = map_kind(shared, length, &fd);
    struct kuf *kuf = open_sources(0);
    must(add_with(kuf, ram, fd, &top) == 0, "%s", kuf_error());
    must(ftruncate(difference, (off_t)(40 * page + 100)) == 0, "cuts the difference");
    expect(0, PAGES, 1);
    expect(32, 32, 2);
    is(touch(ram + 40 * page), poison_signal(), "%s: a page that the difference has in part only", how);
    is(touch(ram + 250 * page), poison_signal(), "%s: a page that it has no more", how);
    ok(holds(ram, 39) && holds(ram, 32), "%s: pages that it still has", how);
    ok(holds(ram, 31) && holds(ram, 64) && holds(ram, 255), "%s: pages of the base", how);
    close_with(kuf, KUF_END_POISON);
    munmap(ram, length);
    close(fd);
    close(base);
    close(difference);
}

int main(void)
{
    begin();
    page = page_size();
    length = PAGES * page;
    bool minor = has_feature(KUF_FEATURE_MINOR);
    if (!minor)
        skip_part("no minor faults: nothing is filled in place");
    for (int shared = 0; shared <= minor; shared++) {
        for (int detect = 0; detect <= 1; detect++) {
            uint32_t flags = detect ? KUF_OPEN_DETECT_ZERO : 0;
            differences(shared, flags, 0);
            differences(shared, flags, KUF_SOURCE_DIRECT_IO);
            bitmap(shared, flags);
            parts(shared, flags);
        }
        loses(shared);
    }
    return done();
}
