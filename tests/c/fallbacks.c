/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The library on kernels that lack a part of userfaultfd, as docs/kernels.md lists them. This program stands between
 * the library and the kernel, and hides the parts that this kernel has: one at a time, and all. Each way is a process
 * of its own, because the library asks the kernel once.
 */
#include "uffd.h"

#include <sched.h>
#include <stdarg.h>
#include <sys/mount.h>

#define BASE UINT64_C(0x40000000)
#define HUGE (UINT64_C(2) << 20)
#define MINOR (UINT64_C(3) << 9)
#define POISON (UINT64_C(1) << 14)
#define MOVE (UINT64_C(1) << 16)
#define THREAD_ID UFFD_FEATURE_THREAD_ID
enum { PAGES = 64 };

/* ---- Between the library and the kernel ---------------------------------------------------------------------------- */

static uint64_t hidden;

/* Whether an older kernel refuses the call. */
static bool refused(unsigned long request, const void *argument)
{
    /* The number of one is that of USERFAULTFD_IOC_NEW, which has no argument. */
    if (request == UFFDIO_REGISTER)
        return ((const struct uffdio_register *)argument)->mode & 4 && hidden & MINOR;
    switch (_IOC_TYPE(request) == UFFDIO ? _IOC_NR(request) : ~0u) {
    case 0x05: return hidden & MOVE;
    case 0x07: return hidden & MINOR;
    case 0x08: return hidden & POISON;
    case 0x3f: return ((const struct uffdio_api *)argument)->features & hidden;
    default: return false;
    }
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (refused(request, argument)) {
        errno = EINVAL;
        return -1;
    }
    int got = (int)syscall(SYS_ioctl, fd, request, argument);
    if (got == 0 && request == UFFDIO_API)
        ((struct uffdio_api *)argument)->features &= ~hidden;
    return got;
}

/* ---- The library without it ---------------------------------------------------------------------------------------- */

static struct source source = SOURCE_INIT;
static atomic_uint with_thread;

static int fill(void *opaque, struct kuf_fill *run)
{
    atomic_fetch_add(&with_thread, run->thread != 0);
    return source_fill(opaque, run);
}

static struct kuf *open_again(void)
{
    source = (struct source)SOURCE_INIT;
    atomic_store(&with_thread, 0);
    return open_with((struct kuf_options){.fill = fill, .event = source_event, .opaque = &source, .demand_run = page_size()});
}

static bool has(uint64_t bit, uint32_t feature, const char *name)
{
    bool found = has_feature(feature);
    ok(!(found && hidden & bit), "%s is %s", name, found ? "there" : "not there");
    return found;
}

/* A page that cannot be filled. */
static void poison(void)
{
    bool poisons = has(POISON, KUF_FEATURE_POISON, "poison");
    unsigned char *ram = map_anonymous(PAGES * page_size());
    struct kuf *kuf = open_again();
    add(kuf, BASE, ram, PAGES * page_size());
    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.bad_gpa, BASE + 5 * page_size());
    is(touch(ram + 5 * page_size()), poisons ? SIGBUS : SIGSEGV, "a page that cannot be filled raises its signal");
    comes_to(atomic_load(&source.events[poisons ? KUF_EVENT_POISONED : KUF_EVENT_INACCESSIBLE]), 1, "and an event says so");
    ok(holds_content(ram + 4 * page_size(), BASE + 4 * page_size(), page_size(), 1), "its neighbour has its bytes");
    atomic_store(&source.bad_gpa, NO_GPA);
    is(kuf_discard(kuf, BASE + 5 * page_size(), page_size(), KUF_DISCARD_REFILL), 0, "discarded");
    ok(holds_content(ram + 5 * page_size(), BASE + 5 * page_size(), page_size(), 1), "it is filled");
    close_with(kuf, KUF_END_POISON);
    is(touch(ram), poisons ? SIGBUS : SIGSEGV, "a page that was never filled raises it at the end");
    munmap(ram, PAGES * page_size());
}

/* Shared memory. */
static void minor(void)
{
    int fd;
    bool in_place = has(MINOR, KUF_FEATURE_MINOR, "minor faults");
    uint64_t length = PAGES * page_size();
    unsigned char *ram = map_shared(length, &fd);
    struct kuf *kuf = open_again();
    add_shared(kuf, BASE, ram, length, fd, 0);
    ok(holds_content(ram, BASE, length, 1), "shared memory has its bytes");
    comes_to(stats_of(kuf).bytes_in_place, in_place ? length : 0, "filled in place");
    comes_to(stats_of(kuf).bytes_copied, in_place ? 0 : length, "filled by copy");
    must(madvise(ram, length, MADV_REMOVE) == 0, "madvise");
    ok(holds_zeroes(ram, length), "pages that were given back are zero");
    close_with(kuf, KUF_END_POISON);
    struct kuf_memory all = {.size = sizeof(all), .flags = KUF_MEMORY_FILL_ALL, .gpa = BASE, .len = length,
                             .hva = (uintptr_t)ram, .fd = fd};
    kuf = open_again();
    int got = kuf_add_memory(kuf, &all);
    ok(in_place ? got == 0 : got == -ENOTSUP, "KUF_MEMORY_FILL_ALL: %d, %s", got, got ? kuf_error() : "taken");
    close_with(kuf, KUF_END_POISON);
    munmap(ram, length);
    close(fd);
}

/* Memory that is to be on huge pages. */
static void move(void)
{
    bool moves = has(MOVE, KUF_FEATURE_HUGE, "filling huge pages");
    uint64_t length = 4 * HUGE;
    unsigned char *ram = map_anonymous(length);
    struct kuf *kuf = open_again();
    struct kuf_memory slot = {.size = sizeof(slot), .flags = KUF_MEMORY_HUGE, .gpa = BASE, .len = length,
                              .hva = (uintptr_t)ram};
    is(kuf_add_memory(kuf, &slot), 0, "KUF_MEMORY_HUGE is a wish");
    is(kuf_ensure(kuf, BASE, length, -1), 0, "all of it is filled");
    ok(holds_content(ram, BASE, length, 1), "with its bytes");
    ok(moves || source.calls >= 4, "in more than one piece");
    close_with(kuf, 0);
    munmap(ram, length);
}

/* The toucher's thread id. */
static void thread_id(void)
{
    bool named = has(THREAD_ID, KUF_FEATURE_THREAD_ID, "the toucher's thread");
    unsigned char *ram = map_anonymous(PAGES * page_size());
    struct kuf *kuf = open_again();
    add(kuf, BASE, ram, PAGES * page_size());
    ok(holds_content(ram, BASE, PAGES * page_size(), 1), "memory has its bytes");
    is(atomic_load(&with_thread) > 0, named, "fills know the thread");
    struct kuf_block_time times[4];
    is(kuf_block_times(kuf, times, 4), named ? 1 : 0, "and its waiting time");
    close_with(kuf, 0);
    munmap(ram, PAGES * page_size());
}

/* Each in a process of its own: whether a file system could be hidden from it. */
static bool hide_device(void)
{
    return unshare(CLONE_NEWNS) == 0 && mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
           mount("/dev/null", "/dev/userfaultfd", NULL, MS_BIND, NULL) == 0;
}

static void device(void)
{
    if (access("/dev/userfaultfd", F_OK) == 0 && !hide_device()) {
        skip_part("/dev/userfaultfd cannot be hidden: %s", strerror(errno));
        return;
    }
    struct kuf_probe_info probe = {.size = sizeof(probe)};
    is(kuf_probe(-1, &probe), 0, "kuf_probe without /dev/userfaultfd");
    const char *why = probe.why[KUF_MECHANISM_USERFAULTFD];
    ok(strstr(why, "userfaultfd(2)") != NULL, "the system call is what is used or refused: %s", why);
    unsigned char *ram = map_anonymous(PAGES * page_size());
    struct kuf *kuf = open_again();
    add(kuf, BASE, ram, PAGES * page_size());
    ok(holds_content(ram, BASE, PAGES * page_size(), 1), "memory is served");
    close_with(kuf, 0);
    munmap(ram, PAGES * page_size());
}

static void all_parts(void)
{
    poison();
    minor();
    move();
    thread_id();
}

static void apart(const char *what, uint64_t bits, void (*part)(void))
{
    printf("# without %s\n", what);
    fflush(stdout);
    pid_t child = fork();
    must(child >= 0, "fork");
    if (child == 0) {
        begin_child();
        hidden = bits;
        part();
        _exit(atomic_load(&harness_failures) != 0);
    }
    int status = end_of(child);
    if (status == 77)
        skip("no userfaultfd without %s", what);
    is(status, 0, "without %s", what);
}

int main(void)
{
    begin();
    apart("anything hidden", 0, all_parts);
    apart("poison", POISON, all_parts);
    apart("minor faults", MINOR, all_parts);
    apart("moving pages", MOVE, all_parts);
    apart("thread ids", THREAD_ID, all_parts);
    apart("all of them", POISON | MINOR | MOVE | THREAD_ID, all_parts);
    apart("/dev/userfaultfd", 0, device);
    return done();
}
