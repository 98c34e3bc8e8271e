//! The end of a slot and of a handle. No page that was not filled is released onto zeroes.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::host::{refuse_inside_callbacks, refuse_inside_fill};
use super::{Service, Work, DEAD};
use crate::capi::types::*;
use crate::claims::{Claims, Id};
use crate::error::{Error, Result};
use crate::mechanism::Content;
use crate::memory::{Slot, Waiter};
use crate::pages::State;
use crate::sync::lock;

/// Runs of pages from this length on, in bytes, are not poisoned at the end but made inaccessible: poison goes page by
/// page through the kernel and makes page tables, 17 ms and 2 MiB for each GiB. Few enough mappings come of it.
const CLOSE_OFF: u64 = 1 << 30;

/// How long kuf_remove_memory waits for fills that are running.
const FILLS_END: Duration = Duration::from_millis(100);

const UNFILLED: &str = "was not filled before the end of its service";

impl Service {
    /// `kuf_remove_memory`.
    pub fn remove_memory(&self, gpa: u64, flags: u32) -> Result<()> {
        refuse_inside_fill("kuf_remove_memory")?;
        known_flags(flags, KUF_CLOSE_POISON | KUF_CLOSE_POPULATE)?;
        self.check_open()?;
        let map = self.memory.map();
        let slot = map.slots().iter().find(|slot| slot.gpa == gpa).ok_or_else(|| no_slot_starts(gpa))?;
        if flags & KUF_CLOSE_POPULATE != 0 {
            // It waits for fills, of which the thread that raises an event may be one.
            refuse_inside_callbacks("kuf_remove_memory with KUF_CLOSE_POPULATE")?;
            self.populate_before_end(Some((slot.gpa, slot.len)), flags)?;
        }
        self.refuse_memslot_change(slot, "kuf_remove_memory")?;
        let views: Vec<_> = map.forks_of(slot).cloned().collect();
        // Until it has gone: see `Asking`.
        let _none = self.ahead.keep_off(slot);
        self.poison_when_idle(slot, flags & KUF_CLOSE_POISON != 0)?;
        views.iter().for_each(|slot| self.poison_rest(slot));
        self.take_out(slot, &views)?;
        views.iter().chain([slot]).for_each(|slot| slot.mechanism.detach(slot, false));
        slot.mechanism.detached(slot);
        if slot.mechanism.adopted() {
            let _adopting = lock(&self.adopting);
            let id = slot.mechanism.id();
            if !self.memory.map().all().any(|other| other.mechanism.id() == id) {
                self.give_up(&slot.mechanism);
            }
        }
        Ok(())
    }

    /// Closes the slot's pages for good when no fill of it is running, and without `poison` only if all are settled.
    ///
    /// Fills are waited for: a host whose vCPUs have stopped knows of none, but what was brought beside or ahead of their
    /// last touches may be under way. Not for ever, for a callback may want a lock that the caller holds; and not in a
    /// callback, on a thread that others may be waiting for.
    fn poison_when_idle(&self, slot: &Arc<Slot>, poison: bool) -> Result<()> {
        let patience = if refuse_inside_callbacks("").is_ok() { FILLS_END } else { Duration::ZERO };
        let since = Instant::now();
        let until = since + patience;
        let all = 0..slot.pages.total();
        // Host code that fills the slot may be writing to its very pages.
        // What has gone is not counted as unresolved: nobody can touch it.
        let poison = || poison || slot.gone().is_some_and(|errno| errno != libc::ENOENT);
        while !self.poison_unless(slot, |claims, all| {
            claims.busy(all) || slot.asks() || !poison() && (slot.pages.count(State::Absent) > 0 || claims.open(all))
        }) {
            let claims = slot.claims();
            let busy = claims.busy(&all) || slot.asks();
            if !poison() && (slot.pages.count(State::Absent) > 0 || !busy && claims.open(&all)) {
                return Err(unresolved(slot));
            }
            if self.check_open().is_ok() && claims.installing(&all) && since.elapsed() < FILLS_END {
                // Through the kernel in a moment, also where fills are not waited for: its toucher may have gone on already.
                drop(claims);
                std::thread::yield_now();
            } else if busy && Instant::now() >= until {
                return Err(Error::new(libc::EBUSY, "a fill of this slot is running: try again when it has ended"));
            } else if busy {
                // Not every end of a claim wakes who sleeps.
                let soon = Instant::now() + Duration::from_millis(1);
                drop(slot.sleep(claims, Some(soon.min(until))));
            }
        }
        Ok(())
    }

    /// Takes a slot and the views of it off the map. From here on no install of a late owner reaches its addresses,
    /// whoever they belong to next. Err: another thread has taken it off, and they may be another slot's already.
    pub(super) fn take_out(&self, slot: &Arc<Slot>, views: &[Arc<Slot>]) -> Result<()> {
        let _gate = slot.mechanism.gate().write().unwrap_or_else(PoisonError::into_inner);
        if slot.gone.swap(libc::ENOENT, Ordering::AcqRel) == libc::ENOENT {
            return Err(no_slot_starts(slot.gpa));
        }
        views.iter().for_each(|view| view.gone.store(libc::ENOENT, Ordering::Release));
        self.memory.update(|map| {
            map.remove(slot);
            Ok(())
        })
    }

    /// The part of `kuf_close` that can still be refused, while the handle is in full use.
    pub fn prepare_close(&self, flags: u32) -> Result<()> {
        refuse_inside_callbacks("kuf_close")?;
        known_flags(flags, KUF_CLOSE_POISON | KUF_CLOSE_POPULATE | KUF_CLOSE_NOWAIT | KUF_CLOSE_HANDOVER)?;
        if flags & KUF_CLOSE_HANDOVER != 0 {
            if flags & (KUF_CLOSE_POISON | KUF_CLOSE_POPULATE) != 0 {
                let text =
                    "KUF_CLOSE_HANDOVER leaves pages to another handler: it goes with no other way to settle them";
                return Err(Error::new(libc::EINVAL, text));
            }
            if self.memory.map().slots().iter().any(|slot| !slot.mechanism.adopted()) {
                let text = "KUF_CLOSE_HANDOVER needs every slot to have been added with KUF_MEMORY_UFFD";
                return Err(Error::new(libc::EINVAL, text));
            }
            return Ok(());
        }
        if self.life.load(Ordering::Acquire) == DEAD {
            return Ok(());
        }
        if flags & KUF_CLOSE_POPULATE != 0 {
            self.populate_before_end(None, flags)?;
        }
        self.check_settled(flags)
    }

    /// Refuses to end with unresolved pages that nobody said what to do with.
    pub fn check_settled(&self, flags: u32) -> Result<()> {
        if flags & (KUF_CLOSE_POISON | KUF_CLOSE_HANDOVER) != 0 || self.life.load(Ordering::Acquire) == DEAD {
            return Ok(());
        }
        match self.memory.map().slots().iter().find(|slot| !settled(slot)) {
            Some(slot) => Err(unresolved(slot)),
            None => Ok(()),
        }
    }

    fn populate_before_end(&self, range: Option<(u64, u64)>, flags: u32) -> Result<()> {
        if !self.serviced() {
            return Err(Error::new(libc::ENOTSUP, "KUF_CLOSE_POPULATE needs a fill callback to ask, or sources"));
        }
        match self.populate_now(range) {
            Err(errno) if flags & KUF_CLOSE_POISON == 0 => {
                let reason = std::io::Error::from_raw_os_error(errno);
                Err(Error::new(libc::EIO, format!("not everything could be filled ({reason}): nothing was closed")))
            }
            _ => Ok(()),
        }
    }

    /// The part of `kuf_close` that cannot fail. No call on the handle begins any more; those that wait return.
    pub fn begin_end(&self) {
        let _ = self.life.compare_exchange(super::OPEN, super::CLOSING, Ordering::AcqRel, Ordering::Acquire);
        self.wake_everybody();
    }

    /// Poisons what is left, before anything that may take time.
    pub fn settle_rest(&self, flags: u32) {
        if flags & KUF_CLOSE_HANDOVER != 0 {
            return;
        }
        for slot in self.memory.map().all() {
            self.poison_rest(slot);
        }
    }

    /// Ends the threads and gives the memory back.
    pub fn end(self: &Arc<Self>, flags: u32) {
        self.stop_threads(flags & KUF_CLOSE_NOWAIT != 0);
        if flags & KUF_CLOSE_HANDOVER != 0 {
            // What was read here and not served is asked again, of whoever reads next.
            for slot in self.memory.map().all() {
                slot.mechanism.wake(slot, &(0..slot.pages.total()));
            }
        } else {
            self.let_go(flags & KUF_CLOSE_NOWAIT != 0);
        }
        self.end_forks();
    }

    fn let_go(&self, in_use: bool) {
        // Every page is present, removed or poisoned now: unregistering wakes nobody onto a wrong page. What was added since
        // the pages were settled is settled here.
        let map = self.memory.map();
        map.all().for_each(|slot| self.poison_rest(slot));
        map.all().for_each(|slot| slot.mechanism.detach(slot, in_use));
        map.all().for_each(|slot| slot.mechanism.detached(slot));
        self.read_at_the_end();
        // A thread that is left in a callback finds that its slot has gone. Not with the gate held: a service that died
        // may never give it back.
        map.all().for_each(|slot| slot.gone.store(libc::ECANCELED, Ordering::Release));
    }

    /// Reads and applies events when the service threads do so no more: whoever waits in madvise, munmap or mremap for
    /// an event of theirs to be read has nobody else to read it. Faults find their pages poisoned, or present.
    fn read_at_the_end(&self) {
        self.pump_all();
    }

    /// As [`Service::read_at_the_end`], and serves the faults that no source is needed for: a thread that still runs may
    /// be changing a memslot, and KVM lets it when nobody waits.
    pub fn serve_at_the_end(&self) {
        self.read_at_the_end();
        while let Ok(work) = self.work.1.try_recv() {
            match work {
                Work::Fault(fault) if fault.slot.pages.get(fault.page) != State::Absent => {
                    let _ = self.serve(fault);
                }
                _ => {}
            }
        }
    }

    /// Takes every unsettled page from whoever is at it and poisons it. Late answers find nothing to fill.
    pub(super) fn poison_rest(&self, slot: &Arc<Slot>) {
        self.poison_unless(slot, |_, _| false);
    }

    /// As [`Service::poison_rest`], but does nothing and returns false if `refuse` says so of the slot's claims.
    pub(super) fn poison_unless(
        &self,
        slot: &Arc<Slot>,
        refuse: impl Fn(&Claims<Waiter>, &Range<u64>) -> bool,
    ) -> bool {
        let (id, runs, waiters) = loop {
            let mut claims = slot.claims();
            if refuse(&claims, &(0..slot.pages.total())) {
                return false;
            }
            // A page that is on its way through the kernel is present in a moment, or dropped. In a dead service it may
            // stay there.
            let all = 0..slot.pages.total();
            if self.life.load(Ordering::Acquire) == DEAD || !(claims.installing(&all) || claims.dropping(&all)) {
                let shut = claims.shut(&slot.pages);
                slot.wake_sleepers(&claims);
                break shut;
            }
            drop(claims);
            if self.check_open().is_err() {
                // It may be waiting for its REMOVE event to be read, and the threads that read may have ended.
                self.serve_at_the_end();
            }
            std::thread::yield_now();
        };
        drop(waiters);
        if slot.gone().is_none() {
            for run in runs {
                if !self.close_off_at_end(slot, id, &run) {
                    self.poison_with(slot, id, run, Content::PoisonAtEnd, libc::ECANCELED, UNFILLED);
                }
            }
        }
        true
    }

    /// Makes a long run that the claim `id` owns inaccessible, which takes no time and no page tables. False: it is to be
    /// poisoned.
    fn close_off_at_end(&self, slot: &Arc<Slot>, id: Id, run: &Range<u64>) -> bool {
        let (gpa, len) = slot.gpa_of(run);
        if len < CLOSE_OFF || slot.mechanism.marks() || slot.mechanism.remote() {
            return false;
        }
        {
            let _gate = slot.mechanism.gate().read().unwrap_or_else(PoisonError::into_inner);
            if slot.gone().is_some() {
                return false;
            }
            let (mine, _) = slot.claims().begin_install(run.clone(), id);
            // The host may have resolved or discarded pages of it since.
            let whole = mine.first() == Some(run);
            if whole && slot.in_place() {
                // What a failed fill has left there is nobody's.
                slot.scrub(run);
            }
            if !whole || !slot.mechanism.close_off(slot, run) {
                slot.claims().suspend(run.clone(), id);
                return false;
            }
            self.closed_off(slot, id, run);
        }
        let text = format!("guest memory {gpa:#x}..{:#x} {UNFILLED}: made inaccessible", gpa + len);
        self.config.host.event(KUF_EVENT_CLOSED_OFF, gpa, len, libc::ECANCELED, &text);
        true
    }
}

/// Whether nothing is left to be filled. A page whose toucher has gone on already may not be booked yet: that is waited
/// for.
fn settled(slot: &Arc<Slot>) -> bool {
    while slot.gone().is_none() && !slot.settled_for_good() {
        if slot.pages.count(State::Absent) > 0 || !slot.claims().installing(&(0..slot.pages.total())) {
            return slot.settled_for_good();
        }
        std::thread::yield_now();
    }
    true
}

fn no_slot_starts(gpa: u64) -> Error {
    Error::new(libc::ENOENT, format!("no memory slot starts at gpa {gpa:#x}"))
}

fn unresolved(slot: &Slot) -> Error {
    let text = format!(
        "the memory slot at gpa {:#x} has unresolved pages: pass KUF_CLOSE_POPULATE to fill them or KUF_CLOSE_POISON to \
         poison them",
        slot.gpa
    );
    Error::new(libc::EBUSY, text)
}

fn known_flags(flags: u32, known: u32) -> Result<()> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Error::new(libc::EINVAL, format!("unknown flags {unknown:#x}"))),
    }
}
