/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * All operations at once in random order: touches of pages by vCPUs and by KVM,
 * providing, discarding and marking pages, adding and removing memslots, disabling
 * and enabling.  The content must be right at all times; the kernel must survive;
 * no thread may hang.
 */
#include "test.h"

#define PAGES 32UL
#define SIZE (PAGES * PAGE)
#define CPUS 4

static struct vm vm;
static _Atomic bool stop, stop_resolver;
static _Atomic unsigned long touches, accesses, resolved, flips, slot_changes;

static unsigned int rnd(unsigned int *seed)
{
	*seed = *seed * 1103515245 + 12345;
	return *seed >> 16 & 0x7fff;
}

/*
 * Pages always hold their pattern: a "discard" only marks them, so that the guest
 * reads the right bytes whichever way a race ends.
 */
static void *vcpu_main(void *arg)
{
	int cpu = (int)(intptr_t)arg;
	unsigned int seed = cpu * 7919 + 1;
	uint8_t out[16];

	while (!stop) {
		uint64_t gpa = TEST_GPA + rnd(&seed) % PAGES * PAGE + rnd(&seed) % 4000;
		size_t len = 0;
		bool outsb = rnd(&seed) & 1;
		int e;

		set_guest(&vm, cpu, outsb ? guest_outsb : guest_read, gpa, 8, 0);
		for (;;) {
			e = run_vcpu(&vm, cpu);
			if (e == UF_EXIT_MEMORY_FAULT) {
				if (rnd(&seed) & 1)
					set_attr(&vm, memory_fault(&vm, cpu).gpa, PAGE, 0);
				else
					sched_yield();
				continue;
			}
			if (e != KVM_EXIT_IO)
				break;
			size_t n = (size_t)vm.run[cpu]->io.count;
			for (size_t i = 0; i < n && len < sizeof(out); i++)
				out[len++] = ((uint8_t *)vm.run[cpu] +
					      vm.run[cpu]->io.data_offset)[i];
		}
		if (e != KVM_EXIT_HLT)
			DIE("vCPU %d: run says %d", cpu, e);
		if (outsb ? len != 8 || !is_pattern(out, gpa, 8) :
			    guest_rax(&vm, cpu) != pattern64(gpa))
			DIE("vCPU %d: wrong content at %#" PRIx64, cpu, gpa);
		outsb ? accesses++ : touches++;
	}
	return NULL;
}

static void *resolver_main(void *arg)
{
	(void)arg;
	while (!stop_resolver) {
		uint64_t gfn;

		wait_event(&vm, 5);
		read_event(&vm);
		while (!read_fault(&vm, &gfn)) {
			if (gfn < TEST_GFN || gfn >= TEST_GFN + PAGES)
				DIE("gfn %#" PRIx64 " out of thin air", gfn);
			unmark(&vm, gfn * PAGE, PAGE);
			resolved++;
		}
		if (errno != ENOENT)
			DIE("read: %s", strerror(errno));
	}
	return NULL;
}

static void *marker_main(void *arg)
{
	unsigned int seed = 99;

	(void)arg;
	while (!stop) {
		uint64_t first = rnd(&seed) % PAGES, n = 1 + rnd(&seed) % (PAGES - first);

		/* EINVAL: userfaults are disabled at the moment. */
		if (set_attr(&vm, TEST_GPA + first * PAGE, n * PAGE, UF_ATTR_USERFAULT) &&
		    errno != EINVAL)
			DIE("mark: %s", strerror(errno));
		if (rnd(&seed) % 8 == 0)
			sleep_ms(1);
	}
	return NULL;
}

static void *flipper_main(void *arg)
{
	unsigned int seed = 5;

	(void)arg;
	while (!stop) {
		sleep_ms(rnd(&seed) % 8);
		MUST(userfault_cap(&vm, UF_DISABLE, 0, 0));
		MUST(userfault_cap(&vm, UF_ENABLE, vm.event, 0));
		flips++;
	}
	return NULL;
}

static void *slots_main(void *arg)
{
	void *other = anon(SIZE);
	unsigned int seed = 6;

	(void)arg;
	while (!stop) {
		MUST(set_slot(&vm, TEST_SLOT, rnd(&seed) & 1 ? UF_MEM_LOG_DIRTY : 0, TEST_GPA,
			      SIZE, vm.mem, NULL));
		MUST(set_slot(&vm, 2, 0, TEST_GPA + 32 * HUGE, SIZE, other, NULL));
		MUST(set_slot(&vm, 2, 0, 0, 0, NULL, NULL));
		slot_changes++;
		sleep_ms(rnd(&seed) % 4);
	}
	return NULL;
}

static void *memory_main(void *arg)
{
	unsigned int seed = 7;

	(void)arg;
	while (!stop) {
		/* Unmaps the page but keeps its content. */
		madvise(host(&vm, TEST_GPA) + rnd(&seed) % PAGES * PAGE, PAGE, MADV_PAGEOUT);
		mprotect(vm.mem, PAGE, PROT_READ | PROT_WRITE);
		sleep_ms(1);
	}
	return NULL;
}

static void run_for(const char *name, unsigned int ms, void *(*const *extra)(void *))
{
	pthread_t cpus[CPUS], resolver, others[8];
	int n = 0;

	doing(name, 60);
	touches = accesses = resolved = flips = slot_changes = 0;
	stop = stop_resolver = false;
	pthread_create(&resolver, NULL, resolver_main, NULL);
	for (int i = 0; i < CPUS; i++)
		pthread_create(&cpus[i], NULL, vcpu_main, (void *)(intptr_t)i);
	for (; extra[n]; n++)
		pthread_create(&others[n], NULL, extra[n], NULL);
	sleep_ms(ms);
	stop = true;
	while (n)
		pthread_join(others[--n], NULL);
	for (int i = 0; i < CPUS; i++)
		pthread_join(cpus[i], NULL);
	stop_resolver = true;
	pthread_join(resolver, NULL);
	dprintf(1, "# %lu touches, %lu accesses by KVM, %lu faults read, %lu flips, %lu slot changes\n",
		touches, accesses, resolved, flips, slot_changes);
	CHECK(name, touches && accesses);
	CHECK("nothing is left in the queue", no_fault_queued(&vm));
}

/* VMs are destroyed under load, again and again. */
static void torn_down(void)
{
	bool good = true;

	doing("torn down", 120);
	for (int i = 0; i < 20; i++) {
		pid_t pid = fork();
		int s;

		if (!pid) {
			pthread_t t;

			vm_create(&vm, SIZE, CPUS);
			fill(&vm, TEST_GPA, SIZE);
			enable(&vm);
			pthread_create(&t, NULL, marker_main, NULL);
			for (int c = 0; c < CPUS; c++)
				pthread_create(&t, NULL, vcpu_main, (void *)(intptr_t)c);
			if (i & 1)
				pthread_create(&t, NULL, resolver_main, NULL);
			sleep_ms(5 + i * 3);
			_exit(0);
		}
		waitpid(pid, &s, 0);
		good = good && WIFEXITED(s) && !WEXITSTATUS(s);
	}
	CHECK("torn down in the middle of it", good);
}

int main(void)
{
	static void *(*const plain[])(void *) = { marker_main, NULL };
	static void *(*const with_slots[])(void *) = { marker_main, slots_main, NULL };
	static void *(*const with_flips[])(void *) = { marker_main, flipper_main, NULL };
	static void *(*const all[])(void *) = {
		marker_main, marker_main, slots_main, flipper_main, memory_main, NULL
	};

	doing("create", 20);
	vm_create(&vm, SIZE, CPUS);
	fill(&vm, TEST_GPA, SIZE);
	enable(&vm);
	run_for("marking", 2000, plain);
	run_for("marking, memslots", 2000, with_slots);
	run_for("marking, switching off and on", 2000, with_flips);
	run_for("all together", 4000, all);
	doing("destroy", 20);
	vm_destroy(&vm);
	torn_down();
	return finish();
}
