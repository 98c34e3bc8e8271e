//! Caller-driven use: the caller's own loop reads the faults.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::abi::*;
use crate::error::{Error, Result};
use crate::memory::Slot;
use crate::service::fault::ask;
use crate::service::inside::refuse_inside_callbacks;
use crate::service::queues::read;
use crate::service::threads::serve;
use crate::service::{deadline, Service};
use crate::sync::time::{Duration, Instant};
use crate::sync::Arc;

/// How often a polling thread checks that the handle still works: a filter may have refused its wake-up.
const LOOK: Duration = Duration::from_secs(1);

fn check_caller_driven(service: &Service) -> Result<()> {
    if service.serviced() {
        let text = "this handle has a fill callback or sources: its own threads read the faults";
        return Err(Error::new(Errno::NOTSUP, text));
    }
    Ok(())
}

fn caller_descriptor(service: &Service) -> BorrowedFd<'_> {
    if service.config.direct {
        service.threads.waking.fd()
    } else {
        service.ready.fd()
    }
}

/// `kuf_fd`.
pub fn caller_fd(service: &Service) -> Result<i32> {
    check_caller_driven(service)?;
    Ok(caller_descriptor(service).as_raw_fd())
}

/// `kuf_poll`.
pub fn caller_poll(service: &Service, timeout_ms: i32) -> Result<bool> {
    refuse_inside_callbacks("kuf_poll")?;
    let deadline = deadline(timeout_ms)?;
    check_caller_driven(service)?;
    loop {
        service.check_open()?;
        let left = deadline.map_or(LOOK, |deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = Timespec::try_from(left.min(LOOK)).ok();
        let fd = caller_descriptor(service);
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) if deadline.is_none() || left > LOOK => {}
            Ok(0) => {
                service.check_open()?;
                return Ok(false);
            }
            Ok(_) => {
                service.check_open()?;
                return Ok(true);
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(Error::system("poll", e)),
        }
    }
}

/// `kuf_read`.
pub fn caller_read(service: &Service, out: &mut [MaybeUninit<kuf_fault>]) -> Result<usize> {
    refuse_inside_callbacks("kuf_read")?;
    check_caller_driven(service)?;
    service.check_open()?;
    service.ready.clear();
    if service.config.direct {
        read::drain_all(service);
        while let Some(work) = service.threads.next_work() {
            serve::work_on(service, work);
        }
    }
    let mut n = 0;
    // Faults that are put back are not looked at again in this call.
    for _ in 0..service.ready.len() {
        if n == out.len() {
            break;
        }
        let Some((slot, page)) = service.ready.next() else { break };
        if let Some(fault) = fault_at(service, &slot, page) {
            out[n].write(fault);
            n += 1;
        } else if slot.claims().may_be_owed(page) {
            // A kuf_resolve owns the page, or did a moment ago. If it fails the page is owed again, and no other list
            // has it.
            service.ready.put(&slot, page);
        }
    }
    if service.ready.len() > 0 {
        ask::signal_caller(service);
    }
    if n == 0 {
        return Err(Error::new(Errno::AGAIN, "no fault to read now"));
    }
    Ok(n)
}

/// The fault at `page`, if the caller still owes it.
fn fault_at(service: &Service, slot: &Arc<Slot>, page: u64) -> Option<kuf_fault> {
    let pages = page..page + 1;
    let mut fault = {
        let mut claims = slot.claims();
        let (owed, waiter) = claims.owed_at(page)?;
        let (flags, thread) = waiter.map_or((0, 0), |waiter| (waiter.flags, waiter.wait.thread));
        kuf_fault { thread, ..describe(slot, &pages, flags | KUF_FAULT_DEMAND, owed.since) }
    };
    service.stats.here().queueing(Duration::from_nanos(fault.age_ns));
    if let Ok(Some(place)) = slot.binding.in_place_buffer(&pages) {
        fault.place = place.as_ptr().cast();
    }
    Some(fault)
}

/// `kuf_pending`.
pub fn pending(service: &Service, out: &mut [MaybeUninit<kuf_fault>]) -> Result<usize> {
    service.check_open()?;
    let map = service.memory.map();
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
