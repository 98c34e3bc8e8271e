/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The output of a failure.
 */
#include "fuzz.h"
#include <dirent.h>

struct world *world;
_Thread_local unsigned trace_index = TRACE_ROUND;

unsigned trace_shown = 6;
static atomic_flag failing = ATOMIC_FLAG_INIT;

/* The first failure of a round ends it; the driver prints the traces. */
void fail(const char *format, ...)
{
    if (atomic_flag_test_and_set(&failing))
        for (;;)
            sleep_us(1000000);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(world->message, sizeof(world->message), format, arguments);
    va_end(arguments);
    atomic_store(&world->failed, true);
    printf("not ok - %s\n", world->message);
    unsigned page;
    if (sscanf(world->message, "page %u", &page) == 1 && page < PAGES)
        model_describe(page);
    report_handle();
    fflush(stdout);
    _exit(1);
}

void report_traces(void)
{
    uint64_t now = now_ns();
    for (unsigned i = 0; i < TRACES; i++) {
        struct trace *trace = &world->trace[i];
        uint32_t count = atomic_load(&trace->count);
        if (count == 0)
            continue;
        printf("    thread %u (tid %d), %u operations, the last ones:\n", i, trace->thread, count);
        for (uint32_t n = count > trace_shown ? count - trace_shown : 0; n < count; n++) {
            struct trace_entry *entry = &trace->entry[n % TRACE_LENGTH];
            printf("        %" PRIu64 " us ", entry->begun_ns / 1000);
            describe_operation(&entry->operation);
            if (entry->ended_ns == 0)
                printf(": under way for %" PRIu64 " us\n", (now - entry->begun_ns) / 1000);
            else
                printf(": %" PRId64 ", took %" PRIu64 " us\n", entry->result, (entry->ended_ns - entry->begun_ns) / 1000);
        }
    }
}

static void print_file(pid_t process, const char *task, const char *name, const char *before)
{
    char path[128], line[1024];
    snprintf(path, sizeof(path), "/proc/%d/task/%s/%s", process, task, name);
    FILE *file = fopen(path, "r");
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        line[strcspn(line, "\n")] = 0;
        printf("%s%s", before, line);
    }
    if (file != NULL)
        fclose(file);
}

/* Prints the place of each thread of a process. */
void report_threads(pid_t process)
{
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/task", process);
    DIR *tasks = opendir(path);
    for (struct dirent *entry; tasks != NULL && (entry = readdir(tasks)) != NULL;) {
        if (entry->d_name[0] == '.')
            continue;
        printf("    %s", entry->d_name);
        print_file(process, entry->d_name, "comm", " ");
        print_file(process, entry->d_name, "wchan", " ");
        print_file(process, entry->d_name, "syscall", " ");
        printf("\n");
    }
    if (tasks != NULL)
        closedir(tasks);
}

void report_handle(void)
{
    struct kuf *kuf = atomic_load(&fuzz_handle);
    struct kuf_progress_info p = {.size = sizeof(p)};
    struct kuf_stats_info s = {.size = sizeof(s)};
    struct kuf_fault owed[8];
    if (kuf == NULL)
        return;
    if (kuf_progress(kuf, KUF_ALL, &p) == 0)
        printf("    progress: total %#" PRIx64 " present %#" PRIx64 " removed %#" PRIx64 " absent %#" PRIx64
               " filling %#" PRIx64 " deferred %#" PRIx64 " poisoned %#" PRIx64 " flags %#x\n",
               p.total, p.present, p.removed, p.absent, p.filling, p.deferred, p.poisoned, p.flags);
    if (kuf_stats(kuf, &s) == 0)
        printf("    stats: faults %" PRIu64 " joined %" PRIu64 " late %" PRIu64 " unknown %" PRIu64 " fills %" PRIu64
               " failed %" PRIu64 " deferred %" PRIu64 " remove %" PRIu64 " unmap %" PRIu64 " remap %" PRIu64
               " fork %" PRIu64 " again %" PRIu64 " exists %" PRIu64 " no_memory %" PRIu64 " bytes poisoned %" PRIu64 "\n",
               s.faults, s.faults_joined, s.faults_late, s.faults_unknown, s.fills, s.fills_failed, s.fills_deferred,
               s.events_remove, s.events_unmap, s.events_remap, s.events_fork, s.install_again, s.install_exists,
               s.install_no_memory, s.bytes_poisoned);
    ssize_t n = kuf_pending(kuf, owed, 8);
    for (ssize_t i = 0; i < n && i < 8; i++)
        printf("    pending: %#" PRIx64 "+%#" PRIx64 " flags %#x for %" PRIu64 " ms\n", owed[i].gpa, owed[i].len,
               owed[i].flags, owed[i].age_ns / 1000000);
}
