/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pages that KVM itself writes: it caches their translations, and needs some of
 * the pages where it cannot sleep.
 */
#include "test.h"

#define MSR_WALL_CLOCK 0x4b564d00
#define MSR_SYSTEM_TIME 0x4b564d01
#define MSR_STEAL_TIME 0x4b564d03
#define MSR_PV_EOI 0x4b564d04

static struct vm vm;

static int set_msr(uint32_t index, uint64_t value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} m = { .head.nmsrs = 1, .entry = { .index = index, .data = value } };

	return ioctl(vm.vcpu[0], KVM_SET_MSRS, &m.head);
}

static bool all_bytes(const uint8_t *p, size_t n, uint8_t v)
{
	for (size_t i = 0; i < n; i++)
		if (p[i] != v)
			return false;
	return true;
}

/*
 * Runs the vCPU until KVM waits for the page at @gpa.  Fills the page with 0x11,
 * so that KVM's writes are visible, and lets KVM continue.
 */
static void expect_wait(const char *name, uint64_t gpa, size_t size)
{
	struct runner r = { 0 };
	uint64_t gfn = 0;
	char what[80];

	doing(name, 30);
	set_guest(&vm, 0, guest_nop, 0, 0, 0);
	runner_start(&r, &vm, 0);
	bool event = wait_event(&vm, 20000);
	snprintf(what, sizeof(what), "%s: event", name);
	CHECK(what, event && read_event(&vm) == 1);
	int e = read_fault(&vm, &gfn);
	snprintf(what, sizeof(what), "%s: gfn", name);
	CHECK(what, !e && gfn == gpa / PAGE);
	sleep_ms(50);
	snprintf(what, sizeof(what), "%s: nothing written while it is marked", name);
	CHECK(what, !r.done && all_bytes(host(&vm, gpa & -PAGE), PAGE, 0));
	memset(host(&vm, gpa & -PAGE), 0x11, PAGE);
	memset(host(&vm, gpa), 0, size);
	unmark(&vm, gpa & -PAGE, PAGE);
	snprintf(what, sizeof(what), "%s: goes on", name);
	CHECK_EQ(what, runner_join(&r), KVM_EXIT_HLT);
	snprintf(what, sizeof(what), "%s: written then, and nothing else", name);
	CHECK(what, !all_bytes(host(&vm, gpa), size, 0) &&
	      all_bytes(host(&vm, gpa & -PAGE), gpa % PAGE, 0x11) &&
	      all_bytes(host(&vm, gpa + size), PAGE - gpa % PAGE - size, 0x11));
}

static void discard(uint64_t gpa)
{
	mark(&vm, gpa & -PAGE, PAGE);
	MUST(madvise(host(&vm, gpa & -PAGE), PAGE, MADV_DONTNEED));
}

/* Makes the vCPU update its clock at the next entry into the guest. */
static void want_clock_update(void)
{
	struct kvm_clock_data c = { 0 };

	MUST(ioctl(vm.fd, KVM_GET_CLOCK, &c));
	c.flags = 0;
	MUST(ioctl(vm.fd, KVM_SET_CLOCK, &c));
}

static void kvmclock(void)
{
	uint64_t gpa = TEST_GPA + 2 * PAGE + 0x40;

	doing("kvmclock", 30);
	discard(gpa);
	CHECK_EQ("setting the MSR does not wait", set_msr(MSR_SYSTEM_TIME, gpa | 1), 1);
	CHECK("nor does it ask for the page", !wait_event(&vm, 0));
	expect_wait("kvmclock", gpa, 32);

	/* The translation is cached now, and the page is discarded. */
	discard(gpa);
	want_clock_update();
	expect_wait("kvmclock again", gpa, 32);

	set_msr(MSR_SYSTEM_TIME, 0);
}

static void *write_msr(void *arg)
{
	struct runner *r = arg;

	r->result = run_vcpu(&vm, 0);
	r->done = true;
	return NULL;
}

/* The guest itself writes the MSR, so that all of it happens in KVM_RUN. */
static void kvmclock_by_guest(void)
{
	uint64_t gpa = TEST_GPA + 4 * PAGE + 0x80, gfn;
	struct runner r = { 0 };
	pthread_t t;
	struct kvm_regs regs;

	doing("kvmclock by the guest", 30);
	discard(gpa);
	set_guest(&vm, 0, guest_wrmsr, 0, 0, 0);
	MUST(ioctl(vm.vcpu[0], KVM_GET_REGS, &regs));
	regs.rcx = MSR_SYSTEM_TIME;
	regs.rax = gpa | 1;
	regs.rdx = 0;
	MUST(ioctl(vm.vcpu[0], KVM_SET_REGS, &regs));
	pthread_create(&t, NULL, write_msr, &r);
	CHECK("by the guest: event", wait_event(&vm, 20000) && read_event(&vm) == 1);
	CHECK("by the guest: gfn", !read_fault(&vm, &gfn) && gfn == gpa / PAGE);
	unmark(&vm, gpa & -PAGE, PAGE);
	pthread_join(t, NULL);
	CHECK_EQ("by the guest: goes on", r.result, KVM_EXIT_HLT);
	CHECK("by the guest: written", !all_bytes(host(&vm, gpa), 32, 0));
	set_msr(MSR_SYSTEM_TIME, 0);
}

static void steal_time(void)
{
	uint64_t gpa = TEST_GPA + 6 * PAGE + 0x40;

	doing("steal time", 30);
	discard(gpa);
	CHECK_EQ("setting the MSR does not wait", set_msr(MSR_STEAL_TIME, gpa | 1), 1);
	expect_wait("steal time", gpa, 64);
	discard(gpa);
	/* Setting the MSR again starts a new recording. */
	MUST(set_msr(MSR_STEAL_TIME, gpa | 1));
	expect_wait("steal time again", gpa, 64);
	set_msr(MSR_STEAL_TIME, 0);
}

struct msr_setter {
	uint32_t index;
	uint64_t value;
	int r;
};

static void *msr_setter(void *arg)
{
	struct msr_setter *s = arg;

	s->r = set_msr(s->index, s->value);
	return NULL;
}

/* KVM_SET_MSRS writes this page at once, so the ioctl waits. */
static void wall_clock(void)
{
	struct msr_setter s = { MSR_WALL_CLOCK, TEST_GPA + 8 * PAGE, 0 };
	uint64_t gfn;
	pthread_t t;

	doing("wall clock", 30);
	discard(s.value);
	pthread_create(&t, NULL, msr_setter, &s);
	CHECK("wall clock: event", wait_event(&vm, 20000) && read_event(&vm) == 1);
	CHECK("wall clock: gfn", !read_fault(&vm, &gfn) && gfn == s.value / PAGE);
	unmark(&vm, s.value, PAGE);
	pthread_join(t, NULL);
	CHECK_EQ("wall clock: set", s.r, 1);
	CHECK("wall clock: written", !all_bytes(host(&vm, s.value), 12, 0));
}

/* The vCPU runs while all these pages are marked again and again. */
static void *marker(void *arg)
{
	_Atomic bool *stop = arg;

	while (!*stop) {
		mark(&vm, TEST_GPA, 16 * PAGE);
		if (wait_event(&vm, 2))
			read_event(&vm);
		unmark(&vm, TEST_GPA, 16 * PAGE);
		want_clock_update();
	}
	return NULL;
}

static void storm(void)
{
	static _Atomic bool stop;
	pthread_t t;
	int good = 0;

	doing("storm", 60);
	unmark(&vm, TEST_GPA, vm.size);
	MUST(set_msr(MSR_SYSTEM_TIME, (TEST_GPA + 2 * PAGE) | 1));
	MUST(set_msr(MSR_STEAL_TIME, (TEST_GPA + 6 * PAGE) | 1));
	pthread_create(&t, NULL, marker, &stop);
	for (int i = 0; i < 300; i++) {
		set_guest(&vm, 0, guest_nop, 0, 0, 0);
		good += run_vcpu(&vm, 0) == KVM_EXIT_HLT;
	}
	stop = true;
	pthread_join(t, NULL);
	CHECK_EQ("storm", good, 300);
}

int main(void)
{
	doing("create", 20);
	vm_create(&vm, 64 * PAGE, 1);
	enable(&vm);
	kvmclock();
	kvmclock_by_guest();
	steal_time();
	wall_clock();
	storm();
	doing("destroy", 20);
	vm_destroy(&vm);
	return finish();
}
