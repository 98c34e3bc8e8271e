/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kuf_fill.thread, the thread of a fault; and kuf_watch_threads: the time in which all threads of a set waited at once.
 */
#include "harness.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 64 };

static struct kuf *kuf;
static unsigned char *ram, *bytes;
static _Atomic uint32_t asked_for[PAGES];
static atomic_int asked;

static int defer(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    uint64_t page = fill->memory_offset / page_size();
    for (uint64_t i = 0; i < fill->len / page_size(); i++)
        atomic_store(&asked_for[page + i], fill->thread);
    ok(fill->reserved == 0, "the reserved field is 0");
    atomic_fetch_add(&asked, 1);
    return KUF_FILL_DEFERRED;
}

/* Threads that touch the pages that they are told to, one after the other: the vCPUs. */
struct vcpu {
    pthread_t thread;
    _Atomic uint32_t tid;
    atomic_int page, done;
};

static void *vcpu_body(void *argument)
{
    struct vcpu *vcpu = argument;
    atomic_store(&vcpu->tid, (uint32_t)syscall(SYS_gettid));
    for (int last = 0;;) {
        int page;
        while ((page = atomic_load(&vcpu->page)) == last)
            sleep_ms(1);
        if (page < 0)
            return NULL;
        must(holds_content(ram + page * page_size(), BASE + page * page_size(), page_size(), 1), "its bytes are there");
        atomic_store(&vcpu->done, page);
        last = page;
    }
}

static void start_vcpu(struct vcpu *vcpu)
{
    *vcpu = (struct vcpu){.page = 0};
    vcpu->thread = start(vcpu_body, vcpu);
    wait_until(atomic_load(&vcpu->tid) != 0);
}

/* Touches a page, and returns when the library knows. */
static void blocks_at(struct vcpu *vcpu, int page)
{
    uint64_t faults = stats_of(kuf).faults;
    atomic_store(&vcpu->page, page);
    wait_until(stats_of(kuf).faults == faults + 1);
}

static void goes_on(struct vcpu *vcpu, int page)
{
    write_content(bytes, BASE + page * page_size(), page_size(), 1);
    is(kuf_resolve(kuf, BASE + page * page_size(), bytes, page_size(), 0), (ssize_t)page_size(), "page %d comes", page);
    wait_until(atomic_load(&vcpu->done) == page);
}

static uint64_t overlap(void)
{
    return stats_of(kuf).blocked_all_ns;
}

/* A thread whose page is poisoned while it waits. */
struct victim {
    const unsigned char *at;
    _Atomic uint32_t tid;
    atomic_bool watched;
    int raised;
};

static void *victim_body(void *argument)
{
    struct victim *victim = argument;
    atomic_store(&victim->tid, (uint32_t)syscall(SYS_gettid));
    while (!atomic_load(&victim->watched))
        sleep_ms(1);
    victim->raised = touch(victim->at);
    return NULL;
}

/* Waits that end with the service of their page, and not because the page is filled. */
static void ends_without_the_page(bool closes_slot, const char *what)
{
    const uint64_t gpa = BASE << 1;
    size_t page = page_size();
    unsigned char *memory = map_anonymous(4 * page);
    add(kuf, gpa, memory, 4 * page);
    struct victim victim = {.at = memory};
    pthread_t thread = start(victim_body, &victim);
    wait_until(atomic_load(&victim.tid) != 0);
    uint32_t tid = atomic_load(&victim.tid);
    uint64_t faults = stats_of(kuf).faults, before = overlap();
    is(kuf_watch_threads(kuf, &tid, 1), 0, "one thread is watched");
    atomic_store(&victim.watched, true);
    wait_until(stats_of(kuf).faults == faults + 1);
    sleep_ms(2);
    ok(overlap() > before, "it waits");
    if (closes_slot)
        is(remove_patiently(kuf, gpa), 0, "the slot is removed");
    else
        is(kuf_resolve(kuf, gpa, NULL, page, KUF_RESOLVE_POISON), (ssize_t)page, "the page is poisoned");
    pthread_join(thread, NULL);
    is(victim.raised, poison_signal(), "the thread goes on, with an error");
    uint64_t counted = overlap();
    sleep_ms(5);
    is(overlap(), counted, "%s: the wait is over", what);
    kuf_watch_threads(kuf, NULL, 0);
    if (!closes_slot)
        is(remove_patiently(kuf, gpa), 0, "the slot is removed");
    munmap(memory, 4 * page);
}

int main(void)
{
    begin();
    needs_feature(KUF_FEATURE_THREAD_ID, "thread ids");
    ram = map_anonymous(PAGES * page_size());
    bytes = map_anonymous(page_size());
    kuf = open_with((struct kuf_options){.fill = defer, .demand_run = page_size()});
    add(kuf, BASE, ram, PAGES * page_size());
    struct vcpu a, b, other;
    start_vcpu(&a);
    start_vcpu(&b);
    start_vcpu(&other);

    blocks_at(&a, 1);
    wait_until(atomic_load(&asked) == 1);
    is(atomic_load(&asked_for[1]), atomic_load(&a.tid), "the callback is told whose fault it is");
    blocks_at(&b, 2);
    is(overlap(), 0, "no thread is watched, nothing is counted");
    goes_on(&a, 1);
    goes_on(&b, 2);

    uint32_t tids[] = {atomic_load(&a.tid), atomic_load(&b.tid), atomic_load(&a.tid)};
    is(kuf_watch_threads(kuf, tids, 3), 0, "two threads are watched, one of them is named twice");
    blocks_at(&a, 3);
    blocks_at(&other, 4);
    sleep_ms(5);
    is(overlap(), 0, "one of them and one that is not watched wait: nothing is counted");
    uint64_t begin_ns = now_ns();
    blocks_at(&b, 3);
    uint64_t both_ns = now_ns();
    sleep_ms(20);
    uint64_t running = overlap();
    ok(running >= 20 * 1000000u && running <= now_ns() - begin_ns, "both wait, for the same page: it is counted while it lasts");
    uint64_t ending_ns = now_ns();
    goes_on(&a, 3);
    wait_until(atomic_load(&b.done) == 3);
    uint64_t counted = overlap();
    ok(counted >= ending_ns - both_ns && counted <= now_ns() - begin_ns, "and when it has ended");
    sleep_ms(5);
    is(overlap(), counted, "and not afterwards");

    blocks_at(&a, 5);
    blocks_at(&b, 6);
    goes_on(&b, 6);
    uint64_t more = overlap();
    ok(more > counted, "the time that they share is added");
    sleep_ms(5);
    is(overlap(), more, "one of them goes on, and it has ended");
    is(kuf_watch_threads(kuf, NULL, 0), 0, "no thread is watched any more");
    blocks_at(&b, 7);
    sleep_ms(5);
    is(overlap(), more, "and what was counted stays");

    struct kuf_block_time times[4];
    ok(kuf_block_times(kuf, times, 4) >= 2, "the times of each thread are there all the same");
    goes_on(&a, 5);
    goes_on(&b, 7);
    goes_on(&other, 4);
    struct vcpu *all[] = {&a, &b, &other};
    for (int i = 0; i < 3; i++) {
        atomic_store(&all[i]->page, -1);
        pthread_join(all[i]->thread, NULL);
    }
    ends_without_the_page(false, "KUF_RESOLVE_POISON");
    ends_without_the_page(true, "kuf_remove_memory");
    is(kuf_ensure(kuf, BASE + 20 * page_size(), page_size(), 0), -ETIMEDOUT, "kuf_ensure");
    is(atomic_load(&asked_for[20]), 0, "its callback is on the thread that waits, and is told no id");
    close_with(kuf, KUF_END_POISON);
    return done();
}
