/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* The entries of the queue, their order, and KVM_READ_USERFAULT. */
#include "test.h"

#define N 8

static struct vm vm;

/* Starts vCPU threads that each wait for their page. */
static void start(struct runner *r, uint8_t (*out)[16], int n, const uint64_t *gpas)
{
	for (int i = 0; i < n; i++) {
		memset(&r[i], 0, sizeof(r[i]));
		r[i].io = out[i];
		r[i].io_max = sizeof(out[i]);
		set_guest(&vm, i, guest_outsb, gpas[i], 16, 0);
		runner_start(&r[i], &vm, i);
		/* Wait for each, so that the order is known. */
		if (!wait_event(&vm, 20000))
			DIE("no event for vCPU %d", i);
		if (read_event(&vm) != 1)
			DIE("not one event for vCPU %d", i);
	}
}

static bool join(struct runner *r, uint8_t (*out)[16], int n, const uint64_t *gpas)
{
	bool good = true;

	for (int i = 0; i < n; i++)
		good = runner_join(&r[i]) == KVM_EXIT_HLT && r[i].io_len == 16 &&
		       is_pattern(out[i], gpas[i], 16) && good;
	return good;
}

static void order(void)
{
	static const int pages[N] = { 7, 1, 12, 3, 9, 0, 5, 2 };
	struct runner r[N];
	uint8_t out[N][16];
	uint64_t gpas[N], gfn;
	bool good = true;

	doing("order", 60);
	fill(&vm, TEST_GPA, vm.size);
	mark(&vm, TEST_GPA, vm.size);
	for (int i = 0; i < N; i++)
		gpas[i] = TEST_GPA + pages[i] * PAGE + 32;
	start(r, out, N, gpas);
	for (int i = 0; i < N; i++)
		good = !read_fault(&vm, &gfn) && gfn == gpas[i] / PAGE && good;
	CHECK("first in, first out", good);
	CHECK("then nothing", no_fault_queued(&vm));
	/* and release them in another order */
	for (int i = N - 1; i >= 0; i--)
		unmark(&vm, gpas[i] & -PAGE, PAGE);
	CHECK("all go on with what is theirs", join(r, out, N, gpas));
}

static void bad_buffer(void)
{
	struct runner r[3];
	uint8_t out[3][16];
	uint64_t gpas[3], gfn;
	void *ro = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *edge = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uf_fault *fresh;

	doing("bad buffer", 60);
	MUST(munmap(edge + PAGE, PAGE));
	mark(&vm, TEST_GPA, vm.size);
	for (int i = 0; i < 3; i++)
		gpas[i] = TEST_GPA + (20 - i) * PAGE;
	start(r, out, 3, gpas);
	CHECK_ERRNO("null pointer", ioctl(vm.fd, UF_READ_USERFAULT, NULL), EFAULT);
	CHECK_ERRNO("kernel pointer",
		    ioctl(vm.fd, UF_READ_USERFAULT, 0xffffffff81000000UL), EFAULT);
	CHECK_ERRNO("non-canonical pointer",
		    ioctl(vm.fd, UF_READ_USERFAULT, 0x8000000000000000UL), EFAULT);
	CHECK_ERRNO("read-only buffer", ioctl(vm.fd, UF_READ_USERFAULT, ro), EFAULT);
	CHECK_ERRNO("buffer that ends early",
		    ioctl(vm.fd, UF_READ_USERFAULT, edge + PAGE - 4), EFAULT);
	CHECK_ERRNO("good buffer", read_fault(&vm, &gfn), 0);
	CHECK_EQ("nothing lost, same order", gfn, gpas[0] / PAGE);
	/* A buffer without a page must work too. */
	fresh = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK_ERRNO("untouched buffer", ioctl(vm.fd, UF_READ_USERFAULT, fresh), 0);
	CHECK_EQ("the second", fresh->gfn, gpas[1] / PAGE);
	CHECK_ERRNO("once more a bad one", ioctl(vm.fd, UF_READ_USERFAULT, NULL), EFAULT);
	CHECK_ERRNO("the third", read_fault(&vm, &gfn), 0);
	CHECK_EQ("the third it is", gfn, gpas[2] / PAGE);
	CHECK("no more", no_fault_queued(&vm));
	unmark(&vm, TEST_GPA, vm.size);
	CHECK("all go on", join(r, out, 3, gpas));
	munmap(ro, PAGE);
	munmap(edge, PAGE);
	munmap(fresh, PAGE);
}

/* An entry at any place in the queue is removed when its waiter ends. */
static void resolved_before_read(void)
{
	struct runner r[4];
	uint8_t out[4][16];
	uint64_t gpas[4], gfn;

	doing("resolved before read", 60);
	mark(&vm, TEST_GPA, vm.size);
	for (int i = 0; i < 4; i++)
		gpas[i] = TEST_GPA + (30 + i) * PAGE;
	start(r, out, 4, gpas);
	unmark(&vm, gpas[1], PAGE);
	CHECK_EQ("second is through", runner_join(&r[1]), KVM_EXIT_HLT);
	unmark(&vm, gpas[3], PAGE);
	CHECK_EQ("last is through", runner_join(&r[3]), KVM_EXIT_HLT);
	CHECK_ERRNO("read", read_fault(&vm, &gfn), 0);
	CHECK_EQ("first", gfn, gpas[0] / PAGE);
	CHECK_ERRNO("read", read_fault(&vm, &gfn), 0);
	CHECK_EQ("third", gfn, gpas[2] / PAGE);
	CHECK("none of those that were resolved", no_fault_queued(&vm));
	unmark(&vm, TEST_GPA, vm.size);
	CHECK("the others are through", runner_join(&r[0]) == KVM_EXIT_HLT &&
					runner_join(&r[2]) == KVM_EXIT_HLT);
	for (int i = 0; i < 4; i++)
		CHECK("content", is_pattern(out[i], gpas[i], 16));
}

static void same_page(void)
{
	struct runner r[4];
	uint8_t out[4][16];
	uint64_t gpas[4], gfn;
	int n = 0;

	doing("same page", 60);
	mark(&vm, TEST_GPA, vm.size);
	for (int i = 0; i < 4; i++)
		gpas[i] = TEST_GPA + 40 * PAGE + i * 64;
	start(r, out, 4, gpas);
	while (!read_fault(&vm, &gfn))
		n += gfn == TEST_GFN + 40;
	CHECK_EQ("an entry for every waiter", n, 4);
	unmark(&vm, TEST_GPA + 40 * PAGE, PAGE);
	CHECK("one resolution for all", join(r, out, 4, gpas));
	CHECK("and no event for it", !wait_event(&vm, 0));
}

/*
 * A page that is marked again before its waiter has run is a new fault, which
 * needs a new entry, because the first one has been read.
 */
static void marked_again(void)
{
	struct runner r[1];
	uint8_t out[1][16];
	uint64_t gpa = TEST_GPA + 50 * PAGE, gfn;
	int told = 0, through = 0;

	doing("marked again", 60);
	for (int i = 0; i < 50; i++) {
		fill(&vm, gpa, PAGE);
		mark(&vm, gpa, PAGE);
		start(r, out, 1, &gpa);
		MUST(read_fault(&vm, &gfn));
		unmark(&vm, gpa, PAGE);
		mark(&vm, gpa, PAGE);
		/* Either the waiter was quick enough or it has a new entry. */
		while (!r[0].done && !wait_event(&vm, 1))
			;
		if (!read_fault(&vm, &gfn)) {
			read_event(&vm);
			told++;
			if (gfn != gpa / PAGE)
				DIE("wrong gfn %#" PRIx64, gfn);
		} else {
			through++;
		}
		unmark(&vm, gpa, PAGE);
		if (!join(r, out, 1, &gpa))
			DIE("wrong end of round %d", i);
		while (!read_fault(&vm, &gfn))
			;
		read_event(&vm);
	}
	dprintf(1, "# told again %d times, through %d times\n", told, through);
	CHECK("told again or through", told + through == 50);
}

static void *reader(void *arg)
{
	_Atomic int *seen = arg;
	uint64_t gfn;

	for (;;) {
		if (read_fault(&vm, &gfn)) {
			if (errno != ENOENT)
				DIE("read: %s", strerror(errno));
			if (seen[63])
				return NULL;
			sched_yield();
			continue;
		}
		seen[gfn - TEST_GFN]++;
	}
}

/* Several readers: each entry goes to exactly one of them. */
static void readers(void)
{
	struct runner r[N];
	uint8_t out[N][16];
	uint64_t gpas[N];
	static _Atomic int seen[64];
	pthread_t t[3];
	bool good = true;

	doing("several readers", 60);
	for (int round = 0; round < 20; round++) {
		memset((void *)seen, 0, sizeof(seen));
		mark(&vm, TEST_GPA, vm.size);
		for (int i = 0; i < 3; i++)
			pthread_create(&t[i], NULL, reader, (void *)seen);
		for (int i = 0; i < N; i++)
			gpas[i] = TEST_GPA + i * PAGE;
		start(r, out, N, gpas);
		/* Each signal has an entry, unless it was already read. */
		for (int i = 0; i < N; i++)
			while (!seen[i])
				sched_yield();
		seen[63] = 1;
		for (int i = 0; i < 3; i++)
			pthread_join(t[i], NULL);
		for (int i = 0; i < N; i++)
			good = good && seen[i] == 1;
		unmark(&vm, TEST_GPA, vm.size);
		good = join(r, out, N, gpas) && good;
	}
	CHECK("each entry to one reader", good);
}

/* A long queue: one entry for each vCPU. */
static void long_queue(void)
{
	static struct runner r[MAX_VCPUS];
	static uint8_t out[MAX_VCPUS][16];
	static uint64_t gpas[MAX_VCPUS];
	uint64_t gfn;
	bool good = true;

	doing("long queue", 120);
	vm_create(&vm, MAX_VCPUS * PAGE, MAX_VCPUS);
	enable(&vm);
	fill(&vm, TEST_GPA, vm.size);
	for (int round = 0; round < 2; round++) {
		mark(&vm, TEST_GPA, vm.size);
		for (int i = 0; i < MAX_VCPUS; i++)
			gpas[i] = TEST_GPA + (i * 37 + round) % MAX_VCPUS * PAGE + i;
		start(r, out, MAX_VCPUS, gpas);
		for (int i = 0; i < MAX_VCPUS; i++) {
			good = !read_fault(&vm, &gfn) && gfn == gpas[i] / PAGE && good;
			unmark(&vm, gfn * PAGE, PAGE);
		}
		good = no_fault_queued(&vm) && good;
		good = join(r, out, MAX_VCPUS, gpas) && good;
	}
	CHECK("256 in order, twice", good);
	vm_destroy(&vm);
}

int main(void)
{
	doing("create", 20);
	vm_create(&vm, 64 * PAGE, N);
	enable(&vm);
	order();
	bad_buffer();
	resolved_before_read();
	same_page();
	marked_again();
	readers();
	doing("destroy", 20);
	vm_destroy(&vm);
	long_queue();
	return finish();
}
