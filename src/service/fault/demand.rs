//! Decides what to do for a fault, by the state of its page.

use std::ops::Range;

use rustix::io::Errno;

use crate::abi::*;
use crate::alloc::NoMemory;
use crate::mechanism::Content;
use crate::memory::{Slot, Waiter};
use crate::pages::claims::{Claims, Id, Owner, Terms};
use crate::pages::readahead::{Plan, Reach, Rest};
use crate::pages::State;
use crate::service::background::{prefetch, recorder, replay_window};
use crate::service::fault::bytes::Bytes;
use crate::service::fault::fill::Fill;
use crate::service::fault::retry::RetryLimits;
use crate::service::fault::{ask, complete, fill, install, poison, retry, settle, shortage};
use crate::service::{Fault, Service};
use crate::stats::all_blocked::Wait;
use crate::sync::atomic::Ordering;
use crate::sync::time::Instant;
use crate::sync::{lock, Arc};

/// How far zero pages are mapped around a page that was given back, in bytes: the span of one page table.
const ZEROED_TOGETHER: u64 = 2 << 20;

/// The action that a fault needs.
enum Action {
    /// None: the page is present, or another thread fills it.
    Nothing,
    /// Fill this run now, and the rest later.
    Fill(Id, Range<u64>, Rest),
    /// The guest gave these pages back: install zeroes.
    Zero(Id, Range<u64>),
    /// The page has its bytes already, but the toucher's mapping may not show them.
    Map(Id),
    /// The page is poisoned and was touched.
    Poison,
    /// The root slot has to fill the page; serve this fault again afterwards.
    Parent(Arc<Slot>, Waiter),
    /// There is no memory to serve the fault now.
    Later(Fault),
}

/// Serves one fault that was read from the kernel. Returns the rest of the plan, to be filled before the next fault is
/// served.
pub fn serve(service: &Service, fault: Fault) -> Option<prefetch::PrefetchTask> {
    let since = Instant::now();
    service.stats.here().queueing(since.saturating_duration_since(fault.wait.read_at));
    let (slot, page, thread) = (fault.slot.clone(), fault.page, fault.wait.thread);
    if slot.gone().is_some() {
        return None;
    }
    let action = action_for(service, fault, since);
    if !matches!(action, Action::Later(_)) {
        service.shortage.is_over();
    }
    match action {
        Action::Nothing => {}
        Action::Fill(id, pages, rest) => {
            // A failure has poisoned the page and told the caller.
            let run = Fill {
                slot,
                id,
                pages,
                wanted: Some(page),
                thread,
                speculative: false,
                since,
                patience: RetryLimits::default(),
            };
            if fill::fill(service, &run).is_ok() {
                return prefetch::queue_rest(service, &run.slot, id, rest);
            }
        }
        Action::Zero(id, pages) => zero(service, &slot, id, pages),
        Action::Map(id) => map(service, &slot, id, page),
        Action::Poison => poison::touch_poison(service, &slot, page),
        Action::Later(fault) => shortage::serve_later(service, fault),
        Action::Parent(root, waiter) => serve_for_child(service, &root, &slot, waiter),
    }
    None
}

/// `since`: now.
fn action_for(service: &Service, fault: Fault, since: Instant) -> Action {
    let Fault { slot, page, flags, wait } = fault;
    let thread = wait.thread;
    let waiter = Waiter { page, wait, flags, fork: None };
    let terms = Terms { since: Some(since), ..slot.fill_terms(true) };
    if let Some(root) = slot.parent.as_ref().filter(|_| slot.shared.is_some()) {
        if root.pages.get(page) != State::Present {
            return Action::Parent(root.clone(), Waiter { fork: Some(slot.clone()), ..waiter });
        }
        let Ok(mut claims) = slot.claims_for(&(page..page + 1), true) else {
            return Action::Later(Fault::again(&slot, waiter));
        };
        return match claim_from(&mut claims, &slot, page, 1, terms, waiter) {
            Some((id, _)) => Action::Map(id),
            None => Action::Nothing,
        };
    }
    let Ok(mut claims) = slot.claims_for(&(page..page + 1), true) else {
        return Action::Later(Fault::again(&slot, waiter));
    };
    match slot.pages.get(page) {
        State::Filling => {
            service.stats.here().faults_joined(1);
            if service.background.is_observed() {
                recorder::record_joined(service, &slot, page, &mut claims);
            }
            match claims.join(waiter) {
                Ok(Owner::Poison) => Action::Poison,
                _ => Action::Nothing,
            }
        }
        State::Absent if !service.serviced() => {
            drop(claims);
            ask::ask(service, &slot, page, waiter);
            Action::Nothing
        }
        State::Absent => {
            let waiter = match service.background.is_observed() {
                true => replay_window::intercept(service, &slot, waiter),
                false => Some(waiter),
            };
            let Some(waiter) = waiter else { return Action::Nothing };
            let (mut run, mut rest) = plan(service, &slot, page, thread);
            if claims.reserve(&slot.pages, &run, true).is_err() {
                (run, rest) = (page..page + 1, Rest::Nothing);
            }
            match claim_from(&mut claims, &slot, run.start, run.end - run.start, terms, waiter) {
                Some((id, pages)) => {
                    if service.background.is_observed() {
                        recorder::record(service, &slot, &pages);
                    }
                    Action::Fill(id, pages, rest)
                }
                None => Action::Nothing,
            }
        }
        state @ (State::Removed | State::Present) => {
            if state == State::Present {
                service.stats.here().faults_late(1);
                if slot.remap().is_none() {
                    drop(claims);
                    service.stats.ended(service.stats.here(), waiter.wait, Instant::now());
                    return Action::Nothing;
                }
            }
            let mut run = if state == State::Removed { zeroed_together(&slot, page) } else { page..page + 1 };
            if claims.reserve(&slot.pages, &run, true).is_err() {
                run = page..page + 1;
            }
            let claimed = claims.claim(&slot.pages, run.start, run.end - run.start, state, terms);
            let Some((id, pages)) = claimed else { return Action::Nothing };
            let _ = claims.join(waiter);
            if state == State::Removed {
                Action::Zero(id, pages)
            } else {
                Action::Map(id)
            }
        }
    }
}

/// Plans the fills for a fault at `page`, which is absent: the run to fill now, and the rest for later. The claims are
/// locked.
pub fn plan(service: &Service, slot: &Slot, page: u64, thread: u32) -> (Range<u64>, Rest) {
    let reach = Reach::new(service.config.demand_run, slot.granule);
    let Plan { run, rest, passed } = lock(&slot.streams).plan(&slot.pages, reach, page, thread);
    // A page that was filled ahead and then passed by the access belongs to the working set.
    if service.background.is_observed() {
        recorder::record(service, slot, &passed);
    }
    (run, rest)
}

/// A fault on pages that the guest gave back.
fn zero(service: &Service, slot: &Arc<Slot>, id: Id, pages: Range<u64>) {
    if slot.ending.load(Ordering::Acquire) {
        return let_go_of_removed(service, slot, id, &pages);
    }
    if slot.shared.is_some() {
        // If the file still holds the page, it was only unmapped, and its bytes are the guest's own.
        match settle::install(service, slot, id, pages.clone(), Bytes::plain(Content::Map, pages.start)) {
            (_, Err(failed)) if failed.errno == Errno::FAULT => {}
            (_, Err(failed)) => return settle::could_not(service, slot, id, pages, failed.errno),
            (_, Ok(())) => return,
        }
    }
    let bytes = match hole_in_place(service, slot, &pages) {
        // Its content was dropped when it was given back, and it was not installed since: it is zero.
        _ if slot.facts().gates_kvm_only => Bytes::zero_in_place(pages.start),
        Ok(true) => Bytes::zero_in_place(pages.start),
        Ok(false) => Bytes::plain(Content::Zero, pages.start),
        Err(errno) => return settle::could_not(service, slot, id, pages, errno),
    };
    let (_, result) = settle::install(service, slot, id, pages.clone(), bytes);
    if let Err(failed) = result {
        settle::could_not(service, slot, id, pages, failed.errno);
    }
}

/// Allocates pages that are a hole in the slot's file, which makes them zero. Nothing is written, so bytes that another
/// mapping of the file has put there meanwhile stay. With the gate held: when the slot has been removed the file is the
/// caller's, and may be another slot's. False: the slot has no file. Err is an errno.
fn hole_in_place(service: &Service, slot: &Slot, pages: &Range<u64>) -> std::result::Result<bool, Errno> {
    retry::patiently(service, &RetryLimits::default(), || {
        let _gate = slot.mechanism.gate().read();
        match slot.gone() {
            Some(errno) => Err(errno),
            None => slot.binding.in_place_buffer(pages).map(|place| place.is_some()),
        }
    })
}

/// A fault on pages that the guest gave back, while their slot is being ended. The library no longer serves them (see
/// [`events::give_back`](crate::service::queues::events::give_back)); the kernel makes them zero.
fn let_go_of_removed(service: &Service, slot: &Arc<Slot>, id: Id, pages: &Range<u64>) {
    let settled = {
        let _gate = slot.mechanism.gate().read();
        if slot.gone().is_none() {
            let _ = slot.each_held(id, pages, |run| {
                slot.binding.release(&run);
                Ok::<_, std::convert::Infallible>(())
            });
        }
        slot.settle(|claims| claims.settle(&slot.pages, pages.clone(), id, Some(State::Removed)))
    };
    install::ended(service, slot, settled.waiters, service.stats.here());
    if settled.whole {
        complete::tell_whole(service, slot);
    }
}

/// A fault on a page that is present. It became present after the touch, or this mapping does not show it yet, or it was
/// dropped without an event (an adopted userfaultfd may have no REMOVE events); then it is zero like all dropped memory.
pub fn map(service: &Service, slot: &Arc<Slot>, id: Id, page: u64) {
    let pages = page..page + 1;
    let bytes = match slot.remap() {
        Some(Content::Zero) => Bytes::plain(Content::Zero, page),
        _ => Bytes::present(page),
    };
    match settle::install(service, slot, id, pages.clone(), bytes) {
        (_, Ok(())) => {}
        (_, Err(failed)) if failed.errno == Errno::FAULT && slot.shared.is_some() => {
            zero(service, slot, id, pages);
        }
        (_, Err(failed)) => settle::could_not(service, slot, id, pages, failed.errno),
    }
}

/// Installs the pages of `pages` that the guest gave back. A vCPU that exits at such a page would otherwise exit again.
pub fn open_removed(service: &Service, slot: &Arc<Slot>, pages: &Range<u64>) -> std::result::Result<(), NoMemory> {
    let mut from = pages.start;
    let max = if slot.facts().gates_kvm_only { u64::MAX } else { 1 };
    while let Some(run) = slot.pages.first_run(from..pages.end, State::Removed, max) {
        let terms = slot.fill_terms(true);
        let mut claims = slot.claims_for(&(run.start..run.start + 1), true)?;
        claims.reserve_ends(&slot.pages, &run)?;
        let claimed = claims.claim(&slot.pages, run.start, run.end - run.start, State::Removed, terms);
        drop(claims);
        from = claimed.as_ref().map_or(run.start + 1, |(_, pages)| pages.end);
        if let Some((id, pages)) = claimed {
            zero(service, slot, id, pages);
        }
    }
    Ok(())
}

/// A child touched shared memory that is not filled yet: fill the root slot, then serve the child.
fn serve_for_child(service: &Service, root: &Arc<Slot>, child: &Arc<Slot>, waiter: Waiter) {
    let (page, flags) = (waiter.page, waiter.flags);
    let join = |waiter| {
        let mut claims = root.claims();
        // A touch of a poisoned page waits for nothing.
        if claims.is_poisoned(page) {
            Ok(Owner::Poison)
        } else {
            claims.join(waiter)
        }
    };
    let mut owner = join(waiter);
    if let Err(waiter) = owner {
        let flags = flags | KUF_FAULT_FORKED;
        let wait = Wait::unknown(waiter.wait.read_at);
        prefetch::put_off(service, serve(service, Fault { slot: root.clone(), page, flags, wait }));
        owner = join(waiter);
    }
    match owner {
        Ok(Owner::Poison) => poison::touch_poison(service, child, page),
        // Served again when the root's page is settled.
        Ok(_) => {}
        Err(waiter) => prefetch::put_off(service, serve(service, Fault::again(child, waiter))),
    }
}

/// The removed pages that become present by a fault at one of them: all removed pages around it, where the kernel maps its
/// shared zero page. That takes no memory, and a guest that reuses memory of its balloon causes one fault for a stretch and
/// not one for each page.
fn zeroed_together(slot: &Slot, page: u64) -> Range<u64> {
    if slot.shared.is_some() || slot.granule != rustix::param::page_size() as u64 {
        return page..page + 1;
    }
    let per_stretch = ZEROED_TOGETHER / slot.granule;
    let start = page - page % per_stretch;
    slot.pages.run_around(page, &(start..(start + per_stretch).min(slot.pages.total())))
}

/// Claims the run that begins at `page` for `waiter`, in its present state, unless another thread has claimed it. `waiter`
/// joins the claim.
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
