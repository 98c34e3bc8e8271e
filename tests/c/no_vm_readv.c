/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The library reads the caller's memory also where the kernel lacks process_vm_readv(2) or a filter refuses it, and
 * where the check before (mincore, MADV_POPULATE_READ) is refused. It still detects memory that cannot be read.
 */
#include "harness.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/uio.h>

#define BASE UINT64_C(0x40000000)
enum { PAGES = 200 };
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

#define REFUSE(number, errno_value)                                                                                       \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (number), 0, 1),                                                                  \
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ((errno_value) & SECCOMP_RET_DATA))

/* From here on, for this thread and those it starts. */
static bool refuse(unsigned errno_value)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        REFUSE(SYS_process_vm_readv, errno_value),
        REFUSE(SYS_mincore, errno_value),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_madvise, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
        REFUSE(MADV_POPULATE_READ, errno_value),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof(filter) / sizeof(filter[0]), .filter = filter};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

static void resolved(uint32_t flags, bool shared, const char *what)
{
    static struct source source = SOURCE_INIT;
    size_t page = page_size();
    int fd;
    struct kuf *kuf = open_with((struct kuf_options){.flags = flags, .event = source_event, .opaque = &source});
    unsigned char *ram = map_kind(shared, PAGES * page, &fd);
    /* With an unmapped page after it. */
    unsigned char *bytes = map_anonymous((PAGES + 1) * page);
    munmap(bytes + PAGES * page, page);
    write_content(bytes, BASE, PAGES * page, 1);
    add_kind(kuf, BASE, ram, PAGES * page, fd);
    is(kuf_resolve(kuf, BASE, bytes, page, 0), page, "%s: a page is resolved", what);
    is(kuf_resolve(kuf, BASE + page, bytes + page, (PAGES - 2) * page, 0), (PAGES - 2) * page, "%s: many are", what);
    uint64_t last = (PAGES - 1) * page;
    is(kuf_resolve(kuf, BASE + last, bytes + last + page / 2, page, 0), -EFAULT, "%s: memory that ends is told", what);
    is(kuf_resolve(kuf, BASE + last, bytes + last, page, 0), page, "%s: and then the page is resolved", what);
    ok(holds_content(ram, BASE, PAGES * page, 1), "%s: with their bytes", what);
    close_with(kuf, 0);
    munmap(ram, PAGES * page);
    munmap(bytes, PAGES * page);
    close(fd);
}

static void from_memory(bool shared, const char *what)
{
    static struct source source = SOURCE_INIT;
    size_t page = page_size();
    int fd;
    struct kuf *kuf = open_with((struct kuf_options){.flags = KUF_OPEN_SOURCES, .event = source_event, .opaque = &source});
    unsigned char *ram = map_kind(shared, PAGES * page, &fd);
    unsigned char *bytes = map_anonymous(PAGES * page);
    write_content(bytes, BASE, PAGES * page, 1);
    struct kuf_source from = {.size = sizeof(from), .kind = KUF_SOURCE_MEMORY, .addr = bytes, .len = PAGES * page};
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = PAGES * page,
                              .hva = (uintptr_t)ram, .fd = shared ? fd : 0, .source = &from};
    must(kuf_add_memory(kuf, &slot) == 0, "%s: kuf_add_memory: %s", what, kuf_error());
    ok(holds_content(ram, BASE, PAGES * page, 1), "%s: pages come from memory", what);
    close_with(kuf, 0);
    munmap(ram, PAGES * page);
    munmap(bytes, PAGES * page);
    close(fd);
}

static int refused(unsigned errno_value)
{
    begin_child();
    if (!refuse(errno_value))
        skip("no seccomp filter can be set: %s", strerror(errno));
    char byte = 1, other = 0;
    struct iovec from = {&byte, 1}, to = {&other, 1};
    must(process_vm_readv(getpid(), &to, 1, &from, 1, 0) < 0 && errno == (int)errno_value, "the filter refuses");
    resolved(0, true, "a shared file");
    resolved(0, false, "private memory");
    resolved(KUF_OPEN_DETECT_ZERO, false, "private memory, looked through for zeroes");
    from_memory(true, "a shared file");
    from_memory(false, "private memory");
    return done();
}

int main(void)
{
    begin();
    static const unsigned answers[] = {ENOSYS, EPERM};
    for (int i = 0; i < 2; i++) {
        pid_t child = fork();
        if (child == 0)
            exit(refused(answers[i]));
        int status = end_of(child);
        if (status == 77)
            skip("see above");
        is(status, 0, "refused with %s", strerror((int)answers[i]));
    }
    return done();
}
