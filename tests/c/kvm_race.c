/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A real KVM guest with four vCPUs that read and write the pages of two slots, one anonymous and one of a memfd, while
 * threads of the VMM populate, discard, resolve unasked and read guest memory as device models do, and while the vCPU
 * threads call kuf_vcpu_fault between their KVM_RUNs. The guest itself compares every word of every page.
 *
 * Each page has one owner, a vCPU or the thread that plays a balloon. Only the owner writes to it, discards it and
 * gives it back. The owner raises the generation of the page, waits until no kuf_resolve with older bytes is under way,
 * and then discards: after the return no thread may see older bytes.
 *
 * KUF_STRESS_SEED sets the seed, KUF_STRESS_SECONDS the duration.
 */
#include "seeded.h"

#if defined(__x86_64__) || defined(__aarch64__)
#include "kvm_race_guest.h"

#define PAGE ((uint64_t)page_size())
#define WORDS (PAGE / 8)
enum { PAGE_MAX = 65536, WORDS_MAX = PAGE_MAX / 8 };
enum { VCPUS = 4, OWNERS = VCPUS + 1, SLOTS = 2, PAGES = 64, ALL_PAGES = SLOTS * PAGES };
enum { ORDERS = 8, RUN_MAX = 16, PATIENCE_S = 40 };


struct order {
    uint64_t address, factor, summand, write, differ, first;
    uint64_t unused[2];
};

struct mailbox {
    uint64_t orders, words;
    uint64_t unused[6];
    struct order order[ORDERS];
};

struct page {
    _Atomic uint64_t generation;
    /* kuf_resolve calls under way with bytes of an even or odd generation. */
    atomic_int supplying[2];
    /* Odd while the owner changes the contents of the page. */
    _Atomic uint64_t sequence, holds;
};

struct vcpu {
    unsigned index;
    int fd;
    struct kvm_run *run;
    struct mailbox *mailbox;
    uint64_t written;
};

static const uint64_t slot_gpa[SLOTS] = {0x800000, 0x1000000};
static unsigned char *memory[SLOTS], *low;
static struct page pages[ALL_PAGES];
static struct vcpu vcpus[VCPUS];
static int kvm, vm, memory_fd;
static size_t run_size;
static struct kuf *handle;
static atomic_bool stop;
static _Atomic uint64_t steps, guest_checks, cross_checks, host_checks, guest_writes, discards;

static uint64_t gpa_of(unsigned page)
{
    return slot_gpa[page / PAGES] + page % PAGES * PAGE;
}

static unsigned char *at(unsigned page)
{
    return memory[page / PAGES] + page % PAGES * PAGE;
}

/* Runs of four pages have the same owner. */
static unsigned owner_of(unsigned page)
{
    return page / 4 % OWNERS;
}

static void put(unsigned char *buffer, unsigned page, uint64_t code)
{
    write_code(buffer, gpa_of(page), PAGE, code);
}

static void describe(const char *what, uint64_t code)
{
    if (code == CODE_ZERO)
        printf("%s zero", what);
    else
        printf("%s %s %" PRIu64, what, code & CODE_WRITTEN ? "the guest's write" : "generation", code & ~CODE_WRITTEN);
}

static void wrong(unsigned page, uint64_t wanted, uint64_t first, uint64_t differ, const char *who)
{
    ok(false, "gpa %#" PRIx64 ": %" PRIu64 " of %" PRIu64 " words are wrong, seen by %s", gpa_of(page), differ, WORDS, who);
    printf("    ");
    describe("wanted", wanted);
    printf("; the first wrong word is %#" PRIx64, first);
    for (unsigned word = 0; word < WORDS && first != 0; word++)
        for (unsigned other = 0; other < ALL_PAGES; other++)
            for (uint64_t g = 1; g <= atomic_load(&pages[other].generation) + 1; g++)
                if (first == word_of(gpa_of(other) + word * 8, g))
                    printf(", that is word %u of gpa %#" PRIx64 " in generation %" PRIu64, word, gpa_of(other), g);
    printf("; through the VMM's mapping it is now %#" PRIx64, *(volatile uint64_t *)at(page));
    printf("\n    generation of the source now %" PRIu64 ", seed %" PRIu64 "\n", atomic_load(&pages[page].generation), seed);
    dump_handle(handle);
    _exit(1);
}

static void check_here(unsigned page, uint64_t wanted, const char *who)
{
    bool good = wanted == CODE_ZERO ? holds_zeroes(at(page), PAGE) : holds_content(at(page), gpa_of(page), PAGE, wanted);
    if (!good)
        wrong(page, wanted, *(volatile uint64_t *)at(page), 0, who);
    atomic_fetch_add(&host_checks, 1);
}

static void changing(unsigned first, unsigned count)
{
    for (unsigned i = first; i < first + count; i++)
        atomic_fetch_add(&pages[i].sequence, 1);
}

/* ---- The source ---------------------------------------------------------------------------------------------------- */

static int fill(void *opaque, struct kuf_fill *run)
{
    (void)opaque;
    unsigned first = (unsigned)((uintptr_t)run->memory_opaque * PAGES + run->memory_offset / PAGE);
    unsigned count = (unsigned)(run->len / PAGE), zeroes = 0;
    uint64_t code[RUN_MAX];
    must(count <= RUN_MAX && run->gpa == gpa_of(first), "a run of the slot: %#" PRIx64, run->gpa);
    if (below(4) == 0)
        sched_yield();
    for (unsigned i = 0; i < count; i++) {
        code[i] = source_code(first + i, atomic_load(&pages[first + i].generation));
        zeroes = zeroes == i && code[i] == CODE_ZERO ? i + 1 : zeroes;
    }
    if (zeroes > 0) {
        run->filled = zeroes * PAGE;
        return KUF_FILL_ZERO;
    }
    if (below(4) == 0)
        count = 1 + (unsigned)below(count);
    for (unsigned i = 0; i < count; i++)
        put((unsigned char *)run->buf + i * PAGE, first + i, code[i]);
    run->filled = count * PAGE;
    return KUF_FILL_DONE;
}

static void event(void *opaque, const struct kuf_event *told)
{
    (void)opaque;
    must(told->kind == KUF_EVENT_COMPLETE || told->kind == KUF_EVENT_POPULATED, "event %u at %#" PRIx64 ": %s", told->kind,
         told->gpa, told->text);
}

/* ---- Owners -------------------------------------------------------------------------------------------------------- */

static void discard(unsigned first, unsigned count, bool removed)
{
    changing(first, count);
    for (unsigned i = first; i < first + count; i++) {
        uint64_t old = atomic_fetch_add(&pages[i].generation, 1);
        while (atomic_load(&pages[i].supplying[old % 2]) != 0)
            sched_yield();
    }
    int got = kuf_discard(handle, gpa_of(first), count * PAGE, removed ? KUF_DISCARD_ZERO : KUF_DISCARD_REFILL);
    must(got == 0, "kuf_discard %#" PRIx64 ": %s", gpa_of(first), kuf_error());
    for (unsigned i = first; i < first + count; i++)
        atomic_store(&pages[i].holds, removed ? CODE_ZERO : source_code(i, atomic_load(&pages[i].generation)));
    changing(first, count);
    atomic_fetch_add(&discards, 1);
}

static void give_back(unsigned first, unsigned count)
{
    changing(first, count);
    int got = madvise(at(first), count * PAGE, first < PAGES ? MADV_DONTNEED : MADV_REMOVE);
    must(got == 0, "madvise: %s", strerror(errno));
    for (unsigned i = first; i < first + count; i++)
        atomic_store(&pages[i].holds, CODE_ZERO);
    changing(first, count);
}

/* Discards or gives back some pages of an owner. */
static void renew(unsigned owner)
{
    unsigned first;
    do {
        first = (unsigned)below(ALL_PAGES);
    } while (owner_of(first) != owner);
    unsigned count = 1 + (unsigned)below(4 - first % 4);
    uint64_t how = below(8);
    if (how == 0)
        give_back(first, count);
    else
        discard(first, count, how == 1);
}

/* ---- vCPUs --------------------------------------------------------------------------------------------------------- */

static void vcpu_step(struct vcpu *vcpu)
{
    unsigned page[ORDERS], count = 1 + (unsigned)below(ORDERS);
    uint64_t wanted[ORDERS], sequence[ORDERS];
    bool changes[ALL_PAGES] = {false};
    for (unsigned i = 0; i < count; i++) {
        struct order *order = &vcpu->mailbox->order[i];
        page[i] = (unsigned)below(ALL_PAGES);
        bool own = owner_of(page[i]) == vcpu->index, write = own && below(3) == 0;
        if (write && !changes[page[i]]) {
            changing(page[i], 1);
            changes[page[i]] = true;
        }
        sequence[i] = atomic_load(&pages[page[i]].sequence);
        if (write)
            atomic_store(&pages[page[i]].holds, CODE_WRITTEN | (++vcpu->written * VCPUS + vcpu->index));
        wanted[i] = atomic_load(&pages[page[i]].holds);
        *order = (struct order){.address = gpa_of(page[i]), .write = write};
        if (wanted[i] != CODE_ZERO) {
            /* As word_of(). */
            order->factor = UINT64_C(0x9e3779b97f4a7c15);
            order->summand = wanted[i] * UINT64_C(0xc2b2ae3d27d4eb4f);
        }
    }
    vcpu->mailbox->orders = count;
    vcpu->mailbox->words = WORDS;
    atomic_thread_fence(memory_order_seq_cst);
    while (ioctl(vcpu->fd, KVM_RUN, 0) < 0)
        must(errno == EINTR || errno == EAGAIN, "KVM_RUN of vCPU %u: %s", vcpu->index, strerror(errno));
    must(guest_reports(vcpu->run), "vCPU %u stops with exit reason %u", vcpu->index,
         vcpu->run->exit_reason);
    atomic_thread_fence(memory_order_seq_cst);
    for (unsigned i = 0; i < count; i++) {
        const struct order *order = &vcpu->mailbox->order[i];
        bool own = owner_of(page[i]) == vcpu->index;
        atomic_fetch_add(own ? order->write ? &guest_writes : &guest_checks : &cross_checks, 1);
        if (order->write || order->differ == 0)
            continue;
        if (own || (sequence[i] % 2 == 0 && atomic_load(&pages[page[i]].sequence) == sequence[i]))
            wrong(page[i], wanted[i], order->first, order->differ, own ? "the vCPU that owns it" : "another vCPU");
    }
    for (unsigned i = 0; i < ALL_PAGES; i++)
        if (changes[i])
            changing(i, 1);
    atomic_fetch_add(&steps, 1);
}

static void *vcpu_main(void *argument)
{
    struct vcpu *vcpu = argument;
    while (!atomic_load(&stop)) {
        vcpu_step(vcpu);
        if (below(2) == 0)
            renew(vcpu->index);
        if (below(4) == 0) {
            /* As for KVM_EXIT_MEMORY_FAULT, of any alignment. */
            uint64_t gpa = gpa_of((unsigned)below(ALL_PAGES)) + below(PAGE - 64);
            int got = kuf_vcpu_fault(handle, gpa, 1 + below(64), 0);
            must(got == 0, "kuf_vcpu_fault: %d, %s", got, kuf_error());
        }
    }
    return NULL;
}

/* ---- Other threads of the VMM -------------------------------------------------------------------------------------- */

static void *balloon_main(void *unused)
{
    (void)unused;
    while (!atomic_load(&stop)) {
        renew(VCPUS);
        atomic_fetch_add(&steps, 1);
        if (below(4) == 0)
            nanosleep(&(struct timespec){.tv_nsec = 100000}, NULL);
    }
    return NULL;
}

static void *populate_main(void *unused)
{
    (void)unused;
    while (!atomic_load(&stop)) {
        struct kuf_populate_request request = {.size = sizeof(request), .gpa = KUF_ALL};
        if (below(2)) {
            request.gpa = gpa_of((unsigned)below(ALL_PAGES));
            request.len = (1 + below(32)) * PAGE;
            request.rate = below(2) ? 64 << 20 : 0;
        } else if (below(8) == 0) {
            request = (struct kuf_populate_request){.size = sizeof(request), .flags = KUF_POPULATE_STOP};
        }
        int got = kuf_populate(handle, &request);
        must(got == 0, "kuf_populate: %d, %s", got, kuf_error());
        nanosleep(&(struct timespec){.tv_nsec = (long)below(2000000)}, NULL);
    }
    return NULL;
}

static void *resolve_main(void *unused)
{
    (void)unused;
    static unsigned char bytes[8 * PAGE_MAX];
    while (!atomic_load(&stop)) {
        unsigned first = (unsigned)below(ALL_PAGES), count = 1 + (unsigned)below(8);
        if (first / PAGES != (first + count - 1) / PAGES)
            continue;
        uint64_t generation[8];
        for (unsigned i = 0; i < count; i++) {
            struct page *page = &pages[first + i];
            for (;;) {
                generation[i] = atomic_load(&page->generation);
                atomic_fetch_add(&page->supplying[generation[i] % 2], 1);
                if (atomic_load(&page->generation) == generation[i])
                    break;
                atomic_fetch_sub(&page->supplying[generation[i] % 2], 1);
            }
            put(bytes + i * PAGE, first + i, source_code(first + i, generation[i]));
        }
        for (int twice = 0; twice < 2; twice++) {
            ssize_t got = kuf_resolve(handle, gpa_of(first), bytes, count * PAGE, 0);
            must(got >= 0 && got <= (ssize_t)(count * PAGE), "kuf_resolve: %zd, %s", got, kuf_error());
        }
        for (unsigned i = 0; i < count; i++)
            atomic_fetch_sub(&pages[first + i].supplying[generation[i] % 2], 1);
        nanosleep(&(struct timespec){.tv_nsec = (long)below(500000)}, NULL);
    }
    return NULL;
}

/* Reads guest memory through the VMM's mapping, after kuf_ensure. */
static void *device_main(void *unused)
{
    (void)unused;
    while (!atomic_load(&stop)) {
        unsigned page = (unsigned)below(ALL_PAGES);
        uint64_t before = atomic_load(&pages[page].sequence), wanted = atomic_load(&pages[page].holds);
        int got = kuf_ensure(handle, gpa_of(page), PAGE, -1);
        must(got == 0, "kuf_ensure: %d, %s", got, kuf_error());
        uint64_t copy[WORDS_MAX], differ = 0, first = 0;
        const volatile uint64_t *words = (const volatile uint64_t *)at(page);
        for (unsigned i = 0; i < WORDS; i++)
            copy[i] = words[i];
        atomic_thread_fence(memory_order_seq_cst);
        if (before % 2 != 0 || atomic_load(&pages[page].sequence) != before)
            continue;
        for (unsigned i = 0; i < WORDS; i++)
            if (copy[i] != (wanted == CODE_ZERO ? 0 : word_of(gpa_of(page) + i * 8, wanted))) {
                first = differ++ == 0 ? copy[i] : first;
            }
        if (differ != 0)
            wrong(page, wanted, first, differ, "a device model");
        atomic_fetch_add(&host_checks, 1);
    }
    return NULL;
}

static uint64_t work_done(void)
{
    return atomic_load(&steps) + atomic_load(&host_checks);
}

static void say_where(void)
{
    printf("    seed %" PRIu64 "\n", seed);
    dump_handle(handle);
}

/* ---- The machine --------------------------------------------------------------------------------------------------- */

static void add_slot(unsigned number, uint64_t gpa, void *host, uint64_t length)
{
    struct kvm_userspace_memory_region slot = {
        .slot = number, .guest_phys_addr = gpa, .memory_size = length, .userspace_addr = (uintptr_t)host};
    KVM_CALL(vm, KVM_SET_USER_MEMORY_REGION, &slot);
}

static void add_vcpu(struct vcpu *vcpu, unsigned index)
{
    uint64_t mailbox = MAILBOX + index * 0x1000;
    vcpu->index = index;
    vcpu->mailbox = (struct mailbox *)(low + mailbox);
    vcpu->fd = ioctl(vm, KVM_CREATE_VCPU, (unsigned long)index);
    must(vcpu->fd >= 0, "KVM_CREATE_VCPU: %s", strerror(errno));
    int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    must(size > 0, "KVM_GET_VCPU_MMAP_SIZE");
    run_size = (size_t)size;
    vcpu->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    must(vcpu->run != MAP_FAILED, "mmap of kvm_run: %s", strerror(errno));
    start_guest(kvm, vm, vcpu->fd, mailbox);
}

int main(void)
{
    begin();
    uint64_t seconds = begin_seeded(6, 180);
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        skip("/dev/kvm: %s", strerror(errno));
    vm = ioctl(kvm, KVM_CREATE_VM, 0);
    if (vm < 0)
        skip("KVM_CREATE_VM: %s", strerror(errno));
    needs_feature(KUF_FEATURE_KERNEL_FAULTS, "userfaultfd that serves KVM, for this user");

    low = map_anonymous(LOW);
    memory[0] = map_anonymous(PAGES * PAGE);
    memory[1] = map_shared(PAGES * PAGE, &memory_fd);
    load_guest(low);
    add_slot(0, 0, low, LOW);
    for (unsigned i = 0; i < SLOTS; i++)
        add_slot(1 + i, slot_gpa[i], memory[i], PAGES * PAGE);
    for (unsigned i = 0; i < VCPUS; i++)
        add_vcpu(&vcpus[i], i);
    for (unsigned i = 0; i < ALL_PAGES; i++) {
        atomic_store(&pages[i].generation, 1);
        atomic_store(&pages[i].holds, source_code(i, 1));
    }

    handle = open_with((struct kuf_options){.vm_fd = vm, .fill = fill, .event = event,
                                            .fill_threads = 1 + (uint32_t)below(4),
                                            .demand_run = PAGE << below(8), .populate_run = PAGE << below(5)});
    for (unsigned i = 0; i < SLOTS; i++) {
        struct kuf_memory slot = {.size = sizeof(slot), .gpa = slot_gpa[i],
                                  .len = PAGES * PAGE, .hva = (uintptr_t)memory[i], .fd = i ? memory_fd : 0,
                                  .opaque = (void *)(uintptr_t)i};
        int got = kuf_add_memory(handle, &slot);
        must(got == 0, "kuf_add_memory: %s", got ? kuf_error() : "adds");
    }

    static struct progress_watch progress = {.work = work_done, .describe = say_where, .patience_s = PATIENCE_S};
    start_progress_watch(&progress);
    pthread_t threads[VCPUS + 4];
    unsigned count = 0;
    for (unsigned i = 0; i < VCPUS; i++)
        threads[count++] = start(vcpu_main, &vcpus[i]);
    threads[count++] = start(balloon_main, NULL);
    threads[count++] = start(populate_main, NULL);
    threads[count++] = start(resolve_main, NULL);
    threads[count++] = start(device_main, NULL);
    uint64_t end = now_ns() + seconds * 1000000000;
    while (now_ns() < end)
        sleep_ms(10);
    atomic_store(&stop, true);
    for (unsigned i = 0; i < count; i++)
        pthread_join(threads[i], NULL);

    int got = kuf_close(&handle, KUF_END_POPULATE);
    must(got == 0, "kuf_close: %d, %s", got, got ? kuf_error() : "closes");
    for (unsigned i = 0; i < ALL_PAGES; i++)
        check_here(i, atomic_load(&pages[i].holds), "the VMM at the end");
    end_progress_watch(&progress);
    ok(true, "%" PRIu64 " pages compared by the vCPUs that own them, %" PRIu64 " by others", atomic_load(&guest_checks),
       atomic_load(&cross_checks));
    ok(true, "%" PRIu64 " pages written by the guest, %" PRIu64 " discards, %" PRIu64 " pages compared by the VMM",
       atomic_load(&guest_writes), atomic_load(&discards), atomic_load(&host_checks));
    for (unsigned i = 0; i < VCPUS; i++) {
        munmap(vcpus[i].run, run_size);
        close(vcpus[i].fd);
    }
    close(vm);
    close(kvm);
    for (unsigned i = 0; i < SLOTS; i++)
        munmap(memory[i], PAGES * PAGE);
    munmap(low, LOW);
    close(memory_fd);
    return done();
}

#else

int main(void)
{
    begin();
    skip("this test has no guest for this architecture");
}

#endif
