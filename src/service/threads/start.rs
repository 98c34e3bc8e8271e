//! Starts and ends the service threads.

use crate::abi::KUF_LOG_INFO;
use crate::alloc::{refusable, try_box, NoMemory};
use crate::error::{last_text, words, Error, Result};
use crate::os::cpus::Cpus;
use crate::os::worker::{Name, Worker};
use crate::panics::quietly;
use crate::service::background::populate;
use crate::service::config::Which;
use crate::service::threads::serve;
use crate::service::threads::serve::serve_loop;
use crate::service::Service;
use crate::sync::atomic::Ordering;
use crate::sync::time::Duration;
use crate::sync::{lock, thread, wait, Arc, Condvar, Mutex};

/// The number of threads that were started and have not called [`begins`] yet.
#[derive(Default)]
pub struct Beginning {
    threads: Mutex<usize>,
    changed: Condvar,
}

impl Beginning {
    fn change(&self, to: impl FnOnce(usize) -> usize) {
        let mut threads = lock(&self.threads);
        *threads = to(*threads);
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut threads = lock(&self.threads);
        while *threads > 0 {
            threads = wait(&self.changed, threads);
        }
    }
}

/// Starts the service threads and the populate thread.
pub fn start_threads(service: &Arc<Service>) -> Result<()> {
    if service.config.direct {
        return service.threads.waking.watch_level(service.ready.fd());
    }
    for n in 0..service.config.service_threads() {
        spawn(service, Name::new(format_args!("kuf-serve-{n}")), serve_loop)?;
    }
    decide_on_spinning(service);
    // The populate thread also does slow work that is not demand and must not delay it.
    if service.serviced() || matches!(service.config.mechanism, Which::KvmBitmap(_)) {
        spawn(service, Name::new(format_args!("kuf-populate")), populate::populate_loop)?;
    }
    wait_for_threads(service);
    Ok(())
}

/// Computed once at start: available_parallelism reads /proc, which seccomp may forbid later.
fn decide_on_spinning(service: &Service) {
    if service.config.spin.is_zero() {
        return;
    }
    // Look at all threads: vCPU threads may be pinned to other CPUs than this thread and those it has started.
    let several = Cpus::of_this_process().count() > 1;
    // If this thread may use several CPUs, an answer of one comes from the cgroup's quota.
    let quota = Cpus::of_this_thread().is_some_and(|here| here.count() > 1)
        && thread::available_parallelism().is_ok_and(|n| n.get() == 1);
    if several && !quota {
        service.threads.may_spin.store(true, Ordering::Relaxed);
    } else {
        service.config.callbacks.log(KUF_LOG_INFO, || "spin_us has no effect: all threads share one CPU".into());
    }
}

/// Restricts a new thread to the CPUs that the caller chose.
pub fn keep_on_cpus(service: &Service, thread: &Worker) -> Result<()> {
    service.config.cpus.as_ref().map_or(Ok(()), |cpus| cpus.keep(thread, "options->cpus"))
}

fn spawn(service: &Arc<Service>, name: Name, body: impl FnOnce(&Arc<Service>) + Send + 'static) -> Result<()> {
    let held = service.clone();
    let guarded = move || {
        let service = &held;
        let run = || {
            begins(service);
            service.stats.enlist();
            body(service);
        };
        if let Err(what) = quietly(run) {
            let _ = quietly(|| service.fail(&words!("a service thread panicked: {what}")));
        }
    };
    refusable(|| lock(&service.threads.started).try_reserve(1)).map_err(NoMemory::from)?;
    let thread = start(service, name, guarded)?;
    let placed = keep_on_cpus(service, &thread);
    lock(&service.threads.started).push(thread);
    placed
}

/// Starts a thread that takes no signals of the caller, for it inherits the mask. The thread calls [`begins`] first.
pub fn start(service: &Service, name: Name, body: impl FnOnce() + Send + 'static) -> Result<Worker> {
    service.threads.beginning.change(|threads| threads + 1);
    with_signals_blocked(|| Worker::start(name, body)).map_err(|errno| {
        service.threads.beginning.change(|threads| threads - 1);
        Error::system("starting a service thread", errno)
    })
}

/// Makes the allocations of a new thread (its thread-local data and its malloc arena), and counts it as begun.
pub fn begins(service: &Service) {
    let _ = last_text();
    drop(try_box(0_u64));
    service.threads.beginning.change(|threads| threads - 1);
}

/// Returns when every thread has begun: from then on none of them needs an allocation that cannot fail.
pub fn wait_for_threads(service: &Service) {
    service.threads.beginning.wait();
}

/// Tells the threads to end, and waits for them unless `nowait`.
pub fn stop_threads(service: &Service, nowait: bool) {
    service.life.close();
    service.wake_all();
    if nowait {
        return lock(&service.threads.started).clear();
    }
    let last_has_ended = || lock(&service.threads.started).last_mut().map(Worker::has_ended);
    while let Some(ended) = last_has_ended() {
        if ended {
            lock(&service.threads.started).pop();
            continue;
        }
        // The thread may be in a callback that waits for a thread of the caller, which in turn waits for its event to be read.
        serve::serve_at_the_end(service);
        thread::sleep(Duration::from_micros(200));
    }
}

/// Runs `body` with all signals blocked. A new thread inherits the mask, so the library's threads take no signals of
/// the caller.
pub fn with_signals_blocked<T>(body: impl FnOnce() -> T) -> T {
    let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the calls fill both sets; the mask is this thread's own and is restored below.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
    }
    let result = body();
    // SAFETY: `before` was filled above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    result
}
