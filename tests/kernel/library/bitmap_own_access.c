/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The bitmap stops only vCPUs. The userfaultfd catches KVM's own accesses and the VMM's threads. One service handles
 * both: one fill for all of them, and all continue.
 */
#include "bitmap.h"

#include <linux/userfaultfd.h>

#define PAGES 128UL
#define SIZE (PAGES * PAGE)
#define MSR_WALL_CLOCK 0x4b564d00
#define MSR_SYSTEM_TIME 0x4b564d01
#define MSR_STEAL_TIME 0x4b564d03

static struct rig r;

static void kvm(void)
{
	uint64_t a = TEST_GPA + 2 * PAGE + 0x700, b = TEST_GPA + 5 * PAGE - 8, c = TEST_GPA + 9 * PAGE + 0x100;
	unsigned int exits;

	doing("KVM", 30);
	CHECK("rep outsb: content", kvm_reads(&r, 0, a, 16, 0));
	CHECK_EQ("rep outsb: by userfaultfd", stats(&r).faults, 1);
	CHECK("rep outsb: bit clear", !bit(&r, a));
	CHECK("rep outsb: the vCPU has it too", reads(&r, 0, a, 0, &exits) && exits == 0);
	CHECK("rep outsb across pages", kvm_reads(&r, 0, b, 16, 0));
	CHECK_EQ("rep outsb across pages: a fault each", stats(&r).faults, 3);

	struct vcpu v = { .rig = &r, .cpu = 1, .in = 0xa7 };
	set_guest(&r.vm, 1, guest_insb, c, 32, 0);
	CHECK_EQ("rep insb: goes on", drive(&v), KVM_EXIT_HLT);
	CHECK_EQ("rep insb: by userfaultfd", stats(&r).faults, 4);
	CHECK("rep insb: into the page's own bytes",
	      is_pattern(host(&r.vm, c & -PAGE), c & -PAGE, 0x100) && all_bytes(host(&r.vm, c), 32, 0xa7) &&
	      is_pattern(host(&r.vm, c + 32), c + 32, PAGE - 0x100 - 32));
	CHECK_EQ("no exits", stats(&r).vcpu_faults, 0);
}

/* Pages that KVM writes when it enters the guest. */
static void clocks(void)
{
	static const struct {
		const char *name;
		uint32_t msr;
		uint64_t gpa, bit;
		size_t size;
	} m[] = {
		{ "kvmclock", MSR_SYSTEM_TIME, TEST_GPA + 20 * PAGE + 0x40, 1, 32 },
		{ "steal time", MSR_STEAL_TIME, TEST_GPA + 22 * PAGE + 0x40, 1, 64 },
		{ "wall clock", MSR_WALL_CLOCK, TEST_GPA + 24 * PAGE, 0, 12 },
	};
	uint64_t faults = stats(&r).faults;

	for (int i = 0; i < 3; i++) {
		uint64_t page = m[i].gpa & -PAGE, end = m[i].gpa + m[i].size;
		char what[80];

		doing(m[i].name, 30);
		CHECK_EQ(m[i].name, set_msr(&r, 0, m[i].msr, m[i].gpa | m[i].bit), 1);
		set_guest(&r.vm, 0, guest_nop, 0, 0, 0);
		snprintf(what, sizeof(what), "%s: runs", m[i].name);
		CHECK(what, run_to(&r, 0, 0, NULL));
		snprintf(what, sizeof(what), "%s: written into the page's own bytes", m[i].name);
		CHECK(what, !is_pattern(host(&r.vm, m[i].gpa), m[i].gpa, m[i].size) &&
		      is_pattern(host(&r.vm, page), page, m[i].gpa - page) &&
		      is_pattern(host(&r.vm, end), end, page + PAGE - end));
		snprintf(what, sizeof(what), "%s: by userfaultfd", m[i].name);
		CHECK_EQ(what, stats(&r).faults, ++faults);
		set_msr(&r, 0, m[i].msr, 0);
	}
	CHECK_EQ("clocks: no exits", stats(&r).vcpu_faults, 0);
}

static void vmm(void)
{
	uint64_t a = TEST_GPA + 30 * PAGE, b = TEST_GPA + 32 * PAGE;
	uint64_t faults = stats(&r).faults;
	unsigned int exits;

	doing("the VMM's own threads", 30);
	CHECK("VMM reads", page_is(&r, a, 0));
	*host(&r.vm, b + 5) = 0x77;
	CHECK("VMM writes", *host(&r.vm, b + 5) == 0x77 && is_pattern(host(&r.vm, b), b, 5) &&
	      is_pattern(host(&r.vm, b + 6), b + 6, PAGE - 6));
	CHECK_EQ("VMM: by userfaultfd", stats(&r).faults, faults + 2);
	CHECK("VMM: bits clear", !bit(&r, a) && !bit(&r, b));
	CHECK("VMM: the vCPU has it too", reads(&r, 0, a, 0, &exits) && exits == 0);
	CHECK_KUF("kuf_ensure", kuf_ensure(r.kuf, TEST_GPA + 34 * PAGE, 2 * PAGE, -1), 0);
	CHECK_EQ("kuf_ensure: no fault", stats(&r).faults, faults + 2);
	CHECK("kuf_ensure: bits clear", !bit(&r, TEST_GPA + 34 * PAGE) && !bit(&r, TEST_GPA + 35 * PAGE));
	CHECK("kuf_ensure: content", page_is(&r, TEST_GPA + 35 * PAGE, 0));
}

/* ---- all of them access the same page at once ---- */

static pthread_barrier_t line;
static _Atomic uint64_t at;
static _Atomic bool stop, good;

static void *by_vcpu(void *arg)
{
	int cpu = (int)(intptr_t)arg;

	for (;;) {
		pthread_barrier_wait(&line);
		if (stop)
			return NULL;
		if (!(cpu ? reads(&r, cpu, at, 0, NULL) : kvm_reads(&r, cpu, at + 8, 8, 0)))
			good = false;
		pthread_barrier_wait(&line);
	}
}

static void *by_vmm(void *arg)
{
	(void)arg;
	for (;;) {
		pthread_barrier_wait(&line);
		if (stop)
			return NULL;
		if (!page_is(&r, at, 0))
			good = false;
		pthread_barrier_wait(&line);
	}
}

static void together(void)
{
	static _Atomic uint8_t asked[PAGES];
	pthread_t t[4];
	bool once = true;

	doing("the same page at once", 60);
	stop = false;
	good = true;
	memset((void *)asked, 0, sizeof(asked));
	rig_vm(&r, anon(SIZE), SIZE, 3);
	struct kuf_options o = rig_options(&r);
	o.demand_run = PAGE; /* no readahead */
	rig_open(&r, o);
	rig_add(&r, rig_slot(&r, BY_LIBRARY));
	r.source.asked = asked;
	pthread_barrier_init(&line, NULL, 5);
	for (intptr_t i = 0; i < 3; i++)
		pthread_create(&t[i], NULL, by_vcpu, (void *)i);
	pthread_create(&t[3], NULL, by_vmm, NULL);
	for (uint64_t i = 0; i < PAGES; i++) {
		struct kuf_populate_request p = { .size = sizeof(p), .gpa = TEST_GPA + i * PAGE, .len = PAGE };

		struct kuf_stats_info was = stats(&r);

		at = p.gpa;
		/* Vary the order: populate is first in each other round, and half of the rounds hold the fill until all wait. */
		r.source.held_gpa = i % 4 < 2 ? p.gpa : UINT64_MAX;
		if (i % 2 == 0)
			MUST_KUF(kuf_populate(r.kuf, &p));
		if (i % 4 == 0)
			AWAIT(r.source.inside == 1);
		pthread_barrier_wait(&line);
		if (i % 4 < 2) {
			AWAIT(stats(&r).vcpu_faults == was.vcpu_faults + 2);
			AWAIT(stats(&r).faults == was.faults + 2);
		}
		for (unsigned int n = i % 7; n; n--)
			sched_yield();
		if (i % 2)
			MUST_KUF(kuf_populate(r.kuf, &p));
		r.source.held_gpa = UINT64_MAX;
		pthread_barrier_wait(&line);
		once = once && asked[i] == 1;
	}
	stop = true;
	pthread_barrier_wait(&line);
	for (int i = 0; i < 4; i++)
		pthread_join(t[i], NULL);
	CHECK("at once: all have the right content", good);
	CHECK("at once: every page was asked for once", once);
	/* The waiting thread may get here before the thread that filled the page has counted it. */
	AWAIT(r.source.events[KUF_EVENT_COMPLETE] == 1);
	struct kuf_stats_info s = stats(&r);
	dprintf(1, "# at once: %llu exits, %llu faults (%llu joined, %llu late), %llu bytes by populate\n",
		(unsigned long long)s.vcpu_faults, (unsigned long long)s.faults, (unsigned long long)s.faults_joined,
		(unsigned long long)s.faults_late, (unsigned long long)s.bytes_populated);
	CHECK("at once: all of them came", s.vcpu_faults >= PAGES && s.faults >= PAGES && s.bytes_populated >= SIZE / 4);
	CHECK_EQ("at once: each byte once", s.bytes_copied, SIZE);
	CHECK_EQ("at once: no bit left", bits(&r, TEST_GPA, PAGES), 0);
	rig_end(&r, 0);
}

/* KVM waits in the userfaultfd; then a vCPU exits for the page, waits for the same fill, and both continue. */
static void after(void)
{
	uint64_t a = TEST_GPA + 3 * PAGE;
	struct vcpu k = { 0 }, v = { 0 };

	doing("one after the other", 30);
	rig_start(&r, anon(SIZE), SIZE, 2, HOST, 0, 0);
	r.source.held_gpa = a;
	set_guest(&r.vm, 0, guest_outsb, a, 8, 0);
	vcpu_start(&k, &r, 0);
	AWAIT(r.source.inside == 1);
	set_guest(&r.vm, 1, guest_read, a, 0, 0);
	vcpu_start(&v, &r, 1);
	AWAIT(stats(&r).vcpu_faults == 1);
	sleep_ms(50);
	CHECK("both wait", !k.done && !v.done && bit(&r, a));
	r.source.held_gpa = UINT64_MAX;
	CHECK_EQ("KVM goes on", vcpu_join(&k), KVM_EXIT_HLT);
	CHECK_EQ("the vCPU goes on", vcpu_join(&v), KVM_EXIT_HLT);
	CHECK("content", is_pattern(k.out, a, 8) && guest_rax(&r.vm, 1) == pattern64(a));
	CHECK_EQ("one fill", r.source.fills, 1);

	/* In the opposite order. */
	a += PAGE;
	r.source.held_gpa = a;
	set_guest(&r.vm, 1, guest_read, a, 0, 0);
	vcpu_start(&v, &r, 1);
	AWAIT(r.source.inside == 1);
	set_guest(&r.vm, 0, guest_outsb, a, 8, 0);
	vcpu_start(&k, &r, 0);
	AWAIT(stats(&r).faults == 2);
	sleep_ms(50);
	CHECK("both wait again", !k.done && !v.done);
	r.source.held_gpa = UINT64_MAX;
	CHECK_EQ("KVM goes on again", vcpu_join(&k), KVM_EXIT_HLT);
	CHECK_EQ("the vCPU goes on again", vcpu_join(&v), KVM_EXIT_HLT);
	CHECK("content again", is_pattern(k.out, a, 8) && guest_rax(&r.vm, 1) == pattern64(a));
	CHECK_EQ("one fill again", r.source.fills, 2);
	rig_memslot(&r, 0);
	rig_end(&r, KUF_END_POISON);
}

/* Finds the library's userfaultfd, as other code of this process could. */
static int librarys_uffd(void)
{
	for (int fd = 3; fd < 1024; fd++) {
		char path[40], to[64] = "";

		snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
		if (readlink(path, to, sizeof(to) - 1) > 0 && !strcmp(to, "anon_inode:[userfaultfd]"))
			return fd;
	}
	return -1;
}

/* A page that is already present when the library installs it: EEXIST wakes no thread, so the library must. */
static void placed_by_another(void)
{
	uint64_t a = TEST_GPA + 3 * PAGE, b = TEST_GPA + 5 * PAGE;
	static uint8_t page[PAGE];
	struct vcpu k = { 0 }, v = { 0 };
	unsigned int exits;

	doing("placed by another", 30);
	rig_start(&r, anon(SIZE), SIZE, 2, LIBRARY, KUF_MEMORY_POPULATED, 0);
	int uffd = librarys_uffd();
	if (uffd < 0)
		DIE("no userfaultfd to be found");

	for (int i = 0; i < 2; i++) {
		uint64_t gpa = i ? b : a;
		struct uffdio_copy copy = {
			.dst = (uintptr_t)host(&r.vm, gpa), .src = (uintptr_t)page, .len = PAGE,
			.mode = UFFDIO_COPY_MODE_DONTWAKE,
		};

		r.source.held_gpa = gpa;
		set_guest(&r.vm, i, i ? guest_read : guest_outsb, gpa, 8, 0);
		vcpu_start(i ? &v : &k, &r, i);
		AWAIT(r.source.inside == 1);
		write_pages(page, gpa, PAGE, 7);
		MUST(ioctl(uffd, UFFDIO_COPY, &copy));
		sleep_ms(20);
		CHECK("placed by other code: still waits", !(i ? &v : &k)->done);
		r.source.held_gpa = UINT64_MAX;
		CHECK_EQ("placed by other code: continues", vcpu_join(i ? &v : &k), KVM_EXIT_HLT);
	}
	CHECK("KVM sees what is there", k.out_len == 8 && is_pattern(k.out, key(a, 7), 8));
	CHECK("the vCPU sees what is there", guest_rax(&r.vm, 1) == pattern64(key(b, 7)));
	CHECK_EQ("found there", stats(&r).install_exists, 2);
	CHECK("bits clear", !bit(&r, a) && !bit(&r, b));
	CHECK("and no exits any more", reads(&r, 1, a, 7, &exits) && exits == 0);
	rig_end(&r, KUF_END_POISON);
}

int main(void)
{
	doing("start", 30);
	rig_start(&r, anon(SIZE), SIZE, 2, LIBRARY, 0, 0);
	kvm();
	rig_end(&r, KUF_END_POISON);
	rig_start(&r, anon(SIZE), SIZE, 2, HOST, 0, 0);
	clocks();
	vmm();
	rig_memslot(&r, 0);
	rig_end(&r, KUF_END_POISON);
	together();
	after();
	placed_by_another();
	return finish();
}
