/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Anonymous memory filled by a callback: the callback's arguments, one request for each page, and the bytes that touchers read. */
#include "harness.h"

#define BASE UINT64_C(0x100000000)
#define OTHER UINT64_C(0x300000000)
enum { PAGES = 1024, TOUCHERS = 4, FEW = 16 };

static unsigned char *ram, *other;
static int ram_name, other_name;
static atomic_int asked[PAGES], fills, wrong, completed;
static _Atomic uint64_t complete_len;

static int fill(void *opaque, struct kuf_fill *fill)
{
    size_t page = page_size();
    atomic_fetch_add(&fills, 1);
    bool good = opaque == asked && fill->size == sizeof(*fill) && fill->page_size == page && fill->filled == fill->len &&
                fill->len > 0 && fill->len % page == 0 && fill->len <= (fill->flags & KUF_RUN_DEMAND ? 64 << 10 : 256 << 10) && fill->gpa % page == 0 &&
                !(fill->flags & ~(uint32_t)(KUF_RUN_DEMAND | KUF_RUN_IN_PLACE)) &&
                (uintptr_t)fill->buf % page == 0;
    if (fill->memory_opaque == &ram_name) {
        char name[32] = "";
        pthread_getname_np(pthread_self(), name, sizeof(name));
        good = good && strncmp(name, "kuf-serve-", 10) == 0 && fill->gpa - BASE == fill->memory_offset && fill->memory_offset + fill->len <= PAGES * page;
        for (uint64_t at = 0; good && at < fill->len; at += page)
            atomic_fetch_add(&asked[(fill->memory_offset + at) / page], 1);
    } else {
        good = good && fill->memory_opaque == &other_name && fill->gpa - OTHER == fill->memory_offset;
    }
    if (!good)
        atomic_fetch_add(&wrong, 1);
    write_content(fill->buf, fill->gpa, fill->len, 1);
    return KUF_FILL_DONE;
}

static void event(void *opaque, const struct kuf_event *event)
{
    (void)opaque;
    if (event->kind == KUF_EVENT_COMPLETE && event->gpa == BASE) {
        atomic_store(&complete_len, event->len);
        atomic_fetch_add(&completed, 1);
    }
}

/* Each thread in its own order, so that they meet on pages from different sides. */
static void *touch_all(void *argument)
{
    int which = *(int *)argument;
    size_t page = page_size();
    long bad = 0;
    for (int i = 0; i < PAGES; i++) {
        int at = which == 0 ? i : which == 1 ? PAGES - 1 - i : i * (2 * which + 1) % PAGES;
        if (!holds_content(ram + at * page, BASE + at * page, page, 1))
            bad++;
    }
    return (void *)bad;
}

int main(void)
{
    begin();
    size_t page = page_size();
    ram = map_anonymous(PAGES * page);
    other = map_anonymous(FEW * page);
    memset(other + 5 * page, 0xab, page);
    struct kuf *kuf = open_with((struct kuf_options){.fill = fill, .event = event, .opaque = asked});

    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = PAGES * page, .hva = (uintptr_t)ram,
                                .opaque = &ram_name};
    is(kuf_add_memory(kuf, &memory), 0, "memory is added");
    struct kuf_progress_info progress = progress_of(kuf, BASE);
    is(progress.gpa, BASE, "progress names the slot");
    is(progress.total, PAGES * page, "progress has the slot's length");
    is(progress.absent, PAGES * page, "all of it is absent");
    ok(!(progress.flags & KUF_PROGRESS_COMPLETE), "and the slot is not complete");

    pthread_t threads[TOUCHERS];
    int names[TOUCHERS];
    for (int i = 0; i < TOUCHERS; i++) {
        names[i] = i;
        threads[i] = start(touch_all, &names[i]);
    }
    for (int i = 0; i < TOUCHERS; i++) {
        void *bad;
        pthread_join(threads[i], &bad);
        is((long)bad, 0, "toucher %d reads every page's own bytes", i);
    }
    int not_once = 0;
    for (int i = 0; i < PAGES; i++)
        not_once += atomic_load(&asked[i]) != 1;
    is(not_once, 0, "every page is asked for exactly once");
    is(atomic_load(&wrong), 0, "every run is as the header describes it");

    wait_until(atomic_load(&completed) > 0);
    is(atomic_load(&complete_len), PAGES * page, "the completion event names the slot");
    progress = progress_of(kuf, BASE + 7 * page);
    ok((progress.flags & KUF_PROGRESS_COMPLETE) && progress.present == PAGES * page, "progress says complete");

    /* A slot added while the first is in use; writes fault too; what existed stays. */
    memory = (struct kuf_memory){.size = sizeof(memory), .gpa = OTHER, .len = FEW * page, .hva = (uintptr_t)other,
                                 .flags = KUF_MEMORY_POPULATED, .opaque = &other_name};
    is(kuf_add_memory(kuf, &memory), 0, "a second slot is added");
    other[0] = 'w';
    ok(other[0] == 'w' && holds_content(other + 8, OTHER + 8, page - 8, 1), "a write lands on the filled page");
    is(kuf_ensure(kuf, OTHER, FEW * page, -1), 0, "the rest is filled");
    ok(other[5 * page] == 0xab && other[6 * page - 1] == 0xab, "a page that existed before keeps its bytes");
    ok(holds_content(other + 6 * page, OTHER + 6 * page, 10 * page, 1), "its neighbours are filled");
    progress = progress_of(kuf, KUF_ALL);
    is(progress.present, (PAGES + FEW) * page, "all slots together are present");
    is(atomic_load(&completed), 1, "completion is told once");
    close_with(kuf, 0);
    return done();
}
