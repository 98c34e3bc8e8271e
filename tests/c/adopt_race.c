/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Slots that share a userfaultfd of the caller's are added and removed on several threads: every one of them is served.
 */
#include "uffd.h"

#define BASE UINT64_C(0x40000000)
enum { SLOTS = 2, ROUNDS = 300 };

static struct source source = SOURCE_INIT;
static size_t page;
static unsigned char *ram;
static struct kuf *kuf;
static int uffd;
static atomic_int ready;

struct change {
    int slot, got;
    bool add;
};

static void *change_one(void *argument)
{
    struct change *change = argument;
    uint64_t gpa = BASE + (uint64_t)change->slot * page;
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = gpa, .len = page,
                                .hva = (uintptr_t)ram + (size_t)change->slot * page, .uffd = uffd};
    atomic_fetch_add(&ready, 1);
    while (atomic_load(&ready) < 2)
        ;
    change->got = change->add ? kuf_add_memory(kuf, &memory) : remove_patiently(kuf, gpa);
    return NULL;
}

static int both(struct change first, struct change second)
{
    atomic_store(&ready, 0);
    pthread_t threads[] = {start(change_one, &first), start(change_one, &second)};
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    return (first.got == 0) + (second.got == 0);
}

/* A toucher that is not served hangs, and the watchdog reports it. */
static int touched(int slot)
{
    struct toucher toucher = {.memory = ram + (size_t)slot * page, .gpa = BASE + (uint64_t)slot * page, .length = page,
                              .generation = 1};
    start_toucher(&toucher);
    return join_toucher(&toucher);
}

int main(void)
{
    begin();
    page = page_size();
    int changed = 0, served = 0;
    for (int round = 0; round < ROUNDS; round++) {
        uffd = own_userfaultfd(0);
        kuf = open_with((struct kuf_options){
            .fill = source_fill, .opaque = &source, .flags = KUF_OPEN_ADOPT_ONLY, .fill_threads = 2});
        ram = map_anonymous(SLOTS * page);
        /* The first two: one of them adopts the userfaultfd. */
        changed += both((struct change){.slot = 0, .add = true}, (struct change){.slot = 1, .add = true});
        served += touched(0) + touched(1);
        /* The last one is removed while another is added. */
        must(kuf_remove_memory(kuf, BASE, KUF_END_POPULATE) == 0, "a slot is removed");
        must(madvise(ram, page, MADV_DONTNEED) == 0, "its page is dropped");
        changed += both((struct change){.slot = 1, .add = false}, (struct change){.slot = 0, .add = true});
        served += touched(0);
        must(kuf_close(&kuf, KUF_END_POISON) == 0, "kuf_close");
        close(uffd);
        munmap(ram, SLOTS * page);
    }
    is(changed, 4 * ROUNDS, "slots come and go");
    is(served, 3 * ROUNDS, "and are served");
    return done();
}
