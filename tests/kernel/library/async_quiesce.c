/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* kuf_kvm_quiesce waits until memslots can change, and after it they can. */
#include "async.h"

#define PAGES 256

static struct vm vm;
static struct source source;
static struct kuf *kuf;
static _Atomic int from_callback, from_event;

static int asking_fill(void *opaque, struct kuf_fill *f)
{
	from_callback = kuf_kvm_quiesce(kuf, 0);
	return source_fill(opaque, f);
}

static void asking_event(void *opaque, const struct kuf_event *e)
{
	from_event = kuf_kvm_quiesce(kuf, 0);
	source_event(opaque, e);
}

static void *quiesce_forever(void *arg)
{
	*(_Atomic int *)arg = kuf_kvm_quiesce(kuf, -1);
	return NULL;
}

int main(void)
{
	struct worker w;
	uint8_t out[16];
	uint64_t gpa = TEST_GPA + 20 * PAGE, far = TEST_GPA + 16 * HUGE;
	_Atomic int late = 1;
	pthread_t t;

	doing("create", 20);
	vm_create(&vm, PAGES * PAGE, 2);
	source_init(&source, TEST_GPA);
	kuf = open_options(&vm, (struct kuf_options){ .fill = asking_fill, .event = asking_event,
			   .opaque = &source });
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	CHECK_KUF("quiet when nothing has happened", kuf_kvm_quiesce(kuf, 0), 0);
	CHECK_KUF("for ever, when nothing has happened", kuf_kvm_quiesce(kuf, -1), 0);
	CHECK_KUF("a time that is none", kuf_kvm_quiesce(kuf, -2), -EINVAL);
	CHECK("before", kvm_reads(&vm, kuf, 0, TEST_GPA, out) && has_content(out, TEST_GPA, 16, 0));
	CHECK_EQ("in a fill callback", from_callback, -EDEADLK);
	CHECK_KUF("quiet after a fault", kuf_kvm_quiesce(kuf, 10000), 0);

	doing("KVM waits", 60);
	source.hold_gpa = gpa;
	set_guest(&vm, 0, guest_outsb, gpa, 16, 0);
	worker_start(&w, &vm, kuf, 0);
	CHECK("KVM waits", sleeps_in_kvm(&w));
	CHECK_KUF("not quiet", kuf_kvm_quiesce(kuf, 0), -ETIMEDOUT);
	double started = now_s();
	CHECK_KUF("not quiet after a while", kuf_kvm_quiesce(kuf, 300), -ETIMEDOUT);
	CHECK("that was waited for", now_s() - started >= 0.29);
	pthread_create(&t, NULL, quiesce_forever, (void *)&late);
	sleep_ms(100);
	CHECK_EQ("kuf_kvm_quiesce waits", late, 1);
	/* Other pages are served meanwhile. */
	CHECK("others are served", guest_reads(&vm, kuf, 1, gpa + 8 * PAGE, content64(gpa + 8 * PAGE, 0)));
	source.hold_gpa = NO_GPA;
	pthread_join(t, NULL);
	CHECK_EQ("until it is", late, 0);
	CHECK_EQ("KVM goes on", worker_join(&w), KVM_EXIT_HLT);
	CHECK("with its bytes", has_content(w.out, gpa, 16, 0));

	/* Now memslots and I/O can change, and slots can be added and removed. */
	doing("memslots", 60);
	for (int round = 0; round < 5; round++) {
		uint8_t *more = anon(32 * PAGE);
		struct kvm_ioeventfd io = { .addr = 0x20, .len = 1, .fd = (int)MUST(eventfd(0, 0)),
					    .flags = KVM_IOEVENTFD_FLAG_PIO };

		CHECK_KUF("quiet", kuf_kvm_quiesce(kuf, 10000), 0);
		CHECK_ERRNO("a memslot is added",
			    set_slot(&vm, 2, 0, far, 32 * PAGE, more, NULL), 0);
		CHECK_ERRNO("an ioeventfd", ioctl(vm.fd, KVM_IOEVENTFD, &io), 0);
		add_slot(kuf, far, more, 32 * PAGE);
		CHECK("KVM at the new one", kvm_reads(&vm, kuf, 0, far + PAGE + 16, out) &&
		      has_content(out, far + PAGE + 16, 16, 0));
		CHECK("a vCPU at the new one",
		      guest_reads(&vm, kuf, 1, far + 9 * PAGE, content64(far + 9 * PAGE, 0)));
		CHECK("the old one", kvm_reads(&vm, kuf, 0, gpa + (40 + round * 8) * PAGE, out) &&
		      has_content(out, gpa + (40 + round * 8) * PAGE, 16, 0));
		CHECK_KUF("quiet again", kuf_kvm_quiesce(kuf, 10000), 0);
		CHECK_ERRNO("dirty logging on",
			    set_slot(&vm, 2, UF_MEM_LOG_DIRTY, far, 32 * PAGE, more, NULL), 0);
		CHECK("marks are left by that",
		      guest_reads(&vm, kuf, 1, far + 20 * PAGE, content64(far + 20 * PAGE, 0)) &&
		      fills_of(&source, far + 20 * PAGE) == (unsigned int)round + 1);
		CHECK_KUF("and goes", kuf_remove_memory(kuf, far, KUF_END_POPULATE), 0);
		set_guest(&vm, 0, guest_read, far + 30 * PAGE, 0, 0);
		CHECK("all there", halts(&vm, 0) && guest_rax(&vm, 0) == content64(far + 30 * PAGE, 0));
		CHECK_ERRNO("the memslot goes", set_slot(&vm, 2, 0, 0, 0, NULL, NULL), 0);
		io.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
		CHECK_ERRNO("the ioeventfd goes", ioctl(vm.fd, KVM_IOEVENTFD, &io), 0);
		close(io.fd);
		munmap(more, 32 * PAGE);
	}

	doing("close", 60);
	CHECK_KUF("all is filled", kuf_ensure(kuf, TEST_GPA, vm.size, -1), 0);
	CHECK("told so", wait_for_event(&source, KUF_EVENT_COMPLETE, 1));
	CHECK_EQ("in an event callback", from_event, -EDEADLK);
	close_kuf(kuf, 0);
	vm_destroy(&vm);
	return finish();
}
