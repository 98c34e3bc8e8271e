/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Thousands of accesses wait in KVM's queue at once.  One fill thread serves them in
 * their order and forgets none.
 */
#include "async.h"

#include <sys/resource.h>

#define PART MAX_VCPUS
#define PARTS 8
#define MANY (PART * PARTS)

/* One VM with more vCPUs than fit into struct vm. */
static struct vm vm[PARTS];
static struct worker w[MANY];
static struct source source;
static struct kuf *kuf;
static int nr;

static void add_vcpus(void)
{
	long max = ioctl(vm[0].fd, KVM_CHECK_EXTENSION, KVM_CAP_MAX_VCPUS);
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[128];
	} cpuid = { .head.nent = 128 };
	long size = MUST(ioctl(vm[0].kvm, KVM_GET_VCPU_MMAP_SIZE, 0));

	MUST(ioctl(vm[0].kvm, KVM_GET_SUPPORTED_CPUID, &cpuid.head));
	nr = max < MANY ? (int)max : MANY;
	for (int i = 0; i < nr; i++) {
		struct vm *v = &vm[i / PART];

		if (i % PART == 0 && i)
			*v = (struct vm){ .kvm = vm[0].kvm, .fd = vm[0].fd, .low = vm[0].low,
					  .mem = vm[0].mem, .size = vm[0].size, .event = -1 };
		v->vcpu[i % PART] = (int)MUST(ioctl(vm[0].fd, KVM_CREATE_VCPU, (unsigned long)i));
		v->run[i % PART] = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED,
					v->vcpu[i % PART], 0);
		if (v->run[i % PART] == MAP_FAILED)
			DIE("mmap of kvm_run: %s", strerror(errno));
		MUST(ioctl(v->vcpu[i % PART], KVM_SET_CPUID2, &cpuid.head));
		v->nr_vcpus++;
	}
}

static void start(int i, uint64_t gpa)
{
	struct vm *v = &vm[i / PART];

	set_guest(v, i % PART, guest_outsb, gpa, 16, 0);
	worker_start(&w[i], v, kuf, i % PART);
}

/* The accesses start one after another, while the first fill is held. */
static void in_order(int round, int count)
{
	bool order = true, good = true, once = true;
	uint64_t gpa[MANY];
	struct eventfds events = eventfds_but(NULL);
	double started;

	doing("in order", 300);
	source_init(&source, TEST_GPA);
	source.generation = round;
	kuf = open_options(&vm[0], (struct kuf_options){ .fill = source_fill,
			   .event = source_event, .opaque = &source, .fill_threads = 1,
			   .demand_run = PAGE });
	events = eventfds_but(&events);
	MUST(madvise(vm[0].mem, vm[0].size, MADV_DONTNEED));
	add_slot(kuf, TEST_GPA, vm[0].mem, vm[0].size);
	source.hold = true;
	started = now_s();
	for (int i = 0; i < count; i++) {
		/* The number of pages is a power of two and the factor is odd: each page once, scattered. */
		gpa[i] = TEST_GPA + (uint64_t)(i * 37 + round) % MANY * PAGE + i % 64 * 16;
		start(i, gpa[i]);
		/* The entry is read, or signalled but not read yet because the library's room is full. */
		if (!COMES_TRUE(stats_of(kuf).faults + sum_of(&events) == (uint64_t)i + 1))
			DIE("vCPU %d: no signal", i);
	}
	dprintf(1, "# %d wait after %.1f s\n", count, now_s() - started);
	CHECK_EQ("one is being filled", source.calls, 1);
	started = now_s();
	source.hold = false;
	for (int i = 0; i < count; i++) {
		good = worker_join(&w[i]) == KVM_EXIT_HLT && w[i].out_len == 16 &&
		       has_content(w[i].out, gpa[i], 16, round) && good;
		once = fills_of(&source, gpa[i]) == 1 && once;
	}
	dprintf(1, "# all have gone on after %.1f s\n", now_s() - started);
	CHECK("all go on with their bytes", good);
	CHECK("each page was filled once", once);
	CHECK_EQ("as many fills as waiting accesses", source.calls, count);
	for (int i = 0; i < count && order; i++) {
		order = source.order[i] == (gpa[i] & -PAGE);
		if (!order)
			dprintf(1, "# out of order at %d: page %" PRIu64 ", not %" PRIu64 "\n", i,
				(source.order[i] - TEST_GPA) / PAGE, (gpa[i] - TEST_GPA) / PAGE);
	}
	CHECK("served in the order in which they came", order);
	CHECK_EQ("all of them were read", stats_of(kuf).faults, count);
	close_kuf(kuf, KUF_END_POPULATE);
}

/* All vCPUs access the same few pages. */
static void same_pages(void)
{
	bool good = true;

	doing("same pages", 120);
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm[0], &source, 0);
	MUST(madvise(vm[0].mem, vm[0].size, MADV_DONTNEED));
	add_slot(kuf, TEST_GPA, vm[0].mem, vm[0].size);
	source.hold = true;
	for (int i = 0; i < nr; i++)
		start(i, TEST_GPA + i % 3 * 64 * PAGE + 128);
	for (int i = 0; i < nr; i++) {
		if (sleeps_in_kvm(&w[i]))
			continue;
		dprintf(1, "# vCPU %d does not wait: state %c, done %d, result %d, %d, %u exits\n", i,
			thread_state(w[i].tid), w[i].done, w[i].result, w[i].refused, w[i].exits);
		good = false;
		break;
	}
	CHECK("all wait for three pages", good);
	source.hold = false;
	for (int i = 0; i < nr; i++)
		good = worker_join(&w[i]) == KVM_EXIT_HLT && w[i].out_len == 16 &&
		       has_content(w[i].out, TEST_GPA + i % 3 * 64 * PAGE + 128, 16, 0) && good;
	CHECK("all go on", good);
	CHECK("three fills", fills_of(&source, TEST_GPA) == 1 &&
	      fills_of(&source, TEST_GPA + 64 * PAGE) == 1 &&
	      fills_of(&source, TEST_GPA + 128 * PAGE) == 1);
	CHECK_EQ("no other", source.calls, 3);
	close_kuf(kuf, KUF_END_POPULATE);
}

int main(void)
{
	struct rlimit files = { 4 * MANY, 4 * MANY };

	doing("create", 120);
	MUST(setrlimit(RLIMIT_NOFILE, &files));
	vm_create(&vm[0], MANY * PAGE, 0);
	add_vcpus();
	dprintf(1, "# %d vCPUs\n", nr);
	CHECK("there are many", nr >= 1000);
	in_order(0, nr);
	/* Fewer, because a vCPU that has changed its thread starts slowly. */
	in_order(1, nr / 4);
	same_pages();
	return finish();
}
