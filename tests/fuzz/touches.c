/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The guest: reads and writes of pages, and the madvise, munmap and mremap of its VMM.
 */
#include "fuzz.h"

static _Thread_local sigjmp_buf *volatile touching;

static void touched(int signal_number)
{
    sigjmp_buf *back = touching;
    if (back == NULL) {
        signal(signal_number, SIG_DFL);
        return;
    }
    touching = NULL;
    siglongjmp(*back, signal_number);
}

static void nothing(int signal_number)
{
    (void)signal_number;
}

void catch_signals(void)
{
    struct sigaction action = {.sa_handler = touched, .sa_flags = SA_NODEFER};
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGSEGV, &action, NULL);
    struct sigaction ignored = {.sa_handler = nothing};
    sigaction(SIGUSR1, &ignored, NULL);
}

/* ---- Reading ------------------------------------------------------------------------------------------------------- */

struct look {
    struct value values[8];
    unsigned count;
    bool mixed;
};

static void add_value(struct look *look, struct value value)
{
    for (unsigned i = 0; i < look->count; i++)
        if (memcmp(&look->values[i], &value, sizeof(value)) == 0)
            return;
    if (look->count < 8)
        look->values[look->count++] = value;
}

static void check_word(unsigned page, unsigned index, uint64_t word, struct value *value)
{
    char text[128];
    if (decode(page, index, word, value))
        return;
    describe_word(text, sizeof(text), word);
    fail("page %u word %u holds %s", page, index, text);
}

/*
 * Reads every word of a small page, and two of each 4 KiB of a huge one. Reports one value if all words agree, else
 * each value seen.
 */
static void look_at(unsigned page, const uint8_t *at, size_t length, struct look *look)
{
    const volatile uint64_t *words = (const volatile uint64_t *)at;
    size_t step = length > SMALL_PAGE ? 256 : 1;
    uint64_t first = words[0], mark = words[WRITE_WORD];
    struct value base = {0}, value;
    check_word(page, 0, first, &base);
    uint64_t per_index = first == 0 ? 0 : UINT64_C(1) << 10;
    for (size_t i = step; i < length / 8; i += step) {
        uint64_t word = words[i];
        if (word == first + i * per_index || i == WRITE_WORD)
            continue;
        look->mixed = true;
        check_word(page, (unsigned)i, word, &value);
        add_value(look, value);
    }
    check_word(page, WRITE_WORD, mark, &value);
    bool written = value.written != 0;
    if (!written && mark != first + WRITE_WORD * per_index)
        look->mixed = true;
    if (look->mixed) {
        add_value(look, base);
        add_value(look, value);
        return;
    }
    base.written = value.written;
    look->values[0] = base;
    look->count = 1;
}

static void failed_touch(struct look *look, int raised)
{
    look->values[0] = (struct value){.kind = raised == SIGBUS ? KIND_POISONED : KIND_NOWHERE};
    look->count = 1;
    look->mixed = false;
}

/* Reads a word. False: the read raised a signal. */
bool read_word(const uint8_t *at, uint64_t *word)
{
    sigjmp_buf here;
    int raised = sigsetjmp(here, 1);
    if (raised != 0)
        return false;
    touching = &here;
    *word = *(const volatile uint64_t *)at;
    touching = NULL;
    return true;
}

/* Touches a page and tells the model. The caller holds the slot's layout. */
long touch_page(unsigned page, bool write)
{
    struct slot *slot = slot_of(page);
    uint8_t *at = atomic_load(&slot->memory) + (page % SLOT_PAGES) * slot->page_size;
    uint32_t number = write ? atomic_fetch_add(&world->pages[page].writes, 1) + 1 : 0;
    static _Thread_local struct look look;
    sigjmp_buf here;
    memset(&look, 0, sizeof(look));
    int pending = model_begin(page, write ? EFFECT_WRITE : EFFECT_READ, number, 0);
    int raised = sigsetjmp(here, 1);
    if (raised == 0) {
        touching = &here;
        if (write)
            ((volatile uint64_t *)at)[WRITE_WORD] = written_word(page, number);
        else
            look_at(page, at, slot->page_size, &look);
        touching = NULL;
    } else {
        failed_touch(&look, raised);
    }
    atomic_fetch_add(&world->touches, 1);
    if (write && raised == 0)
        model_end(page, pending, OUTCOME_DONE, NULL, 0);
    else
        model_end(page, pending, look.mixed ? OUTCOME_MIXED : OUTCOME_VALUE, look.values, look.count);
    return raised;
}

/* ---- The VMM's changes of the mapping ------------------------------------------------------------------------------ */

static long advise(struct slot *slot, const struct operation_entry *operation, int advice, enum effect effect)
{
    int pending[SLOT_PAGES];
    uint8_t *at = atomic_load(&slot->memory) + operation->page * slot->page_size;
    for (unsigned i = 0; i < operation->count; i++) {
        pending[i] = model_begin(slot->first + operation->page + i, effect, 0, 0);
        if (effect == EFFECT_GIVE_BACK)
            note_dropped(slot->first + operation->page + i);
    }
    long got = madvise(at, operation->count * slot->page_size, advice) < 0 ? -errno : 0;
    for (unsigned i = 0; i < operation->count; i++) {
        if (effect == EFFECT_GIVE_BACK)
            note_dropped(slot->first + operation->page + i);
        model_end(slot->first + operation->page + i, pending[i],
                  got == 0 ? OUTCOME_DONE : OUTCOME_UNKNOWN, NULL, 0);
    }
    /* If a part was unmapped before, the kernel goes on and returns ENOMEM, or does a part and returns EINVAL. */
    if (got != 0 && got != -EINVAL && got != -ENOMEM)
        fail("madvise %d: %s", advice, strerror((int)-got));
    return got;
}

static long cut(struct slot *slot, const struct operation_entry *operation)
{
    int pending[SLOT_PAGES];
    for (unsigned i = 0; i < operation->count; i++)
        pending[i] = model_begin(slot->first + operation->page + i, EFFECT_CUT, 0, 0);
    long got = cut_slot(slot, operation->page, operation->count);
    for (unsigned i = 0; i < operation->count; i++)
        model_end(slot->first + operation->page + i, pending[i], got == 0 ? OUTCOME_DONE : OUTCOME_UNKNOWN, NULL, 0);
    return got;
}

long kernel_event(const struct operation_entry *operation)
{
    struct slot *slot = &world->slot[operation->slot];
    bool private = slot->backing == BACKING_PRIVATE || slot->backing == BACKING_HUGE_PRIVATE;
    switch (operation->kind) {
    case OP_DONTNEED:
        /* A handler that has just taken over takes every page of a file for absent, and this call for one that gives
         * the page back. */
        if (!private && world->plan.mode == MODE_REMOTE)
            return 0;
        return advise(slot, operation, MADV_DONTNEED, private ? EFFECT_GIVE_BACK : EFFECT_UNMAP_SHARED);
    case OP_MADV_REMOVE:
        return private ? 0 : advise(slot, operation, MADV_REMOVE, EFFECT_GIVE_BACK);
    case OP_MADV_FREE:
        return slot->backing != BACKING_PRIVATE ? 0 : advise(slot, operation, MADV_FREE, EFFECT_LAZY);
    default:
        return cut(slot, operation);
    }
}
