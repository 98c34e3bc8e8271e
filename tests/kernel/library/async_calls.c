/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The library's threads may make only two KVM ioctls: one that touches guest memory
 * or takes a vCPU's mutex could wait for a page that these threads have to fill.
 * This program defines ioctl(), which the library calls.
 */
#include "async.h"

#include <sys/prctl.h>

#define PAGES 256UL

static struct vm vm;
static struct source source;
static struct kuf *kuf;
static _Atomic unsigned int by_threads[256], by_others[256];
static _Atomic unsigned long strange;

int ioctl(int fd, unsigned long request, ...)
{
	char name[16] = "";
	va_list ap;
	void *argument;

	va_start(ap, request);
	argument = va_arg(ap, void *);
	va_end(ap);
	if ((request >> 8 & 0xff) == KVMIO) {
		prctl(PR_GET_NAME, name);
		if (strncmp(name, "kuf-", 4)) {
			by_others[request & 0xff]++;
		} else {
			by_threads[request & 0xff]++;
			if (request != UF_READ_USERFAULT && request != UF_SET_MEMORY_ATTRIBUTES)
				strange = request;
		}
	}
	return (int)syscall(SYS_ioctl, fd, request, argument);
}

int main(void)
{
	struct kuf_populate_request p = { .size = sizeof(p), .gpa = TEST_GPA, .len = PAGES * PAGE };
	uint8_t out[16];
	bool good = true;

	doing("calls", 60);
	vm_create(&vm, PAGES * PAGE, 2);
	source_init(&source, TEST_GPA);
	CHECK("this program's calls go through here", by_others[KVM_CREATE_VCPU & 0xff] == 2);
	kuf = open_options(&vm, (struct kuf_options){ .flags = KUF_KVM_OPEN_DRAIN, .fill = source_fill,
			   .event = source_event, .opaque = &source, .demand_run = PAGE });
	CHECK("the library's do", by_others[KVM_ENABLE_CAP & 0xff] > 0);
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	for (uint64_t gpa = TEST_GPA; gpa < TEST_GPA + 64 * PAGE; gpa += 2 * PAGE) {
		good = kvm_reads(&vm, kuf, 0, gpa, out) && has_content(out, gpa, 16, 0) && good;
		good = guest_reads(&vm, kuf, 1, gpa + PAGE, content64(gpa + PAGE, 0)) && good;
	}
	source.bad = TEST_GPA + 80 * PAGE;
	source.bad_answer = -EIO;
	struct worker w;
	set_guest(&vm, 0, guest_outsb, source.bad, 16, 0);
	worker_start(&w, &vm, kuf, 0);
	CHECK("one is parked", wait_for_event(&source, KUF_KVM_EVENT_PARKED, 1));
	source.bad = NO_GPA;
	CHECK_KUF("discard", kuf_discard(kuf, TEST_GPA + 80 * PAGE, PAGE, KUF_DISCARD_REFILL), 0);
	CHECK_EQ("and goes on", worker_join(&w), KVM_EXIT_HLT);
	CHECK_KUF("removed", kuf_discard(kuf, TEST_GPA + 90 * PAGE, PAGE, KUF_DISCARD_ZERO), 0);
	good = kvm_reads(&vm, kuf, 0, TEST_GPA + 90 * PAGE, out) && is_zero(out, 16) && good;
	CHECK_KUF("populate", kuf_populate(kuf, &p), 0);
	CHECK("populated", wait_for_event(&source, KUF_EVENT_POPULATED, 1));
	CHECK("right bytes", good);
	sleep_ms(1100);
	close_kuf(kuf, 0);
	CHECK("its threads have read faults", by_threads[UF_READ_USERFAULT & 0xff] >= 32);
	CHECK("its threads have taken marks off", by_threads[UF_SET_MEMORY_ATTRIBUTES & 0xff] >= 32);
	CHECK_EQ("and made no other call", strange, 0);
	vm_destroy(&vm);
	return finish();
}
