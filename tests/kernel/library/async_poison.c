/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Pages that cannot be filled stay marked, for a vCPU as for KVM. */
#include "async.h"

#define PAGES 64

static struct vm vm;
static struct source source;
static struct kuf *kuf;

static void fail_at(uint64_t gpa, int answer)
{
	source.bad_answer = answer;
	source.smear = true;
	source.bad = gpa;
}

static void vcpu(void)
{
	uint64_t gpa = TEST_GPA + 4 * PAGE;
	struct worker w;

	doing("vCPU", 30);
	fail_at(gpa, -EIO);
	set_guest(&vm, 0, guest_read, gpa + 8, 0, 0);
	CHECK_EQ("vCPU: kuf_vcpu_fault says so", run_here(&w, &vm, kuf, 0), -EHWPOISON);
	CHECK("vCPU: told of", wait_for_event(&source, KUF_EVENT_POISONED, 1));
	CHECK("vCPU: of this page", source.last[KUF_EVENT_POISONED].gpa == gpa &&
	      source.last[KUF_EVENT_POISONED].len == PAGE &&
	      source.last[KUF_EVENT_POISONED].error == -EIO);
	CHECK_EQ("vCPU: again", run_here(&w, &vm, kuf, 0), -EHWPOISON);
	CHECK_EQ("vCPU: it does exit", w.exits, 1);
	CHECK_EQ("vCPU: a write is no different",
		 (set_guest(&vm, 0, guest_write, gpa, 0, 1), run_here(&w, &vm, kuf, 0)),
		 -EHWPOISON);
	CHECK_KUF("vCPU: kuf_ensure", kuf_ensure(kuf, gpa, 1, -1), -EHWPOISON);
	CHECK_EQ("vCPU: asked for once", fills_of(&source, gpa), 1);
	CHECK_EQ("vCPU: progress", progress_of(kuf, TEST_GPA).poisoned, PAGE);
	CHECK_EQ("vCPU: a thread of the VMM's that does not ask", touch(host(&vm, gpa)), SIGBUS);
	CHECK_KUF("vCPU: no access waits", kuf_kvm_quiesce(kuf, 1000), 0);

	source.bad = NO_GPA;
	CHECK_KUF("vCPU: discard", kuf_discard(kuf, gpa, PAGE, KUF_DISCARD_REFILL), 0);
	CHECK("vCPU: refilled", guest_reads(&vm, kuf, 0, gpa + 8, content64(gpa + 8, 0)));
	CHECK_EQ("vCPU: asked for twice", fills_of(&source, gpa), 2);
	CHECK_EQ("vCPU: nothing parked", source.events[KUF_KVM_EVENT_PARKED], 0);
}

/* KVM waits for the page. The library cannot make this access fail, so KVM keeps waiting. */
static void kvm(void)
{
	uint64_t gpa = TEST_GPA + 8 * PAGE;
	struct worker w;

	doing("KVM", 60);
	fail_at(gpa, -ENXIO);
	set_guest(&vm, 0, guest_outsb, gpa + 0x100, 16, 0);
	worker_start(&w, &vm, kuf, 0);
	CHECK("KVM: parked", wait_for_event(&source, KUF_KVM_EVENT_PARKED, 1));
	CHECK("KVM: of this page", source.last[KUF_KVM_EVENT_PARKED].gpa == gpa &&
	      source.last[KUF_KVM_EVENT_PARKED].len == PAGE &&
	      source.last[KUF_KVM_EVENT_PARKED].error == -EHWPOISON);
	CHECK("KVM: poisoned", wait_for_event(&source, KUF_EVENT_POISONED, 2));
	CHECK_REFUSED("KVM: not quiet", kuf_kvm_quiesce(kuf, 1000), -EHWPOISON, "0x208000");
	CHECK_KUF("KVM: other pages are served", kuf_ensure(kuf, gpa + PAGE, PAGE, -1), 0);
	sleep_ms(100);
	CHECK("KVM: still there", sleeps_in_kvm(&w));
	CHECK_EQ("KVM: told once", source.events[KUF_KVM_EVENT_PARKED], 1);

	/* A vCPU faults on the same page. */
	struct worker other;
	set_guest(&vm, 1, guest_read, gpa, 0, 0);
	CHECK_EQ("KVM: a vCPU besides", run_here(&other, &vm, kuf, 1), -EHWPOISON);

	/* A second KVM access: the event is raised once for each page. */
	set_guest(&vm, 1, guest_outsb, gpa + 0x200, 16, 0);
	worker_start(&other, &vm, kuf, 1);
	CHECK("KVM: a second one is parked", sleeps_in_kvm(&other));
	sleep_ms(50);
	CHECK_EQ("KVM: still told once", source.events[KUF_KVM_EVENT_PARKED], 1);

	source.bad = NO_GPA;
	source.generation = 3;
	CHECK_KUF("KVM: discard", kuf_discard(kuf, gpa, PAGE, KUF_DISCARD_REFILL), 0);
	CHECK_EQ("KVM: it is filled unasked and goes on", worker_join(&w), KVM_EXIT_HLT);
	CHECK_EQ("KVM: so does the second", worker_join(&other), KVM_EXIT_HLT);
	CHECK("KVM: with the new bytes", w.out_len == 16 && has_content(w.out, gpa + 0x100, 16, 3) &&
	      other.out_len == 16 && has_content(other.out, gpa + 0x200, 16, 3));
	CHECK_EQ("KVM: asked for twice", fills_of(&source, gpa), 2);
	CHECK_KUF("KVM: quiet again", kuf_kvm_quiesce(kuf, 10000), 0);
	source.generation = 0;
}

/* Poisoned before KVM's access. */
static void kvm_late(void)
{
	uint64_t gpa = TEST_GPA + 12 * PAGE;
	struct worker w;

	doing("KVM late", 60);
	CHECK_EQ("late: kuf_resolve poisons", kuf_resolve(kuf, gpa, NULL, PAGE, KUF_RESOLVE_POISON),
		 PAGE);
	CHECK_EQ("late: no access is parked yet", source.events[KUF_KVM_EVENT_PARKED], 1);
	set_guest(&vm, 0, guest_insb, gpa + 0x100, 16, 0);
	worker_start(&w, &vm, kuf, 0);
	w.in = 0x42;
	CHECK("late: parked", wait_for_event(&source, KUF_KVM_EVENT_PARKED, 2));
	CHECK("late: stays there", sleeps_in_kvm(&w));
	CHECK_EQ("late: nothing is to be seen", touch(host(&vm, gpa + 0x100)), SIGBUS);
	CHECK_KUF("late: not quiet", kuf_kvm_quiesce(kuf, 0), -EHWPOISON);

	/* A removed page is zero; KVM's write follows. */
	CHECK_KUF("late: discard as removed", kuf_discard(kuf, gpa, PAGE, KUF_DISCARD_ZERO), 0);
	CHECK_EQ("late: goes on", worker_join(&w), KVM_EXIT_HLT);
	CHECK("late: into zeroes", is_zero(host(&vm, gpa), 0x100) &&
	      *host(&vm, gpa + 0x100) == 0x42 && is_zero(host(&vm, gpa + 0x110), PAGE - 0x110));
	CHECK_EQ("late: never asked for", fills_of(&source, gpa), 0);
	CHECK_KUF("late: quiet again", kuf_kvm_quiesce(kuf, 10000), 0);
}

/* One bad page in a requested run does not affect its neighbours. */
static void neighbours(void)
{
	uint64_t gpa = TEST_GPA + 16 * PAGE;
	struct worker w[2];

	doing("neighbours", 60);
	source.bad = NO_GPA;
	source.smear = true;
	fail_at(gpa + 2 * PAGE, -EIO);
	CHECK_KUF("neighbours: kuf_ensure of eight", kuf_ensure(kuf, gpa, 8 * PAGE, -1), -EHWPOISON);
	set_guest(&vm, 0, guest_outsb, gpa + PAGE, 16, 0);
	worker_start(&w[0], &vm, kuf, 0);
	set_guest(&vm, 1, guest_outsb, gpa + 3 * PAGE, 16, 0);
	worker_start(&w[1], &vm, kuf, 1);
	CHECK_EQ("neighbours: in front of it", worker_join(&w[0]), KVM_EXIT_HLT);
	CHECK_EQ("neighbours: behind it", worker_join(&w[1]), KVM_EXIT_HLT);
	CHECK("neighbours: bytes", has_content(w[0].out, gpa + PAGE, 16, 0) &&
	      has_content(w[1].out, gpa + 3 * PAGE, 16, 0));
	CHECK_EQ("neighbours: the bad one cannot be read", touch(host(&vm, gpa + 2 * PAGE)), SIGBUS);
	CHECK_KUF("neighbours: and is closed",
		  kuf_vcpu_fault(kuf, gpa + 2 * PAGE, PAGE, UF_EXIT_FLAG_USERFAULT), -EHWPOISON);
	source.bad = NO_GPA;
	CHECK_KUF("neighbours: discard", kuf_discard(kuf, gpa + 2 * PAGE, PAGE, KUF_DISCARD_REFILL), 0);
}

/* A removed page reads as zero for all, also after a failed fill has written to it. */
static void removed(void)
{
	uint64_t gpa = TEST_GPA + 32 * PAGE;
	struct kuf_populate_request p = { .size = sizeof(p), .gpa = gpa, .len = 4 * PAGE };
	int populated = source.events[KUF_EVENT_POPULATED];
	uint8_t out[16];

	doing("removed", 60);
	/* No thread waits, so the failure ends the request, poisons no page, and leaves the buffer's bytes. */
	fail_at(gpa, -EIO);
	CHECK_KUF("removed: populate", kuf_populate(kuf, &p), 0);
	CHECK("removed: it has failed", wait_for_event(&source, KUF_EVENT_POPULATED, populated + 1) &&
	      source.last[KUF_EVENT_POPULATED].error == -EIO);
	source.bad = NO_GPA;
	CHECK_KUF("removed: absent pages", kuf_discard(kuf, gpa, 4 * PAGE, KUF_DISCARD_ZERO), 0);
	unsigned int fills = fills_of(&source, gpa);
	CHECK("removed: a vCPU reads zero", guest_reads(&vm, kuf, 0, gpa + 16, 0));
	CHECK("removed: KVM reads zero", kvm_reads(&vm, kuf, 0, gpa + PAGE + 64, out) &&
	      is_zero(out, 16));
	CHECK_KUF("removed: the VMM's thread", kuf_ensure(kuf, gpa + 2 * PAGE, PAGE, -1), 0);
	CHECK("removed: reads zero", is_zero(host(&vm, gpa + 2 * PAGE), PAGE));
	CHECK_EQ("removed: not asked for", fills_of(&source, gpa), fills);

	/* Present pages, first through KVM. */
	gpa += 4 * PAGE;
	CHECK_KUF("removed: fill", kuf_ensure(kuf, gpa, 2 * PAGE, -1), 0);
	CHECK_KUF("removed: present pages", kuf_discard(kuf, gpa, 2 * PAGE, KUF_DISCARD_ZERO), 0);
	CHECK("removed: KVM reads zero, first", kvm_reads(&vm, kuf, 0, gpa + 256, out) &&
	      is_zero(out, 16));
	CHECK("removed: a vCPU does, second", guest_reads(&vm, kuf, 0, gpa + 256, 0));
	CHECK("removed: a vCPU does, first", guest_reads(&vm, kuf, 1, gpa + PAGE, 0));
	CHECK_EQ("removed: filled before only", fills_of(&source, gpa), 1);

	/* ...and after that the source again. */
	source.generation = 9;
	CHECK_KUF("removed: discard", kuf_discard(kuf, gpa, PAGE, KUF_DISCARD_REFILL), 0);
	CHECK("removed: refilled", guest_reads(&vm, kuf, 0, gpa, content64(gpa, 9)));
	source.generation = 0;
}

/* A source that always fails: vCPUs and KVM access many pages, and read no byte. */
static void all_bad(void)
{
	uint64_t gpa = TEST_GPA + 48 * PAGE;
	struct worker w[4];
	int parked = source.events[KUF_KVM_EVENT_PARKED];

	doing("all bad", 60);
	source.answer = -EIO;
	source.smear = true;
	for (int i = 0; i < 4; i++) {
		set_guest(&vm, i, i % 2 ? guest_outsb : guest_read, gpa + i * PAGE, 8, 0x55);
		worker_start(&w[i], &vm, kuf, i);
	}
	CHECK_EQ("all bad: a vCPU", worker_join(&w[0]), -EHWPOISON);
	CHECK_EQ("all bad: a vCPU", worker_join(&w[2]), -EHWPOISON);
	CHECK("all bad: two parked", wait_for_event(&source, KUF_KVM_EVENT_PARKED, parked + 2));
	CHECK("all bad: nothing was read", guest_rax(&vm, 0) == 0x55 && guest_rax(&vm, 2) == 0x55 &&
	      !w[1].out_len && !w[3].out_len);
	source.answer = 0;
	CHECK_KUF("all bad: discard", kuf_discard(kuf, gpa, 4 * PAGE, KUF_DISCARD_REFILL), 0);
	CHECK("all bad: KVM goes on", worker_join(&w[1]) == KVM_EXIT_HLT &&
	      worker_join(&w[3]) == KVM_EXIT_HLT);
	CHECK("all bad: with its bytes", has_content(w[1].out, gpa + PAGE, 8, 0) &&
	      has_content(w[3].out, gpa + 3 * PAGE, 8, 0));
}

int main(void)
{
	doing("create", 20);
	vm_create(&vm, PAGES * PAGE, 4);
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm, &source, 0);
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	vcpu();
	kvm();
	kvm_late();
	neighbours();
	removed();
	all_bad();
	close_kuf(kuf, KUF_END_POPULATE);
	vm_destroy(&vm);
	return finish();
}
