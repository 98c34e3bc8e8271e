/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* minimal.c - serves a fault. Build: cc -O2 -o minimal minimal.c $(pkg-config --cflags --libs kuf)   Run: ./minimal */
#define _GNU_SOURCE
#include <kuf.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

static int fill(void *opaque, struct kuf_fill *run)
{
    memset(run->buf, *(const char *)opaque, run->len); /* a VMM reads its snapshot at run->memory_offset */
    return KUF_FILL_DONE;
}

int main(void)
{
    char *ram = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct kuf_options options = { .size = sizeof(options), .flags = KUF_OPEN_USER_MODE_ONLY, .fill = fill, .opaque = "k" };
    struct kuf_memory slot = { .size = sizeof(slot), .len = 1 << 20, .hva = (uintptr_t)ram };
    struct kuf *kuf;
    if (kuf_open(&options, &kuf) < 0)
        return fprintf(stderr, "SKIP: %s\n", kuf_error()), 77;
    if (kuf_add_memory(kuf, &slot) < 0)
        return fprintf(stderr, "FAIL: %s\n", kuf_error()), 1;
    printf("the first touch of page 3 reads '%c'\n", ram[3 * 4096]);
    return kuf_close(&kuf, KUF_END_POISON) < 0;
}
