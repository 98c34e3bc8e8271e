/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KUF_FILL_DEFERRED: pending pages are listed and resolved later, from another thread or the callback itself, in
 * pieces.
 */
#include "harness.h"

#define BASE UINT64_C(0x50000000)
enum { PAGES = 64 };

static struct kuf *kuf;
static unsigned char *ram;
static atomic_int calls, in_callback_wrong;
static enum { LATER, AT_ONCE, IN_PLACE_LATER } how;
static void *_Atomic place;
static _Atomic uint64_t place_gpa, place_len;

static int fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    if (how == AT_ONCE) {
        void *bytes = malloc(fill->len);
        write_content(bytes, fill->gpa, fill->len, 1);
        if (kuf_resolve(kuf, fill->gpa, bytes, fill->len, 0) < 0)
            atomic_fetch_add(&in_callback_wrong, 1);
        free(bytes);
    }
    if (how == IN_PLACE_LATER) {
        atomic_store(&place_gpa, fill->gpa);
        atomic_store(&place_len, fill->len);
        atomic_store(&place, fill->buf);
    }
    atomic_fetch_add(&calls, 1);
    return KUF_FILL_DEFERRED;
}

/* Resolves all pending pages, one by one, last page first. */
static void *answer_all(void *unused)
{
    (void)unused;
    size_t page = page_size();
    struct kuf_fault faults[PAGES];
    unsigned char *bytes = malloc(page);
    ssize_t n = kuf_pending(kuf, faults, PAGES);
    for (ssize_t i = n - 1; i >= 0 && i < PAGES; i--)
        for (uint64_t at = faults[i].len; at > 0; at -= page) {
            write_content(bytes, faults[i].gpa + at - page, page, 1);
            kuf_resolve(kuf, faults[i].gpa + at - page, bytes, page, 0);
        }
    free(bytes);
    return (void *)n;
}

int main(void)
{
    begin();
    size_t page = page_size();
    struct kuf_fault faults[PAGES];
    ram = map_anonymous(PAGES * page);
    kuf = open_with((struct kuf_options){.fill = fill, .demand_run = 2 * page});
    add(kuf, BASE, ram, PAGES * page);

    struct toucher touchers[4];
    const int first[4] = {40, 0, 20, 10};
    for (int i = 0; i < 4; i++) {
        touchers[i] = (struct toucher){.memory = ram + first[i] * page, .gpa = BASE + first[i] * page, .length = page,
                                       .generation = 1};
        start_toucher(&touchers[i]);
        wait_until(atomic_load(&calls) == i + 1);
    }
    wait_until(kuf_pending(kuf, NULL, 0) == 4);
    is(kuf_pending(kuf, faults, 2), 4, "four runs are owed, also when there is room for two");
    is(kuf_pending(kuf, faults, PAGES), 4, "four runs are owed");
    bool sorted = true, demanded = true;
    uint64_t owed = 0;
    for (int i = 0; i < 4; i++) {
        sorted = sorted && (i == 0 || faults[i - 1].gpa < faults[i].gpa);
        demanded = demanded && (faults[i].flags & KUF_FAULT_DEMAND) && faults[i].place == NULL &&
                   faults[i].memory_offset == faults[i].gpa - BASE;
        owed += faults[i].len;
    }
    ok(sorted, "in order of gpa");
    ok(demanded, "a thread waits for each");
    struct kuf_progress_info progress = progress_of(kuf, BASE);
    is(progress.deferred, owed, "progress counts the same bytes");
    is(progress.present, 0, "and none is present");
    ok(!atomic_load(&touchers[0].finished) && !atomic_load(&touchers[1].finished), "no thread reads an unanswered page");

    void *answered;
    pthread_join(start(answer_all, NULL), &answered);
    is((long)answered, 4, "another thread answers, page by page, last first");
    bool good = true;
    for (int i = 0; i < 4; i++)
        good = join_toucher(&touchers[i]) && good;
    ok(good, "each waiting thread reads its page");
    is(kuf_pending(kuf, NULL, 0), 0, "nothing is owed");
    is(progress_of(kuf, BASE).present, owed, "and the runs are present");
    is(stats_of(kuf).fills_deferred, 4, "four fills were deferred");

    how = AT_ONCE;
    struct toucher rest = {.memory = ram, .gpa = BASE, .length = PAGES * page, .generation = 1};
    start_toucher(&rest);
    ok(join_toucher(&rest), "a callback that resolves its own run and returns KUF_FILL_DEFERRED");
    is(atomic_load(&in_callback_wrong), 0, "kuf_resolve works inside the callback");
    is(kuf_pending(kuf, NULL, 0), 0, "and owes nothing");
    close_with(kuf, 0);

    if (!has_feature(KUF_FEATURE_MINOR)) {
        skip_part("no minor faults on shared memory: nothing is filled in place");
        return done();
    }
    /* The buffer outlives the callback: data may still arrive in it. */
    how = IN_PLACE_LATER;
    int fd;
    ram = map_shared(PAGES * page, &fd);
    kuf = open_with((struct kuf_options){.fill = fill});
    add_shared(kuf, BASE, ram, PAGES * page, fd, 0);
    struct toucher one = {.memory = ram + 33 * page, .gpa = BASE + 33 * page, .length = page, .generation = 1};
    start_toucher(&one);
    wait_until(atomic_load(&place) != NULL);
    wait_until(kuf_pending(kuf, NULL, 0) == 1);
    uint64_t gpa = atomic_load(&place_gpa), length = atomic_load(&place_len);
    write_content(atomic_load(&place), gpa, length, 1);
    is(kuf_resolve(kuf, gpa, NULL, length, KUF_RESOLVE_IN_PLACE), length, "a deferred run is published in place");
    ok(join_toucher(&one), "and read");
    ok(holds_content(ram + (gpa - BASE), gpa, length, 1), "all of it");
    how = AT_ONCE;
    struct toucher all = {.memory = ram, .gpa = BASE, .length = PAGES * page, .generation = 1};
    start_toucher(&all);
    ok(join_toucher(&all), "in place: a callback that resolves its own run from another buffer");
    is(atomic_load(&in_callback_wrong), 0, "kuf_resolve works there too");
    close_with(kuf, 0);
    close(fd);
    return done();
}
