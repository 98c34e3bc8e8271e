/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A guest starts together with the replay of its working set and catches up with it, again and again: it gets the right
 * bytes and continues, whatever else happens to its memory, and whatever the result of a fill.
 */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
#define OTHER UINT64_C(0x90000000) /* a second slot */
enum { PAGES = 16384, TOUCHED = PAGES / 8, GUESTS = 3 };

static unsigned order[TOUCHED];
static unsigned char *memory;
static unsigned char file[1 << 20];
static size_t file_length;

static struct source source = SOURCE_INIT;
static _Atomic uint64_t blocked = NO_GPA; /* its fill blocks, unless a thread waits for it */
static atomic_bool inside, released;

static int fill(void *opaque, struct kuf_fill *fill)
{
    if (fill->gpa == atomic_load(&blocked) && !(fill->flags & KUF_RUN_DEMAND)) {
        atomic_store(&inside, true);
        while (!atomic_load(&released))
            sleep_ms(1);
    }
    return source_fill(opaque, fill);
}

static uint64_t gpa_of(unsigned page)
{
    return BASE + page * (uint64_t)page_size();
}

static unsigned char *at(unsigned page)
{
    return memory + page * page_size();
}

static unsigned some_page(uint64_t *seed)
{
    *seed ^= *seed << 13, *seed ^= *seed >> 7, *seed ^= *seed << 17;
    return (unsigned)(*seed % PAGES);
}

/* No two of them next to each other: each is a run of its own. */
static void choose(void)
{
    static bool taken[PAGES + 2];
    uint64_t seed = 0x9e3779b97f4a7c15;
    for (unsigned n = 0; n < TOUCHED;) {
        unsigned page = some_page(&seed);
        if (taken[page] || taken[page + 1] || taken[page + 2])
            continue;
        taken[page + 1] = true;
        order[n++] = page;
    }
}

static struct kuf *new_guest(void)
{
    memory = map_anonymous(PAGES * page_size());
    struct kuf *kuf = open_with((struct kuf_options){.fill = fill, .event = source_event, .release = source_release,
                                                     .opaque = &source, .demand_run = (uint32_t)page_size()});
    add(kuf, BASE, memory, PAGES * page_size());
    return kuf;
}

static void end_guest(struct kuf *kuf)
{
    close_with(kuf, KUF_END_POISON);
    munmap(memory, PAGES * page_size());
}

struct guest {
    unsigned from;    /* in `order`: vCPUs do not all start at its beginning */
    uint64_t not_for; /* a page that is left out */
    bool good;
};

static void *guest_body(void *argument)
{
    struct guest *guest = argument;
    guest->good = true;
    for (unsigned n = 0; n < TOUCHED; n++) {
        unsigned page = order[(guest->from + n) % TOUCHED];
        if (gpa_of(page) != guest->not_for && !holds_content(at(page), gpa_of(page), page_size(), 1))
            guest->good = false;
    }
    return NULL;
}

static void record(void)
{
    struct kuf *kuf = new_guest();
    is(kuf_record_start(kuf, 0), 0, "a guest is recorded");
    struct guest guest = {.not_for = NO_GPA};
    pthread_join(start(guest_body, &guest), NULL);
    int fd = memfd_create("recording", MFD_CLOEXEC);
    must(fd >= 0, "a file");
    is(kuf_record_stop(kuf, fd), 0, "to a file");
    file_length = (size_t)pread(fd, file, sizeof(file), 0);
    close(fd);
    end_guest(kuf);
}

static void replay(struct kuf *kuf)
{
    int fd = memfd_create("recording", MFD_CLOEXEC);
    must(fd >= 0 && pwrite(fd, file, file_length, 0) == (ssize_t)file_length, "a file");
    atomic_store(&source.events[KUF_EVENT_REPLAYED], 0);
    is(kuf_replay(kuf, fd, 0), 0, "it is replayed");
    close(fd);
}

static int replayed(void)
{
    wait_until(atomic_load(&source.events[KUF_EVENT_REPLAYED]) > 0);
    return last_event(&source, KUF_EVENT_REPLAYED).error;
}

static void together(void)
{
    struct kuf *kuf = new_guest();
    replay(kuf);
    struct guest guest = {.not_for = NO_GPA};
    pthread_t thread = start(guest_body, &guest);
    pthread_join(thread, NULL);
    ok(guest.good, "a guest that starts with its replay has the right bytes");
    is(replayed(), 0, "and the replay is done");
    uint64_t present = progress_of(kuf, BASE).present / page_size();
    is(present, TOUCHED, "recorded pages are present and no others");
    end_guest(kuf);
}

struct disturber {
    struct kuf *kuf;
    atomic_bool end;
};

static void *disturb(void *argument)
{
    struct disturber *disturber = argument;
    uint64_t seed = 88172645463325252;
    while (!atomic_load(&disturber->end)) {
        unsigned page = some_page(&seed);
        int got = kuf_discard(disturber->kuf, gpa_of(page), page_size(), KUF_DISCARD_REFILL);
        if (got == 0)
            got = kuf_ensure(disturber->kuf, gpa_of(some_page(&seed)), 1, -1);
        if (got != 0)
            harness_ok(false, __FILE__, __LINE__, "disturbing failed: %d", got);
        sched_yield();
    }
    return NULL;
}

/* Several vCPUs in different places, and pages that are dropped, filled again, and resolved by others meanwhile. */
static void disturbed(void)
{
    struct kuf *kuf = new_guest();
    struct disturber disturber = {.kuf = kuf};
    pthread_t disturbing = start(disturb, &disturber);
    for (int round = 0; round < 4; round++) {
        replay(kuf);
        struct guest guests[GUESTS];
        pthread_t threads[GUESTS];
        for (unsigned n = 0; n < GUESTS; n++) {
            guests[n] = (struct guest){.from = n * TOUCHED / GUESTS, .not_for = NO_GPA};
            threads[n] = start(guest_body, &guests[n]);
        }
        bool good = true;
        for (unsigned n = 0; n < GUESTS; n++) {
            pthread_join(threads[n], NULL);
            good &= guests[n].good;
        }
        ok(good, "several vCPUs have the right bytes in spite of discards, in round %d", round);
        is(replayed(), 0, "the replay is done");
        is(kuf_discard(kuf, BASE, PAGES * page_size(), KUF_DISCARD_REFILL), 0, "everything is dropped");
    }
    atomic_store(&disturber.end, true);
    pthread_join(disturbing, NULL);
    end_guest(kuf);
}

/* The caller may hold a lock there that a vCPU's thread wants, and touch memory with it held. */
static void does_not_end(unsigned n)
{
    struct kuf *kuf = new_guest();
    atomic_store(&blocked, gpa_of(order[n]));
    atomic_store(&released, false);
    replay(kuf);
    struct guest guest = {.not_for = gpa_of(order[n])};
    pthread_join(start(guest_body, &guest), NULL);
    ok(guest.good, "a fill of page %u that does not end delays no other page", n);
    wait_until(atomic_load(&inside));
    atomic_store(&released, true);
    is(replayed(), 0, "the replay goes on");
    ok(holds_content(at(order[n]), gpa_of(order[n]), page_size(), 1), "and has filled it");
    atomic_store(&blocked, NO_GPA);
    atomic_store(&inside, false);
    end_guest(kuf);
}

static void *remove_other(void *kuf)
{
    must(remove_patiently(kuf, OTHER) == 0, "it is removed");
    return NULL;
}

static void fails(void)
{
    struct kuf *kuf = new_guest();
    unsigned bad = order[TOUCHED / 2];
    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.bad_gpa, gpa_of(bad));
    replay(kuf);
    struct guest guest = {.not_for = gpa_of(bad)};
    pthread_join(start(guest_body, &guest), NULL);
    ok(guest.good, "a guest whose replay ends early has the right bytes");
    is(replayed(), -EIO, "it has ended with the error of the fill");
    is(progress_of(kuf, BASE).poisoned, 0, "for a page that no thread wanted");
    atomic_store(&source.bad_gpa, NO_GPA);
    ok(holds_content(at(bad), gpa_of(bad), page_size(), 1), "it is filled when the source has it again");
    end_guest(kuf);
}

/* Another slot comes and goes, and the replay is stopped: faults that were left to it are served. */
static void stopped(void)
{
    struct kuf *kuf = new_guest();
    unsigned char *more = map_anonymous(page_size());
    for (int round = 0; round < 8; round++) {
        must(madvise(more, page_size(), MADV_DONTNEED) == 0, "an empty page");
        add(kuf, OTHER, more, page_size());
        replay(kuf);
        struct guest guest = {.not_for = NO_GPA};
        pthread_t thread = start(guest_body, &guest);
        is(kuf_ensure(kuf, OTHER, 1, -1), 0, "the other slot is used");
        pthread_t removing = start(remove_other, kuf);
        wait_until(progress_of(kuf, BASE).present / page_size() > (unsigned)round * TOUCHED / 8);
        struct kuf_populate_request stop = {.size = sizeof(stop), .flags = KUF_POPULATE_STOP};
        is(kuf_populate(kuf, &stop), 0, "the replay is told to stop");
        pthread_join(thread, NULL);
        pthread_join(removing, NULL);
        ok(guest.good, "the guest gets on, with the right bytes");
        int error = replayed();
        ok(error == 0 || error == -ECANCELED, "the replay has ended: %d", error);
        is(kuf_discard(kuf, BASE, PAGES * page_size(), KUF_DISCARD_REFILL), 0, "everything is dropped");
    }
    munmap(more, page_size());
    end_guest(kuf);
}

int main(void)
{
    begin();
    choose();
    record();
    together();
    disturbed();
    for (unsigned n = 0; n < 8; n++)
        does_not_end(100 + 200 * n + 9 * n);
    fails();
    stopped();
    return done();
}
