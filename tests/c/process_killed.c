/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The process behind an adopted userfaultfd is killed: while populate fills its memory, and with pages pending. Every
 * waiting call returns, no retry lasts for ever, and the handle closes with no unresolved pages.
 */
#include "in_thread.h"
#include "touches.h"
#include "uffd.h"
#include "watched.h"
#include <sys/prctl.h>

#define BASE UINT64_C(0xb0000000)
enum { PAGES = 64, HALF = PAGES / 2, OWED = 5 };

/* ---- The other process ----------------------------------------------------------------------------------------------- */

/* Its message, which comes with its userfaultfd. */
struct hello {
    uint64_t hva;
    int error;
};

struct other {
    pid_t pid;
    int socket;
    /* In this process. */
    int uffd;
    uint64_t hva;
};

static void say_hello(int socket, struct hello hello, int uffd)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct iovec part = {&hello, sizeof(hello)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (uffd >= 0) {
        message.msg_control = &control;
        message.msg_controllen = sizeof(control);
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &uffd, sizeof(int));
    }
    if (sendmsg(socket, &message, 0) < 0)
        _exit(1);
}

/* Opens a userfaultfd, sends it, and touches the pages that it is told to, one after the other, until it is killed. */
static void other_process(int socket)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    size_t length = PAGES * page_size();
    unsigned char *ram = map_anonymous(length);
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC), uffd = -1;
    if (device >= 0)
        uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API};
    int error = uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0 ? errno : 0;
    say_hello(socket, (struct hello){(uintptr_t)ram, error}, uffd);
    for (int page; read(socket, &page, sizeof(page)) == sizeof(page);) {
        uint64_t word = *(volatile uint64_t *)(ram + (size_t)page * page_size());
        if (write(socket, &word, sizeof(word)) != sizeof(word))
            break;
    }
    _exit(0);
}

static struct other start_other(void)
{
    int pair[2];
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0, "a socket pair");
    struct other other = {.pid = fork(), .socket = pair[0], .uffd = -1};
    must(other.pid >= 0, "a process");
    if (other.pid == 0) {
        close(pair[0]);
        other_process(pair[1]);
    }
    close(pair[1]);
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct hello hello = {0};
    struct iovec part = {&hello, sizeof(hello)};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof(control)};
    must(recvmsg(other.socket, &message, MSG_CMSG_CLOEXEC) == sizeof(hello), "the other process says hello");
    if (hello.error != 0)
        skip("no userfaultfd in another process: %s", strerror(hello.error));
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    must(header != NULL && header->cmsg_type == SCM_RIGHTS, "with its userfaultfd");
    memcpy(&other.uffd, CMSG_DATA(header), sizeof(int));
    other.hva = hello.hva;
    return other;
}

static void ask_touch(struct other *other, int page)
{
    must(write(other->socket, &page, sizeof(page)) == sizeof(page), "the other process is told to touch page %d", page);
}

static uint64_t touched(struct other *other)
{
    uint64_t word = 0;
    must(read(other->socket, &word, sizeof(word)) == sizeof(word), "the other process has touched a page");
    return word;
}

static void kill_other(struct other *other)
{
    must(kill(other->pid, SIGKILL) == 0, "kill");
    is(end_of(other->pid), -SIGKILL, "the other process is killed");
}

/* ---- After its end ---------------------------------------------------------------------------------------------------- */

static struct source source = SOURCE_INIT;
static atomic_bool gate, waits_at_gate;

/* The second half waits at the gate. */
static int fill(void *opaque, struct kuf_fill *fill)
{
    if (fill->gpa + fill->len > BASE + HALF * page_size()) {
        atomic_store(&waits_at_gate, true);
        wait_until(atomic_load(&gate));
    }
    return source_fill(opaque, fill);
}

/* Calls kuf_ensure on another thread, and returns when that waits. */
static void start_waiting(struct ensuring *ensuring, struct kuf *kuf, int page)
{
    start_ensuring(ensuring, kuf, BASE + (uint64_t)page * page_size(), page_size());
    wait_until(atomic_load(&ensuring->tid) != 0 && waits_in(atomic_load(&ensuring->tid), "futex"));
}

static void add_remote(struct kuf *kuf, struct other *other)
{
    struct kuf_memory slot = {.size = sizeof(slot), .flags = KUF_MEMORY_REMOTE, .gpa = BASE,
                              .len = PAGES * page_size(), .hva = other->hva, .uffd = other->uffd};
    int got = kuf_add_memory(kuf, &slot);
    must(got == 0, "kuf_add_memory of another process: %s", got ? kuf_error() : "adds");
}

static void all_is_gone(struct kuf *kuf, struct other *other, const char *when)
{
    size_t page = page_size();
    unsigned char *bytes = map_anonymous(page);
    is(last_event(&source, KUF_EVENT_GONE).error, -ESRCH, "%s: KUF_EVENT_GONE says why", when);
    is(last_event(&source, KUF_EVENT_GONE).gpa, BASE, "%s: and which slot", when);
    ok(progress_of(kuf, BASE).flags & KUF_PROGRESS_GONE, "%s: kuf_progress says so", when);
    is(kuf_resolve(kuf, BASE + OWED * page, bytes, page, 0), -ESRCH, "%s: kuf_resolve of what is owed", when);
    is(kuf_resolve(kuf, BASE + (PAGES - 1) * page, bytes, page, 0), -ESRCH, "%s: kuf_resolve of another page", when);
    is(kuf_ensure(kuf, BASE + (PAGES - 1) * page, page, -1), -ESRCH, "%s: kuf_ensure", when);
    is(kuf_vcpu_fault(kuf, BASE + (PAGES - 1) * page, page, 0), -ESRCH, "%s: kuf_vcpu_fault", when);
    is(kuf_discard(kuf, BASE, page, KUF_DISCARD_REFILL), -ESRCH, "%s: kuf_discard", when);
    struct kuf_memory slot = {.size = sizeof(slot), .flags = KUF_MEMORY_REMOTE, .gpa = 2 * BASE,
                              .len = page, .hva = other->hva + PAGES * page, .uffd = other->uffd};
    is(kuf_add_memory(kuf, &slot), -ESRCH, "%s: kuf_add_memory", when);
    is(atomic_load(&source.events[KUF_EVENT_GONE]), 1, "%s: the caller is told once", when);
    is(atomic_load(&source.events[KUF_EVENT_FATAL]), 0, "%s: and the service lives", when);
    is(stats_of(kuf).bytes_poisoned, 0, "%s: nothing is poisoned", when);
    is(kuf_remove_memory(kuf, BASE, 0), 0, "%s: the slot ends, with nothing to settle", when);
    close_watched(kuf, 0);
    close(other->uffd);
    close(other->socket);
    munmap(bytes, page);
    atomic_store(&source.events[KUF_EVENT_GONE], 0);
}

static void during_populate(struct other *other)
{
    size_t page = page_size();
    struct kuf *kuf = watch(open_with((struct kuf_options){
        .flags = KUF_OPEN_ADOPT_ONLY, .fill = fill, .event = source_event, .opaque = &source, .demand_run = page,
        .populate_run = 4 * page}));
    add_remote(kuf, other);
    ask_touch(other, 3);
    ok(touched(other) == word_of(BASE + 3 * page, 1), "the other process reads its bytes");
    atomic_store(&source.bad_answer, KUF_FILL_DEFERRED);
    atomic_store(&source.bad_gpa, BASE + OWED * page);
    ask_touch(other, OWED);
    wait_until(kuf_pending(kuf, NULL, 0) == 1);
    struct kuf_populate_request all = {.size = sizeof(all), .gpa = KUF_ALL};
    is(kuf_populate(kuf, &all), 0, "populate begins");
    wait_until(atomic_load(&waits_at_gate));
    struct ensuring owed, filling;
    start_waiting(&owed, kuf, OWED);
    start_waiting(&filling, kuf, HALF);
    is(progress_of(kuf, BASE).deferred, page, "a page is owed and half of the memory is filled");
    kill_other(other);
    atomic_store(&gate, true);
    is(join_ensuring(&owed), -ESRCH, "kuf_ensure of the page that is owed returns");
    is(join_ensuring(&filling), -ESRCH, "and that of a page which was being filled");
    wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) == 1);
    is(last_event(&source, KUF_EVENT_POPULATED).error, -ESRCH, "populate ends and says why");
    wait_until(atomic_load(&source.events[KUF_EVENT_GONE]) > 0);
    all_is_gone(kuf, other, "populate");
    atomic_store(&source.bad_gpa, NO_GPA);
}

/* No call meets the end of the process: the library finds out by itself. */
static void while_pages_are_owed(struct other *other)
{
    size_t page = page_size();
    struct kuf *kuf = watch(open_with((struct kuf_options){.flags = KUF_OPEN_ADOPT_ONLY, .event = source_event,
                                                           .opaque = &source}));
    add_remote(kuf, other);
    ask_touch(other, OWED);
    is(kuf_poll(kuf, -1), 1, "a fault to read");
    struct kuf_fault fault;
    is(kuf_read(kuf, &fault, 1), 1, "is read");
    is(fault.gpa, BASE + OWED * page, "and owed");
    struct ensuring owed;
    start_waiting(&owed, kuf, OWED);
    kill_other(other);
    is(join_ensuring(&owed), -ESRCH, "kuf_ensure of it returns");
    wait_until(atomic_load(&source.events[KUF_EVENT_GONE]) > 0);
    all_is_gone(kuf, other, "owed");
}

/* The first call that meets it reports it: here kuf_resolve. */
static void found_by_resolve(struct other *other)
{
    size_t page = page_size();
    unsigned char *bytes = map_anonymous(page);
    struct kuf *kuf = watch(open_with((struct kuf_options){.flags = KUF_OPEN_ADOPT_ONLY, .event = source_event,
                                                           .opaque = &source}));
    add_remote(kuf, other);
    ask_touch(other, OWED);
    is(kuf_poll(kuf, -1), 1, "a fault to read");
    kill_other(other);
    is(kuf_resolve(kuf, BASE + OWED * page, bytes, page, 0), -ESRCH, "kuf_resolve finds the process gone");
    wait_until(atomic_load(&source.events[KUF_EVENT_GONE]) > 0);
    all_is_gone(kuf, other, "resolve");
    munmap(bytes, page);
}

int main(void)
{
    begin();
    /* Before there are threads: the processes are forks of this one. */
    struct other other[3];
    for (int i = 0; i < 3; i++)
        other[i] = start_other();
    begin_watched(40);
    during_populate(&other[0]);
    while_pages_are_owed(&other[1]);
    found_by_resolve(&other[2]);
    return done();
}
