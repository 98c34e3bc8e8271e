/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Maps the memory of slots, and adds it.
 */
#include "fuzz.h"
#include "../c/open_uffd.h"
#include <sys/mount.h>

static int adopted_uffd = -1;
static bool small_file_system;

bool huge_pages_can_be_had(void)
{
    enum { WANTED = 18 };
    void *memory = mmap(NULL, WANTED * (size_t)HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
    if (memory == MAP_FAILED)
        return false;
    munmap(memory, WANTED * (size_t)HUGE_PAGE);
    return true;
}

/* Maps with free room on both sides, where a call that acts beyond the slot shows. */
static uint8_t *map_at_random(size_t length, size_t align, int flags, int fd)
{
    char *room = mmap(NULL, length + 2 * align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return NULL;
    char *at = (char *)(((uintptr_t)room + align - 1) / align * align), *end = at + length;
    if (at > room)
        munmap(room, (size_t)(at - room));
    munmap(end, (size_t)(room + length + 2 * align - end));
    void *memory = mmap(at, length, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0);
    if (memory != MAP_FAILED)
        return memory;
    munmap(at, length);
    return NULL;
}

/* A file system of this process alone, with room for half of the pages. */
void mount_small_file_system(void)
{
    unsigned pages = 0;
    char options[32];
    for (unsigned i = 0; i < world->plan.slots; i++)
        pages += world->plan.slot[i].backing == BACKING_SHARED ? world->plan.slot[i].pages : 0;
    snprintf(options, sizeof(options), "size=%uk", (pages / 2 + 1) * SMALL_PAGE / 1024);
    if (pages == 0 || unshare(CLONE_NEWNS) < 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("tmpfs", "/tmp", "tmpfs", 0, options) < 0)
        return;
    small_file_system = true;
    atomic_store(&world->shortage, true);
}

static int make_file(const struct slot *slot)
{
    bool huge = slot->backing == BACKING_HUGE_SHARED, small = small_file_system && slot->backing == BACKING_SHARED;
    int fd = small ? open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600)
                   : memfd_create("guest", MFD_CLOEXEC | (huge ? MFD_HUGETLB : 0));
    if (fd >= 0 && ftruncate(fd, (off_t)slot->length) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Maps new, empty memory for a slot. False: there is none. */
bool map_slot(struct slot *slot)
{
    bool huge = slot->backing >= BACKING_HUGE_PRIVATE;
    bool private = slot->backing == BACKING_PRIVATE || slot->backing == BACKING_HUGE_PRIVATE;
    slot->fd = private ? -1 : make_file(slot);
    if (!private && slot->fd < 0)
        return false;
    int flags = private ? MAP_PRIVATE | MAP_ANONYMOUS | (huge ? MAP_HUGETLB : 0) : MAP_SHARED;
    uint8_t *memory = map_at_random(slot->length, huge ? HUGE_PAGE : slot->page_size * 16, flags, slot->fd);
    if (memory == NULL) {
        if (slot->fd >= 0)
            close(slot->fd);
        return false;
    }
    if (!huge)
        madvise(memory, slot->length, MADV_NOHUGEPAGE);
    if (world->plan.mode != MODE_FORKING)
        madvise(memory, slot->length, MADV_DONTFORK);
    atomic_store(&slot->memory, memory);
    return true;
}

void unmap_slot(struct slot *slot)
{
    munmap(atomic_load(&slot->memory), slot->length);
    atomic_store(&slot->memory, NULL);
    if (slot->fd >= 0)
        close(slot->fd);
    slot->fd = -1;
}

/* Moves about every second small page from the file to the memory below it. What a layer holds elsewhere is no page's. */
static void make_base(struct slot *slot)
{
    size_t small = slot->length / SMALL_PAGE;
    slot->base_memory = mmap(NULL, slot->length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    slot->bitmap = calloc(1, small / 8 + 1);
    if (slot->base_memory == MAP_FAILED || slot->bitmap == NULL)
        fail("the base of a source: %s", strerror(errno));
    for (size_t i = 0; i < small; i++) {
        uint8_t *upper = slot->source_memory + i * SMALL_PAGE, *lower = slot->base_memory + i * SMALL_PAGE;
        bool is_upper = (uint32_t)i * UINT32_C(2654435761) >> 31;
        slot->bitmap[i / 8] |= (uint8_t)(is_upper << i % 8);
        if (!is_upper)
            memcpy(lower, upper, SMALL_PAGE);
        memset(is_upper ? lower : upper, 0xa5, SMALL_PAGE);
    }
}

static void make_source(struct slot *slot)
{
    if (slot->source_memory != NULL || slot->source == KUF_SOURCE_ZERO)
        return;
    int fd = memfd_create("source", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)slot->length) < 0)
        fail("a source file: %s", strerror(errno));
    slot->source_memory = mmap(NULL, slot->length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (slot->source_memory == MAP_FAILED)
        fail("a source mapping: %s", strerror(errno));
    for (unsigned i = 0; i < slot->pages; i++)
        if (content_of(slot->first + i, 1) != CONTENT_ZERO)
            put_page(slot->source_memory + i * slot->page_size, slot->first + i, 1, slot->page_size);
    slot->source_fd = fd;
    if (slot->layers)
        make_base(slot);
}

int uffd_to_adopt(void)
{
    if (adopted_uffd < 0) {
        adopted_uffd = open_uffd();
        struct uffdio_api api = {.api = UFFD_API,
                                 .features = UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP |
                                             UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_MISSING_SHMEM |
                                             UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_SHMEM |
                                             UFFD_FEATURE_MINOR_HUGETLBFS | UFFD_FEATURE_THREAD_ID};
        if (adopted_uffd < 0 || ioctl(adopted_uffd, UFFDIO_API, &api) < 0)
            fail("a userfaultfd to adopt: %s", strerror(errno));
    }
    return adopted_uffd;
}

int add_slot(struct slot *slot, uint32_t flags)
{
    struct kuf_source source = {.size = sizeof(source), .kind = slot->source};
    struct kuf_source base = {.size = sizeof(base), .kind = KUF_SOURCE_MEMORY, .len = slot->length};
    struct kuf_memory memory = {.size = sizeof(memory), .gpa = slot->gpa, .len = slot->length,
                                .hva = (uintptr_t)atomic_load(&slot->memory), .opaque = slot, .flags = flags};
    if (slot->source) {
        make_source(slot);
        memory.source = &source;
        source.fd = slot->source == KUF_SOURCE_FILE ? slot->source_fd : 0;
        source.addr = slot->source == KUF_SOURCE_MEMORY ? slot->source_memory : NULL;
        source.len = slot->source == KUF_SOURCE_MEMORY ? slot->length : 0;
        if (slot->bitmap != NULL) {
            source.bitmap = slot->bitmap;
            source.bitmap_size = slot->length / SMALL_PAGE / 8 + 1;
            source.bitmap_page_size = SMALL_PAGE;
            base.addr = slot->base_memory;
            source.base = &base;
        }
    }
    if (slot->backing != BACKING_SHARED_NO_FD)
        memory.fd = slot->fd;
    bool remote = world->plan.mode == MODE_REMOTE;
    if (remote)
        memory.page_size = slot->page_size;
    if (world->plan.mode == MODE_ADOPTED || remote) {
        memory.flags |= (remote ? KUF_MEMORY_REMOTE : 0);
        memory.uffd = uffd_to_adopt();
    }
    if (world->plan.slot[slot - world->slot].huge_wish && !remote)
        memory.flags |= KUF_MEMORY_HUGE;
    atomic_fetch_add(&world->end_calls, 1);
    int got = kuf_add_memory(atomic_load(&fuzz_handle), &memory);
    if (got < 0 && world->plan.mode == MODE_ADOPTED) {
        /* It may be registered still with this process's own userfaultfd, whose events nothing reads when the handle has gone. */
        struct uffdio_range range = {.start = memory.hva, .len = memory.len};
        ioctl(memory.uffd, UFFDIO_UNREGISTER, &range);
    }
    return got;
}

/* Checks the old place after MREMAP_DONTUNMAP: ordinary memory, of which each page reads as zero, if it can be read. */
static void look_at_old_place(const struct slot *slot, const uint8_t *old)
{
    uint64_t word;
    for (size_t at = 0; at < slot->length; at += slot->page_size)
        if (read_word(old + at, &word) && word != 0)
            fail("what mremap has left at the old place of slot %u reads %#" PRIx64 " at %#zx", (unsigned)(slot - world->slot),
                 word, at);
    munmap((void *)(uintptr_t)old, slot->length);
}

/*
 * Whether a page is at the new place after an mremap that has failed. Pages that it has moved are not registered with
 * a userfaultfd, so they can be populated, or are poisoned; the rest of the new place has no access. The old place tells it
 * only if mremap has unmapped what it moved.
 */
static bool has_moved(uint8_t *old, uint8_t *at, size_t size, bool leave_old)
{
    unsigned char resident;
    if (leave_old)
        return madvise(at, size, MADV_POPULATE_READ) == 0 || errno == EHWPOISON;
    return mincore(old, size, &resident) < 0 && errno == ENOMEM;
}

/*
 * Linux 6.17 moves several mappings one after the other, and stops at the first that is registered with a userfaultfd:
 * the unregistered ones before it have moved, with their pages.
 */
static void put_back_what_moved(const struct slot *slot, uint8_t *old, uint8_t *at, bool leave_old)
{
    size_t size = slot->page_size;
    for (size_t offset = 0; offset < slot->length; offset += size)
        if (has_moved(old + offset, at + offset, size, leave_old) &&
            mremap(at + offset, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, old + offset) == MAP_FAILED)
            fail("mremap of what another one has moved: %s", strerror(errno));
}

/*
 * Moves the memory to another place; no thread touches it meanwhile. The old place becomes free, or stays mapped with
 * `leave_old`, for a check of its bytes.
 */
long move_slot(struct slot *slot, bool leave_old)
{
    uint8_t *old = atomic_load(&slot->memory);
    int flags = MREMAP_MAYMOVE | MREMAP_FIXED | (leave_old ? MREMAP_DONTUNMAP : 0);
    void *room = mmap(NULL, slot->length + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return -errno;
    uint8_t *at = (uint8_t *)(((uintptr_t)room + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    void *moved = mremap(old, slot->length, slot->length, flags, at);
    if (moved == MAP_FAILED) {
        int error = errno;
        put_back_what_moved(slot, old, at, leave_old);
        return -error;
    }
    atomic_store(&slot->memory, moved);
    if (leave_old)
        look_at_old_place(slot, old);
    return 0;
}

/* As munmap(2), but the addresses stay reserved. */
long cut_slot(struct slot *slot, unsigned first, unsigned count)
{
    uint8_t *at = atomic_load(&slot->memory) + first * slot->page_size;
    void *got = mmap(at, count * slot->page_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    return got == MAP_FAILED ? -errno : 0;
}
