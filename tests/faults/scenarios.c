/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The scenarios: each use of the library. Any call may fail, and any page may be poisoned with an event. No page may
 * hold wrong bytes, and no thread may wait for ever.
 *
 * A scenario repeats a call that fails. If the fault occurs only once, the repetition must succeed, or a KUF_EVENT_FATAL
 * must precede it. At the end no more faults occur, and kuf_close with KUF_END_POISON must succeed.
 */
#include "guest.h"

#include <sys/prctl.h>

/* ---- Calls --------------------------------------------------------------------------------------------------------- */

static void ask_everything(struct region *region)
{
    struct kuf_progress_info progress_of_all = {.size = sizeof(progress_of_all)};
    static struct kuf_stats_info stats = {.size = sizeof(stats)};
    struct kuf_settings_info settings = {.size = sizeof(settings)};
    struct kuf_fault owed[4];
    struct kuf_block_time times[4];
    uint32_t thread = (uint32_t)syscall(SYS_gettid);
    TRY(kuf_progress(kuf, KUF_ALL, &progress_of_all));
    TRY(kuf_stats(kuf, &stats));
    TRY(kuf_settings(kuf, KUF_ALL, &settings));
    TRY(kuf_pending(kuf, owed, 4));
    TRY(kuf_watch_threads(kuf, &thread, 1));
    TRY(kuf_block_times(kuf, times, 4));
    if (atomic_load(&region->served))
        TRY(kuf_kvm_owned(kuf, region->gpa, page_size()));
}

static void populate(uint64_t gpa, uint64_t length)
{
    int before = atomic_load(&events[KUF_EVENT_POPULATED]);
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = gpa, .len = length};
    if (!stopped() && TRY(kuf_populate(kuf, &request)) == 0 &&
        !comes(atomic_load(&events[KUF_EVENT_POPULATED]) > before || stopped()))
        end_with(SILENT, "kuf_populate: no event reports its end");
}

static void ensure(struct region *region)
{
    if (atomic_load(&region->served) && !stopped() &&
        TRY(kuf_ensure(kuf, region->gpa, length_of(region), 10000)) == 0)
        look_at_all(region);
}

static void remove_region(struct region *region, uint32_t flags)
{
    if (!atomic_load(&region->served) || stopped())
        return;
    if (flags & KUF_END_POISON)
        atomic_store(&region->ended, true);
    if (TRY(kuf_remove_memory(kuf, region->gpa, flags)) == 0) {
        look_at_all(region);
        atomic_store(&region->served, false);
    }
}

/* ---- Serviced ------------------------------------------------------------------------------------------------------ */

static void use(struct region *first, struct region *second)
{
    if (!touch_region(first))
        return;
    ask_everything(first);
    drop(first, 3, 4, KUF_DISCARD_REFILL);
    drop(first, 10, 4, KUF_DISCARD_ZERO);
    if (!touch_region(first))
        return;
    if (atomic_load(&second->served))
        populate(second->gpa, length_of(second) / 2);
    ensure(second);
    remove_region(second, KUF_END_POISON);
}

static void serviced(bool is_shared, uint32_t flags, uint32_t close_flags)
{
    if (!open_handle((struct kuf_options){.fill = on_fill, .flags = flags, .demand_run = 8 * page_size()}))
        return;
    struct region *first = new_region(0, is_shared), *second = new_region(1, is_shared);
    add_region(first, (struct kuf_memory){0});
    add_region(second, (struct kuf_memory){0});
    use(first, second);
    if (!stopped()) {
        struct region *third = new_region(2, is_shared);
        add_region(third, (struct kuf_memory){0});
        if (atomic_load(&third->served))
            TRY(kuf_ensure(kuf, third->gpa + page_size(), page_size(), 10000));
    }
    close_handle(close_flags);
}

static void anonymous(void)
{
    serviced(false, 0, KUF_END_POISON);
}

static void in_place(void)
{
    serviced(true, 0, KUF_END_POPULATE);
}

static void zeroes(void)
{
    serviced(true, KUF_OPEN_DETECT_ZERO, KUF_END_POPULATE | KUF_END_POISON);
}

static void nowait(void)
{
    serviced(false, KUF_OPEN_DETECT_ZERO, KUF_END_POISON | KUF_END_NOWAIT);
}

/* ---- Sources ------------------------------------------------------------------------------------------------------- */

/* Writes a region's image to a file, with a hole in it. */
static int image_of(struct region *region)
{
    int fd = memfd_create("image", MFD_CLOEXEC);
    must(fd >= 0 && ftruncate(fd, (off_t)length_of(region)) == 0, "an image");
    set_pages(region, 8, 4, IS_ZERO);
    for (int page = 0; page < region->pages; page++) {
        char bytes[4096];
        if (page >= 8 && page < 12)
            continue;
        write_content(bytes, region->gpa + (uint64_t)page * page_size(), page_size(), 1);
        must(pwrite(fd, bytes, page_size(), (off_t)((size_t)page * page_size())) > 0, "a page of the image");
    }
    return fd;
}

static void sources_in(bool is_shared, uint32_t flags)
{
    if (!open_handle((struct kuf_options){.flags = KUF_OPEN_SOURCES | flags, .demand_run = 8 * page_size()}))
        return;
    static char bytes[PAGES * 4096];
    struct region *first = new_region(0, is_shared), *second = new_region(1, is_shared), *third = new_region(2, false);
    int image = image_of(first);
    write_content(bytes, second->gpa, length_of(second), 1);
    set_pages(third, 0, third->pages, IS_ZERO);
    struct kuf_source file = {.size = sizeof(file), .kind = KUF_SOURCE_FILE, .fd = image};
    struct kuf_source memory = {.size = sizeof(memory), .kind = KUF_SOURCE_MEMORY, .addr = bytes, .len = sizeof(bytes)};
    struct kuf_source zero = {.size = sizeof(zero), .kind = KUF_SOURCE_ZERO};
    add_region(first, (struct kuf_memory){.source = &file});
    add_region(second, (struct kuf_memory){.source = &memory});
    add_region(third, (struct kuf_memory){.source = &zero});
    if (touch_region(first) && touch_region(second))
        touch_region(third);
    populate(KUF_ALL, 0);
    close_handle(KUF_END_POISON);
    close(image);
}

static void sources(void)
{
    sources_in(false, 0);
}

static void sources_in_place(void)
{
    sources_in(true, KUF_OPEN_DETECT_ZERO);
}

/* ---- Pages that the caller resolves ---------------------------------------------------------------------------------- */

static void resolve_owed(uint64_t gpa, uint64_t length)
{
    char *bytes = malloc(length);
    fill_content(bytes, gpa, length);
    if (TRY(kuf_resolve(kuf, gpa, bytes, length, 0)) < 0 && TRY(kuf_resolve(kuf, gpa, NULL, length, KUF_RESOLVE_POISON)) < 0)
        atomic_store(&gave_up, true);
    free(bytes);
    progress();
}

static atomic_bool driver_ends;

/* Serves faults until the handle is closed or a call fails for good. */
static void *drive(void *unused)
{
    (void)unused;
    mark_place(false, "driving");
    struct kuf_fault faults[4];
    for (int errors = 0; !atomic_load(&driver_ends) && errors < 20;) {
        long got = LIB(kuf_poll(kuf, 20));
        if (got > 0)
            got = LIB(kuf_read(kuf, faults, 4));
        for (long i = 0; i < got; i++)
            resolve_owed(faults[i].gpa, faults[i].len);
        if (got < 0 && got != -EAGAIN) {
            failed("kuf_poll, kuf_read", got, 3);
            errors++;
            nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        } else {
            errors = 0;
        }
    }
    atomic_store(&gave_up, true);
    return NULL;
}

static void driven_with(uint32_t flags, bool is_shared)
{
    if (!open_handle((struct kuf_options){.flags = flags}))
        return;
    TRY(kuf_fd(kuf));
    pthread_t driver = start(drive, NULL);
    struct region *first = new_region(0, is_shared), *second = new_region(1, false);
    add_region(first, (struct kuf_memory){0});
    add_region(second, (struct kuf_memory){0});
    if (touch_region(first)) {
        drop(first, 3, 4, KUF_DISCARD_REFILL);
        touch_region(first);
        ensure(second);
    }
    atomic_store(&driver_ends, true);
    pthread_join(driver, NULL);
    close_handle(KUF_END_POISON);
}

static void driven(void)
{
    driven_with(0, true);
}

static void direct(void)
{
    driven_with(KUF_OPEN_DIRECT, false);
}

/* Runs that the fill callback has deferred. */
static struct {
    pthread_mutex_t lock;
    uint64_t gpa[256], length[256];
    int count, done;
} put_off = {.lock = PTHREAD_MUTEX_INITIALIZER};

static int on_fill_later(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    struct place before = mark_place(false, "fill callback");
    pthread_mutex_lock(&put_off.lock);
    bool room = put_off.count < 256;
    if (room) {
        put_off.gpa[put_off.count] = fill->gpa;
        put_off.length[put_off.count++] = fill->len;
    }
    pthread_mutex_unlock(&put_off.lock);
    mark_back(before);
    return room ? KUF_FILL_DEFERRED : -ENOBUFS;
}

static void *resolve_later(void *unused)
{
    (void)unused;
    mark_place(false, "resolving deferred runs");
    while (!atomic_load(&driver_ends)) {
        pthread_mutex_lock(&put_off.lock);
        bool more = put_off.done < put_off.count;
        int next = put_off.done;
        put_off.done += more;
        pthread_mutex_unlock(&put_off.lock);
        if (more)
            resolve_owed(put_off.gpa[next], put_off.length[next]);
        else
            nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
    }
    return NULL;
}

static void deferred(void)
{
    if (!open_handle((struct kuf_options){.fill = on_fill_later, .demand_run = 4 * page_size()}))
        return;
    pthread_t resolver = start(resolve_later, NULL);
    struct region *first = new_region(0, true), *second = new_region(1, false);
    add_region(first, (struct kuf_memory){0});
    add_region(second, (struct kuf_memory){0});
    if (touch_region(first) && touch_region(second)) {
        drop(second, 0, 6, KUF_DISCARD_REFILL);
        touch_region(second);
    }
    atomic_store(&driver_ends, true);
    pthread_join(resolver, NULL);
    close_handle(KUF_END_POISON);
}

static void resolve_some(struct region *region)
{
    static char bytes[4 * 4096];
    uint64_t page = page_size();
    if (!atomic_load(&region->served) || stopped())
        return;
    fill_content(bytes, region->gpa, sizeof(bytes));
    TRY(kuf_resolve(kuf, region->gpa, bytes, 4 * page, 0));
    set_pages(region, 4, 2, MAY_BE_ZERO);
    TRY(kuf_resolve(kuf, region->gpa + 4 * page, NULL, 2 * page, KUF_RESOLVE_ZERO));
    if (region->fd < 0) {
        TRY(kuf_resolve(kuf, region->gpa, NULL, length_of(region), KUF_RESOLVE_PRESENT));
        return;
    }
    fill_content(bytes, region->gpa + 8 * page, page);
    must(pwrite(region->fd, bytes, page, (off_t)(8 * page)) > 0, "a page of the file");
    TRY(kuf_resolve(kuf, region->gpa + 8 * page, NULL, page, KUF_RESOLVE_IN_PLACE));
}

/* The caller resolves pages that no fault has requested. */
static void resolved(void)
{
    struct kuf_probe_info probe = {.size = sizeof(probe)};
    TRY(kuf_probe(-1, &probe));
    if (!open_handle((struct kuf_options){.fill = on_fill}))
        return;
    struct region *first = new_region(0, true), *second = new_region(1, false), *third = new_region(2, false);
    add_region(first, (struct kuf_memory){0});
    add_region(second, (struct kuf_memory){0});
    if (add_region(third, (struct kuf_memory){0})) {
        atomic_store(&third->ended, true);
        TRY(kuf_resolve(kuf, third->gpa, NULL, 2 * page_size(), KUF_RESOLVE_POISON));
        atomic_store(&third->ended, false);
        drop(third, 0, 1, KUF_DISCARD_REFILL);
        /* kuf_vcpu_fault waits for the page, as a vCPU does, so skip it if the queue cannot be read. */
        if (!stopped())
            TRY(kuf_vcpu_fault(kuf, third->gpa + 4 * page_size(), 8, 1 << 4));
    }
    resolve_some(first);
    resolve_some(second);
    if (touch_region(first))
        touch_region(second);
    close_handle(KUF_END_POISON);
}

/* ---- A working set ------------------------------------------------------------------------------------------------- */

static void replay(struct region *region, int fd)
{
    int before = atomic_load(&events[KUF_EVENT_REPLAYED]);
    long got = -1;
    for (int tries = 0; !stopped() && (tries == 0 || failed("kuf_replay", got, tries)); tries++) {
        /* A failed call may have read a part of the file. */
        must(lseek(fd, 0, SEEK_SET) == 0, "to the beginning of the recording");
        got = LIB(kuf_replay(kuf, fd, 0));
    }
    if (got == 0 &&
        !comes(atomic_load(&events[KUF_EVENT_REPLAYED]) > before || stopped()))
        end_with(SILENT, "kuf_replay: no event reports its end");
    touch_region(region);
}

static void record(void)
{
    if (!open_handle((struct kuf_options){.fill = on_fill, .demand_run = page_size()}))
        return;
    struct region *region = new_region(0, false);
    int fd = memfd_create("recording", MFD_CLOEXEC);
    add_region(region, (struct kuf_memory){0});
    bool records = TRY(kuf_record_start(kuf, 0)) == 0;
    if (touch_region(region) && records) {
        /* A failed call may have written a part of the file. */
        long got = LIB(kuf_record_stop(kuf, fd));
        for (int tries = 0; failed("kuf_record_stop", got, ++tries);) {
            must(ftruncate(fd, 0) == 0 && lseek(fd, 0, SEEK_SET) == 0, "the recording is begun anew");
            got = LIB(kuf_record_stop(kuf, fd));
        }
        drop(region, 0, region->pages, KUF_DISCARD_REFILL);
        if (got == 0)
            replay(region, fd);
    }
    close_handle(KUF_END_POISON);
    close(fd);
}

/* ---- Guest memory that changes ------------------------------------------------------------------------------------- */

static void *give_back(void *argument)
{
    struct region *region = argument;
    mark_place(false, "madvise of the guest");
    set_pages(region, 2, 4, MAY_BE_ZERO);
    if (madvise(region->memory + 2 * page_size(), 4 * page_size(), MADV_DONTNEED) == 0 && !stopped())
        set_pages(region, 2, 4, region->fd < 0 ? IS_ZERO : MAY_BE_ZERO);
    atomic_store(&guest->touchers[0].finished, true);
    return NULL;
}

static void *move(void *argument)
{
    struct region *region = argument;
    mark_place(false, "mremap of the guest");
    size_t length = length_of(region);
    void *to = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    void *now = mremap(region->memory, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    if (now != MAP_FAILED)
        region->memory = now;
    else
        munmap(to, length);
    atomic_store(&guest->touchers[0].finished, true);
    return NULL;
}

static void *cut(void *argument)
{
    struct region *region = argument;
    mark_place(false, "munmap of the guest");
    region->pages /= 2;
    munmap(region->memory + length_of(region), length_of(region));
    atomic_store(&guest->touchers[0].finished, true);
    return NULL;
}

static void change(struct region *first, struct region *second, struct region *third)
{
    if (atomic_load(&first->served) && (!by_itself(give_back, first) || !touch_region(first)))
        return;
    if (atomic_load(&second->served) && (!by_itself(move, second) || !touch_region(second)))
        return;
    if (atomic_load(&third->served) && by_itself(cut, third))
        touch_region(third);
}

static void changed(void)
{
    if (!open_handle((struct kuf_options){.fill = on_fill, .demand_run = page_size(), .userfaultfds = 1}))
        return;
    struct region *first = new_region(0, false), *second = new_region(1, false), *third = new_region(2, false);
    add_region(first, (struct kuf_memory){0});
    add_region(second, (struct kuf_memory){0});
    add_region(third, (struct kuf_memory){0});
    change(first, second, third);
    close_handle(KUF_END_POISON);
}

/* ---- Forks --------------------------------------------------------------------------------------------------------- */

static int look_in_child(struct region *region)
{
    mark_anew();
    mark_place(false, "touching in a forked child");
    bool all = true;
    for (int page = 0; page < region->pages; page++) {
        const unsigned char *at = region->memory + (size_t)page * page_size();
        if (try_touch(at) != 0)
            continue;
        if (!holds_content(at, region->gpa + (uint64_t)page * page_size(), page_size(), 1))
            all = false;
        progress();
    }
    return all ? 0 : 1;
}

static bool fork_ended(pid_t child, int *status)
{
    return waitpid(child, status, WNOHANG) == child;
}

static atomic_bool fork_returned;

/* Forks on its own thread, because fork waits until the library has read the event. */
static void *fork_and_look(void *argument)
{
    struct region *region = argument;
    mark_place(false, "fork of the VMM");
    int status = -1;
    fflush(stdout);
    /* The fork handlers that the library has registered are its own code. */
    pid_t child = LIB(fork());
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        _exit(look_in_child(region));
    }
    fork_returned = true;
    if (child > 0 && !comes(fork_ended(child, &status) || stopped()))
        end_with(SILENT, "a forked child waits for a page, and no event reported why");
    bool ended = child > 0 && (status != -1 || fork_ended(child, &status));
    if (child > 0 && !ended)
        kill(child, SIGKILL);
    if (ended && WIFEXITED(status) && WEXITSTATUS(status) == 1 &&
        !comes(stopped() || (atomic_load(&events[KUF_EVENT_FORKED]) > 0 && atomic_load(&last_error[KUF_EVENT_FORKED]) != 0)))
        end_with(WRONG_BYTES, "a forked child reads wrong bytes, and no event reported that it is not served");
    atomic_store(&guest->touchers[0].finished, true);
    return NULL;
}

static void forks(void)
{
    if (!open_handle((struct kuf_options){.fill = on_fill, .demand_run = page_size(), .flags = KUF_OPEN_FOLLOW_FORK}))
        return;
    struct region *region = new_region(0, false);
    if (add_region(region, (struct kuf_memory){0}) && by_itself(fork_and_look, region))
        touch_region(region);
    /*
     * If reads of the userfaultfd start to fail during a fork(2), that call does not return and keeps malloc locked. The
     * library can only report this: if it closed the userfaultfd, the child would read zeroes.
     */
    if (atomic_load(&region->served) && stopped() && !comes(fork_returned))
        end_run_stopped();
    close_handle(KUF_END_POISON);
}

/* ---- Huge pages ---------------------------------------------------------------------------------------------------- */

static void huge(void)
{
    enum { STRETCH = 512 };
    size_t length = 2 * STRETCH * page_size();
    if (!open_handle((struct kuf_options){.fill = on_fill}))
        return;
    char *room = mmap(NULL, 2 * length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    must(room != MAP_FAILED, "room");
    char *at = (char *)(((uintptr_t)room + length / 2 - 1) / (length / 2) * (length / 2));
    struct region *region = new_region_of(0, (unsigned char *)at, -1, 2 * STRETCH);
    add_region(region, (struct kuf_memory){.flags = KUF_MEMORY_HUGE});
    if (atomic_load(&region->served)) {
        populate(region->gpa, length / 2);
        if (!stopped())
            TRY(kuf_ensure(kuf, region->gpa + length / 2, length / 2, 10000));
        touch_region(region);
    }
    close_handle(KUF_END_POISON);
    region->memory = NULL;
    munmap(room, 2 * length);
}

/* ---- Memory of another process ------------------------------------------------------------------------------------- */

static pid_t vmm;
static int vmm_uffd = -1;

static void do_command(struct region *region)
{
    switch (atomic_load(&guest->command)) {
    case 'd':
        give_back(region);
        break;
    case 't':
        touch_here(region);
        for (int i = 0; i < TOUCHERS; i++)
            pthread_join(guest->touchers[i].thread, NULL);
        break;
    default:
        _exit(0);
    }
}

/* The VMM: opens a userfaultfd, reports its number, and executes commands. It must keep its descriptor. */
static _Noreturn void be_the_vmm(bool is_shared, int to)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    mark_anew();
    mark_place(false, "the VMM");
    for (int r = 0; r < 2; r++) {
        struct region *region = &guest->regions[r];
        int flags = is_shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
        region->memory = mmap(NULL, length_of(region), PROT_READ | PROT_WRITE, flags, is_shared ? region->fd : -1, 0);
    }
    int uffd = open_uffd();
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0)
        uffd = -1;
    (void)!write(to, &uffd, sizeof(uffd));
    for (;;) {
        while (atomic_load(&guest->answered) == atomic_load(&guest->asked))
            nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
        do_command(&guest->regions[atomic_load(&guest->region)]);
        atomic_fetch_add(&guest->answered, 1);
    }
}

static void start_vmm(bool is_shared)
{
    int ends[2], uffd = -1;
    for (int r = 0; r < 2; r++) {
        int fd = is_shared ? memfd_create("guest", MFD_CLOEXEC) : -1;
        struct region *region = new_region_of(r, NULL, fd, PAGES);
        must(fd < 0 || ftruncate(fd, (off_t)length_of(region)) == 0, "the guest's file");
    }
    must(pipe(ends) == 0, "a pipe");
    vmm = fork();
    if (vmm == 0)
        be_the_vmm(is_shared, ends[1]);
    must(read(ends[0], &uffd, sizeof(uffd)) == sizeof(uffd), "the VMM says which");
    close(ends[0]);
    close(ends[1]);
    int pidfd = (int)syscall(SYS_pidfd_open, vmm, 0);
    vmm_uffd = uffd < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, pidfd, uffd, 0);
    must(vmm_uffd >= 0, "the VMM's userfaultfd");
    close(pidfd);
    is_remote = true;
}

static void end_vmm(void)
{
    close(vmm_uffd);
    if (left_closed())
        kill(vmm, SIGKILL);
    ask('q', &guest->regions[0]);
    waitpid(vmm, NULL, 0);
    atomic_store(&guest->answered, atomic_load(&guest->asked));
}

static void adopt(bool is_shared, uint32_t memory_flags)
{
    struct region *first = &guest->regions[0], *second = &guest->regions[1];
    struct kuf_memory memory = {.flags = KUF_MEMORY_REMOTE | memory_flags, .uffd = vmm_uffd};
    add_region(first, memory);
    add_region(second, memory);
    if (!touch_region(first))
        return;
    ask_everything(first);
    if (atomic_load(&first->served) && !is_shared && (!by_itself_there('d', first) || !touch_region(first)))
        return;
    if (is_shared)
        drop(first, 3, 4, KUF_DISCARD_REFILL);
    if (atomic_load(&second->served))
        populate(second->gpa, length_of(second) / 2);
}

static bool open_adopting(void)
{
    return open_handle((struct kuf_options){.fill = on_fill, .flags = KUF_OPEN_ADOPT_ONLY, .demand_run = 4 * page_size()});
}

static void adopted_with(bool is_shared)
{
    start_vmm(is_shared);
    if (open_adopting()) {
        adopt(is_shared, 0);
        close_handle(KUF_END_POISON);
        for (int r = 0; r < 2; r++)
            if (atomic_load(&guest->regions[r].served) && !left_closed() && !touch_there(&guest->regions[r]))
                end_silent("kuf_close has returned");
    }
    end_vmm();
}

static void adopted(void)
{
    adopted_with(false);
}

static void adopted_in_place(void)
{
    adopted_with(true);
}

/* One handler hands over to the next. */
static void handed_over(void)
{
    start_vmm(false);
    if (open_adopting()) {
        adopt(false, 0);
        close_handle(stopped() ? KUF_END_POISON : KUF_END_HANDOVER);
    }
    if (!stopped() && open_adopting()) {
        for (int r = 0; r < 2; r++)
            if (atomic_load(&guest->regions[r].served))
                add_region(&guest->regions[r], (struct kuf_memory){.flags = KUF_MEMORY_REMOTE,
                                                                   .uffd = vmm_uffd});
        touch_region(&guest->regions[1]);
        close_handle(KUF_END_POISON);
    }
    end_vmm();
}

const struct scenario scenarios[] = {
    {"anonymous", anonymous, false},
    {"in_place", in_place, false},
    {"zeroes", zeroes, false},
    {"nowait", nowait, false},
    {"sources", sources, false},
    {"sources_in_place", sources_in_place, false},
    {"driven", driven, false},
    {"direct", direct, false},
    {"deferred", deferred, false},
    {"resolved", resolved, false},
    {"record", record, false},
    {"changed", changed, false},
    {"forks", forks, false},
    {"huge", huge, false},
    {"adopted", adopted, true},
    {"adopted_in_place", adopted_in_place, true},
    {"handed_over", handed_over, true},
};
const int scenario_count = sizeof(scenarios) / sizeof(*scenarios);

_Noreturn void run_scenario(const struct scenario *scenario)
{
    begin_run();
    scenario->body();
    finish_run();
}
