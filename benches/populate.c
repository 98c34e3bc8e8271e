/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * populate.c - populates anonymous memory: the speed, the size of the pages, and the effect on demand faults
 *
 *     populate copy|kuf|demand image=FILE [KEY=VALUE]...
 *
 *     copy     UFFDIO_COPY in 2 MiB runs, with no faults and no other threads
 *     kuf      kuf_populate
 *     demand   one toucher of another slot at a steady pace, while kuf_populate runs (background=1) or not
 *
 *     size=BYTES  zero=PERCENT cluster=PAGES (as in the image)  reads=N (random, afterwards)  verify=quick|full
 *     want_huge=1    the mapping has MADV_HUGEPAGE
 *     detect=1       kuf: KUF_OPEN_DETECT_ZERO              huge=1    kuf: KUF_MEMORY_HUGE
 *     source=file    kuf: the image is a built-in source (KUF_SOURCE_FILE) instead of a fill callback
 *     touches=N interval_us=N window=BYTES    demand only
 *     fill=... fill_threads=N populate_run=BYTES    kuf and demand
 */
#include "baseline.h"

/* Random reads, each dependent on the one before, so that the time of each shows the cost of a TLB miss. */
static double random_reads(const uint8_t *memory, uint64_t size, uint64_t reads)
{
    uint64_t sum = 0, state = 1, began = now_ns();
    for (uint64_t n = 0; n < reads; n++) {
        /* The next address depends on the value read, so that the CPU cannot overlap the reads. */
        state = mix(state + 1 + (sum & 1));
        sum = *(const volatile uint64_t *)(const volatile void *)(memory + state % size / 64 * 64);
    }
    return (double)(now_ns() - began) / (double)reads;
}

static _Noreturn void demand(const struct image *image, uint64_t size, bool thorough)
{
    uint64_t window = argument("window", 64 * MIB), touches = argument("touches", 1000);
    bool background = argument("background", 1) != 0;
    static struct touchers touchers;
    uint8_t *memory = guest_memory(size + window, false), *touched = memory + size;
    touchers.image = image;
    touchers.memory = touched;
    touchers.count = touches;
    touchers.threads = 1;
    touchers.interval_ns = argument("interval_us", 200) * 1000;
    touchers.order = make_order(0, window / PAGE, touches, false, argument("seed", 1));
    struct guest guest = {.image = image};
    open_kuf(&guest, (struct kuf_options){.size = 0});
    no_more_arguments();
    add_guest(&guest, 0, memory, size, 0, 0);
    add_guest(&guest, size, touched, window, 0, 0);

    start_touchers(&touchers);
    release_touchers(&touchers);
    uint64_t began = now_ns();
    if (background) {
        populate_guest(&guest, 0, size);
        uint64_t took = wait_populated(&guest) - began;
        /* Touches after the end of the populate request must not count. */
        atomic_store(&touchers.stop, true);
        join_touchers(&touchers);
        verify_all(image, memory, size, thorough);
        put_number("populate_seconds", seconds(took));
        put_number("populate_bytes_per_second", (double)size / seconds(took));
    } else {
        join_touchers(&touchers);
    }
    verify_touched(&touchers, thorough);
    put_text("side", "demand");
    put_latencies(&touchers);
    put_kuf_stats(guest.kuf);
    close_kuf(&guest);
    end_result();
}

/* Adds a slot with the image's file as its built-in source. */
static void add_guest_of_file(struct guest *guest, const uint8_t *memory, uint64_t size, uint32_t flags)
{
#ifdef KUF_SOURCE_FILE
    const char *path = text_argument("image", NULL);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    must(fd >= 0, path);
    if (size > guest->image->size)
        fail("source=file: the image is smaller than the memory");
    struct kuf_source source = {.size = sizeof(source), .kind = KUF_SOURCE_FILE, .fd = fd};
    struct kuf_memory slot = {.size = sizeof(slot), .flags = flags, .len = size, .hva = (uintptr_t)memory,
                              .source = &source};
    if (kuf_add_memory(guest->kuf, &slot) < 0)
        fail("kuf_add_memory: %s", kuf_error());
    close(fd);
#else
    (void)guest, (void)memory, (void)size, (void)flags;
    skip("this kuf.h has no KUF_SOURCE_FILE");
#endif
}

int main(int argc, char **argv)
{
    const char *side = begin(argc, argv);
    struct image image = map_image();
    uint64_t size = argument("size", image.size), reads = argument("reads", 0);
    bool thorough = verify_argument(), want_huge = argument("want_huge", 0) != 0;
    bool with_kuf = strcmp(side, "kuf") == 0;
    if (strcmp(side, "demand") == 0)
        demand(&image, size, thorough);
    if (!with_kuf && strcmp(side, "copy") != 0)
        fail("%s: copy, kuf or demand", side);
    bool from_file = with_kuf && strcmp(text_argument("source", ""), "file") == 0;
    bool detect = with_kuf && argument("detect", 0) != 0, huge = with_kuf && argument("huge", 0) != 0;
    uint8_t *memory = guest_memory(size, want_huge);
    struct guest guest = {.image = &image};
    struct kuf_options options = {.size = 0};
    uint32_t slot_flags = 0;
    if (detect) {
#ifdef KUF_OPEN_DETECT_ZERO
        options.flags |= KUF_OPEN_DETECT_ZERO;
#else
        skip("this kuf.h has no KUF_OPEN_DETECT_ZERO");
#endif
    }
    if (huge) {
#ifdef KUF_MEMORY_HUGE
        slot_flags |= KUF_MEMORY_HUGE;
#else
        skip("this kuf.h has no KUF_MEMORY_HUGE");
#endif
    }

    struct service_use before = {0}, after = {0};
    uint64_t took;
    if (with_kuf) {
        open_kuf(&guest, options);
        no_more_arguments();
        if (from_file)
            add_guest_of_file(&guest, memory, size, slot_flags);
        else
            add_guest(&guest, 0, memory, size, slot_flags, 0);
        before = service_use();
        uint64_t began = now_ns();
        populate_guest(&guest, 0, size);
        took = wait_populated(&guest) - began;
        after = service_use();
        put_kuf_stats(guest.kuf);
        /* Remove the slot, so that both sides read without a service. */
        if (kuf_remove_memory(guest.kuf, 0, 0) < 0)
            fail("kuf_remove_memory: %s", kuf_error());
    } else {
        no_more_arguments();
        int uffd = open_userfaultfd(0);
        register_memory(uffd, memory, size, UFFDIO_REGISTER_MODE_MISSING);
        uint64_t began = now_ns();
        for (uint64_t at = 0; at < size; at += RUN)
            copy_pages(uffd, memory + at, image_at(&image, at), RUN);
        took = now_ns() - began;
        unregister_memory(uffd, memory, size);
    }

    struct memory_use use = memory_use(memory, size);
    if (reads != 0)
        put_number("read_ns", random_reads(memory, size, reads));
    verify_all(&image, memory, size, thorough);
    put_text("side", side);
    put_count("pages", size / PAGE);
    put_number("seconds", seconds(took));
    put_number("bytes_per_second", (double)size / seconds(took));
    put_number("us_per_page", seconds(took) * 1e6 / ((double)size / PAGE));
    uint64_t zero = 0;
    for (uint64_t page = 0; image.zero != 0 && page < size / PAGE; page++)
        zero += image_page_is_zero(page % (image.size / PAGE), image.zero, image.cluster);
    put_number("zero_part", (double)zero / ((double)size / PAGE));
    put_number("resident_part", (double)use.resident / (double)size);
    put_number("huge_part", (double)use.huge / (double)size);
    if (with_kuf) {
        put_service_use(before, after, size / PAGE);
        close_kuf(&guest);
    }
    end_result();
}
