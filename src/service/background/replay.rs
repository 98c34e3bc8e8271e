//! `kuf_replay`: fills a recorded working set ahead of demand. The populate thread does that; this file reads a
//! recording and checks it against the present slots.

use std::os::fd::BorrowedFd;

use rustix::event::PollFlags;
use rustix::io::Errno;

use crate::abi::*;
use crate::error::{words, Error, Result};
use crate::memory::Map;
use crate::record_file::Recording;
use crate::service::background::recorder::{usable, wait_for};
use crate::service::inside::refuse_inside_quiet;
use crate::service::Service;

/// `kuf_replay`.
pub fn replay(service: &Service, fd: i32, flags: u32) -> Result<()> {
    refuse_inside_quiet("kuf_replay")?;
    if flags != 0 {
        return Err(Error::new(Errno::INVAL, words!("flags has unknown bits {flags:#x}")));
    }
    service.check_open()?;
    if !service.serviced() {
        return Err(Error::new(Errno::NOTSUP, "kuf_replay needs a fill callback to ask, or sources"));
    }
    let fd = usable(fd)?;
    let recording = Recording::read(|buffer| read_up_to(fd, buffer))?;
    let bytes = bytes_in_slots(&recording, &service.memory.map())?;
    service.config.callbacks.log(KUF_LOG_INFO, || {
        words!("a recording of {} runs, {bytes:#x} bytes of them in memory slots", recording.count())
    });
    service.background.populate.replay(recording)
}

/// Refuses a recording that names more bytes than the slots have, for it could take any time.
fn bytes_in_slots(recording: &Recording, map: &Map) -> Result<u64> {
    let all: u64 = map.slots().iter().map(|slot| slot.len).sum();
    let mut bytes = 0;
    for run in recording.runs() {
        bytes += map.within_gpa(run).map(|(_, offsets)| offsets.end - offsets.start).sum::<u64>();
        if bytes > all {
            return Err(Error::new(Errno::BADMSG, "the recording is damaged: it names pages more than once"));
        }
    }
    if bytes == 0 && recording.count() > 0 {
        return Err(Error::new(Errno::NOENT, "no part of the recording is in a memory slot of this handle"));
    }
    Ok(bytes)
}

/// Reads until `buffer` is full or the file ends.
fn read_up_to(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match rustix::io::read(fd, &mut buffer[got..]) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(fd, PollFlags::IN),
            Err(e) => return Err(Error::system("reading a recording from fd", e)),
        }
    }
    Ok(got)
}
