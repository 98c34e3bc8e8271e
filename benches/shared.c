/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * shared.c - libkuf fills a shared memory file in place; the other side of each comparison is in limits.c
 *
 *     shared populate|resolve image=FILE [size=BYTES verify=quick|full fill_threads=N populate_run=BYTES]
 *
 *     populate   kuf_populate; the callback copies the image into the file. Compared with `limits place`
 *     resolve    the file already holds the bytes: kuf_resolve in place in 2 MiB runs. Compared with `limits continue`
 */
#include "baseline.h"

int main(int argc, char **argv)
{
    const char *side = begin(argc, argv);
    bool resolve = strcmp(side, "resolve") == 0;
    if (!resolve && strcmp(side, "populate") != 0)
        fail("%s: populate or resolve", side);
    struct kuf_probe_info probe = {.size = sizeof(probe)};
    if (kuf_probe(-1, &probe) < 0 || !(probe.features & KUF_FEATURE_MINOR))
        skip("this kernel has no minor faults on shared memory");
    struct image image = map_image();
    uint64_t size = argument("size", image.size);
    bool thorough = verify_argument();
    if (size % RUN != 0 || image.size % RUN != 0)
        fail("the size is not a multiple of 2 MiB");

    warm_memory(size, false);
    int fd = memfd_create("guest", MFD_CLOEXEC);
    must(fd >= 0 && ftruncate(fd, (off_t)size) == 0, "memfd");
    uint8_t *memory = must_map(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, "the memfd");
    struct guest guest = {.image = &image};
    open_kuf(&guest, (struct kuf_options){.size = 0});
    no_more_arguments();
    uint32_t flags = 0;
    if (resolve) {
        uint8_t *second = must_map(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, "the memfd again");
        for (uint64_t at = 0; at < size; at += RUN)
            memcpy(second + at, image_at(&image, at), RUN);
        flags |= KUF_MEMORY_FILL_ALL;
    }
    add_guest(&guest, 0, memory, size, flags, fd);

    struct service_use before = service_use();
    uint64_t began = now_ns(), took;
    if (resolve) {
        for (uint64_t at = 0; at < size; at += RUN)
            if (kuf_resolve(guest.kuf, at, NULL, RUN, KUF_RESOLVE_IN_PLACE) < 0)
                fail("kuf_resolve: %s", kuf_error());
        took = now_ns() - began;
    } else {
        populate_guest(&guest, 0, size);
        took = wait_populated(&guest) - began;
    }
    struct service_use after = service_use();

    struct kuf_progress_info progress = {.size = sizeof(progress)};
    if (kuf_progress(guest.kuf, 0, &progress) < 0 || progress.present != size)
        fail("the slot is not completely present");
    verify_all(&image, memory, size, thorough);
    put_text("side", side);
    put_count("pages", size / PAGE);
    put_number("seconds", seconds(took));
    put_number("bytes_per_second", (double)size / seconds(took));
    put_number("us_per_page", seconds(took) * 1e6 / ((double)size / PAGE));
    put_service_use(before, after, size / PAGE);
    put_kuf_stats(guest.kuf);
    close_kuf(&guest);
    end_result();
}
