//! The options of a handle.

use crate::abi::*;
use crate::api::checks::{in_range, invalid};
use crate::caller::{Event, Fill, Filled, LogLevel, OnEvent, OnLog, Run};
use crate::error::Result;
use crate::os::cpus::Cpus;
use crate::os::environment;

use crate::service::config::{Callbacks, Config, Which, POPULATE_INFLIGHT};
use crate::sync::time::Duration;
use crate::sync::Arc;

/// The default of kuf_options.end_timeout_ms.
const END_TIMEOUT_MS: u64 = 30_000;

/// The options of a handle. The constructor decides how its pages are filled.
///
/// [`Kuf::open`](crate::Kuf::open) checks the values: it fails with EINVAL if one is out of its range or contradicts
/// another.
///
/// ```no_run
/// use std::os::unix::fs::FileExt;
/// use kuf::{Filled, Kuf, Options, Run};
///
/// let image = std::fs::File::open("memory.img")?;
/// let options = Options::serviced(move |run: &mut Run<'_>| {
///     let offset = run.memory_offset();
///     Filled::from(image.read_exact_at(run.buf(), offset))
/// });
/// let kuf = Kuf::open(options.fill_threads(4).on_event(|event| eprintln!("{}", event.text())))?;
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
pub struct Options {
    pub(crate) mode: Mode,
    pub(crate) event: Option<OnEvent>,
    pub(crate) log: Option<OnLog>,
    /// 0: none is passed on.
    pub(crate) log_level: u32,
    pub(crate) mechanism: Which,
    pub(crate) user_mode_only: bool,
    pub(crate) follow_fork: bool,
    pub(crate) adopt_only: bool,
    pub(crate) detect_zero: bool,
    pub(crate) debug_env: bool,
    // In each of these numbers 0 stands for the default.
    pub(crate) fill_threads: u64,
    pub(crate) demand_run: u64,
    pub(crate) populate_run: u64,
    pub(crate) userfaultfds: u64,
    pub(crate) spin_us: u64,
    /// u32::MAX: no limit.
    pub(crate) end_timeout_ms: u64,
    pub(crate) cpus: Option<Cpus>,
    /// The first value that cannot be used at all.
    pub(crate) wrong: Option<&'static str>,
}

/// How the pages of a handle are filled.
pub enum Mode {
    /// Service threads call this.
    Serviced(Arc<dyn Fill>),
    /// Service threads ask the source of each slot.
    Sources,
    /// The caller reads faults and resolves them. Threads of the library read the kernel.
    CallerDriven,
    /// The caller reads faults from the kernel itself.
    Direct,
}

impl Options {
    pub(crate) fn new(mode: Mode) -> Self {
        Self {
            mode,
            event: None,
            log: None,
            log_level: 0,
            mechanism: Which::Userfaultfd,
            user_mode_only: false,
            follow_fork: false,
            adopt_only: false,
            detect_zero: false,
            debug_env: false,
            fill_threads: 0,
            demand_run: 0,
            populate_run: 0,
            userfaultfds: 0,
            spin_us: 0,
            end_timeout_ms: 0,
            cpus: None,
            wrong: None,
        }
    }

    /// A serviced handle: threads of the library read faults, call `fill` and install the pages.
    pub fn serviced(fill: impl Fn(&mut Run<'_>) -> Filled + Send + Sync + 'static) -> Self {
        Self::serviced_by(fill)
    }

    /// As [`Options::serviced`], with an implementation of [`Fill`].
    pub fn serviced_by(fill: impl Fill + 'static) -> Self {
        Self::new(Mode::Serviced(Arc::new(fill)))
    }

    /// A serviced handle without a fill callback: every slot has a [`Source`](crate::Source).
    pub fn sources() -> Self {
        Self::new(Mode::Sources)
    }

    /// A caller-driven handle: the caller's own loop takes faults with [`Kuf::read`](crate::Kuf::read) and answers them
    /// with [`Kuf::resolve`](crate::Kuf::resolve).
    pub fn caller_driven() -> Self {
        Self::new(Mode::CallerDriven)
    }

    /// A caller-driven handle without a service thread: [`Kuf::read`](crate::Kuf::read) reads the kernel itself, which
    /// saves one wake-up of a thread for each fault. The caller reports memory that the guest gives back with
    /// [`Kuf::discard`](crate::Kuf::discard), and does not unmap or move guest memory before its slot is removed. Not
    /// with [`Kuf::populate`](crate::Kuf::populate), [`Kuf::replay`](crate::Kuf::replay), [`Options::follow_fork`] and
    /// [`Options::cpus`].
    pub fn direct() -> Self {
        Self::new(Mode::Direct)
    }

    /// The event callback: called for each event, on the thread that detected it. It may make the calls that a fill
    /// callback may make, and [`Slot::remove`](crate::Slot::remove). It should return soon, because the thread serves
    /// faults.
    pub fn on_event(mut self, event: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Self {
        self.event = Some(Box::new(event));
        self
    }

    /// The log callback: called for each log record of `level` and of the more urgent levels, on any thread. It must
    /// not call the library.
    pub fn on_log(mut self, level: LogLevel, log: impl Fn(LogLevel, &str) + Send + Sync + 'static) -> Self {
        self.log = Some(Box::new(log));
        self.log_level = level.number();
        self
    }

    /// The number of threads that fill demanded pages, and so of concurrent calls of the fill callback: 1 to 256, 2 by
    /// default. One more fills ahead of demand.
    pub fn fill_threads(mut self, threads: u32) -> Self {
        self.fill_threads = threads.into();
        self.never_0(threads.into(), "fill_threads is 0")
    }

    /// The most bytes that one fault fills, its own page included: up to 64 MiB, 2 MiB by default; rounded to whole
    /// pages, at least one.
    pub fn demand_run(mut self, bytes: u64) -> Self {
        self.demand_run = bytes;
        self.never_0(bytes, "demand_run is 0")
    }

    /// The longest run, in bytes, of a fill for which no thread is blocked: up to 64 MiB, 256 KiB by default; rounded
    /// to whole pages, at least one.
    pub fn populate_run(mut self, bytes: u64) -> Self {
        self.populate_run = bytes;
        self.never_0(bytes, "populate_run is 0")
    }

    /// How many userfaultfds share the guest memory, striped in chunks of 16 MiB or more: 1 to 64, 1 by default. With
    /// more than one, mremap(2) across the border of two chunks fails with EFAULT. Not with [`Options::adopt_only`].
    pub fn userfaultfds(mut self, number: u32) -> Self {
        self.userfaultfds = number.into();
        self.never_0(number.into(), "userfaultfds is 0")
    }

    /// How long a service thread busy-polls for the next fault before it sleeps: whole microseconds, at most 10 ms, 0 by
    /// default. It saves the wake-up of the thread, and takes up to one CPU while faults come.
    pub fn spin(mut self, time: Duration) -> Self {
        self.spin_us = time.as_micros().try_into().unwrap_or(u64::MAX);
        self
    }

    /// How long the end of a slot or handle with [`End::Populate`](crate::End::Populate) or
    /// [`End::PopulateOrPoison`](crate::End::PopulateOrPoison) may fill: 30 seconds by default. None: no limit. Then it
    /// fails with ETIMEDOUT, or poisons the rest.
    pub fn end_timeout(mut self, time: Option<Duration>) -> Self {
        let ms = |time: Duration| time.as_millis().clamp(1, u128::from(u32::MAX) - 1) as u64;
        self.end_timeout_ms = time.map_or(u32::MAX.into(), ms);
        self
    }

    /// The CPUs that service threads may use, by number: by default those of the thread that opens the handle. CPUs
    /// that the process may not use are left out; EINVAL if none is left.
    pub fn cpus(mut self, cpus: impl IntoIterator<Item = usize>) -> Self {
        self.cpus = Cpus::of_numbers(cpus);
        let there = self.cpus.is_some().into();
        self.never_0(there, "cpus names no CPU, or one that no kernel has")
    }

    /// Accept a userfaultfd that catches accesses from user mode only. It needs no privilege, and cannot serve a KVM
    /// guest: KVM's accesses would fail with EFAULT.
    pub fn user_mode_only(mut self) -> Self {
        self.user_mode_only = true;
        self
    }

    /// Serve forked children too, from the same source. Needs CAP_SYS_PTRACE, else EPERM.
    pub fn follow_fork(mut self) -> Self {
        self.follow_fork = true;
        self
    }

    /// Open no userfaultfd: every slot has one ([`Memory::userfaultfd`](crate::Memory::userfaultfd)). For a handler
    /// without privilege that serves other processes.
    pub fn adopt_only(mut self) -> Self {
        self.adopt_only = true;
        self
    }

    /// Look for pages of zeroes in the filled bytes, and install them as zero pages, which take no memory until they are
    /// written.
    pub fn detect_zero(mut self) -> Self {
        self.detect_zero = true;
        self
    }

    /// If the environment has KUF_DEBUG=1, also write log records of every level to standard error.
    pub fn debug_env(mut self) -> Self {
        self.debug_env = true;
        self
    }

    fn never_0(mut self, value: u64, text: &'static str) -> Self {
        if value == 0 {
            self.wrong.get_or_insert(text);
        }
        self
    }

    /// Checks the options, and fills in defaults.
    pub(crate) fn config(self) -> Result<Config> {
        if let Some(text) = self.wrong {
            return invalid(text);
        }
        let (fill, serviced, direct) = match &self.mode {
            Mode::Serviced(fill) => (Some(fill.clone()), true, false),
            Mode::Sources => (None, true, false),
            Mode::CallerDriven => (None, false, false),
            Mode::Direct => (None, false, true),
        };
        if direct && self.follow_fork {
            return invalid("KUF_OPEN_FOLLOW_FORK needs a thread: with KUF_OPEN_DIRECT fork would wait for kuf_read");
        }
        if self.adopt_only && self.follow_fork {
            let text =
                "KUF_OPEN_FOLLOW_FORK is for the library's own userfaultfd: for an adopted one its UFFDIO_API decides";
            return invalid(text);
        }
        if direct && self.cpus.is_some() {
            return invalid("options->cpus: with KUF_OPEN_DIRECT there is no thread");
        }
        let end_timeout_ms = in_range("options->end_timeout_ms", self.end_timeout_ms, END_TIMEOUT_MS, u32::MAX.into())?;
        let run = |what, value, default| in_range(what, value, default, 64 << 20);
        Ok(Config {
            fill_threads: in_range("options->fill_threads", self.fill_threads, 2, 256)? as usize,
            demand_run: run("options->demand_run", self.demand_run, 2 << 20)?,
            populate_run: run("options->populate_run", self.populate_run, 256 << 10)?,
            populate_inflight: POPULATE_INFLIGHT,
            spin: Duration::from_micros(in_range("options->spin_us", self.spin_us, 0, KUF_SPIN_MAX.into())?),
            end_timeout: Some(end_timeout_ms).filter(|ms| *ms != u64::from(u32::MAX)).map(Duration::from_millis),
            userfaultfds: self.number_of_userfaultfds()?,
            user_mode_only: self.user_mode_only,
            follow_fork: self.follow_fork,
            direct,
            adopt_only: self.adopt_only,
            detect_zero: self.detect_zero,
            serviced,
            mechanism: self.mechanism,
            cpus: self.cpus,
            callbacks: Callbacks {
                fill,
                event: self.event,
                log: self.log,
                log_level: self.log_level,
                to_stderr: self.debug_env && environment::is_debugged(),
            },
        })
    }

    fn number_of_userfaultfds(&self) -> Result<usize> {
        let wanted = in_range("options->userfaultfds", self.userfaultfds, 0, KUF_USERFAULTFDS_MAX.into())? as usize;
        if wanted > 0 && (self.adopt_only || matches!(self.mechanism, Which::KvmAsync { .. })) {
            return invalid("options->userfaultfds: KUF_OPEN_ADOPT_ONLY and KUF_MECHANISM_KVM_ASYNC open none");
        }
        if wanted > 1 && self.follow_fork {
            return invalid("options->userfaultfds: forks are followed with one only");
        }
        Ok(wanted.max(1))
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.mode {
            Mode::Serviced(_) => "Options(serviced)",
            Mode::Sources => "Options(sources)",
            Mode::CallerDriven => "Options(caller-driven)",
            Mode::Direct => "Options(direct)",
        })
    }
}
