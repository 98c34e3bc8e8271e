/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * slow.c - a source with a fixed latency and a limited number of concurrent fills
 *
 *     slow ideal|workers|deferred image=FILE latency_us=N inflight=N
 *          [touchers=N pages=N window=BYTES seed=N verify=quick|full]
 *
 *     ideal      the source alone at full speed: `inflight` threads fetch page after page, without faults. Timers and
 *                the scheduler add to its latency as they do on the other sides
 *     workers    libkuf with `inflight` fill threads, which wait in the callback
 *     deferred   libkuf with two fill threads; the callback passes the request to the source's own threads, which
 *                answer with kuf_resolve
 */
#include "baseline.h"

struct source {
    const struct image *image;
    struct kuf *kuf;
    uint64_t latency_ns;
    /* ideal: the next page. */
    _Atomic uint64_t next;
    uint64_t pages;
    /* deferred: the queue of requests. */
    pthread_mutex_t lock;
    pthread_cond_t more;
    struct request {
        uint64_t gpa, len;
    } *requests;
    uint64_t from, to, room;
    _Atomic uint64_t fills;
};

/* One fetch from the source. */
static void fetch(struct source *source, void *to, uint64_t offset, uint64_t length)
{
    static _Thread_local bool exact;
    if (!exact) {
        prctl(PR_SET_TIMERSLACK, 1);
        exact = true;
    }
    sleep_until(now_ns() + source->latency_ns);
    memcpy(to, image_at(source->image, offset), length);
    atomic_fetch_add(&source->fills, 1);
}

static void *ideal_body(void *argument)
{
    struct source *source = argument;
    static _Thread_local uint8_t page[PAGE];
    for (uint64_t at; (at = atomic_fetch_add(&source->next, 1)) < source->pages;)
        fetch(source, page, at * PAGE, PAGE);
    return NULL;
}

static int fill_by_waiting(void *opaque, struct kuf_fill *run)
{
    struct guest *guest = opaque;
    fetch(guest->before_fill_argument, run->buf, run->memory_offset, run->len);
    return KUF_FILL_DONE;
}

static int fill_later(void *opaque, struct kuf_fill *run)
{
    struct source *source = ((struct guest *)opaque)->before_fill_argument;
    pthread_mutex_lock(&source->lock);
    source->requests[source->to++ % source->room] = (struct request){run->gpa, run->len};
    if (source->to - source->from > source->room)
        fail("more requests than touchers");
    pthread_cond_signal(&source->more);
    pthread_mutex_unlock(&source->lock);
    return KUF_FILL_DEFERRED;
}

static void *deferred_body(void *argument)
{
    struct source *source = argument;
    uint8_t *buffer = malloc(64 * MIB); /* the longest possible run */
    must(buffer != NULL, "memory");
    for (;;) {
        pthread_mutex_lock(&source->lock);
        while (source->from == source->to)
            pthread_cond_wait(&source->more, &source->lock);
        struct request request = source->requests[source->from++ % source->room];
        pthread_mutex_unlock(&source->lock);
        fetch(source, buffer, request.gpa, request.len);
        if (kuf_resolve(source->kuf, request.gpa, buffer, request.len, 0) < 0)
            fail("kuf_resolve: %s", kuf_error());
    }
    return NULL;
}

int main(int argc, char **argv)
{
    const char *side = begin(argc, argv);
    bool ideal = strcmp(side, "ideal") == 0, deferred = strcmp(side, "deferred") == 0;
    if (!ideal && !deferred && strcmp(side, "workers") != 0)
        fail("%s: ideal, workers or deferred", side);
    struct image image = map_image();
    uint64_t window = argument("window", image.size), inflight = argument("inflight", 8);
    static struct touchers touchers;
    touchers.threads = (unsigned)argument("touchers", 64);
    touchers.count = argument("pages", 1000);
    uint64_t seed = argument("seed", 1), latency_us = argument("latency_us", 1000);
    bool thorough = verify_argument();
    static struct source source = {.lock = PTHREAD_MUTEX_INITIALIZER, .more = PTHREAD_COND_INITIALIZER};
    source.image = &image;
    source.latency_ns = latency_us * 1000;
    source.pages = touchers.count;
    pthread_t threads[TOUCHERS_MAX];
    if (window > image.size)
        fail("the window is larger than the image");
    if (inflight == 0 || inflight > TOUCHERS_MAX)
        fail("inflight is out of range");
    uint64_t took;
    if (ideal) {
        no_more_arguments();
        uint64_t began = now_ns();
        for (unsigned n = 0; n < inflight; n++)
            must(pthread_create(&threads[n], NULL, ideal_body, &source) == 0, "a thread of the source");
        for (unsigned n = 0; n < inflight; n++)
            pthread_join(threads[n], NULL);
        took = now_ns() - began;
        put_count("pages", touchers.count);
    } else {
        uint8_t *memory = guest_memory(window, false);
        touchers.image = &image;
        touchers.memory = memory;
        touchers.order = make_order(0, window / PAGE, touchers.count, false, seed);
        struct guest guest = {.image = &image, .before_fill_argument = &source};
        struct kuf_options options = {.fill = deferred ? fill_later : fill_by_waiting,
                                      .fill_threads = deferred ? 0 : (uint32_t)inflight};
        source.room = touchers.threads;
        source.requests = calloc(source.room, sizeof(*source.requests));
        must(source.requests != NULL, "memory for requests");
        open_kuf(&guest, options);
        no_more_arguments();
        source.kuf = guest.kuf;
        add_guest(&guest, 0, memory, window, 0, 0);
        start_touchers(&touchers);
        for (unsigned n = 0; deferred && n < inflight; n++)
            must(pthread_create(&threads[n], NULL, deferred_body, &source) == 0, "a thread of the source");
        struct service_use before = service_use();
        release_touchers(&touchers);
        took = join_touchers(&touchers);
        struct service_use after = service_use();
        verify_touched(&touchers, thorough);
        put_latencies(&touchers);
        put_service_use(before, after, touchers.count);
        put_kuf_stats(guest.kuf);
        close_kuf(&guest);
    }
    put_text("side", side);
    put_number("seconds", seconds(took));
    put_number("pages_per_second", (double)touchers.count / seconds(took));
    put_count("source_fills", atomic_load(&source.fills));
    /* The time by definition, for a source with exact timers; no machine has such timers. */
    put_number("nominal_seconds", (double)latency_us / 1e6 * (double)touchers.count / (double)inflight);
    end_result();
}
