/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A page that a vCPU, KVM, a thread of the VMM and populate need at the same time is
 * filled once, and all of them continue with its bytes.
 */
#include "async.h"

#define PAGES 256UL
#define VCPUS 4

static struct vm vm;
static struct source source;
static struct kuf *kuf;

/* All of them wait before the fill ends. */
static void together(void)
{
	uint64_t gpa = TEST_GPA + 7 * PAGE;
	struct kuf_populate_request p = { .size = sizeof(p), .gpa = gpa, .len = PAGE };
	struct worker w[VCPUS];
	struct kuf_stats_info before = stats_of(kuf);

	doing("together", 60);
	source.hold = true;
	/* populate is first, then two accesses of KVM, then vCPUs. */
	CHECK_KUF("populate", kuf_populate(kuf, &p), 0);
	CHECK("populate asks", COMES_TRUE(source.inside == 1));
	for (int i = 0; i < VCPUS; i++) {
		set_guest(&vm, i, i < 2 ? guest_outsb : guest_read, gpa + 64 * i, 16, 0);
		worker_start(&w[i], &vm, kuf, i);
	}
	CHECK("KVM waits", sleeps_in_kvm(&w[0]) && sleeps_in_kvm(&w[1]));
	CHECK("vCPUs have left for it", COMES_TRUE(w[2].exits == 1 && w[3].exits == 1));
	CHECK_KUF("kuf_ensure waits, too", kuf_ensure(kuf, gpa, 8, 20), -ETIMEDOUT);
	CHECK("KVM's are joined", COMES_TRUE(stats_of(kuf).faults_joined ==
					     before.faults_joined + 2));
	CHECK_EQ("it was asked for once", fills_of(&source, gpa), 1);
	CHECK_EQ("no vCPU has continued", w[0].done + w[1].done + w[2].done + w[3].done, 0);
	source.hold = false;
	for (int i = 0; i < VCPUS; i++)
		CHECK_EQ("goes on", worker_join(&w[i]), KVM_EXIT_HLT);
	CHECK_EQ("filled once", fills_of(&source, gpa), 1);
	CHECK("KVM's bytes", w[0].out_len == 16 && has_content(w[0].out, gpa, 16, 0) &&
	      w[1].out_len == 16 && has_content(w[1].out, gpa + 64, 16, 0));
	CHECK("the vCPUs' bytes", guest_rax(&vm, 2) == content64(gpa + 128, 0) &&
	      guest_rax(&vm, 3) == content64(gpa + 192, 0));
	CHECK_KUF("kuf_ensure", kuf_ensure(kuf, gpa, 8, 0), 0);
}

/* KVM is first, so that kuf_vcpu_fault on the vCPU's thread finds the fill in progress. */
static void kvm_first(void)
{
	uint64_t gpa = TEST_GPA + 9 * PAGE;
	struct worker w[2];

	doing("KVM first", 60);
	source.hold = true;
	set_guest(&vm, 0, guest_outsb, gpa, 16, 0);
	worker_start(&w[0], &vm, kuf, 0);
	CHECK("KVM's fault is being filled", COMES_TRUE(source.inside == 1));
	set_guest(&vm, 1, guest_write, gpa + 512, 0, 0x1234567812345678);
	worker_start(&w[1], &vm, kuf, 1);
	CHECK("a vCPU joins it", COMES_TRUE(w[1].exits == 1));
	sleep_ms(20);
	CHECK_EQ("and waits", w[1].done, 0);
	source.hold = false;
	CHECK_EQ("KVM goes on", worker_join(&w[0]), KVM_EXIT_HLT);
	CHECK_EQ("the vCPU goes on", worker_join(&w[1]), KVM_EXIT_HLT);
	CHECK_EQ("one fill for both", fills_of(&source, gpa), 1);
	CHECK("KVM's bytes, the other way round", has_content(w[0].out, gpa, 16, 0));
	CHECK_EQ("what was written", *(uint64_t *)host(&vm, gpa + 512), 0x1234567812345678);
	CHECK("around it what was filled", has_content(host(&vm, gpa), gpa, 512, 0) &&
	      has_content(host(&vm, gpa + 520), gpa + 520, PAGE - 520, 0));
}

static void *ensurer(void *arg)
{
	_Atomic int *bad = arg;

	for (uint64_t gpa = TEST_GPA; gpa < TEST_GPA + PAGES * PAGE; gpa += PAGE) {
		if (kuf_ensure(kuf, gpa, PAGE, -1) ||
		    !has_content(host(&vm, gpa), gpa, PAGE, source.generation))
			(*bad)++;
	}
	return NULL;
}

struct reader {
	pthread_t thread;
	int cpu;
	bool kvm;
	_Atomic int bad;
};

/* Most read the pages in the same order, with KVM ahead of the others. */
static void *reader_main(void *arg)
{
	struct reader *r = arg;
	uint8_t out[16];

	for (uint64_t i = 0; i < PAGES; i++) {
		uint64_t gpa = TEST_GPA + (r->cpu == 3 ? PAGES - 1 - i : i) * PAGE;
		uint64_t at = gpa + 128 * (r->cpu + 1);

		if (r->kvm ? !kvm_reads(&vm, kuf, r->cpu, at, out) ||
			     !has_content(out, at, 16, source.generation) :
			     !guest_reads(&vm, kuf, r->cpu, at, content64(at, source.generation)))
			r->bad++;
	}
	return NULL;
}

static void all_at_once(int round)
{
	struct kuf_populate_request p = { .size = sizeof(p), .gpa = TEST_GPA, .len = PAGES * PAGE,
				   .rate = 2 << 20 };
	struct reader r[VCPUS];
	_Atomic int bad = 0;
	pthread_t t;
	bool once = true;

	doing("all at once", 60);
	source.generation = round + 1;
	source.delay_us = round % 2 ? 200 : 0;
	CHECK_KUF("discard", kuf_discard(kuf, TEST_GPA, PAGES * PAGE, KUF_DISCARD_REFILL), 0);
	memset((void *)source.fills, 0, sizeof(source.fills));
	for (int i = 0; i < VCPUS; i++) {
		r[i] = (struct reader){ .cpu = i, .kvm = i % 2 };
		pthread_create(&r[i].thread, NULL, reader_main, &r[i]);
	}
	pthread_create(&t, NULL, ensurer, &bad);
	CHECK_KUF("populate", kuf_populate(kuf, &p), 0);
	for (int i = 0; i < VCPUS; i++) {
		pthread_join(r[i].thread, NULL);
		CHECK_EQ("every byte read is right", r[i].bad, 0);
	}
	pthread_join(t, NULL);
	CHECK_EQ("the VMM's thread: every byte is right", bad, 0);
	CHECK("populated", wait_for_event(&source, KUF_EVENT_POPULATED, round + 2));
	for (uint64_t i = 0; i < PAGES; i++)
		once = once && source.fills[i] == 1;
	CHECK("every page is filled exactly once", once);
	CHECK("complete", COMES_TRUE(progress_of(kuf, TEST_GPA).flags & KUF_PROGRESS_COMPLETE));
}

int main(void)
{
	doing("create", 20);
	vm_create(&vm, PAGES * PAGE, VCPUS);
	source_init(&source, TEST_GPA);
	kuf = open_options(&vm, (struct kuf_options){ .fill = source_fill, .event = source_event,
			   .opaque = &source, .fill_threads = 3, .demand_run = PAGE });
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	together();
	kvm_first();
	for (int round = 0; round < 6; round++)
		all_at_once(round);
	struct kuf_stats_info st = stats_of(kuf);
	dprintf(1, "# %" PRIu64 " faults, %" PRIu64 " joined, %" PRIu64 " late, %" PRIu64
		" vCPU exits\n", st.faults, st.faults_joined, st.faults_late, st.vcpu_faults);
	CHECK("KVM's were among them", st.faults > 20);
	CHECK_EQ("none was unknown", st.faults_unknown, 0);
	close_kuf(kuf, 0);
	vm_destroy(&vm);
	return finish();
}
