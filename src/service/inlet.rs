//! Reading the kernel: messages in, faults out, with the removals of a batch applied before its faults.
//!
//! The kernel hands out page faults before other events, and a thread in madvise or munmap goes on as soon as its event
//! has been read. So reading and applying happen with the gate held exclusively: no install that was decided on before
//! can reach the kernel after. A page that was given back is then refilled with zeroes, never with old bytes.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::{Fault, Service, Work};
use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::mechanism::{Address, Left, Mechanism, Message};
use crate::memory::Slot;
use crate::sync::{lock, Mutex};

/// A queue that is read.
pub struct Inlet {
    pub mechanism: Arc<dyn Mechanism>,
    /// Which of the mechanism's.
    pub queue: usize,
    /// The host's descriptor it was made from.
    pub host_fd: Option<i32>,
    /// Its memory belongs to another process.
    pub remote: bool,
    /// It serves a forked child.
    pub fork: bool,
    /// It holds messages there was no room for.
    starved: AtomicBool,
    /// It is read no more, whoever still has it: its userfaultfd may be another mechanism's by now.
    dropped: AtomicBool,
    /// Faults of an adopted userfaultfd in no slot, as (hva, flags, thread, when): of one that is still to be added.
    parked: Mutex<Vec<(u64, u32, u32, Instant)>>,
    /// What was given back there and is in no slot: of one that is still to be added. Sorted, apart from each other.
    given_back: Mutex<Vec<Range<u64>>>,
    /// Empty ones, for whoever reads next.
    lists: Mutex<Lists>,
}

/// What was read, and what there is to do about it: kept, so that a read allocates nothing.
#[derive(Default)]
struct Lists {
    messages: Vec<Message>,
    work: Vec<Work>,
}

impl Inlet {
    pub(super) fn new(
        mechanism: Arc<dyn Mechanism>,
        queue: usize,
        host_fd: Option<i32>,
        remote: bool,
        fork: bool,
    ) -> Arc<Self> {
        let (starved, dropped) = (AtomicBool::new(false), AtomicBool::new(false));
        let (parked, given_back, lists) = Default::default();
        Arc::new(Self { mechanism, queue, host_fd, remote, fork, starved, dropped, parked, given_back, lists })
    }

    /// Whether it holds messages there was no room for.
    pub(super) fn is_starved(&self) -> bool {
        self.starved.load(Ordering::SeqCst)
    }
}

impl Service {
    /// Reads a mechanism from now on.
    pub(super) fn add_inlet(&self, mechanism: Arc<dyn Mechanism>, host_fd: Option<(i32, bool)>) -> Result<()> {
        let (host_fd, remote) = host_fd.map_or((None, false), |(fd, remote)| (Some(fd), remote));
        for queue in 0..mechanism.queues() {
            self.add(Inlet::new(mechanism.clone(), queue, host_fd, remote, false))?;
        }
        Ok(())
    }

    pub(super) fn add(&self, inlet: Arc<Inlet>) -> Result<()> {
        let mechanism = inlet.mechanism.clone();
        let (queue, remote) = (inlet.queue, inlet.remote);
        if remote || mechanism.ticks() {
            self.has_to_look.store(true, Ordering::Relaxed);
        }
        self.change_inlets(|inlets| inlets.push(inlet));
        if let Some(fd) = mechanism.inlet(queue) {
            if let Err(error) = self.waking.watch(fd, mechanism.id(), queue) {
                self.drop_inlet(mechanism.id());
                return Err(error);
            }
        }
        if remote && !self.config.direct {
            // Somebody has to start looking after that process now and then.
            self.waking.wake();
        }
        Ok(())
    }

    /// Stops reading a mechanism.
    pub(super) fn drop_inlet(&self, mechanism: u32) {
        self.change_inlets(|inlets| {
            inlets.retain(|inlet| {
                let other = inlet.mechanism.id() != mechanism;
                inlet.dropped.fetch_or(!other, Ordering::SeqCst);
                if let Some(fd) = inlet.mechanism.inlet(inlet.queue).filter(|_| !other) {
                    self.waking.unwatch(fd);
                }
                other
            });
        });
    }

    fn change_inlets(&self, change: impl FnOnce(&mut Vec<Arc<Inlet>>)) {
        let mut inlets = self.inlets.write().unwrap_or_else(PoisonError::into_inner);
        change(Arc::make_mut(&mut inlets));
    }

    /// The first queue of a mechanism: what only adopted userfaultfds need is kept there, which have no other.
    pub(super) fn inlet(&self, mechanism: u32) -> Option<Arc<Inlet>> {
        self.inlets().iter().find(|inlet| inlet.mechanism.id() == mechanism).cloned()
    }

    /// Reads what a queue has, as far as there is room for more faults.
    pub(super) fn pump(&self, mechanism: u32, queue: usize) {
        let inlets = self.inlets();
        let found = inlets.iter().find(|inlet| inlet.queue == queue && inlet.mechanism.id() == mechanism);
        let Some(inlet) = found else { return };
        let held = self.work.1.len();
        let room = self.config.queue_max.saturating_sub(held);
        if room == 0 {
            self.stats.here().queue_full(1);
            self.starve(inlet);
            // Whoever takes the last one looks for starved queues; it may have looked just before.
            if !self.work.1.is_empty() {
                return;
            }
        }
        self.pump_inlet(inlet, room.max(1), Self::send);
    }

    /// Reads everything a mechanism has, room or not: an install waits for the events in there. From every queue: an
    /// munmap(2) has an event for each, makes all of them refuse at once, and brings one when another has been read.
    pub(super) fn pump_events(&self, mechanism: &Arc<dyn Mechanism>) {
        for inlet in self.inlets().iter().filter(|inlet| inlet.mechanism.id() == mechanism.id()) {
            self.pump_inlet(inlet, usize::MAX, Self::push_counted);
        }
    }

    /// Reads every queue that had to wait for room.
    pub(super) fn pump_starved(&self) {
        // Asked after each fault, and almost never so.
        if !self.starving.load(Ordering::SeqCst) || !self.starving.swap(false, Ordering::SeqCst) {
            return;
        }
        for inlet in self.inlets().iter() {
            if inlet.is_starved() {
                self.pump(inlet.mechanism.id(), inlet.queue);
            }
        }
    }

    fn starve(&self, inlet: &Inlet) {
        inlet.starved.store(true, Ordering::SeqCst);
        self.starving.store(true, Ordering::SeqCst);
    }

    /// Reads every queue: the host's thread is the only reader there is.
    pub(super) fn pump_all(&self) {
        for inlet in self.inlets().iter() {
            self.pump_inlet(inlet, self.config.queue_max, Self::send);
        }
    }

    fn pump_inlet(&self, inlet: &Arc<Inlet>, room: usize, push: fn(&Self, Work)) {
        // Somebody else may have them at this moment, and then they are new ones.
        let Lists { mut messages, mut work } = std::mem::take(&mut *lock(&inlet.lists));
        let mut read = Ok(Left::More);
        while work.is_empty() && matches!(read, Ok(Left::More)) {
            read = {
                let _gate = inlet.mechanism.gate().write().unwrap_or_else(PoisonError::into_inner);
                inlet.starved.store(false, Ordering::SeqCst);
                let read = match inlet.dropped.load(Ordering::SeqCst) {
                    false => inlet.mechanism.read(inlet.queue, room, &mut messages),
                    true => Ok(Left::Nothing),
                };
                if matches!(read, Ok(Left::More)) {
                    self.starve(inlet);
                }
                self.apply(inlet, &mut messages, &mut work);
                work.iter().for_each(|work| self.count(work));
                read
            };
        }
        // Stopped for want of room, which may have been just enough.
        self.stats.here().queue_full(u64::from(matches!(read, Ok(Left::More))));
        self.hand_on(inlet, work.drain(..), read.map(drop), push);
        *lock(&inlet.lists) = Lists { messages, work };
    }

    /// What follows a read, with the gate released.
    pub(super) fn hand_on(
        &self,
        inlet: &Arc<Inlet>,
        work: impl IntoIterator<Item = Work>,
        read: std::result::Result<(), i32>,
        push: fn(&Self, Work),
    ) {
        for work in work {
            push(self, work);
        }
        if let Err(errno) = read {
            let what = format!("reading {}", inlet.mechanism.queue_name());
            self.unreadable(inlet, &Error::system(&what, errno));
        }
    }

    /// The library's own queue cannot be read any more: that is the end. One that the host brought may be broken
    /// without harm to the others.
    fn unreadable(&self, inlet: &Arc<Inlet>, error: &Error) {
        if !inlet.mechanism.adopted() {
            return self.fail(error.text());
        }
        self.drop_inlet(inlet.mechanism.id());
        self.lose(inlet.mechanism.as_ref(), error.errno());
    }

    /// Applies events in their order, then looks up where the faults are. Leaves `messages` empty.
    pub(super) fn apply(&self, inlet: &Arc<Inlet>, messages: &mut Vec<Message>, work: &mut Vec<Work>) {
        let id = inlet.mechanism.id();
        let read_at = Instant::now();
        let mut remapped = false;
        messages.retain_mut(|message| {
            if matches!(message, Message::Fault { .. }) {
                return true;
            }
            remapped |= self.apply_event(inlet, std::mem::replace(message, Message::Lost), work);
            false
        });
        if remapped {
            self.unpark(id, true);
        }
        self.count_faults(messages);
        let map = self.memory.map();
        for message in messages.drain(..) {
            let Message::Fault { at, flags, thread } = message else { continue };
            match (map.at(id, at), at) {
                (Some((slot, page)), _) => {
                    self.stats.overlap.begin(thread, read_at);
                    work.push(Work::Fault(Fault { slot: slot.clone(), page, flags, thread, read_at }));
                }
                // Registered by the host, which may be about to add the slot: let it wait, not spin.
                (None, Address::Hva(hva)) if inlet.mechanism.adopted() => {
                    lock(&inlet.parked).push((hva, flags, thread, read_at));
                }
                (None, at) => {
                    self.stats.here().faults_unknown(1);
                    if let Address::Hva(hva) = at {
                        inlet.mechanism.wake_range(hva..hva + 1);
                    }
                }
            }
        }
    }

    /// Before anybody is woken: who goes on finds the fault counted.
    fn count_faults(&self, faults: &[Message]) {
        let stats = self.stats.here();
        let having = |flag| {
            let has = |fault: &&Message| matches!(fault, Message::Fault { flags, .. } if flags & flag != 0);
            faults.iter().filter(has).count() as u64
        };
        stats.faults(faults.len() as u64);
        stats.faults_minor(having(KUF_FAULT_MINOR));
        stats.faults_write(having(KUF_FAULT_WRITE));
    }

    /// Applies one event. Returns whether it changed which addresses are guest memory.
    fn apply_event(&self, inlet: &Arc<Inlet>, message: Message, work: &mut Vec<Work>) -> bool {
        let id = inlet.mechanism.id();
        let remaps = matches!(message, Message::Unmapped(_) | Message::Moved { .. });
        match message {
            Message::Fault { .. } => {}
            Message::Removed(range) => {
                self.stats.here().events_remove(1);
                self.remove_range(id, &range, false, work);
                self.note_given_back(inlet, range);
            }
            Message::Unmapped(range) => {
                self.stats.here().events_unmap(1);
                self.remove_range(id, &range, true, work);
                // What is mapped there next is not what was given back.
                let _ = take_within(&mut lock(&inlet.given_back), &range);
                inlet.mechanism.wake_range(range);
            }
            Message::Moved { from, to } => {
                self.stats.here().events_remap(1);
                self.note(KUF_LOG_DEBUG, || format!("hva {from:#x?} moved to {to:#x}"), work);
                let map = self.memory.map();
                for (slot, _) in map.within_hva(id, from.clone()) {
                    slot.moved(from.clone(), Some(to));
                }
                self.memory.reindex();
                let moved = take_within(&mut lock(&inlet.given_back), &from);
                for range in moved {
                    let at = |hva| to + (hva - from.start);
                    self.note_given_back(inlet, at(range.start)..at(range.end));
                }
                // The kernel does not wake who waits at an address that is no longer the page's.
                inlet.mechanism.wake_range(from);
            }
            Message::Forked(fd) => {
                self.stats.here().events_fork(1);
                self.follow_fork(inlet, fd, work);
            }
            Message::Lost => {
                self.stats.here().faults_lost(1);
                self.begin_sweep(work);
            }
            Message::Unsignalled => {
                self.stats.here().faults_unsignalled(1);
                self.warn_of_signals(work);
            }
        }
        remaps
    }

    /// An adopted userfaultfd may report memory given back before its slot is added: it is kept for that.
    fn note_given_back(&self, inlet: &Inlet, range: Range<u64>) {
        if !inlet.mechanism.adopted() {
            return;
        }
        let mut rest = vec![range];
        for (slot, _) in self.memory.map().within_hva(inlet.mechanism.id(), rest[0].clone()) {
            for extent in slot.extents() {
                let _ = take_within(&mut rest, &(extent.hva..extent.hva + extent.len));
            }
        }
        let mut given_back = lock(&inlet.given_back);
        for range in rest {
            let _ = take_within(&mut given_back, &range);
            let at = given_back.partition_point(|other| other.end < range.start);
            let end =
                given_back[at..].iter().position(|other| other.start > range.end).map_or(given_back.len(), |n| at + n);
            let touching = &given_back[at..end];
            let start = touching.first().map_or(range.start, |first| first.start.min(range.start));
            let last = touching.last().map_or(range.end, |last| last.end.max(range.end));
            given_back.splice(at..end, std::iter::once(start..last));
        }
    }

    /// Applies to a slot that was just added what was given back of it before. The caller holds the gate exclusively.
    pub(super) fn apply_given_back(&self, slot: &Arc<Slot>, work: &mut Vec<Work>) {
        let Some(inlet) = self.inlet(slot.mechanism.id()) else { return };
        for extent in slot.extents() {
            let ranges = take_within(&mut lock(&inlet.given_back), &(extent.hva..extent.hva + extent.len));
            for range in ranges {
                let offset = |hva| extent.offset + (hva - extent.hva);
                self.give_back(slot, slot.pages_of(&(offset(range.start)..offset(range.end))), work);
            }
        }
    }

    /// Looks again at faults that were in no slot: one was added (`mechanism`'s), or a mapping changed.
    pub(super) fn unpark(&self, mechanism: u32, wake_rest: bool) {
        let Some(inlet) = self.inlet(mechanism) else { return };
        let map = self.memory.map();
        let mut found = Vec::new();
        lock(&inlet.parked).retain(|(hva, flags, thread, read_at)| match map.at_hva(mechanism, *hva) {
            Some((slot, page)) => {
                let (flags, thread, read_at) = (*flags, *thread, *read_at);
                self.stats.overlap.begin(thread, read_at);
                found.push(Fault { slot: slot.clone(), page, flags, thread, read_at });
                false
            }
            None if wake_rest => {
                self.stats.here().faults_unknown(1);
                inlet.mechanism.wake_range(*hva..*hva + 1);
                false
            }
            None => true,
        });
        found.into_iter().for_each(|fault| self.push(Work::Fault(fault)));
    }

    /// A log record to be passed on when the gate is free again.
    fn note(&self, level: u32, text: impl FnOnce() -> String, work: &mut Vec<Work>) {
        if self.config.host.wants(level) {
            work.push(Work::Log(level, text()));
        }
    }

    fn remove_range(&self, mechanism: u32, hva: &Range<u64>, unmapped: bool, work: &mut Vec<Work>) {
        let what = if unmapped { "unmapped" } else { "removed" };
        self.note(KUF_LOG_DEBUG, || format!("hva {hva:#x?} {what}"), work);
        let map = self.memory.map();
        for (slot, pages) in map.within_hva(mechanism, hva.clone()) {
            self.give_back(&slot, pages, work);
        }
        if unmapped {
            for (slot, _) in map.within_hva(mechanism, hva.clone()) {
                slot.moved(hva.clone(), None);
            }
            self.memory.reindex();
        }
    }

    /// Marks pages as given back by the guest. The caller holds the gate exclusively.
    pub(super) fn give_back(&self, slot: &Arc<Slot>, pages: Range<u64>, work: &mut Vec<Work>) {
        use crate::pages::State;
        // Whatever the file holds where no page was ever filled is nobody's: it must not turn up at a minor fault.
        if slot.shared.is_some() && slot.parent.is_none() {
            let mut from = pages.start;
            while let Some(run) = slot.pages.first_run(from..pages.end, State::Absent, u64::MAX) {
                from = run.end;
                slot.scrub(&run);
            }
        }
        let waiters = {
            let mut claims = slot.claims();
            let before = slot.pages.count(State::Removed);
            let waiters = claims.remove(&slot.pages, pages);
            self.stats.here().bytes_removed((slot.pages.count(State::Removed) - before) * slot.granule);
            slot.wake_sleepers(&claims);
            waiters
        };
        work.extend(waiters.into_iter().map(|w| {
            let slot = w.fork.clone().unwrap_or_else(|| slot.clone());
            Work::Fault(Fault { slot, page: w.page, flags: w.flags, thread: w.thread, read_at: w.read_at })
        }));
        if let Some(notice) = self.completion(slot) {
            work.push(notice);
        }
    }

    /// Nothing in the kernel reports that another process has ended: look now and then.
    pub(super) fn look_after_processes(&self) {
        self.forget_dead_children();
        for inlet in self.inlets().iter().filter(|inlet| inlet.remote && !inlet.fork) {
            if !inlet.mechanism.alive() {
                self.lose(inlet.mechanism.as_ref(), libc::ESRCH);
            }
        }
    }

    fn lose(&self, mechanism: &dyn Mechanism, errno: i32) {
        let lost: Vec<_> = {
            // A slot that is being added is in the map before the kernel has accepted it: where it does not, the host is
            // told by the call, and nothing has gone.
            let _gate = mechanism.gate().read().unwrap_or_else(PoisonError::into_inner);
            let map = self.memory.map();
            let its = map.slots().iter().filter(|slot| slot.mechanism.id() == mechanism.id());
            its.filter_map(|slot| self.gone(slot, errno)).collect()
        };
        lost.into_iter().for_each(|work| self.push(work));
    }

    /// The memory behind a slot, or its process, went away. Returns what to tell the host, the first time.
    pub(super) fn gone(&self, slot: &Arc<Slot>, errno: i32) -> Option<Work> {
        slot.gone.compare_exchange(0, errno, Ordering::AcqRel, Ordering::Acquire).ok()?;
        let claims = slot.claims();
        slot.wake_sleepers(&claims);
        let text = format!("the process behind the memory slot at gpa {:#x} is gone", slot.gpa);
        (slot.parent.is_none()).then_some(Work::Notice {
            kind: KUF_EVENT_GONE,
            gpa: slot.gpa,
            len: slot.len,
            error: errno,
            text,
        })
    }
}

/// Cuts `range` out of `ranges`, which are sorted and apart, and returns what was cut.
fn take_within(ranges: &mut Vec<Range<u64>>, range: &Range<u64>) -> Vec<Range<u64>> {
    let mut taken = Vec::new();
    let mut left = Vec::with_capacity(ranges.len());
    for other in ranges.drain(..) {
        let (start, end) = (other.start.max(range.start), other.end.min(range.end));
        if start >= end {
            left.push(other);
            continue;
        }
        taken.push(start..end);
        left.extend([other.start..start, end..other.end].into_iter().filter(|part| !part.is_empty()));
    }
    *ranges = left;
    taken
}

#[cfg(test)]
mod tests {
    use super::take_within;

    #[test]
    fn a_range_is_cut_out_of_others() {
        let mut ranges = vec![0..10, 20..30, 40..50];
        assert_eq!(take_within(&mut ranges, &(5..45)), [5..10, 20..30, 40..45]);
        assert_eq!(ranges, [0..5, 45..50]);
        assert!(take_within(&mut ranges, &(5..45)).is_empty());
    }
}
