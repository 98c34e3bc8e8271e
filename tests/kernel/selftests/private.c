/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* PRIVATE and USERFAULT are two independent attributes. */
#include "test.h"

static struct vm vm;

static bool exits_with(uint64_t gpa, uint64_t flags)
{
	int e = run_vcpu(&vm, 0);
	struct uf_exit_memory_fault f = memory_fault(&vm, 0);

	if (e == UF_EXIT_MEMORY_FAULT && f.gpa == gpa && f.flags == flags)
		return true;
	dprintf(1, "# run %d, flags %#" PRIx64 " gpa %#" PRIx64 "\n", e, f.flags, f.gpa);
	return false;
}

int main(void)
{
	struct uf_create_guest_memfd c = { .size = 64 * PAGE };
	struct uf_memory_region2 slot = {
		.slot = TEST_SLOT,
		.flags = UF_MEM_GUEST_MEMFD,
		.guest_phys_addr = TEST_GPA,
		.memory_size = 64 * PAGE,
	};
	uint64_t a = TEST_GPA, b = TEST_GPA + PAGE;
	uint64_t both = UF_ATTR_PRIVATE | UF_ATTR_USERFAULT;
	int kvm = (int)MUST(open("/dev/kvm", O_RDWR));

	doing("private", 60);
	if (!(ioctl(kvm, KVM_CHECK_EXTENSION, UF_CAP_VM_TYPES) & 1 << UF_VM_TYPE_SW_PROTECTED)) {
		skip("private memory", "no VM type that has it");
		return 77;
	}
	close(kvm);

	/* Such a VM starts with shared memory; the low memory stays shared. */
	vm_create_type(&vm, UF_VM_TYPE_SW_PROTECTED, 0, anon(64 * PAGE), 1);
	vm.size = 64 * PAGE;
	slot.userspace_addr = (uintptr_t)vm.mem;
	slot.guest_memfd = MUST(ioctl(vm.fd, UF_CREATE_GUEST_MEMFD, &c));
	MUST(ioctl(vm.fd, UF_SET_USER_MEMORY_REGION2, &slot));

	CHECK_EQ("private before enabling",
		 ioctl(vm.fd, KVM_CHECK_EXTENSION, UF_CAP_MEMORY_ATTRIBUTES), UF_ATTR_PRIVATE);
	enable(&vm);
	CHECK_EQ("both after enabling",
		 ioctl(vm.fd, KVM_CHECK_EXTENSION, UF_CAP_MEMORY_ATTRIBUTES), both);

	/* A shared page works as in any VM. */
	MUST(set_attr(&vm, a, PAGE, UF_ATTR_USERFAULT));
	set_guest(&vm, 0, guest_read, a, 0, 0);
	CHECK("shared, marked", exits_with(a, UF_EXIT_FLAG_USERFAULT));
	fill(&vm, a, PAGE);
	MUST(set_attr(&vm, a, PAGE, 0));
	CHECK("shared, goes on", halts(&vm, 0));
	CHECK_EQ("shared, content", guest_rax(&vm, 0), pattern64(a));

	/* The guest fills a private page, because no other way exists here. */
	MUST(set_attr(&vm, b, PAGE, both));
	set_guest(&vm, 0, guest_write, b, 0, 0x0123456789abcdef);
	CHECK("private, marked", exits_with(b, UF_EXIT_FLAG_PRIVATE | UF_EXIT_FLAG_USERFAULT));
	MUST(set_attr(&vm, b, PAGE, UF_ATTR_PRIVATE));
	CHECK("private, goes on", halts(&vm, 0));
	set_guest(&vm, 0, guest_read, b, 0, 0);
	CHECK("private, is mapped", halts(&vm, 0));
	CHECK_EQ("private, content", guest_rax(&vm, 0), 0x0123456789abcdef);
	CHECK_EQ("private, not in shared memory", *(uint64_t *)host(&vm, b), 0);

	/* Marked while mapped and unmarked again, a page keeps its content. */
	MUST(set_attr(&vm, b, PAGE, both));
	CHECK("marked while mapped private",
	      (set_guest(&vm, 0, guest_read, b, 0, 0),
	       exits_with(b, UF_EXIT_FLAG_PRIVATE | UF_EXIT_FLAG_USERFAULT)));
	MUST(set_attr(&vm, b, PAGE, UF_ATTR_PRIVATE));
	CHECK("goes on as private", halts(&vm, 0));
	CHECK_EQ("with what was there", guest_rax(&vm, 0), 0x0123456789abcdef);

	/* Disabling removes the marks but not PRIVATE. */
	MUST(set_attr(&vm, a, PAGE, UF_ATTR_USERFAULT));
	MUST(set_attr(&vm, b, PAGE, both));
	MUST(userfault_cap(&vm, UF_DISABLE, 0, 0));
	set_guest(&vm, 0, guest_read, b, 0, 0);
	CHECK("private after disabling", halts(&vm, 0));
	CHECK_EQ("private after disabling, content", guest_rax(&vm, 0), 0x0123456789abcdef);
	set_guest(&vm, 0, guest_read, a, 0, 0);
	CHECK("shared after disabling", halts(&vm, 0));
	CHECK_EQ("shared after disabling, content", guest_rax(&vm, 0), pattern64(a));

	/* Without PRIVATE the guest reads the shared page. */
	MUST(userfault_cap(&vm, UF_ENABLE, vm.event, 0));
	*(uint64_t *)host(&vm, b) = 42;
	MUST(set_attr(&vm, b, PAGE, UF_ATTR_USERFAULT));
	set_guest(&vm, 0, guest_read, b, 0, 0);
	CHECK("from private to shared and marked", exits_with(b, UF_EXIT_FLAG_USERFAULT));
	MUST(set_attr(&vm, b, PAGE, 0));
	CHECK("then to shared", halts(&vm, 0));
	CHECK_EQ("shared content", guest_rax(&vm, 0), 42);

	/* This kind of slot can get a bitmap only when it is created. */
	static uint64_t bitmap[1];
	slot.flags |= UF_MEM_USERFAULT;
	slot.userfault_bitmap = (uintptr_t)bitmap;
	CHECK_ERRNO("bitmap for a slot with guest_memfd, later",
		    ioctl(vm.fd, UF_SET_USER_MEMORY_REGION2, &slot), EINVAL);
	MUST(set_slot(&vm, TEST_SLOT, 0, 0, 0, NULL, NULL));
	CHECK_ERRNO("bitmap for a slot with guest_memfd, from the start",
		    ioctl(vm.fd, UF_SET_USER_MEMORY_REGION2, &slot), 0);
	bitmap[0] = 3;
	MUST(set_attr(&vm, b, PAGE, UF_ATTR_PRIVATE));
	set_guest(&vm, 0, guest_read, b, 0, 0);
	CHECK("private, by bitmap",
	      exits_with(b, UF_EXIT_FLAG_PRIVATE | UF_EXIT_FLAG_USERFAULT));
	bitmap[0] = 1;
	CHECK("private, by bitmap, goes on", halts(&vm, 0));
	CHECK_EQ("private, by bitmap, content", guest_rax(&vm, 0), 0x0123456789abcdef);
	vm_destroy(&vm);
	close(slot.guest_memfd);
	return finish();
}
