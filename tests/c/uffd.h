/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Userfaultfds that the host has opened.
 */
#ifndef KUF_TESTS_UFFD_H
#define KUF_TESTS_UFFD_H

#include "harness.h"
#include <linux/userfaultfd.h>

/* A userfaultfd of the test's own, for the library to adopt; skips the test when there is none. */
static inline int own_userfaultfd(uint64_t features)
{
    int fd = -1, device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
    }
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (fd < 0)
        skip("no userfaultfd: %s", strerror(errno));
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (ioctl(fd, UFFDIO_API, &api) < 0)
        skip("this kernel's userfaultfd lacks a feature: %s", strerror(errno));
    return fd;
}

#endif
