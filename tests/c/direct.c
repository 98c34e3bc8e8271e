/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* KUF_OPEN_DIRECT: the caller's own loop reads the kernel, and the library starts no thread. */
#include "harness.h"

#include <poll.h>

#define BASE UINT64_C(0x10000000)
enum { PAGES = 256, TOUCHERS = 4 };

int main(void)
{
    begin();
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length), *bytes = malloc(page);
    struct kuf *kuf = open_with((struct kuf_options){.flags = KUF_OPEN_DIRECT});
    is(threads_named("kuf-"), 0, "no thread is started");
    add(kuf, BASE, ram, length);
    int fd = kuf_fd(kuf);
    ok(fd >= 0, "a descriptor to poll");
    struct pollfd poller = {.fd = fd, .events = POLLIN};
    is(poll(&poller, 1, 0), 0, "not readable at first");
    is(kuf_poll(kuf, 0), 0, "kuf_poll agrees");

    struct toucher touchers[TOUCHERS];
    for (int i = 0; i < TOUCHERS; i++) {
        touchers[i] = (struct toucher){.memory = ram, .gpa = BASE, .length = length, .generation = 1};
        start_toucher(&touchers[i]);
    }
    long bad = 0;
    for (uint64_t resolved = 0; resolved < length;) {
        poller.revents = 0;
        bad += poll(&poller, 1, -1) != 1 || poller.revents != POLLIN;
        struct kuf_fault faults[8];
        ssize_t n = kuf_read(kuf, faults, 8);
        /* The descriptor may be readable for a fault that needs no answer any more. */
        for (ssize_t i = 0; i < n; i++) {
            write_content(bytes, faults[i].gpa, page, 1);
            ssize_t got = kuf_resolve(kuf, faults[i].gpa, bytes, page, 0);
            bad += got != (ssize_t)page || faults[i].len != page;
            resolved += got > 0 ? (uint64_t)got : 0;
        }
    }
    is(bad, 0, "every page is given once and resolved");
    bool good = true;
    for (int i = 0; i < TOUCHERS; i++)
        good = join_toucher(&touchers[i]) && good;
    ok(good, "every thread reads every page");
    is(kuf_discard(kuf, BASE, 2 * page, KUF_DISCARD_ZERO), 0, "memory that the guest gave back is reported by hand");
    is(threads_named("kuf-"), 0, "still no thread");
    close_with(kuf, 0);
    free(bytes);
    return done();
}
