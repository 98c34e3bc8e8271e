/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Faults that outlive their slot, and callbacks that call back on the library's only free thread: no thread waits for
 * ever, and no page of another slot is installed.
 */
#include "touches.h"
#include "watched.h"

#define BASE UINT64_C(0x80000000)
#define OTHER UINT64_C(0x90000000)
enum { PAGES = 16 };

static struct source source = SOURCE_INIT;
static _Atomic uint64_t hold_gpa = NO_GPA;
static atomic_int held;

static int fill(void *opaque, struct kuf_fill *fill)
{
    uint64_t gpa = atomic_load(&hold_gpa);
    if (gpa != NO_GPA && fill->gpa <= gpa && gpa - fill->gpa < fill->len) {
        atomic_fetch_add(&held, 1);
        while (atomic_load(&hold_gpa) == gpa)
            sleep_ms(1);
    }
    return source_fill(opaque, fill);
}

/* A second fault for a page waits in the library while the page is filled, the slot taken off and its memory put back. */
static void fault_outlives_slot(void)
{
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length), *other = map_anonymous(length);
    struct kuf *kuf = watch(open_with((struct kuf_options){
        .fill = fill, .event = source_event, .opaque = &source, .demand_run = page, .fill_threads = 1}));
    add(kuf, BASE, ram, page);
    add(kuf, OTHER, other, length);
    struct one_touch first, between, second;
    atomic_store(&hold_gpa, BASE);
    touch_in_thread(&first, ram);
    wait_until(atomic_load(&held) == 1);
    touch_in_thread(&between, other + 3 * page);
    wait_until(stats_of(kuf).faults == 2);
    touch_in_thread(&second, ram);
    wait_until(stats_of(kuf).faults == 3);
    /*
     * The one worker continues from the first page to the page of the other slot; the second fault stays queued after
     * that.
     */
    atomic_store(&hold_gpa, OTHER + 3 * page);
    wait_until(atomic_load(&held) == 2);
    pthread_join(first.thread, NULL);
    pthread_join(second.thread, NULL);
    is(kuf_remove_memory(kuf, BASE, 0), 0, "a slot is complete and taken off while a fault for it is still queued");
    must(madvise(ram, page, MADV_DONTNEED) == 0, "its memory is emptied");
    add(kuf, BASE, ram, page);
    atomic_store(&hold_gpa, NO_GPA);
    pthread_join(between.thread, NULL);
    wait_until(progress_of(kuf, KUF_ALL).filling == 0);
    sleep_ms(20);
    ok(holds_content(ram, BASE, page, 1), "the new slot on the same memory is filled from the source");
    ok(holds_content(other, OTHER, length, 1), "and so is the other");
    close_watched(kuf, KUF_END_POPULATE);
    munmap(ram, length);
    munmap(other, length);
}

struct giver {
    unsigned char *at;
    int rounds;
};

static void *give_and_touch(void *argument)
{
    struct giver *giver = argument;
    for (int i = 0; i < giver->rounds; i++) {
        must(madvise(giver->at, page_size(), MADV_DONTNEED) == 0, "madvise");
        if (*(volatile unsigned char *)giver->at != 0)
            ok(false, "a page that was given back reads as zero");
    }
    return NULL;
}

/* Events and faults come one after the other in one read, again and again. */
static void give_back_and_touch(void)
{
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length);
    struct kuf *kuf = watch(open_with((struct kuf_options){
        .fill = fill, .event = source_event, .opaque = &source, .fill_threads = 2}));
    add(kuf, BASE, ram, length);
    struct giver giver[6];
    pthread_t thread[6];
    for (int i = 0; i < 6; i++) {
        giver[i] = (struct giver){ram + (size_t)i * page, 3000};
        thread[i] = start(give_and_touch, &giver[i]);
    }
    for (int i = 0; i < 6; i++)
        pthread_join(thread[i], NULL);
    ok(true, "six threads give pages back and touch them, and all of them end");
    close_watched(kuf, KUF_END_POPULATE);
    munmap(ram, length);
}

/* Page 0 is served when page 1 is: both are touched at once. */
static _Atomic(struct kuf *) patient_kuf;
static atomic_bool second_filled;

static int patient_fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    if (fill->gpa == BASE)
        while (!atomic_load(&second_filled))
            sleep_ms(1);
    write_content(fill->buf, fill->gpa, fill->len, 1);
    if (fill->gpa != BASE)
        atomic_store(&second_filled, true);
    return KUF_FILL_DONE;
}

static void *touch_at_once(void *argument)
{
    struct one_touch *one = argument;
    /* First in, first out, before any thread of the library gets the processor. */
    struct sched_param high = {.sched_priority = 10};
    pthread_setschedparam(pthread_self(), SCHED_FIFO, &high);
    return one_touch_body(one);
}

static void blocked_fill_of_two_at_once(void)
{
    size_t page = page_size(), length = PAGES * page;
    cpu_set_t before, one_cpu;
    must(sched_getaffinity(0, sizeof(before), &before) == 0, "affinity");
    int cpu = 0;
    while (!CPU_ISSET(cpu, &before))
        cpu++;
    CPU_ZERO(&one_cpu);
    CPU_SET(cpu, &one_cpu);
    int served = 0;
    for (int round = 0; round < 20; round++) {
        atomic_store(&second_filled, false);
        unsigned char *ram = map_anonymous(length);
        sched_setaffinity(0, sizeof(one_cpu), &one_cpu);
        struct kuf *kuf = watch(open_with((struct kuf_options){
            .fill = patient_fill, .opaque = &patient_kuf, .fill_threads = 2, .demand_run = page}));
        add(kuf, BASE, ram, length);
        struct one_touch touch[2] = {{.at = ram}, {.at = ram + page}};
        struct sched_param high = {.sched_priority = 20}, normal = {0};
        bool real_time = pthread_setschedparam(pthread_self(), SCHED_FIFO, &high) == 0;
        for (int i = 0; i < 2; i++)
            touch[i].thread = start(touch_at_once, &touch[i]);
        pthread_setschedparam(pthread_self(), SCHED_OTHER, &normal);
        if (round == 0 && !real_time)
            skip_part("no real-time scheduling: two faults at once are left to chance");
        for (int i = 0; i < 2; i++)
            pthread_join(touch[i].thread, NULL);
        served += touch[0].raised == 0 && touch[1].raised == 0;
        sched_setaffinity(0, sizeof(before), &before);
        close_watched(kuf, KUF_END_POPULATE);
        munmap(ram, length);
    }
    is(served, 20, "two faults at once: a blocked fill delays no other page while a thread is free");
}

/* The only thread of a caller-driven service raises an event whose callback drops a page: the kernel has to be read for that. */
static struct kuf *event_kuf;
static atomic_int dropped;

static void dropping_event(void *opaque, const struct kuf_event *event)
{
    (void)opaque;
    if (event->kind == KUF_EVENT_COMPLETE && atomic_fetch_add(&dropped, 1) == 0)
        is(kuf_discard(event_kuf, BASE, page_size(), KUF_DISCARD_REFILL), 0, "an event callback drops a page");
}

static void event_callback_drops(void)
{
    size_t page = page_size(), length = PAGES * page;
    unsigned char *ram = map_anonymous(length), *bytes = map_anonymous(length);
    event_kuf = watch(open_with((struct kuf_options){.event = dropping_event}));
    add(event_kuf, BASE, ram, length);
    write_content(bytes, BASE, length, 1);
    is(kuf_resolve(event_kuf, BASE, bytes, length - page, 0), length - page, "all but one page are resolved");
    must(madvise(ram + length - page, page, MADV_DONTNEED) == 0, "the last is given back");
    wait_until(atomic_load(&dropped) > 0 && progress_of(event_kuf, BASE).absent == page);
    is(kuf_resolve(event_kuf, BASE, bytes, page, 0), page, "the page that was dropped is resolved again");
    ok(holds_content(ram, BASE, length - page, 1), "and holds its bytes");
    close_watched(event_kuf, 0);
    munmap(ram, length);
    munmap(bytes, length);
}

int main(int argc, char **argv)
{
    int only = argc > 1 ? atoi(argv[1]) : 0;
    begin_watched(30);
    catch_touches();
    if (only == 0 || only == 1)
        fault_outlives_slot();
    if (only == 0 || only == 2)
        give_back_and_touch();
    if (only == 0 || only == 3)
        blocked_fill_of_two_at_once();
    if (only == 0 || only == 4)
        event_callback_drops();
    return done();
}
