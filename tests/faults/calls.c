/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * System calls that fail. A filter in the child passes each call of the table to the parent by seccomp user
 * notification, which also catches calls that bypass the C library. The parent lets a call continue unless it comes from
 * a thread inside the library and is the occurrence that this run has to fail.
 *
 * The errors are those that Linux returns for the call, and those of a seccomp filter (EPERM, ENOSYS).
 */
#include "faults.h"

#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define ANY -1, 0
#define IOCTL(request) SYS_ioctl, 1, request
#define MADVISE(advice) SYS_madvise, 2, advice

#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP 1
#endif
#ifndef UFFDIO_MOVE
#define UFFDIO_MOVE 0xc028aa05
#endif
#ifndef UFFDIO_POISON
#define UFFDIO_POISON 0xc020aa08
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW 0xaa00
#endif

const struct call calls[] = {
    {"UFFDIO_COPY", IOCTL(UFFDIO_COPY), {EAGAIN, ENOMEM, EEXIST, ENOENT, ENOSPC, ESRCH, EFAULT, EINVAL, EPERM}, 32},
    {"UFFDIO_ZEROPAGE", IOCTL(UFFDIO_ZEROPAGE), {EAGAIN, ENOMEM, EEXIST, ENOENT, ESRCH, EINVAL, EPERM}, 24},
    {"UFFDIO_CONTINUE", IOCTL(UFFDIO_CONTINUE), {EAGAIN, ENOMEM, EEXIST, EFAULT, ENOENT, ESRCH, EINVAL, EPERM}, 24},
    {"UFFDIO_MOVE", IOCTL(UFFDIO_MOVE), {EAGAIN, ENOMEM, EEXIST, EBUSY, ENOENT, ESRCH, EINVAL, EPERM}, 32},
    {"UFFDIO_POISON", IOCTL(UFFDIO_POISON), {EAGAIN, ENOMEM, EEXIST, ENOENT, ESRCH, EINVAL, EPERM}, 24},
    {"UFFDIO_WAKE", IOCTL(UFFDIO_WAKE), {EINVAL, EPERM}, 0},
    {"UFFDIO_REGISTER", IOCTL(UFFDIO_REGISTER), {ENOMEM, EINVAL, EBUSY, EPERM}, 0},
    {"UFFDIO_UNREGISTER", IOCTL(UFFDIO_UNREGISTER), {ENOMEM, EINVAL, EPERM}, 0},
    {"UFFDIO_API", IOCTL(UFFDIO_API), {EINVAL, EPERM, ENOMEM}, 0},
    {"USERFAULTFD_IOC_NEW", IOCTL(USERFAULTFD_IOC_NEW), {EMFILE, ENFILE, ENOMEM, EPERM, EINVAL}, 0},
    {"ioctl", SYS_ioctl, ANY, {ENOTTY, EPERM, ENOMEM}, 0},
    {"userfaultfd", SYS_userfaultfd, ANY, {EMFILE, ENFILE, ENOMEM, EPERM, ENOSYS}, 0},
    {"read", SYS_read, ANY, {EINTR, EAGAIN, EMFILE, ENOMEM, EIO, EINVAL, EPERM}, 0},
    /* An eventfd, which never fills up here. */
    {"write_8", SYS_write, 2, 8, {EPERM}, 0},
    {"write", SYS_write, ANY, {EINTR, EAGAIN, EIO, ENOSPC, EPERM}, 0},
    {"pread64", SYS_pread64, ANY, {EINTR, EIO, EAGAIN, ENOMEM, EINVAL, EPERM}, 0},
    {"lseek", SYS_lseek, ANY, {EINVAL, EIO, EPERM}, 0},
    {"openat", SYS_openat, ANY, {EMFILE, ENFILE, ENOENT, EACCES, ENOMEM, EINTR, EPERM}, 0},
#ifdef SYS_open
    {"open", SYS_open, ANY, {EMFILE, ENFILE, ENOENT, EACCES, ENOMEM, EINTR, EPERM}, 0},
    {"epoll_create", SYS_epoll_create, ANY, {EMFILE, ENFILE, ENOMEM, EPERM}, 0},
    {"epoll_wait", SYS_epoll_wait, ANY, {EINTR, EINVAL, EPERM}, 0},
    {"poll", SYS_poll, ANY, {EINTR, ENOMEM, EPERM}, 0},
    {"readlink", SYS_readlink, ANY, {ENOENT, EACCES, ENOMEM, EPERM}, 0},
#endif
    {"close", SYS_close, ANY, {EINTR, EIO, EPERM}, 0},
    {"fcntl", SYS_fcntl, ANY, {EMFILE, EINVAL, ENOMEM, EPERM}, 0},
    {"fstat", SYS_fstat, ANY, {ENOMEM, EIO, EPERM}, 0},
    {"newfstatat", SYS_newfstatat, ANY, {ENOENT, EACCES, ENOMEM, EPERM}, 0},
    {"statx", SYS_statx, ANY, {ENOSYS, ENOENT, ENOMEM, EPERM}, 0},
    {"fstatfs", SYS_fstatfs, ANY, {EIO, ENOMEM, EPERM}, 0},
    {"readlinkat", SYS_readlinkat, ANY, {ENOENT, EACCES, ENOMEM, EPERM}, 0},
    {"kcmp", SYS_kcmp, ANY, {EPERM, ENOSYS, ESRCH}, 0},
    {"epoll_create1", SYS_epoll_create1, ANY, {EMFILE, ENFILE, ENOMEM, EPERM}, 0},
    {"epoll_ctl", SYS_epoll_ctl, ANY, {ENOMEM, ENOSPC, EPERM}, 0},
    {"epoll_pwait", SYS_epoll_pwait, ANY, {EINTR, EINVAL, ENOMEM, EPERM}, 0},
    {"eventfd2", SYS_eventfd2, ANY, {EMFILE, ENFILE, ENOMEM, EPERM}, 0},
    {"ppoll", SYS_ppoll, ANY, {EINTR, ENOMEM, EPERM}, 0},
    {"mmap", SYS_mmap, ANY, {ENOMEM, EAGAIN, EPERM, ENODEV}, 0},
    /* Only calls of the library's own code: the C library aborts if it cannot unmap a stack. */
    {"munmap", SYS_munmap, ANY, {ENOMEM, EINVAL, EPERM}, 0},
    {"mprotect", SYS_mprotect, ANY, {ENOMEM, EACCES, EPERM}, 0},
    {"mremap", SYS_mremap, ANY, {ENOMEM, EFAULT, EPERM}, 0},
    {"mincore", SYS_mincore, ANY, {EAGAIN, ENOMEM, EFAULT, EPERM}, 0},
    {"MADV_DONTNEED", MADVISE(MADV_DONTNEED), {ENOMEM, EAGAIN, EINVAL, EPERM}, 0},
    {"MADV_REMOVE", MADVISE(MADV_REMOVE), {ENOMEM, EIO, EINVAL, EACCES, EPERM}, 0},
    {"MADV_POPULATE_READ", MADVISE(22), {EINVAL, ENOMEM, EFAULT, EHWPOISON, EAGAIN, EINTR, EPERM}, 0},
    {"MADV_POPULATE_WRITE", MADVISE(23), {EINVAL, ENOMEM, EFAULT, EHWPOISON, EAGAIN, EINTR, EPERM}, 0},
    {"MADV_WILLNEED", MADVISE(MADV_WILLNEED), {EAGAIN, EBADF, EIO, EPERM}, 0},
    {"madvise", SYS_madvise, ANY, {ENOMEM, EINVAL, EAGAIN, EPERM}, 0},
    {"fallocate", SYS_fallocate, ANY, {EINTR, ENOSPC, EIO, EOPNOTSUPP, EPERM}, 0},
    {"ftruncate", SYS_ftruncate, ANY, {EINTR, EIO, EPERM}, 0},
    {"memfd_create", SYS_memfd_create, ANY, {EMFILE, ENFILE, ENOMEM, EPERM}, 0},
    {"process_vm_readv", SYS_process_vm_readv, ANY, {EPERM, ENOSYS, ESRCH, ENOMEM, EFAULT}, 0},
    {"get_mempolicy", SYS_get_mempolicy, ANY, {ENOSYS, EINVAL, EPERM}, 0},
    {"mbind", SYS_mbind, ANY, {ENOMEM, EINVAL, EPERM}, 0},
    {"clone3", SYS_clone3, ANY, {EAGAIN, ENOMEM, EPERM, ENOSYS}, 0},
    {"clone", SYS_clone, ANY, {EAGAIN, ENOMEM, EPERM}, 0},
    {"sched_getaffinity", SYS_sched_getaffinity, ANY, {EINVAL, ESRCH, EPERM}, 0},
    {"sched_setaffinity", SYS_sched_setaffinity, ANY, {EINVAL, ESRCH, EPERM}, 0},
    {"sigaltstack", SYS_sigaltstack, ANY, {ENOMEM, EPERM}, 0},
    {"prctl", SYS_prctl, ANY, {EINVAL, EPERM}, 0},
    {"getrandom", SYS_getrandom, ANY, {ENOSYS, EAGAIN, EINTR, EPERM}, 0},
    {"clock_nanosleep", SYS_clock_nanosleep, ANY, {EINTR, EPERM}, 0},
    {"sched_yield", SYS_sched_yield, ANY, {EPERM}, 0},
    {"uname", SYS_uname, ANY, {EFAULT, EPERM}, 0},
    {"sysinfo", SYS_sysinfo, ANY, {EFAULT, EPERM}, 0},
    {"getdents64", SYS_getdents64, ANY, {ENOENT, EPERM}, 0},
    {"set_mempolicy", SYS_set_mempolicy, ANY, {ENOSYS, EPERM}, 0},
};
const int call_count = sizeof(calls) / sizeof(*calls);

/* Returns the first entry that matches, or -1. Special entries precede general ones in the table. */
static int call_of(const struct seccomp_data *data)
{
    for (int c = 0; c < call_count; c++)
        if (calls[c].nr == data->nr &&
            (calls[c].argument < 0 || (uint32_t)data->args[calls[c].argument] == (uint32_t)calls[c].value))
            return c;
    return -1;
}

bool install_filter(void)
{
    static struct sock_filter program[3 + 2 * sizeof(calls) / sizeof(*calls)];
    unsigned short n = 0;
    program[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int c = 0; c < call_count; c++) {
        program[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)calls[c].nr, 0, 1);
        program[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF);
    }
    program[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog all = {.len = n, .filter = program};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return false;
    int fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &all);
    if (fd < 0)
        return false;
    atomic_store(&shared->listener, fd);
    return true;
}

/* ---- In the parent ------------------------------------------------------------------------------------------------- */

/* The thread's last mark counts, because the kernel reuses thread ids. */
static bool is_inside(int tid)
{
    int used = atomic_load(&shared->marks_used);
    for (int i = (used < MARKS ? used : MARKS) - 1; i >= 0; i--)
        if (atomic_load(&shared->marks[i].tid) == tid)
            return atomic_load(&shared->marks[i].inside);
    return false;
}

static bool is_to_fail(long n)
{
    return n == shared->first || (n > shared->first && shared->good);
}

static int in_library(struct dl_phdr_info *info, size_t size, void *argument)
{
    uint64_t at = *(uint64_t *)argument;
    (void)size;
    if (strstr(info->dlpi_name, "libkuf") == NULL)
        return 0;
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (at - info->dlpi_addr - info->dlpi_phdr[i].p_vaddr < info->dlpi_phdr[i].p_memsz)
            return 1;
    return 0;
}

/* Returns false for a munmap of the C library, which would abort if it failed. */
static bool is_wanted(const struct seccomp_data *data)
{
    uint64_t at = data->instruction_pointer;
    return data->nr != SYS_munmap || dl_iterate_phdr(in_library, &at) != 0;
}

/* Writes the error into the caller's struct, as the kernel does for this ioctl. */
static void write_result(int tid, const struct seccomp_data *data, const struct call *call, int error)
{
    int64_t result = -error;
    if (call->result_at == 0)
        return;
    struct iovec from = {&result, sizeof(result)};
    struct iovec to = {(void *)(uintptr_t)(data->args[2] + (uint64_t)call->result_at), sizeof(result)};
    (void)!process_vm_writev(tid, &from, 1, &to, 1, 0);
}

static void answer(int listener, const struct call *call, int error)
{
    struct seccomp_notif asked = {0};
    if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &asked) < 0)
        return;
    struct seccomp_notif_resp say = {.id = asked.id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE};
    int c = call_of(&asked.data);
    if (c >= 0 && atomic_load(&shared->armed) && is_inside((int)asked.pid) && is_wanted(&asked.data)) {
        long n = atomic_fetch_add(&shared->counted[c], 1) + 1;
        if (call == &calls[c] && is_to_fail(n)) {
            atomic_fetch_add(&shared->injected, 1);
            write_result((int)asked.pid, &asked.data, call, error);
            say.flags = 0;
            say.error = -error;
        }
    }
    /* Fails if the thread was killed meanwhile. */
    (void)ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &say);
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* Waits for the child's filter and returns its descriptor, or -1 if the child has ended. */
static int listener_of(int child_fd, uint64_t deadline)
{
    struct pollfd ends = {.fd = child_fd, .events = POLLIN};
    while (atomic_load(&shared->listener) < 0)
        if (poll(&ends, 1, 1) > 0 || now() > deadline)
            return -1;
    int fd = (int)syscall(SYS_pidfd_getfd, child_fd, atomic_load(&shared->listener), 0);
    if (fd < 0)
        perror("pidfd_getfd");
    return fd;
}

bool answer_calls(int child_fd, const struct call *call, int error, uint64_t deadline)
{
    int listener = listener_of(child_fd, deadline);
    if (listener >= 0)
        (void)ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
    struct pollfd waits[2] = {{.fd = child_fd, .events = POLLIN}, {.fd = listener, .events = POLLIN}};
    bool ended = false;
    for (uint64_t at; !ended && (at = now()) < deadline;) {
        if (poll(waits, 2, (int)((deadline - at) / 1000000) + 1) <= 0)
            continue;
        ended = (waits[0].revents & POLLIN) != 0;
        if (waits[1].revents & POLLIN)
            answer(listener, call, error);
        else if (waits[1].revents != 0)
            waits[1].fd = -1;
    }
    if (listener >= 0)
        close(listener);
    return ended;
}
