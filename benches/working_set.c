/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * working_set.c - a guest touches a scattered part of its memory: by demand faults, or with a replayed record
 *
 *     working_set poll|demand|record|replay image=FILE [size=BYTES pages=N seed=N file=FILE verify=...]
 *
 *     poll       the baseline's loop      demand   libkuf, fault by fault
 *     record     as demand, and writes the record to `file`
 *     replay     replays the record of `file` while the guest touches its memory
 */
#include "baseline.h"

int main(int argc, char **argv)
{
    const char *side = begin(argc, argv);
    bool poll = strcmp(side, "poll") == 0, record = strcmp(side, "record") == 0, replay = strcmp(side, "replay") == 0;
    if (!poll && !record && !replay && strcmp(side, "demand") != 0)
        fail("%s: poll, demand, record or replay", side);
    struct image image = map_image();
    uint64_t size = argument("size", image.size);
    static struct touchers touchers;
    touchers.threads = 1;
    touchers.count = argument("pages", size / PAGE / 10);
    uint64_t seed = argument("seed", 1);
    bool thorough = verify_argument();
    const char *path = text_argument("file", NULL);
    if ((record || replay) && path == NULL)
        fail("file=FILE is needed");
#ifndef KUF_RECORD_VERSION
    if (record || replay)
        skip("this kuf.h has no KUF_RECORD_VERSION");
#endif

    uint8_t *memory = guest_memory(size, false);
    touchers.image = &image;
    touchers.memory = memory;
    touchers.order = make_order(0, size / PAGE, touchers.count, false, seed);
    struct server server = {.image = &image, .memory = memory};
    struct guest guest = {.image = &image};
    int fd = -1;
    if (poll) {
        no_more_arguments();
        server.uffd = open_userfaultfd(0);
        register_memory(server.uffd, memory, size, UFFDIO_REGISTER_MODE_MISSING);
        start_server(&server);
    } else {
        open_kuf(&guest, (struct kuf_options){.size = 0});
        no_more_arguments();
        add_guest(&guest, 0, memory, size, 0, 0);
        if (record || replay) {
            fd = open(path, (record ? O_RDWR | O_CREAT | O_TRUNC : O_RDONLY) | O_CLOEXEC, 0600);
            must(fd >= 0, path);
        }
    }
    start_touchers(&touchers);
    struct service_use before = service_use();
    uint64_t began = now_ns();
#ifdef KUF_RECORD_VERSION
    if (record && kuf_record_start(guest.kuf, 0) < 0)
        fail("kuf_record_start: %s", kuf_error());
    if (replay && kuf_replay(guest.kuf, fd, 0) < 0)
        fail("kuf_replay: %s", kuf_error());
#endif
    release_touchers(&touchers);
    join_touchers(&touchers);
    uint64_t took = now_ns() - began;
    struct service_use after = service_use();
#ifdef KUF_RECORD_VERSION
    if (record && kuf_record_stop(guest.kuf, fd) < 0)
        fail("kuf_record_stop: %s", kuf_error());
#endif

    verify_touched(&touchers, thorough);
    put_text("side", side);
    put_number("seconds", seconds(took));
    put_latencies(&touchers);
    put_service_use(before, after, touchers.count);
    if (poll) {
        stop_server(&server);
        put_count("faults", server.faults);
    } else {
        put_kuf_stats(guest.kuf);
        struct stat stat;
        if (fd >= 0 && fstat(fd, &stat) == 0)
            put_count("record_bytes", (uint64_t)stat.st_size);
        close_kuf(&guest);
    }
    end_result();
}
