//! `kuf_record_start`, `kuf_record_stop`: records the demanded pages in their order.
//!
//! The recorder notes the run that a demand claims, not the faulting page alone: the guest may have touched the other
//! pages since, without a fault. A run is longer than a page only where access was sequential or dense, so most of it
//! is used. Pages filled ahead of a stream are recorded when the stream has gone through them; pages of a dense place,
//! when they are claimed.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::event::{poll, PollFd, PollFlags};
use rustix::io::Errno;

use crate::abi::*;
use crate::alloc::table::Table;
use crate::alloc::{refusable, try_box, NoMemory};
use crate::error::{words, Error, Result};
use crate::memory::{Slot, Waiter};
use crate::pages::claims::Claims;
use crate::record_file::{encode, Run, MAX_RUNS};
use crate::service::inside::refuse_inside_quiet;
use crate::service::Service;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{lock, Mutex};

/// The recording of a handle.
#[derive(Default)]
pub struct Recorder {
    /// Read without the lock: a demand pays only for this when no recording is on.
    on: AtomicBool,
    state: Mutex<RecorderState>,
    /// Held while a recording is written out.
    saving: Mutex<()>,
}

#[derive(Default)]
struct RecorderState {
    phase: Phase,
    demanded: Demanded,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Off,
    On,
    /// The recording has ended, but could not be written yet.
    Kept,
}

/// Units (of the host's page size) in the order in which they were demanded, each once.
#[derive(Default)]
struct Demanded {
    runs: Vec<Run>,
    seen: Seen,
    /// Some units were left out.
    full: bool,
}

impl Demanded {
    fn add(&mut self, units: Range<u64>) {
        let Self { runs, seen, full } = self;
        let all = seen.add(units, |new| {
            let run = Run { first: new.start, units: new.end - new.start };
            match runs.last_mut() {
                Some(last) if last.first + last.units == run.first => last.units += run.units,
                Some(last) if last.first == new.end => *last = Run { units: last.units + run.units, ..run },
                // Over the limit, or without memory, leave the run out: a part of a working set is still of use.
                _ => match (runs.len() as u64) < MAX_RUNS && refusable(|| runs.try_reserve(1)).is_ok() {
                    true => runs.push(run),
                    false => *full = true,
                },
            }
        });
        *full |= all.is_err();
    }
}

const WORDS: usize = 64;

/// A bit for each unit, in pieces that are allocated when first written.
#[derive(Default)]
struct Seen(Table<Box<[u64; WORDS]>>);

impl Seen {
    /// Adds `units`, and calls `new` with each run of new ones, in order. Err: there is no memory for all.
    fn add(&mut self, units: Range<u64>, mut new: impl FnMut(Range<u64>)) -> std::result::Result<(), NoMemory> {
        let mut at = units.start;
        while at < units.end {
            let (word, bit) = (at / 64, at % 64);
            let n = (64 - bit).min(units.end - at);
            let bits = &mut self.piece(word / WORDS as u64)?[(word % WORDS as u64) as usize];
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
        Ok(())
    }

    fn piece(&mut self, n: u64) -> std::result::Result<&mut [u64; WORDS], NoMemory> {
        if self.0.floor(n).is_none_or(|(at, _)| at != n) && !self.0.insert(n, try_box([0; WORDS])?) {
            return Err(NoMemory);
        }
        self.0.floor_mut(n).map(|(_, piece)| &mut **piece).ok_or(NoMemory)
    }
}

/// The `n` lowest bits.
fn ones(n: u64) -> u64 {
    u64::MAX >> (64 - n)
}

/// `kuf_record_start`.
pub fn record_start(service: &Service, flags: u32) -> Result<()> {
    refuse_inside_quiet("kuf_record_start")?;
    if flags != 0 {
        return Err(Error::new(Errno::INVAL, words!("flags has unknown bits {flags:#x}")));
    }
    service.check_open()?;
    let mut state = lock(&service.background.recorder.state);
    match state.phase {
        Phase::Off => {}
        Phase::On => return Err(Error::new(Errno::ALREADY, "this handle is recording: kuf_record_stop first")),
        Phase::Kept => {
            let text = "a recording could not be written: kuf_record_stop first, with another fd or -1 to drop it";
            return Err(Error::new(Errno::ALREADY, text));
        }
    }
    *state = RecorderState { phase: Phase::On, demanded: Demanded::default() };
    service.background.recorder.on.store(true, Ordering::Relaxed);
    service.background.observers_changed();
    Ok(())
}

/// `kuf_record_stop`: writes the recording to `fd`, or drops it for -1.
pub fn record_stop(service: &Service, fd: i32) -> Result<()> {
    refuse_inside_quiet("kuf_record_stop")?;
    service.check_open()?;
    let fd = match fd {
        -1 => None,
        fd => Some(usable(fd)?),
    };
    let saving = lock(&service.background.recorder.saving);
    let demanded = {
        let mut state = lock(&service.background.recorder.state);
        if state.phase == Phase::Off {
            return Err(Error::new(Errno::INVAL, "this handle is not recording: kuf_record_start first"));
        }
        if let Some(fd) = fd {
            // This writes no byte: a bad descriptor is refused while the recording goes on.
            if rustix::io::write(fd, &[]) == Err(Errno::BADF) {
                return Err(Error::new(Errno::BADF, words!("fd {} is not open for writing", fd.as_raw_fd())));
            }
        }
        service.background.recorder.on.store(false, Ordering::Relaxed);
        service.background.observers_changed();
        state.phase = Phase::Kept;
        std::mem::take(&mut state.demanded)
    };
    let runs = &demanded.runs;
    let written =
        fd.map_or(Ok(()), |fd| encode(rustix::param::page_size() as u64, runs).and_then(|f| write_all(fd, &f)));
    let cut = (fd.is_some() && demanded.full).then_some(runs.len());
    {
        let mut state = lock(&service.background.recorder.state);
        match written {
            Ok(()) => state.phase = Phase::Off,
            Err(_) => state.demanded = demanded,
        }
    }
    drop(saving);
    if let Some(runs) = cut {
        service.config.callbacks.log(KUF_LOG_WARN, || words!("the recording is not whole: it has {runs} runs"));
    }
    written
}

/// Records `pages`, which were claimed for a demand fault on one of them.
pub fn record(service: &Service, slot: &Slot, pages: &Range<u64>) {
    if service.background.recorder.on.load(Ordering::Relaxed) {
        service.background.recorder.add(slot, pages);
    }
}

/// Records `page`, which a thread demands while it is being filled: a speculative fill was not recorded.
pub fn record_joined(service: &Service, slot: &Slot, page: u64, claims: &mut Claims<Waiter>) {
    if service.background.recorder.on.load(Ordering::Relaxed) && claims.awaited(page) {
        service.background.recorder.add(slot, &(page..page + 1));
    }
}

impl Recorder {
    /// Whether a recording is on.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    #[cold]
    fn add(&self, slot: &Slot, pages: &Range<u64>) {
        // Skip a forked child's copy: a guest does not start from it.
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

/// Borrows a descriptor of the caller for the time of a call.
pub fn usable(fd: i32) -> Result<BorrowedFd<'static>> {
    if fd < 0 {
        return Err(Error::new(Errno::BADF, words!("fd {fd} is no descriptor")));
    }
    // SAFETY: not -1; the kernel reports one that is not open, and the caller keeps it open during the call.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Waits until a non-blocking descriptor is ready.
pub fn wait_for(fd: BorrowedFd<'_>, what: PollFlags) {
    // The next read or write reports an error.
    let _ = poll(&mut [PollFd::new(&fd, what)], None);
}

/// Writes every byte.
fn write_all(fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<()> {
    let mut left = bytes;
    loop {
        match rustix::io::write(fd, left) {
            Ok(n) if n >= left.len() => return Ok(()),
            Ok(0) => return Err(Error::new(Errno::IO, "writing the recording: fd takes no more bytes")),
            Ok(n) => left = &left[n..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(fd, PollFlags::OUT),
            Err(e) => return Err(Error::system("writing the recording to fd", e)),
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
    fn the_recorder_agrees_with_a_plain_array() {
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
