//! `kuf_replay`: a recorded working set is filled ahead of demand. The thread that populates does it; here is what a
//! recording means for the slots there are.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::event::PollFlags;
use rustix::io::Errno;

use super::host::refuse_inside_quiet;
use super::populate::{Act, Step};
use super::record::{usable, wait_for};
use super::Service;
use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::memory::{Map, Slot};
use crate::record::Recording;

/// Runs, and bytes, of a recording that are put in the order of their addresses, so that neighbours are filled at once:
/// vCPUs that each went through memory in order are recorded page by page in turn. A window this small keeps what was
/// wanted first in front.
const WINDOW_RUNS: usize = 32;
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

/// Calls `act` with what slots of `map` have of `recording`, in whole pages, about in the order of the recording.
pub(super) fn each_part(recording: &Recording, map: &Map, go_on: &dyn Fn() -> Step, act: &mut Act<'_>) -> Step {
    let mut runs = recording.runs().peekable();
    let mut window: Vec<(&Arc<Slot>, Range<u64>)> = Vec::new();
    while runs.peek().is_some() {
        go_on()?;
        let (mut n, mut bytes) = (0, 0_u64);
        // A run that is longer than a window is one of its own.
        let fits = |n, bytes: u64| n == 0 || n < WINDOW_RUNS && bytes <= WINDOW_BYTES;
        while let Some(run) = runs.next_if(|run| fits(n, bytes.saturating_add(run.end - run.start))) {
            n += 1;
            bytes = bytes.saturating_add(run.end - run.start);
            window.extend(map.within_gpa(run).map(|(slot, offsets)| (slot, slot.pages_of(&offsets))));
        }
        window.sort_unstable_by_key(|(slot, pages)| (slot.gpa, pages.start));
        window.dedup_by(|(slot, pages), (last, before)| {
            let joins = Arc::ptr_eq(slot, last) && pages.start <= before.end;
            if joins {
                before.end = before.end.max(pages.end);
            }
            joins
        });
        for (slot, pages) in window.drain(..) {
            // A slot that was removed meanwhile is skipped like memory that never was there.
            match act(slot, &pages) {
                Err(errno) if errno != libc::ECANCELED && slot.gone() == Some(libc::ENOENT) => {}
                other => other?,
            }
        }
    }
    Ok(())
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
