/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * fork with KUF_OPEN_FOLLOW_FORK while threads allocate and touch guest memory: glibc's fork holds malloc's locks until
 * the library has read the FORK event. Also from a fill callback, and while handles come and go.
 */
#include "watched.h"

#define BASE UINT64_C(0xa0000000)
enum { PAGES = 128, FORKS = 100, CHURNERS = 4 };

static struct source source = SOURCE_INIT;
static size_t page, length;
static atomic_bool over;
static atomic_int bad;

static struct kuf *open_here(kuf_fill_fn fill, unsigned char *ram)
{
    struct kuf_options options = {.size = sizeof(options), .flags = KUF_OPEN_FOLLOW_FORK, .fill = fill,
                                  .event = source_event, .opaque = &source, .demand_run = page};
    struct kuf *kuf = NULL;
    if (kuf_open(&options, &kuf) < 0)
        skip("KUF_OPEN_FOLLOW_FORK: %s", kuf_error());
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = length, .hva = (uintptr_t)ram};
    must(kuf_add_memory(kuf, &memory) == 0, "kuf_add_memory: %s", kuf_error());
    return kuf;
}

/* The exit status is 0 when the child has read the right bytes. */
static void expect_child(pid_t child)
{
    int status = 0;
    must(child > 0 && waitpid(child, &status, 0) == child, "a child was made, and ends");
    if (status != 0)
        atomic_fetch_add(&bad, 1);
}

static void *churn(void *seed_of)
{
    unsigned seed = (unsigned)(uintptr_t)seed_of;
    void *kept[64] = {NULL};
    while (!atomic_load(&over)) {
        int i = rand_r(&seed) % 64;
        free(kept[i]);
        kept[i] = malloc((size_t)rand_r(&seed) % (i == 0 ? 400000 : 3000) + 1);
    }
    for (int i = 0; i < 64; i++)
        free(kept[i]);
    return NULL;
}

/* The first half is dropped and touched again and again; the second half is given back. */
static void *touch_and_give(void *memory)
{
    unsigned char *ram = memory;
    for (size_t n = 0; !atomic_load(&over); n++) {
        size_t i = n % (PAGES / 2);
        if (!holds_content(ram + i * page, BASE + i * page, page, 1))
            atomic_fetch_add(&bad, 1);
        unsigned char *given = ram + (PAGES / 2 + i) * page;
        if (madvise(given, page, MADV_DONTNEED) != 0 || !holds_zeroes(given, page))
            atomic_fetch_add(&bad, 1);
    }
    return NULL;
}

static int forking_fill(void *opaque, struct kuf_fill *fill)
{
    static atomic_int fills;
    if (atomic_fetch_add(&fills, 1) % 8 == 0) {
        pid_t child = fork();
        if (child == 0)
            _exit(0);
        expect_child(child);
    }
    return source_fill(opaque, fill);
}

static void *come_and_go(void *unused)
{
    (void)unused;
    unsigned char *ram = map_anonymous(length);
    while (!atomic_load(&over)) {
        struct kuf *kuf = open_here(forking_fill, ram);
        if (!holds_content(ram, BASE, 16 * page, 1))
            atomic_fetch_add(&bad, 1);
        must(kuf_close(&kuf, KUF_END_POISON) == 0, "kuf_close: %s", kuf_error());
        munmap(ram, length);
        ram = map_anonymous(length);
    }
    munmap(ram, length);
    return NULL;
}

int main(void)
{
    begin_watched(100);
    page = page_size();
    length = PAGES * page;
    unsigned char *ram = map_anonymous(length);
    struct kuf *kuf = open_here(source_fill, ram);
    pthread_t threads[CHURNERS + 2];
    for (int i = 0; i < CHURNERS; i++)
        must(pthread_create(&threads[i], NULL, churn, (void *)(uintptr_t)(i + 1)) == 0, "a thread");
    must(pthread_create(&threads[CHURNERS], NULL, touch_and_give, ram) == 0, "a thread");
    must(pthread_create(&threads[CHURNERS + 1], NULL, come_and_go, NULL) == 0, "a thread");
    for (int i = 0; i < FORKS; i++) {
        if (i % 4 == 0)
            must(kuf_discard(kuf, BASE, length / 2, KUF_DISCARD_REFILL) >= 0, "kuf_discard: %s", kuf_error());
        pid_t child = fork();
        if (child == 0) {
            watchdog(60);
            _exit(!holds_content(ram, BASE, length / 4, 1));
        }
        expect_child(child);
    }
    atomic_store(&over, true);
    for (int i = 0; i < CHURNERS + 2; i++)
        pthread_join(threads[i], NULL);
    is(atomic_load(&bad), 0, "%d forks came through, and every child read its own bytes", FORKS);
    ok(stats_of(kuf).events_fork >= FORKS, "each was reported");
    close_watched(kuf, KUF_END_POISON);
    munmap(ram, length);
    return done();
}
