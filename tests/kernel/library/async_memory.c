/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Slots of other kinds: shared files that hold data, huge pages, private memory. */
#include "async.h"

#define PAGES 64

static struct vm vm;
static struct source source;
static struct kuf *kuf;

static int memfd(size_t size, unsigned int flags)
{
	int fd = (int)MUST(memfd_create("guest", MFD_CLOEXEC | flags));

	MUST(ftruncate(fd, (off_t)size));
	return fd;
}

static void *map_fd(int fd, size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (p == MAP_FAILED)
		DIE("mmap of the file: %s", strerror(errno));
	return p;
}

static void add_fd(int fd, uint64_t len, uint32_t flags)
{
	struct kuf_memory m = { .size = sizeof(m), .flags = flags, .gpa = TEST_GPA,
				.len = len, .hva = (uintptr_t)vm.mem, .fd = fd };

	if (kuf_add_memory(kuf, &m))
		DIE("kuf_add_memory: %s", kuf_error());
}

/* Pages with data in the file are present; the library requests the others. */
static void with_data(void)
{
	int fd = memfd(PAGES * PAGE, 0);
	uint8_t buf[PAGE], out[16];
	uint64_t a = TEST_GPA + 4 * PAGE;

	doing("file with data", 60);
	for (int i = 4; i < 8; i++) {
		put_content(buf, TEST_GPA + i * PAGE, PAGE, 77);
		MUST(pwrite(fd, buf, PAGE, i * (off_t)PAGE));
	}
	vm_create_type(&vm, 0, PAGES * PAGE, map_fd(fd, PAGES * PAGE), 2);
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm, &source, 0);
	add_fd(fd, PAGES * PAGE, KUF_MEMORY_POPULATED);
	CHECK_EQ("file: what it holds is present", progress_of(kuf, TEST_GPA).present, 4 * PAGE);
	set_guest(&vm, 0, guest_read, a, 0, 0);
	CHECK("file: read without an exit", halts(&vm, 0) && guest_rax(&vm, 0) == content64(a, 77));
	CHECK("file: KVM reads it", kvm_reads(&vm, kuf, 0, a + 3 * PAGE, out) &&
	      has_content(out, a + 3 * PAGE, 16, 77));
	CHECK("file: in front of it", guest_reads(&vm, kuf, 0, a - PAGE, content64(a - PAGE, 0)));
	CHECK("file: behind it, by KVM", kvm_reads(&vm, kuf, 0, a + 4 * PAGE, out) &&
	      has_content(out, a + 4 * PAGE, 16, 0));
	CHECK_EQ("file: across its end",
		 (set_guest(&vm, 1, guest_insb, a + 5 * PAGE, 8, 0),
		  run_here(&(struct worker){ 0 }, &vm, kuf, 1)), KVM_EXIT_HLT);
	CHECK("file: what the guest sees is in the file",
	      pread(fd, buf, PAGE, 3 * (off_t)PAGE) == PAGE && has_content(buf, a - PAGE, PAGE, 0));
	for (int i = 4; i < 8; i++)
		CHECK_EQ("file: what it held was not asked for", source.fills[i], 0);

	/* A discarded page is dropped from the file and filled from the source. */
	source.generation = 5;
	CHECK_KUF("file: discard", kuf_discard(kuf, a, PAGE, KUF_DISCARD_REFILL), 0);
	CHECK("file: gone from the file", pread(fd, buf, PAGE, 4 * (off_t)PAGE) == PAGE &&
	      is_zero(buf, PAGE));
	CHECK("file: refilled", guest_reads(&vm, kuf, 0, a, content64(a, 5)));
	CHECK_KUF("file: removed", kuf_discard(kuf, a + PAGE, PAGE, KUF_DISCARD_ZERO), 0);
	CHECK("file: KVM reads zero", kvm_reads(&vm, kuf, 0, a + PAGE, out) && is_zero(out, 16));
	CHECK("file: vCPU reads zero", guest_reads(&vm, kuf, 0, a + PAGE + 512, 0));
	CHECK_EQ("file: it was not requested", fills_of(&source, a + PAGE), 0);

	/* A failed fill leaves no bytes in the file. */
	source.bad = TEST_GPA + 20 * PAGE;
	source.bad_answer = -EIO;
	source.smear = true;
	CHECK_KUF("file: a fill fails", kuf_ensure(kuf, source.bad, PAGE, -1), -EHWPOISON);
	CHECK("file: nothing of it is in the file",
	      pread(fd, buf, PAGE, 20 * (off_t)PAGE) == PAGE && is_zero(buf, PAGE));
	source.bad = NO_GPA;
	CHECK_KUF("file: discard", kuf_discard(kuf, TEST_GPA + 20 * PAGE, PAGE, KUF_DISCARD_REFILL), 0);
	close_kuf(kuf, KUF_END_POPULATE);
	CHECK("file: all is there in the end",
	      pread(fd, buf, PAGE, 20 * (off_t)PAGE) == PAGE &&
	      has_content(buf, TEST_GPA + 20 * PAGE, PAGE, 5));
	vm_destroy(&vm);
	close(fd);
}

/* With KUF_MEMORY_FILL_ALL the file's data, perhaps of a dead handler, is filled again, also where it is mapped. */
static void fill_all(void)
{
	int fd = memfd(PAGES * PAGE, 0);
	uint8_t buf[PAGE], out[16];
	uint64_t a = TEST_GPA + 4 * PAGE;

	doing("fill all", 60);
	memset(buf, 0xdd, PAGE);
	for (int i = 0; i < PAGES; i++)
		MUST(pwrite(fd, buf, PAGE, i * (off_t)PAGE));
	vm_create_type(&vm, 0, PAGES * PAGE, map_fd(fd, PAGES * PAGE), 1);
	for (int i = 0; i < PAGES; i++)
		(void)*(volatile uint8_t *)host(&vm, TEST_GPA + i * PAGE);
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm, &source, 0);
	add_fd(fd, PAGES * PAGE, KUF_MEMORY_FILL_ALL);
	CHECK_EQ("fill all: nothing is present", progress_of(kuf, TEST_GPA).present, 0);
	CHECK("fill all: vCPU", guest_reads(&vm, kuf, 0, a, content64(a, 0)));
	CHECK("fill all: KVM", kvm_reads(&vm, kuf, 0, a + PAGE, out) &&
	      has_content(out, a + PAGE, 16, 0));
	/* The caller declares this page complete, so it keeps its bytes. */
	CHECK_KUF("fill all: known to be whole",
		  kuf_resolve(kuf, a + 16 * PAGE, NULL, PAGE, KUF_RESOLVE_IN_PLACE), PAGE);
	CHECK("fill all: is kept", guest_reads(&vm, kuf, 0, a + 16 * PAGE, 0xdddddddddddddddd));
	CHECK_EQ("fill all: and not asked for", fills_of(&source, a + 16 * PAGE), 0);
	/* KUF_RESOLVE_ZERO and removal give zeroes, whatever the file held. */
	CHECK_KUF("fill all: zero", kuf_resolve(kuf, a + 24 * PAGE, NULL, PAGE, KUF_RESOLVE_ZERO),
		  PAGE);
	CHECK("fill all: is zero", guest_reads(&vm, kuf, 0, a + 24 * PAGE, 0));
	CHECK_KUF("fill all: removed", kuf_discard(kuf, a + 32 * PAGE, PAGE, KUF_DISCARD_ZERO), 0);
	CHECK("fill all: removed is zero", kvm_reads(&vm, kuf, 0, a + 32 * PAGE + 256, out) &&
	      is_zero(out, 16));
	/* The source answers KUF_FILL_ZERO. */
	source.answer = KUF_FILL_ZERO;
	CHECK("fill all: a fill of zeroes", guest_reads(&vm, kuf, 0, a + 40 * PAGE, 0));
	source.answer = 0;
	close_kuf(kuf, KUF_END_POISON);
	CHECK("fill all: nothing of the rest is left in the file",
	      pread(fd, buf, PAGE, 60 * (off_t)PAGE) == PAGE && is_zero(buf, PAGE));
	vm_destroy(&vm);
	close(fd);
}

/* Huge pages: one fill and one mark for 2 MiB. */
static void hugetlb(bool of_a_file)
{
	const char *name = of_a_file ? "hugetlb file" : "hugetlb";
	size_t size = 4 * HUGE;
	int fd = -1;
	void *mem;
	uint8_t out[16];
	struct kuf_memory m = { .size = sizeof(m), .gpa = TEST_GPA, .len = size };

	doing(name, 120);
	if (of_a_file) {
		fd = memfd(size, MFD_HUGETLB);
		mem = map_fd(fd, size);
	} else {
		mem = mmap(NULL, size, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	}
	if (mem == MAP_FAILED)
		DIE("%s: %s", name, strerror(errno));
	vm_create_type(&vm, 0, size, mem, 2);
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm, &source, 0);
	m.hva = (uintptr_t)mem;
	if (of_a_file)
		m.fd = fd;
	CHECK_KUF("hugetlb: added", kuf_add_memory(kuf, &m), 0);
	uint64_t a = TEST_GPA + HUGE + 77 * PAGE + 0x18;
	CHECK("hugetlb: vCPU", guest_reads(&vm, kuf, 0, a, content64(a, 0)));
	CHECK_EQ("hugetlb: a whole one", progress_of(kuf, TEST_GPA).present, HUGE);
	set_guest(&vm, 0, guest_read, a + 200 * PAGE, 0, 0);
	CHECK("hugetlb: its other end without an exit", halts(&vm, 0) &&
	      guest_rax(&vm, 0) == content64(a + 200 * PAGE, 0));
	CHECK("hugetlb: KVM", kvm_reads(&vm, kuf, 0, a + HUGE, out) &&
	      has_content(out, a + HUGE, 16, 0));
	CHECK_EQ("hugetlb: two fills", source.calls, 2);
	/* Two vCPUs wait for one huge page. */
	struct worker w[2];
	source.hold = true;
	for (int i = 0; i < 2; i++) {
		set_guest(&vm, i, guest_outsb, TEST_GPA + i * 300 * PAGE, 16, 0);
		worker_start(&w[i], &vm, kuf, i);
	}
	CHECK("hugetlb: two wait", sleeps_in_kvm(&w[0]) && sleeps_in_kvm(&w[1]));
	source.hold = false;
	CHECK("hugetlb: both go on", worker_join(&w[0]) == KVM_EXIT_HLT &&
	      worker_join(&w[1]) == KVM_EXIT_HLT);
	CHECK("hugetlb: bytes", has_content(w[0].out, TEST_GPA, 16, 0) &&
	      has_content(w[1].out, TEST_GPA + 300 * PAGE, 16, 0));
	CHECK_EQ("hugetlb: one fill for both", source.calls, 3);
	source.generation = 4;
	CHECK_KUF("hugetlb: discard", kuf_discard(kuf, TEST_GPA, HUGE, KUF_DISCARD_REFILL), 0);
	CHECK_KUF("hugetlb: part of a page", kuf_discard(kuf, TEST_GPA, PAGE, KUF_DISCARD_REFILL), -EINVAL);
	CHECK("hugetlb: refilled", kvm_reads(&vm, kuf, 1, TEST_GPA + PAGE, out) &&
	      has_content(out, TEST_GPA + PAGE, 16, 4));
	CHECK_KUF("hugetlb: removed", kuf_discard(kuf, TEST_GPA, HUGE, KUF_DISCARD_ZERO), 0);
	CHECK("hugetlb: zero", guest_reads(&vm, kuf, 1, TEST_GPA + 511 * PAGE, 0));
	close_kuf(kuf, KUF_END_POPULATE);
	CHECK("hugetlb: the rest is there", has_content((uint8_t *)mem + 3 * HUGE, TEST_GPA + 3 * HUGE,
							HUGE, 4));
	vm_destroy(&vm);
	if (fd >= 0)
		close(fd);
}

/* With PRIVATE in attributes, it stays when the library removes the mark. */
static void private(void)
{
	struct uf_create_guest_memfd c = { .size = PAGES * PAGE };
	struct uf_memory_region2 slot = {
		.slot = TEST_SLOT,
		.flags = UF_MEM_GUEST_MEMFD,
		.guest_phys_addr = TEST_GPA,
		.memory_size = PAGES * PAGE,
	};
	struct kuf_memory m = { .size = sizeof(m), .gpa = TEST_GPA, .len = 32 * PAGE };
	uint64_t shared = TEST_GPA + 32 * PAGE, a = TEST_GPA + 3 * PAGE;
	struct worker w;

	doing("private", 60);
	int kvm = (int)MUST(open("/dev/kvm", O_RDWR));
	if (!(ioctl(kvm, KVM_CHECK_EXTENSION, UF_CAP_VM_TYPES) & 1 << UF_VM_TYPE_SW_PROTECTED)) {
		skip("private memory", "no VM type that has it");
		return;
	}
	close(kvm);
	vm_create_type(&vm, UF_VM_TYPE_SW_PROTECTED, 0, anon(PAGES * PAGE), 1);
	vm.size = PAGES * PAGE;
	slot.userspace_addr = (uintptr_t)vm.mem;
	slot.guest_memfd = (uint32_t)MUST(ioctl(vm.fd, UF_CREATE_GUEST_MEMFD, &c));
	MUST(ioctl(vm.fd, UF_SET_USER_MEMORY_REGION2, &slot));
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm, &source, 0);
	m.hva = (uintptr_t)vm.mem;
	m.kvm = &(struct kuf_kvm_memory){ .size = sizeof(struct kuf_kvm_memory),
					  .attributes = UF_ATTR_PRIVATE };
	CHECK_KUF("private: added", kuf_add_memory(kuf, &m), 0);
	add_slot(kuf, shared, vm.mem + 32 * PAGE, 32 * PAGE);

	set_guest(&vm, 0, guest_write, a, 0, 0x0123456789abcdef);
	CHECK("private: exits with both",
	      run_vcpu(&vm, 0) == UF_EXIT_MEMORY_FAULT && memory_fault(&vm, 0).gpa == a &&
	      memory_fault(&vm, 0).flags == (UF_EXIT_FLAG_PRIVATE | UF_EXIT_FLAG_USERFAULT));
	CHECK_KUF("private: taken by its flag among others",
		  kuf_vcpu_fault(kuf, a, PAGE, memory_fault(&vm, 0).flags), 0);
	CHECK_EQ("private: goes on", run_here(&w, &vm, kuf, 0), KVM_EXIT_HLT);
	CHECK_EQ("private: asked for once", fills_of(&source, a), 1);
	/* Without PRIVATE the guest would have written to the shared page. */
	CHECK("private: what is written does not go to shared memory",
	      has_content(host(&vm, a), a, PAGE, 0));
	set_guest(&vm, 0, guest_read, a, 0, 0);
	CHECK("private: reads its own", halts(&vm, 0) && guest_rax(&vm, 0) == 0x0123456789abcdef);
	set_guest(&vm, 0, guest_read, a + 8, 0, 1);
	CHECK("private: and none of the shared page's bytes", halts(&vm, 0) && guest_rax(&vm, 0) == 0);

	/* PRIVATE stays when a discard marks the page again and a fill removes the mark. */
	CHECK_KUF("private: discard", kuf_discard(kuf, a, PAGE, KUF_DISCARD_REFILL), 0);
	set_guest(&vm, 0, guest_read, a, 0, 0);
	CHECK_EQ("private: exits again", run_here(&w, &vm, kuf, 0), KVM_EXIT_HLT);
	CHECK("private: for the library", w.exits == 1 && fills_of(&source, a) == 2);
	CHECK_EQ("private: with what guest_memfd holds", guest_rax(&vm, 0), 0x0123456789abcdef);

	/* A run whose marks are removed by one call stays private as a whole. */
	CHECK_KUF("private: a run", kuf_ensure(kuf, TEST_GPA + 8 * PAGE, 8 * PAGE, -1), 0);
	bool good = true;
	for (int i = 8; i < 16; i++) {
		set_guest(&vm, 0, guest_read, TEST_GPA + i * PAGE, 0, 1);
		good = halts(&vm, 0) && guest_rax(&vm, 0) == 0 && good;
	}
	CHECK("private: each page of it", good);

	/* The other slot is not private. */
	CHECK("shared: by the source", guest_reads(&vm, kuf, 0, shared, content64(shared, 0)));

	/* PRIVATE stays after the slot is removed too. */
	CHECK_KUF("private: removed", kuf_remove_memory(kuf, TEST_GPA, KUF_END_POPULATE), 0);
	set_guest(&vm, 0, guest_read, TEST_GPA + 20 * PAGE, 0, 1);
	CHECK("private: off the service", halts(&vm, 0) && guest_rax(&vm, 0) == 0);
	set_guest(&vm, 0, guest_read, a, 0, 1);
	CHECK("private: off the service, its own", halts(&vm, 0) &&
	      guest_rax(&vm, 0) == 0x0123456789abcdef);
	close_kuf(kuf, KUF_END_POPULATE);
	vm_destroy(&vm);
	close((int)slot.guest_memfd);
}

int main(void)
{
	with_data();
	fill_all();
	hugetlb(false);
	hugetlb(true);
	private();
	return finish();
}
