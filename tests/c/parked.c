/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A fault in memory that is registered with an adopted userfaultfd and in no slot is kept for a slot that may be added.
 * When the library gives up the userfaultfd, the next reader gets the fault.
 */
#include "uffd.h"

#define BASE UINT64_C(0x40000000)

static struct source source = SOURCE_INIT;
static size_t page;
static atomic_int through;

static void *touch_one(void *memory)
{
    if (holds_content(memory, BASE, page, 2))
        atomic_fetch_add(&through, 1);
    return NULL;
}

/* Serves the faults that it reads until both threads are done. If it reads none, the watchdog ends the program. */
static int serve_until_through(int uffd)
{
    unsigned char *bytes = map_anonymous(page);
    write_content(bytes, BASE, page, 2);
    int heard = 0;
    while (atomic_load(&through) < 2) {
        struct uffd_msg message;
        if (read(uffd, &message, sizeof(message)) != sizeof(message)) {
            sleep_ms(1);
            continue;
        }
        heard += message.event == UFFD_EVENT_PAGEFAULT;
        struct uffdio_copy copy = {.dst = message.arg.pagefault.address & ~(page - 1), .src = (uintptr_t)bytes, .len = page};
        if (ioctl(uffd, UFFDIO_COPY, &copy) < 0 && errno == EEXIST) {
            struct uffdio_range range = {copy.dst, page};
            ioctl(uffd, UFFDIO_WAKE, &range);
        }
    }
    munmap(bytes, page);
    return heard;
}

enum how { HANDOVER, HANDOVER_NOWAIT, REMOVE, CLOSE };

static void let_go(enum how how, const char *what)
{
    int uffd = own_userfaultfd(0);
    unsigned char *slot = map_anonymous(page), *other = map_anonymous(page);
    struct uffdio_register range = {.range = {(uintptr_t)other, page}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    must(ioctl(uffd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER: %s", strerror(errno));
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = source_fill, .opaque = &source, .flags = KUF_OPEN_ADOPT_ONLY, .fill_threads = 1});
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = page,
                                .hva = (uintptr_t)slot, .uffd = uffd};
    is(kuf_add_memory(kuf, &memory), 0, "%s: a slot is added", what);
    atomic_store(&through, 0);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        threads[i] = start(touch_one, other);
    wait_until(stats_of(kuf).faults == 2);
    if (how == REMOVE)
        is(kuf_remove_memory(kuf, BASE, KUF_END_POISON), 0, "%s: the last slot is removed", what);
    else
        close_with(kuf, how == CLOSE ? KUF_END_POISON
                                     : KUF_END_HANDOVER | (how == HANDOVER_NOWAIT ? KUF_END_NOWAIT : 0));
    ok(serve_until_through(uffd) > 0, "%s: the next reader hears of the fault", what);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    if (how == REMOVE)
        close_with(kuf, 0);
    close(uffd);
    munmap(slot, page);
    munmap(other, page);
}

int main(void)
{
    begin();
    page = page_size();
    let_go(HANDOVER, "KUF_END_HANDOVER");
    let_go(HANDOVER_NOWAIT, "KUF_END_HANDOVER and NOWAIT");
    let_go(REMOVE, "kuf_remove_memory");
    let_go(CLOSE, "KUF_END_POISON");
    return done();
}
