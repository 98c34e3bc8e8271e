/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The library's threads: they have names, block all signals, and are gone after kuf_close, as are its descriptors and
 * mappings.
 */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 64, CYCLES = 20 };

static struct source source = SOURCE_INIT;

/* Checks each thread named kuf-*; returns their number. */
static int check_signals_blocked(void)
{
    int count = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *entry; (entry = readdir(tasks)) != NULL;) {
        char path[300], line[256], name[64] = "";
        unsigned long long blocked = 0;
        snprintf(path, sizeof(path), "/proc/self/task/%s/status", entry->d_name);
        FILE *status = entry->d_name[0] == '.' ? NULL : fopen(path, "r");
        while (status != NULL && fgets(line, sizeof(line), status) != NULL) {
            sscanf(line, "Name: %63[^\n]", name);
            sscanf(line, "SigBlk: %llx", &blocked);
        }
        if (status != NULL)
            fclose(status);
        if (strncmp(name, "kuf-", 4) != 0)
            continue;
        count++;
        /* KILL and STOP cannot be blocked; 32 and 33 are the C library's own, which sigfillset leaves out. */
        unsigned long long want = ~(1ull << (SIGKILL - 1) | 1ull << (SIGSTOP - 1) | 1ull << 31 | 1ull << 32);
        ok((blocked & want) == want, "%s blocks every signal (%llx)", name, blocked);
    }
    closedir(tasks);
    return count;
}

static int mappings(void)
{
    FILE *maps = fopen("/proc/self/maps", "r");
    int count = 0;
    for (int c; (c = fgetc(maps)) != EOF;)
        count += c == '\n';
    fclose(maps);
    return count;
}

static void cycle(unsigned char *ram, unsigned char *shared, int fd)
{
    size_t page = page_size();
    atomic_store(&source.generation, 1);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .release = source_release, .opaque = &source, .fill_threads = 3});
    add(kuf, BASE, ram, PAGES * page);
    add_shared(kuf, BASE * 2, shared, PAGES * page, fd, KUF_MEMORY_FILL_ALL);
    struct kuf_populate_request all = {.size = sizeof(all), .gpa = KUF_ALL, .rate = 1 << 20};
    must(kuf_populate(kuf, &all) == 0, "kuf_populate");
    struct toucher toucher = {.memory = ram, .gpa = BASE, .length = PAGES * page, .generation = 1};
    start_toucher(&toucher);
    must(join_toucher(&toucher), "the memory is served");
    must(kuf_close(&kuf, KUF_END_POPULATE) == 0, "kuf_close: %s", kuf_error());
    must(madvise(ram, PAGES * page, MADV_DONTNEED) == 0, "drops the pages");
}

int main(void)
{
    begin();
    size_t page = page_size();
    int fd;
    unsigned char *ram = map_anonymous(PAGES * page), *shared = map_shared(PAGES * page, &fd);
    is(threads_named("kuf-"), 0, "no thread before the first handle");

    sigset_t none, now;
    sigemptyset(&none);
    pthread_sigmask(SIG_SETMASK, &none, NULL);
    struct kuf *kuf = open_with((struct kuf_options){.fill = source_fill, .opaque = &source, .fill_threads = 3});
    add(kuf, BASE, ram, PAGES * page);
    struct kuf_populate_request all = {.size = sizeof(all), .gpa = KUF_ALL, .rate = page};
    is(kuf_populate(kuf, &all), 0, "a request that takes long");
    ok(holds_content(ram, BASE, page, 1), "a page is served");
    wait_until(threads_named("kuf-serve-") >= 3 && threads_named("kuf-populate") == 1);
    ok(check_signals_blocked() >= 4, "every thread of the library was looked at");
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    bool empty = true;
    for (int i = 1; i < 32; i++)
        empty = empty && !sigismember(&now, i);
    ok(empty, "the caller's own mask is as it was");
    struct kuf *driven = open_driven(NULL);
    ok(check_signals_blocked() >= 4, "a caller-driven handle's too");
    close_with(driven, 0);
    close_with(kuf, KUF_END_POISON);
    wait_until(threads_named("kuf-") == 0);
    ok(true, "all gone after kuf_close");

    munmap(ram, PAGES * page);
    ram = map_anonymous(PAGES * page);
    cycle(ram, shared, fd); /* here the library makes the objects that it makes once and keeps */
    wait_until(threads_named("kuf-") == 0);
    int descriptors = open_descriptors(), maps = mappings();
    for (int i = 0; i < CYCLES; i++)
        cycle(ram, shared, fd);
    wait_until(threads_named("kuf-") == 0);
    is(open_descriptors(), descriptors, "%d handles later no descriptor is left", CYCLES);
    /* The C library keeps a few thread stacks and arenas for the next thread. */
    ok(mappings() - maps < CYCLES, "and no mapping a handle (%d before, %d now)", maps, mappings());
    is(atomic_load(&source.released), CYCLES + 1, "each was released once");
    close(fd);
    return done();
}
