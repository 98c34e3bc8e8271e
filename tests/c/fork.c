/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* fork: the handle stays the parent's, the child ends without harm, and with KUF_OPEN_FOLLOW_FORK it is served. */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 32 };

static struct source source = SOURCE_INIT;

/*
 * A child inherits the locks of AddressSanitizer's allocator as they are (those of glibc's allocator are handled). So
 * with it the library's threads have to be idle: a child that inherits a held lock hangs in its first malloc.
 */
static pid_t fork_at_rest(void)
{
#ifdef __SANITIZE_ADDRESS__
    sleep_ms(100);
#endif
    return fork();
}

/* Every call of the handle in the child. The child ends with exit, so that exit handlers run. */
static void child_calls(struct kuf *kuf)
{
    begin_child();
    size_t page = page_size();
    static unsigned char bytes[4096];
    struct kuf_progress_info progress = {.size = sizeof(progress)};
    static struct kuf_stats_info stats = {.size = sizeof(stats)};
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = BASE, .len = page};
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE * 2, .len = sizeof(bytes), .hva = (uintptr_t)bytes};
    struct kuf_fault fault;
    struct kuf *copy = kuf;
    is(kuf_close(&copy, KUF_END_POISON), -ECHILD, "child: kuf_close");
    ok(copy == kuf, "child: kuf_close leaves the pointer");
    is(kuf_add_memory(kuf, &memory), -ECHILD, "child: kuf_add_memory");
    is(kuf_remove_memory(kuf, BASE, KUF_END_POISON), -ECHILD, "child: kuf_remove_memory");
    is(kuf_fd(kuf), -ECHILD, "child: kuf_fd");
    is(kuf_poll(kuf, 0), -ECHILD, "child: kuf_poll");
    is(kuf_read(kuf, &fault, 1), -ECHILD, "child: kuf_read");
    is(kuf_resolve(kuf, BASE, bytes, page, 0), -ECHILD, "child: kuf_resolve");
    is(kuf_vcpu_fault(kuf, BASE, page, 0), -ECHILD, "child: kuf_vcpu_fault");
    is(kuf_ensure(kuf, BASE, page, 0), -ECHILD, "child: kuf_ensure");
    is(kuf_populate(kuf, &request), -ECHILD, "child: kuf_populate");
    is(kuf_discard(kuf, BASE, page, KUF_DISCARD_REFILL), -ECHILD, "child: kuf_discard");
    is(kuf_pending(kuf, &fault, 1), -ECHILD, "child: kuf_pending");
    is(kuf_progress(kuf, BASE, &progress), -ECHILD, "child: kuf_progress");
    is(kuf_stats(kuf, &stats), -ECHILD, "child: kuf_stats");
    is(kuf_block_times(kuf, NULL, 0), -ECHILD, "child: kuf_block_times");
    ok(kuf_error()[0] != '\0', "child: kuf_error says \"%s\"", kuf_error());
    is(kuf_version(), KUF_VERSION_MAJOR << 16 | KUF_VERSION_MINOR << 8 | KUF_VERSION_PATCH, "child: kuf_version");
    exit(atomic_load(&harness_failures) != 0);
}

/* A child may use the library for itself. */
static void child_opens(void)
{
    begin_child();
    static struct source own = SOURCE_INIT;
    struct kuf *kuf = open_serviced(&own);
    unsigned char *ram = map_anonymous(PAGES * page_size());
    add(kuf, BASE, ram, PAGES * page_size());
    ok(holds_content(ram, BASE, PAGES * page_size(), 1), "child: a handle of its own serves it");
    close_with(kuf, 0);
    exit(atomic_load(&harness_failures) != 0);
}

int main(void)
{
    begin();
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length);
    struct kuf *kuf = open_serviced(&source), *driven = open_driven(NULL);
    add(kuf, BASE, ram, length);
    ok(holds_content(ram, BASE, page, 1), "one page is filled before the fork");

    pid_t child = fork_at_rest();
    if (child == 0)
        child_calls(kuf);
    is(end_of(child), 0, "a child gets -ECHILD from every call and exits");
    child = fork_at_rest();
    if (child == 0)
        child_calls(driven);
    is(end_of(child), 0, "the same with a caller-driven handle");
    child = fork_at_rest();
    if (child == 0)
        child_opens();
    is(end_of(child), 0, "a child opens a handle of its own");
    child = fork_at_rest();
    if (child == 0) {
        begin_child();
        exit(!holds_content(ram, BASE, page, 1));
    }
    is(end_of(child), 0, "a page that was filled before is the child's as well");
    ok(holds_content(ram, BASE, length, 1), "the parent is served after all that");
    close_with(driven, 0);
    close_with(kuf, 0);

    kuf = NULL;
    struct kuf_options options = {.size = sizeof(options), .flags = KUF_OPEN_FOLLOW_FORK, .fill = source_fill,
                                  .event = source_event, .opaque = &source};
    int got = kuf_open(&options, &kuf);
    if (got < 0) {
        skip_part("KUF_OPEN_FOLLOW_FORK: %s", kuf_error());
        return done();
    }
    ram = map_anonymous(length);
    add(kuf, BASE, ram, length);
    ok(holds_content(ram, BASE, 4 * page, 1), "following forks: some pages are filled before");
    child = fork_at_rest();
    if (child == 0) {
        begin_child();
        /* It has its own copy, and reads the source's bytes also where the parent has touched nothing. */
        exit(!holds_content(ram, BASE, length, 1));
    }
    is(end_of(child), 0, "following forks: the child reads every page's own bytes");
    is(atomic_load(&source.events[KUF_EVENT_FORKED]), 1, "following forks: the caller is told");
    is(stats_of(kuf).events_fork, 1, "following forks: and it is counted");
    struct toucher toucher = {.memory = ram, .gpa = BASE, .length = length, .generation = 1};
    start_toucher(&toucher);
    ok(join_toucher(&toucher), "following forks: the parent is served as before");

    /* The service continues after a child is killed while it waits. */
    is(kuf_discard(kuf, BASE, length, KUF_DISCARD_REFILL), 0, "pages are dropped");
    atomic_store(&source.hold, true);
    child = fork_at_rest();
    if (child == 0)
        _exit(touch(ram + 20 * page));
    wait_until(atomic_load(&source.inside) >= 1);
    kill(child, SIGKILL);
    is(end_of(child), -SIGKILL, "following forks: a child is killed while it waits for a page");
    atomic_store(&source.hold, false);
    toucher = (struct toucher){.memory = ram, .gpa = BASE, .length = length, .generation = 1};
    start_toucher(&toucher);
    ok(join_toucher(&toucher), "following forks: the parent is served all the same");
    close_with(kuf, 0);
    return done();
}
