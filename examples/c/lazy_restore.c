/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * lazy_restore.c - restores a virtual machine from a snapshot and fills its memory while it runs
 *
 * A small KVM guest builds data, and the program writes its registers and memory to a snapshot file. Then it restores
 * the snapshot twice. Eagerly: it reads the whole memory, then runs the guest. Lazily: it runs the guest and reads each
 * page at its first touch, while a populate request fills the rest. Both guests check each page; the program compares
 * their reports and prints the cost of both ways. It exits with 0 if both guests found the right bytes.
 *
 * Build:  cc -O2 -pthread -o lazy_restore lazy_restore.c lazy_restore_guest.S $(pkg-config --cflags --libs kuf)
 * Run:    ./lazy_restore            (--help lists the options)
 *
 * Without /dev/kvm it prints a note, and threads of this process take the place of the vCPUs.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <getopt.h>
#include <kuf.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "example.h"
#include "lazy_restore_guest.h"

#if defined(__x86_64__) || defined(__aarch64__)
#define HAS_GUEST
#include <linux/kvm.h>
#endif

enum { VCPUS_MAX = 4, IMAGE_MEMORY = 16384, WATCHDOG_S = 60 };

static const char usage[] =
    "usage: lazy_restore [options]\n"
    "Restores a KVM guest lazily from a snapshot file and compares that with an eager restore.\n"
    "  --memory MiB    size of the data that the guest builds and checks, 16 to 1022 (default 128)\n"
    "  --vcpus N       vCPUs, 1 to 4 (default 2)\n"
    "  --no-populate   fill only what the guest touches\n"
    "  --rate MiB/s    rate limit of populate (default: none)\n"
    "  --thread        use threads in place of vCPUs, as without /dev/kvm\n"
    "  --file PATH     write the snapshot to PATH and keep it (default: a temporary file)\n";

struct options {
    uint64_t data;
    uint64_t rate;
    unsigned vcpus;
    bool populate;
    bool thread;
    const char *file;
};

/* ---- The machine: memory and vCPUs, as in any VMM ---- */

struct vcpu {
    struct machine *machine;
    unsigned index;
    int fd;
    struct kvm_run *run;
    pthread_t thread;
    /* The guest's report. */
    uint64_t first_ns;
    uint64_t done_ns;
    uint64_t bad_pages;
    uint64_t sum;
};

struct machine {
    int kvm;
    int vm; /* -1: threads in place of vCPUs */
    size_t run_size;
    uint8_t *memory;
    uint64_t len;
    uint64_t data_pages;
    uint64_t page_words;
    struct kuf *kuf;
    bool restored;
    uint64_t made_ns;
    atomic_uint running;
    unsigned vcpus;
    struct vcpu vcpu[VCPUS_MAX];
};

/* Handles a write of the guest to a port. Returns whether the vCPU stops at it. */
static bool guest_report(struct vcpu *vcpu, uint16_t port, uint32_t value)
{
    switch (port) {
    case PORT_BUILT:
        return true;
    case PORT_FIRST:
        vcpu->first_ns = now_ns();
        return false;
    case PORT_BAD_PAGES:
        vcpu->bad_pages = value;
        return false;
    case PORT_SUM_LOW:
        vcpu->sum = value;
        return false;
    case PORT_SUM_HIGH:
        vcpu->sum |= (uint64_t)value << 32;
        return false;
    case PORT_DONE:
        vcpu->done_ns = now_ns();
        return true;
    default:
        fail("vCPU %u wrote to the unknown port 0x%x", vcpu->index, port);
    }
}

/* ---- KVM ---- */

#if defined(HAS_GUEST)

extern const uint8_t guest_code[], guest_code_end[];

static void kvm_call(int fd, unsigned long request, void *argument, const char *name)
{
    if (ioctl(fd, request, argument) < 0)
        fail("%s: %s", name, strerror(errno));
}
#define KVM_CALL(fd, request, argument) kvm_call(fd, request, argument, #request)

#if defined(__x86_64__)
#include "lazy_restore_x86_64.h"
#else
#include "lazy_restore_arm64.h"
#endif

/* Returns NULL, or the reason why this host cannot run a KVM guest. */
static const char *kvm_open(struct machine *machine)
{
    machine->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (machine->kvm < 0)
        return strerror(errno);
    if (ioctl(machine->kvm, KVM_GET_API_VERSION, 0) != KVM_API_VERSION)
        return "unknown version of the KVM API";
    machine->vm = ioctl(machine->kvm, KVM_CREATE_VM, kvm_machine_type(machine->kvm));
    return machine->vm < 0 ? strerror(errno) : NULL;
}

static void kvm_add_memory(struct machine *machine)
{
    struct kvm_userspace_memory_region slot = {
        .guest_phys_addr = 0,
        .memory_size = machine->len,
        .userspace_addr = (uintptr_t)machine->memory,
    };
    KVM_CALL(machine->vm, KVM_SET_USER_MEMORY_REGION, &slot);
}

static void kvm_add_vcpu(struct machine *machine, struct vcpu *vcpu)
{
    vcpu->fd = ioctl(machine->vm, KVM_CREATE_VCPU, (unsigned long)vcpu->index);
    if (vcpu->fd < 0)
        fail("KVM_CREATE_VCPU: %s", strerror(errno));
    kvm_init_vcpu(machine, vcpu);

    int size = ioctl(machine->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    machine->run_size = size < 0 ? 0 : (size_t)size;
    vcpu->run = mmap(NULL, machine->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (vcpu->run == MAP_FAILED)
        fail("mmap of kvm_run: %s", strerror(errno));
}

static void kvm_load_guest(struct machine *machine)
{
    kvm_map_guest(machine->memory);
    memcpy(machine->memory + GUEST_CODE, guest_code, (size_t)(guest_code_end - guest_code));
}

static void kvm_save_vcpu(struct vcpu *vcpu, struct vcpu_state *state)
{
    /* KVM completes the port write only at the next KVM_RUN. */
    vcpu->run->immediate_exit = 1;
    if (ioctl(vcpu->fd, KVM_RUN, 0) == 0 || errno != EINTR)
        fail("KVM_RUN ran a vCPU despite immediate_exit");
    vcpu->run->immediate_exit = 0;
    kvm_get_state(vcpu, state);
}

/*
 * With userfaultfd, KVM_RUN does not return for a fault: the vCPU thread sleeps in the kernel until the page is
 * present. With the KVM mechanisms KVM_RUN returns with this exit, which <linux/kvm.h> names since Linux 6.8.
 */
static bool kvm_memory_fault(struct vcpu *vcpu)
{
#if defined(KVM_EXIT_MEMORY_FAULT)
    const struct kvm_run *run = vcpu->run;
    if (run->exit_reason == KVM_EXIT_MEMORY_FAULT && vcpu->machine->kuf != NULL)
        return kuf_vcpu_fault(vcpu->machine->kuf, run->memory_fault.gpa, run->memory_fault.size,
                              run->memory_fault.flags) == 0;
#endif
    (void)vcpu;
    return false;
}

static void kvm_run_vcpu(struct vcpu *vcpu)
{
    uint16_t port;
    uint32_t value;
    do {
        while (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
            int error = errno;
            if (error != EINTR && !kvm_memory_fault(vcpu))
                fail("KVM_RUN of vCPU %u: %s", vcpu->index, strerror(error));
        }
        if (!kvm_port_write(vcpu->run, &port, &value))
            fail("vCPU %u stops with exit reason %u", vcpu->index, vcpu->run->exit_reason);
    } while (!guest_report(vcpu, port, value));
}

static void kvm_close(struct machine *machine)
{
    for (unsigned i = 0; i < machine->vcpus; i++) {
        munmap(machine->vcpu[i].run, machine->run_size);
        close(machine->vcpu[i].fd);
    }
    close(machine->vm);
    close(machine->kvm);
}

#else /* no KVM guest for other architectures: threads in place of vCPUs */

struct vcpu_state {
    uint64_t none;
};

static const char *kvm_open(struct machine *machine)
{
    (void)machine;
    return "this example has no guest for this architecture";
}

static void kvm_add_memory(struct machine *machine) { (void)machine; }
static void kvm_add_vcpu(struct machine *machine, struct vcpu *vcpu) { (void)machine, (void)vcpu; }
static void kvm_load_guest(struct machine *machine) { (void)machine; }
static void kvm_reset_vcpu(struct machine *machine, struct vcpu *vcpu) { (void)machine, (void)vcpu; }
static void kvm_save_vcpu(struct vcpu *vcpu, struct vcpu_state *state) { (void)vcpu, (void)state; }
static void kvm_restore_vcpu(struct vcpu *vcpu, struct vcpu_state *state) { (void)vcpu, (void)state; }
static void kvm_run_vcpu(struct vcpu *vcpu) { (void)vcpu; }
static void kvm_close(struct machine *machine) { (void)machine; }

#endif

/* ---- Threads in place of vCPUs: the same work and the same reports as lazy_restore_guest.S ---- */

static void thread_build(struct vcpu *vcpu)
{
    const struct machine *machine = vcpu->machine;
    for (uint64_t page = vcpu->index; page < machine->data_pages; page += machine->vcpus)
        pattern_write(machine->memory + GUEST_DATA + page * PAGE, page);
    guest_report(vcpu, PORT_BUILT, 0);
}

static void thread_check(struct vcpu *vcpu)
{
    const struct machine *machine = vcpu->machine;
    uint64_t sum = 0;
    uint32_t bad = 0;

    guest_report(vcpu, PORT_FIRST, 0);
    for (uint64_t i = vcpu->index; i < machine->data_pages; i += machine->vcpus) {
        uint64_t page = scattered(i, machine->data_pages);
        volatile uint64_t *words = (volatile uint64_t *)(machine->memory + GUEST_DATA + page * PAGE);
        bad += !pattern_matches((const void *)words, page);
        for (uint64_t word = 0; word < machine->page_words; word++)
            sum += words[word];
        words[0] = ~words[0];
    }
    for (uint64_t i = vcpu->index; i < machine->data_pages; i += machine->vcpus) {
        uint64_t page = scattered(i, machine->data_pages);
        volatile uint64_t *words = (volatile uint64_t *)(machine->memory + GUEST_DATA + page * PAGE);
        bad += words[0] != ~pattern_next(pattern_seed(page));
    }
    guest_report(vcpu, PORT_BAD_PAGES, bad);
    guest_report(vcpu, PORT_SUM_LOW, (uint32_t)sum);
    guest_report(vcpu, PORT_SUM_HIGH, (uint32_t)(sum >> 32));
    guest_report(vcpu, PORT_DONE, 0);
}

/* ---- Common to both kinds of machine ---- */

static void machine_add_kvm(struct machine *machine)
{
    const char *why = kvm_open(machine);
    if (why != NULL)
        fail("/dev/kvm: %s", why);
    kvm_add_memory(machine);
    for (unsigned i = 0; i < machine->vcpus; i++)
        kvm_add_vcpu(machine, &machine->vcpu[i]);
}

/* Creates a machine with new, untouched memory. */
static void machine_open(struct machine *machine, const struct options *options)
{
    *machine = (struct machine){
        .kvm = -1,
        .vm = -1,
        .len = GUEST_DATA + options->data,
        .data_pages = options->data / PAGE,
        .page_words = PAGE_WORDS,
        .vcpus = options->vcpus,
    };
    void *memory = mmap(NULL, machine->len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap of guest memory: %s", strerror(errno));
    /* A child process would read zeroes from pages that are not filled yet. */
    madvise(memory, machine->len, MADV_DONTFORK);
    machine->memory = memory;

    for (unsigned i = 0; i < machine->vcpus; i++) {
        machine->vcpu[i].machine = machine;
        machine->vcpu[i].index = i;
    }
    if (!options->thread)
        machine_add_kvm(machine);
    machine->made_ns = now_ns();
}

static void machine_close(struct machine *machine)
{
    if (machine->vm >= 0)
        kvm_close(machine);
    munmap(machine->memory, machine->len);
}

static void *vcpu_main(void *argument)
{
    struct vcpu *vcpu = argument;
    if (vcpu->machine->vm >= 0)
        kvm_run_vcpu(vcpu);
    else if (vcpu->machine->restored)
        thread_check(vcpu);
    else
        thread_build(vcpu);
    atomic_fetch_sub(&vcpu->machine->running, 1);
    return NULL;
}

static void machine_start(struct machine *machine)
{
    atomic_store(&machine->running, machine->vcpus);
    for (unsigned i = 0; i < machine->vcpus; i++)
        if (pthread_create(&machine->vcpu[i].thread, NULL, vcpu_main, &machine->vcpu[i]) != 0)
            fail("cannot start a vCPU thread");
}

static void machine_join(struct machine *machine)
{
    for (unsigned i = 0; i < machine->vcpus; i++)
        pthread_join(machine->vcpu[i].thread, NULL);
}

/* ---- The snapshot file: this header, then the whole memory at IMAGE_MEMORY ---- */

struct snapshot {
    char magic[8];
    uint64_t memory;
    uint32_t vcpus;
    uint32_t reserved;
    struct vcpu_state vcpu[VCPUS_MAX];
};
_Static_assert(sizeof(struct snapshot) <= IMAGE_MEMORY, "the header overlaps the memory in the file");

static const char snapshot_magic[8] = "lazyrst";

/* Returns 0 after reading all bytes, otherwise -errno. */
static int read_fully(int file, void *buffer, uint64_t len, uint64_t offset)
{
    uint8_t *at = buffer;
    while (len > 0) {
        ssize_t n = pread(file, at, len, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            return -EIO; /* the file is too short: missing bytes must not become zeroes */
        at += n;
        offset += (uint64_t)n;
        len -= (uint64_t)n;
    }
    return 0;
}

static void write_fully(int file, const void *buffer, uint64_t len, uint64_t offset)
{
    const uint8_t *at = buffer;
    while (len > 0) {
        ssize_t n = pwrite(file, at, len, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            fail("writing the snapshot: %s", strerror(errno));
        at += n;
        offset += (uint64_t)n;
        len -= (uint64_t)n;
    }
}

static void snapshot_save(struct machine *machine, int file)
{
    struct snapshot snapshot = { .memory = machine->len, .vcpus = machine->vcpus };
    memcpy(snapshot.magic, snapshot_magic, sizeof(snapshot.magic));
    if (machine->vm >= 0)
        for (unsigned i = 0; i < machine->vcpus; i++)
            kvm_save_vcpu(&machine->vcpu[i], &snapshot.vcpu[i]);
    write_fully(file, &snapshot, sizeof(snapshot), 0);
    write_fully(file, machine->memory, machine->len, IMAGE_MEMORY);
}

/* Restores the vCPUs but no memory. */
static void snapshot_restore_vcpus(struct machine *machine, int file)
{
    struct snapshot snapshot;
    int error = read_fully(file, &snapshot, sizeof(snapshot), 0);
    if (error < 0)
        fail("reading the snapshot: %s", strerror(-error));
    if (memcmp(snapshot.magic, snapshot_magic, sizeof(snapshot.magic)) != 0 || snapshot.memory != machine->len ||
        snapshot.vcpus != machine->vcpus)
        fail("the snapshot is of another machine");
    if (machine->vm >= 0)
        for (unsigned i = 0; i < machine->vcpus; i++)
            kvm_restore_vcpu(&machine->vcpu[i], &snapshot.vcpu[i]);
    machine->restored = true;
}

static int snapshot_create(const struct options *options)
{
    char temporary[] = "/tmp/lazy_restore-XXXXXX";
    int file = options->file != NULL ? open(options->file, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600)
                                     : mkostemp(temporary, O_CLOEXEC);
    if (file < 0)
        fail("%s: %s", options->file != NULL ? options->file : temporary, strerror(errno));
    if (options->file == NULL)
        unlink(temporary);

    struct machine machine;
    uint64_t start = now_ns();
    machine_open(&machine, options);
    if (machine.vm >= 0) {
        kvm_load_guest(&machine);
        for (unsigned i = 0; i < machine.vcpus; i++)
            kvm_reset_vcpu(&machine, &machine.vcpu[i]);
    }
    machine_start(&machine);
    machine_join(&machine);
    uint64_t built = now_ns();
    snapshot_save(&machine, file);
    printf("snapshot      %u %s built %llu MiB of data in %.0f ms, written with their state in %.0f ms\n", options->vcpus,
           options->thread ? "thread(s)" : "vCPU(s)", (unsigned long long)(options->data / MIB),
           (double)(built - start) / 1e6, (double)(now_ns() - built) / 1e6);
    machine_close(&machine);
    return file;
}

/* ---- The report of a restored guest ---- */

struct outcome {
    uint64_t made_ns;
    uint64_t first_ns;
    uint64_t done_ns;
    uint64_t bad_pages;
    uint64_t sum;
};

/* Adds up the vCPUs' reports. Times count from `start`. */
static struct outcome machine_outcome(const struct machine *machine, uint64_t start)
{
    struct outcome outcome = { .made_ns = machine->made_ns - start, .first_ns = UINT64_MAX };
    for (unsigned i = 0; i < machine->vcpus; i++) {
        const struct vcpu *vcpu = &machine->vcpu[i];
        if (vcpu->first_ns - start < outcome.first_ns)
            outcome.first_ns = vcpu->first_ns - start;
        if (vcpu->done_ns - start > outcome.done_ns)
            outcome.done_ns = vcpu->done_ns - start;
        outcome.bad_pages += vcpu->bad_pages;
        outcome.sum += vcpu->sum;
    }
    return outcome;
}

static void print_outcome(const char *name, const struct outcome *outcome)
{
    printf("%-13s VM made after %.2f ms, first guest exit after %.2f ms, all pages checked after %.2f ms\n", name,
           (double)outcome->made_ns / 1e6, (double)outcome->first_ns / 1e6, (double)outcome->done_ns / 1e6);
    printf("              bad pages: %llu, sum of all words: %016llx\n", (unsigned long long)outcome->bad_pages,
           (unsigned long long)outcome->sum);
}

static uint64_t expected_sum(uint64_t pages)
{
    uint64_t sum = 0;
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t word = pattern_seed(page);
        for (uint64_t i = 0, words = PAGE_WORDS; i < words; i++)
            sum += word = pattern_next(word);
    }
    return sum;
}

/* ---- The eager restore: read all memory first ---- */

static struct outcome restore_eagerly(const struct options *options, int file)
{
    struct machine machine;
    uint64_t start = now_ns();
    machine_open(&machine, options);
    int error = read_fully(file, machine.memory, machine.len, IMAGE_MEMORY);
    if (error < 0)
        fail("reading the snapshot: %s", strerror(-error));
    snapshot_restore_vcpus(&machine, file);
    machine_start(&machine);
    machine_join(&machine);
    struct outcome outcome = machine_outcome(&machine, start);
    print_outcome("eager load", &outcome);
    machine_close(&machine);
    return outcome;
}

/* ---- The lazy restore ---- */

struct source {
    int file;
    atomic_bool populated;
    atomic_int error;
};

/*
 * The fill callback: reads a run of pages from the file. Several threads call it at once. The library installs buf in
 * one step, so that no vCPU sees half a page. After a failure it asks for single pages and poisons those that fail
 * again.
 */
static int fill_from_file(void *opaque, struct kuf_fill *fill)
{
    const struct source *source = opaque;
    int error = read_fully(source->file, fill->buf, fill->len, IMAGE_MEMORY + fill->memory_offset);
    return error < 0 ? error : KUF_FILL_DONE;
}

static void event(void *opaque, const struct kuf_event *event)
{
    struct source *source = opaque;
    switch (event->kind) {
    case KUF_EVENT_POPULATED:
        if (event->error != 0)
            atomic_store(&source->error, event->error);
        atomic_store(&source->populated, true);
        break;
    case KUF_EVENT_POISONED:
    case KUF_EVENT_INACCESSIBLE:
    case KUF_EVENT_FATAL:
        atomic_store(&source->error, event->error != 0 ? event->error : -EIO);
        fprintf(stderr, "lost: %s\n", event->text);
        break;
    default:
        break;
    }
}

static void serve_memory(struct machine *machine, struct source *source)
{
    struct kuf_options options = {
        .size = sizeof(options),
        .fill = fill_from_file,
        .event = event,
        .opaque = source,
    };
    if (machine->vm < 0)
        options.flags = KUF_OPEN_USER_MODE_ONLY; /* enough for threads, and needs no privilege */
    int result = kuf_open(&options, &machine->kuf);
    check_open(result, kuf_error());

    struct kuf_memory memory = {
        .size = sizeof(memory),
        .gpa = 0,
        .len = machine->len,
        .hva = (uintptr_t)machine->memory,
    };
    if (kuf_add_memory(machine->kuf, &memory) < 0)
        fail("kuf_add_memory: %s", kuf_error());
}

/* Redraws the bar on a terminal; otherwise prints a line for each quarter. */
static void show_progress(struct kuf *kuf)
{
    static int quarter = -1;
    struct kuf_progress_info progress = { .size = sizeof(progress) };
    if (kuf_progress(kuf, KUF_ALL, &progress) < 0)
        fail("kuf_progress: %s", kuf_error());
    int percent = (int)(progress.present * 100 / progress.total);
    char bar[41] = "........................................";
    memset(bar, '#', (size_t)percent * (sizeof(bar) - 1) / 100);
    if (isatty(STDOUT_FILENO))
        printf("\r  [%s] %3d %% present ", bar, percent);
    else if (percent / 25 > quarter)
        printf("  [%s] %3d %% present\n", bar, percent);
    quarter = percent / 25;
    fflush(stdout);
}

static void show_histogram(const char *name, const struct kuf_histogram *histogram)
{
    uint64_t most = 1;
    int first = KUF_HISTOGRAM_BUCKETS, last = -1;
    for (int i = 0; i < KUF_HISTOGRAM_BUCKETS; i++) {
        if (histogram->bucket[i] == 0)
            continue;
        first = first < i ? first : i;
        last = i;
        most = most > histogram->bucket[i] ? most : histogram->bucket[i];
    }
    if (last < 0)
        return;
    printf("%s: %llu, mean %.1f us, longest %.1f us\n", name, (unsigned long long)histogram->count,
           (double)histogram->sum_ns / 1e3 / (double)histogram->count, (double)histogram->max_ns / 1e3);
    for (int i = first; i <= last; i++) {
        char bar[51] = "";
        memset(bar, '#', (size_t)(histogram->bucket[i] * (sizeof(bar) - 1) / most));
        printf("  below %9.1f us %7llu %s\n", (double)(UINT64_C(2) << i) / 1e3, (unsigned long long)histogram->bucket[i], bar);
    }
}

static void show_block_times(struct kuf *kuf)
{
    struct kuf_block_time times[VCPUS_MAX];
    ssize_t known = kuf_block_times(kuf, times, VCPUS_MAX);
    for (ssize_t i = 0; i < known && i < VCPUS_MAX; i++)
        printf("  thread %u waited %.2f ms in all for %llu faults, longest %.2f ms\n", times[i].thread,
               (double)times[i].total_ns / 1e6, (unsigned long long)times[i].faults, (double)times[i].max_ns / 1e6);
}

/* Shows the counters. Fails unless pages were filled on demand and, if requested, by populate. */
static void show_stats(struct kuf *kuf, const struct options *options)
{
    struct kuf_stats_info stats = { .size = sizeof(stats) };
    if (kuf_stats(kuf, &stats) < 0)
        fail("kuf_stats: %s", kuf_error());
    uint64_t filled = stats.bytes_copied + stats.bytes_zeroed + stats.bytes_in_place;
    uint64_t demand = filled - stats.bytes_populated;
    printf("faults        %llu (%llu of them for a page already requested); fill callbacks: %llu\n",
           (unsigned long long)stats.faults, (unsigned long long)(stats.faults_joined + stats.faults_late),
           (unsigned long long)stats.fills);
    printf("filled        on demand %.1f MiB, by populate %.1f MiB\n", (double)demand / (double)MIB,
           (double)stats.bytes_populated / (double)MIB);
    show_block_times(kuf);
    show_histogram("wait for a page, from reading the fault", &stats.blocked);
    show_histogram("time in the fill callback, also for populate", &stats.filling);

    if (stats.faults == 0 || demand == 0)
        fail("no page was filled on demand");
    if (options->populate && filled < GUEST_DATA + options->data)
        fail("populate ended with only %llu bytes filled", (unsigned long long)filled);
}

static struct outcome restore_lazily(const struct options *options, int file)
{
    struct source source = { .file = file };
    struct machine machine;
    uint64_t start = now_ns();
    machine_open(&machine, options);
    /* Start the service before restoring the vCPUs: KVM may read guest memory as soon as a vCPU has state. */
    serve_memory(&machine, &source);
    snapshot_restore_vcpus(&machine, file);
    machine_start(&machine);

    struct kuf_populate_request populate = { .size = sizeof(populate), .gpa = KUF_ALL, .rate = options->rate };
    if (options->populate && kuf_populate(machine.kuf, &populate) < 0)
        fail("kuf_populate: %s", kuf_error());
    while (atomic_load(&machine.running) > 0 || (options->populate && !atomic_load(&source.populated))) {
        show_progress(machine.kuf);
        sleep_us(5000);
    }
    show_progress(machine.kuf);
    if (isatty(STDOUT_FILENO))
        printf("\n");
    machine_join(&machine);

    struct outcome outcome = machine_outcome(&machine, start);
    print_outcome("lazy restore", &outcome);
    show_stats(machine.kuf, options);
    if (atomic_load(&source.error) != 0)
        fail("pages were lost: %s", strerror(-atomic_load(&source.error)));
    /* Without populate, some pages are still absent; kuf_close refuses to leave absent pages without a flag. */
    if (kuf_close(&machine.kuf, KUF_END_POPULATE) < 0)
        fail("kuf_close: %s", kuf_error());
    machine_close(&machine);
    return outcome;
}

/*
 * The guest, or a thread in its place, has touched a page that is poisoned because it could not be filled. A VMM would
 * inject a machine check into the guest; this example ends.
 */
static void memory_is_lost(int signal)
{
    static const char text[] = "lazy_restore: FAIL: the guest touched a page that could not be read from the file\n";
    (void)signal;
    if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0)
        _exit(EXIT_FAILURE);
    _exit(EXIT_FAILURE);
}

/* ---- */

static uint64_t number(const char *text, uint64_t least, uint64_t most)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || value < least || value > most)
        fail("'%s' is not a number from %llu to %llu", text, (unsigned long long)least, (unsigned long long)most);
    return value;
}

static struct options parse(int argc, char **argv)
{
    static const struct option names[] = {
        { "memory", required_argument, NULL, 'm' },  { "vcpus", required_argument, NULL, 'v' },
        { "no-populate", no_argument, NULL, 'n' },   { "rate", required_argument, NULL, 'r' },
        { "thread", no_argument, NULL, 't' },        { "file", required_argument, NULL, 'f' },
        { "help", no_argument, NULL, 'h' },          { NULL, 0, NULL, 0 },
    };
    struct options options = { .data = 128 * MIB, .vcpus = 2, .populate = true };
    for (int c; (c = getopt_long(argc, argv, "h", names, NULL)) != -1;) {
        switch (c) {
        case 'm': options.data = number(optarg, 16, 1022) * MIB; break;
        case 'v': options.vcpus = (unsigned)number(optarg, 1, VCPUS_MAX); break;
        case 'n': options.populate = false; break;
        case 'r': options.rate = number(optarg, 0, 1 << 20) * MIB; break;
        case 't': options.thread = true; break;
        case 'f': options.file = optarg; break;
        case 'h': fputs(usage, stdout); exit(EXIT_SUCCESS);
        default: fputs(usage, stderr); exit(EXIT_FAILURE);
        }
    }
    return options;
}

int main(int argc, char **argv)
{
    struct options options = parse(argc, argv);
    example_begin(WATCHDOG_S);
    signal(SIGBUS, memory_is_lost);

    struct machine trial = { .kvm = -1, .vm = -1 };
    const char *why = options.thread ? NULL : kvm_open(&trial);
    if (why != NULL) {
        fprintf(stderr, "NOTE: no KVM guest here (/dev/kvm: %s); using threads in place of vCPUs\n", why);
        options.thread = true;
    }
    if (trial.vm >= 0)
        close(trial.vm);
    if (trial.kvm >= 0)
        close(trial.kvm);

    int file = snapshot_create(&options);
    struct outcome eager = restore_eagerly(&options, file);
    struct outcome lazy = restore_lazily(&options, file);
    close(file);

    uint64_t sum = expected_sum(options.data / PAGE);
    if (eager.bad_pages != 0 || eager.sum != sum)
        fail("the eagerly restored guest found wrong bytes");
    if (lazy.bad_pages != 0 || lazy.sum != sum)
        fail("the lazily restored guest found wrong bytes");
    printf("ok            the lazily restored guest ran %.1f times sooner and found the right bytes\n",
           (double)eager.first_ns / (double)lazy.first_ns);
    return EXIT_SUCCESS;
}
