/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * UFFDIO_UNREGISTER alone can leave a thread blocked: the kernel wakes before it takes the mapping's lock. So a WAKE of
 * the same range follows every UNREGISTER of the library: at the end of a slot and of a handle, and when a registration
 * is rolled back. This program stands between the library and the kernel, and counts.
 */
#include "harness.h"
#include "uffd.h"
#include <stdarg.h>

#define BASE UINT64_C(0x50000000)
#define WIDE ((size_t)64 << 20)

/* ---- Between the library and the kernel ---------------------------------------------------------------------------- */

enum { MOST = 256 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    int fd;
    uint64_t start, len;
} unwoken[MOST];
static int waiting, unregistered;

static void note(int fd, unsigned long request, const struct uffdio_range *range)
{
    pthread_mutex_lock(&lock);
    if (request == UFFDIO_UNREGISTER && waiting < MOST) {
        unwoken[waiting].fd = fd;
        unwoken[waiting].start = range->start;
        unwoken[waiting++].len = range->len;
        unregistered++;
    } else if (request == UFFDIO_WAKE) {
        for (int i = 0; i < waiting; i++)
            if (unwoken[i].fd == fd && unwoken[i].start >= range->start &&
                unwoken[i].start + unwoken[i].len <= range->start + range->len)
                unwoken[i--] = unwoken[--waiting];
    }
    pthread_mutex_unlock(&lock);
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    long got = syscall(SYS_ioctl, fd, request, argument);
    int error = errno;
    if (request == UFFDIO_UNREGISTER || request == UFFDIO_WAKE)
        note(fd, request, argument);
    errno = error;
    return (int)got;
}

static void all_woken(int at_least, const char *when)
{
    pthread_mutex_lock(&lock);
    ok(unregistered >= at_least, "%s: ranges were unregistered (%d)", when, unregistered);
    is(waiting, 0, "%s: and each was woken afterwards", when);
    waiting = unregistered = 0;
    pthread_mutex_unlock(&lock);
}

/* ---- Ways to unregister -------------------------------------------------------------------------------------------- */

static struct source source = SOURCE_INIT;

static struct kuf *open_several(uint32_t userfaultfds)
{
    return open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &source, .userfaultfds = userfaultfds});
}

static unsigned char *map_wide(void)
{
    unsigned char *ram = map_across(WIDE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    must(ram != MAP_FAILED, "a wide mapping");
    return ram;
}

static void ends(uint32_t userfaultfds)
{
    unsigned char *ram = map_wide();
    struct kuf *kuf = open_several(userfaultfds);
    add(kuf, BASE, ram, WIDE);
    is(remove_patiently(kuf, BASE), 0, "%u: the slot ends", userfaultfds);
    all_woken(1, "kuf_remove_memory");
    must(madvise(ram, WIDE, MADV_DONTNEED) == 0, "its poison is dropped");
    add(kuf, BASE, ram, WIDE);
    close_with(kuf, KUF_END_POISON);
    all_woken(1, "kuf_close");
    munmap(ram, WIDE);
}

/* Another userfaultfd has the last page: all stripes before it are registered, and unregistered again. */
static void rolled_back(uint32_t userfaultfds)
{
    size_t page = page_size();
    unsigned char *ram = map_wide();
    int other = own_userfaultfd(0);
    struct uffdio_register last = {.range = {(uintptr_t)ram + WIDE - page, page}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    must(ioctl(other, UFFDIO_REGISTER, &last) == 0, "another userfaultfd has the last page");
    struct kuf *kuf = open_several(userfaultfds);
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = WIDE, .hva = (uintptr_t)ram};
    is(kuf_add_memory(kuf, &slot), -EBUSY, "%u: the slot is refused", userfaultfds);
    all_woken(WIDE / STRIPE - 1, "a registration that fails half-way");
    ok(!is_registered(ram), "nothing of it stays registered");
    close_with(kuf, 0);
    close(other);
    munmap(ram, WIDE);
}

int main(void)
{
    begin();
    ends(1);
    ends(2);
    rolled_back(2);
    rolled_back(4);
    return done();
}
