/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A kernel that gives false answers: that a page exists which does not, that memory is not mapped which is, that this
 * very process has ended. For every false answer, no page that was not filled reads as zero. A filter is such a kernel.
 */
#include "harness.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <stddef.h>
#include <sys/prctl.h>

#ifndef UFFDIO_CONTINUE
#define UFFDIO_CONTINUE 0xc020aa07
#endif
#ifndef UFFDIO_POISON
#define UFFDIO_POISON 0xc020aa08
#endif

#define BASE UINT64_C(0x40000000)
enum { PAGES = 16, CASES = 24 };

static struct source source = SOURCE_INIT;

/* The requests that get such answers. */
enum { COPY = 1, CONTINUE = 2, ZEROPAGE = 4, POISON = 8 };
static const struct {
    int requests;
    const char *name;
} lies[] = {{COPY, "UFFDIO_COPY"}, {CONTINUE, "UFFDIO_CONTINUE"}, {COPY | CONTINUE | ZEROPAGE, "whatever fills"},
            {COPY | CONTINUE | ZEROPAGE | POISON, "everything"}};
static const unsigned answers[] = {EEXIST, ENOENT, ESRCH};

#define REFUSE(request)                                                                                                   \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)(request), 0, 1),                                                       \
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (answer & SECCOMP_RET_DATA))
#define NEVER 0xffffffff

static bool lie(int requests, unsigned answer)
{
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        REFUSE(requests & COPY ? UFFDIO_COPY : NEVER),
        REFUSE(requests & CONTINUE ? UFFDIO_CONTINUE : NEVER),
        REFUSE(requests & ZEROPAGE ? UFFDIO_ZEROPAGE : NEVER),
        REFUSE(requests & POISON ? UFFDIO_POISON : NEVER),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof(filter) / sizeof(filter[0]), .filter = filter};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

static const unsigned char *ram;
static atomic_bool touched;
static atomic_int raised;

static void *touch_first(void *unused)
{
    (void)unused;
    atomic_store(&raised, touch(ram));
    atomic_store(&touched, true);
    return NULL;
}

/* Its bytes, or an error. */
static bool is_closed_or_filled(uint64_t page)
{
    const unsigned char *at = ram + page * page_size();
    return touch(at) != 0 || holds_content(at, BASE + page * page_size(), page_size(), 1);
}

static int told(int requests, unsigned answer, bool shared, const char *what)
{
    int fd;
    size_t page = page_size();
    begin_child();
    ram = map_kind(shared, PAGES * page, &fd);
    if (!lie(requests, answer))
        skip("no seccomp filter can be set: %s", strerror(errno));
    struct kuf *kuf = open_serviced(&source);
    add_kind(kuf, BASE, ram, PAGES * page, fd);
    pthread_t toucher = start(touch_first, NULL);
    wait_until(atomic_load(&touched) || atomic_load(&source.events[KUF_EVENT_FATAL]) > 0);
    close_with(kuf, KUF_END_POISON);
    pthread_join(toucher, NULL);
    ok(atomic_load(&raised) != 0 || holds_content(ram, BASE, page, 1), "%s: a page that is touched has its bytes, or is closed", what);
    bool good = true;
    for (uint64_t i = 0; i < PAGES; i++)
        good = is_closed_or_filled(i) && good;
    ok(good, "%s: and no other reads as zero when the handle is closed", what);
    is(atomic_load(&source.events[KUF_EVENT_GONE]), 0, "%s: this process is not taken for gone", what);
    return done();
}

int main(void)
{
    begin();
    pid_t children[CASES];
    int count = 0;
    bool minor = has_feature(KUF_FEATURE_MINOR);
    static char what[CASES][96];
    for (int shared = 0; shared <= minor; shared++)
        for (size_t i = 0; i < sizeof(lies) / sizeof(lies[0]); i++)
            for (size_t j = 0; j < sizeof(answers) / sizeof(answers[0]); j++, count++) {
                snprintf(what[count], sizeof(what[count]), "%s: %s to %s", shared ? "in place" : "by copy",
                         strerror((int)answers[j]), lies[i].name);
                fflush(stdout);
                children[count] = fork();
                if (children[count] == 0)
                    exit(told(lies[i].requests, answers[j], shared, what[count]));
            }
    for (int i = 0; i < count; i++) {
        int status = end_of(children[i]);
        if (status == 77)
            skip("see above");
        is(status, 0, "%s", what[i]);
    }
    return done();
}
