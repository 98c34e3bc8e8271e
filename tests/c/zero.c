/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KUF_OPEN_DETECT_ZERO: pages of zeroes are installed as zero pages, wherever the bytes come from, and take no memory;
 * every other page holds its bytes.
 */
#include "harness.h"

#include <sys/stat.h>

#define BASE UINT64_C(0x40000000)
enum { PAGES = 512 };

/* Data, zeroes alone and in runs, and pages that are zero but for one byte at either end. */
enum kind { DATA, NOTHING, FIRST_BYTE, LAST_BYTE };

static enum kind kind_of_page(int page)
{
    if (page >= 200 && page < 300)
        return NOTHING;
    if (page >= 300 && page < 400)
        return DATA;
    return page % 7 == 3 ? NOTHING : page % 11 == 5 ? FIRST_BYTE : page % 13 == 6 ? LAST_BYTE : DATA;
}

static int zero_pages(int first, int count)
{
    int zero = 0;
    for (int page = first; page < first + count; page++)
        zero += kind_of_page(page) == NOTHING;
    return zero;
}

static void make_page(unsigned char *at, int page)
{
    memset(at, 0, page_size());
    if (kind_of_page(page) == DATA)
        write_content(at, BASE + (uint64_t)page * page_size(), page_size(), 1);
    else if (kind_of_page(page) == FIRST_BYTE)
        at[0] = 1;
    else if (kind_of_page(page) == LAST_BYTE)
        at[page_size() - 1] = 0x80;
}

static bool good(const unsigned char *ram, int first, int count)
{
    unsigned char *wanted = malloc(page_size());
    bool all = true;
    for (int page = first; page < first + count; page++) {
        make_page(wanted, page);
        all = all && memcmp(ram + (size_t)page * page_size(), wanted, page_size()) == 0;
    }
    free(wanted);
    return all;
}

enum how { BUFFER, ELSEWHERE, RESOLVED, SOURCE, HOWS };
static const char *const hows[HOWS] = {"written by the callback", "handed over by the callback", "kuf_resolve",
                                       "a source"};
static unsigned char *image;

static int fill(void *opaque, struct kuf_fill *fill)
{
    const enum how *how = opaque;
    const unsigned char *from = image + fill->memory_offset;
    if (*how == ELSEWHERE)
        fill->src = from;
    else
        memcpy(fill->buf, from, fill->len);
    return KUF_FILL_DONE;
}

/* The pages of a mapping, by the kernel's own count; the zero page does not count. */
static long resident(const void *memory)
{
    FILE *maps = fopen("/proc/self/smaps", "r");
    char line[1024];
    bool here = false;
    long pages = -1;
    while (maps != NULL && fgets(line, sizeof(line), maps) != NULL) {
        unsigned long from, to, kib;
        if (sscanf(line, "%lx-%lx ", &from, &to) == 2)
            here = from <= (uintptr_t)memory && (uintptr_t)memory < to;
        if (here && sscanf(line, "Rss: %lu kB", &kib) == 1)
            pages = (long)(kib * 1024 / page_size());
    }
    if (maps != NULL)
        fclose(maps);
    return pages;
}

static long pages_of(int fd)
{
    struct stat stat;
    must(fstat(fd, &stat) == 0, "fstat");
    return (long)(stat.st_blocks * 512 / (long)page_size());
}

static void supply(struct kuf *kuf, enum how how, int first, int count)
{
    size_t page = page_size();
    uint64_t gpa = BASE + (uint64_t)first * page;
    if (how == RESOLVED) {
        is(kuf_resolve(kuf, gpa, image + (size_t)first * page, count * page, 0), count * page, "%s: all of it", hows[how]);
        return;
    }
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = gpa, .len = count * page};
    is(kuf_populate(kuf, &request), 0, "%s: populate", hows[how]);
    wait_until(progress_of(kuf, BASE).absent + progress_of(kuf, BASE).filling == (uint64_t)(PAGES - first - count) * page);
}

static struct kuf *open_for(enum how *how, uint32_t flags)
{
    return open_with((struct kuf_options){.flags = flags, .fill = fill, .opaque = how, .demand_run = 64 << 10});
}

static void add_of(struct kuf *kuf, enum how how, unsigned char *ram, int fd)
{
    struct kuf_source source = {.size = sizeof(source), .kind = KUF_SOURCE_MEMORY, .addr = image, .len = PAGES * page_size()};
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = PAGES * page_size(), .hva = (uintptr_t)ram,
                              .fd = fd};
    if (how == SOURCE)
        slot.source = &source;
    must(kuf_add_memory(kuf, &slot) == 0, "kuf_add_memory: %s", kuf_error());
}

static void private_memory(enum how how)
{
    size_t page = page_size();
    /* With neighbours of other access rights, so that no mapping merges with it. */
    unsigned char *room = mmap(NULL, (PAGES + 2) * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *ram = room + page;
    must(room != MAP_FAILED && mprotect(ram, PAGES * page, PROT_READ | PROT_WRITE) == 0, "guest memory");
    madvise(ram, PAGES * page, MADV_NOHUGEPAGE);
    struct kuf *kuf = open_for(&how, KUF_OPEN_DETECT_ZERO);
    add_of(kuf, how, ram, -1);
    supply(kuf, how, 0, 450);
    is(resident(ram), 450 - zero_pages(0, 450), "private, %s: zeroes take no memory", hows[how]);
    if (how != RESOLVED)
        ok(good(ram, 450, PAGES - 450), "private, %s: on demand", hows[how]);
    else
        supply(kuf, how, 450, PAGES - 450);
    ok(good(ram, 0, PAGES), "private, %s: each page has its bytes", hows[how]);
    is(resident(ram), PAGES - zero_pages(0, PAGES), "private, %s: reading takes no memory either", hows[how]);
    comes_to(stats_of(kuf).bytes_zeroed, zero_pages(0, PAGES) * page, "private, %s: counted as zeroed", hows[how]);
    comes_to(stats_of(kuf).bytes_copied, (PAGES - zero_pages(0, PAGES)) * page, "private, %s: the rest as copied", hows[how]);
    is(progress_of(kuf, BASE).present, PAGES * page, "private, %s: all is present", hows[how]);
    ram[203 * page] = 9;
    ok(ram[203 * page] == 9 && holds_zeroes(ram + 204 * page, page), "private, %s: a zero page can be written", hows[how]);
    close_with(kuf, 0);
    munmap(room, (PAGES + 2) * page);
}

/* In place with the file's descriptor, by copy without it. */
static void shared_memory(enum how how, bool in_place)
{
    size_t page = page_size();
    const char *kind = in_place ? "shared in place" : "shared by copy";
    int fd;
    unsigned char *ram = map_shared(PAGES * page, &fd);
    struct kuf *kuf = open_for(&how, KUF_OPEN_DETECT_ZERO);
    add_of(kuf, how, ram, in_place ? fd : -1);
    supply(kuf, how, 0, 450);
    is(pages_of(fd), 450 - zero_pages(0, 450), "%s, %s: zeroes take no memory", kind, hows[how]);
    is(progress_of(kuf, BASE).removed, zero_pages(0, 450) * page, "%s, %s: they count as removed", kind, hows[how]);
    is(stats_of(kuf).bytes_zeroed, zero_pages(0, 450) * page, "%s, %s: and as zeroed", kind, hows[how]);
    is(kuf_ensure(kuf, BASE + 200 * page, 10 * page, -1), 0, "%s, %s: kuf_ensure", kind, hows[how]);
    is(progress_of(kuf, BASE).removed, (zero_pages(0, 450) - 10) * page, "%s, %s: makes them", kind, hows[how]);
    is(pages_of(fd), 450 - zero_pages(0, 450) + 10, "%s, %s: with memory", kind, hows[how]);
    if (how == RESOLVED) {
        supply(kuf, how, 450, PAGES - 450);
    } else {
        is(kuf_ensure(kuf, BASE + 450 * page, 32 * page, -1), 0, "%s, %s: kuf_ensure fills", kind, hows[how]);
        is(progress_of(kuf, BASE).removed, (zero_pages(0, 450) - 10) * page, "%s, %s: and leaves nothing out", kind,
           hows[how]);
    }
    ok(good(ram, 0, PAGES), "%s, %s: each page has its bytes", kind, hows[how]);
    ram[220 * page] = 9;
    ok(ram[220 * page] == 9, "%s, %s: a page that was left out can be written", kind, hows[how]);
    wait_until(progress_of(kuf, BASE).flags & KUF_PROGRESS_COMPLETE);
    close_with(kuf, 0);
    ram[220 * page] = 0;
    ok(good(ram, 0, PAGES), "%s, %s: and still is when the service is gone", kind, hows[how]);
    munmap(ram, PAGES * page);
    close(fd);
}

int main(void)
{
    begin();
    size_t page = page_size();
    image = map_anonymous(PAGES * page);
    for (int n = 0; n < PAGES; n++)
        make_page(image + (size_t)n * page, n);

    for (enum how how = 0; how < HOWS; how++)
        private_memory(how);
    for (enum how how = 0; how < HOWS; how++)
        shared_memory(how, false);
    if (has_feature(KUF_FEATURE_MINOR))
        for (enum how how = 0; how < HOWS; how++)
            shared_memory(how, true);
    else
        skip_part("no minor faults: nothing is filled in place");

    /* Without the flag the library does not look for zeroes. */
    enum how how = BUFFER;
    unsigned char *ram = map_anonymous(PAGES * page);
    struct kuf *kuf = open_for(&how, 0);
    add_of(kuf, how, ram, -1);
    supply(kuf, how, 0, PAGES);
    is(stats_of(kuf).bytes_zeroed, 0, "without the flag zeroes are bytes like any other");
    ok(good(ram, 0, PAGES), "without the flag: each page has its bytes");
    close_with(kuf, 0);

    /*
     * After a discard it comes from the source again, with its zeroes; unreadable bytes are refused as without the
     * flag.
     */
    ram = map_anonymous(PAGES * page);
    kuf = open_for(&how, KUF_OPEN_DETECT_ZERO);
    add_of(kuf, how, ram, -1);
    supply(kuf, how, 0, 300);
    memset(ram + 190 * page, 0xff, 20 * page);
    is(kuf_discard(kuf, BASE + 190 * page, 20 * page, KUF_DISCARD_REFILL), 0, "pages are dropped");
    ok(good(ram, 180, 40), "and come again");
    unsigned char *torn = map_anonymous(4 * page);
    munmap(torn + 2 * page, 2 * page);
    is(kuf_resolve(kuf, BASE + 320 * page, torn, 4 * page, 0), -EFAULT, "a source that ends early is refused");
    ok(good(ram, 0, PAGES), "and harms no page");
    close_with(kuf, 0);
    return done();
}
