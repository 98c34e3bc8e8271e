/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Several vCPUs access several slots in random order, directly and through KVM, during populate, discards, removals of
 * pages, removals and additions of slots, and memslot changes by the caller. The test always knows the content of each
 * page. Arguments: seconds, seed.
 */
#include "bitmap.h"

#define CHUNK 4UL		/* pages that are discarded together */
#define CHUNKS 12UL
#define PAGES (CHUNK * CHUNKS)
#define SIZE (PAGES * PAGE)
#define SLOTS 3			/* a memslot of the caller, one of the library, one of the library over a shared file */
#define CPUS 4

static struct rig r;

/*
 * The caller must keep the guest off pages that it discards: a thread that touches a chunk holds its lock for reading,
 * a thread that changes its content holds it for writing.
 */
struct chunk {
	pthread_rwlock_t lock;
	uint64_t generation;
	_Atomic bool zero;
};

static struct slot {
	uint64_t gpa;
	uint8_t *mem;
	int fd;
	uint32_t flags;
	struct chunk chunks[CHUNKS];
	/* Users of the slot hold it for reading. */
	pthread_rwlock_t there;
	_Atomic uint64_t *bitmap;
} slots[SLOTS];

static _Atomic bool stop;
static _Atomic unsigned long touches, accesses, writes, host_touches, discards, removals, flips, populates;

static unsigned int rnd(unsigned int *seed)
{
	*seed = *seed * 1103515245 + 12345;
	return *seed >> 16 & 0x7fff;
}

static struct slot *slot_of(uint64_t gpa)
{
	for (int i = 0; i < SLOTS; i++)
		if (gpa - slots[i].gpa < SIZE)
			return &slots[i];
	DIE("gpa %#" PRIx64 " out of thin air", gpa);
}

static struct chunk *chunk_of(struct slot *s, uint64_t gpa)
{
	return &s->chunks[(gpa - s->gpa) / (CHUNK * PAGE)];
}

static int fill_chunks(void *opaque, struct kuf_fill *run)
{
	struct slot *s = slot_of(run->gpa);

	(void)opaque;
	for (uint64_t at = 0; at < run->len; at += PAGE)
		write_pages((uint8_t *)run->buf + at, run->gpa + at, PAGE, chunk_of(s, run->gpa + at)->generation);
	return KUF_FILL_DONE;
}

static int host_memslot(struct slot *s, bool on)
{
	return set_slot(&r.vm, 10 + (uint32_t)(s - slots), on ? UF_MEM_USERFAULT : 0, s->gpa, SIZE, s->mem,
			on ? (void *)s->bitmap : NULL);
}

static void add(struct slot *s)
{
	struct kuf_memory m = {
		.size = sizeof(m), .gpa = s->gpa, .len = SIZE, .hva = (uintptr_t)s->mem, .fd = s->fd,
		.kvm = s->flags & BY_LIBRARY ? memslot_of(10 + (uint32_t)(s - slots), 0) : NULL,
	};
	uint64_t address;

	MUST_KUF(kuf_add_memory(r.kuf, &m));
	MUST_KUF(kuf_kvm_bitmap(r.kuf, s->gpa, &address));
	s->bitmap = (_Atomic uint64_t *)(uintptr_t)address;
	if (!(s->flags & BY_LIBRARY))
		MUST(host_memslot(s, true));
}

static void *vcpu_thread(void *arg)
{
	int cpu = (int)(intptr_t)arg & 0xff;
	unsigned int seed = (unsigned int)((intptr_t)arg >> 8) * 31 + cpu;

	while (!stop) {
		struct slot *s = &slots[rnd(&seed) % SLOTS];
		uint64_t gpa = s->gpa + rnd(&seed) % PAGES * PAGE + rnd(&seed) % 510 * 8;
		struct chunk *c = chunk_of(s, gpa);
		struct vcpu v = { .rig = &r, .cpu = cpu };
		unsigned int how = rnd(&seed) % 3;

		pthread_rwlock_rdlock(&s->there);
		pthread_rwlock_rdlock(&c->lock);
		uint64_t want = c->zero ? 0 : pattern64(key(gpa, c->generation));
		/* Writes the value that the page already has. */
		set_guest(&r.vm, cpu, how == 0 ? guest_outsb : how == 1 ? guest_read : guest_write, gpa, 8,
			  how == 1 ? ~want : want);
		int result = drive(&v);
		uint64_t got = how == 0 ? 0 : guest_rax(&r.vm, cpu);
		if (how == 0 && v.out_len == 8)
			memcpy(&got, v.out, 8);
		if (result != KVM_EXIT_HLT || got != want || (how == 0 && v.out_len != 8))
			DIE("vCPU %d at %#" PRIx64 " (%u): run %d, kuf_vcpu_fault %d, %#" PRIx64
			    " instead of %#" PRIx64, cpu, gpa, how, result, v.error, got, want);
		pthread_rwlock_unlock(&c->lock);
		pthread_rwlock_unlock(&s->there);
		(how == 0 ? &accesses : how == 1 ? &touches : &writes)[0]++;
	}
	return NULL;
}

/* A device model that reads guest memory at any time. */
static void *device_thread(void *arg)
{
	unsigned int seed = (unsigned int)(intptr_t)arg + 77;

	while (!stop) {
		struct slot *s = &slots[rnd(&seed) % SLOTS];
		uint64_t gpa = s->gpa + rnd(&seed) % PAGES * PAGE;
		struct chunk *c = chunk_of(s, gpa);

		pthread_rwlock_rdlock(&s->there);
		pthread_rwlock_rdlock(&c->lock);
		uint8_t *at = s->mem + (gpa - s->gpa);
		if (c->zero ? !all_bytes(at, PAGE, 0) : !is_pattern(at, key(gpa, c->generation), PAGE))
			DIE("device at %#" PRIx64 ": wrong content", gpa);
		pthread_rwlock_unlock(&c->lock);
		pthread_rwlock_unlock(&s->there);
		host_touches++;
		sleep_ms(rnd(&seed) % 3);
	}
	return NULL;
}

static void *discard_thread(void *arg)
{
	unsigned int seed = (unsigned int)(intptr_t)arg + 177;

	while (!stop) {
		struct slot *s = &slots[rnd(&seed) % SLOTS];
		uint64_t n = rnd(&seed) % CHUNKS, gpa = s->gpa + n * CHUNK * PAGE;
		struct chunk *c = &s->chunks[n];
		bool remove = rnd(&seed) % 3 == 0;

		pthread_rwlock_rdlock(&s->there);
		pthread_rwlock_wrlock(&c->lock);
		c->generation++;
		MUST_KUF(kuf_discard(r.kuf, gpa, CHUNK * PAGE, remove ? KUF_DISCARD_ZERO : KUF_DISCARD_REFILL));
		c->zero = remove;
		pthread_rwlock_unlock(&c->lock);
		pthread_rwlock_unlock(&s->there);
		discards++;
		sleep_ms(rnd(&seed) % 8);
	}
	return NULL;
}

static void *populate_thread(void *arg)
{
	unsigned int seed = (unsigned int)(intptr_t)arg + 277;

	while (!stop) {
		struct kuf_populate_request p = { .size = sizeof(p), .gpa = KUF_ALL };
		int result = kuf_populate(r.kuf, &p);

		if (result && result != -ENOENT)
			DIE("kuf_populate: %s", kuf_error());
		populates++;
		sleep_ms(rnd(&seed) % 40);
	}
	return NULL;
}

/* Removes and adds slots, each time with new memory, because poisoned memory stays poisoned. */
static void *removal_thread(void *arg)
{
	unsigned int seed = (unsigned int)(intptr_t)arg + 377;

	while (!stop) {
		struct slot *s = &slots[rnd(&seed) % SLOTS];
		int result;

		sleep_ms(100 + rnd(&seed) % 100);
		pthread_rwlock_wrlock(&s->there);
		if (!(s->flags & BY_LIBRARY))
			MUST(host_memslot(s, false));
		while ((result = kuf_remove_memory(r.kuf, s->gpa, KUF_END_POISON)) == -EBUSY)
			sched_yield();
		MUST_KUF(result);
		MUST(set_slot(&r.vm, 10 + (uint32_t)(s - slots), 0, s->gpa, 0, NULL, NULL));
		munmap(s->mem, SIZE);
		if (s->fd) {
			close(s->fd);
			s->mem = shared_memory(SIZE, 0, &s->fd);
		} else {
			s->mem = anon(SIZE);
		}
		for (uint64_t n = 0; n < CHUNKS; n++)
			s->chunks[n].zero = false;
		add(s);
		pthread_rwlock_unlock(&s->there);
		removals++;
	}
	return NULL;
}

/* Sets and clears the flag of the caller's memslot at any time; set bits count again when it is set. */
static void *flip_thread(void *arg)
{
	struct slot *s = &slots[0];
	unsigned int seed = (unsigned int)(intptr_t)arg + 477;
	bool on = true;

	while (!stop) {
		pthread_rwlock_rdlock(&s->there);
		on = !on;
		MUST(host_memslot(s, on));
		pthread_rwlock_unlock(&s->there);
		flips++;
		sleep_ms(5 + rnd(&seed) % 30);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	unsigned int seconds = argc > 1 ? (unsigned int)atoi(argv[1]) : 20;
	unsigned int seed = argc > 2 ? (unsigned int)atoi(argv[2]) : (unsigned int)time(NULL) % 100000;
	void *(*const others[])(void *) = {
		device_thread, discard_thread, populate_thread, removal_thread, flip_thread,
	};
	pthread_t t[CPUS + 5];
	int n = 0;

	dprintf(1, "# bitmap_stress %u %u\n", seconds, seed);
	doing("stress", seconds + 15);
	rig_vm(&r, anon(PAGE), PAGE, CPUS);
	struct kuf_options o = rig_options(&r);
	o.fill = fill_chunks;
	o.fill_threads = 1 + seed % 3;
	o.demand_run = 0;
	rig_open(&r, o);
	for (int i = 0; i < SLOTS; i++) {
		struct slot *s = &slots[i];

		s->gpa = TEST_GPA + (uint64_t)i * 16 * HUGE;
		s->flags = (i > 0 ? BY_LIBRARY : 0);
		s->mem = i == 2 ? shared_memory(SIZE, 0, &s->fd) : anon(SIZE);
		pthread_rwlock_init(&s->there, NULL);
		for (uint64_t c = 0; c < CHUNKS; c++)
			pthread_rwlock_init(&s->chunks[c].lock, NULL);
		add(s);
	}
	for (intptr_t i = 0; i < CPUS; i++)
		pthread_create(&t[n++], NULL, vcpu_thread, (void *)((intptr_t)seed << 8 | i));
	for (int i = 0; i < 5; i++)
		pthread_create(&t[n++], NULL, others[i], (void *)(intptr_t)seed);
	for (double end = now_s() + seconds; now_s() < end;)
		sleep_ms(50);
	stop = true;
	while (n)
		pthread_join(t[--n], NULL);
	dprintf(1, "# %lu touches and %lu writes by vCPUs, %lu accesses of KVM's, %lu of the VMM's; %lu discards, "
		   "%lu removals, %lu flags, %lu populates\n", (unsigned long)touches, (unsigned long)writes,
		(unsigned long)accesses, (unsigned long)host_touches, (unsigned long)discards,
		(unsigned long)removals, (unsigned long)flips, (unsigned long)populates);
	struct kuf_stats_info s = stats(&r);
	dprintf(1, "# %llu exits, %llu faults, %llu fills\n", (unsigned long long)s.vcpu_faults,
		(unsigned long long)s.faults, (unsigned long long)s.fills);
	CHECK("everything was going on", touches && writes && accesses && host_touches && discards && removals &&
	      flips && populates && s.vcpu_faults && s.faults);
	if (!(slots[0].flags & BY_LIBRARY))
		MUST(host_memslot(&slots[0], false));
	CHECK_KUF("closes", kuf_close(&r.kuf, seed & 1 ? KUF_END_POISON : KUF_END_POPULATE), 0);
	doing("destroy", 20);
	rig_end(&r, 0);
	return finish();
}
