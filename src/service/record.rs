//! `kuf_record_start`, `kuf_record_stop`: which pages are demanded, in which order.
//!
//! What is recorded is the run that a demand claims, not the faulting page alone: pages that came along may have been
//! touched since without a fault, and nobody can tell. A run is longer than a page only where access was sequential or the
//! place dense, so little of it is in vain. What is brought ahead of a stream is recorded when the stream has gone
//! through it; what fills up a dense place, when it is claimed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{poll, PollFd, PollFlags};
use rustix::io::Errno;

use super::host::refuse_inside_quiet;
use super::Service;
use crate::capi::types::*;
use crate::claims::Claims;
use crate::error::{Error, Result};
use crate::memory::{Slot, Waiter};
use crate::record::{encode, Run, MAX_RUNS};
use crate::sync::{lock, Mutex};

/// What is being recorded.
#[derive(Default)]
pub struct Recorder {
    /// For a look without the lock: all that a demand pays when nothing is recorded.
    on: AtomicBool,
    state: Mutex<State>,
    /// Held by who writes a recording out.
    saving: Mutex<()>,
}

#[derive(Default)]
struct State {
    phase: Phase,
    demanded: Demanded,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Off,
    On,
    /// Over, and not written yet: it could not be.
    Kept,
}

/// Units (of the host's page size) in the order in which they were demanded, each once.
#[derive(Default)]
struct Demanded {
    runs: Vec<Run>,
    seen: Seen,
    /// Some were left out.
    full: bool,
}

impl Demanded {
    fn add(&mut self, units: Range<u64>) {
        let Self { runs, seen, full } = self;
        seen.add(units, |new| {
            let run = Run { first: new.start, units: new.end - new.start };
            match runs.last_mut() {
                Some(last) if last.first + last.units == run.first => last.units += run.units,
                Some(last) if last.first == new.end => *last = Run { units: last.units + run.units, ..run },
                // Out of bounds, or without memory for it: a working set that is not whole is still of use.
                _ => match (runs.len() as u64) < MAX_RUNS && runs.try_reserve(1).is_ok() {
                    true => runs.push(run),
                    false => *full = true,
                },
            }
        });
    }
}

const WORDS: usize = 64;

/// A bit for each unit, in pieces that are made when first written.
#[derive(Default)]
struct Seen(BTreeMap<u64, Box<[u64; WORDS]>>);

impl Seen {
    /// Adds `units`, and calls `new` with the runs of them that were not there, in order.
    fn add(&mut self, units: Range<u64>, mut new: impl FnMut(Range<u64>)) {
        let mut at = units.start;
        while at < units.end {
            let (word, bit) = (at / 64, at % 64);
            let n = (64 - bit).min(units.end - at);
            let piece = self.0.entry(word / WORDS as u64).or_insert_with(|| Box::new([0; WORDS]));
            let bits = &mut piece[(word % WORDS as u64) as usize];
            let mut fresh = ones(n) << bit & !*bits;
            *bits |= fresh;
            while fresh != 0 {
                let from = u64::from(fresh.trailing_zeros());
                let len = u64::from((fresh >> from).trailing_ones());
                new(word * 64 + from..word * 64 + from + len);
                fresh &= !(ones(len) << from);
            }
            at += n;
        }
    }
}

/// The `n` lowest bits.
fn ones(n: u64) -> u64 {
    u64::MAX >> (64 - n)
}

impl Service {
    /// `kuf_record_start`.
    pub fn record_start(&self, flags: u32) -> Result<()> {
        refuse_inside_quiet("kuf_record_start")?;
        if flags != 0 {
            return Err(Error::new(libc::EINVAL, format!("flags has unknown bits {flags:#x}")));
        }
        self.check_open()?;
        let mut state = lock(&self.recorder.state);
        match state.phase {
            Phase::Off => {}
            Phase::On => return Err(Error::new(libc::EALREADY, "this handle is recording: kuf_record_stop first")),
            Phase::Kept => {
                let text = "a recording could not be written: kuf_record_stop first, with another fd or -1 to drop it";
                return Err(Error::new(libc::EALREADY, text));
            }
        }
        *state = State { phase: Phase::On, demanded: Demanded::default() };
        self.recorder.on.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// `kuf_record_stop`: writes the recording to `fd`, or drops it for -1.
    pub fn record_stop(&self, fd: i32) -> Result<()> {
        refuse_inside_quiet("kuf_record_stop")?;
        self.check_open()?;
        let fd = match fd {
            -1 => None,
            fd => Some(usable(fd)?),
        };
        let saving = lock(&self.recorder.saving);
        let demanded = {
            let mut state = lock(&self.recorder.state);
            if state.phase == Phase::Off {
                return Err(Error::new(libc::EINVAL, "this handle is not recording: kuf_record_start first"));
            }
            if let Some(fd) = fd {
                // Nothing is written: refused while the recording goes on.
                if rustix::io::write(fd, &[]) == Err(Errno::BADF) {
                    return Err(Error::new(libc::EBADF, format!("fd {} is not open for writing", fd.as_raw_fd())));
                }
            }
            self.recorder.on.store(false, Ordering::Relaxed);
            state.phase = Phase::Kept;
            std::mem::take(&mut state.demanded)
        };
        let runs = &demanded.runs;
        let written =
            fd.map_or(Ok(()), |fd| encode(rustix::param::page_size() as u64, runs).and_then(|f| write_all(fd, &f)));
        let cut = (fd.is_some() && demanded.full).then_some(runs.len());
        {
            let mut state = lock(&self.recorder.state);
            match written {
                Ok(()) => state.phase = Phase::Off,
                Err(_) => state.demanded = demanded,
            }
        }
        drop(saving);
        if let Some(runs) = cut {
            self.config.host.log(KUF_LOG_WARN, || format!("the recording is not whole: it has {runs} runs"));
        }
        written
    }

    /// `pages` were claimed for somebody who wants one of them.
    pub(super) fn record(&self, slot: &Slot, pages: &Range<u64>) {
        if self.recorder.on.load(Ordering::Relaxed) {
            self.recorder.add(slot, pages);
        }
    }

    /// Somebody wants `page`, which is on its way: ahead of demand perhaps, and then it has not been recorded.
    pub(super) fn record_joined(&self, slot: &Slot, page: u64, claims: &mut Claims<Waiter>) {
        if self.recorder.on.load(Ordering::Relaxed) && claims.awaited(page) {
            self.recorder.add(slot, &(page..page + 1));
        }
    }
}

impl Recorder {
    #[cold]
    fn add(&self, slot: &Slot, pages: &Range<u64>) {
        // A forked child's copy is not what a guest starts from.
        if slot.parent.is_some() {
            return;
        }
        let unit = rustix::param::page_size() as u64;
        let (gpa, len) = slot.gpa_of(pages);
        let mut state = lock(&self.state);
        if state.phase == Phase::On {
            state.demanded.add(gpa / unit..(gpa + len) / unit);
        }
    }
}

/// A descriptor of the host's, for the time of a call.
pub(super) fn usable(fd: i32) -> Result<BorrowedFd<'static>> {
    if fd < 0 {
        return Err(Error::new(libc::EBADF, format!("fd {fd} is no descriptor")));
    }
    // SAFETY: not -1; whether it is open the kernel says, and the host keeps it so for the time of the call.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Waits until a descriptor that does not block can go on.
pub(super) fn wait_for(fd: BorrowedFd<'_>, what: PollFlags) {
    // What is wrong with it, the next read or write says.
    let _ = poll(&mut [PollFd::new(&fd, what)], None);
}

/// Writes every byte.
fn write_all(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<()> {
    let mut left = bytes;
    loop {
        match rustix::io::write(fd, left) {
            Ok(n) if n >= left.len() => return Ok(()),
            Ok(0) => return Err(Error::new(libc::EIO, "writing the recording: fd takes no more bytes")),
            Ok(n) => left = &left[n..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(fd, PollFlags::OUT),
            Err(e) => return Err(Error::system("writing the recording to fd", e.raw_os_error())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_unit_is_recorded_once_and_neighbours_are_one_run() {
        let mut demanded = Demanded::default();
        for units in [10..11, 11..12, 9..10, 100..400, 5..20, 9..12, 350..500, 0..1, 4095..4097, 1 << 40..(1 << 40) + 3]
        {
            demanded.add(units);
        }
        let runs: Vec<_> = demanded.runs.iter().map(|run| (run.first, run.units)).collect();
        assert_eq!(
            runs,
            [(9, 3), (100, 300), (5, 4), (12, 8), (400, 100), (0, 1), (4095, 2), (1 << 40, 3)],
            "in the order in which they came"
        );
        assert!(!demanded.full);
        assert_eq!(demanded.seen.0.len(), 3);
    }

    #[test]
    fn agrees_with_a_plain_array() {
        let (mut demanded, mut model, mut order) = (Demanded::default(), vec![false; 20_000], Vec::new());
        let mut random = crate::testing::random();
        for _ in 0..2_000 {
            let start = random(19_000);
            let most = if random(10) == 0 { 1_000 } else { 3 };
            let units = start..start + 1 + random(most);
            demanded.add(units.clone());
            for unit in units {
                if !std::mem::replace(&mut model[unit as usize], true) {
                    order.push(unit);
                }
            }
        }
        let mut recorded: Vec<u64> = demanded.runs.iter().flat_map(|run| run.first..run.first + run.units).collect();
        assert_eq!(recorded.len(), order.len(), "each once");
        recorded.sort_unstable();
        order.sort_unstable();
        assert_eq!(recorded, order);
    }
}
