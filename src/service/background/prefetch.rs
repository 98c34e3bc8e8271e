//! Prefetch: when no demand is queued, a service thread fills the pages that are likely to be touched next
//! (`pages::readahead` chooses them). While fills are quick, it fills a dense place around a fault even before the next
//! fault: queued faults mostly want the same places, and fewer of them remain.
//!
//! One thread at a time prefetches, a piece at a time, and checks for demand before each. It holds no filler's place
//! meanwhile, so that a slow fill here delays no fault, and there is one more service thread for it. While fills are
//! quick the leader does it, between two reads of the kernel's queues: the piece itself wakes a thread that ran into
//! it, and the leader need not read that thread's fault.

use std::collections::VecDeque;
use std::ops::Range;

use crate::memory::Slot;
use crate::pages::claims::{Id, Terms};
use crate::pages::readahead::{Rest, NEAR};
use crate::pages::State;
use crate::service::background::recorder;
use crate::service::fault::fill;
use crate::service::fault::fill::Fill;
use crate::service::fault::retry::RetryLimits;
use crate::service::threads::leader::Lead;
use crate::service::Service;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::time::Instant;
use crate::sync::{lock, Arc, Mutex};

/// The longest piece that the leader fills (bytes). It does not read the kernel's queues meanwhile: a new fault waits
/// about as long as waking a thread would take.
///
/// Longer pieces showed no gain in measurements. A second thread that reads the queues meanwhile does not help either:
/// it reads the faults that this one is about to resolve.
const LEAD_PIECE: u64 = 2 * NEAR;

/// The number of tasks that are kept. A new one replaces the oldest.
const TASKS: usize = 16;

pub struct PrefetchTask {
    slot: Arc<Slot>,
    pages: Range<u64>,
    /// The claim of the fault that made the task. A later discard in the slot ends the task.
    after: Id,
    /// The pages are recorded when they are claimed. Those of a stream are recorded later, when the stream has reached
    /// them.
    record: bool,
}

/// The tasks of prefetch, and whether a thread works on one.
#[derive(Default)]
pub struct Prefetch {
    tasks: Mutex<VecDeque<PrefetchTask>>,
    /// The number of tasks, to be read without the lock.
    left: AtomicUsize,
    /// A thread is prefetching.
    busy: AtomicBool,
}

impl Prefetch {
    fn put(&self, mut task: PrefetchTask) {
        let mut tasks = lock(&self.tasks);
        tasks.retain(|old| {
            let apart = old.pages.start > task.pages.end || task.pages.start > old.pages.end;
            let joins = Arc::ptr_eq(&old.slot, &task.slot) && old.record == task.record && !apart;
            if joins {
                // Both tasks belong to one stream, which has gone on.
                task.pages = old.pages.start.min(task.pages.start)..old.pages.end.max(task.pages.end);
                task.after = old.after.min(task.after);
            }
            !joins
        });
        if tasks.len() == TASKS {
            tasks.pop_front();
        }
        tasks.push_back(task);
        self.left.store(tasks.len(), Ordering::SeqCst);
    }

    fn take(&self) -> Option<PrefetchTask> {
        let mut tasks = lock(&self.tasks);
        let task = tasks.pop_front();
        self.left.store(tasks.len(), Ordering::SeqCst);
        task
    }

    /// Stops prefetch for `slot` until the result is dropped. A piece in progress goes on.
    pub fn suspend_for<'a>(&self, slot: &'a Arc<Slot>) -> Suspended<'a> {
        slot.removing.fetch_add(1, Ordering::SeqCst);
        self.forget(slot);
        Suspended(slot)
    }

    /// Drops the tasks of `slot`.
    fn forget(&self, slot: &Arc<Slot>) {
        let mut tasks = lock(&self.tasks);
        tasks.retain(|task| !Arc::ptr_eq(&task.slot, slot));
        self.left.store(tasks.len(), Ordering::SeqCst);
    }
}

/// Plans the `rest` of a fault that was served with the claim `after`. Returns a task to do at once.
pub fn queue_rest(service: &Service, slot: &Arc<Slot>, after: Id, rest: Rest) -> Option<PrefetchTask> {
    // Most forked children live only briefly.
    if slot.parent.is_some() {
        return None;
    }
    match rest {
        // A slow source has other faults to serve.
        Rest::Dense(pages) if service.threads.leader.fills_are_quick() => {
            Some(PrefetchTask { slot: slot.clone(), pages, after, record: true })
        }
        Rest::Nothing | Rest::Dense(_) => None,
        Rest::Sequential(pages) => {
            service.background.prefetch.put(PrefetchTask { slot: slot.clone(), pages, after, record: false });
            None
        }
    }
}

/// Queues a task that was to be done at once.
pub fn put_off(service: &Service, task: Option<PrefetchTask>) {
    if let Some(task) = task {
        service.background.prefetch.put(task);
    }
}

/// Fills up a dense place, in at most as many pieces as it has pages.
pub fn fill_dense(service: &Service, lead: Option<Lead>, mut task: PrefetchTask) {
    if service.background.prefetch.busy.swap(true, Ordering::SeqCst) {
        return service.background.prefetch.put(task);
    }
    let _place = Busy(service);
    // A source that was quick may block.
    service.threads.leader.ensure_watched();
    let lead = lead.filter(|lead| service.threads.leader.leads(*lead));
    let inside = lead.map(|lead| service.threads.leader.enter(lead, Instant::now()));
    while service.life.is_open()
        && service.threads.leader.fills_are_quick()
        && lead.is_none_or(|lead| service.threads.leader.leads(lead))
    {
        let Some(run) = claim_piece(service, &task, u64::MAX) else { break };
        task.pages.start = run.pages.end;
        if fill::fill(service, &run).is_err() {
            // The pages were speculative: a thread that touches one gets the error itself.
            break;
        }
    }
    if let Some(inside) = inside {
        service.threads.leader.leave(inside);
    }
}

/// Whether an idle thread is to prefetch. While fills are quick, only the leader does.
pub fn can_prefetch(service: &Service, leads: bool) -> bool {
    service.background.prefetch.left.load(Ordering::SeqCst) > 0
        && (leads || !service.threads.leader.fills_are_quick())
        && service.threads.queued() == 0
        && !service.background.prefetch.busy.load(Ordering::SeqCst)
}

/// Fills pieces while no demand is queued. The leader fills one piece, for it has to read the kernel's queues before
/// the next.
pub fn prefetch(service: &Service, lead: Option<Lead>) {
    while service.life.is_open()
        && can_prefetch(service, true)
        && !service.background.prefetch.busy.swap(true, Ordering::SeqCst)
    {
        let _place = Busy(service);
        let Some(task) = service.background.prefetch.take() else { continue };
        match lead.filter(|lead| service.threads.leader.leads(*lead)) {
            Some(lead) if service.threads.leader.fills_are_quick() => {
                // A source that was quick may block.
                service.threads.leader.ensure_watched();
                let inside = service.threads.leader.enter(lead, Instant::now());
                fill_piece(service, task, LEAD_PIECE.min(service.config.populate_run));
                service.threads.leader.leave(inside);
                return;
            }
            lead => {
                if let Some(lead) = lead {
                    service.threads.leader.give_up(lead);
                }
                service.threads.leader.ensure_watched();
                fill_piece(service, task, service.config.populate_run);
            }
        }
    }
}

fn fill_piece(service: &Service, mut task: PrefetchTask, most: u64) {
    let slot = task.slot.clone();
    let Some(run) = claim_piece(service, &task, (most / slot.granule).max(1)) else { return };
    let pages = run.pages.clone();
    if fill::fill(service, &run).is_err() {
        // The pages were speculative: a thread that touches one gets the error itself.
        return lock(&slot.streams).broken(task.pages.end);
    }
    // Go on after the pages that the source had. If it had none, go on after the piece, so that no page is asked for
    // twice.
    let begun = slot.pages.get(pages.start) != State::Absent;
    task.pages.start = if begun { pages.start } else { pages.end };
    if !task.pages.is_empty() {
        service.background.prefetch.put(task);
    }
}

fn claim_piece(service: &Service, task: &PrefetchTask, most: u64) -> Option<Fill> {
    let slot = &task.slot;
    let mut claims = slot.claims();
    // Check this under the claims' lock, for the thread that removes the slot looks for claims afterwards.
    let ends = slot.gone().is_some() || slot.removing.load(Ordering::SeqCst) > 0;
    if ends || claims.discarded_since(task.after) {
        return None;
    }
    let run = slot.pages.first_run(task.pages.clone(), State::Absent, most)?;
    let terms = Terms { speculative: true, ..slot.fill_terms(false) };
    claims.reserve(&slot.pages, &run, false).ok()?;
    let (id, pages) = claims.claim(&slot.pages, run.start, run.end - run.start, State::Absent, terms)?;
    if task.record {
        recorder::record(service, slot, &pages);
    }
    Some(Fill {
        slot: slot.clone(),
        id,
        pages,
        wanted: None,
        thread: 0,
        speculative: true,
        since: Instant::now(),
        patience: RetryLimits::default(),
    })
}

/// See [`Prefetch::suspend_for`].
pub struct Suspended<'a>(&'a Slot);

impl Drop for Suspended<'_> {
    fn drop(&mut self) {
        self.0.removing.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The place of the prefetching thread. Dropping it, even by a panic, frees it.
struct Busy<'a>(&'a Service);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.background.prefetch.busy.store(false, Ordering::SeqCst);
    }
}
