//! Installs between events, while threads give memory back without pause.
//!
//! The kernel refuses installs from before a thread in madvise(2) sends its event until the event was read and the thread
//! has gone on. A thread in a loop of madvise(2) sends the next event a moment later. Events are applied before an install,
//! and applying them may take longer than that moment: then each try would meet the next event, for ever, and the waiters of
//! the page would wait as long. So this code reads events and applies them later: in between it retries the install of pages
//! that these events do not touch. No other thread installs pages or applies events meanwhile.

use std::ops::Range;

use smallvec::SmallVec;

use crate::mechanism::gate::Exclusive;
use crate::mechanism::{Mechanism, Message};
use crate::memory::Slot;
use crate::pages::claims::Id;
use crate::service::queues::read::Batch;
use crate::service::Service;
use crate::sync::time::{Duration, Instant};
use crate::sync::Arc;

/// How long one round retries with the gate held: other threads want the gate. The thread should not be preempted meanwhile:
/// an overloaded machine would keep it off the CPU for long, with the gate held.
const AT_A_TIME: Duration = Duration::from_micros(100);

/// The subject of events that must be applied before the next attempt.
pub enum About<'a> {
    Nothing,
    /// These pages.
    Pages(&'a Arc<Slot>, &'a Range<u64>),
    /// The same, as far as this claim still has bytes for them. A page that was given back before is zero, or has the file's
    /// bytes, whether a second removal is applied before or after.
    Fill(&'a Arc<Slot>, &'a Range<u64>, Id),
    /// The addresses of mappings.
    Mappings,
}

/// Holds the gate exclusively. Hands the work of its events on when the gate is released.
pub struct Moment<'a> {
    service: &'a Service,
    gate: Option<Exclusive<'a>>,
    batches: SmallVec<[Batch; 2]>,
}

impl<'a> Moment<'a> {
    pub fn begin(service: &'a Service, mechanism: &'a Arc<dyn Mechanism>) -> Self {
        Self { service, gate: Some(mechanism.gate().write()), batches: SmallVec::new() }
    }

    /// Reads all queues.
    fn read(&mut self) {
        self.batches.iter_mut().for_each(|batch| batch.read_more(self.service));
    }

    /// Applies the messages.
    fn apply(&mut self) {
        self.batches.iter_mut().for_each(|batch| batch.apply(self.service));
    }
}

impl Drop for Moment<'_> {
    fn drop(&mut self) {
        drop(self.gate.take());
        self.batches.drain(..).for_each(|batch| batch.end(self.service, Service::push_counted));
    }
}

/// Calls `attempt` with the gate held exclusively, until it reports that no event was in its way, or for a while. Events on
/// the subject `about` are applied before the next attempt. Returns the last result and the gate: all events from before the
/// result have been applied.
pub fn between_events<'a, T>(
    service: &'a Service,
    mechanism: &'a Arc<dyn Mechanism>,
    about: &About<'_>,
    mut attempt: impl FnMut() -> (T, bool),
) -> (T, Moment<'a>) {
    let queues = service.queues.list();
    let its = queues.iter().filter(|queue| queue.mechanism.id() == mechanism.id());
    let batches = its.map(Batch::begin).collect();
    let mut moment = Moment::begin(service, mechanism);
    moment.batches = batches;
    moment.read();
    moment.apply();
    let since = Instant::now();
    let result = loop {
        let (result, in_the_way) = attempt();
        if !in_the_way || since.elapsed() >= AT_A_TIME {
            break result;
        }
        moment.read();
        let mut messages = moment.batches.iter().flat_map(Batch::messages);
        if messages.any(|message| is_about(service, mechanism, message, about)) {
            moment.apply();
        }
    };
    moment.apply();
    (result, moment)
}

fn is_about(service: &Service, mechanism: &Arc<dyn Mechanism>, message: &Message, about: &About<'_>) -> bool {
    match (message, about) {
        (_, About::Nothing) | (Message::Fault { .. }, _) | (Message::Removed(_), About::Mappings) => false,
        (Message::Removed(hva), About::Pages(slot, pages) | About::Fill(slot, pages, _)) => {
            let map = service.memory.map();
            let mut its = map.within_hva(mechanism.id(), hva.clone()).filter(|(other, _)| Arc::ptr_eq(other, slot));
            its.any(|(_, offsets)| {
                let removed = slot.pages_of(&offsets);
                let both = removed.start.max(pages.start)..removed.end.min(pages.end);
                let is_filled = |id: &Id| slot.claims().fills(&both, *id);
                !both.is_empty() && if let About::Fill(.., id) = about { is_filled(id) } else { true }
            })
        }
        _ => true,
    }
}
