/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * baseline.h - the fault loops that VMMs use today, without anything those loops do not have
 *
 * poll:  poll(2), read one message, UFFDIO_COPY, repeat: the loop of the manual page and of QEMU.
 * drain: poll(2), then read and serve one message at a time until the queue is empty: Firecracker's example handlers.
 * spin:  read(2) in a busy loop. No VMM does this, because it occupies a CPU. It gives the lower limit for the cost of
 *        a fault: no thread has to be woken.
 *
 * All copy straight from the mapped image into the guest.
 */
#ifndef KUF_BENCH_BASELINE_H
#define KUF_BENCH_BASELINE_H

#include "bench.h" /* first: it asks for _GNU_SOURCE */

#include "../tests/c/open_uffd.h"

static inline int open_userfaultfd(uint64_t features)
{
    int fd = open_uffd();
    if (fd < 0)
        skip("userfaultfd is not available here");
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (ioctl(fd, UFFDIO_API, &api) < 0)
        skip("this kernel's userfaultfd lacks a feature");
    return fd;
}

static inline void register_memory(int uffd, const void *memory, uint64_t size, uint64_t mode)
{
    struct uffdio_register range = {.range = {(uintptr_t)memory, size}, .mode = mode};
    if (ioctl(uffd, UFFDIO_REGISTER, &range) < 0)
        skip("UFFDIO_REGISTER: %s", strerror(errno));
}

static inline void unregister_memory(int uffd, const void *memory, uint64_t size)
{
    struct uffdio_range range = {(uintptr_t)memory, size};
    must(ioctl(uffd, UFFDIO_UNREGISTER, &range) == 0, "UFFDIO_UNREGISTER");
}

static inline void copy_pages(int uffd, uint8_t *to, const uint8_t *from, uint64_t length)
{
    for (uint64_t done = 0; done < length;) {
        struct uffdio_copy copy = {.dst = (uintptr_t)to + done, .src = (uintptr_t)from + done, .len = length - done};
        if (ioctl(uffd, UFFDIO_COPY, &copy) == 0)
            return;
        if (copy.copy > 0) {
            done += (uint64_t)copy.copy;
        } else if (errno == EEXIST) {
            struct uffdio_range range = {(uintptr_t)to + done, PAGE};
            must(ioctl(uffd, UFFDIO_WAKE, &range) == 0, "UFFDIO_WAKE");
            done += PAGE;
        } else if (errno != EAGAIN) {
            fail("UFFDIO_COPY: %s", strerror(errno));
        }
    }
}

struct server {
    const struct image *image;
    uint8_t *memory;
    int uffd, quit;
    bool drain, spin;
    atomic_bool stop; /* spin only */
    pthread_t thread;
    uint64_t faults, reads, polls;
};

/* Reads one message and serves it. Returns false if the queue was empty. */
static inline bool serve_one(struct server *server)
{
    struct uffd_msg message;
    server->reads++;
    ssize_t got = read(server->uffd, &message, sizeof(message));
    if (got < 0 && errno == EAGAIN)
        return false;
    if (got != sizeof(message) || message.event != UFFD_EVENT_PAGEFAULT)
        fail("the userfaultfd returned something other than a page fault");
    uint64_t offset = (message.arg.pagefault.address & ~(uint64_t)(PAGE - 1)) - (uintptr_t)server->memory;
    copy_pages(server->uffd, server->memory + offset, image_at(server->image, offset), PAGE);
    server->faults++;
    return true;
}

static inline void *server_body(void *argument)
{
    struct server *server = argument;
    struct pollfd fds[] = {{.fd = server->uffd, .events = POLLIN}, {.fd = server->quit, .events = POLLIN}};
    pthread_setname_np(pthread_self(), "bench-serve");
    while (server->spin) {
        if (!serve_one(server) && atomic_load_explicit(&server->stop, memory_order_relaxed))
            return NULL;
    }
    for (;;) {
        server->polls++;
        if (poll(fds, 2, -1) < 0)
            fail("poll: %s", strerror(errno));
        if (fds[1].revents != 0)
            return NULL;
        while (serve_one(server) && server->drain)
            ;
    }
}

static inline void start_server(struct server *server)
{
    server->quit = eventfd(0, EFD_CLOEXEC);
    must(server->quit >= 0, "eventfd");
    if (pthread_create(&server->thread, NULL, server_body, server) != 0)
        fail("cannot start the handler's thread");
}

static inline void stop_server(struct server *server)
{
    uint64_t one = 1;
    atomic_store(&server->stop, true);
    must(write(server->quit, &one, sizeof(one)) == sizeof(one), "eventfd");
    pthread_join(server->thread, NULL);
}

#endif
