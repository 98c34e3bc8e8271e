/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A page that the guest has given back does not prevent the removal of its slot. A thread that touches it meanwhile
 * continues: the kernel may leave the thread asleep when the range is unregistered (in a few of a thousand rounds on
 * Linux 6.18), and the library does not read a userfaultfd of the caller's afterwards.
 */
#include "uffd.h"

#define BASE UINT64_C(0x10000000)
enum { ROUNDS = 4000 };

static struct source source = SOURCE_INIT;
static const volatile unsigned char *touched;
static atomic_ulong round_begun, round_done;
static atomic_bool not_zero;

static void *touch_each_round(void *unused)
{
    (void)unused;
    for (unsigned long n = 1; n <= ROUNDS; n++) {
        while (atomic_load(&round_begun) < n)
            ;
        for (uint64_t until = now_ns() + n % 64 * 50; now_ns() < until;)
            ;
        if (*touched != 0)
            atomic_store(&not_zero, true);
        atomic_store(&round_done, n);
    }
    return NULL;
}

int main(void)
{
    begin();
    size_t page = page_size();
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = source_fill, .opaque = &source, .flags = KUF_OPEN_ADOPT_ONLY, .fill_threads = 1});
    unsigned char *ram = map_anonymous(page);
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = page,
                                .hva = (uintptr_t)ram, .uffd = own_userfaultfd(0)};
    touched = ram;
    pthread_t toucher = start(touch_each_round, NULL);
    for (unsigned long n = 1; n <= ROUNDS; n++) {
        must(madvise(ram, page, MADV_DONTNEED) == 0, "the page is dropped");
        must(kuf_add_memory(kuf, &memory) == 0, "%s", kuf_error());
        must(kuf_discard(kuf, BASE, page, KUF_DISCARD_ZERO) == 0, "%s", kuf_error());
        atomic_store(&round_begun, n);
        for (uint64_t until = now_ns() + n / 64 % 64 * 200; now_ns() < until;)
            ;
        must(remove_patiently(kuf, BASE) == 0, "the slot is removed");
        wait_until(atomic_load(&round_done) == n);
    }
    pthread_join(toucher, NULL);
    ok(!atomic_load(&not_zero), "each time the page is zero, and its toucher goes on");
    close_with(kuf, 0);
    close(memory.uffd);
    return done();
}
