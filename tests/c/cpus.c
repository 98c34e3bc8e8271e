/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Service threads run on the CPUs that the caller names, and do not spin where all threads share one CPU. */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 16 };

static struct source source = SOURCE_INIT;
static atomic_bool spin_is_off;

static void hear(void *opaque, uint32_t level, const char *text)
{
    (void)opaque, (void)level;
    if (strstr(text, "spin_us has no effect") != NULL)
        atomic_store(&spin_is_off, true);
}

/* Threads of this process whose name starts so, and how many of them may use exactly these CPUs. */
static int threads_on(const char *prefix, const cpu_set_t *cpus, int *right)
{
    int count = 0;
    *right = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *entry; (entry = readdir(tasks)) != NULL;) {
        char path[300], name[64] = "";
        snprintf(path, sizeof(path), "/proc/self/task/%s/comm", entry->d_name);
        FILE *comm = entry->d_name[0] == '.' ? NULL : fopen(path, "r");
        if (comm == NULL)
            continue;
        bool named = fgets(name, sizeof(name), comm) != NULL && strncmp(name, prefix, strlen(prefix)) == 0;
        fclose(comm);
        cpu_set_t has;
        CPU_ZERO(&has);
        if (!named || sched_getaffinity(atoi(entry->d_name), sizeof(has), &has) != 0)
            continue;
        count++;
        *right += CPU_EQUAL(&has, cpus);
    }
    closedir(tasks);
    return count;
}

/* A thread has its name a moment after kuf_open has returned. */
static void check_threads(const char *prefix, int least, const cpu_set_t *cpus, const char *what)
{
    int right, count;
    wait_until((count = threads_on(prefix, cpus, &right)) >= least);
    is(right, count, "%s: each thread %s* is where it belongs", what, prefix);
}

static struct kuf_options serviced(void)
{
    return (struct kuf_options){.fill = source_fill, .event = source_event, .opaque = &source, .fill_threads = 3};
}

static void serve_and_close(struct kuf *kuf)
{
    size_t length = PAGES * page_size();
    unsigned char *ram = map_anonymous(length);
    add(kuf, BASE, ram, length);
    ok(holds_content(ram, BASE, length, 1), "and they serve");
    close_with(kuf, KUF_END_POISON);
    munmap(ram, length);
}

static bool spins(struct kuf_options options)
{
    options.spin_us = 100;
    options.log = hear;
    options.log_level = KUF_LOG_INFO;
    atomic_store(&spin_is_off, false);
    close_with(open_with(options), 0);
    return !atomic_load(&spin_is_off);
}

static void *elsewhere(void *argument)
{
    atomic_bool *end = argument;
    while (!atomic_load(end))
        sleep_ms(1);
    return NULL;
}

int main(void)
{
    begin();
    cpu_set_t all, one, other;
    must(sched_getaffinity(0, sizeof(all), &all) == 0, "the CPUs of this process are known");
    int first = 0, second;
    while (!CPU_ISSET(first, &all))
        first++;
    for (second = first + 1; second < CPU_SETSIZE && !CPU_ISSET(second, &all); second++)
        ;
    CPU_ZERO(&one);
    CPU_SET(first, &one);

    struct kuf *kuf = open_with(serviced());
    check_threads("kuf-serve-", 4, &all, "by default as the thread that opens");
    check_threads("kuf-populate", 1, &all, "by default");
    serve_and_close(kuf);

    /* Longer than the kernel's own, and of CPUs that are not there besides. */
    unsigned char many[1024];
    memset(many, 0, sizeof(many));
    memcpy(many, &one, sizeof(one));
    many[sizeof(many) - 1] = 0x80;
    struct kuf_options options = serviced();
    options.cpus = many;
    options.cpus_size = sizeof(many);
    kuf = open_with(options);
    memset(many, 0, sizeof(many));
    check_threads("kuf-", 5, &one, "one CPU for all");
    serve_and_close(kuf);

    cpu_set_t none;
    memset(&none, 0, sizeof(none));
    CPU_SET(CPU_SETSIZE - 1, &none);
    if (!CPU_ISSET(CPU_SETSIZE - 1, &all)) {
        options = serviced();
        options.size = sizeof(options);
        options.flags = KUF_OPEN_USER_MODE_ONLY;
        options.cpus = &none;
        options.cpus_size = sizeof(none);
        is(kuf_open(&options, &kuf), -EINVAL, "CPUs that are not there are refused");
        ok(strstr(kuf_error(), "options->cpus") != NULL, "by name: %s", kuf_error());
        comes_to(threads_named("kuf-"), 0, "and no thread stays");
    }

    if (second == CPU_SETSIZE) {
        ok(!spins(serviced()), "with one CPU there is no spinning");
        skip_part("placing threads apart needs two CPUs");
        return done();
    }
    CPU_ZERO(&other);
    CPU_SET(second, &other);
    ok(spins(serviced()), "with two CPUs there is spinning");
    options = serviced();
    options.cpus = &one;
    options.cpus_size = sizeof(one);
    ok(spins(options), "also on one of them when others may touch memory from the other");
    must(sched_setaffinity(0, sizeof(one), &one) == 0, "this thread keeps to one CPU");
    ok(!spins(serviced()), "not when everything keeps to one");
    ok(!spins(options), "said or inherited");
    options.cpus = &other;
    ok(spins(options), "but when the service has one and all other threads another");
    atomic_bool end = false;
    pthread_t toucher = start(elsewhere, &end);
    must(pthread_setaffinity_np(toucher, sizeof(other), &other) == 0, "a thread keeps to the other");
    ok(spins(serviced()), "and when one thread may run elsewhere");
    atomic_store(&end, true);
    pthread_join(toucher, NULL);
    return done();
}
