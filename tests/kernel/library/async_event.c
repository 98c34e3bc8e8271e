/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Another thread reads the eventfd that KVM signals, and so takes the library's signals. */
#include "async.h"

static struct vm vm;
static struct source source;
static struct kuf *kuf;
static struct eventfds events;
static _Atomic bool stop;
static _Atomic uint64_t stolen;

/* The thief reads first, because it never sleeps, while the library's thread has to wake. */
static void *thief(void *arg)
{
	struct sched_param p = { .sched_priority = 10 };

	(void)arg;
	/* With a real-time priority, if allowed, it takes all signals. */
	pthread_setschedparam(pthread_self(), SCHED_FIFO, &p);
	while (!stop) {
		struct pollfd fds[64];

		for (int i = 0; i < events.nr; i++)
			fds[i] = (struct pollfd){ .fd = events.fd[i], .events = POLLIN };
		if (poll(fds, (nfds_t)events.nr, 10) <= 0)
			continue;
		for (int i = 0; i < events.nr; i++) {
			uint64_t n;

			if (fds[i].revents & POLLIN && read(events.fd[i], &n, sizeof(n)) == 8)
				stolen += n;
		}
	}
	return NULL;
}

static void open_it(uint32_t flags)
{
	vm_create(&vm, 64 * PAGE, 4);
	source_init(&source, TEST_GPA);
	events = eventfds_but(NULL);
	kuf = open_serviced(&vm, &source, flags);
	events = eventfds_but(&events);
	add_slot(kuf, TEST_GPA, vm.mem, vm.size);
}

/* With KUF_KVM_OPEN_DRAIN the library finds a fault whose signal was stolen. */
static void drained(void)
{
	struct worker w[4];
	struct kuf_stats_info st;
	pthread_t t;
	double started, slowest = 0;
	uint64_t before;
	uint8_t out[16];

	doing("drain", 30);
	open_it(KUF_KVM_OPEN_DRAIN);
	CHECK("drain: nothing amiss", kvm_reads(&vm, kuf, 0, TEST_GPA, out) &&
	      has_content(out, TEST_GPA, 16, 0));
	sleep_ms(1200);
	CHECK_EQ("drain: nothing is reported", source.events[KUF_KVM_EVENT_UNSIGNALLED], 0);
	CHECK_EQ("drain: nothing is counted", stats_of(kuf).faults_unsignalled, 0);

	stop = false;
	stolen = 0;
	pthread_create(&t, NULL, thief, NULL);
	for (int round = 1; round <= 4; round++) {
		uint64_t gpa = TEST_GPA + round * 4 * PAGE + 64;
		bool good = true;

		started = now_s();
		for (int i = 0; i < 4; i++) {
			set_guest(&vm, i, guest_outsb, gpa + i * PAGE, 16, 0);
			worker_start(&w[i], &vm, kuf, i);
		}
		for (int i = 0; i < 4; i++)
			good = worker_join(&w[i]) == KVM_EXIT_HLT && w[i].out_len == 16 &&
			       has_content(w[i].out, gpa + i * PAGE, 16, 0) && good;
		CHECK("drain: served all the same", good);
		if (now_s() - started > slowest)
			slowest = now_s() - started;
	}
	dprintf(1, "# slowest after %.2f s, %" PRIu64 " signals stolen\n", slowest, stolen);
	CHECK("drain: some were stolen", stolen > 0);
	/* The library looks twice a second; the emulated machine is slow and shared. */
	CHECK("drain: soon", slowest < 3);
	stop = true;
	pthread_join(t, NULL);
	CHECK("drain: told", wait_for_event(&source, KUF_KVM_EVENT_UNSIGNALLED, 1));
	st = stats_of(kuf);
	CHECK("drain: counted", st.faults_unsignalled > 0 && st.faults_unsignalled <= stolen);
	CHECK_EQ("drain: told once", source.events[KUF_KVM_EVENT_UNSIGNALLED], 1);
	CHECK_EQ("drain: nothing is unknown", st.faults_unknown, 0);

	/* Without the thief, faults are served at once again. */
	before = st.faults_unsignalled;
	sleep_ms(600);
	before = stats_of(kuf).faults_unsignalled;
	started = now_s();
	bool good = true;
	for (int i = 0; i < 8; i++)
		good = kvm_reads(&vm, kuf, 0, TEST_GPA + (32 + i) * PAGE, out) &&
		       has_content(out, TEST_GPA + (32 + i) * PAGE, 16, 0) && good;
	CHECK("drain: served afterwards", good);
	CHECK("drain: by signals", now_s() - started < 1.5);
	sleep_ms(1200);
	CHECK_EQ("drain: none of these was without", stats_of(kuf).faults_unsignalled, before);
	close_kuf(kuf, KUF_END_POISON);
	vm_destroy(&vm);
}

/* Without KUF_KVM_OPEN_DRAIN the access waits until its page is filled in another way; all else works. */
static void not_drained(void)
{
	struct worker w, last;
	uint8_t out[16];
	uint64_t gpa = TEST_GPA + 3 * PAGE, n;
	pthread_t t;

	doing("no drain", 30);
	open_it(0);
	stop = false;
	stolen = 0;
	pthread_create(&t, NULL, thief, NULL);
	/* Repeat until the thief is first. */
	for (int i = 0; i < 50; i++, gpa += PAGE) {
		set_guest(&vm, 0, guest_outsb, gpa, 16, 0);
		worker_start(&w, &vm, kuf, 0);
		for (int ms = 0; ms < 300 && !w.done; ms++)
			sleep_ms(1);
		if (!w.done)
			break;
		if (worker_join(&w) != KVM_EXIT_HLT || !has_content(w.out, gpa, 16, 0))
			DIE("wrong end");
	}
	stop = true;
	pthread_join(t, NULL);
	if (w.done)
		DIE("nothing could be stolen");
	CHECK("no drain: a fault is lost", sleeps_in_kvm(&w) && stolen > 0);
	CHECK_EQ("no drain: its page was not requested", fills_of(&source, gpa), 0);
	CHECK("no drain: vCPUs are served",
	      guest_reads(&vm, kuf, 1, gpa + PAGE, content64(gpa + PAGE, 0)));
	/*
	 * One more signal makes the library read one entry, the oldest.  A signal does
	 * not name its entry, so that the newest one stays.
	 */
	set_guest(&vm, 2, guest_outsb, gpa + 2 * PAGE, 16, 0);
	worker_start(&last, &vm, kuf, 2);
	CHECK_EQ("no drain: the next signal lets the first one go on", worker_join(&w), KVM_EXIT_HLT);
	CHECK("no drain: with its bytes", has_content(w.out, gpa, 16, 0));
	CHECK("no drain: and the next one is left", sleeps_in_kvm(&last));
	CHECK_KUF("no drain: its page comes in another way",
		  kuf_ensure(kuf, gpa + 2 * PAGE, PAGE, -1), 0);
	CHECK_EQ("no drain: then it goes on", worker_join(&last), KVM_EXIT_HLT);
	CHECK("no drain: with its bytes, too", has_content(last.out, gpa + 2 * PAGE, 16, 0));

	/* A foreign signal without a fault must do no harm. */
	n = 5;
	for (int i = 0; i < events.nr; i++)
		MUST(write(events.fd[i], &n, sizeof(n)));
	sleep_ms(50);
	CHECK("no drain: signals without a fault do no harm",
	      kvm_reads(&vm, kuf, 3, TEST_GPA + 60 * PAGE, out) &&
	      has_content(out, TEST_GPA + 60 * PAGE, 16, 0));
	CHECK_EQ("no drain: nothing was lost by reading", stats_of(kuf).faults_lost, 0);
	CHECK_EQ("no drain: not reported", source.events[KUF_KVM_EVENT_UNSIGNALLED], 0);
	CHECK_EQ("no drain: not dead", source.events[KUF_EVENT_FATAL], 0);
	close_kuf(kuf, KUF_END_POPULATE);
	CHECK("no drain: all is there", has_content(vm.mem, TEST_GPA, vm.size, 0));
	vm_destroy(&vm);
}

int main(void)
{
	drained();
	not_drained();
	return finish();
}
