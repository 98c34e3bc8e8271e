/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A change of a memslot waits for all threads inside KVM, and these may wait for a page of this slot or another. So
 * the library must continue to serve pages while it sets a memslot. These tests use as few threads as possible and
 * make KVM wait for a page at each such moment.
 */
#include "bitmap.h"

#define PAGES 16UL
#define SIZE (PAGES * PAGE)
/* A second slot of the handle. */
#define OTHER_GPA (TEST_GPA + 32 * HUGE)
#define OTHER_SLOT 5

static struct rig r;
static uint8_t *other;

static struct kuf_memory other_slot(uint32_t flags)
{
	return (struct kuf_memory){
		.size = sizeof(struct kuf_memory),
		.flags = flags & ~BY_LIBRARY,
		.gpa = OTHER_GPA,
		.len = SIZE,
		.hva = (uintptr_t)other,
		.kvm = flags & BY_LIBRARY ? memslot_of(OTHER_SLOT, 0) : NULL,
	};
}

/* Opens a handle with one fill thread, and adds the slot that KVM will wait for. */
static void begin(const char *name, uint32_t flags)
{
	struct kuf_options o;

	doing(name, 4);
	rig_vm(&r, anon(SIZE), SIZE, 3);
	other = anon(SIZE);
	o = rig_options(&r);
	o.fill_threads = 1;
	rig_open(&r, o);
	rig_add(&r, rig_slot(&r, BY_LIBRARY | flags));
}

static void end(void)
{
	rig_end(&r, KUF_END_POISON);
	munmap(other, SIZE);
}

/* KVM waits for the page, and the only fill thread is in the callback for it. */
static void kvm_waits(struct vcpu *v, int cpu, uint64_t gpa)
{
	int inside = r.source.inside;

	r.source.held_gpa = gpa;
	set_guest(&r.vm, cpu, guest_outsb, gpa, 8, 0);
	vcpu_start(v, &r, cpu);
	AWAIT(r.source.inside == inside + 1);
}

static void check_kvm(const char *name, struct vcpu *v, uint64_t gpa)
{
	char what[100];

	snprintf(what, sizeof(what), "%s: KVM goes on", name);
	CHECK_EQ(what, vcpu_join(v), KVM_EXIT_HLT);
	snprintf(what, sizeof(what), "%s: with the right content", name);
	CHECK(what, v->out_len == 8 && is_pattern(v->out, gpa, 8));
}

struct call {
	int (*what)(struct call *c);
	int result;
	_Atomic pid_t tid;
	_Atomic bool done;
	pthread_t thread;
};

static void *call_main(void *arg)
{
	struct call *c = arg;

	c->tid = (pid_t)syscall(SYS_gettid);
	c->result = c->what(c);
	c->done = true;
	return NULL;
}

/* Starts the call and waits until it sleeps in the kernel or has returned. */
static void call_start(struct call *c, int (*what)(struct call *))
{
	*c = (struct call){ .what = what };
	if (pthread_create(&c->thread, NULL, call_main, c))
		DIE("pthread_create");
	for (int i = 0; i < 300 && !c->done; i++) {
		sleep_ms(1);
		if (c->tid && thread_state(c->tid) == 'D')
			break;
	}
	sleep_ms(20);
}

static int call_join(struct call *c)
{
	pthread_join(c->thread, NULL);
	return c->result;
}

static int add_other(struct call *c)
{
	struct kuf_memory slot = other_slot(BY_LIBRARY);

	(void)c;
	return kuf_add_memory(r.kuf, &slot);
}

/* A slot is added while KVM waits for a page of another one. */
static void add(void)
{
	uint64_t a = TEST_GPA + 3 * PAGE;
	unsigned int exits;
	struct vcpu v;
	struct call c;

	begin("add", 0);
	kvm_waits(&v, 0, a);
	call_start(&c, add_other);
	r.source.held_gpa = UINT64_MAX;
	check_kvm("add", &v, a);
	CHECK_EQ("add: done", call_join(&c), 0);
	CHECK("add: the new slot is served", reads(&r, 1, OTHER_GPA + PAGE, 0, &exits) && exits == 1);
	end();
}

static bool fill_all(int cpu, uint64_t gpa)
{
	bool good = true;

	for (uint64_t i = 0; i < PAGES; i++)
		good = good && reads(&r, cpu, gpa + i * PAGE, 0, NULL);
	return good;
}

/* A slot completes while KVM waits for a page of another: the library clears the flag when that wait ends. */
static void complete(void)
{
	uint64_t a = TEST_GPA + 3 * PAGE;
	struct vcpu v;

	begin("complete", 0);
	MUST_KUF(add_other(NULL));
	kvm_waits(&v, 0, a);
	CHECK("complete: the other slot", fill_all(1, OTHER_GPA));
	AWAIT(r.source.events[KUF_EVENT_COMPLETE] == 1);
	sleep_ms(50);
	CHECK("complete: vCPUs are served meanwhile", reads(&r, 2, TEST_GPA + 7 * PAGE, 0, NULL));
	r.source.held_gpa = UINT64_MAX;
	check_kvm("complete", &v, a);
	CHECK("complete: goes on being served", fill_all(1, TEST_GPA));
	end();
}

static int discard_other(struct call *c)
{
	(void)c;
	return kuf_discard(r.kuf, OTHER_GPA + 2 * PAGE, 3 * PAGE, KUF_DISCARD_REFILL);
}

/* A discard sets the flag again while KVM waits for a page of another slot. */
static void discard(void)
{
	uint64_t a = TEST_GPA + 3 * PAGE;
	unsigned int exits;
	struct vcpu v;
	struct call c;

	begin("discard", 0);
	MUST_KUF(add_other(NULL));
	CHECK("discard: fill the other slot", fill_all(1, OTHER_GPA));
	AWAIT(r.source.events[KUF_EVENT_COMPLETE] == 1);
	sleep_ms(50);
	kvm_waits(&v, 0, a);
	call_start(&c, discard_other);
	r.source.held_gpa = UINT64_MAX;
	check_kvm("discard", &v, a);
	CHECK_EQ("discard: done", call_join(&c), 0);
	r.source.generation = 1;
	CHECK("discard: exits again", reads(&r, 1, OTHER_GPA + 2 * PAGE, 1, &exits) && exits == 1);
	CHECK("discard: its neighbour kept its bytes", reads(&r, 1, OTHER_GPA + PAGE, 0, &exits) && exits == 0);
	end();
}

static int remove_other(struct call *c)
{
	(void)c;
	return kuf_remove_memory(r.kuf, OTHER_GPA, KUF_END_POISON);
}

/* A slot is removed and its flag cleared while KVM waits for a page of another. */
static void remove_slot(void)
{
	uint64_t a = TEST_GPA + 3 * PAGE;
	struct vcpu v;
	struct call c;

	begin("remove", 0);
	MUST_KUF(add_other(NULL));
	kvm_waits(&v, 0, a);
	call_start(&c, remove_other);
	r.source.held_gpa = UINT64_MAX;
	check_kvm("remove", &v, a);
	CHECK_EQ("remove: done", call_join(&c), 0);
	end();
}

static int close_poison(struct call *c)
{
	(void)c;
	return kuf_close(&r.kuf, KUF_END_POISON);
}

static int close_nowait(struct call *c)
{
	(void)c;
	return kuf_close(&r.kuf, KUF_END_POISON | KUF_END_NOWAIT);
}

static int close_populate(struct call *c)
{
	(void)c;
	return kuf_close(&r.kuf, KUF_END_POPULATE);
}

/* The handle or slot ends while KVM waits for a page whose fill is running. */
static void close_while_waiting(const char *name, int (*how)(struct call *), bool poisons)
{
	uint64_t a = TEST_GPA + 3 * PAGE;
	char what[100];
	struct vcpu v;
	struct call c;

	begin(name, 0);
	MUST_KUF(add_other(NULL));
	kvm_waits(&v, 0, a);
	call_start(&c, how);
	if (poisons) {
		/* The access ends before the callback returns: with an error, never with zeroes. */
		int result = vcpu_join(&v);
		snprintf(what, sizeof(what), "%s: KVM's access fails (%d)", name, result);
		CHECK(what, result != KVM_EXIT_HLT && v.out_len == 0);
	}
	r.source.held_gpa = UINT64_MAX;
	if (!poisons)
		check_kvm(name, &v, a);
	snprintf(what, sizeof(what), "%s: done", name);
	CHECK_EQ(what, call_join(&c), 0);
	AWAIT(r.source.released == 1);
	end();
}

/*
 * vCPUs that make KVM read pages that need no fill but are not mapped in this process yet, so that they are always
 * inside KVM.
 */
struct walker {
	pthread_t thread;
	struct rig *r;
	int cpu;
	uint64_t gpa, pages;
	bool zero;
	_Atomic bool stop, bad;
	_Atomic unsigned int rounds;
};

static void *walker_main(void *arg)
{
	struct walker *w = arg;

	while (!w->stop) {
		uint64_t gpa = w->gpa + w->rounds % w->pages * PAGE;
		struct vcpu v = { .rig = w->r, .cpu = w->cpu };

		set_guest(&w->r->vm, w->cpu, guest_outsb, gpa, 8, 0);
		if (drive(&v) != KVM_EXIT_HLT || v.out_len != 8 ||
		    !(w->zero ? all_bytes(v.out, 8, 0) : is_pattern(v.out, gpa, 8)))
			w->bad = true;
		w->rounds++;
	}
	return NULL;
}

/*
 * The slot that ends has one absent page, so that its flag is set; its other pages are removed, or in the file and not
 * mapped here. The userfaultfd, while it exists, makes KVM wait for these pages at the moment when the library clears
 * the flag of this slot and of the slot before it.
 */
static void end_under_touches(const char *name, bool zero, bool close_it)
{
	const uint64_t pages = 512;
	unsigned int rounds = 0;
	char what[100];

	doing(name, 4);
	for (int i = 0; i < 8; i++) {
		struct walker w = { .r = &r, .cpu = 0, .gpa = OTHER_GPA, .pages = pages - 1, .zero = zero };
		struct kuf_memory slot;
		struct kuf_options o;
		int result, fd = 0;

		rig_vm(&r, anon(SIZE), SIZE, 1);
		o = rig_options(&r);
		o.fill_threads = 1;
		rig_open(&r, o);
		rig_add(&r, rig_slot(&r, BY_LIBRARY));
		other = zero ? anon(pages * PAGE) : shared_memory(pages * PAGE, 0, &fd);
		for (uint64_t n = 0; !zero && n < pages - 1; n++) {
			uint8_t page[PAGE];

			write_pages(page, OTHER_GPA + n * PAGE, PAGE, 0);
			MUST(pwrite(fd, page, PAGE, (off_t)(n * PAGE)));
		}
		slot = other_slot(BY_LIBRARY | (zero ? 0 : KUF_MEMORY_POPULATED));
		slot.len = pages * PAGE;
		slot.fd = fd;
		MUST_KUF(kuf_add_memory(r.kuf, &slot));
		if (zero)
			MUST_KUF(kuf_discard(r.kuf, OTHER_GPA, (pages - 1) * PAGE, KUF_DISCARD_ZERO));
		CHECK_EQ("a page is left", progress(&r, OTHER_GPA).absent, PAGE);
		pthread_create(&w.thread, NULL, walker_main, &w);
		AWAIT(w.rounds >= (unsigned int)(2 + i * 8));
		result = close_it ? kuf_close(&r.kuf, KUF_END_POISON) :
				    kuf_remove_memory(r.kuf, OTHER_GPA, KUF_END_POISON);
		rounds += w.rounds;
		w.stop = true;
		pthread_join(w.thread, NULL);
		snprintf(what, sizeof(what), "%s: ends (round %d)", name, i);
		CHECK_EQ(what, result, 0);
		snprintf(what, sizeof(what), "%s: content (round %d)", name, i);
		CHECK(what, !w.bad);
		rig_end(&r, KUF_END_POISON);
		munmap(other, pages * PAGE);
		if (fd)
			close(fd);
	}
	dprintf(1, "# %s: %u touches in 8 rounds\n", name, rounds);
}

/*
 * The handle is closed while the library waits to clear the flag of a complete slot, because KVM waits for a page of
 * another slot. Meanwhile KVM touches removed pages.
 */
static void close_completing(void)
{
	const uint64_t pages = 512;
	struct walker w = { .r = &r, .cpu = 0, .gpa = OTHER_GPA, .pages = pages - 1, .zero = true };
	struct kuf_memory slot;
	struct vcpu v;
	struct call c;

	begin("close completing", 0);
	munmap(other, SIZE);
	other = anon(pages * PAGE);
	slot = other_slot(BY_LIBRARY);
	slot.len = pages * PAGE;
	MUST_KUF(kuf_add_memory(r.kuf, &slot));
	MUST_KUF(kuf_discard(r.kuf, OTHER_GPA, (pages - 1) * PAGE, KUF_DISCARD_ZERO));
	kvm_waits(&v, 1, TEST_GPA + 3 * PAGE);
	pthread_create(&w.thread, NULL, walker_main, &w);
	MUST_KUF(kuf_ensure(r.kuf, OTHER_GPA + (pages - 1) * PAGE, PAGE, -1));
	AWAIT(r.source.events[KUF_EVENT_COMPLETE] == 1);
	sleep_ms(50);
	call_start(&c, close_poison);
	r.source.held_gpa = UINT64_MAX;
	CHECK_EQ("close completing: ends", call_join(&c), 0);
	w.stop = true;
	pthread_join(w.thread, NULL);
	CHECK("close completing: content", !w.bad && w.rounds > 0);
	int result = vcpu_join(&v);
	CHECK("close completing: KVM has its bytes, or none",
	      result == KVM_EXIT_HLT ? is_pattern(v.out, TEST_GPA + 3 * PAGE, 8) : v.out_len == 0);
	munmap(other, pages * PAGE);
	other = anon(SIZE);
	end();
}

/*
 * A complete slot, whose flag is clear: each discard sets it and each fill of the last page clears it, while vCPUs and
 * KVM touch these pages and wait for them. (The guest may read the bytes from before or after the discard; a real one
 * would stay off the pages.)
 */
static _Atomic bool whole_stop, whole_bad;
static _Atomic unsigned int whole_touches[2];

static void *whole_main(void *arg)
{
	int cpu = (int)(intptr_t)arg;
	unsigned int n = (unsigned int)cpu;

	while (!whole_stop) {
		uint64_t gpa = TEST_GPA + n++ * 5 % PAGES * PAGE;
		struct vcpu v = { .rig = &r, .cpu = cpu };

		set_guest(&r.vm, cpu, cpu ? guest_outsb : guest_read, gpa, 8, 0);
		bool good = drive(&v) == KVM_EXIT_HLT;
		if (cpu) {
			/* Check byte by byte, because the page may be dropped between two. */
			for (uint64_t i = 0; i < 8; i++)
				good = good && (v.out[i] == 0 || v.out[i] == pattern(gpa + i));
		} else {
			uint64_t rax = guest_rax(&r.vm, cpu);

			good = good && (rax == 0 || rax == pattern64(gpa));
		}
		if (!good) {
			dprintf(1, "# vCPU %d: run %d, kuf_vcpu_fault %d\n", cpu, v.result, v.error);
			whole_bad = true;
			return NULL;
		}
		whole_touches[cpu]++;
	}
	return NULL;
}

static void discard_whole(void)
{
	pthread_t t[2];
	unsigned int n = 0;

	begin("discard whole", 0);
	doing("discard whole", 8);
	CHECK("discard whole: fill", fill_all(2, TEST_GPA));
	for (intptr_t i = 0; i < 2; i++)
		pthread_create(&t[i], NULL, whole_main, (void *)i);
	while ((whole_touches[0] < 400 || whole_touches[1] < 400) && !whole_bad) {
		uint64_t first = n * 7 % PAGES, len = 1 + n % (PAGES - first);

		MUST_KUF(kuf_discard(r.kuf, TEST_GPA + first * PAGE, len * PAGE, n % 3 ? KUF_DISCARD_REFILL : KUF_DISCARD_ZERO));
		/* Sometimes, complete the slot again. */
		if (n++ % 4 == 0)
			MUST_KUF(kuf_ensure(r.kuf, TEST_GPA, SIZE, -1));
	}
	whole_stop = true;
	for (int i = 0; i < 2; i++)
		pthread_join(t[i], NULL);
	CHECK("discard whole: its bytes or zeroes, and they get on", !whole_bad);
	dprintf(1, "# discard whole: %u discards, %u times complete\n", n,
		(unsigned int)r.source.events[KUF_EVENT_COMPLETE]);
	CHECK("discard whole: it was", r.source.events[KUF_EVENT_COMPLETE] > 3);
	end();
}

static _Atomic int in_callback[4];

static void call_back(const struct kuf_event *event)
{
	if (event->kind != KUF_EVENT_COMPLETE)
		return;
	in_callback[0] = kuf_discard(r.kuf, TEST_GPA, PAGE, KUF_DISCARD_REFILL);
	in_callback[1] = kuf_remove_memory(r.kuf, TEST_GPA, 0);
	in_callback[2] = 1;
}

/* KVM may wait for a thread that serves faults, so such a thread must change no memslot. */
static void callbacks(void)
{
	begin("callbacks", 0);
	r.source.on_event = call_back;
	CHECK("callbacks: fill", fill_all(0, TEST_GPA));
	AWAIT(in_callback[2]);
	CHECK_EQ("callbacks: kuf_discard", (int64_t)in_callback[0], (int64_t)-EDEADLK);
	CHECK_EQ("callbacks: kuf_remove_memory", (int64_t)in_callback[1], (int64_t)-EDEADLK);
	r.source.on_event = NULL;
	CHECK("callbacks: nothing changed", reads(&r, 0, TEST_GPA, 0, NULL));
	CHECK_KUF("callbacks: outside of them it may", kuf_discard(r.kuf, TEST_GPA, PAGE, KUF_DISCARD_REFILL), 0);
	end();
}

int main(int argc, char **argv)
{
	const char *only = argc > 1 ? argv[1] : NULL;

#define RUN(name, call)                              \
	do {                                         \
		if (!only || !strcmp(only, name))    \
			call;                        \
	} while (0)
	RUN("complete", complete());
	RUN("discard", discard());
	RUN("remove", remove_slot());
	RUN("close", close_while_waiting("close poisoning", close_poison, true));
	RUN("nowait", close_while_waiting("close without waiting", close_nowait, true));
	RUN("populate", close_while_waiting("close populating", close_populate, false));
	RUN("callbacks", callbacks());
	RUN("add", add());
	RUN("remove-removed", end_under_touches("remove under touches of removed pages", true, false));
	RUN("remove-file", end_under_touches("remove under touches of a file's pages", false, false));
	RUN("close-removed", end_under_touches("close under touches of removed pages", true, true));
	RUN("close-completing", close_completing());
	RUN("discard-whole", discard_whole());
	RUN("close-file", end_under_touches("close under touches of a file's pages", false, true));
	return finish();
}
