/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * dlopen, serve, dlclose, thread exit, exit: thread-local destructors and service threads outlive dlclose, so the code has
 * to stay. This program is not linked with libkuf.
 */
#define HARNESS_WITHOUT_LIBRARY
#include "harness.h"

#include <dlfcn.h>

#define BASE UINT64_C(0x10000000)
enum { PAGES = 64, ROUNDS = 5 };

static struct source source = SOURCE_INIT;

struct library {
    void *handle;
    uint32_t (*version)(void);
    const char *(*error)(void);
    int (*open)(const struct kuf_options *, struct kuf **);
    int (*add_memory)(struct kuf *, const struct kuf_memory *);
    int (*close)(struct kuf **, uint32_t);
};

static void load(struct library *library)
{
    library->handle = dlopen("libkuf.so.0", RTLD_NOW | RTLD_LOCAL);
    must(library->handle != NULL, "dlopen: %s", dlerror());
    *(void **)&library->version = dlvsym(library->handle, "kuf_version", "KUF_0.1");
    *(void **)&library->error = dlvsym(library->handle, "kuf_error", "KUF_0.1");
    *(void **)&library->open = dlvsym(library->handle, "kuf_open", "KUF_0.1");
    *(void **)&library->add_memory = dlvsym(library->handle, "kuf_add_memory", "KUF_0.1");
    *(void **)&library->close = dlvsym(library->handle, "kuf_close", "KUF_0.1");
    must(library->version && library->error && library->open && library->add_memory && library->close,
         "the names are there, with their version: %s", dlerror());
}

static struct kuf *serve(struct library *library, unsigned char *ram)
{
    size_t length = PAGES * page_size();
    struct kuf *kuf = NULL;
    struct kuf_options options = {.size = sizeof(options), .fill = source_fill, .opaque = &source};
    int got = library->open(&options, &kuf);
    if (got == -EPERM) {
        options.flags = KUF_OPEN_USER_MODE_ONLY;
        got = library->open(&options, &kuf);
    }
    if (got == -EPERM || got == -ENOSYS || got == -ENOTSUP)
        skip("kuf_open: %s", library->error());
    must(got == 0, "kuf_open: %s", library->error());
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = length, .hva = (uintptr_t)ram};
    must(library->add_memory(kuf, &memory) == 0, "kuf_add_memory: %s", library->error());
    return kuf;
}

/* A thread whose thread-locals the library has used, and which ends after dlclose. */
struct late {
    struct library *library;
    atomic_bool used, go;
};

static void *use_and_wait(void *argument)
{
    struct late *late = argument;
    struct kuf *kuf = NULL;
    if (late->library->open(NULL, &kuf) == -EINVAL && late->library->error()[0] != '\0')
        atomic_store(&late->used, true);
    while (!atomic_load(&late->go))
        sleep_ms(1);
    return NULL;
}

static void *touch_to_the_end(void *memory)
{
    touch((unsigned char *)memory + (PAGES - 1) * page_size());
    return NULL;
}

/* In a process of its own: how it ends is the test. */
static int in_child(void (*body)(void))
{
    pid_t child = fork();
    if (child == 0) {
        begin_child();
        body();
        exit(atomic_load(&harness_failures) != 0);
    }
    int status = -1;
    waitpid(child, &status, 0);
    return status;
}

static void closed_first(void)
{
    unsigned char *ram = map_anonymous(PAGES * page_size());
    for (int round = 0; round < ROUNDS; round++) {
        struct library library;
        load(&library);
        struct late late = {.library = &library};
        pthread_t thread = start(use_and_wait, &late);
        wait_until(atomic_load(&late.used));
        struct kuf *kuf = serve(&library, ram);
        ok(holds_content(ram, BASE, PAGES * page_size(), 1), "round %d: served", round);
        is(library.close(&kuf, 0), 0, "round %d: closed", round);
        is(dlclose(library.handle), 0, "round %d: dlclose", round);
        /* Its thread-local destructors run now. */
        atomic_store(&late.go, true);
        pthread_join(thread, NULL);
        is(library.version(), KUF_VERSION_MAJOR << 16 | KUF_VERSION_MINOR << 8 | KUF_VERSION_PATCH,
           "round %d: the code is still there", round);
        must(madvise(ram, PAGES * page_size(), MADV_DONTNEED) == 0, "drops the pages");
    }
}

static void still_open(void)
{
    unsigned char *ram = map_anonymous(PAGES * page_size());
    struct library library;
    load(&library);
    struct kuf *kuf = serve(&library, ram);
    (void)kuf;
    is(dlclose(library.handle), 0, "dlclose with an open handle");
    ok(holds_content(ram, BASE, PAGES * page_size(), 1), "which serves on");
}

static void still_open_and_busy(void)
{
    unsigned char *ram = map_anonymous(PAGES * page_size());
    struct library library;
    load(&library);
    serve(&library, ram);
    atomic_store(&source.hold, true);
    pthread_t thread = start(touch_to_the_end, ram);
    pthread_detach(thread);
    wait_until(atomic_load(&source.inside) > 0);
    is(dlclose(library.handle), 0, "dlclose while a fill runs; then exit");
}

int main(void)
{
    begin();
    struct library library;
    load(&library);
    unsigned char *ram = map_anonymous(PAGES * page_size());
    struct kuf *kuf = serve(&library, ram); /* skips here when this machine cannot */
    is(library.close(&kuf, KUF_END_POISON), 0, "opens and closes");
    is(dlclose(library.handle), 0, "dlclose");
    is(in_child(closed_first), 0, "closed, unloaded, threads end, exit");
    is(in_child(still_open), 0, "unloaded with an open handle");
    is(in_child(still_open_and_busy), 0, "unloaded while a fill runs");
    closed_first();
    return done();
}
