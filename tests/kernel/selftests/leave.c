/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* All operations that end a wait, and all that must work during one. */
#include "test.h"

static struct vm vm;
static uint8_t out[64];
static struct runner r = { .io = out, .io_max = sizeof(out) };

/* vCPU 0 waits for the page at @gpa; its entry has not been read. */
static void wait_for(uint64_t gpa)
{
	set_guest(&vm, 0, guest_outsb, gpa, 16, 0);
	runner_start(&r, &vm, 0);
	if (!wait_event(&vm, 20000))
		DIE("no event");
	read_event(&vm);
	for (int i = 0; i < 1000 && thread_state(r.tid) != 'D'; i++)
		sleep_ms(1);
}

static bool still_waits(void)
{
	sleep_ms(50);
	return !r.done && thread_state(r.tid) == 'D';
}

static bool goes_on(uint64_t gpa)
{
	return runner_join(&r) == KVM_EXIT_HLT && r.io_len == 16 &&
	       is_pattern(out, gpa, 16);
}

static void fresh(int vcpus)
{
	if (vm.fd)
		vm_destroy(&vm);
	vm_create(&vm, 64 * PAGE, vcpus);
	enable(&vm);
	fill(&vm, TEST_GPA, vm.size);
	mark(&vm, TEST_GPA, vm.size);
}

static void disable(void)
{
	uint64_t gfn;

	doing("disable", 30);
	fresh(1);
	wait_for(TEST_GPA);
	MUST(userfault_cap(&vm, UF_DISABLE, 0, 0));
	CHECK("disable releases who waits", goes_on(TEST_GPA));
	CHECK_ERRNO("and the queue is gone", read_fault(&vm, &gfn), ENOENT);
	CHECK("and no event came of it", !wait_event(&vm, 0));

	/* The same after the entry was read, and with userfaults enabled again at once. */
	MUST(userfault_cap(&vm, UF_ENABLE, vm.event, 0));
	mark(&vm, TEST_GPA, vm.size);
	wait_for(TEST_GPA + PAGE);
	MUST(read_fault(&vm, &gfn));
	MUST(userfault_cap(&vm, UF_DISABLE, 0, 0));
	MUST(userfault_cap(&vm, UF_ENABLE, vm.event, 0));
	CHECK("disable and enable", goes_on(TEST_GPA + PAGE));
}

/* A call that waits for kvm->srcu must work while a vCPU waits for a page. */
static void memslots(void)
{
	void *other = anon(4 * PAGE);
	uint64_t gfn, far = TEST_GPA + 16 * HUGE;

	doing("memslots", 60);
	fresh(1);
	wait_for(TEST_GPA);
	CHECK_ERRNO("add another memslot", set_slot(&vm, 2, 0, far, 4 * PAGE, other, NULL), 0);
	CHECK_ERRNO("change its flags",
		    set_slot(&vm, 2, UF_MEM_LOG_DIRTY, far, 4 * PAGE, other, NULL), 0);
	CHECK_ERRNO("move it", set_slot(&vm, 2, UF_MEM_LOG_DIRTY, far + HUGE, 4 * PAGE,
					other, NULL), 0);
	CHECK_ERRNO("delete it", set_slot(&vm, 2, 0, 0, 0, NULL, NULL), 0);
	CHECK("waits all the same", still_waits());
	CHECK_ERRNO("change the flags of its memslot",
		    set_slot(&vm, TEST_SLOT, UF_MEM_LOG_DIRTY, TEST_GPA, vm.size, vm.mem,
			     NULL), 0);
	CHECK("still waits", still_waits());
	CHECK_ERRNO("entry is still there", read_fault(&vm, &gfn), 0);
	CHECK_EQ("and right", gfn, TEST_GFN);
	unmark(&vm, TEST_GPA, PAGE);
	CHECK("goes on", goes_on(TEST_GPA));

	/* The slot is removed while the vCPU waits. */
	wait_for(TEST_GPA + PAGE);
	CHECK_ERRNO("delete its memslot", set_slot(&vm, TEST_SLOT, 0, 0, 0, NULL, NULL), 0);
	int end = runner_join(&r);
	dprintf(1, "# ended with %d\n", end);
	CHECK("the waiter is released", end == KVM_EXIT_HLT || end == KVM_EXIT_MMIO ||
					end == KVM_EXIT_INTERNAL_ERROR);
	CHECK("with no entry left", no_fault_queued(&vm));
	while (run_vcpu(&vm, 0) == KVM_EXIT_MMIO)
		;

	/* ...and added again, with the marks that it had. */
	MUST(set_slot(&vm, TEST_SLOT, 0, TEST_GPA, vm.size, vm.mem, NULL));
	wait_for(TEST_GPA + PAGE);
	CHECK_ERRNO("move its memslot",
		    set_slot(&vm, TEST_SLOT, 0, TEST_GPA + HUGE, vm.size, vm.mem, NULL), 0);
	end = runner_join(&r);
	dprintf(1, "# ended with %d\n", end);
	CHECK("the waiter is released", end == KVM_EXIT_HLT || end == KVM_EXIT_MMIO ||
					end == KVM_EXIT_INTERNAL_ERROR);
	while (run_vcpu(&vm, 0) == KVM_EXIT_MMIO)
		;
	MUST(set_slot(&vm, TEST_SLOT, 0, TEST_GPA, vm.size, vm.mem, NULL));

	/* Other memory replaces it at the same address: a new fault of the same page. */
	wait_for(TEST_GPA + 2 * PAGE);
	MUST(read_fault(&vm, &gfn));
	unmark(&vm, TEST_GPA + 2 * PAGE, PAGE);
	CHECK("after all of this", goes_on(TEST_GPA + 2 * PAGE));
	munmap(other, 4 * PAGE);
}

static void other_calls(void)
{
	struct kvm_ioeventfd io = { .addr = 0x20, .len = 1, .fd = -1,
				    .flags = KVM_IOEVENTFD_FLAG_PIO };
	struct kvm_coalesced_mmio_zone zone = { .addr = 0xf0000000, .size = PAGE };
	struct kvm_msr_filter filter = { .flags = KVM_MSR_FILTER_DEFAULT_ALLOW };
	unsigned long bitmap[1024] = { 0 };
	struct kvm_dirty_log log = { .slot = TEST_SLOT, .dirty_bitmap = bitmap };
	struct kvm_clock_data clock;

	doing("other calls", 60);
	fresh(2);
	wait_for(TEST_GPA);
	io.fd = (int)MUST(eventfd(0, 0));
	CHECK_ERRNO("ioeventfd", ioctl(vm.fd, KVM_IOEVENTFD, &io), 0);
	io.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
	CHECK_ERRNO("no ioeventfd", ioctl(vm.fd, KVM_IOEVENTFD, &io), 0);
	CHECK_ERRNO("coalesced MMIO", ioctl(vm.fd, KVM_REGISTER_COALESCED_MMIO, &zone), 0);
	CHECK_ERRNO("no coalesced MMIO", ioctl(vm.fd, KVM_UNREGISTER_COALESCED_MMIO, &zone), 0);
	CHECK_ERRNO("MSR filter", ioctl(vm.fd, KVM_X86_SET_MSR_FILTER, &filter), 0);
	MUST(set_slot(&vm, TEST_SLOT, UF_MEM_LOG_DIRTY, TEST_GPA, vm.size, vm.mem, NULL));
	CHECK_ERRNO("dirty log", ioctl(vm.fd, KVM_GET_DIRTY_LOG, &log), 0);
	CHECK_ERRNO("clock", ioctl(vm.fd, KVM_GET_CLOCK, &clock), 0);
	CHECK_ERRNO("marking other pages",
		    set_attr(&vm, TEST_GPA + 8 * PAGE, PAGE, UF_ATTR_USERFAULT), 0);
	CHECK_ERRNO("unmarking other pages", set_attr(&vm, TEST_GPA + 8 * PAGE, PAGE, 0), 0);
	CHECK_ERRNO("marking the same page", set_attr(&vm, TEST_GPA, PAGE, UF_ATTR_USERFAULT), 0);
	CHECK_ERRNO("unmapping host memory", madvise(host(&vm, TEST_GPA + 16 * PAGE), PAGE,
						     MADV_DONTNEED), 0);
	set_guest(&vm, 1, guest_read, TEST_GPA + 8 * PAGE, 0, 0);
	CHECK("another vCPU runs", halts(&vm, 1));
	add_vcpu(&vm);
	CHECK("another vCPU is made", true);
	CHECK("it still waits", still_waits());
	unmark(&vm, TEST_GPA, PAGE);
	CHECK("it goes on", goes_on(TEST_GPA));
	close(io.fd);
}

static void on_signal(int sig)
{
	(void)sig;
}

/* A signal that has a handler does not end the wait. */
static void signals(void)
{
	struct sigaction sa = { .sa_handler = on_signal };

	doing("signals", 30);
	sigaction(SIGUSR1, &sa, NULL);
	fresh(1);
	wait_for(TEST_GPA);
	pthread_kill(r.thread, SIGUSR1);
	CHECK("a signal does not end it", still_waits());
	unmark(&vm, TEST_GPA, PAGE);
	CHECK("goes on", goes_on(TEST_GPA));
}

/*
 * Runs @body in a child, which dies while vCPU 0 of its VM waits.  The VM is
 * destroyed with it; the kernel would report a remaining entry on the console.
 */
static bool child(void (*body)(void), int *status)
{
	pid_t pid = fork();

	if (!pid) {
		alarm(60);
		memset(&vm, 0, sizeof(vm));
		fresh(2);
		wait_for(TEST_GPA);
		body();
		for (;;)
			pause();
	}
	for (int i = 0; i < 6000; i++) {
		if (waitpid(pid, status, WNOHANG) == pid)
			return true;
		sleep_ms(5);
	}
	return false;
}

static void by_sigkill(void)
{
	kill(getpid(), SIGKILL);
}

static void by_exit_group(void)
{
	_exit(42);
}

static void by_segfault(void)
{
	raise(SIGSEGV);
}

static void *do_exec(void *arg)
{
	char *argv[] = { (char *)"x", (char *)"exit", NULL }, *envp[] = { NULL };

	(void)arg;
	execve("/proc/self/exe", argv, envp);
	_exit(1);
}

/* exec kills all other threads, one of which waits, and continues. */
static void by_exec(void)
{
	do_exec(NULL);
}

static void by_disable_and_exit(void)
{
	pid_t pid = fork();

	/* Only the process that created the VM may call its ioctls. */
	if (!pid) {
		uint64_t gfn;

		errno = 0;
		_exit(read_fault(&vm, &gfn) < 0 && errno == EIO ? 0 : 1);
	}
	int s;
	waitpid(pid, &s, 0);
	if (s)
		_exit(1);
	close(vm.fd);	/* the vCPUs hold the VM */
	_exit(43);
}

static void deaths(void)
{
	int s = 0;

	doing("deaths", 120);
	CHECK("SIGKILL ends it", child(by_sigkill, &s) && WIFSIGNALED(s) &&
				 WTERMSIG(s) == SIGKILL);
	CHECK("exit_group ends it", child(by_exit_group, &s) && WIFEXITED(s) &&
				    WEXITSTATUS(s) == 42);
	CHECK("a fatal signal ends it", child(by_segfault, &s) && WIFSIGNALED(s) &&
					WTERMSIG(s) == SIGSEGV);
	CHECK("exec ends it", child(by_exec, &s) && WIFEXITED(s) && WEXITSTATUS(s) == 44);
	CHECK("another process gets EIO", child(by_disable_and_exit, &s) && WIFEXITED(s) &&
					  WEXITSTATUS(s) == 43);
}

int main(int argc, char **argv)
{
	(void)argv;
	if (argc > 1)
		return 44; /* by_exec() */
	disable();
	memslots();
	other_calls();
	signals();
	doing("destroy", 20);
	vm_destroy(&vm);
	deaths();
	return finish();
}
