/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Two kuf_resolve of one page at once, of which one has a source that is not readable: the bytes of the other arrive. */
#include "harness.h"

#define BASE UINT64_C(0x40000000)
enum { ROUNDS = 400 };

static struct kuf *kuf;
static pthread_barrier_t both;
static atomic_int asked;

static int defer(void *opaque, struct kuf_fill *fill)
{
    (void)opaque, (void)fill;
    atomic_fetch_add(&asked, 1);
    return KUF_FILL_DEFERRED;
}

static void *resolve(void *src)
{
    pthread_barrier_wait(&both);
    return (void *)kuf_resolve(kuf, BASE, src, page_size(), 0);
}

int main(void)
{
    begin();
    size_t page = page_size();
    unsigned char *ram = map_anonymous(page), *bytes = map_anonymous(page);
    write_content(bytes, BASE, page, 1);
    kuf = open_with((struct kuf_options){.fill = defer});
    add(kuf, BASE, ram, page);
    must(pthread_barrier_init(&both, NULL, 2) == 0, "a barrier");
    int wrong = 0;
    for (int round = 1; round <= ROUNDS && !wrong; round++) {
        struct toucher toucher = {.memory = ram, .gpa = BASE, .length = page, .generation = 1};
        start_toucher(&toucher);
        while (atomic_load(&asked) < round) sched_yield();
        pthread_t bad = start(resolve, (void *)8), good = start(resolve, bytes);
        void *failed, *resolved;
        must(pthread_join(bad, &failed) == 0 && pthread_join(good, &resolved) == 0, "both return");
        uint64_t present = progress_of(kuf, BASE).present;
        wrong = (ssize_t)resolved != (ssize_t)page || (ssize_t)failed != -EFAULT || present != page;
        if (wrong) {
            printf("# round %d: %zd and %zd, present %ju\n", round, (ssize_t)failed, (ssize_t)resolved, (uintmax_t)present);
            kuf_resolve(kuf, BASE, bytes, page, 0);
        }
        must(join_toucher(&toucher), "the toucher reads the page's bytes");
        must(kuf_discard(kuf, BASE, page, KUF_DISCARD_REFILL) == 0, "kuf_discard");
    }
    ok(!wrong, "the bytes of the call that returned success arrive, %d times", ROUNDS);
    close_with(kuf, KUF_END_POISON);
    return done();
}
