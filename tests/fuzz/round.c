/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * One round, in a process of its own: a handle, its slots, the threads of the plan, the end of the handle, and a look at
 * every page afterwards.
 */
#include "fuzz.h"
#include <dirent.h>

static pthread_t threads[THREADS], servers[SERVERS], disturber;
static atomic_bool stop_disturbing;
static pid_t thread_ids[THREADS];
static pthread_barrier_t start_line;

/* ---- Threads ------------------------------------------------------------------------------------------------------- */

void *operate(void *argument)
{
    unsigned index = (unsigned)(uintptr_t)argument;
    const struct plan *plan = &world->plan;
    trace_index = index;
    thread_ids[index] = (pid_t)syscall(SYS_gettid);
    if (plan->mode != MODE_REMOTE)
        pthread_barrier_wait(&start_line);
    while (atomic_load(&world->leave) == LEAVE_NOT || index % 2 == 0) {
        unsigned i = atomic_fetch_add(&world->next[index], 1);
        if (i >= plan->lengths[index])
            break;
        if (!plan->left_out[index][i] && here(index, &plan->list[index][i]))
            perform(&plan->list[index][i]);
    }
    return NULL;
}

/* Sends signals to touching threads, which then fault again, and makes shortages come and go. */
static void *disturb(void *argument)
{
    (void)argument;
    const struct plan *plan = &world->plan;
    uint64_t random = mix(plan->seed + 4711);
    struct rlimit usual, few;
    getrlimit(RLIMIT_NOFILE, &usual);
    few = usual;
    few.rlim_cur = 8;
    while (!atomic_load(&stop_disturbing)) {
        if (plan->signals && atomic_load(&thread_ids[0]) != 0)
            syscall(SYS_tgkill, getpid(), thread_ids[below(&random, plan->threads)], SIGUSR1);
        if (atomic_load(&world->dump) && !atomic_load(&world->dumped)) {
            report_handle();
            fflush(stdout);
            atomic_store(&world->dumped, true);
        }
        if (plan->few_descriptors && below(&random, 20) == 0) {
            atomic_store(&world->shortage, true);
            setrlimit(RLIMIT_NOFILE, below(&random, 2) ? &few : &usual);
        }
        sleep_us(plan->signals ? 200 : 2000);
    }
    setrlimit(RLIMIT_NOFILE, &usual);
    return NULL;
}

void start_thread(pthread_t *thread, void *(*body)(void *), uintptr_t argument)
{
    int got = pthread_create(thread, NULL, body, (void *)argument);
    if (got != 0)
        fail("a thread: %s", strerror(got));
}

/* ---- Set up -------------------------------------------------------------------------------------------------------- */

static void lay_out(void)
{
    const struct plan *plan = &world->plan;
    model_reset();
    for (unsigned i = 0; i < plan->slots; i++) {
        struct slot *slot = &world->slot[i];
        const struct slot_plan *from = &plan->slot[i];
        slot->backing = from->backing;
        if (slot->backing >= BACKING_HUGE_PRIVATE && !huge_pages_can_be_had())
            slot->backing -= BACKING_HUGE_PRIVATE;
        slot->page_size = slot->backing >= BACKING_HUGE_PRIVATE ? HUGE_PAGE : SMALL_PAGE;
        slot->pages = from->pages;
        slot->first = (uint16_t)(i * SLOT_PAGES);
        slot->length = slot->pages * slot->page_size;
        slot->gpa = (uint64_t)(i + 1) << 30;
        slot->fd = slot->source_fd = -1;
        slot->source = plan->mode == MODE_REMOTE ? 0 : from->source;
        slot->layers = slot->source != 0 && from->layers;
        slot->fixed = slot->source != 0;
        pthread_rwlockattr_t shared;
        pthread_rwlockattr_init(&shared);
        pthread_rwlockattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
        pthread_rwlock_init(&slot->layout, &shared);
        pthread_mutex_init(&slot->living, NULL);
        if (!map_slot(slot))
            fail("memory for slot %u: %s", i, strerror(errno));
    }
}

void open_handle(void)
{
    struct kuf_options options = world->plan.options;
    struct kuf *kuf = NULL;
    bool serviced = !(options.flags & (KUF_OPEN_DIRECT | KUF_OPEN_SOURCES | KUF_OPEN_CALLER_DRIVEN));
    options.fill = serviced ? fuzz_fill : NULL;
    options.event = fuzz_event;
    options.log = fuzz_log;
    options.release = fuzz_release;
    options.opaque = world;
    int got = kuf_open(&options, &kuf);
    if (got == -EPERM || got == -ENOSYS) {
        printf("SKIP: kuf_open: %s\n", kuf_error());
        fflush(stdout);
        _exit(77);
    }
    if (got < 0)
        fail("kuf_open: %d, %s", got, kuf_error());
    atomic_store(&fuzz_handle, kuf);
}

static void add_first_slots(void)
{
    for (unsigned i = 0; i < world->plan.slots; i++) {
        struct operation_entry add = {.kind = OP_ADD_MEMORY, .slot = (uint8_t)i};
        perform(&add);
    }
}

/* ---- End ----------------------------------------------------------------------------------------------------------- */

void end_handle(uint32_t flags)
{
    if (!atomic_load(&world->closed) && close_handle(flags) != 0)
        close_handle(KUF_END_POISON);
    while (atomic_load(&released) == 0)
        sleep_us(500);
}

static void look_at_all(void)
{
    for (unsigned i = 0; i < world->plan.slots; i++)
        for (unsigned page = 0; page < world->slot[i].pages; page++)
            if (!model_may_be(world->slot[i].first + page, KIND_FRESH))
                touch_page(world->slot[i].first + page, false);
}

static unsigned entries(const char *path, const char *comm)
{
    unsigned count = 0;
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder != NULL && (entry = readdir(folder)) != NULL;) {
        char name[300], text[64] = "";
        if (entry->d_name[0] == '.')
            continue;
        if (comm != NULL) {
            snprintf(name, sizeof(name), "%s/%s/comm", path, entry->d_name);
            FILE *file = fopen(name, "r");
            if (file == NULL)
                continue;
            if (fgets(text, sizeof(text), file) == NULL)
                text[0] = 0;
            fclose(file);
            if (strncmp(text, comm, strlen(comm)) != 0)
                continue;
        }
        count++;
    }
    if (folder != NULL)
        closedir(folder);
    return count;
}

/* Checks that the library has left nothing behind. A thread that has ended may still be listed for a moment. */
static void nothing_is_left(unsigned descriptors)
{
    for (unsigned n = 0; entries("/proc/self/task", "kuf-") != 0; n++) {
        if (n > 20000)
            fail("%u threads of the library are left after kuf_close", entries("/proc/self/task", "kuf-"));
        sleep_us(1000);
    }
    for (unsigned i = 0; i < world->plan.slots; i++)
        if (world->slot[i].fd >= 0)
            descriptors++;
    for (unsigned i = 0; i < world->plan.slots; i++)
        if (world->slot[i].source_fd >= 0)
            descriptors++;
    if (world->plan.mode == MODE_ADOPTED)
        descriptors++;
    unsigned now = entries("/proc/self/fd", NULL);
    if (now > descriptors)
        fail("%u descriptors are open after kuf_close, %u before kuf_open", now, descriptors);
}

int run_round(void)
{
    const struct plan *plan = &world->plan;
    static const uint32_t ends[] = {KUF_END_POISON, KUF_END_POPULATE, KUF_END_POPULATE | KUF_END_POISON,
                                    KUF_END_POISON | KUF_END_NOWAIT, 0};
    unsigned descriptors = entries("/proc/self/fd", NULL);
    catch_signals();
    if (plan->small_file_system)
        mount_small_file_system();
    lay_out();
    if (plan->mode == MODE_REMOTE) {
        run_remote_round();
        look_at_all();
        return 0;
    }
    open_handle();
    pthread_barrier_init(&start_line, NULL, plan->threads);
    add_first_slots();
    for (uintptr_t i = 0; i < SERVERS; i++)
        start_thread(&servers[i], serve, i);
    for (uintptr_t i = 0; i < plan->threads; i++)
        start_thread(&threads[i], operate, i);
    start_thread(&disturber, disturb, 0);
    for (unsigned i = 0; i < plan->threads; i++)
        pthread_join(threads[i], NULL);
    atomic_store(&stop_disturbing, true);
    pthread_join(disturber, NULL);
    end_handle(ends[plan->close_flags % 5]);
    atomic_store(&world->stop_serving, true);
    for (unsigned i = 0; i < SERVERS; i++)
        pthread_join(servers[i], NULL);
    look_at_all();
    nothing_is_left(descriptors);
    return 0;
}
