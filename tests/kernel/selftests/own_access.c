/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* KVM itself waits for a marked page, and userspace can read this. */
#include "test.h"

static struct vm vm;

static void outsb(void)
{
	uint64_t a = TEST_GPA + 2 * PAGE + 0x700, gfn;
	uint8_t out[64];
	struct runner r = { .io = out, .io_max = sizeof(out) };

	doing("rep outsb", 30);
	mark(&vm, TEST_GPA, vm.size);
	set_guest(&vm, 0, guest_outsb, a, 16, 0);
	runner_start(&r, &vm, 0);
	CHECK("rep outsb: eventfd", wait_event(&vm, 20000));
	CHECK_EQ("rep outsb: signalled once", read_event(&vm), 1);
	CHECK_ERRNO("rep outsb: read", read_fault(&vm, &gfn), 0);
	CHECK_EQ("rep outsb: gfn", gfn, a / PAGE);
	CHECK("rep outsb: read once", no_fault_queued(&vm));
	sleep_ms(100);
	CHECK("rep outsb: waits", !r.done && r.io_len == 0);
	CHECK_EQ("rep outsb: sleeps", thread_state(r.tid), 'D');
	CHECK("rep outsb: not signalled again", !wait_event(&vm, 0));
	fill(&vm, a & -PAGE, PAGE);
	unmark(&vm, a & -PAGE, PAGE);
	CHECK_EQ("rep outsb: goes on", runner_join(&r), KVM_EXIT_HLT);
	CHECK("rep outsb: content", r.io_len == 16 && is_pattern(out, a, 16));
	CHECK("rep outsb: nothing left", no_fault_queued(&vm) && !wait_event(&vm, 0));
}

static void outsb_two_pages(void)
{
	uint64_t a = TEST_GPA + 5 * PAGE - 8, gfn;
	uint8_t out[64];
	struct runner r = { .io = out, .io_max = sizeof(out) };

	doing("rep outsb across pages", 30);
	mark(&vm, TEST_GPA, vm.size);
	set_guest(&vm, 0, guest_outsb, a, 16, 0);
	runner_start(&r, &vm, 0);
	for (uint64_t n = 4; n <= 5; n++) {
		CHECK("across pages: eventfd", wait_event(&vm, 20000));
		read_event(&vm);
		CHECK_ERRNO("across pages: read", read_fault(&vm, &gfn), 0);
		CHECK_EQ("across pages: gfn", gfn, TEST_GFN + n);
		fill(&vm, gfn * PAGE, PAGE);
		unmark(&vm, gfn * PAGE, PAGE);
	}
	CHECK_EQ("across pages: goes on", runner_join(&r), KVM_EXIT_HLT);
	CHECK("across pages: content", r.io_len == 16 && is_pattern(out, a, 16));
}

static void insb(void)
{
	uint64_t a = TEST_GPA + 9 * PAGE + 0x100, gfn;
	struct runner r = { .fill = 0xa7 };

	doing("rep insb", 30);
	mark(&vm, TEST_GPA, vm.size);
	set_guest(&vm, 0, guest_insb, a, 32, 0);
	runner_start(&r, &vm, 0);
	CHECK("rep insb: eventfd", wait_event(&vm, 20000));
	read_event(&vm);
	CHECK_ERRNO("rep insb: read", read_fault(&vm, &gfn), 0);
	CHECK_EQ("rep insb: gfn", gfn, a / PAGE);
	/* Fill the page now; KVM's write follows. */
	fill(&vm, a & -PAGE, PAGE);
	unmark(&vm, a & -PAGE, PAGE);
	CHECK_EQ("rep insb: goes on", runner_join(&r), KVM_EXIT_HLT);
	bool good = is_pattern(host(&vm, a & -PAGE), a & -PAGE, 0x100) &&
		    is_pattern(host(&vm, a + 32), a + 32, PAGE - 0x100 - 32);
	for (int i = 0; i < 32; i++)
		good = good && host(&vm, a)[i] == 0xa7;
	CHECK("rep insb: content", good);
}

/* The emulator walks the guest's page tables by itself. */
static void page_tables(void)
{
	uint64_t a = TEST_GPA + 12 * PAGE, gfn;
	uint8_t out[8];
	struct runner r = { .io = out, .io_max = sizeof(out) };
	uint64_t *pd = (uint64_t *)(vm.low + PD_GPA);
	uint64_t *pt = (uint64_t *)host(&vm, TEST_GPA);
	uint64_t va = 64 * HUGE;

	doing("page tables", 30);
	unmark(&vm, TEST_GPA, vm.size);
	pd[64] = TEST_GPA | 0x7; /* a table in test memory */
	memset(pt, 0, PAGE);
	pt[0] = a | 0x67;
	fill(&vm, a, PAGE);

	/* The processor may access the code but no other memory. */
	mark(&vm, TEST_GPA, PAGE);
	mark(&vm, a, PAGE);
	set_guest(&vm, 0, guest_outsb, va + 0x10, 8, 0);
	runner_start(&r, &vm, 0);
	CHECK("page table: eventfd", wait_event(&vm, 20000));
	read_event(&vm);
	CHECK_ERRNO("page table: read", read_fault(&vm, &gfn), 0);
	CHECK_EQ("page table: gfn", gfn, TEST_GFN);
	unmark(&vm, TEST_GPA, PAGE);
	CHECK("page behind it: eventfd", wait_event(&vm, 20000));
	read_event(&vm);
	CHECK_ERRNO("page behind it: read", read_fault(&vm, &gfn), 0);
	CHECK_EQ("page behind it: gfn", gfn, a / PAGE);
	unmark(&vm, a, PAGE);
	CHECK_EQ("page table: goes on", runner_join(&r), KVM_EXIT_HLT);
	CHECK("page table: content", r.io_len == 8 && is_pattern(out, a + 0x10, 8));
	pd[64] = 64 * HUGE | 0xe7;
}

static void *translate(void *arg)
{
	struct kvm_translation *t = arg;

	if (ioctl(vm.vcpu[0], KVM_TRANSLATE, t))
		t->physical_address = ~0ULL;
	return NULL;
}

/* Another vCPU ioctl than KVM_RUN waits too. */
static void other_ioctl(void)
{
	struct kvm_translation t = { .linear_address = TEST_GPA + 0x1234 };
	pthread_t thread;
	uint64_t gfn;

	doing("KVM_TRANSLATE", 30);
	unmark(&vm, TEST_GPA, vm.size);
	set_guest(&vm, 0, guest_nop, 0, 0, 0);
	mark(&vm, PD_GPA, PAGE);
	pthread_create(&thread, NULL, translate, &t);
	CHECK("KVM_TRANSLATE: eventfd", wait_event(&vm, 20000));
	read_event(&vm);
	CHECK_ERRNO("KVM_TRANSLATE: read", read_fault(&vm, &gfn), 0);
	CHECK_EQ("KVM_TRANSLATE: gfn", gfn, PD_GPA / PAGE);
	unmark(&vm, PD_GPA, PAGE);
	pthread_join(thread, NULL);
	CHECK_EQ("KVM_TRANSLATE: address", t.physical_address, TEST_GPA + 0x1234);
}

/* KVM and a vCPU need the same page. */
static void both(void)
{
	uint64_t a = TEST_GPA + 20 * PAGE, gfn;
	uint8_t out[16];
	struct runner r = { .io = out, .io_max = sizeof(out) };

	doing("both", 30);
	mark(&vm, TEST_GPA, vm.size);
	set_guest(&vm, 1, guest_outsb, a, 16, 0);
	runner_start(&r, &vm, 1);
	CHECK("both: eventfd", wait_event(&vm, 20000));
	read_event(&vm);
	set_guest(&vm, 0, guest_read, a, 0, 0);
	CHECK("both: the vCPU leaves", faults_at(&vm, 0, a));
	fill(&vm, a, PAGE);
	/* resolved before the entry is read: the entry must be gone */
	unmark(&vm, a, PAGE);
	CHECK_EQ("both: KVM goes on", runner_join(&r), KVM_EXIT_HLT);
	CHECK("both: the vCPU goes on", halts(&vm, 0));
	CHECK("both: content", is_pattern(out, a, 16) && guest_rax(&vm, 0) == pattern64(a));
	CHECK_ERRNO("both: entry is gone", read_fault(&vm, &gfn), ENOENT);
}

int main(void)
{
	doing("create", 20);
	vm_create(&vm, 64 * PAGE, 2);
	enable(&vm);
	outsb();
	outsb_two_pages();
	insb();
	page_tables();
	other_ioctl();
	both();
	doing("destroy", 20);
	vm_destroy(&vm);
	return finish();
}
