/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A snapshot is written over the file that memory is still served from: write(2) holds the file's lock while it reads guest
 * memory, and waits there for pages. Serving them takes no lock of that file.
 */
#include "harness.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 512, HOLE = 64, HOLE_END = 128 };

static struct source events = SOURCE_INIT;
static size_t page, length;

/* With a hole, which holds zeroes. */
static int fill_file(int fd)
{
    must(fd >= 0 && ftruncate(fd, (off_t)length) == 0, "a file");
    unsigned char *bytes = malloc(length);
    write_content(bytes, BASE, length, 1);
    size_t first = HOLE * page, second = HOLE_END * page;
    must(pwrite(fd, bytes, first, 0) == (ssize_t)first, "writes it");
    must(pwrite(fd, bytes + second, length - second, (off_t)second) == (ssize_t)(length - second), "writes its end");
    free(bytes);
    return fd;
}

static int file_on_disk(void)
{
    char path[] = "/var/tmp/kuf-test-XXXXXX";
    int fd = mkstemp(path);
    unlink(path);
    return fill_file(fd);
}

static bool holds_snapshot(const unsigned char *bytes)
{
    return holds_content(bytes, BASE, HOLE * page, 1) && holds_zeroes(bytes + HOLE * page, (HOLE_END - HOLE) * page) &&
           holds_content(bytes + HOLE_END * page, BASE + HOLE_END * page, (PAGES - HOLE_END) * page, 1);
}

struct snapshot {
    int file;
    const unsigned char *ram;
    bool good;
};

/*
 * Page by page: the first page of each write is absent. Then all in one write. On a thread of its own: the watchdog's
 * signal finds the other free to handle it.
 */
static void *write_snapshot(void *argument)
{
    struct snapshot *snapshot = argument;
    snapshot->good = true;
    for (size_t at = length / 2; at < length && snapshot->good; at += 7 * page)
        snapshot->good = pwrite(snapshot->file, snapshot->ram + at, page, (off_t)at) == (ssize_t)page;
    snapshot->good = snapshot->good && pwrite(snapshot->file, snapshot->ram, length, 0) == (ssize_t)length;
    return NULL;
}

static void written_over(const char *what, int file, bool shared, uint32_t flags)
{
    int fd;
    unsigned char *ram = map_kind(shared, length, &fd);
    struct kuf *kuf = open_with((struct kuf_options){
        .flags = KUF_OPEN_SOURCES | flags, .event = source_event, .opaque = &events});
    struct kuf_source source = {.size = sizeof(source), .kind = KUF_SOURCE_FILE, .fd = file};
    struct kuf_memory slot = {.size = sizeof(slot), .gpa = BASE, .len = length,
                              .hva = (uintptr_t)ram, .fd = shared ? fd : 0, .source = &source};
    must(kuf_add_memory(kuf, &slot) == 0, "%s: kuf_add_memory: %s", what, kuf_error());
    struct snapshot snapshot = {.file = file, .ram = ram};
    pthread_join(start(write_snapshot, &snapshot), NULL);
    ok(snapshot.good, "%s: guest memory is written over the file that it comes from", what);
    ok(holds_snapshot(ram), "%s: every page has its bytes", what);
    unsigned char *bytes = mmap(NULL, length, PROT_READ, MAP_SHARED, file, 0);
    ok(bytes != MAP_FAILED && holds_snapshot(bytes), "%s: and the file too", what);
    close_with(kuf, 0);
    munmap(bytes, length);
    munmap(ram, length);
    close(fd);
}

int main(void)
{
    begin();
    page = page_size();
    length = PAGES * page;
    static const uint32_t flags[] = {0, KUF_OPEN_DETECT_ZERO};
    for (int shared = 0; shared <= (has_feature(KUF_FEATURE_MINOR)); shared++) {
        for (int i = 0; i < 2; i++) {
            char what[64];
            snprintf(what, sizeof(what), "%s%s", shared ? "in place" : "by copy", i ? ", looking for zeroes" : "");
            int file = fill_file(memfd_create("snapshot", MFD_CLOEXEC));
            written_over(what, file, shared, flags[i]);
            close(file);
            file = file_on_disk();
            written_over(what, file, shared, flags[i]);
            close(file);
        }
    }
    return done();
}
