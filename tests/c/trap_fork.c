/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * FORK with KUF_OPEN_FOLLOW_FORK: parent, child and grandchild touch the same absent pages at the same time, write, and
 * give pages back. What is private is each one's own; what is shared is not lost because one of them lets go of it.
 */
#include "trap.h"

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

static int wait_for(pid_t child)
{
    int status = 0;
    must(waitpid(child, &status, 0) == child, "a child ends");
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

/* Says which check failed by its exit status: a child shares no counters with the parent. */
#define expect(condition, number)                                                                                        \
    do {                                                                                                                  \
        if (!(condition))                                                                                                 \
            _exit(number);                                                                                                \
    } while (0)

static void family(bool shared)
{
    const char *kind = shared ? "shared" : "anonymous";
    int fd = -1;
    unsigned char *ram = shared ? map_shared(length, &fd) : map_anonymous(length);
    struct kuf *kuf = open_here();
    if (shared)
        add_shared(kuf, BASE, ram, length, fd, 0);
    else
        add(kuf, BASE, ram, length);
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
        _exit(wait_for(grandchild));
    }
    struct toucher toucher = {.memory = ram + 8 * page, .gpa = BASE + 8 * page, .length = length - 8 * page, .generation = 1};
    start_toucher(&toucher);
    ok(join_toucher(&toucher), "%s: the parent reads every page's own bytes", kind);
    is(wait_for(child), 0, "%s: so do the child and its child", kind);
    ok(holds_content(ram + 8 * page, BASE + 8 * page, length - 8 * page, 1), "%s: what the child wrote or gave back is its own",
       kind);
    is(stats_of(kuf).events_fork, 2, "%s: two forks were reported", kind);
    close_watched(kuf, 0);
    munmap(ram, length);
    close(fd);
}

/* A child lets go of its mapping of pages that it has never touched: the bytes are in the file all the same. */
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
    is(wait_for(child), 0, "let go: the child finds the bytes again");
    ok(holds_content(ram, BASE, 2 * page, 1), "let go: the parent's bytes are still there");
    ok(holds_content(ram + 2 * page, 3, page, 4), "let go: also those that it wrote");
    close_watched(kuf, KUF_CLOSE_POPULATE);
    munmap(ram, length);
    close(fd);
}

/* Children come while fills run and pages are resolved unasked. */
static void many(bool shared)
{
    const char *kind = shared ? "shared" : "anonymous";
    int bad = 0;
    uint64_t again = 0;
    unsigned char *bytes = map_anonymous(length);
    write_content(bytes, BASE, length, 1);
    for (int round = 0; round < 12; round++) {
        int fd = -1;
        unsigned char *ram = shared ? map_shared(length, &fd) : map_anonymous(length);
        struct kuf *kuf = open_here();
        if (shared)
            add_shared(kuf, BASE, ram, length, fd, 0);
        else
            add(kuf, BASE, ram, length);
        struct toucher toucher = {.memory = ram, .gpa = BASE, .length = length, .generation = 1};
        start_toucher(&toucher);
        pid_t child[3];
        for (int i = 0; i < 3; i++) {
            child[i] = fork();
            if (child[i] == 0) {
                watchdog(60);
                _exit(!holds_content(ram, BASE, length, 1));
            }
            struct kuf_populate request = {.size = sizeof(request), .gpa = KUF_ALL};
            if (i == 0)
                must(kuf_populate(kuf, &request) == 0, "populate");
            must(kuf_resolve(kuf, BASE + (uint64_t)(i * 16) * page, bytes + (size_t)(i * 16) * page, 16 * page, 0) >= 0,
                 "resolve: %s", kuf_error());
        }
        for (int i = 0; i < 3; i++)
            bad += wait_for(child[i]) != 0;
        bad += !join_toucher(&toucher);
        again += stats_of(kuf).install_again;
        close_watched(kuf, KUF_CLOSE_POPULATE);
        munmap(ram, length);
        close(fd);
    }
    is(bad, 0, "%s: children that come in the middle of everything read their own bytes", kind);
    printf("# %s: installs put off: %" PRIu64 "\n", kind, again);
    munmap(bytes, length);
}

int main(void)
{
    begin_watched(50);
    page = page_size();
    length = PAGES * page;
    family(false);
    family(true);
    child_lets_go_of_shared();
    many(false);
    many(true);
    return done();
}
