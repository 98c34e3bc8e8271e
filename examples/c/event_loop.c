/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * event_loop.c - serves faults from the program's own epoll loop, with no fill callback
 *
 * For a VMM that already has an event loop. kuf_fd is one more descriptor in it, next to a timer in place of the VMM's
 * other work. When kuf_fd polls readable, kuf_read takes the faults in batches and kuf_resolve answers them: most of
 * them in the loop, each third from another thread, which answers late and newest first, as a source with several
 * connections would. Threads take the place of vCPUs and check each byte of each page.
 *
 * The example runs twice: the library's service thread reads the kernel's queue, or kuf_read does (KUF_OPEN_DIRECT).
 *
 * Build:  cc -O2 -pthread -o event_loop event_loop.c $(pkg-config --cflags --libs kuf)
 * Run:    ./event_loop [--queued | --direct]
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <kuf.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/timerfd.h>

#include "example.h"

#define MEMORY (16 * MIB)
#define PAGES (MEMORY / PAGE)
enum { TOUCHERS = 3, BATCH = 16, HELPER_MAX = 64, TICK_MS = 5, WATCHDOG_S = 30 };

static const char usage[] =
    "usage: event_loop [--queued | --direct]\n"
    "Serves page faults from an epoll loop. Runs both ways without an option.\n"
    "  --queued   the library's thread reads faults from the kernel\n"
    "  --direct   kuf_read reads faults from the kernel (KUF_OPEN_DIRECT)\n";

/* The slot's guest physical address; the program may choose any. */
static const uint64_t slot_gpa = UINT64_C(1) << 32;

/* The queue of faults for the other thread. */
struct helper {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct kuf_fault faults[HELPER_MAX];
    unsigned count;
    bool stop;
    uint64_t resolved;
};

struct vmm {
    struct kuf *kuf;
    uint8_t *memory;
    int epoll, timer, done;
    unsigned ticks;
    unsigned finished;
    uint64_t faults, resolved, batches;
    struct helper helper;
    pthread_t toucher[TOUCHERS];
    atomic_uint next_toucher;
    atomic_uint bad_pages;
};

/* Answers one fault with the pattern; a VMM would read a file or a connection. */
static void resolve(struct kuf *kuf, const struct kuf_fault *fault)
{
    uint8_t page[PAGE_MAX];
    pattern_write(page, fault->memory_offset / PAGE);
    if (kuf_resolve(kuf, fault->gpa, page, PAGE, 0) < 0)
        fail("kuf_resolve: %s", kuf_error());
}

/* ---- The other thread ---- */

static void *helper_main(void *argument)
{
    struct vmm *vmm = argument;
    struct helper *helper = &vmm->helper;
    pthread_mutex_lock(&helper->lock);
    while (!helper->stop) {
        if (helper->count == 0) {
            pthread_cond_wait(&helper->changed, &helper->lock);
            continue;
        }
        struct kuf_fault fault = helper->faults[--helper->count];
        pthread_mutex_unlock(&helper->lock);
        resolve(vmm->kuf, &fault);
        pthread_mutex_lock(&helper->lock);
        helper->resolved++;
    }
    pthread_mutex_unlock(&helper->lock);
    return NULL;
}

/* Returns whether the other thread took the fault. */
static bool helper_take(struct helper *helper, const struct kuf_fault *fault)
{
    pthread_mutex_lock(&helper->lock);
    bool room = helper->count < HELPER_MAX;
    if (room)
        helper->faults[helper->count++] = *fault;
    pthread_cond_signal(&helper->changed);
    pthread_mutex_unlock(&helper->lock);
    return room;
}

static void helper_stop(struct helper *helper)
{
    pthread_mutex_lock(&helper->lock);
    helper->stop = true;
    pthread_cond_signal(&helper->changed);
    pthread_mutex_unlock(&helper->lock);
    pthread_join(helper->thread, NULL);
}

/* ---- Threads in place of vCPUs ---- */

static void *toucher_main(void *argument)
{
    struct vmm *vmm = argument;
    uint64_t start = atomic_fetch_add(&vmm->next_toucher, 1) * (PAGES / TOUCHERS);
    for (uint64_t i = 0; i < PAGES; i++) {
        uint64_t page = scattered(start + i, PAGES);
        if (!pattern_matches(vmm->memory + page * PAGE, page))
            atomic_fetch_add(&vmm->bad_pages, 1);
    }
    uint64_t one = 1;
    if (write(vmm->done, &one, sizeof(one)) != sizeof(one))
        fail("eventfd: %s", strerror(errno));
    return NULL;
}

/* ---- The loop ---- */

/* The descriptor is level-triggered: it stays readable while faults are left, so that one batch at a time is enough. */
static void on_faults(struct vmm *vmm)
{
    struct kuf_fault faults[BATCH];
    ssize_t n = kuf_read(vmm->kuf, faults, BATCH);
    if (n == -EAGAIN)
        return;
    if (n < 0)
        fail("kuf_read: %s", kuf_error());
    vmm->batches++;
    for (ssize_t i = 0; i < n; i++) {
        bool taken = vmm->faults++ % 3 == 0 && helper_take(&vmm->helper, &faults[i]);
        if (taken)
            continue;
        resolve(vmm->kuf, &faults[i]);
        vmm->resolved++;
    }
}

static void on_timer(struct vmm *vmm)
{
    uint64_t expirations;
    if (read(vmm->timer, &expirations, sizeof(expirations)) == sizeof(expirations))
        vmm->ticks++;
}

static void on_done(struct vmm *vmm)
{
    uint64_t more;
    if (read(vmm->done, &more, sizeof(more)) == sizeof(more))
        vmm->finished += (unsigned)more;
}

static void watch(struct vmm *vmm, int fd)
{
    struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };
    if (epoll_ctl(vmm->epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        fail("epoll_ctl: %s", strerror(errno));
}

static void loop(struct vmm *vmm)
{
    int faults = kuf_fd(vmm->kuf);
    if (faults < 0)
        fail("kuf_fd: %s", kuf_error());
    watch(vmm, faults);
    watch(vmm, vmm->timer);
    watch(vmm, vmm->done);
    while (vmm->finished < TOUCHERS || vmm->ticks < 2) {
        struct epoll_event events[4];
        int n = epoll_wait(vmm->epoll, events, 4, -1);
        for (int i = 0; i < n; i++) {
            if (events[i].data.fd == faults)
                on_faults(vmm);
            else if (events[i].data.fd == vmm->timer)
                on_timer(vmm);
            else
                on_done(vmm);
        }
    }
}

/* ---- */

static void start(struct vmm *vmm, uint32_t flags)
{
    vmm->epoll = epoll_create1(EPOLL_CLOEXEC);
    vmm->timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    vmm->done = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    vmm->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (vmm->epoll < 0 || vmm->timer < 0 || vmm->done < 0 || vmm->memory == MAP_FAILED)
        fail("setting up: %s", strerror(errno));
    struct itimerspec every = { { 0, TICK_MS * 1000000 }, { 0, TICK_MS * 1000000 } };
    timerfd_settime(vmm->timer, 0, &every, NULL);

    /* USER_MODE_ONLY needs no privilege and is enough for threads. A VMM with a KVM guest must leave it out. */
    struct kuf_options options = { .size = sizeof(options), .flags = flags | KUF_OPEN_USER_MODE_ONLY };
    int result = kuf_open(&options, &vmm->kuf);
    check_open(result, kuf_error());
    struct kuf_memory memory = {
        .size = sizeof(memory),
        .gpa = slot_gpa,
        .len = MEMORY,
        .hva = (uintptr_t)vmm->memory,
    };
    if (kuf_add_memory(vmm->kuf, &memory) < 0)
        fail("kuf_add_memory: %s", kuf_error());

    pthread_mutex_init(&vmm->helper.lock, NULL);
    pthread_cond_init(&vmm->helper.changed, NULL);
    if (pthread_create(&vmm->helper.thread, NULL, helper_main, vmm) != 0)
        fail("cannot start a thread");
    for (int i = 0; i < TOUCHERS; i++)
        if (pthread_create(&vmm->toucher[i], NULL, toucher_main, vmm) != 0)
            fail("cannot start a thread");
}

static void finish(struct vmm *vmm, const char *name)
{
    for (int i = 0; i < TOUCHERS; i++)
        pthread_join(vmm->toucher[i], NULL);
    helper_stop(&vmm->helper);
    printf("%-7s %llu faults in %llu batches; %llu resolved in the loop, %llu by the other thread; %u timer ticks; "
           "bad pages: %u\n",
           name, (unsigned long long)vmm->faults, (unsigned long long)vmm->batches, (unsigned long long)vmm->resolved,
           (unsigned long long)vmm->helper.resolved, vmm->ticks, atomic_load(&vmm->bad_pages));

    /* All pages are present, so that kuf_remove_memory needs no flag. */
    if (kuf_remove_memory(vmm->kuf, slot_gpa, 0) < 0)
        fail("kuf_remove_memory: %s", kuf_error());
    if (kuf_close(&vmm->kuf, 0) < 0)
        fail("kuf_close: %s", kuf_error());
    if (atomic_load(&vmm->bad_pages) != 0)
        fail("%s: wrong bytes", name);
    if (vmm->faults != PAGES || vmm->resolved + vmm->helper.resolved != PAGES || vmm->helper.resolved == 0)
        fail("%s: the number of faults is not %llu, that of the pages", name, (unsigned long long)PAGES);
    close(vmm->epoll);
    close(vmm->timer);
    close(vmm->done);
    munmap(vmm->memory, MEMORY);
}

static void run(const char *name, uint32_t flags)
{
    struct vmm vmm = { .epoll = -1 };
    start(&vmm, flags);
    loop(&vmm);
    finish(&vmm, name);
}

int main(int argc, char **argv)
{
    static const struct option names[] = {
        { "queued", no_argument, NULL, 'q' },
        { "direct", no_argument, NULL, 'd' },
        { "help", no_argument, NULL, 'h' },
        { NULL, 0, NULL, 0 },
    };
    bool queued = true, direct = true;
    for (int c; (c = getopt_long(argc, argv, "h", names, NULL)) != -1;) {
        switch (c) {
        case 'q': direct = false; break;
        case 'd': queued = false; break;
        case 'h': fputs(usage, stdout); return EXIT_SUCCESS;
        default: fputs(usage, stderr); return EXIT_FAILURE;
        }
    }
    example_begin(WATCHDOG_S);
    if (queued)
        run("queued", KUF_OPEN_CALLER_DRIVEN);
    if (direct)
        run("direct", KUF_OPEN_DIRECT);
    return EXIT_SUCCESS;
}
