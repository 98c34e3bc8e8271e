/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Readahead: a fault also fills the pages after it where access is sequential, the missing pages around it where access
 * is dense, and no others elsewhere. Fills ahead of touchers delay no thread, and cost nothing when they fail.
 */
#include "harness.h"

#define BASE UINT64_C(0x40000000)
#define FAR_AWAY 8000
enum { PAGES = 8192 };

static size_t page;
static struct source source;
static unsigned char *ram;

/* The callback's runs: those for which a thread waits, and those ahead of it. */
static atomic_uint demanded, ahead;
static _Atomic uint64_t demanded_bytes, ahead_bytes, longest_demanded, longest_ahead;
/* Runs ahead of demand block, or fail. */
static atomic_bool hold_ahead, fail_ahead;
static atomic_int held;
/* The page whose fills are held up. */
static _Atomic uint64_t hold_gpa = NO_GPA;
static atomic_int demand_held;
/* How many runs had been filled ahead when this page was asked for. */
static _Atomic uint64_t mark_gpa = NO_GPA;
static atomic_uint ahead_at_mark;
/* All the source's bytes, where fills have to be quick whatever the options of the compiler; else NULL. */
static unsigned char *image;

static void longest(_Atomic uint64_t *of, uint64_t length)
{
    uint64_t before = atomic_load(of);
    while (before < length && !atomic_compare_exchange_weak(of, &before, length))
        ;
}

static int fill(void *opaque, struct kuf_fill *fill)
{
    bool waits = fill->flags & KUF_RUN_DEMAND;
    longest(waits ? &longest_demanded : &longest_ahead, fill->len);
    if (waits) {
        atomic_fetch_add(&demanded, 1);
        atomic_fetch_add(&demanded_bytes, fill->len);
        if (atomic_load(&mark_gpa) == fill->gpa)
            atomic_store(&ahead_at_mark, atomic_load(&ahead));
        uint64_t gpa = atomic_load(&hold_gpa);
        if (gpa >= fill->gpa && gpa - fill->gpa < fill->len) {
            atomic_fetch_add(&demand_held, 1);
            while (atomic_load(&hold_gpa) == gpa)
                sleep_ms(1);
        }
    } else {
        atomic_fetch_add(&ahead, 1);
        atomic_fetch_add(&held, 1);
        while (atomic_load(&hold_ahead))
            sleep_ms(1);
        atomic_fetch_sub(&held, 1);
        if (atomic_load(&fail_ahead))
            return -EIO;
        atomic_fetch_add(&ahead_bytes, fill->len);
    }
    if (image != NULL) {
        fill->src = image + fill->memory_offset;
        return KUF_FILL_DONE;
    }
    return source_fill(opaque, fill);
}

static struct kuf *begin_part(struct kuf_options options)
{
    source = (struct source)SOURCE_INIT;
    demanded = ahead = 0;
    demand_held = 0;
    demanded_bytes = ahead_bytes = longest_demanded = longest_ahead = 0;
    options.fill = fill;
    options.event = source_event;
    options.release = source_release;
    options.opaque = &source;
    struct kuf *kuf = open_with(options);
    ram = map_anonymous(PAGES * page);
    add(kuf, BASE, ram, PAGES * page);
    return kuf;
}

static void end_part(struct kuf *kuf)
{
    close_with(kuf, KUF_END_POISON);
    munmap(ram, PAGES * page);
}

static uint64_t gpa_of(uint64_t n)
{
    return BASE + n * page;
}

static bool good(uint64_t n)
{
    return holds_content(ram + n * page, gpa_of(n), page, 1);
}

static uint64_t present(struct kuf *kuf)
{
    return progress_of(kuf, BASE).present / page;
}

/* A thread that touches one page. */
static void *touch_page(void *argument)
{
    return (void *)(uintptr_t)good((uintptr_t)argument);
}

static bool joins(pthread_t thread)
{
    void *result;
    pthread_join(thread, &result);
    return result != NULL;
}

static unsigned faults_of(struct kuf *kuf)
{
    return (unsigned)stats_of(kuf).faults;
}

/* ---- Sequential ---------------------------------------------------------------------------------------------------- */

/* Touches `count` pages from each start in turn, and lets the fills ahead finish. */
static void walk(struct kuf *kuf, const uint64_t *starts, unsigned streams, uint64_t count)
{
    uint64_t window[4] = {0}, here[4] = {0}, expected = present(kuf);
    bool right = true;
    for (uint64_t n = 0; n < count; n++)
        for (unsigned s = 0; s < streams; s++) {
            right = right && good(starts[s] + n);
            if (n == here[s]) {
                window[s] = window[s] == 0 ? 1 : window[s] * 2 * page > 2 << 20 ? window[s] : window[s] * 2;
                here[s] += window[s];
                expected += window[s];
            }
            wait_until(present(kuf) >= expected);
        }
    ok(right, "%u streams of %" PRIu64 " pages: each page has its own bytes", streams, count);
    comes_to(present(kuf), expected, "and no more came than the windows hold");
}

static void sequential(void)
{
    if (page != 4096) {
        skip_part("windows are counted in pages of 4096 bytes here");
        return;
    }
    struct kuf *kuf = begin_part((struct kuf_options){.size = 0});
    walk(kuf, (uint64_t[]){0}, 1, 7000);
    unsigned faults = faults_of(kuf);
    ok(faults <= 7000 / 100, "sequential: %u faults for 7000 pages", faults);
    is(atomic_load(&longest_demanded), 64 << 10, "the longest run for which a thread waits");
    ok(atomic_load(&longest_ahead) <= 256 << 10, "and the longest ahead of demand, %" PRIu64, longest_ahead);
    comes_to(stats_of(kuf).bytes_ahead, atomic_load(&ahead_bytes), "bytes ahead of demand are counted");
    is(stats_of(kuf).bytes_populated, 0, "and is not taken for populated");
    end_part(kuf);

    kuf = begin_part((struct kuf_options){.size = 0});
    walk(kuf, (uint64_t[]){0, 3000, 6000}, 3, 2000);
    faults = faults_of(kuf);
    ok(faults <= 3 * 2000 / 100, "three streams of one thread: %u faults for 6000 pages", faults);
    end_part(kuf);

    kuf = begin_part((struct kuf_options){.demand_run = 64 << 10});
    bool right = true;
    for (uint64_t n = 0; n < 4096; n++)
        right = right && good(n);
    ok(right, "demand_run of 64 KiB: pages in order");
    is(atomic_load(&ahead), 0, "nothing is left to be filled later");
    is(faults_of(kuf), 4 + 4096 / 16, "a fault each 64 KiB");
    end_part(kuf);
}

/* ---- Neither sequential nor dense ---------------------------------------------------------------------------------- */

static void sparse(void)
{
    struct kuf *kuf = begin_part((struct kuf_options){.size = 0});
    uint64_t touched = 0;
    bool right = true;
    /* 37 and 213 have no common factor with the number of pages. */
    for (uint64_t i = 0; i < 213; i++, touched++)
        right = right && good(i * 37 % 213 * 37);
    ok(right, "far apart and in no order: each page has its own bytes");
    is(atomic_load(&demanded_bytes) + atomic_load(&ahead_bytes), touched * page, "and nothing else was asked for");
    comes_to(present(kuf), touched, "or came");
    end_part(kuf);

    kuf = begin_part((struct kuf_options){.demand_run = page});
    for (uint64_t n = 0; n < 600; n++)
        right = right && good(n);
    for (uint64_t n = 0; n < 600; n++)
        right = right && good(1000 + n * 37 % 600);
    ok(right, "demand_run of one page: pages in order, and all of a place in no order");
    is(atomic_load(&demanded), 1200, "each by itself");
    is(atomic_load(&ahead), 0, "and none ahead");
    is(atomic_load(&longest_demanded), (long long)page, "one page a run");
    end_part(kuf);
}

/* ---- Dense --------------------------------------------------------------------------------------------------------- */

static void dense(void)
{
    if (page != 4096) {
        skip_part("places of 32 pages of 4096 bytes");
        return;
    }
    static const uint8_t order[] = {0, 5, 9, 14, 18, 24, 29};
    struct kuf *kuf = begin_part((struct kuf_options){.size = 0});
    bool right = true;
    for (unsigned i = 0; i < sizeof(order); i++)
        right = right && good(320 + order[i]);
    comes_to(present(kuf), sizeof(order), "below a quarter, each page comes by itself");
    right = right && good(320 + 20);
    is(atomic_load(&longest_demanded), 5 * (long long)page, "the eighth of 32 fills its neighbours, up to those that are there");
    /* Unless the source seems slow, which it does on a busy machine: then touchers demand the rest themselves. */
    for (int i = 0; i < 200 && present(kuf) < 32; i++)
        sleep_ms(1);
    bool filled_up = present(kuf) == 32;
    right = right && good(352 + 3);
    for (unsigned n = 0; n < 32; n++)
        right = right && good(320 + n * 13 % 32);
    ok(right, "each page has its own bytes");
    ok(faults_of(kuf) <= sizeof(order) + 2 + 10, "%u faults for 33 pages", faults_of(kuf));
    wait_until(present(kuf) >= 33 && progress_of(kuf, BASE).filling == 0);
    comes_to(atomic_load(&demanded_bytes) + atomic_load(&ahead_bytes), present(kuf) * page, "each is asked for once");
    ok(present(kuf) == 33 || !filled_up, "and none beyond");
    end_part(kuf);
}

/* Seven pages of the place of 32 that begins with `first`: one more makes it dense. */
static void nearly_dense(uint64_t first)
{
    static const uint8_t order[] = {0, 5, 9, 14, 18, 24, 29};
    for (unsigned i = 0; i < sizeof(order); i++)
        must(good(first + order[i]), "page %" PRIu64 " comes", first + order[i]);
}

/* The time of the quickest of some fills that this thread asks for one by one. */
static uint64_t quickest_fill(struct kuf *kuf)
{
    uint64_t quickest = UINT64_MAX;
    for (uint64_t n = 0; n < 32; n++) {
        uint64_t began = now_ns();
        must(kuf_ensure(kuf, gpa_of(64 + 64 * n), page, -1) == 0, "kuf_ensure: %s", kuf_error());
        uint64_t took = now_ns() - began;
        quickest = took < quickest ? took : quickest;
    }
    return quickest;
}

/*
 * The missing pages of a dense place are filled before the next fault, if fills have been quick lately, and without the
 * place of a demand fill. Only the machine decides whether they have been quick: the test tries one place after the
 * other.
 */
static void dense_first(void)
{
    enum { ROUNDS = 50, EIGHTH = 20 };
    if (page != 4096) {
        skip_part("places of 32 pages of 4096 bytes");
        return;
    }
    image = map_anonymous(PAGES * page);
    write_content(image, BASE, PAGES * page, 1);
    struct kuf *kuf = begin_part((struct kuf_options){.fill_threads = 1});
    uint64_t took = quickest_fill(kuf);
    end_part(kuf);
    /* Quick is below the cost of waking a thread, for which the library assumes 20 us. */
    if (took > 15000) {
        skip_part("no fill is quick on this machine: the quickest took %.1f us", (double)took / 1e3);
        munmap(image, PAGES * page);
        image = NULL;
        return;
    }
    kuf = begin_part((struct kuf_options){.fill_threads = 1});
    bool first = false, right = true;
    for (unsigned round = 0; round < ROUNDS && !first; round++) {
        uint64_t place = 320 + 64 * round, elsewhere = FAR_AWAY - 40 * round;
        nearly_dense(place);
        /* The only place for demand is taken: two faults are queued. */
        int before = atomic_load(&demand_held);
        unsigned brought = atomic_load(&ahead);
        atomic_store(&hold_gpa, gpa_of(elsewhere));
        pthread_t held_up = start(touch_page, (void *)(uintptr_t)elsewhere);
        wait_until(atomic_load(&demand_held) > before);
        unsigned faults = faults_of(kuf);
        pthread_t eighth = start(touch_page, (void *)(uintptr_t)(place + EIGHTH));
        wait_until(faults_of(kuf) == faults + 1);
        atomic_store(&mark_gpa, gpa_of(elsewhere - 20));
        pthread_t next = start(touch_page, (void *)(uintptr_t)(elsewhere - 20));
        wait_until(faults_of(kuf) == faults + 2);
        atomic_store(&hold_gpa, NO_GPA);
        right = joins(held_up) && joins(eighth) && joins(next) && right;
        first = atomic_load(&ahead_at_mark) > brought;
    }
    ok(right, "each page has its own bytes");
    ok(first, "missing pages in a dense place come before the next fault");
    end_part(kuf);

    kuf = begin_part((struct kuf_options){.fill_threads = 1});
    atomic_store(&hold_ahead, true);
    bool is_held = false;
    uint64_t elsewhere = FAR_AWAY;
    for (unsigned round = 0; round < ROUNDS && !is_held; round++) {
        nearly_dense(320 + 64 * round);
        right = good(320 + 64 * round + EIGHTH) && right;
        for (unsigned ms = 0; ms < 20 && !is_held; ms++) {
            sleep_ms(1);
            is_held = atomic_load(&held) == 1;
        }
    }
    ok(is_held, "it is held up");
    for (unsigned n = 0; n < 20; n++, elsewhere -= 40)
        right = good(elsewhere) && right;
    ok(right, "with one place for fills, others come meanwhile");
    atomic_store(&hold_ahead, false);
    end_part(kuf);
    munmap(image, PAGES * page);
    image = NULL;
}

/* ---- Waiting for readahead ------------------------------------------------------------------------------------------ */

/* Windows of 1, 2, 4, 8 and 16 pages, and one of 32: pages 47 to 62 are being filled ahead, and are held. */
static void walk_until_held(void)
{
    atomic_store(&hold_ahead, true);
    for (uint64_t n = 0; n < 32; n++)
        must(good(n), "page %" PRIu64 " comes", n);
    wait_until(atomic_load(&held) == 1);
}

static void nobody_waits(void)
{
    if (page != 4096) {
        skip_part("pages of 4096 bytes");
        return;
    }
    struct kuf *kuf = begin_part((struct kuf_options){.fill_threads = 1});
    walk_until_held();
    ok(joins(start(touch_page, (void *)(uintptr_t)FAR_AWAY)), "a page is filled while what is filled ahead is held up");
    ok(good(FAR_AWAY - 100) && good(FAR_AWAY - 200), "and others");

    /* The only place for demand is taken too: the library reads events all the same. */
    atomic_store(&hold_gpa, gpa_of(FAR_AWAY + 50));
    pthread_t waits = start(touch_page, (void *)(uintptr_t)(FAR_AWAY + 50));
    wait_until(atomic_load(&demand_held) == 1);
    is(madvise(ram + FAR_AWAY * page, page, MADV_DONTNEED), 0, "memory is given back with both held up");
    wait_until(stats_of(kuf).events_remove == 1);
    atomic_store(&hold_gpa, NO_GPA);
    ok(joins(waits), "the demanded page comes");
    ok(holds_zeroes(ram + FAR_AWAY * page, page), "pages that were given back are zero");

    /*
     * A toucher of a page whose fill blocks waits for that fill. If the page is discarded meanwhile, the source is
     * asked again.
     */
    pthread_t catches_up = start(touch_page, (void *)(uintptr_t)50);
    wait_until(stats_of(kuf).faults_joined >= 1);
    is(kuf_discard(kuf, gpa_of(48), 8 * page, KUF_DISCARD_REFILL), 0, "pages that are being filled ahead are discarded");
    is(kuf_discard(kuf, gpa_of(56), 2 * page, KUF_DISCARD_ZERO), 0, "and some are given back");
    atomic_store(&hold_ahead, false);
    ok(joins(catches_up), "the toucher gets its page");
    ok(holds_zeroes(ram + 56 * page, 2 * page), "pages that were given back are zero");
    ok(good(49) && good(55) && good(60), "the rest has its bytes");
    is(atomic_load(&source.events[poison_event()]), 0, "nothing was poisoned");
    end_part(kuf);
}

/* A discard ends the fills ahead in its slot: a run in a callback, and one that has not been asked for. */
static void discarded(void)
{
    if (page != 4096)
        return;
    struct kuf *kuf = begin_part((struct kuf_options){.size = 0});
    walk_until_held();
    for (uint64_t n = FAR_AWAY - 4000; n < FAR_AWAY - 4000 + 32; n++)
        must(good(n), "page %" PRIu64 " comes", n);
    unsigned asked = atomic_load(&ahead);
    is(kuf_discard(kuf, BASE, PAGES * page, KUF_DISCARD_REFILL), 0, "everything is discarded while a run that is filled ahead is held up");
    atomic_store(&source.answer, KUF_FILL_DEFERRED);
    atomic_store(&hold_ahead, false);
    wait_until(stats_of(kuf).fills_deferred >= 1);
    sleep_ms(20);
    is(atomic_load(&ahead), asked, "nothing more is filled ahead");
    is(kuf_pending(kuf, NULL, 0), 0, "and no page is owed for which no thread waits");
    atomic_store(&source.answer, 0);
    is(kuf_ensure(kuf, BASE, PAGES * page, 30000), 0, "every page is filled when it is asked for");
    struct kuf *handle = kuf;
    is(kuf_close(&handle, 0), 0, "and the handle can be closed");
    if (handle != NULL)
        end_part(kuf);
    else
        munmap(ram, PAGES * page);
}

/* ---- Every thread that served is blocked ---- */

static atomic_bool blocking, go, blocks;
static atomic_int blocked_ahead;

/* Quick, until a run ahead of demand lets another page be touched, whose fill blocks, as does the next run. */
static int fill_then_block(void *opaque, struct kuf_fill *fill)
{
    if (!(fill->flags & KUF_RUN_DEMAND) && atomic_exchange(&blocking, false)) {
        atomic_store(&go, true);
        for (uint64_t until = now_ns() + 250000; now_ns() < until;)
            ;
    } else if (fill->flags & KUF_RUN_DEMAND && fill->gpa == gpa_of(7000)) {
        atomic_fetch_add(&demand_held, 1);
        while (atomic_load(&blocks))
            sleep_ms(1);
    } else if (!(fill->flags & KUF_RUN_DEMAND) && atomic_load(&demand_held)) {
        atomic_fetch_add(&blocked_ahead, 1);
        while (atomic_load(&blocks))
            sleep_ms(1);
    }
    return source_fill(opaque, fill);
}

static void *touch_when_told(void *unused)
{
    (void)unused;
    while (!atomic_load(&go))
        ;
    return (void *)(uintptr_t)good(7000);
}

/*
 * A fill of a quick source blocks, and so does a fill ahead on the thread that has taken the lead since: a third thread
 * reads the kernel. The scheduler decides which thread gets which fill, so the test repeats until this happens.
 */
static void both_block(void)
{
    bool came = false;
    for (int round = 0; round < 20 && !came; round++) {
        atomic_store(&blocking, false);
        atomic_store(&go, false);
        atomic_store(&blocks, true);
        demand_held = blocked_ahead = 0;
        source = (struct source)SOURCE_INIT;
        struct kuf *kuf = open_with((struct kuf_options){
            .fill = fill_then_block, .fill_threads = 2, .userfaultfds = 1, .opaque = &source, .event = source_event});
        ram = map_anonymous(PAGES * page);
        add(kuf, BASE, ram, PAGES * page);
        pthread_t other = start(touch_when_told, NULL);
        bool served = true;
        for (uint64_t n = 0; n < 1023; n++)
            served = good(n) && served;
        sleep_ms(5);
        atomic_store(&blocking, true);
        served = good(1023) && served;
        for (int i = 0; i < 200 && !(atomic_load(&demand_held) && atomic_load(&blocked_ahead)); i++)
            sleep_ms(1);
        came = atomic_load(&demand_held) && atomic_load(&blocked_ahead);
        served = good(7500) && served;
        must(madvise(ram + 7800 * page, page, MADV_DONTNEED) == 0, "madvise");
        atomic_store(&blocks, false);
        atomic_store(&go, true);
        ok(joins(other) && served, "pages are served and events read while two threads are held up (%s)",
           came ? "they were" : "one was");
        end_part(kuf);
    }
}

/* Releases the held fill a moment after the main thread has begun to wait for it. */
static void *let_go_soon(void *unused)
{
    (void)unused;
    sleep_ms(5);
    atomic_store(&hold_ahead, false);
    return NULL;
}

/* Once is enough: on a busy machine a round may take longer than the library waits. */
static void removal_waits(void)
{
    bool at_once = false;
    for (int round = 0; round < 20 && !at_once; round++) {
        struct kuf *kuf = begin_part((struct kuf_options){.size = 0});
        walk_until_held();
        pthread_t lets_go = start(let_go_soon, NULL);
        at_once = kuf_remove_memory(kuf, BASE, KUF_END_POISON) == 0;
        pthread_join(lets_go, NULL);
        end_part(kuf);
    }
    ok(at_once, "taking a slot off waits for what is filled ahead at that moment");
}

static void ends(void)
{
    if (page != 4096)
        return;
    removal_waits();
    struct kuf *kuf = begin_part((struct kuf_options){.size = 0});
    walk_until_held();
    is(kuf_remove_memory(kuf, BASE, KUF_END_POISON), -EBUSY, "a slot is not taken off while its pages are filled: %s",
       kuf_error());
    atomic_store(&hold_ahead, false);
    is(remove_patiently(kuf, BASE), 0, "and is when they have come");
    uint64_t asked = atomic_load(&ahead_bytes);
    sleep_ms(20);
    is(atomic_load(&ahead_bytes), asked, "no more is asked for");
    munmap(ram, PAGES * page);
    ram = map_anonymous(PAGES * page);
    add(kuf, BASE, ram, PAGES * page);
    walk_until_held();
    is(kuf_close(&kuf, KUF_END_POISON | KUF_END_NOWAIT), 0, "a handle is closed without waiting");
    is(atomic_load(&source.released), 0, "the callback is running still");
    atomic_store(&hold_ahead, false);
    wait_until(atomic_load(&source.released) == 1);
    is(touch(ram + 60 * page), poison_signal(), "the bytes that it wrote too late are not seen");
    munmap(ram, PAGES * page);
}

static void fails(void)
{
    if (page != 4096)
        return;
    struct kuf *kuf = begin_part((struct kuf_options){.fill_threads = 1});
    atomic_store(&fail_ahead, true);
    bool right = true;
    for (uint64_t n = 0; n < 1000; n++)
        right = right && good(n);
    ok(right, "all that is filled ahead fails: each page is asked for again when it is touched");
    ok(stats_of(kuf).fills_failed > 0 && atomic_load(&ahead) > 0, "it did fail");
    is(atomic_load(&source.events[poison_event()]), 0, "nothing is poisoned");
    comes_to(progress_of(kuf, BASE).poisoned, 0, "at all");

    atomic_store(&fail_ahead, false);
    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.bad_gpa, gpa_of(2048 + 40));
    for (uint64_t n = 2048; n < 2048 + 40; n++)
        right = right && good(n);
    ok(right, "up to a page that is bad, all are good");
    is(touch(ram + (2048 + 40) * page), poison_signal(), "the bad one is not");
    ok(good(2048 + 41) && good(2048 + 47), "those behind it are");
    comes_to(progress_of(kuf, BASE).poisoned, page, "one page is poisoned");
    atomic_store(&source.bad_gpa, NO_GPA);
    end_part(kuf);
}

/* ---- Recorded ------------------------------------------------------------------------------------------------------ */

static void recorded(void)
{
    if (page != 4096)
        return;
    struct kuf *kuf = begin_part((struct kuf_options){.size = 0});
    is(kuf_record_start(kuf, 0), 0, "recording starts");
    walk(kuf, (uint64_t[]){0}, 1, 3000);
    int fd = memfd_create("recording", MFD_CLOEXEC);
    is(kuf_record_stop(kuf, fd), 0, "and ends");
    end_part(kuf);
    kuf = begin_part((struct kuf_options){.size = 0});
    lseek(fd, 0, SEEK_SET);
    is(kuf_replay(kuf, fd, 0), 0, "it is replayed");
    wait_until(atomic_load(&source.events[KUF_EVENT_REPLAYED]) == 1);
    /* Faults at 0, 1, 3, ... 511, 1023, 1535, 2047 and 2559. */
    is(present(kuf), 2559 + 16, "the pages up to the last fault are present, and those of its run");
    bool right = true;
    for (uint64_t n = 0; n < 2559; n++)
        right = right && good(n);
    ok(right && faults_of(kuf) == 0, "without another fault");
    close(fd);
    end_part(kuf);
}

/* ---- Deferred ------------------------------------------------------------------------------------------------------ */

static int defer(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    if (!(fill->flags & KUF_RUN_DEMAND))
        return KUF_FILL_DEFERRED;
    write_content(fill->buf, fill->gpa, fill->len, 1);
    return KUF_FILL_DONE;
}

static void deferred(void)
{
    if (page != 4096)
        return;
    struct kuf *kuf = open_with((struct kuf_options){.fill = defer, .fill_threads = 1});
    ram = map_anonymous(PAGES * page);
    add(kuf, BASE, ram, PAGES * page);
    bool right = true;
    for (uint64_t n = 0; n < 32; n++)
        right = right && good(n);
    ok(right, "the pages for which threads wait come at once");
    wait_until(progress_of(kuf, BASE).deferred == 16 * page);
    struct kuf_fault owed = {0};
    is(kuf_pending(kuf, &owed, 1), 1, "those ahead of demand are owed");
    ok(owed.gpa == gpa_of(47) && owed.len == 16 * page && !(owed.flags & KUF_FAULT_DEMAND), "as such");
    unsigned char *bytes = map_anonymous(owed.len);
    write_content(bytes, owed.gpa, owed.len, 1);
    is(kuf_resolve(kuf, owed.gpa, bytes, owed.len, 0), (long long)owed.len, "and are resolved");
    is(stats_of(kuf).bytes_ahead, (long long)owed.len, "they count as filled ahead");
    is(stats_of(kuf).bytes_populated, 0, "and not as populated");
    ok(good(47) && good(62), "with their bytes");
    munmap(bytes, owed.len);
    end_part(kuf);
}

int main(void)
{
    begin();
    page = page_size();
    sequential();
    sparse();
    dense();
    dense_first();
    nobody_waits();
    discarded();
    both_block();
    ends();
    fails();
    recorded();
    deferred();
    return done();
}
