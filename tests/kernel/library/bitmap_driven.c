/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Handles without a fill callback: the caller's own loop reads faults and exits and resolves them. */
#include "bitmap.h"

#define PAGES 32UL
#define SIZE (PAGES * PAGE)

static struct rig r;
static char what[120];
static const char *kind;
#define NAME(text) (snprintf(what, sizeof(what), "%s: %s", kind, text), what)

/* The caller's loop, as on a VMM's main thread. */
static struct {
	pthread_t thread;
	_Atomic bool stop, bad;
	_Atomic unsigned int given;
	_Atomic uint64_t generation;
	bool poison;
} loop;

static void *loop_main(void *arg)
{
	static uint8_t page[PAGE];

	(void)arg;
	while (!loop.stop) {
		struct kuf_fault f[8];
		int ready = kuf_poll(r.kuf, 10);
		ssize_t n = ready > 0 ? kuf_read(r.kuf, f, 8) : ready;

		if (n < 0 && n != -EAGAIN && n != -ECANCELED)
			loop.bad = true;
		for (ssize_t i = 0; i < n; i++) {
			loop.given++;
			if (f[i].len != PAGE || f[i].gpa < TEST_GPA || f[i].gpa >= TEST_GPA + SIZE)
				loop.bad = true;
			write_pages(page, f[i].gpa, PAGE, loop.generation);
			if (kuf_resolve(r.kuf, f[i].gpa, loop.poison ? NULL : page, PAGE,
					loop.poison ? KUF_RESOLVE_POISON : 0) < 0)
				loop.bad = true;
		}
	}
	return NULL;
}

static void loop_start(void)
{
	memset(&loop, 0, sizeof(loop));
	pthread_create(&loop.thread, NULL, loop_main, NULL);
}

static bool loop_end(void)
{
	loop.stop = true;
	pthread_join(loop.thread, NULL);
	return !loop.bad;
}

static void driven(const char *name, bool direct, enum owner owner, bool shared)
{
	uint64_t a = TEST_GPA + 2 * PAGE, b = TEST_GPA + 4 * PAGE, c = TEST_GPA + 6 * PAGE;
	unsigned int exits;
	int fd = 0;

	kind = name;
	doing(kind, 40);
	uint8_t *mem = shared ? shared_memory(SIZE, 0, &fd) : anon(SIZE);
	rig_vm(&r, mem, SIZE, 3);
	struct kuf_options o = rig_options(&r);
	o.fill = NULL;
	if (direct)
		o.flags |= KUF_OPEN_DIRECT;
	rig_open(&r, o);
	struct kuf_memory slot = rig_slot(&r, owner == LIBRARY ? BY_LIBRARY : 0);
	slot.fd = fd;
	rig_add(&r, slot);
	if (owner == HOST)
		rig_memslot(&r, UF_MEM_USERFAULT);

	/* First without the loop: one exit, one fault to read. */
	struct vcpu v = { 0 };
	struct kuf_fault f = { 0 };
	static uint8_t page[PAGE];
	set_guest(&r.vm, 0, guest_read, a, 0, 0);
	vcpu_start(&v, &r, 0);
	CHECK_KUF(NAME("an exit is to be read"), kuf_poll(r.kuf, 10000), 1);
	CHECK_KUF(NAME("read"), kuf_read(r.kuf, &f, 1), 1);
	CHECK(NAME("what it says"), f.gpa == a && f.len == PAGE && f.flags & KUF_FAULT_DEMAND &&
	      !(f.flags & KUF_KVM_FAULT) && f.memory_offset == a - TEST_GPA);
	sleep_ms(20);
	CHECK(NAME("the vCPU waits, bit set"), !v.done && bit(&r, a));
	write_pages(page, a, PAGE, 0);
	CHECK_KUF(NAME("resolve"), kuf_resolve(r.kuf, a, page, PAGE, 0), PAGE);
	CHECK_EQ(NAME("goes on"), vcpu_join(&v), KVM_EXIT_HLT);
	CHECK(NAME("content"), guest_rax(&r.vm, 0) == pattern64(a) && !bit(&r, a));
	CHECK_EQ(NAME("at one exit"), v.exits, 1);

	/* The same page by a vCPU and by KVM: one fault to read. */
	struct vcpu k = { 0 };
	set_guest(&r.vm, 1, guest_outsb, b, 16, 0);
	vcpu_start(&k, &r, 1);
	CHECK_KUF(NAME("KVM's access is to be read"), kuf_poll(r.kuf, 10000), 1);
	CHECK_KUF(NAME("read"), kuf_read(r.kuf, &f, 1), 1);
	CHECK_EQ(NAME("which page"), f.gpa, b);
	set_guest(&r.vm, 0, guest_read, b, 0, 0);
	vcpu_start(&v, &r, 0);
	AWAIT(stats(&r).vcpu_faults == 2);
	sleep_ms(20);
	CHECK_KUF(NAME("nothing more to read"), kuf_read(r.kuf, &f, 1), -EAGAIN);
	CHECK(NAME("both wait"), !v.done && !k.done);
	CHECK_KUF(NAME("one pending"), kuf_pending(r.kuf, &f, 1), 1);
	write_pages(page, b, PAGE, 0);
	CHECK_KUF(NAME("resolve both"), kuf_resolve(r.kuf, b, page, PAGE, 0), PAGE);
	CHECK(NAME("both go on"), vcpu_join(&v) == KVM_EXIT_HLT && vcpu_join(&k) == KVM_EXIT_HLT);
	CHECK(NAME("content"), guest_rax(&r.vm, 0) == pattern64(b) && is_pattern(k.out, b, 16));

	/* Now with the loop. */
	loop_start();
	CHECK(NAME("loop: vCPU"), reads(&r, 0, c, 0, &exits) && exits == 1);
	CHECK(NAME("loop: KVM"), kvm_reads(&r, 1, c + PAGE, 16, 0));
	CHECK(NAME("loop: VMM"), page_is(&r, c + 2 * PAGE, 0));
	CHECK_EQ(NAME("loop: each of them was read"), loop.given, 3);
	loop.poison = true;
	uint64_t d = TEST_GPA + 12 * PAGE;
	set_guest(&r.vm, 0, guest_read, d, 0, 0);
	vcpu_start(&v, &r, 0);
	vcpu_join(&v);
	CHECK(NAME("loop: poisoned"), v.result == UF_EXIT_MEMORY_FAULT && v.error == -EHWPOISON);
	loop.poison = false;
	loop.generation = 1;
	CHECK_KUF(NAME("loop: discard"), kuf_discard(r.kuf, d, PAGE, KUF_DISCARD_REFILL), 0);
	CHECK(NAME("loop: discard, and filled"), reads(&r, 0, d, 1, &exits) && exits == 1);
	unsigned int given = loop.given;
	CHECK_KUF(NAME("loop: given back"), kuf_discard(r.kuf, c, 4 * PAGE, KUF_DISCARD_ZERO), 0);
	CHECK(NAME("loop: given back, a vCPU reads zero"), reads_zero(&r, 0, c, &exits) && exits <= 1);
	struct vcpu z = { .rig = &r, .cpu = 1 };
	set_guest(&r.vm, 1, guest_outsb, c + PAGE, 16, 0);
	CHECK(NAME("loop: given back, KVM reads zero"),
	      drive(&z) == KVM_EXIT_HLT && z.out_len == 16 && all_bytes(z.out, 16, 0));
	CHECK(NAME("loop: given back, the VMM reads zero"), all_bytes(host(&r.vm, c + 2 * PAGE), PAGE, 0));
	CHECK_EQ(NAME("loop: no fill was requested"), loop.given, given);

	/* All pages: the slot is complete, and the library clears the flag if it owns the memslot. */
	set_guest(&r.vm, 2, guest_nop, 0, 0, 0);
	loop.generation = 0;
	bool good = true;
	for (uint64_t gpa = TEST_GPA; gpa < TEST_GPA + SIZE; gpa += PAGE) {
		set_guest(&r.vm, 2, guest_read, gpa, 0, 0);
		struct vcpu w = { .rig = &r, .cpu = 2 };
		good = good && drive(&w) == KVM_EXIT_HLT;
	}
	CHECK(NAME("loop: all of it"), good);
	CHECK_EQ(NAME("loop: no bit left"), bits(&r, TEST_GPA, PAGES), 0);
	if (owner == HOST)
		rig_memslot(&r, 0);
	else
		AWAIT(r.source.events[KUF_EVENT_COMPLETE] >= 1);
	CHECK(NAME("loop: ends in order"), loop_end());
	rig_close(&r, 0);
	CHECK(NAME("runs on"), reads(&r, 0, a, 0, &exits) && exits == 0);
	rig_end(&r, 0);
	if (fd)
		close(fd);
}

/* kuf_close while a vCPU and KVM wait for pages that are never resolved. */
static void close_under(bool direct, enum owner owner)
{
	struct vcpu v = { 0 }, k = { 0 };

	kind = direct ? "close, direct" : owner == HOST ? "close, host's memslot" : "close, library's memslot";
	doing(kind, 20);
	rig_vm(&r, anon(SIZE), SIZE, 2);
	struct kuf_options o = rig_options(&r);
	o.fill = NULL;
	if (direct)
		o.flags |= KUF_OPEN_DIRECT;
	rig_open(&r, o);
	rig_add(&r, rig_slot(&r, owner == LIBRARY ? BY_LIBRARY : 0));
	if (owner == HOST)
		rig_memslot(&r, UF_MEM_USERFAULT);
	set_guest(&r.vm, 0, guest_read, TEST_GPA, 0, 0xdead);
	vcpu_start(&v, &r, 0);
	set_guest(&r.vm, 1, guest_outsb, TEST_GPA + PAGE, 16, 0);
	vcpu_start(&k, &r, 1);
	AWAIT(stats(&r).vcpu_faults == 1);
	sleep_ms(50);
	CHECK_KUF(NAME("refused with pages left"), kuf_close(&r.kuf, 0), -EBUSY);
	CHECK(NAME("both still wait"), !v.done && !k.done);
	CHECK_KUF(NAME("poisons"), kuf_close(&r.kuf, KUF_END_POISON), 0);
	vcpu_join(&v);
	vcpu_join(&k);
	CHECK(NAME("the vCPU is told"), v.result == UF_EXIT_MEMORY_FAULT &&
	      (v.error == -ECANCELED || v.error == -EHWPOISON || v.error == -EBADF) &&
	      guest_rax(&r.vm, 0) == 0xdead);
	CHECK(NAME("KVM's access fails"), k.result != KVM_EXIT_HLT && k.out_len == 0);
	if (owner == HOST)
		MUST(set_slot(&r.vm, TEST_SLOT, 0, TEST_GPA, SIZE, r.vm.mem, NULL));
	rig_end(&r, 0);
}

int main(void)
{
	driven("caller-driven", false, HOST, false);
	driven("caller-driven, library's memslot", false, LIBRARY, false);
	driven("caller-driven, shared", false, LIBRARY, true);
	driven("direct", true, HOST, false);
	driven("direct, shared", true, HOST, true);
	close_under(false, HOST);
	close_under(false, LIBRARY);
	close_under(true, HOST);
	return finish();
}
