/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Probing, opening, and refusals, which must change nothing. */
#include "async.h"

static struct vm vm;
static struct source source;

#define SIZE (64 * PAGE)

static struct kuf_probe_info probe_of(int fd)
{
	static struct kuf_probe_info p;

	memset(&p, 0, sizeof(p));
	p.size = sizeof(p);
	CHECK_KUF("kuf_probe", kuf_probe(fd, &p), 0);
	return p;
}

static void probing(void)
{
	struct kuf_probe_info p;

	doing("probe", 30);
	vm_create(&vm, SIZE, 1);
	p = probe_of(vm.fd);
	CHECK_EQ("probe: every mechanism works here", p.mechanisms,
		 1 << KUF_MECHANISM_AUTO | 1 << KUF_MECHANISM_USERFAULTFD |
		 1 << KUF_MECHANISM_KVM_BITMAP | 1 << KUF_MECHANISM_KVM_ASYNC);
	CHECK_EQ("probe: asynchronous: no error", p.error[KUF_MECHANISM_KVM_ASYNC], 0);
	CHECK_EQ("probe: bitmap: no error", p.error[KUF_MECHANISM_KVM_BITMAP], 0);
	CHECK("probe: asynchronous: why", strstr(p.why[KUF_MECHANISM_KVM_ASYNC], "by name"));
	CHECK("probe: bitmap: why", strstr(p.why[KUF_MECHANISM_KVM_BITMAP], "by name"));
	CHECK_EQ("probe: userfaultfd is recommended", p.recommended, KUF_MECHANISM_USERFAULTFD);

	/* Probing must not enable userfaults or mark pages. */
	CHECK_EQ("probe: the VM is as before",
		 ioctl(vm.fd, KVM_CHECK_EXTENSION, UF_CAP_MEMORY_ATTRIBUTES), 0);

	p = probe_of(-1);
	CHECK_EQ("probe without a VM: not asynchronous", p.error[KUF_MECHANISM_KVM_ASYNC],
		 -ENOTSUP);
	CHECK("probe without a VM: says what to do",
	      strstr(p.why[KUF_MECHANISM_KVM_ASYNC], "VM descriptor"));
	CHECK("probe without a VM: bitmap",
	      p.mechanisms & 1 << KUF_MECHANISM_KVM_BITMAP);
	CHECK_REFUSED("probe of what is no VM", kuf_probe(vm.kvm, &p), -EINVAL, "KVM VM");
	CHECK_KUF("probe of no descriptor", kuf_probe(999, &p), -EBADF);
	vm_destroy(&vm);
}

/* AUTO selects userfaultfd, even with a VM that supports more. */
static void automatic(void)
{
	struct kuf_options o = { .size = sizeof(o), .fill = source_fill,
				 .opaque = &source };
	struct kuf *kuf;

	doing("auto", 30);
	vm_create(&vm, SIZE, 1);
	source_init(&source, TEST_GPA);
	o.vm_fd = vm.fd;
	CHECK_KUF("AUTO opens", kuf_open(&o, &kuf), 0);
	CHECK_EQ("AUTO has not enabled userfaults",
		 ioctl(vm.fd, KVM_CHECK_EXTENSION, UF_CAP_MEMORY_ATTRIBUTES), 0);
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	CHECK("AUTO serves", guest_reads(&vm, kuf, 0, TEST_GPA, content64(TEST_GPA, 0)));
	CHECK_EQ("AUTO had no exit", stats_of(kuf).vcpu_faults, 0);
	close_kuf(kuf, KUF_END_POISON);
	vm_destroy(&vm);
}

static void enabled_already(void)
{
	uint64_t gpa = TEST_GPA + 3 * PAGE, gfn;
	struct kuf_probe_info p;
	struct kuf *kuf = (void *)1;
	uint8_t out[16];
	struct runner r = { .io = out, .io_max = sizeof(out) };

	doing("enabled already", 30);
	vm_create(&vm, SIZE, 1);
	source_init(&source, TEST_GPA);
	enable(&vm);
	fill(&vm, TEST_GPA, vm.size);
	mark(&vm, gpa, PAGE);
	set_guest(&vm, 0, guest_outsb, gpa, 16, 0);
	runner_start(&r, &vm, 0);
	CHECK("another owner's access waits", wait_event(&vm, 20000));

	p = probe_of(vm.fd);
	CHECK_EQ("probe: EEXIST", p.error[KUF_MECHANISM_KVM_ASYNC], -EEXIST);
	CHECK("probe: not offered", !(p.mechanisms & 1 << KUF_MECHANISM_KVM_ASYNC));
	CHECK_REFUSED("kuf_open: EEXIST", try_open(&vm, &source, 0, &kuf), -EEXIST, "enabled");
	CHECK("kuf_open: no handle", !kuf);
	CHECK_EQ("kuf_open: release is not called", source.released, 0);
	sleep_ms(50);
	CHECK("another owner's access still waits", !r.done && thread_state(r.tid) == 'D');
	CHECK("its entry is still queued", read_event(&vm) == 1 && !read_fault(&vm, &gfn) &&
	      gfn == gpa / PAGE);
	unmark(&vm, gpa, PAGE);
	CHECK_EQ("it goes on when its owner says so", runner_join(&r), KVM_EXIT_HLT);
	CHECK("with its bytes", r.io_len == 16 && is_pattern(out, gpa, 16));
	mark(&vm, gpa, PAGE);
	set_guest(&vm, 0, guest_read, gpa, 0, 0);
	CHECK("another owner's marks still work", faults_at(&vm, 0, gpa));

	MUST(userfault_cap(&vm, UF_DISABLE, 0, 0));
	CHECK_KUF("when it is disabled it opens", try_open(&vm, &source, 0, &kuf), 0);
	close_kuf(kuf, 0);
	vm_destroy(&vm);
}

static void open_refusals(void)
{
	static const struct {
		uint64_t flag;
		const char *name;
	} no[] = {
		{ KUF_OPEN_USER_MODE_ONLY, "USER_MODE_ONLY" },
		{ KUF_OPEN_FOLLOW_FORK, "FOLLOW_FORK" },
		{ KUF_OPEN_ADOPT_ONLY, "ADOPT_ONLY" },
	};
	struct kuf_options o = { .size = sizeof(o), .mechanism = KUF_MECHANISM_KVM_ASYNC,
				 .fill = source_fill, .opaque = &source };
	struct kuf *kuf;

	doing("refusals of kuf_open", 30);
	vm_create(&vm, SIZE, 1);
	CHECK_REFUSED("without a VM", kuf_open(&o, &kuf), -EINVAL, "vm_fd");
	o.vm_fd = vm.kvm;
	CHECK_REFUSED("with what is no VM", kuf_open(&o, &kuf), -EINVAL, "KVM VM");
	o.vm_fd = vm.vcpu[0];
	CHECK_REFUSED("with a vCPU", kuf_open(&o, &kuf), -EINVAL, "KVM VM");
	o.vm_fd = 999;
	CHECK_KUF("with no descriptor", kuf_open(&o, &kuf), -EBADF);
	for (unsigned int i = 0; i < sizeof(no) / sizeof(*no); i++) {
		char name[64];

		snprintf(name, sizeof(name), "with %s", no[i].name);
		CHECK_REFUSED(name, try_open(&vm, &source, no[i].flag, &kuf), -EINVAL,
			      no[i].name);
	}
	CHECK_KUF("DIRECT with a callback", try_open(&vm, &source, KUF_OPEN_DIRECT, &kuf), -EINVAL);
	CHECK_EQ("none of these has enabled anything",
		 ioctl(vm.fd, KVM_CHECK_EXTENSION, UF_CAP_MEMORY_ATTRIBUTES), 0);
	vm_destroy(&vm);
}

static bool is_marked(uint64_t gpa)
{
	set_guest(&vm, 0, guest_read, gpa, 0, 0);
	return run_vcpu(&vm, 0) == UF_EXIT_MEMORY_FAULT && memory_fault(&vm, 0).gpa == gpa;
}

static void memory_refusals(void)
{
	struct kuf_memory m = { .size = sizeof(m), .gpa = TEST_GPA, .len = SIZE };
	struct kuf *kuf;
	uint64_t address;

	doing("refusals of kuf_add_memory", 30);
	vm_create(&vm, SIZE, 1);
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm, &source, 0);
	m.hva = (uintptr_t)vm.mem;

	*(volatile uint8_t *)host(&vm, TEST_GPA + 40 * PAGE) = 0x77;
	CHECK_REFUSED("touched memory", kuf_add_memory(kuf, &m), -EBUSY, "touched");
	CHECK("touched memory: nothing is marked", !is_marked(TEST_GPA));
	CHECK_EQ("touched memory: no slot", kuf_progress(kuf, TEST_GPA,
		 &(struct kuf_progress_info){ .size = sizeof(struct kuf_progress_info) }), -ENOENT);
	CHECK_EQ("touched memory: its byte", *host(&vm, TEST_GPA + 40 * PAGE), 0x77);
	MUST(madvise(vm.mem, SIZE, MADV_DONTNEED));

	struct kuf_kvm_memory kvm = { .size = sizeof(kvm), .attributes = UF_ATTR_USERFAULT };
	m.kvm = &kvm;
	CHECK_REFUSED("the mark as an attribute", kuf_add_memory(kuf, &m), -EINVAL, "USERFAULT");
	kvm.attributes = UF_ATTR_PRIVATE;
	CHECK_REFUSED("an attribute that this VM has not", kuf_add_memory(kuf, &m), -EINVAL,
		      "attributes");
	CHECK("refused attributes: nothing is marked", !is_marked(TEST_GPA));
	MUST(madvise(vm.mem, SIZE, MADV_DONTNEED));
	m.kvm = NULL;

	int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	m.uffd = uffd;
	CHECK_KUF("a userfaultfd", kuf_add_memory(kuf, &m), -EINVAL);
	close(uffd);
	m.uffd = 0;
	kvm = (struct kuf_kvm_memory){ .size = sizeof(kvm), .flags = KUF_KVM_MEMORY_MEMSLOT, .memslot = TEST_SLOT };
	m.kvm = &kvm;
	CHECK_REFUSED("KUF_KVM_MEMORY_MEMSLOT", kuf_add_memory(kuf, &m), -EINVAL, "BITMAP");
	m.kvm = NULL;

	MUST(mprotect(vm.mem, SIZE, PROT_READ));
	CHECK_REFUSED("a mapping that cannot be written", kuf_add_memory(kuf, &m), -EINVAL, "writ");
	MUST(mprotect(vm.mem, SIZE, PROT_NONE));
	CHECK_REFUSED("a mapping that is inaccessible", kuf_add_memory(kuf, &m), -EINVAL, "writ");
	MUST(mprotect(vm.mem, SIZE, PROT_READ | PROT_WRITE));
	CHECK("refused mappings: nothing is marked", !is_marked(TEST_GPA));
	MUST(madvise(vm.mem, SIZE, MADV_DONTNEED));

	CHECK_KUF("and then it is added", kuf_add_memory(kuf, &m), 0);
	CHECK("and marked", is_marked(TEST_GPA));
	CHECK_KUF("twice", kuf_add_memory(kuf, &m), -EEXIST);
	CHECK("twice: still marked", is_marked(TEST_GPA + PAGE));
	CHECK_REFUSED("kuf_kvm_bitmap", kuf_kvm_bitmap(kuf, TEST_GPA, &address), -ENOTSUP,
		      "bitmap");
	CHECK("and it is served", guest_reads(&vm, kuf, 0, TEST_GPA, content64(TEST_GPA, 0)));

	/* Now the library itself has enabled userfaults, and a second handle is refused. */
	struct kuf *second;
	CHECK_REFUSED("a second handle on this VM", try_open(&vm, &source, 0, &second), -EEXIST,
		      "enabled");
	CHECK("the first one is served on",
	      guest_reads(&vm, kuf, 0, TEST_GPA + PAGE, content64(TEST_GPA + PAGE, 0)));
	CHECK_REFUSED("kuf_close with unresolved pages", kuf_close(&kuf, 0), -EBUSY, "unresolved");
	CHECK("still marked", is_marked(TEST_GPA + 30 * PAGE));
	CHECK_KUF("kuf_remove_memory with unresolved pages", kuf_remove_memory(kuf, TEST_GPA, 0),
		  -EBUSY);

	/* The caller makes a page read-only later: it cannot be filled, but this ends no thread. */
	MUST(mprotect(host(&vm, TEST_GPA + 45 * PAGE), PAGE, PROT_READ));
	CHECK_KUF("a page that became read-only",
		  kuf_vcpu_fault(kuf, TEST_GPA + 45 * PAGE, PAGE, UF_EXIT_FLAG_USERFAULT), -EHWPOISON);
	CHECK("a page that became read-only: marked", is_marked(TEST_GPA + 45 * PAGE));
	MUST(mprotect(host(&vm, TEST_GPA + 45 * PAGE), PAGE, PROT_READ | PROT_WRITE));
	CHECK_KUF("and is writable again", kuf_discard(kuf, TEST_GPA + 45 * PAGE, PAGE, KUF_DISCARD_REFILL), 0);
	CHECK_KUF("kuf_remove_memory that populates",
		  kuf_remove_memory(kuf, TEST_GPA, KUF_END_POPULATE), 0);
	bool good = true;
	for (uint64_t gpa = TEST_GPA; gpa < TEST_GPA + SIZE; gpa += PAGE) {
		set_guest(&vm, 0, guest_read, gpa, 0, 0);
		good = good && halts(&vm, 0) && guest_rax(&vm, 0) == content64(gpa, 0);
	}
	CHECK("no mark is left, and every page is there", good);
	close_kuf(kuf, 0);
	vm_destroy(&vm);
}

/* When kuf_close returns, userfaults are disabled. */
static void again_and_again(void)
{
	bool good = true;

	doing("open and close", 60);
	vm_create(&vm, SIZE, 1);
	for (int i = 0; i < 30; i++) {
		struct kuf *kuf;

		source_init(&source, TEST_GPA);
		source.generation = i;
		int r = try_open(&vm, &source, 0, &kuf);
		if (r) {
			dprintf(1, "# round %d: %d %s\n", i, r, kuf_error());
			good = false;
			break;
		}
		add_slot(kuf, TEST_GPA, vm.mem, vm.size);
		good = good && guest_reads(&vm, kuf, 0, TEST_GPA + i * PAGE,
					   content64(TEST_GPA + i * PAGE, i));
		close_kuf(kuf, KUF_END_POPULATE);
		good = good && has_content(vm.mem, TEST_GPA, SIZE, i);
		MUST(madvise(vm.mem, SIZE, MADV_DONTNEED));
	}
	CHECK("opened and closed many times", good);
	CHECK_EQ("and disabled", ioctl(vm.fd, KVM_CHECK_EXTENSION, UF_CAP_MEMORY_ATTRIBUTES), 0);
	vm_destroy(&vm);
}

/* The kernel's errors, on which kuf.h and the library rely. */
static void kernel_errors(void)
{
	uint64_t gfn;
	int event = (int)MUST(eventfd(0, EFD_CLOEXEC));
	struct kuf *kuf;

	doing("kernel errors", 30);
	vm_create(&vm, SIZE, 1);
	source_init(&source, TEST_GPA);
	CHECK_ERRNO("raw: read when not enabled", read_fault(&vm, &gfn), ENOENT);
	CHECK_ERRNO("raw: enable with no descriptor", userfault_cap(&vm, UF_ENABLE, 999, 0), EBADF);
	CHECK_ERRNO("raw: enable with no eventfd", userfault_cap(&vm, UF_ENABLE, vm.kvm, 0), EINVAL);
	CHECK_ERRNO("raw: enable and disable",
		    userfault_cap(&vm, UF_ENABLE | UF_DISABLE, event, 0), EINVAL);
	CHECK_ERRNO("raw: disable when not enabled", userfault_cap(&vm, UF_DISABLE, 0, 0), 0);
	CHECK_ERRNO("raw: mark when not enabled",
		    set_attr(&vm, TEST_GPA, PAGE, UF_ATTR_USERFAULT), EINVAL);
	kuf = open_serviced(&vm, &source, 0);
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	CHECK_ERRNO("raw: enable what the library has enabled",
		    userfault_cap(&vm, UF_ENABLE, event, 0), EEXIST);
	CHECK_ERRNO("raw: read of an empty queue", read_fault(&vm, &gfn), ENOENT);
	CHECK("the library does not mind", guest_reads(&vm, kuf, 0, TEST_GPA,
						       content64(TEST_GPA, 0)));
	close_kuf(kuf, KUF_END_POISON);
	vm_destroy(&vm);
	close(event);
}

/* Runs in a child, which has the VM's descriptor but is not the VM's process. */
static int in_a_child(int (*body)(void))
{
	int s = 0;
	pid_t pid = fork();

	if (!pid) {
		alarm(60);
		_exit(body());
	}
	MUST(waitpid(pid, &s, 0));
	return WIFEXITED(s) ? WEXITSTATUS(s) : -1;
}

static struct kuf *parents;

static int child_raw(void)
{
	uint64_t gfn;

	errno = 0;
	return read_fault(&vm, &gfn) < 0 && errno == EIO ? 0 : 1;
}

static int child_handle(void)
{
	struct kuf_progress_info p = { .size = sizeof(p) };
	struct kuf *kuf = parents;

	if (kuf_vcpu_fault(kuf, TEST_GPA, PAGE, UF_EXIT_FLAG_USERFAULT) != -ECHILD)
		return 1;
	if (kuf_ensure(kuf, TEST_GPA, PAGE, 0) != -ECHILD)
		return 2;
	if (kuf_discard(kuf, TEST_GPA, PAGE, KUF_DISCARD_REFILL) != -ECHILD)
		return 3;
	if (kuf_progress(kuf, TEST_GPA, &p) != -ECHILD)
		return 4;
	if (kuf_kvm_quiesce(kuf, 0) != -ECHILD)
		return 5;
	if (kuf_kvm_owned(kuf, TEST_GPA, PAGE) != -ECHILD)
		return 6;
	if (kuf_close(&kuf, KUF_END_POISON) != -ECHILD)
		return 7;
	return 0;
}

static int child_opens(void)
{
	struct kuf *kuf;
	int r = try_open(&vm, &source, 0, &kuf);

	dprintf(1, "# kuf_open in a child: %d, %s\n", r, kuf_error());
	return r == -EIO ? 0 : r == -ECHILD ? 1 : r == -EEXIST ? 2 : r == -ENOTSUP ? 3 : 4;
}

static void other_process(void)
{
	doing("other process", 60);
	vm_create(&vm, SIZE, 1);
	source_init(&source, TEST_GPA);
	CHECK_EQ("kuf_open in a child is EIO", in_a_child(child_opens), 0);
	parents = open_serviced(&vm, &source, 0);
	add_slot(parents, TEST_GPA, vm.mem, vm.size);
	CHECK("before", guest_reads(&vm, parents, 0, TEST_GPA, content64(TEST_GPA, 0)));
	CHECK_EQ("raw read in a child is EIO", in_a_child(child_raw), 0);
	CHECK_EQ("the handle in a child is ECHILD", in_a_child(child_handle), 0);
	CHECK_EQ("kuf_open in a child is EIO, also when it is enabled", in_a_child(child_opens), 0);
	uint8_t out[16];
	CHECK("a vCPU after all of that", guest_reads(&vm, parents, 0, TEST_GPA + PAGE,
						      content64(TEST_GPA + PAGE, 0)));
	CHECK("KVM after all of that", kvm_reads(&vm, parents, 0, TEST_GPA + 2 * PAGE, out) &&
	      has_content(out, TEST_GPA + 2 * PAGE, 16, 0));
	close_kuf(parents, KUF_END_POISON);
	vm_destroy(&vm);
}

int main(void)
{
	probing();
	automatic();
	enabled_already();
	open_refusals();
	memory_refusals();
	again_and_again();
	kernel_errors();
	other_process();
	return finish();
}
