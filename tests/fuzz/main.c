/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The driver: it runs rounds from seeds, each in a process of its own, reports a failure, and repeats a failing seed,
 * also with fewer operations.
 *
 *     fuzz [--seconds=N] [--seed=N] [--times=N] [--mode=NAME] [--rounds=N] [--minimise] [--without=FILE]
 */
#include "fuzz.h"

enum { PATIENCE_S = 60, MINIMISING_S = 120 };

struct settings {
    uint64_t seconds, seed, times, rounds;
    bool seed_given, minimise, keep_going, huge_pages;
    int mode;
    const char *without;
    uint64_t kinds_without;
};

static struct settings settings = {.seconds = 10, .times = 1, .mode = -1};
static uint64_t total_operations, total_touches, total_callbacks, total_lossy, total_rounds, total_kinds[OP_KINDS];
static uint64_t total_pairs[OP_KINDS][OP_KINDS];

/* ---- One process --------------------------------------------------------------------------------------------------- */

static void clear_world(void)
{
    struct plan kept = world->plan;
    madvise(world, sizeof(*world), MADV_REMOVE);
    memset(world, 0, sizeof(*world));
    world->plan = kept;
}

/* Waits for the process while operations go on. Returns its status, or -1 when no operation has ended for a long while.
 */
static int wait_for(pid_t process)
{
    uint64_t last = 0, since = now_ns();
    for (unsigned n = 0;; n++) {
        int status;
        if (waitpid(process, &status, WNOHANG) == process)
            return status;
        uint64_t done = atomic_load(&world->operations) + atomic_load(&world->touches);
        if (done != last) {
            last = done;
            since = now_ns();
        } else if (now_ns() - since > (uint64_t)PATIENCE_S * 1000000000) {
            return -1;
        }
        sleep_us(n < 100 ? 500 : 5000);
    }
}

static void report_hang(pid_t process)
{
    printf("not ok - HANG: nothing was done for %d s; the threads, and where they are:\n", PATIENCE_S);
    report_threads(process);
    if (atomic_load(&world->handler) != 0)
        report_threads(atomic_load(&world->handler));
    fflush(stdout);
    /* Prints the library's progress, if it can still report it. */
    atomic_store(&world->dump, true);
    for (unsigned n = 0; n < 300 && !atomic_load(&world->dumped); n++)
        sleep_us(10000);
    kill(process, SIGKILL);
    waitpid(process, NULL, 0);
}

static void silence(void)
{
    int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    dup2(null, STDOUT_FILENO);
    close(null);
}

/* 0: right. 77: this machine cannot. Else wrong. */
static int one_round(bool quiet)
{
    clear_world();
    fflush(stdout);
    pid_t process = fork();
    if (process == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (quiet)
            silence();
        _exit(run_round());
    }
    int status = wait_for(process);
    if (status == -1 && !quiet)
        report_hang(process);
    if (status == -1 && quiet) {
        kill(process, SIGKILL);
        waitpid(process, NULL, 0);
    }
    if (status != -1 && WIFSIGNALED(status) && !quiet)
        printf("not ok - the process ended with signal %d (%s)\n", WTERMSIG(status), strsignal(WTERMSIG(status)));
    return status != -1 && WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

static void add_up(void)
{
    total_operations += atomic_load(&world->operations);
    total_touches += atomic_load(&world->touches);
    total_callbacks += atomic_load(&world->callbacks);
    total_lossy += atomic_load(&world->lossy);
    total_rounds++;
    for (unsigned i = 0; i < OP_KINDS; i++)
        total_kinds[i] += atomic_load(&world->kinds[i]);
    for (unsigned i = 0; i < OP_KINDS; i++)
        for (unsigned k = 0; k < OP_KINDS; k++)
            total_pairs[i][k] += atomic_load(&world->pair[i][k]);
}

/* ---- Fewer operations ---------------------------------------------------------------------------------------------- */

/* The message of a failure without its numbers. Two failures with one message count as the same. */
static void kind_of_failure(char *kind, size_t room, int status)
{
    size_t at = 0;
    if (world->message[0] == 0)
        at = (size_t)snprintf(kind, room, "ended with %d", status);
    for (const char *from = world->message; *from != 0 && *from != '(' && at + 1 < room; from++)
        if (*from < '0' || *from > '9')
            kind[at++] = *from;
    kind[at] = 0;
}

static bool fails_again(unsigned tries, const char *wanted)
{
    char kind[256];
    for (unsigned n = 0; n < tries; n++) {
        int got = one_round(true);
        if (got == 0 || got == 77)
            continue;
        kind_of_failure(kind, sizeof(kind), got);
        if (strcmp(kind, wanted) == 0)
            return true;
    }
    return false;
}

static unsigned operations_left(const struct plan *plan)
{
    unsigned left = 0;
    for (unsigned thread = 0; thread < plan->threads; thread++)
        for (unsigned i = 0; i < plan->lengths[thread]; i++)
            left += !plan->left_out[thread][i];
    return left;
}

static void leave_out(struct plan *plan, unsigned from, unsigned count)
{
    unsigned at = 0;
    for (unsigned thread = 0; thread < plan->threads; thread++)
        for (unsigned i = 0; i < plan->lengths[thread]; i++)
            if (!plan->left_out[thread][i] && at++ >= from && at <= from + count)
                plan->left_out[thread][i] = true;
}

/* Removes ever smaller parts of the lists, as long as the round still fails within some tries. */
static void minimise(unsigned tries, const char *wanted)
{
    static struct plan best;
    best = world->plan;
    uint64_t end = now_ns() + (uint64_t)MINIMISING_S * 1000000000;
    for (unsigned part = operations_left(&best) / 2; part > 0; part /= 2)
        for (unsigned from = 0; from < operations_left(&best) && now_ns() < end;) {
            world->plan = best;
            leave_out(&world->plan, from, part);
            if (fails_again(tries, wanted))
                best = world->plan;
            else
                from += part;
        }
    world->plan = best;
}

static void write_left_out(const char *path)
{
    FILE *file = fopen(path, "w");
    for (unsigned thread = 0; file != NULL && thread < world->plan.threads; thread++)
        for (unsigned i = 0; i < world->plan.lengths[thread]; i++)
            if (world->plan.left_out[thread][i])
                fprintf(file, "%u %u\n", thread, i);
    if (file != NULL)
        fclose(file);
}

static void read_left_out(const char *path)
{
    unsigned thread, i;
    FILE *file = fopen(path, "r");
    while (file != NULL && fscanf(file, "%u %u", &thread, &i) == 2)
        if (thread < THREADS && i < OPERATIONS)
            world->plan.left_out[thread][i] = true;
    if (file != NULL)
        fclose(file);
}

static void print_operations(void)
{
    const struct plan *plan = &world->plan;
    for (unsigned thread = 0; thread < plan->threads; thread++)
        for (unsigned i = 0; i < plan->lengths[thread]; i++)
            if (!plan->left_out[thread][i]) {
                printf("    thread %u, %u: ", thread, i);
                describe_operation(&plan->list[thread][i]);
                printf("\n");
            }
}

/* ---- All rounds ---------------------------------------------------------------------------------------------------- */

static void report_failure(const char *program, int status)
{
    char kind[256];
    kind_of_failure(kind, sizeof(kind), status);
    describe_plan(&world->plan);
    report_traces();
    printf("again: %s --seed=%" PRIu64 " --times=200%s%s%s%s\n", program, world->plan.seed,
           settings.mode >= 0 ? " --mode=" : "", settings.mode >= 0 ? mode_names[settings.mode] : "",
           settings.without ? " --without=" : "", settings.without ? settings.without : "");
    if (!settings.minimise)
        return;
    char path[64];
    snprintf(path, sizeof(path), "fuzz-%" PRIu64 ".without", world->plan.seed);
    minimise(30, kind);
    write_left_out(path);
    printf("%u operations are enough (--without=%s):\n", operations_left(&world->plan), path);
    print_operations();
}

/* Returns whether the round was right. */
static bool seed_round(const char *program, uint64_t seed)
{
    make_plan(&world->plan, seed, settings.mode, settings.kinds_without);
    if (settings.without != NULL)
        read_left_out(settings.without);
    for (uint64_t n = 0; n < settings.times; n++) {
        int got = one_round(false);
        if (got == 77)
            exit(77);
        add_up();
        if (got != 0) {
            report_failure(program, got);
            return false;
        }
    }
    return true;
}

static uint64_t number_after(const char *argument)
{
    return strtoull(strchr(argument, '=') + 1, NULL, 0);
}

static int mode_named(const char *name)
{
    for (int i = 0; i < MODES; i++)
        if (strcmp(mode_names[i], name) == 0)
            return i;
    fprintf(stderr, "no mode %s\n", name);
    exit(2);
}

static uint64_t kind_named(const char *name)
{
    for (int i = 0; i < OP_KINDS; i++)
        if (strcmp(operation_names[i], name) == 0)
            return UINT64_C(1) << i;
    for (int i = 0; i < BACKINGS; i++)
        if (strcmp(backing_names[i], name) == 0)
            return WITHOUT_BACKING(i);
    fprintf(stderr, "no operation or memory %s\n", name);
    exit(2);
}

static void take_arguments(int count, char **arguments)
{
    for (int i = 1; i < count; i++) {
        const char *argument = arguments[i];
        if (strncmp(argument, "--seconds=", 10) == 0)
            settings.seconds = number_after(argument);
        else if (strncmp(argument, "--seed=", 7) == 0) {
            settings.seed = number_after(argument);
            settings.seed_given = true;
        } else if (strncmp(argument, "--times=", 8) == 0)
            settings.times = number_after(argument);
        else if (strncmp(argument, "--rounds=", 9) == 0)
            settings.rounds = number_after(argument);
        else if (strncmp(argument, "--mode=", 7) == 0)
            settings.mode = mode_named(argument + 7);
        else if (strncmp(argument, "--without=", 10) == 0)
            settings.without = argument + 10;
        else if (strncmp(argument, "--not=", 6) == 0)
            settings.kinds_without |= kind_named(argument + 6);
        else if (strcmp(argument, "--huge-pages") == 0)
            settings.huge_pages = true;
        else if (strcmp(argument, "--keep-going") == 0)
            settings.keep_going = true;
        else if (strcmp(argument, "--minimise") == 0)
            settings.minimise = true;
        else {
            fprintf(stderr, "usage: fuzz [--seconds=N] [--seed=N [--times=N] [--without=FILE]] [--rounds=N] [--mode=NAME] "
                            "[--not=OPERATION or MEMORY]... [--huge-pages] [--keep-going] [--minimise]\n");
            exit(2);
        }
    }
}

static void print_sum(uint64_t failures)
{
    unsigned met = 0, never = 0;
    for (unsigned i = 0; i < OP_KINDS; i++)
        for (unsigned k = 0; k <= i; k++)
            if (total_kinds[i] && total_kinds[k])
                total_pairs[i][k] + total_pairs[k][i] ? met++ : never++;
    printf("%" PRIu64 " rounds, %" PRIu64 " failed; %" PRIu64 " operations, %" PRIu64 " touches checked, %" PRIu64
           " fills; %u pairs of operations met on one slot, %u did not; %" PRIu64 " pages not checked\n",
           total_rounds, failures, total_operations, total_touches, total_callbacks, met, never, total_lossy);
}

/* ---- Huge pages for the time of the run ------------------------------------------------------------------------------ */

#define OVERCOMMIT "/proc/sys/vm/nr_overcommit_hugepages"
static long overcommitted = -1;

static void set_overcommit(long count)
{
    FILE *file = fopen(OVERCOMMIT, "w");
    if (file == NULL)
        return;
    fprintf(file, "%ld\n", count);
    fclose(file);
}

static void put_back(void)
{
    if (overcommitted >= 0)
        set_overcommit(overcommitted);
}

/* Lets the kernel make huge pages on request, if this process may set that. */
static void ask_for_huge_pages(void)
{
    long now;
    FILE *file = fopen(OVERCOMMIT, "r");
    bool known = file != NULL && fscanf(file, "%ld", &now) == 1;
    if (file != NULL)
        fclose(file);
    if (!known || now >= 64 || huge_pages_can_be_had())
        return;
    overcommitted = now;
    atexit(put_back);
    set_overcommit(64);
}

int main(int count, char **arguments)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    take_arguments(count, arguments);
    world = mmap(NULL, sizeof(*world), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (world == MAP_FAILED) {
        perror("mmap");
        return 2;
    }
    if (settings.huge_pages)
        ask_for_huge_pages();
    uint64_t seed = settings.seed, end = now_ns() + settings.seconds * 1000000000, failures = 0;
    if (!settings.seed_given) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        seed = (uint64_t)now.tv_sec * 1000003 + (uint64_t)now.tv_nsec;
        printf("# first seed %" PRIu64 "\n", seed);
    }
    bool one = settings.seed_given && settings.rounds == 0;
    for (uint64_t n = 0; one ? n < 1 : settings.rounds ? n < settings.rounds : now_ns() < end; n++)
        if (!seed_round(arguments[0], seed + n)) {
            failures++;
            if (!settings.keep_going)
                break;
        }
    print_sum(failures);
    return failures != 0;
}
