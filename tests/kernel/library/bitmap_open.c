/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Opening, slots and the bitmap's address: accepted and refused arguments. A refusal must change nothing. */
#include "bitmap.h"

#define PAGES 40UL
#define SIZE (PAGES * PAGE)

static struct rig r;

static int try_open(uint32_t mechanism, uint32_t flags, int vm_fd, kuf_fill_fn callback)
{
	struct kuf_options o = {
		.size = sizeof(o), .mechanism = mechanism, .flags = flags, .vm_fd = vm_fd, .fill = callback,
		.opaque = &r.source,
	};
	struct kuf *kuf = NULL;
	int result = kuf_open(&o, &kuf);

	if (!result)
		MUST_KUF(kuf_close(&kuf, KUF_END_POISON));
	return result;
}

static void opening(void)
{
	struct kuf_probe_info p = { .size = sizeof(p) };
	uint32_t b = KUF_MECHANISM_KVM_BITMAP;

	CHECK_KUF("probe", kuf_probe(r.vm.fd, &p), 0);
	CHECK("probe: it works here", p.mechanisms & 1 << b && p.error[b] == 0 && p.why[b][0]);
	CHECK("probe: it is not what AUTO chooses", p.recommended != b);
	dprintf(1, "# %s\n", p.why[b]);

	CHECK_KUF("by name", try_open(b, 0, r.vm.fd, source_fill), 0);
	CHECK_KUF("caller-driven", try_open(b, KUF_OPEN_CALLER_DRIVEN, r.vm.fd, NULL), 0);
	CHECK_KUF("direct", try_open(b, KUF_OPEN_DIRECT, r.vm.fd, NULL), 0);
	CHECK_KUF("direct with a callback", try_open(b, KUF_OPEN_DIRECT, r.vm.fd, source_fill),
		  -EINVAL);
	CHECK_KUF("without a VM", try_open(b, 0, 0, source_fill), -EINVAL);
	CHECK_KUF("with no mode", try_open(b, 0, r.vm.fd, NULL), -EINVAL);
	CHECK_KUF("with /dev/kvm", try_open(b, 0, r.vm.kvm, source_fill), -EINVAL);
	CHECK_KUF("with a vCPU", try_open(b, 0, r.vm.vcpu[0], source_fill), -EINVAL);
	CHECK_KUF("with no descriptor", try_open(b, 0, 999, source_fill), -EBADF);
	CHECK_KUF("following forks", try_open(b, KUF_OPEN_FOLLOW_FORK, r.vm.fd, source_fill), -EINVAL);
	CHECK_KUF("adopting only", try_open(b, KUF_OPEN_ADOPT_ONLY, r.vm.fd, source_fill), -EINVAL);
	CHECK_KUF("user mode only", try_open(b, KUF_OPEN_USER_MODE_ONLY, r.vm.fd, source_fill),
		  -EINVAL);
	CHECK_KUF("draining", try_open(b, KUF_KVM_OPEN_DRAIN, r.vm.fd, source_fill), -EINVAL);
}

/* Checks that the slot was refused: the library does not know it, and its memory is as before. */
static void refused(const char *name, struct kuf_memory slot, int want)
{
	struct kuf_progress_info p = { .size = sizeof(p) };
	uint64_t address;
	char what[120];

	CHECK_KUF(name, kuf_add_memory(r.kuf, &slot), want);
	snprintf(what, sizeof(what), "%s: nothing is left of it", name);
	CHECK(what, kuf_kvm_bitmap(r.kuf, slot.gpa, &address) == -ENOENT &&
	      kuf_progress(r.kuf, slot.gpa, &p) == -ENOENT && r.vm.mem[SIZE - 1] == 0);
	MUST(madvise(r.vm.mem, SIZE, MADV_DONTNEED));
}

static void slots(void)
{
	struct kuf_memory slot;
	uint64_t address = 0;

	rig_open(&r, rig_options(&r));
	slot = rig_slot(&r, 0);
	slot.kvm = &(struct kuf_kvm_memory){ .size = sizeof(struct kuf_kvm_memory), .memslot = TEST_SLOT };
	refused("memslot without its flag", slot, -EINVAL);
	slot.kvm = &(struct kuf_kvm_memory){ .size = sizeof(struct kuf_kvm_memory), .memslot_flags = UF_MEM_LOG_DIRTY };
	refused("memslot flags without the flag", slot, -EINVAL);
	slot.kvm = memslot_of(TEST_SLOT, UF_MEM_USERFAULT);
	refused("the flag that is the library's", slot, -EINVAL);
	slot.kvm = memslot_of(TEST_SLOT, UF_MEM_GUEST_MEMFD);
	refused("a memslot with guest_memfd", slot, -EINVAL);
	slot.kvm = &(struct kuf_kvm_memory){ .size = sizeof(struct kuf_kvm_memory), .attributes = UF_ATTR_PRIVATE };
	refused("attributes", slot, -EINVAL);
	slot.kvm = &(struct kuf_kvm_memory){ .size = 8 };
	refused("a struct that is too short", slot, -EINVAL);
	/* Errors that only KVM can detect. */
	slot.kvm = memslot_of(0x7fff, 0);
	refused("a memslot number that KVM has not", slot, -EINVAL);
	slot.kvm = memslot_of(7 << 16 | TEST_SLOT, 0);
	refused("an address space that KVM has not", slot, -EINVAL);
	MUST(set_slot(&r.vm, 9, 0, TEST_GPA + SIZE - PAGE, PAGE, anon(PAGE), NULL));
	slot = rig_slot(&r, BY_LIBRARY);
	refused("another memslot in the way", slot, -EEXIST);
	MUST(set_slot(&r.vm, 9, 0, 0, 0, NULL, NULL));
	MUST(set_slot(&r.vm, TEST_SLOT, 0, TEST_GPA, SIZE, anon(SIZE), NULL));
	refused("a memslot with other memory", slot, -EINVAL);
	MUST(set_slot(&r.vm, TEST_SLOT, 0, 0, 0, NULL, NULL));

	CHECK_KUF("bitmap of no slot", kuf_kvm_bitmap(r.kuf, TEST_GPA, &address), -ENOENT);
	rig_add(&r, rig_slot(&r, BY_LIBRARY));
	CHECK_KUF("bitmap: nowhere to put it", kuf_kvm_bitmap(r.kuf, TEST_GPA, NULL), -EINVAL);
	CHECK_KUF("bitmap: no handle", kuf_kvm_bitmap(NULL, TEST_GPA, &address), -EINVAL);
	CHECK_KUF("bitmap: not where a slot starts", kuf_kvm_bitmap(r.kuf, TEST_GPA + PAGE, &address), -ENOENT);
	CHECK_KUF("bitmap", kuf_kvm_bitmap(r.kuf, TEST_GPA, &address), 0);
	CHECK("bitmap: aligned", address && address % 8 == 0);
	CHECK("bitmap: as many bits as pages", r.bitmap[0] == (1UL << PAGES) - 1);

	/* Another slot has another bitmap. */
	slot = rig_slot(&r, 0);
	slot.gpa += 64 * HUGE;
	slot.hva = (uintptr_t)anon(SIZE);
	CHECK_KUF("second slot", kuf_add_memory(r.kuf, &slot), 0);
	uint64_t second = 0;
	CHECK_KUF("second bitmap", kuf_kvm_bitmap(r.kuf, slot.gpa, &second), 0);
	CHECK("second bitmap is another one",
	      second && (second + 8 <= address || second >= address + 8));
	CHECK_KUF("first slot ends", kuf_remove_memory(r.kuf, TEST_GPA, KUF_END_POISON), 0);
	CHECK_KUF("and its bitmap", kuf_kvm_bitmap(r.kuf, TEST_GPA, &address), -ENOENT);
	CHECK_KUF("second bitmap stays", kuf_kvm_bitmap(r.kuf, slot.gpa, &second), 0);
	struct kuf *gone = r.kuf;
	rig_close(&r, KUF_END_POISON);
	CHECK_KUF("closed", kuf_kvm_bitmap(gone, slot.gpa, &address), -EBADF);
}

/* A handle with another mechanism has no bitmap and sets no memslot. */
static void others(uint32_t mechanism, const char *name)
{
	struct kuf_options o = rig_options(&r);
	struct kuf_memory slot;
	uint64_t address;
	uint8_t *old = r.vm.mem;
	char what[80];

	r.vm.mem = anon(SIZE); /* the poisoned memory is not usable any more */
	munmap(old, SIZE);
	o.mechanism = mechanism;
	rig_open(&r, o);
	slot = rig_slot(&r, BY_LIBRARY);
	snprintf(what, sizeof(what), "%s: memslot", name);
	CHECK_KUF(what, kuf_add_memory(r.kuf, &slot), -EINVAL);
	slot = rig_slot(&r, 0);
	snprintf(what, sizeof(what), "%s: slot", name);
	CHECK_KUF(what, kuf_add_memory(r.kuf, &slot), 0);
	snprintf(what, sizeof(what), "%s: no bitmap", name);
	CHECK_KUF(what, kuf_kvm_bitmap(r.kuf, TEST_GPA, &address), -ENOTSUP);
	rig_close(&r, KUF_END_POISON);
}

int main(void)
{
	doing("open", 60);
	rig_vm(&r, anon(SIZE), SIZE, 1);
	opening();
	slots();
	others(KUF_MECHANISM_AUTO, "auto");
	others(KUF_MECHANISM_USERFAULTFD, "userfaultfd");
	others(KUF_MECHANISM_KVM_ASYNC, "asynchronous");

	/* Without a library thread the caller must set the memslots itself, because the change can wait for its loop. */
	struct kuf_options o = rig_options(&r);
	o.flags |= KUF_OPEN_DIRECT;
	o.fill = NULL;
	rig_open(&r, o);
	r.vm.mem = anon(SIZE);
	refused("direct: memslot", rig_slot(&r, BY_LIBRARY), -EINVAL);
	rig_add(&r, rig_slot(&r, 0));
	CHECK("direct: bitmap", r.bitmap[0] == (1UL << PAGES) - 1);
	rig_end(&r, KUF_END_POISON);
	return finish();
}
