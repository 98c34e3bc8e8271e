/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Opens a userfaultfd in any way that this process is allowed, as the library does. For tests and benches. */
#ifndef KUF_OPEN_UFFD_H
#define KUF_OPEN_UFFD_H

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The device, the system call, the system call for user mode only. -1 and errno when none is granted. */
static inline int open_uffd(void)
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
    return fd;
}

#endif
