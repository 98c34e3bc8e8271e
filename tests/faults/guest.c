/* SPDX-License-Identifier: MIT OR Apache-2.0 */
#include "guest.h"

#include <malloc.h>

struct guest *guest;
struct kuf *kuf;
atomic_int events[HARNESS_EVENTS], last_error[HARNESS_EVENTS];
atomic_bool gave_up;
bool is_remote;

/* ---- The verdict --------------------------------------------------------------------------------------------------- */

/* The time without progress after which a wait is given up: longer than any time-out of the library on a busy machine. */
static const uint64_t PATIENCE = UINT64_C(12000000000);

void end_with(enum verdict verdict, const char *format, ...)
{
    int none = VERDICTS;
    if (atomic_compare_exchange_strong(&shared->verdict, &none, verdict)) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(shared->problem, sizeof(shared->problem), format, arguments);
        va_end(arguments);
    }
    _exit(1);
}

void progress(void)
{
    atomic_store(&guest->progress_at, now_ns());
}

bool keep_waiting(void)
{
    struct timespec time = {.tv_nsec = 200000};
    nanosleep(&time, NULL);
    /* The other process has set a verdict. */
    if (atomic_load(&shared->verdict) != VERDICTS)
        _exit(1);
    return now_ns() < atomic_load(&guest->progress_at) + PATIENCE;
}

bool fault_is_over(void)
{
    return !shared->good && atomic_load(&shared->injected) > 0;
}

bool failed(const char *call, long got, int tries)
{
    if (got >= 0)
        return false;
    const char *why = kuf_error();
    if (why == NULL || why[0] == '\0')
        end_with(BROKEN, "%s: %ld, but kuf_error is empty", call, got);
    if (!atomic_exchange(&shared->error_seen, true))
        snprintf(shared->first_error, sizeof(shared->first_error), "%s: %ld %s", call, got, why);
    return tries < 3;
}

bool is_aftermath(long got)
{
    if (got == -EHWPOISON)
        return comes(atomic_load(&shared->poison_seen));
    /* Another thread may raise the event after the call has returned. */
    return got == -EIO ? comes(atomic_load(&shared->fatal_seen)) : atomic_load(&shared->fatal_seen);
}

bool left_closed(void)
{
    return is_remote && atomic_load(&events[KUF_EVENT_INACCESSIBLE]) > 0;
}

bool stopped(void)
{
    return atomic_load(&shared->fatal_seen) || atomic_load(&gave_up) || left_closed() ||
           atomic_load(&events[KUF_EVENT_UNREADABLE]) > 0;
}

/* ---- Callbacks ----------------------------------------------------------------------------------------------------- */

size_t length_of(const struct region *region)
{
    return (size_t)region->pages * page_size();
}

/* Returns the region that contains gpa, and the number of the page in it; or NULL. */
static struct region *find(uint64_t gpa, int *page)
{
    for (int r = 0; r < REGIONS; r++) {
        struct region *region = &guest->regions[r];
        if (region->memory != NULL && gpa >= region->gpa && gpa - region->gpa < length_of(region)) {
            *page = (int)((gpa - region->gpa) / page_size());
            return region;
        }
    }
    return NULL;
}

static void note_poison(uint64_t gpa, uint64_t length)
{
    /* The one event of kuf_close is about all memory. */
    for (int r = 0; r < REGIONS && length == 0; r++)
        if (guest->regions[r].memory != NULL)
            note_poison(guest->regions[r].gpa, length_of(&guest->regions[r]));
    for (uint64_t at = gpa; at < gpa + length; at += page_size()) {
        int page;
        struct region *region = find(at, &page);
        if (region == NULL)
            continue;
        atomic_store(&region->poisoned[page], true);
        if (!atomic_load(&region->ended))
            atomic_store(&shared->poison_seen, true);
    }
}

void on_event(void *opaque, const struct kuf_event *event)
{
    (void)opaque;
    struct place before = mark_place(false, "event callback");
    progress();
    if (event->kind == KUF_EVENT_POISONED || event->kind == KUF_EVENT_INACCESSIBLE)
        note_poison(event->gpa, event->len);
    if (event->kind == KUF_EVENT_FATAL) {
        snprintf(shared->first_error, sizeof(shared->first_error), "FATAL: %s", event->text);
        atomic_store(&shared->fatal_seen, true);
    }
    if (event->kind < HARNESS_EVENTS) {
        atomic_store(&last_error[event->kind], event->error);
        atomic_fetch_add(&events[event->kind], 1);
    }
    mark_back(before);
}

void fill_content(void *to, uint64_t gpa, uint64_t length)
{
    for (uint64_t at = 0; at < length; at += page_size()) {
        int page;
        struct region *region = find(gpa + at, &page);
        unsigned may_be = region == NULL ? 0 : atomic_load(&region->may_be[page]);
        if (may_be & IS_ZERO)
            memset((char *)to + at, 0, page_size());
        else
            write_content((char *)to + at, gpa + at, page_size(), may_be & MAY_BE_NEW ? 2 : 1);
    }
}

int on_fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    struct place before = mark_place(false, "fill callback");
    fill_content(fill->buf, fill->gpa, fill->len);
    mark_back(before);
    return KUF_FILL_DONE;
}

/* ---- Guest memory -------------------------------------------------------------------------------------------------- */

void set_pages(struct region *region, int from, int count, unsigned may_be)
{
    for (int page = from; page < from + count; page++)
        atomic_store(&region->may_be[page], (unsigned char)may_be);
}

struct region *new_region_of(int r, unsigned char *memory, int fd, int pages)
{
    struct region *region = &guest->regions[r];
    region->gpa = UINT64_C(0x10000000) * (unsigned)(r + 1);
    region->fd = fd;
    region->pages = pages;
    set_pages(region, 0, pages, 0);
    region->memory = memory;
    return region;
}

struct region *new_region(int r, bool is_shared)
{
    int fd = -1;
    size_t length = PAGES * page_size();
    unsigned char *memory = is_shared ? map_shared(length, &fd) : map_anonymous(length);
    return new_region_of(r, memory, fd, PAGES);
}

bool add_region(struct region *region, struct kuf_memory memory)
{
    memory.size = sizeof(memory);
    memory.gpa = region->gpa;
    memory.len = length_of(region);
    memory.hva = (uintptr_t)region->memory;
    memory.fd = region->fd;
    atomic_store(&region->ended, false);
    bool added = TRY(kuf_add_memory(kuf, &memory)) == 0;
    atomic_store(&region->served, added);
    return added;
}

static bool holds_its_own(const unsigned char *at, uint64_t gpa, unsigned may_be)
{
    if (!(may_be & IS_ZERO) && holds_content(at, gpa, page_size(), may_be & MAY_BE_NEW ? 2 : 1))
        return true;
    if (may_be & (MAY_BE_ZERO | IS_ZERO) && holds_zeroes(at, page_size()))
        return true;
    return may_be & MAY_BE_OLD && holds_content(at, gpa, page_size(), 1);
}

bool look_at(struct region *region, int page)
{
    uint64_t gpa = region->gpa + (uint64_t)page * page_size();
    const unsigned char *at = region->memory + (size_t)page * page_size();
    if (try_touch(at) != 0) {
        if (!comes(atomic_load(&region->poisoned[page]) || atomic_load(&region->ended)))
            end_with(BROKEN, "page %d at %#llx raises a signal, but no event reported poison", page, (unsigned long long)gpa);
        return false;
    }
    if (!holds_its_own(at, gpa, atomic_load(&region->may_be[page])))
        end_with(WRONG_BYTES, "page %d at %#llx holds %#llx: %s (may be %#x%s%s%s)", page, (unsigned long long)gpa,
                 (unsigned long long)*(const uint64_t *)at,
                 holds_zeroes(at, page_size()) ? "zeroes" : "foreign bytes",
                 atomic_load(&region->may_be[page]), atomic_load(&region->poisoned[page]) ? ", poisoned" : "",
                 atomic_load(&region->ended) ? ", ended" : "", kuf == NULL ? ", closed" : "");
    return true;
}

void look_at_all(struct region *region)
{
    for (int page = 0; page < region->pages; page++)
        look_at(region, page);
}

/* ---- Threads that touch guest memory ------------------------------------------------------------------------------- */

static void *touch_all(void *argument)
{
    struct toucher_of *toucher = argument;
    mark_place(false, "touching guest memory");
    /* Stop after two poisoned pages: the library retries for a long time before it poisons one. */
    for (int page = toucher->from, lost = 0; page != toucher->to && lost < 2; page += toucher->step) {
        atomic_store(&toucher->at, page);
        lost += !look_at(toucher->region, page);
        progress();
    }
    atomic_store(&toucher->finished, true);
    return NULL;
}

bool touchers_are_through(void)
{
    for (int i = 0; i < TOUCHERS; i++)
        if (guest->touchers[i].region != NULL && !atomic_load(&guest->touchers[i].finished))
            return false;
    return atomic_load(&guest->asked) == atomic_load(&guest->answered);
}

void join_touchers(void)
{
    for (int i = 0; i < TOUCHERS && !is_remote; i++) {
        if (guest->touchers[i].region != NULL)
            pthread_join(guest->touchers[i].thread, NULL);
        guest->touchers[i].region = NULL;
    }
}

void end_silent(const char *what)
{
    for (int i = 0; i < TOUCHERS; i++) {
        struct toucher_of *toucher = &guest->touchers[i];
        if (toucher->region != NULL && !atomic_load(&toucher->finished))
            end_with(SILENT, "%s: a thread waits for page %d of %#llx, and no event or call reported why", what,
                     atomic_load(&toucher->at), (unsigned long long)toucher->region->gpa);
    }
    end_with(SILENT, "%s: a thread waits, and no event or call reported why", what);
}

void touch_here(struct region *region)
{
    for (int i = 0; i < TOUCHERS; i++) {
        struct toucher_of *toucher = &guest->touchers[i];
        toucher->from = i == 0 ? 0 : region->pages - 1;
        toucher->to = i == 0 ? region->pages : -1;
        toucher->step = i == 0 ? 1 : -1;
        atomic_store(&toucher->finished, false);
        toucher->region = region;
        toucher->thread = start(touch_all, toucher);
    }
}

void ask(int command, struct region *region)
{
    atomic_store(&guest->command, command);
    atomic_store(&guest->region, (int)(region - guest->regions));
    atomic_fetch_add(&guest->asked, 1);
}

static bool wait_for_touchers(const char *what)
{
    if (!comes(touchers_are_through() || stopped()))
        end_silent(what);
    if (!touchers_are_through())
        return false;
    join_touchers();
    return true;
}

bool touch_region(struct region *region)
{
    if (!atomic_load(&region->served) || stopped())
        return !stopped();
    if (is_remote)
        ask('t', region);
    else
        touch_here(region);
    return wait_for_touchers("touching");
}

bool by_itself_there(int command, struct region *region)
{
    ask(command, region);
    return wait_for_touchers("changing guest memory");
}

bool touch_there(struct region *region)
{
    ask('t', region);
    return comes(touchers_are_through());
}

bool by_itself(void *(*body)(void *), void *argument)
{
    struct toucher_of *toucher = &guest->touchers[0];
    atomic_store(&toucher->finished, false);
    toucher->region = &guest->regions[0];
    toucher->thread = start(body, argument);
    return wait_for_touchers("changing guest memory");
}

/* ---- Start and end ------------------------------------------------------------------------------------------------- */

bool open_handle(struct kuf_options options)
{
    options.size = sizeof(options);
    options.event = on_event;
    if (options.fill == NULL && !(options.flags & (KUF_OPEN_SOURCES | KUF_OPEN_DIRECT)))
        options.flags |= KUF_OPEN_CALLER_DRIVEN;
    if (options.fill_threads == 0)
        options.fill_threads = 1;
    TRY(kuf_open(&options, &kuf));
    if (shared->after_open)
        atomic_store(&shared->armed, true);
    return kuf != NULL;
}

/* From now on pages may be poisoned without an event for each page. */
static void end_regions(void)
{
    for (int r = 0; r < REGIONS; r++)
        atomic_store(&guest->regions[r].ended, true);
}

static void close_for_good(void)
{
    atomic_store(&shared->armed, false);
    end_regions();
    int got = LIB(kuf_close(&kuf, KUF_END_POISON));
    if (got < 0)
        end_with(BROKEN, "kuf_close with KUF_END_POISON: %d without an injected fault: %s", got, kuf_error());
}

void close_handle(uint32_t flags)
{
    if (kuf == NULL)
        return;
    if (flags & KUF_END_POISON || stopped())
        end_regions();
    struct kuf *closing = kuf;
    int got = LIB(kuf_close(&kuf, flags));
    failed("kuf_close", got, 3);
    if (got < 0 && kuf != closing)
        end_with(BROKEN, "kuf_close: %d, but the pointer changed", got);
    if (got < 0)
        close_for_good();
    atomic_store(&shared->armed, false);
    if (flags & KUF_END_HANDOVER && got == 0)
        return;
    if (!comes(touchers_are_through() || left_closed()))
        end_silent("kuf_close has returned");
    join_touchers();
    end_discard();
    atomic_store(&gave_up, false);
    /* Pages that are not poisoned still hold their bytes. */
    for (int r = 0; r < REGIONS; r++)
        if (!is_remote && atomic_load(&guest->regions[r].served))
            look_at_all(&guest->regions[r]);
}

/* Returns the total length of all mappings except the heap. */
static long mapped(void)
{
    static char text[1 << 18];
    long sum = 0;
    size_t length = 0;
    int fd = open("/proc/self/maps", O_RDONLY);
    for (ssize_t got; (got = read(fd, text + length, sizeof(text) - 1 - length)) > 0;)
        length += (size_t)got;
    close(fd);
    text[length] = '\0';
    for (char *line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        unsigned long from, to;
        if (strstr(line, "[heap]") == NULL && strstr(line, "[stack]") == NULL && sscanf(line, "%lx-%lx ", &from, &to) == 2)
            sum += (long)(to - from);
    }
    return sum;
}

static long mapped_at_first;

static void *do_nothing(void *unused)
{
    return unused;
}

static void count_left(void)
{
    for (int r = 0; r < REGIONS; r++) {
        struct region *region = &guest->regions[r];
        if (region->memory != NULL && !is_remote)
            munmap(region->memory, length_of(region));
        if (region->memory != NULL && region->fd >= 0)
            close(region->fd);
        region->memory = NULL;
    }
    /* A joined thread may stay in /proc for a moment. */
    (void)comes(threads_named("kuf-") == 0);
    /* The stacks of detached threads are freed after that. */
    for (int i = 0; i < 200 && mapped() - mapped_at_first > shared->usually_mapped; i++) {
        /* glibc unmaps the stack of a detached thread only when another thread frees its own. */
        pthread_join(start(do_nothing, NULL), NULL);
        sleep_ms(5);
    }
    shared->left_closed = left_closed();
    shared->threads = threads_named("kuf-");
    shared->descriptors = open_descriptors();
    allocations_left(&shared->allocations, &shared->allocated);
    shared->mapped = mapped() - mapped_at_first;
}

void begin_run(void)
{
    begin();
    alarm(0);
    catch_touches();
    /* Use one heap, so that new mappings are the library's. */
    mallopt(M_ARENA_MAX, 1);
    mark_place(false, "the scenario");
    guest = mmap(NULL, sizeof(*guest), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(guest != MAP_FAILED, "memory for the guest");
    mapped_at_first = mapped();
    if (shared->kind == KIND_CALL && !install_filter())
        end_with(BROKEN, "cannot install the seccomp filter: %s", strerror(errno));
    atomic_store(&shared->armed, !shared->after_open);
}

void end_run_stopped(void)
{
    atomic_store(&shared->verdict, STOPPED);
    _exit(0);
}

void finish_run(void)
{
    atomic_store(&shared->armed, false);
    if (kuf != NULL)
        end_with(BROKEN, "the scenario did not close its handle");
    count_left();
    if (getenv("FAULTS_LEFT") != NULL)
        print_allocations();
    atomic_store(&shared->verdict, atomic_load(&shared->fatal_seen) ? STOPPED
                                   : atomic_load(&shared->poison_seen) ? POISONED
                                   : atomic_load(&shared->error_seen) ? CLEAN_ERROR
                                                                      : RECOVERED);
    _exit(0);
}
