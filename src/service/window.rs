//! What a replay is about to bring, and the faults that are left to it.
//!
//! A guest that touches again what it touched when it was recorded is faster than its pages come: it catches up with the
//! replay. Served at once, each of its faults would bring one page and end at the next, which is absent too. So a fault
//! in the window that the replay is at is left to the replay. That fills the window from its end to its beginning:
//! whoever has caught up stands at the beginning, and has all of the window before it when its page comes.
//!
//! To everybody else such a fault is one that was not served yet: no page is claimed for it, and whoever else brings the
//! page, discards it or takes its slot away wakes its toucher as ever. Nor is it left for long. A window opens only if it
//! is expected to be through in a moment; a source that takes its time all the same is noticed by the thread that has
//! the lead, which then serves what was left ([`Service::serve_late`]); and a window that ends, for whatever reason, leaves
//! nobody behind.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use super::{Fault, Service, Work};
use crate::capi::types::KUF_FAULT_FORKED;
use crate::claims::Claims;
use crate::memory::{Slot, Waiter};
use crate::sync::{lock, Mutex};

/// How long a window may be expected to take for faults to be left to it: two dozen times what serving one takes.
const MOMENT: Duration = Duration::from_micros(400);

/// How long a fault is left to a replay at most, before the lead's next look.
const LATE: Duration = Duration::from_micros(800);

/// How often the lead looks, in milliseconds.
pub const LOOK_MS: i64 = 1;

/// Recorded pages of a slot.
#[derive(Clone)]
pub struct Part {
    pub slot: Arc<Slot>,
    pub pages: Range<u64>,
    /// The place of the first of them in the recording, from the start of the window.
    pub rank: usize,
}

/// The windows of a replay, and what is left to them.
#[derive(Default)]
pub struct Windows {
    state: Mutex<State>,
    /// Whether one is open, for a look without the lock.
    any: AtomicBool,
    /// How many faults are left to them, for a look without the lock.
    left: AtomicUsize,
    /// No fault is late.
    #[cfg(test)]
    pub patient: AtomicBool,
}

#[derive(Default)]
struct State {
    opened: u64,
    /// At most two: the one that is filled, and the next.
    open: SmallVec<[(u64, Vec<Part>); 2]>,
    left: Vec<Left>,
}

struct Left {
    slot: Arc<Slot>,
    waiter: Waiter,
    since: Instant,
}

impl State {
    fn has(&self, slot: &Arc<Slot>, page: u64) -> bool {
        let here = |part: &Part| part.pages.contains(&page) && Arc::ptr_eq(&part.slot, slot);
        self.open.iter().any(|(_, parts)| parts.iter().any(here))
    }

    /// Those whose window is not open any more.
    fn take_uncovered(&mut self) -> Vec<Left> {
        let left = std::mem::take(&mut self.left);
        let (stay, go) = left.into_iter().partition(|left| self.has(&left.slot, left.waiter.page));
        self.left = stay;
        go
    }
}

impl Windows {
    /// Leaves a fault at an absent page to the window that has it, or gives it back: there is none. The slot's claims are
    /// locked.
    fn leave(&self, slot: &Arc<Slot>, waiter: Waiter) -> Option<Waiter> {
        let mut state = lock(&self.state);
        if !state.has(slot, waiter.page) {
            return Some(waiter);
        }
        state.left.push(Left { slot: slot.clone(), waiter, since: Instant::now() });
        self.left.store(state.left.len(), Ordering::SeqCst);
        None
    }

    /// What was left of `pages`. The slot's claims are locked, as they were when it was left.
    fn take(&self, slot: &Arc<Slot>, pages: &Range<u64>) -> SmallVec<[Waiter; 1]> {
        let mut taken = SmallVec::new();
        if self.left.load(Ordering::Relaxed) > 0 {
            let mut state = lock(&self.state);
            while let Some(n) =
                state.left.iter().position(|left| pages.contains(&left.waiter.page) && Arc::ptr_eq(&left.slot, slot))
            {
                taken.push(state.left.swap_remove(n).waiter);
            }
            self.left.store(state.left.len(), Ordering::SeqCst);
        }
        taken
    }

    fn open(&self, parts: &[Part]) -> u64 {
        let mut state = lock(&self.state);
        state.opened += 1;
        let number = state.opened;
        state.open.push((number, parts.to_vec()));
        self.any.store(true, Ordering::Relaxed);
        number
    }

    /// Returns the faults that nobody else has: to be served.
    fn close(&self, which: impl Fn(u64) -> bool) -> Vec<Left> {
        let mut state = lock(&self.state);
        state.open.retain(|(number, _)| !which(*number));
        let gone = state.take_uncovered();
        self.any.store(!state.open.is_empty(), Ordering::Relaxed);
        self.left.store(state.left.len(), Ordering::SeqCst);
        gone
    }

    /// Whether there is one that faults are left to.
    #[cfg(test)]
    pub fn is_open(&self) -> bool {
        self.any.load(Ordering::SeqCst)
    }

    /// How many faults are left to them.
    pub fn left(&self) -> usize {
        self.left.load(Ordering::SeqCst)
    }

    fn is_late(&self, now: Instant) -> bool {
        #[cfg(test)]
        if self.patient.load(Ordering::SeqCst) {
            return false;
        }
        lock(&self.state).left.iter().any(|left| now.saturating_duration_since(left.since) >= LATE)
    }
}

/// Parts that are filled one after the other.
pub struct Window<'a> {
    service: &'a Service,
    /// What is still to be filled, from the end.
    parts: Vec<Part>,
    pages: u64,
    /// Its number, if faults are left to it.
    number: Option<u64>,
}

impl Window<'_> {
    /// The next part to be filled.
    pub fn next(&mut self) -> Option<Part> {
        self.parts.pop()
    }
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        if let Some(number) = self.number {
            self.service.close_windows(|n| n == number);
        }
    }
}

/// How long windows take of late.
#[derive(Default)]
pub struct Pace {
    /// Nanoseconds a page; 0: not known.
    pub page: u64,
}

impl Pace {
    /// Nothing is expected of the first one.
    fn is_quick(&self, pages: u64) -> bool {
        self.page > 0 && self.page.saturating_mul(pages) <= MOMENT.as_nanos() as u64
    }

    /// One window that is slow says little of the source: the thread may have been preempted. The second says it.
    pub fn took(&mut self, window: &Window<'_>, took: Duration) {
        let page = (took.as_nanos() as u64 / window.pages.max(1)).max(1);
        self.page = if self.page > 0 { page.min(2 * self.page) } else { page };
    }
}

impl Service {
    /// Of `parts`, which are in the order of their addresses. Faults are left to it if it is expected to be quick.
    pub(super) fn window(&self, mut parts: Vec<Part>, pace: &Pace) -> Window<'_> {
        let pages = parts.iter().map(|part| part.pages.end - part.pages.start).sum();
        let number = pace.is_quick(pages).then(|| self.windows.open(&parts));
        if number.is_some() {
            parts.sort_unstable_by_key(|part| part.rank);
        } else {
            parts.reverse();
        }
        Window { service: self, parts, pages, number }
    }

    /// Leaves a fault at an absent page to a replay that is about to bring the page, or gives it back. The slot's claims
    /// are locked.
    pub(super) fn leave_to_replay(&self, slot: &Arc<Slot>, waiter: Waiter) -> Option<Waiter> {
        // What is served for a child is joined by the child's own fault at once.
        if waiter.flags & KUF_FAULT_FORKED != 0 || !self.windows.any.load(Ordering::Relaxed) {
            return Some(waiter);
        }
        // Demand until it is a claim's, or served: see `quiesce`. It is being served, so it counts still.
        self.demanded.fetch_add(1, Ordering::SeqCst);
        let back = self.windows.leave(slot, waiter);
        if back.is_none() {
            // To look at the clock from now on.
            self.wake_lead();
        } else {
            self.demanded.fetch_sub(1, Ordering::SeqCst);
        }
        back
    }

    /// `pages` were claimed to be filled: who was left to that waits for the claim now. Returns the first of them, as page
    /// and thread.
    pub(super) fn join_left(
        &self,
        slot: &Arc<Slot>,
        pages: &Range<u64>,
        claims: &mut Claims<Waiter>,
    ) -> Option<(u64, u32)> {
        let mut first = None;
        for waiter in self.windows.take(slot, pages) {
            self.stats.here().faults_joined(1);
            self.record_joined(slot, waiter.page, claims);
            first = first.or(Some((waiter.page, waiter.thread)));
            // It is claimed.
            let _ = claims.join(waiter);
            self.demanded.fetch_sub(1, Ordering::SeqCst);
        }
        first
    }

    /// Serves what was left for too long.
    pub(super) fn serve_late(&self) {
        if self.windows.left() > 0 && self.windows.is_late(Instant::now()) {
            self.close_windows(|_| true);
        }
    }

    fn close_windows(&self, which: impl Fn(u64) -> bool) {
        for Left { slot, waiter, .. } in self.windows.close(which) {
            let Waiter { page, read_at, thread, flags, .. } = waiter;
            self.push(Work::Fault(Fault { slot, page, flags, thread, read_at }));
            self.demanded.fetch_sub(1, Ordering::SeqCst);
        }
    }
}
