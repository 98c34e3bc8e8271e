/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memory of a userfaultfd of the caller's that is given back before its slot is added reads as zero, also if another
 * slot was there a moment before, while threads give memory back elsewhere all the time.
 */
#include "uffd.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 4, ROUNDS = 300, GIVERS = 2 };

static struct source source = SOURCE_INIT;
static size_t page;
static unsigned char *elsewhere;
static atomic_bool stop;

static void register_missing(int uffd, void *at, size_t len)
{
    struct uffdio_register range = {.range = {(uintptr_t)at, len}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    must(ioctl(uffd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER");
}

/* Makes events all the time. */
static void *give_back(void *argument)
{
    unsigned char *mine = elsewhere + (size_t)(uintptr_t)argument * page;
    while (!atomic_load(&stop)) {
        must(madvise(mine, page, MADV_DONTNEED) == 0, "madvise");
        /* Slots are added only when no event is on its way. */
        nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
    }
    return NULL;
}

int main(void)
{
    begin();
    page = page_size();
    int uffd = own_userfaultfd(UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_EVENT_REMAP);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = source_fill, .opaque = &source, .flags = KUF_OPEN_ADOPT_ONLY, .fill_threads = 2});
    unsigned char *ram = map_anonymous(PAGES * page);
    elsewhere = map_anonymous(GIVERS * page);
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = PAGES * page,
                                .hva = (uintptr_t)ram, .uffd = uffd};
    struct kuf_memory other = {.size = sizeof(other), .gpa = 2 * BASE, .len = GIVERS * page,
                               .hva = (uintptr_t)elsewhere, .uffd = uffd};
    register_missing(uffd, elsewhere, GIVERS * page);
    must(kuf_add_memory(kuf, &other) == 0, "the slot elsewhere");
    pthread_t givers[GIVERS];
    for (int i = 0; i < GIVERS; i++) givers[i] = start(give_back, (void *)(uintptr_t)i);
    int wrong = 0;
    for (int round = 0; round < ROUNDS; round++) {
        register_missing(uffd, ram, PAGES * page);
        must(madvise(ram + page, page, MADV_DONTNEED) == 0, "madvise before the slot is added");
        int got;
        while ((got = kuf_add_memory(kuf, &memory)) == -EAGAIN)
            ;
        must(got == 0, "kuf_add_memory: %s", kuf_error());
        wrong += ram[page] != 0 || !holds_content(ram, BASE, page, 1);
        while ((got = kuf_remove_memory(kuf, BASE, KUF_END_POISON)) == -EBUSY)
            ;
        must(got == 0, "kuf_remove_memory: %s", kuf_error());
        must(mmap(ram, PAGES * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == ram, "anew");
    }
    is(wrong, 0, "a page is zero that was given back before its slot was added, the others have their bytes, %d times", ROUNDS);
    atomic_store(&stop, true);
    for (int i = 0; i < GIVERS; i++) pthread_join(givers[i], NULL);
    close_with(kuf, KUF_END_POISON);
    close(uffd);
    return done();
}
