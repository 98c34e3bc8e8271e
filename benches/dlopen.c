/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * dlopen.c - what it costs a program to start with libkuf
 *
 *     dlopen [LIBRARY [ROUNDS]]
 *
 * Each round is a new process that loads the library, opens a handle with the default threads, adds a slot, touches a page
 * of it, and closes the handle. Prints the median time of each step, the first and the last decile, and the memory that the
 * process has more of afterwards. The library is in the page cache: the first round is left out.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <kuf.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS_MAX = 10000, SLOT = 1 << 20, EXIT_SKIP = 77 };
enum step { LOAD, OPEN, ADD, TOUCH, CLOSE, STEPS };

static const char *const names[STEPS] = {
    "dlopen", "kuf_open", "kuf_add_memory", "first touch of a page", "kuf_close",
};

struct round {
    uint64_t ns[STEPS];
    long kib; /* resident memory, private to the process, after kuf_open */
};

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

static __attribute__((format(printf, 2, 3))) _Noreturn void stop(int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    _exit(code);
}

static int fill(void *opaque, struct kuf_fill *run)
{
    (void)opaque;
    memset(run->buf, 'k', run->len);
    return KUF_FILL_DONE;
}

static long private_kib(void)
{
    FILE *file = fopen("/proc/self/smaps_rollup", "r");
    long sum = 0, kib;
    char line[256];
    while (file != NULL && fgets(line, sizeof(line), file) != NULL)
        if (sscanf(line, "Private_Dirty: %ld kB", &kib) == 1)
            sum += kib;
    if (file != NULL)
        fclose(file);
    return sum;
}

static void *address(void *library, const char *name)
{
    void *found = dlsym(library, name);
    if (found == NULL)
        stop(1, "%s", dlerror());
    return found;
}

static struct round measure(const char *path)
{
    struct round round;
    long before = private_kib();
    uint64_t at[STEPS + 1] = { now() };
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        stop(1, "%s", dlerror());
    at[OPEN] = now();

    __typeof__(kuf_open) *open_handle;
    __typeof__(kuf_add_memory) *add_memory;
    __typeof__(kuf_close) *close_handle;
    __typeof__(kuf_error) *error;
    *(void **)&open_handle = address(library, "kuf_open");
    *(void **)&add_memory = address(library, "kuf_add_memory");
    *(void **)&close_handle = address(library, "kuf_close");
    *(void **)&error = address(library, "kuf_error");
    struct kuf_options options = { .size = sizeof(options), .flags = KUF_OPEN_USER_MODE_ONLY, .fill = fill };
    struct kuf *kuf;
    if (open_handle(&options, &kuf) < 0)
        stop(EXIT_SKIP, "SKIP: %s", error());
    at[ADD] = now();

    round.kib = private_kib() - before;
    char *ram = mmap(NULL, SLOT, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kuf_memory slot = { .size = sizeof(slot), .len = SLOT, .hva = (uintptr_t)ram };
    uint64_t adding = now();
    if (add_memory(kuf, &slot) < 0)
        stop(1, "%s", error());
    at[TOUCH] = now();
    if (*(volatile char *)ram != 'k')
        stop(1, "wrong byte");
    at[CLOSE] = now();
    if (close_handle(&kuf, KUF_END_POISON) < 0)
        stop(1, "%s", error());
    at[STEPS] = now();

    for (enum step step = LOAD; step < STEPS; step++)
        round.ns[step] = at[step + 1] - (step == ADD ? adding : at[step]);
    return round;
}

static int compare(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

int main(int argc, char **argv)
{
    const char *path = argc > 1 ? argv[1] : "libkuf.so.0";
    int count = argc > 2 ? atoi(argv[2]) : 200;
    if (count < 1 || count > ROUNDS_MAX)
        stop(2, "usage: dlopen [LIBRARY [ROUNDS]]");
    struct round *rounds = mmap(NULL, sizeof(*rounds) * ROUNDS_MAX, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = -1; i < count; i++) {
        pid_t child = fork();
        if (child == 0) {
            struct round round = measure(path);
            if (i >= 0)
                rounds[i] = round;
            _exit(0);
        }
        int status;
        if (child < 0 || waitpid(child, &status, 0) != child)
            stop(1, "fork failed");
        if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
            return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
    }
    static uint64_t sorted[ROUNDS_MAX];
    printf("%-24s %10s %10s %10s\n", "us", "median", "10 %", "90 %");
    for (enum step step = LOAD; step < STEPS; step++) {
        for (int i = 0; i < count; i++)
            sorted[i] = rounds[i].ns[step];
        qsort(sorted, (size_t)count, sizeof(sorted[0]), compare);
        printf("%-24s %10.1f %10.1f %10.1f\n", names[step], (double)sorted[count / 2] / 1000, (double)sorted[count / 10] / 1000,
            (double)sorted[count * 9 / 10] / 1000);
    }
    printf("private memory after kuf_open: %ld KiB more\n", rounds[count / 2].kib);
    return 0;
}
