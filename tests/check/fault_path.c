/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * fault_path FAULTS DEMAND_RUN: touches so many pages far apart, one after the other, each served by a callback that fills at
 * once. For tests/check/fault_path.sh, which counts what the library does for each. Nothing else is switched on.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <kuf.h>

#define BASE UINT64_C(0x100000000)
#define APART (UINT64_C(1) << 20)

static int fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    memset(fill->buf, 1, fill->len);
    return KUF_FILL_DONE;
}

int main(int argc, char **argv)
{
    uint64_t faults = argc > 2 ? strtoull(argv[1], NULL, 0) : 0;
    if (faults < 1)
        return 2;
    struct kuf_options options = {.size = sizeof(options), .fill = fill, .fill_threads = 1, .userfaultfds = 1,
                                  .demand_run = strtoull(argv[2], NULL, 0)};
    struct kuf *kuf;
    if (kuf_open(&options, &kuf) < 0) {
        printf("SKIP %s\n", kuf_error());
        return 77;
    }
    /* As much for every number of faults, so that the set-up is the same. */
    uint64_t len = 8192 * APART;
    unsigned char *ram = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = BASE, .len = len, .hva = (uintptr_t)ram};
    if (ram == MAP_FAILED || kuf_add_memory(kuf, &memory) < 0) {
        fprintf(stderr, "no memory: %s\n", kuf_error());
        return 1;
    }
    /*
     * Valgrind runs one thread at a time, and any other only while this one is in a system call: so it is the kernel that
     * touches. An odd multiplier meets each page of a power of two once, and none follows its neighbour.
     */
    int ends[2];
    char byte;
    if (pipe(ends) < 0)
        return 1;
    for (uint64_t i = 0; i < faults; i++)
        if (write(ends[1], ram + (i * 5003 + 17) % 8192 * APART, 1) != 1 || read(ends[0], &byte, 1) != 1 || byte != 1)
            return 1;
    /* The last fault is counted a moment after its page is there. The handle stays open: closing depends on what was filled. */
    usleep(200000);
    fflush(stdout);
    _exit(0);
}
