/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memory of huge pages: a slot's unit is 2 MiB, whatever the page sizes of the other slots. Filled by copy (anonymous)
 * and in place (a file), as zeroes, dropped and filled again, added and removed while others are touched.
 */
#include "harness.h"

#define HUGE_PAGE (UINT64_C(2) << 20)
#define BASE UINT64_C(0x100000000)
enum { PAGES = 4, RESERVED = 4 * PAGES };

static struct source source = SOURCE_INIT;

/* ---- Huge pages, for the time of the test --------------------------------------------------------------------------- */

static long reserved_now(void)
{
    return number_in("/proc/sys/vm/nr_hugepages", "");
}

static bool reserve(long count)
{
    FILE *file = fopen("/proc/sys/vm/nr_hugepages", "w");
    if (file == NULL)
        return false;
    bool good = fprintf(file, "%ld\n", count) > 0;
    return fclose(file) == 0 && good && reserved_now() == count;
}

static long meminfo(const char *name)
{
    return number_in("/proc/meminfo", name);
}

/* ---- Memory --------------------------------------------------------------------------------------------------------- */

static unsigned char *map_huge(size_t length, int *fd)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB;
    if (fd != NULL) {
        *fd = memfd_create("guest", MFD_CLOEXEC | MFD_HUGETLB);
        if (*fd < 0 || ftruncate(*fd, (off_t)length) < 0)
            skip("no memfd of huge pages: %s", strerror(errno));
        flags = MAP_SHARED;
    }
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, fd != NULL ? *fd : -1, 0);
    if (memory == MAP_FAILED)
        skip("no %zu bytes of huge pages: %s", length, strerror(errno));
    return memory;
}

static struct kuf_memory slot_of(uint64_t gpa, const void *memory, uint64_t length, int fd)
{
    return (struct kuf_memory){.size = sizeof(struct kuf_memory), .gpa = gpa, .len = length, .hva = (uintptr_t)memory, .fd = fd};
}

static void add_slot(struct kuf *kuf, uint64_t gpa, const void *memory, uint64_t length, int fd)
{
    struct kuf_memory slot = slot_of(gpa, memory, length, fd);
    int got = kuf_add_memory(kuf, &slot);
    must(got == 0, "kuf_add_memory of huge pages: %s", got ? kuf_error() : "adds");
}

/* Reads on another thread, so that the watchdog's signal finds this one free to handle it. */
struct look {
    const unsigned char *at;
    uint64_t gpa, generation;
    bool good;
};

static void *look_body(void *argument)
{
    struct look *look = argument;
    look->good = look->generation == 0 ? holds_zeroes(look->at, HUGE_PAGE)
                                       : holds_content(look->at, look->gpa, HUGE_PAGE, look->generation);
    return NULL;
}

/* Generation 0: zeroes. */
static bool shows(const unsigned char *ram, uint64_t gpa, int page, uint64_t generation)
{
    uint64_t offset = (uint64_t)page * HUGE_PAGE;
    struct look look = {.at = ram + offset, .gpa = gpa + offset, .generation = generation};
    pthread_join(start(look_body, &look), NULL);
    return look.good;
}

/* ---- Granules ------------------------------------------------------------------------------------------------------- */

static void wrong_granules(bool file)
{
    const char *kind = file ? "a file" : "anonymous memory";
    size_t length = 2 * HUGE_PAGE;
    int fd = -1;
    unsigned char *ram = map_huge(length, file ? &fd : NULL);
    struct kuf *kuf = open_serviced(&source);
    atomic_store(&source.generation, 1);
    struct kuf_memory slot = slot_of(BASE, ram, length, fd);
    static const uint64_t wrong[] = {4096, 65536, UINT64_C(4) << 20, UINT64_C(1) << 30, 3};
    for (size_t i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        slot.page_size = wrong[i];
        int got = kuf_add_memory(kuf, &slot);
        is(got, -EINVAL, "huge pages of %s with granule %#" PRIx64 " are refused", kind, wrong[i]);
        if (got == 0) {
            /* No later check means anything. */
            close_with(kuf, KUF_END_POISON);
            return;
        }
    }
    slot.page_size = 0;
    slot.gpa = BASE + page_size();
    is(kuf_add_memory(kuf, &slot), -EINVAL, "so is a gpa that is no multiple of the granule (%s)", kind);
    slot = slot_of(BASE, ram, HUGE_PAGE + page_size(), fd);
    is(kuf_add_memory(kuf, &slot), -EINVAL, "and a length (%s)", kind);
    is(progress_of(kuf, KUF_ALL).total, 0, "nothing was added (%s)", kind);
    slot = slot_of(BASE, ram, length, fd);
    slot.page_size = HUGE_PAGE;
    is(kuf_add_memory(kuf, &slot), 0, "huge pages of %s with their own granule are taken", kind);
    is(kuf_resolve(kuf, BASE + page_size(), NULL, page_size(), KUF_RESOLVE_ZERO), -EINVAL,
       "part of a huge page cannot be resolved (%s)", kind);
    ok(shows(ram, BASE, 1, 1), "a page is filled (%s)", kind);
    close_with(kuf, KUF_END_POPULATE);
    munmap(ram, length);
    close(fd);
}

/* ---- One kind of memory, with every operation on it ---------------------------------------------------------------- */

static struct kuf_fill last_fill;

static int recording_fill(void *opaque, struct kuf_fill *fill)
{
    last_fill = *fill;
    return source_fill(opaque, fill);
}

static void everything(bool file)
{
    const char *kind = file ? "file" : "anonymous";
    size_t length = PAGES * HUGE_PAGE;
    int fd = -1;
    unsigned char *ram = map_huge(length, file ? &fd : NULL);
    unsigned char *bytes = map_anonymous(HUGE_PAGE);
    struct kuf *kuf = open_with((struct kuf_options){.fill = recording_fill, .event = source_event, .opaque = &source});
    atomic_store(&source.generation, 1);
    add_slot(kuf, BASE, ram, length, fd);

    ok(shows(ram, BASE, 0, 1), "%s: a touched page is filled", kind);
    is(last_fill.page_size, HUGE_PAGE, "%s: the granule was found out", kind);
    is(last_fill.len, HUGE_PAGE, "%s: and is what was asked for", kind);
    is((last_fill.flags & KUF_RUN_IN_PLACE) != 0, file, "%s: in place if it is a file", kind);
    comes_to(progress_of(kuf, BASE).present, HUGE_PAGE, "%s: one page is present", kind);
    struct kuf_stats_info stats = stats_of(kuf);
    is(file ? stats.bytes_in_place : stats.bytes_copied, HUGE_PAGE, "%s: it was opened the right way", kind);

    atomic_store(&source.answer, KUF_FILL_ZERO);
    ok(shows(ram, BASE, 1, 0), "%s: a page that the callback calls zero", kind);
    atomic_store(&source.answer, 0);
    unsigned before = atomic_load(&source.calls);
    is(kuf_resolve(kuf, BASE + 2 * HUGE_PAGE, NULL, HUGE_PAGE, KUF_RESOLVE_ZERO), HUGE_PAGE, "%s: zeroes unasked", kind);
    ok(shows(ram, BASE, 2, 0), "%s: they are there", kind);
    is(atomic_load(&source.calls), before, "%s: and the callback was not asked for them", kind);
    comes_to(stats_of(kuf).bytes_zeroed, 2 * HUGE_PAGE, "%s: both are counted", kind);
    write_content(bytes, BASE + 3 * HUGE_PAGE, HUGE_PAGE, 7);
    is(kuf_resolve(kuf, BASE + 3 * HUGE_PAGE, bytes, HUGE_PAGE, 0), HUGE_PAGE, "%s: bytes unasked", kind);
    ok(shows(ram, BASE, 3, 7), "%s: they are there", kind);
    ok(progress_of(kuf, BASE).flags & KUF_PROGRESS_COMPLETE, "%s: the slot is complete", kind);

    atomic_store(&source.generation, 2);
    is(kuf_discard(kuf, BASE, HUGE_PAGE, KUF_DISCARD_REFILL), 0, "%s: a page is dropped", kind);
    is(kuf_discard(kuf, BASE + HUGE_PAGE, HUGE_PAGE, KUF_DISCARD_ZERO), 0, "%s: one is given back", kind);
    is(kuf_discard(kuf, BASE, page_size(), KUF_DISCARD_REFILL), -EINVAL, "%s: part of a page cannot be dropped", kind);
    ok(shows(ram, BASE, 0, 2), "%s: the first refills from the source", kind);
    ok(shows(ram, BASE, 1, 0), "%s: the other reads as zero", kind);
    ok(shows(ram, BASE, 3, 7), "%s: their neighbour keeps its bytes", kind);
    is(stats_of(kuf).bytes_discarded, 2 * HUGE_PAGE, "%s: dropped bytes are counted", kind);

    must(madvise(ram + 3 * HUGE_PAGE, HUGE_PAGE, file ? MADV_REMOVE : MADV_DONTNEED) == 0, "madvise: %s", strerror(errno));
    ok(shows(ram, BASE, 3, 0), "%s: a page that madvise gave back reads as zero", kind);
    ok(stats_of(kuf).events_remove > 0, "%s: the kernel has reported it", kind);

    is(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE), 0, "%s: the slot is taken off", kind);
    ok(!is_registered(ram), "%s: its memory is the caller's alone", kind);
    ok(shows(ram, BASE, 0, 2), "%s: and keeps its bytes", kind);
    close_with(kuf, 0);
    munmap(ram, length);
    munmap(bytes, HUGE_PAGE);
    close(fd);
}

/* A page that cannot be filled. */
static void bad_page(bool file)
{
    const char *kind = file ? "file" : "anonymous";
    int fd = -1;
    unsigned char *ram = map_huge(2 * HUGE_PAGE, file ? &fd : NULL);
    struct kuf *kuf = open_serviced(&source);
    atomic_store(&source.generation, 1);
    add_slot(kuf, BASE, ram, 2 * HUGE_PAGE, fd);
    int events = atomic_load(&source.events[KUF_EVENT_POISONED]);
    atomic_store(&source.answer, -EIO);
    is(kuf_ensure(kuf, BASE, 1, -1), -EHWPOISON, "%s: a page whose fill fails is poisoned", kind);
    atomic_store(&source.answer, 0);
    is(touch(ram + HUGE_PAGE / 2), SIGBUS, "%s: all of it", kind);
    is(atomic_load(&source.events[KUF_EVENT_POISONED]), events + 1, "%s: the caller is told", kind);
    is(last_event(&source, KUF_EVENT_POISONED).len, HUGE_PAGE, "%s: of one page", kind);
    ok(shows(ram, BASE, 1, 1), "%s: its neighbour is filled", kind);
    close_with(kuf, KUF_END_POISON);
    munmap(ram, 2 * HUGE_PAGE);
    close(fd);
}

/* Poison that an earlier slot has left is refused until it is dropped. */
static void poison_left(bool file)
{
    const char *kind = file ? "file" : "anonymous";
    int fd = -1;
    unsigned char *ram = map_huge(HUGE_PAGE, file ? &fd : NULL);
    struct kuf *kuf = open_serviced(&source);
    atomic_store(&source.generation, 1);
    struct kuf_memory slot = slot_of(BASE, ram, HUGE_PAGE, fd);
    must(kuf_add_memory(kuf, &slot) == 0, "kuf_add_memory: %s", kuf_error());
    is(kuf_remove_memory(kuf, BASE, KUF_END_POISON), 0, "%s: removed and poisoned", kind);
    is(kuf_add_memory(kuf, &slot), -EBUSY, "%s: refused with the poison", kind);
    must(madvise(ram, HUGE_PAGE, MADV_DONTNEED) == 0, "madvise: %s", strerror(errno));
    is(kuf_add_memory(kuf, &slot), 0, "%s: taken when it was dropped", kind);
    ok(shows(ram, BASE, 0, 1), "%s: and filled", kind);
    close_with(kuf, 0);
    munmap(ram, HUGE_PAGE);
    close(fd);
}

/* ---- Parts of pages are given back ------------------------------------------------------------------------------------ */

struct part {
    const unsigned char *ram;
    uint64_t from, len, wrong;
};

/* Counts base pages outside the range given back that have lost their bytes, and those inside that are neither. */
static void *look_around(void *argument)
{
    struct part *part = argument;
    for (uint64_t at = 0; at < PAGES * HUGE_PAGE; at += page_size()) {
        bool inside = at >= part->from && at < part->from + part->len;
        part->wrong += !holds_content(part->ram + at, BASE + at, page_size(), 1)
                       && !(inside && holds_zeroes(part->ram + at, page_size()));
    }
    return NULL;
}

/*
 * MADV_REMOVE takes ranges of base pages, and its event has the range as given: a huge page is dropped only as a whole.
 */
static void given_back_in_part(uint64_t from, uint64_t len, bool filled, uint64_t removed, const char *what)
{
    int fd = -1;
    unsigned char *ram = map_huge(PAGES * HUGE_PAGE, &fd);
    struct kuf *kuf = open_serviced(&source);
    atomic_store(&source.generation, 1);
    add_slot(kuf, BASE, ram, PAGES * HUGE_PAGE, fd);
    if (filled)
        must(kuf_ensure(kuf, BASE, PAGES * HUGE_PAGE, -1) == 0, "kuf_ensure: %s", kuf_error());
    must(madvise(ram + from, len, MADV_REMOVE) == 0, "madvise: %s", strerror(errno));
    comes_to(progress_of(kuf, BASE).removed, removed, "%s: whole huge pages are removed", what);
    struct part part = {.ram = ram, .from = from, .len = len};
    pthread_join(start(look_around, &part), NULL);
    is(part.wrong, 0, "%s: everything else keeps its bytes", what);
    close_with(kuf, KUF_END_POISON);
    munmap(ram, PAGES * HUGE_PAGE);
    close(fd);
}

static void parts(void)
{
    uint64_t page = page_size();
    given_back_in_part(HUGE_PAGE, HUGE_PAGE, false, HUGE_PAGE, "a whole page, absent");
    given_back_in_part(HUGE_PAGE + page, page, false, 0, "a part of an absent page");
    given_back_in_part(HUGE_PAGE - page, 2 * page, false, 0, "parts of two absent pages");
    given_back_in_part(HUGE_PAGE / 2, 2 * HUGE_PAGE, false, HUGE_PAGE, "half a page, a page and half a page, absent");
    given_back_in_part(HUGE_PAGE + page, page, true, 0, "a part of a present page");
    given_back_in_part(HUGE_PAGE / 2, 2 * HUGE_PAGE, true, HUGE_PAGE, "half a page, a page and half a page, present");
}

/* ---- Slots of different granules, some that come and go --------------------------------------------------------------- */

struct field {
    const unsigned char *ram;
    uint64_t gpa, page_size;
};

static atomic_bool stop;
static struct kuf *shared_kuf;

/* Drops a page, touches it, looks at it. Each field has one of these threads. */
static void *drop_and_touch(void *argument)
{
    struct field *field = argument;
    bool good = true;
    for (int round = 0; !atomic_load(&stop); round++) {
        uint64_t offset = (uint64_t)(round % PAGES) * field->page_size;
        good = good && holds_content(field->ram + offset, field->gpa + offset, field->page_size, 1);
        int got = kuf_discard(shared_kuf, field->gpa + offset, field->page_size, KUF_DISCARD_REFILL);
        good = good && got == 0;
        good = good && holds_content(field->ram + offset, field->gpa + offset, field->page_size, 1);
    }
    ok(good, "granule %#" PRIx64 ": a page is dropped and refilled over and over", field->page_size);
    return NULL;
}

static void different_granules(void)
{
    size_t page = page_size();
    int fd[4] = {-1, -1, -1, -1};
    struct field field[4] = {
        {map_anonymous(PAGES * page), BASE, page},
        {map_shared(PAGES * page, &fd[1]), BASE + (UINT64_C(1) << 30), page},
        {map_huge(PAGES * HUGE_PAGE, NULL), BASE + (UINT64_C(2) << 30), HUGE_PAGE},
        {map_huge(PAGES * HUGE_PAGE, &fd[3]), BASE + (UINT64_C(3) << 30), HUGE_PAGE},
    };
    atomic_store(&source.generation, 1);
    struct kuf *kuf = shared_kuf = open_serviced(&source);
    for (int i = 0; i < 4; i++)
        add_slot(kuf, field[i].gpa, field[i].ram, PAGES * field[i].page_size, fd[i]);
    is(progress_of(kuf, KUF_ALL).total, 2 * PAGES * (page + HUGE_PAGE), "four slots of two granules in one handle");
    pthread_t thread[4];
    for (int i = 0; i < 4; i++)
        thread[i] = start(drop_and_touch, &field[i]);
    /* Two more come and go beside them: one page of each kind. */
    unsigned char *private_ram = map_huge(HUGE_PAGE, NULL);
    uint64_t gpa = BASE + (UINT64_C(4) << 30);
    int rounds = 0, good = 0;
    for (; rounds < 15; rounds++) {
        int file = -1;
        unsigned char *file_ram = map_huge(HUGE_PAGE, &file);
        struct kuf_memory one = slot_of(gpa, private_ram, HUGE_PAGE, -1);
        struct kuf_memory two = slot_of(gpa + HUGE_PAGE, file_ram, HUGE_PAGE, file);
        int added = kuf_add_memory(kuf, &one) == 0 && kuf_add_memory(kuf, &two) == 0;
        int filled = shows(private_ram, gpa, 0, 1) && shows(file_ram, gpa + HUGE_PAGE, 0, 1);
        int removed = kuf_remove_memory(kuf, gpa, KUF_END_POPULATE) == 0
                      && kuf_remove_memory(kuf, gpa + HUGE_PAGE, KUF_END_POPULATE) == 0;
        good += added && filled && removed;
        must(madvise(private_ram, HUGE_PAGE, MADV_DONTNEED) == 0, "madvise: %s", strerror(errno));
        munmap(file_ram, HUGE_PAGE);
        close(file);
    }
    is(good, rounds, "slots of huge pages come, are filled and go while others are touched");
    atomic_store(&stop, true);
    for (int i = 0; i < 4; i++)
        pthread_join(thread[i], NULL);
    struct kuf_populate_request all = {.size = sizeof(all), .gpa = KUF_ALL};
    is(kuf_populate(kuf, &all), 0, "everything is populated");
    wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) == 1);
    ok(progress_of(kuf, KUF_ALL).flags & KUF_PROGRESS_COMPLETE, "all of it is present");
    struct kuf_stats_info stats = stats_of(kuf);
    ok(stats.bytes_copied > 0 && stats.bytes_in_place > 0 && stats.bytes_discarded > 0, "by copy and in place");
    is(stats.bytes_poisoned, 0, "and nothing was lost");
    close_with(kuf, 0);
    for (int i = 0; i < 4; i++) {
        munmap((void *)(uintptr_t)field[i].ram, PAGES * field[i].page_size);
        close(fd[i]);
    }
    munmap(private_ram, HUGE_PAGE);
}

/* Small pages of two layers of a source are put together to one huge page. Guest memory that is absent is not read for it. */
static void of_layers(void)
{
    const size_t small = 4096;
    char path[] = "/var/tmp/kuf-test-XXXXXX";
    int difference = mkstemp(path);
    must(difference >= 0 && unlink(path) == 0 && ftruncate(difference, HUGE_PAGE) == 0, "a file in /var/tmp");
    unsigned char *bytes = malloc(HUGE_PAGE), *absent = map_anonymous(HUGE_PAGE), *ram = map_huge(HUGE_PAGE, NULL);
    write_content(bytes, BASE, HUGE_PAGE, 2);
    for (size_t at = 5 * small; at < HUGE_PAGE; at += HUGE_PAGE - 6 * small)
        must(pwrite(difference, bytes + at, small, (off_t)at) == (ssize_t)small, "writes the file");
    write_content(bytes, BASE, HUGE_PAGE, 1);
    struct kuf_source base = {.size = sizeof(base), .kind = KUF_SOURCE_MEMORY, .addr = bytes, .len = HUGE_PAGE};
    struct kuf_source top = {.size = sizeof(top), .kind = KUF_SOURCE_FILE, .fd = difference, .base = &base};
    struct kuf *kuf = open_with(
        (struct kuf_options){.flags = KUF_OPEN_SOURCES, .event = source_event, .opaque = &source});
    struct kuf_memory slot = slot_of(BASE, ram, HUGE_PAGE, -1);
    slot.source = &top;
    must(kuf_add_memory(kuf, &slot) == 0, "%s", kuf_error());
    bool right = true;
    for (size_t at = 0; at < HUGE_PAGE; at += small)
        right = right && holds_content(ram + at, BASE + at, small, at == 5 * small || at == HUGE_PAGE - small ? 2 : 1);
    ok(right, "a huge page of small ones from two layers");

    is(kuf_remove_memory(kuf, BASE, 0), 0, "the slot is removed");
    must(madvise(ram, HUGE_PAGE, MADV_DONTNEED) == 0, "madvise");
    struct kuf_source zero = {.size = sizeof(zero), .kind = KUF_SOURCE_ZERO};
    struct kuf_memory other = slot_of(BASE + 2 * HUGE_PAGE, absent, HUGE_PAGE, -1);
    other.source = &zero;
    must(kuf_add_memory(kuf, &other) == 0, "%s", kuf_error());
    base.addr = absent;
    must(kuf_add_memory(kuf, &slot) == 0, "%s", kuf_error());
    is(kuf_ensure(kuf, BASE, HUGE_PAGE, -1), -EHWPOISON, "a layer that is absent guest memory is not read");
    is(last_event(&source, poison_event()).error, -EDEADLK, "it would be a deadlock");
    close_with(kuf, KUF_END_POISON);
    munmap(ram, HUGE_PAGE);
    munmap(absent, HUGE_PAGE);
    free(bytes);
    close(difference);
}

static int test(void)
{
    begin();
    for (int file = 0; file < 2; file++) {
        wrong_granules(file);
        everything(file);
        if (has_feature(KUF_FEATURE_POISON)) {
            bad_page(file);
            poison_left(file);
        } else {
            skip_part("this kernel cannot poison pages");
        }
    }
    parts();
    different_granules();
    of_layers();
    return done();
}

/* The test is a child, so that the reservation is returned however it ends. */
int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    harness_process = getpid();
    if (meminfo("Hugepagesize:") != (long)(HUGE_PAGE >> 10))
        skip("the huge pages of this machine are not 2 MiB");
    long before = reserved_now(), free_before = meminfo("HugePages_Free:");
    bool enough = before >= 0 && free_before >= RESERVED;
    if (!enough && !reserve(before + RESERVED)) {
        if (before >= 0)
            reserve(before);
        skip("%d huge pages cannot be reserved through vm.nr_hugepages", RESERVED);
    }
    pid_t child = fork();
    if (child == 0)
        exit(test());
    int status = end_of(child);
    if (!enough && !reserve(before))
        printf("# vm.nr_hugepages could not be put back to %ld\n", before);
    return status >= 0 ? status : 1;
}
