//! `kuf_replay`: a recorded working set is filled ahead of demand. The thread that populates does it; here is what a
//! recording means for the slots there are.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::PollFlags;
use rustix::io::Errno;

use super::host::refuse_inside_quiet;
use super::populate::{Act, Step};
use super::record::{usable, wait_for};
use super::window::{Pace, Part};
use super::Service;
use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::memory::{Map, Slot};
use crate::record::Recording;

/// Runs, and bytes, of a recording that are put in the order of their addresses, so that neighbours are filled at once:
/// vCPUs that each went through memory in order are recorded page by page in turn. A window this small keeps what was
/// wanted first in front.
const WINDOW_RUNS: usize = 64;
const WINDOW_BYTES: u64 = 4 << 20;

impl Service {
    /// `kuf_replay`.
    pub fn replay(&self, fd: i32, flags: u32) -> Result<()> {
        refuse_inside_quiet("kuf_replay")?;
        if flags != 0 {
            return Err(Error::new(libc::EINVAL, format!("flags has unknown bits {flags:#x}")));
        }
        self.check_open()?;
        if !self.serviced() {
            return Err(Error::new(libc::ENOTSUP, "kuf_replay needs a fill callback to ask, or sources"));
        }
        let fd = usable(fd)?;
        let recording = Recording::read(|buffer| read_up_to(fd, buffer))?;
        let bytes = bytes_in_slots(&recording, &self.memory.map())?;
        self.config.host.log(KUF_LOG_INFO, || {
            format!("a recording of {} runs, {bytes:#x} bytes of them in memory slots", recording.count())
        });
        self.populate.replay(recording);
        Ok(())
    }
}

/// Refuses a recording that names more than there is: to go over it would take any time.
fn bytes_in_slots(recording: &Recording, map: &Map) -> Result<u64> {
    let all: u64 = map.slots().iter().map(|slot| slot.len).sum();
    let mut bytes = 0;
    for run in recording.runs() {
        bytes += map.within_gpa(run).map(|(_, offsets)| offsets.end - offsets.start).sum::<u64>();
        if bytes > all {
            return Err(Error::new(libc::EBADMSG, "the recording is damaged: it names pages more than once"));
        }
    }
    if bytes == 0 && recording.count() > 0 {
        return Err(Error::new(libc::ENOENT, "no part of the recording is in a memory slot of this handle"));
    }
    Ok(bytes)
}

/// What slots of `map` have of `recording`, in whole pages, window by window: each in the order of addresses.
fn windows<'a>(recording: &'a Recording, map: &'a Map) -> impl Iterator<Item = Vec<Part>> + 'a {
    let mut runs = recording.runs().peekable();
    std::iter::from_fn(move || {
        runs.peek()?;
        let (mut n, mut bytes) = (0, 0_u64);
        let mut window: Vec<Part> = Vec::with_capacity(WINDOW_RUNS);
        // A run that is longer than a window is one of its own.
        let fits = |n, bytes: u64| n == 0 || n < WINDOW_RUNS && bytes <= WINDOW_BYTES;
        while let Some(run) = runs.next_if(|run| fits(n, bytes.saturating_add(run.end - run.start))) {
            n += 1;
            bytes = bytes.saturating_add(run.end - run.start);
            window.extend(map.within_gpa(run).map(|(slot, offsets)| Part {
                slot: slot.clone(),
                pages: slot.pages_of(&offsets),
                rank: n,
            }));
        }
        window.sort_unstable_by_key(|part| (part.slot.gpa, part.pages.start));
        window.dedup_by(|part, last| {
            let joins = Arc::ptr_eq(&part.slot, &last.slot) && part.pages.start <= last.pages.end;
            if joins {
                last.pages.end = last.pages.end.max(part.pages.end);
                last.rank = last.rank.min(part.rank);
            }
            joins
        });
        Some(window)
    })
}

/// Calls `act` with what slots of `map` have of `recording`, in whole pages, about in the order of the recording.
pub(super) fn each_part(recording: &Recording, map: &Map, go_on: &dyn Fn() -> Step, act: &mut Act<'_>) -> Step {
    for window in windows(recording, map) {
        go_on()?;
        window.iter().try_for_each(|part| skip_removed(&part.slot, act(&part.slot, &part.pages)))?;
    }
    Ok(())
}

/// A slot that was removed meanwhile is skipped like memory that never was there.
fn skip_removed(slot: &Slot, step: Step) -> Step {
    match step {
        Err(errno) if errno != libc::ECANCELED && slot.gone() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

impl Service {
    /// As [`each_part`], for parts that `act` fills: faults in a window are left to it while windows are quick.
    pub(super) fn each_window(
        &self,
        recording: &Recording,
        map: &Map,
        go_on: &dyn Fn() -> Step,
        act: &mut Act<'_>,
    ) -> Step {
        let mut pace = Pace::default();
        let mut windows = windows(recording, map);
        let mut next = windows.next().map(|parts| self.window(parts, &pace));
        while let Some(mut window) = next {
            go_on()?;
            // Before this one ends: who is through with it comes to the next.
            next = windows.next().map(|parts| self.window(parts, &pace));
            let began = Instant::now();
            while let Some(part) = window.next() {
                skip_removed(&part.slot, act(&part.slot, &part.pages))?;
            }
            pace.took(&window, began.elapsed());
        }
        Ok(())
    }
}

/// Reads until `buffer` is full or there is no more.
fn read_up_to(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match rustix::io::read(fd, &mut buffer[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(fd, PollFlags::IN),
            Err(e) => return Err(Error::system("reading a recording from fd", e.raw_os_error())),
        }
    }
    Ok(got)
}
