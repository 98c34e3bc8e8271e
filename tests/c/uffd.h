/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Userfaultfds that the caller has opened.
 */
#ifndef KUF_TESTS_UFFD_H
#define KUF_TESTS_UFFD_H

#include "harness.h"
#include "open_uffd.h"

/* A userfaultfd of the test's own, for the library to adopt; skips the test when there is none. */
static inline int own_userfaultfd(uint64_t features)
{
    int fd = open_uffd();
    if (fd < 0)
        skip("no userfaultfd: %s", strerror(errno));
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (ioctl(fd, UFFDIO_API, &api) < 0)
        skip("this kernel's userfaultfd lacks a feature: %s", strerror(errno));
    return fd;
}

#endif
