/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A process that forks while it has no descriptor left for the child's userfaultfd: reading the FORK event fails with
 * EMFILE, and the kernel keeps it. fork(2) returns, the service and its slots continue, and no page reads as zeroes.
 */
#include "touches.h"
#include "uffd.h"
#include "watched.h"
#include <sys/resource.h>

#define BASE UINT64_C(0x60000000)
enum { PAGES = 32 };

static struct source source = SOURCE_INIT;
static size_t page, length;

/* ---- Descriptors ----------------------------------------------------------------------------------------------------- */

static struct rlimit before;

/* From now on only descriptors that are closed become free. */
static void no_descriptors(void)
{
    int free = dup(STDOUT_FILENO);
    must(free >= 0 && getrlimit(RLIMIT_NOFILE, &before) == 0, "a free descriptor");
    struct rlimit none = {.rlim_cur = (rlim_t)free, .rlim_max = before.rlim_max};
    close(free);
    must(setrlimit(RLIMIT_NOFILE, &none) == 0 && dup(STDOUT_FILENO) == -1 && errno == EMFILE, "no descriptor is left");
}

static void descriptors_again(void)
{
    must(setrlimit(RLIMIT_NOFILE, &before) == 0, "descriptors again");
}

/* ---- Children ---------------------------------------------------------------------------------------------------------- */

/* Blocks until the parent lets it continue, or ends. */
static int go_on[2];

static void wait_in_child(void)
{
    char byte;
    watchdog(60);
    close(go_on[1]);
    if (read(go_on[0], &byte, 1) < 0)
        _exit(9);
}

/* 0: the pages are the source's; 3: they are not; killed by a signal: the pages are not mapped. */
static _Noreturn void look_and_end(const unsigned char *ram)
{
    _exit(holds_content(ram + 8 * page, BASE + 8 * page, 4 * page, 1) ? 0 : 3);
}

/* The end of the child: its exit status, or minus the signal. */
static pid_t fork_here(const unsigned char *ram, bool waits)
{
    pid_t child = fork();
    if (child != 0)
        return child;
    signal(SIGSEGV, SIG_DFL);
    watchdog(60);
    if (waits)
        wait_in_child();
    look_and_end(ram);
}

/* A bare clone(2): no handler of pthread_atfork runs. */
struct clone {
    const unsigned char *ram;
    pid_t pid;
    atomic_bool returned;
    pthread_t thread;
};

static void *clone_body(void *argument)
{
    struct clone *clone = argument;
    pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == 0) {
        wait_in_child();
        look_and_end(clone->ram);
    }
    clone->pid = child;
    atomic_store(&clone->returned, true);
    return NULL;
}

static void clone_in_thread(struct clone *clone, const unsigned char *ram)
{
    *clone = (struct clone){.ram = ram};
    clone->thread = start(clone_body, clone);
}

/* ---- fork(2) ----------------------------------------------------------------------------------------------------------- */

static void forks(void)
{
    unsigned char *ram = map_anonymous(length);
    struct kuf_options options = {.size = sizeof(options), .flags = KUF_OPEN_FOLLOW_FORK, .fill = source_fill,
                                  .event = source_event, .opaque = &source, .demand_run = page};
    struct kuf *kuf = NULL;
    if (kuf_open(&options, &kuf) < 0) {
        skip_part("KUF_OPEN_FOLLOW_FORK: %s", kuf_error());
        return;
    }
    watch(kuf);
    add(kuf, BASE, ram, length);
    must(pipe(go_on) == 0, "a pipe");
    no_descriptors();
    pid_t first = fork_here(ram, true);
    ok(first > 0, "fork returns without a descriptor left");
    comes_to(atomic_load(&source.events[KUF_EVENT_FORKED]), 1, "the child is announced");
    is(last_event(&source, KUF_EVENT_FORKED).error, 0, "and served, with the descriptor in reserve");
    ok(holds_content(ram, BASE, 2 * page, 1), "the parent is served");
    pid_t second = fork_here(ram, false);
    ok(second > 0, "fork returns when that is used up, too");
    comes_to(atomic_load(&source.events[KUF_EVENT_FORKED]), 2, "the second child is announced");
    is(last_event(&source, KUF_EVENT_FORKED).error, -EMFILE, "as one that is not served");
    is(end_of(second), -SIGSEGV, "it has no guest memory");
    ok(holds_content(ram + 2 * page, BASE + 2 * page, 2 * page, 1), "the parent is served");
    descriptors_again();
    pid_t third = fork_here(ram, false);
    is(end_of(third), 0, "with descriptors a child is served again");
    must(write(go_on[1], "", 1) == 1, "the first child goes on");
    is(end_of(first), 0, "and is served as well");
    ok(holds_content(ram, BASE, length, 1), "the parent reads all of its memory");
    is(atomic_load(&source.events[KUF_EVENT_FATAL]), 0, "the service lives");
    close_watched(kuf, 0);
    close(go_on[0]);
    close(go_on[1]);
    munmap(ram, length);
}

/* ---- A bare clone(2), under the handle's own userfaultfd or an adopted one --------------------------------------------- */

static void clones(bool adopted)
{
    const char *whose = adopted ? "adopted" : "own";
    unsigned char *ram = map_anonymous(length);
    int uffd = adopted ? own_userfaultfd(UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMOVE) : -1;
    atomic_store(&source.events[KUF_EVENT_FORKED], 0);
    atomic_store(&source.events[KUF_EVENT_UNREADABLE], 0);
    struct kuf_options options = {.size = sizeof(options), .flags = adopted ? KUF_OPEN_ADOPT_ONLY : KUF_OPEN_FOLLOW_FORK,
                                  .fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page};
    struct kuf *kuf = NULL;
    if (kuf_open(&options, &kuf) < 0) {
        skip_part("%s: %s", whose, kuf_error());
        return;
    }
    watch(kuf);
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = length,
                              .hva = (uintptr_t)ram, .uffd = adopted ? uffd : -1};
    must(kuf_add_memory(kuf, &slot) == 0, "%s: kuf_add_memory: %s", whose, kuf_error());
    must(pipe(go_on) == 0, "a pipe");
    no_descriptors();
    struct clone first, second;
    clone_in_thread(&first, ram);
    pthread_join(first.thread, NULL);
    ok(first.pid > 0, "%s: clone returns without a descriptor left", whose);
    clone_in_thread(&second, ram);
    wait_until(atomic_load(&source.events[KUF_EVENT_UNREADABLE]) > 0);
    is(last_event(&source, KUF_EVENT_UNREADABLE).error, -EMFILE, "%s: the next one waits, and an event says why", whose);
    is(last_event(&source, KUF_EVENT_UNREADABLE).len, adopted ? length : 0, "%s: and of what", whose);
    ok(!atomic_load(&second.returned), "%s: it waits still", whose);
    struct one_touch touch;
    touch_in_thread(&touch, ram + page);
    is(progress_of(kuf, BASE).flags, 0, "%s: the slot has not gone", whose);
    is(kuf_close(&(struct kuf *){kuf}, 0), -EBUSY, "%s: and its pages are unresolved", whose);
    descriptors_again();
    pthread_join(second.thread, NULL);
    ok(second.pid > 0, "%s: with a descriptor it returns", whose);
    pthread_join(touch.thread, NULL);
    ok(touch.raised == 0 && touch.word == word_of(BASE + page, 1), "%s: a thread that touched meanwhile is served", whose);
    is(atomic_load(&source.events[KUF_EVENT_UNREADABLE]), 1, "%s: it was said once", whose);
    is(atomic_load(&source.events[KUF_EVENT_GONE]) + atomic_load(&source.events[KUF_EVENT_FATAL]), 0,
       "%s: nothing is gone or dead", whose);
    must(write(go_on[1], "go", 2) == 2, "the children go on");
    is(end_of(first.pid), 0, "%s: the first child is served", whose);
    is(end_of(second.pid), 0, "%s: the second, too", whose);
    close_watched(kuf, KUF_END_POISON);
    is(try_touch(ram + (PAGES - 1) * page), poison_signal(), "%s: a page that was not filled is poisoned", whose);
    close(go_on[0]);
    close(go_on[1]);
    if (adopted)
        close(uffd);
    munmap(ram, length);
}

int main(void)
{
    page = page_size();
    length = PAGES * page;
    begin_watched(60);
    catch_touches();
    forks();
    clones(false);
    clones(true);
    return done();
}
