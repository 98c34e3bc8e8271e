/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Accepted and refused arguments of the capability. */
#include "test.h"

static long check_extension(int fd, long cap)
{
	return ioctl(fd, KVM_CHECK_EXTENSION, cap);
}

int main(void)
{
	struct vm vm;
	uint64_t gfn;
	int fd, null;

	doing("caps", 20);
	vm_create(&vm, 16 * PAGE, 1);
	fd = MUST(eventfd(0, 0));
	null = MUST(open("/dev/null", O_RDWR));

	CHECK("attribute on /dev/kvm",
	      check_extension(vm.kvm, UF_CAP_MEMORY_ATTRIBUTES) & UF_ATTR_USERFAULT);
	CHECK("no attribute on the VM before enabling",
	      !(check_extension(vm.fd, UF_CAP_MEMORY_ATTRIBUTES) & UF_ATTR_USERFAULT));
	CHECK_EQ("bitmap capability", check_extension(vm.fd, UF_CAP_USERFAULT_BITMAP), 1);
	CHECK_EQ("memory fault info", check_extension(vm.fd, UF_CAP_MEMORY_FAULT_INFO), 1);

	CHECK_ERRNO("read when not enabled", read_fault(&vm, &gfn), ENOENT);
	CHECK_ERRNO("mark when not enabled",
		    set_attr(&vm, TEST_GPA, PAGE, UF_ATTR_USERFAULT), EINVAL);
	CHECK_ERRNO("disable when not enabled", userfault_cap(&vm, UF_DISABLE, 0, 0), 0);
	CHECK_ERRNO("neither enable nor disable", userfault_cap(&vm, 0, fd, 0), EINVAL);
	CHECK_ERRNO("both enable and disable",
		    userfault_cap(&vm, UF_ENABLE | UF_DISABLE, fd, 0), EINVAL);
	CHECK_ERRNO("unknown option", userfault_cap(&vm, UF_ENABLE | 4, fd, 0), EINVAL);
	CHECK_ERRNO("option beyond 32 bits",
		    userfault_cap(&vm, UF_ENABLE | 1ULL << 32, fd, 0), EINVAL);
	CHECK_ERRNO("flags", userfault_cap(&vm, UF_ENABLE, fd, 1), EINVAL);
	CHECK_ERRNO("flags with disable", userfault_cap(&vm, UF_DISABLE, fd, 1), EINVAL);
	CHECK_ERRNO("bad descriptor", userfault_cap(&vm, UF_ENABLE, 1000, 0), EBADF);
	CHECK_ERRNO("negative descriptor", userfault_cap(&vm, UF_ENABLE, -1ULL, 0), EBADF);
	CHECK_ERRNO("no eventfd", userfault_cap(&vm, UF_ENABLE, null, 0), EINVAL);
	CHECK("still no attribute",
	      !(check_extension(vm.fd, UF_CAP_MEMORY_ATTRIBUTES) & UF_ATTR_USERFAULT));

	CHECK_ERRNO("enable", userfault_cap(&vm, UF_ENABLE, fd, 0), 0);
	CHECK_ERRNO("enable twice", userfault_cap(&vm, UF_ENABLE, fd, 0), EEXIST);
	CHECK("attribute on the VM",
	      check_extension(vm.fd, UF_CAP_MEMORY_ATTRIBUTES) & UF_ATTR_USERFAULT);
	CHECK_ERRNO("read with nothing queued", read_fault(&vm, &gfn), ENOENT);
	CHECK_ERRNO("read with nothing queued, bad pointer",
		    ioctl(vm.fd, UF_READ_USERFAULT, 8), ENOENT);
	CHECK_ERRNO("read on the vCPU is another ioctl",
		    ioctl(vm.vcpu[0], UF_READ_USERFAULT, &gfn), EINVAL);

	CHECK_ERRNO("mark", set_attr(&vm, TEST_GPA, PAGE, UF_ATTR_USERFAULT), 0);
	CHECK_ERRNO("mark again", set_attr(&vm, TEST_GPA, PAGE, UF_ATTR_USERFAULT), 0);
	CHECK_ERRNO("no private memory on this VM",
		    set_attr(&vm, TEST_GPA, PAGE, UF_ATTR_PRIVATE), EINVAL);
	CHECK_ERRNO("unknown attribute",
		    set_attr(&vm, TEST_GPA, PAGE, UF_ATTR_USERFAULT | 1 << 5), EINVAL);
	CHECK_ERRNO("size that is no pages",
		    set_attr(&vm, TEST_GPA, 100, UF_ATTR_USERFAULT), EINVAL);
	CHECK_ERRNO("no size", set_attr(&vm, TEST_GPA, 0, UF_ATTR_USERFAULT), EINVAL);
	CHECK_ERRNO("mark where there is no slot",
		    set_attr(&vm, 1UL << 32, PAGE, UF_ATTR_USERFAULT), 0);
	CHECK_ERRNO("unmark where there is no slot", set_attr(&vm, 1UL << 32, PAGE, 0), 0);
	CHECK_ERRNO("unmark", set_attr(&vm, TEST_GPA, PAGE, 0), 0);
	CHECK_ERRNO("mark everything",
		    set_attr(&vm, 0, TEST_GPA + vm.size, UF_ATTR_USERFAULT), 0);
	CHECK_ERRNO("disable with marks left", userfault_cap(&vm, UF_DISABLE, 0, 0), 0);
	CHECK("no attribute after disabling",
	      !(check_extension(vm.fd, UF_CAP_MEMORY_ATTRIBUTES) & UF_ATTR_USERFAULT));
	CHECK_ERRNO("unmark after disabling",
		    set_attr(&vm, 0, TEST_GPA + vm.size, 0), 0);
	CHECK_ERRNO("mark after disabling",
		    set_attr(&vm, TEST_GPA, PAGE, UF_ATTR_USERFAULT), EINVAL);
	CHECK_ERRNO("read after disabling", read_fault(&vm, &gfn), ENOENT);

	/* Disabling has removed all marks. */
	CHECK_ERRNO("enable anew", userfault_cap(&vm, UF_ENABLE, fd, 0), 0);
	fill(&vm, TEST_GPA, PAGE);
	set_guest(&vm, 0, guest_read, TEST_GPA, 0, 0);
	CHECK("marks do not come back", halts(&vm, 0));
	CHECK_EQ("content", guest_rax(&vm, 0), pattern64(TEST_GPA));

	/* The kernel has its own reference. */
	mark(&vm, TEST_GPA, PAGE);
	close(fd);
	CHECK_ERRNO("disable with the eventfd closed", userfault_cap(&vm, UF_DISABLE, 0, 0), 0);

	/* Destroy the VM while only the kernel still has the eventfd. */
	fd = MUST(eventfd(0, 0));
	MUST(userfault_cap(&vm, UF_ENABLE, fd, 0));
	close(fd);
	mark(&vm, TEST_GPA, PAGE);
	vm_destroy(&vm);
	CHECK("destroy while enabled", true);

	return finish();
}
