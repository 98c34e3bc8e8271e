/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * faults.c - threads touch absent pages of anonymous memory: latency, pages per second and the cost of serving
 *
 *     faults poll|drain|spin|kuf image=FILE [KEY=VALUE]...
 *
 *     size=BYTES       the memory slot
 *     window=BYTES     the part that is touched, in the middle of the slot (default: all)
 *     pages=N          the number of pages to touch once each, spread evenly over the window (default: all)
 *     order=random|sequential   touchers=N   seed=N   pin=none|split|same   verify=quick|full
 *     fill=copy|resolve   fill_threads=N   demand_run=BYTES   spin=US   uffds=N   kuf only
 *     stats_hz=N       kuf: another thread calls kuf_stats N times a second
 *     dose=N           kuf: repeats the library's statistics of a fault N times, see statistics_again
 */
#include "baseline.h"

/* ---- Cost of statistics ------------------------------------------------------------------------------------------ */

/*
 * The library's counters cannot be turned off, and a build without them would be a different program. So the fill
 * callback repeats the library's statistics of one fault (src/stats) N times, between the same cache misses. The
 * additional time divided by N is the cost per fault. Keep this in step with src/stats.
 *
 * As in the library, each thread writes to its own shard, so that adding is a load and a store.
 */
struct shard {
    _Atomic uint64_t counter[6];
    struct {
        _Atomic uint64_t sum, max, bucket[KUF_HISTOGRAM_BUCKETS];
    } histogram[4];
    struct {
        _Atomic uint32_t thread;
        _Atomic uint64_t faults, total, max;
    } threads[64];
} __attribute__((aligned(128)));

struct statistics {
    unsigned dose;
    /* The thread's shard. */
    pthread_key_t mine;
    struct shard shards[64];
    atomic_uint taken;
    /* Whether any thread is watched, as in src/stats/all_blocked.rs. */
    atomic_bool watching;
};

/* The library uses a thread-local variable, whose access from a shared library is a call like this one. */
static struct shard *here(struct statistics *statistics)
{
    struct shard *shard = pthread_getspecific(statistics->mine);
    if (shard == NULL) {
        shard = &statistics->shards[atomic_fetch_add(&statistics->taken, 1) % 64];
        pthread_setspecific(statistics->mine, shard);
    }
    return shard;
}

static void add(_Atomic uint64_t *to, uint64_t n)
{
    if (n == 0)
        return;
    atomic_store_explicit(to, atomic_load_explicit(to, memory_order_relaxed) + n, memory_order_release);
}

static void record(struct shard *shard, unsigned which, uint64_t ns)
{
    unsigned bucket = 63 - (unsigned)__builtin_clzll(ns | 1);
    add(&shard->histogram[which].sum, ns);
    if (atomic_load_explicit(&shard->histogram[which].max, memory_order_relaxed) < ns)
        atomic_store_explicit(&shard->histogram[which].max, ns, memory_order_relaxed);
    add(&shard->histogram[which].bucket[bucket % KUF_HISTOGRAM_BUCKETS], 1);
}

/*
 * The library does the following in four steps, and looks up the shard in each:
 *
 *   read      faults; faults_minor, faults_write, faults_lost (nothing to add); is the thread watched?
 *   claim     queueing
 *   fill      fills, filling
 *   install   bytes_copied, installing, blocked, the thread's sum; is the thread watched?
 *
 * Statistics need one reading of the clock, after the install. The library would take its other three readings without
 * statistics too: after reading faults and after the fill, to tell quick fills from slow ones and to detect a service
 * thread stuck in a callback; and at the claim, for its age (kuf_pending) and the start of the fill.
 */
static void statistics_again(void *argument)
{
    struct statistics *statistics = argument;
    uint64_t read_at = now_ns();
    /* faults, faults_minor, faults_write, faults_lost. volatile: as in the library, the compiler cannot know them. */
    static const volatile uint8_t read[4] = {1, 0, 0, 0};
    for (unsigned dose = 0; dose < statistics->dose; dose++) {
        struct shard *shard = here(statistics);
        for (unsigned n = 0; n < 4; n++)
            add(&shard->counter[n], read[n]);
        bool watching = atomic_load_explicit(&statistics->watching, memory_order_relaxed);
        shard = here(statistics);
        record(shard, 0, dose);
        shard = here(statistics);
        add(&shard->counter[4], 1);
        record(shard, 1, dose);
        shard = here(statistics);
        add(&shard->counter[5], PAGE);
        uint64_t waited = now_ns() - read_at;
        record(shard, 2, waited);
        watching |= atomic_load_explicit(&statistics->watching, memory_order_relaxed);
        record(shard, 3, waited);
        uint32_t thread = 1 + (uint32_t)watching;
        for (unsigned at = thread % 64;; at = (at + 1) % 64) {
            uint32_t other = atomic_load_explicit(&shard->threads[at].thread, memory_order_relaxed);
            if (other == 0)
                atomic_store_explicit(&shard->threads[at].thread, thread, memory_order_relaxed);
            else if (other != thread)
                continue;
            add(&shard->threads[at].total, waited);
            if (atomic_load_explicit(&shard->threads[at].max, memory_order_relaxed) < waited)
                atomic_store_explicit(&shard->threads[at].max, waited, memory_order_release);
            uint64_t faults = atomic_load_explicit(&shard->threads[at].faults, memory_order_relaxed);
            atomic_store_explicit(&shard->threads[at].faults, faults + 1, memory_order_release);
            break;
        }
    }
}

struct asker {
    struct kuf *kuf;
    uint64_t interval_ns, asked;
    atomic_bool stop;
    pthread_t thread;
};

static void *asker_body(void *argument)
{
    struct asker *asker = argument;
    struct kuf_stats_info stats = {.size = sizeof(stats)};
    uint64_t next = now_ns();
    while (!atomic_load(&asker->stop)) {
        if (kuf_stats(asker->kuf, &stats) < 0)
            fail("kuf_stats: %s", kuf_error());
        asker->asked++;
        sleep_until(next += asker->interval_ns);
    }
    return NULL;
}

/* ---- The sides --------------------------------------------------------------------------------------------------- */

int main(int argc, char **argv)
{
    const char *side = begin(argc, argv);
    bool with_kuf = strcmp(side, "kuf") == 0;
    bool spins = strcmp(side, "spin") == 0, drains = strcmp(side, "drain") == 0;
    if (!with_kuf && !spins && !drains && strcmp(side, "poll") != 0)
        fail("%s: poll, drain, spin or kuf", side);
    if (spins && CPU_COUNT(&cpus_allowed) < 2)
        skip("spinning needs two CPUs");
    struct image image = map_image();
    uint64_t size = argument("size", image.size), window = argument("window", size);
    uint64_t count = argument("pages", window / PAGE), seed = argument("seed", 1);
    bool sequential = strcmp(text_argument("order", "random"), "sequential") == 0, thorough = verify_argument();
    uint64_t stats_hz = with_kuf ? argument("stats_hz", 0) : 0;
    static struct statistics statistics;
    statistics.dose = with_kuf ? (unsigned)argument("dose", 0) : 0;
    if (pthread_key_create(&statistics.mine, NULL) != 0)
        fail("no thread-specific data");
    static struct touchers touchers;
    touchers.threads = (unsigned)argument("touchers", 1);
    touchers.pin = pin_argument();

    uint8_t *memory = guest_memory(size, false);
    uint64_t first = (size - window) / 2 / RUN * RUN / PAGE;
    touchers.image = &image;
    touchers.memory = memory;
    touchers.count = count;
    touchers.order = make_order(first, window / PAGE, count, sequential, seed);
    start_touchers(&touchers);
    double memory_before = own_memory(memory, size);

    place_service(touchers.pin);
    struct server server = {.image = &image, .memory = memory, .drain = drains, .spin = spins};
    struct guest guest = {.image = &image};
    struct asker asker = {0};
    uint64_t opening = now_ns();
    if (with_kuf) {
        if (statistics.dose != 0) {
            guest.before_fill = statistics_again;
            guest.before_fill_argument = &statistics;
        }
        open_kuf(&guest, (struct kuf_options){.size = 0});
        add_guest(&guest, 0, memory, size, 0, 0);
    } else {
        server.uffd = open_userfaultfd(0);
        register_memory(server.uffd, memory, size, UFFDIO_REGISTER_MODE_MISSING);
        start_server(&server);
    }
    opening = now_ns() - opening;
    no_more_arguments();
    if (stats_hz != 0) {
        asker.kuf = guest.kuf;
        asker.interval_ns = 1000000000 / stats_hz;
        if (pthread_create(&asker.thread, NULL, asker_body, &asker) != 0)
            fail("cannot start the thread that reads statistics");
    }

    struct service_use before = service_use();
    release_touchers(&touchers);
    uint64_t took = join_touchers(&touchers);
    struct service_use after = service_use();
    if (stats_hz != 0) {
        atomic_store(&asker.stop, true);
        pthread_join(asker.thread, NULL);
    }

    verify_touched(&touchers, thorough);
    put_text("side", side);
    put_number("seconds", seconds(took));
    put_latencies(&touchers);
    put_number("pages_per_second", (double)count / seconds(took));
    put_number("bytes_per_second", (double)count * PAGE / seconds(took));
    put_number("us_per_page", seconds(took) * 1e6 / (double)count);
    put_service_use(before, after, count);
    put_number("open_ms", seconds(opening) * 1e3);
    put_number("bookkeeping_bytes", own_memory(memory, size) - memory_before);
    put_count("slot_pages", size / PAGE);
    if (with_kuf) {
        put_kuf_stats(guest.kuf);
        if (stats_hz != 0)
            put_count("stats_asked", asker.asked);
        close_kuf(&guest);
    } else {
        stop_server(&server);
        put_count("faults", server.faults);
        put_count("calls", server.faults + server.reads + server.polls);
    }
    end_result();
}
