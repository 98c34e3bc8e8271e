/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Shared memory in a file system whose files have huge pages (tmpfs, huge=always). A filled page takes memory for
 * itself only, and MADV_COLLAPSE shows no page that was not filled.
 */
#include "harness.h"

#include <sys/mount.h>
#include <sys/stat.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define BASE UINT64_C(0x40000000)
#define HUGE (UINT64_C(2) << 20)
enum { STRETCHES = 4 };
#define LENGTH (STRETCHES * HUGE)

static struct source source = SOURCE_INIT;

static int file_with_huge_pages(void)
{
    char directory[] = "/tmp/kuf-test-XXXXXX", path[64];
    must(mkdtemp(directory) != NULL, "a directory");
    if (mount("tmpfs", directory, "tmpfs", 0, "huge=always,size=64m") != 0) {
        int why = errno;
        rmdir(directory);
        skip("no tmpfs with huge pages can be mounted: %s", strerror(why));
    }
    snprintf(path, sizeof(path), "%s/guest", directory);
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    umount2(directory, MNT_DETACH);
    rmdir(directory);
    must(fd >= 0 && ftruncate(fd, LENGTH) == 0, "a file");
    return fd;
}

static uint64_t bytes_in(int fd)
{
    struct stat stat;
    must(fstat(fd, &stat) == 0, "fstat");
    return (uint64_t)stat.st_blocks * 512;
}

int main(void)
{
    begin();
    needs_feature(KUF_FEATURE_MINOR, "minor faults on shared memory");
    int fd = file_with_huge_pages();
    unsigned char *room = mmap(NULL, LENGTH + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    must(room != MAP_FAILED, "room");
    unsigned char *ram = (unsigned char *)(((uintptr_t)room + HUGE - 1) & ~(HUGE - 1));
    must(mmap(ram, LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == ram, "guest memory");
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page_size()});
    add_shared(kuf, BASE, ram, LENGTH, fd, 0);
    for (uint64_t at = 7 * page_size(); at < LENGTH; at += HUGE)
        must(holds_content(ram + at, BASE + at, page_size(), 1), "a page of each stretch");
    is(bytes_in(fd), STRETCHES * page_size(), "a page that is filled takes no more than itself");
    int collapsed = 0;
    for (uint64_t at = 0; at < LENGTH; at += HUGE)
        collapsed += madvise(ram + at, HUGE, MADV_COLLAPSE) == 0;
    is(collapsed, 0, "MADV_COLLAPSE is refused where pages are missing");
    ok(holds_content(ram, BASE, LENGTH, 1), "every page has its bytes");
    close_with(kuf, 0);
    close(fd);
    return done();
}
