/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* kuf_populate: fills behind demand, at a rate, until it is stopped or the source fails. */
#include "harness.h"

#define LOW UINT64_C(0x10000000)
#define HIGH UINT64_C(0x90000000)
enum { PAGES = 512 };

static struct source source = SOURCE_INIT;
static struct kuf *kuf;
static unsigned char *low, *high;

static void populate(uint64_t gpa, uint64_t length, uint64_t rate, uint32_t flags)
{
    struct kuf_populate_request request = {.size = sizeof(request), .flags = flags, .gpa = gpa, .len = length, .rate = rate};
    is(kuf_populate(kuf, &request), 0, "a request is taken");
}

static void wait_populated(int count)
{
    wait_until(atomic_load(&source.events[KUF_EVENT_POPULATED]) >= count);
}

static void drop(uint64_t gpa)
{
    is(kuf_discard(kuf, gpa, PAGES * page_size(), KUF_DISCARD_REFILL), 0, "pages are dropped");
}

static atomic_bool demand_is_stuck;

static int fill_unless_stuck(void *opaque, struct kuf_fill *fill)
{
    while ((fill->flags & KUF_RUN_DEMAND) != 0 && atomic_load(&demand_is_stuck))
        sleep_ms(1);
    return source_fill(opaque, fill);
}

/* All the time there is more demand than there are places for. */
static void under_steady_demand(size_t page, size_t length)
{
    static struct source other = SOURCE_INIT;
    static struct toucher touchers[3];
    struct kuf *busy = open_with((struct kuf_options){.fill = fill_unless_stuck, .event = source_event, .opaque = &other,
                                                      .fill_threads = 1, .demand_run = page});
    unsigned char *filled = map_anonymous(length), *touched = map_anonymous(length);
    add(busy, LOW, filled, length);
    add(busy, HIGH, touched, length);
    atomic_store(&demand_is_stuck, true);
    for (uint64_t i = 0; i < 3; i++) {
        touchers[i] = (struct toucher){.memory = touched + 8 * i * page, .gpa = HIGH + 8 * i * page, .length = page,
                                       .generation = 1};
        start_toucher(&touchers[i]);
    }
    comes_to(stats_of(busy).faults, 3, "three pages are waited for, and one can be filled at a time");
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = LOW, .len = length};
    is(kuf_populate(busy, &request), 0, "a request is taken");
    comes_to(progress_of(busy, LOW).present, length, "demand that does not end does not keep it from being filled");
    is(progress_of(busy, HIGH).present, 0, "and nothing of the demand was");
    atomic_store(&demand_is_stuck, false);
    for (int i = 0; i < 3; i++)
        ok(join_toucher(&touchers[i]), "a toucher goes on");
    close_with(busy, KUF_END_POISON);
}

/* KUF_POPULATE_STOP ends every request and every replay, the one that is running too, each with its event. */
static void stops_all(size_t page, size_t length)
{
    enum { REQUESTS = 4, REPLAYS = 3 };
    static struct source other = SOURCE_INIT;
    unsigned char *ram = map_anonymous(length);
    int recording = memfd_create("recording", MFD_CLOEXEC);
    struct kuf *stopped = open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &other, .demand_run = page, .populate_run = page});
    add(stopped, LOW, ram, length);
    is(kuf_record_start(stopped, 0), 0, "a recording begins");
    is(kuf_ensure(stopped, LOW, 16 * page, -1), 0, "some pages are demanded");
    is(kuf_record_stop(stopped, recording), 0, "and recorded");
    is(kuf_discard(stopped, LOW, length, KUF_DISCARD_REFILL), 0, "pages are dropped");
    for (int replay_runs = 0; replay_runs < 2; replay_runs++) {
        for (unsigned i = 0; i < HARNESS_EVENTS; i++)
            atomic_store(&other.events[i], 0);
        atomic_store(&other.hold, true);
        for (int i = 0; i < REPLAYS && replay_runs; i++)
            must(lseek(recording, 0, SEEK_SET) == 0 && kuf_replay(stopped, recording, 0) == 0, "a replay is queued");
        if (replay_runs)
            wait_until(atomic_load(&other.inside) == 1);
        for (int i = 0; i < REQUESTS; i++) {
            struct kuf_populate_request request = {.size = sizeof(request), .gpa = LOW, .len = length};
            must(kuf_populate(stopped, &request) == 0, "a request is queued");
        }
        wait_until(atomic_load(&other.inside) == 1);
        struct kuf_populate_request stop = {.size = sizeof(stop), .flags = KUF_POPULATE_STOP};
        is(kuf_populate(stopped, &stop), 0, "all are stopped, while a run is in its callback");
        atomic_store(&other.hold, false);
        comes_to(atomic_load(&other.events[KUF_EVENT_POPULATED]), REQUESTS, "each request ends with its event");
        comes_to(atomic_load(&other.events[KUF_EVENT_REPLAYED]), replay_runs ? REPLAYS : 0, "and each replay");
        is(last_event(&other, KUF_EVENT_POPULATED).error, -ECANCELED, "with its error");
        ok(strstr(last_event(&other, KUF_EVENT_POPULATED).text, "KUF_POPULATE_STOP") != NULL, "and why");
        if (replay_runs)
            is(last_event(&other, KUF_EVENT_REPLAYED).error, -ECANCELED, "replays too");
        ok(progress_of(stopped, LOW).absent >= length - 3 * page, "nothing was filled but the runs in their callbacks");
    }
    struct kuf_populate_request again = {.size = sizeof(again), .gpa = LOW, .len = length};
    is(kuf_populate(stopped, &again), 0, "a later request is not concerned");
    comes_to(atomic_load(&other.events[KUF_EVENT_POPULATED]), REQUESTS + 1, "and ends");
    is(last_event(&other, KUF_EVENT_POPULATED).error, 0, "when it is done");
    close_with(stopped, 0);
    close(recording);
}

int main(void)
{
    begin();
    size_t page = page_size(), length = PAGES * page;
    low = map_anonymous(length);
    high = map_anonymous(length);
    kuf = open_serviced(&source);
    add(kuf, LOW, low, length);
    add(kuf, HIGH, high, length);

    populate(LOW, length / 2, 0, 0);
    wait_populated(1);
    struct kuf_event event = last_event(&source, KUF_EVENT_POPULATED);
    ok(event.gpa == LOW && event.len == length / 2 && event.error == 0, "the event names the request, with no error");
    is(progress_of(kuf, LOW).present, length / 2, "the range is present");
    is(progress_of(kuf, HIGH).present, 0, "and nothing else");
    is(atomic_load(&source.flags_seen) & KUF_RUN_DEMAND, 0, "no thread waited for it");
    is(stats_of(kuf).bytes_populated, length / 2, "and it is counted as populated");
    is(stats_of(kuf).faults, 0, "without a fault");
    ok(holds_content(low, LOW, length / 2, 1), "the bytes are there");

    /* Over a hole between two slots, then everything. */
    populate(LOW + length / 2, HIGH + length / 2 - LOW - length / 2, 0, 0);
    wait_populated(2);
    is(progress_of(kuf, LOW).present, length, "a request spans slots: the first is present");
    is(progress_of(kuf, HIGH).present, length / 2, "and half of the second");
    populate(KUF_ALL, length, 0, 0); /* len is ignored */
    wait_populated(3);
    is(progress_of(kuf, KUF_ALL).present, 2 * length, "KUF_ALL: everything is present");
    ok(progress_of(kuf, KUF_ALL).flags & KUF_PROGRESS_COMPLETE, "and complete");
    wait_until(atomic_load(&source.events[KUF_EVENT_COMPLETE]) == 2);
    ok(holds_content(low, LOW, length, 1) && holds_content(high, HIGH, length, 1), "the bytes are there");

    /* A rate can only be exceeded: half a second's worth must not take less than a quarter of a second. */
    drop(LOW);
    uint64_t begun = now_ns();
    populate(LOW, length, length * 2, 0);
    wait_populated(4);
    ok(now_ns() - begun > 250000000, "the rate is kept: %" PRIu64 " ms for 500", (now_ns() - begun) / 1000000);
    is(progress_of(kuf, LOW).present, length, "and everything filled");

    /* A slow request yields to demand, and to a stop. */
    drop(LOW);
    populate(LOW, length, page, 0);
    struct toucher toucher = {.memory = low + length / 2, .gpa = LOW + length / 2, .length = length / 2, .generation = 1};
    start_toucher(&toucher);
    ok(join_toucher(&toucher), "demand is served while a slow request runs");
    is(atomic_load(&source.events[KUF_EVENT_POPULATED]), 4, "which goes on");
    populate(HIGH, length, 0, 0);
    populate(0, 0, 0, KUF_POPULATE_STOP);
    wait_populated(6);
    ok(progress_of(kuf, LOW).absent > 0, "a stopped request has left pages absent");
    is(kuf_ensure(kuf, LOW, length, -1), 0, "which are served as before");

    /* A source that fails ends the request and poisons nothing. */
    drop(LOW);
    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.bad_gpa, LOW + 300 * page);
    populate(LOW, length, 0, 0);
    wait_populated(7);
    event = last_event(&source, KUF_EVENT_POPULATED);
    is(event.error, -EIO, "the event has the source's error");
    struct kuf_progress_info progress = progress_of(kuf, LOW);
    is(progress.poisoned, 0, "nothing is poisoned");
    ok(progress.absent >= page && progress.present >= 100 * page, "the pages before are present, the rest absent");
    is(atomic_load(&source.events[poison_event()]), 0, "no event says that a page is poisoned");
    atomic_store(&source.bad_gpa, NO_GPA);
    toucher = (struct toucher){.memory = low, .gpa = LOW, .length = length, .generation = 1};
    start_toucher(&toucher);
    ok(join_toucher(&toucher), "a source that has recovered serves them");

    /* Deferred: the request waits for what it has asked for. */
    drop(LOW);
    atomic_store(&source.answer, KUF_FILL_DEFERRED);
    populate(LOW, 4 * page, 0, 0);
    wait_until(progress_of(kuf, LOW).deferred == 4 * page);
    struct kuf_fault owed;
    is(kuf_pending(kuf, &owed, 1), 1, "a deferred run is owed");
    ok(owed.gpa == LOW && owed.len == 4 * page && !(owed.flags & KUF_FAULT_DEMAND), "and no thread waits for it");
    unsigned char *bytes = malloc(4 * page);
    write_content(bytes, LOW, 4 * page, 1);
    is(kuf_resolve(kuf, LOW, bytes, 4 * page, 0), 4 * page, "it is resolved");
    free(bytes);
    wait_populated(8);
    is(last_event(&source, KUF_EVENT_POPULATED).error, 0, "then the request ends");
    close_with(kuf, KUF_END_POISON);
    is(atomic_load(&source.released), 1, "released once");
    under_steady_demand(page, length);
    stops_all(page, length);
    return done();
}
