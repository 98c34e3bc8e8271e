/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* More pages whose translations KVM caches: the local APIC's and Xen's. */
#include "test.h"

static struct vm vm;

static void discard(uint64_t gpa)
{
	mark(&vm, gpa & -PAGE, PAGE);
	MUST(madvise(host(&vm, gpa & -PAGE), PAGE, MADV_DONTNEED));
}

static bool zero(uint64_t gpa, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (host(&vm, gpa)[i])
			return false;
	return true;
}

static void *run_once(void *arg)
{
	struct runner *r = arg;

	r->result = run_vcpu(&vm, 0);
	r->done = true;
	return NULL;
}

/* Runs the vCPU up to its first output, and expects KVM to wait for @gpa. */
static void expect_wait(const char *name, uint64_t gpa)
{
	uint64_t gfn = 0;
	struct runner r = { 0 };
	char what[80];
	pthread_t t;

	doing(name, 30);
	set_guest(&vm, 0, guest_outsb, TEST_GPA + 60 * PAGE, 1, 0);
	pthread_create(&t, NULL, run_once, &r);
	snprintf(what, sizeof(what), "%s: event", name);
	CHECK(what, wait_event(&vm, 20000) && read_event(&vm) == 1);
	int e = read_fault(&vm, &gfn);
	snprintf(what, sizeof(what), "%s: gfn", name);
	CHECK(what, !e && gfn == gpa / PAGE);
	sleep_ms(50);
	snprintf(what, sizeof(what), "%s: waits", name);
	CHECK(what, !r.done && zero(gpa & -PAGE, PAGE));
	unmark(&vm, gpa & -PAGE, PAGE);
	pthread_join(t, NULL);
	snprintf(what, sizeof(what), "%s: goes on", name);
	CHECK_EQ(what, r.result, KVM_EXIT_IO);
	/* KVM must complete the output before the next one. */
	vm.run[0]->immediate_exit = 1;
	ioctl(vm.vcpu[0], KVM_RUN, 0);
	vm.run[0]->immediate_exit = 0;
}

/* Uses gfn_to_hva_cache in other places than the clocks do. */
static void vapic(void)
{
	struct kvm_vapic_addr va = { .vapic_addr = TEST_GPA + 3 * PAGE + 0x40 };

	doing("vapic", 30);
	discard(va.vapic_addr);
	CHECK_ERRNO("setting the address does not wait",
		    ioctl(vm.vcpu[0], KVM_SET_VAPIC_ADDR, &va), 0);
	expect_wait("vapic", va.vapic_addr);
	discard(va.vapic_addr);
	expect_wait("vapic again", va.vapic_addr);
	va.vapic_addr = 0;
	MUST(ioctl(vm.vcpu[0], KVM_SET_VAPIC_ADDR, &va));
}

static int xen_vm_attr(uint16_t type, uint64_t value)
{
	struct kvm_xen_hvm_attr a = { .type = type };

	a.u.shared_info.gfn = value;
	return ioctl(vm.fd, KVM_XEN_HVM_SET_ATTR, &a);
}

static int xen_vcpu_attr(uint16_t type, uint64_t gpa)
{
	struct kvm_xen_vcpu_attr a = { .type = type };

	a.u.gpa = gpa;
	return ioctl(vm.vcpu[0], KVM_XEN_VCPU_SET_ATTR, &a);
}

static void xen(void)
{
	struct kvm_xen_hvm_config config = { .msr = 0x40000200 };
	uint64_t shared = TEST_GPA + 5 * PAGE, info = TEST_GPA + 6 * PAGE;
	uint64_t time = TEST_GPA + 7 * PAGE, runstate = TEST_GPA + 8 * PAGE;
	struct kvm_irq_routing_xen_evtchn send = { .port = 3, .vcpu = 0, .priority = -1 };
	int flags = ioctl(vm.kvm, KVM_CHECK_EXTENSION, KVM_CAP_XEN_HVM);

	doing("xen", 60);
	if (!(flags & KVM_XEN_HVM_CONFIG_SHARED_INFO)) {
		skip("xen", "not in this kernel");
		return;
	}
	config.flags = 0;
	MUST(ioctl(vm.fd, KVM_XEN_HVM_CONFIG, &config));
	struct kvm_xen_hvm_attr longmode = { .type = KVM_XEN_ATTR_TYPE_LONG_MODE };
	longmode.u.long_mode = 1;
	MUST(ioctl(vm.fd, KVM_XEN_HVM_SET_ATTR, &longmode));

	/* Ioctls that hold locks with which they must not wait: they fail. */
	discard(shared);
	CHECK_ERRNO("shared_info on a marked page",
		    xen_vm_attr(KVM_XEN_ATTR_TYPE_SHARED_INFO, shared / PAGE), EFAULT);
	unmark(&vm, shared, PAGE);
	CHECK_ERRNO("shared_info on the page when it is there",
		    xen_vm_attr(KVM_XEN_ATTR_TYPE_SHARED_INFO, shared / PAGE), 0);
	discard(info);
	CHECK_ERRNO("vcpu_info on a marked page",
		    xen_vcpu_attr(KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, info), EFAULT);
	unmark(&vm, info, PAGE);
	CHECK_ERRNO("vcpu_info on the page when it is there",
		    xen_vcpu_attr(KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, info), 0);

	/* Deliver an event from userspace. */
	CHECK("event", ioctl(vm.fd, KVM_XEN_HVM_EVTCHN_SEND, &send) >= 0);
	CHECK("event is pending", *(uint64_t *)host(&vm, shared + 64 * 32) == 1 << 3 ||
				  !zero(shared, PAGE));
	discard(shared);
	CHECK_ERRNO("event with shared_info marked",
		    ioctl(vm.fd, KVM_XEN_HVM_EVTCHN_SEND, &send), EFAULT);
	CHECK("nothing written", zero(shared, PAGE));
	unmark(&vm, shared, PAGE);
	CHECK("event when it is there again",
	      ioctl(vm.fd, KVM_XEN_HVM_EVTCHN_SEND, &send) >= 0);

	/* The vCPU waits in KVM_RUN for a page that it writes itself. */
	MUST(xen_vcpu_attr(KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, time));
	discard(time);
	struct kvm_clock_data c = { 0 };
	MUST(ioctl(vm.fd, KVM_SET_CLOCK, &c));
	expect_wait("vcpu_time_info", time);
	CHECK("vcpu_time_info is written", !zero(time, PAGE));
	if (flags & KVM_XEN_HVM_CONFIG_RUNSTATE) {
		MUST(xen_vcpu_attr(KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, runstate));
		discard(runstate);
		/* Loading the vCPU makes KVM record its run state. */
		expect_wait("runstate", runstate);
		CHECK("runstate is written", !zero(runstate, PAGE));

		/* Data on two pages has two translations. */
		uint64_t two = TEST_GPA + 11 * PAGE - 16;
		MUST(xen_vcpu_attr(KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, two));
		discard(two + PAGE);
		expect_wait("runstate, second page", two + PAGE);
		CHECK("second page is written", !zero(two + 16, PAGE));
	}
}

int main(void)
{
	doing("create", 20);
	vm_create(&vm, 64 * PAGE, 0);
	MUST(ioctl(vm.fd, KVM_CREATE_IRQCHIP, 0));
	add_vcpu(&vm);
	enable(&vm);
	vapic();
	xen();
	doing("destroy", 20);
	vm_destroy(&vm);
	return finish();
}
