/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Every mistake of a caller gets its own errno and a text that names it, and changes nothing: bad_input_rows.h, row by
 * row. With --markdown, prints the table for docs/bad-input.md instead.
 */
#include "harness.h"

#include <ctype.h>
#include <linux/userfaultfd.h>
#include <stddef.h>

#define GPA_A UINT64_C(0x10000000)          /* 16 pages, the first four present */
#define GPA_B (GPA_A + 16 * (uint64_t)PAGE) /* 16 pages, right behind A */
#define GPA_C UINT64_C(0x20000000)          /* 16 pages of a shared file */
#define GPA_D UINT64_C(0x30000000)          /* 64 pages; the rows that run inside a callback use them up */
#define GPA_SPARE UINT64_C(0x40000000)
#define GPA_NONE UINT64_C(0x7fff0000)
#define PAGE page_size()
enum { TAIL = 32 };

/* The handles and memory that the rows use. */
static struct fixture {
    struct kuf *served, *driven, *direct, *sources, *closed, *opened;
    struct kuf_options plain;
    unsigned char *a, *b, *c, *d, *driven_ram, *spare, *big, *torn, *file_map, *taken, *shared_spare, *page;
    unsigned char *private_map; /* of memfd */
    int null_fd, write_fd, dead_fd, memfd, other_memfd, uffd, orphan_uffd;
    struct kuf_fault faults[4];
    struct kuf_block_time times[4];
    unsigned char recording[64]; /* of a page of SPARE */
    size_t recording_length;
} f;

static struct source source = SOURCE_INIT;

/* The last CPU of the largest set that is accepted. */
static const unsigned char no_such_cpu[8192] = {[8191] = 0x80};

/* ---- Calls of the rows --------------------------------------------------------------------------------------------- */

/* Memory that can be added as it is; a row changes one field. */
static struct kuf_memory m;

#define add_memory(from, ...) (m = from(), __VA_ARGS__, kuf_add_memory(f.served, &m))
#define add_for_kvm(...) (m = spare(), m.kvm = &(struct kuf_kvm_memory){.size = sizeof(struct kuf_kvm_memory), __VA_ARGS__}, \
                          kuf_add_memory(f.served, &m))
#define open_options(...) open_these((struct kuf_options){.size = sizeof(struct kuf_options), __VA_ARGS__})
#define populate_on(kuf, ...) kuf_populate(kuf, &(struct kuf_populate_request){.size = sizeof(struct kuf_populate_request), __VA_ARGS__})

static struct kuf_memory spare(void)
{
    return (struct kuf_memory){.size = sizeof(m), .gpa = GPA_SPARE, .len = 4 * PAGE, .hva = (uintptr_t)f.spare};
}

static struct kuf_memory shared_spare(void)
{
    return (struct kuf_memory){.size = sizeof(m), .gpa = GPA_SPARE, .len = 4 * PAGE,
                               .hva = (uintptr_t)f.shared_spare, .fd = f.memfd};
}

static int add_spare(struct kuf *kuf)
{
    m = spare();
    return kuf_add_memory(kuf, &m);
}

static const struct kuf_source zero_source = {.size = sizeof(zero_source), .kind = KUF_SOURCE_ZERO};

static const struct kuf_source no_source;
static const struct kuf_source endless_source = {
    .size = sizeof(endless_source), .kind = KUF_SOURCE_ZERO, .base = &endless_source};

/* A source that can be used as it is; a row changes one field. */
static struct kuf_source s;

#define add_source(...) (s = zero_source, __VA_ARGS__, add_source_to(f.served, s))

static int add_source_to(struct kuf *kuf, struct kuf_source source)
{
    m = spare();
    m.source = &source;
    /* An earlier slot has left these pages poisoned. */
    must(madvise(f.spare, 4 * PAGE, MADV_DONTNEED) == 0, "madvise");
    int got = kuf_add_memory(kuf, &m);
    return got == 0 ? kuf_remove_memory(kuf, GPA_SPARE, KUF_END_POISON) : got;
}

static int add_long_source(unsigned char last)
{
    struct {
        struct kuf_source known;
        unsigned char tail[TAIL];
    } source = {.known = zero_source, .tail = {[TAIL - 1] = last}};
    source.known.size = sizeof(source);
    m = spare();
    m.source = &source.known;
    must(madvise(f.spare, 4 * PAGE, MADV_DONTNEED) == 0, "madvise");
    int got = kuf_add_memory(f.served, &m);
    return got == 0 ? kuf_remove_memory(f.served, GPA_SPARE, KUF_END_POISON) : got;
}

static int probe_sized(size_t size, unsigned char old)
{
    struct {
        struct kuf_probe_info known;
        unsigned char tail[TAIL];
    } out;
    memset(&out, old, sizeof(out));
    out.known.size = (uint32_t)size;
    int got = kuf_probe(-1, &out.known);
    if (got == 0)
        ok(out.tail[0] == 0 && out.tail[TAIL - 1] == 0, "kuf_probe: fields the library does not know are zeroed");
    return got;
}

static int probe_of(int vm_fd)
{
    struct kuf_probe_info out = {.size = sizeof(out)};
    return kuf_probe(vm_fd, &out);
}

static int open_mode(uint32_t mode, kuf_fill_fn fill)
{
    struct kuf *kuf = f.served;
    struct kuf_options options = {.size = sizeof(options), .fill = fill,
                                  .flags = mode | (f.plain.flags & KUF_OPEN_USER_MODE_ONLY)};
    int got = kuf_open(&options, &kuf);
    ok(kuf == NULL, "kuf_open: *out is NULL when it fails");
    return got;
}

/* A row without a mode is about something else. */
static int open_these(struct kuf_options options)
{
    struct kuf *kuf = f.served;
    bool said = options.fill != NULL || options.flags & (KUF_OPEN_DIRECT | KUF_OPEN_SOURCES);
    options.flags |= said ? f.plain.flags & ~KUF_OPEN_CALLER_DRIVEN : f.plain.flags;
    int got = kuf_open(&options, &kuf);
    ok((kuf != NULL) == (got == 0), "kuf_open: *out is NULL exactly when it fails");
    return got == 0 ? kuf_close(&kuf, 0) : got;
}

static int open_sized(size_t size, unsigned char last)
{
    struct {
        struct kuf_options known;
        unsigned char tail[TAIL];
    } options = {.known = f.plain, .tail = {[TAIL - 1] = last}};
    struct kuf *kuf = NULL;
    options.known.size = (uint32_t)size;
    int got = kuf_open(&options.known, &kuf);
    return got == 0 ? kuf_close(&kuf, 0) : got;
}

static int add_sized(size_t size, unsigned char last)
{
    struct {
        struct kuf_memory known;
        unsigned char tail[TAIL];
    } memory = {.known = spare(), .tail = {[TAIL - 1] = last}};
    memory.known.size = (uint32_t)size;
    int got = kuf_add_memory(f.served, &memory.known);
    return got == 0 ? kuf_remove_memory(f.served, GPA_SPARE, KUF_END_POISON) : got;
}

static int populate_sized(size_t size, unsigned char last)
{
    struct {
        struct kuf_populate_request known;
        unsigned char tail[TAIL];
    } request = {.known = {.flags = KUF_POPULATE_STOP}, .tail = {[TAIL - 1] = last}};
    request.known.size = (uint32_t)size;
    return kuf_populate(f.served, &request.known);
}

static int progress_sized(struct kuf *kuf, uint64_t gpa, size_t size)
{
    struct {
        struct kuf_progress_info known;
        unsigned char tail[TAIL];
    } out = {.known = {.size = (uint32_t)size}, .tail = {[0] = 1, [TAIL - 1] = 1}};
    int got = kuf_progress(kuf, gpa, &out.known);
    if (got == 0)
        ok(out.tail[0] == 0 && out.tail[TAIL - 1] == 0, "kuf_progress: fields the library does not know are zeroed");
    return got;
}

static int settings_sized(struct kuf *kuf, uint64_t gpa, size_t size)
{
    struct {
        struct kuf_settings_info known;
        unsigned char tail[TAIL];
    } out = {.known = {.size = (uint32_t)size}, .tail = {[0] = 1, [TAIL - 1] = 1}};
    int got = kuf_settings(kuf, gpa, &out.known);
    if (got == 0)
        ok(out.tail[0] == 0 && out.tail[TAIL - 1] == 0, "kuf_settings: fields the library does not know are zeroed");
    return got;
}

static int stats_sized(struct kuf *kuf, size_t size)
{
    struct {
        struct kuf_stats_info known;
        unsigned char tail[TAIL];
    } out = {.known = {.size = (uint32_t)size}, .tail = {[0] = 1, [TAIL - 1] = 1}};
    int got = kuf_stats(kuf, &out.known);
    if (got == 0)
        ok(out.tail[0] == 0 && out.tail[TAIL - 1] == 0, "kuf_stats: fields the library does not know are zeroed");
    return got;
}

static int start_twice(void)
{
    int got = kuf_record_start(f.served, 0);
    if (got == 0)
        got = kuf_record_start(f.served, 0);
    must(kuf_record_stop(f.served, -1) == 0, "the first recording ends");
    return got;
}

/* While a recording is running, which continues if this call is refused. */
static int stop_to(int fd)
{
    must(kuf_record_start(f.served, 0) == 0, "a recording runs");
    int got = kuf_record_stop(f.served, fd);
    must(kuf_record_stop(f.served, -1) == 0, "a recording that was not stopped goes on");
    return got;
}

/* The first bytes of the fixture's recording, so many, with one byte changed. */
static int replay_changed(struct kuf *kuf, size_t length, size_t at, unsigned char change)
{
    unsigned char copy[sizeof(f.recording)];
    memcpy(copy, f.recording, sizeof(copy));
    copy[at] ^= change;
    int fd = memfd_create("recording", MFD_CLOEXEC);
    must(fd >= 0 && pwrite(fd, copy, length, 0) == (ssize_t)length, "a file holds a recording");
    int got = kuf_replay(kuf, fd, 0);
    close(fd);
    return got;
}

/* The call cannot change the fixture's own pointer. */
static int close_copy(struct kuf *kuf, uint32_t flags)
{
    struct kuf *copy = kuf;
    int got = kuf_close(&copy, flags);
    if (got < 0)
        ok(copy == kuf, "kuf_close: a refused call leaves the pointer");
    return got;
}

/* ---- The table ----------------------------------------------------------------------------------------------------- */

enum where { ANYWHERE, FILL, EVENT, DRIVEN_EVENT };

#define NAME_OF_LINE(line) row_##line
#define FUNCTION(line) NAME_OF_LINE(line)
#define ROW(call, input, error, words, ...)                                                                              \
    static long FUNCTION(__LINE__)(void)                                                                                  \
    {                                                                                                                     \
        return (long)(__VA_ARGS__);                                                                                       \
    }
#define ROW_CHANGES ROW
#define IN_FILL ROW
#define IN_EVENT ROW
#define IN_DRIVEN_EVENT ROW
#include "bad_input_rows.h"
#undef ROW
#undef ROW_CHANGES
#undef IN_FILL
#undef IN_EVENT
#undef IN_DRIVEN_EVENT

struct row {
    const char *call, *input, *name;
    int error;
    const char *words;
    enum where where;
    bool changes;
    long (*run)(void);
};

#define ENTRY(call, input, name, error, words, where, changes)                                                                 \
    {call, input, name, error, words, where, changes, FUNCTION(__LINE__)},
#define ROW(call, input, error, words, ...) ENTRY(#call, input, #error, error, words, ANYWHERE, false)
#define ROW_CHANGES(call, input, error, words, ...) ENTRY(#call, input, #error, error, words, ANYWHERE, true)
#define IN_FILL(call, input, error, words, ...) ENTRY(#call, input, #error, error, words, FILL, false)
#define IN_EVENT(call, input, error, words, ...) ENTRY(#call, input, #error, error, words, EVENT, false)
#define IN_DRIVEN_EVENT(call, input, error, words, ...) ENTRY(#call, input, #error, error, words, DRIVEN_EVENT, false)
static const struct row rows[] = {
#include "bad_input_rows.h"
};
enum { ROWS = sizeof(rows) / sizeof(rows[0]) };

/* ---- Judging a row ------------------------------------------------------------------------------------------------- */

struct state {
    struct kuf_progress_info progress[2];
    struct kuf_stats_info stats[2];
    long pending[2];
    struct kuf_fault faults[2][16];
};

static struct state state_now(void)
{
    struct state state;
    memset(&state, 0, sizeof(state));
    for (int i = 0; i < 2; i++) {
        struct kuf *kuf = i == 0 ? f.served : f.driven;
        state.progress[i] = progress_of(kuf, KUF_ALL);
        state.stats[i] = stats_of(kuf);
        state.pending[i] = (long)kuf_pending(kuf, state.faults[i], 16);
        for (int j = 0; j < 16; j++)
            state.faults[i][j].age_ns = 0;
    }
    return state;
}

/* Whether the text contains each word, in any case. */
static bool names_all(const char *text, const char *words)
{
    char copy[128], *rest = copy;
    snprintf(copy, sizeof(copy), "%s", words);
    for (char *word; (word = strsep(&rest, " ")) != NULL;)
        if (strcasestr(text, word) == NULL)
            return false;
    return true;
}

static void judge(const struct row *row)
{
    /* Set the text of another failure first: a row that sets no text must not pass with that of the row before it. */
    (void)kuf_probe(-424242, &(struct kuf_probe_info){.size = sizeof(struct kuf_probe_info)});
    char before_text[512];
    snprintf(before_text, sizeof(before_text), "%s", kuf_error());
    struct state before = state_now();
    long got = row->run();
    char text[512];
    snprintf(text, sizeof(text), "%s", kuf_error());
    struct state after = state_now();

    is(got, -row->error, "%s: %s: -%s", row->call, row->input, row->name);
    if (row->error != 0)
        ok(strcmp(text, before_text) != 0, "%s: %s: leaves a text of its own: \"%s\"", row->call, row->input, text);
    if (row->error != 0)
        ok(text[0] != '\0' && names_all(text, row->words), "%s: %s: the text names \"%s\": \"%s\"", row->call, row->input,
           row->words, text);
    if (!row->changes && row->error != 0) {
        ok(memcmp(before.progress, after.progress, sizeof(before.progress)) == 0, "%s: %s: progress is as before",
           row->call, row->input);
        ok(memcmp(before.stats, after.stats, sizeof(before.stats)) == 0, "%s: %s: counters are as before", row->call,
           row->input);
        ok(memcmp(before.pending, after.pending, sizeof(before.pending)) == 0 &&
               memcmp(before.faults, after.faults, sizeof(before.faults)) == 0,
           "%s: %s: the pending faults are as before", row->call, row->input);
    }
}

/* The row to judge inside the next callback. */
static const struct row *_Atomic inside_fill, *_Atomic inside_event;

static int fill(void *opaque, struct kuf_fill *fill)
{
    const struct row *row = atomic_load(&inside_fill);
    if (row != NULL) {
        judge(row);
        atomic_store(&inside_fill, NULL);
    }
    return source_fill(opaque, fill);
}

static void event(void *opaque, const struct kuf_event *event)
{
    const struct row *row = atomic_load(&inside_event);
    if (row != NULL && event->kind == poison_event()) {
        judge(row);
        atomic_store(&inside_event, NULL);
    }
    source_event(opaque, event);
}

static void run_row(const struct row *row)
{
    static uint64_t next; /* of D's pages, each used up by one row */
    switch (row->where) {
    case ANYWHERE:
        judge(row);
        return;
    case FILL:
        atomic_store(&inside_fill, row);
        is(kuf_ensure(f.served, GPA_D + next++ * PAGE, PAGE, -1), 0, "%s: %s: the callback runs", row->call, row->input);
        must(atomic_load(&inside_fill) == NULL, "the fill callback judges the row");
        return;
    case EVENT:
    case DRIVEN_EVENT:
        atomic_store(&inside_event, row);
        is(kuf_resolve(row->where == EVENT ? f.served : f.driven, GPA_D + next++ * PAGE, NULL, PAGE, KUF_RESOLVE_POISON),
           PAGE, "%s: %s: a poisoned page raises an event", row->call, row->input);
        wait_until(atomic_load(&inside_event) == NULL);
        return;
    }
}

/* ---- The fixture --------------------------------------------------------------------------------------------------- */

/* A userfaultfd as a caller opens it, or -1. */
static int open_uffd(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API};
    return fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0 ? fd : -1;
}

/* A userfaultfd that was opened by a process which has ended, or -1. */
static int open_orphan_uffd(void)
{
    int pair[2];
    must(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) == 0, "a socket pair");
    char byte = 'u';
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec data = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    pid_t child = fork();
    if (child == 0) {
        int fd = open_uffd();
        memset(&control, 0, sizeof(control));
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
        _exit(fd < 0 || sendmsg(pair[0], &message, 0) != 1);
    }
    int status = 1, fd = -1;
    waitpid(child, &status, 0);
    if (status == 0 && recvmsg(pair[1], &message, 0) == 1)
        memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
    close(pair[0]);
    close(pair[1]);
    return fd;
}

static void *touch_driven(void *unused)
{
    (void)unused;
    touch(f.driven_ram + 2 * PAGE);
    return NULL;
}

static void make_fixture(void)
{
    f.null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    f.dead_fd = 900;
    f.orphan_uffd = open_orphan_uffd();
    f.uffd = open_uffd();
    f.page = map_anonymous(4 * PAGE);
    write_content(f.page, 0, 4 * PAGE, 1);
    f.spare = map_anonymous(4 * PAGE);
    f.a = map_anonymous(16 * PAGE);
    f.b = map_anonymous(16 * PAGE);
    f.d = map_anonymous(64 * PAGE);
    /* Far from the kernel's other mappings, so that its hole stays a hole. */
    f.torn = mmap((void *)UINT64_C(0x200000000000), 4 * PAGE, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    must(f.torn != MAP_FAILED, "a mapping that ends early");
    write_content(f.torn, 0, 2 * PAGE, 1);
    munmap(f.torn + 2 * PAGE, 2 * PAGE);
    unsigned char *room = map_anonymous(4 << 20);
    f.big = (unsigned char *)(((uintptr_t)room + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
    int self = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    f.file_map = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, self, 0);
    must(f.null_fd >= 0 && f.file_map != MAP_FAILED, "the fixture's mappings");
    close(self);
    unsigned char *other = map_shared(4 * PAGE, &f.other_memfd);
    f.shared_spare = map_shared(8 * PAGE, &f.memfd);
    munmap(other, 4 * PAGE);
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", f.memfd);
    f.write_fd = open(path, O_WRONLY | O_CLOEXEC);
    must(f.write_fd >= 0, "a descriptor for writing only");
    f.private_map = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, f.memfd, 0);
    must(f.private_map != MAP_FAILED, "a private mapping of the memfd");

    f.taken = map_anonymous(4 * PAGE);
    struct uffdio_register registration = {.range = {.start = (uintptr_t)f.taken, .len = 4 * PAGE},
                                           .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (f.uffd >= 0)
        must(ioctl(f.uffd, UFFDIO_REGISTER, &registration) == 0, "another userfaultfd takes a range");

    f.served = open_with((struct kuf_options){
        .fill = fill, .event = event, .opaque = &source, .demand_run = PAGE});
    f.driven = open_with((struct kuf_options){.flags = KUF_OPEN_CALLER_DRIVEN, .event = event, .opaque = &source});
    f.direct = open_with((struct kuf_options){.flags = KUF_OPEN_DIRECT});
    f.sources = open_with((struct kuf_options){.flags = KUF_OPEN_SOURCES});
    f.closed = open_driven(NULL);
    struct kuf *copy = f.closed;
    close_with(copy, 0);
    /* The rows that call kuf_open use the mode that works here. */
    f.plain = (struct kuf_options){.size = sizeof(struct kuf_options), .flags = KUF_OPEN_CALLER_DRIVEN};
    if (kuf_open(&f.plain, &copy) == -EPERM)
        f.plain.flags |= KUF_OPEN_USER_MODE_ONLY;
    else
        close_with(copy, 0);

    int memfd;
    f.c = map_shared(16 * PAGE, &memfd);
    add(f.served, GPA_A, f.a, 16 * PAGE);
    add(f.served, GPA_B, f.b, 16 * PAGE);
    add_shared(f.served, GPA_C, f.c, 16 * PAGE, memfd, 0);
    add(f.served, GPA_D, f.d, 64 * PAGE);
    close(memfd);
    is(kuf_ensure(f.served, GPA_A, 4 * PAGE, -1), 0, "some pages are present");

    add(f.served, GPA_SPARE, f.spare, 4 * PAGE);
    int fd = memfd_create("recording", MFD_CLOEXEC);
    must(kuf_record_start(f.served, 0) == 0 && kuf_ensure(f.served, GPA_SPARE, PAGE, -1) == 0 &&
             kuf_record_stop(f.served, fd) == 0 && kuf_remove_memory(f.served, GPA_SPARE, KUF_END_POISON) == 0,
         "a recording: %s", kuf_error());
    f.recording_length = (size_t)pread(fd, f.recording, sizeof(f.recording), 0);
    close(fd);
    munmap(f.spare, 4 * PAGE);
    f.spare = map_anonymous(4 * PAGE);

    f.driven_ram = map_anonymous(16 * PAGE);
    add(f.driven, GPA_A, f.driven_ram, 16 * PAGE);
    add(f.driven, GPA_D, map_anonymous(64 * PAGE), 64 * PAGE);
}

/* ---- docs/bad-input.md --------------------------------------------------------------------------------------------- */

static int print_table(void)
{
    printf("| call | input | returns | the text names |\n|---|---|---|---|\n");
    for (int i = 0; i < ROWS; i++) {
        const struct row *row = &rows[i];
        printf("| `%s` | %s%s | %s%s | ", row->call, row->input, row->changes ? " (what it could do first stays done)" : "",
               row->error ? "-" : "", row->error ? row->name : "0");
        printf("%s |\n", row->words);
    }
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "--markdown") == 0)
        return print_table();
    begin();
    make_fixture();

    /* A fault that is read and not answered: the rows must not change the list of pending pages. */
    pthread_t toucher = start(touch_driven, NULL);
    is(kuf_poll(f.driven, -1), 1, "a fault to read");
    is(kuf_read(f.driven, f.faults, 4), 1, "a fault is read");

    for (int i = 0; i < ROWS; i++) {
        const struct row *row = &rows[i];
        if (f.orphan_uffd < 0 && strstr(row->input, "is gone") != NULL)
            skip_part("%s: %s: no userfaultfd for a user-mode process", row->call, row->input);
        else if (f.uffd < 0 && strstr(row->input, "userfaultfd has") != NULL)
            skip_part("%s: %s: no second userfaultfd", row->call, row->input);
        else
            run_row(row);
    }

    is(kuf_resolve(f.driven, GPA_A + 2 * PAGE, f.page, PAGE, 0), PAGE, "the owed fault is resolved");
    pthread_join(toucher, NULL);
    ok(holds_content(f.a + 8 * PAGE, GPA_A + 8 * PAGE, PAGE, 1), "the handle still serves");
    close_with(f.served, KUF_END_POISON);
    close_with(f.driven, KUF_END_POISON);
    close_with(f.direct, 0);
    close_with(f.sources, 0);
    return done();
}
