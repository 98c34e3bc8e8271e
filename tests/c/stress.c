/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * All operations at once, at random, with the bytes of every page checked.
 *
 * Each page has one owner among the touchers. Only the owner writes to it, discards it and gives it back, and so knows
 * at any moment its contents: the source's bytes of exactly one generation, the bytes that the owner wrote, or zero.
 * The owner raises the page's generation, waits until no kuf_resolve with bytes of the older one is under way, and only
 * then discards; after the return no older bytes may be seen. Readers that are not owners check the bytes that they
 * read whenever a sequence number shows that the owner did not use the page meanwhile.
 *
 * KUF_STRESS_SEED sets the seed, KUF_STRESS_SECONDS the duration. The seed decides the operations of each thread and
 * their order; the scheduler still decides which of them meet.
 */
#include "seeded.h"

enum { SLOTS = 3, ANONYMOUS = 0, SHARED = 1, COMING = 2 };
enum { BLOCK = 8, PAGES = 128, COMING_PAGES = 32, BAD_PAGES = 8, ALL_PAGES = 2 * PAGES + COMING_PAGES };
enum { TOUCHERS = 4, RESOLVERS = 2, WORKERS_MAX = 16, PREFIX_WORDS = 64, WORDS_MAX = 8192, RUN_MAX = 64 };
enum { PATIENCE_S = 40, HISTORY = 8 };


struct slot {
    uint64_t gpa;
    unsigned first, pages;
    unsigned char *memory;
    int fd;
};

struct page {
    /* The source's. Only the owner raises it. */
    _Atomic uint64_t generation;
    /* kuf_resolve calls under way with bytes of an even or odd generation. */
    atomic_int supplying[2];
    /* Odd while the owner changes the contents of the page. */
    _Atomic uint64_t sequence;
    /* The code of its contents, and another one for its first words when that is not 0. */
    _Atomic uint64_t holds, prefix;
    /* The source fails for it. */
    atomic_bool bad;
    /* The owner's last operations on it. */
    const char *_Atomic did[HISTORY];
    atomic_uint did_count;
};

/* A deferred run that a resolver has to resolve. */
struct ticket {
    unsigned first, pages;
    unsigned char *place;
};

struct worker {
    const char *_Atomic doing;
    _Atomic uint64_t gpa, operations;
    uint64_t random, written;
    unsigned index;
    pthread_t thread;
    uint64_t copy[WORDS_MAX];
};

static struct slot slots[SLOTS];
static struct page pages[ALL_PAGES];
static struct worker workers[WORKERS_MAX];
static unsigned worker_count;
static struct kuf *handle;
static size_t page_bytes, page_words;
static atomic_bool stop, stop_supplying, ending, closing;
static atomic_int released;
/* Held while writing in place to pages of a file, which KUF_END_POISON takes away. */
static pthread_rwlock_t places = PTHREAD_RWLOCK_INITIALIZER;
static _Atomic uint64_t checked, cross_checked, deferred, failed, poisonings, rounds_of_slot;
static char round_text[256];

static pthread_mutex_t tickets_lock = PTHREAD_MUTEX_INITIALIZER;
static struct ticket tickets[65536];
static unsigned ticket_count;

static void dawdle(void)
{
    uint64_t r = below(64);
    if (r < 16)
        sched_yield();
    else if (r == 16)
        nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
}

/* ---- Pages --------------------------------------------------------------------------------------------------------- */

static struct slot *slot_of(unsigned page)
{
    return &slots[page < PAGES ? ANONYMOUS : page < 2 * PAGES ? SHARED : COMING];
}

static uint64_t gpa_of(unsigned page)
{
    const struct slot *slot = slot_of(page);
    return slot->gpa + (page - slot->first) * page_bytes;
}

static unsigned char *at(unsigned page)
{
    const struct slot *slot = slot_of(page);
    return slot->memory + (page - slot->first) * page_bytes;
}

static bool may_be_bad(unsigned page)
{
    return page < 2 * PAGES && page % PAGES >= PAGES - BAD_PAGES;
}

/* Deferred runs here are written in place, so no other thread may resolve these pages. */
static bool brought_in_place(unsigned page)
{
    return page >= PAGES && page < 2 * PAGES && page / BLOCK % 4 == 3;
}

static void put(unsigned char *buffer, unsigned page, uint64_t code)
{
    write_code(buffer, gpa_of(page), page_bytes, code);
}

/* Describes a word, if it was ever meant for any page. */
static void explain(unsigned page, unsigned word, uint64_t value)
{
    if (value == 0) {
        printf("zero");
        return;
    }
    uint64_t latest = atomic_load(&pages[page].generation);
    for (uint64_t generation = 1; generation <= latest + 2; generation++)
        if (value == word_of(gpa_of(page) + word * 8, generation)) {
            printf("this page, generation %" PRIu64, generation);
            return;
        }
    for (unsigned other = 0; other < ALL_PAGES; other++)
        for (uint64_t generation = 1; generation <= atomic_load(&pages[other].generation) + 2; generation++)
            if (value == word_of(gpa_of(other) + word * 8, generation)) {
                printf("page %u (gpa %#" PRIx64 "), generation %" PRIu64, other, gpa_of(other), generation);
                return;
            }
    for (uint64_t version = 1; version < 1000000; version++)
        if (value == word_of(gpa_of(page) + word * 8, CODE_WRITTEN | version)) {
            printf("this page, written as %" PRIu64, version);
            return;
        }
    printf("%#" PRIx64, value);
}

static void describe(const char *what, uint64_t code)
{
    if (code == CODE_ZERO)
        printf("%s zero", what);
    else if (code & CODE_WRITTEN)
        printf("%s the guest's write %" PRIu64, what, code & ~CODE_WRITTEN);
    else
        printf("%s generation %" PRIu64, what, code);
}

static void dump_workers(void)
{
    for (unsigned i = 0; i < worker_count; i++) {
        const char *doing = atomic_load(&workers[i].doing);
        printf("    worker %u: %s gpa %#" PRIx64 ", %" PRIu64 " operations\n", i, doing ? doing : "-",
               atomic_load(&workers[i].gpa), atomic_load(&workers[i].operations));
    }
    printf("    deferred runs that are still to be resolved: %u\n", ticket_count);
    for (unsigned i = 0; i < ticket_count && i < 16; i++)
        printf("        gpa %#" PRIx64 ", %u pages%s\n", gpa_of(tickets[i].first), tickets[i].pages,
               tickets[i].place ? ", in place" : "");
    printf("    %s, seed %" PRIu64 "\n", round_text, seed);
    fflush(stdout);
}

static void wrong(struct worker *worker, unsigned page, unsigned word, uint64_t base, uint64_t prefix, const char *who)
{
    static atomic_flag once = ATOMIC_FLAG_INIT;
    if (atomic_flag_test_and_set(&once))
        for (;;)
            sleep_ms(1000);
    unsigned bad = 0;
    for (unsigned i = 0; i < page_words; i++) {
        uint64_t code = prefix && i < PREFIX_WORDS ? prefix : base;
        bad += worker->copy[i] != (code ? word_of(gpa_of(page) + i * 8, code) : 0);
    }
    ok(false, "page %u (gpa %#" PRIx64 ", slot %u): %u of %zu words are wrong, the first is %u, seen by %s", page,
       gpa_of(page), (unsigned)(slot_of(page) - slots), bad, page_words, word, who);
    printf("    ");
    describe("wanted", prefix && word < PREFIX_WORDS ? prefix : base);
    printf("; got ");
    explain(page, word, worker->copy[word]);
    printf("; last word ");
    explain(page, (unsigned)page_words - 1, worker->copy[page_words - 1]);
    printf("\n    its owner:");
    for (unsigned i = 0, n = atomic_load(&pages[page].did_count); i < HISTORY; i++)
        if (n + i >= HISTORY)
            printf("%s %s", i ? "," : "", atomic_load(&pages[page].did[(n + i) % HISTORY]));
    printf("\n    generation of the source now %" PRIu64 "\n", atomic_load(&pages[page].generation));
    printf("    now at the page: ");
    explain(page, word, ((volatile uint64_t *)at(page))[word]);
    printf("\n");
    dump_handle(handle);
    dump_workers();
    _exit(1);
}

static void doing(struct worker *worker, const char *what, unsigned page)
{
    atomic_store(&worker->gpa, gpa_of(page));
    atomic_store(&worker->doing, what);
    atomic_fetch_add(&worker->operations, 1);
}

static void look(struct worker *worker, unsigned page)
{
    const volatile uint64_t *words = (const volatile uint64_t *)at(page);
    for (unsigned i = 0; i < page_words; i++)
        worker->copy[i] = words[i];
}

static void compare(struct worker *worker, unsigned page, uint64_t base, uint64_t prefix, const char *who)
{
    for (unsigned i = 0; i < page_words; i++) {
        uint64_t code = prefix && i < PREFIX_WORDS ? prefix : base;
        if (worker->copy[i] != (code ? word_of(gpa_of(page) + i * 8, code) : 0))
            wrong(worker, page, i, base, prefix, who);
    }
}

/* The owner checks its own page. */
static void check(struct worker *worker, unsigned page)
{
    doing(worker, "reads its page", page);
    look(worker, page);
    compare(worker, page, atomic_load(&pages[page].holds), atomic_load(&pages[page].prefix), "its owner");
    atomic_fetch_add(&checked, 1);
}

/* A thread that is not the owner checks a page. */
static void check_from_afar(struct worker *worker, unsigned page)
{
    doing(worker, "reads another's page", page);
    uint64_t before = atomic_load(&pages[page].sequence);
    uint64_t base = atomic_load(&pages[page].holds), prefix = atomic_load(&pages[page].prefix);
    look(worker, page);
    atomic_thread_fence(memory_order_seq_cst);
    if (before % 2 == 0 && atomic_load(&pages[page].sequence) == before) {
        compare(worker, page, base, prefix, "another thread");
        atomic_fetch_add(&cross_checked, 1);
    }
}

static void begin_change(unsigned first, unsigned count, const char *what)
{
    for (unsigned i = first; i < first + count; i++) {
        atomic_fetch_add(&pages[i].sequence, 1);
        atomic_store(&pages[i].did[atomic_fetch_add(&pages[i].did_count, 1) % HISTORY], what);
    }
}

static void end_change(unsigned first, unsigned count)
{
    for (unsigned i = first; i < first + count; i++)
        atomic_fetch_add(&pages[i].sequence, 1);
}

/* New generation of pages: from here on the source has other bytes, and no thread is resolving the old ones. */
static void next_generation(unsigned first, unsigned count)
{
    for (unsigned i = first; i < first + count; i++) {
        uint64_t old = atomic_fetch_add(&pages[i].generation, 1);
        while (atomic_load(&pages[i].supplying[old % 2]) != 0)
            sched_yield();
    }
}

static void holds_source(unsigned first, unsigned count)
{
    for (unsigned i = first; i < first + count; i++) {
        atomic_store(&pages[i].holds, source_code(i, atomic_load(&pages[i].generation)));
        atomic_store(&pages[i].prefix, 0);
    }
}

static void holds_zero(unsigned first, unsigned count)
{
    for (unsigned i = first; i < first + count; i++) {
        atomic_store(&pages[i].holds, CODE_ZERO);
        atomic_store(&pages[i].prefix, 0);
    }
}

/* ---- Resolving pages ----------------------------------------------------------------------------------------------- */

/* Takes the current generation of a page and keeps its owner from discarding while its bytes are on their way. */
static uint64_t hold_generation(unsigned page)
{
    for (;;) {
        uint64_t generation = atomic_load(&pages[page].generation);
        atomic_fetch_add(&pages[page].supplying[generation % 2], 1);
        if (atomic_load(&pages[page].generation) == generation)
            return generation;
        atomic_fetch_sub(&pages[page].supplying[generation % 2], 1);
    }
}

static void supply(unsigned first, unsigned count, unsigned char *place, unsigned times)
{
    uint64_t generation[RUN_MAX];
    unsigned char *bytes = place ? place : malloc(count * page_bytes);
    bool zero = true;
    for (unsigned i = 0; i < count; i++) {
        generation[i] = hold_generation(first + i);
        zero = zero && source_code(first + i, generation[i]) == CODE_ZERO;
    }
    if (!zero || place != NULL)
        for (unsigned i = 0; i < count; i++)
            put(bytes + i * page_bytes, first + i, source_code(first + i, generation[i]));
    dawdle();
    uint32_t flags = place ? KUF_RESOLVE_IN_PLACE : zero ? KUF_RESOLVE_ZERO : 0;
    for (unsigned n = 0; n < times; n++) {
        ssize_t got = kuf_resolve(handle, gpa_of(first), flags ? NULL : bytes, count * page_bytes, flags);
        bool gone = got == -ENOENT && slot_of(first) == &slots[COMING];
        bool closed = got == -EBADF && atomic_load(&ending);
        if (!gone && !closed && (got < 0 || (size_t)got > count * page_bytes || (size_t)got % page_bytes))
            must(false, "kuf_resolve %#" PRIx64 "+%#zx flags %#x: %zd, %s", gpa_of(first), count * page_bytes, flags, got,
                 kuf_error());
    }
    for (unsigned i = 0; i < count; i++)
        atomic_fetch_sub(&pages[first + i].supplying[generation[i] % 2], 1);
    if (place == NULL)
        free(bytes);
}

static void push_ticket(struct ticket ticket)
{
    pthread_mutex_lock(&tickets_lock);
    must(ticket_count < sizeof(tickets) / sizeof(tickets[0]), "room for deferred runs");
    tickets[ticket_count++] = ticket;
    pthread_mutex_unlock(&tickets_lock);
}

static bool pop_ticket(struct ticket *ticket)
{
    pthread_mutex_lock(&tickets_lock);
    bool any = ticket_count > 0;
    if (any) {
        unsigned i = (unsigned)below(ticket_count);
        *ticket = tickets[i];
        tickets[i] = tickets[--ticket_count];
    }
    pthread_mutex_unlock(&tickets_lock);
    return any;
}

/* Resolves deferred runs, in random order and pieces. */
static void *supplying_body(void *argument)
{
    struct worker *worker = argument;
    thread_random = worker->random;
    struct ticket ticket;
    while (!atomic_load(&stop_supplying)) {
        if (!pop_ticket(&ticket)) {
            atomic_store(&worker->doing, "waits for deferred runs");
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
            continue;
        }
        unsigned from = (unsigned)below(ticket.pages), count = 1 + (unsigned)below(ticket.pages - from);
        if (from > 0)
            push_ticket((struct ticket){ticket.first, from, ticket.place});
        if (from + count < ticket.pages)
            push_ticket((struct ticket){ticket.first + from + count, ticket.pages - from - count,
                                        ticket.place ? ticket.place + (from + count) * page_bytes : NULL});
        doing(worker, "resolves a deferred run", ticket.first + from);
        pthread_rwlock_rdlock(&places);
        if (ticket.place == NULL || !atomic_load(&closing))
            supply(ticket.first + from, count, ticket.place ? ticket.place + from * page_bytes : NULL, 1);
        pthread_rwlock_unlock(&places);
    }
    atomic_store(&worker->doing, "ended");
    return NULL;
}

static int fill(void *opaque, struct kuf_fill *run)
{
    (void)opaque;
    const struct slot *slot = run->memory_opaque;
    unsigned first = slot->first + (unsigned)(run->memory_offset / page_bytes), count = (unsigned)(run->len / page_bytes);
    must(run->gpa == slot->gpa + run->memory_offset && run->memory_offset % page_bytes == 0 && count > 0 &&
             run->memory_offset + run->len <= slot->pages * page_bytes && count <= RUN_MAX && run->filled == run->len,
         "the run %#" PRIx64 "+%#" PRIx64 " is one of its slot", run->gpa, run->len);
    dawdle();
    uint64_t code[RUN_MAX];
    bool near_bad = false, in_place = true, others_place = false;
    unsigned good = 0;
    for (unsigned i = 0; i < count; i++) {
        near_bad = near_bad || may_be_bad(first + i);
        in_place = in_place && brought_in_place(first + i) && run->flags & KUF_RUN_IN_PLACE;
        others_place = others_place || brought_in_place(first + i);
        if (!atomic_load(&pages[first + i].bad) && good == i)
            good = i + 1;
        code[i] = source_code(first + i, atomic_load(&pages[first + i].generation));
    }
    if (good < count) {
        if (good == 0 || below(2)) {
            atomic_fetch_add(&failed, 1);
            return -EIO;
        }
        count = good;
    } else if (!near_bad && below(6) == 0 && in_place == others_place) {
        atomic_fetch_add(&deferred, 1);
        push_ticket((struct ticket){first, count, in_place ? run->buf : NULL});
        dawdle();
        return KUF_FILL_DEFERRED;
    } else if (!near_bad && !others_place && below(12) == 0) {
        supply(first, count, NULL, 1);
        return KUF_FILL_DEFERRED;
    }
    if (count > 1 && below(4) == 0)
        count = 1 + (unsigned)below(count);
    unsigned zeroes = 0;
    while (zeroes < count && code[zeroes] == CODE_ZERO)
        zeroes++;
    if (zeroes > 0) {
        run->filled = zeroes * page_bytes;
        return KUF_FILL_ZERO;
    }
    for (unsigned i = 0; i < count; i++) {
        put((unsigned char *)run->buf + i * page_bytes, first + i, code[i]);
        if (below(16) == 0)
            sched_yield();
    }
    run->filled = count * page_bytes;
    dawdle();
    return KUF_FILL_DONE;
}

static void event(void *opaque, const struct kuf_event *told)
{
    (void)opaque;
    must(told->kind != KUF_EVENT_FATAL && told->kind != KUF_EVENT_GONE && told->kind != KUF_EVENT_INACCESSIBLE,
         "event %u at %#" PRIx64 "+%#" PRIx64 ": %s", told->kind, told->gpa, told->len, told->text);
    if (told->kind != KUF_EVENT_POISONED)
        return;
    atomic_fetch_add(&poisonings, 1);
    if (atomic_load(&closing) || told->gpa >= slots[COMING].gpa)
        return;
    const struct slot *slot = &slots[told->gpa >= slots[SHARED].gpa ? SHARED : ANONYMOUS];
    for (uint64_t i = 0; i < told->len; i += page_bytes) {
        unsigned page = slot->first + (unsigned)((told->gpa + i - slot->gpa) / page_bytes);
        must(may_be_bad(page), "only pages whose source fails are poisoned: %#" PRIx64 ", %s", told->gpa + i, told->text);
    }
}

static void release(void *opaque)
{
    (void)opaque;
    atomic_fetch_add(&released, 1);
}

/* ---- The threads --------------------------------------------------------------------------------------------------- */

/* The owner of the pages discards, so that they are filled again. */
static void discard(struct worker *worker, unsigned first, unsigned count, bool removed)
{
    doing(worker, removed ? "discards as removed" : "discards", first);
    begin_change(first, count, removed ? "discarded as removed" : "discarded");
    next_generation(first, count);
    int got = kuf_discard(handle, gpa_of(first), count * page_bytes, removed ? KUF_DISCARD_ZERO : KUF_DISCARD_REFILL);
    must(got == 0, "kuf_discard %#" PRIx64 ": %s", gpa_of(first), kuf_error());
    if (removed)
        holds_zero(first, count);
    else
        holds_source(first, count);
    end_change(first, count);
}

static void give_back(struct worker *worker, unsigned first, unsigned count)
{
    bool shared = slot_of(first)->fd >= 0;
    doing(worker, shared ? "MADV_REMOVE" : "MADV_DONTNEED", first);
    begin_change(first, count, "gave back");
    int got = madvise(at(first), count * page_bytes, shared ? MADV_REMOVE : MADV_DONTNEED);
    must(got == 0, "madvise: %s", strerror(errno));
    holds_zero(first, count);
    end_change(first, count);
}

static void write_page(struct worker *worker, unsigned page, bool whole)
{
    doing(worker, whole ? "writes its page" : "writes to its page", page);
    begin_change(page, 1, whole ? "wrote" : "wrote to");
    uint64_t code = CODE_WRITTEN | (++worker->written * WORKERS_MAX + worker->index);
    volatile uint64_t *words = (volatile uint64_t *)at(page);
    unsigned length = whole ? (unsigned)page_words : PREFIX_WORDS;
    /* Half of them from the end, so that the first word is not always touched first. */
    bool backwards = below(2);
    for (unsigned i = 0; i < length; i++) {
        unsigned word = backwards ? length - 1 - i : i;
        words[word] = word_of(gpa_of(page) + word * 8, code);
    }
    if (whole) {
        atomic_store(&pages[page].holds, code);
        atomic_store(&pages[page].prefix, 0);
    } else {
        atomic_store(&pages[page].prefix, code);
    }
    end_change(page, 1);
}

static void owner_step(struct worker *worker, unsigned first, unsigned count)
{
    unsigned one = first + (unsigned)below(count);
    switch (below(16)) {
    case 0:
    case 1:
        write_page(worker, one, true);
        break;
    case 2:
        write_page(worker, one, false);
        break;
    case 3:
        discard(worker, first, count, false);
        break;
    case 4:
        discard(worker, first, count, below(3) == 0);
        break;
    case 5:
        give_back(worker, first, count);
        break;
    case 6:
        if (slot_of(first)->fd >= 0) {
            /* Only unmaps: the file keeps its bytes. */
            for (unsigned i = first; i < first + count; i++)
                check(worker, i);
            doing(worker, "unmaps the pages of a file", first);
            must(madvise(at(first), count * page_bytes, MADV_DONTNEED) == 0, "MADV_DONTNEED of a file");
        }
        for (unsigned i = first; i < first + count; i++)
            check(worker, i);
        break;
    default:
        check(worker, one);
    }
}

static void *toucher_main(void *argument)
{
    struct worker *worker = argument;
    thread_random = worker->random;
    while (!atomic_load(&stop)) {
        if (below(4) == 0) {
            unsigned page = (unsigned)below(2 * PAGES);
            if (!may_be_bad(page))
                check_from_afar(worker, page);
            continue;
        }
        unsigned block = (unsigned)below(2 * PAGES / BLOCK / TOUCHERS) * TOUCHERS + worker->index;
        unsigned from = (unsigned)below(BLOCK), count = 1 + (unsigned)below(BLOCK - from);
        if (!may_be_bad(block * BLOCK))
            owner_step(worker, block * BLOCK + from, count);
    }
    atomic_store(&worker->doing, "ended");
    return NULL;
}

static void *populate_main(void *argument)
{
    struct worker *worker = argument;
    thread_random = worker->random;
    while (!atomic_load(&stop)) {
        struct kuf_populate_request request = {.size = sizeof(request)};
        unsigned page = (unsigned)below(ALL_PAGES);
        if (below(8) == 0) {
            request.flags = KUF_POPULATE_STOP;
        } else if (below(4) == 0) {
            request.gpa = KUF_ALL;
        } else {
            request.gpa = gpa_of(page);
            request.len = (1 + below(64)) * page_bytes;
            request.rate = below(2) ? (1 + below(64)) << 20 : 0;
        }
        doing(worker, "populates", page);
        int got = kuf_populate(handle, &request);
        must(got == 0 || (got == -ENOENT && page >= 2 * PAGES), "kuf_populate: %s", kuf_error());
        nanosleep(&(struct timespec){.tv_nsec = (long)below(3000000)}, NULL);
    }
    atomic_store(&worker->doing, "ended");
    return NULL;
}

static void *ensure_main(void *argument)
{
    struct worker *worker = argument;
    thread_random = worker->random;
    while (!atomic_load(&stop)) {
        unsigned page = (unsigned)below(ALL_PAGES);
        const struct slot *slot = slot_of(page);
        unsigned count = 1 + (unsigned)below(16);
        if (page + count > slot->first + slot->pages)
            count = slot->first + slot->pages - page;
        bool near_bad = may_be_bad(page) || may_be_bad(page + count - 1);
        int timeout = (int)below(3) - 1;
        doing(worker, timeout < 0 ? "kuf_ensure" : timeout ? "kuf_ensure for a moment" : "kuf_ensure of what is free", page);
        int got = below(2) && timeout < 0 ? kuf_vcpu_fault(handle, gpa_of(page), count * page_bytes, 0)
                                          : kuf_ensure(handle, gpa_of(page), count * page_bytes, timeout);
        must(got == 0 || (got == -EHWPOISON && near_bad) || (got == -ETIMEDOUT && timeout >= 0) ||
                 (slot == &slots[COMING] && (got == -ENOENT || got == -EHWPOISON)),
             "kuf_ensure %#" PRIx64 "+%#zx: %d, %s", gpa_of(page), count * page_bytes, got, kuf_error());
        dawdle();
    }
    atomic_store(&worker->doing, "ended");
    return NULL;
}

/* Resolves pages before they are touched, twice. */
static void *unasked_main(void *argument)
{
    struct worker *worker = argument;
    thread_random = worker->random;
    while (!atomic_load(&stop)) {
        unsigned page = (unsigned)below(ALL_PAGES), count = 1 + (unsigned)below(BLOCK);
        const struct slot *slot = slot_of(page);
        if (page + count > slot->first + slot->pages)
            count = slot->first + slot->pages - page;
        bool theirs = false;
        for (unsigned i = page; i < page + count; i++)
            theirs = theirs || may_be_bad(i) || brought_in_place(i);
        if (!theirs) {
            doing(worker, "resolves pages unasked", page);
            supply(page, count, NULL, 2);
        }
        struct kuf_fault owed[8];
        ssize_t n = kuf_pending(handle, owed, 8);
        must(n >= 0, "kuf_pending: %s", kuf_error());
        struct kuf_progress_info p = {.size = sizeof(p)};
        must(kuf_progress(handle, KUF_ALL, &p) == 0, "kuf_progress: %s", kuf_error());
        dawdle();
    }
    atomic_store(&worker->doing, "ended");
    return NULL;
}

/* Pages whose source fails: poisoned, never wrong, and usable again after a discard. */
static void *bad_main(void *argument)
{
    struct worker *worker = argument;
    thread_random = worker->random;
    while (!atomic_load(&stop)) {
        unsigned page = (unsigned)below(2) * PAGES + PAGES - BAD_PAGES + (unsigned)below(BAD_PAGES);
        atomic_store(&pages[page].bad, true);
        discard(worker, page, 1, false);
        doing(worker, "kuf_ensure of a bad page", page);
        int got = kuf_ensure(handle, gpa_of(page), page_bytes, -1);
        must(got == -EHWPOISON, "a page whose source fails is poisoned: %#" PRIx64 ", got %d", gpa_of(page), got);
        atomic_store(&pages[page].bad, false);
        discard(worker, page, 1, false);
        check(worker, page);
        if (below(2))
            write_page(worker, page, below(2));
        check(worker, page);
        dawdle();
    }
    atomic_store(&worker->doing, "ended");
    return NULL;
}

static void map_coming(struct slot *slot)
{
    if (below(2)) {
        slot->memory = map_shared(slot->pages * page_bytes, &slot->fd);
    } else {
        slot->memory = map_anonymous(slot->pages * page_bytes);
        slot->fd = -1;
    }
}

static void unmap_coming(struct slot *slot)
{
    munmap(slot->memory, slot->pages * page_bytes);
    if (slot->fd >= 0)
        close(slot->fd);
    slot->fd = -1;
}

static void put_under(struct slot *slot)
{
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = slot->gpa,
                                .len = slot->pages * page_bytes, .hva = (uintptr_t)slot->memory,
                                .fd = slot->fd, .opaque = slot};
    int got = kuf_add_memory(handle, &memory);
    must(got == 0, "kuf_add_memory %#" PRIx64 ": %s", slot->gpa, got ? kuf_error() : "adds");
}

/* A slot that is added, used, and removed. */
static void *coming_main(void *argument)
{
    struct worker *worker = argument;
    thread_random = worker->random;
    struct slot *slot = &slots[COMING];
    while (!atomic_load(&stop)) {
        map_coming(slot);
        begin_change(slot->first, slot->pages, "added");
        next_generation(slot->first, slot->pages);
        doing(worker, "adds a slot", slot->first);
        put_under(slot);
        holds_source(slot->first, slot->pages);
        end_change(slot->first, slot->pages);
        for (uint64_t n = below(100); n > 0; n--) {
            unsigned from = (unsigned)below(slot->pages), count = 1 + (unsigned)below(BLOCK);
            owner_step(worker, slot->first + from, from + count > slot->pages ? slot->pages - from : count);
        }
        uint32_t flags = below(3) ? KUF_END_POPULATE : KUF_END_POISON;
        int got = -EBUSY;
        for (int tries = 0; got == -EBUSY; tries++) {
            doing(worker, flags == KUF_END_POISON ? "removes and poisons a slot" : "fills and removes a slot", slot->first);
            got = kuf_remove_memory(handle, slot->gpa, tries == 0 && below(4) == 0 ? 0 : flags);
            if (got == 0 && tries == 0)
                break;
            if (got == -EBUSY)
                sched_yield();
        }
        must(got == 0, "kuf_remove_memory: %d %s", got, kuf_error());
        if (flags == KUF_END_POPULATE)
            for (unsigned i = slot->first; i < slot->first + slot->pages; i++)
                check(worker, i);
        unmap_coming(slot);
        atomic_fetch_add(&rounds_of_slot, 1);
    }
    atomic_store(&worker->doing, "ended");
    return NULL;
}

/* ---- Rounds -------------------------------------------------------------------------------------------------------- */

static struct worker *employ(void *(*body)(void *))
{
    must(worker_count < WORKERS_MAX, "room for workers");
    struct worker *worker = &workers[worker_count];
    worker->index = worker_count++;
    worker->random = chance() | 1;
    worker->thread = start(body, worker);
    return worker;
}

static void bus(int signal_number, siginfo_t *info, void *context)
{
    (void)signal_number;
    (void)context;
    uintptr_t address = (uintptr_t)info->si_addr;
    for (unsigned i = 0; i < SLOTS; i++) {
        uintptr_t from = (uintptr_t)slots[i].memory;
        if (address >= from && address < from + slots[i].pages * page_bytes) {
            printf("not ok - SIGBUS (code %d) at gpa %#" PRIx64 "\n", info->si_code,
                   (uint64_t)(slots[i].gpa + (address - from)));
            dump_handle(handle);
            dump_workers();
        }
    }
    static const char what[] = "not ok - SIGBUS: a page is poisoned that should have been readable\n";
    (void)!write(STDOUT_FILENO, what, sizeof(what) - 1);
    _exit(1);
}

static uint64_t work_done(void)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < WORKERS_MAX; i++)
        sum += atomic_load(&workers[i].operations);
    return sum;
}

static void say_where(void)
{
    dump_workers();
    dump_handle(handle);
}

static void run_round(unsigned number, uint64_t until)
{
    struct kuf_options options = {
        .fill = fill, .event = event, .release = release,
        .fill_threads = 1 + (uint32_t)below(8),
        .demand_run = page_bytes << below(10),
        .populate_run = page_bytes << below(7),
        .userfaultfds = 1 + (uint32_t)below(4),
    };
    snprintf(round_text, sizeof(round_text),
             "round %u: %u fill threads, %u userfaultfds, runs of %" PRIu64 " and %" PRIu64 " pages", number,
             options.fill_threads, options.userfaultfds, options.demand_run / page_bytes, options.populate_run / page_bytes);
    atomic_store(&ending, false);
    atomic_store(&closing, false);
    atomic_store(&stop, false);
    atomic_store(&stop_supplying, false);
    atomic_store(&released, 0);
    ticket_count = 0;
    worker_count = 0;
    handle = open_with(options);
    slots[ANONYMOUS].memory = map_anonymous(PAGES * page_bytes);
    slots[SHARED].memory = map_shared(PAGES * page_bytes, &slots[SHARED].fd);
    for (unsigned i = 0; i < 2 * PAGES; i++) {
        atomic_fetch_add(&pages[i].generation, 1);
        atomic_store(&pages[i].bad, false);
    }
    holds_source(0, 2 * PAGES);
    put_under(&slots[ANONYMOUS]);
    put_under(&slots[SHARED]);

    for (unsigned i = 0; i < TOUCHERS; i++)
        employ(toucher_main);
    employ(populate_main);
    employ(ensure_main);
    employ(unasked_main);
    employ(bad_main);
    employ(coming_main);
    unsigned users = worker_count;
    for (unsigned i = 0; i < RESOLVERS; i++)
        employ(supplying_body);

    while (now_ns() < until)
        sleep_ms(5);
    atomic_store(&stop, true);
    for (unsigned i = 0; i < users; i++)
        pthread_join(workers[i].thread, NULL);

    /* Poison that a kuf_ensure has left on a page that was bad at the time was discarded by its owner. */
    struct worker *me = &workers[0];
    bool poison = below(4) == 0;
    uint32_t flags = poison ? KUF_END_POISON : KUF_END_POPULATE;
    if (poison && below(2))
        flags |= KUF_END_NOWAIT;
    struct kuf *closed = handle;
    doing(me, poison ? "closes and poisons" : "fills and closes", 0);
    atomic_store(&ending, true);
    if (poison) {
        pthread_rwlock_wrlock(&places);
        atomic_store(&closing, true);
        pthread_rwlock_unlock(&places);
    }
    int got = kuf_close(&closed, flags);
    must(got == 0, "kuf_close %#x: %d, %s", flags, got, kuf_error());
    atomic_store(&closing, true);
    wait_until(atomic_load(&released) == 1);
    atomic_store(&stop_supplying, true);
    for (unsigned i = users; i < worker_count; i++)
        pthread_join(workers[i].thread, NULL);
    if (!poison)
        for (unsigned i = 0; i < 2 * PAGES; i++)
            check(me, i);
    for (unsigned i = 0; i < 2; i++)
        munmap(slots[i].memory, PAGES * page_bytes);
    close(slots[SHARED].fd);
    ok(true, "%s", round_text);
}

int main(void)
{
    begin();
    uint64_t seconds = begin_seeded(8, 240);
    struct sigaction action = {.sa_sigaction = bus, .sa_flags = SA_SIGINFO};
    sigaction(SIGBUS, &action, NULL);
    needs_feature(KUF_FEATURE_POISON, "UFFDIO_POISON");

    page_bytes = page_size();
    page_words = page_bytes / 8;
    must(page_words <= WORDS_MAX, "pages of this size");
    slots[ANONYMOUS] = (struct slot){.gpa = UINT64_C(1) << 30, .first = 0, .pages = PAGES, .fd = -1};
    slots[SHARED] = (struct slot){.gpa = UINT64_C(2) << 30, .first = PAGES, .pages = PAGES, .fd = -1};
    slots[COMING] = (struct slot){.gpa = UINT64_C(3) << 30, .first = 2 * PAGES, .pages = COMING_PAGES, .fd = -1};
    static struct progress_watch progress = {.work = work_done, .describe = say_where, .patience_s = PATIENCE_S};
    start_progress_watch(&progress);

    thread_random = mix(seed) | 1;
    uint64_t end = now_ns() + seconds * 1000000000;
    for (unsigned round = 0; round == 0 || now_ns() < end; round++) {
        uint64_t until = now_ns() + 300000000 + below(900) * 1000000;
        run_round(round, until);
    }
    end_progress_watch(&progress);
    printf("# seed %" PRIu64 ": %" PRIu64 " pages checked by their owners, %" PRIu64 " by others, %" PRIu64
           " runs deferred, %" PRIu64 " failed, %" PRIu64 " pages poisoned, a slot came %" PRIu64 " times\n",
           seed, atomic_load(&checked), atomic_load(&cross_checked), atomic_load(&deferred), atomic_load(&failed),
           atomic_load(&poisonings), atomic_load(&rounds_of_slot));
    return done();
}
