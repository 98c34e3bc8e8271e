/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* KVM_RUN returns when a vCPU touches a marked page, and the vCPU continues later. */
#include "test.h"

static struct vm vm;

static void first_touch(void)
{
	uint64_t a = TEST_GPA, b = TEST_GPA + 3 * PAGE, c = TEST_GPA + 5 * PAGE;
	/* mov $0x12345678, %eax; ret */
	static const uint8_t insns[] = { 0xb8, 0x78, 0x56, 0x34, 0x12, 0xc3 };

	doing("first touch", 20);
	mark(&vm, TEST_GPA, vm.size);

	set_guest(&vm, 0, guest_read, a + 0x123, 0, 0);
	CHECK("read faults", faults_at(&vm, 0, a));
	CHECK("read faults again", faults_at(&vm, 0, a));
	fill(&vm, a, PAGE);
	unmark(&vm, a, PAGE);
	CHECK("read goes on", halts(&vm, 0));
	CHECK_EQ("read content", guest_rax(&vm, 0), pattern64(a + 0x123));

	set_guest(&vm, 0, guest_write, b + 8, 0, 0x1122334455667788);
	CHECK("write faults", faults_at(&vm, 0, b));
	fill(&vm, b, PAGE);
	unmark(&vm, b, PAGE);
	CHECK("write goes on", halts(&vm, 0));
	CHECK_EQ("write content", *(uint64_t *)host(&vm, b + 8), 0x1122334455667788);
	CHECK("write leaves the rest", is_pattern(host(&vm, b), b, 8) &&
	      is_pattern(host(&vm, b + 16), b + 16, PAGE - 16));

	set_guest(&vm, 0, guest_call, c + 0x40, 0, 0);
	CHECK("instruction fetch faults", faults_at(&vm, 0, c));
	memcpy(host(&vm, c + 0x40), insns, sizeof(insns));
	unmark(&vm, c, PAGE);
	CHECK("instruction fetch goes on", halts(&vm, 0));
	CHECK_EQ("instruction fetch content", guest_rax(&vm, 0), 0x12345678);

	CHECK("the eventfd is not for these", !wait_event(&vm, 0));
	CHECK("nor is the queue", no_fault_queued(&vm));

	/* An access across the border of two pages faults on one, then the other. */
	set_guest(&vm, 0, guest_read, TEST_GPA + 8 * PAGE - 4, 0, 0);
	CHECK("straddling: first page", faults_at(&vm, 0, TEST_GPA + 7 * PAGE));
	fill(&vm, TEST_GPA + 7 * PAGE, PAGE);
	unmark(&vm, TEST_GPA + 7 * PAGE, PAGE);
	CHECK("straddling: second page", faults_at(&vm, 0, TEST_GPA + 8 * PAGE));
	fill(&vm, TEST_GPA + 8 * PAGE, PAGE);
	unmark(&vm, TEST_GPA + 8 * PAGE, PAGE);
	CHECK("straddling goes on", halts(&vm, 0));
	CHECK_EQ("straddling content", guest_rax(&vm, 0), pattern64(TEST_GPA + 8 * PAGE - 4));
}

static void mapped_pages(void)
{
	uint64_t a = TEST_GPA + 16 * PAGE;

	doing("mapped pages", 20);
	unmark(&vm, TEST_GPA, vm.size);
	fill(&vm, TEST_GPA, vm.size);
	set_guest(&vm, 0, guest_touch, TEST_GPA, vm.size / PAGE, 0);
	CHECK("everything mapped", halts(&vm, 0));

	mark(&vm, a, PAGE);
	set_guest(&vm, 0, guest_read, a, 0, 0);
	CHECK("marking a mapped page takes effect", faults_at(&vm, 0, a));
	set_guest(&vm, 0, guest_read, a - PAGE, 0, 0);
	CHECK("not on the page before it", halts(&vm, 0));
	set_guest(&vm, 0, guest_read, a + PAGE, 0, 0);
	CHECK("not on the page after it", halts(&vm, 0));

	/* Drop its memory, as a discard does. */
	MUST(madvise(host(&vm, a), PAGE, MADV_DONTNEED));
	memset(host(&vm, a), 0x5a, PAGE);
	set_guest(&vm, 0, guest_read, a, 0, 0);
	CHECK("still marked", faults_at(&vm, 0, a));
	unmark(&vm, a, PAGE);
	CHECK("goes on with new memory", halts(&vm, 0));
	CHECK_EQ("new content", guest_rax(&vm, 0), 0x5a5a5a5a5a5a5a5a);
}

static void slots(void)
{
	uint64_t gpa = TEST_GPA + vm.size + HUGE;
	void *mem = anon(4 * PAGE);

	doing("slots", 20);
	mark(&vm, gpa + PAGE, PAGE);
	MUST(set_slot(&vm, 2, 0, gpa, 4 * PAGE, mem, NULL));
	set_guest(&vm, 0, guest_read, gpa, 0, 0);
	CHECK("page of a later slot, not marked", halts(&vm, 0));
	set_guest(&vm, 0, guest_read, gpa + PAGE, 0, 0);
	CHECK("page that was marked before it had a slot", faults_at(&vm, 0, gpa + PAGE));
	MUST(set_slot(&vm, 2, 0, gpa, 0, mem, NULL));
	CHECK_EQ("marked page that has no slot is MMIO", run_vcpu(&vm, 0), KVM_EXIT_MMIO);
	/* KVM must still complete the instruction, whatever the registers are. */
	CHECK("MMIO completed", halts(&vm, 0));
	unmark(&vm, gpa + PAGE, PAGE);
}

static void prefault(void)
{
	struct uf_pre_fault_memory p = { .gpa = TEST_GPA, .size = 4 * PAGE };

	doing("prefault", 20);
	if (!has_tdp(&vm)) {
		skip("KVM_PRE_FAULT_MEMORY", "shadow paging");
		return;
	}
	unmark(&vm, TEST_GPA, vm.size);
	mark(&vm, TEST_GPA + 2 * PAGE, PAGE);
	CHECK_ERRNO("KVM_PRE_FAULT_MEMORY up to a marked page",
		    ioctl(vm.vcpu[0], UF_PRE_FAULT_MEMORY, &p), 0);
	CHECK_EQ("stops in front of it", p.gpa, TEST_GPA + 2 * PAGE);
	CHECK_ERRNO("KVM_PRE_FAULT_MEMORY of a marked page",
		    ioctl(vm.vcpu[0], UF_PRE_FAULT_MEMORY, &p), EFAULT);
	set_guest(&vm, 0, guest_read, TEST_GPA + 2 * PAGE, 0, 0);
	CHECK("and has not mapped it", faults_at(&vm, 0, TEST_GPA + 2 * PAGE));
	unmark(&vm, TEST_GPA, vm.size);
}

static void *mark_later(void *arg)
{
	(void)arg;
	sleep_ms(200);
	mark(&vm, TEST_GPA + 20 * PAGE, PAGE);
	return NULL;
}

/* Marking must also stop a vCPU that never leaves the guest. */
static void running_guest(void)
{
	pthread_t t;

	doing("running guest", 30);
	unmark(&vm, TEST_GPA, vm.size);
	set_guest(&vm, 0, guest_touch, TEST_GPA, vm.size / PAGE, 0);
	CHECK("before", halts(&vm, 0));
	/* reads the same page for ever: rsi does not change */
	static const uint8_t loop[] = { 0x8a, 0x06, 0xeb, 0xfc }; /* 1: mov (%rsi),%al; jmp 1b */
	memcpy(host(&vm, TEST_GPA + 21 * PAGE), loop, sizeof(loop));
	pthread_create(&t, NULL, mark_later, NULL);
	set_guest(&vm, 0, guest_call, TEST_GPA + 21 * PAGE, 0, 0);
	struct kvm_regs r;
	MUST(ioctl(vm.vcpu[0], KVM_GET_REGS, &r));
	r.rip = TEST_GPA + 21 * PAGE;
	r.rsi = TEST_GPA + 20 * PAGE;
	MUST(ioctl(vm.vcpu[0], KVM_SET_REGS, &r));
	CHECK("guest that spins on a page that gets marked",
	      faults_at(&vm, 0, TEST_GPA + 20 * PAGE));
	pthread_join(t, NULL);
	unmark(&vm, TEST_GPA, vm.size);
}

int main(void)
{
	doing("create", 20);
	vm_create(&vm, 64 * PAGE, 1);
	enable(&vm);
	first_touch();
	mapped_pages();
	slots();
	prefault();
	running_guest();
	doing("destroy", 20);
	vm_destroy(&vm);
	return finish();
}
