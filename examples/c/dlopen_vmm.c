/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * dlopen_vmm.c - a VMM that uses libkuf where it is installed, and works without it
 *
 * The program does not link the library: it takes the types from the header and loads the library with dlopen. With the
 * library, memory is filled when the guest touches it; without, the program fills all memory first. By default it runs
 * both ways, the second with the name of a library that does not exist. At the end it unloads the library while a
 * thread that has used it is still alive.
 *
 * Build:  cc -O2 -pthread -o dlopen_vmm dlopen_vmm.c $(pkg-config --cflags kuf) -ldl
 * Run:    ./dlopen_vmm [LIBRARY]
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <getopt.h>
#include <kuf.h>
#include <pthread.h>
#include <semaphore.h>
#include <stddef.h>
#include <sys/mman.h>

#include "example.h"

enum { PAGES = 1024, WATCHDOG_S = 20 };

#define MEMORY ((uint64_t)PAGES * PAGE)

static const char usage[] =
    "usage: dlopen_vmm [LIBRARY]\n"
    "Fills memory through libkuf, or before the guest runs if libkuf cannot be loaded. Without LIBRARY it does both,\n"
    "first with the library that the environment variable KUF_LIBRARY names, or libkuf.so.0, then with one that does\n"
    "not exist.\n";

/* The calls this VMM needs. __typeof__ takes their types from the header, so that the two always agree. */
struct kuf_calls {
    __typeof__(kuf_version) *version;
    __typeof__(kuf_error) *error;
    __typeof__(kuf_open) *open;
    __typeof__(kuf_add_memory) *add_memory;
    __typeof__(kuf_ensure) *ensure;
    __typeof__(kuf_stats) *stats;
    __typeof__(kuf_close) *close;
};

static const struct {
    const char *name;
    size_t offset;
} symbols[] = {
    { "kuf_version", offsetof(struct kuf_calls, version) },
    { "kuf_error", offsetof(struct kuf_calls, error) },
    { "kuf_open", offsetof(struct kuf_calls, open) },
    { "kuf_add_memory", offsetof(struct kuf_calls, add_memory) },
    { "kuf_ensure", offsetof(struct kuf_calls, ensure) },
    { "kuf_stats", offsetof(struct kuf_calls, stats) },
    { "kuf_close", offsetof(struct kuf_calls, close) },
};

/* The soname guarantees the major version. A library older than the header may lack calls or fields. */
static bool is_new_enough(uint32_t version)
{
    return version >> 16 == KUF_VERSION_MAJOR && (version >> 8 & 255) >= KUF_VERSION_MINOR;
}

/* Returns the library's handle, or prints the reason and returns NULL. */
static void *load(const char *name, struct kuf_calls *kuf)
{
    void *library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        printf("no libkuf: %s\n", dlerror());
        return NULL;
    }
    for (size_t i = 0; i < sizeof(symbols) / sizeof(symbols[0]); i++) {
        void *address = dlsym(library, symbols[i].name);
        if (address == NULL) {
            printf("no libkuf: %s\n", dlerror());
            dlclose(library);
            return NULL;
        }
        memcpy((char *)kuf + symbols[i].offset, &address, sizeof(address));
    }
    uint32_t version = kuf->version();
    printf("%s is version %u.%u.%u\n", name, version >> 16, version >> 8 & 255, version & 255);
    if (is_new_enough(version))
        return library;
    printf("no libkuf: this program needs version %d.%d or newer\n", KUF_VERSION_MAJOR, KUF_VERSION_MINOR);
    dlclose(library);
    return NULL;
}

static uint8_t *map_memory(void)
{
    uint8_t *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap: %s", strerror(errno));
    return memory;
}

/* The guest. It is the same whether its memory is already present or filled on demand. */
static void run_guest(const uint8_t *memory)
{
    for (uint64_t i = 0; i < PAGES; i++) {
        uint64_t page = scattered(i, PAGES);
        if (!pattern_matches(memory + page * PAGE, page))
            fail("page %llu holds wrong bytes", (unsigned long long)page);
    }
}

/* ---- Without the library ---- */

static void load_and_run(void)
{
    uint8_t *memory = map_memory();
    for (uint64_t page = 0; page < PAGES; page++)
        pattern_write(memory + page * PAGE, page);
    run_guest(memory);
    munmap(memory, MEMORY);
    printf("  loaded %d pages, then ran: ok\n", PAGES);
}

/* ---- With the library ---- */

static int fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    for (uint64_t done = 0; done < fill->len; done += PAGE)
        pattern_write((uint8_t *)fill->buf + done, (fill->memory_offset + done) / PAGE);
    return KUF_FILL_DONE;
}

/* A thread that calls the library, has thread-local data of it, and ends after dlclose. */
struct guest {
    const struct kuf_calls *calls;
    struct kuf *kuf;
    const uint8_t *memory;
    sem_t done;
    sem_t closed;
};

static void *guest_main(void *argument)
{
    struct guest *guest = argument;
    /* A device model calls kuf_ensure before it passes memory to hardware. The second call must fail. */
    if (guest->calls->ensure(guest->kuf, 0, PAGE, -1) < 0)
        fail("kuf_ensure: %s", guest->calls->error());
    if (guest->calls->ensure(guest->kuf, MEMORY, PAGE, -1) != -ENOENT || guest->calls->error()[0] == '\0')
        fail("kuf_ensure succeeded outside the memory");
    run_guest(guest->memory);
    sem_post(&guest->done);
    sem_wait(&guest->closed);
    return NULL;
}

static void wait_for(sem_t *semaphore)
{
    while (sem_wait(semaphore) < 0 && errno == EINTR)
        continue;
}

/* Serves the memory while the guest runs, and closes the service and the library. */
static void serve_and_run(const struct kuf_calls *calls, void *library)
{
    struct guest guest = { .calls = calls, .memory = map_memory() };
    struct kuf_options options = { .size = sizeof(options), .flags = KUF_OPEN_USER_MODE_ONLY, .fill = fill };
    int result = calls->open(&options, &guest.kuf);
    check_open(result, calls->error());
    struct kuf_memory slot = { .size = sizeof(slot), .len = MEMORY, .hva = (uintptr_t)guest.memory };
    if (calls->add_memory(guest.kuf, &slot) < 0)
        fail("kuf_add_memory: %s", calls->error());

    pthread_t thread;
    sem_init(&guest.done, 0, 0);
    sem_init(&guest.closed, 0, 0);
    if (pthread_create(&thread, NULL, guest_main, &guest) != 0)
        fail("cannot start a thread");
    wait_for(&guest.done);

    struct kuf_stats_info stats = { .size = sizeof(stats) };
    if (calls->stats(guest.kuf, &stats) < 0 || stats.faults == 0)
        fail("no fault was served");
    if (calls->close(&guest.kuf, KUF_END_POPULATE) < 0)
        fail("kuf_close: %s", calls->error());
    if (dlclose(library) != 0)
        fail("dlclose: %s", dlerror());
    sem_post(&guest.closed);
    pthread_join(thread, NULL); /* the thread ends after dlclose: its thread-local data must be freed safely */
    munmap((void *)(uintptr_t)guest.memory, MEMORY);
    printf("  ran and served %llu faults: ok\n", (unsigned long long)stats.faults);
}

/* Runs the guest with or without the library. Returns whether the library could be loaded. */
static bool run_vmm(const char *name)
{
    struct kuf_calls calls;
    void *library = load(name, &calls);
    if (library != NULL)
        serve_and_run(&calls, library);
    else
        load_and_run();
    return library != NULL;
}

int main(int argc, char **argv)
{
    static const struct option names[] = { { "help", no_argument, NULL, 'h' }, { NULL, 0, NULL, 0 } };
    for (int c; (c = getopt_long(argc, argv, "h", names, NULL)) != -1;) {
        fputs(usage, c == 'h' ? stdout : stderr);
        return c == 'h' ? EXIT_SUCCESS : EXIT_FAILURE;
    }
    example_begin(WATCHDOG_S);
    if (optind < argc) {
        run_vmm(argv[optind]);
        return EXIT_SUCCESS;
    }
    const char *name = getenv("KUF_LIBRARY");
    name = name != NULL ? name : "libkuf.so.0";
    bool found = run_vmm(name);
    if (run_vmm("libkuf.so.none"))
        fail("dlopen loaded a library that does not exist");
    if (!found)
        skip("%s could not be loaded: ran only without it", name);
    return EXIT_SUCCESS;
}
