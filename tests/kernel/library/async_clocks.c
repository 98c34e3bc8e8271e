/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pages that KVM itself writes.  KVM writes into filled pages and caches a
 * translation; both must be right after the page was dropped, too.
 */
#include "async.h"

#define MSR_WALL_CLOCK 0x4b564d00
#define MSR_SYSTEM_TIME 0x4b564d01
#define MSR_STEAL_TIME 0x4b564d03
#define MSR_PV_EOI 0x4b564d04

static struct vm vm;
static struct source source;
static struct kuf *kuf;
static struct worker w;

static int set_msr(uint32_t index, uint64_t value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} m = { .head.nmsrs = 1, .entry = { .index = index, .data = value } };

	return ioctl(vm.vcpu[0], KVM_SET_MSRS, &m.head);
}

static void want_clock_update(void)
{
	struct kvm_clock_data c = { 0 };

	MUST(ioctl(vm.fd, KVM_GET_CLOCK, &c));
	c.flags = 0;
	MUST(ioctl(vm.fd, KVM_SET_CLOCK, &c));
}

static const char *label(const char *what, const char *which)
{
	static char text[128];

	snprintf(text, sizeof(text), "%s: %s", what, which);
	return text;
}

/*
 * Runs the vCPU; KVM needs the page at @gpa for that and writes @size bytes, which
 * differ from the source's at least in part.
 */
static void runs_with(const char *what, uint64_t gpa, size_t size, unsigned int fills,
		      uint64_t generation)
{
	uint64_t page = gpa & -PAGE, faults = stats_of(kuf).faults;

	doing(what, 30);
	set_guest(&vm, 0, guest_nop, 0, 0, 0);
	CHECK_EQ(label(what, "goes on"), run_here(&w, &vm, kuf, 0), KVM_EXIT_HLT);
	CHECK_EQ(label(what, "filled"), fills_of(&source, gpa), fills);
	CHECK_EQ(label(what, "through the queue"), stats_of(kuf).faults, faults + 1);
	CHECK(label(what, "written into what was filled"),
	      !has_content(host(&vm, gpa), gpa, size, generation) &&
	      has_content(host(&vm, page), page, gpa % PAGE, generation) &&
	      has_content(host(&vm, gpa + size), gpa + size, PAGE - gpa % PAGE - size, generation));
}

static void kvmclock(void)
{
	uint64_t gpa = TEST_GPA + 2 * PAGE + 0x40;
	uint32_t before;

	CHECK_EQ("kvmclock: setting the MSR does not wait", set_msr(MSR_SYSTEM_TIME, gpa | 1), 1);
	runs_with("kvmclock", gpa, 32, 1, 0);

	/* The translation is cached now; the page is dropped and refilled with other bytes. */
	source.generation = 5;
	CHECK_KUF("kvmclock: discard", kuf_discard(kuf, gpa & -PAGE, PAGE, KUF_DISCARD_REFILL), 0);
	want_clock_update();
	runs_with("kvmclock after discard", gpa, 32, 2, 5);

	/* ...and removed: KVM writes into zeroes. */
	CHECK_KUF("kvmclock: removed", kuf_discard(kuf, gpa & -PAGE, PAGE, KUF_DISCARD_ZERO), 0);
	want_clock_update();
	set_guest(&vm, 0, guest_nop, 0, 0, 0);
	CHECK_EQ("kvmclock removed: goes on", run_here(&w, &vm, kuf, 0), KVM_EXIT_HLT);
	CHECK_EQ("kvmclock removed: not filled", fills_of(&source, gpa), 2);
	CHECK("kvmclock removed: written into zeroes",
	      is_zero(host(&vm, gpa & -PAGE), 0x40) && !is_zero(host(&vm, gpa), 32) &&
	      is_zero(host(&vm, gpa + 32), PAGE - 0x60));
	before = *(uint32_t *)host(&vm, gpa);
	want_clock_update();
	set_guest(&vm, 0, guest_nop, 0, 0, 0);
	CHECK_EQ("kvmclock: runs on", run_here(&w, &vm, kuf, 0), KVM_EXIT_HLT);
	CHECK("kvmclock: is updated in the new page", *(uint32_t *)host(&vm, gpa) != before);
	MUST(set_msr(MSR_SYSTEM_TIME, 0));
	source.generation = 0;
}

static void steal_time(void)
{
	uint64_t gpa = TEST_GPA + 6 * PAGE + 0x40;

	CHECK_EQ("steal time: setting the MSR does not wait", set_msr(MSR_STEAL_TIME, gpa | 1), 1);
	runs_with("steal time", gpa, 64, 1, 0);
	source.generation = 7;
	CHECK_KUF("steal time: discard", kuf_discard(kuf, gpa & -PAGE, PAGE, KUF_DISCARD_REFILL), 0);
	MUST(set_msr(MSR_STEAL_TIME, gpa | 1));
	runs_with("steal time after discard", gpa, 64, 2, 7);
	MUST(set_msr(MSR_STEAL_TIME, 0));
	source.generation = 0;
}

/* The guest itself writes the MSR. */
static void by_the_guest(void)
{
	uint64_t gpa = TEST_GPA + 10 * PAGE + 0x80;
	struct kvm_regs regs;

	doing("by the guest", 30);
	set_guest(&vm, 0, guest_wrmsr, 0, 0, 0);
	MUST(ioctl(vm.vcpu[0], KVM_GET_REGS, &regs));
	regs.rcx = MSR_SYSTEM_TIME;
	regs.rax = gpa | 1;
	regs.rdx = 0;
	MUST(ioctl(vm.vcpu[0], KVM_SET_REGS, &regs));
	CHECK_EQ("wrmsr: goes on", run_here(&w, &vm, kuf, 0), KVM_EXIT_HLT);
	CHECK_EQ("wrmsr: filled once", fills_of(&source, gpa), 1);
	CHECK("wrmsr: written into what was filled", !has_content(host(&vm, gpa), gpa, 32, 0) &&
	      has_content(host(&vm, gpa & -PAGE), gpa & -PAGE, 0x80, 0));
	MUST(set_msr(MSR_SYSTEM_TIME, 0));
}

/* KVM_SET_MSRS writes the page, and waits on the calling thread. */
static void wall_clock(void)
{
	uint64_t gpa = TEST_GPA + 14 * PAGE;

	doing("wall clock", 30);
	CHECK_EQ("wall clock: set", set_msr(MSR_WALL_CLOCK, gpa), 1);
	CHECK_EQ("wall clock: filled once", fills_of(&source, gpa), 1);
	CHECK("wall clock: written into what was filled",
	      !has_content(host(&vm, gpa), gpa, 12, 0) &&
	      has_content(host(&vm, gpa + 12), gpa + 12, PAGE - 12, 0));
}

/* As the documentation requires: pass the page to kuf_kvm_owned, and fill it before vCPUs run. */
static void owned(void)
{
	uint64_t gpa = TEST_GPA + 20 * PAGE + 0x40, faults = stats_of(kuf).faults;

	doing("owned", 30);
	CHECK_KUF("kuf_kvm_owned", kuf_kvm_owned(kuf, gpa, 32), 0);
	CHECK_KUF("kuf_kvm_owned in no slot", kuf_kvm_owned(kuf, TEST_GPA + vm.size, 32), -ENOENT);
	CHECK_KUF("kuf_kvm_owned out of its slot",
		  kuf_kvm_owned(kuf, TEST_GPA + vm.size - 16, 32), -ERANGE);
	CHECK_KUF("kuf_kvm_owned of nothing", kuf_kvm_owned(kuf, gpa, 0), -EINVAL);
	CHECK_KUF("kuf_ensure", kuf_ensure(kuf, gpa, 32, -1), 0);
	MUST(set_msr(MSR_SYSTEM_TIME, gpa | 1));
	set_guest(&vm, 0, guest_nop, 0, 0, 0);
	CHECK_EQ("ensured clock: goes on", run_here(&w, &vm, kuf, 0), KVM_EXIT_HLT);
	CHECK_EQ("ensured clock: no access waited", stats_of(kuf).faults, faults);
	CHECK("ensured clock: written", !has_content(host(&vm, gpa), gpa, 32, 0));
	MUST(set_msr(MSR_SYSTEM_TIME, 0));
}

static _Atomic bool stop;

static void *dropper(void *arg)
{
	(void)arg;
	while (!stop) {
		if (kuf_discard(kuf, TEST_GPA, 16 * PAGE, KUF_DISCARD_REFILL))
			DIE("kuf_discard: %s", kuf_error());
		want_clock_update();
		usleep(300);
	}
	return NULL;
}

static void storm(void)
{
	pthread_t t;
	int good = 0;

	doing("storm", 60);
	MUST(set_msr(MSR_SYSTEM_TIME, (TEST_GPA + 2 * PAGE) | 1));
	MUST(set_msr(MSR_STEAL_TIME, (TEST_GPA + 6 * PAGE) | 1));
	pthread_create(&t, NULL, dropper, NULL);
	for (int i = 0; i < 300; i++) {
		set_guest(&vm, 0, guest_nop, 0, 0, 0);
		good += run_here(&w, &vm, kuf, 0) == KVM_EXIT_HLT;
	}
	stop = true;
	pthread_join(t, NULL);
	CHECK_EQ("clock and steal time while their pages are dropped", good, 300);
	MUST(set_msr(MSR_SYSTEM_TIME, 0));
	MUST(set_msr(MSR_STEAL_TIME, 0));
}

int main(void)
{
	doing("create", 20);
	vm_create(&vm, 64 * PAGE, 1);
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm, &source, 0);
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	kvmclock();
	steal_time();
	by_the_guest();
	wall_clock();
	owned();
	storm();
	close_kuf(kuf, KUF_END_POISON);
	vm_destroy(&vm);
	return finish();
}
