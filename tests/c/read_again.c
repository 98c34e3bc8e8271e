/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A fault waits in the list of kuf_read while a kuf_resolve for its page fails: the page is pending as before, and
 * kuf_read still returns it. Each round is a fault, with threads beside it whose kuf_resolve fails with -EFAULT.
 */
#include "touches.h"
#include "watched.h"

#define BASE UINT64_C(0x40000000)
enum { FAILING = 2, ROUNDS = 400 };

static struct kuf *kuf;
static atomic_bool stop;

static void *fails(void *unused)
{
    while (!atomic_load(&stop)) {
        ssize_t got = kuf_resolve(kuf, BASE, (const void *)16, page_size(), 0);
        must(got == -EFAULT || got == 0, "kuf_resolve with an address that is not mapped: %zd", got);
    }
    return unused;
}

/* Takes the one fault and answers it, until the toucher continues. */
static void serve_one(const void *bytes, struct one_touch *one)
{
    struct kuf_fault fault;
    ssize_t got;
    while ((got = kuf_read(kuf, &fault, 1)) == -EAGAIN)
        must(kuf_poll(kuf, -1) == 1, "kuf_poll waits for the fault");
    must(got == 1 && fault.gpa == BASE, "kuf_read gives the fault: %zd", got);
    while (!atomic_load(&one->finished))
        must(kuf_resolve(kuf, BASE, bytes, page_size(), 0) >= 0, "kuf_resolve: %s", kuf_error());
}

int main(void)
{
    static unsigned char bytes[1 << 16];
    pthread_t failing[FAILING];
    begin_watched(60);
    kuf = watch(open_driven(NULL));
    unsigned char *ram = map_anonymous(page_size());
    add(kuf, BASE, ram, page_size());
    write_content(bytes, BASE, page_size(), 1);
    for (int i = 0; i < FAILING; i++)
        failing[i] = start(fails, NULL);
    for (int i = 0; i < ROUNDS; i++) {
        struct one_touch one;
        touch_in_thread(&one, ram);
        serve_one(bytes, &one);
        pthread_join(one.thread, NULL);
        must(one.raised == 0 && one.word == word_of(BASE, 1), "the toucher reads the page");
        must(kuf_discard(kuf, BASE, page_size(), KUF_DISCARD_REFILL) == 0, "kuf_discard: %s", kuf_error());
    }
    ok(true, "%d faults were given, though kuf_resolve failed for their page meanwhile", ROUNDS);
    atomic_store(&stop, true);
    for (int i = 0; i < FAILING; i++)
        pthread_join(failing[i], NULL);
    close_watched(kuf, KUF_END_POISON);
    return done();
}
