/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The end of a handle, of a slot and of the process while KVM and vCPUs wait: no
 * thread hangs, and no thread reads a byte that is not the page's.
 */
#include "async.h"

#define PAGES 64
#define SEEN 0x5555555555555555

static struct vm vm;
static struct source source;
static struct kuf *kuf;

static void fresh(int vcpus, uint32_t flags)
{
	vm_create(&vm, PAGES * PAGE, vcpus);
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm, &source, flags);
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
}

/* Whether the output is empty or from the page at @gpa. */
static bool only_content(struct worker *w, uint64_t gpa)
{
	return has_content(w->out, gpa, w->out_len, source.generation);
}

/* Whether KVM_RUN returned as it does when KVM cannot access guest memory. */
static bool let_go(struct worker *w)
{
	return w->result == KVM_EXIT_MMIO || w->result == KVM_EXIT_INTERNAL_ERROR ||
	       w->result == -EFAULT;
}

static _Atomic int buses;

static void on_bus(int sig)
{
	(void)sig;
	buses++;
}

static void *closer(void *arg)
{
	struct kuf *mine = kuf;
	uint32_t *flags = arg;

	if (kuf_close(&mine, *flags))
		DIE("kuf_close: %s", kuf_error());
	return NULL;
}

/* A KVM access and a vCPU wait for pages whose fill callback has not returned. */
static void with(const char *name, uint32_t flags, bool nowait)
{
	struct worker w[3];
	char what[96];
	pthread_t t;

	doing(name, 60);
	fresh(3, 0);
	source.hold = true;
	for (int i = 0; i < 3; i++) {
		/* the third one's fill has not begun */
		set_guest(&vm, i, i == 1 ? guest_read : guest_outsb, TEST_GPA + (i * 7) * PAGE, 16, SEEN);
		worker_start(&w[i], &vm, kuf, i);
	}
	snprintf(what, sizeof(what), "%s: KVM waits", name);
	CHECK(what, sleeps_in_kvm(&w[0]) && sleeps_in_kvm(&w[2]));
	snprintf(what, sizeof(what), "%s: a vCPU waits", name);
	CHECK(what, COMES_TRUE(w[1].exits == 1));
	pthread_create(&t, NULL, closer, &flags);
	if (flags & KUF_END_POPULATE) {
		sleep_ms(50);
		source.hold = false;
	} else {
		/* Before the callbacks return, the pages are poisoned. */
		sleep_ms(100);
		snprintf(what, sizeof(what), "%s: no byte was read yet", name);
		CHECK(what, !w[0].out_len && !w[2].out_len &&
		      (!w[1].done || w[1].result != KVM_EXIT_HLT));
		source.hold = false;
	}
	pthread_join(t, NULL);
	if (nowait) {
		snprintf(what, sizeof(what), "%s: released in the end", name);
		CHECK(what, COMES_TRUE(source.released == 1));
	}
	if (flags & KUF_END_POPULATE) {
		snprintf(what, sizeof(what), "%s: KVM goes on", name);
		CHECK(what, worker_join(&w[0]) == KVM_EXIT_HLT && worker_join(&w[2]) == KVM_EXIT_HLT);
		snprintf(what, sizeof(what), "%s: the vCPU goes on", name);
		CHECK(what, worker_join(&w[1]) == KVM_EXIT_HLT &&
		      guest_rax(&vm, 1) == content64(TEST_GPA + 7 * PAGE, 0));
		snprintf(what, sizeof(what), "%s: with the right bytes", name);
		CHECK(what, w[0].out_len == 16 && only_content(&w[0], TEST_GPA) &&
		      w[2].out_len == 16 && only_content(&w[2], TEST_GPA + 14 * PAGE));
		snprintf(what, sizeof(what), "%s: all is there", name);
		CHECK(what, has_content(vm.mem, TEST_GPA, vm.size, 0));
	} else if (!nowait) {
		snprintf(what, sizeof(what), "%s: KVM is let go", name);
		CHECK(what, COMES_TRUE(w[0].done && w[2].done));
		snprintf(what, sizeof(what), "%s: the vCPU is told", name);
		CHECK_EQ(what, worker_join(&w[1]), -ECANCELED);
		worker_join(&w[0]);
		worker_join(&w[2]);
		dprintf(1, "# %s: KVM's access ended with %d, %d\n", name, w[0].result, w[2].result);
		snprintf(what, sizeof(what), "%s: by an exit that is no end", name);
		CHECK(what, let_go(&w[0]) && let_go(&w[2]));
		snprintf(what, sizeof(what), "%s: no byte was seen", name);
		CHECK(what, !w[0].out_len && !w[2].out_len && guest_rax(&vm, 1) == SEEN);

		/* A touch is a memory error now, on the vCPU's thread too. */
		struct sigaction sa = { .sa_handler = on_bus }, before;
		sigaction(SIGBUS, &sa, &before);
		buses = 0;
		set_guest(&vm, 1, guest_read, TEST_GPA + 20 * PAGE, 0, SEEN);
		int r = ioctl(vm.vcpu[1], KVM_RUN, 0);
		snprintf(what, sizeof(what), "%s: nor afterwards", name);
		CHECK(what, r < 0 && (errno == EINTR ? buses == 1 : errno == EFAULT) &&
		      guest_rax(&vm, 1) == SEEN);
		sigaction(SIGBUS, &before, NULL);
		snprintf(what, sizeof(what), "%s: nor by the VMM", name);
		CHECK_EQ(what, touch(host(&vm, TEST_GPA)), SIGBUS);
		snprintf(what, sizeof(what), "%s: userfaults are disabled", name);
		CHECK_EQ(what, ioctl(vm.fd, KVM_CHECK_EXTENSION, UF_CAP_MEMORY_ATTRIBUTES), 0);
	}
	snprintf(what, sizeof(what), "%s: released once", name);
	CHECK_EQ(what, source.released, 1);
	if (!nowait)
		vm_destroy(&vm);
}

static void all_present(void)
{
	uint8_t out[16];

	doing("all present", 30);
	fresh(1, 0);
	CHECK_KUF("present: kuf_ensure", kuf_ensure(kuf, TEST_GPA, vm.size, -1), 0);
	CHECK("present: told", wait_for_event(&source, KUF_EVENT_COMPLETE, 1));
	/* A removed page needs no fill, and is zero without the library too. */
	CHECK_KUF("present: removed", kuf_discard(kuf, TEST_GPA + PAGE, PAGE, KUF_DISCARD_ZERO), 0);
	close_kuf(kuf, 0);
	set_guest(&vm, 0, guest_read, TEST_GPA, 0, 0);
	CHECK("present: read", halts(&vm, 0) && guest_rax(&vm, 0) == content64(TEST_GPA, 0));
	set_guest(&vm, 0, guest_read, TEST_GPA + PAGE, 0, SEEN);
	CHECK("present: removed is zero", halts(&vm, 0) && guest_rax(&vm, 0) == 0);
	CHECK("present: KVM", kvm_reads(&vm, NULL, 0, TEST_GPA + 2 * PAGE, out) &&
	      has_content(out, TEST_GPA + 2 * PAGE, 16, 0));
	vm_destroy(&vm);
}

/* One slot is removed, another stays. */
static void one_slot(void)
{
	struct worker w[2];
	struct kuf_memory m = { .size = sizeof(m) };

	doing("one slot", 60);
	vm_create(&vm, PAGES * PAGE, 2);
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm, &source, 0);
	add_slot(kuf, TEST_GPA, vm.mem, 32 * PAGE);
	add_slot(kuf, TEST_GPA + 32 * PAGE, vm.mem + 32 * PAGE, 32 * PAGE);
	source.answer = -EIO;
	set_guest(&vm, 0, guest_outsb, TEST_GPA + PAGE, 16, 0);
	worker_start(&w[0], &vm, kuf, 0);
	CHECK("slot: parked", wait_for_event(&source, KUF_KVM_EVENT_PARKED, 1));
	source.answer = 0;
	source.hold_gpa = TEST_GPA + 40 * PAGE;
	set_guest(&vm, 1, guest_outsb, TEST_GPA + 40 * PAGE, 16, 0);
	worker_start(&w[1], &vm, kuf, 1);
	CHECK("slot: another waits in the other one", sleeps_in_kvm(&w[1]));
	CHECK_KUF("slot: not without a flag", kuf_remove_memory(kuf, TEST_GPA, 0), -EBUSY);
	CHECK_KUF("slot: removed", kuf_remove_memory(kuf, TEST_GPA, KUF_END_POISON), 0);
	CHECK("slot: the parked access is released", COMES_TRUE(w[0].done));
	worker_join(&w[0]);
	CHECK("slot: with nothing", let_go(&w[0]) && !w[0].out_len);
	CHECK("slot: the other one waits on", sleeps_in_kvm(&w[1]));
	CHECK_KUF("slot: nothing is parked any more", kuf_kvm_quiesce(kuf, 0), -ETIMEDOUT);
	source.hold_gpa = NO_GPA;
	CHECK_EQ("slot: and goes on", worker_join(&w[1]), KVM_EXIT_HLT);
	CHECK("slot: with its bytes", only_content(&w[1], TEST_GPA + 40 * PAGE));

	/* New memory in its place. */
	m.gpa = TEST_GPA;
	m.len = 32 * PAGE;
	m.hva = (uintptr_t)vm.mem;
	if (mmap(vm.mem, 32 * PAGE, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
		DIE("mmap: %s", strerror(errno));
	CHECK_KUF("slot: added again", kuf_add_memory(kuf, &m), 0);
	CHECK("slot: served", guest_reads(&vm, kuf, 1, TEST_GPA + PAGE, content64(TEST_GPA + PAGE, 0)));
	close_kuf(kuf, KUF_END_POPULATE);
	vm_destroy(&vm);
}

/* ---- the process ends while KVM waits ---- */

static bool child(const char *name, void (*body)(void), int want_signal, int want_exit)
{
	int s = 0;
	pid_t pid;

	doing(name, 60);
	pid = fork();
	if (!pid) {
		struct worker w[2];

		alarm(60);
		memset(&vm, 0, sizeof(vm));
		fresh(2, 0);
		source.hold = true;
		for (int i = 0; i < 2; i++) {
			set_guest(&vm, i, i ? guest_read : guest_outsb, TEST_GPA + i * PAGE, 16, 0);
			worker_start(&w[i], &vm, kuf, i);
		}
		if (!sleeps_in_kvm(&w[0]))
			_exit(99);
		body();
		for (;;)
			pause();
	}
	for (int i = 0; i < 6000; i++) {
		if (waitpid(pid, &s, WNOHANG) == pid)
			return want_signal ? WIFSIGNALED(s) && WTERMSIG(s) == want_signal :
			       WIFEXITED(s) && WEXITSTATUS(s) == want_exit;
		sleep_ms(5);
	}
	return false;
}

static void by_sigkill(void)
{
	kill(getpid(), SIGKILL);
}

static void by_segfault(void)
{
	raise(SIGSEGV);
}

static void by_exit_group(void)
{
	_exit(42);
}

/* Destructors and atexit run, with service threads alive. */
static void by_exit(void)
{
	exit(43);
}

/* No state remains for the next VM. */
static void deaths(void)
{
	CHECK("SIGKILL ends it", child("SIGKILL", by_sigkill, SIGKILL, 0));
	CHECK("a fatal signal ends it", child("SIGSEGV", by_segfault, SIGSEGV, 0));
	CHECK("exit_group ends it", child("exit_group", by_exit_group, 0, 42));
	CHECK("exit ends it", child("exit", by_exit, 0, 43));
	doing("afterwards", 30);
	fresh(1, 0);
	CHECK("a new VM is served", guest_reads(&vm, kuf, 0, TEST_GPA, content64(TEST_GPA, 0)));
	close_kuf(kuf, KUF_END_POISON);
	vm_destroy(&vm);
}

/* KUF_END_NOWAIT leaves the pages of running callbacks inaccessible: in a child, which has to be killed. */
static void nowait(void)
{
	int s = 0;
	pid_t pid;

	doing("nowait", 60);
	pid = fork();
	if (!pid) {
		alarm(60);
		memset(&vm, 0, sizeof(vm));
		nr_failed = 0;
		with("close NOWAIT", KUF_END_POISON | KUF_END_NOWAIT, true);
		_exit(nr_failed ? 1 : 0);
	}
	MUST(waitpid(pid, &s, 0));
	CHECK("NOWAIT ends, and the process can", WIFEXITED(s) && !WEXITSTATUS(s));
}

int main(void)
{
	all_present();
	with("close POISON", KUF_END_POISON, false);
	with("close POPULATE", KUF_END_POPULATE, false);
	with("close POPULATE POISON", KUF_END_POPULATE | KUF_END_POISON, false);
	one_slot();
	nowait();
	deaths();
	return finish();
}
