/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* kuf_close: refuses, poisons, fills or hands over unresolved pages; ends every wait; releases exactly once. */
#include "harness.h"

#include <linux/userfaultfd.h>

#define BASE UINT64_C(0x10000000)
enum { PAGES = 32 };

static size_t page, length;

/* A handle with one slot of anonymous memory. */
static struct kuf *open_slot(struct source *source, unsigned char **ram)
{
    struct kuf *kuf = open_with((struct kuf_options){.fill = source_fill, .event = source_event,
                                                     .release = source_release, .opaque = source, .demand_run = page});
    *ram = map_anonymous(length);
    add(kuf, BASE, *ram, length);
    return kuf;
}

static void by_flags(void)
{
    static struct source source = SOURCE_INIT;
    unsigned char *ram;
    struct kuf *kuf = open_with((struct kuf_options){.fill = source_fill, .release = source_release, .opaque = &source});
    struct kuf *closed = kuf;
    close_with(kuf, 0);
    is(atomic_load(&source.released), 1, "no memory: closed and released");
    is(kuf_close(&closed, 0), -EBADF, "a closed handle is recognised");
    is(kuf_pending(closed, NULL, 0), -EBADF, "by every call");

    kuf = open_slot(&source, &ram);
    ok(holds_content(ram, BASE, 3 * page, 1), "three pages are touched");
    struct kuf *copy = kuf;
    is(kuf_close(&copy, 0), -EBUSY, "unresolved pages and no flag");
    ok(copy == kuf, "leaves the pointer");
    is(atomic_load(&source.released), 1, "and releases nothing");
    ok(holds_content(ram + 3 * page, BASE + 3 * page, page, 1), "the handle serves as before");
    close_with(kuf, KUF_END_POISON);
    is(atomic_load(&source.released), 2, "KUF_END_POISON: released before it returns");
    ok(holds_content(ram, BASE, 4 * page, 1), "KUF_END_POISON: filled pages stay");
    int raised = 0;
    for (int i = 4; i < PAGES; i++)
        raised += touch(ram + i * page) == poison_signal();
    is(raised, PAGES - 4, "KUF_END_POISON: the others raise the signal");
    ok(!is_registered(ram), "KUF_END_POISON: no registration is left");

    kuf = open_slot(&source, &ram);
    close_with(kuf, KUF_END_POPULATE);
    is(atomic_load(&source.released), 3, "KUF_END_POPULATE: released");
    ok(holds_content(ram, BASE, length, 1), "KUF_END_POPULATE: everything is filled");
    ok(!is_registered(ram), "KUF_END_POPULATE: no registration is left");

    kuf = copy = open_slot(&source, &ram);
    atomic_store(&source.bad_answer, -EIO);
    atomic_store(&source.bad_gpa, BASE + 9 * page);
    is(kuf_close(&copy, KUF_END_POPULATE), -EIO, "KUF_END_POPULATE with a source that fails");
    ok(copy == kuf, "leaves the handle open");
    is(atomic_load(&source.released), 3, "and releases nothing");
    ok(holds_content(ram, BASE, 9 * page, 1), "it serves as before");
    close_with(kuf, KUF_END_POPULATE | KUF_END_POISON);
    is(touch(ram + 9 * page), poison_signal(), "with KUF_END_POISON too: that page is poisoned");
    ok(holds_content(ram + 10 * page, BASE + 10 * page, length - 10 * page, 1), "and the others are filled");
    is(atomic_load(&source.released), 4, "released");
    atomic_store(&source.bad_gpa, NO_GPA);

    kuf = open_slot(&source, &ram);
    is(kuf_discard(kuf, BASE, length, KUF_DISCARD_ZERO), 0, "all of it is given back");
    close_with(kuf, 0);
    ok(holds_zeroes(ram, length), "which is nothing unresolved: it reads as zero afterwards");

    kuf = open_driven(&source);
    ram = map_anonymous(length);
    add(kuf, BASE, ram, length);
    copy = kuf;
    is(kuf_close(&copy, 0), -EBUSY, "caller-driven: unresolved pages");
    is(kuf_resolve(kuf, BASE, NULL, length, KUF_RESOLVE_ZERO), length, "caller-driven: all resolved");
    close_with(kuf, 0);
}

/* ---- While things run ---------------------------------------------------------------------------------------------- */

struct closer {
    struct kuf *kuf;
    uint32_t flags;
    int got;
    atomic_bool returned;
};

static void *close_it(void *argument)
{
    struct closer *closer = argument;
    closer->got = kuf_close(&closer->kuf, closer->flags);
    atomic_store(&closer->returned, true);
    return NULL;
}

struct bus_toucher {
    unsigned char *at;
    atomic_int raised; /* -1: not yet */
};

static void *touch_one(void *argument)
{
    struct bus_toucher *toucher = argument;
    atomic_store(&toucher->raised, touch(toucher->at));
    return NULL;
}

static void while_fills_run(void)
{
    static struct source source = SOURCE_INIT;
    unsigned char *ram;
    struct closer closer = {.kuf = open_slot(&source, &ram), .flags = KUF_END_POISON};
    struct kuf *kuf = closer.kuf;
    struct bus_toucher toucher = {.at = ram, .raised = -1};
    atomic_store(&source.hold, true);
    pthread_t touching = start(touch_one, &toucher);
    wait_until(atomic_load(&source.inside) == 1);
    pthread_t closing = start(close_it, &closer);
    wait_until(kuf_pending(kuf, NULL, 0) == -EBADF);
    ok(true, "other calls fail with -EBADF once closing has begun");
    struct kuf *copy = kuf;
    is(kuf_close(&copy, KUF_END_POISON), -EBADF, "a second close too");
    /* The page is poisoned first, so its toucher does not wait for the callback. */
    pthread_join(touching, NULL);
    is(atomic_load(&toucher.raised), poison_signal(), "a thread that waits is let go with the signal, the fill still running");
    ok(!atomic_load(&closer.returned), "kuf_close waits for the callback");
    is(atomic_load(&source.released), 0, "and nothing is released");
    atomic_store(&source.hold, false);
    pthread_join(closing, NULL);
    is(closer.got, 0, "it returns when the callback has");
    is(atomic_load(&source.released), 1, "released once");
    is(atomic_load(&source.inside), 0, "with no callback running");
    is(touch(ram), poison_signal(), "the late result is dropped");

    static struct source second = SOURCE_INIT;
    kuf = open_slot(&second, &ram);
    toucher = (struct bus_toucher){.at = ram, .raised = -1};
    atomic_store(&second.hold, true);
    touching = start(touch_one, &toucher);
    wait_until(atomic_load(&second.inside) == 1);
    close_with(kuf, KUF_END_POISON | KUF_END_NOWAIT);
    is(atomic_load(&second.inside), 1, "KUF_END_NOWAIT returns while a callback runs");
    is(atomic_load(&second.released), 0, "KUF_END_NOWAIT: not released yet");
    pthread_join(touching, NULL);
    is(atomic_load(&toucher.raised), poison_signal(), "KUF_END_NOWAIT: the thread that waits gets the signal");
    atomic_store(&second.hold, false);
    wait_until(atomic_load(&second.released) > 0);
    wait_until(threads_named("kuf-") == 0);
    is(atomic_load(&second.released), 1, "KUF_END_NOWAIT: released once, when the callback has returned");
    is(touch(ram), poison_signal(), "KUF_END_NOWAIT: the late result is dropped");

    static struct source third = SOURCE_INIT;
    kuf = open_slot(&third, &ram);
    is(kuf_ensure(kuf, BASE, length, -1), 0, "all of a slot is filled");
    close_with(kuf, KUF_END_NOWAIT);
    wait_until(atomic_load(&third.released) == 1);
    ok(holds_content(ram, BASE, length, 1), "KUF_END_NOWAIT with nothing running");
}

struct waiting {
    struct kuf *kuf;
    int what, got;
    atomic_bool begun;
};

static void *wait_in_call(void *argument)
{
    struct waiting *waiting = argument;
    atomic_store(&waiting->begun, true);
    waiting->got = waiting->what == 0   ? kuf_poll(waiting->kuf, -1)
                   : waiting->what == 1 ? kuf_ensure(waiting->kuf, BASE + 5 * page, page, -1)
                                        : kuf_vcpu_fault(waiting->kuf, BASE + 6 * page, page, 0);
    return NULL;
}

static void while_calls_wait(void)
{
    static const char *const names[] = {"kuf_poll", "kuf_ensure", "kuf_vcpu_fault"};
    for (int what = 0; what < 3; what++) {
        struct kuf *kuf = open_driven(NULL);
        unsigned char *ram = map_anonymous(length);
        add(kuf, BASE, ram, length);
        struct waiting waiting = {.kuf = kuf, .what = what};
        pthread_t thread = start(wait_in_call, &waiting);
        if (what == 0) {
            wait_until(atomic_load(&waiting.begun));
            sleep_ms(20);
        } else {
            wait_until(kuf_pending(kuf, NULL, 0) == 1);
        }
        close_with(kuf, KUF_END_POISON);
        pthread_join(thread, NULL);
        /* A thread that has not begun to wait yet finds the handle closed. */
        ok(waiting.got == -ECANCELED || (what == 0 && waiting.got == -EBADF), "%s: a wait ends with -ECANCELED (%d)",
           names[what], waiting.got);
    }
}

static void handing_over(void)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) < 0) {
        skip_part("KUF_END_HANDOVER: no userfaultfd to hand over: %s", strerror(errno));
        return;
    }
    static struct source source = SOURCE_INIT;
    struct kuf *kuf = open_serviced(&source);
    unsigned char *ram = map_anonymous(length);
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = length,
                                .hva = (uintptr_t)ram, .uffd = uffd};
    is(kuf_add_memory(kuf, &memory), 0, "memory under the caller's userfaultfd: %s", kuf_error());
    is(kuf_ensure(kuf, BASE, page, -1), 0, "one page is filled");
    struct kuf_progress_info progress = progress_of(kuf, BASE);
    close_with(kuf, KUF_END_HANDOVER);
    is(atomic_load(&source.released), 1, "KUF_END_HANDOVER: released");
    ok(is_registered(ram + progress.present), "KUF_END_HANDOVER: the rest stays registered");
    ok(holds_content(ram, BASE, page, 1), "KUF_END_HANDOVER: filled pages stay");

    /* The next handler: this test. */
    struct toucher toucher = {.memory = ram + length - page, .gpa = BASE + length - page, .length = page, .generation = 1};
    start_toucher(&toucher);
    struct uffd_msg message;
    while (read(uffd, &message, sizeof(message)) != (ssize_t)sizeof(message))
        sleep_ms(1);
    is(message.event, UFFD_EVENT_PAGEFAULT, "KUF_END_HANDOVER: a fault comes to the caller's own descriptor");
    unsigned char *bytes = map_anonymous(page);
    write_content(bytes, BASE + length - page, page, 1);
    struct uffdio_copy copy = {.dst = (uintptr_t)ram + length - page, .src = (uintptr_t)bytes, .len = page};
    is(ioctl(uffd, UFFDIO_COPY, &copy), 0, "KUF_END_HANDOVER: which can answer it");
    ok(join_toucher(&toucher), "KUF_END_HANDOVER: and the toucher goes on");
    close(uffd);
}

/* A terabyte that was hardly touched: to poison it page by page would take many seconds and 2 GiB of page tables. */
static void long_runs(void)
{
    /* Without poison and PAGEMAP_SCAN, the library reads an entry for each page when the slot is added. */
    const uint64_t size = UINT64_C(1) << (poison_event() == KUF_EVENT_POISONED ? 40 : 34), near_end = size - 4 * page;
    const struct {
        uint64_t at;
        int raises;
    } looks[] = {{page, SIGSEGV}, {size / 2 + page, SIGSEGV}, {near_end - page, SIGSEGV},
                 {near_end + page, poison_signal()}, {size - page, poison_signal()}};
    for (int remove = 0; remove < 2; remove++) {
        struct source source = SOURCE_INIT;
        struct kuf *kuf = open_with((struct kuf_options){.fill = source_fill, .event = source_event, .opaque = &source,
                                                         .demand_run = page});
        unsigned char *ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        must(ram != MAP_FAILED, "a terabyte of address space");
        add(kuf, BASE, ram, size);
        const uint64_t touched[] = {0, size / 2, near_end};
        for (size_t i = 0; i < sizeof(touched) / sizeof(touched[0]); i++)
            ok(holds_content(ram + touched[i], BASE + touched[i], page, 1), "page %#" PRIx64 " is touched", touched[i]);
        if (remove)
            is(remove_patiently(kuf, BASE), 0, "kuf_remove_memory with KUF_END_POISON");
        close_with(kuf, KUF_END_POISON);
        is(source.events[KUF_EVENT_INACCESSIBLE], 1, "long runs are made inaccessible, and it is said once");
        is(source.last[KUF_EVENT_INACCESSIBLE].error, -ECANCELED, "and why");
        is(source.events[KUF_EVENT_POISONED], poison_event() == KUF_EVENT_POISONED, "short ones are poisoned, and it is said once");
        for (size_t i = 0; i < sizeof(touched) / sizeof(touched[0]); i++)
            ok(holds_content(ram + touched[i], BASE + touched[i], page, 1), "page %#" PRIx64 " stays", touched[i]);
        for (size_t i = 0; i < sizeof(looks) / sizeof(looks[0]); i++)
            is(touch(ram + looks[i].at), looks[i].raises, "page %#" PRIx64 " shows no zeroes", looks[i].at);
        ok(!is_registered(ram), "no registration is left");
        munmap(ram, size);
    }
}

/* A callback for which kuf_close waits itself waits for a thread that touches a page which the guest has given back. */
static atomic_bool inside, may_touch, touched;

static int fill_when_touched(void *opaque, struct kuf_fill *fill)
{
    atomic_store(&inside, true);
    while (!atomic_load(&touched))
        sleep_ms(1);
    return source_fill(opaque, fill);
}

static void *touch_given_back(void *ram)
{
    wait_until(atomic_load(&may_touch));
    ok(holds_zeroes(ram, page), "a page that was given back is zero while the handle is being closed");
    atomic_store(&touched, true);
    return NULL;
}

static void *close_poisoned(void *kuf)
{
    close_with(kuf, KUF_END_POISON);
    return NULL;
}

static void touched_at_the_end(void)
{
    static struct source source = SOURCE_INIT;
    unsigned char *ram = map_anonymous(length);
    struct kuf *kuf = open_with((struct kuf_options){.fill = fill_when_touched, .opaque = &source, .demand_run = page});
    add(kuf, BASE, ram, length);
    is(kuf_discard(kuf, BASE, page, KUF_DISCARD_ZERO), 0, "a page is given back");
    pthread_t toucher = start(touch_given_back, ram);
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = BASE + page, .len = page};
    is(kuf_populate(kuf, &request), 0, "another is being filled");
    wait_until(atomic_load(&inside));
    pthread_t closer = start(close_poisoned, kuf);
    wait_until(kuf_pending(kuf, NULL, 0) == -EBADF);
    sleep_ms(20);
    atomic_store(&may_touch, true);
    pthread_join(toucher, NULL);
    pthread_join(closer, NULL);
}

int main(void)
{
    begin();
    page = page_size();
    length = PAGES * page;
    by_flags();
    while_fills_run();
    while_calls_wait();
    handing_over();
    long_runs();
    touched_at_the_end();
    return done();
}
