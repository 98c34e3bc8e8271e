/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * One operation: a call of the library, its report to the model, and the check of its answer. An errno has to stand in
 * the text of the call (documented.h is made from the headers) and to have a reason in the operations in progress.
 */
#include "fuzz.h"

struct kuf *_Atomic fuzz_handle;

static const struct {
    const char *call;
    int error;
} documented[] = {
#include "documented.h"
};

/* ---- Which answers are allowed ------------------------------------------------------------------------------------- */

bool errno_is_documented(const char *call, int error)
{
    for (size_t i = 0; i < sizeof(documented) / sizeof(documented[0]); i++)
        if (documented[i].error == error &&
            (strcmp(documented[i].call, call) == 0 || strcmp(documented[i].call, "*") == 0))
            return true;
    return false;
}

void check_errno(const char *call, int error, bool allowed, const char *why)
{
    if (!errno_is_documented(call, error))
        fail("%s returns -%s, which its text does not name (%s)", call, strerrorname_np(error), kuf_error());
    if (!allowed)
        fail("%s returns -%s without a reason: %s (%s)", call, strerrorname_np(error), why, kuf_error());
    if (kuf_error()[0] == 0)
        fail("%s returns -%s and kuf_error says nothing", call, strerrorname_np(error));
}

unsigned closes_seen(void)
{
    return (unsigned)atomic_load(&world->close_calls) - (unsigned)atomic_load(&world->closing);
}

/* Whether a close was in progress at some time since. */
bool close_explains(unsigned before)
{
    return atomic_load(&world->closed) || atomic_load(&world->closing) != 0 ||
           (unsigned)atomic_load(&world->close_calls) != before;
}

/* The state of the round when a call began. */
struct moment {
    unsigned closes, ends, adds, moves;
    bool there;
};

static struct moment moment_of(const struct slot *slot)
{
    unsigned ends = atomic_load(&slot->ends), adds = atomic_load(&slot->adds);
    bool calm = atomic_load(&slot->changing) == 0;
    return (struct moment){closes_seen(), ends, adds, atomic_load(&world->moves) - atomic_load(&world->moving), calm && atomic_load(&slot->live)};
}

static bool slot_may_be_missing(const struct slot *slot, struct moment before)
{
    return !before.there || !atomic_load(&slot->live) || before.ends != atomic_load(&slot->ends) ||
           before.adds != atomic_load(&slot->adds);
}

/* Whether memory was moving to another address. */
static bool moved_meanwhile(struct moment before)
{
    return atomic_load(&world->moving) != 0 || atomic_load(&world->moves) != before.moves;
}

/* The reasons that most calls on a range share. */
static bool usual(const struct slot *slot, struct moment before, int error)
{
    switch (error) {
    case ENOENT:
        return slot_may_be_missing(slot, before);
    case EBADF:
    case ECANCELED:
        return close_explains(before.closes);
    case ENOMEM:
    case EMFILE:
        /* For a huge page of another process the kernel gives one answer for two cases: the page is present, or the
         * pool has none left. */
        return atomic_load(&world->shortage) || moved_meanwhile(before) ||
               (world->plan.mode == MODE_REMOTE && slot->backing == BACKING_HUGE_PRIVATE);
    case ESRCH:
        return atomic_load(&world->process_gone);
    case EIO:
        return atomic_load(&fatal_seen);
    case ENOTSUP:
        /* Only the other process can drop its private memory, or look at it. */
        return world->plan.mode == MODE_REMOTE;
    default:
        return false;
    }
}

static bool changed_nothing(long got)
{
    return got == -ENOENT || got == -EBADF || got == -EINVAL || got == -ENOTSUP || got == -ERANGE || got == -ECHILD;
}

/* ---- The model over the pages of a call ---------------------------------------------------------------------------- */

struct range {
    struct slot *slot;
    unsigned first, count;
    uint64_t gpa, length;
    int pending[SLOT_PAGES];
};

static struct range range_of(const struct operation_entry *operation)
{
    struct slot *slot = &world->slot[operation->slot];
    return (struct range){.slot = slot, .first = slot->first + operation->page, .count = operation->count,
                          .gpa = slot->gpa + operation->page * slot->page_size,
                          .length = operation->count * slot->page_size};
}

static void range_begin(struct range *range, enum effect effect, uint32_t argument, uint32_t flags)
{
    for (unsigned i = 0; i < range->count; i++)
        range->pending[i] = model_begin(range->first + i, effect, argument, flags);
}

static void range_end(struct range *range, enum outcome outcome)
{
    for (unsigned i = 0; i < range->count; i++)
        model_end(range->first + i, range->pending[i], outcome, NULL, 0);
}

static enum outcome outcome_of(long got)
{
    return got >= 0 ? OUTCOME_DONE : changed_nothing(got) ? OUTCOME_REFUSED : OUTCOME_UNKNOWN;
}

/* ---- Calls on a range ---------------------------------------------------------------------------------------------- */

/* A handler is not killed in the middle of a discard, for the test could not tell whether its pages are whole. */
static pthread_rwlock_t dropping = PTHREAD_RWLOCK_INITIALIZER;

static long discard(const struct operation_entry *operation)
{
    struct range range = range_of(operation);
    struct moment before = moment_of(range.slot);
    bool removed = operation->kind == OP_DISCARD_REMOVED;
    pthread_rwlock_rdlock(&dropping);
    range_begin(&range, removed ? EFFECT_DISCARD_REMOVED : EFFECT_DISCARD, 0, 0);
    int got = kuf_discard(atomic_load(&fuzz_handle), range.gpa, range.length, removed ? KUF_DISCARD_ZERO : KUF_DISCARD_REFILL);
    if (got > 0)
        fail("kuf_discard returns %d", got);
    if (got < 0)
        check_errno("kuf_discard", -got, usual(range.slot, before, -got), "of a whole range");
    for (unsigned i = 0; i < range.count; i++)
        note_dropped(range.first + i);
    /* A slot that was removed in the middle of the discard may have lost a part. */
    range_end(&range, got == -ENOENT ? OUTCOME_UNKNOWN : outcome_of(got));
    pthread_rwlock_unlock(&dropping);
    return got;
}

static enum effect resolve_effect(unsigned kind)
{
    return kind == OP_RESOLVE_ZERO ? EFFECT_RESOLVE_ZERO : kind == OP_RESOLVE_POISON ? EFFECT_RESOLVE_POISON : EFFECT_RESOLVE;
}

/* Whether PRESENT or IN_PLACE is for other kinds of slots. */
static bool filled_in_place(const struct slot *slot)
{
    return slot->backing == BACKING_SHARED || slot->backing == BACKING_HUGE_SHARED;
}

static long resolve(const struct operation_entry *operation)
{
    struct range range = range_of(operation);
    struct moment before = moment_of(range.slot);
    uint8_t *bytes = NULL;
    uint32_t flags = operation->kind == OP_RESOLVE_ZERO ? KUF_RESOLVE_ZERO
                     : operation->kind == OP_RESOLVE_POISON ? KUF_RESOLVE_POISON : 0;
    if (flags == 0)
        bytes = mmap(NULL, range.length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (bytes == MAP_FAILED)
        return -ENOMEM;
    if (flags & KUF_RESOLVE_POISON)
        atomic_fetch_add(&world->poisonings, 1);
    for (unsigned i = 0; i < range.count; i++) {
        uint32_t version = model_new_version(range.first + i);
        range.pending[i] = model_begin(range.first + i, resolve_effect(operation->kind), version, 0);
        if (bytes != NULL)
            put_page(bytes + i * range.slot->page_size, range.first + i, version, range.slot->page_size);
    }
    ssize_t got = kuf_resolve(atomic_load(&fuzz_handle), range.gpa, bytes, range.length, flags);
    /* -EDEADLK: the buffer was mapped at the old address of a slot that is moving. */
    if (got < 0)
        check_errno("kuf_resolve", (int)-got, usual(range.slot, before, (int)-got) ||
                    (got == -EDEADLK && moved_meanwhile(before)), "of a whole range");
    if (got > (ssize_t)range.length || (got > 0 && got % (ssize_t)range.slot->page_size != 0))
        fail("kuf_resolve of %#" PRIx64 " bytes returns %zd", range.length, got);
    /* A slot that was removed in the middle of the call may have got a part. */
    bool went = got == -ENOENT && (before.there || range.count > 1);
    range_end(&range, got == (ssize_t)range.length ? OUTCOME_MADE : went ? OUTCOME_UNKNOWN : outcome_of(got));
    if (bytes != NULL)
        munmap(bytes, range.length);
    return got;
}

static long resolve_present(const struct operation_entry *operation)
{
    struct range range = range_of(operation);
    struct moment before = moment_of(range.slot);
    ssize_t got = kuf_resolve(atomic_load(&fuzz_handle), range.gpa, NULL, range.length, KUF_RESOLVE_PRESENT);
    bool right = got == -EINVAL ? filled_in_place(range.slot) || world->plan.mode == MODE_REMOTE : got < 0 && usual(range.slot, before, (int)-got);
    if (got < 0)
        check_errno("kuf_resolve", (int)-got, right, "KUF_RESOLVE_PRESENT");
    return got;
}

/* Whether the callback declines this background fill. */
static bool declines(void)
{
    return world->plan.mode != MODE_SOURCES;
}

/* Whether an end with these flags may run out of time. */
static bool times_out(uint32_t flags)
{
    uint32_t limit = world->plan.options.end_timeout_ms;
    return (flags & KUF_END_POPULATE) && !(flags & KUF_END_POISON) && limit != UINT32_MAX;
}

static bool may_be_poisoned(const struct range *range)
{
    for (unsigned i = 0; i < range->count; i++)
        if (model_may_be(range->first + i, KIND_POISONED))
            return true;
    return false;
}

/* A poisoned page of a file stays poisoned after its mapping is gone. */
static bool may_be_poisoned_unseen(const struct range *range)
{
    bool private = range->slot->backing == BACKING_PRIVATE || range->slot->backing == BACKING_HUGE_PRIVATE;
    for (unsigned i = 0; i < range->count && !private; i++)
        if (model_may_be(range->first + i, KIND_NOWHERE))
            return true;
    return may_be_poisoned(range);
}

static long ensure(const struct operation_entry *operation)
{
    struct range range = range_of(operation);
    struct moment before = moment_of(range.slot);
    static const int timeouts[] = {-1, 0, 5, 100};
    int timeout = timeouts[operation->argument % 4], got;
    bool vcpu = operation->kind == OP_VCPU_FAULT, poisoned = may_be_poisoned_unseen(&range);
    unsigned poisonings = atomic_load(&world->poisonings);
    const char *call = vcpu ? "kuf_vcpu_fault" : "kuf_ensure";
    range_begin(&range, EFFECT_ENSURE, 0, 0);
    if (vcpu)
        got = kuf_vcpu_fault(atomic_load(&fuzz_handle), range.gpa + 1, range.length - 1, 1 << 4);
    else
        got = kuf_ensure(atomic_load(&fuzz_handle), range.gpa, range.length, timeout);
    poisoned = poisoned || may_be_poisoned_unseen(&range) || atomic_load(&world->poisonings) != poisonings;
    bool right = usual(range.slot, before, -got) || (got == -ETIMEDOUT && timeout >= 0) ||
                 (got == -EHWPOISON && (poisoned || world->plan.failing_source));
    if (got > 0)
        fail("%s returns %d", call, got);
    if (got < 0)
        check_errno(call, -got, right, "of a range");
    struct value value = {.kind = KIND_POISONED};
    bool one = got == -EHWPOISON && range.count == 1 && !model_may_be(range.first, KIND_NOWHERE);
    for (unsigned i = 0; i < range.count; i++)
        model_end(range.first + i, range.pending[i], got == 0 ? OUTCOME_DONE : one ? OUTCOME_VALUE : OUTCOME_UNKNOWN, &value, 1);
    return got;
}

static long populate(const struct operation_entry *operation)
{
    struct range range = range_of(operation);
    struct moment before = moment_of(range.slot);
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = range.gpa, .len = range.length};
    bool driven = world->plan.mode == MODE_DRIVEN || world->plan.mode == MODE_DIRECT;
    if (operation->kind == OP_POPULATE_STOP)
        request.flags = KUF_POPULATE_STOP;
    if (operation->argument % 4 == 0) {
        request.gpa = KUF_ALL;
        request.len = 0;
    }
    request.rate = operation->argument % 5 == 0 ? 1 << 20 : 0;
    int got = kuf_populate(atomic_load(&fuzz_handle), &request);
    if (got < 0)
        check_errno("kuf_populate", -got, usual(range.slot, before, -got) || (got == -ENOTSUP && driven) ||
                    (got == -ENOENT && request.gpa == KUF_ALL), "a request");
    return got;
}

/* ---- Slots --------------------------------------------------------------------------------------------------------- */

static struct range whole(struct slot *slot)
{
    return (struct range){.slot = slot, .first = slot->first, .count = slot->pages, .gpa = slot->gpa, .length = slot->length};
}

/* Another thread may have added the slot that this one has removed, or the other way round. */
static void look_whether_live(struct slot *slot)
{
    struct kuf_progress_info progress = {.size = sizeof(progress)};
    pthread_mutex_lock(&slot->living);
    atomic_store(&slot->live, kuf_progress(atomic_load(&fuzz_handle), slot->gpa, &progress) == 0);
    pthread_mutex_unlock(&slot->living);
}

static long remove_memory(const struct operation_entry *operation)
{
    static const uint32_t choices[] = {0, KUF_END_POISON, KUF_END_POPULATE, KUF_END_POISON | KUF_END_POPULATE};
    struct slot *slot = &world->slot[operation->slot];
    struct range range = whole(slot);
    uint32_t flags = choices[operation->argument % 4];
    struct moment before = moment_of(slot);
    bool driven = world->plan.mode == MODE_DRIVEN || world->plan.mode == MODE_DIRECT;
    atomic_fetch_add(&slot->changing, 1);
    atomic_fetch_add(&slot->ends, 1);
    range_begin(&range, EFFECT_END, 0, flags);
    atomic_fetch_add(&world->end_calls, 1);
    int got = kuf_remove_memory(atomic_load(&fuzz_handle), slot->gpa, flags);
    bool right = got == -EBUSY || usual(slot, before, -got) || (got == -ENOENT && slot_may_be_missing(slot, before)) ||
                 (got == -ENOTSUP && driven && flags & KUF_END_POPULATE) ||
                 (got == -EIO && flags & KUF_END_POPULATE &&
                  (world->plan.failing_source || atomic_load(&world->shortage) || may_be_poisoned(&range) || declines() ||
                   slot_may_be_missing(slot, before))) ||
                 (got == -ETIMEDOUT && times_out(flags));
    if (got < 0)
        check_errno("kuf_remove_memory", -got, right, "of a slot");
    if (got == 0)
        look_whether_live(slot);
    range_end(&range, got == 0 ? OUTCOME_DONE : got == -ENOENT ? OUTCOME_REFUSED
              : got == -EBADF || got == -ECANCELED ? OUTCOME_UNKNOWN : OUTCOME_REFUSED);
    atomic_fetch_sub(&slot->changing, 1);
    return got;
}

/* Adds a slot that is not there, with memory mapped anew. No thread touches it meanwhile. */
static long add_memory(const struct operation_entry *operation)
{
    struct slot *slot = &world->slot[operation->slot];
    if (atomic_load(&slot->live) || atomic_load(&world->closed) || pthread_rwlock_trywrlock(&slot->layout) != 0)
        return 0;
    long got = 0;
    struct range range = whole(slot);
    if (!atomic_load(&slot->live) && !atomic_load(&world->closed)) {
        struct moment before = moment_of(slot);
        range_begin(&range, EFFECT_RESET, 0, 0);
        unmap_slot(slot);
        while (!map_slot(slot)) {
            /* It takes a descriptor, of which this round has none now and then. */
            if (errno != EMFILE || !world->plan.few_descriptors)
                fail("memory for a slot: %s", strerror(errno));
            sleep_us(100);
        }
        range_end(&range, OUTCOME_DONE);
        range_begin(&range, EFFECT_ADD, 0, 0);
        atomic_fetch_add(&slot->changing, 1);
        atomic_fetch_add(&slot->adds, 1);
        /* Before the call: another thread may remove the slot before this one goes on. */
        atomic_store(&slot->live, true);
        got = add_slot(slot, 0);
        look_whether_live(slot);
        bool right = usual(slot, before, (int)-got) || (got == -EEXIST && moved_meanwhile(before));
        if (got < 0)
            check_errno("kuf_add_memory", (int)-got, right, "fresh memory, at a place that is free");
        /* A close that has begun poisons a slot that was half added. */
        range_end(&range, got == 0 ? OUTCOME_DONE : got == -ECANCELED || got == -EBADF ? OUTCOME_UNKNOWN : OUTCOME_REFUSED);
        atomic_fetch_sub(&slot->changing, 1);
    }
    pthread_rwlock_unlock(&slot->layout);
    return got;
}

/* Adds a slot that is there: the call fails and changes nothing. If the slot was removed meanwhile, the call may add it
 * as it was. */
static long add_again(const struct operation_entry *operation)
{
    struct slot *slot = &world->slot[operation->slot];
    struct moment before = moment_of(slot);
    bool all = operation->argument % 2 && filled_in_place(slot);
    if (!atomic_load(&slot->live) || world->plan.mode == MODE_ADOPTED || pthread_rwlock_trywrlock(&slot->layout) != 0)
        return 0;
    struct range range = whole(slot);
    range_begin(&range, EFFECT_ADD, 0, all ? FILLS_ALL : 0);
    atomic_fetch_add(&slot->changing, 1);
    atomic_fetch_add(&slot->adds, 1);
    int got = add_slot(slot, all ? KUF_MEMORY_FILL_ALL : 0);
    /* The slot was removed, then added, and may be removed again. */
    if (got == 0)
        look_whether_live(slot);
    /* The library does not promise which of two errors it reports: pages may have been unmapped. */
    bool right = got == -EEXIST || got == -EFAULT || got == -EBADFD || got == -EINVAL || usual(slot, before, -got) ||
                 ((got == 0 || got == -EBUSY || got == -ENOTSUP) && slot_may_be_missing(slot, before));
    if (!right)
        fail("kuf_add_memory of a slot that is there returns %d", got);
    if (got < 0)
        check_errno("kuf_add_memory", -got, true, "");
    range_end(&range, got == 0 ? OUTCOME_DONE : got == -ECANCELED ? OUTCOME_UNKNOWN : OUTCOME_REFUSED);
    atomic_fetch_sub(&slot->changing, 1);
    pthread_rwlock_unlock(&slot->layout);
    return got;
}

static long move(const struct operation_entry *operation)
{
    struct slot *slot = &world->slot[operation->slot];
    if (slot->backing >= BACKING_HUGE_PRIVATE || !atomic_load(&slot->live) || pthread_rwlock_trywrlock(&slot->layout) != 0)
        return 0;
    /* EFAULT: the slot has more than one mapping, for some pages were unmapped or belong to another userfaultfd. */
    bool leave_old = slot->backing == BACKING_PRIVATE && operation->argument % 3 == 0;
    atomic_fetch_add(&world->moves, 1);
    atomic_fetch_add(&world->moving, 1);
    long got = move_slot(slot, leave_old);
    atomic_fetch_sub(&world->moving, 1);
    pthread_rwlock_unlock(&slot->layout);
    if (got < 0 && got != -EFAULT && got != -ENOMEM)
        fail("mremap: %s", strerror((int)-got));
    return got;
}

/* ---- The handle ---------------------------------------------------------------------------------------------------- */

static void all_begin(struct range *ranges, uint32_t flags)
{
    for (unsigned i = 0; i < world->plan.slots; i++) {
        ranges[i] = whole(&world->slot[i]);
        range_begin(&ranges[i], EFFECT_END, 0, flags | ENDS_HANDLE);
    }
}

int close_handle(uint32_t flags)
{
    struct range ranges[SLOTS];
    struct kuf *kuf = atomic_load(&fuzz_handle);
    bool driven = world->plan.mode == MODE_DRIVEN || world->plan.mode == MODE_DIRECT, poisoned = false;
    atomic_fetch_add(&world->closing, 1);
    int begun = atomic_fetch_add(&world->close_calls, 1) + 1;
    bool alone = atomic_load(&world->closing) == 1 && !atomic_load(&world->closed);
    all_begin(ranges, flags);
    atomic_fetch_add(&world->end_calls, 1);
    int got = kuf_close(&kuf, flags);
    alone = alone && atomic_load(&world->close_calls) == begun;
    for (unsigned i = 0; i < world->plan.slots; i++)
        poisoned = poisoned || may_be_poisoned(&ranges[i]);
    if (got == 0)
        atomic_store(&world->closed, true);
    bool right = (got == -EBUSY && !(flags & KUF_END_POISON)) || (got == -EBADF && !alone) ||
                 (got == -ENOTSUP && driven && flags & KUF_END_POPULATE) ||
                 (got == -EIO && flags & KUF_END_POPULATE && !(flags & KUF_END_POISON) &&
                  (world->plan.failing_source || atomic_load(&world->shortage) || poisoned || declines() || !alone)) ||
                 (got == -ETIMEDOUT && times_out(flags));
    if (got < 0)
        check_errno("kuf_close", -got, right, "of the handle");
    if ((got == 0) != (kuf == NULL))
        fail("kuf_close returns %d and leaves the pointer %p", got, (void *)kuf);
    for (unsigned i = 0; i < world->plan.slots; i++)
        range_end(&ranges[i], got == 0 ? OUTCOME_DONE : OUTCOME_REFUSED);
    if (got == 0)
        for (unsigned i = 0; i < world->plan.slots; i++)
            atomic_store(&world->slot[i].live, false);
    atomic_fetch_sub(&world->closing, 1);
    return got;
}

static long close_now(const struct operation_entry *operation)
{
    static const uint32_t choices[] = {0, KUF_END_POISON, KUF_END_POPULATE, KUF_END_POISON | KUF_END_NOWAIT,
                                       KUF_END_POPULATE | KUF_END_POISON};
    return close_handle(choices[operation->argument % 5]);
}

static long query(const struct operation_entry *operation)
{
    struct kuf *kuf = atomic_load(&fuzz_handle);
    struct slot *slot = &world->slot[operation->slot];
    struct moment before = moment_of(slot);
    struct kuf_progress_info p = {.size = sizeof(p)};
    struct kuf_stats_info stats = {.size = sizeof(stats)};
    struct kuf_settings_info settings = {.size = sizeof(settings)};
    struct kuf_fault owed[16];
    struct kuf_block_time times[8];
    uint32_t threads[] = {(uint32_t)syscall(SYS_gettid)};
    uint64_t address;
    long got = 0;
    bool driven = world->plan.mode == MODE_DRIVEN || world->plan.mode == MODE_DIRECT;
    const char *call = "";
    switch (operation->argument % 12) {
    case 0:
    case 1:
        call = "kuf_progress";
        got = kuf_progress(kuf, operation->argument & 16 ? KUF_ALL : slot->gpa, &p);
        if (got == 0 && p.present + p.removed + p.absent + p.filling + p.deferred + p.poisoned != p.total)
            fail("kuf_progress does not add up: %#" PRIx64 "+%#" PRIx64 "+%#" PRIx64 "+%#" PRIx64 "+%#" PRIx64 "+%#" PRIx64
                 " of %#" PRIx64, p.present, p.removed, p.absent, p.filling, p.deferred, p.poisoned, p.total);
        break;
    case 2:
        call = "kuf_stats";
        got = kuf_stats(kuf, &stats);
        break;
    case 3:
        call = "kuf_pending";
        got = kuf_pending(kuf, owed, 16);
        /* A child's fault may have the pages of its parent's. */
        for (long i = 1; i < got && i < 16; i++)
            if (owed[i].gpa < owed[i - 1].gpa ||
                (owed[i].gpa < owed[i - 1].gpa + owed[i - 1].len && !((owed[i].flags | owed[i - 1].flags) & KUF_FAULT_FORKED)))
                fail("kuf_pending is not in order: %#" PRIx64 "+%#" PRIx64 " before %#" PRIx64, owed[i - 1].gpa,
                     owed[i - 1].len, owed[i].gpa);
        break;
    case 4:
        call = "kuf_block_times";
        got = kuf_block_times(kuf, times, 8);
        break;
    case 5:
        call = "kuf_watch_threads";
        got = kuf_watch_threads(kuf, threads, operation->argument & 16 ? 1 : 0);
        break;
    case 6:
        call = "kuf_kvm_owned";
        got = kuf_kvm_owned(kuf, slot->gpa + 1, 1);
        break;
    case 7:
        call = "kuf_kvm_bitmap";
        got = kuf_kvm_bitmap(kuf, slot->gpa, &address);
        if (got == 0)
            fail("kuf_kvm_bitmap answers 0 with userfaultfd");
        break;
    case 8:
        call = "kuf_kvm_quiesce";
        got = kuf_kvm_quiesce(kuf, 0);
        break;
    case 9:
        call = "kuf_read";
        if (!driven)
            got = kuf_read(kuf, owed, 1);
        if (!driven && got >= 0)
            fail("kuf_read answers %ld on a serviced handle", got);
        break;
    case 10:
        call = "kuf_settings";
        got = kuf_settings(kuf, operation->argument & 16 ? KUF_ALL : slot->gpa + 1, &settings);
        if (got == 0 && (settings.page_size == 0 || settings.demand_run % settings.page_size != 0))
            fail("kuf_settings: demand_run %#" PRIx64 " of pages of %#" PRIx64, settings.demand_run, settings.page_size);
        break;
    default:
        call = "kuf_poll";
        got = kuf_poll(kuf, (int)(operation->argument >> 8) % 3);
        break;
    }
    if (got < 0)
        check_errno(call, (int)-got, usual(slot, before, (int)-got) || got == -ENOTSUP ||
                    (got == -ETIMEDOUT && strcmp(call, "kuf_kvm_quiesce") == 0), "a question");
    return got;
}

/* ---- Recordings ---------------------------------------------------------------------------------------------------- */

static long record(const struct operation_entry *operation, struct slot *slot)
{
    struct moment before = moment_of(slot);
    struct kuf *kuf = atomic_load(&fuzz_handle);
    int got;
    if (operation->argument % 2) {
        got = kuf_record_start(kuf, 0);
        if (got < 0)
            check_errno("kuf_record_start", -got, got == -EALREADY || usual(slot, before, -got), "start");
        return got;
    }
    int fd = memfd_create("recording", MFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    got = kuf_record_stop(kuf, fd);
    if (got < 0)
        check_errno("kuf_record_stop", -got, got == -EINVAL || usual(slot, before, -got), "stop");
    lseek(fd, 0, SEEK_SET);
    if (got == 0) {
        bool driven = world->plan.mode == MODE_DRIVEN || world->plan.mode == MODE_DIRECT;
        got = kuf_replay(kuf, fd, 0);
        if (got < 0)
            check_errno("kuf_replay", -got, got == -ENOENT || (got == -ENOTSUP && driven) || usual(slot, before, -got),
                        "of a recording just made");
    }
    close(fd);
    return got;
}

/* ---- Bad arguments ------------------------------------------------------------------------------------------------- */

static long bad_argument(const struct operation_entry *operation)
{
    struct kuf *kuf = atomic_load(&fuzz_handle);
    struct slot *slot = &world->slot[operation->slot];
    struct moment before = moment_of(slot);
    uint64_t size = slot->page_size, gpa = slot->gpa + operation->page * size;
    struct kuf_populate_request request = {.size = sizeof(request), .gpa = gpa + 1, .len = size};
    long got, want = -EINVAL;
    const char *call = "kuf_discard";
    switch (operation->argument % 15) {
    case 0: got = kuf_discard(kuf, slot->gpa + 8, size, KUF_DISCARD_REFILL); break;
    case 1: got = kuf_discard(kuf, gpa, 0, KUF_DISCARD_REFILL); break;
    case 2: got = kuf_discard(kuf, gpa, size, 0x80); break;
    case 3: got = kuf_discard(kuf, gpa, UINT64_MAX - size + 1, KUF_DISCARD_REFILL), want = -EINVAL; break;
    case 4: got = kuf_discard(kuf, gpa, slot->length * 2, KUF_DISCARD_REFILL), want = -ERANGE; break;
    case 5: got = kuf_discard(kuf, UINT64_C(1) << 45, size, KUF_DISCARD_REFILL), want = -ENOENT; break;
    case 6: call = "kuf_resolve", got = kuf_resolve(kuf, gpa, NULL, size, 0); break;
    case 7: call = "kuf_resolve", got = kuf_resolve(kuf, gpa, NULL, size, KUF_RESOLVE_ZERO | KUF_RESOLVE_POISON); break;
    case 8: call = "kuf_resolve", got = kuf_resolve(kuf, gpa, (void *)16, size, 0), want = -EFAULT; break;
    case 9: call = "kuf_ensure", got = kuf_ensure(kuf, gpa, size, -2); break;
    case 10: call = "kuf_ensure", got = kuf_ensure(kuf, gpa, slot->length * 2, 0), want = -ERANGE; break;
    case 11: call = "kuf_populate", got = kuf_populate(kuf, &request); break;
    case 12: call = "kuf_remove_memory", got = kuf_remove_memory(kuf, slot->gpa + size, 0), want = -ENOENT; break;
    case 13: call = "kuf_remove_memory", got = kuf_remove_memory(kuf, slot->gpa, KUF_END_NOWAIT); break;
    default: {
        struct kuf *none = kuf;
        call = "kuf_close";
        got = kuf_close(&none, 0x100);
    }
    }
    bool resolved_already = want == -EFAULT && got == 0;
    if (got != want && !resolved_already && !(got < 0 && usual(slot, before, (int)-got)))
        fail("%s with a bad argument (%u) returns %ld, wanted %ld (%s)", call, operation->argument % 15, got, want,
             kuf_error());
    if (got < 0)
        check_errno(call, (int)-got, true, "");
    return got;
}

/* ---- fork ---------------------------------------------------------------------------------------------------------- */

/* Runs in the child: every call returns ECHILD. Where forks are followed its memory is served, and the values it saw go
 * to the parent. */
static void child(struct kuf *kuf, const uint8_t *at, int pipe_end)
{
    struct kuf_stats_info stats = {.size = sizeof(stats)};
    uint64_t word = 0;
    if (kuf_stats(kuf, &stats) != -ECHILD || kuf_discard(kuf, 0, SMALL_PAGE, KUF_DISCARD_REFILL) != -ECHILD)
        _exit(2);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGBUS, SIG_DFL);
    if (at != NULL)
        word = *(const volatile uint64_t *)at;
    if (write(pipe_end, &word, sizeof(word)) != sizeof(word))
        _exit(3);
    _exit(0);
}

static long fork_child(const struct operation_entry *operation)
{
    struct slot *slot = &world->slot[operation->slot];
    unsigned page = slot->first + operation->page, before = closes_seen(), poisonings = atomic_load(&world->poisonings);
    bool follows = world->plan.mode == MODE_FORKING && slot->backing == BACKING_PRIVATE &&
                   pthread_rwlock_tryrdlock(&slot->layout) == 0;
    int ends[2], status = 0, pending = NOT_TRACKED;
    if (pipe2(ends, O_CLOEXEC) < 0) {
        if (follows)
            pthread_rwlock_unlock(&slot->layout);
        return -errno;
    }
    const uint8_t *at = atomic_load(&slot->memory) + operation->page * slot->page_size;
    bool touches = follows && atomic_load(&slot->live) && !atomic_load(&world->closed);
    if (touches)
        pending = model_begin(page, EFFECT_READ, 0, 0);
    atomic_fetch_add(&world->end_calls, SLOTS);
    pid_t process = fork();
    if (process == 0)
        child(atomic_load(&fuzz_handle), touches ? at : NULL, ends[1]);
    close(ends[1]);
    uint64_t word = 0;
    ssize_t got = -1;
    while (process > 0 && (got = read(ends[0], &word, sizeof(word))) < 0 && errno == EINTR)
        ;
    bool said = got == sizeof(word);
    close(ends[0]);
    while (process > 0 && waitpid(process, &status, 0) < 0 && errno == EINTR)
        ;
    if (process > 0 && status != 0 &&
        !(touches && WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS))
        fail("a forked child: status %#x (2: a call did not answer ECHILD)", status);
    /* A page that was absent when it forked is the child's own from then on, and may be poisoned for one of the two. */
    bool own = world->plan.failing_source || poisonings != atomic_load(&world->poisonings);
    if (touches && said) {
        struct value value;
        if (!decode(page, 0, word, &value))
            fail("page %u: a forked child reads %#" PRIx64, page, word);
        model_end(page, pending, own ? OUTCOME_UNKNOWN : OUTCOME_MIXED, &value, 1);
    } else if (touches) {
        struct value value = {.kind = KIND_POISONED};
        bool excused = own || process < 0 || close_explains(before) || slot_may_be_missing(slot, moment_of(slot));
        model_end(page, pending, excused ? OUTCOME_UNKNOWN : OUTCOME_MIXED, &value, 1);
    }
    if (follows)
        pthread_rwlock_unlock(&slot->layout);
    return process < 0 ? -errno : 0;
}

/* ---- One operation ------------------------------------------------------------------------------------------------- */

static long touch_range(const struct operation_entry *operation)
{
    struct slot *slot = &world->slot[operation->slot];
    long last = 0;
    for (unsigned i = 0; i < operation->count; i++) {
        unsigned page = slot->first + operation->page + i;
        if (pthread_rwlock_tryrdlock(&slot->layout) != 0)
            return -EAGAIN;
        /* Do not touch memory that no slot has had yet. */
        if (atomic_load(&slot->memory) != NULL && !model_may_be(page, KIND_FRESH))
            last = touch_page(page, operation->kind == OP_WRITE);
        pthread_rwlock_unlock(&slot->layout);
    }
    return last;
}

static long event_on(const struct operation_entry *operation)
{
    struct slot *slot = &world->slot[operation->slot];
    long got = 0;
    if (pthread_rwlock_tryrdlock(&slot->layout) != 0)
        return -EAGAIN;
    if (atomic_load(&slot->live) && !model_may_be(slot->first + operation->page, KIND_FRESH))
        got = kernel_event(operation);
    pthread_rwlock_unlock(&slot->layout);
    return got;
}

/* Lets another handler take over: this one closes its handle, or is killed. */
static long hand_over(const struct operation_entry *operation)
{
    if (atomic_load(&world->turn) >= world->plan.restarts)
        return 0;
    if (operation->argument % 2 == 0) {
        atomic_store(&world->leave, LEAVE_HAND_OVER);
        return 0;
    }
    int not = LEAVE_NOT;
    if (pthread_rwlock_trywrlock(&dropping) != 0)
        return 0;
    if (!atomic_compare_exchange_strong(&world->leave, &not, LEAVE_KILLED)) {
        pthread_rwlock_unlock(&dropping);
        return 0;
    }
    model_stop_here();
    kill(getpid(), SIGKILL);
    for (;;)
        sleep_us(1000000);
}

static long perform_kind(const struct operation_entry *operation)
{
    switch ((enum operation)operation->kind) {
    case OP_READ:
    case OP_WRITE:
        return touch_range(operation);
    case OP_DISCARD:
    case OP_DISCARD_REMOVED:
        return discard(operation);
    case OP_RESOLVE:
    case OP_RESOLVE_ZERO:
    case OP_RESOLVE_POISON:
        return resolve(operation);
    case OP_RESOLVE_PRESENT:
        return resolve_present(operation);
    case OP_ENSURE:
    case OP_VCPU_FAULT:
        return ensure(operation);
    case OP_POPULATE:
    case OP_POPULATE_STOP:
        return populate(operation);
    case OP_DONTNEED:
    case OP_MADV_REMOVE:
    case OP_MADV_FREE:
    case OP_UNMAP:
        return event_on(operation);
    case OP_REMOVE_MEMORY:
        return remove_memory(operation);
    case OP_ADD_MEMORY:
        return add_memory(operation);
    case OP_ADD_AGAIN:
        return add_again(operation);
    case OP_MREMAP:
        return move(operation);
    case OP_FORK:
        return fork_child(operation);
    case OP_BAD_ARGUMENT:
        return bad_argument(operation);
    case OP_QUERY:
        return query(operation);
    case OP_RECORD:
    case OP_REPLAY:
        return record(operation, &world->slot[operation->slot]);
    case OP_CLOSE:
        return close_now(operation);
    case OP_HAND_OVER:
        return hand_over(operation);
    case OP_KINDS:
        return 0;
    case OP_PAUSE:
        sleep_us(operation->argument % 400);
        return 0;
    }
    return 0;
}

long perform(const struct operation_entry *operation)
{
    struct trace *trace = &world->trace[trace_index];
    uint32_t n = atomic_load(&trace->count);
    struct trace_entry *entry = &trace->entry[n % TRACE_LENGTH];
    *entry = (struct trace_entry){.operation = *operation, .begun_ns = now_ns()};
    trace->thread = (pid_t)syscall(SYS_gettid);
    atomic_store(&trace->count, n + 1);
    for (unsigned i = 0; i < THREADS + SERVERS; i++) {
        struct trace *other = &world->trace[i];
        uint32_t count = atomic_load(&other->count);
        struct trace_entry *last = &other->entry[(count - 1) % TRACE_LENGTH];
        if (i != trace_index && count > 0 && last->ended_ns == 0 && last->operation.slot == operation->slot)
            atomic_fetch_add(&world->pair[operation->kind][last->operation.kind], 1);
    }
    atomic_fetch_add(&world->kinds[operation->kind], 1);
    entry->result = perform_kind(operation);
    entry->ended_ns = now_ns();
    atomic_fetch_add(&world->operations, 1);
    return entry->result;
}
