/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A storm of signals at threads that fault and wait: handlers run on the caller's threads, and nothing is lost or cut
 * short.
 */
#include "harness.h"

#include <sys/prctl.h>

#define BASE UINT64_C(0x10000000)
enum { PAGES = 512, TOUCHERS = 3, ROUNDS = 4 };

static struct source source = SOURCE_INIT;
static atomic_int handled, elsewhere;

static void on_signal(int signal_number)
{
    (void)signal_number;
    atomic_fetch_add(&handled, 1);
    char name[16] = "";
    prctl(PR_GET_NAME, name);
    if (strncmp(name, "kuf-", 4) == 0)
        atomic_fetch_add(&elsewhere, 1);
}

struct waiter {
    struct kuf *kuf;
    int got;
    atomic_bool ready, returned;
};

static void *wait_in_poll(void *argument)
{
    struct waiter *waiter = argument;
    atomic_store(&waiter->ready, true);
    waiter->got = kuf_poll(waiter->kuf, -1);
    atomic_store(&waiter->returned, true);
    return NULL;
}

static void *wait_in_ensure(void *argument)
{
    struct waiter *waiter = argument;
    atomic_store(&waiter->ready, true);
    waiter->got = kuf_ensure(waiter->kuf, BASE, page_size(), -1);
    atomic_store(&waiter->returned, true);
    return NULL;
}

int main(void)
{
    begin();
    size_t page = page_size(), length = PAGES * page;
    /* Without SA_RESTART a signal interrupts every call that it can. */
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGUSR2, &action, NULL);

    for (int round = 0; round < ROUNDS; round++) {
        unsigned char *ram = map_anonymous(length);
        struct kuf *kuf = open_with((struct kuf_options){.fill = source_fill, .opaque = &source, .demand_run = page});
        add(kuf, BASE, ram, length);
        struct toucher touchers[TOUCHERS];
        for (int i = 0; i < TOUCHERS; i++) {
            touchers[i] = (struct toucher){.memory = ram, .gpa = BASE, .length = length, .generation = 1};
            start_toucher(&touchers[i]);
        }
        bool running = true;
        while (running) {
            running = false;
            for (int i = 0; i < TOUCHERS; i++)
                if (!atomic_load(&touchers[i].finished)) {
                    pthread_kill(touchers[i].thread, SIGUSR1);
                    running = true;
                }
            kill(getpid(), SIGUSR2); /* to whichever thread takes it */
        }
        bool good = true;
        for (int i = 0; i < TOUCHERS; i++)
            good = join_toucher(&touchers[i]) && good;
        ok(good, "round %d: every thread reads every page", round);
        close_with(kuf, 0);
        munmap(ram, length);
    }
    ok(atomic_load(&handled) > 0, "%d signals were handled", atomic_load(&handled));
    is(atomic_load(&elsewhere), 0, "none of them on a thread of the library");

    /* Waits are not ended by signals. */
    unsigned char *ram = map_anonymous(length);
    struct kuf *kuf = open_driven(NULL);
    add(kuf, BASE, ram, length);
    struct waiter polling = {.kuf = kuf}, ensuring = {.kuf = kuf};
    pthread_t thread = start(wait_in_poll, &polling);
    wait_until(atomic_load(&polling.ready));
    for (int i = 0; i < 200; i++) {
        pthread_kill(thread, SIGUSR1);
        sched_yield();
    }
    sleep_ms(10);
    ok(!atomic_load(&polling.returned), "kuf_poll goes on waiting");
    pthread_t second = start(wait_in_ensure, &ensuring);
    wait_until(kuf_pending(kuf, NULL, 0) == 1);
    pthread_join(thread, NULL);
    is(polling.got, 1, "until there is something to read");
    for (int i = 0; i < 200; i++) {
        pthread_kill(second, SIGUSR1);
        sched_yield();
    }
    sleep_ms(10);
    ok(!atomic_load(&ensuring.returned), "kuf_ensure goes on waiting");
    struct kuf_fault fault;
    is(kuf_read(kuf, &fault, 1), 1, "the fault is read");
    is(kuf_resolve(kuf, BASE, NULL, page, KUF_RESOLVE_ZERO), page, "and resolved");
    pthread_join(second, NULL);
    is(ensuring.got, 0, "until the page is there");
    close_with(kuf, KUF_END_POISON);
    return done();
}
