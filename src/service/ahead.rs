//! What a service thread does when nobody waits: it brings what is likely to be touched next (`crate::ahead` says which
//! pages). What is missing around a fault in a dense place it brings before the next fault, while fills are quick: faults
//! that are queued want the same places, as a rule, and are fewer for it.
//!
//! One thread at a time does so, a piece at a time, and looks for demand before each. It holds no filler's place then, so
//! that a fill here that takes long keeps no fault waiting, and there is one service thread more for it. While fills
//! are quick it is the thread that has the lead, between two looks at the kernel: a toucher that catches up is woken by
//! the piece it ran into, and nobody has to read its fault.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::Instant;

use super::fill::Run;
use super::Service;
use crate::ahead::{Rest, NEAR};
use crate::claims::Terms;
use crate::crew::Lead;
use crate::memory::Slot;
use crate::pages::State;
use crate::sync::{lock, Mutex};

/// With the lead, pieces are this long at most (bytes). The kernel is not looked at meanwhile: who comes then waits about as
/// long as waking a thread would have taken.
///
/// Longer pieces brought nothing that could be told from chance. Nor does another thread help that looks at the kernel
/// meanwhile: it reads the faults that this one is about to resolve.
const LEAD_PIECE: u64 = 2 * NEAR;

/// Places where something is left to be brought. The oldest is given up for a new one.
const TASKS: usize = 16;

pub(super) struct Task {
    slot: Arc<Slot>,
    pages: Range<u64>,
    /// To be recorded when it is claimed. What a stream comes to is recorded when it has come there.
    record: bool,
}

/// What is left to be brought, and who does it.
#[derive(Default)]
pub struct Ahead {
    tasks: Mutex<VecDeque<Task>>,
    /// How many, for a look without the lock.
    left: AtomicUsize,
    /// A thread is at it.
    busy: AtomicBool,
}

impl Ahead {
    fn put(&self, mut task: Task) {
        let mut tasks = lock(&self.tasks);
        tasks.retain(|old| {
            let apart = old.pages.start > task.pages.end || task.pages.start > old.pages.end;
            let joins = Arc::ptr_eq(&old.slot, &task.slot) && old.record == task.record && !apart;
            if joins {
                // The same stream, which has gone on.
                task.pages = old.pages.start.min(task.pages.start)..old.pages.end.max(task.pages.end);
            }
            !joins
        });
        if tasks.len() == TASKS {
            tasks.pop_front();
        }
        tasks.push_back(task);
        self.left.store(tasks.len(), Ordering::SeqCst);
    }

    fn take(&self) -> Option<Task> {
        let mut tasks = lock(&self.tasks);
        let task = tasks.pop_front();
        self.left.store(tasks.len(), Ordering::SeqCst);
        task
    }

    /// Brings nothing more for `slot` until the result is dropped. The piece that is under way goes on.
    pub(super) fn keep_off<'a>(&self, slot: &'a Arc<Slot>) -> KeptOff<'a> {
        slot.leaving.fetch_add(1, Ordering::SeqCst);
        self.forget(slot);
        KeptOff(slot)
    }

    /// Forgets what is left for `slot`.
    fn forget(&self, slot: &Arc<Slot>) {
        let mut tasks = lock(&self.tasks);
        tasks.retain(|task| !Arc::ptr_eq(&task.slot, slot));
        self.left.store(tasks.len(), Ordering::SeqCst);
    }
}

impl Service {
    /// The fault is served: `rest` is what to bring next. Returns what is to be brought at once.
    pub(super) fn bring_later(&self, slot: &Arc<Slot>, rest: Rest) -> Option<Task> {
        // A forked child's copy is short-lived, as a rule.
        if slot.parent.is_some() {
            return None;
        }
        match rest {
            // A source that takes its time has others to serve.
            Rest::Dense(pages) if self.crew.quick() => Some(Task { slot: slot.clone(), pages, record: true }),
            Rest::Nothing | Rest::Dense(_) => None,
            Rest::Sequential(pages) => {
                self.ahead.put(Task { slot: slot.clone(), pages, record: false });
                None
            }
        }
    }

    /// What was to be brought at once is brought when there is time.
    pub(super) fn put_off(&self, task: Option<Task>) {
        if let Some(task) = task {
            self.ahead.put(task);
        }
    }

    /// Fills up a dense place, in at most as many pieces as it has pages.
    pub(super) fn fill_up(&self, lead: Option<Lead>, mut task: Task) {
        if self.ahead.busy.swap(true, Ordering::SeqCst) {
            return self.ahead.put(task);
        }
        let _place = Place(self);
        // A source that was quick may block.
        self.crew.have_watched();
        let lead = lead.filter(|lead| self.crew.leads(*lead));
        let inside = lead.map(|lead| self.crew.enter(lead, Instant::now()));
        while self.running() && self.crew.quick() && lead.is_none_or(|lead| self.crew.leads(lead)) {
            let Some(run) = self.claim_piece(&task, u64::MAX) else { break };
            task.pages.start = run.pages.end;
            if self.fill(&run).is_err() {
                // Nobody has asked for these; who does will be told.
                break;
            }
        }
        if let Some(inside) = inside {
            self.crew.leave(inside);
        }
    }

    /// Whether a thread that has nothing else to do is to go ahead. While fills are quick, that is the one that leads.
    pub(super) fn can_go_ahead(&self, leads: bool) -> bool {
        self.ahead.left.load(Ordering::SeqCst) > 0
            && (leads || !self.crew.quick())
            && self.work.1.is_empty()
            && !self.ahead.busy.load(Ordering::SeqCst)
    }

    /// Brings pieces while nobody waits for anything; with the lead one piece, for the kernel has to be looked at before
    /// the next.
    pub(super) fn go_ahead(&self, lead: Option<Lead>) {
        while self.running() && self.can_go_ahead(true) && !self.ahead.busy.swap(true, Ordering::SeqCst) {
            let _place = Place(self);
            let Some(task) = self.ahead.take() else { continue };
            match lead.filter(|lead| self.crew.leads(*lead)) {
                Some(lead) if self.crew.quick() => {
                    // A source that was quick may block.
                    self.crew.have_watched();
                    let inside = self.crew.enter(lead, Instant::now());
                    self.bring_piece(task, LEAD_PIECE.min(self.config.populate_run));
                    self.crew.leave(inside);
                    return;
                }
                lead => {
                    if let Some(lead) = lead {
                        self.crew.let_go(lead);
                    }
                    self.crew.have_watched();
                    self.bring_piece(task, self.config.populate_run);
                }
            }
        }
    }

    fn bring_piece(&self, mut task: Task, most: u64) {
        let slot = task.slot.clone();
        let Some(run) = self.claim_piece(&task, (most / slot.granule).max(1)) else { return };
        let pages = run.pages.clone();
        if self.fill(&run).is_err() {
            // Nobody has asked for these; who does will be told.
            return lock(&slot.streams).broken(task.pages.end);
        }
        // What the source had of it, and no page twice if that was nothing.
        let begun = slot.pages.get(pages.start) != State::Absent;
        task.pages.start = if begun { pages.start } else { pages.end };
        if !task.pages.is_empty() {
            self.ahead.put(task);
        }
    }

    fn claim_piece(&self, task: &Task, most: u64) -> Option<Run> {
        let slot = &task.slot;
        let mut claims = slot.claims();
        // Looked at under the claims' lock: who takes the slot off looks for claims afterwards.
        if slot.gone().is_some() || slot.leaving.load(Ordering::SeqCst) > 0 {
            return None;
        }
        let run = slot.pages.first_run(task.pages.clone(), State::Absent, most)?;
        let terms = Terms { ahead: true, ..slot.fill_terms(false) };
        let (id, pages) = claims.claim(&slot.pages, run.start, run.end - run.start, State::Absent, terms)?;
        if task.record {
            self.record(slot, &pages);
        }
        Some(Run { slot: slot.clone(), id, pages, wanted: None, thread: 0, ahead: true, since: Instant::now() })
    }
}

/// See [`Ahead::keep_off`].
pub(super) struct KeptOff<'a>(&'a Slot);

impl Drop for KeptOff<'_> {
    fn drop(&mut self) {
        self.0.leaving.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The place of the one who goes ahead, free again when dropped, also by a panic.
struct Place<'a>(&'a Service);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.ahead.busy.store(false, Ordering::SeqCst);
    }
}
