/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Memory of another process. The round's process is the VMM: it has the memory and the userfaultfd, touches and advises.
 * Handlers, one after the other, adopt the userfaultfd and make the calls; each ends in order or is killed. The threads
 * with even numbers are the VMM's, those with odd ones the handler's of the moment.
 */
#include "fuzz.h"

static pthread_t guests[THREADS], callers[THREADS], servers[SERVERS];

static bool of_the_guest(unsigned kind)
{
    return kind == OP_READ || kind == OP_WRITE || kind == OP_DONTNEED || kind == OP_MADV_REMOVE || kind == OP_MADV_FREE ||
           kind == OP_PAUSE;
}

/* Deferred pages of shared files are written to in place and then named whole: nothing else may resolve them meanwhile. */
static bool goes_unrecorded(const struct operation_entry *operation)
{
    const struct slot *slot = &world->slot[operation->slot];
    bool resolves = operation->kind >= OP_RESOLVE && operation->kind <= OP_RESOLVE_PRESENT;
    return resolves && slot->fd >= 0 && slot->backing != BACKING_SHARED_NO_FD;
}

/* Whether this process does an operation of a thread's list. */
bool here(unsigned thread, const struct operation_entry *operation)
{
    if (world->plan.mode != MODE_REMOTE)
        return true;
    if (thread % 2 == 0)
        return of_the_guest(operation->kind);
    return !of_the_guest(operation->kind) && !goes_unrecorded(operation);
}

/* ---- A handler ----------------------------------------------------------------------------------------------------- */

static bool is_named(unsigned page)
{
    uint32_t version = atomic_load(&world->whole[page]);
    return version != 0 && version == model_new_version(page);
}

static void add_slots(bool again)
{
    for (unsigned i = 0; i < world->plan.slots; i++) {
        struct slot *slot = &world->slot[i];
        int pending[SLOT_PAGES];
        uint32_t flags = !again ? 0 : slot->fd >= 0 && slot->backing != BACKING_SHARED_NO_FD ? KUF_MEMORY_FILL_ALL
                                                                                          : KUF_MEMORY_POPULATED;
        for (unsigned page = 0; page < slot->pages; page++)
            pending[page] = model_begin(slot->first + page, EFFECT_ADD, 0, 
                                        !again ? 0 : flags == 0 || is_named(slot->first + page) ? ADDED_ANEW
                                                                                                : ADDED_ANEW | FILLS_ALL);
        int got = add_slot(slot, flags);
        if (got < 0)
            fail("kuf_add_memory of another process's memory: %d, %s", got, kuf_error());
        for (unsigned page = 0; page < slot->pages; page++)
            model_end(slot->first + page, pending[page], OUTCOME_DONE, NULL, 0);
        atomic_store(&slot->live, true);
    }
}

/* Names the pages of shared files that keep their bytes: the last handler has filled them, and they were not dropped
 * since. */
static void name_whole_pages(void)
{
    for (unsigned i = 0; i < world->plan.slots; i++) {
        struct slot *slot = &world->slot[i];
        for (unsigned page = slot->first; page < slot->first + slot->pages && slot->fd >= 0; page++) {
            uint32_t version = atomic_load(&world->whole[page]);
            if (slot->backing == BACKING_SHARED_NO_FD || !is_named(page))
                continue;
            int pending = model_begin(page, EFFECT_RESOLVE, version, 0);
            ssize_t got = kuf_resolve(atomic_load(&fuzz_handle), gpa_of(page), NULL, slot->page_size, KUF_RESOLVE_IN_PLACE);
            /* -EFAULT: the guest has given it back since. */
            if (got < 0 && got != -EFAULT)
                fail("page %u: KUF_RESOLVE_IN_PLACE after a hand-over: %zd, %s", page, got, kuf_error());
            if (got >= 0)
                note_named(page);
            model_end(page, pending, got >= 0 ? OUTCOME_DONE : OUTCOME_UNKNOWN, NULL, 0);
        }
    }
}

static void run_handler(unsigned turn)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    while (atomic_load(&world->turn) != turn)
        sleep_us(200);
    atomic_store(&world->taking_over, turn > 0);
    atomic_store(&world->handler, getpid());
    open_handle();
    add_slots(turn > 0);
    name_whole_pages();
    atomic_store(&world->taking_over, false);
    atomic_store(&world->ready, true);
    for (uintptr_t i = 0; i < SERVERS; i++)
        start_thread(&servers[i], serve, i);
    for (uintptr_t i = 1; i < world->plan.threads; i += 2)
        start_thread(&callers[i], operate, i);
    for (unsigned i = 1; i < world->plan.threads; i += 2)
        pthread_join(callers[i], NULL);
    if (atomic_load(&world->leave) == LEAVE_HAND_OVER) {
        leave_places();
        if (close_handle(KUF_END_HANDOVER) != 0)
            fail("KUF_END_HANDOVER: %s", kuf_error());
        _exit(0);
    }
    while (!atomic_load(&world->guest_done))
        sleep_us(500);
    leave_places();
    end_handle(KUF_END_POISON);
    atomic_store(&world->ended, true);
    _exit(0);
}

/* ---- The VMM ------------------------------------------------------------------------------------------------------- */

static void *join_guests(void *unused)
{
    for (unsigned i = 0; i < world->plan.threads; i += 2)
        pthread_join(guests[i], NULL);
    atomic_store(&world->guest_done, true);
    return unused;
}

/* No handler serves the pages until the next one has added them. */
static void left_alone(pid_t dead)
{
    model_forget(dead);
    for (unsigned i = 0; i < world->plan.slots; i++)
        for (unsigned page = 0; page < world->slot[i].pages; page++)
            model_end(world->slot[i].first + page,
                      model_begin(world->slot[i].first + page, EFFECT_END, 0, KUF_END_HANDOVER | ENDS_HANDLE), OUTCOME_DONE,
                      NULL, 0);
}

static void next_turn(void)
{
    atomic_store(&world->closed, false);
    atomic_store(&world->closing, 0);
    for (unsigned i = 0; i < world->plan.slots; i++) {
        atomic_store(&world->slot[i].live, false);
        atomic_store(&world->slot[i].changing, 0);
    }
    atomic_store(&world->leave, LEAVE_NOT);
    atomic_fetch_add(&world->turn, 1);
}

void run_remote_round(void)
{
    pid_t handlers[HANDLERS];
    pthread_t joiner;
    uffd_to_adopt();
    for (unsigned turn = 0; turn <= world->plan.restarts; turn++) {
        handlers[turn] = fork();
        if (handlers[turn] == 0)
            run_handler(turn);
    }
    while (!atomic_load(&world->ready) && !atomic_load(&world->failed))
        sleep_us(200);
    for (uintptr_t i = 0; i < world->plan.threads; i += 2)
        start_thread(&guests[i], operate, i);
    start_thread(&joiner, join_guests, 0);
    while (!atomic_load(&world->ended)) {
        unsigned turn = atomic_load(&world->turn);
        int status;
        if (waitpid(handlers[turn], &status, 0) != handlers[turn])
            fail("waitpid: %s", strerror(errno));
        int leave = atomic_load(&world->leave);
        bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL && leave == LEAVE_KILLED;
        bool in_order = WIFEXITED(status) && WEXITSTATUS(status) == 0;
        if (atomic_load(&world->failed))
            _exit(1);
        if (!killed && !in_order)
            fail("handler %u ended with status %#x", turn, status);
        if (killed)
            left_alone(handlers[turn]);
        if (!atomic_load(&world->ended))
            next_turn();
    }
    pthread_join(joiner, NULL);
    /* These are the handlers whose turn has not come. */
    for (unsigned turn = atomic_load(&world->turn) + 1; turn <= world->plan.restarts; turn++) {
        kill(handlers[turn], SIGKILL);
        waitpid(handlers[turn], NULL, 0);
    }
}
