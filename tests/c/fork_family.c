/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Forks with KUF_OPEN_FOLLOW_FORK: parent, child and grandchild touch the same absent pages at the same time, write,
 * and give pages back. Private memory belongs to each process alone; shared memory is not lost when one of them drops
 * it.
 */
#include "watched.h"

#define BASE UINT64_C(0xa0000000)
enum { PAGES = 64 };

static struct source source = SOURCE_INIT;
static size_t page, length;

static struct kuf *open_here(void)
{
    struct kuf_options options = {.size = sizeof(options), .flags = KUF_OPEN_FOLLOW_FORK, .fill = source_fill,
                                  .event = source_event, .opaque = &source, .demand_run = 4 * page};
    struct kuf *kuf = NULL;
    if (kuf_open(&options, &kuf) < 0)
        skip("KUF_OPEN_FOLLOW_FORK: %s", kuf_error());
    return watch(kuf);
}

/* The exit status names the check that failed: a child shares no counters with the parent. */
#define expect(condition, number)                                                                                        \
    do {                                                                                                                  \
        if (!(condition))                                                                                                 \
            _exit(number);                                                                                                \
    } while (0)

static void family(bool shared)
{
    const char *kind = kind_of(shared);
    int fd;
    unsigned char *ram = map_kind(shared, length, &fd);
    struct kuf *kuf = open_here();
    add_kind(kuf, BASE, ram, length, fd);
    ok(holds_content(ram, BASE, 8 * page, 1), "%s: eight pages are filled before", kind);
    write_content(ram + page, 5, page, 7);

    pid_t child = fork();
    if (child == 0) {
        watchdog(60);
        pid_t grandchild = fork();
        if (grandchild == 0) {
            watchdog(60);
            expect(holds_content(ram + 8 * page, BASE + 8 * page, length - 8 * page, 1), 21);
            expect(holds_content(ram + page, 5, page, 7), 22);
            _exit(0);
        }
        expect(holds_content(ram + 8 * page, BASE + 8 * page, length - 8 * page, 1), 11);
        expect(holds_content(ram, BASE, page, 1) && holds_content(ram + page, 5, page, 7), 12);
        if (!shared) {
            write_content(ram + 9 * page, 6, page, 8);
            expect(madvise(ram + 10 * page, page, MADV_DONTNEED) == 0 && holds_zeroes(ram + 10 * page, page), 13);
        }
        _exit(end_of(grandchild));
    }
    struct toucher toucher = {.memory = ram + 8 * page, .gpa = BASE + 8 * page, .length = length - 8 * page, .generation = 1};
    start_toucher(&toucher);
    ok(join_toucher(&toucher), "%s: the parent reads every page's own bytes", kind);
    is(end_of(child), 0, "%s: so do the child and its child", kind);
    ok(holds_content(ram + 8 * page, BASE + 8 * page, length - 8 * page, 1), "%s: the child's writes and the pages it gave back are its own",
       kind);
    is(stats_of(kuf).events_fork, 2, "%s: two forks were reported", kind);
    close_watched(kuf, 0);
    munmap(ram, length);
    close(fd);
}

/* A child unmaps pages that it has never touched: the bytes stay in the file. */
static void child_lets_go_of_shared(void)
{
    int fd;
    unsigned char *ram = map_shared(length, &fd);
    struct kuf *kuf = open_here();
    add_shared(kuf, BASE, ram, length, fd, 0);
    ok(holds_content(ram, BASE, 8 * page, 1), "let go: eight pages are filled before");
    write_content(ram + 2 * page, 3, page, 4);
    pid_t child = fork();
    if (child == 0) {
        watchdog(60);
        expect(madvise(ram, 16 * page, MADV_DONTNEED) == 0, 31);
        expect(holds_content(ram + 2 * page, 3, page, 4), 32);
        _exit(0);
    }
    is(end_of(child), 0, "let go: the child finds the bytes again");
    ok(holds_content(ram, BASE, 2 * page, 1), "let go: the parent's bytes are still there");
    ok(holds_content(ram + 2 * page, 3, page, 4), "let go: also those that it wrote");
    close_watched(kuf, KUF_END_POPULATE);
    munmap(ram, length);
    close(fd);
}

struct touching {
    const volatile unsigned char *memory;
    atomic_bool stop;
};

static void *touch_on(void *argument)
{
    struct touching *touching = argument;
    while (!atomic_load(&touching->stop))
        for (size_t i = 0; i < 8; i++)
            (void)touching->memory[i * page];
    return NULL;
}

/* Forks come while pages that were given back are being made zero for the parent: they are zero in the child too. */
static void given_back_meanwhile(void)
{
    unsigned char *ram = map_anonymous(length);
    struct kuf *kuf = open_here();
    struct touching touching = {.memory = ram};
    int bad = 0;
    add(kuf, BASE, ram, length);
    must(madvise(ram, 8 * page, MADV_DONTNEED) == 0, "madvise");
    pthread_t threads[2] = {start(touch_on, &touching), start(touch_on, &touching)};
    for (int round = 0; round < 300; round++) {
        must(madvise(ram, 8 * page, MADV_DONTNEED) == 0, "madvise");
        pid_t child = fork();
        if (child == 0) {
            watchdog(60);
            _exit(!holds_zeroes(ram, 8 * page));
        }
        bad += end_of(child) != 0;
    }
    atomic_store(&touching.stop, true);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    is(bad, 0, "pages that are given back and touched while children come read as zero there");
    close_watched(kuf, KUF_END_POISON);
    munmap(ram, length);
}

struct dropping {
    struct kuf *kuf;
    atomic_bool stop;
    int failed;
};

static void *drop_on(void *argument)
{
    struct dropping *dropping = argument;
    while (!atomic_load(&dropping->stop))
        dropping->failed += kuf_discard(dropping->kuf, BASE, 8 * page, KUF_DISCARD_ZERO) != 0;
    return NULL;
}

/* Forks come while kuf_discard drops pages that the guest gave back: at every step they are zero. */
static void dropped_meanwhile(void)
{
    unsigned char *ram = map_anonymous(length);
    struct dropping dropping = {.kuf = open_here()};
    int bad = 0;
    add(dropping.kuf, BASE, ram, length);
    must(kuf_discard(dropping.kuf, BASE, 8 * page, KUF_DISCARD_ZERO) == 0, "kuf_discard");
    pthread_t thread = start(drop_on, &dropping);
    for (int round = 0; round < 300; round++) {
        pid_t child = fork();
        if (child == 0) {
            watchdog(60);
            _exit(!holds_zeroes(ram, 8 * page));
        }
        bad += end_of(child) != 0;
    }
    atomic_store(&dropping.stop, true);
    pthread_join(thread, NULL);
    is(dropping.failed, 0, "pages are dropped again and again while children come");
    is(bad, 0, "and read as zero there");
    close_watched(dropping.kuf, KUF_END_POISON);
    munmap(ram, length);
}

/* The end of the service poisons the pages that the child does not have. The file is the parent's too. */
static void end_keeps_the_file(uint32_t flags, bool child_lives, const char *what)
{
    int fd, hold[2];
    unsigned char *ram = map_shared(length, &fd);
    struct kuf *kuf = open_here();
    add_shared(kuf, BASE, ram, length, fd, 0);
    ok(holds_content(ram, BASE, 8 * page, 1), "%s: eight pages are filled before", what);
    write_content(ram + 2 * page, 3, page, 4);
    must(pipe(hold) == 0, "a pipe");
    pid_t child = fork();
    if (child == 0) {
        char byte;
        watchdog(60);
        close(hold[1]);
        expect(!child_lives || read(hold[0], &byte, 1) == 0, 41);
        _exit(0);
    }
    close(hold[0]);
    if (!child_lives)
        is(end_of(child), 0, "%s: the child has ended", what);
    close_watched(kuf, flags);
    ok(holds_content(ram, BASE, 2 * page, 1), "%s: the parent's bytes are still there", what);
    ok(holds_content(ram + 2 * page, 3, page, 4), "%s: also those that it wrote", what);
    close(hold[1]);
    if (child_lives)
        is(end_of(child), 0, "%s: the child has ended", what);
    munmap(ram, length);
    close(fd);
}

/* Children are forked while fills run and pages are resolved unasked. */
static void many(bool shared)
{
    const char *kind = kind_of(shared);
    int bad = 0;
    uint64_t again = 0;
    unsigned char *bytes = map_anonymous(length);
    write_content(bytes, BASE, length, 1);
    for (int round = 0; round < 12; round++) {
        int fd;
        unsigned char *ram = map_kind(shared, length, &fd);
        struct kuf *kuf = open_here();
        add_kind(kuf, BASE, ram, length, fd);
        struct toucher toucher = {.memory = ram, .gpa = BASE, .length = length, .generation = 1};
        start_toucher(&toucher);
        pid_t child[3];
        for (int i = 0; i < 3; i++) {
            child[i] = fork();
            if (child[i] == 0) {
                watchdog(60);
                _exit(!holds_content(ram, BASE, length, 1));
            }
            struct kuf_populate_request request = {.size = sizeof(request), .gpa = KUF_ALL};
            if (i == 0)
                must(kuf_populate(kuf, &request) == 0, "populate");
            must(kuf_resolve(kuf, BASE + (uint64_t)(i * 16) * page, bytes + (size_t)(i * 16) * page, 16 * page, 0) >= 0,
                 "resolve: %s", kuf_error());
        }
        for (int i = 0; i < 3; i++)
            bad += end_of(child[i]) != 0;
        bad += !join_toucher(&toucher);
        again += stats_of(kuf).install_again;
        close_watched(kuf, KUF_END_POPULATE);
        munmap(ram, length);
        close(fd);
    }
    is(bad, 0, "%s: children that come in the middle of everything read their own bytes", kind);
    printf("# %s: installs put off: %" PRIu64 "\n", kind, again);
    munmap(bytes, length);
}

/* A page of shared memory that could not be filled is poisoned for the children too. */
static void lost_to_all(bool before)
{
    const char *when = before ? "before the fork" : "when the child touches it";
    int fd;
    unsigned char *ram = map_shared(length, &fd);
    struct kuf *kuf = open_here();
    if (!has_feature(KUF_FEATURE_POISON)) {
        printf("# no poison here: a child that touches a lost page stays blocked\n");
    } else {
        add_shared(kuf, BASE, ram, length, fd, 0);
        atomic_store(&source.bad_answer, -EIO);
        atomic_store(&source.bad_gpa, BASE);
        if (before)
            is(kuf_ensure(kuf, BASE, page, -1), -EHWPOISON, "lost %s: kuf_ensure", when);
        pid_t child = fork();
        if (child == 0) {
            watchdog(20);
            expect(touch(ram) == SIGBUS, 51);
            expect(touch(ram) == SIGBUS, 52);
            expect(holds_content(ram + page, BASE + page, 3 * page, 1), 53);
            _exit(0);
        }
        is(end_of(child), 0, "lost %s: the child gets SIGBUS there, and the bytes beside it", when);
        is(kuf_ensure(kuf, BASE, page, -1), -EHWPOISON, "lost %s: so does the parent", when);
        atomic_store(&source.bad_gpa, NO_GPA);
    }
    close_watched(kuf, KUF_END_POISON);
    munmap(ram, length);
    close(fd);
}

int main(void)
{
    begin_watched(50);
    page = page_size();
    length = PAGES * page;
    family(false);
    family(true);
    child_lets_go_of_shared();
    given_back_meanwhile();
    dropped_meanwhile();
    end_keeps_the_file(KUF_END_POISON, true, "poisoning end, the child lives");
    end_keeps_the_file(KUF_END_POPULATE, true, "filling end, the child lives");
    end_keeps_the_file(KUF_END_POISON, false, "poisoning end, the child has ended");
    lost_to_all(false);
    lost_to_all(true);
    many(false);
    many(true);
    return done();
}
