/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Slots and handles end under full load: vCPUs, KVM for them, populate, the VMM's
 * threads, without or with deferred fills.  An access may fail, but each byte that
 * it reads is the page's.
 */
#include "async.h"

#define PAGES 256UL
#define VCPUS 4
#define ROUNDS 24

static struct vm vm;
static struct source source;
static struct kuf *kuf;
static _Atomic bool stop;
static _Atomic int wrong, buses;
static _Atomic unsigned int good_reads;

static void on_bus(int sig)
{
	(void)sig;
	buses++;
}

/* A vCPU reads pages in random order until the memory is gone. */
static void *vcpu(void *arg)
{
	int cpu = (int)(intptr_t)arg;
	uint32_t rnd = 12345u + 7919u * (unsigned int)cpu;
	struct worker w;

	while (!stop) {
		uint64_t gpa;
		int r;

		rnd = rnd * 1664525 + 1013904223;
		gpa = TEST_GPA + (rnd >> 8) % PAGES * PAGE + (rnd & 63) * 8;
		set_guest(&vm, cpu, rnd & 0x80 ? guest_outsb : guest_read, gpa, 16, 0x5555);
		worker_init(&w, &vm, kuf, cpu);
		/* Without run_here, which would retry for ever after a memory error interrupts KVM_RUN. */
		for (;;) {
			r = ioctl(vm.vcpu[cpu], KVM_RUN, 0);
			if (r < 0 && errno == EFAULT && vm.run[cpu]->exit_reason == UF_EXIT_MEMORY_FAULT) {
				struct uf_exit_memory_fault f = memory_fault(&vm, cpu);

				r = kuf_vcpu_fault(kuf, f.gpa, f.size, f.flags);
				if (!r)
					continue;
				/* Only the errors for the end of the handle or of the slot. */
				if (r != -ECANCELED && r != -EBADF && r != -EHWPOISON && r != -ENOENT) {
					dprintf(1, "# kuf_vcpu_fault: %d %s\n", r, kuf_error());
					wrong++;
				}
				return NULL;
			}
			if (r < 0)
				return NULL;	/* EFAULT, or EINTR by a memory error */
			if (vm.run[cpu]->exit_reason == KVM_EXIT_HLT)
				break;
			if (vm.run[cpu]->exit_reason != KVM_EXIT_IO ||
			    vm.run[cpu]->io.port == EXCEPTION_PORT)
				return NULL;	/* MMIO at memory, or an error of the emulator */
			uint8_t *data = (uint8_t *)vm.run[cpu] + vm.run[cpu]->io.data_offset;
			size_t n = (size_t)vm.run[cpu]->io.size * vm.run[cpu]->io.count;

			if (!has_content(data, gpa, n, source.generation))
				wrong++;
			gpa += n;
		}
		if (!(rnd & 0x80) && guest_rax(&vm, cpu) != content64(gpa, source.generation))
			wrong++;
		good_reads++;
	}
	return NULL;
}

static void *ensurer(void *arg)
{
	uint32_t rnd = 777;

	(void)arg;
	while (!stop) {
		uint64_t gpa;
		int r;

		rnd = rnd * 1664525 + 1013904223;
		gpa = TEST_GPA + (rnd >> 8) % PAGES * PAGE;
		r = kuf_ensure(kuf, gpa, PAGE, 1000);
		if (r == -ECANCELED || r == -EBADF || r == -ENOENT || r == -EHWPOISON)
			return NULL;
		if (r) {
			dprintf(1, "# kuf_ensure: %d %s\n", r, kuf_error());
			wrong++;
			return NULL;
		}
		usleep(300);
	}
	return NULL;
}

static void run(int round)
{
	static const uint32_t flags[] = { KUF_END_POISON, KUF_END_POPULATE,
					  KUF_END_POISON | KUF_END_POPULATE };
	uint32_t how = flags[round % 3];
	bool slot_only = round / 3 % 2;
	struct kuf_populate_request p = { .size = sizeof(p), .gpa = KUF_ALL, .rate = 1 << 20 };
	pthread_t t[VCPUS], e;
	int r;

	vm_create(&vm, PAGES * PAGE, VCPUS);
	source_init(&source, TEST_GPA);
	source.generation = (uint64_t)round;
	source.delay_us = round % 4 * 300;
	kuf = open_options(&vm, (struct kuf_options){ .fill = source_fill, .event = source_event,
			   .release = source_release, .opaque = &source,
			   .flags = round & 8 ? KUF_KVM_OPEN_DRAIN : 0 });
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	stop = false;
	for (int i = 0; i < VCPUS; i++)
		pthread_create(&t[i], NULL, vcpu, (void *)(intptr_t)i);
	pthread_create(&e, NULL, ensurer, NULL);
	if (kuf_populate(kuf, &p))
		DIE("kuf_populate: %s", kuf_error());
	usleep((unsigned int)(round * 7919 % 40) * 1000);
	/* The variable kuf keeps the handle, so that the other threads' calls fail by themselves. */
	struct kuf *mine = kuf;
	if (slot_only) {
		do {
			r = kuf_remove_memory(kuf, TEST_GPA, how);
		} while (r == -EBUSY);
		if (r)
			DIE("round %d: kuf_remove_memory: %d %s", round, r, kuf_error());
	}
	r = kuf_close(&mine, how);
	if (r)
		DIE("round %d: kuf_close: %d %s", round, r, kuf_error());
	if (how & KUF_END_POPULATE) {
		/* All pages are present: vCPUs continue until they are stopped. */
		usleep(5000);
		if (!has_content(vm.mem, TEST_GPA, vm.size, source.generation)) {
			dprintf(1, "# round %d: not all is there\n", round);
			wrong++;
		}
	}
	stop = true;
	for (int i = 0; i < VCPUS; i++)
		pthread_join(t[i], NULL);
	pthread_join(e, NULL);
	if (source.released != 1 || source.events[KUF_EVENT_FATAL]) {
		dprintf(1, "# round %d: released %d times, fatal %d\n", round, source.released,
			source.events[KUF_EVENT_FATAL]);
		wrong++;
	}
	vm_destroy(&vm);
}

int main(void)
{
	struct sigaction sa = { .sa_handler = on_bus };

	doing("end", 20);
	sigaction(SIGBUS, &sa, NULL);
	for (int round = 0; round < ROUNDS; round++) {
		char name[64];

		doing("end", 20);
		wrong = 0;
		run(round);
		snprintf(name, sizeof(name), "end, round %d", round);
		CHECK_EQ(name, wrong, 0);
	}
	dprintf(1, "# %u reads, %d memory errors\n", good_reads, buses);
	CHECK("pages were read", good_reads > 100);
	return finish();
}
