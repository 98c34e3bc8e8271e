/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KVM maps small pages while pages are absent, and huge ones when all are present.
 * KVM's own statistics count them.
 */
#include "async.h"

#define SIZE (4 * HUGE)

static struct vm vm;
static struct source source;
static struct kuf *kuf;
static int64_t base;

static void settle(void)
{
	set_guest(&vm, 0, guest_nop, 0, 0, 0);
	if (!halts(&vm, 0))
		DIE("no halt");
	base = vm_stat(&vm, "pages_2m");
}

static int64_t huge(void)
{
	return vm_stat(&vm, "pages_2m") - base;
}

static bool touch_all(void)
{
	struct worker w;
	uint64_t sum = 0;

	for (uint64_t gpa = TEST_GPA; gpa < TEST_GPA + SIZE; gpa += PAGE)
		sum += content(gpa, source.generation);
	set_guest(&vm, 0, guest_touch, TEST_GPA, SIZE / PAGE, 0);
	return run_here(&w, &vm, kuf, 0) == KVM_EXIT_HLT && guest_rax(&vm, 0) == sum;
}

/* Maps memory for huge pages, at an aligned address. */
static uint8_t *aligned(void)
{
	uint8_t *p = anon(SIZE + HUGE);
	uint8_t *at = (uint8_t *)(((uintptr_t)p + HUGE - 1) & -HUGE);

	if (at > p)
		munmap(p, (size_t)(at - p));
	munmap(at + SIZE, (size_t)(p + SIZE + HUGE - (at + SIZE)));
	MUST(madvise(at, SIZE, MADV_HUGEPAGE));
	return at;
}

/* The granule of the mapping decides whether a huge page has one mark or 512. */
static void run(const char *name, void *mem, uint64_t granule)
{
	char what[96];

	doing(name, 120);
	vm_create_type(&vm, 0, 0, mem, 1);
	vm.size = SIZE;
	MUST(set_slot(&vm, TEST_SLOT, 0, TEST_GPA, SIZE, mem, NULL));
	settle();
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm, &source, 0);
	add_slot(kuf, TEST_GPA, mem, SIZE);
	/* Touch all but the last granule of each huge page. */
	for (uint64_t gpa = TEST_GPA; granule == PAGE && gpa < TEST_GPA + SIZE; gpa += HUGE)
		if (kuf_ensure(kuf, gpa, HUGE - PAGE, -1))
			DIE("kuf_ensure: %s", kuf_error());
	if (granule == PAGE) {
		set_guest(&vm, 0, guest_touch, TEST_GPA, 511, 0);
		snprintf(what, sizeof(what), "%s: present pages run", name);
		CHECK(what, halts(&vm, 0));
		snprintf(what, sizeof(what), "%s: small as long as one is missing", name);
		CHECK_EQ(what, huge(), 0);
	}
	snprintf(what, sizeof(what), "%s: all of it", name);
	CHECK(what, touch_all());
	snprintf(what, sizeof(what), "%s: each was asked for once", name);
	uint64_t calls = 0;
	for (uint64_t i = 0; i < SIZE / granule; i++)
		calls += source.fills[i];
	CHECK_EQ(what, calls, SIZE / granule);
	snprintf(what, sizeof(what), "%s: complete", name);
	CHECK(what, wait_for_event(&source, KUF_EVENT_COMPLETE, 1));
	snprintf(what, sizeof(what), "%s: content", name);
	CHECK(what, has_content(mem, TEST_GPA, SIZE, 0));
	snprintf(what, sizeof(what), "%s: huge with the last page", name);
	CHECK_EQ(what, huge(), 4);

	/* One page is dropped and filled again. */
	source.generation = 1;
	CHECK_KUF(name, kuf_discard(kuf, TEST_GPA + HUGE, granule, KUF_DISCARD_REFILL), 0);
	set_guest(&vm, 0, guest_read, TEST_GPA + HUGE + PAGE, 0, 0);
	struct worker w;
	snprintf(what, sizeof(what), "%s: with one missing", name);
	CHECK_EQ(what, run_here(&w, &vm, kuf, 0), KVM_EXIT_HLT);
	if (granule == PAGE) {
		snprintf(what, sizeof(what), "%s: only that one is small", name);
		CHECK_EQ(what, huge(), 3);
	}
	snprintf(what, sizeof(what), "%s: refilled", name);
	CHECK(what, guest_reads(&vm, kuf, 0, TEST_GPA + HUGE, content64(TEST_GPA + HUGE, 1)));

	/* After a fill in the background, which touches no page, mappings are huge after the end at the latest. */
	CHECK_KUF(name, kuf_discard(kuf, TEST_GPA, SIZE, KUF_DISCARD_REFILL), 0);
	struct kuf_populate_request p = { .size = sizeof(p), .gpa = KUF_ALL };
	CHECK_KUF(name, kuf_populate(kuf, &p), 0);
	snprintf(what, sizeof(what), "%s: populated", name);
	CHECK(what, wait_for_event(&source, KUF_EVENT_POPULATED, 1) &&
	      !source.last[KUF_EVENT_POPULATED].error);
	close_kuf(kuf, 0);
	snprintf(what, sizeof(what), "%s: all of it without the library", name);
	uint64_t sum = 0;
	for (uint64_t gpa = TEST_GPA; gpa < TEST_GPA + SIZE; gpa += PAGE)
		sum += content(gpa, 1);
	set_guest(&vm, 0, guest_touch, TEST_GPA, SIZE / PAGE, 0);
	CHECK(what, halts(&vm, 0) && guest_rax(&vm, 0) == sum);
	/* Anonymous memory that was dropped page by page has small pages until khugepaged merges them. */
	if (granule == HUGE) {
		snprintf(what, sizeof(what), "%s: huge after the end", name);
		CHECK_EQ(what, huge(), 4);
	}
	vm_destroy(&vm);
}

int main(void)
{
	void *mem = mmap(NULL, SIZE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);

	if (mem == MAP_FAILED)
		skip("hugetlb", "no huge pages");
	else
		run("hugetlb", mem, HUGE);
	if (access("/sys/kernel/mm/transparent_hugepage/enabled", F_OK))
		skip("transparent", "the kernel has no transparent huge pages");
	else
		run("transparent", aligned(), PAGE);
	return finish();
}
