/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kvm_run_loop.c - the KVM_RUN loop of a VMM, for all mechanisms
 *
 * With userfaultfd, a vCPU sleeps inside KVM_RUN until its page is present, and the loop has nothing to do. With the
 * two KVM mechanisms, KVM_RUN returns with KVM_EXIT_MEMORY_FAULT; the loop calls kuf_vcpu_fault, which fills the page
 * on the vCPU's thread, and the VMM follows a few rules about memslots. All else is the same for the three, so that one
 * loop is enough for all kernels. See run_vcpu, plug, and the end of main.
 *
 * The guest sums up some pages, makes KVM read others (by a string instruction, which KVM emulates), and leaves one to
 * a device. The VMM plugs in half of the memory while the guest runs. It checks the guest's reports and each byte.
 *
 * Build:  cc -O2 -pthread -o kvm_run_loop kvm_run_loop.c $(pkg-config --cflags --libs kuf)
 * Run:    ./kvm_run_loop [userfaultfd | bitmap | async]
 *
 * Without an argument it uses a KVM mechanism if the kernel has one; no released kernel does.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <kuf-kvm.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include "example.h"

static const char usage[] =
    "usage: kvm_run_loop [userfaultfd | bitmap | async]\n"
    "Runs a small KVM guest on memory that is filled on demand. Without an argument it uses a KVM mechanism if the\n"
    "kernel has one, otherwise userfaultfd.\n";

#if defined(__x86_64__)

#include "long_mode.h"

#define BANK_LEN (BANK_PAGES * PAGE)
enum { VCPUS = 2, BANKS = 2, BANK_PAGES = 512, TEXT_LEN = 16, WATCHDOG_S = 60 };

/* Guest physical memory: page tables and code, which the VMM fills itself, and two banks, which the library serves. */
enum { PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, CODE = 0x8000, LOW_LEN = 0x10000, BANK_GPA = 0x200000 };

enum { PORT_SUM = 0x500, PORT_TEXT, PORT_DEVICE, PORT_DONE };

/* <linux/kvm.h> has these since Linux 6.8, but not yet those with USERFAULT in their names. */
enum { EXIT_MEMORY_FAULT = 39, MEM_USERFAULT = 1 << 3 };

struct memory_fault {
    uint64_t flags, gpa, size;
};

struct memslot {
    uint32_t slot, flags;
    uint64_t gpa, len, hva;
    uint64_t guest_memfd_offset;
    uint32_t guest_memfd, pad1;
    uint64_t userfault_bitmap, pad2[13];
};
#define SET_MEMSLOT _IOW(KVMIO, 0x49, struct memslot) /* KVM_SET_USER_MEMORY_REGION2 */

/*
 * The guest: rbx is the address of the first page, rbp the number of pages, r8 the distance between two. Of each four
 * pages it sums up two and puts out the beginning of two; then it inverts a word, so that the VMM detects a page that
 * is filled again. It leaves the last page to the device.
 */
extern const uint8_t guest_code[], guest_code_end[];
__asm__(".pushsection .rodata\n"
        "guest_code:\n"
        "        dec     %rbp\n"
        ".Lpage: mov     %rbx, %rsi\n"
        "        test    $0x2000, %ebx\n"
        "        jnz     .Ltext\n"
        "        xor     %eax, %eax\n"
        "        mov     $512, %ecx\n"
        ".Lword: add     (%rsi), %rax\n"
        "        add     $8, %rsi\n"
        "        dec     %ecx\n"
        "        jnz     .Lword\n"
        "        mov     $0x500, %edx\n" /* PORT_SUM */
        "        out     %eax, %dx\n"
        "        shr     $32, %rax\n"
        "        out     %eax, %dx\n"
        "        jmp     .Lnext\n"
        ".Ltext: mov     $0x501, %edx\n" /* PORT_TEXT */
        "        mov     $16, %ecx\n"
        "        cld\n"
        "        rep     outsb\n"
        ".Lnext: notq    (%rbx)\n"
        "        add     %r8, %rbx\n"
        "        dec     %rbp\n"
        "        jnz     .Lpage\n"
        "        mov     %ebx, %eax\n"
        "        mov     $0x502, %edx\n" /* PORT_DEVICE */
        "        out     %eax, %dx\n"
        "        mov     $0x503, %edx\n" /* PORT_DONE */
        "        out     %eax, %dx\n"
        "        hlt\n"
        "guest_code_end:\n"
        ".popsection\n");

struct vcpu {
    struct vmm *vmm;
    unsigned index;
    int fd;
    struct kvm_run *run;
    pthread_t thread;
    /* The guest's report of the page it is working on. */
    uint64_t page;
    uint8_t report[TEXT_LEN];
    unsigned reported;
};

struct vmm {
    uint32_t mechanism;
    int kvm, vm;
    struct kuf *kuf;
    uint8_t *low;
    uint8_t *bank[BANKS];
    struct vcpu vcpu[VCPUS];
    pthread_barrier_t stopped, plugged;
    sem_t complete;
    atomic_uint bad_reports;
};

static uint64_t bank_gpa(unsigned bank)
{
    return BANK_GPA + (uint64_t)bank * BANK_LEN;
}

/* Returns the VMM's address of a guest address in a bank, or NULL. */
static uint8_t *at_gpa(struct vmm *vmm, uint64_t gpa)
{
    for (unsigned i = 0; i < BANKS; i++) {
        if (gpa - bank_gpa(i) < BANK_LEN)
            return vmm->bank[i] + (gpa - bank_gpa(i));
    }
    return NULL;
}

/* ---- The library's side ---- */

/* A VMM would read its snapshot here. It runs on service threads and, for vCPU exits, on the vCPU threads. */
static int fill(void *opaque, struct kuf_fill *run)
{
    (void)opaque;
    for (uint64_t at = 0; at < run->len; at += PAGE)
        pattern_write((uint8_t *)run->buf + at, (run->gpa + at - BANK_GPA) / PAGE);
    return KUF_FILL_DONE;
}

/* Must not change memslots: KVM would wait for vCPUs that wait for pages, which this thread may have to serve. */
static void event(void *opaque, const struct kuf_event *event)
{
    struct vmm *vmm = opaque;
    if (event->kind == KUF_EVENT_COMPLETE)
        sem_post(&vmm->complete);
    else if (event->error < 0)
        fprintf(stderr, "%s\n", event->text);
}

static void open_service(struct vmm *vmm, const char *wanted)
{
    static const char *const names[KUF_MECHANISM_COUNT] = { "auto", "userfaultfd", "bitmap", "async" };
    static const uint32_t preferred[] = {
        KUF_MECHANISM_KVM_BITMAP, KUF_MECHANISM_KVM_ASYNC, KUF_MECHANISM_USERFAULTFD,
    };
    struct kuf_probe_info probe = { .size = sizeof(probe) };
    if (kuf_probe(vmm->vm, &probe) < 0)
        fail("kuf_probe: %s", kuf_error());
    for (unsigned i = 0; i < sizeof(preferred) / sizeof(preferred[0]) && vmm->mechanism == 0; i++) {
        uint32_t m = preferred[i];
        if (wanted != NULL ? strcmp(wanted, names[m]) == 0 : (probe.mechanisms & 1u << m) != 0)
            vmm->mechanism = m;
    }
    if (vmm->mechanism == 0)
        skip("no mechanism works here: %s", probe.why[KUF_MECHANISM_USERFAULTFD]);
    if (probe.error[vmm->mechanism] != 0)
        skip("%s: %s", names[vmm->mechanism], probe.why[vmm->mechanism]);

    struct kuf_options options = {
        .size = sizeof(options),
        .mechanism = vmm->mechanism,
        .vm_fd = vmm->vm,
        .fill = fill,
        .event = event,
        .opaque = vmm,
    };
    check_open(kuf_open(&options, &vmm->kuf), kuf_error());
    printf("mechanism     %s\n", names[vmm->mechanism]);
}

/* ---- Memslots ---- */

static void kvm_call(int fd, unsigned long request, void *argument, const char *name)
{
    if (ioctl(fd, request, argument) < 0)
        fail("%s: %s", name, strerror(errno));
}
#define KVM_CALL(fd, request, argument) kvm_call(fd, request, argument, #request)

static void set_memslot(struct vmm *vmm, uint32_t slot, uint64_t gpa, uint64_t len, void *memory, uint64_t bitmap)
{
    struct memslot m = { .slot = slot, .gpa = gpa, .len = len, .hva = (uintptr_t)memory };
    if (bitmap == 0) {
        /* The first fields are those of the older call, which all kernels have. */
        KVM_CALL(vmm->vm, KVM_SET_USER_MEMORY_REGION, &m);
        return;
    }
    m.flags = MEM_USERFAULT;
    m.userfault_bitmap = bitmap;
    KVM_CALL(vmm->vm, SET_MEMSLOT, &m);
}

static void *map_memory(uint64_t len)
{
    void *memory = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap of guest memory: %s", strerror(errno));
    return memory;
}

/*
 * Gives the guest a bank of memory: first to the service, then as a memslot, because no vCPU may reach memory that is
 * not armed yet. If vCPUs have already run, stop them first, and let no thread wait for a page: with asynchronous
 * userfaults KVM would wait for that thread.
 */
static void plug(struct vmm *vmm, unsigned bank)
{
    uint64_t bitmap = 0;
    vmm->bank[bank] = map_memory(BANK_LEN);
    struct kuf_memory memory = {
        .size = sizeof(memory),
        .gpa = bank_gpa(bank),
        .len = BANK_LEN,
        .hva = (uintptr_t)vmm->bank[bank],
    };
    if (kuf_kvm_quiesce(vmm->kuf, -1) < 0)
        fail("kuf_kvm_quiesce: %s", kuf_error());
    if (kuf_add_memory(vmm->kuf, &memory) < 0)
        fail("kuf_add_memory: %s", kuf_error());
    if (vmm->mechanism == KUF_MECHANISM_KVM_BITMAP && kuf_kvm_bitmap(vmm->kuf, memory.gpa, &bitmap) < 0)
        fail("kuf_kvm_bitmap: %s", kuf_error());
    set_memslot(vmm, 1 + bank, memory.gpa, memory.len, vmm->bank[bank], bitmap);
}

/* ---- vCPUs ---- */

/* Checks the guest's reports of its pages, which arrive in the order of the pages. */
static void guest_report(struct vcpu *vcpu, const uint8_t *data, size_t len, size_t wanted)
{
    for (size_t i = 0; i < len; i++) {
        uint64_t words[PAGE_MAX / 8], sum = 0;
        vcpu->report[vcpu->reported++] = data[i];
        if (vcpu->reported < wanted)
            continue;
        pattern_write(words, vcpu->page);
        for (uint64_t word = 0; word < PAGE_WORDS; word++)
            sum += words[word];
        if (memcmp(vcpu->report, wanted == TEXT_LEN ? (void *)words : (void *)&sum, wanted) != 0)
            atomic_fetch_add(&vcpu->vmm->bad_reports, 1);
        vcpu->reported = 0;
        vcpu->page += VCPUS;
    }
}

/*
 * A device that reads a page of the guest's choice. With asynchronous userfaults the VMM's own threads must call
 * kuf_ensure, because no fault stops them at an absent page; with the other mechanisms the call saves a fault.
 */
static void device_read(struct vmm *vmm, uint64_t gpa)
{
    if (kuf_ensure(vmm->kuf, gpa, PAGE, -1) < 0)
        fail("kuf_ensure: %s", kuf_error());
    if (!pattern_matches(at_gpa(vmm, gpa), (gpa - BANK_GPA) / PAGE))
        atomic_fetch_add(&vmm->bad_reports, 1);
}

/*
 * The guest needs a page that could not be filled. A VMM must inject a machine check with this address
 * (KVM_X86_SET_MCE) or stop the guest; it must not let the guest continue without the page.
 */
static _Noreturn void lost_memory(struct vcpu *vcpu, uint64_t gpa)
{
    fail("vCPU %u needs the page at gpa 0x%llx, which is lost", vcpu->index, (unsigned long long)gpa);
}

/* Handles KVM_EXIT_MEMORY_FAULT. Returns when the vCPU can run again. */
static void memory_fault(struct vcpu *vcpu)
{
    struct memory_fault fault;
    memcpy(&fault, &vcpu->run->hw, sizeof(fault)); /* kvm_run.memory_fault in newer headers */
    int result = kuf_vcpu_fault(vcpu->vmm->kuf, fault.gpa, fault.size, fault.flags);
    switch (result) {
    case 0:
        return;
    case -EHWPOISON:
        lost_memory(vcpu, fault.gpa);
    case -ENOENT:
    case -ERANGE:
        /* Not the library's memory, or another reason (private memory touched as shared): as without libkuf. */
        fail("vCPU %u: memory fault at gpa 0x%llx, flags 0x%llx", vcpu->index, (unsigned long long)fault.gpa,
             (unsigned long long)fault.flags);
    case -ECANCELED:
    case -EBADF:
        /* kuf_close has begun. A VMM whose vCPUs still run would stop them here. */
    default:
        fail("kuf_vcpu_fault: %s", kuf_error());
    }
}

static void run_vcpu(struct vcpu *vcpu)
{
    struct vmm *vmm = vcpu->vmm;
    struct kvm_run *run = vcpu->run;
    for (;;) {
        /* EFAULT means an absent page only with EXIT_MEMORY_FAULT. KVM may leave an old exit reason, so clear it. */
        run->exit_reason = KVM_EXIT_UNKNOWN;
        if (ioctl(vcpu->fd, KVM_RUN, 0) < 0 && errno != EINTR &&
            !((errno == EFAULT || errno == EHWPOISON) && run->exit_reason == EXIT_MEMORY_FAULT))
            fail("KVM_RUN of vCPU %u: %s", vcpu->index, strerror(errno));

        const uint8_t *data = (const uint8_t *)run + run->io.data_offset;
        uint32_t value = 0;
        switch (run->exit_reason) {
        case KVM_EXIT_UNKNOWN: /* EINTR */
            break;
        case EXIT_MEMORY_FAULT:
            memory_fault(vcpu);
            break;
        case KVM_EXIT_MMIO:
            /* KVM's emulator reports a page that it cannot read as MMIO. The VMM must not invent bytes for it. */
            if (kuf_ensure(vmm->kuf, run->mmio.phys_addr, run->mmio.len, -1) == -EHWPOISON)
                lost_memory(vcpu, run->mmio.phys_addr);
            fail("vCPU %u: no device at 0x%llx", vcpu->index, (unsigned long long)run->mmio.phys_addr);
        case KVM_EXIT_IO:
            memcpy(&value, data, run->io.size);
            if (run->io.port == PORT_DONE)
                return;
            if (run->io.port == PORT_DEVICE)
                device_read(vmm, value);
            else
                guest_report(vcpu, data, (size_t)run->io.size * run->io.count,
                             run->io.port == PORT_TEXT ? TEXT_LEN : sizeof(uint64_t));
            break;
        default:
            fail("vCPU %u stops with exit reason %u", vcpu->index, run->exit_reason);
        }
    }
}

/* Puts the vCPU into long mode at the start of the guest. */
static void reset_vcpu(struct vcpu *vcpu, unsigned bank)
{
    struct kvm_sregs sregs;
    KVM_CALL(vcpu->fd, KVM_GET_SREGS, &sregs);
    long_mode_enter(&sregs, PML4);
    KVM_CALL(vcpu->fd, KVM_SET_SREGS, &sregs);

    vcpu->page = (uint64_t)bank * BANK_PAGES + vcpu->index;
    struct kvm_regs regs = {
        .rip = CODE,
        .rflags = LONG_MODE_RFLAGS,
        .rbx = BANK_GPA + vcpu->page * PAGE,
        .rbp = BANK_PAGES / VCPUS,
        .r8 = VCPUS * PAGE,
    };
    KVM_CALL(vcpu->fd, KVM_SET_REGS, &regs);
}

static void *vcpu_main(void *argument)
{
    struct vcpu *vcpu = argument;
    for (unsigned bank = 0; bank < BANKS; bank++) {
        if (bank > 0) {
            /* The vCPUs stop for each change of memslots. */
            pthread_barrier_wait(&vcpu->vmm->stopped);
            pthread_barrier_wait(&vcpu->vmm->plugged);
        }
        reset_vcpu(vcpu, bank);
        run_vcpu(vcpu);
    }
    return NULL;
}

static void add_vcpu(struct vmm *vmm, unsigned index)
{
    struct vcpu *vcpu = &vmm->vcpu[index];
    union {
        struct kvm_cpuid2 list;
        uint8_t room[sizeof(struct kvm_cpuid2) + 256 * sizeof(struct kvm_cpuid_entry2)];
    } cpuid = { .list = { .nent = 256 } };

    vcpu->vmm = vmm;
    vcpu->index = index;
    vcpu->fd = ioctl(vmm->vm, KVM_CREATE_VCPU, (unsigned long)index);
    if (vcpu->fd < 0)
        fail("KVM_CREATE_VCPU: %s", strerror(errno));
    KVM_CALL(vmm->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
    KVM_CALL(vcpu->fd, KVM_SET_CPUID2, &cpuid);
    int size = ioctl(vmm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    vcpu->run = mmap(NULL, size < 0 ? 0 : (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (vcpu->run == MAP_FAILED)
        fail("mmap of kvm_run: %s", strerror(errno));
}

/* Loads the guest's code and page tables. */
static void load_guest(struct vmm *vmm)
{
    vmm->low = map_memory(LOW_LEN);
    long_mode_tables(vmm->low, PML4, PDPT, PD);
    memcpy(vmm->low + CODE, guest_code, (size_t)(guest_code_end - guest_code));
    set_memslot(vmm, 0, 0, LOW_LEN, vmm->low, 0);
}

/* The guest has inverted the first word of each page except those that it left to the device. */
static unsigned check_memory(struct vmm *vmm)
{
    unsigned bad = 0;
    for (uint64_t page = 0; page < BANKS * BANK_PAGES; page++) {
        uint64_t *words = (uint64_t *)at_gpa(vmm, BANK_GPA + page * PAGE);
        if (page % BANK_PAGES < BANK_PAGES - VCPUS)
            words[0] = ~words[0];
        bad += !pattern_matches(words, page);
    }
    return bad;
}

int main(int argc, char **argv)
{
    static struct vmm vmm;
    const char *wanted = argc > 1 ? argv[1] : NULL;
    if (argc > 2 || (wanted != NULL && strcmp(wanted, "userfaultfd") != 0 && strcmp(wanted, "bitmap") != 0 &&
                     strcmp(wanted, "async") != 0)) {
        fputs(usage, wanted != NULL && strcmp(wanted, "--help") == 0 ? stdout : stderr);
        return wanted != NULL && strcmp(wanted, "--help") == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
    }
    example_begin(WATCHDOG_S);
    vmm.kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    vmm.vm = vmm.kvm < 0 ? -1 : ioctl(vmm.kvm, KVM_CREATE_VM, 0);
    if (vmm.vm < 0)
        skip("/dev/kvm: %s", strerror(errno));
    pthread_barrier_init(&vmm.stopped, NULL, VCPUS + 1);
    pthread_barrier_init(&vmm.plugged, NULL, VCPUS + 1);
    sem_init(&vmm.complete, 0, 0);

    /* Arm the memory before creating vCPUs: setting MSRs may make KVM look up pages and keep them. */
    open_service(&vmm, wanted);
    load_guest(&vmm);
    plug(&vmm, 0);
    for (unsigned i = 0; i < VCPUS; i++)
        add_vcpu(&vmm, i);
    for (unsigned i = 0; i < VCPUS; i++)
        pthread_create(&vmm.vcpu[i].thread, NULL, vcpu_main, &vmm.vcpu[i]);

    pthread_barrier_wait(&vmm.stopped);
    plug(&vmm, 1);
    pthread_barrier_wait(&vmm.plugged);

    /* A complete bank has no bit set; without KVM_MEM_USERFAULT KVM can map huge pages. Do this before kuf_close. */
    for (unsigned i = 0; i < BANKS; i++) {
        while (sem_wait(&vmm.complete) < 0)
            ;
    }
    for (unsigned i = 0; i < BANKS && vmm.mechanism == KUF_MECHANISM_KVM_BITMAP; i++)
        set_memslot(&vmm, 1 + i, bank_gpa(i), BANK_LEN, vmm.bank[i], 0);

    struct kuf_stats_info stats = { .size = sizeof(stats) };
    kuf_stats(vmm.kuf, &stats);
    for (unsigned i = 0; i < VCPUS; i++)
        pthread_join(vmm.vcpu[i].thread, NULL);
    if (kuf_close(&vmm.kuf, 0) < 0)
        fail("kuf_close: %s", kuf_error());

    unsigned bad = check_memory(&vmm);
    printf("vCPU exits    %llu\n", (unsigned long long)stats.vcpu_faults);
    printf("other faults  %llu\n", (unsigned long long)stats.faults);
    printf("bad pages     %u, bad reports of the guest %u\n", bad, atomic_load(&vmm.bad_reports));
    if (bad > 0 || atomic_load(&vmm.bad_reports) > 0)
        fail("the guest found wrong bytes");
    if ((vmm.mechanism != KUF_MECHANISM_USERFAULTFD) != (stats.vcpu_faults > 0))
        fail("the number of vCPU exits does not fit the mechanism");
    return EXIT_SUCCESS;
}

#else

int main(void)
{
    (void)usage;
    skip("this example has no guest for this architecture");
}

#endif
