/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Pages that are discarded and filled again; removed, and zero from then on; dropped by the VMM's balloon. The next
 * touch must read the new content, and a vCPU must make progress, whatever the bits are.
 */
#include "bitmap.h"

#define PAGES 64UL
#define SIZE (PAGES * PAGE)

static struct rig r;

/* The name of a check, with the name of the test as its prefix. */
static char what[120];
#define NAME(text) (snprintf(what, sizeof(what), "%s: %s", kind, text), what)

static uint64_t page(uint64_t n)
{
	return TEST_GPA + n * PAGE;
}

/* Of the first 32 pages, those with even numbers are present. */
static void start(const char *name, bool shared, enum owner owner, int *fd)
{
	bool good = true;

	doing(name, 60);
	*fd = 0;
	uint8_t *mem = shared ? shared_memory(SIZE, 0, fd) : anon(SIZE);
	rig_start(&r, mem, SIZE, 2, owner, 0, *fd);
	for (uint64_t n = 0; n < 32; n += 2)
		good = good && reads(&r, 0, page(n), 0, NULL);
	CHECK("begins", good && r.bitmap[0] == 0xffffffffaaaaaaaa);
}

static void end(int fd, enum owner owner)
{
	if (owner == HOST)
		rig_memslot(&r, 0);
	rig_end(&r, KUF_END_POISON);
	if (fd)
		close(fd);
}

static void discarding(const char *kind, bool shared, enum owner owner)
{
	struct vcpu v = { .rig = &r, .cpu = 1, .in = 0xa7 };
	unsigned int exits;
	int fd;

	start(kind, shared, owner, &fd);
	r.source.generation = 1;
	/* Present and absent ones. */
	CHECK_KUF(NAME("discard"), kuf_discard(r.kuf, page(0), 8 * PAGE, KUF_DISCARD_REFILL), 0);
	CHECK_EQ(NAME("discard: bits"), r.bitmap[0], 0xffffffffaaaaaaff);
	CHECK(NAME("discard: a vCPU exits, and sees new bytes"), reads(&r, 0, page(0), 1, &exits) && exits == 1);
	CHECK(NAME("discard: KVM sees new bytes"), kvm_reads(&r, 1, page(2), 16, 1));
	CHECK(NAME("discard: the VMM sees new bytes"), page_is(&r, page(4), 1));
	CHECK(NAME("discard: others kept theirs"), reads(&r, 0, page(8), 0, &exits) && exits == 0);
	CHECK(NAME("discard: what was absent"), reads(&r, 0, page(1), 1, &exits) && exits == 1);

	CHECK_KUF(NAME("give back"), kuf_discard(r.kuf, page(8), 16 * PAGE, KUF_DISCARD_ZERO), 0);
	unsigned int fills = r.source.fills;
	CHECK(NAME("given back: a vCPU reads zero"), reads_zero(&r, 0, page(8), &exits));
	CHECK(NAME("given back: by an exit that ends"), exits <= 1);
	CHECK(NAME("given back: bit clear"), !bit(&r, page(8)));
	CHECK(NAME("given back: a vCPU reads zero, absent before"), reads_zero(&r, 0, page(9), &exits) && exits <= 1);
	set_guest(&r.vm, 0, guest_outsb, page(10) + 8, 16, 0);
	v.cpu = 0;
	CHECK(NAME("given back: KVM reads zero"),
	      drive(&v) == KVM_EXIT_HLT && v.out_len == 16 && all_bytes(v.out, 16, 0));
	set_guest(&r.vm, 1, guest_outsb, page(11) + 8, 16, 0);
	v.cpu = 1;
	CHECK(NAME("given back: KVM reads zero, absent before"),
	      drive(&v) == KVM_EXIT_HLT && v.out_len == 16 && all_bytes(v.out, 16, 0));
	set_guest(&r.vm, 1, guest_insb, page(12) + 8, 16, 0);
	CHECK(NAME("given back: KVM writes"), drive(&v) == KVM_EXIT_HLT);
	CHECK(NAME("given back: into zeroes"), all_bytes(host(&r.vm, page(12)), 8, 0) &&
	      all_bytes(host(&r.vm, page(12) + 8), 16, 0xa7) &&
	      all_bytes(host(&r.vm, page(12) + 24), PAGE - 24, 0));
	set_guest(&r.vm, 0, guest_write, page(13), 0, 0x77);
	CHECK(NAME("given back: a vCPU writes"), run_to(&r, 0, 0x77, &exits) && exits <= 1);
	CHECK(NAME("given back: and keeps it"), *host(&r.vm, page(13)) == 0x77 &&
	      all_bytes(host(&r.vm, page(13) + 8), PAGE - 8, 0));
	CHECK(NAME("given back: the VMM reads zero"), all_bytes(host(&r.vm, page(14)), PAGE, 0) &&
	      all_bytes(host(&r.vm, page(15)), PAGE, 0));
	CHECK_KUF(NAME("given back: kuf_ensure"), kuf_ensure(r.kuf, page(16), 8 * PAGE, -1), 0);
	CHECK(NAME("given back: zero after kuf_ensure"), reads_zero(&r, 0, page(17), &exits) && exits <= 1);
	CHECK_EQ(NAME("given back: no fill was requested"), r.source.fills, fills);

	/* Removed after a discard, and discarded after a removal. */
	CHECK_KUF(NAME("given back, then discarded"), kuf_discard(r.kuf, page(8), 2 * PAGE, KUF_DISCARD_REFILL), 0);
	CHECK(NAME("filled anew"), reads(&r, 0, page(8), 1, &exits) && exits == 1);
	CHECK_KUF(NAME("discarded, then given back"), kuf_discard(r.kuf, page(8), 2 * PAGE, KUF_DISCARD_ZERO), 0);
	CHECK(NAME("zero"), reads_zero(&r, 0, page(8), &exits) && reads_zero(&r, 1, page(9), &exits));
	end(fd, owner);
}

/* The VMM drops pages as its balloon does, without a call of the library; the kernel's event reports it. */
static void balloon(const char *kind, bool shared, enum owner owner)
{
	unsigned int exits;
	int fd;

	start(kind, shared, owner, &fd);
	int how = shared ? MADV_REMOVE : MADV_DONTNEED;
	CHECK_EQ(NAME("balloon"), madvise(host(&r.vm, page(0)), 4 * PAGE, how), 0);
	AWAIT(progress(&r, TEST_GPA).removed == 4 * PAGE);
	unsigned int fills = r.source.fills;
	CHECK(NAME("balloon: a vCPU reads zero, present before"), reads_zero(&r, 0, page(0), &exits) && exits <= 1);
	/* The bit was set and stays set. */
	CHECK(NAME("balloon: a vCPU reads zero, absent before"), reads_zero(&r, 0, page(1), &exits) && exits <= 1);
	struct vcpu v = { .rig = &r, .cpu = 1 };
	set_guest(&r.vm, 1, guest_outsb, page(2), 16, 0);
	CHECK(NAME("balloon: KVM reads zero, present before"),
	      drive(&v) == KVM_EXIT_HLT && v.out_len == 16 && all_bytes(v.out, 16, 0));
	set_guest(&r.vm, 1, guest_outsb, page(3), 16, 0);
	CHECK(NAME("balloon: KVM reads zero, absent before"),
	      drive(&v) == KVM_EXIT_HLT && v.out_len == 16 && all_bytes(v.out, 16, 0));
	CHECK_EQ(NAME("balloon: no fill was requested"), r.source.fills, fills);
	/* KVM touched the page first, and the bit may be set or clear: a vCPU must make progress. */
	CHECK(NAME("balloon: a vCPU after KVM"), reads_zero(&r, 0, page(3), &exits) && exits <= 1);
	CHECK(NAME("balloon: others kept theirs"), reads(&r, 0, page(4), 0, &exits) && exits == 0);
	end(fd, owner);
}

/* Pages that a vCPU has mapped are dropped while it runs. */
static _Atomic bool stop;
static _Atomic unsigned int touches;
static _Atomic bool bad;

static void *toucher(void *arg)
{
	uint64_t n = 0;

	(void)arg;
	while (!stop) {
		/* The page's bytes, or zero right after the removal. */
		struct vcpu v = { .rig = &r, .cpu = 1 };
		set_guest(&r.vm, 1, guest_read, page(n % 32), 0, 1);
		uint64_t rax;
		if (drive(&v) != KVM_EXIT_HLT ||
		    ((rax = guest_rax(&r.vm, 1)) && rax != pattern64(page(n % 32)))) {
			dprintf(1, "# run %d, kuf_vcpu_fault %d\n", v.result, v.error);
			bad = true;
			break;
		}
		touches++;
		n++;
	}
	return NULL;
}

static void under_touches(enum owner owner)
{
	pthread_t t;
	int fd;

	start("dropped under touches", false, owner, &fd);
	stop = bad = false;
	touches = 0;
	pthread_create(&t, NULL, toucher, NULL);
	for (unsigned int i = 0; touches < 600 && !bad; i++) {
		if (i % 3 == 0)
			MUST(madvise(host(&r.vm, page(i % 29)), 3 * PAGE, MADV_DONTNEED));
		else if (i % 3 == 1)
			MUST_KUF(kuf_discard(r.kuf, page(i % 31), PAGE, KUF_DISCARD_ZERO));
		else
			MUST_KUF(kuf_discard(r.kuf, page(i % 28), 4 * PAGE, KUF_DISCARD_REFILL));
		sleep_ms(1);
	}
	stop = true;
	pthread_join(t, NULL);
	CHECK("dropped under touches: its bytes or zero, and it gets on", !bad);
	dprintf(1, "# dropped under touches: %u touches\n", (unsigned int)touches);
	end(fd, owner);
}

/* Locked memory is dropped as any other. */
static void locked(void)
{
	unsigned int exits;
	int fd;

	start("locked", false, LIBRARY, &fd);
	/* MLOCK_ONFAULT, because mlock would touch the pages. */
	if (mlock2(host(&r.vm, page(0)), 8 * PAGE, MLOCK_ONFAULT))
		DIE("mlock2: %s", strerror(errno));
	r.source.generation = 1;
	CHECK_KUF("locked: discard", kuf_discard(r.kuf, page(0), 8 * PAGE, KUF_DISCARD_REFILL), 0);
	CHECK("locked: filled anew", reads(&r, 0, page(0), 1, &exits) && exits == 1);
	CHECK_KUF("locked: give back", kuf_discard(r.kuf, page(0), 4 * PAGE, KUF_DISCARD_ZERO), 0);
	CHECK("locked: zero", reads_zero(&r, 0, page(0), &exits) && reads_zero(&r, 0, page(1), &exits));
	end(fd, LIBRARY);
}

/*
 * A discard that the kernel refuses, here because a sealed file cannot get holes, leaves the pages as they were: a
 * present page stays present, whatever its bit is, and vCPUs that touch it make progress.
 */
static void refused(enum owner owner)
{
	uint64_t *bitmap;
	unsigned int exits;
	bool good = true;
	int fd;

	doing("refused", 60);
	uint8_t *mem = shared_memory(SIZE, MFD_ALLOW_SEALING, &fd);
	rig_start(&r, mem, SIZE, 2, owner, 0, fd);
	for (uint64_t n = 0; n < 32; n += 2)
		good = good && reads(&r, 0, page(n), 0, NULL);
	CHECK("refused: begins", good);
	MUST(fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE));
	CHECK_KUF("refused: discard", kuf_discard(r.kuf, page(0), 8 * PAGE, KUF_DISCARD_REFILL), -EPERM);
	CHECK("refused: present pages are", page_is(&r, page(2), 0));
	/* KVM may drop its mappings at any time; then only the bit counts. */
	if (owner == HOST) {
		rig_memslot(&r, 0);
		rig_memslot(&r, UF_MEM_USERFAULT);
	} else {
		MUST(mprotect(host(&r.vm, page(0)), 8 * PAGE, PROT_READ));
		MUST(mprotect(host(&r.vm, page(0)), 8 * PAGE, PROT_READ | PROT_WRITE));
	}
	CHECK("refused: a vCPU gets on with what was present", reads(&r, 0, page(0), 0, &exits));
	CHECK("refused: at one exit at most", exits <= 1);
	CHECK("refused: what was absent exits", reads(&r, 0, page(1), 0, &exits) && exits == 1);
	CHECK("refused: KVM, too", kvm_reads(&r, 0, page(3), 8, 0));

	/* A bit set by other code does not stop a vCPU at a present page either. */
	bitmap = (uint64_t *)(uintptr_t)r.bitmap;
	__atomic_fetch_or(bitmap, 1UL << 4, __ATOMIC_SEQ_CST);
	MUST(mprotect(host(&r.vm, page(4)), PAGE, PROT_READ));
	MUST(mprotect(host(&r.vm, page(4)), PAGE, PROT_READ | PROT_WRITE));
	CHECK("set by another: a vCPU gets on", reads(&r, 0, page(4), 0, &exits));
	CHECK_EQ("set by another: at one exit", exits, 1);
	end(0, owner);
	close(fd);
}

int main(void)
{
	discarding("private", false, HOST);
	discarding("private, library's memslot", false, LIBRARY);
	discarding("shared", true, HOST);
	discarding("shared, library's memslot", true, LIBRARY);
	balloon("private", false, HOST);
	balloon("private, library's memslot", false, LIBRARY);
	balloon("shared", true, LIBRARY);
	under_touches(HOST);
	under_touches(LIBRARY);
	locked();
	refused(HOST);
	refused(LIBRARY);
	return finish();
}
