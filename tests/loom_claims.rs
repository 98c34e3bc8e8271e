//! Tests all interleavings of the claim / wait / install state machine on loom's scheduler.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom_claims`
//!
//! The kernel is one word for each page: empty, or the owner that filled it. The models show for the real states and
//! claims: a page is installed once between two removals; an install begun before a removal has no effect after it; no
//! wait is lost; bytes that the caller resolves while a callback runs are not lost.

#![cfg(loom)]

use std::ops::Range;

use kuf::pages::claims::{Claims, Early, Owner, Terms, Waits};
use kuf::pages::{Pages, State};
use kuf::sync::{lock, Condvar, Mutex};
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::{Arc, RwLock};
use loom::thread;

const EMPTY: u32 = 0;
const SOURCE: u32 = 1;
const CALLER: u32 = 2;

struct Waiter(u64);

impl Waits for Waiter {
    fn page(&self) -> u64 {
        self.0
    }
}

/// A slot of one or two pages, with the kernel behind it.
struct Slot {
    pages: Pages,
    claims: Mutex<Claims<Waiter>>,
    settled: Condvar,
    gate: RwLock<()>,
    kernel: Vec<AtomicU32>,
    /// Installs that found the page present.
    exists: AtomicU32,
    /// Waits that ended.
    woken: AtomicU32,
    /// The number of times the slot was reported complete.
    whole: AtomicU32,
}

const FILL: Terms = Terms { owner: Owner::Fill, in_place: false, demand: true, speculative: false, since: None };

impl Slot {
    fn new(pages: u64) -> Arc<Self> {
        Arc::new(Self {
            pages: Pages::new(pages).unwrap(),
            claims: Mutex::new(Claims::new(1)),
            settled: Condvar::new(),
            gate: RwLock::new(()),
            kernel: (0..pages).map(|_| AtomicU32::new(EMPTY)).collect(),
            exists: AtomicU32::new(0),
            woken: AtomicU32::new(0),
            whole: AtomicU32::new(0),
        })
    }

    fn claim(&self, page: u64, max: u64) -> Option<(u64, Range<u64>)> {
        lock(&self.claims).claim(&self.pages, page, max, State::Absent, FILL)
    }

    /// As `service::install`, without the parts for a real kernel.
    fn install(&self, id: u64, range: Range<u64>, content: u32) {
        let _gate = self.gate.read().unwrap();
        let runs = lock(&self.claims).begin_install(range, id).runs;
        for run in runs {
            for page in run.clone() {
                let put =
                    self.kernel[page as usize].compare_exchange(EMPTY, content, Ordering::AcqRel, Ordering::Acquire);
                if put.is_err() {
                    self.exists.fetch_add(1, Ordering::Relaxed);
                }
            }
            let mut claims = lock(&self.claims);
            let settled = claims.settle(&self.pages, run, id, Some(State::Present));
            self.woken.fetch_add(settled.waiters.len() as u32, Ordering::Relaxed);
            self.whole.fetch_add(settled.whole as u32, Ordering::Relaxed);
            if settled.whole {
                let open = |page| matches!(self.pages.get(page), State::Absent | State::Filling);
                assert!(!(0..self.pages.total()).any(open), "a page is not filled yet");
            }
            if claims.sleepers > 0 {
                self.settled.notify_all();
            }
        }
    }

    /// The steps of a thread in madvise and of the reader of its event.
    fn give_back(&self, range: Range<u64>) -> usize {
        let waiters = {
            let _gate = self.gate.write().unwrap();
            let mut claims = lock(&self.claims);
            let waiters = claims.remove(&self.pages, range.clone(), false).waiters;
            if claims.sleepers > 0 {
                self.settled.notify_all();
            }
            waiters.len()
        };
        for page in range {
            self.kernel[page as usize].store(EMPTY, Ordering::Release);
        }
        waiters
    }

    /// As `service::resolve`.
    fn resolve(&self, range: Range<u64>) {
        let mut left = vec![range];
        while let Some(part) = left.pop() {
            let taken = loop {
                let mut claims = lock(&self.claims);
                if !claims.dropping(&part) {
                    break claims.take(&self.pages, part, false, None);
                }
                drop(claims);
                thread::yield_now();
            };
            if !taken.again.is_empty() {
                thread::yield_now();
                left.extend(taken.again);
            }
            for run in taken.install {
                self.install(taken.id, run, CALLER);
            }
            for run in taken.early {
                if lock(&self.claims).stash(run.clone(), Early::Zero).is_err() {
                    left.push(run);
                }
            }
        }
    }

    /// A `kuf_resolve` of the first page, whose source is unreadable when the kernel copies from it.
    fn resolve_in_vain(&self) {
        let taken = lock(&self.claims).take(&self.pages, 0..1, false, None);
        for run in taken.install {
            let _gate = self.gate.read().unwrap();
            let begun = lock(&self.claims).begin_install(run.clone(), taken.id).runs;
            begun.into_iter().for_each(|run| lock(&self.claims).suspend(run, taken.id));
            let _ = lock(&self.claims).give_back(&self.pages, run, taken.id, None);
        }
    }

    /// As `service::discard`, of the first page.
    fn discard(&self, removed: bool) {
        let mut claims = loop {
            let claims = lock(&self.claims);
            if !claims.installing(&(0..1)) && !claims.dropping(&(0..1)) {
                break claims;
            }
            drop(claims);
            thread::yield_now();
        };
        let begun = claims.begin_discard(&self.pages, 0..1, removed).unwrap();
        drop(claims);
        let state = if removed { State::Removed } else { State::Absent };
        for run in begun.runs {
            self.kernel[0].store(EMPTY, Ordering::Release);
            let _ = lock(&self.claims).settle(&self.pages, run, begun.id, Some(state));
        }
    }

    fn content(&self, page: usize) -> u32 {
        self.kernel[page].load(Ordering::Acquire)
    }
}

#[test]
fn a_slot_is_said_to_be_whole_once_and_when_it_is() {
    loom::model(|| {
        let slot = Slot::new(2);
        let other = {
            let slot = slot.clone();
            thread::spawn(move || {
                let (id, run) = slot.claim(1, 1).unwrap();
                slot.install(id, run, SOURCE);
            })
        };
        let (id, run) = slot.claim(0, 1).unwrap();
        slot.install(id, run, SOURCE);
        other.join().unwrap();
        assert_eq!(slot.whole.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn two_faults_on_one_page_fill_it_once() {
    loom::model(|| {
        let slot = Slot::new(1);
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let slot = slot.clone();
                thread::spawn(move || {
                    let claimed = slot.claim(0, 1);
                    let lost = lock(&slot.claims).join(Waiter(0)).is_err();
                    if let Some((id, run)) = claimed {
                        slot.install(id, run, SOURCE);
                    }
                    // If it is too late to wait, the page must be present.
                    lost.then(|| assert_eq!(slot.pages.get(0), State::Present)).is_some() as u32
                })
            })
            .collect();
        let late: u32 = threads.into_iter().map(|t| t.join().unwrap()).sum();
        assert_eq!(slot.content(0), SOURCE);
        assert_eq!(slot.exists.load(Ordering::Relaxed), 0);
        assert_eq!(slot.woken.load(Ordering::Relaxed) + late, 2, "both threads continued");
    });
}

#[test]
fn nothing_decided_before_a_removal_arrives_after_it() {
    loom::model(|| {
        let slot = Slot::new(2);
        let filler = {
            let slot = slot.clone();
            thread::spawn(move || {
                if let Some((id, run)) = slot.claim(0, 2) {
                    slot.install(id, run, SOURCE);
                }
            })
        };
        let caller = {
            let slot = slot.clone();
            thread::spawn(move || slot.resolve(0..2))
        };
        slot.give_back(0..1);
        filler.join().unwrap();
        caller.join().unwrap();
        assert_eq!(slot.pages.get(0), State::Removed);
        assert_eq!(slot.content(0), EMPTY, "a removed page holds old bytes");
        assert_eq!(slot.pages.get(1), State::Present);
        assert_ne!(slot.content(1), EMPTY);
        assert_eq!(slot.exists.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn a_waiter_of_a_removed_page_is_handed_on() {
    loom::model(|| {
        let slot = Slot::new(1);
        let (id, run) = slot.claim(0, 1).unwrap();
        assert!(lock(&slot.claims).join(Waiter(0)).is_ok());
        let filler = {
            let slot = slot.clone();
            thread::spawn(move || slot.install(id, run, SOURCE))
        };
        let orphans = slot.give_back(0..1) as u32;
        filler.join().unwrap();
        assert_eq!(slot.woken.load(Ordering::Relaxed) + orphans, 1);
        assert_eq!(slot.content(0), EMPTY);
    });
}

#[test]
fn bytes_that_come_while_the_callback_runs_are_not_lost() {
    loom::model(|| {
        let slot = Slot::new(1);
        let terms = Terms { in_place: true, ..FILL };
        let (id, run) = lock(&slot.claims).claim(&slot.pages, 0, 1, State::Absent, terms).unwrap();
        let caller = {
            let slot = slot.clone();
            thread::spawn(move || slot.resolve(0..1))
        };
        // The callback returns KUF_FILL_DEFERRED.
        lock(&slot.claims).defer(run.clone(), id);
        let early = lock(&slot.claims).early(&run, id);
        if let Some((run, _)) = early {
            slot.install(id, run, CALLER);
        }
        caller.join().unwrap();
        assert_eq!(slot.pages.get(0), State::Present);
        assert_eq!(slot.content(0), CALLER);
        assert_eq!(slot.exists.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn bytes_that_come_while_a_fill_fails_are_not_lost() {
    for in_place in [false, true] {
        loom::model(move || {
            let slot = Slot::new(1);
            let terms = Terms { in_place, ..FILL };
            let (id, run) = lock(&slot.claims).claim(&slot.pages, 0, 1, State::Absent, terms).unwrap();
            let caller = {
                let slot = slot.clone();
                thread::spawn(move || slot.resolve(0..1))
            };
            // The kernel cannot read the bytes.
            lock(&slot.claims).begin_install(run.clone(), id);
            lock(&slot.claims).suspend(run.clone(), id);
            // As `service::install::abandon_quietly`.
            while lock(&slot.claims).give_back(&slot.pages, run.clone(), id, None).is_none() {
                let (run, _) = lock(&slot.claims).early(&run, id).unwrap();
                slot.install(id, run, CALLER);
            }
            caller.join().unwrap();
            assert_eq!((slot.pages.get(0), slot.content(0)), (State::Present, CALLER));
        });
    }
}

#[test]
fn bytes_that_come_while_a_page_is_poisoned_are_used_or_refused() {
    loom::model(|| {
        let slot = Slot::new(1);
        let terms = Terms { in_place: true, ..FILL };
        let (id, run) = lock(&slot.claims).claim(&slot.pages, 0, 1, State::Absent, terms).unwrap();
        let caller = {
            let slot = slot.clone();
            thread::spawn(move || {
                let taken = lock(&slot.claims).take(&slot.pages, 0..1, false, None);
                taken.early.into_iter().any(|run| lock(&slot.claims).stash(run, Early::Zero).is_ok())
            })
        };
        let begun = lock(&slot.claims).begin_poison(run.clone(), id);
        for run in begun.runs {
            lock(&slot.claims).poison(run, id);
        }
        while lock(&slot.claims).give_back(&slot.pages, run.clone(), id, None).is_none() {
            let (run, _) = lock(&slot.claims).early(&run, id).unwrap();
            slot.install(id, run, CALLER);
        }
        let poisoned = !caller.join().unwrap();
        assert_eq!(slot.content(0), if poisoned { EMPTY } else { CALLER });
        assert_eq!(lock(&slot.claims).is_poisoned(0), poisoned);
    });
}

#[test]
fn bytes_that_one_resolve_brings_are_not_lost_to_another_that_fails() {
    loom::model(|| {
        let slot = Slot::new(1);
        let (id, _) = slot.claim(0, 1).unwrap();
        lock(&slot.claims).join(Waiter(0)).ok().unwrap();
        lock(&slot.claims).defer(0..1, id);
        let other = thread::spawn({
            let slot = slot.clone();
            move || slot.resolve_in_vain()
        });
        slot.resolve(0..1);
        other.join().unwrap();
        assert_eq!((slot.content(0), slot.woken.load(Ordering::Relaxed)), (CALLER, 1));
        assert_eq!(slot.pages.get(0), State::Present);
    });
}

#[test]
fn a_page_that_a_callback_could_not_resolve_is_the_callbacks_still() {
    loom::model(|| {
        let slot = Slot::new(1);
        let (id, run) = slot.claim(0, 1).unwrap();
        // kuf_resolve inside the callback.
        let taken = lock(&slot.claims).take(&slot.pages, 0..1, false, Some(id));
        assert_eq!(taken.install[..], [run.clone()]);
        assert!(lock(&slot.claims).give_back(&slot.pages, run.clone(), taken.id, None).unwrap().waiters.is_empty());
        assert!(lock(&slot.claims).holds(&run, id));
        // The same, but the page is discarded meanwhile, so that the callback's bytes are stale.
        let taken = lock(&slot.claims).take(&slot.pages, 0..1, false, Some(id));
        let begun = lock(&slot.claims).begin_discard(&slot.pages, 0..1, false).unwrap();
        let _ = lock(&slot.claims).give_back(&slot.pages, run.clone(), taken.id, None);
        let _ = lock(&slot.claims).settle(&slot.pages, run.clone(), begun.id, Some(State::Absent));
        assert!(!lock(&slot.claims).holds(&run, id));
        assert_eq!(slot.pages.get(0), State::Absent);
    });
}

#[test]
fn a_deferred_page_that_is_resolved_and_given_back_holds_nothing_old() {
    loom::model(|| {
        let slot = Slot::new(1);
        let (id, run) = slot.claim(0, 1).unwrap();
        lock(&slot.claims).defer(run, id);
        let caller = {
            let slot = slot.clone();
            thread::spawn(move || slot.resolve(0..1))
        };
        slot.give_back(0..1);
        caller.join().unwrap();
        assert_eq!((slot.pages.get(0), slot.content(0)), (State::Removed, EMPTY));
    });
}

#[test]
fn a_sleeper_always_wakes() {
    loom::model(|| {
        let slot = Slot::new(1);
        let (id, run) = slot.claim(0, 1).unwrap();
        let sleeper = {
            let slot = slot.clone();
            thread::spawn(move || {
                let mut claims = lock(&slot.claims);
                while slot.pages.get(0) == State::Filling {
                    claims.sleepers += 1;
                    claims = slot.settled.wait(claims).unwrap();
                    claims.sleepers -= 1;
                }
            })
        };
        slot.install(id, run, SOURCE);
        sleeper.join().unwrap();
        assert_eq!(slot.pages.get(0), State::Present);
    });
}

#[test]
fn a_fill_that_was_overtaken_by_a_discard_is_not_used() {
    loom::model(|| {
        let slot = Slot::new(1);
        let (id, run) = slot.claim(0, 1).unwrap();
        let filler = {
            let slot = slot.clone();
            thread::spawn(move || {
                slot.install(id, run.clone(), SOURCE);
                let _gate = slot.gate.read().unwrap();
                let mut claims = lock(&slot.claims);
                let _ = claims.settle_cancelled(&slot.pages, run, id);
            })
        };
        slot.discard(false);
        filler.join().unwrap();
        assert_eq!((slot.pages.get(0), slot.content(0)), (State::Absent, EMPTY));
    });
}

#[test]
fn a_page_that_the_host_gives_back_holds_nothing_old_whatever_is_filling_it() {
    loom::model(|| {
        let slot = Slot::new(1);
        let filler = {
            let slot = slot.clone();
            thread::spawn(move || {
                if let Some((id, run)) = slot.claim(0, 1) {
                    slot.install(id, run, SOURCE);
                }
            })
        };
        slot.discard(true);
        filler.join().unwrap();
        assert_eq!((slot.pages.get(0), slot.content(0)), (State::Removed, EMPTY));
    });
}
