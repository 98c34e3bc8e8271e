/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KVM maps small pages while pages are marked, and huge ones when they are not.
 * KVM's own statistics count the mappings of each size.
 */
#include "test.h"

#define SIZE (4 * HUGE)

static struct vm vm;
static int64_t small_before, huge_before;

static void *huge_memory(void)
{
	void *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_POPULATE, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

/* The low memory has mappings too, so count from their number. */
static void base(void)
{
	set_guest(&vm, 0, guest_nop, 0, 0, 0);
	if (!halts(&vm, 0))
		DIE("no halt");
	small_before = vm_stat(&vm, "pages_4k");
	huge_before = vm_stat(&vm, "pages_2m");
}

static int64_t small(void)
{
	return vm_stat(&vm, "pages_4k") - small_before;
}

/*
 * Shadow paging keeps and counts small mappings that a huge one has replaced,
 * because it may need them again.
 */
#define CHECK_SMALL(name, n)                                  \
	do {                                                  \
		if (has_tdp(&vm))                             \
			CHECK_EQ(name, small(), n);           \
		else                                          \
			skip(name, "shadow paging");          \
	} while (0)

static int64_t huge(void)
{
	return vm_stat(&vm, "pages_2m") - huge_before;
}

static bool touch(uint64_t gpa, uint64_t pages)
{
	uint64_t sum = 0;

	for (uint64_t i = 0; i < pages; i++)
		sum += host(&vm, gpa)[i * PAGE];
	set_guest(&vm, 0, guest_touch, gpa, pages, 0);
	return halts(&vm, 0) && guest_rax(&vm, 0) == sum;
}

static void create(uint32_t flags, void *bitmap)
{
	vm_create_type(&vm, 0, 0, huge_memory(), 1);
	vm.size = SIZE;
	fill(&vm, TEST_GPA, SIZE);
	MUST(set_slot(&vm, TEST_SLOT, flags, TEST_GPA, SIZE, vm.mem, bitmap));
	base();
}

static void attribute(void)
{
	doing("attribute", 120);
	create(0, NULL);
	CHECK("touch", touch(TEST_GPA, SIZE / PAGE));
	CHECK_EQ("huge without userfault", huge(), 4);
	CHECK_SMALL("not small without userfault", 0);

	enable(&vm);
	CHECK("touch", touch(TEST_GPA, SIZE / PAGE));
	CHECK_EQ("enabling alone leaves them", huge(), 4);

	mark(&vm, TEST_GPA + HUGE + 5 * PAGE, PAGE);
	CHECK_EQ("marking one page zaps the one that it is in", huge(), 3);
	CHECK("touch in front of it", touch(TEST_GPA + HUGE, 5));
	CHECK("touch behind it", touch(TEST_GPA + HUGE + 6 * PAGE, 506));
	CHECK_SMALL("small around a marked page", 511);
	CHECK_EQ("the others stay huge", huge(), 3);
	set_guest(&vm, 0, guest_read, TEST_GPA + HUGE + 5 * PAGE, 0, 0);
	CHECK("marked page faults", faults_at(&vm, 0, TEST_GPA + HUGE + 5 * PAGE));

	unmark(&vm, TEST_GPA + HUGE + 5 * PAGE, PAGE);
	CHECK("goes on", halts(&vm, 0));
	CHECK_EQ("content", guest_rax(&vm, 0), pattern64(TEST_GPA + HUGE + 5 * PAGE));
	CHECK_EQ("huge again at the first touch of the last page", huge(), 4);
	CHECK_SMALL("and nothing small", 0);

	/* As in a restore: mark all pages, then unmark them one by one. */
	mark(&vm, TEST_GPA, SIZE);
	CHECK_EQ("marking all zaps all", huge() + small(), 0);
	bool good = true;
	for (uint64_t gpa = TEST_GPA; gpa < TEST_GPA + HUGE; gpa += PAGE) {
		set_guest(&vm, 0, guest_read, gpa, 0, 0);
		good = good && faults_at(&vm, 0, gpa);
		if (gpa == TEST_GPA + HUGE - PAGE)
			CHECK_SMALL("small as long as one is marked", 511);
		unmark(&vm, gpa, PAGE);
		good = good && halts(&vm, 0) && guest_rax(&vm, 0) == pattern64(gpa);
	}
	CHECK("one by one", good);
	CHECK_EQ("huge with the last one", huge(), 1);
	CHECK_SMALL("and nothing small", 0);

	/*
	 * The last page is provided in the background and never touched: the
	 * mappings stay small until disabling, because no fault occurs.
	 */
	unmark(&vm, TEST_GPA + HUGE, HUGE - PAGE);
	CHECK("touch all but the last", touch(TEST_GPA + HUGE, 511));
	unmark(&vm, TEST_GPA + 2 * HUGE - PAGE, PAGE);
	CHECK("touch these again", touch(TEST_GPA + HUGE, 511));
	CHECK_SMALL("small, for nothing has faulted", 511);
	MUST(userfault_cap(&vm, UF_DISABLE, 0, 0));
	CHECK_SMALL("disabling zaps what can be huge", 0);
	CHECK("touch", touch(TEST_GPA, SIZE / PAGE));
	CHECK_EQ("all huge after disabling", huge(), 4);

	/* Disable while each range has some marks. */
	MUST(userfault_cap(&vm, UF_ENABLE, vm.event, 0));
	for (uint64_t gpa = TEST_GPA; gpa < TEST_GPA + SIZE; gpa += 64 * PAGE)
		mark(&vm, gpa + PAGE, PAGE);
	CHECK("touch the first", touch(TEST_GPA, 1));
	CHECK_EQ("small", huge(), 0);
	MUST(userfault_cap(&vm, UF_DISABLE, 0, 0));
	CHECK("touch", touch(TEST_GPA, SIZE / PAGE));
	CHECK_EQ("all huge after disabling with marks", huge(), 4);
	vm_destroy(&vm);
}

/* A memslot that is created when marks already exist. */
static void slot_after_marks(void)
{
	doing("slot after marks", 60);
	create(0, NULL);
	enable(&vm);
	mark(&vm, TEST_GPA + 3 * PAGE, PAGE);
	MUST(set_slot(&vm, TEST_SLOT, 0, 0, 0, NULL, NULL));
	MUST(set_slot(&vm, TEST_SLOT, 0, TEST_GPA, SIZE, vm.mem, NULL));
	CHECK("touch", touch(TEST_GPA, 3));
	CHECK("touch elsewhere", touch(TEST_GPA + HUGE, 1));
	CHECK_SMALL("small where a page is marked", 3);
	CHECK_EQ("huge where none is", huge(), 1);
	set_guest(&vm, 0, guest_read, TEST_GPA + 3 * PAGE, 0, 0);
	CHECK("marked page faults", faults_at(&vm, 0, TEST_GPA + 3 * PAGE));
	vm_destroy(&vm);
}

static void bitmap_slot(void)
{
	static uint64_t bitmap[SIZE / PAGE / 64];

	doing("bitmap", 60);
	create(UF_MEM_USERFAULT, bitmap);
	CHECK("touch", touch(TEST_GPA, SIZE / PAGE));
	CHECK_SMALL("bitmap: small, even with no bit set", SIZE / PAGE);
	CHECK_EQ("bitmap: none huge", huge(), 0);
	MUST(set_slot(&vm, TEST_SLOT, 0, TEST_GPA, SIZE, vm.mem, NULL));
	CHECK_SMALL("bitmap off: zapped what can be huge", 0);
	CHECK("touch", touch(TEST_GPA, SIZE / PAGE));
	CHECK_EQ("bitmap off: huge", huge(), 4);
	memset(bitmap, 0xff, sizeof(bitmap));
	MUST(set_slot(&vm, TEST_SLOT, UF_MEM_USERFAULT, TEST_GPA, SIZE, vm.mem, bitmap));
	CHECK_EQ("bitmap on: all zapped", small() + huge(), 0);
	set_guest(&vm, 0, guest_read, TEST_GPA + HUGE, 0, 0);
	CHECK("bitmap on: faults", faults_at(&vm, 0, TEST_GPA + HUGE));
	vm_destroy(&vm);
}

int main(void)
{
	void *p = huge_memory();

	if (!p) {
		skip("huge pages", "no hugetlb memory");
		return 77;
	}
	munmap(p, SIZE);
	attribute();
	slot_after_marks();
	bitmap_slot();
	return finish();
}
