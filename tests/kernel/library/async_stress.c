/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * vCPUs, KVM for them, threads of the VMM, populate, discards and deferred fills, in
 * random order over several slots.  Each read must return the page's current content:
 * its current generation, or zero if it was removed, with all later writes.
 *
 * A thread that discards a page keeps the others off it meanwhile, as kuf_discard
 * requires of the caller; fills for populate continue, and their bytes may be stale.
 */
#include "async.h"

#define SLOTS 3
#define PAGES 384UL		/* of each slot */
#define GROUP 8			/* pages under one lock */
#define VCPUS 4
#define CELLS 2048		/* offset of the words that vCPUs write */
#define SECONDS 15

struct page {
	_Atomic uint64_t generation;
	_Atomic bool removed;
	_Atomic uint64_t cell[VCPUS];
	_Atomic bool written[VCPUS];
};

static struct vm vm;
static struct kuf *kuf;
static uint8_t *mem[SLOTS];
static struct page pages[SLOTS * PAGES];
static pthread_rwlock_t locks[SLOTS * PAGES / GROUP];
static _Atomic bool stop, closing, all_stopped, bad;
static _Atomic unsigned int reads, kvm_reads_done, writes, ensures, discards, removals, fills, deferrals;
static unsigned int seed;

/* Slots have gaps between them, so that no run crosses from one to the next. */
static uint64_t slot_gpa(int slot)
{
	return TEST_GPA + (uint64_t)slot * 2 * PAGES * PAGE;
}

static uint64_t gpa_of(int n)
{
	return slot_gpa(n / (int)PAGES) + (uint64_t)n % PAGES * PAGE;
}

static int page_at(uint64_t gpa)
{
	uint64_t slot = (gpa - TEST_GPA) / (2 * PAGES * PAGE);

	return (int)(slot * PAGES + (gpa - slot_gpa((int)slot)) / PAGE);
}

static uint8_t *memory_of(int n)
{
	return mem[n / (int)PAGES] + (uint64_t)n % PAGES * PAGE;
}

static uint32_t next(uint32_t *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 17;
	*state ^= *state << 5;
	return *state;
}

static void wrong(const char *what, int n)
{
	if (!bad)
		dprintf(1, "# seed %u: %s at page %d, generation %" PRIu64 ", removed %d\n", seed, what,
			n, pages[n].generation, pages[n].removed);
	bad = true;
}

static void expected(int n, uint64_t offset, uint8_t *to, size_t len)
{
	if (pages[n].removed)
		memset(to, 0, len);
	else
		put_content(to, gpa_of(n) + offset, len, pages[n].generation);
}

static void put_page(uint8_t *to, uint64_t gpa)
{
	put_content(to, gpa, PAGE, pages[page_at(gpa)].generation);
}

/* ---- fills: at once, or later by another thread ---- */

static struct kuf_fill later[4096];
static _Atomic unsigned int nr_later, nr_settled;
static pthread_mutex_t later_lock = PTHREAD_MUTEX_INITIALIZER;

static int stress_fill(void *opaque, struct kuf_fill *f)
{
	static _Atomic uint32_t counter;
	uint32_t n = counter++;

	(void)opaque;
	fills++;
	if (n % 5 == 0) {
		pthread_mutex_lock(&later_lock);
		if (nr_later - nr_settled < 4096) {
			later[nr_later % 4096] = *f;
			nr_later++;
			deferrals++;
			pthread_mutex_unlock(&later_lock);
			return KUF_FILL_DEFERRED;
		}
		pthread_mutex_unlock(&later_lock);
	}
	if (n % 7 == 0)
		usleep(n % 3 * 300);
	for (uint64_t at = 0; at < f->len; at += PAGE)
		put_page((uint8_t *)f->buf + at, f->gpa + at);
	/* Sometimes only a part of the run. */
	if (n % 11 == 0 && f->len > PAGE)
		f->filled = PAGE;
	return KUF_FILL_DONE;
}

/* Resolves deferred runs with the generation that is current at that time. */
static void *settler(void *arg)
{
	uint32_t rnd = seed ^ 0x5e771e;
	static uint8_t buf[1 << 20];

	(void)arg;
	while (!all_stopped || nr_settled != nr_later) {
		struct kuf_fill f;

		if (nr_settled == nr_later) {
			usleep(200);
			continue;
		}
		pthread_mutex_lock(&later_lock);
		f = later[nr_settled % 4096];
		nr_settled++;
		pthread_mutex_unlock(&later_lock);
		if (next(&rnd) % 4 == 0)
			usleep(next(&rnd) % 1000);
		for (uint64_t gpa = f.gpa; gpa < f.gpa + f.len; gpa += PAGE) {
			pthread_rwlock_t *lock = &locks[page_at(gpa) / GROUP];
			ssize_t r;

			/* One page at a time under the lock, so that it is not discarded meanwhile. */
			pthread_rwlock_rdlock(lock);
			if (next(&rnd) % 2) {
				put_page((uint8_t *)f.buf + (gpa - f.gpa), gpa);
				r = kuf_resolve(kuf, gpa, NULL, PAGE, KUF_RESOLVE_IN_PLACE);
			} else {
				put_page(buf, gpa);
				r = kuf_resolve(kuf, gpa, buf, PAGE, 0);
			}
			pthread_rwlock_unlock(lock);
			/* At the end, remaining runs may not be pending any more. */
			if (r < 0 && !closing)
				DIE("seed %u: kuf_resolve: %zd %s", seed, r, kuf_error());
		}
	}
	return NULL;
}

/* ---- the users of pages ---- */

static void check_page_by_vcpu(int cpu, int n, uint32_t rnd)
{
	uint64_t offset = rnd % (CELLS - 16) & ~7UL, gpa = gpa_of(n) + offset;
	uint8_t want[16], out[16];
	struct worker w;
	int r;

	expected(n, offset, want, 16);
	switch (rnd >> 16 & 3) {
	case 0:	/* KVM reads for the vCPU */
		if (!kvm_reads(&vm, kuf, cpu, gpa, out) || memcmp(out, want, 16))
			wrong("rep outsb", n);
		kvm_reads_done++;
		break;
	case 1:	/* the vCPU writes to its cell */
		set_guest(&vm, cpu, guest_write, gpa_of(n) + CELLS + 8 * (uint64_t)cpu, 0,
			  (uint64_t)rnd << 32 | rnd);
		r = run_here(&w, &vm, kuf, cpu);
		if (r != KVM_EXIT_HLT)
			wrong("write", n);
		pages[n].cell[cpu] = (uint64_t)rnd << 32 | rnd;
		pages[n].written[cpu] = true;
		writes++;
		break;
	case 2:	/* the vCPU reads its cell again */
		if (pages[n].written[cpu]) {
			if (!guest_reads(&vm, kuf, cpu, gpa_of(n) + CELLS + 8 * (uint64_t)cpu,
					 pages[n].cell[cpu]))
				wrong("read of what was written", n);
			break;
		}
		/* fall through */
	default: {
		uint64_t word;

		memcpy(&word, want, 8);
		if (!guest_reads(&vm, kuf, cpu, gpa, word))
			wrong("read", n);
		reads++;
	}
	}
}

static void *vcpu(void *arg)
{
	int cpu = (int)(intptr_t)arg;
	uint32_t rnd = seed + 77u * ((unsigned int)cpu + 1);

	while (!stop && !bad) {
		int n = (int)(next(&rnd) % (SLOTS * PAGES));
		pthread_rwlock_t *lock = &locks[n / GROUP];

		pthread_rwlock_rdlock(lock);
		check_page_by_vcpu(cpu, n, next(&rnd));
		pthread_rwlock_unlock(lock);
	}
	return NULL;
}

/* A device model that checks the first part of a page. */
static void *device(void *arg)
{
	uint32_t rnd = seed ^ 0xdef1ce;
	static uint8_t want[CELLS];

	(void)arg;
	while (!stop && !bad) {
		int n = (int)(next(&rnd) % (SLOTS * PAGES));
		pthread_rwlock_t *lock = &locks[n / GROUP];
		int r;

		pthread_rwlock_rdlock(lock);
		r = kuf_ensure(kuf, gpa_of(n), PAGE, -1);
		expected(n, 0, want, CELLS);
		if (r || memcmp(memory_of(n), want, CELLS))
			wrong("the VMM's thread", n);
		pthread_rwlock_unlock(lock);
		ensures++;
		usleep(next(&rnd) % 500);
	}
	return NULL;
}

static void *discarder(void *arg)
{
	uint32_t rnd = seed ^ 0xd15ca4d;

	(void)arg;
	while (!stop && !bad) {
		int group = (int)(next(&rnd) % (SLOTS * PAGES / GROUP));
		int first = group * GROUP + (int)(next(&rnd) % GROUP);
		int nr = 1 + (int)(next(&rnd) % (uint32_t)(GROUP - first % GROUP));
		bool remove = next(&rnd) % 3 == 0;
		int r;

		pthread_rwlock_wrlock(&locks[group]);
		for (int n = first; n < first + nr; n++) {
			pages[n].generation++;
			pages[n].removed = remove;
			for (int i = 0; i < VCPUS; i++)
				pages[n].written[i] = false;
		}
		r = kuf_discard(kuf, gpa_of(first), (uint64_t)nr * PAGE,
				remove ? KUF_DISCARD_ZERO : KUF_DISCARD_REFILL);
		pthread_rwlock_unlock(&locks[group]);
		if (r)
			DIE("seed %u: kuf_discard: %d %s", seed, r, kuf_error());
		if (remove)
			removals++;
		else
			discards++;
		usleep(next(&rnd) % 1500);
	}
	return NULL;
}

static void *populater(void *arg)
{
	uint32_t rnd = seed ^ 0x90901a7e;

	(void)arg;
	while (!stop && !bad) {
		int n = (int)(next(&rnd) % (SLOTS * PAGES));
		struct kuf_populate_request p = { .size = sizeof(p), .gpa = gpa_of(n) };
		int r;

		p.len = (1 + next(&rnd) % (PAGES - (uint32_t)n % PAGES)) * PAGE;
		if (next(&rnd) % 16 == 0)
			p.flags = KUF_POPULATE_STOP;
		r = kuf_populate(kuf, &p);
		if (r)
			DIE("seed %u: kuf_populate: %d %s", seed, r, kuf_error());
		usleep(next(&rnd) % 20000);
	}
	return NULL;
}

/* kuf_kvm_quiesce must return one of two results, and must return. */
static void *quiescer(void *arg)
{
	(void)arg;
	while (!stop && !bad) {
		int r = kuf_kvm_quiesce(kuf, 5);

		if (r && r != -ETIMEDOUT)
			DIE("seed %u: kuf_kvm_quiesce: %d %s", seed, r, kuf_error());
		usleep(20000);
	}
	return NULL;
}

static struct source events;

int main(int argc, char **argv)
{
	void *(*other[])(void *) = { device, discarder, populater, quiescer };
	pthread_t t[VCPUS], o[sizeof(other) / sizeof(*other)], settles;
	int fd = (int)MUST(memfd_create("guest", MFD_CLOEXEC));
	bool whole = true;

	doing("create", 30);
	seed = argc > 1 ? (unsigned int)atoi(argv[1]) : (unsigned int)(now_s() * 1000) ^ (unsigned int)getpid() << 16;
	if (!seed)
		seed = 1;
	dprintf(1, "# seed %u\n", seed);
	vm_create_type(&vm, 0, 0, anon(PAGE), VCPUS);
	vm.size = SLOTS * 2 * PAGES * PAGE;
	MUST(ftruncate(fd, PAGES * PAGE));
	for (int i = 0; i < SLOTS; i++) {
		mem[i] = i == 1 ? mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) :
				  anon(PAGES * PAGE);
		if (mem[i] == MAP_FAILED)
			DIE("mmap: %s", strerror(errno));
		MUST(set_slot(&vm, (uint32_t)(TEST_SLOT + i), 0, slot_gpa(i), PAGES * PAGE, mem[i], NULL));
	}
	for (unsigned int i = 0; i < SLOTS * PAGES / GROUP; i++)
		pthread_rwlock_init(&locks[i], NULL);
	source_init(&events, TEST_GPA);
	kuf = open_options(&vm, (struct kuf_options){ .fill = stress_fill, .event = source_event,
			   .opaque = &events, .fill_threads = 3 });
	for (int i = 0; i < SLOTS; i++) {
		struct kuf_memory m = { .size = sizeof(m), .gpa = slot_gpa(i), .len = PAGES * PAGE,
					.hva = (uintptr_t)mem[i] };

		if (i == 1)
			m.fd = fd;
		if (kuf_add_memory(kuf, &m))
			DIE("kuf_add_memory: %s", kuf_error());
	}

	doing("stress", SECONDS * 3);
	pthread_create(&settles, NULL, settler, NULL);
	for (int i = 0; i < VCPUS; i++)
		pthread_create(&t[i], NULL, vcpu, (void *)(intptr_t)i);
	for (size_t i = 0; i < sizeof(other) / sizeof(*other); i++)
		pthread_create(&o[i], NULL, other[i], NULL);
	for (int i = 0; i < SECONDS * 20 && !bad; i++)
		sleep_ms(50);
	stop = true;
	for (int i = 0; i < VCPUS; i++)
		pthread_join(t[i], NULL);
	for (size_t i = 0; i < sizeof(other) / sizeof(*other); i++)
		pthread_join(o[i], NULL);

	struct kuf_stats_info st = stats_of(kuf);
	dprintf(1, "# %u reads, %u by KVM, %u writes, %u ensured, %u discards, %u removals; %u fills, "
		"%u deferred; %" PRIu64 " in KVM's queue, %" PRIu64 " exits, %" PRIu64 " joined, %" PRIu64
		" late\n", reads, kvm_reads_done, writes, ensures, discards, removals, fills, deferrals,
		st.faults, st.vcpu_faults, st.faults_joined, st.faults_late);
	report(!bad, "every byte is the page's own", "seed %u", seed);
	report(st.faults > 50 && st.vcpu_faults > 50 && discards > 50 && removals > 20 && deferrals > 50,
	       "there was something to do", "seed %u", seed);
	report(!st.faults_unknown && !st.faults_lost, "none unknown, none lost", "seed %u", seed);
	report(!events.events[KUF_EVENT_POISONED] && !events.events[KUF_EVENT_FATAL] &&
	       !events.events[KUF_KVM_EVENT_PARKED], "nothing poisoned", "seed %u", seed);
	closing = true;
	CHECK_KUF("stress: close", kuf_close(&kuf, KUF_END_POPULATE), 0);
	/* A call, kuf_close too, may have to wait for it. */
	all_stopped = true;
	pthread_join(settles, NULL);
	for (int n = 0; n < SLOTS * (int)PAGES && whole; n++) {
		static uint8_t want[CELLS];

		expected(n, 0, want, CELLS);
		whole = !memcmp(memory_of(n), want, CELLS);
		for (int i = 0; i < VCPUS && whole; i++)
			whole = !pages[n].written[i] ||
				*(uint64_t *)(memory_of(n) + CELLS + 8 * i) == pages[n].cell[i];
		if (!whole)
			wrong("in the end", n);
	}
	report(whole, "all pages are whole in the end", "seed %u", seed);
	return finish();
}
