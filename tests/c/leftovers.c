/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * munmap(2) and mremap(2) send their events after the mapping has changed. Meanwhile other memory may be mapped and
 * added at the same addresses, or the memory of another slot may move there: a late event does not apply to the new
 * slot. And a page in no slot that is still registered (after MREMAP_DONTUNMAP, where a mapping was extended, or where
 * the memory of a slot moved that was just being removed) is unregistered, so that its toucher neither stays blocked
 * nor faults for ever.
 */
#include "touches.h"
#include "uffd.h"
#include "watched.h"

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

#define BASE UINT64_C(0x70000000)
#define OTHER UINT64_C(0x7000000000)
#define WIDE ((size_t)64 << 20)

static struct source source = SOURCE_INIT;

/* ---- Between the library and the kernel ---------------------------------------------------------------------------- */

static pthread_mutex_t reading = PTHREAD_MUTEX_INITIALIZER;
static bool is_uffd[1024];
/* After this event only the thread that adds a slot may read, until it has read. 0: no such event. */
static int hold_after;
static atomic_bool held;
static _Thread_local bool adding;
/* The only userfaultfd that is held (-1: all are), and the one that was read last. */
static int held_only = -1, read_last = -1;

ssize_t read(int fd, void *buffer, size_t length)
{
    if (fd < 0 || fd >= 1024 || !is_uffd[fd])
        return syscall(SYS_read, fd, buffer, length);
    pthread_mutex_lock(&reading);
    if (atomic_load(&held) && (held_only < 0 || held_only == fd)) {
        if (!adding) {
            pthread_mutex_unlock(&reading);
            errno = EAGAIN;
            return -1;
        }
        atomic_store(&held, false);
    }
    ssize_t got = syscall(SYS_read, fd, buffer, length);
    int error = errno;
    if (got > 0)
        read_last = fd;
    const struct uffd_msg *messages = buffer;
    for (ssize_t i = 0; i < got / (ssize_t)sizeof(*messages); i++)
        if (hold_after != 0 && messages[i].event == hold_after) {
            hold_after = 0;
            atomic_store(&held, true);
        }
    pthread_mutex_unlock(&reading);
    errno = error;
    return got;
}

/* Runs once, before the next range is taken off a userfaultfd. */
static void (*before_unregister)(void *);
static void *before_unregister_argument;

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request == UFFDIO_UNREGISTER && before_unregister != NULL) {
        void (*first)(void *) = before_unregister;
        before_unregister = NULL;
        first(before_unregister_argument);
    }
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

static void find_userfaultfds(void)
{
    memset(is_uffd, 0, sizeof(is_uffd));
    for (int fd = 0; fd < 1024; fd++) {
        char path[32], target[64] = "";
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        is_uffd[fd] = readlink(path, target, sizeof(target) - 1) > 0 && strcmp(target, "anon_inode:[userfaultfd]") == 0;
    }
}

static void hold_from(int event)
{
    pthread_mutex_lock(&reading);
    hold_after = event;
    pthread_mutex_unlock(&reading);
}

static void hold_only(int fd)
{
    pthread_mutex_lock(&reading);
    held_only = fd;
    pthread_mutex_unlock(&reading);
    atomic_store(&held, true);
}

/* ---- The next slot at the same addresses ----------------------------------------------------------------------------- */

static unsigned char *map_at(unsigned char *at, size_t length)
{
    unsigned char *ram = mmap(at, length, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    must(ram == at, "the addresses are free: %s", strerror(errno));
    madvise(ram, length, MADV_NOHUGEPAGE);
    return ram;
}

/* The library waits for the events of the earlier mapping; on a busy machine not long enough. */
static void add_patiently(struct kuf *kuf, uint64_t gpa, void *ram, size_t length, int uffd)
{
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = gpa, .len = length,
                              .hva = (uintptr_t)ram, .uffd = uffd};
    int got;
    while ((got = kuf_add_memory(kuf, &slot)) == -EAGAIN)
        sched_yield();
    must(got == 0, "kuf_add_memory: %s", got ? kuf_error() : "adds");
}

struct change {
    unsigned char *from, *to;
    size_t length;
    pthread_t thread;
};

static void *change_body(void *argument)
{
    struct change *change = argument;
    if (change->to == NULL)
        must(munmap(change->from, change->length) == 0, "munmap");
    else
        must(mremap(change->from, change->length, change->length, MREMAP_MAYMOVE | MREMAP_FIXED, change->to) == change->to,
             "mremap");
    return NULL;
}

/*
 * Moves a slot away, or unmaps it, and adds another in its place while the last event of the change is still to come.
 */
static void followed(uint32_t userfaultfds, bool moves)
{
    const char *how = moves ? "moved" : "unmapped";
    size_t page = page_size(), length = moves ? (size_t)1 << 20 : WIDE;
    struct change change = {.from = map_across(length, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1), .length = length};
    must(change.from != MAP_FAILED, "a mapping");
    madvise(change.from, length, MADV_NOHUGEPAGE);
    if (moves)
        change.to = map_anonymous(length);
    struct kuf *kuf = watch(open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page, .userfaultfds = userfaultfds}));
    find_userfaultfds();
    add(kuf, BASE, change.from, length);
    ok(holds_content(change.from, BASE, page, 1), "%u, %s: the first slot is served", userfaultfds, how);
    hold_from(moves ? UFFD_EVENT_REMAP : UFFD_EVENT_UNMAP);
    change.thread = start(change_body, &change);
    wait_until(atomic_load(&held));
    unsigned char *ram = map_at(change.from, length);
    adding = true;
    add_patiently(kuf, OTHER, ram, length, -1);
    adding = false;
    atomic_store(&held, false);
    bool good = true;
    for (size_t at = 0; at < length; at += length / 32)
        good = holds_content(ram + at, OTHER + at, page, 1) && good;
    ok(good, "%u, %s: the second slot is served at the same addresses", userfaultfds, how);
    pthread_join(change.thread, NULL);
    is(progress_of(kuf, OTHER).removed, 0, "%u, %s: nothing of it is taken for removed", userfaultfds, how);
    is(progress_of(kuf, BASE).removed, moves ? 0 : length, "%u, %s: the first one is where it is", userfaultfds, how);
    if (moves)
        ok(holds_content(change.to, BASE, length, 1), "%u, %s: and served there", userfaultfds, how);
    ok(stats_of(kuf).faults_unknown < 100, "%u, %s: no thread faults for ever", userfaultfds, how);
    close_watched(kuf, KUF_END_POISON);
    memset(is_uffd, 0, sizeof(is_uffd));
    munmap(ram, length);
    if (moves)
        munmap(change.to, length);
}

/*
 * Unmaps a slot that another thread removes, and adds another in its place, before the event of that was read. All pages
 * are filled, so that the removal reads no events to poison any.
 */
static void removed_first(uint32_t userfaultfds, bool adopted)
{
    const char *whose = adopted ? "adopted" : "own";
    size_t page = page_size(), length = adopted ? 32 * page : 4 * STRIPE;
    struct change change = {.from = map_across(length, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1), .length = length};
    must(change.from != MAP_FAILED, "a mapping");
    madvise(change.from, length, MADV_NOHUGEPAGE);
    struct kuf *kuf = watch(open_with((struct kuf_options){
        .flags = adopted ? KUF_OPEN_ADOPT_ONLY : 0, .fill = source_fill, .event = source_event, .opaque = &source,
        .demand_run = length, .userfaultfds = adopted ? 0 : userfaultfds}));
    int uffd = adopted ? own_userfaultfd(UFFD_FEATURE_EVENT_UNMAP) : -1;
    add_patiently(kuf, BASE, change.from, length, uffd);
    find_userfaultfds();
    ok(holds_content(change.from, BASE, length, 1), "%u, %s: the first slot is filled", userfaultfds, whose);
    atomic_store(&held, true);
    change.thread = start(change_body, &change);
    unsigned char *ram;
    do
        ram = mmap(change.from, length, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    while (ram == MAP_FAILED);
    madvise(ram, length, MADV_NOHUGEPAGE);
    is(kuf_remove_memory(kuf, BASE, 0), 0, "%u, %s: the first slot is removed", userfaultfds, whose);
    adding = true;
    add_patiently(kuf, OTHER, ram, length, uffd);
    adding = false;
    atomic_store(&held, false);
    /* Its touch makes the library read the events in the kernel, if they are unread. */
    ok(holds_content(ram, OTHER, page, 1), "%u, %s: a page of the second slot is served", userfaultfds, whose);
    pthread_join(change.thread, NULL);
    ok(holds_content(ram, OTHER, length, 1), "%u, %s: all of it is", userfaultfds, whose);
    is(progress_of(kuf, OTHER).removed, 0, "%u, %s: nothing of it is taken for removed", userfaultfds, whose);
    close_watched(kuf, KUF_END_POISON);
    memset(is_uffd, 0, sizeof(is_uffd));
    if (adopted)
        close(uffd);
    munmap(ram, length);
}

static struct kuf *open_for(bool adopted, int *uffd, void *ram, size_t length)
{
    struct kuf *kuf = watch(open_with((struct kuf_options){.flags = adopted ? KUF_OPEN_ADOPT_ONLY : 0, .fill = source_fill,
                                                           .event = source_event, .opaque = &source,
                                                           .demand_run = page_size()}));
    if (adopted)
        *uffd = own_userfaultfd(UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMOVE);
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = length,
                              .hva = (uintptr_t)ram, .uffd = adopted ? *uffd : 0};
    must(kuf_add_memory(kuf, &slot) == 0, "kuf_add_memory: %s", kuf_error());
    return kuf;
}

/* The same without any help. */
static void raced(uint32_t userfaultfds)
{
    enum { ROUNDS = 20 };
    size_t page = page_size();
    int served = 0;
    for (int round = 0; round < ROUNDS; round++) {
        struct change change = {.from = map_across(WIDE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1), .length = WIDE};
        must(change.from != MAP_FAILED, "a mapping");
        struct kuf *kuf = watch(open_with((struct kuf_options){
            .fill = source_fill, .opaque = &source, .demand_run = page, .userfaultfds = userfaultfds}));
        add(kuf, BASE, change.from, WIDE);
        change.thread = start(change_body, &change);
        unsigned char *ram;
        do
            ram = mmap(change.from, WIDE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
        while (ram == MAP_FAILED);
        struct kuf_memory slot = {.size = sizeof(slot), .gpa = OTHER, .len = WIDE, .hva = (uintptr_t)ram};
        int got;
        while ((got = kuf_add_memory(kuf, &slot)) == -EEXIST || got == -EAGAIN)
            sched_yield();
        pthread_join(change.thread, NULL);
        if (got == 0 && holds_content(ram + STRIPE, OTHER + STRIPE, page, 1) && progress_of(kuf, OTHER).removed == 0)
            served++;
        close_watched(kuf, KUF_END_POISON);
        munmap(ram, WIDE);
    }
    is(served, ROUNDS, "%u: a slot that follows another at once is served", userfaultfds);
}

/* ---- Pages in no slot ------------------------------------------------------------------------------------------------- */

static void left_behind(bool adopted)
{
    const char *whose = adopted ? "adopted" : "own";
    size_t page = page_size(), length = 32 * page;
    unsigned char *ram = map_anonymous(length), *room = map_anonymous(length);
    int uffd = -1;
    struct kuf *kuf = open_for(adopted, &uffd, ram, length);
    ok(holds_content(ram, BASE, page, 1), "%s: a page is filled", whose);
    void *to = mremap(ram, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, room);
    if (to == MAP_FAILED) {
        skip_part("%s: MREMAP_DONTUNMAP: %s", whose, strerror(errno));
    } else {
        ok(holds_content(room, BASE, length, 1), "%s: after MREMAP_DONTUNMAP the slot is served where it is now", whose);
        ok(holds_zeroes(ram, length), "%s: the memory that it left behind is ordinary", whose);
        ok(stats_of(kuf).faults_unknown < 1000, "%s: and no thread faults for ever", whose);
        must(madvise(ram, length, MADV_DONTNEED) == 0, "it is empty");
        add_patiently(kuf, OTHER, ram, length, uffd);
        ok(holds_content(ram, OTHER, length, 1), "%s: it can be added again", whose);
    }
    close_watched(kuf, KUF_END_POISON);
    if (adopted)
        close(uffd);
    munmap(ram, length);
    munmap(room, length);
}

/* The pages that a slot has left behind move too. */
static void left_and_moved(bool adopted)
{
    const char *whose = adopted ? "adopted" : "own";
    size_t length = 8 * page_size();
    unsigned char *ram = map_anonymous(length), *room = map_anonymous(length), *last = map_anonymous(length);
    int uffd = -1;
    struct kuf *kuf = open_for(adopted, &uffd, ram, length);
    if (mremap(ram, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, room) == MAP_FAILED) {
        skip_part("%s: MREMAP_DONTUNMAP: %s", whose, strerror(errno));
    } else {
        must(mremap(ram, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, last) == last, "mremap: %s", strerror(errno));
        ok(holds_zeroes(last, length), "%s: what a slot has left behind is ordinary memory where it is moved to", whose);
        ok(holds_content(room, BASE, length, 1), "%s: and the slot is served", whose);
        munmap(room, length);
    }
    close_watched(kuf, KUF_END_POISON);
    if (adopted)
        close(uffd);
    munmap(last, length);
}

/*
 * When its last slot has gone, nothing reads the caller's userfaultfd any more, but the program that opened it keeps it
 * open.
 */
static void left_unread(bool removed)
{
    const char *when = removed ? "its last slot was removed" : "the handle was closed";
    size_t page = page_size(), length = 8 * page;
    unsigned char *ram = map_anonymous(length), *room = map_anonymous(length);
    int uffd = -1;
    struct kuf *kuf = open_for(true, &uffd, ram, length);
    void *to = mremap(ram, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, room);
    if (to == MAP_FAILED)
        skip_part("MREMAP_DONTUNMAP: %s", strerror(errno));
    if (removed)
        must(kuf_remove_memory(kuf, BASE, KUF_END_POISON) == 0, "kuf_remove_memory: %s", kuf_error());
    else
        close_watched(kuf, KUF_END_POISON);
    if (to != MAP_FAILED)
        ok(holds_zeroes(ram, length), "what MREMAP_DONTUNMAP left behind is ordinary memory when %s", when);
    if (removed)
        close_watched(kuf, 0);
    close(uffd);
    munmap(ram, length);
    munmap(room, length);
}

/* ---- Memory that moves while its slot ends ---------------------------------------------------------------------------- */

struct moving {
    unsigned char *from, *to;
    size_t length;
    int flags, error;
    void *got;
    atomic_int tid;
    pthread_t thread;
};

static void *moving_body(void *argument)
{
    struct moving *moving = argument;
    atomic_store(&moving->tid, (int)syscall(SYS_gettid));
    if (moving->to == NULL)
        must(munmap(moving->from, moving->length) == 0, "munmap: %s", strerror(errno));
    else
    moving->got = mremap(moving->from, moving->length, moving->length, MREMAP_MAYMOVE | MREMAP_FIXED | moving->flags, moving->to);
    moving->error = errno;
    return NULL;
}

/* Moves or unmaps memory. The memory has left its place when this returns; the thread waits until its event is read. */
static void start_moving(struct moving *moving)
{
    moving->thread = start(moving_body, moving);
    wait_until(waits_in(atomic_load(&moving->tid), "userfaultfd_event"));
}

static void end_moving(struct moving *moving)
{
    pthread_join(moving->thread, NULL);
    must(moving->got == moving->to, "mremap: %s", strerror(moving->error));
}

struct moves {
    int count;
    struct moving each[2];
};

static void move_all(void *argument)
{
    struct moves *moves = argument;
    for (int i = 0; i < moves->count; i++)
        start_moving(&moves->each[i]);
}

enum end { REMOVED, REMOVED_LAST, CLOSED };

/*
 * Ends a slot of an adopted userfaultfd whose memory is moved, `count` times, just before the library unregisters the
 * addresses that it knows. Where the memory is now it is ordinary memory, and it stays so wherever it moves.
 */
static void moved_at_the_end(enum end end, int count)
{
    static const char *const ends[] = {"removed", "removed as the last one", "closed"};
    const char *how = ends[end];
    size_t page = page_size(), length = 8 * page, half = length / 2;
    unsigned char *ram = map_anonymous(length), *other = map_anonymous(length), *at = ram;
    struct moves moves = {.count = count};
    for (int i = 0; i < count; i++) {
        moves.each[i] = (struct moving){.from = at, .to = map_anonymous(length), .length = length};
        at = moves.each[i].to;
    }
    int uffd = -1;
    struct kuf *kuf = open_for(true, &uffd, ram, length);
    if (end == REMOVED)
        add_patiently(kuf, OTHER, other, length, uffd);
    ok(holds_content(ram, BASE, length, 1), "%s, moved %d: the slot is filled", how, count);
    must(madvise(ram + half, half, MADV_DONTNEED) == 0, "madvise: %s", strerror(errno));
    wait_until(progress_of(kuf, BASE).removed == half);
    before_unregister_argument = &moves;
    before_unregister = move_all;
    if (end == CLOSED)
        close_watched(kuf, 0);
    else
        is(kuf_remove_memory(kuf, BASE, 0), 0, "%s, moved %d: the slot is removed", how, count);
    for (int i = 0; i < count; i++)
        end_moving(&moves.each[i]);
    ok(holds_content(at, BASE, half, 1), "%s, moved %d: what was filled is where it went to", how, count);
    ok(holds_zeroes(at + half, half), "%s, moved %d: and what was given back is zero", how, count);
    must(madvise(at, length, MADV_DONTNEED) == 0, "madvise: %s", strerror(errno));
    unsigned char *later = map_anonymous(length);
    if (mremap(at, length, length, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, later) == MAP_FAILED)
        skip_part("MREMAP_DONTUNMAP: %s", strerror(errno));
    ok(holds_zeroes(later, length), "%s, moved %d: it is ordinary memory where it is moved to later", how, count);
    ok(holds_zeroes(at, length), "%s, moved %d: so is what it leaves behind", how, count);
    if (end == REMOVED) {
        must(madvise(at, length, MADV_DONTNEED) == 0, "it is empty");
        add_patiently(kuf, BASE, at, length, uffd);
        ok(holds_content(at, BASE, length, 1), "%s, moved %d: it can be added again", how, count);
    }
    if (end != CLOSED)
        close_watched(kuf, KUF_END_POISON);
    close(uffd);
    munmap(at, length);
    munmap(other, length);
    munmap(later, length);
}

static void extended(void)
{
    size_t page = page_size(), length = 32 * page;
    unsigned char *room = mmap(NULL, 2 * length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    must(room != MAP_FAILED, "a mapping with room behind it");
    madvise(room, length, MADV_NOHUGEPAGE);
    int uffd = -1;
    struct kuf *kuf = open_for(false, &uffd, room, length);
    /* At the last moment: a mapping of any thread may take the room. */
    must(munmap(room + length, length) == 0, "the room is free");
    must(mremap(room, length, 2 * length, 0) == room, "the mapping is extended");
    ok(holds_zeroes(room + length, length), "the extension of a mapping is ordinary memory");
    ok(holds_content(room, BASE, length, 1), "and the slot in front of it is served");
    ok(stats_of(kuf).faults_unknown < 1000, "no thread faults for ever");
    close_watched(kuf, 0);
    munmap(room, 2 * length);
}

/* ---- Memory that moves to where other memory was ---------------------------------------------------------------------- */

/* A slot moves to where another has just moved away from, before the UNMAP event of that. */
static void moved_into_the_gap(bool adopted)
{
    const char *whose = adopted ? "adopted" : "own";
    size_t page = page_size(), length = 8 * page;
    unsigned char *ram = map_anonymous(length), *other = map_anonymous(length);
    struct moving first = {.from = ram, .to = map_anonymous(length), .length = length};
    struct moving second = {.from = other, .to = ram, .length = length};
    int uffd = -1;
    struct kuf *kuf = open_for(adopted, &uffd, ram, length);
    add_patiently(kuf, OTHER, other, length, uffd);
    find_userfaultfds();
    atomic_store(&held, true);
    start_moving(&first);
    start_moving(&second);
    atomic_store(&held, false);
    end_moving(&first);
    end_moving(&second);
    is(progress_of(kuf, OTHER).removed, 0, "%s: nothing of a slot that takes the place of another is taken for removed", whose);
    ok(holds_content(ram, OTHER, length, 1), "%s: it is served there", whose);
    ok(holds_content(first.to, BASE, length, 1), "%s: and the other where it is now", whose);
    must(munmap(ram, length) == 0, "munmap: %s", strerror(errno));
    wait_until(progress_of(kuf, OTHER).removed == length);
    is(progress_of(kuf, BASE).removed, 0, "%s: a later munmap is that of the slot which is there", whose);
    close_watched(kuf, KUF_END_POISON);
    memset(is_uffd, 0, sizeof(is_uffd));
    if (adopted)
        close(uffd);
    munmap(first.to, length);
}

/* `length` bytes from a border of stripes on, in a mapping at *room that is a stripe longer. */
static unsigned char *map_stripes(size_t length, unsigned char **room)
{
    *room = mmap(NULL, length + STRIPE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    must(*room != MAP_FAILED, "%zu bytes", length);
    madvise(*room, length + STRIPE, MADV_NOHUGEPAGE);
    return *room + (STRIPE - (uintptr_t)*room % STRIPE) % STRIPE;
}

/* Other memory may be mapped by now where the mapping has a hole. */
static void unmap_around(unsigned char *room, size_t length, unsigned char *hole, unsigned char *end)
{
    munmap(room, (size_t)(hole - room));
    munmap(end, (size_t)(room + length - end));
}

/* The library's userfaultfd of the page, which has not been touched. */
static int userfaultfd_of(unsigned char *at, uint64_t gpa)
{
    must(holds_content(at, gpa, page_size(), 1), "a page is filled");
    pthread_mutex_lock(&reading);
    int fd = read_last;
    pthread_mutex_unlock(&reading);
    return fd;
}

static struct kuf *open_two(unsigned char *ram, size_t length, unsigned char *other, size_t other_length)
{
    struct kuf *kuf = watch(open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page_size(), .userfaultfds = 2}));
    add_patiently(kuf, BASE, ram, length, -1);
    add_patiently(kuf, OTHER, other, other_length, -1);
    find_userfaultfds();
    return kuf;
}

/*
 * A slot moves to the place of another. All events of that one are read after those of the slot: they come by another
 * queue.
 */
static void moved_before(bool moves)
{
    const char *how = moves ? "moved" : "unmapped";
    size_t page = page_size(), length = 8 * page;
    unsigned char *room, *ram = map_stripes(2 * STRIPE, &room), *other = ram + STRIPE;
    struct moving first = {.from = ram, .to = moves ? map_anonymous(length) : NULL, .length = length};
    struct moving second = {.from = other, .to = ram, .length = length};
    struct kuf *kuf = open_two(ram, length, other, length);
    hold_only(userfaultfd_of(ram, BASE));
    start_moving(&first);
    /* On this thread, for the stack of a new one might be mapped into the hole. */
    moving_body(&second);
    must(second.got == ram, "mremap: %s", strerror(second.error));
    ok(holds_content(ram, OTHER, length / 2, 1), "%s: the slot that takes another's place is served there at once", how);
    atomic_store(&held, false);
    end_moving(&first);
    ok(holds_content(ram, OTHER, length, 1), "%s: it is when the events of the other were read", how);
    is(progress_of(kuf, OTHER).removed, 0, "%s: nothing of it is taken for removed", how);
    is(progress_of(kuf, BASE).removed, moves ? 0 : length, "%s: and of the other only if it was unmapped", how);
    if (moves)
        ok(holds_content(first.to, BASE, length, 1), "%s: the other is served where it is now", how);
    close_watched(kuf, KUF_END_POISON);
    memset(is_uffd, 0, sizeof(is_uffd));
    held_only = -1;
    unmap_around(room, 3 * STRIPE, other, other + length);
    if (moves)
        munmap(first.to, length);
}

/*
 * A slot moves to where another was, and goes on from there, or is unmapped there, before the event of the other was read:
 * that comes by another queue.
 */
static void moved_through(bool moves_on)
{
    const char *how = moves_on ? "moved on" : "unmapped there";
    size_t page = page_size(), length = 8 * page;
    unsigned char *room, *ram = map_stripes(2 * STRIPE, &room), *other = ram + STRIPE, *last = map_anonymous(length);
    struct moving first = {.from = ram, .to = map_anonymous(length), .length = length};
    struct moving second = {.from = other, .to = ram, .length = length};
    struct moving third = {.from = ram, .to = moves_on ? last : NULL, .length = length};
    struct kuf *kuf = open_two(ram, length, other, length);
    hold_only(userfaultfd_of(ram, BASE));
    start_moving(&first);
    /* On this thread, for a new one's stack might be put into the hole. */
    moving_body(&second);
    must(second.got == ram, "mremap: %s", strerror(second.error));
    ok(holds_content(ram, OTHER, page, 1), "%s: a slot that takes another's place is served there at once", how);
    moving_body(&third);
    must(third.got == third.to, "mremap: %s", strerror(third.error));
    if (moves_on)
        ok(holds_content(last, OTHER, length / 2, 1), "%s: and where it goes from there", how);
    atomic_store(&held, false);
    end_moving(&first);
    is(progress_of(kuf, BASE).removed, 0, "%s: nothing of the other is taken for removed", how);
    ok(holds_content(first.to, BASE, length, 1), "%s: it is served where it is now", how);
    is(progress_of(kuf, OTHER).removed, moves_on ? 0 : length, "%s: the first is removed only if it was unmapped", how);
    if (moves_on)
        ok(holds_content(last, OTHER, length, 1), "%s: it is served to its end", how);
    close_watched(kuf, KUF_END_POISON);
    memset(is_uffd, 0, sizeof(is_uffd));
    held_only = -1;
    unmap_around(room, 3 * STRIPE, ram, ram + length);
    munmap(last, length);
    munmap(first.to, length);
}

/*
 * A slot moves to the place of another that was unmapped and that two userfaultfds had shared, before the second event
 * of that.
 */
static void moved_to_unmapped(void)
{
    size_t page = page_size(), length = 8 * page, wide = 2 * STRIPE;
    unsigned char *room, *ram = map_stripes(3 * STRIPE, &room), *other = ram + wide;
    struct moving first = {.from = ram, .length = wide}, second = {.from = other, .to = ram, .length = length};
    struct kuf *kuf = open_two(ram, wide, other, length);
    hold_only(userfaultfd_of(ram + STRIPE, BASE + STRIPE));
    first.thread = start(moving_body, &first);
    wait_until(progress_of(kuf, BASE).removed == wide);
    /* On this thread, for the stack of a new one might be mapped into the hole. */
    moving_body(&second);
    must(second.got == ram, "mremap: %s", strerror(second.error));
    atomic_store(&held, false);
    end_moving(&first);
    is(progress_of(kuf, OTHER).removed, 0, "the second UNMAP of a munmap is not of the slot that has moved there");
    ok(holds_content(ram, OTHER, length, 1), "it is served there");
    close_watched(kuf, KUF_END_POISON);
    memset(is_uffd, 0, sizeof(is_uffd));
    held_only = -1;
    unmap_around(room, 4 * STRIPE, ram + length, other + length);
}

int main(void)
{
    begin_watched(60);
    catch_touches();
    followed(2, false);
    followed(4, false);
    followed(1, true);
    removed_first(1, false);
    removed_first(2, false);
    removed_first(1, true);
    raced(1);
    raced(2);
    left_behind(false);
    left_behind(true);
    left_and_moved(false);
    left_and_moved(true);
    left_unread(true);
    left_unread(false);
    extended();
    for (int count = 1; count <= 2; count++)
        for (enum end end = REMOVED; end <= CLOSED; end++)
            moved_at_the_end(end, count);
    moved_into_the_gap(false);
    moved_into_the_gap(true);
    moved_before(true);
    moved_before(false);
    moved_through(true);
    moved_through(false);
    moved_to_unmapped();
    return done();
}
