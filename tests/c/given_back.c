/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memory that a balloon gave back and the guest uses again: it reads as zero, what is written stays, and private memory
 * costs a fault for each 2 MiB and not for each page.
 */
#include "harness.h"

#define BASE UINT64_C(0x70000000)
#define STRETCH (UINT64_C(2) << 20)
enum { STRETCHES = 8 };

static struct source source = SOURCE_INIT;
static const uint64_t size = STRETCHES * STRETCH;

/* Drops a range as a balloon does, and waits until the library knows of it. */
static void give_back(struct kuf *kuf, unsigned char *ram, uint64_t from, uint64_t len)
{
    uint64_t before = stats_of(kuf).bytes_removed;
    must(madvise(ram + from, len, MADV_DONTNEED) == 0, "madvise: %s", strerror(errno));
    comes_to(stats_of(kuf).bytes_removed - before, len, "given back");
}

/*
 * Faults that had to be served. A thread that returns to a stretch before all of it is present faults too, and waits
 * for the pages on their way.
 */
static uint64_t served(struct kuf *kuf)
{
    struct kuf_stats_info stats = stats_of(kuf);
    return stats.faults - stats.faults_joined - stats.faults_late;
}

static void read_all(const unsigned char *ram, uint64_t step, const char *what)
{
    uint64_t wrong = 0, page = page_size();
    for (uint64_t i = 0; i < size / page; i++)
        wrong += !holds_zeroes(ram + i * step % (size / page) * page, page);
    is(wrong, 0, "%s: reads as zero", what);
}

static void private_memory(void)
{
    size_t page = page_size();
    unsigned char *ram = map_anonymous(size);
    struct kuf *kuf = open_with((struct kuf_options){.fill = source_fill, .event = source_event, .opaque = &source});
    add(kuf, BASE, ram, size);
    ok(holds_content(ram, BASE, size, 1), "filled");

    give_back(kuf, ram, 0, size);
    uint64_t before = served(kuf), kept = 0;
    read_all(ram, 1, "in order");
    comes_to(served(kuf) - before, STRETCHES, "in order: a fault for each stretch");
    give_back(kuf, ram, 0, size);
    before = served(kuf);
    read_all(ram, 1031, "scattered");
    comes_to(served(kuf) - before, STRETCHES, "scattered: a fault for each stretch");

    give_back(kuf, ram, 0, size);
    before = served(kuf);
    for (uint64_t at = 0; at < size; at += page)
        ram[at] = 7;
    comes_to(served(kuf) - before, STRETCHES, "written: a fault for each stretch");
    for (uint64_t at = 0; at < size; at += page)
        kept += ram[at] == 7 && holds_zeroes(ram + at + 1, page - 1);
    is(kept, size / page, "written: the bytes stay");

    /* Only the pages that were given back become zero: their neighbours keep their bytes, or come from the source. */
    must(kuf_discard(kuf, BASE, size / 2, KUF_DISCARD_REFILL) == 0, "%s", kuf_error());
    give_back(kuf, ram, 3 * page, 5 * page);
    give_back(kuf, ram, size - 4 * page, 2 * page);
    ok(holds_zeroes(ram + 5 * page, page) && holds_zeroes(ram + 3 * page, 5 * page), "a run within absent pages is zero");
    ok(holds_content(ram, BASE, 3 * page, 1) && holds_content(ram + 8 * page, BASE + 8 * page, size / 2 - 8 * page, 1),
       "its neighbours come from the source");
    ok(holds_zeroes(ram + size - 3 * page, page) && holds_zeroes(ram + size - 4 * page, 2 * page),
       "a run within present pages is zero");
    ok(ram[size - 5 * page] == 7 && ram[size - 2 * page] == 7 && ram[size - page] == 7, "its neighbours keep their bytes");
    is(kuf_close(&kuf, 0), 0, "closed: %s", kuf_error());
    munmap(ram, size);
}

/* Shared memory gets a page of its own for each page of zeroes, so no page becomes present that was not touched. */
static void shared_memory(void)
{
    int fd = -1;
    size_t page = page_size();
    unsigned char *ram = map_shared(size, &fd);
    struct kuf *kuf = open_with((struct kuf_options){.fill = source_fill, .event = source_event, .opaque = &source});
    add_shared(kuf, BASE, ram, size, fd, 0);
    is(kuf_discard(kuf, BASE, size, KUF_DISCARD_ZERO), 0, "shared: given back");
    ok(holds_zeroes(ram + 9 * page, page), "shared: reads as zero");
    comes_to(progress_of(kuf, BASE).present, page, "shared: one page is present");
    is(kuf_close(&kuf, KUF_END_POISON), 0, "shared: closed: %s", kuf_error());
    close(fd);
    munmap(ram, size);
}

int main(void)
{
    begin();
    atomic_store(&source.generation, 1);
    private_memory();
    shared_memory();
    return done();
}
