/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A page that could not be filled stays inaccessible to the vCPU, to KVM and to the VMM until it is discarded and
 * filled. None of them ever reads zeroes in its place.
 */
#include "bitmap.h"

#include <setjmp.h>

#define PAGES 16UL
#define SIZE (PAGES * PAGE)

static struct rig r;
static char what[120];
#define NAME(text) (snprintf(what, sizeof(what), "%s: %s", kind, text), what)

static sigjmp_buf out;
static _Atomic int bus;
static _Atomic uint64_t bus_at;

static void on_bus(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	bus++;
	bus_at = (uintptr_t)info->si_addr;
}

static void jump(int sig)
{
	(void)sig;
	siglongjmp(out, 1);
}

/* Whether a touch raises SIGBUS. */
static bool raises(uint64_t gpa)
{
	struct sigaction a = { .sa_handler = jump }, old;
	volatile bool raised = true;

	sigaction(SIGBUS, &a, &old);
	if (!sigsetjmp(out, 1)) {
		(void)*(volatile uint8_t *)host(&r.vm, gpa);
		raised = false;
	}
	sigaction(SIGBUS, &old, NULL);
	return raised;
}

/* The vCPU makes no progress, and each kuf_vcpu_fault fails. */
static bool stays_closed(int cpu, uint64_t gpa)
{
	struct vcpu v = { .rig = &r, .cpu = cpu };

	for (int i = 0; i < 3; i++) {
		set_guest(&r.vm, cpu, guest_read, gpa, 0, 0xdead);
		if (drive(&v) != UF_EXIT_MEMORY_FAULT || v.error != -EHWPOISON || guest_rax(&r.vm, cpu) != 0xdead) {
			dprintf(1, "# run %d, kuf_vcpu_fault %d\n", v.result, v.error);
			return false;
		}
	}
	return true;
}

/*
 * KVM's emulator treats memory that it cannot read as a device and asks the VMM for these bytes. The VMM knows from
 * the address that it is memory; it must stop the guest or inject a machine check, but not answer.
 */
static bool kvm_fails(int cpu, uint64_t gpa)
{
	struct vcpu v = { .rig = &r, .cpu = cpu };

	set_guest(&r.vm, cpu, guest_outsb, gpa, 16, 0);
	drive(&v);
	dprintf(1, "# KVM's access to a poisoned page: run %d, %zu bytes, mmio at %#llx\n", v.result, v.out_len,
		(unsigned long long)r.vm.run[cpu]->mmio.phys_addr);
	return v.out_len == 0 && (v.result == -EFAULT || v.result == -EHWPOISON ||
				  (v.result == KVM_EXIT_MMIO && r.vm.run[cpu]->mmio.phys_addr == gpa));
}

static void poison(const char *kind, bool shared, bool huge, enum owner owner)
{
	uint64_t granule = huge ? HUGE : PAGE, size = PAGES / (huge ? 4 : 1) * granule;
	uint64_t a = TEST_GPA + granule, b = TEST_GPA + 2 * granule, other = TEST_GPA + 3 * granule;
	unsigned int exits;
	uint8_t *mem;
	int fd = 0;

	doing(kind, 60);
	if (shared) {
		mem = shared_memory(size, huge ? MFD_HUGETLB : 0, &fd);
	} else {
		mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | (huge ? MAP_HUGETLB : 0), -1, 0);
	}
	if (!mem || mem == MAP_FAILED) {
		skip(kind, "no such memory here");
		return;
	}
	rig_start(&r, mem, size, 3, owner, 0, fd);

	/* A vCPU is first. */
	r.source.bad_gpa = a;
	r.source.bad_answer = -EIO;
	CHECK(NAME("the vCPU is told, each time"), stays_closed(0, a + 0x18));
	CHECK_EQ(NAME("the source was asked once"), r.source.fills, 1);
	CHECK(NAME("bit stays set"), bit(&r, a));
	CHECK(NAME("event"), r.source.events[KUF_EVENT_POISONED] == 1 &&
	      r.source.event_gpa[KUF_EVENT_POISONED] == a);
	CHECK(NAME("KVM's own access fails"), kvm_fails(1, a + 0x20));
	CHECK(NAME("the VMM's raises SIGBUS"), raises(a + 0x30));
	/* A VMM detects this by kuf_ensure, when KVM reports MMIO at an address in memory. */
	CHECK_KUF(NAME("kuf_ensure says so"), kuf_ensure(r.kuf, a, 8, -1), -EHWPOISON);

	/* KVM is first. */
	r.source.bad_gpa = b;
	CHECK(NAME("KVM first: its access fails"), kvm_fails(2, b + 0x20));
	CHECK(NAME("KVM first: then the vCPU is told"), stays_closed(0, b));
	AWAIT(r.source.events[KUF_EVENT_POISONED] == 2);

	/* The caller poisons a page that was not requested yet. */
	r.source.bad_gpa = UINT64_MAX;
	if (!huge) {
		uint64_t c = TEST_GPA + 5 * PAGE;
		CHECK_KUF(NAME("kuf_resolve poisons"), kuf_resolve(r.kuf, c, NULL, PAGE, KUF_RESOLVE_POISON), PAGE);
		CHECK(NAME("kuf_resolve poisons: the vCPU is told"), stays_closed(0, c));
	}
	CHECK(NAME("others are served"), reads(&r, 0, other, 0, &exits) && exits == 1);
	struct kuf_progress_info p = progress(&r, TEST_GPA);
	CHECK_EQ(NAME("counted"), p.poisoned, (huge ? 2 : 3) * granule);

	/* Discard and fill again. */
	r.source.generation = 1;
	CHECK_KUF(NAME("discard"), kuf_discard(r.kuf, a, granule, KUF_DISCARD_REFILL), 0);
	CHECK(NAME("discard: the vCPU gets on"), reads(&r, 0, a + 0x18, 1, &exits) && exits == 1);
	CHECK_KUF(NAME("discard, given back"), kuf_discard(r.kuf, b, granule, KUF_DISCARD_ZERO), 0);
	CHECK(NAME("discard, given back: the vCPU gets on"), reads_zero(&r, 0, b, &exits) && exits <= 1);
	CHECK(NAME("discard: KVM, too"), kvm_reads(&r, 0, a + 0x20, 16, 1));

	/* At the end the absent pages are poisoned, and no flag makes a vCPU exit. */
	uint64_t left = huge ? TEST_GPA : TEST_GPA + 9 * PAGE;
	if (owner == HOST) {
		rig_memslot(&r, 0);
		CHECK_KUF(NAME("closes, poisoning"), kuf_close(&r.kuf, KUF_END_POISON), 0);
	} else {
		CHECK_KUF(NAME("closes, poisoning"), kuf_close(&r.kuf, KUF_END_POISON), 0);
	}
	struct sigaction sa = { .sa_sigaction = on_bus, .sa_flags = SA_SIGINFO };
	sigaction(SIGBUS, &sa, NULL);
	bus = 0;
	set_guest(&r.vm, 0, guest_read, left, 0, 0xdead);
	int result = ioctl(r.vm.vcpu[0], KVM_RUN, 0);
	int error = errno;
	dprintf(1, "# after the end: KVM_RUN %d (errno %d), exit reason %u, %d signals\n", result, error,
		r.vm.run[0]->exit_reason, (int)bus);
	CHECK(NAME("after the end: the vCPU does not get on"),
	      result < 0 && (error == EINTR || error == EFAULT || error == EHWPOISON));
	CHECK(NAME("after the end: it is told where"),
	      error != EINTR || (bus >= 1 && (bus_at & -granule) == (uintptr_t)host(&r.vm, left)));
	CHECK(NAME("after the end: what was present is"), reads(&r, 0, other, 0, &exits) && exits == 0);
	sa.sa_flags = 0;
	sa.sa_handler = SIG_DFL;
	sigaction(SIGBUS, &sa, NULL);
	rig_end(&r, 0);
	if (fd)
		close(fd);
}

/* A slot with poisoned pages is not complete: its flag stays set, but it can be removed. */
static void slot(void)
{
	const char *kind = "slot";
	unsigned int exits;
	bool good = true;

	doing(kind, 30);
	rig_start(&r, anon(SIZE), SIZE, 1, LIBRARY, 0, 0);
	r.source.bad_gpa = TEST_GPA + 7 * PAGE;
	r.source.bad_answer = -EIO;
	CHECK(NAME("poisoned"), stays_closed(0, TEST_GPA + 7 * PAGE));
	for (uint64_t n = 0; n < PAGES; n++)
		good = good && (n == 7 || reads(&r, 0, TEST_GPA + n * PAGE, 0, NULL));
	CHECK(NAME("the rest is there"), good);
	sleep_ms(50);
	CHECK_EQ(NAME("not complete"), r.source.events[KUF_EVENT_COMPLETE], 0);
	CHECK(NAME("the flag is on: the vCPU leaves"), stays_closed(0, TEST_GPA + 7 * PAGE));
	r.source.bad_gpa = UINT64_MAX;
	CHECK_KUF(NAME("discard"), kuf_discard(r.kuf, TEST_GPA + 7 * PAGE, PAGE, KUF_DISCARD_REFILL), 0);
	CHECK(NAME("filled"), reads(&r, 0, TEST_GPA + 7 * PAGE, 0, &exits) && exits == 1);
	AWAIT(r.source.events[KUF_EVENT_COMPLETE] == 1);
	CHECK_KUF(NAME("removed"), kuf_remove_memory(r.kuf, TEST_GPA, 0), 0);
	rig_end(&r, 0);
}

int main(void)
{
	poison("private", false, false, HOST);
	poison("private, library's memslot", false, false, LIBRARY);
	poison("shared", true, false, HOST);
	poison("shared, library's memslot", true, false, LIBRARY);
	poison("huge", false, true, LIBRARY);
	poison("shared huge", true, true, LIBRARY);
	slot();
	return finish();
}
