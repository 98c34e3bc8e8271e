//! Whose page is it? What a fault, a vCPU exit or a host thread finds, and what it does about it.

use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::fill::Run;
use super::host::refuse_inside_callbacks;
use super::{ahead, deadline, huge, Fault, Service};
use crate::ahead::{Plan, Reach, Rest, NEAR};
use crate::capi::types::*;
use crate::claims::{Claims, Id, Owner, Terms};
use crate::error::{Error, Result};
use crate::mechanism::{Content, Stop};
use crate::memory::{Slot, Waiter};
use crate::pages::State;
use crate::sync::lock;
use crate::uapi::kvm::KVM_MEMORY_EXIT_FLAG_USERFAULT;

/// What a thread has to do for a page.
enum Task {
    /// Nothing: it is there, or somebody else is at it.
    Nothing,
    /// Ask for this run, and later for the rest.
    Fill(Id, Range<u64>, Rest),
    /// The guest gave it back: zero.
    Zero(Id),
    /// It has its bytes already, but this toucher's mapping may not show them.
    Map(Id),
    /// It was poisoned, and was touched all the same.
    Poison,
    /// It is the root slot's to fill; serve this fault again when that is done.
    Parent(Arc<Slot>),
}

impl Service {
    /// Serves one fault that was read from the kernel. Returns what is to be brought before the next one.
    pub(super) fn serve(&self, fault: Fault) -> Option<ahead::Task> {
        let since = Instant::now();
        self.stats.here().queueing(since.saturating_duration_since(fault.read_at));
        let (slot, page, flags, thread) = (fault.slot.clone(), fault.page, fault.flags, fault.thread);
        if slot.gone().is_some() {
            return None;
        }
        match self.task_for(fault, since) {
            Task::Nothing => {}
            Task::Fill(id, pages, rest) => {
                // A failure has poisoned the page and told the host.
                let run = Run { slot, id, pages, wanted: Some(page), thread, ahead: false, since };
                if self.fill(&run).is_ok() {
                    return self.bring_later(&run.slot, rest);
                }
            }
            Task::Zero(id) => self.zero(&slot, id, page..page + 1),
            Task::Map(id) => self.map(&slot, id, page),
            Task::Poison => self.touch_poison(&slot, page),
            Task::Parent(root) => {
                let fault = Fault { slot: root, page, flags, thread: 0, read_at: Instant::now() };
                self.serve_for_child(fault, slot);
            }
        }
        None
    }

    /// `since`: now.
    fn task_for(&self, fault: Fault, since: Instant) -> Task {
        let Fault { slot, page, flags, thread, read_at } = fault;
        let waiter = Waiter { page, read_at, thread, flags, fork: None };
        let terms = Terms { since: Some(since), ..slot.fill_terms(true) };
        if let Some(root) = slot.parent.as_ref().filter(|_| slot.shared.is_some()) {
            if root.pages.get(page) != State::Present {
                return Task::Parent(root.clone());
            }
            let mut claims = slot.claims();
            return match claim_from(&mut claims, &slot, page, 1, terms, waiter) {
                Some((id, _)) => Task::Map(id),
                None => Task::Nothing,
            };
        }
        let mut claims = slot.claims();
        match slot.pages.get(page) {
            State::Filling => {
                self.stats.here().faults_joined(1);
                self.record_joined(&slot, page, &mut claims);
                match claims.join(waiter) {
                    Ok(Owner::Poison) => Task::Poison,
                    _ => Task::Nothing,
                }
            }
            State::Absent if !self.serviced() => {
                drop(claims);
                self.ask(&slot, page, waiter);
                Task::Nothing
            }
            State::Absent => {
                let Some(waiter) = self.leave_to_replay(&slot, waiter) else { return Task::Nothing };
                let (run, rest) = self.plan(&slot, page, thread);
                match claim_from(&mut claims, &slot, run.start, run.end - run.start, terms, waiter) {
                    Some((id, pages)) => {
                        self.record(&slot, &pages);
                        Task::Fill(id, pages, rest)
                    }
                    None => Task::Nothing,
                }
            }
            state @ (State::Removed | State::Present) => {
                if state == State::Present {
                    self.stats.here().faults_late(1);
                    if slot.mechanism.reveal(&slot).is_none() {
                        drop(claims);
                        self.stats.ended(self.stats.here(), thread, read_at, Instant::now());
                        return Task::Nothing;
                    }
                }
                let Some((id, _)) = claims.claim(&slot.pages, page, 1, state, terms) else { return Task::Nothing };
                let _ = claims.join(waiter);
                if state == State::Removed {
                    Task::Zero(id)
                } else {
                    Task::Map(id)
                }
            }
        }
    }

    /// What a fault at `page`, which is absent, brings: at once, and afterwards. The claims are locked.
    fn plan(&self, slot: &Slot, page: u64, thread: u32) -> (Range<u64>, Rest) {
        let reach = Reach::new(self.config.demand_run, slot.granule);
        let Plan { run, rest, passed } = lock(&slot.streams).plan(&slot.pages, reach, page, thread);
        // What was brought ahead is of the working set when it turns out to have been.
        self.record(slot, &passed);
        (run, rest)
    }

    /// Pages that the guest gave back are touched again.
    fn zero(&self, slot: &Arc<Slot>, id: Id, pages: Range<u64>) {
        let page = pages.start;
        if slot.shared.is_some() {
            // Still in the file, then it was unmapped only, and its bytes are the guest's own.
            match self.install(slot, id, pages.clone(), page, Content::InPlace) {
                (_, Err(failed)) if failed.errno == libc::EFAULT => {}
                (_, Err(failed)) => return self.could_not(slot, id, pages, failed.errno),
                (_, Ok(())) => return,
            }
        }
        let content = match self.place_in(slot, &pages) {
            // Dropped when it was given back, and not opened since: it is zero.
            _ if slot.mechanism.marks() => Content::ZeroInPlace,
            Ok(Some(at)) => {
                // SAFETY: `place` made these bytes writable, and the claim makes them this thread's.
                unsafe { at.write_bytes(0, ((pages.end - pages.start) * slot.granule) as usize) };
                Content::ZeroInPlace
            }
            Ok(None) => Content::Zero,
            Err(errno) => return self.could_not(slot, id, pages, errno),
        };
        let (_, result) = self.install(slot, id, pages.clone(), page, content);
        if let Err(failed) = result {
            self.could_not(slot, id, pages, failed.errno);
        }
    }

    /// A page that is present was touched: it has become so since, or this mapping does not show it yet, or it was
    /// dropped without a word (no REMOVE events on an adopted userfaultfd), and then it is zero like all memory that
    /// was dropped.
    fn map(&self, slot: &Arc<Slot>, id: Id, page: u64) {
        let pages = page..page + 1;
        let content = slot.mechanism.reveal(slot).unwrap_or(Content::Shown);
        match self.install(slot, id, pages.clone(), page, content) {
            (_, Ok(())) => {}
            (_, Err(failed)) if failed.errno == libc::EFAULT && slot.shared.is_some() => {
                self.zero(slot, id, pages);
            }
            (_, Err(failed)) => self.could_not(slot, id, pages, failed.errno),
        }
    }

    /// Opens what the guest gave back of `pages`: where a vCPU exits at it, it would exit again.
    pub(super) fn open_removed(&self, slot: &Arc<Slot>, pages: &Range<u64>) {
        let mut from = pages.start;
        let max = if slot.mechanism.marks() { u64::MAX } else { 1 };
        while let Some(run) = slot.pages.first_run(from..pages.end, State::Removed, max) {
            let terms = slot.fill_terms(true);
            let claimed = slot.claims().claim(&slot.pages, run.start, run.end - run.start, State::Removed, terms);
            from = claimed.as_ref().map_or(run.start + 1, |(_, pages)| pages.end);
            if let Some((id, pages)) = claimed {
                self.zero(slot, id, pages);
            }
        }
    }

    pub(super) fn could_not(&self, slot: &Arc<Slot>, id: Id, pages: Range<u64>, errno: i32) {
        if slot.gone().is_some() {
            self.abandon_quietly(slot, id, pages);
        } else if errno == libc::EFAULT && slot.shared.is_some() {
            // Dropped from the file between being put there and being opened: MADV_REMOVE does so some time after its
            // event. Who waits is served anew.
            self.abandon(slot, id, pages);
        } else {
            self.poison(slot, id, pages, errno, "could not be made present");
        }
    }

    /// The mark of a poisoned page was lost (its mapping changed, or the kernel has no poison): put it there again.
    pub(super) fn touch_poison(&self, slot: &Arc<Slot>, page: u64) {
        let pages = page..page + 1;
        loop {
            let stop = {
                let _gate = slot.mechanism.gate().read().unwrap_or_else(PoisonError::into_inner);
                if slot.gone().is_some() {
                    // A fault that was read before its slot was removed. Its addresses may be another slot's by now.
                    return;
                }
                let Some(id) = slot.claims().begin_mark(page) else {
                    // Discarded meanwhile: who waits looks again.
                    return slot.mechanism.wake(slot, &pages);
                };
                // A service that ends may have left its callback to write there.
                let content = if self.check_open().is_ok() { Content::Poison } else { Content::PoisonAtEnd };
                let marked = slot.mechanism.install(slot, &pages, content);
                let mut claims = slot.claims();
                for waiter in claims.poison(pages.clone(), id) {
                    self.stats.overlap.end(waiter.thread, waiter.read_at, Instant::now());
                }
                slot.wake_sleepers(&claims);
                marked.stop
            };
            match stop {
                Some(Stop::Again) => {
                    self.pump_events(&slot.mechanism);
                    std::thread::yield_now();
                }
                Some(Stop::Exists) => return slot.mechanism.wake(slot, &pages),
                // Guest memory no more, so nobody waits; what is mapped there now may be anybody's.
                Some(Stop::Unmapped | Stop::Dead) => return,
                None if slot.mechanism.marks() => return self.parked(slot, pages),
                Some(_) if !self.close_off(slot, std::slice::from_ref(&pages)) => {
                    let text = || format!("a poisoned page of the memory slot at gpa {:#x} stays closed", slot.gpa);
                    return self.config.host.log(KUF_LOG_WARN, text);
                }
                _ => return,
            }
        }
    }

    /// A child touched shared memory whose bytes are not there yet: fill the root slot, then come back.
    fn serve_for_child(&self, root: Fault, child: Arc<Slot>) {
        let Fault { slot, page, flags, read_at, .. } = root;
        let wait = |fork: &Arc<Slot>| {
            let waiter = Waiter { page, read_at, thread: 0, flags, fork: Some(fork.clone()) };
            slot.claims().join(waiter).ok()
        };
        let mut owner = wait(&child);
        if owner.is_none() {
            let fault = Fault { slot: slot.clone(), page, flags: flags | KUF_FAULT_FORKED, thread: 0, read_at };
            self.put_off(self.serve(fault));
            owner = wait(&child);
        }
        match owner {
            Some(Owner::Poison) => self.touch_poison(&child, page),
            // Served again when the root's page is settled.
            Some(_) => {}
            None => self.put_off(self.serve(Fault { slot: child, page, flags, thread: 0, read_at })),
        }
    }

    /// `kuf_vcpu_fault`.
    pub fn vcpu_fault(&self, gpa: u64, len: u64, exit_flags: u64) -> Result<()> {
        refuse_inside_callbacks("kuf_vcpu_fault")?;
        self.check_open()?;
        let map = self.memory.map();
        let (slot, offsets) = map.range(gpa, len)?;
        if slot.mechanism.vcpu_exits() && exit_flags & KVM_MEMORY_EXIT_FLAG_USERFAULT == 0 {
            let text = "KVM_EXIT_MEMORY_FAULT without its USERFAULT flag: not a fault of the library's";
            return Err(Error::new(libc::ENOENT, text));
        }
        self.stats.here().vcpu_faults(1);
        let pages = slot.pages_of(&offsets);
        if slot.mechanism.vcpu_exits() && slot.pages.first_run(pages.clone(), State::Present, 1).is_some() {
            self.reopen(slot, &pages);
        }
        self.ensure_pages(slot, pages, None, true)
    }

    /// A vCPU has left KVM_RUN at a page that is present: it has become so since, or it was marked by somebody else. Opened
    /// once more, so that no vCPU can leave for ever.
    fn reopen(&self, slot: &Arc<Slot>, pages: &Range<u64>) {
        for page in pages.clone() {
            let terms = slot.fill_terms(true);
            let claimed = slot.claims().claim(&slot.pages, page, 1, State::Present, terms);
            if let Some((id, _)) = claimed {
                self.map(slot, id, page);
            }
        }
    }

    /// `kuf_ensure`.
    pub fn ensure(&self, gpa: u64, len: u64, timeout_ms: i32) -> Result<()> {
        refuse_inside_callbacks("kuf_ensure")?;
        let deadline = deadline(timeout_ms)?;
        self.check_open()?;
        let map = self.memory.map();
        let (slot, offsets) = map.range(gpa, len)?;
        self.ensure_pages(slot, slot.pages_of(&offsets), deadline, false)
    }

    /// Returns when `pages` are present or removed. Fills what nobody has begun on the calling thread; `ahead`: and what
    /// follows, if access is sequential.
    fn ensure_pages(&self, slot: &Arc<Slot>, pages: Range<u64>, deadline: Option<Instant>, ahead: bool) -> Result<()> {
        if slot.mechanism.vcpu_exits() {
            self.open_removed(slot, &pages);
        }
        loop {
            self.bring_pages(slot, pages.clone(), deadline, ahead)?;
            if !self.leaves_zeroes(slot) {
                return Ok(());
            }
            self.open_removed(slot, &pages);
            // One may have been poisoned for want of memory, or be somebody else's to open.
            if slot.pages.first_open(pages.clone()).is_none() {
                return Ok(());
            }
        }
    }

    /// Returns when none of `pages` is absent or on its way.
    fn bring_pages(&self, slot: &Arc<Slot>, pages: Range<u64>, deadline: Option<Instant>, ahead: bool) -> Result<()> {
        let mut one_by_one = false;
        while let Some(page) = slot.pages.first_open(pages.clone()) {
            self.check_open()?;
            if let Some(errno) = slot.gone() {
                return Err(Error::new(errno, "the process behind this memory slot is gone"));
            }
            let mut claims = slot.claims();
            match slot.pages.get(page) {
                State::Present | State::Removed => {}
                State::Filling => {
                    if claims.want(page) == Some(Owner::Poison) {
                        // By kuf_close, perhaps.
                        self.check_open()?;
                        let text = format!("gpa {:#x} could not be filled", slot.gpa + page * slot.granule);
                        return Err(Error::new(libc::EHWPOISON, text));
                    }
                    self.record_joined(slot, page, &mut claims);
                    // Looked at with the lock held: who ends it locks and wakes afterwards.
                    if slot.gone().is_some() || self.check_open().is_err() {
                        continue;
                    }
                    let (claims, in_time) = slot.sleep(claims, deadline);
                    drop(claims);
                    if !in_time && slot.pages.get(page) == State::Filling {
                        let text = format!("gpa {:#x} is not present yet", slot.gpa + page * slot.granule);
                        return Err(Error::new(libc::ETIMEDOUT, text));
                    }
                }
                State::Absent if !self.serviced() => {
                    drop(claims);
                    let read_at = Instant::now();
                    self.ask(slot, page, Waiter { page, read_at, thread: 0, flags: 0, fork: None });
                }
                State::Absent => {
                    let (run, rest) = match (one_by_one, ahead) {
                        (true, _) => (page..page + 1, Rest::Nothing),
                        (false, true) => self.plan(slot, page, 0),
                        // All of it is waited for.
                        (false, false) => {
                            let max = self.config.demand_run.min(self.config.populate_run.max(NEAR)) / slot.granule;
                            let max = huge::claim_max(slot, &(page..pages.end), max.clamp(1, pages.end - page));
                            (page..page + max, Rest::Nothing)
                        }
                    };
                    let terms = slot.fill_terms(true);
                    let claimed = claims.claim(&slot.pages, run.start, run.end - run.start, State::Absent, terms);
                    drop(claims);
                    if let Some((id, pages)) = claimed {
                        self.record(slot, &pages);
                        one_by_one = self.fill(&Run::demand(slot, id, pages, page, 0)).is_err();
                        if !one_by_one && rest != Rest::Nothing {
                            self.put_off(self.bring_later(slot, rest));
                            self.wake_lead();
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// Claims what begins at `page` for `waiter`, in the state it is in, unless somebody has.
fn claim_from(
    claims: &mut Claims<Waiter>,
    slot: &Slot,
    page: u64,
    max: u64,
    terms: Terms,
    waiter: Waiter,
) -> Option<(Id, Range<u64>)> {
    let claimed = match slot.pages.get(page) {
        State::Filling => None,
        from => claims.claim(&slot.pages, page, max, from, terms),
    };
    let _ = claims.join(waiter);
    claimed
}
