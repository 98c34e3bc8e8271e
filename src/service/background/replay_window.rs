//! Replay windows: the pages that a replay is about to fill, and the faults that are left to it.
//!
//! A guest that repeats a recorded working set is faster than the fills and catches up with the replay. If its faults
//! were served at once, each would fill one page, and the guest would fault at the next, which is absent too. So a
//! fault in the replay's present window is left to the replay, which fills the window from its end to its beginning: a
//! thread that has caught up waits at the beginning, and finds the whole window present when it goes on.
//!
//! For all other code such a fault was not served yet: no page is claimed for it, and a thread that resolves or
//! discards the page, or removes its slot, wakes the waiter as usual. The fault does not wait long. A window opens only
//! if it is expected to end soon; if the source turns out slow, the leader notices and serves the faults that were left
//! ([`serve_late`]); and a window that ends for any reason leaves no waiter behind.

use std::ops::Range;

use smallvec::SmallVec;

use crate::abi::KUF_FAULT_FORKED;
use crate::memory::{Slot, Waiter};
use crate::pages::claims::Claims;
use crate::service::background::recorder;
use crate::service::{Fault, Service, Work};
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::time::{Duration, Instant};
use crate::sync::{lock, Arc, Mutex};

/// Faults are left to a window that is expected to take at most this long: two dozen times the service of one fault.
const MOMENT: Duration = Duration::from_micros(400);

/// How long a fault is left to a replay at most, before the lead's next look.
const LATE: Duration = Duration::from_micros(800);

/// How often the leader looks for late faults, in milliseconds.
pub const LOOK_MS: i64 = 1;

/// Recorded pages of a slot.
#[derive(Clone)]
pub struct Part {
    pub slot: Arc<Slot>,
    pub pages: Range<u64>,
    /// The place of the first page in the recording, counted from the start of the window.
    pub rank: usize,
}

/// The windows of a replay, and the faults left to them.
#[derive(Default)]
pub struct ReplayWindows {
    state: Mutex<WindowState>,
    /// Whether a window is open, to be read without the lock.
    any: AtomicBool,
    /// How many faults are left to the windows, to be read without the lock.
    left: AtomicUsize,
    /// No fault is late.
    #[cfg(test)]
    pub patient: AtomicBool,
}

#[derive(Default)]
struct WindowState {
    opened: u64,
    /// The open windows, at most two: the one being filled, and the next.
    open: SmallVec<[(u64, Vec<Part>); 2]>,
    left: Vec<Intercepted>,
}

struct Intercepted {
    slot: Arc<Slot>,
    waiter: Waiter,
    since: Instant,
}

impl WindowState {
    fn has(&self, slot: &Arc<Slot>, page: u64) -> bool {
        let here = |part: &Part| part.pages.contains(&page) && Arc::ptr_eq(&part.slot, slot);
        self.open.iter().any(|(_, parts)| parts.iter().any(here))
    }

    /// Takes the faults whose window is not open any more.
    fn take_uncovered(&mut self) -> Vec<Intercepted> {
        let left = std::mem::take(&mut self.left);
        let (stay, go) = left.into_iter().partition(|left| self.has(&left.slot, left.waiter.page));
        self.left = stay;
        go
    }
}

impl ReplayWindows {
    /// Leaves a fault at an absent page to the window that has the page, or gives it back if there is none. The slot's
    /// claims are locked.
    fn leave(&self, slot: &Arc<Slot>, waiter: Waiter) -> Option<Waiter> {
        let mut state = lock(&self.state);
        if !state.has(slot, waiter.page) {
            return Some(waiter);
        }
        state.left.push(Intercepted { slot: slot.clone(), waiter, since: Instant::now() });
        self.left.store(state.left.len(), Ordering::SeqCst);
        None
    }

    /// Takes the faults left in `pages`. The slot's claims are locked, as they were when the faults were left.
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

    /// Closes windows. Returns the faults that no other window covers, to be served.
    fn close(&self, which: impl Fn(u64) -> bool) -> Vec<Intercepted> {
        let mut state = lock(&self.state);
        state.open.retain(|(number, _)| !which(*number));
        let gone = state.take_uncovered();
        self.any.store(!state.open.is_empty(), Ordering::Relaxed);
        self.left.store(state.left.len(), Ordering::SeqCst);
        gone
    }

    /// Whether a window is open.
    pub fn is_open(&self) -> bool {
        self.any.load(Ordering::SeqCst)
    }

    /// How many faults are left to the windows.
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
    /// The parts still to be filled, from the end.
    parts: Vec<Part>,
    pages: u64,
    /// The window's number, if faults are left to it.
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
            close_windows(self.service, |n| n == number);
        }
    }
}

/// The recent duration of windows.
#[derive(Default)]
pub struct WindowPace {
    /// Nanoseconds a page; 0: not known.
    pub page: u64,
}

impl WindowPace {
    /// Whether a window of `pages` is expected to be quick. The first one never is.
    fn is_quick(&self, pages: u64) -> bool {
        self.page > 0 && self.page.saturating_mul(pages) <= MOMENT.as_nanos() as u64
    }

    /// Notes the duration of a window. Clamps outliers: the thread may have been preempted in one slow window, so only
    /// a second one counts fully.
    pub fn took(&mut self, window: &Window<'_>, took: Duration) {
        let page = (took.as_nanos() as u64 / window.pages.max(1)).max(1);
        self.page = if self.page > 0 { page.min(2 * self.page) } else { page };
    }
}

/// Makes a window of `parts`, which are in the order of their addresses. Faults are left to it if it is expected to be
/// quick.
pub fn window<'a>(service: &'a Service, mut parts: Vec<Part>, pace: &WindowPace) -> Window<'a> {
    let pages = parts.iter().map(|part| part.pages.end - part.pages.start).sum();
    let number = pace.is_quick(pages).then(|| service.background.windows.open(&parts));
    service.background.observers_changed();
    if number.is_some() {
        parts.sort_unstable_by_key(|part| part.rank);
    } else {
        parts.reverse();
    }
    Window { service, parts, pages, number }
}

/// Leaves a fault at an absent page to a replay that is about to fill the page, or gives it back. The slot's claims are
/// locked.
pub fn intercept(service: &Service, slot: &Arc<Slot>, waiter: Waiter) -> Option<Waiter> {
    // A fault served for a forked child is not left to a replay: the child's own fault joins it at once.
    if waiter.flags & KUF_FAULT_FORKED != 0 || !service.background.windows.any.load(Ordering::Relaxed) {
        return Some(waiter);
    }
    // Count the fault as demand until a claim has it or it is served: see `quiesce`. Its present service keeps the
    // count above zero.
    service.threads.begin_demand();
    let back = service.background.windows.leave(slot, waiter);
    if back.is_none() {
        // The leader must now check for late faults.
        service.threads.wake_lead();
    } else {
        service.threads.end_demand();
    }
    back
}

/// Joins the faults left in `pages` to the claim that was made for these pages. Returns the page and the thread of the
/// first.
pub fn join_intercepted(
    service: &Service,
    slot: &Arc<Slot>,
    pages: &Range<u64>,
    claims: &mut Claims<Waiter>,
) -> Option<(u64, u32)> {
    let mut first = None;
    for waiter in service.background.windows.take(slot, pages) {
        service.stats.here().faults_joined(1);
        recorder::record_joined(service, slot, waiter.page, claims);
        first = first.or(Some((waiter.page, waiter.wait.thread)));
        // The page is claimed. Without memory to join the claim, the fault is queued again.
        service.push_again(slot, claims.join(waiter).err());
        service.threads.end_demand();
    }
    first
}

/// Serves the faults that were left for too long.
pub fn serve_late(service: &Service) {
    if service.background.windows.left() > 0 && service.background.windows.is_late(Instant::now()) {
        close_windows(service, |_| true);
    }
}

fn close_windows(service: &Service, which: impl Fn(u64) -> bool) {
    let intercepted = service.background.windows.close(which);
    service.background.observers_changed();
    for Intercepted { slot, waiter, .. } in intercepted {
        service.push(Work::Fault(Fault::again(&slot, waiter)));
        service.threads.end_demand();
    }
}
