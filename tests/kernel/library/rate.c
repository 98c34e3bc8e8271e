/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Compares how fast each mechanism serves first touches: the same guest touches the same pages, each once, with its
 * own instruction (a vCPU exit, or a fault in KVM_RUN) or through KVM's emulator (one byte by rep outsb, which always
 * has an exit for the byte too). A fill is a copy from memory. The rounds interleave the mechanisms, so that noise of
 * the machine affects all of them; the first round does not count.
 *
 * It passes if each page was served in the intended way with the right bytes. It prints the times but does not judge
 * them. Arguments: pages, rounds.
 */
#include "bitmap.h"

#define MAX_ROUNDS 64

extern char rate_outsb[], rate_end[];

/* Puts out a byte of each page by the string instruction: rsi is the address, rbx the number of pages. */
__asm__(".pushsection .rodata\n"
	"rate_outsb:\n"
	"	cld\n"
	"1:	mov $1, %ecx\n"
	"	rep outsb\n"
	"	add $4095, %rsi\n"
	"	dec %rbx\n"
	"	jnz 1b\n"
	"	hlt\n"
	"rate_end:\n"
	".popsection\n");

#define OUTSB_GPA (CODE_GPA + 0x1000)

enum touch { VCPU, KVM };

static const struct way {
	const char *name;
	enum touch touch;
	uint32_t mechanism; /* 0: the memory is present, which leaves KVM's own work */
	unsigned int against; /* the one to compare with */
} ways[] = {
	{ "vCPU, memory present", VCPU, 0, 1 },
	{ "vCPU, userfaultfd", VCPU, KUF_MECHANISM_USERFAULTFD, 1 },
	{ "vCPU, bitmap: exit", VCPU, KUF_MECHANISM_KVM_BITMAP, 1 },
	{ "vCPU, asynchronous: exit", VCPU, KUF_MECHANISM_KVM_ASYNC, 1 },
	{ "KVM, memory present", KVM, 0, 5 },
	{ "KVM, userfaultfd", KVM, KUF_MECHANISM_USERFAULTFD, 5 },
	{ "KVM, bitmap: userfaultfd underneath", KVM, KUF_MECHANISM_KVM_BITMAP, 5 },
	{ "KVM, asynchronous: KVM_READ_USERFAULT", KVM, KUF_MECHANISM_KVM_ASYNC, 5 },
};

#define WAYS (sizeof(ways) / sizeof(ways[0]))

static uint64_t pages;
static uint8_t *image;
static double seconds[WAYS][MAX_ROUNDS];

static int fill_from_image(void *opaque, struct kuf_fill *run)
{
	(void)opaque;
	memcpy(run->buf, image + run->memory_offset, run->len);
	return KUF_FILL_DONE;
}

/* The vCPU's loop without the counters of the tests. */
static bool run(struct rig *r, const struct way *w)
{
	struct kvm_run *run = r->vm.run[0];
	uint64_t page = 0;

	for (;;) {
		int result = run_vcpu(&r->vm, 0);

		if (result == UF_EXIT_MEMORY_FAULT) {
			struct uf_exit_memory_fault f = memory_fault(&r->vm, 0);

			if (kuf_vcpu_fault(r->kuf, f.gpa, f.size, f.flags))
				return false;
		} else if (result == KVM_EXIT_IO) {
			if (page == pages || *((uint8_t *)run + run->io.data_offset) != image[page * PAGE])
				return false;
			page++;
		} else {
			return result == KVM_EXIT_HLT && (w->touch == VCPU || page == pages);
		}
	}
}

static void measure(unsigned int way, int round)
{
	const struct way *w = &ways[way];
	struct kvm_regs regs;
	struct rig r;
	double before;
	char what[100];

	doing(w->name, 60);
	rig_vm(&r, anon(pages * PAGE), pages * PAGE, 1);
	memcpy(r.vm.low + OUTSB_GPA, rate_outsb, (size_t)(rate_end - rate_outsb));
	if (w->mechanism) {
		struct kuf_options o = rig_options(&r);

		o.mechanism = w->mechanism;
		o.fill = fill_from_image;
		/* One page for each fault, as with a random order. */
		o.demand_run = PAGE;
		rig_open(&r, o);
		struct kuf_memory slot = rig_slot(&r, 0);
		MUST_KUF(kuf_add_memory(r.kuf, &slot));
	} else {
		memcpy(r.vm.mem, image, pages * PAGE);
	}
	if (w->mechanism == KUF_MECHANISM_KVM_BITMAP) {
		rig_bitmap(&r);
		rig_memslot(&r, UF_MEM_USERFAULT);
	} else {
		rig_memslot(&r, 0);
	}
	set_guest(&r.vm, 0, guest_touch, TEST_GPA, pages, 0);
	if (w->touch == KVM) {
		MUST(ioctl(r.vm.vcpu[0], KVM_GET_REGS, &regs));
		regs.rip = OUTSB_GPA;
		regs.rbx = pages;
		MUST(ioctl(r.vm.vcpu[0], KVM_SET_REGS, &regs));
	}

	before = now_s();
	bool good = run(&r, w);
	seconds[way][round] = now_s() - before;

	uint64_t sum = 0;
	for (uint64_t i = 0; i < pages; i++)
		sum += image[i * PAGE];
	good = good && (w->touch == KVM || guest_rax(&r.vm, 0) == sum);
	snprintf(what, sizeof(what), "%s: the guest's bytes (round %d)", w->name, round);
	CHECK(what, good);
	if (w->mechanism) {
		struct kuf_stats_info s = stats(&r);
		bool exits = w->touch == VCPU && w->mechanism != KUF_MECHANISM_USERFAULTFD;

		snprintf(what, sizeof(what), "%s: each page in the way it was to be (round %d)", w->name, round);
		report(s.vcpu_faults == (exits ? pages : 0) && s.faults == (exits ? 0 : pages) && s.fills == pages,
		       what, "%" PRIu64 " exits, %" PRIu64 " faults, %" PRIu64 " fills of %" PRIu64 " pages",
		       s.vcpu_faults, s.faults, s.fills, pages);
		if (w->mechanism == KUF_MECHANISM_KVM_BITMAP)
			rig_memslot(&r, 0);
		rig_close(&r, KUF_END_POPULATE);
	}
	snprintf(what, sizeof(what), "%s: every byte (round %d)", w->name, round);
	CHECK(what, !memcmp(r.vm.mem, image, pages * PAGE));
	rig_end(&r, 0);
}

static int order(const void *a, const void *b)
{
	double d = *(const double *)a - *(const double *)b;

	return (d > 0) - (d < 0);
}

struct spread {
	double low, middle, high;
};

static struct spread spread(double *v, int n)
{
	qsort(v, (size_t)n, sizeof(*v), order);
	return (struct spread){ v[0], n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2, v[n - 1] };
}

int main(int argc, char **argv)
{
	int rounds = argc > 2 ? atoi(argv[2]) : 7;

	pages = argc > 1 ? (uint64_t)atoi(argv[1]) : 1024;
	if (rounds < 1 || rounds >= MAX_ROUNDS || pages < 1)
		DIE("pages, rounds");
	image = anon(pages * PAGE);
	write_pages(image, TEST_GPA, pages * PAGE, 0);
	/* Round 0 warms up. Each round starts with another mechanism, so that none always follows the same one. */
	for (int round = 0; round <= rounds; round++)
		for (unsigned int i = 0; i < WAYS; i++)
			measure((i * 3 + (unsigned int)round) % WAYS, round);

	dprintf(1, "# %" PRIu64 " pages of 4 KiB, one fill each; median of %d rounds (lowest, highest)\n", pages,
		rounds);
	dprintf(1, "# %-38s %28s %32s\n", "", "pages per second", "times userfaultfd, round by round");
	for (unsigned int i = 0; i < WAYS; i++) {
		double rate[MAX_ROUNDS], ratio[MAX_ROUNDS];

		for (int round = 1; round <= rounds; round++) {
			rate[round - 1] = (double)pages / seconds[i][round];
			ratio[round - 1] = seconds[ways[i].against][round] / seconds[i][round];
		}
		struct spread a = spread(rate, rounds), b = spread(ratio, rounds);
		dprintf(1, "# %-38s %8.0f (%7.0f, %8.0f) %14.2f (%5.2f, %5.2f)\n", ways[i].name, a.middle, a.low,
			a.high, b.middle, b.low, b.high);
	}
	return finish();
}
