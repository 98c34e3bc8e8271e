/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * external_handler.c - serves the memory of another process
 *
 * The child is the VMM. It maps guest memory, opens a userfaultfd and sends it over a Unix socket, with the address and
 * the length of the mapping. The parent is the handler: it adopts the userfaultfd (kuf_memory.uffd) for addresses of
 * another process (KUF_MEMORY_REMOTE) and fills the pages. There are three rounds:
 *
 *   anonymous   the VMM checks all pages; those that it gives back with madvise, as a balloon does, must read as zero
 *   memfd       the same with a shared file, which it sends too (kuf_memory.fd): the handler fills the pages in place
 *   gone        the VMM dies while a fault is not answered; the handler learns of this and ends
 *
 * Build:  cc -O2 -pthread -o external_handler external_handler.c $(pkg-config --cflags --libs kuf)
 * Run:    ./external_handler [anonymous | memfd | gone]      (all three without an argument)
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <getopt.h>
#include <kuf.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "example.h"

enum { PAGES = 2048, GIVEN_BACK = 64, WATCHDOG_S = 20 };

#define MEMORY ((uint64_t)PAGES * PAGE)

static const char usage[] =
    "usage: external_handler [anonymous | memfd | gone]\n"
    "Serves the memory of another process through a userfaultfd received from it.\n";

enum round { ANONYMOUS, MEMFD, GONE, ROUNDS };

static const char *const round_names[ROUNDS] = { "anonymous", "memfd", "gone" };

/* ---- The protocol of the socket: the announcement with the descriptors, then single bytes ---- */

struct announcement {
    uint64_t hva;
    uint64_t len;
    uint32_t descriptors; /* 1: the userfaultfd; 2: the userfaultfd and the memory's file */
    uint32_t reserved;
};

enum { SERVED = 's', CHECKED = 'c', LEAVE = 'l' };

static void send_announcement(int channel, const struct announcement *announcement, const int *descriptors)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(2 * sizeof(int))];
    } control = { .room = { 0 } };
    struct iovec bytes = { .iov_base = (void *)(uintptr_t)announcement, .iov_len = sizeof(*announcement) };
    struct msghdr message = {
        .msg_iov = &bytes,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = CMSG_SPACE(announcement->descriptors * sizeof(int)),
    };
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(announcement->descriptors * sizeof(int));
    memcpy(CMSG_DATA(rights), descriptors, announcement->descriptors * sizeof(int));
    if (sendmsg(channel, &message, 0) != (ssize_t)sizeof(*announcement))
        fail("sendmsg: %s", strerror(errno));
}

/* Returns false if the VMM ended without an announcement; its exit status gives the reason. */
static bool receive_announcement(int channel, struct announcement *announcement, int *descriptors)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(2 * sizeof(int))];
    } control;
    struct iovec bytes = { .iov_base = announcement, .iov_len = sizeof(*announcement) };
    struct msghdr message = {
        .msg_iov = &bytes,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    ssize_t n = recvmsg(channel, &message, MSG_CMSG_CLOEXEC | MSG_WAITALL);
    if (n == 0 || (n < 0 && errno == ECONNRESET))
        return false;
    struct cmsghdr *rights = n < 0 ? NULL : CMSG_FIRSTHDR(&message);
    if (n != (ssize_t)sizeof(*announcement) || rights == NULL || rights->cmsg_type != SCM_RIGHTS ||
        announcement->descriptors < 1 || announcement->descriptors > 2 ||
        rights->cmsg_len != CMSG_LEN(announcement->descriptors * sizeof(int)))
        fail("the VMM sent a wrong announcement");
    memcpy(descriptors, CMSG_DATA(rights), announcement->descriptors * sizeof(int));
    return true;
}

static void send_byte(int channel, char byte)
{
    if (send(channel, &byte, 1, MSG_NOSIGNAL) != 1)
        fail("send: %s", strerror(errno));
}

static void expect_byte(int channel, char byte)
{
    char got = 0;
    if (recv(channel, &got, 1, 0) != 1 || got != byte)
        fail("the other process did not send the expected byte");
}

/* ---- The VMM ---- */

/*
 * Opens a userfaultfd in one of the ways that the kernel offers. The last way serves only faults of user mode, which is
 * enough here but not for a KVM guest.
 */
static int open_userfaultfd(void)
{
    int uffd = -1;
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
        uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
    }
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (uffd < 0)
        skip("userfaultfd: %s", strerror(errno));
    return uffd;
}

/*
 * The process that opens the userfaultfd chooses its features. EVENT_REMOVE tells the handler that the VMM gave memory
 * back; without it the handler would fill such a page with the old bytes.
 */
static void choose_features(int uffd, enum round round)
{
    struct uffdio_api api = { .api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE };
    if (round == MEMFD)
        api.features |= UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM;
    if (ioctl(uffd, UFFDIO_API, &api) < 0)
        skip("this kernel's userfaultfd lacks what the %s round needs", round_names[round]);
}

static uint8_t *map_memory(enum round round, int *file)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    *file = -1;
    if (round == MEMFD) {
        flags = MAP_SHARED;
        *file = memfd_create("guest-memory", MFD_CLOEXEC);
        if (*file < 0 || ftruncate(*file, (off_t)MEMORY) < 0)
            fail("memfd: %s", strerror(errno));
    }
    uint8_t *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, flags, *file, 0);
    if (memory == MAP_FAILED)
        fail("mmap: %s", strerror(errno));
    return memory;
}

/* Whether the guest gives this page back. It has touched some of these pages before, and others not. */
static bool is_given_back(uint64_t page)
{
    return page % (PAGES / GIVEN_BACK) == 0;
}

static bool is_zero(const uint8_t *page)
{
    static const uint8_t zeroes[PAGE_MAX];
    return memcmp(page, zeroes, PAGE) == 0;
}

/* For a file it uses MADV_REMOVE, which makes a hole; MADV_DONTNEED would drop only the mapping. */
static void give_pages_back(uint8_t *memory, enum round round)
{
    int advice = round == MEMFD ? MADV_REMOVE : MADV_DONTNEED;
    for (uint64_t page = 0; page < PAGES; page++)
        if (is_given_back(page) && madvise(memory + page * PAGE, PAGE, advice) < 0)
            fail("madvise: %s", strerror(errno));
}

static void check_pages(const uint8_t *memory, uint64_t from, uint64_t to, bool after)
{
    for (uint64_t i = from; i < to; i++) {
        uint64_t page = scattered(i, PAGES);
        const uint8_t *at = memory + page * PAGE;
        bool good = after && is_given_back(page) ? is_zero(at) : pattern_matches(at, page);
        if (!good)
            fail("VMM: page %llu holds wrong bytes", (unsigned long long)page);
    }
}

static void *touch_last_page(void *argument)
{
    const volatile uint8_t *memory = argument;
    fail("VMM: read %u from a page that was never filled", memory[MEMORY - 1]);
}

static _Noreturn void vmm_main(int channel, enum round round)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    example_begin(WATCHDOG_S);
    int file;
    uint8_t *memory = map_memory(round, &file);
    int uffd = open_userfaultfd();
    choose_features(uffd, round);
    struct announcement announcement = {
        .hva = (uintptr_t)memory,
        .len = MEMORY,
        .descriptors = round == MEMFD ? 2 : 1,
    };
    send_announcement(channel, &announcement, (int[]){ uffd, file });
    expect_byte(channel, SERVED); /* after this the VMM may touch the memory */

    if (round == GONE) {
        pthread_t toucher;
        if (!pattern_matches(memory, 0))
            fail("VMM: page 0 holds wrong bytes");
        if (pthread_create(&toucher, NULL, touch_last_page, memory) != 0)
            fail("cannot start a thread");
        expect_byte(channel, LEAVE);
        _exit(EXIT_SUCCESS); /* while that thread waits for its page */
    }
    check_pages(memory, 0, PAGES / 2, false);
    give_pages_back(memory, round);
    check_pages(memory, 0, PAGES, true);
    send_byte(channel, CHECKED);
    expect_byte(channel, LEAVE);
    _exit(EXIT_SUCCESS);
}

/* ---- The handler ---- */

struct handler {
    enum round round;
    int channel;
    atomic_bool complete;
    atomic_bool gone;
    atomic_uint lost;
};

/* The handler has no mapping of the VMM's memory: buf is the library's buffer or, with a file, the page itself. */
static int fill(void *opaque, struct kuf_fill *fill)
{
    struct handler *handler = opaque;
    if (handler->round == GONE && fill->memory_offset + fill->len == MEMORY)
        return KUF_FILL_DEFERRED; /* as from a slow source: the VMM dies before the answer */
    for (uint64_t done = 0; done < fill->len; done += PAGE)
        pattern_write((uint8_t *)fill->buf + done, (fill->memory_offset + done) / PAGE);
    return KUF_FILL_DONE;
}

static void on_event(void *opaque, const struct kuf_event *event)
{
    struct handler *handler = opaque;
    if (event->kind == KUF_EVENT_COMPLETE)
        atomic_store(&handler->complete, true);
    if (event->kind == KUF_EVENT_GONE)
        atomic_store(&handler->gone, true);
    if (event->kind == KUF_EVENT_POISONED || event->kind == KUF_EVENT_INACCESSIBLE || event->kind == KUF_EVENT_FATAL)
        atomic_fetch_add(&handler->lost, 1);
}

/* Returns NULL if the VMM ended before it announced memory. */
static struct kuf *serve(struct handler *handler)
{
    struct announcement announcement;
    int descriptors[2] = { -1, -1 };
    if (!receive_announcement(handler->channel, &announcement, descriptors))
        return NULL;
    if (announcement.len != MEMORY)
        fail("the VMM announces memory of another size");

    struct kuf *kuf;
    struct kuf_options options = {
        .size = sizeof(options),
        .flags = KUF_OPEN_ADOPT_ONLY, /* the handler opens no userfaultfd and needs no privilege */
        .fill = fill,
        .event = on_event,
        .opaque = handler,
    };
    int result = kuf_open(&options, &kuf);
    check_open(result, kuf_error());
    struct kuf_memory memory = {
        .size = sizeof(memory),
        .flags = KUF_MEMORY_REMOTE,
        .len = announcement.len,
        .hva = announcement.hva,
        .uffd = descriptors[0],
    };
    if (announcement.descriptors == 2)
        memory.fd = descriptors[1];
    if (kuf_add_memory(kuf, &memory) < 0)
        fail("kuf_add_memory: %s", kuf_error());
    /* The library has duplicated them. */
    close(descriptors[0]);
    if (descriptors[1] >= 0)
        close(descriptors[1]);
    send_byte(handler->channel, SERVED);
    return kuf;
}

static void report(struct kuf *kuf, enum round round)
{
    struct kuf_stats_info stats = { .size = sizeof(stats) };
    if (kuf_stats(kuf, &stats) < 0)
        fail("kuf_stats: %s", kuf_error());
    printf("%-10s %llu faults; KiB copied %llu, in place %llu, zeroed %llu; REMOVE events: %llu\n", round_names[round],
           (unsigned long long)stats.faults, (unsigned long long)stats.bytes_copied / 1024,
           (unsigned long long)stats.bytes_in_place / 1024, (unsigned long long)stats.bytes_zeroed / 1024,
           (unsigned long long)stats.events_remove);
    if (stats.faults == 0 || (round == MEMFD && stats.bytes_in_place == 0))
        fail("%s: the pages were not filled as expected", round_names[round]);
}

/* Another thread raises the event, shortly after its cause. */
static void wait_for_event(const atomic_bool *came, const char *name)
{
    for (int i = 0; i < 5000 && !atomic_load(came); i++)
        sleep_us(1000);
    if (!atomic_load(came))
        fail("%s was not raised", name);
}

/* All pages are present or removed. An event reports this, and after it kuf_close needs no flag. */
static void end_of_healthy_vmm(struct handler *handler, struct kuf *kuf)
{
    expect_byte(handler->channel, CHECKED);
    wait_for_event(&handler->complete, "KUF_EVENT_COMPLETE");
    report(kuf, handler->round);
    if (kuf_close(&kuf, 0) < 0)
        fail("kuf_close: %s", kuf_error());
    if (atomic_load(&handler->lost) != 0)
        fail("%s: pages were lost", round_names[handler->round]);
    send_byte(handler->channel, LEAVE);
}

/* The VMM dies while a fault is not answered: the socket closes, kuf_resolve returns -ESRCH, and no call blocks. */
static void end_of_dead_vmm(struct handler *handler, struct kuf *kuf)
{
    struct kuf_fault owed;
    ssize_t n;
    while ((n = kuf_pending(kuf, &owed, 1)) == 0)
        sleep_us(1000); /* until the VMM's thread has touched the page */
    if (n < 0)
        fail("kuf_pending: %s", kuf_error());
    char byte;
    send_byte(handler->channel, LEAVE);
    if (recv(handler->channel, &byte, 1, 0) != 0)
        fail("the VMM did not die");
    static const uint8_t late[PAGE_MAX];
    ssize_t resolved = kuf_resolve(kuf, owed.gpa, late, PAGE, 0);
    if (resolved != -ESRCH)
        fail("kuf_resolve for a dead process returned %zd", resolved);
    wait_for_event(&handler->gone, "KUF_EVENT_GONE");
    if (kuf_close(&kuf, 0) < 0)
        fail("kuf_close: %s", kuf_error());
    printf("           the VMM died: kuf_resolve returned -ESRCH, KUF_EVENT_GONE was raised, the handler ended\n");
}

static void run(enum round round)
{
    int channels[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channels) < 0)
        fail("socketpair: %s", strerror(errno));
    fflush(stdout); /* so that the child does not print the buffered text again */
    pid_t vmm = fork();
    if (vmm < 0)
        fail("fork: %s", strerror(errno));
    if (vmm == 0) {
        close(channels[0]);
        vmm_main(channels[1], round);
    }
    close(channels[1]);

    struct handler handler = { .round = round, .channel = channels[0] };
    struct kuf *kuf = serve(&handler);
    if (kuf != NULL && round == GONE)
        end_of_dead_vmm(&handler, kuf);
    else if (kuf != NULL)
        end_of_healthy_vmm(&handler, kuf);
    close(channels[0]);

    int status;
    if (waitpid(vmm, &status, 0) < 0 || !WIFEXITED(status))
        fail("%s: the VMM was killed", round_names[round]);
    if (WEXITSTATUS(status) != 0)
        _exit(WEXITSTATUS(status));
    if (kuf == NULL)
        fail("%s: the VMM announced no memory", round_names[round]);
}

int main(int argc, char **argv)
{
    static const struct option names[] = { { "help", no_argument, NULL, 'h' }, { NULL, 0, NULL, 0 } };
    for (int c; (c = getopt_long(argc, argv, "h", names, NULL)) != -1;) {
        fputs(usage, c == 'h' ? stdout : stderr);
        return c == 'h' ? EXIT_SUCCESS : EXIT_FAILURE;
    }
    example_begin(WATCHDOG_S);
    bool ran = false;
    for (enum round round = ANONYMOUS; round < ROUNDS; round++) {
        if (optind < argc && strcmp(argv[optind], round_names[round]) != 0)
            continue;
        run(round);
        ran = true;
    }
    if (!ran)
        fail("there is no round '%s'", argv[optind]);
    return EXIT_SUCCESS;
}
