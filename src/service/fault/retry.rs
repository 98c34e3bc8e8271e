//! How long one piece of work waits for conditions that pass: a shortage of memory, and events of other threads that
//! are on their way. Each limit holds for all its pages together: if there is no memory for one page, there is none for
//! the next either.

use std::cell::Cell;

use rustix::io::Errno;

use crate::service::Service;
use crate::sync::thread;
use crate::sync::time::{Duration, Instant};

/// How long a shortage of memory is waited out: guests are stopped meanwhile, but a page given up is lost.
const MEMORY: Duration = Duration::from_secs(2);

/// How long the end of a slot or of a handle tries to poison pages while other threads give memory back. The kernel refuses
/// from before an event is sent until it is read; while threads give memory back without pause it refuses nearly all the
/// time.
const EVENTS: Duration = Duration::from_millis(100);

/// The same where pages cannot be made inaccessible in another way.
const EVENTS_REMOTE: Duration = Duration::from_secs(2);

/// How often work that may give up retries pages that the kernel refuses because of events, beyond the tries that it has
/// earned.
const TRIES: u32 = 256;

/// How many more tries it earns with each installed stretch: work that makes progress does not give up.
const EARNED: u32 = 8;

/// How long the end of a slot or a handle waits for a queue that cannot be read.
const UNREADABLE: Duration = Duration::from_secs(2);

/// How long a queue that cannot be read is waited for.
#[derive(Clone, Copy, Default)]
enum Limit {
    /// A thread that waits for a page waits for the queue.
    #[default]
    None,
    /// A slot or a handle must end even when the queue stays unreadable.
    End,
    /// A call with a timeout.
    At(Instant),
}

/// Of one piece of work, on one thread.
#[derive(Clone, Default)]
pub struct RetryLimits {
    /// How often it may still retry because of events. None: without a limit, for threads that give memory back without
    /// pause hold up only their own guest.
    tries: Cell<Option<u32>>,
    limit: Limit,
    /// When a queue was first and last found to be unreadable.
    unreadable: Cell<Option<(Instant, Instant)>>,
    /// The limit for unreadable queues ran out.
    out: Cell<bool>,
    /// When the shortage began, and when it was last met. A shortage that was not met for a while is over.
    memory: Cell<Option<(Instant, Instant)>>,
    /// Since when it has been waiting for events.
    events: Cell<Option<Instant>>,
}

impl RetryLimits {
    /// Whether to wait: there is no memory at `now`.
    pub fn for_memory(&self, now: Instant) -> bool {
        goes_on(&self.memory, now, MEMORY)
    }

    /// Of a call that ends a slot or a handle.
    pub fn for_queue() -> Self {
        Self { limit: Limit::End, ..Self::default() }
    }

    /// Of a call that is to return by `deadline`.
    pub fn until(deadline: Option<Instant>) -> Self {
        Self { limit: deadline.map_or(Limit::None, Limit::At), ..Self::default() }
    }

    /// Whether a queue that cannot be read at `now` is waited for no longer.
    pub fn is_out(&self, now: Instant) -> bool {
        self.out.set(match self.limit {
            Limit::None => false,
            Limit::End => !goes_on(&self.unreadable, now, UNREADABLE),
            Limit::At(deadline) => now >= deadline,
        });
        self.out.get()
    }

    /// Whether that limit ran out.
    pub fn was_out(&self) -> bool {
        self.out.get()
    }

    /// Whether to wait: an event is under way at `now`.
    pub fn for_events(&self, now: Instant, remote: bool) -> bool {
        let since = self.events.get().unwrap_or(now);
        self.events.set(Some(since));
        now.saturating_duration_since(since) < if remote { EVENTS_REMOTE } else { EVENTS }
    }

    /// Of work that is to end by `deadline`, and gives up in the end however often threads give memory back.
    pub fn of_end(deadline: Option<Instant>) -> Self {
        Self { tries: Cell::new(Some(TRIES)), ..Self::until(deadline) }
    }

    /// Whether to retry after an event was in the way.
    pub fn tries_again(&self) -> bool {
        let left = self.tries.get().map(|tries| tries.saturating_sub(1));
        self.tries.set(left);
        left != Some(0)
    }

    /// Whether it tries without end.
    pub fn is_endless(&self) -> bool {
        self.tries.get().is_none()
    }

    /// Notes that pages were installed.
    pub fn got_through(&self) {
        self.tries.set(self.tries.get().map(|tries| if tries == 0 { 0 } else { TRIES.min(tries + EARNED) }));
    }

    /// Whether all tries are used up.
    pub fn gave_up(&self) -> bool {
        self.tries.get() == Some(0)
    }

    /// Takes over the remaining limits of `other`, which was cloned from it.
    pub fn go_on_from(&self, other: &Self) {
        self.unreadable.set(other.unreadable.get());
        self.memory.set(other.memory.get());
        self.events.set(other.events.get());
        self.tries.set(other.tries.get());
    }
}

/// Whether to wait for a condition that is met at `now`, for `most` in all. A condition that was not met for `most` is over,
/// and a new one begins.
fn goes_on(met: &Cell<Option<(Instant, Instant)>>, now: Instant, most: Duration) -> bool {
    let since = match met.get() {
        Some((since, last)) if now.saturating_duration_since(last) < most => since,
        _ => now,
    };
    met.set(Some((since, now)));
    now.saturating_duration_since(since) < most
}

/// Retries an act that fails for want of memory, for a while: a shortage passes, and a page given up is lost.
pub fn patiently<T>(
    service: &Service,
    patience: &RetryLimits,
    mut attempt: impl FnMut() -> Result<T, Errno>,
) -> Result<T, Errno> {
    loop {
        match attempt() {
            Err(errno) if matches!(errno, Errno::NOMEM | Errno::NOSPC) && patience.for_memory(Instant::now()) => {
                service.stats.here().install_no_memory(1);
                thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// How often [`Backoff`] yields before it sleeps.
const YIELDS: u32 = 16;

/// Pauses that grow from a yield to a millisecond.
#[derive(Default)]
pub struct Backoff {
    pauses: u32,
}

impl Backoff {
    /// Whether it has slept.
    pub fn is_long(&self) -> bool {
        self.pauses > YIELDS
    }

    pub fn pause(&mut self) {
        self.pauses += 1;
        if self.pauses <= YIELDS {
            thread::yield_now();
        } else {
            thread::sleep(Duration::from_micros(50).saturating_mul(self.pauses - YIELDS).min(Duration::from_millis(1)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_is_waited_out_once_however_many_pages_meet_it() {
        let (patience, start) = (RetryLimits::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert!((0..20).all(|n| patience.for_memory(at(n * 100))));
        // The next pages meet the same one.
        assert!((20..60).all(|n| !patience.for_memory(at(n * 100))));
        assert!(patience.for_memory(at(9_000)), "another one");
    }

    #[test]
    fn tries_are_counted_and_earned() {
        let endless = RetryLimits::default();
        assert!((0..10 * TRIES).all(|_| endless.tries_again()) && !endless.gave_up());
        let patience = RetryLimits::of_end(None);
        for _ in 0..TRIES {
            // A page that takes a few tries earns them.
            assert!((0..EARNED).all(|_| patience.tries_again()));
            patience.got_through();
        }
        assert!((1..TRIES).all(|_| patience.tries_again()) && !patience.tries_again());
        patience.got_through();
        assert!(patience.gave_up(), "for good");
    }

    #[test]
    fn waiters_for_a_page_do_not_give_up_on_a_queue_that_cannot_be_read() {
        let (end, other, start) = (RetryLimits::for_queue(), RetryLimits::until(None), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let call = RetryLimits::until(Some(at(500)));
        assert!(!call.is_out(at(499)) && call.is_out(at(500)) && call.was_out());
        assert!((0..20).all(|n| !end.is_out(at(n * 100)) && !other.is_out(at(n * 100))));
        assert!(end.is_out(at(2000)) && end.was_out());
        assert!(!other.is_out(at(2000)) && !other.was_out());
        assert!(!end.is_out(at(9000)) && !end.was_out(), "another one");
    }

    #[test]
    fn events_are_waited_for_once() {
        let (patience, start) = (RetryLimits::default(), Instant::now());
        assert!(patience.for_events(start, false));
        assert!(patience.for_events(start + EVENTS / 2, false));
        let next = patience.clone();
        assert!(!next.for_events(start + EVENTS, false) && next.for_events(start + EVENTS, true));
    }
}
