/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Several handles at once do not affect each other, and fifty in a row leave nothing behind. */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { HANDLES = 8, PAGES = 64, CYCLES = 50 };

int main(void)
{
    begin();
    size_t page = page_size(), length = PAGES * page;
    static struct source sources[HANDLES];
    struct kuf *handles[HANDLES], *closed[HANDLES];
    unsigned char *rams[HANDLES];
    struct toucher touchers[HANDLES];
    for (int i = 0; i < HANDLES; i++) {
        sources[i] = (struct source)SOURCE_INIT;
        atomic_store(&sources[i].generation, (uint64_t)i + 1);
        handles[i] = open_serviced(&sources[i]);
        rams[i] = map_anonymous(length);
        /* The same guest address in each: a handle is one VM. */
        add(handles[i], BASE, rams[i], length);
    }
    for (int i = 0; i < HANDLES; i++) {
        touchers[i] = (struct toucher){.memory = rams[i], .gpa = BASE, .length = length, .generation = (uint64_t)i + 1};
        start_toucher(&touchers[i]);
    }
    for (int i = 0; i < HANDLES; i++)
        ok(join_toucher(&touchers[i]), "handle %d reads from its own source", i);
    for (int i = 0; i < HANDLES; i++)
        is(atomic_load(&sources[i].bytes), length, "source %d filled its own memory, once", i);

    /* Closing one does not affect the others. */
    for (int i = 0; i < HANDLES; i += 2) {
        closed[i] = handles[i];
        close_with(handles[i], 0);
        is(atomic_load(&sources[i].released), 1, "handle %d is released", i);
    }
    for (int i = 1; i < HANDLES; i += 2) {
        atomic_store(&sources[i].generation, 100);
        is(kuf_discard(handles[i], BASE, length, KUF_DISCARD_REFILL), 0, "handle %d drops its pages", i);
        touchers[i].generation = 100;
        start_toucher(&touchers[i]);
    }
    for (int i = 1; i < HANDLES; i += 2) {
        ok(join_toucher(&touchers[i]), "handle %d serves on", i);
        is(atomic_load(&sources[i].released), 0, "and is not released");
    }

    int descriptors = 0;
    for (int i = 0; i < CYCLES; i++) {
        static struct source source = SOURCE_INIT;
        struct kuf *kuf = open_serviced(&source);
        empty_again(rams[0], length);
        add(kuf, BASE, rams[0], length);
        must(holds_content(rams[0] + page * (i % PAGES), BASE + page * (i % PAGES), page, 1), "cycle %d is served", i);
        struct kuf *copy = kuf;
        must(kuf_close(&copy, i % 2 ? KUF_END_POPULATE : KUF_END_POISON) == 0, "cycle %d: %s", i, kuf_error());
        must(kuf_pending(kuf, NULL, 0) == -EBADF, "a closed handle stays closed");
        must(kuf_pending(closed[0], NULL, 0) == -EBADF, "and so do older ones");
        must(atomic_load(&source.released) == i + 1, "each is released once");
        if (i == 0)
            descriptors = open_descriptors();
    }
    is(open_descriptors(), descriptors, "%d handles later no descriptor is left", CYCLES);
    for (int i = 1; i < HANDLES; i += 2)
        close_with(handles[i], 0);
    for (int i = 0; i < HANDLES; i += 2)
        is(kuf_pending(closed[i], NULL, 0), -EBADF, "handle %d, closed long ago, is recognised", i);
    wait_until(threads_named("kuf-") == 0);
    return done();
}
