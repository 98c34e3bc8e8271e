/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Checks that each print a line, a watchdog, and a small virtual machine.  All
 * functions are static in this header, so that each test is one file.
 */
#ifndef KUF_TEST_H
#define KUF_TEST_H

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "uapi.h"

#define UNUSED __attribute__((unused))
#define PAGE 4096UL
#define HUGE (2UL << 20)

static const char *now_doing = "start";
static unsigned int nr_failed;

/* ---- checks ---- */

static UNUSED void report(bool good, const char *name, const char *fmt, ...)
	__attribute__((format(printf, 3, 4)));

static UNUSED void report(bool good, const char *name, const char *fmt, ...)
{
	char why[256];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(why, sizeof(why), fmt, ap);
	va_end(ap);

	/* Print with one call, because threads and children print too. */
	if (good)
		dprintf(1, "ok %s\n", name);
	else
		dprintf(1, "not ok %s: %s\n", name, why);
	nr_failed += !good;
}

/* Ends a test that cannot continue. */
#define DIE(...)                                            \
	do {                                                \
		report(false, now_doing, __VA_ARGS__);      \
		_exit(1);                                   \
	} while (0)

#define CHECK(name, cond) report(cond, name, "line %d: %s (errno %d)", __LINE__, #cond, errno)

#define CHECK_EQ(name, a, b)                                                     \
	do {                                                                     \
		uint64_t a_ = (uint64_t)(a), b_ = (uint64_t)(b);                 \
		report(a_ == b_, name, "line %d: %s is %#" PRIx64 ", not %#" PRIx64, \
		       __LINE__, #a, a_, b_);                                    \
	} while (0)

#define CHECK_ERRNO(name, call, want)                                           \
	do {                                                                    \
		errno = 0;                                                      \
		long r_ = (call);                                               \
		int e_ = r_ < 0 ? errno : 0;                                    \
		report(e_ == (want), name, "line %d: errno %d, not %d", __LINE__, \
		       e_, (want));                                             \
	} while (0)

static UNUSED void skip(const char *name, const char *why)
{
	dprintf(1, "ok %s # SKIP %s\n", name, why);
}

#define MUST(call)                                                       \
	({                                                               \
		long r_ = (long)(call);                                  \
		if (r_ < 0)                                              \
			DIE("line %d: %s: %s", __LINE__, #call, strerror(errno)); \
		r_;                                                      \
	})

static UNUSED int finish(void)
{
	return nr_failed ? 1 : 0;
}

/* ---- the watchdog ---- */

static void watchdog_bark(int sig)
{
	(void)sig;
	dprintf(1, "not ok %s: hangs\n", now_doing);
	_exit(1);
}

/* Names the next part of the test, and limits it to @seconds. */
static UNUSED void doing(const char *what, unsigned int seconds)
{
	static bool armed;

	if (!armed) {
		signal(SIGALRM, watchdog_bark);
		armed = true;
	}
	now_doing = what;
	/* The debug kernel is an order of magnitude slower. */
	alarm(seconds * 4);
}

static UNUSED void sleep_ms(unsigned int ms)
{
	struct timespec ts = { ms / 1000, ms % 1000 * 1000000L };

	while (nanosleep(&ts, &ts) && errno == EINTR)
		;
}

static UNUSED double now_s(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

/* Returns a thread's scheduler state: 'D', 'S'... */
static UNUSED char thread_state(pid_t tid)
{
	char path[64], buf[512], *p;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/self/task/%d/stat", tid);
	fd = open(path, O_RDONLY);
	if (fd < 0)
		return 0;
	n = read(fd, buf, sizeof(buf) - 1);
	close(fd);
	if (n <= 0)
		return 0;
	buf[n] = 0;
	p = strrchr(buf, ')');
	return p ? p[2] : 0;
}

/* ---- the virtual machine ---- */

/*
 * Low memory: page tables that map the first GiB onto itself, the guest's
 * code and a stack.  The memory that tests play with begins at TEST_GPA.
 */
#define LOW_SIZE 0x200000UL
#define PML4_GPA 0x1000UL
#define PDPT_GPA 0x2000UL
#define PD_GPA 0x3000UL
#define CODE_GPA 0x10000UL
#define STACK_GPA 0x20000UL
#define GDT_GPA 0x4000UL
#define IDT_GPA 0x5000UL
#define TEST_GPA 0x200000UL
#define TEST_GFN (TEST_GPA / PAGE)
#define LOW_SLOT 0
#define TEST_SLOT 1
#define MAX_VCPUS 256
#define PORT 0x10
#define EXCEPTION_PORT 0x99

/* All routines end with hlt.  rsi is the address, rcx the count, rax the value. */
extern char guest_start[], guest_end[];
extern char guest_read[], guest_write[], guest_call[], guest_outsb[], guest_insb[],
	guest_touch[], guest_wrmsr[], guest_nop[], guest_exceptions[];

__asm__(".pushsection .rodata\n"
    "guest_start:\n"
    "guest_read:\n"
    "	mov (%rsi), %rax\n"
    "	hlt\n"
    "guest_write:\n"
    "	mov %rax, (%rsi)\n"
    "	hlt\n"
    "guest_call:\n"
    "	call *%rsi\n"
    "	hlt\n"
    "guest_outsb:\n"
    "	cld\n"
    "	rep outsb\n"
    "	hlt\n"
    "guest_insb:\n"
    "	cld\n"
    "	mov %rsi, %rdi\n"
    "	rep insb\n"
    "	hlt\n"
    "guest_touch:\n"		/* reads a byte of each page, the sum in rax */
    "	xor %eax, %eax\n"
    "1:	movzbl (%rsi), %ebx\n"
    "	add %rbx, %rax\n"
    "	add $4096, %rsi\n"
    "	dec %rcx\n"
    "	jnz 1b\n"
    "	hlt\n"
    "guest_wrmsr:\n"
    "	wrmsr\n"
    "guest_nop:\n"
    "	hlt\n"
    /*
     * An unexpected exception: vector in rax, error code (or rip) in rdx, rip
     * (or cs) in rsi, cr2 in rcx.
     */
    "	.balign 16\n"
    "guest_exceptions:\n"
    "	vector = 0\n"
    "	.rept 32\n"
    "	.balign 16\n"
    "	mov $vector, %eax\n"
    "	jmp 1f\n"
    "	vector = vector + 1\n"
    "	.endr\n"
    "1:	mov %cr2, %rcx\n"
    "	mov (%rsp), %rdx\n"
    "	mov 8(%rsp), %rsi\n"
    "	out %al, $0x99\n"
    "	hlt\n"
    "guest_end:\n"
    ".popsection\n");

struct vm {
	int kvm, fd, event;
	uint8_t *low, *mem;
	size_t size;
	int nr_vcpus;
	int vcpu[MAX_VCPUS];
	struct kvm_run *run[MAX_VCPUS];
};

static UNUSED uint64_t code(const char *label)
{
	return CODE_GPA + (uint64_t)(label - guest_start);
}

static UNUSED int set_slot(struct vm *vm, uint32_t slot, uint32_t flags, uint64_t gpa,
			   uint64_t size, void *mem, void *bitmap)
{
	struct uf_memory_region2 r = {
		.slot = slot,
		.flags = flags,
		.guest_phys_addr = gpa,
		.memory_size = size,
		.userspace_addr = (uintptr_t)mem,
		.userfault_bitmap = (uintptr_t)bitmap,
	};

	return ioctl(vm->fd, UF_SET_USER_MEMORY_REGION2, &r);
}

static UNUSED int set_attr(struct vm *vm, uint64_t gpa, uint64_t size, uint64_t attributes)
{
	struct uf_memory_attributes a = {
		.address = gpa,
		.size = size,
		.attributes = attributes,
	};

	return ioctl(vm->fd, UF_SET_MEMORY_ATTRIBUTES, &a);
}

static UNUSED void mark(struct vm *vm, uint64_t gpa, uint64_t size)
{
	MUST(set_attr(vm, gpa, size, UF_ATTR_USERFAULT));
}

static UNUSED void unmark(struct vm *vm, uint64_t gpa, uint64_t size)
{
	MUST(set_attr(vm, gpa, size, 0));
}

static UNUSED int userfault_cap(struct vm *vm, uint64_t arg0, uint64_t arg1, uint32_t flags)
{
	struct kvm_enable_cap cap = {
		.cap = UF_CAP_USERFAULT,
		.flags = flags,
		.args = { arg0, arg1 },
	};

	return ioctl(vm->fd, KVM_ENABLE_CAP, &cap);
}

static UNUSED void enable(struct vm *vm)
{
	vm->event = MUST(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
	MUST(userfault_cap(vm, UF_ENABLE, vm->event, 0));
}

static UNUSED void *anon(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		DIE("mmap: %s", strerror(errno));
	return p;
}

static UNUSED void add_vcpu(struct vm *vm)
{
	int i = vm->nr_vcpus++;
	long size = MUST(ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[128];
	} cpuid = { .head.nent = 128 };

	vm->vcpu[i] = MUST(ioctl(vm->fd, KVM_CREATE_VCPU, (unsigned long)i));
	vm->run[i] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vm->vcpu[i], 0);
	if (vm->run[i] == MAP_FAILED)
		DIE("mmap of kvm_run: %s", strerror(errno));
	MUST(ioctl(vm->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid.head));
	MUST(ioctl(vm->vcpu[i], KVM_SET_CPUID2, &cpuid.head));
}

/* With @mem NULL the test memory is new anonymous memory. */
static UNUSED void vm_create_type(struct vm *vm, unsigned long type, size_t size, void *mem,
				  int vcpus)
{
	uint64_t *pml4, *pdpt, *pd;

	memset(vm, 0, sizeof(*vm));
	vm->event = -1;
	vm->kvm = MUST(open("/dev/kvm", O_RDWR | O_CLOEXEC));
	vm->fd = MUST(ioctl(vm->kvm, KVM_CREATE_VM, type));
	vm->low = anon(LOW_SIZE);
	vm->mem = mem ? mem : anon(size);
	vm->size = size;

	pml4 = (uint64_t *)(vm->low + PML4_GPA);
	pdpt = (uint64_t *)(vm->low + PDPT_GPA);
	pd = (uint64_t *)(vm->low + PD_GPA);
	pml4[0] = PDPT_GPA | 0x7;
	pdpt[0] = PD_GPA | 0x7;
	for (uint64_t n = 0; n < 512; n++)
		pd[n] = n * HUGE | 0xe7; /* accessed, dirty, huge */
	memcpy(vm->low + CODE_GPA, guest_start, guest_end - guest_start);

	((uint64_t *)(vm->low + GDT_GPA))[1] = 0x00af9b000000ffff; /* code */
	((uint64_t *)(vm->low + GDT_GPA))[2] = 0x00cf93000000ffff; /* data */
	for (uint64_t n = 0; n < 32; n++) {
		uint64_t at = code(guest_exceptions) + n * 16;
		uint64_t *gate = (uint64_t *)(vm->low + IDT_GPA) + n * 2;

		gate[0] = (at & 0xffff) | 8 << 16 | 0x8e00ULL << 32 | (at >> 16 & 0xffff) << 48;
		gate[1] = at >> 32;
	}

	MUST(set_slot(vm, LOW_SLOT, 0, 0, LOW_SIZE, vm->low, NULL));
	if (size)
		MUST(set_slot(vm, TEST_SLOT, 0, TEST_GPA, size, vm->mem, NULL));
	while (vm->nr_vcpus < vcpus)
		add_vcpu(vm);
}

static UNUSED void vm_create(struct vm *vm, size_t size, int vcpus)
{
	vm_create_type(vm, 0, size, NULL, vcpus);
}

static UNUSED void vm_destroy(struct vm *vm)
{
	long size = ioctl(vm->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);

	for (int i = 0; i < vm->nr_vcpus; i++) {
		munmap(vm->run[i], size);
		close(vm->vcpu[i]);
	}
	close(vm->fd);
	close(vm->kvm);
	if (vm->event >= 0)
		close(vm->event);
	munmap(vm->low, LOW_SIZE);
	munmap(vm->mem, vm->size);
}

static UNUSED void set_guest(struct vm *vm, int cpu, const char *label, uint64_t rsi,
			     uint64_t rcx, uint64_t rax)
{
	struct kvm_segment cs = {
		.limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .s = 1,
		.l = 1, .g = 1,
	}, ds = {
		.limit = 0xffffffff, .selector = 16, .type = 3, .present = 1, .s = 1,
		.db = 1, .g = 1,
	};
	struct kvm_sregs s;
	struct kvm_regs r = {
		.rip = code(label),
		.rflags = 2,
		.rsp = STACK_GPA + (uint64_t)(cpu + 1) * 1024,
		.rsi = rsi,
		.rcx = rcx,
		.rax = rax,
		.rdx = PORT,
	};

	MUST(ioctl(vm->vcpu[cpu], KVM_GET_SREGS, &s));
	s.cs = cs;
	s.ds = s.es = s.fs = s.gs = s.ss = ds;
	s.cr0 = 0x80050033;
	s.cr3 = PML4_GPA;
	s.cr4 = 0x20;
	s.efer = 0x500;
	s.gdt.base = GDT_GPA;
	s.gdt.limit = 23;
	s.idt.base = IDT_GPA;
	s.idt.limit = 32 * 16 - 1;
	MUST(ioctl(vm->vcpu[cpu], KVM_SET_SREGS, &s));
	MUST(ioctl(vm->vcpu[cpu], KVM_SET_REGS, &r));
}

static UNUSED uint64_t guest_rax(struct vm *vm, int cpu)
{
	struct kvm_regs r;

	MUST(ioctl(vm->vcpu[cpu], KVM_GET_REGS, &r));
	return r.rax;
}

/*
 * Calls KVM_RUN until it exits.  Returns the exit reason, or the negative errno;
 * for a memory fault it returns the exit reason only with the matching errno.
 */
static UNUSED int run_vcpu(struct vm *vm, int cpu)
{
	int r;

	do {
		r = ioctl(vm->vcpu[cpu], KVM_RUN, 0);
	} while (r < 0 && errno == EINTR);

	if (!r && vm->run[cpu]->exit_reason == KVM_EXIT_IO &&
	    vm->run[cpu]->io.port == EXCEPTION_PORT) {
		struct kvm_regs regs;

		MUST(ioctl(vm->vcpu[cpu], KVM_GET_REGS, &regs));
		dprintf(1, "# vCPU %d: exception %lld, stack %#llx %#llx, cr2 %#llx\n", cpu,
			regs.rax, regs.rdx, regs.rsi, regs.rcx);
		return -1000;
	}

	if (r < 0) {
		if (errno == EFAULT && vm->run[cpu]->exit_reason == UF_EXIT_MEMORY_FAULT)
			return UF_EXIT_MEMORY_FAULT;
		return -errno;
	}
	return vm->run[cpu]->exit_reason;
}

static UNUSED struct uf_exit_memory_fault memory_fault(struct vm *vm, int cpu)
{
	struct uf_exit_memory_fault f;

	memcpy(&f, (char *)vm->run[cpu] + 32, sizeof(f));
	return f;
}

/* Whether a vCPU exits for a marked page. */
static UNUSED bool faults_at(struct vm *vm, int cpu, uint64_t gpa)
{
	int r = run_vcpu(vm, cpu);
	struct uf_exit_memory_fault f = memory_fault(vm, cpu);

	if (r == UF_EXIT_MEMORY_FAULT && f.gpa == gpa && f.size == PAGE &&
	    f.flags == UF_EXIT_FLAG_USERFAULT)
		return true;
	dprintf(1, "# run %d, flags %#" PRIx64 " gpa %#" PRIx64 " size %#" PRIx64
		   " instead of gpa %#" PRIx64 "\n", r, f.flags, f.gpa, f.size, gpa);
	return false;
}

static UNUSED bool halts(struct vm *vm, int cpu)
{
	int r = run_vcpu(vm, cpu);

	if (r == KVM_EXIT_HLT)
		return true;
	dprintf(1, "# run %d instead of hlt\n", r);
	return false;
}

/* ---- a vCPU on its own thread that runs until it halts ---- */

struct runner {
	struct vm *vm;
	int cpu;
	pthread_t thread;
	_Atomic pid_t tid;
	_Atomic bool done;
	int result;		/* KVM_EXIT_HLT if all went well */
	uint8_t *io;		/* the guest's output */
	size_t io_len, io_max;
	uint8_t fill;		/* the guest's input */
};

static void *runner_main(void *arg)
{
	struct runner *r = arg;
	struct kvm_run *run = r->vm->run[r->cpu];

	r->tid = (pid_t)syscall(SYS_gettid);
	for (;;) {
		r->result = run_vcpu(r->vm, r->cpu);
		if (r->result != KVM_EXIT_IO)
			break;

		uint8_t *data = (uint8_t *)run + run->io.data_offset;
		size_t n = (size_t)run->io.size * run->io.count;

		if (run->io.direction == KVM_EXIT_IO_IN) {
			memset(data, r->fill, n);
			continue;
		}
		for (size_t i = 0; i < n && r->io_len < r->io_max; i++)
			r->io[r->io_len++] = data[i];
	}
	r->done = true;
	return NULL;
}

static UNUSED void runner_start(struct runner *r, struct vm *vm, int cpu)
{
	r->vm = vm;
	r->cpu = cpu;
	r->tid = 0;
	r->done = false;
	r->io_len = 0;
	if (pthread_create(&r->thread, NULL, runner_main, r))
		DIE("pthread_create");
}

static UNUSED int runner_join(struct runner *r)
{
	pthread_join(r->thread, NULL);
	return r->result;
}

/* ---- the resolver's side ---- */

static UNUSED bool wait_event(struct vm *vm, int ms)
{
	struct pollfd p = { .fd = vm->event, .events = POLLIN };

	return poll(&p, 1, ms) == 1;
}

static UNUSED uint64_t read_event(struct vm *vm)
{
	uint64_t n;

	return read(vm->event, &n, sizeof(n)) == sizeof(n) ? n : 0;
}

/* Waits for @n signals in total. */
static UNUSED bool wait_events(struct vm *vm, uint64_t n)
{
	uint64_t got = 0;

	while (got < n) {
		if (!wait_event(vm, 20000))
			return false;
		got += read_event(vm);
	}
	return got == n;
}

static UNUSED int read_fault(struct vm *vm, uint64_t *gfn)
{
	struct uf_fault f = { .gfn = ~0ULL };
	int r = ioctl(vm->fd, UF_READ_USERFAULT, &f);

	*gfn = f.gfn;
	return r;
}

static UNUSED bool no_fault_queued(struct vm *vm)
{
	uint64_t gfn;

	return read_fault(vm, &gfn) < 0 && errno == ENOENT;
}

/* A pattern that differs from page to page and from byte to byte. */
static UNUSED uint8_t pattern(uint64_t gpa)
{
	uint64_t x = gpa * 0x9e3779b97f4a7c15ULL;

	return (uint8_t)(x >> 56 ^ x >> 40);
}

static UNUSED uint8_t *host(struct vm *vm, uint64_t gpa)
{
	return vm->mem + (gpa - TEST_GPA);
}

static UNUSED void fill(struct vm *vm, uint64_t gpa, size_t n)
{
	for (size_t i = 0; i < n; i++)
		host(vm, gpa)[i] = pattern(gpa + i);
}

static UNUSED bool is_pattern(const uint8_t *p, uint64_t gpa, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (p[i] != pattern(gpa + i))
			return false;
	return true;
}

static UNUSED uint64_t pattern64(uint64_t gpa)
{
	uint64_t v = 0;

	for (int i = 7; i >= 0; i--)
		v = v << 8 | pattern(gpa + i);
	return v;
}

/* Whether nested paging is on; the capability with the same number as userfault tells. */
static UNUSED bool has_tdp(struct vm *vm)
{
	return ioctl(vm->kvm, KVM_CHECK_EXTENSION, UF_CAP_USERFAULT) > 0;
}

/* ---- statistics of the VM, e.g. pages_2m ---- */

static UNUSED int64_t vm_stat(struct vm *vm, const char *name)
{
	struct kvm_stats_header h;
	int fd = (int)MUST(ioctl(vm->fd, KVM_GET_STATS_FD, NULL));
	int64_t value = -1;

	MUST(pread(fd, &h, sizeof(h), 0));
	for (uint32_t i = 0; i < h.num_desc; i++) {
		char buf[sizeof(struct kvm_stats_desc) + 256];
		struct kvm_stats_desc *d = (struct kvm_stats_desc *)buf;
		size_t len = sizeof(*d) + h.name_size;

		MUST(pread(fd, buf, len, h.desc_offset + i * len));
		if (!strcmp(buf + sizeof(*d), name))
			MUST(pread(fd, &value, sizeof(value), h.data_offset + d->offset));
	}
	close(fd);
	return value;
}

#endif
