/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KVM_MEM_USERFAULT on and off: while it is on, KVM maps small pages; when it is off, huge ones. When it is on again,
 * vCPUs exit at pages whose bit is set, even if they were mapped before, and at no others.
 */
#include "bitmap.h"

#define PAGES 4UL
#define SIZE (PAGES * HUGE)

static struct rig r;
static int64_t small_before, huge_before;

static uint8_t *huge_memory(void)
{
	void *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

/* The low memory has mappings too, so count from their number. */
static void base(void)
{
	set_guest(&r.vm, 0, guest_nop, 0, 0, 0);
	if (!halts(&r.vm, 0))
		DIE("no halt");
	small_before = vm_stat(&r.vm, "pages_4k");
	huge_before = vm_stat(&r.vm, "pages_2m");
}

static int64_t huge(void)
{
	return vm_stat(&r.vm, "pages_2m") - huge_before;
}

/* Shadow paging keeps and counts small mappings that a huge one has replaced. */
#define CHECK_SMALL(name, n)                                                                \
	do {                                                                                \
		if (has_tdp(&r.vm))                                                         \
			CHECK_EQ(name, vm_stat(&r.vm, "pages_4k") - small_before, n);       \
		else                                                                        \
			skip(name, "shadow paging");                                        \
	} while (0)

/* The vCPU touches each 4 KiB page. */
static bool touch(uint64_t gpa, uint64_t pages, uint64_t generation, unsigned int *exits)
{
	uint64_t sum = 0;

	for (uint64_t i = 0; i < pages; i++)
		sum += pattern(key(gpa + i * PAGE, generation));
	set_guest(&r.vm, 0, guest_touch, gpa, pages, 0);
	return run_to(&r, 0, sum, exits);
}

/* Waits until the library has cleared the flag, which it does in the background without an event. */
static void await_off(void)
{
	for (int i = 0; vm_stat(&r.vm, "pages_4k") > small_before && i < 5000; i++)
		sleep_ms(1);
}

static void on_and_off(enum owner owner, uint32_t extra)
{
	uint64_t second = TEST_GPA + HUGE;
	unsigned int exits;

	rig_vm(&r, huge_memory(), SIZE, 1);
	base();
	rig_open(&r, rig_options(&r));
	struct kuf_memory slot = rig_slot(&r, owner == LIBRARY ? BY_LIBRARY : 0);
	if (owner == LIBRARY)
		slot.kvm = memslot_of(TEST_SLOT, extra);
	rig_add(&r, slot);
	if (owner == HOST)
		rig_memslot(&r, UF_MEM_USERFAULT | extra);

	CHECK_EQ("the granule is huge", bits(&r, TEST_GPA, SIZE / PAGE), SIZE / PAGE);
	CHECK("first touches", touch(TEST_GPA, SIZE / PAGE, 0, &exits));
	CHECK_EQ("an exit each", exits, PAGES);
	CHECK_EQ("a fill each", r.source.fills, PAGES);
	AWAIT(r.source.events[KUF_EVENT_COMPLETE] == 1);
	CHECK_EQ("the event names the slot", r.source.event_gpa[KUF_EVENT_COMPLETE], TEST_GPA);
	if (owner == HOST) {
		CHECK_SMALL("small while it is on", SIZE / PAGE);
		CHECK_EQ("none huge while it is on", huge(), 0);
		rig_memslot(&r, extra);
	} else if (!(extra & UF_MEM_LOG_DIRTY)) {
		await_off();
	}
	/* With a dirty log KVM makes no huge mappings. */
	if (!(extra & UF_MEM_LOG_DIRTY))
		CHECK_SMALL("off: dropped", 0);
	CHECK("off: touches", touch(TEST_GPA, SIZE / PAGE, 0, &exits));
	CHECK_EQ("off: no exits", exits, 0);
	CHECK_EQ("off: huge", huge(), extra & UF_MEM_LOG_DIRTY ? 0 : (int64_t)PAGES);

	/* Set the flag again for a page with a huge mapping. */
	if (owner == HOST)
		rig_memslot(&r, UF_MEM_USERFAULT | extra);
	r.source.generation = 1;
	CHECK_KUF("discard", kuf_discard(r.kuf, second, HUGE, KUF_DISCARD_REFILL), 0);
	CHECK("discard: its 512 bits, and no others",
	      bits(&r, second, 512) == 512 && bits(&r, TEST_GPA, SIZE / PAGE) == 512);
	CHECK("discard: the page in front kept its bytes", touch(TEST_GPA, 512, 0, &exits));
	CHECK_EQ("discard: with no exit", exits, 0);
	CHECK("discard: the pages behind kept theirs", touch(second + HUGE, 1024, 0, &exits));
	CHECK_EQ("discard: with no exit", exits, 0);
	CHECK_EQ("discard: small, for it is on", huge(), 0);
	CHECK("discard: filled anew", reads(&r, 0, second + 0x1000, 1, &exits));
	CHECK_EQ("discard: by an exit", exits, 1);
	CHECK("discard: all of it", touch(second, 512, 1, &exits) && exits == 0);
	CHECK_EQ("discard: nothing by userfaultfd", stats(&r).faults, 0);
	AWAIT(r.source.events[KUF_EVENT_COMPLETE] == 2);
	if (owner == HOST)
		rig_memslot(&r, extra);
	else if (!(extra & UF_MEM_LOG_DIRTY))
		await_off();
	CHECK("off again: touches", touch(TEST_GPA, 512, 0, &exits) && exits == 0 && touch(second, 512, 1, &exits) &&
	      exits == 0);
	CHECK_EQ("off again: huge", huge(), extra & UF_MEM_LOG_DIRTY ? 0 : 2);
	if (extra & UF_MEM_LOG_DIRTY) {
		static uint64_t dirty[SIZE / PAGE / 64];
		struct kvm_dirty_log log = { .slot = TEST_SLOT, .dirty_bitmap = dirty };

		/* The first log has the writes so far. */
		CHECK_ERRNO("dirty log: it is one", ioctl(r.vm.fd, KVM_GET_DIRTY_LOG, &log), 0);
		set_guest(&r.vm, 0, guest_write, second + 5 * PAGE, 0, 0x42);
		CHECK("dirty log: write", run_to(&r, 0, 0x42, &exits) && exits == 0);
		CHECK_ERRNO("dirty log: read", ioctl(r.vm.fd, KVM_GET_DIRTY_LOG, &log), 0);
		bool good = dirty[512 / 64] == 1 << 5;
		for (uint64_t i = 0; i < SIZE / PAGE / 64; i++)
			good = good && (i == 512 / 64 || dirty[i] == 0);
		CHECK("dirty log: that page", good);
	}
	rig_end(&r, 0);
}

/* The memslot exists and is in use when the library sets it. */
static void existing(void)
{
	const uint64_t size = 16 * PAGE;
	unsigned int exits;
	uint8_t *mem = anon(size);

	doing("existing memslot", 30);
	rig_vm(&r, mem, size, 1);
	MUST(set_slot(&r.vm, TEST_SLOT, 0, TEST_GPA, size, mem, NULL));
	/*
	 * The guest has read zeroes here, and the pages are dropped before kuf_add_memory: KVM must not use its mappings.
	 */
	CHECK("existing: zeroes before", reads_zero(&r, 0, TEST_GPA + PAGE, &exits));
	MUST(madvise(mem, size, MADV_DONTNEED));
	rig_open(&r, rig_options(&r));
	rig_add(&r, rig_slot(&r, BY_LIBRARY));
	CHECK("existing: an exit and the right bytes", reads(&r, 0, TEST_GPA + PAGE, 0, &exits) && exits == 1);
	/* The library keeps only those other flags of the memslot that the caller passed to it; here it has none. */
	CHECK_KUF("existing: removed", kuf_remove_memory(r.kuf, TEST_GPA, KUF_END_POPULATE), 0);
	CHECK("existing: the memslot stays, without its flag",
	      reads(&r, 0, TEST_GPA + 15 * PAGE, 0, &exits) && exits == 0);
	MUST(set_slot(&r.vm, TEST_SLOT, 0, 0, 0, NULL, NULL));
	rig_end(&r, 0);
}

static void read_only(void)
{
	const uint64_t size = 16 * PAGE;
	unsigned int exits;

	doing("read-only", 30);
	rig_vm(&r, anon(size), size, 1);
	rig_open(&r, rig_options(&r));
	struct kuf_memory slot = rig_slot(&r, BY_LIBRARY);
	slot.kvm = memslot_of(TEST_SLOT, UF_MEM_READONLY);
	rig_add(&r, slot);
	CHECK("read-only: read", reads(&r, 0, TEST_GPA + PAGE, 0, &exits) && exits == 1);
	CHECK("read-only: KVM reads", kvm_reads(&r, 0, TEST_GPA + 2 * PAGE, 8, 0));
	set_guest(&r.vm, 0, guest_write, TEST_GPA + PAGE, 0, 0x42);
	struct vcpu v = { .rig = &r };
	CHECK_EQ("read-only: a write is the host's to handle", drive(&v), KVM_EXIT_MMIO);
	CHECK("read-only: nothing was written", page_is(&r, TEST_GPA + PAGE, 0));
	rig_end(&r, KUF_END_POPULATE);
}

/* The caller discards without setting the flag first: userfaultfd catches the touch, and the bytes are right. */
static void off_and_discarded(void)
{
	const uint64_t size = 16 * PAGE;
	unsigned int exits;

	doing("off and discarded", 30);
	rig_start(&r, anon(size), size, 1, HOST, 0, 0);
	bool good = true;
	for (uint64_t i = 0; i < 16; i++)
		good = good && reads(&r, 0, TEST_GPA + i * PAGE, 0, NULL);
	CHECK("fill", good);
	AWAIT(r.source.events[KUF_EVENT_COMPLETE] == 1);
	rig_memslot(&r, 0);
	r.source.generation = 2;
	CHECK_KUF("off: discard", kuf_discard(r.kuf, TEST_GPA + 4 * PAGE, PAGE, KUF_DISCARD_REFILL), 0);
	CHECK("off: bit set all the same", r.bitmap[0] == 1 << 4);
	CHECK("off: filled anew", reads(&r, 0, TEST_GPA + 4 * PAGE, 2, &exits));
	CHECK_EQ("off: with no exit", exits, 0);
	CHECK_EQ("off: by userfaultfd", stats(&r).faults, 1);
	CHECK_EQ("off: bit clear", r.bitmap[0], 0);
	rig_memslot(&r, UF_MEM_USERFAULT);
	CHECK("on again: present pages do not exit", reads(&r, 0, TEST_GPA + 4 * PAGE, 2, &exits) && exits == 0);
	rig_memslot(&r, 0);
	rig_end(&r, 0);
}

/*
 * The end of an incomplete slot: the library clears the flag, because it frees the bitmap. KVM reads the bitmap only
 * where it has no mapping, so the mappings are dropped first.
 */
static void ended(bool close_it)
{
	const char *name = close_it ? "closed with pages left" : "removed with pages left";
	const uint64_t size = 16 * PAGE;
	unsigned int exits;
	char what[80];

	doing(name, 30);
	rig_start(&r, anon(size), size, 1, LIBRARY, 0, 0);
	snprintf(what, sizeof(what), "%s: fill one", name);
	CHECK(what, reads(&r, 0, TEST_GPA + 4 * PAGE, 0, &exits) && exits == 1);
	snprintf(what, sizeof(what), "%s: ends", name);
	CHECK_KUF(what, close_it ? kuf_close(&r.kuf, KUF_END_POISON) :
				   kuf_remove_memory(r.kuf, TEST_GPA, KUF_END_POISON), 0);
	MUST(mprotect(r.vm.mem, size, PROT_READ));
	MUST(mprotect(r.vm.mem, size, PROT_READ | PROT_WRITE));
	snprintf(what, sizeof(what), "%s: no flag", name);
	CHECK(what, reads(&r, 0, TEST_GPA + 4 * PAGE, 0, &exits) && exits == 0);
	rig_end(&r, KUF_END_POISON);
}

int main(void)
{
	uint8_t *p = huge_memory();

	if (p) {
		munmap(p, SIZE);
		doing("host's flag", 60);
		on_and_off(HOST, 0);
		doing("library's flag", 60);
		on_and_off(LIBRARY, 0);
		doing("library's flag, dirty log", 60);
		on_and_off(LIBRARY, UF_MEM_LOG_DIRTY);
	} else {
		skip("huge mappings", "no hugetlb memory");
	}
	existing();
	read_only();
	off_and_discarded();
	ended(false);
	ended(true);
	return finish();
}
