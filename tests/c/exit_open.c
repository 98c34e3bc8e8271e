/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A program that exits with open handles, running callbacks and threads that wait for pages: it ends at once, with its
 * own exit status.
 */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 64, TOUCHERS = 4, STATUS = 23 };

static struct source source = SOURCE_INIT;
static struct kuf *kuf;
static unsigned char *ram;

static void *touch_page(void *argument)
{
    touch(argument);
    return NULL;
}

static void *ensure_all(void *unused)
{
    (void)unused;
    kuf_ensure(kuf, BASE, PAGES * page_size(), -1);
    return NULL;
}

/* A serviced handle with callbacks that never return, threads that wait and a request that runs. */
static void open_busy(int answer)
{
    begin_child();
    size_t page = page_size();
    kuf = open_with((struct kuf_options){.fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page});
    ram = map_anonymous(PAGES * page);
    add(kuf, BASE, ram, PAGES * page);
    atomic_store(&source.answer, answer);
    atomic_store(&source.hold, answer == 0);
    for (int i = 0; i < TOUCHERS; i++)
        pthread_detach(start(touch_page, ram + i * page));
    wait_until(atomic_load(&source.calls) > 0);
    pthread_detach(start(ensure_all, NULL));
    struct kuf_populate_request all = {.size = sizeof(all), .gpa = KUF_ALL};
    must(kuf_populate(kuf, &all) == 0, "kuf_populate");
}

static void busy_fills(void)
{
    open_busy(0);
    exit(STATUS);
}

static void deferred_fills(void)
{
    open_busy(KUF_FILL_DEFERRED);
    exit(STATUS);
}

static void quick_end(void)
{
    open_busy(0);
    _exit(STATUS);
}

static void driven(void)
{
    begin_child();
    kuf = open_driven(NULL);
    ram = map_anonymous(PAGES * page_size());
    add(kuf, BASE, ram, PAGES * page_size());
    for (int i = 0; i < TOUCHERS; i++)
        pthread_detach(start(touch_page, ram + i * page_size()));
    must(kuf_poll(kuf, -1) == 1, "a fault to read");
    exit(STATUS);
}

static void killed(void)
{
    open_busy(0);
    kill(getpid(), SIGKILL);
}

static int status_of(void (*body)(void))
{
    pid_t child = fork();
    if (child == 0) {
        body();
        _exit(99);
    }
    int status = -1;
    waitpid(child, &status, 0);
    return status;
}

int main(void)
{
    begin();
    /* Skips here when this machine cannot. */
    struct kuf *probe = open_driven(NULL);
    close_with(probe, 0);

    is(WEXITSTATUS(status_of(busy_fills)), STATUS, "exit with fills that never end");
    is(WEXITSTATUS(status_of(deferred_fills)), STATUS, "exit with deferred fills that are never answered");
    is(WEXITSTATUS(status_of(quick_end)), STATUS, "_exit");
    is(WEXITSTATUS(status_of(driven)), STATUS, "exit with a caller-driven handle and threads that wait");
    is(WTERMSIG(status_of(killed)), SIGKILL, "killed");
    return done();
}
