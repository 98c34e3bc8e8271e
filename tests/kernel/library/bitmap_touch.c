/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A vCPU's first touch of a page: KVM_RUN returns, the vCPU's thread fills the page, and the vCPU continues. None of
 * this uses the userfaultfd, whether the caller or the library owns the memslot.
 */
#include "bitmap.h"

#define PAGES 64UL
#define SIZE (PAGES * PAGE)

static struct rig r;
static const char *const names[] = { "host's memslot", "library's memslot" };

static void touches(enum owner owner)
{
	uint64_t a = TEST_GPA + 2 * PAGE + 0x108, b = TEST_GPA + 5 * PAGE + 8, c = TEST_GPA + 9 * PAGE;
	unsigned int exits;

	doing(names[owner], 60);
	rig_start(&r, anon(SIZE), SIZE, 2, owner, 0, 0);
	r.source.code_gpa = c;
	CHECK_EQ("all bits set at first", bits(&r, TEST_GPA, PAGES), PAGES);

	/* First step by step: KVM's exit, and the call that lets the vCPU continue. */
	set_guest(&r.vm, 0, guest_read, a, 0, 0);
	CHECK("read: the vCPU leaves", faults_at(&r.vm, 0, a & -PAGE));
	CHECK("read: it would leave again", faults_at(&r.vm, 0, a & -PAGE));
	CHECK_EQ("read: nothing was filled yet", r.source.fills, 0);
	CHECK_KUF("read: kuf_vcpu_fault", kuf_vcpu_fault(r.kuf, a & -PAGE, PAGE, UF_EXIT_FLAG_USERFAULT), 0);
	CHECK_EQ("read: filled once", r.source.fills, 1);
	CHECK("read: bit clear, page whole", !bit(&r, a) && page_is(&r, a & -PAGE, 0));
	CHECK("read: goes on", halts(&r.vm, 0));
	CHECK_EQ("read: content", guest_rax(&r.vm, 0), pattern64(a));
	CHECK("read: again, with no exit", reads(&r, 0, a, 0, &exits) && exits == 0);

	set_guest(&r.vm, 1, guest_write, b, 0, 0x1122334455667788);
	CHECK("write: goes on", run_to(&r, 1, 0x1122334455667788, &exits));
	CHECK_EQ("write: one exit", exits, 1);
	bool good = is_pattern(host(&r.vm, b & -PAGE), b & -PAGE, 8) &&
		    is_pattern(host(&r.vm, b + 8), b + 8, PAGE - 16);
	uint64_t written;
	memcpy(&written, host(&r.vm, b), sizeof(written));
	CHECK("write: into the page's own bytes", good && written == 0x1122334455667788);
	CHECK("write: bit clear", !bit(&r, b));

	set_guest(&r.vm, 0, guest_call, c, 0, 0);
	CHECK("fetch: goes on, with the right code", run_to(&r, 0, pattern64(c), &exits));
	CHECK_EQ("fetch: one exit", exits, 1);
	CHECK("fetch: bit clear", !bit(&r, c));

	/* Across two pages: two exits. */
	uint64_t d = TEST_GPA + 20 * PAGE - 4;
	CHECK("across pages: goes on", reads(&r, 0, d, 0, &exits));
	CHECK_EQ("across pages: an exit each", exits, 2);

	set_guest(&r.vm, 1, guest_touch, TEST_GPA, PAGES, 0);
	uint64_t sum = 0;
	for (uint64_t i = 0; i < PAGES; i++)
		sum += TEST_GPA + i * PAGE == c ? 0x48 : pattern(TEST_GPA + i * PAGE);
	CHECK("every page: goes on, with the right content", run_to(&r, 1, sum, &exits));
	dprintf(1, "# %u exits for the other %lu pages\n", exits, PAGES - 5);
	CHECK("every page: exits", exits > 0 && exits <= PAGES - 5);
	CHECK_EQ("every page: no bit left", bits(&r, TEST_GPA, PAGES), 0);

	struct kuf_stats_info s = stats(&r);
	CHECK_EQ("no fault went by userfaultfd", s.faults, 0);
	CHECK_EQ("exits are counted", s.vcpu_faults, 1 + 1 + 1 + 2 + exits);
	CHECK_EQ("every byte filled once", s.bytes_copied, SIZE);
	CHECK_EQ("all present", progress(&r, TEST_GPA).present, SIZE);
	if (owner == HOST)
		rig_memslot(&r, 0);
	CHECK_KUF("closes with nothing left", kuf_close(&r.kuf, 0), 0);
	CHECK_EQ("callbacks are released", r.source.released, 1);
	CHECK("runs on without the library", reads(&r, 0, a, 0, &exits) && exits == 0);
	rig_end(&r, 0);
}

/* The library refuses exits that are not its own. */
static void not_ours(void)
{
	doing("not ours", 30);
	rig_start(&r, anon(SIZE), SIZE, 1, LIBRARY, 0, 0);
	CHECK_KUF("exit without the flag", kuf_vcpu_fault(r.kuf, TEST_GPA, PAGE, 0), -ENOENT);
	CHECK_KUF("exit for private memory", kuf_vcpu_fault(r.kuf, TEST_GPA, PAGE, UF_EXIT_FLAG_PRIVATE), -ENOENT);
	CHECK_KUF("exit elsewhere", kuf_vcpu_fault(r.kuf, PAGE, PAGE, UF_EXIT_FLAG_USERFAULT), -ENOENT);
	CHECK_KUF("exit past the end", kuf_vcpu_fault(r.kuf, TEST_GPA + SIZE - PAGE, 2 * PAGE, UF_EXIT_FLAG_USERFAULT),
		  -ERANGE);
	CHECK_EQ("nothing was filled", r.source.fills, 0);
	CHECK_EQ("no bit was cleared", bits(&r, TEST_GPA, PAGES), PAGES);
	CHECK_KUF("flags are bits", kuf_vcpu_fault(r.kuf, TEST_GPA + 0x123, 8, UF_EXIT_FLAG_USERFAULT | 1ULL << 40), 0);
	CHECK_EQ("that one was", bits(&r, TEST_GPA, PAGES), PAGES - 1);
	rig_end(&r, KUF_END_POISON);
}

int main(void)
{
	touches(HOST);
	touches(LIBRARY);
	not_ours();
	return finish();
}
