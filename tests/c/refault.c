/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A thread that waits for a page and takes signals faults again after each of them, as an interrupted vCPU does. It is
 * one wait all the same, wherever the earlier fault is kept: with a pending page, in the library's queue, or in memory
 * of an adopted userfaultfd that is in no slot yet.
 */
#include "uffd.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 16, AGAIN = 300 };

static struct source source = SOURCE_INIT;
static struct kuf *kuf;

static void nothing(int signal_number)
{
    (void)signal_number;
}

struct waiting {
    const unsigned char *at;
    pthread_t thread;
    _Atomic uint32_t tid;
    uint64_t began_ns;
};

static void *waiting_body(void *argument)
{
    struct waiting *waiting = argument;
    waiting->began_ns = now_ns();
    atomic_store(&waiting->tid, (uint32_t)syscall(SYS_gettid));
    (void)*(volatile const unsigned char *)waiting->at;
    return NULL;
}

/* Returns when the thread has faulted there again and again. */
static void faults_again(struct waiting *waiting, const unsigned char *at)
{
    *waiting = (struct waiting){.at = at};
    uint64_t faults = stats_of(kuf).faults;
    waiting->thread = start(waiting_body, waiting);
    while (stats_of(kuf).faults < faults + AGAIN) {
        if (stats_of(kuf).faults > faults)
            pthread_kill(waiting->thread, SIGUSR1);
        sched_yield();
    }
}

static bool time_of(uint32_t tid, struct kuf_block_time *time)
{
    static struct kuf_block_time all[64];
    ssize_t n = kuf_block_times(kuf, all, 64);
    for (ssize_t i = 0; i < n && i < 64; i++)
        if (all[i].thread == tid) {
            *time = all[i];
            return true;
        }
    return false;
}

static void waited_once(struct waiting *waiting, const char *what)
{
    pthread_join(waiting->thread, NULL);
    uint32_t tid = atomic_load(&waiting->tid);
    struct kuf_block_time time = {0};
    /* The thread continues before it has been counted. */
    wait_until(time_of(tid, &time));
    /* Faults that were on their way when the page came are counted by now, or soon. */
    sleep_ms(20);
    time_of(tid, &time);
    uint64_t most = now_ns() - waiting->began_ns;
    /* One that was read while the page was installed is a wait of its own, of length 0. */
    ok(time.faults <= 2, "%s: it has waited once (%" PRIu64 ")", what, time.faults);
    ok(time.max_ns <= most, "%s: not longer than it has", what);
    ok(time.total_ns <= 2 * most, "%s: and not many times", what);
}

static void owed(void)
{
    size_t page = page_size();
    unsigned char *ram = map_anonymous(PAGES * page), *bytes = map_anonymous(page);
    kuf = open_with((struct kuf_options){.fill = source_fill, .opaque = &source, .demand_run = page});
    add(kuf, BASE, ram, PAGES * page);
    atomic_store(&source.answer, KUF_FILL_DEFERRED);
    struct waiting waiting;
    faults_again(&waiting, ram);
    atomic_store(&source.answer, 0);
    is(atomic_load(&source.calls), 1, "the source is asked once");
    write_content(bytes, BASE, page, 1);
    is(kuf_resolve(kuf, BASE, bytes, page, 0), (ssize_t)page, "the page comes");
    waited_once(&waiting, "a page that is owed");
    close_with(kuf, KUF_END_POISON);
    munmap(ram, PAGES * page);
    munmap(bytes, page);
}

static void queued(void)
{
    size_t page = page_size();
    unsigned char *ram = map_anonymous(PAGES * page);
    kuf = open_with((struct kuf_options){.fill = source_fill, .opaque = &source, .demand_run = page, .fill_threads = 1});
    add(kuf, BASE, ram, PAGES * page);
    atomic_store(&source.hold, true);
    struct toucher toucher = {.memory = ram, .gpa = BASE, .length = page, .generation = 1};
    start_toucher(&toucher);
    wait_until(atomic_load(&source.inside) == 1);
    struct waiting waiting;
    faults_again(&waiting, ram + page);
    atomic_store(&source.hold, false);
    waited_once(&waiting, "a queued fault");
    ok(join_toucher(&toucher), "the other page has its bytes");
    comes_to(stats_of(kuf).fills, 2, "each page is filled once");
    close_with(kuf, KUF_END_POISON);
    munmap(ram, PAGES * page);
}

static void in_no_slot(void)
{
    size_t page = page_size();
    int uffd = own_userfaultfd(UFFD_FEATURE_THREAD_ID);
    unsigned char *first = map_anonymous(page), *second = map_anonymous(page);
    kuf = open_with((struct kuf_options){
        .fill = source_fill, .opaque = &source, .flags = KUF_OPEN_ADOPT_ONLY, .demand_run = page});
    struct uffdio_register range = {.range = {(uintptr_t)second, page}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    must(ioctl(uffd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER: %s", strerror(errno));
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = page,
                                .hva = (uintptr_t)first, .uffd = uffd};
    is(kuf_add_memory(kuf, &memory), 0, "a slot is added");
    struct waiting waiting;
    faults_again(&waiting, second);
    memory.gpa = BASE + page;
    memory.hva = (uintptr_t)second;
    is(kuf_add_memory(kuf, &memory), 0, "the slot that was touched is added");
    waited_once(&waiting, "a fault in no slot");
    close_with(kuf, KUF_END_POISON);
    close(uffd);
    munmap(first, page);
    munmap(second, page);
}

int main(void)
{
    begin();
    needs_feature(KUF_FEATURE_THREAD_ID, "thread ids");
    struct sigaction action = {.sa_handler = nothing, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    owed();
    queued();
    in_no_slot();
    return done();
}
