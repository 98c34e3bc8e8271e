/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * 8192 slots, and 100000 poisoned pages in one: the last slot costs as much as the first to add, and every page is
 * served or poisoned as usual. The test counts the bytes that the library reads of the kernel's lists; it only prints
 * the times.
 *
 * Fewer slots before Linux 6.11, where the kernel's list of mappings is read from its beginning each time, and fewer pages
 * before 6.6, where each page that cannot be filled is a mapping of its own.
 */
#include "harness.h"

#define BASE UINT64_C(0x100000000)
enum { BLOCK = 512 };
static unsigned slots = 8192;
static uint64_t poisoned;

static struct source source = SOURCE_INIT;

/* Bytes that this thread has read from files so far. */
static long long bytes_read(void)
{
    FILE *file = fopen("/proc/thread-self/io", "r");
    long long bytes = -1;
    if (file != NULL) {
        if (fscanf(file, "rchar: %lld", &bytes) != 1)
            bytes = -1;
        fclose(file);
    }
    return bytes;
}

/* Whether the kernel can be asked for a mapping (PROCMAP_QUERY): it looks at the address of the question then. */
static bool asks_for_mappings(void)
{
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    bool asks = ioctl(fd, _IOWR('f', 17, char[104]), NULL) == -1 && errno == EFAULT;
    close(fd);
    return asks;
}

static void adds_slots(struct kuf *kuf, unsigned char *ram)
{
    uint64_t page = page_size();
    long long first = 0, last = 0;
    uint64_t began = now_ns(), times[2] = {0, 0};
    for (unsigned i = 0; i < slots; i++) {
        if (i % BLOCK == 0) {
            first = i == BLOCK ? bytes_read() - last : first;
            times[0] = i == BLOCK ? now_ns() - began : times[0];
            last = bytes_read();
            began = now_ns();
        }
        /* A page of every other one, so that each is a mapping of its own. */
        add(kuf, BASE + i * page, ram + 2 * i * page, page);
    }
    last = bytes_read() - last;
    times[1] = now_ns() - began;
    printf("# %d slots added: the first in %.1f ms, %lld bytes read; the last in %.1f ms, %lld bytes\n", BLOCK,
           (double)times[0] / 1e6, first, (double)times[1] / 1e6, last);
    if (asks_for_mappings())
        ok(last <= 2 * first + (1 << 16), "the last slots read no more of the process's mappings than the first");
}

static void serves_slots(struct kuf *kuf, unsigned char *ram)
{
    uint64_t page = page_size(), began = now_ns();
    unsigned wrong = 0;
    for (unsigned i = 0; i < slots; i += 7)
        wrong += touch(ram + 2 * i * page) != 0 || !holds_content(ram + 2 * i * page, BASE + i * page, page, 1);
    is(wrong, 0, "each slot has its bytes");
    uint64_t removed = stats_of(kuf).bytes_removed;
    for (unsigned i = 0; i < slots; i += 14)
        madvise(ram + 2 * i * page, page, MADV_DONTNEED);
    comes_to(stats_of(kuf).bytes_removed - removed, (slots + 13) / 14 * page, "each event is applied");
    for (unsigned i = 0; i < slots; i += 14)
        wrong += !holds_zeroes(ram + 2 * i * page, page);
    is(wrong, 0, "and what was given back is zero");
    printf("# %u faults and %u events in %.1f ms\n", slots / 7 + slots / 14, slots / 14, (double)(now_ns() - began) / 1e6);
    began = now_ns();
    for (unsigned i = 0; i < slots; i++)
        wrong += kuf_remove_memory(kuf, BASE + i * page, KUF_END_POISON) != 0;
    is(wrong, 0, "each slot is removed");
    printf("# %u slots removed in %.1f ms\n", slots, (double)(now_ns() - began) / 1e6);
}

static void poisons_many(struct kuf *kuf)
{
    uint64_t page = page_size(), length = 2 * poisoned * page, began = now_ns();
    unsigned char *ram = map_anonymous(length);
    add(kuf, BASE, ram, length);
    unsigned wrong = 0;
    for (uint64_t i = 0; i < poisoned; i++)
        wrong += kuf_resolve(kuf, BASE + 2 * i * page, NULL, page, KUF_RESOLVE_POISON) != (ssize_t)page;
    is(wrong, 0, "pages are poisoned one by one");
    printf("# %" PRIu64 " pages poisoned in %.1f ms\n", poisoned, (double)(now_ns() - began) / 1e6);
    began = now_ns();
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = KUF_ALL};
    is(kuf_populate(kuf, &request), 0, "populate");
    wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) > 0);
    struct kuf_progress_info progress = progress_of(kuf, KUF_ALL);
    is(progress.poisoned, poisoned * page, "poisoned pages stay so");
    is(progress.present, poisoned * page, "and the rest is filled");
    printf("# the rest populated between them in %.1f ms\n", (double)(now_ns() - began) / 1e6);
    began = now_ns();
    is(kuf_discard(kuf, BASE, length, KUF_DISCARD_REFILL), 0, "all of it discarded");
    is(progress_of(kuf, KUF_ALL).absent, length, "is absent");
    printf("# discarded in %.1f ms\n", (double)(now_ns() - began) / 1e6);
}

int main(void)
{
    begin();
    if (!asks_for_mappings())
        slots = 1024;
    /* As much memory with larger pages. */
    poisoned = poison_event() == KUF_EVENT_INACCESSIBLE ? 4096 : 100000 * UINT64_C(4096) / page_size();
    unsigned char *ram = map_anonymous(2 * slots * page_size());
    struct kuf *kuf = open_serviced(&source);
    if (bytes_read() < 0)
        skip("no /proc/thread-self/io");
    adds_slots(kuf, ram);
    serves_slots(kuf, ram);
    poisons_many(kuf);
    is(kuf_close(&kuf, KUF_END_POISON), 0, "closed");
    return done();
}
