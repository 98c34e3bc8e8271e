/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The memory behind the guest's pages: anonymous memory, filled by copy; a shared file, filled in place; and huge
 * pages of both kinds, which have 512 bits each.
 */
#include "bitmap.h"

struct kind {
	const char *name;
	bool shared, huge;
};

static struct rig r;

static uint8_t *memory(const struct kind *k, size_t size, int *fd)
{
	void *p;

	*fd = 0;
	if (k->shared)
		return shared_memory(size, k->huge ? MFD_HUGETLB : 0, fd);
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (k->huge ? MAP_HUGETLB : 0), -1, 0);
	return p == MAP_FAILED ? NULL : p;
}

static void serve(const struct kind *k, enum owner owner)
{
	const uint64_t granule = k->huge ? HUGE : PAGE, pages = 8, size = pages * granule, per = granule / PAGE;
	uint64_t in_page = granule / 2 + 0x10;
	unsigned int exits;
	char what[120];
	int fd;

#define NAME(text) (snprintf(what, sizeof(what), "%s: %s", k->name, text), what)
	doing(k->name, 60);
	uint8_t *mem = memory(k, size, &fd);
	if (!mem) {
		skip(k->name, "no such memory here");
		return;
	}
	rig_start(&r, mem, size, 2, owner, 0, fd);
	CHECK_EQ(NAME("all bits set"), bits(&r, TEST_GPA, pages * per), pages * per);

	uint64_t a = TEST_GPA, b = TEST_GPA + granule, c = TEST_GPA + 2 * granule, d = TEST_GPA + 5 * granule;
	CHECK(NAME("a vCPU reads"), reads(&r, 0, a + in_page, 0, &exits));
	CHECK_EQ(NAME("one exit"), exits, 1);
	CHECK(NAME("the page's bits are clear, and no others"),
	      bits(&r, a, per) == 0 && bits(&r, b, 7 * per) == 7 * per);
	CHECK(NAME("the whole page is there"), reads(&r, 0, a, 0, &exits) && exits == 0 &&
	      reads(&r, 1, a + granule - 8, 0, &exits) && exits == 0);
	set_guest(&r.vm, 1, guest_write, b + in_page, 0, 0x55);
	CHECK(NAME("a vCPU writes"), run_to(&r, 1, 0x55, &exits) && exits == 1);
	CHECK(NAME("into the page's own bytes"), reads(&r, 0, b + in_page - 8, 0, &exits) && exits == 0 &&
	      reads(&r, 0, b + in_page + 8, 0, &exits) && exits == 0 && *host(&r.vm, b + in_page) == 0x55);
	CHECK_EQ(NAME("nothing by userfaultfd"), stats(&r).faults - stats(&r).faults_minor, 0);
	CHECK(NAME("KVM reads"), kvm_reads(&r, 0, c + in_page, 16, 0));
	CHECK(NAME("the VMM reads"), is_pattern(host(&r.vm, d), d, granule));
	CHECK_EQ(NAME("bits of both are clear"), bits(&r, c, per) + bits(&r, d, per), 0);
	if (k->shared) {
		/* Another mapping of the file shows the filled pages. */
		uint8_t *second = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
		CHECK(NAME("the file has it"), is_pattern(second + 5 * granule, d, granule));
		munmap(second, size);
	}
	bool good = true;
	for (uint64_t gpa = c + granule; gpa < TEST_GPA + size; gpa += granule)
		good = good && reads(&r, 0, gpa + granule - 8, 0, &exits) && exits == (gpa != d);
	CHECK(NAME("the rest, by an exit each"), good);

	/* The waiting thread may get here before the thread that filled the page has counted it. */
	AWAIT(r.source.events[KUF_EVENT_COMPLETE] == 1);
	struct kuf_stats_info s = stats(&r);
	CHECK_EQ(NAME("every byte once"), k->shared ? s.bytes_in_place : s.bytes_copied, size);
	CHECK_EQ(NAME("and no other way"), k->shared ? s.bytes_copied : s.bytes_in_place, 0);
	if (owner == HOST)
		rig_memslot(&r, 0);
	rig_end(&r, 0);
	if (fd)
		close(fd);
}

/* A page with data in the file is present: no bit, no exit, no fill. */
static void file_with_data(bool fill_all)
{
	const uint64_t pages = 16;
	uint8_t page[PAGE];
	unsigned int exits;
	int fd;

	doing("file with data", 30);
	uint8_t *mem = shared_memory(pages * PAGE, 0, &fd);
	for (uint64_t n = 4; n < 8; n++) {
		write_pages(page, TEST_GPA + n * PAGE, PAGE, 9);
		MUST(pwrite(fd, page, PAGE, (off_t)(n * PAGE)));
	}
	rig_start(&r, mem, pages * PAGE, 1, LIBRARY,
		  (fill_all ? KUF_MEMORY_FILL_ALL : KUF_MEMORY_POPULATED), fd);
	CHECK_EQ("file with data: bits", r.bitmap[0], fill_all ? 0xffff : 0xff0f);
	CHECK("file with data: what it held", reads(&r, 0, TEST_GPA + 5 * PAGE, fill_all ? 0 : 9, &exits));
	CHECK_EQ("file with data: exits", exits, fill_all);
	CHECK("file with data: what it did not hold", reads(&r, 0, TEST_GPA + 9 * PAGE, 0, &exits) && exits == 1);
	CHECK_EQ("file with data: fills", r.source.fills, fill_all ? 2 : 1);
	CHECK("file with data: by KVM", kvm_reads(&r, 0, TEST_GPA + 6 * PAGE, 8, fill_all ? 0 : 9));
	rig_end(&r, KUF_END_POISON);
	close(fd);
}

/* kuf_resolve of pages without a fault, and populate, clear the bits too. */
static void unasked(void)
{
	const uint64_t pages = 200;
	uint8_t *buffer = malloc(70 * PAGE);
	unsigned int exits;

	doing("unasked", 30);
	rig_start(&r, anon(pages * PAGE), pages * PAGE, 1, LIBRARY, 0, 0);
	write_pages(buffer, TEST_GPA + 60 * PAGE, 70 * PAGE, 3);
	CHECK_KUF("kuf_resolve", kuf_resolve(r.kuf, TEST_GPA + 60 * PAGE, buffer, 70 * PAGE, 0), 70 * PAGE);
	CHECK("kuf_resolve: these bits and no others", bits(&r, TEST_GPA, pages) == pages - 70 &&
	      bits(&r, TEST_GPA + 60 * PAGE, 70) == 0);
	CHECK("kuf_resolve: content, with no exit", reads(&r, 0, TEST_GPA + 129 * PAGE, 3, &exits) && exits == 0);
	CHECK_KUF("kuf_resolve zero", kuf_resolve(r.kuf, TEST_GPA + 130 * PAGE, NULL, PAGE, KUF_RESOLVE_ZERO), PAGE);
	CHECK("kuf_resolve zero: content, with no exit",
	      reads_zero(&r, 0, TEST_GPA + 130 * PAGE, &exits) && exits == 0);
	struct kuf_populate_request p = { .size = sizeof(p), .gpa = TEST_GPA, .len = 60 * PAGE };
	CHECK_KUF("kuf_populate", kuf_populate(r.kuf, &p), 0);
	AWAIT(r.source.events[KUF_EVENT_POPULATED] == 1);
	CHECK("kuf_populate: these bits and no others", bits(&r, TEST_GPA, 131) == 0 &&
	      bits(&r, TEST_GPA + 131 * PAGE, 69) == 69);
	CHECK("kuf_populate: content, with no exit", reads(&r, 0, TEST_GPA + 59 * PAGE, 0, &exits) && exits == 0);
	CHECK("the next page exits", reads(&r, 0, TEST_GPA + 131 * PAGE, 0, &exits) && exits == 1);
	CHECK_EQ("nothing by userfaultfd", stats(&r).faults, 0);
	CHECK_KUF("closes, populating", kuf_close(&r.kuf, KUF_END_POPULATE), 0);
	CHECK("all of it is there", reads(&r, 0, TEST_GPA + 199 * PAGE, 0, &exits) && exits == 0);
	rig_end(&r, 0);
	free(buffer);
}

int main(void)
{
	static const struct kind kinds[] = {
		{ "private", false, false }, { "shared", true, false }, { "private huge", false, true },
		{ "shared huge", true, true },
	};

	for (int i = 0; i < 4; i++) {
		serve(&kinds[i], HOST);
		serve(&kinds[i], LIBRARY);
	}
	file_with_data(false);
	file_with_data(true);
	unasked();
	return finish();
}
