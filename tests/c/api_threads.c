/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Every call from many threads at one handle, which is then closed under them: each call returns, none hangs. */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
#define EXTRA UINT64_C(0x90000000)
enum { PAGES = 128, THREADS = 10, ROUNDS = 6, CALLS_BEFORE = 200 };

static struct source source;
static struct kuf *_Atomic shared_handle;
static atomic_long calls[THREADS];
static unsigned char *extra;
static bool driven;

/* No page of Linux is larger. */
enum { PAGE_MAX = 64 << 10 };

/* The `n`th call of thread `which`, with the results that are allowed while the handle is open. */
static long call(struct kuf *kuf, int which, long n, bool *fine)
{
    size_t page = page_size();
    uint64_t gpa = BASE + (uint64_t)(n * 7 % PAGES) * page;
    long got;
    switch (which) {
    case 0: {
        unsigned char bytes[PAGE_MAX];
        write_content(bytes, gpa, page, 1);
        got = kuf_resolve(kuf, gpa, bytes, page, 0);
        *fine = got == 0 || got == (long)page;
        return got;
    }
    case 1:
        got = kuf_ensure(kuf, gpa, page, driven ? 1 : -1);
        *fine = got == 0 || (driven && got == -ETIMEDOUT);
        return got;
    case 2:
        if (driven)
            return call(kuf, 1, n, fine);
        got = kuf_vcpu_fault(kuf, gpa + 8, 8, 0);
        *fine = got == 0;
        return got;
    case 3:
        got = kuf_discard(kuf, gpa, page, n % 5 == 0 ? KUF_DISCARD_ZERO : KUF_DISCARD_REFILL);
        *fine = got == 0;
        return got;
    case 4: {
        struct kuf_populate_request request = {.size = sizeof(request), .gpa = n % 2 ? gpa : KUF_ALL, .len = n % 2 ? page : 0};
        if (n % 7 == 0)
            request.flags = KUF_POPULATE_STOP;
        got = kuf_populate(kuf, &request);
        *fine = got == (driven ? -ENOTSUP : 0) || (driven && got == 0);
        return got;
    }
    case 5: {
        struct kuf_fault faults[8];
        got = kuf_pending(kuf, faults, 8);
        *fine = got >= 0;
        return got;
    }
    case 6: {
        struct kuf_progress_info progress = {.size = sizeof(progress)};
        got = kuf_progress(kuf, n % 2 ? KUF_ALL : BASE, &progress);
        *fine = got == 0;
        return got;
    }
    case 7: {
        struct kuf_stats_info stats = {.size = sizeof(stats)};
        struct kuf_block_time times[4];
        got = n % 2 ? kuf_stats(kuf, &stats) : kuf_block_times(kuf, times, 4);
        *fine = got >= 0;
        return got;
    }
    case 8: {
        struct kuf_memory memory = {.size = sizeof(memory), .gpa = EXTRA, .len = 4 * page, .hva = (uintptr_t)extra};
        if (n % 2 == 0) {
            got = kuf_add_memory(kuf, &memory);
            *fine = got == 0 || got == -EEXIST;
        } else {
            got = kuf_remove_memory(kuf, EXTRA, KUF_END_POISON);
            *fine = got == 0 || got == -EBUSY;
            /* Poison markers go with the pages. */
            madvise(extra, 4 * page, MADV_DONTNEED);
        }
        return got;
    }
    default: {
        struct kuf_fault fault;
        unsigned char bytes[PAGE_MAX];
        if (!driven) {
            got = n % 2 ? kuf_poll(kuf, 0) : kuf_fd(kuf);
            *fine = got == -ENOTSUP;
            return got;
        }
        got = kuf_poll(kuf, n % 4 == 0 ? 1 : 0);
        *fine = got == 0 || got == 1;
        if (got != 1)
            return got;
        got = kuf_read(kuf, &fault, 1);
        *fine = got == 1 || got == -EAGAIN;
        if (got == 1 && fault.gpa >= BASE && fault.gpa < BASE + PAGES * page) {
            write_content(bytes, fault.gpa, page, 1);
            long resolved = kuf_resolve(kuf, fault.gpa, bytes, page, 0);
            *fine = resolved == 0 || resolved == (long)page;
            return resolved;
        }
        return got;
    }
    }
}

struct caller {
    int which;
    long last;
    atomic_bool ended;
};

static void *hammer(void *argument)
{
    struct caller *caller = argument;
    struct kuf *kuf = atomic_load(&shared_handle);
    for (long n = 0;; n++) {
        bool fine = false;
        long got = call(kuf, caller->which, n, &fine);
        atomic_fetch_add(&calls[caller->which], 1);
        /* Once closing has begun: this errno and no other. */
        if (got == -EBADF)
            return NULL;
        if (!fine && got != -ECANCELED) {
            caller->last = got;
            atomic_store(&caller->ended, true);
            return "an answer that it may not give";
        }
    }
}

static void go(int round)
{
    size_t page = page_size();
    driven = round % 2;
    source = (struct source)SOURCE_INIT;
    struct kuf *kuf = driven ? open_driven(&source) : open_serviced(&source);
    unsigned char *ram = map_anonymous(PAGES * page);
    extra = map_anonymous(4 * page);
    add(kuf, BASE, ram, PAGES * page);
    atomic_store(&shared_handle, kuf);
    struct caller callers[THREADS];
    pthread_t threads[THREADS];
    for (int i = 0; i < THREADS; i++) {
        atomic_store(&calls[i], 0);
        callers[i] = (struct caller){.which = i};
        threads[i] = start(hammer, &callers[i]);
    }
    for (int i = 0; i < THREADS; i++)
        wait_until(atomic_load(&calls[i]) >= CALLS_BEFORE || atomic_load(&callers[i].ended));
    int got = kuf_close(&kuf, KUF_END_POISON);
    is(got, 0, "round %d: closed while every call is being made", round);
    for (int i = 0; i < THREADS; i++) {
        void *wrong = NULL;
        pthread_join(threads[i], &wrong);
        ok(wrong == NULL, "round %d: thread %d: %s (%ld, %s)", round, i, wrong ? (char *)wrong : "every answer is one of those",
           callers[i].last, callers[i].last < 0 ? strerror((int)-callers[i].last) : "-");
    }
    is(atomic_load(&source.released), 1, "round %d: released once", round);
    munmap(ram, PAGES * page);
    munmap(extra, 4 * page);
}

int main(void)
{
    begin();
    for (int round = 0; round < ROUNDS; round++)
        go(round);
    wait_until(threads_named("kuf-") == 0);
    return done();
}
