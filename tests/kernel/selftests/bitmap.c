/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The bitmap of a memslot. */
#include "test.h"

#include <linux/userfaultfd.h>

#define PAGES 200UL
#define SIZE (PAGES * PAGE)
#define WORDS ((PAGES + 63) / 64)

static struct vm vm;
static _Atomic uint64_t *bitmap;

static int toggle(uint32_t flags)
{
	return set_slot(&vm, TEST_SLOT, flags, TEST_GPA, SIZE, vm.mem,
			flags & UF_MEM_USERFAULT ? (void *)bitmap : NULL);
}

static void set_bit(uint64_t page)
{
	atomic_fetch_or(&bitmap[page / 64], 1UL << page % 64);
}

static void clear_bit(uint64_t page)
{
	atomic_fetch_and_explicit(&bitmap[page / 64], ~(1UL << page % 64),
				  memory_order_release);
}

static void set_all(void)
{
	for (size_t i = 0; i < WORDS; i++)
		bitmap[i] = ~0ULL;
}

static void first_touch(void)
{
	uint64_t a = TEST_GPA + 63 * PAGE, b = TEST_GPA + 64 * PAGE, c = TEST_GPA + 199 * PAGE;
	/* mov $0x12345678, %eax; ret */
	static const uint8_t insns[] = { 0xb8, 0x78, 0x56, 0x34, 0x12, 0xc3 };

	doing("first touch", 30);
	set_all();
	CHECK_ERRNO("flag on", toggle(UF_MEM_USERFAULT), 0);
	set_guest(&vm, 0, guest_read, a + 8, 0, 0);
	CHECK("read faults", faults_at(&vm, 0, a));
	CHECK("read faults again", faults_at(&vm, 0, a));
	fill(&vm, a, PAGE);
	clear_bit(63);
	CHECK("read goes on", halts(&vm, 0));
	CHECK_EQ("read content", guest_rax(&vm, 0), pattern64(a + 8));
	set_guest(&vm, 0, guest_write, b + 8, 0, 77);
	CHECK("write faults", faults_at(&vm, 0, b));
	fill(&vm, b, PAGE);
	clear_bit(64);
	CHECK("write goes on", halts(&vm, 0));
	CHECK_EQ("write content", *(uint64_t *)host(&vm, b + 8), 77);
	CHECK("write leaves the rest", is_pattern(host(&vm, b), b, 8) &&
				       is_pattern(host(&vm, b + 16), b + 16, PAGE - 16));
	set_guest(&vm, 0, guest_call, c, 0, 0);
	CHECK("instruction fetch faults", faults_at(&vm, 0, c));
	memcpy(host(&vm, c), insns, sizeof(insns));
	clear_bit(199);
	CHECK("instruction fetch goes on", halts(&vm, 0));
	CHECK_EQ("instruction fetch content", guest_rax(&vm, 0), 0x12345678);

	/* Setting a bit has no effect on mapped pages until the flag is cleared and set. */
	set_bit(63);
	set_guest(&vm, 0, guest_read, a, 0, 0);
	CHECK("setting a bit of a mapped page does nothing", halts(&vm, 0));
	CHECK_ERRNO("flag off", toggle(0), 0);
	set_guest(&vm, 0, guest_read, TEST_GPA, 0, 0);
	CHECK("off: bits do not matter", halts(&vm, 0));
	CHECK_ERRNO("flag on again", toggle(UF_MEM_USERFAULT), 0);
	set_guest(&vm, 0, guest_read, a, 0, 0);
	CHECK("on again: that bit matters", faults_at(&vm, 0, a));
	clear_bit(63);
	CHECK("and can be cleared", halts(&vm, 0));
	set_guest(&vm, 0, guest_read, b, 0, 0);
	CHECK("others are mapped anew", halts(&vm, 0));

	/* The same call may change other flags. */
	set_bit(63);
	CHECK_ERRNO("off, with dirty logging on", toggle(UF_MEM_LOG_DIRTY), 0);
	CHECK_ERRNO("on, with dirty logging off", toggle(UF_MEM_USERFAULT), 0);
	set_guest(&vm, 0, guest_write, a, 0, 1);
	CHECK("faults", faults_at(&vm, 0, a));
	CHECK_ERRNO("dirty logging as well", toggle(UF_MEM_USERFAULT | UF_MEM_LOG_DIRTY), 0);
	CHECK("faults with dirty logging", faults_at(&vm, 0, a));
	clear_bit(63);
	CHECK("goes on with dirty logging", halts(&vm, 0));
	unsigned long dirty[WORDS] = { 0 };
	struct kvm_dirty_log log = { .slot = TEST_SLOT, .dirty_bitmap = dirty };
	MUST(ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log));
	CHECK_EQ("and is logged", dirty[0], 1UL << 63);
	CHECK_ERRNO("both off", toggle(0), 0);

	/* Switch directly to another bitmap, with bits set for mapped pages. */
	CHECK_ERRNO("on", toggle(UF_MEM_USERFAULT), 0);
	_Atomic uint64_t *old = bitmap;
	bitmap = anon(PAGE);
	set_all();
	CHECK_ERRNO("another bitmap", toggle(UF_MEM_USERFAULT), 0);
	set_guest(&vm, 0, guest_read, a, 0, 0);
	CHECK("the other one counts", faults_at(&vm, 0, a));
	clear_bit(63);
	CHECK("and can be cleared", halts(&vm, 0));
	munmap((void *)old, PAGE);

	CHECK("all this without the eventfd", vm.event < 0);
}

static bool cpu_has(const char *flag)
{
	FILE *f = fopen("/proc/cpuinfo", "r");
	char line[4096], word[32];
	bool found = false;

	snprintf(word, sizeof(word), " %s ", flag);
	while (f && fgets(line, sizeof(line), f)) {
		if (strncmp(line, "flags", 5))
			continue;
		line[strcspn(line, "\n")] = ' ';
		found = strstr(line, word);
		break;
	}
	if (f)
		fclose(f);
	return found;
}

static void refused(void)
{
	struct kvm_userspace_memory_region v1 = {
		.slot = TEST_SLOT, .flags = UF_MEM_USERFAULT, .guest_phys_addr = TEST_GPA,
		.memory_size = SIZE, .userspace_addr = (uintptr_t)vm.mem,
	};
	/* The highest possible end of userspace: the bitmap may reach up to it. */
	uint64_t end = (cpu_has("la57") ? 1UL << 56 : 1UL << 47) - PAGE;
	uint64_t beyond = 0x8000000000000000UL;

	doing("refused", 30);
	MUST(toggle(0));
	CHECK_ERRNO("flag with the first ioctl",
		    ioctl(vm.fd, KVM_SET_USER_MEMORY_REGION, &v1), EINVAL);
	CHECK_ERRNO("unknown flag", toggle(1 << 4), EINVAL);
	CHECK_ERRNO("bitmap in the kernel",
		    set_slot(&vm, TEST_SLOT, UF_MEM_USERFAULT, TEST_GPA, SIZE, vm.mem,
			     (void *)0xffff888000000000UL), EINVAL);
	CHECK_ERRNO("bitmap that is non-canonical",
		    set_slot(&vm, TEST_SLOT, UF_MEM_USERFAULT, TEST_GPA, SIZE, vm.mem,
			     (void *)beyond), EINVAL);
	CHECK_ERRNO("bitmap that wraps around",
		    set_slot(&vm, TEST_SLOT, UF_MEM_USERFAULT, TEST_GPA, SIZE, vm.mem,
			     (void *)-8UL), EINVAL);
	if (cpu_has("lam"))
		skip("bitmap that ends a word too late", "address bits are ignored");
	else
		CHECK_ERRNO("bitmap that ends a word too late",
			    set_slot(&vm, TEST_SLOT, UF_MEM_USERFAULT, TEST_GPA, SIZE,
				     vm.mem, (void *)(end - (WORDS - 1) * 8)), EINVAL);
	CHECK_ERRNO("bitmap that just ends in time",
		    set_slot(&vm, TEST_SLOT, UF_MEM_USERFAULT, TEST_GPA, SIZE, vm.mem,
			     (void *)(end - WORDS * 8)), 0);
	CHECK_ERRNO("off again", toggle(0), 0);
	set_guest(&vm, 0, guest_read, TEST_GPA, 0, 0);
	CHECK("slot is as it was", halts(&vm, 0));
	CHECK_ERRNO("garbage in the field without the flag",
		    set_slot(&vm, TEST_SLOT, 0, TEST_GPA, SIZE, vm.mem, (void *)-8UL), 0);
	CHECK_ERRNO("moving with the flag on is a move", toggle(UF_MEM_USERFAULT), 0);
	CHECK_ERRNO("move", set_slot(&vm, TEST_SLOT, UF_MEM_USERFAULT, TEST_GPA + HUGE, SIZE,
				     vm.mem, (void *)bitmap), 0);
	set_all();
	set_guest(&vm, 0, guest_read, TEST_GPA + HUGE, 0, 0);
	CHECK("bit 0 is where the slot begins", faults_at(&vm, 0, TEST_GPA + HUGE));
	CHECK_ERRNO("move back", set_slot(&vm, TEST_SLOT, UF_MEM_USERFAULT, TEST_GPA, SIZE,
					  vm.mem, (void *)bitmap), 0);
	CHECK_ERRNO("off", toggle(0), 0);
}

static void bad_pointer(void)
{
	void *saved = (void *)bitmap;
	void *none = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	doing("bad pointer", 30);
	bitmap = NULL;
	CHECK_ERRNO("null bitmap is accepted", toggle(UF_MEM_USERFAULT), 0);
	set_guest(&vm, 0, guest_read, TEST_GPA, 0, 0);
	CHECK_EQ("null bitmap: bare EFAULT", run_vcpu(&vm, 0), -EFAULT);
	CHECK("null bitmap: no exit reason", vm.run[0]->exit_reason != UF_EXIT_MEMORY_FAULT);
	bitmap = none;
	CHECK_ERRNO("unreadable bitmap is accepted", toggle(UF_MEM_USERFAULT), 0);
	CHECK_EQ("unreadable bitmap: bare EFAULT", run_vcpu(&vm, 0), -EFAULT);
	MUST(mprotect(none, PAGE, PROT_READ));
	CHECK("readable again", halts(&vm, 0));
	munmap(none, PAGE);
	set_guest(&vm, 0, guest_read, TEST_GPA + PAGE, 0, 0);
	CHECK_EQ("unmapped bitmap: bare EFAULT", run_vcpu(&vm, 0), -EFAULT);
	set_guest(&vm, 0, guest_read, TEST_GPA, 0, 0);
	CHECK("what is mapped does not need it", halts(&vm, 0));
	bitmap = saved;
	CHECK_ERRNO("off", toggle(0), 0);
}

/* KVM's own access ignores the bitmap; userfaultfd catches it. */
static int uffd;
static _Atomic int uffd_faults;

static void *uffd_main(void *arg)
{
	struct uffd_msg msg;
	uint8_t page[PAGE];

	(void)arg;
	while (read(uffd, &msg, sizeof(msg)) == sizeof(msg)) {
		uint64_t at = msg.arg.pagefault.address & -PAGE;
		uint64_t gpa = TEST_GPA + (at - (uintptr_t)vm.mem);
		struct uffdio_copy copy = {
			.dst = at, .src = (uintptr_t)page, .len = PAGE,
		};

		uffd_faults++;
		for (size_t i = 0; i < PAGE; i++)
			page[i] = pattern(gpa + i);
		clear_bit((gpa - TEST_GPA) / PAGE);
		if (ioctl(uffd, UFFDIO_COPY, &copy) && copy.copy != -EEXIST)
			DIE("UFFDIO_COPY: %s", strerror(errno));
	}
	return NULL;
}

static void with_userfaultfd(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	uint64_t a = TEST_GPA + 10 * PAGE;
	uint8_t out[64], page[PAGE];
	struct runner r = { .io = out, .io_max = 16 };
	pthread_t t;

	doing("userfaultfd", 60);
	uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
	if (uffd < 0) {
		skip("userfaultfd", strerror(errno));
		return;
	}
	MUST(ioctl(uffd, UFFDIO_API, &api));
	MUST(madvise(vm.mem, SIZE, MADV_DONTNEED));
	reg.range.start = (uintptr_t)vm.mem;
	reg.range.len = SIZE;
	MUST(ioctl(uffd, UFFDIO_REGISTER, &reg));
	set_all();
	MUST(toggle(UF_MEM_USERFAULT));
	pthread_create(&t, NULL, uffd_main, NULL);

	set_guest(&vm, 0, guest_outsb, a, 16, 0);
	runner_start(&r, &vm, 0);
	CHECK_EQ("KVM's own access goes on", runner_join(&r), KVM_EXIT_HLT);
	CHECK("with the right content", r.io_len == 16 && is_pattern(out, a, 16));
	CHECK_EQ("by userfaultfd", uffd_faults, 1);

	/* A vCPU exits instead, and its own thread installs the page. */
	set_guest(&vm, 0, guest_read, a + PAGE, 0, 0);
	CHECK("a vCPU leaves", faults_at(&vm, 0, a + PAGE));
	struct uffdio_copy copy = {
		.dst = (uintptr_t)host(&vm, a + PAGE), .src = (uintptr_t)page, .len = PAGE,
		.mode = UFFDIO_COPY_MODE_DONTWAKE,
	};
	for (size_t i = 0; i < PAGE; i++)
		page[i] = pattern(a + PAGE + i);
	MUST(ioctl(uffd, UFFDIO_COPY, &copy));
	clear_bit(11);
	CHECK("and goes on", halts(&vm, 0));
	CHECK_EQ("with the right content", guest_rax(&vm, 0), pattern64(a + PAGE));
	CHECK_EQ("without userfaultfd", uffd_faults, 1);

	/* The bit is clear but the page is absent: userfaultfd catches the access. */
	clear_bit(12);
	set_guest(&vm, 0, guest_read, a + 2 * PAGE, 0, 0);
	CHECK("bit cleared too early", halts(&vm, 0));
	CHECK_EQ("content", guest_rax(&vm, 0), pattern64(a + 2 * PAGE));
	CHECK_EQ("by userfaultfd then", uffd_faults, 2);
	MUST(toggle(0));
}

/* Several vCPUs fault on the same and on different pages, without synchronisation. */
struct worker {
	pthread_t t;
	int cpu;
	unsigned int seed, faults;
	bool good;
};

static _Atomic uint8_t state[PAGES]; /* 0 absent, 1 being filled, 2 present */

static void *worker_main(void *arg)
{
	struct worker *w = arg;

	w->good = true;
	for (int i = 0; i < 300; i++) {
		w->seed = w->seed * 1103515245 + 12345;
		uint64_t page = w->seed / 65536 % PAGES;
		uint64_t gpa = TEST_GPA + page * PAGE;
		int e;

		set_guest(&vm, w->cpu, guest_read, gpa, 0, 0);
		while ((e = run_vcpu(&vm, w->cpu)) == UF_EXIT_MEMORY_FAULT) {
			uint8_t absent = 0;

			w->faults++;
			if (memory_fault(&vm, w->cpu).gpa != gpa)
				w->good = false;
			if (atomic_compare_exchange_strong(&state[page], &absent, 1)) {
				fill(&vm, gpa, PAGE);
				state[page] = 2;
				clear_bit(page);
			} else {
				sched_yield();
			}
		}
		if (e != KVM_EXIT_HLT || guest_rax(&vm, w->cpu) != pattern64(gpa))
			w->good = false;
	}
	return NULL;
}

static void many(void)
{
	struct worker w[4];
	bool good = true;
	unsigned int faults = 0;

	doing("many", 120);
	for (int round = 0; round < 3; round++) {
		MUST(madvise(vm.mem, SIZE, MADV_DONTNEED));
		memset((void *)state, 0, sizeof(state));
		set_all();
		MUST(toggle(UF_MEM_USERFAULT));
		for (int i = 0; i < 4; i++) {
			w[i] = (struct worker){ .cpu = i, .seed = round * 4 + i };
			pthread_create(&w[i].t, NULL, worker_main, &w[i]);
		}
		for (int i = 0; i < 4; i++) {
			pthread_join(w[i].t, NULL);
			good = good && w[i].good;
			faults += w[i].faults;
		}
		MUST(toggle(0));
	}
	dprintf(1, "# %u faults\n", faults);
	CHECK("many vCPUs, each with the right content", good);
}

int main(void)
{
	doing("create", 20);
	bitmap = anon(PAGE);
	vm_create(&vm, SIZE, 4);
	first_touch();
	refused();
	bad_pointer();
	many();
	with_userfaultfd();
	doing("destroy", 20);
	vm_destroy(&vm);
	return finish();
}
