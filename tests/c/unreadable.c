/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The library's userfaultfd cannot be read any more, and a thread is in mremap(2) or munmap(2), which waits for its event to be
 * read: it goes on when the handle is closed, and no page that was not filled reads as zeroes, wherever it is now.
 */
#include "touches.h"
#include "uffd.h"
#include "watched.h"

#define BASE UINT64_C(0x70000000)
#define OTHER UINT64_C(0x90000000)

static struct source source = SOURCE_INIT;
static atomic_bool broken;
static int own_uffd = -1;

ssize_t read(int fd, void *buffer, size_t length)
{
    if (atomic_load(&broken) && fd == own_uffd) {
        errno = EINVAL;
        return -1;
    }
    return syscall(SYS_read, fd, buffer, length);
}

static void find_userfaultfd(void)
{
    for (int fd = 0; fd < 1024; fd++) {
        char path[32], target[64] = "";
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        if (readlink(path, target, sizeof(target) - 1) > 0 && strcmp(target, "anon_inode:[userfaultfd]") == 0)
            own_uffd = fd;
    }
}

struct change {
    unsigned char *from, *to;
    size_t length;
};

static void *change_body(void *argument)
{
    struct change *change = argument;
    if (change->to == NULL)
        must(munmap(change->from, change->length) == 0, "munmap: %s", strerror(errno));
    else
        must(mremap(change->from, change->length, change->length, MREMAP_MAYMOVE | MREMAP_FIXED, change->to) == change->to,
             "mremap: %s", strerror(errno));
    return NULL;
}

static void ends(bool moves, bool shared)
{
    const char *how = moves ? "moved" : "unmapped", *kind = kind_of(shared);
    size_t page = page_size(), length = 8 * page;
    int fd;
    unsigned char *ram = map_kind(shared, length, &fd), *other = map_anonymous(length);
    struct change change = {.from = ram, .to = moves ? map_anonymous(length) : NULL, .length = length};
    int before = atomic_load(&source.events[KUF_EVENT_FATAL]);
    struct kuf *kuf = watch(open_with((struct kuf_options){
        .fill = source_fill, .event = source_event, .opaque = &source, .demand_run = page, .userfaultfds = 1}));
    add_kind(kuf, BASE, ram, length, fd);
    add(kuf, OTHER, other, length);
    ok(holds_content(ram, BASE, page, 1) && holds_content(other, OTHER, page, 1), "%s, %s: pages are filled", how, kind);
    find_userfaultfd();
    atomic_store(&broken, true);
    pthread_t thread = start(change_body, &change);
    wait_until(atomic_load(&source.events[KUF_EVENT_FATAL]) > before);
    close_watched(kuf, KUF_END_POISON);
    pthread_join(thread, NULL);
    ok(true, "%s, %s: the thread goes on when the handle is closed", how, kind);
    bool none = true;
    for (size_t n = 1; n < 8; n++)
        none = none && try_touch(other + n * page) != 0 && (!moves || try_touch(change.to + n * page) != 0);
    ok(none, "%s, %s: no page that was not filled can be touched", how, kind);
    atomic_store(&broken, false);
    own_uffd = -1;
    munmap(other, length);
    if (moves)
        munmap(change.to, length);
    close(fd);
}

int main(void)
{
    begin_watched(60);
    catch_touches();
    for (int shared = 0; shared < 2; shared++) {
        ends(true, shared);
        ends(false, shared);
    }
    return done();
}
