/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The end of a handle and of a slot while other threads keep giving memory back and touching it. The kernel refuses to
 * install or poison a page from before a REMOVE event until it was read, and with such threads an event is nearly
 * always unread. The end happens all the same, or reports that it could not and leaves the handle as it was. No page
 * that was not filled reads as zeroes unless it was given back, and every thread continues.
 */
#include "seeded.h"
#include "touches.h"
#include "uffd.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 512, NEVER = 64, GIVEN = 8, EACH = 2 };

/* Kinds of memory. The last two are under a userfaultfd that the library adopts. */
enum memory { PRIVATE, IN_PLACE, ADOPTED, REMOTE, MEMORIES };
static const char *const memories[MEMORIES] = {"private memory", "shared memory filled in place",
                                               "a userfaultfd of the caller's", "memory of another process"};

static const struct ending {
    const char *how;
    /* KUF_END_*. */
    uint32_t flags;
    /* kuf_remove_memory, and kuf_close afterwards. */
    bool remove;
    /* All pages were filled before the other threads began to give memory back. */
    bool full;
} endings[] = {
    {"kuf_close that poisons", KUF_END_POISON, false, false},
    {"kuf_close that does not wait", KUF_END_POISON | KUF_END_NOWAIT, false, false},
    {"kuf_remove_memory that poisons", KUF_END_POISON, true, false},
    {"kuf_close that fills, and poisons the rest", KUF_END_POPULATE | KUF_END_POISON, false, false},
    {"kuf_remove_memory that fills, and poisons the rest", KUF_END_POPULATE | KUF_END_POISON, true, false},
    {"kuf_close that fills", KUF_END_POPULATE, false, false},
    {"kuf_remove_memory that fills", KUF_END_POPULATE, true, false},
    {"kuf_close of full memory", 0, false, true},
    {"kuf_remove_memory of full memory", 0, true, true},
};
enum { ENDINGS = sizeof(endings) / sizeof(endings[0]) };

static struct source source = SOURCE_INIT;
static unsigned char *ram;
static atomic_bool stop;
static size_t page;
static int advice;

/* The first pages are never given back. */
static void *giver(void *argument)
{
    uint64_t random = (uint64_t)(uintptr_t)argument;
    while (!atomic_load(&stop)) {
        size_t first = NEVER + next_random(&random) % (PAGES - NEVER - GIVEN);
        madvise(ram + first * page, GIVEN * page, advice);
    }
    return NULL;
}

static void *reader(void *argument)
{
    uint64_t random = (uint64_t)(uintptr_t)argument;
    while (!atomic_load(&stop))
        try_touch(ram + (NEVER + next_random(&random) % (PAGES - NEVER)) * page);
    return NULL;
}

/* ---- Another process ------------------------------------------------------------------------------------------------- */

/* Opens a userfaultfd, sends it, and gives memory back on command. */
static void other_process(int socket, uint64_t seed)
{
    int uffd = own_userfaultfd(UFFD_FEATURE_EVENT_REMOVE);
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {.header = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    memcpy(CMSG_DATA(&control.header), &uffd, sizeof(int));
    char byte = 0;
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof(control)};
    if (sendmsg(socket, &message, 0) != 1 || read(socket, &byte, 1) != 1)
        _exit(1);
    for (uintptr_t i = 0; i < 4; i++)
        start(i < 2 ? giver : reader, (void *)(uintptr_t)(seed + i));
    for (;;)
        pause();
}

static pid_t start_other(int *socket, int *uffd, uint64_t seed)
{
    int pair[2];
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0, "a socket pair");
    pid_t pid = fork();
    must(pid >= 0, "a process");
    if (pid == 0) {
        begin_child();
        other_process(pair[1], seed);
    }
    close(pair[1]);
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {0};
    char byte;
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control,
                             .msg_controllen = sizeof(control)};
    must(recvmsg(pair[0], &message, MSG_CMSG_CLOEXEC) == 1 && CMSG_FIRSTHDR(&message) != NULL,
         "the other process sends its userfaultfd");
    memcpy(uffd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
    *socket = pair[0];
    return pid;
}

/* ---- One round ------------------------------------------------------------------------------------------------------- */

struct round {
    enum memory memory;
    const struct ending *ending;
    struct kuf *kuf;
    int file, uffd, socket;
    pid_t other;
    pthread_t threads[4];
    uint64_t seed;
};

static void set_up(struct round *round)
{
    round->file = round->uffd = round->socket = -1;
    advice = round->memory == IN_PLACE ? MADV_REMOVE : MADV_DONTNEED;
    ram = round->memory == IN_PLACE ? map_shared(PAGES * page, &round->file) : map_anonymous(PAGES * page);
    atomic_store(&stop, false);
    /* Before the library has threads in this process. */
    if (round->memory == REMOTE)
        round->other = start_other(&round->socket, &round->uffd, round->seed);
    round->kuf = watch(open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page,
        .userfaultfds = 1 + (uint32_t)round->seed % 3}));
    if (round->memory == ADOPTED)
        round->uffd = own_userfaultfd(UFFD_FEATURE_EVENT_REMOVE);
    bool remote = round->memory == REMOTE;
    uint32_t flags = remote ? KUF_MEMORY_REMOTE : 0;
    struct kuf_memory slot = {.size = sizeof(slot), .flags = flags, .gpa = BASE, .len = PAGES * page,
                              .hva = (uintptr_t)ram, .fd = round->memory == IN_PLACE ? round->file : -1,
                              .uffd = remote || round->memory == ADOPTED ? round->uffd : -1};
    int got = kuf_add_memory(round->kuf, &slot);
    must(got == 0, "kuf_add_memory: %s", got ? kuf_error() : "adds");
    if (round->ending->full)
        must(kuf_ensure(round->kuf, BASE, PAGES * page, -1) == 0, "kuf_ensure: %s", kuf_error());
}

static void begin_storm(struct round *round)
{
    if (round->memory == REMOTE)
        must(write(round->socket, "", 1) == 1, "the other process is told to begin");
    for (uintptr_t i = 0; i < 4 && round->memory != REMOTE; i++)
        round->threads[i] = start(i < 2 ? giver : reader, (void *)(uintptr_t)(round->seed * 4 + i + 1));
    wait_until(stats_of(round->kuf).events_remove > 0);
}

static void end_storm(struct round *round)
{
    atomic_store(&stop, true);
    if (round->memory == REMOTE) {
        must(kill(round->other, SIGKILL) == 0, "kill");
        end_of(round->other);
    }
    for (int i = 0; i < 4 && round->memory != REMOTE; i++)
        pthread_join(round->threads[i], NULL);
}

/* One call of the ending; kuf_remove_memory again while a callback is in the way. */
static int call(struct round *round)
{
    int got;
    if (!round->ending->remove)
        return kuf_close(&round->kuf, round->ending->flags);
    while ((got = kuf_remove_memory(round->kuf, BASE, round->ending->flags)) == -EBUSY)
        sleep_ms(1);
    return got;
}

/* kuf_close and kuf_remove_memory promise these results for this ending. */
static bool may_return(const struct round *round, int got)
{
    bool fills = round->ending->flags == KUF_END_POPULATE;
    /* Pages that can be neither poisoned nor made inaccessible stay as they are, and so does the slot. */
    bool stays = round->memory == REMOTE && round->ending->remove && round->ending->flags & KUF_END_POISON;
    return got == 0 || (got == -EIO && (fills || stays));
}

/* Bytes of the caller's own memory that are neither the source's nor zero because they were given back. */
static int wrong_pages(bool filled)
{
    int wrong = 0;
    for (int i = 0; i < PAGES; i++) {
        const unsigned char *at = ram + i * page;
        bool read = try_touch(at) == 0;
        bool zero = read && i >= NEVER && holds_zeroes(at, page);
        bool right = read && (zero || holds_content(at, BASE + i * page, page, 1));
        /* A page that cannot be read is poisoned. No page that was filled before the end is poisoned. */
        if (read || (filled && i < NEVER))
            wrong += !right;
    }
    return wrong;
}

static void one_round(enum memory memory, const struct ending *ending, uint64_t seed, int results[3])
{
    struct round round = {.memory = memory, .ending = ending, .seed = seed};
    set_up(&round);
    begin_storm(&round);
    atomic_store(&watched, ending->remove ? round.kuf : NULL);
    int got = call(&round);
    if (!may_return(&round, got))
        printf("    %s: %d (%s)\n", ending->how, got, kuf_error());
    results[0] += may_return(&round, got);
    results[2] += got == -EIO;
    if (memory == REMOTE)
        end_storm(&round);
    bool goes_on = got == -EIO && memory != REMOTE && ending->flags == KUF_END_POPULATE;
    if (goes_on) {
        /* The handle is as it was. */
        end_storm(&round);
        must(kuf_ensure(round.kuf, BASE, PAGES * page, -1) == 0, "kuf_ensure afterwards: %s", kuf_error());
    }
    atomic_store(&watched, NULL);
    if (round.kuf != NULL)
        must(kuf_close(&round.kuf, got == 0 || goes_on ? 0 : KUF_END_POISON) == 0, "kuf_close: %s", kuf_error());
    if (memory != REMOTE && !goes_on)
        end_storm(&round);
    if (memory != REMOTE)
        results[1] += wrong_pages(ending->full || ending->flags == KUF_END_POPULATE);
    munmap(ram, PAGES * page);
    for (int *fd = (int[]){round.file, round.uffd, round.socket, -2}; *fd != -2; fd++)
        if (*fd >= 0)
            close(*fd);
}

int main(void)
{
    page = page_size();
    begin_watched(120);
    catch_touches();
    uint64_t seed = 1;
    for (enum memory memory = 0; memory < MEMORIES; memory++) {
        if (memory == IN_PLACE && !has_feature(KUF_FEATURE_MINOR)) {
            skip_part("no minor faults: nothing is filled in place");
            continue;
        }
        /* Ends, wrong pages, and ends that reported that not every page could be filled. */
        int results[3] = {0};
        uint64_t since = now_ns();
        for (int n = 0; n < EACH * ENDINGS; n++)
            one_round(memory, &endings[n % ENDINGS], seed++, results);
        is(results[0], EACH * ENDINGS, "%s: each end comes while memory is given back", memories[memory]);
        is(results[1], 0, "%s: and no unfilled page that was not given back can be read", memories[memory]);
        printf("    %d of them could not fill everything, %" PRIu64 " ms in all\n", results[2],
               (now_ns() - since) / 1000000);
    }
    return done();
}
