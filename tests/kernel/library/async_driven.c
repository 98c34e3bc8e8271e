/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The caller's own loop of kuf_poll, kuf_read and kuf_resolve, with a service thread
 * and without one; and a callback that defers, with bytes received in place.
 */
#include "async.h"

#define PAGES 512UL

static struct vm vm;
static struct source source;
static struct kuf *kuf;
static _Atomic bool stop;
static _Atomic unsigned int taken[PAGES];
static _Atomic unsigned int kvms, others, no_place;

enum how { BY_COPY, BY_PLACE, BY_ZERO };

static void resolve(struct kuf_fault *f, enum how how)
{
	static uint8_t page[PAGE];
	ssize_t n = -1;

	if (how == BY_PLACE) {
		if (!f->place) {
			no_place++;
			return;
		}
		put_content(f->place, f->gpa, f->len, source.generation);
		n = kuf_resolve(kuf, f->gpa, NULL, f->len, KUF_RESOLVE_IN_PLACE);
	} else if (how == BY_COPY) {
		put_content(page, f->gpa, f->len, source.generation);
		n = kuf_resolve(kuf, f->gpa, page, f->len, 0);
	} else {
		n = kuf_resolve(kuf, f->gpa, NULL, f->len, KUF_RESOLVE_ZERO);
	}
	if (n != (ssize_t)f->len)
		DIE("kuf_resolve of %#" PRIx64 ": %zd %s", f->gpa, n, kuf_error());
}

static void *loop(void *arg)
{
	enum how how = *(enum how *)arg;
	struct kuf_fault f[4];

	while (!stop) {
		int r = kuf_poll(kuf, 50);

		if (r < 0)
			DIE("kuf_poll: %d %s", r, kuf_error());
		if (!r)
			continue;
		ssize_t n = kuf_read(kuf, f, 4);
		if (n == -EAGAIN)
			continue;
		if (n < 0)
			DIE("kuf_read: %zd %s", n, kuf_error());
		for (ssize_t i = 0; i < n; i++) {
			taken[(f[i].gpa - TEST_GPA) / PAGE]++;
			if (f[i].flags & KUF_KVM_FAULT)
				kvms++;
			else
				others++;
			resolve(&f[i], how);
		}
	}
	return NULL;
}

static void run_loop(const char *name, uint32_t flags, enum how how)
{
	struct worker w[4];
	char what[96];
	pthread_t t;
	uint8_t out[16];
	bool good = true, once = true;

	doing(name, 60);
	vm_create(&vm, PAGES * PAGE, 4);
	source_init(&source, TEST_GPA);
	memset((void *)taken, 0, sizeof(taken));
	kvms = others = no_place = 0;
	stop = false;
	kuf = open_driven(&vm, &source, flags);
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	snprintf(what, sizeof(what), "%s: kuf_fd", name);
	CHECK(what, kuf_fd(kuf) >= 0);
	pthread_create(&t, NULL, loop, &how);
	for (uint64_t i = 0; i < 40; i++) {
		uint64_t gpa = TEST_GPA + i * PAGE + 0x80;

		if (i % 2)
			good = kvm_reads(&vm, kuf, 0, gpa, out) &&
			       (how == BY_ZERO ? is_zero(out, 16) : has_content(out, gpa, 16, 0)) && good;
		else
			good = guest_reads(&vm, kuf, 0, gpa,
					   how == BY_ZERO ? 0 : content64(gpa, 0)) && good;
		once = once && taken[i] == 1;
	}
	snprintf(what, sizeof(what), "%s: right bytes, one after the other", name);
	CHECK(what, good);
	snprintf(what, sizeof(what), "%s: each was read once", name);
	CHECK(what, once);
	snprintf(what, sizeof(what), "%s: KVM's are told apart", name);
	CHECK(what, kvms == 20 && others == 20);
	snprintf(what, sizeof(what), "%s: a place for each", name);
	CHECK_EQ(what, no_place, 0);

	/* Four vCPUs at once, at the same pages and at others. */
	for (int round = 0; round < 40; round++) {
		uint64_t gpa = TEST_GPA + (64 + (uint64_t)round * 4) * PAGE;

		for (int i = 0; i < 4; i++) {
			set_guest(&vm, i, i % 2 ? guest_outsb : guest_read,
				  gpa + (uint64_t)(i & round & 3) * PAGE + 128 * i, 16, 0);
			worker_start(&w[i], &vm, kuf, i);
		}
		for (int i = 0; i < 4; i++) {
			uint64_t at = gpa + (uint64_t)(i & round & 3) * PAGE + 128 * i;

			good = worker_join(&w[i]) == KVM_EXIT_HLT && good;
			if (i % 2)
				good = w[i].out_len == 16 &&
				       (how == BY_ZERO ? is_zero(w[i].out, 16) :
				       has_content(w[i].out, at, 16, 0)) && good;
			else
				good = guest_rax(&vm, i) == (how == BY_ZERO ? 0 : content64(at, 0)) &&
				       good;
		}
	}
	for (uint64_t i = 0; i < PAGES; i++)
		once = once && taken[i] <= 1;
	snprintf(what, sizeof(what), "%s: right bytes, four at once", name);
	CHECK(what, good);
	snprintf(what, sizeof(what), "%s: none was read twice", name);
	CHECK(what, once);
	snprintf(what, sizeof(what), "%s: nothing is owed", name);
	CHECK_EQ(what, kuf_pending(kuf, NULL, 0), 0);
	stop = true;
	pthread_join(t, NULL);
	close_kuf(kuf, KUF_END_POISON);
	vm_destroy(&vm);
}

/* Serves faults until there are none for a while.  Returns the number of faults. */
static int pump(int patience_ms)
{
	struct kuf_fault f[2];
	int got = 0;

	while (kuf_poll(kuf, patience_ms) == 1) {
		ssize_t n = kuf_read(kuf, f, 2);

		if (n < 0 && n != -EAGAIN)
			DIE("kuf_read: %zd", n);
		for (ssize_t i = 0; i < n; i++)
			resolve(&f[i], BY_COPY);
		got += n > 0 ? (int)n : 0;
	}
	return got;
}

/* Eight vCPUs wait before the first read: none is forgotten. */
static void many_at_once(const char *name, uint32_t flags)
{
	struct worker w[8];
	struct eventfds events = eventfds_but(NULL);
	char what[96];
	bool good = true;

	doing(name, 60);
	vm_create(&vm, PAGES * PAGE, 8);
	source_init(&source, TEST_GPA);
	kuf = open_options(&vm, (struct kuf_options){ .flags = flags });
	events = eventfds_but(&events);
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	for (int i = 0; i < 8; i++) {
		set_guest(&vm, i, guest_outsb, TEST_GPA + (uint64_t)i * PAGE, 16, 0);
		worker_start(&w[i], &vm, kuf, i);
		if (!sleeps_in_kvm(&w[i]))
			DIE("vCPU %d does not wait", i);
	}
	snprintf(what, sizeof(what), "%s: all eight are asked for", name);
	CHECK_EQ(what, pump(1500), 8);
	for (int i = 0; i < 8; i++) {
		if (!COMES_TRUE(w[i].done)) {
			dprintf(1, "# vCPU %d waits for ever\n", i);
			good = false;
			/* The entries of KVM's queue are lost. */
			kuf_ensure(kuf, TEST_GPA + (uint64_t)i * PAGE, PAGE, 0);
			pump(300);
		}
		good = worker_join(&w[i]) == KVM_EXIT_HLT && w[i].out_len == 16 &&
		       has_content(w[i].out, TEST_GPA + (uint64_t)i * PAGE, 16, 0) && good;
	}
	snprintf(what, sizeof(what), "%s: all eight go on", name);
	CHECK(what, good);
	close_kuf(kuf, KUF_END_POISON);
	vm_destroy(&vm);
}

/* A fault that was read is pending, is listed, and may be poisoned. */
static void owed(void)
{
	struct worker w[3];
	struct kuf_fault f[4];
	uint64_t gpa = TEST_GPA + 5 * PAGE;
	ssize_t n = 0;

	doing("owed", 60);
	vm_create(&vm, PAGES * PAGE, 3);
	source_init(&source, TEST_GPA);
	kuf = open_driven(&vm, &source, 0);
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	CHECK_KUF("owed: nothing yet", kuf_read(kuf, f, 4), -EAGAIN);
	CHECK_KUF("owed: kuf_poll", kuf_poll(kuf, 0), 0);
	set_guest(&vm, 0, guest_outsb, gpa, 16, 0);
	worker_start(&w[0], &vm, kuf, 0);
	CHECK_KUF("owed: one comes", kuf_poll(kuf, 20000), 1);
	CHECK_KUF("owed: it is read", kuf_read(kuf, f, 4), 1);
	CHECK("owed: by KVM, for this page", f[0].gpa == gpa && f[0].len == PAGE &&
	      f[0].flags == (KUF_KVM_FAULT | KUF_FAULT_DEMAND) && f[0].memory_offset == 5 * PAGE);
	CHECK("owed: its place is the memory itself", f[0].place == host(&vm, gpa));

	/* Further faults of the same page join it and are not read again. */
	set_guest(&vm, 1, guest_read, gpa + 8, 0, 0);
	worker_start(&w[1], &vm, kuf, 1);
	set_guest(&vm, 2, guest_outsb, gpa + 32, 16, 0);
	worker_start(&w[2], &vm, kuf, 2);
	CHECK("owed: they wait", sleeps_in_kvm(&w[2]) && COMES_TRUE(w[1].exits == 1));
	CHECK_KUF("owed: nothing more to read", kuf_poll(kuf, 200), 0);
	CHECK_KUF("owed: one page is pending", n = kuf_pending(kuf, f, 4), 1);
	CHECK("owed: this one", n == 1 && f[0].gpa == gpa);
	CHECK_KUF("owed: not quiet", kuf_kvm_quiesce(kuf, 50), -ETIMEDOUT);
	f[0].len = PAGE;
	f[0].place = host(&vm, gpa);
	resolve(&f[0], BY_PLACE);
	CHECK("owed: all go on", worker_join(&w[0]) == KVM_EXIT_HLT &&
	      worker_join(&w[1]) == KVM_EXIT_HLT && worker_join(&w[2]) == KVM_EXIT_HLT);
	CHECK("owed: bytes", has_content(w[0].out, gpa, 16, 0) &&
	      guest_rax(&vm, 1) == content64(gpa + 8, 0) && has_content(w[2].out, gpa + 32, 16, 0));
	CHECK_KUF("owed: quiet", kuf_kvm_quiesce(kuf, 10000), 0);

	/* Resolving again must leave present pages as they are, with the guest's writes. */
	*host(&vm, gpa) = 0x99;
	static uint8_t junk[PAGE];
	memset(junk, 0xbb, PAGE);
	CHECK_KUF("owed: resolving twice", kuf_resolve(kuf, gpa, junk, PAGE, 0), 0);
	CHECK_KUF("owed: zero, later", kuf_resolve(kuf, gpa, NULL, PAGE, KUF_RESOLVE_ZERO), 0);
	CHECK("owed: changes nothing", *host(&vm, gpa) == 0x99 &&
	      has_content(host(&vm, gpa + 1), gpa + 1, PAGE - 1, 0));

	/* The caller poisons the page. */
	gpa += PAGE;
	set_guest(&vm, 0, guest_outsb, gpa, 16, 0);
	worker_start(&w[0], &vm, kuf, 0);
	set_guest(&vm, 1, guest_read, gpa, 0, 0);
	worker_start(&w[1], &vm, kuf, 1);
	CHECK_KUF("given up: it comes", kuf_poll(kuf, 20000), 1);
	CHECK_KUF("given up: it is read", kuf_read(kuf, f, 4), 1);
	CHECK("given up: KVM waits", sleeps_in_kvm(&w[0]));
	CHECK_KUF("given up: poison", kuf_resolve(kuf, gpa, NULL, PAGE, KUF_RESOLVE_POISON), PAGE);
	CHECK_EQ("given up: the vCPU", worker_join(&w[1]), -EHWPOISON);
	CHECK("given up: parked", wait_for_event(&source, KUF_KVM_EVENT_PARKED, 1));
	CHECK_KUF("given up: discard", kuf_discard(kuf, gpa, PAGE, KUF_DISCARD_REFILL), 0);
	CHECK_KUF("given up: requested again for the parked access", kuf_poll(kuf, 20000), 1);
	CHECK_KUF("given up: it is read", kuf_read(kuf, f, 4), 1);
	CHECK("given up: still KVM's", f[0].gpa == gpa && f[0].flags & KUF_KVM_FAULT);
	resolve(&f[0], BY_PLACE);
	CHECK_EQ("given up: goes on", worker_join(&w[0]), KVM_EXIT_HLT);
	CHECK("given up: with the right bytes", has_content(w[0].out, gpa, 16, 0));

	/* Resolved before any fault: a run of pages in pieces. */
	static uint8_t run[16 * PAGE];
	gpa = TEST_GPA + 64 * PAGE;
	put_content(run, gpa, sizeof(run), 0);
	CHECK_KUF("unasked: part", kuf_resolve(kuf, gpa + 4 * PAGE, run + 4 * PAGE, 4 * PAGE, 0),
		  4 * PAGE);
	CHECK_KUF("unasked: all", kuf_resolve(kuf, gpa, run, sizeof(run), 0), 12 * PAGE);
	set_guest(&vm, 0, guest_read, gpa + 5 * PAGE, 0, 0);
	CHECK("unasked: there without an exit", halts(&vm, 0) &&
	      guest_rax(&vm, 0) == content64(gpa + 5 * PAGE, 0));
	CHECK("unasked: bytes", has_content(host(&vm, gpa), gpa, sizeof(run), 0));

	/* A removed page is not the caller's to fill. */
	CHECK_KUF("removed: discard", kuf_discard(kuf, gpa, PAGE, KUF_DISCARD_ZERO), 0);
	CHECK_KUF("removed: kuf_resolve", kuf_resolve(kuf, gpa, run, PAGE, 0), 0);
	uint8_t out[16];
	CHECK("removed: KVM reads zero without the host", kvm_reads(&vm, kuf, 0, gpa, out) &&
	      is_zero(out, 16));
	CHECK_KUF("removed: nothing was asked", kuf_poll(kuf, 0), 0);
	close_kuf(kuf, KUF_END_POISON);
	vm_destroy(&vm);
}

/* ---- a callback that defers ---- */

static struct kuf_fill deferred[PAGES];
static _Atomic int nr_deferred;

static int defer(void *opaque, struct kuf_fill *f)
{
	int n;

	(void)opaque;
	if (!(f->flags & KUF_RUN_IN_PLACE))
		no_place++;
	n = nr_deferred;
	deferred[n] = *f;
	nr_deferred = n + 1;
	return KUF_FILL_DEFERRED;
}

static void deferring(void)
{
	struct worker w[4];
	uint64_t gpa = TEST_GPA + 20 * PAGE;

	doing("defer", 60);
	vm_create(&vm, PAGES * PAGE, 4);
	source_init(&source, TEST_GPA);
	no_place = 0;
	kuf = open_options(&vm, (struct kuf_options){ .fill = defer, .event = source_event,
			   .opaque = &source, .fill_threads = 1 });
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
	for (int i = 0; i < 4; i++) {
		set_guest(&vm, i, i % 2 ? guest_outsb : guest_read, gpa + (uint64_t)i * 8 * PAGE, 16, 0);
		worker_start(&w[i], &vm, kuf, i);
		CHECK("defer: asked for", COMES_TRUE(nr_deferred == i + 1));
	}
	CHECK_EQ("defer: in place", no_place, 0);
	CHECK_EQ("defer: pending", kuf_pending(kuf, NULL, 0), 4);
	CHECK("defer: KVM waits", sleeps_in_kvm(&w[1]) && sleeps_in_kvm(&w[3]));
	CHECK_EQ("defer: no vCPU has continued", w[0].done + w[2].done, 0);
	/* Resolve the last one first, with the bytes in the page long before that. */
	for (int i = 3; i >= 0; i--) {
		put_content(deferred[i].buf, deferred[i].gpa, deferred[i].len, 0);
		sleep_ms(20);
		CHECK_EQ("defer: bytes alone do not release a vCPU", w[i].done, 0);
		CHECK_KUF("defer: published",
			  kuf_resolve(kuf, deferred[i].gpa, NULL, deferred[i].len,
				      KUF_RESOLVE_IN_PLACE), (long)deferred[i].len);
		CHECK_EQ("defer: goes on", worker_join(&w[i]), KVM_EXIT_HLT);
	}
	CHECK("defer: bytes", guest_rax(&vm, 0) == content64(gpa, 0) &&
	      has_content(w[1].out, gpa + 8 * PAGE, 16, 0) &&
	      guest_rax(&vm, 2) == content64(gpa + 16 * PAGE, 0) &&
	      has_content(w[3].out, gpa + 24 * PAGE, 16, 0));

	/* Discarded meanwhile: the old answer is stale. */
	int n = nr_deferred;
	gpa = TEST_GPA + 100 * PAGE;
	set_guest(&vm, 0, guest_outsb, gpa, 16, 0);
	worker_start(&w[0], &vm, kuf, 0);
	CHECK("defer: asked for again", COMES_TRUE(nr_deferred == n + 1));
	put_content(deferred[n].buf, gpa, PAGE, 66);
	CHECK_KUF("defer: removed meanwhile", kuf_discard(kuf, gpa, PAGE, KUF_DISCARD_ZERO), 0);
	kuf_resolve(kuf, gpa, NULL, PAGE, KUF_RESOLVE_IN_PLACE);
	CHECK_EQ("defer: KVM goes on", worker_join(&w[0]), KVM_EXIT_HLT);
	CHECK("defer: with zeroes", w[0].out_len == 16 && is_zero(w[0].out, 16));
	close_kuf(kuf, KUF_END_POISON);
	vm_destroy(&vm);
}

int main(void)
{
	run_loop("driven, by copy", 0, BY_COPY);
	run_loop("driven, in place", 0, BY_PLACE);
	run_loop("driven, zero", 0, BY_ZERO);
	run_loop("direct, by copy", KUF_OPEN_DIRECT, BY_COPY);
	run_loop("direct, in place", KUF_OPEN_DIRECT, BY_PLACE);
	run_loop("direct and drain", KUF_OPEN_DIRECT | KUF_KVM_OPEN_DRAIN, BY_PLACE);
	owed();
	deferring();
	many_at_once("many at once", 0);
	many_at_once("many at once, direct", KUF_OPEN_DIRECT);
	return finish();
}
