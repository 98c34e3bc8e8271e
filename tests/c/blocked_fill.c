/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A callback that blocks keeps no other page and no event waiting, whatever else wakes the library's threads meanwhile.
 * The callbacks here wait for an act of another thread, so a library that does not read the kernel hangs.
 */
#include "harness.h"

#define BASE UINT64_C(0x40000000)
enum { ROUNDS = 150, QUICK = 12, PAGES = ROUNDS * (QUICK + 2) };

static unsigned char *ram;
static struct kuf *kuf;
static atomic_bool block, inside, through;

static int fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    if (atomic_exchange(&block, false)) {
        atomic_store(&inside, true);
        while (!atomic_load(&through))
            sleep_ms(1);
    }
    write_content(fill->buf, fill->gpa, fill->len, 1);
    return KUF_FILL_DONE;
}

/* Writes a line to a log, for example. */
static void slow_event(void *opaque, const struct kuf_event *event)
{
    (void)opaque, (void)event;
    for (uint64_t since = now_ns(); now_ns() - since < 100000;)
        ;
}

static void *touch_one(void *argument)
{
    (void)*(volatile unsigned char *)argument;
    return NULL;
}

static void *touch_another(void *argument)
{
    touch_one(argument);
    atomic_store(&through, true);
    return NULL;
}

static void *give_back(void *argument)
{
    must(madvise(argument, page_size(), MADV_DONTNEED) == 0, "madvise");
    atomic_store(&through, true);
    return NULL;
}

/* Threads of the library are woken while the callback is blocked, at different times after it has begun. */
static void wake_threads(int round)
{
    for (uint64_t since = now_ns(); now_ns() - since < (uint64_t)(round % 8) * 30000;)
        ;
    struct kuf_populate_request nothing = {.size = sizeof(nothing), .gpa = BASE, .len = page_size()};
    must(kuf_populate(kuf, &nothing) == 0, "kuf_populate of a page that is there");
    sleep_ms(2);
}

static void blocked(uint32_t threads, void *(*other)(void *), const char *what)
{
    size_t page = page_size();
    ram = map_anonymous(PAGES * page);
    kuf = open_with((struct kuf_options){.fill = fill, .event = slow_event, .demand_run = page, .fill_threads = threads});
    add(kuf, BASE, ram, PAGES * page);
    unsigned char *at = ram;
    for (int round = 0; round < ROUNDS; round++) {
        /* The library learns that fills are quick. */
        for (int i = 0; i < QUICK; i++, at += page)
            touch_one(at);
        atomic_store(&through, false);
        atomic_store(&inside, false);
        atomic_store(&block, true);
        pthread_t first = start(touch_one, at);
        at += page;
        wait_until(atomic_load(&inside));
        wake_threads(round);
        pthread_t second = start(other, other == give_back ? ram : at);
        at += page;
        pthread_join(second, NULL);
        pthread_join(first, NULL);
    }
    ok(true, "%u threads: while a callback is blocked, %s %d times", threads, what, ROUNDS);
    close_with(kuf, KUF_END_POISON);
    munmap(ram, PAGES * page);
}

/* Memory is given back with a lock held that the callback takes too: kuf.h forbids this only for touches. */
static pthread_mutex_t shared_lock = PTHREAD_MUTEX_INITIALIZER;
static atomic_bool stop;

static int locking_fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    pthread_mutex_lock(&shared_lock);
    write_content(fill->buf, fill->gpa, fill->len, 1);
    pthread_mutex_unlock(&shared_lock);
    return KUF_FILL_DONE;
}

static void *locking_giver(void *argument)
{
    unsigned char *at = argument;
    for (int i = 0; !atomic_load(&stop); i = (i + 1) % 64) {
        pthread_mutex_lock(&shared_lock);
        must(madvise(at + i * page_size(), 8 * page_size(), MADV_DONTNEED) == 0, "madvise");
        pthread_mutex_unlock(&shared_lock);
        sched_yield();
    }
    return NULL;
}

static void lock_of_the_caller(uint32_t threads)
{
    enum { HALF = 512, PASSES = 12 };
    size_t page = page_size();
    ram = map_anonymous(2 * HALF * page);
    kuf = open_with((struct kuf_options){.fill = locking_fill, .fill_threads = threads});
    add(kuf, BASE, ram, 2 * HALF * page);
    atomic_store(&stop, false);
    pthread_t givers[] = {start(locking_giver, ram + HALF * page), start(locking_giver, ram + (HALF + 128) * page)};
    long bad = 0;
    for (int pass = 0; pass < PASSES; pass++) {
        struct toucher touchers[3];
        for (int i = 0; i < 3; i++) {
            touchers[i] = (struct toucher){.memory = ram, .gpa = BASE, .length = HALF * page, .generation = 1};
            start_toucher(&touchers[i]);
        }
        for (int i = 0; i < 3; i++)
            bad += !join_toucher(&touchers[i]);
        must(kuf_discard(kuf, BASE, HALF * page, KUF_DISCARD_REFILL) == 0, "kuf_discard: %s", kuf_error());
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 2; i++)
        pthread_join(givers[i], NULL);
    is(bad, 0, "%u threads: a lock of the caller's in callbacks and around madvise: every page has its bytes", threads);
    close_with(kuf, KUF_END_POISON);
    munmap(ram, 2 * HALF * page);
}

int main(void)
{
    begin();
    for (uint32_t threads = 1; threads <= 2; threads++) {
        if (threads > 1)
            blocked(threads, touch_another, "another page was touched and served");
        blocked(threads, give_back, "another page was given back");
        lock_of_the_caller(threads);
    }
    return done();
}
