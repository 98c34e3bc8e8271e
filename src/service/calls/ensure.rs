//! `kuf_ensure` and `kuf_vcpu_fault`: the calling thread fills pages, or waits for their fills, and returns when they
//! are present.

use std::ops::Range;

use rustix::io::Errno;

use crate::error::{words, Error, Result, Words};
use crate::memory::{Slot, Waiter};
use crate::pages::claims::{Claims, Owner};
use crate::pages::readahead::{Rest, NEAR};
use crate::pages::State;
use crate::service::background::{prefetch, recorder};
use crate::service::fault::demand::{map, open_removed, plan};
use crate::service::fault::fill::{self, Fill, NotFilled};
use crate::service::fault::retry::RetryLimits;
use crate::service::fault::{ask, huge};
use crate::service::inside::refuse_inside_callbacks;
use crate::service::{deadline, Service};
use crate::stats::all_blocked::Wait;
use crate::sync::time::Instant;
use crate::sync::{Arc, MutexGuard};
use crate::uapi::kvm::KVM_MEMORY_EXIT_FLAG_USERFAULT;

/// `kuf_vcpu_fault`.
pub fn vcpu_fault(service: &Service, gpa: u64, len: u64, exit_flags: u64) -> Result<()> {
    refuse_inside_callbacks("kuf_vcpu_fault")?;
    service.check_open()?;
    let map = service.memory.map();
    let (slot, offsets) = map.range(gpa, len)?;
    if slot.facts().vcpu_exits && exit_flags & KVM_MEMORY_EXIT_FLAG_USERFAULT == 0 {
        let text = "KVM_EXIT_MEMORY_FAULT without its USERFAULT flag: not a fault of the library's";
        return Err(Error::new(Errno::NOENT, text));
    }
    service.stats.here().vcpu_faults(1);
    let pages = slot.pages_of(&offsets);
    if slot.facts().vcpu_exits && slot.pages.first_run(pages.clone(), State::Present, 1).is_some() {
        reopen(service, slot, &pages);
    }
    ensure_pages(service, slot, pages, None, true)
}

/// Clears the mark of present pages once more. A vCPU has left KVM_RUN at one: it became present since, or other code
/// marked it. Without this the vCPU could exit for ever.
fn reopen(service: &Service, slot: &Arc<Slot>, pages: &Range<u64>) {
    for page in pages.clone() {
        let terms = slot.fill_terms(true);
        let claims = slot.claims_for(&(page..page + 1), true).ok();
        let claimed = claims.and_then(|mut claims| claims.claim(&slot.pages, page, 1, State::Present, terms));
        if let Some((id, _)) = claimed {
            map(service, slot, id, page);
        }
    }
}

/// `kuf_ensure`.
pub fn ensure(service: &Service, gpa: u64, len: u64, timeout_ms: i32) -> Result<()> {
    refuse_inside_callbacks("kuf_ensure")?;
    let deadline = deadline(timeout_ms)?;
    service.check_open()?;
    let map = service.memory.map();
    let (slot, offsets) = map.range(gpa, len)?;
    ensure_pages(service, slot, slot.pages_of(&offsets), deadline, false)
}

/// Returns when `pages` are present or removed. Fills the pages that no other thread fills on the calling thread;
/// `speculative`: also the pages after them, if access is sequential.
fn ensure_pages(
    service: &Service,
    slot: &Arc<Slot>,
    pages: Range<u64>,
    deadline: Option<Instant>,
    speculative: bool,
) -> Result<()> {
    if slot.facts().vcpu_exits {
        open_removed(service, slot, &pages)?;
    }
    loop {
        let patience = RetryLimits::until(deadline);
        let (one_by_one, failed, applied) = (false, None, false);
        let all = pages.clone();
        Ensure { service, slot, pages: all, deadline, speculative, patience, one_by_one, failed, applied }.run()?;
        if !slot.leaves_zeroes() {
            return Ok(());
        }
        open_removed(service, slot, &pages)?;
        // A page may have been poisoned for want of memory, or another thread may own it.
        if slot.pages.first_open(pages.clone()).is_none() {
            return Ok(());
        }
    }
}

/// A call that has pages filled, and returns when none of them is absent or on its way.
struct Ensure<'a> {
    service: &'a Service,
    slot: &'a Arc<Slot>,
    pages: Range<u64>,
    deadline: Option<Instant>,
    /// Fills what follows too, if access is sequential.
    speculative: bool,
    patience: RetryLimits,
    /// A fill of a longer run has failed. For the rest of the call: there may be no memory for long runs.
    one_by_one: bool,
    /// The last run that was not filled, and why.
    failed: Option<(Range<u64>, NotFilled)>,
    /// Events that were read before have been applied.
    applied: bool,
}

impl Ensure<'_> {
    fn run(mut self) -> Result<()> {
        let (slot, pages) = (self.slot, self.pages.clone());
        // Goes on where it was, and looks again at what it has left behind when it is through.
        let next = |from| slot.pages.first_open(from..pages.end).or_else(|| slot.pages.first_open(pages.start..from));
        let mut from = pages.start;
        while let Some(page) = next(from) {
            from = page;
            self.service.check_open()?;
            slot.check_there()?;
            let claims = slot.claims();
            match slot.pages.get(page) {
                State::Present | State::Removed => {}
                State::Filling => self.wait(page, claims)?,
                State::Absent if !self.service.serviced() => {
                    drop(claims);
                    let wait = Wait::unknown(Instant::now());
                    ask::ask(self.service, slot, page, Waiter { page, wait, flags: 0, fork: None });
                }
                State::Absent => self.fill(page, claims)?,
            }
        }
        Ok(())
    }

    /// Waits for a page that has an owner, until something settles.
    fn wait(&mut self, page: u64, mut claims: MutexGuard<'_, Claims<Waiter>>) -> Result<()> {
        let (service, slot) = (self.service, self.slot);
        if claims.want(page) == Some(Owner::Poison) {
            // A kuf_close may have poisoned the page.
            service.check_open()?;
            if !self.applied {
                // A thread that comes from madvise may be here before its event, read already, was applied.
                drop(claims);
                drop(slot.mechanism.gate().read());
                self.applied = true;
                return Ok(());
            }
            return Err(Error::new(Errno::HWPOISON, self.unfilled(page)));
        }
        recorder::record_joined(service, slot, page, &mut claims);
        // Looked at with the lock held: a thread that ends the slot locks and wakes afterwards.
        if slot.gone().is_some() || service.check_open().is_err() {
            return Ok(());
        }
        let (claims, in_time) = slot.sleep(claims, self.deadline);
        drop(claims);
        if !in_time && slot.pages.get(page) == State::Filling {
            return Err(not_in_time(slot, page));
        }
        Ok(())
    }

    /// That `page` is poisoned, and why if this call knows.
    fn unfilled(&self, page: u64) -> Words {
        let gpa = self.slot.gpa + page * self.slot.granule;
        match &self.failed {
            Some((pages, NotFilled::Failed(failure) | NotFilled::Poisoned(failure))) if pages.contains(&page) => {
                words!("gpa {gpa:#x} could not be filled ({failure})")
            }
            _ => words!("gpa {gpa:#x} could not be filled"),
        }
    }

    /// Fills a run from `page` on, which is absent.
    fn fill(&mut self, page: u64, mut claims: MutexGuard<'_, Claims<Waiter>>) -> Result<()> {
        let (service, slot) = (self.service, self.slot);
        let (run, rest) = match (self.one_by_one, self.speculative) {
            (true, _) => (page..page + 1, Rest::Nothing),
            (false, true) => plan(service, slot, page, 0),
            // The call waits for all of it.
            (false, false) => {
                let max = service.config.demand_run.min(service.config.populate_run.max(NEAR)) / slot.granule;
                let left = self.pages.end - page;
                let max = huge::claim_max(slot, &(page..self.pages.end), max.clamp(1, left));
                (page..page + max, Rest::Nothing)
            }
        };
        let terms = slot.fill_terms(true);
        claims.reserve(&slot.pages, &run, true)?;
        let claimed = claims.claim(&slot.pages, run.start, run.end - run.start, State::Absent, terms);
        drop(claims);
        let Some((id, pages)) = claimed else { return Ok(()) };
        recorder::record(service, slot, &pages);
        let run = Fill { patience: self.patience.clone(), ..Fill::demand(slot, id, pages, page, 0) };
        if let Err(not) = fill::fill(service, &run) {
            self.one_by_one |= !matches!(not, NotFilled::Poisoned(_));
            self.failed = Some((run.pages.clone(), not));
        }
        if run.patience.was_out() {
            return Err(not_in_time(slot, page));
        }
        self.patience.go_on_from(&run.patience);
        if !self.one_by_one && rest != Rest::Nothing {
            prefetch::put_off(service, prefetch::queue_rest(service, slot, id, rest));
            service.threads.wake_lead();
        }
        Ok(())
    }
}

fn not_in_time(slot: &Slot, page: u64) -> Error {
    Error::new(Errno::TIMEDOUT, words!("gpa {:#x} is not present yet", slot.gpa + page * slot.granule))
}
