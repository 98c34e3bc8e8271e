/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Each kind of first touch of a page, by the guest and by KVM for the guest. */
#include "async.h"

static struct vm vm;
static struct source source;
static struct kuf *kuf;
static struct worker w;

#define PAGES 64

static void fresh(int vcpus)
{
	vm_create(&vm, PAGES * PAGE, vcpus);
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm, &source, 0);
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
}

static void end(void)
{
	close_kuf(kuf, KUF_END_POISON);
	CHECK_EQ("callbacks are released once", source.released, 1);
	vm_destroy(&vm);
}

static void by_read(void)
{
	uint64_t gpa = TEST_GPA + PAGE + 0x120;

	doing("read", 30);
	set_guest(&vm, 0, guest_read, gpa, 0, 0);
	CHECK_EQ("read: goes on", run_here(&w, &vm, kuf, 0), KVM_EXIT_HLT);
	CHECK_EQ("read: value", guest_rax(&vm, 0), content64(gpa, 0));
	CHECK_EQ("read: left KVM_RUN once", w.exits, 1);
	CHECK_EQ("read: filled once", fills_of(&source, gpa), 1);
	CHECK("read: the whole page", has_content(host(&vm, gpa & -PAGE), gpa & -PAGE, PAGE, 0));
	CHECK_EQ("read: filled in place", source.not_in_place, 0);
	CHECK("read: on demand", source.flags_seen & KUF_RUN_DEMAND);
	CHECK_EQ("read: no other page", progress_of(kuf, TEST_GPA).present, PAGE);
	CHECK("read: again", guest_reads(&vm, kuf, 0, gpa, content64(gpa, 0)));
	CHECK_EQ("read: once is enough", fills_of(&source, gpa), 1);
	CHECK_EQ("read: counted", stats_of(kuf).vcpu_faults, 1);
	CHECK_EQ("read: nothing of it in KVM's queue", stats_of(kuf).faults, 0);
}

static void by_write(void)
{
	uint64_t gpa = TEST_GPA + 2 * PAGE + 0x208, value = 0x0123456789abcdef;

	doing("write", 30);
	set_guest(&vm, 0, guest_write, gpa, 0, value);
	CHECK_EQ("write: goes on", run_here(&w, &vm, kuf, 0), KVM_EXIT_HLT);
	CHECK_EQ("write: filled once", fills_of(&source, gpa), 1);
	CHECK("write: is there", !memcmp(host(&vm, gpa), &value, 8));
	CHECK("write: around it what was filled",
	      has_content(host(&vm, gpa & -PAGE), gpa & -PAGE, 0x208, 0) &&
	      has_content(host(&vm, gpa + 8), gpa + 8, PAGE - 0x210, 0));
}

static void by_fetch(void)
{
	/* mov $0x1122334455667788, %rax; ret */
	static const uint8_t code_bytes[] = { 0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22,
					      0x11, 0xc3 };
	static uint8_t image[PAGES * PAGE];
	uint64_t gpa = TEST_GPA + 3 * PAGE + 0xff8;	/* continues in the next page */

	doing("fetch", 30);
	memset(image, 0xcc, sizeof(image));
	memcpy(image + (gpa - TEST_GPA), code_bytes, sizeof(code_bytes));
	source.image = image;
	set_guest(&vm, 0, guest_call, gpa, 0, 0);
	CHECK_EQ("fetch: goes on", run_here(&w, &vm, kuf, 0), KVM_EXIT_HLT);
	CHECK_EQ("fetch: the code ran", guest_rax(&vm, 0), 0x1122334455667788);
	CHECK_EQ("fetch: an exit for each page", w.exits, 2);
	CHECK("fetch: filled once each", fills_of(&source, gpa) == 1 &&
	      fills_of(&source, gpa + PAGE) == 1);
	source.image = NULL;
}

static void by_outsb(void)
{
	uint64_t gpa = TEST_GPA + 8 * PAGE + 0x700;
	uint64_t faults = stats_of(kuf).faults;
	uint8_t out[16];

	doing("rep outsb", 30);
	CHECK("rep outsb: goes on", kvm_reads(&vm, kuf, 0, gpa, out));
	CHECK("rep outsb: bytes", has_content(out, gpa, 16, 0));
	CHECK_EQ("rep outsb: filled once", fills_of(&source, gpa), 1);
	CHECK_EQ("rep outsb: through the queue", stats_of(kuf).faults, faults + 1);

	gpa = TEST_GPA + 11 * PAGE - 8;
	CHECK("rep outsb across pages: goes on", kvm_reads(&vm, kuf, 0, gpa, out));
	CHECK("rep outsb across pages: bytes", has_content(out, gpa, 16, 0));
	CHECK("rep outsb across pages: filled once each", fills_of(&source, gpa) == 1 &&
	      fills_of(&source, gpa + 8) == 1);
	CHECK_EQ("rep outsb across pages: through the queue", stats_of(kuf).faults, faults + 3);
}

static void by_insb(void)
{
	uint64_t gpa = TEST_GPA + 14 * PAGE + 0x100;
	bool good = true;

	doing("rep insb", 30);
	set_guest(&vm, 0, guest_insb, gpa, 32, 0);
	worker_init(&w, &vm, kuf, 0);
	w.in = 0xa7;
	worker_main(&w);
	CHECK_EQ("rep insb: goes on", w.result, KVM_EXIT_HLT);
	CHECK_EQ("rep insb: filled once", fills_of(&source, gpa), 1);
	for (int i = 0; i < 32; i++)
		good = good && host(&vm, gpa)[i] == 0xa7;
	CHECK("rep insb: is there", good);
	CHECK("rep insb: around it what was filled",
	      has_content(host(&vm, gpa & -PAGE), gpa & -PAGE, 0x100, 0) &&
	      has_content(host(&vm, gpa + 32), gpa + 32, PAGE - 0x120, 0));
}

/* Sets a guest routine that is not in test.h, and the addresses that it reads and writes. */
static void set_routine(const uint8_t *bytes, size_t n, uint64_t rsi, uint64_t rdi)
{
	struct kvm_regs r;

	memcpy(vm.low + MORE_CODE_GPA, bytes, n);
	set_guest(&vm, 0, guest_nop, rsi, 1, 0);
	MUST(ioctl(vm.vcpu[0], KVM_GET_REGS, &r));
	r.rip = MORE_CODE_GPA;
	r.rdi = rdi;
	MUST(ioctl(vm.vcpu[0], KVM_SET_REGS, &r));
}

/*
 * movsq from an address without memory to a marked page: the processor stops at the
 * first operand, and the emulator writes the second.
 */
static void by_mmio(void)
{
	static const uint8_t movsq[] = { 0x48, 0xa5, 0xf4 };
	static const uint8_t add_mem[] = { 0x48, 0x8b, 0x06, 0xf4 };	/* mov (%rsi), %rax */
	uint64_t gpa = TEST_GPA + 16 * PAGE + 0x80, nowhere = 64 * HUGE;
	uint64_t faults = stats_of(kuf).faults;

	doing("mmio", 30);
	set_routine(movsq, sizeof(movsq), nowhere, gpa);
	worker_init(&w, &vm, kuf, 0);
	w.in = 0x5c;
	worker_main(&w);
	CHECK_EQ("mmio to a marked page: goes on", w.result, KVM_EXIT_HLT);
	CHECK_EQ("mmio to a marked page: read once", w.mmio, 1);
	CHECK_EQ("mmio to a marked page: through the queue", stats_of(kuf).faults, faults + 1);
	CHECK_EQ("mmio to a marked page: filled once", fills_of(&source, gpa), 1);
	CHECK_EQ("mmio to a marked page: is there", *(uint64_t *)host(&vm, gpa),
		 0x5c5c5c5c5c5c5c5c);
	CHECK("mmio to a marked page: around it what was filled",
	      has_content(host(&vm, gpa & -PAGE), gpa & -PAGE, 0x80, 0) &&
	      has_content(host(&vm, gpa + 8), gpa + 8, PAGE - 0x88, 0));

	/* From a marked page to an address without memory. */
	gpa = TEST_GPA + 18 * PAGE + 0x40;
	set_routine(movsq, sizeof(movsq), gpa, nowhere);
	worker_init(&w, &vm, kuf, 0);
	worker_main(&w);
	CHECK_EQ("mmio from a marked page: goes on", w.result, KVM_EXIT_HLT);
	CHECK("mmio from a marked page: bytes", w.out_len == 8 && has_content(w.out, gpa, 8, 0));
	CHECK_EQ("mmio from a marked page: filled once", fills_of(&source, gpa), 1);

	/* The instruction itself is on a marked page. */
	static uint8_t image[PAGES * PAGE];
	gpa = TEST_GPA + 20 * PAGE + 0x10;
	memset(image, 0xcc, sizeof(image));
	memcpy(image + (gpa - TEST_GPA), add_mem, sizeof(add_mem));
	source.image = image;
	struct kvm_regs r;
	set_guest(&vm, 0, guest_nop, nowhere, 1, 0);
	MUST(ioctl(vm.vcpu[0], KVM_GET_REGS, &r));
	r.rip = gpa;
	MUST(ioctl(vm.vcpu[0], KVM_SET_REGS, &r));
	worker_init(&w, &vm, kuf, 0);
	w.in = 0x3d;
	worker_main(&w);
	CHECK_EQ("mmio by code on a marked page: goes on", w.result, KVM_EXIT_HLT);
	CHECK_EQ("mmio by code on a marked page: value", guest_rax(&vm, 0), 0x3d3d3d3d3d3d3d3d);
	CHECK_EQ("mmio by code on a marked page: filled once", fills_of(&source, gpa), 1);
	source.image = NULL;
}

/*
 * The emulator translates an address by page tables of the guest on marked pages, to
 * an operand on a marked page.
 */
static void by_page_table(void)
{
	static uint8_t image[PAGES * PAGE];
	uint64_t table = TEST_GPA + 24 * PAGE, gpa = TEST_GPA + 26 * PAGE;
	uint64_t va = 100 * HUGE, faults = stats_of(kuf).faults;
	uint64_t *pd = (uint64_t *)(vm.low + PD_GPA);
	uint8_t out[16];

	doing("page table", 30);
	for (uint64_t at = TEST_GPA; at < TEST_GPA + sizeof(image); at++)
		image[at - TEST_GPA] = content(at, 0);
	memset(image + (table - TEST_GPA), 0, PAGE);
	*(uint64_t *)(image + (table - TEST_GPA)) = gpa | 0x67;
	source.image = image;
	pd[100] = table | 0x7;
	CHECK("page table: goes on", kvm_reads(&vm, kuf, 0, va + 0x230, out));
	CHECK("page table: bytes", has_content(out, gpa + 0x230, 16, 0));
	CHECK("page table: filled once each", fills_of(&source, gpa) == 1 &&
	      fills_of(&source, table) == 1);
	CHECK_EQ("page table: both through the queue", stats_of(kuf).faults, faults + 2);
	pd[100] = 100 * HUGE | 0xe7;
	source.image = NULL;
}

/* Exits that the library must not handle. */
static void not_ours(void)
{
	uint64_t gpa = TEST_GPA + 30 * PAGE;

	doing("not ours", 30);
	CHECK_REFUSED("exit without flags", kuf_vcpu_fault(kuf, gpa, PAGE, 0), -ENOENT,
		      "USERFAULT");
	CHECK_REFUSED("exit with PRIVATE alone",
		      kuf_vcpu_fault(kuf, gpa, PAGE, UF_EXIT_FLAG_PRIVATE), -ENOENT, "USERFAULT");
	CHECK_KUF("exit in no slot",
		  kuf_vcpu_fault(kuf, TEST_GPA + vm.size, PAGE, UF_EXIT_FLAG_USERFAULT), -ENOENT);
	CHECK_KUF("exit that leaves its slot",
		  kuf_vcpu_fault(kuf, TEST_GPA + vm.size - PAGE, 2 * PAGE,
				 UF_EXIT_FLAG_USERFAULT), -ERANGE);
	CHECK_KUF("exit of no length", kuf_vcpu_fault(kuf, gpa, 0, UF_EXIT_FLAG_USERFAULT),
		  -EINVAL);
	CHECK_EQ("none of these filled anything", fills_of(&source, gpa), 0);
	/* The exit may have other flags, now or in later kernels. */
	CHECK_KUF("exit with another flag besides",
		  kuf_vcpu_fault(kuf, gpa, PAGE, UF_EXIT_FLAG_USERFAULT | 1 << 20), 0);
	CHECK_EQ("that one is served", fills_of(&source, gpa), 1);
	CHECK("and open", guest_reads(&vm, kuf, 0, gpa, content64(gpa, 0)));
}

int main(void)
{
	doing("create", 20);
	fresh(1);
	by_read();
	by_write();
	by_fetch();
	by_outsb();
	by_insb();
	by_mmio();
	by_page_table();
	not_ours();
	end();
	return finish();
}
