/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * limits.c - upper limits set by the kernel and the machine: 2 MiB runs without any fault
 *
 *     limits copy|zeropage|continue|place|memcpy|eager|scan image=FILE [size=BYTES run=BYTES zero=PERCENT
 *            cluster=PAGES verify=quick|full pin=... waiting=N]
 *
 *     copy       UFFDIO_COPY from the image into anonymous memory
 *     zeropage   UFFDIO_ZEROPAGE over anonymous memory
 *     continue   UFFDIO_CONTINUE over a shared file that already holds the bytes
 *     place      copies the image into a shared file through a second mapping, then UFFDIO_CONTINUE
 *     memcpy     copies the image into resident memory
 *     eager      reads the whole image into fresh memory by read(2): a restore that is not lazy
 *     scan       reads each byte of the image: the least cost of zero detection
 *
 *     waiting=N  copy: N threads wait for other pages of the same userfaultfd; each ioctl walks their list
 */
#include "baseline.h"

static void zero_pages(int uffd, uint8_t *at, uint64_t length)
{
    for (uint64_t done = 0; done < length;) {
        struct uffdio_zeropage zero = {.range = {(uintptr_t)at + done, length - done}};
        if (ioctl(uffd, UFFDIO_ZEROPAGE, &zero) == 0)
            return;
        if (zero.zeropage > 0)
            done += (uint64_t)zero.zeropage;
        else if (errno != EAGAIN)
            fail("UFFDIO_ZEROPAGE: %s", strerror(errno));
    }
}

static void continue_pages(int uffd, uint8_t *at, uint64_t length)
{
    for (uint64_t done = 0; done < length;) {
        struct uffdio_continue show = {.range = {(uintptr_t)at + done, length - done}};
        if (ioctl(uffd, UFFDIO_CONTINUE, &show) == 0)
            return;
        if (show.mapped > 0)
            done += (uint64_t)show.mapped;
        else if (errno != EAGAIN)
            fail("UFFDIO_CONTINUE: %s", strerror(errno));
    }
}

/* Returns nonzero if a run holds any data. It does not stop early, so that it reads each byte. */
static uint64_t scan(const uint8_t *at, uint64_t length)
{
    const uint64_t *words = (const uint64_t *)(const void *)at;
    uint64_t all = 0;
    for (uint64_t word = 0; word < length / 8; word += 8) {
        uint64_t line = 0;
        for (unsigned n = 0; n < 8; n++)
            line |= words[word + n];
        all |= line;
    }
    return all;
}

static uint64_t thread_cpu_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}

/* Threads that each wait for a page. */
struct waiting {
    int uffd;
    unsigned threads;
    uint8_t *memory;
    pthread_t thread[1024];
};

static void *wait_for_page(void *page)
{
    (void)*(volatile uint8_t *)page;
    return NULL;
}

static void start_waiting(struct waiting *waiting)
{
    if (waiting->threads == 0)
        return;
    waiting->memory = guest_memory(waiting->threads * PAGE, false);
    register_memory(waiting->uffd, waiting->memory, waiting->threads * PAGE, UFFDIO_REGISTER_MODE_MISSING);
    for (unsigned n = 0; n < waiting->threads; n++)
        if (pthread_create(&waiting->thread[n], NULL, wait_for_page, waiting->memory + n * PAGE) != 0)
            fail("cannot start a waiting thread");
    for (unsigned n = 0; n < waiting->threads;) {
        struct uffd_msg message;
        n += read(waiting->uffd, &message, sizeof(message)) == sizeof(message);
    }
}

static void stop_waiting(struct waiting *waiting)
{
    if (waiting->threads != 0)
        zero_pages(waiting->uffd, waiting->memory, waiting->threads * PAGE);
    for (unsigned n = 0; n < waiting->threads; n++)
        pthread_join(waiting->thread[n], NULL);
}

int main(int argc, char **argv)
{
    const char *side = begin(argc, argv);
    enum { COPY, ZEROPAGE, CONTINUE, PLACE, MEMCPY, EAGER, SCAN, SIDES } what;
    static const char *const names[] = {"copy", "zeropage", "continue", "place", "memcpy", "eager", "scan"};
    for (what = COPY; what < SIDES && strcmp(side, names[what]) != 0; what++)
        ;
    if (what == SIDES)
        fail("%s: copy, zeropage, continue, place, memcpy, eager or scan", side);
    struct image image = map_image();
    uint64_t size = argument("size", image.size), run = argument("run", RUN);
    bool thorough = verify_argument();
    enum pin pin = pin_argument();
    const char *path = text_argument("image", "");
    static struct waiting waiting;
    if (what == COPY)
        waiting.threads = (unsigned)argument("waiting", 0);
    no_more_arguments();
    if (waiting.threads > sizeof(waiting.thread) / sizeof(*waiting.thread))
        fail("waiting=N: at most 1024");
    if (size % run != 0 || image.size % run != 0)
        fail("the size is not a multiple of the run");
    place_service(pin);

    uint8_t *memory, *second = NULL;
    int uffd = -1, fd = -1;
    if (what == CONTINUE || what == PLACE) {
        uffd = open_userfaultfd(UFFD_FEATURE_MINOR_SHMEM);
        warm_memory(size, false);
        fd = memfd_create("guest", MFD_CLOEXEC);
        must(fd >= 0 && ftruncate(fd, (off_t)size) == 0, "memfd");
        memory = must_map(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, "the memfd");
        second = must_map(size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, "the memfd again");
        if (what == CONTINUE)
            for (uint64_t at = 0; at < size; at += run)
                memcpy(second + at, image_at(&image, at), run);
        register_memory(uffd, memory, size, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
    } else {
        memory = what == SCAN ? NULL : guest_memory(size, false);
        if (what == COPY || what == ZEROPAGE) {
            uffd = open_userfaultfd(0);
            register_memory(uffd, memory, size, UFFDIO_REGISTER_MODE_MISSING);
        } else if (what == MEMCPY) {
            memset(memory, 1, size);
        }
    }
    waiting.uffd = uffd;
    start_waiting(&waiting);
    int file = what == EAGER ? open(path, O_RDONLY | O_CLOEXEC) : -1;

    uint64_t seen = 0, cpu = thread_cpu_ns(), began = now_ns();
    for (uint64_t at = 0; at < size; at += run) {
        switch (what) {
        case COPY:
            copy_pages(uffd, memory + at, image_at(&image, at), run);
            break;
        case ZEROPAGE:
            zero_pages(uffd, memory + at, run);
            break;
        case CONTINUE:
            continue_pages(uffd, memory + at, run);
            break;
        case PLACE:
            /* Costs half as much as one fault per page. A kernel without it allocates the pages during memcpy. */
            (void)madvise(second + at, run, MADV_POPULATE_WRITE);
            memcpy(second + at, image_at(&image, at), run);
            continue_pages(uffd, memory + at, run);
            break;
        case MEMCPY:
            memcpy(memory + at, image_at(&image, at), run);
            break;
        case SCAN:
            seen |= scan(image_at(&image, at), run);
            break;
        default:
            for (uint64_t done = 0; done < run;) {
                ssize_t got = pread(file, memory + at + done, run - done, (off_t)((at + done) % image.size));
                must(got > 0, path);
                done += (uint64_t)got;
            }
        }
    }
    uint64_t took = now_ns() - began;
    cpu = thread_cpu_ns() - cpu;
    stop_waiting(&waiting);

    if (what == ZEROPAGE)
        image.zero = 100;
    if (what != SCAN)
        verify_all(&image, memory, size, thorough);
    else if (seen == 0)
        fail("the image holds only zeroes");
    put_text("side", side);
    put_count("pages", size / PAGE);
    put_number("seconds", seconds(took));
    put_number("bytes_per_second", (double)size / seconds(took));
    put_number("us_per_page", seconds(took) * 1e6 / ((double)size / PAGE));
    put_number("cpu_us_per_page", seconds(cpu) * 1e6 / ((double)size / PAGE));
    put_count("faults", 0);
    end_result();
}
