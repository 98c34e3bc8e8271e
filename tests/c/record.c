/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A working set: the pages that one guest demanded are recorded, and filled ahead of the next guest's faults, in
 * whatever slots that guest has. A wrong file is refused, and does nothing.
 */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum {
    PAGES = 8192,
    ROW = 256,         /* pages that are touched in order, from page 0 */
    HOLE_FROM = 3000,  /* the other layout has a hole here */
    HOLE_TO = 3700,
    SPLIT = 1000,      /* and where its slots part */
};

static bool wanted[PAGES];
static unsigned order[PAGES], touched;
static struct source source;
static unsigned char file[1 << 20];
static size_t file_length;

/* A tenth of the pages, scattered, in no order; and some in order. */
static void choose(void)
{
    uint64_t seed = 0x9e3779b97f4a7c15;
    for (unsigned page = 0; page < ROW; page++)
        wanted[order[touched++] = page] = true;
    while (touched < PAGES / 10) {
        seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
        unsigned page = (unsigned)(seed % PAGES);
        if (!wanted[page])
            wanted[order[touched++] = page] = true;
    }
}

static void new_source(void)
{
    source = (struct source)SOURCE_INIT;
}

/* With so little readahead that the recording has the touched pages only. */
static struct kuf *open_for_guest(void)
{
    return open_with((struct kuf_options){.fill = source_fill, .event = source_event, .release = source_release,
                                          .opaque = &source, .demand_run = 32 << 10});
}

static uint64_t gpa_of(unsigned page)
{
    return BASE + page * (uint64_t)page_size();
}

static int new_file(void)
{
    int fd = memfd_create("recording", MFD_CLOEXEC);
    must(fd >= 0, "a file");
    return fd;
}

static int file_of(const unsigned char *bytes, size_t length)
{
    int fd = new_file();
    must(write(fd, bytes, length) == (ssize_t)length && lseek(fd, 0, SEEK_SET) == 0, "the file is written");
    return fd;
}

static int replay(struct kuf *kuf, const unsigned char *bytes, size_t length)
{
    int fd = file_of(bytes, length);
    int got = kuf_replay(kuf, fd, 0);
    close(fd);
    return got;
}

static void wait_replayed(int count)
{
    wait_until(atomic_load(&source.events[KUF_EVENT_REPLAYED]) >= count);
}

/* The wanted pages of a range, in the order in which they were wanted; the caller knows their places. */
struct guest {
    const unsigned char *memory;
    unsigned from, to;
    bool good;
};

static void *guest_body(void *argument)
{
    struct guest *guest = argument;
    guest->good = true;
    for (unsigned i = 0; i < touched; i++)
        if (order[i] >= guest->from && order[i] < guest->to &&
            !holds_content(guest->memory + (order[i] - guest->from) * page_size(), gpa_of(order[i]), page_size(), 1))
            guest->good = false;
    return NULL;
}

static bool run_guest(const unsigned char *memory, unsigned from, unsigned to)
{
    struct guest guest = {.memory = memory, .from = from, .to = to};
    pthread_join(start(guest_body, &guest), NULL);
    return guest.good;
}

static uint64_t wanted_in(unsigned from, unsigned to)
{
    uint64_t count = 0;
    for (unsigned page = from; page < to; page++)
        count += wanted[page];
    return count;
}

/* ---- Recording ----------------------------------------------------------------------------------------------------- */

static uint64_t faults_of_demand;

static void record(void)
{
    new_source();
    unsigned char *memory = map_anonymous(PAGES * page_size());
    struct kuf *kuf = open_for_guest();
    add(kuf, BASE, memory, PAGES * page_size());
    int readable = open("/dev/null", O_RDONLY | O_CLOEXEC), full = open("/dev/full", O_WRONLY | O_CLOEXEC);
    is(kuf_record_stop(kuf, -1), -EINVAL, "nothing is being recorded: %s", kuf_error());
    is(kuf_record_start(kuf, 1), -EINVAL, "no flag is known: %s", kuf_error());
    is(kuf_record_start(kuf, 0), 0, "recording starts");
    is(kuf_record_start(kuf, 0), -EALREADY, "once: %s", kuf_error());
    is(kuf_record_stop(kuf, readable), -EBADF, "a descriptor that cannot be written to: %s", kuf_error());
    is(kuf_record_stop(kuf, -2), -EBADF, "and no descriptor at all: %s", kuf_error());
    ok(run_guest(memory, 0, PAGES), "a guest runs");
    faults_of_demand = stats_of(kuf).faults;
    if (full >= 0)
        is(kuf_record_stop(kuf, full), -ENOSPC, "a device that is full: %s", kuf_error());
    else
        skip_part("no /dev/full");
    if (full >= 0)
        is(kuf_record_start(kuf, 0), -EALREADY, "the recording is kept: %s", kuf_error());
    touch(memory + HOLE_FROM * page_size());
    int fd = new_file();
    must(write(fd, "before", 6) == 6, "something is in the file already");
    is(kuf_record_stop(kuf, fd), 0, "it is written elsewhere");
    is(kuf_record_stop(kuf, fd), -EINVAL, "once: %s", kuf_error());
    file_length = (size_t)pread(fd, file, sizeof(file), 6);
    is(lseek(fd, 0, SEEK_CUR), 6 + (off_t)file_length, "from where the descriptor stood");
    ok(file_length > 52 && file_length < 52 + 4 * touched, "it is small: %zu bytes for %u pages in %" PRIu64 " faults",
       file_length, touched, faults_of_demand);
    close(fd);
    close(full);
    close(readable);
    close_with(kuf, KUF_END_POISON);
    munmap(memory, PAGES * page_size());
}

/* ---- Replaying ----------------------------------------------------------------------------------------------------- */

static void replay_same_layout(void)
{
    new_source();
    unsigned char *memory = map_anonymous(PAGES * page_size());
    struct kuf *kuf = open_for_guest();
    add(kuf, BASE, memory, PAGES * page_size());
    is(replay(kuf, file, file_length), 0, "a recording is replayed");
    wait_replayed(1);
    struct kuf_event event = last_event(&source, KUF_EVENT_REPLAYED);
    ok(event.error == 0 && event.gpa == 0 && event.len == 0, "the event comes, without an error");
    uint64_t present = progress_of(kuf, BASE).present / page_size();
    ok(present >= wanted_in(0, PAGES) && present <= wanted_in(0, PAGES) + 16,
       "wanted pages are present and next to no others: %" PRIu64 " pages for %" PRIu64, present,
       wanted_in(0, PAGES));
    is(atomic_load(&source.flags_seen) & KUF_RUN_DEMAND, 0, "no thread waited for it");
    ok(atomic_load(&source.calls) < present, "in fewer fills than pages: %u", atomic_load(&source.calls));
    ok(run_guest(memory, 0, PAGES), "the guest runs, on the right bytes");
    uint64_t faults = stats_of(kuf).faults;
    ok(faults * 100 <= faults_of_demand * 3, "its demand faults are gone: %" PRIu64 " of %" PRIu64, faults,
       faults_of_demand);

    is(replay(kuf, file, file_length), 0, "again");
    wait_replayed(2);
    is(progress_of(kuf, BASE).present / page_size(), present + faults, "present pages are skipped");
    close_with(kuf, KUF_END_POISON);
    munmap(memory, PAGES * page_size());
}

/* Three slots, one of them a shared file, with a hole between; through a pipe that stays open. */
static void replay_other_layout(void)
{
    new_source();
    size_t page = page_size();
    int fd, pipe_fds[2];
    unsigned char *first = map_anonymous(SPLIT * page);
    unsigned char *second = map_shared((HOLE_FROM - SPLIT) * page, &fd);
    unsigned char *third = map_anonymous((PAGES - HOLE_TO) * page);
    struct kuf *kuf = open_for_guest();
    add(kuf, gpa_of(HOLE_TO), third, (PAGES - HOLE_TO) * page);
    add(kuf, BASE, first, SPLIT * page);
    add_shared(kuf, gpa_of(SPLIT), second, (HOLE_FROM - SPLIT) * page, fd, 0);
    close(fd);
    is(kuf_ensure(kuf, BASE, 4 * page, -1), 0, "some is present already");
    is(kuf_discard(kuf, BASE + 4 * page, 4 * page, KUF_DISCARD_ZERO), 0, "and some was given back");
    must(pipe2(pipe_fds, O_CLOEXEC | O_NONBLOCK) == 0, "a pipe");
    must(file_length < 60000 && write(pipe_fds[1], file, file_length) == (ssize_t)file_length, "holds the recording");
    must(write(pipe_fds[1], "rest", 4) == 4, "and more");
    is(kuf_replay(kuf, pipe_fds[0], 0), 0, "a recording is replayed in other slots, from a pipe");
    char rest[8];
    is(read(pipe_fds[0], rest, sizeof(rest)), 4, "the bytes behind it in the pipe are not read");
    wait_replayed(1);
    is(last_event(&source, KUF_EVENT_REPLAYED).error, 0, "without an error");
    uint64_t all = wanted_in(0, HOLE_FROM) + wanted_in(HOLE_TO, PAGES);
    struct kuf_progress_info progress = progress_of(kuf, KUF_ALL);
    ok(progress.present / page >= all - 4 && progress.present / page <= all + 16,
       "pages in slots are present: %" PRIu64 " pages of %" PRIu64, progress.present / page, all);
    is(progress.removed, 4 * page, "pages that were given back stay so");
    uint64_t faults = stats_of(kuf).faults;
    is(faults, 0, "no page was touched");
    ok(holds_zeroes(first + 4 * page, 4 * page), "and read as zero");
    uint64_t zeroed = stats_of(kuf).faults;
    write_content(first + 4 * page, BASE + 4 * page, 4 * page, 1);
    ok(run_guest(first, 0, SPLIT), "the guest's first slot has the right bytes");
    ok(run_guest(second, SPLIT, HOLE_FROM), "so has the shared one");
    ok(run_guest(third, HOLE_TO, PAGES), "and the one behind the hole");
    faults = stats_of(kuf).faults - zeroed;
    ok(faults * 100 <= all * 3, "its demand faults are gone: %" PRIu64, faults);
    close(pipe_fds[0]);
    close(pipe_fds[1]);
    close_with(kuf, KUF_END_POISON);
    munmap(first, SPLIT * page);
    munmap(second, (HOLE_FROM - SPLIT) * page);
    munmap(third, (PAGES - HOLE_TO) * page);
}

static void replay_huge(void)
{
    new_source();
    size_t huge = 2 << 20;
    void *memory = mmap(NULL, 2 * huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | 21 << 26, -1, 0);
    if (memory == MAP_FAILED) {
        skip_part("replay in huge pages: there are none");
        return;
    }
    struct kuf *kuf = open_for_guest();
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = 2 * huge, .hva = (uintptr_t)memory};
    if (kuf_add_memory(kuf, &slot) != 0) {
        skip_part("replay in huge pages: %s", kuf_error());
    } else {
        is(replay(kuf, file, file_length), 0, "a recording is replayed in huge pages");
        wait_replayed(1);
        is(progress_of(kuf, BASE).present, 2 * huge, "which are filled whole");
        ok(holds_content(memory, BASE, 2 * huge, 1), "with the right bytes");
        is(stats_of(kuf).faults, 0, "without a fault");
    }
    close_with(kuf, KUF_END_POISON);
    munmap(memory, 2 * huge);
}

/* ---- Files that are no good ---------------------------------------------------------------------------------------- */

static uint32_t crc32_of(const unsigned char *bytes, size_t length)
{
    uint32_t crc = ~0u;
    for (size_t i = 0; i < length; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
    }
    return ~crc;
}

static void put(unsigned char *at, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        at[i] = (unsigned char)(value >> 8 * i);
}

static size_t put_number(unsigned char *at, uint64_t value)
{
    size_t length = 0;
    for (; value >= 128; value >>= 7)
        at[length++] = (unsigned char)(value | 128);
    at[length++] = (unsigned char)value;
    return length;
}

struct run {
    int64_t step;
    uint64_t pages;
};

/* A file with correct checksums, whatever its contents. */
static size_t forge_of(unsigned char *to, uint32_t version, uint64_t unit, const struct run *runs, unsigned count)
{
    size_t length = 48;
    memcpy(to, "\x89KUFREC\n", 8);
    for (unsigned i = 0; i < count; i++) {
        length += put_number(to + length, ((uint64_t)runs[i].step << 1) ^ (uint64_t)(runs[i].step >> 63));
        length += put_number(to + length, runs[i].pages - 1);
    }
    put(to + 8, version, 4);
    put(to + 12, 48, 4);
    put(to + 16, unit, 8);
    put(to + 24, count, 8);
    put(to + 32, length - 48, 8);
    put(to + 40, 0, 4);
    put(to + 44, crc32_of(to, 44), 4);
    put(to + length, crc32_of(to, length), 4);
    return length + 4;
}

static size_t forge(unsigned char *to, uint32_t version, const struct run *runs, unsigned count)
{
    return forge_of(to, version, page_size(), runs, count);
}

static void refuse_bad_files(void)
{
    enum { SMALL = 64 };
    new_source();
    size_t page = page_size();
    unsigned char *memory = map_anonymous(SMALL * page), bytes[4096];
    struct kuf *kuf = open_for_guest(), *driven = open_driven(NULL);
    const struct run two[] = {{(int64_t)(BASE / page), 1}, {1, 2}};
    size_t length = forge(bytes, KUF_RECORD_VERSION, two, 2);
    is(replay(kuf, bytes, length), -ENOENT, "a handle without memory: %s", kuf_error());
    add(kuf, BASE, memory, SMALL * page);

    int refused = 0, told = 0;
    for (size_t cut = 0; cut < length; cut++) {
        int got = replay(kuf, bytes, cut);
        refused += got == (cut == 0 ? -EINVAL : -EBADMSG);
        told += strstr(kuf_error(), cut == 0 ? "no recording" : "ends early") != NULL;
    }
    is(refused, length, "every file that ends early is refused");
    is(told, length, "and said to");
    refused = 0;
    for (size_t bit = 0; bit < length * 8; bit++) {
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
        refused += replay(kuf, bytes, length) < 0;
        bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    is(refused, length * 8, "every file with a bit that is wrong is refused");
    length = forge(bytes, KUF_RECORD_VERSION + 1, two, 2);
    is(replay(kuf, bytes, length), -EPROTONOSUPPORT, "one of a newer version: %s", kuf_error());
    is(replay(kuf, (const unsigned char *)"#!/bin/sh\n", 10), -EINVAL, "one that is none: %s", kuf_error());
    const struct run twice[] = {{(int64_t)(BASE / page), SMALL}, {-SMALL, SMALL}};
    length = forge(bytes, KUF_RECORD_VERSION, twice, 2);
    is(replay(kuf, bytes, length), -EBADMSG, "one that names pages twice: %s", kuf_error());
    const struct run below[] = {{-1, 1}}, above[] = {{0, 1}, {0, UINT64_C(1) << 62}};
    length = forge(bytes, KUF_RECORD_VERSION, below, 1);
    is(replay(kuf, bytes, length), -EBADMSG, "one that begins below 0: %s", kuf_error());
    length = forge(bytes, KUF_RECORD_VERSION, above, 2);
    is(replay(kuf, bytes, length), -EBADMSG, "one that ends nowhere: %s", kuf_error());
    length = forge(bytes, KUF_RECORD_VERSION, two, 2);
    put(bytes + 24, UINT64_C(1) << 60, 8);
    put(bytes + 32, UINT64_C(1) << 61, 8);
    put(bytes + 44, crc32_of(bytes, 44), 4);
    is(replay(kuf, bytes, length), -EFBIG, "one that says it is beyond all bounds: %s", kuf_error());
    put(bytes + 24, 1 << 26, 8);
    put(bytes + 32, 1 << 30, 8);
    put(bytes + 44, crc32_of(bytes, 44), 4);
    is(replay(kuf, bytes, length), -EBADMSG, "one that says it is a gigabyte: %s", kuf_error());
    const struct run elsewhere[] = {{1, 1}};
    length = forge(bytes, KUF_RECORD_VERSION, elsewhere, 1);
    is(replay(kuf, bytes, length), -ENOENT, "one of other memory: %s", kuf_error());
    length = forge(bytes, KUF_RECORD_VERSION, two, 2);
    is(replay(driven, bytes, length), -ENOTSUP, "a handle without a callback: %s", kuf_error());
    is(kuf_replay(kuf, new_file(), 1), -EINVAL, "no flag is known: %s", kuf_error());
    int directory = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC), path = open("/", O_PATH | O_CLOEXEC);
    is(kuf_replay(kuf, directory, 0), -EISDIR, "a directory: %s", kuf_error());
    is(kuf_replay(kuf, path, 0), -EBADF, "a descriptor that cannot be read: %s", kuf_error());
    is(kuf_replay(kuf, -1, 0), -EBADF, "none: %s", kuf_error());
    is(progress_of(kuf, BASE).absent, SMALL * page, "none of it has filled anything");
    is(atomic_load(&source.events[KUF_EVENT_REPLAYED]), 0, "nor raised an event");

    const struct run everything[] = {{0, UINT64_MAX / page}};
    length = forge(bytes, KUF_RECORD_VERSION, everything, 1);
    unsigned char *none = map_anonymous(SMALL * page);
    is(replay(kuf, bytes, length), 0, "one that names the whole address space");
    wait_replayed(1);
    is(progress_of(kuf, KUF_ALL).present, SMALL * page, "is for the slots alone");
    is(atomic_load(&source.bytes), SMALL * page, "and asks for nothing else");
    ok(holds_content(memory, BASE, SMALL * page, 1) && holds_zeroes(none, SMALL * page), "with the right bytes");
    close_with(kuf, 0);
    close_with(driven, 0);
    munmap(memory, SMALL * page);
}

/* ---- In company ---------------------------------------------------------------------------------------------------- */

static void *touch_page(void *page)
{
    touch(page);
    return NULL;
}

/* Stopped, failed, in front of a populate, joined by demand. */
static void among_others(void)
{
    new_source();
    size_t page = page_size();
    unsigned char *memory = map_anonymous(PAGES * page);
    struct kuf *kuf = open_for_guest();
    add(kuf, BASE, memory, PAGES * page);

    atomic_store(&source.hold, true);
    is(replay(kuf, file, file_length), 0, "a replay begins");
    is(replay(kuf, file, file_length), 0, "and another is queued");
    wait_until(atomic_load(&source.inside) == 1);
    struct kuf_populate_request stop = {.size = sizeof(stop), .flags = KUF_POPULATE_STOP};
    is(kuf_populate(kuf, &stop), 0, "both are told to stop");
    atomic_store(&source.hold, false);
    wait_replayed(2);
    is(last_event(&source, KUF_EVENT_REPLAYED).error, -ECANCELED, "they end");
    ok(progress_of(kuf, BASE).absent > (PAGES - touched) * page, "before they are done");

    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.bad_gpa, gpa_of(order[touched - 40]));
    is(replay(kuf, file, file_length), 0, "a replay from a source that fails");
    wait_replayed(3);
    is(last_event(&source, KUF_EVENT_REPLAYED).error, -EIO, "ends with its error");
    is(progress_of(kuf, BASE).poisoned, 0, "and poisons nothing");
    atomic_store(&source.bad_gpa, NO_GPA);

    is(kuf_discard(kuf, BASE, PAGES * page, KUF_DISCARD_REFILL), 0, "everything is dropped");
    struct kuf_populate_request slow = {.size = sizeof(slow), .gpa = KUF_ALL, .rate = page};
    is(kuf_populate(kuf, &slow), 0, "a slow request runs");
    wait_until(progress_of(kuf, BASE).present > 0);
    is(replay(kuf, file, file_length), 0, "a replay comes in between");
    wait_replayed(4);
    is(last_event(&source, KUF_EVENT_REPLAYED).error, 0, "and is done");
    is(atomic_load(&source.events[KUF_EVENT_POPULATED]), 0, "while the request goes on");
    is(kuf_populate(kuf, &stop), 0, "until it is stopped");
    wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) == 1);

    /* Demand joins what is on its way, and is recorded for it. */
    is(kuf_discard(kuf, BASE, PAGES * page, KUF_DISCARD_REFILL), 0, "everything is dropped");
    uint64_t joined = stats_of(kuf).faults_joined;
    atomic_store(&source.hold, true);
    is(kuf_record_start(kuf, 0), 0, "recording starts");
    is(replay(kuf, file, file_length), 0, "and a replay");
    wait_until(atomic_load(&source.inside) == 1);
    pthread_t toucher = start(touch_page, memory + 5 * page);
    wait_until(stats_of(kuf).faults_joined > joined);
    atomic_store(&source.hold, false);
    pthread_join(toucher, NULL);
    wait_replayed(5);
    is(stats_of(kuf).faults_joined, joined + 1, "a fault for a page that is on its way joins");
    ok(run_guest(memory, 0, PAGES), "all bytes are right");
    int fd = new_file();
    is(kuf_record_stop(kuf, fd), 0, "the recording is written");
    is(kuf_discard(kuf, BASE, PAGES * page, KUF_DISCARD_REFILL), 0, "everything is dropped");
    lseek(fd, 0, SEEK_SET);
    is(kuf_replay(kuf, fd, 0), 0, "and it is replayed");
    wait_replayed(6);
    is(progress_of(kuf, BASE).present, page, "one page was demanded: the others were there in time");
    ok(holds_content(memory + 5 * page, gpa_of(5), page, 1), "that one");
    close(fd);
    close_with(kuf, KUF_END_POISON);
    munmap(memory, PAGES * page);
}

struct reader {
    int fd;
    size_t length;
    unsigned char bytes[1 << 16];
};

static void *read_slowly(void *argument)
{
    struct reader *reader = argument;
    ssize_t got;
    while ((got = read(reader->fd, reader->bytes + reader->length, 700)) > 0) {
        reader->length += (size_t)got;
        sleep_ms(1);
    }
    return NULL;
}

/* Every other page, from kuf_read, kuf_ensure and after a discard; written through a pipe that is too small. */
static void caller_driven(void)
{
    enum { MANY = 6000 };
    static struct reader reader;
    size_t page = page_size();
    unsigned char *memory = map_anonymous(MANY * page), *bytes = malloc(page);
    struct kuf *kuf = open_driven(NULL);
    add(kuf, BASE, memory, MANY * page);
    is(kuf_record_start(kuf, 0), 0, "a caller-driven handle records");
    int good = 0;
    for (unsigned round = 0; round < 2; round++) {
        for (unsigned i = 0; i < (round == 0 ? 100 : MANY); i += 2) {
            struct kuf_fault fault = {.gpa = 0};
            pthread_t toucher = start(touch_page, memory + i * page);
            good += kuf_poll(kuf, -1) == 1 && kuf_read(kuf, &fault, 1) == 1;
            write_content(bytes, fault.gpa, page, 1);
            good += kuf_resolve(kuf, fault.gpa, bytes, page, 0) == (ssize_t)page;
            pthread_join(toucher, NULL);
        }
        if (round == 0)
            is(kuf_discard(kuf, BASE, 100 * page, KUF_DISCARD_REFILL), 0, "some pages are dropped, to be demanded once more");
    }
    is(good, 100 + MANY, "faults are read and resolved");
    free(bytes);
    int fds[2];
    must(pipe2(fds, O_CLOEXEC) == 0, "a pipe");
    fcntl(fds[1], F_SETPIPE_SZ, 4096);
    fcntl(fds[1], F_SETFL, O_NONBLOCK);
    reader.fd = fds[0];
    pthread_t thread = start(read_slowly, &reader);
    is(kuf_record_stop(kuf, fds[1]), 0, "the recording goes through a pipe that takes a part at a time");
    close(fds[1]);
    pthread_join(thread, NULL);
    close(fds[0]);
    close_with(kuf, KUF_END_POISON);
    munmap(memory, MANY * page);

    new_source();
    memory = map_anonymous(MANY * page);
    kuf = open_for_guest();
    add(kuf, BASE, memory, MANY * page);
    is(replay(kuf, reader.bytes, reader.length), 0, "and is replayed on a serviced one (%zu bytes)", reader.length);
    wait_replayed(1);
    is(progress_of(kuf, BASE).present, MANY / 2 * page, "with each page it was asked for");
    close_with(kuf, KUF_END_POISON);
    munmap(memory, MANY * page);
}

/* Recorded on a host with pages of another size: each page here that has a byte of a recorded one is filled, and no other. */
static void other_page_size(uint64_t unit)
{
    static const struct {
        uint64_t first, count;
    } named[] = {{9, 1}, {3, 2}, {12, 3}, {0, 1}};
    enum { RUNS = sizeof(named) / sizeof(named[0]), UNITS = 16 };
    struct run runs[RUNS];
    uint64_t at = 0, page = page_size(), length = UNITS * UINT64_C(65536), expected = 0;
    unsigned char *memory = map_anonymous(length), bytes[4096];
    bool *filled = calloc(length / page, sizeof(*filled));
    for (unsigned i = 0; i < RUNS; i++) {
        uint64_t first = BASE / unit + named[i].first;
        runs[i] = (struct run){(int64_t)(first - at), named[i].count};
        at = first + named[i].count;
        for (uint64_t byte = named[i].first * unit; byte < (named[i].first + named[i].count) * unit; byte += 4096)
            filled[byte / page] = true;
    }
    for (uint64_t i = 0; i < length / page; i++)
        expected += filled[i] * page;
    new_source();
    struct kuf *kuf = open_for_guest();
    add(kuf, BASE, memory, length);
    is(replay(kuf, bytes, forge_of(bytes, KUF_RECORD_VERSION, unit, runs, RUNS)), 0,
       "a recording in pages of %" PRIu64 " bytes is replayed", unit);
    wait_replayed(1);
    is(progress_of(kuf, BASE).present, expected, "its pages are present");
    bool good = true;
    for (uint64_t i = 0; i < length / page; i++)
        good = (!filled[i] || holds_content(memory + i * page, BASE + i * page, page, 1)) && good;
    ok(good, "with its bytes");
    is(stats_of(kuf).faults, 0, "without a fault");
    close_with(kuf, KUF_END_POISON);
    munmap(memory, length);
    free(filled);
}

/* A recording may be empty; one that is never written is dropped. */
static void nothing(void)
{
    new_source();
    size_t page = page_size();
    unsigned char *memory = map_anonymous(4 * page);
    struct kuf *kuf = open_for_guest();
    add(kuf, BASE, memory, 4 * page);
    is(kuf_record_start(kuf, 0), 0, "recording starts");
    int fd = new_file();
    is(kuf_record_stop(kuf, fd), 0, "and ends");
    is(lseek(fd, 0, SEEK_CUR), 52, "with nothing but what every file has");
    lseek(fd, 0, SEEK_SET);
    is(kuf_replay(kuf, fd, 0), 0, "it can be replayed");
    wait_replayed(1);
    is(last_event(&source, KUF_EVENT_REPLAYED).error, 0, "and is done at once");
    close(fd);
    is(kuf_record_start(kuf, 0), 0, "recording starts again");
    is(kuf_ensure(kuf, BASE, page, -1), 0, "something is demanded");
    is(kuf_record_stop(kuf, -1), 0, "and dropped");
    is(kuf_record_stop(kuf, -1), -EINVAL, "for good");
    is(kuf_record_start(kuf, 0), 0, "a recording that is never written");
    close_with(kuf, KUF_END_POISON);
    munmap(memory, 4 * page);
}

int main(void)
{
    begin();
    choose();
    record();
    replay_same_layout();
    replay_other_layout();
    replay_huge();
    refuse_bad_files();
    for (uint64_t unit = 4096; unit <= 65536; unit *= 4)
        other_page_size(unit);
    among_others();
    caller_driven();
    nothing();
    return done();
}
