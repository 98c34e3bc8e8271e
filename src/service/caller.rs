//! Caller-driven use: faults go to the host's own loop.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{unbounded, Receiver, Sender};
use rustix::event::{poll, PollFd, PollFlags, Timespec};

use super::host::refuse_inside_callbacks;
use super::{deadline, eventfd, Service};
use crate::capi::types::*;
use crate::claims::{Owner, Terms};
use crate::error::{Error, Result};
use crate::memory::{Slot, Waiter};
use crate::pages::State;

type Queue = (Sender<(Arc<Slot>, u64)>, Receiver<(Arc<Slot>, u64)>);

/// Faults for `kuf_read`, and the descriptor that says so. Who reads the queue looks at the page states again, so an
/// entry whose page was resolved meanwhile does no harm.
pub struct Ready {
    queue: Queue,
    signal: OwnedFd,
    ended: AtomicBool,
}

impl Ready {
    pub fn new() -> Result<Self> {
        Ok(Self { queue: unbounded(), signal: eventfd()?, ended: AtomicBool::new(false) })
    }

    /// Readable when there may be something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.signal.as_fd()
    }

    /// Makes the descriptor readable.
    pub fn signal(&self) {
        let _ = rustix::io::write(&self.signal, &1_u64.to_ne_bytes());
    }

    /// Wakes whoever polls, for good.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.signal();
    }

    fn push(&self, slot: Arc<Slot>, page: u64) {
        let _ = self.queue.0.send((slot, page));
        self.signal();
    }

    /// To be called before looking into the queue: what is pushed from now on signals again.
    fn clear(&self) {
        let _ = rustix::io::read(&self.signal, &mut [0_u8; 8]);
        if self.ended.load(Ordering::Acquire) {
            self.signal();
        }
    }
}

impl Service {
    /// Asks the host for a page through `kuf_read`.
    pub(super) fn ask(&self, slot: &Arc<Slot>, page: u64, waiter: Waiter) {
        let in_place = slot.in_place();
        {
            let mut claims = slot.claims();
            let terms = Terms { owner: Owner::Host, in_place, demand: true, ahead: false, since: None };
            let claimed = claims.claim(&slot.pages, page, 1, State::Absent, terms);
            self.record_joined(slot, page, &mut claims);
            let stray = claims.join(waiter).err();
            if claimed.is_none() {
                drop(claims);
                // Not absent any more, and not on its way: given back meanwhile, say.
                return self.push_again(slot, stray);
            }
        }
        self.ready.push(slot.clone(), page);
    }

    fn check_caller_driven(&self) -> Result<()> {
        if self.serviced() {
            let text = "this handle has a fill callback or sources: its own threads read the faults";
            return Err(Error::new(libc::ENOTSUP, text));
        }
        Ok(())
    }

    fn caller_descriptor(&self) -> BorrowedFd<'_> {
        if self.config.direct {
            self.waking.fd()
        } else {
            self.ready.fd()
        }
    }

    /// `kuf_fd`.
    pub fn caller_fd(&self) -> Result<i32> {
        self.check_caller_driven()?;
        Ok(self.caller_descriptor().as_raw_fd())
    }

    /// `kuf_poll`.
    pub fn caller_poll(&self, timeout_ms: i32) -> Result<bool> {
        refuse_inside_callbacks("kuf_poll")?;
        let deadline = deadline(timeout_ms)?;
        self.check_caller_driven()?;
        loop {
            self.check_open()?;
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            let fd = self.caller_descriptor();
            let mut fds = [PollFd::new(&fd, PollFlags::IN)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => {
                    self.check_open()?;
                    return Ok(false);
                }
                Ok(_) => {
                    self.check_open()?;
                    return Ok(true);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::system("poll", e.raw_os_error())),
            }
        }
    }

    /// `kuf_read`.
    pub fn caller_read(&self, out: &mut [MaybeUninit<kuf_fault>]) -> Result<usize> {
        refuse_inside_callbacks("kuf_read")?;
        self.check_caller_driven()?;
        self.check_open()?;
        self.ready.clear();
        if self.config.direct {
            self.pump_all();
            if self.inlets().iter().any(|inlet| inlet.is_starved()) {
                // What was left may not be announced again.
                self.ready.signal();
            }
            while let Ok(work) = self.work.1.try_recv() {
                self.work_on(work);
            }
        }
        let mut n = 0;
        while n < out.len() {
            let Ok((slot, page)) = self.ready.queue.1.try_recv() else { break };
            if let Some(fault) = self.fault_at(&slot, page) {
                out[n].write(fault);
                n += 1;
            }
        }
        if !self.ready.queue.1.is_empty() {
            self.ready.signal();
        }
        if n == 0 {
            return Err(Error::new(libc::EAGAIN, "no fault to read now"));
        }
        Ok(n)
    }

    /// The fault at `page`, if the host still owes it.
    fn fault_at(&self, slot: &Arc<Slot>, page: u64) -> Option<kuf_fault> {
        let pages = page..page + 1;
        let mut fault = {
            let mut claims = slot.claims();
            let (owed, waiter) = claims.owed_at(page)?;
            let (flags, thread) = waiter.map_or((0, 0), |waiter| (waiter.flags, waiter.thread));
            kuf_fault { thread, ..describe(slot, &pages, flags | KUF_FAULT_DEMAND, owed.since) }
        };
        self.stats.here().queueing(Duration::from_nanos(fault.age_ns));
        if let Ok(Some(place)) = slot.mechanism.place(slot, &pages) {
            fault.place = place.as_ptr().cast();
        }
        Some(fault)
    }

    /// `kuf_pending`.
    pub fn pending(&self, out: &mut [MaybeUninit<kuf_fault>]) -> Result<usize> {
        self.check_open()?;
        let map = self.memory.map();
        let mut n = 0;
        for slot in map.all() {
            let claims = slot.claims();
            for owed in claims.asked() {
                if let Some(to) = out.get_mut(n) {
                    let demand = if owed.demand { KUF_FAULT_DEMAND } else { 0 };
                    to.write(describe(slot, &owed.pages, demand, owed.since));
                }
                n += 1;
            }
        }
        Ok(n)
    }
}

fn describe(slot: &Slot, pages: &std::ops::Range<u64>, flags: u32, since: Instant) -> kuf_fault {
    let (gpa, len) = slot.gpa_of(pages);
    kuf_fault {
        gpa,
        len,
        flags: flags | if slot.parent.is_some() { KUF_FAULT_FORKED } else { 0 },
        thread: 0,
        age_ns: u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX),
        memory_opaque: slot.opaque.0,
        memory_offset: gpa - slot.gpa,
        place: std::ptr::null_mut(),
        reserved: 0,
    }
}
