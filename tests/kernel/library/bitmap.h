/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Common code of the tests of KUF_MECHANISM_KVM_BITMAP: the selftests' virtual machine, a source that counts fills,
 * and a vCPU's loop as in a VMM. The library serves the memory at TEST_GPA but not the low memory.
 *
 * The content of a page depends on its address and a generation, so that checks detect stale, misplaced and
 * half-filled pages.
 */
#ifndef KUF_BITMAP_H
#define KUF_BITMAP_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "../selftests/test.h"

#include <kuf-kvm.h>

/* After so many consecutive exits for the same page the guest makes no progress. */
#define LOOPS 1000
#define LOOPING (-2000)

/* ---- the source of pages ---- */

struct source {
	_Atomic uint64_t generation;
	_Atomic unsigned int fills, released;
	/* A run that contains this page fails with this error. */
	_Atomic uint64_t bad_gpa;
	_Atomic int bad_answer;
	/* A run that contains this page waits in the callback. */
	_Atomic uint64_t held_gpa;
	_Atomic int inside;
	/* This page holds a function that returns pattern64 of its address. */
	uint64_t code_gpa;
	/* The number of events for each KUF_EVENT_*. */
	_Atomic unsigned int events[64];
	_Atomic uint64_t event_gpa[64];
	void (*on_event)(const struct kuf_event *event);
	/* The number of requests for each page, or NULL. */
	_Atomic uint8_t *asked;
};

/* The argument for pattern and similar functions. */
static UNUSED uint64_t key(uint64_t gpa, uint64_t generation)
{
	return gpa + (generation << 40);
}

static UNUSED bool holds(const struct kuf_fill *run, uint64_t gpa)
{
	return run->gpa <= gpa && gpa < run->gpa + run->len;
}

static UNUSED void write_pages(uint8_t *to, uint64_t gpa, size_t len, uint64_t generation)
{
	for (size_t i = 0; i < len; i++)
		to[i] = pattern(key(gpa + i, generation));
}

static UNUSED int source_fill(void *opaque, struct kuf_fill *run)
{
	struct source *s = opaque;
	int answer = KUF_FILL_DONE;

	s->inside++;
	s->fills++;
	if (s->asked)
		for (uint64_t gpa = run->gpa; gpa < run->gpa + run->len; gpa += PAGE)
			s->asked[(gpa - TEST_GPA) / PAGE]++;
	while (holds(run, s->held_gpa))
		sleep_ms(1);
	if (holds(run, s->bad_gpa)) {
		answer = s->bad_answer;
	} else {
		write_pages(run->buf, run->gpa, run->len, s->generation);
		if (s->code_gpa && holds(run, s->code_gpa)) {
			uint8_t *code_at = (uint8_t *)run->buf + (s->code_gpa - run->gpa);
			uint64_t value = pattern64(s->code_gpa);

			memcpy(code_at, "\x48\xb8", 2); /* mov value, %rax */
			memcpy(code_at + 2, &value, sizeof(value));
			code_at[10] = 0xc3; /* ret */
		}
	}
	s->inside--;
	return answer;
}

static UNUSED void source_event(void *opaque, const struct kuf_event *event)
{
	struct source *s = opaque;

	if (event->kind < 64) {
		s->event_gpa[event->kind] = event->gpa;
		s->events[event->kind]++;
	}
	if (s->on_event)
		s->on_event(event);
}

static UNUSED void source_release(void *opaque)
{
	((struct source *)opaque)->released++;
}

static UNUSED void source_reset(struct source *s)
{
	memset(s, 0, sizeof(*s));
	s->bad_gpa = s->held_gpa = UINT64_MAX;
}

/* ---- a VM, and the library's handle on it ---- */

struct rig {
	struct vm vm;
	struct kuf *kuf;
	struct source source;
	_Atomic uint64_t *bitmap;
};

/* The test memory has no memslot yet. */
static UNUSED void rig_vm(struct rig *r, void *mem, size_t size, int vcpus)
{
	memset(r, 0, sizeof(*r));
	source_reset(&r->source);
	vm_create_type(&r->vm, 0, 0, mem, vcpus);
	r->vm.mem = mem;
	r->vm.size = size;
}

static UNUSED struct kuf_options rig_options(struct rig *r)
{
	return (struct kuf_options){
		.size = sizeof(struct kuf_options),
		.mechanism = KUF_MECHANISM_KVM_BITMAP,
		.vm_fd = r->vm.fd,
		.fill = source_fill,
		.event = source_event,
		.release = source_release,
		.opaque = &r->source,
		/* Tests count exits, so that each must fill only its own page. */
		.demand_run = PAGE,
	};
}

/* For the tests: the library sets the memslot. */
#define BY_LIBRARY (1u << 31)

/* The KVM fields of a slot whose memslot @number the library sets. Never freed, because the program is short. */
static UNUSED const struct kuf_kvm_memory *memslot_of(uint32_t number, uint32_t flags)
{
	struct kuf_kvm_memory *kvm = calloc(1, sizeof(*kvm));

	if (!kvm)
		DIE("no memory");
	*kvm = (struct kuf_kvm_memory){
		.size = sizeof(*kvm), .flags = KUF_KVM_MEMORY_MEMSLOT, .memslot = number, .memslot_flags = flags,
	};
	return kvm;
}

static UNUSED struct kuf_memory rig_slot(struct rig *r, uint32_t flags)
{
	return (struct kuf_memory){
		.size = sizeof(struct kuf_memory),
		.flags = flags & ~BY_LIBRARY,
		.gpa = TEST_GPA,
		.len = r->vm.size,
		.hva = (uintptr_t)r->vm.mem,
		.kvm = flags & BY_LIBRARY ? memslot_of(TEST_SLOT, 0) : NULL,
	};
}

#define MUST_KUF(call)                                                       \
	do {                                                                 \
		long r_ = (long)(call);                                      \
		if (r_ < 0)                                                  \
			DIE("line %d: %s: %s", __LINE__, #call, kuf_error()); \
	} while (0)

/* Checks the result of a call. */
#define CHECK_KUF(name, call, want)                                              \
	do {                                                                     \
		long r_ = (long)(call);                                          \
		report(r_ == (want), name, "line %d: %s is %ld, not %ld (%s)",   \
		       __LINE__, #call, r_, (long)(want), r_ < 0 ? kuf_error() : "-"); \
	} while (0)

/* KUF_TEST_USERFAULTFDS=N makes the library use N userfaultfds. */
static UNUSED void rig_open(struct rig *r, struct kuf_options options)
{
	const char *several = getenv("KUF_TEST_USERFAULTFDS");

	if (several && options.mechanism == KUF_MECHANISM_KVM_BITMAP)
		options.userfaultfds = (uint32_t)atoi(several);
	if (!options.fill && !(options.flags & KUF_OPEN_DIRECT))
		options.flags |= KUF_OPEN_CALLER_DRIVEN;
	MUST_KUF(kuf_open(&options, &r->kuf));
}

static UNUSED void rig_bitmap(struct rig *r)
{
	uint64_t address = 0;

	MUST_KUF(kuf_kvm_bitmap(r->kuf, TEST_GPA, &address));
	r->bitmap = (_Atomic uint64_t *)(uintptr_t)address;
}

static UNUSED void rig_add(struct rig *r, struct kuf_memory slot)
{
	MUST_KUF(kuf_add_memory(r->kuf, &slot));
	rig_bitmap(r);
}

/* Sets the memslot as the caller does, with KVM_MEM_USERFAULT or other flags. */
static UNUSED void rig_memslot(struct rig *r, uint32_t flags)
{
	void *bitmap = flags & UF_MEM_USERFAULT ? (void *)r->bitmap : NULL;

	MUST(set_slot(&r->vm, TEST_SLOT, flags, TEST_GPA, r->vm.size, r->vm.mem, bitmap));
}

static UNUSED void rig_close(struct rig *r, uint32_t flags)
{
	MUST_KUF(kuf_close(&r->kuf, flags));
}

enum owner { HOST, LIBRARY };

/* The start of most tests: an absent, armed slot. */
static UNUSED void rig_start(struct rig *r, void *mem, size_t size, int vcpus, enum owner owner,
			     uint32_t flags, int fd)
{
	rig_vm(r, mem, size, vcpus);
	rig_open(r, rig_options(r));

	struct kuf_memory slot = rig_slot(r, flags | (owner == LIBRARY ? BY_LIBRARY : 0));

	slot.fd = fd;
	rig_add(r, slot);
	if (owner == HOST)
		rig_memslot(r, UF_MEM_USERFAULT);
}

static UNUSED void rig_end(struct rig *r, uint32_t flags)
{
	if (r->kuf)
		rig_close(r, flags);
	vm_destroy(&r->vm);
}

static UNUSED struct kuf_stats_info stats(struct rig *r)
{
	struct kuf_stats_info s = { .size = sizeof(s) };

	MUST_KUF(kuf_stats(r->kuf, &s));
	return s;
}

static UNUSED struct kuf_progress_info progress(struct rig *r, uint64_t gpa)
{
	struct kuf_progress_info p = { .size = sizeof(p) };

	MUST_KUF(kuf_progress(r->kuf, gpa, &p));
	return p;
}

static UNUSED bool bit(struct rig *r, uint64_t gpa)
{
	uint64_t n = (gpa - TEST_GPA) / PAGE;

	return r->bitmap[n / 64] >> n % 64 & 1;
}

static UNUSED uint64_t bits(struct rig *r, uint64_t gpa, uint64_t pages)
{
	uint64_t n = 0;

	for (uint64_t i = 0; i < pages; i++)
		n += bit(r, gpa + i * PAGE);
	return n;
}

/* Waits for another thread's counters, which may lag behind the guest; the watchdog ends an endless wait. */
#define AWAIT(cond)                    \
	do {                           \
		while (!(cond))        \
			sleep_ms(1);   \
	} while (0)

/* ---- memory ---- */

static UNUSED uint8_t *shared_memory(size_t size, unsigned int flags, int *fd)
{
	uint8_t *p;

	*fd = memfd_create("guest", MFD_CLOEXEC | flags);
	if (*fd < 0 || ftruncate(*fd, (off_t)size))
		return NULL;
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	return p == MAP_FAILED ? NULL : p;
}

/* ---- a vCPU's loop, as in a VMM ---- */

struct vcpu {
	struct rig *rig;
	int cpu;
	pthread_t thread;
	_Atomic pid_t tid;
	_Atomic bool done;
	int result;		/* the result of run_vcpu, or LOOPING */
	int error;		/* of kuf_vcpu_fault, if that ended it */
	unsigned int exits;	/* KVM_EXIT_MEMORY_FAULT */
	uint8_t out[256];	/* the guest's output */
	size_t out_len;
	uint8_t in;		/* the guest's input */
};

static UNUSED int drive(struct vcpu *v)
{
	struct vm *vm = &v->rig->vm;
	struct kvm_run *run = vm->run[v->cpu];
	uint64_t last = UINT64_MAX;
	unsigned int same = 0;

	v->tid = (pid_t)syscall(SYS_gettid);
	v->error = 0;
	v->exits = 0;
	v->out_len = 0;
	for (;;) {
		v->result = run_vcpu(vm, v->cpu);
		if (v->result == UF_EXIT_MEMORY_FAULT) {
			struct uf_exit_memory_fault f = memory_fault(vm, v->cpu);

			v->exits++;
			same = f.gpa == last ? same + 1 : 0;
			last = f.gpa;
			if (same > LOOPS) {
				v->result = LOOPING;
				break;
			}
			v->error = kuf_vcpu_fault(v->rig->kuf, f.gpa, f.size, f.flags);
			if (v->error)
				break;
			continue;
		}
		if (v->result != KVM_EXIT_IO)
			break;

		uint8_t *data = (uint8_t *)run + run->io.data_offset;
		size_t n = (size_t)run->io.size * run->io.count;

		last = UINT64_MAX;
		if (run->io.direction == KVM_EXIT_IO_IN) {
			memset(data, v->in, n);
			continue;
		}
		for (size_t i = 0; i < n && v->out_len < sizeof(v->out); i++)
			v->out[v->out_len++] = data[i];
	}
	return v->result;
}

static void *vcpu_main(void *arg)
{
	struct vcpu *v = arg;

	drive(v);
	v->done = true;
	return NULL;
}

static UNUSED void vcpu_start(struct vcpu *v, struct rig *r, int cpu)
{
	v->rig = r;
	v->cpu = cpu;
	v->done = false;
	v->tid = 0;
	if (pthread_create(&v->thread, NULL, vcpu_main, v))
		DIE("pthread_create");
}

static UNUSED int vcpu_join(struct vcpu *v)
{
	pthread_join(v->thread, NULL);
	return v->result;
}

/* Runs on the calling thread.  Returns whether the guest reached its hlt with the right number in rax. */
static UNUSED bool run_to(struct rig *r, int cpu, uint64_t rax, unsigned int *exits)
{
	struct vcpu v = { .rig = r, .cpu = cpu };
	int result = drive(&v);

	if (exits)
		*exits = v.exits;
	if (result == KVM_EXIT_HLT && guest_rax(&r->vm, cpu) == rax)
		return true;
	dprintf(1, "# vCPU %d: run %d, kuf_vcpu_fault %d, rax %#" PRIx64 " instead of %#" PRIx64 "\n", cpu,
		result, v.error, guest_rax(&r->vm, cpu), rax);
	return false;
}

static UNUSED bool reads(struct rig *r, int cpu, uint64_t gpa, uint64_t generation, unsigned int *exits)
{
	set_guest(&r->vm, cpu, guest_read, gpa, 0, 0);
	return run_to(r, cpu, pattern64(key(gpa, generation)), exits);
}

static UNUSED bool reads_zero(struct rig *r, int cpu, uint64_t gpa, unsigned int *exits)
{
	set_guest(&r->vm, cpu, guest_read, gpa, 0, 1);
	return run_to(r, cpu, 0, exits);
}

/* KVM reads n bytes, because it emulates a string instruction. */
static UNUSED bool kvm_reads(struct rig *r, int cpu, uint64_t gpa, size_t n, uint64_t generation)
{
	struct vcpu v = { .rig = r, .cpu = cpu };

	set_guest(&r->vm, cpu, guest_outsb, gpa, n, 0);
	if (drive(&v) == KVM_EXIT_HLT && v.out_len == n && is_pattern(v.out, key(gpa, generation), n))
		return true;
	dprintf(1, "# vCPU %d: run %d, kuf_vcpu_fault %d, %zu bytes, first %#x\n", cpu, v.result, v.error,
		v.out_len, v.out[0]);
	return false;
}

static UNUSED bool all_bytes(const uint8_t *p, size_t n, uint8_t v)
{
	for (size_t i = 0; i < n; i++)
		if (p[i] != v)
			return false;
	return true;
}

/* Whether a present page holds the right bytes at its host address. */
static UNUSED bool page_is(struct rig *r, uint64_t gpa, uint64_t generation)
{
	return is_pattern(host(&r->vm, gpa), key(gpa, generation), PAGE);
}

static UNUSED int set_msr(struct rig *r, int cpu, uint32_t index, uint64_t value)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} m = { .head.nmsrs = 1, .entry = { .index = index, .data = value } };

	return ioctl(r->vm.vcpu[cpu], KVM_SET_MSRS, &m.head);
}

#endif
