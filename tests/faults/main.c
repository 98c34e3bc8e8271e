/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * faults alloc|calls [--all] [--seconds N] [--jobs N] [--scenario NAME]...: fails one allocation or system call of the
 *     library in each run, and counts the verdicts. Ends with 1 if a run was wrong, and prints the command to repeat it.
 * faults filter ...: refuses each kind of system call as a seccomp filter installed after kuf_open does; prints the
 *     verdicts for each call.
 * faults one SCENARIO WHAT N once|good|filter [ERROR]: one run and its verdict. WHAT is "alloc", or a system call's name.
 */
#include "faults.h"

#include <dlfcn.h>
#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *const verdicts[VERDICTS] = {
    [NOT_REACHED] = "not reached",
    [RECOVERED] = "recovered",
    [CLEAN_ERROR] = "clean error",
    [POISONED] = "poisoned with an event",
    [STOPPED] = "stopped with FATAL, released by close",
    [WRONG_BYTES] = "WRONG BYTES",
    [SILENT] = "SILENT HANG",
    [STUCK] = "A CALL DOES NOT RETURN",
    [ABORTED] = "ABORT",
    [LEAKED] = "LEAK",
    [BROKEN] = "BROKEN PROMISE",
};

/* A run is stuck after this time, which is longer than the workload's own limit. */
static const uint64_t RUN_LIMIT = UINT64_C(45000000000);

struct job {
    int scenario;
    /* Index in the table of calls, or -1 for an allocation. */
    int call;
    long n;
    bool good;
    /* Fails the call only after kuf_open has returned. */
    bool filter;
    int error;
};

enum sweep { SWEEP_ALLOC, SWEEP_CALLS, SWEEP_FILTER };

struct result {
    enum verdict verdict;
    char problem[TEXT];
};

/* The resources left over by a run without a fault. */
struct baseline {
    long occurrences, allocations, allocated, descriptors, threads, mapped;
    long counted[256];
};

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static void *map_shared_memory(size_t length)
{
    void *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    return at;
}

/* ---- One run ------------------------------------------------------------------------------------------------------- */

static size_t read_text(const char *path, char *to, size_t room)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, to, room - 1);
    if (fd >= 0)
        close(fd);
    if (got < 0)
        got = 0;
    while (got > 0 && to[got - 1] == '\n')
        got--;
    to[got] = '\0';
    return (size_t)got;
}

/* Describes what each thread of a process is doing. */
static void describe_threads(pid_t pid, char *to, size_t room)
{
    size_t used = 0;
    int count = atomic_load(&shared->marks_used);
    for (int i = 0; i < count && i < MARKS && used < room - 1; i++) {
        char path[96], name[32], where[64];
        int tid = atomic_load(&shared->marks[i].tid);
        snprintf(path, sizeof(path), "/proc/%d/task/%d/comm", pid, tid);
        if (read_text(path, name, sizeof(name)) == 0)
            continue;
        snprintf(path, sizeof(path), "/proc/%d/task/%d/wchan", pid, tid);
        read_text(path, where, sizeof(where));
        const char *what = atomic_load(&shared->marks[i].what);
        used += (size_t)snprintf(to + used, room - used, "%s%s in %s (%s)", used > 0 ? "; " : "", name,
                                 what == NULL ? "?" : what, where);
    }
}

static void describe_stack(char *to, size_t room)
{
    size_t used = strlen(to);
    for (int i = 0; i < shared->depth && used < room - 1; i++) {
        Dl_info info;
        if (dladdr(shared->stack[i], &info) == 0 || strstr(info.dli_fname, "libkuf") == NULL)
            continue;
        used += (size_t)snprintf(to + used, room - used, " %#lx",
                                 (unsigned long)((char *)shared->stack[i] - (char *)info.dli_fbase));
    }
}

static const char *leak_over(const struct baseline *base, const struct job *job)
{
    static char text[200];
    bool closes = job->call >= 0 && strcmp(calls[job->call].name, "close") == 0;
    bool unmaps = job->call >= 0 && strcmp(calls[job->call].name, "munmap") == 0;
    if (shared->threads > base->threads)
        snprintf(text, sizeof(text), "%ld threads", shared->threads - base->threads);
    else if (shared->descriptors > base->descriptors && !closes && !shared->left_closed)
        snprintf(text, sizeof(text), "%ld descriptors", shared->descriptors - base->descriptors);
    else if (shared->mapped > base->mapped && !unmaps)
        snprintf(text, sizeof(text), "%lu KiB of mappings", (unsigned long)(shared->mapped - base->mapped) / 1024);
    else if (shared->allocations > base->allocations && !shared->left_closed)
        snprintf(text, sizeof(text), "%ld allocations, %ld bytes", shared->allocations - base->allocations,
                 shared->allocated - base->allocated);
    else
        return NULL;
    return text;
}

static struct result judge(pid_t pid, bool in_time, int status, const char *output, const struct baseline *base,
                           const struct job *job)
{
    struct result result = {.verdict = atomic_load(&shared->verdict)};
    (void)pid;
    if (!in_time && result.verdict == VERDICTS) {
        result.verdict = STUCK;
        memcpy(result.problem, shared->problem, TEXT);
    } else if (result.verdict == VERDICTS || !WIFEXITED(status)) {
        result.verdict = ABORTED;
        if (WIFSIGNALED(status))
            snprintf(result.problem, TEXT, "signal %d: %.600s", WTERMSIG(status), output);
        else
            snprintf(result.problem, TEXT, "exit status %d: %.600s", WEXITSTATUS(status), output);
    } else if (result.verdict >= WRONG_FROM) {
        memcpy(result.problem, shared->problem, TEXT);
    } else if (output[0] != '\0' && getenv("FAULTS_LEFT") == NULL) {
        result.verdict = ABORTED;
        snprintf(result.problem, TEXT, "printed: %.600s", output);
    } else if (base != NULL && leak_over(base, job) != NULL) {
        result.verdict = LEAKED;
        snprintf(result.problem, TEXT, "%s left over", leak_over(base, job));
    } else if (job->call >= -1 && job->n > 0 && atomic_load(&shared->injected) == 0) {
        result.verdict = NOT_REACHED;
    } else {
        snprintf(result.problem, TEXT, "%.200s", shared->first_error);
    }
    if (result.verdict >= WRONG_FROM && shared->depth > 0) {
        size_t used = strlen(result.problem);
        snprintf(result.problem + used, TEXT - used, " [failed at");
        describe_stack(result.problem, TEXT - 2);
        strcat(result.problem, "]");
    }
    return result;
}

static bool wait_for_end(int pidfd, uint64_t deadline)
{
    struct pollfd ends = {.fd = pidfd, .events = POLLIN};
    for (;;) {
        uint64_t at = now();
        if (at >= deadline)
            return false;
        if (poll(&ends, 1, (int)((deadline - at) / 1000000) + 1) > 0)
            return true;
    }
}

static struct result run(const struct job *job, const struct baseline *base)
{
    memset(shared, 0, sizeof(*shared));
    shared->kind = job->call >= 0 ? KIND_CALL : KIND_ALLOC;
    shared->first = job->n == 0 ? LONG_MAX : job->n;
    shared->good = job->good;
    shared->after_open = job->filter;
    shared->usually_mapped = base == NULL ? LONG_MAX : base->mapped;
    atomic_store(&shared->verdict, VERDICTS);
    atomic_store(&shared->listener, -1);
    int output = memfd_create("output", MFD_CLOEXEC);
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(output, STDOUT_FILENO);
        dup2(output, STDERR_FILENO);
        run_scenario(&scenarios[job->scenario]);
    }
    int pidfd = pid < 0 ? -1 : (int)syscall(SYS_pidfd_open, pid, 0);
    if (pidfd < 0) {
        perror("fork, pidfd_open");
        exit(2);
    }
    uint64_t deadline = now() + RUN_LIMIT;
    bool in_time = job->call >= 0 ? answer_calls(pidfd, job->n == 0 ? NULL : &calls[job->call], job->error, deadline)
                                  : wait_for_end(pidfd, deadline);
    if (!in_time && atomic_load(&shared->verdict) == VERDICTS) {
        describe_threads(pid, shared->problem, TEXT);
    }
    kill(pid, SIGKILL);
    int status = 0;
    waitpid(pid, &status, 0);
    close(pidfd);
    static char text[1 << 16];
    ssize_t got = pread(output, text, sizeof(text) - 1, 0);
    text[got > 0 ? got : 0] = '\0';
    if (getenv("FAULTS_LEFT") != NULL)
        printf("%s", text);
    for (char *end = text; (end = strchr(end, '\n')) != NULL;)
        *end = ' ';
    close(output);
    return judge(pid, in_time, status, text, base, job);
}

/* ---- All runs ------------------------------------------------------------------------------------------------------ */

struct plan {
    atomic_long next, done;
    long count;
    struct job *jobs;
    struct result *results;
    uint64_t until;
};

static struct baseline *baselines;

static void name_of(const struct job *job, char *to, size_t room)
{
    snprintf(to, room, "one %s %s %ld %s%s%s", scenarios[job->scenario].name,
             job->call >= 0 ? calls[job->call].name : "alloc", job->n, job->filter ? "filter" : job->good ? "good" : "once",
             job->call >= 0 ? " " : "", job->call >= 0 ? strerrorname_np(job->error) : "");
}

/* Takes runs of the plan until none are left. */
static _Noreturn void work(struct plan *plan)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    shared = map_shared_memory(sizeof(*shared));
    for (long i; (i = atomic_fetch_add(&plan->next, 1)) < plan->count && now() < plan->until;) {
        struct job *job = &plan->jobs[i];
        plan->results[i] = run(job, &baselines[job->scenario]);
        if (plan->results[i].verdict >= WRONG_FROM) {
            char name[200];
            name_of(job, name, sizeof(name));
            printf("FAIL %s: %s: %s\n", name, verdicts[plan->results[i].verdict], plan->results[i].problem);
            fflush(stdout);
        }
        atomic_fetch_add(&plan->done, 1);
    }
    _exit(0);
}

static void measure(int scenario, bool with_calls)
{
    struct baseline *base = &baselines[scenario];
    for (int i = 0; i < 3; i++) {
        struct job job = {.scenario = scenario, .call = with_calls ? 0 : -1};
        struct result result = run(&job, NULL);
        if (result.verdict != RECOVERED) {
            printf("FAIL scenario %s without a fault: %s: %s\n", scenarios[scenario].name, verdicts[result.verdict],
                   result.problem);
            exit(1);
        }
#define MOST(field) base->field = shared->field > base->field ? shared->field : base->field
        MOST(occurrences);
        MOST(allocations);
        MOST(allocated);
        MOST(descriptors);
        MOST(threads);
        MOST(mapped);
        for (int c = 0; c < call_count; c++)
            MOST(counted[c]);
    }
}

/* Returns the occurrence to try after n: the next one, or in larger and larger steps. */
static long next_occurrence(long n, bool all)
{
    return all || n < 8 ? n + 1 : n + n / 4;
}

static void plan_job(struct plan *plan, struct job job)
{
    static long room;
    if (plan->count == room) {
        room = room > 0 ? room * 2 : 1024;
        plan->jobs = realloc(plan->jobs, (size_t)room * sizeof(*plan->jobs));
    }
    plan->jobs[plan->count++] = job;
}

/* Errors that no kernel returns for ever, after which the library tries again. */
static bool is_passing(const struct call *call, int error)
{
    if (error == EAGAIN)
        return call->result_at > 0 || strcmp(call->name, "read") == 0 || strcmp(call->name, "write") == 0 ||
               strcmp(call->name, "pread64") == 0;
    return error == EINTR;
}

/* The library can verify EEXIST only for pages of its own process. */
static bool cannot_be_told(const struct scenario *scenario, int error)
{
    return scenario->remote && error == EEXIST;
}

/* The errors that seccomp filters return. */
static const int REFUSALS[] = {EPERM, ENOSYS, EACCES};

static void plan_filter(struct plan *plan, int scenario)
{
    for (int c = 0; c < call_count; c++)
        for (size_t e = 0; baselines[scenario].counted[c] > 0 && e < sizeof(REFUSALS) / sizeof(*REFUSALS); e++)
            plan_job(plan, (struct job){.scenario = scenario, .call = c, .n = 1, .good = true, .filter = true,
                                        .error = REFUSALS[e]});
}

static void plan_scenario(struct plan *plan, int scenario, enum sweep what, bool all)
{
    struct baseline *base = &baselines[scenario];
    if (what == SWEEP_FILTER)
        plan_filter(plan, scenario);
    for (int good = 0; good < 2 && what != SWEEP_FILTER; good++) {
        for (long n = 1; what == SWEEP_ALLOC && n <= base->occurrences; n = next_occurrence(n, all))
            plan_job(plan, (struct job){.scenario = scenario, .call = -1, .n = n, .good = good});
        for (int c = 0; what == SWEEP_CALLS && c < call_count; c++)
            for (long n = 1; n <= base->counted[c]; n = next_occurrence(n, all))
                for (const int *error = calls[c].errnos; *error != 0; error++)
                    if ((!good || !is_passing(&calls[c], *error)) && !cannot_be_told(&scenarios[scenario], *error))
                        plan_job(plan, (struct job){.scenario = scenario, .call = c, .n = n, .good = good, .error = *error});
    }
}

/* Adds the function that failed first in a run, unless the list has it. */
static void add_failed(char *to, size_t room, const char *problem)
{
    char name[40];
    snprintf(name, sizeof(name), " %.*s", (int)strcspn(problem, "(:,"), problem);
    if (strncmp(name, " kuf_", 5) == 0 && strstr(to, name) == NULL && strlen(to) + strlen(name) < room)
        strcat(to, name);
}

/* Prints the verdicts for each call. */
static void print_calls(const struct plan *plan)
{
    for (int c = 0; c < call_count; c++) {
        long sums[VERDICTS] = {0}, all = 0;
        char failed[VERDICTS][200] = {""};
        for (long i = 0; i < plan->count && i < atomic_load(&plan->next); i++) {
            const struct result *result = &plan->results[i];
            if (plan->jobs[i].call != c || result->verdict == NOT_REACHED)
                continue;
            sums[result->verdict]++;
            add_failed(failed[result->verdict], sizeof(*failed), result->problem);
            all++;
        }
        if (all == 0)
            continue;
        printf("  %s:", calls[c].name);
        for (int v = 0; v < VERDICTS; v++)
            if (sums[v] > 0)
                printf(" %ld %s%s%s%s;", sums[v], verdicts[v], failed[v][0] ? " (" : "", failed[v], failed[v][0] ? ")" : "");
        printf("\n");
    }
}

/* Shuffles the plan, always in the same way, so that an incomplete run covers some of each kind. */
static void shuffle(struct plan *plan)
{
    uint64_t state = UINT64_C(0x9e3779b97f4a7c15);
    for (long i = plan->count - 1; i > 0; i--) {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        long other = (long)(state % (uint64_t)(i + 1));
        struct job job = plan->jobs[i];
        plan->jobs[i] = plan->jobs[other];
        plan->jobs[other] = job;
    }
}

static int sweep(enum sweep what, bool all, long seconds, int workers, const char *only)
{
    struct plan *plan = map_shared_memory(sizeof(*plan));
    for (int s = 0; s < scenario_count; s++) {
        if (only != NULL && strcmp(only, scenarios[s].name) != 0)
            continue;
        measure(s, what != SWEEP_ALLOC);
        plan_scenario(plan, s, what, all);
    }
    shuffle(plan);
    plan->results = map_shared_memory((size_t)plan->count * sizeof(*plan->results) + 1);
    plan->until = seconds > 0 ? now() + (uint64_t)seconds * 1000000000 : UINT64_MAX;
    uint64_t begun = now();
    for (int w = 0; w < workers; w++)
        if (fork() == 0)
            work(plan);
    while (wait(NULL) > 0)
        ;
    long sums[VERDICTS] = {0}, runs = atomic_load(&plan->done), wrong = 0;
    for (long i = 0; i < plan->count && i < atomic_load(&plan->next); i++)
        sums[plan->results[i].verdict]++;
    printf("%ld of %ld runs in %lu s\n", runs, plan->count, (unsigned long)((now() - begun) / 1000000000));
    for (int v = 0; v < VERDICTS; v++) {
        if (sums[v] > 0 || v >= WRONG_FROM)
            printf("%8ld %s\n", sums[v], verdicts[v]);
        wrong += v >= WRONG_FROM ? sums[v] : 0;
    }
    if (what == SWEEP_FILTER)
        print_calls(plan);
    return wrong > 0;
}

static int one(char **arguments, int count)
{
    struct job job = {.scenario = -1, .call = -2};
    for (int s = 0; s < scenario_count; s++)
        if (strcmp(arguments[0], scenarios[s].name) == 0)
            job.scenario = s;
    if (strcmp(arguments[1], "alloc") == 0)
        job.call = -1;
    for (int c = 0; c < call_count; c++)
        if (strcmp(arguments[1], calls[c].name) == 0)
            job.call = c;
    job.n = atol(arguments[2]);
    job.filter = strcmp(arguments[3], "filter") == 0;
    job.good = job.filter || strcmp(arguments[3], "good") == 0;
    for (int e = 1; count > 4 && e < 200; e++)
        if (strerrorname_np(e) != NULL && strcmp(strerrorname_np(e), arguments[4]) == 0)
            job.error = e;
    if (job.scenario < 0 || job.call < -1 || (job.call >= 0 && job.error == 0)) {
        printf("no such scenario, call or error\n");
        return 2;
    }
    measure(job.scenario, job.call >= 0);
    struct result result = run(&job, &baselines[job.scenario]);
    printf("%s: %s\n", verdicts[result.verdict], result.problem);
    return result.verdict >= WRONG_FROM;
}

/* Turns off glibc's cache of thread stacks, so that new mappings are the library's. */
static void without_stack_cache(char **arguments)
{
    if (getenv("GLIBC_TUNABLES") != NULL)
        return;
    setenv("GLIBC_TUNABLES", "glibc.pthread.stack_cache_size=0", 1);
    execv("/proc/self/exe", arguments);
}

int main(int argc, char **argv)
{
    without_stack_cache(argv);
    unsetenv("RUST_BACKTRACE");
    setvbuf(stdout, NULL, _IOLBF, 0);
    void *frame[4];
    backtrace(frame, 4);
    setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
    baselines = map_shared_memory((size_t)scenario_count * sizeof(*baselines));
    shared = map_shared_memory(sizeof(*shared));
    if (argc >= 6 && strcmp(argv[1], "one") == 0)
        return one(argv + 2, argc - 2);
    bool all = false;
    long seconds = 0, workers = 4 * sysconf(_SC_NPROCESSORS_ONLN);
    const char *only = NULL;
    for (int i = 2; i < argc; i++) {
        if (strcmp(argv[i], "--all") == 0)
            all = true;
        else if (strcmp(argv[i], "--seconds") == 0 && i + 1 < argc)
            seconds = atol(argv[++i]);
        else if (strcmp(argv[i], "--jobs") == 0 && i + 1 < argc)
            workers = atol(argv[++i]);
        else if (strcmp(argv[i], "--scenario") == 0 && i + 1 < argc)
            only = argv[++i];
    }
    static const char *const names[] = {[SWEEP_ALLOC] = "alloc", [SWEEP_CALLS] = "calls", [SWEEP_FILTER] = "filter"};
    for (int what = SWEEP_ALLOC; argc > 1 && what <= SWEEP_FILTER; what++)
        if (strcmp(argv[1], names[what]) == 0)
            return sweep(what, all, seconds, (int)workers, only);
    printf("faults alloc|calls|filter [--all] [--seconds N] [--jobs N] [--scenario NAME]\n");
    return 2;
}
