/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A device model with a ring in guest memory, as virtio has: the guest writes
 * descriptors; a thread of the VMM reads them and the buffers they point to.  Marks
 * stop only KVM at absent pages, so the thread must call kuf_ensure first.
 */
#include "async.h"

#define PAGES 1024UL
#define RING (TEST_GPA + 8 * PAGE)
#define USED (TEST_GPA + 16 * PAGE)
#define ENTRIES 64UL
#define TO_GUEST 1UL		/* the device writes; otherwise it reads */

/* Three words each: address, length, direction. */
#define ENTRY 24UL

static struct vm vm;
static struct source source;
static struct kuf *kuf;
static int kick, call;
static _Atomic int bad;

static uint8_t *ensured(uint64_t gpa, uint64_t len)
{
	int r = kuf_ensure(kuf, gpa, len, -1);

	if (r)
		DIE("kuf_ensure of %#" PRIx64 ": %d %s", gpa, r, kuf_error());
	return host(&vm, gpa);
}

static uint8_t device_byte(uint64_t gpa)
{
	return (uint8_t)~content(gpa, 200);
}

static void *device(void *arg)
{
	uint64_t n;

	(void)arg;
	for (uint64_t done = 0; done < ENTRIES;) {
		if (read(kick, &n, sizeof(n)) != sizeof(n))
			DIE("kick");
		for (; n; n--, done++) {
			uint64_t d[3], sum = 0, one = 1;
			uint8_t *p;

			memcpy(d, ensured(RING + done * ENTRY, ENTRY), ENTRY);
			p = ensured(d[0], d[1]);
			for (uint64_t i = 0; i < d[1]; i++) {
				if (d[2] == TO_GUEST)
					p[i] = device_byte(d[0] + i);
				else if (p[i] != content(d[0] + i, 0))
					bad++;
				sum += p[i];
			}
			memcpy(ensured(USED + done * 8, 8), &sum, 8);
			MUST(write(call, &one, sizeof(one)));
		}
	}
	return NULL;
}

static void guest_writes(uint64_t gpa, uint64_t value)
{
	struct worker w;

	set_guest(&vm, 0, guest_write, gpa, 0, value);
	if (run_here(&w, &vm, kuf, 0) != KVM_EXIT_HLT)
		DIE("the guest cannot write at %#" PRIx64, gpa);
}

int main(void)
{
	struct kuf_populate_request all = { .size = sizeof(all), .gpa = KUF_ALL, .rate = 1 << 20 };
	bool sums = true, seen = true, kvm_sees = true;
	pthread_t t;

	doing("device", 60);
	vm_create(&vm, PAGES * PAGE, 2);
	source_init(&source, TEST_GPA);
	kuf = open_serviced(&vm, &source, 0);
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	kick = (int)MUST(eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE));
	call = (int)MUST(eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE));

	/* Without kuf_ensure no fault stops a thread, and it reads other bytes. */
	CHECK("a thread without kuf_ensure reads zeroes",
	      is_zero(host(&vm, TEST_GPA + 1000 * PAGE), 64));
	CHECK_KUF("one that asks", kuf_ensure(kuf, TEST_GPA + 1000 * PAGE, 64, -1), 0);
	CHECK("reads the page", has_content(host(&vm, TEST_GPA + 1000 * PAGE),
					    TEST_GPA + 1000 * PAGE, 64, 0));

	pthread_create(&t, NULL, device, NULL);
	CHECK_KUF("populate behind all of it", kuf_populate(kuf, &all), 0);
	for (uint64_t i = 0; i < ENTRIES; i++) {
		/* Buffers that begin and end inside pages, some longer than a page. */
		uint64_t gpa = TEST_GPA + (32 + i * 15) * PAGE + i * 61 % PAGE;
		uint64_t len = 1 + i * 797 % (3 * PAGE), sum = 0, n = 1, used;
		bool to_guest = i % 3 == 0;
		uint8_t out[16];

		guest_writes(RING + i * ENTRY, gpa);
		guest_writes(RING + i * ENTRY + 8, len);
		guest_writes(RING + i * ENTRY + 16, to_guest ? TO_GUEST : 0);
		MUST(write(kick, &n, sizeof(n)));
		MUST(read(call, &n, sizeof(n)));
		for (uint64_t at = gpa; at < gpa + len; at++)
			sum += to_guest ? device_byte(at) : content(at, 0);
		/* The guest reads the result. */
		struct worker w;
		set_guest(&vm, 0, guest_read, USED + i * 8, 0, 0);
		if (run_here(&w, &vm, kuf, 0) != KVM_EXIT_HLT)
			DIE("the guest cannot read");
		used = guest_rax(&vm, 0);
		sums = sums && used == sum;
		if (!to_guest || len < 16)
			continue;
		uint64_t word = 0;
		for (int b = 7; b >= 0; b--)
			word = word << 8 | device_byte(gpa + (uint64_t)b);
		seen = guest_reads(&vm, kuf, 1, gpa, word) && seen;
		kvm_sees = kvm_reads(&vm, kuf, 0, gpa + len - 16, out) && kvm_sees;
		for (int b = 0; b < 16; b++)
			kvm_sees = kvm_sees && out[b] == device_byte(gpa + len - 16 + (uint64_t)b);
		/* The bytes around it are the source's. */
		if (gpa % PAGE)
			seen = seen && *host(&vm, gpa - 1) == content(gpa - 1, 0);
	}
	pthread_join(t, NULL);
	CHECK_EQ("the device reads what the source has", bad, 0);
	CHECK("the guest finds in the ring what the device has put there", sums);
	CHECK("a vCPU sees what the device has written", seen);
	CHECK("KVM does", kvm_sees);
	bool once = true;
	for (uint64_t i = 0; i < PAGES; i++)
		once = once && source.fills[i] <= 1;
	CHECK("no page was filled over what was written", once);

	CHECK_KUF("with timeout 0: a page whose fill has not begun is filled",
		  kuf_ensure(kuf, TEST_GPA + 1010 * PAGE, PAGE, 0), 0);
	CHECK_KUF("in no slot", kuf_ensure(kuf, TEST_GPA + vm.size, 1, -1), -ENOENT);
	CHECK_KUF("out of its slot", kuf_ensure(kuf, TEST_GPA + vm.size - 1, 2, -1), -ERANGE);
	close_kuf(kuf, KUF_END_POPULATE);
	vm_destroy(&vm);
	return finish();
}
