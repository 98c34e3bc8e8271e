//! `kuf_discard`: drops pages and arms them again. The same code empties a slot that is added with KUF_MEMORY_FILL_ALL.
//!
//! Dropping is one claim and one madvise(2). The claim has all pages of the range without an owner, whatever their
//! state: the states do not say which pages hold bytes. While madvise waits for its REMOVE event to be read, the reader
//! leaves claimed pages alone, so that they are not taken for memory that the guest gave back.

use std::ops::Range;

use rustix::io::Errno;

use crate::alloc::NoMemory;
use crate::error::{Error, Result};
use crate::memory::{Slot, Waiter};
use crate::pages::claims::{Claims, Discarding, Settled};
use crate::pages::State;
use crate::service::calls::{aligned, kvm};
use crate::service::fault::retry::Backoff;
use crate::service::fault::{complete, exits, parked, settle};
use crate::service::inside::refuse_inside_quiet;
use crate::service::queues::quiet;
use crate::service::Service;
use crate::sync::Arc;

/// Drops `gpa..gpa+len`. `removed`: the guest gave the range back, so it is zero from now on; else the source fills it
/// again.
pub fn discard(service: &Service, gpa: u64, len: u64, removed: bool) -> Result<()> {
    refuse_inside_quiet("kuf_discard")?;
    service.check_open()?;
    let map = service.memory.map();
    let (slot, offsets) = map.range(gpa, len)?;
    let pages = aligned(slot, &offsets)?;
    slot.check_there()?;
    if slot.facts().remote && slot.shared.is_none() {
        let text = "only the process that owns this memory can drop it: the slot has no memory->fd";
        return Err(Error::new(Errno::NOTSUP, text));
    }
    kvm::refuse_memslot_change(slot, "kuf_discard")?;
    drop_pages(service, slot, pages, removed)
}

fn drop_pages(service: &Service, slot: &Arc<Slot>, pages: Range<u64>, removed: bool) -> Result<()> {
    // Wait for the reader: a thread may come here from madvise before its event, read already, is applied, and the
    // discard has to come after that.
    drop(slot.mechanism.gate().write());
    if !removed {
        exits::need(slot).map_err(|e| Error::system("changing the memslot", e))?;
    }
    let begun = begin_drop(service, slot, &pages, |claims| claims.begin_discard(&slot.pages, pages.clone(), removed))?;
    let dropped: u64 = begun.runs.iter().map(|run| run.end - run.start).sum();
    let (state, fresh) = if removed { (State::Removed, dropped - begun.removed) } else { (State::Absent, 0) };
    drop_claimed(service, slot, &begun, state, |run| slot.binding.drop_pages(run))?;
    let stats = service.stats.here();
    stats.bytes_discarded(dropped * slot.granule);
    stats.bytes_removed(fresh * slot.granule);
    if !removed {
        // The slot may have been taken for complete in between, so switch its exits on again; without exits all touches
        // are still caught.
        let _ = exits::need(slot);
    }
    Ok(())
}

/// For KUF_MEMORY_FILL_ALL: unmaps the absent pages of a slot that was just added, so that they do not show their old
/// bytes. The file keeps them.
pub fn empty(service: &Service, slot: &Arc<Slot>) -> Result<()> {
    let all = 0..slot.pages.total();
    let begun = begin_drop(service, slot, &all, |claims| claims.begin_emptying(&slot.pages, all.clone()));
    match begun.and_then(|begun| drop_claimed(service, slot, &begun, State::Absent, |run| slot.unmap(run))) {
        // Another thread has removed the slot.
        Err(error) if error.errno() == Errno::NOENT => Ok(()),
        other => other,
    }
}

/// Claims the pages to drop with `begin`, when none of `pages` is being installed or dropped.
fn begin_drop(
    service: &Service,
    slot: &Arc<Slot>,
    pages: &Range<u64>,
    begin: impl Fn(&mut Claims<Waiter>) -> std::result::Result<Discarding, NoMemory>,
) -> Result<Discarding> {
    let mut waiting = Backoff::default();
    loop {
        let mut claims = slot.claims();
        // Check this under the lock, so that a kuf_close that does not wait for this call has not looked at the slot
        // yet.
        service.check_open()?;
        if claims.is_shut() {
            return Err(slot.removed());
        }
        if !claims.installing(pages) && !claims.dropping(pages) {
            return Ok(begin(&mut claims)?);
        }
        drop(claims);
        // Dropping waits for its REMOVE event to be read.
        quiet::wait_for_events(service, &slot.mechanism, &mut waiting);
    }
}

/// Drops the pages that `begun` has claimed with `act`. The pages become `state`; their waiters are served anew.
fn drop_claimed(
    service: &Service,
    slot: &Arc<Slot>,
    begun: &Discarding,
    state: State,
    act: impl Fn(&Range<u64>) -> std::result::Result<(), Errno>,
) -> Result<()> {
    for (n, run) in begun.runs.iter().enumerate() {
        let (dropped, result) = where_it_is(service, slot, || act(run));
        if dropped {
            let Settled { waiters, whole } =
                slot.settle(|claims| claims.settle(&slot.pages, run.clone(), begun.id, Some(state)));
            parked::serve_parked(service, slot, run);
            service.push_again(slot, waiters);
            if whole {
                complete::tell_whole(service, slot);
            }
        }
        if let Err(errno) = result {
            drop_failed(service, slot, begun, n + usize::from(dropped), state, !dropped);
            return Err(service.ended_or(slot, errno, could_not_drop));
        }
    }
    Ok(())
}

/// Drops with `act`, which uses addresses, and repeats it until the pages certainly were at these addresses. A thread
/// in mremap(2) or munmap(2) changes the mapping before its event can be read: then the addresses are not the slot's
/// any more, and the pages are elsewhere with all their bytes. True: `act` has succeeded at least once, so the pages
/// may have lost their bytes.
fn where_it_is(
    service: &Service,
    slot: &Arc<Slot>,
    act: impl Fn() -> std::result::Result<(), Errno>,
) -> (bool, std::result::Result<(), Errno>) {
    let mut dropped = false;
    loop {
        let before = slot.changes();
        let result = act();
        dropped |= result.is_ok();
        match quiet::changed_since(service, slot, before) {
            Ok(true) => {}
            Ok(false) => return (dropped, result),
            Err(errno) => return (dropped, Err(errno)),
        }
    }
}

/// Gives up the runs from `n` on, which are not dropped. The first of them was `tried` and may be dropped in part. A
/// shared file still has its pages. Of other memory some pages may be gone, so none may count as present; those that
/// are not gone keep their bytes when they are filled anew.
fn drop_failed(service: &Service, slot: &Arc<Slot>, begun: &Discarding, n: usize, state: State, tried: bool) {
    for (at, run) in begun.runs.iter().enumerate().skip(n) {
        let to = (at == n && tried && slot.shared.is_none()).then_some(state);
        let waiters = settle::abandon_as(service, slot, begun.id, run.clone(), to);
        service.push_again(slot, waiters);
    }
}

fn could_not_drop(errno: Errno) -> Error {
    match errno {
        Errno::INVAL => Error::new(
            Errno::BUSY,
            "the memory is locked (mlock, MAP_LOCKED) and cannot be dropped: Linux 5.18 drops it where it is private or has \
             memory->fd",
        ),
        errno => Error::system("dropping guest pages", errno),
    }
}
