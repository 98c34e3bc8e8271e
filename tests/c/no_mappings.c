/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A process that has no mapping left (vm.max_map_count), or only a few: kuf_open opens a handle that works, or reports
 * why it cannot; kuf_add_memory returns -ENOMEM; faults of an existing slot are served.
 */
#include "harness.h"

#define BASE UINT64_C(0x40000000)
enum { MOST = 200000, FEW = 48 };

static struct source source = SOURCE_INIT;
static void *taken[MOST];
static size_t count;

/* Takes a mapping that does not join the one before it. */
static bool take(void)
{
    int rights = count % 2 ? PROT_READ : PROT_READ | PROT_WRITE;
    void *at = count < MOST ? mmap(NULL, page_size(), rights, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : MAP_FAILED;
    if (at == MAP_FAILED)
        return false;
    taken[count++] = at;
    return true;
}

static void take_all(void)
{
    while (take())
        ;
}

/* Unmaps some of them: each one stands alone between two that stay. */
static void give_back(unsigned n)
{
    for (; n > 0 && count > 0; n--)
        munmap(taken[--count], page_size());
}

/* Calls kuf_open with this many mappings left, in a process of its own. Returns 0: a handle; 1: an error. */
static int open_left(unsigned left)
{
    fflush(stdout);
    pid_t child = fork();
    must(child >= 0, "fork: %s", strerror(errno));
    if (child == 0) {
        give_back(left);
        struct kuf_options options = {.size = sizeof(options), .fill = source_fill, .event = source_event, .opaque = &source};
        struct kuf *kuf = (void *)1;
        int got = kuf_open(&options, &kuf);
        if (got != 0)
            _exit(got == -ENOMEM || got == -EAGAIN ? (kuf == NULL ? 1 : 4) : 2);
        take_all();
        /* The same handle is a handle to every later call. */
        struct kuf_stats_info stats = {.size = sizeof(stats)};
        got = kuf_stats(kuf, &stats) == 0 && kuf_close(&kuf, 0) == 0;
        _exit(got ? 0 : 3);
    }
    return end_of(child);
}

static void opens_or_says_why(void)
{
    unsigned opened = 0, refused = 0, wrong = 0;
    for (unsigned left = 0; left < FEW; left++) {
        int got = open_left(left);
        bool good = got == 0 || got == 1;
        if (!good)
            printf("    with %u mappings left: %d\n", left, got);
        opened += got == 0;
        refused += got == 1;
        wrong += !good;
    }
    is(wrong, 0, "no kuf_open ends the process or makes a handle that is none");
    ok(refused > 0, "with too few mappings it says so (%u of %d)", refused, FEW);
    ok(opened > 0, "with enough it opens (%u)", opened);
}

static void adds_and_serves(unsigned char *ram)
{
    struct kuf *kuf = open_serviced(&source);
    add(kuf, BASE, ram, 64 * page_size());
    take_all();
    /* A part of a mapping, which registering would divide in three. */
    struct kuf_memory memory = {
        .size = sizeof(memory), .gpa = BASE + (16 << 20), .len = 1 << 20, .hva = (uintptr_t)ram + (16 << 20)};
    is(kuf_add_memory(kuf, &memory), -ENOMEM, "no mapping left to divide: %s", kuf_error());
    is(touch(ram), 0, "a fault is served with no mapping left");
    ok(holds_content(ram, BASE, page_size(), 1), "with its bytes");
    is(kuf_ensure(kuf, BASE + page_size(), 8 * page_size(), -1), 0, "and kuf_ensure");
    give_back(8);
    is(kuf_add_memory(kuf, &memory), 0, "added when there are mappings again");
    is(touch(ram + (16 << 20)), 0, "and served");
    is(kuf_close(&kuf, KUF_END_POISON), 0, "closed");
}

int main(void)
{
    begin();
    unsigned char *ram = map_anonymous(64 << 20);
    while (count < MOST - 1 && take())
        ;
    if (count >= MOST - 1)
        skip("vm.max_map_count is above %d", MOST);
    /* How much malloc has left before it needs a mapping of its own does not matter here. */
    opens_or_says_why();
    give_back(200);
    adds_and_serves(ram);
    return done();
}
