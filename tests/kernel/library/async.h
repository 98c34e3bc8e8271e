/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Common code of the tests of KUF_MECHANISM_KVM_ASYNC: the virtual machine of the
 * kernel's selftests with its memory served by the library, a source that counts
 * fills, and vCPUs on threads that pass their exits to kuf_vcpu_fault.
 *
 * The bytes of a page are a pattern of its guest physical address and a generation,
 * so that checks detect misplaced, stale and half-filled pages.  Generation 0 is
 * pattern() of test.h.
 */
#ifndef KUF_ASYNC_H
#define KUF_ASYNC_H

#include "../selftests/test.h"

#include <dirent.h>
#include <setjmp.h>
#include <linux/memfd.h>

#include <kuf-kvm.h>

#define MAX_PAGES 16384
#define NO_GPA UINT64_MAX

static UNUSED uint8_t content(uint64_t gpa, uint64_t generation)
{
	return pattern(gpa + (generation << 40));
}

static UNUSED void put_content(void *to, uint64_t gpa, size_t n, uint64_t generation)
{
	for (size_t i = 0; i < n; i++)
		((uint8_t *)to)[i] = content(gpa + i, generation);
}

static UNUSED bool has_content(const void *p, uint64_t gpa, size_t n, uint64_t generation)
{
	for (size_t i = 0; i < n; i++)
		if (((const uint8_t *)p)[i] != content(gpa + i, generation))
			return false;
	return true;
}

static UNUSED uint64_t content64(uint64_t gpa, uint64_t generation)
{
	uint64_t v;

	put_content(&v, gpa, sizeof(v), generation);
	return v;
}

static UNUSED bool is_zero(const void *p, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (((const uint8_t *)p)[i])
			return false;
	return true;
}

static sigjmp_buf touched;

static UNUSED void on_touch(int sig)
{
	siglongjmp(touched, sig);
}

/* Reads a byte.  Returns 0 or the signal raised.  Only one thread at a time may call it. */
static UNUSED int touch(const void *p)
{
	struct sigaction sa = { .sa_handler = on_touch }, bus, segv;
	int sig;

	sigaction(SIGBUS, &sa, &bus);
	sigaction(SIGSEGV, &sa, &segv);
	sig = sigsetjmp(touched, 1);
	if (!sig)
		(void)*(const volatile uint8_t *)p;
	sigaction(SIGBUS, &bus, NULL);
	sigaction(SIGSEGV, &segv, NULL);
	return sig;
}

/* ---- the source of pages ---- */

struct source {
	/* The address of the first counted page, and the number of fills of each page. */
	uint64_t base;
	_Atomic unsigned int fills[MAX_PAGES];
	_Atomic unsigned int calls, flags_seen, not_in_place;
	_Atomic uint64_t generation;
	/* Bytes to use instead of the pattern, from base on. */
	const uint8_t *image;
	/* The result of all fills, if not 0, or only of those that contain the page @bad. */
	_Atomic int answer;
	_Atomic uint64_t bad;
	_Atomic int bad_answer;
	/* A failing fill overwrites its buffer first. */
	_Atomic bool smear;
	/* While set, fills wait in the callback: all of them, or those of one page. */
	_Atomic bool hold;
	_Atomic uint64_t hold_gpa;
	_Atomic int inside;
	_Atomic unsigned int delay_us;
	/* The order of the requested pages. */
	uint64_t order[MAX_PAGES];
	_Atomic size_t nr_order;
	/* For each KUF_EVENT_*: the number of events, and the last one. */
	_Atomic int events[64];
	struct kuf_event last[64];
	pthread_mutex_t lock;
	_Atomic int released;
};

static UNUSED void source_init(struct source *s, uint64_t base)
{
	memset(s, 0, sizeof(*s));
	s->base = base;
	s->bad = NO_GPA;
	s->hold_gpa = NO_GPA;
	pthread_mutex_init(&s->lock, NULL);
}

static UNUSED int source_fill(void *opaque, struct kuf_fill *f)
{
	struct source *s = opaque;
	int answer = s->answer;
	uint64_t bad = s->bad;

	s->inside++;
	s->calls++;
	s->flags_seen |= f->flags;
	s->not_in_place += !(f->flags & KUF_RUN_IN_PLACE);
	for (uint64_t at = f->gpa; at < f->gpa + f->len; at += f->page_size) {
		size_t n = s->nr_order++;

		if (n < MAX_PAGES)
			s->order[n] = at;
		if (at >= s->base && (at - s->base) / f->page_size < MAX_PAGES)
			s->fills[(at - s->base) / f->page_size]++;
	}
	while (s->hold || (s->hold_gpa >= f->gpa && s->hold_gpa - f->gpa < f->len))
		sleep_ms(1);
	if (s->delay_us)
		usleep(s->delay_us);
	if (bad >= f->gpa && bad - f->gpa < f->len)
		answer = s->bad_answer;
	if (answer == KUF_FILL_ZERO || answer == KUF_FILL_DEFERRED) {
		/* nothing is written */
	} else if (answer) {
		if (s->smear)
			memset(f->buf, 0xee, f->len);
	} else if (s->image) {
		memcpy(f->buf, s->image + (f->gpa - s->base), f->len);
	} else {
		put_content(f->buf, f->gpa, f->len, s->generation);
	}
	s->inside--;
	return answer;
}

static UNUSED void source_event(void *opaque, const struct kuf_event *e)
{
	struct source *s = opaque;

	if (e->kind >= 64)
		return;
	pthread_mutex_lock(&s->lock);
	s->last[e->kind] = *e;
	s->last[e->kind].text = NULL;
	pthread_mutex_unlock(&s->lock);
	s->events[e->kind]++;
}

static UNUSED void source_release(void *opaque)
{
	((struct source *)opaque)->released++;
}

static UNUSED unsigned int fills_of(struct source *s, uint64_t gpa)
{
	return s->fills[(gpa - s->base) / PAGE];
}

static UNUSED bool wait_for_event(struct source *s, unsigned int kind, int times)
{
	for (int i = 0; i < 20000 && s->events[kind] < times; i++)
		sleep_ms(1);
	return s->events[kind] >= times;
}

/* ---- handles ---- */

static UNUSED int try_open(struct vm *vm, struct source *s, uint32_t flags, struct kuf **kuf)
{
	struct kuf_options o = {
		.size = sizeof(o),
		.mechanism = KUF_MECHANISM_KVM_ASYNC,
		.flags = flags | (s || flags & KUF_OPEN_DIRECT ? 0 : KUF_OPEN_CALLER_DRIVEN),
		.vm_fd = vm->fd,
		.fill = s ? source_fill : NULL,
		.event = s ? source_event : NULL,
		.release = s ? source_release : NULL,
		.opaque = s,
	};

	return kuf_open(&o, kuf);
}

static UNUSED struct kuf *open_options(struct vm *vm, struct kuf_options o)
{
	struct kuf *kuf = NULL;

	o.size = sizeof(o);
	o.mechanism = KUF_MECHANISM_KVM_ASYNC;
	o.vm_fd = vm->fd;
	if (!o.fill && !(o.flags & KUF_OPEN_DIRECT))
		o.flags |= KUF_OPEN_CALLER_DRIVEN;
	if (kuf_open(&o, &kuf))
		DIE("kuf_open: %s", kuf_error());
	return kuf;
}

/*
 * Fills one page at a time, so that tests know which pages are requested; otherwise
 * readahead answers sequential faults by longer and longer runs.
 */
static UNUSED struct kuf *open_serviced(struct vm *vm, struct source *s, uint32_t flags)
{
	return open_options(vm, (struct kuf_options){ .flags = flags, .fill = source_fill,
			    .event = source_event, .release = source_release, .opaque = s,
			    .demand_run = PAGE });
}

/* The test reads the faults itself; @s, which may be NULL, gets the events. */
static UNUSED struct kuf *open_driven(struct vm *vm, struct source *s, uint32_t flags)
{
	return open_options(vm, (struct kuf_options){ .flags = flags,
			    .event = s ? source_event : NULL,
			    .release = s ? source_release : NULL, .opaque = s });
}

static UNUSED void add_slot(struct kuf *kuf, uint64_t gpa, const void *mem, uint64_t len)
{
	struct kuf_memory m = { .size = sizeof(m), .gpa = gpa, .len = len, .hva = (uintptr_t)mem };

	if (kuf_add_memory(kuf, &m))
		DIE("kuf_add_memory: %s", kuf_error());
}

static UNUSED void close_kuf(struct kuf *kuf, uint32_t flags)
{
	if (kuf_close(&kuf, flags))
		DIE("kuf_close: %s", kuf_error());
}

/*
 * Checks the result of a call that returns 0 or -errno and sets kuf_error.
 */
#define CHECK_KUF(name, call, want)                                                   \
	do {                                                                          \
		long r_ = (call);                                                     \
		report(r_ == (want), name, "line %d: %ld (%s), not %ld", __LINE__, r_, \
		       r_ < 0 ? kuf_error() : "-", (long)(want));                     \
	} while (0)

/* Checks that a call fails with @want and that its error text contains @word. */
#define CHECK_REFUSED(name, call, want, word)                                         \
	do {                                                                          \
		long r_ = (call);                                                     \
		const char *text_ = kuf_error();                                      \
		report(r_ == (want) && strstr(text_, word), name,                     \
		       "line %d: %ld \"%s\", not %ld with \"%s\"", __LINE__, r_, text_, \
		       (long)(want), word);                                           \
	} while (0)

static UNUSED struct kuf_progress_info progress_of(struct kuf *kuf, uint64_t gpa)
{
	struct kuf_progress_info p = { .size = sizeof(p) };

	if (kuf_progress(kuf, gpa, &p))
		DIE("kuf_progress: %s", kuf_error());
	return p;
}

static UNUSED struct kuf_stats_info stats_of(struct kuf *kuf)
{
	static _Thread_local struct kuf_stats_info st;

	memset(&st, 0, sizeof(st));
	st.size = sizeof(st);
	if (kuf_stats(kuf, &st))
		DIE("kuf_stats: %s", kuf_error());
	return st;
}

/* Waits for a long time until another thread makes @condition true. */
#define COMES_TRUE(condition)                                         \
	({                                                            \
		bool true_ = (condition);                             \
		for (int i_ = 0; i_ < 20000 && !true_; i_++) {        \
			sleep_ms(1);                                  \
			true_ = (condition);                          \
		}                                                     \
		true_;                                                \
	})

/* ---- the library's eventfds ---- */

/*
 * All eventfds of the process except semaphores.  The one that KVM signals is among
 * those that kuf_open adds, and with a fill callback the only one whose counter
 * changes.
 */
struct eventfds {
	int fd[64];
	int nr;
};

/* Returns the counter of an eventfd, or -1 for any other descriptor. */
static UNUSED int64_t eventfd_count(int fd)
{
	char path[64], buf[512], *p;
	ssize_t n;
	int info;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	info = open(path, O_RDONLY);
	if (info < 0)
		return -1;
	n = read(info, buf, sizeof(buf) - 1);
	close(info);
	buf[n > 0 ? n : 0] = 0;
	p = strstr(buf, "eventfd-semaphore:");
	if (p && atoi(p + 18))
		return -1;
	p = strstr(buf, "eventfd-count:");
	return p ? strtoll(p + 14, NULL, 16) : -1;
}

static UNUSED struct eventfds eventfds_but(const struct eventfds *known)
{
	struct eventfds all = { .nr = 0 };
	DIR *dir = opendir("/proc/self/fd");

	for (struct dirent *e; dir && (e = readdir(dir));) {
		int fd = atoi(e->d_name);
		bool is_known = false;

		if (e->d_name[0] == '.' || eventfd_count(fd) < 0)
			continue;
		for (int i = 0; known && i < known->nr; i++)
			is_known = is_known || known->fd[i] == fd;
		if (!is_known && all.nr < 64)
			all.fd[all.nr++] = fd;
	}
	if (dir)
		closedir(dir);
	return all;
}

static UNUSED uint64_t sum_of(const struct eventfds *e)
{
	uint64_t sum = 0;

	for (int i = 0; i < e->nr; i++)
		sum += (uint64_t)eventfd_count(e->fd[i]);
	return sum;
}

/* ---- vCPUs ---- */

/* Further routines of a test, in low memory. */
#define MORE_CODE_GPA 0x40000UL

struct worker {
	struct vm *vm;
	struct kuf *kuf;
	int cpu;
	pthread_t thread;
	_Atomic pid_t tid;
	_Atomic bool done;
	int result;		/* KVM_EXIT_HLT if all went well */
	_Atomic int refused;	/* the error of kuf_vcpu_fault, or 0 */
	_Atomic unsigned int exits;	/* passed to kuf_vcpu_fault */
	uint64_t last_gpa;
	uint8_t out[256];	/* the guest's output */
	_Atomic size_t out_len;
	uint8_t in;		/* the guest's input, also for MMIO reads */
	_Atomic unsigned int mmio;
};

/* Runs the vCPU until it halts or has an unexpected exit. */
static void *worker_main(void *arg)
{
	struct worker *w = arg;
	struct kvm_run *run = w->vm->run[w->cpu];

	w->tid = (pid_t)syscall(SYS_gettid);
	for (;;) {
		w->result = run_vcpu(w->vm, w->cpu);
		if (w->result == UF_EXIT_MEMORY_FAULT) {
			struct uf_exit_memory_fault f = memory_fault(w->vm, w->cpu);
			int r;

			w->exits++;
			w->last_gpa = f.gpa;
			r = kuf_vcpu_fault(w->kuf, f.gpa, f.size, f.flags);
			if (r) {
				w->refused = r;
				break;
			}
		} else if (w->result == KVM_EXIT_IO) {
			uint8_t *data = (uint8_t *)run + run->io.data_offset;
			size_t n = (size_t)run->io.size * run->io.count;

			for (size_t i = 0; i < n; i++) {
				if (run->io.direction == KVM_EXIT_IO_IN)
					data[i] = w->in;
				else if (w->out_len < sizeof(w->out))
					w->out[w->out_len++] = data[i];
			}
		} else if (w->result == KVM_EXIT_MMIO && run->mmio.phys_addr >= TEST_GPA &&
			   run->mmio.phys_addr < TEST_GPA + w->vm->size) {
			/*
			 * KVM treats memory that it cannot access as a device.  An answer
			 * would invent the page's bytes.
			 */
			break;
		} else if (w->result == KVM_EXIT_MMIO) {
			w->mmio++;
			if (!run->mmio.is_write) {
				memset(run->mmio.data, w->in, run->mmio.len);
				continue;
			}
			for (size_t i = 0; i < run->mmio.len && w->out_len < sizeof(w->out); i++)
				w->out[w->out_len++] = run->mmio.data[i];
		} else {
			break;
		}
	}
	w->done = true;
	return NULL;
}

static UNUSED void worker_init(struct worker *w, struct vm *vm, struct kuf *kuf, int cpu)
{
	memset(w, 0, sizeof(*w));
	w->vm = vm;
	w->kuf = kuf;
	w->cpu = cpu;
}

static UNUSED void worker_go(struct worker *w)
{
	w->done = false;
	w->refused = 0;
	w->out_len = 0;
	w->tid = 0;
	if (pthread_create(&w->thread, NULL, worker_main, w))
		DIE("pthread_create");
}

static UNUSED void worker_start(struct worker *w, struct vm *vm, struct kuf *kuf, int cpu)
{
	worker_init(w, vm, kuf, cpu);
	worker_go(w);
}

static UNUSED int worker_join(struct worker *w)
{
	pthread_join(w->thread, NULL);
	return w->refused ? w->refused : w->result;
}

/* Runs on the calling thread.  Returns the last exit reason or the error of kuf_vcpu_fault. */
static UNUSED int run_here(struct worker *w, struct vm *vm, struct kuf *kuf, int cpu)
{
	worker_init(w, vm, kuf, cpu);
	worker_main(w);
	return w->refused ? w->refused : w->result;
}

/* Whether a thread sleeps in a function of this name, according to the kernel. */
static UNUSED bool sleeps_in(pid_t tid, const char *name)
{
	char path[64], buf[128];
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/self/task/%d/wchan", tid);
	fd = open(path, O_RDONLY);
	if (fd < 0)
		return false;
	n = read(fd, buf, sizeof(buf) - 1);
	close(fd);
	buf[n > 0 ? n : 0] = 0;
	return strstr(buf, name);
}

/*
 * Whether the vCPU sleeps inside KVM and waits for a page.  The state alone is not
 * enough: a vCPU that has changed its thread waits for a grace period in the same
 * state.  The name is not always enough either, because the kernel guesses it from
 * the stack; then the sleep must be long.
 */
static UNUSED bool sleeps_in_kvm(struct worker *w)
{
	int asleep = 0;

	for (int i = 0; i < 20000 && !w->done; i++) {
		if (w->tid && thread_state(w->tid) == 'D') {
			if (sleeps_in(w->tid, "userfault") || ++asleep == 1000)
				return !w->done;
		} else {
			asleep = 0;
		}
		sleep_ms(1);
	}
	return false;
}

/* The guest reads 8 bytes on the calling thread. */
static UNUSED bool guest_reads(struct vm *vm, struct kuf *kuf, int cpu, uint64_t gpa,
			       uint64_t want)
{
	static _Thread_local struct worker w;
	int r;

	set_guest(vm, cpu, guest_read, gpa, 0, 0);
	r = run_here(&w, vm, kuf, cpu);
	if (r == KVM_EXIT_HLT && guest_rax(vm, cpu) == want)
		return true;
	dprintf(1, "# read at %#" PRIx64 ": %d, %#" PRIx64 " instead of %#" PRIx64 "\n", gpa, r,
		guest_rax(vm, cpu), want);
	return false;
}

/* KVM reads 16 bytes for the guest. */
static UNUSED bool kvm_reads(struct vm *vm, struct kuf *kuf, int cpu, uint64_t gpa, uint8_t *bytes)
{
	static _Thread_local struct worker w;
	int r;

	set_guest(vm, cpu, guest_outsb, gpa, 16, 0);
	r = run_here(&w, vm, kuf, cpu);
	if (r != KVM_EXIT_HLT || w.out_len != 16) {
		dprintf(1, "# rep outsb at %#" PRIx64 ": %d, %zu bytes\n", gpa, r,
			(size_t)w.out_len);
		return false;
	}
	memcpy(bytes, w.out, 16);
	return true;
}

#endif
