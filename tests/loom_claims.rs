//! Every interleaving of the claim / wait / install state machine, on loom's scheduler.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom_claims`
//!
//! The kernel is one word a page here: empty, or who filled it. What the models show for the real states and claims: a page
//! is opened once per life; nothing that was decided on before a removal arrives after it; nobody's wait is lost; bytes that
//! the host brings while a callback runs are not lost.

#![cfg(loom)]

use std::ops::Range;

use kuf::claims::{Claims, Early, Owner, Terms, Waits};
use kuf::pages::{Pages, State};
use kuf::sync::{lock, Condvar, Mutex};
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::{Arc, RwLock};
use loom::thread;

const EMPTY: u32 = 0;
const SOURCE: u32 = 1;
const HOST: u32 = 2;

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
    /// Installs that found the page there.
    exists: AtomicU32,
    /// Waits that ended.
    woken: AtomicU32,
}

const FILL: Terms = Terms { owner: Owner::Fill, in_place: false, demand: true, ahead: false, since: None };

impl Slot {
    fn new(pages: u64) -> Arc<Self> {
        Arc::new(Self {
            pages: Pages::new(pages),
            claims: Mutex::new(Claims::new(1)),
            settled: Condvar::new(),
            gate: RwLock::new(()),
            kernel: (0..pages).map(|_| AtomicU32::new(EMPTY)).collect(),
            exists: AtomicU32::new(0),
            woken: AtomicU32::new(0),
        })
    }

    fn claim(&self, page: u64, max: u64) -> Option<(u64, Range<u64>)> {
        lock(&self.claims).claim(&self.pages, page, max, State::Absent, FILL)
    }

    /// As `service::install`, without what only a real kernel does.
    fn install(&self, id: u64, range: Range<u64>, content: u32) {
        let _gate = self.gate.read().unwrap();
        let (runs, _) = lock(&self.claims).begin_install(range, id);
        for run in runs {
            for page in run.clone() {
                let put =
                    self.kernel[page as usize].compare_exchange(EMPTY, content, Ordering::AcqRel, Ordering::Acquire);
                if put.is_err() {
                    self.exists.fetch_add(1, Ordering::Relaxed);
                }
            }
            let mut claims = lock(&self.claims);
            let waiters = claims.settle(&self.pages, run, id, Some(State::Present));
            self.woken.fetch_add(waiters.len() as u32, Ordering::Relaxed);
            if claims.sleepers > 0 {
                self.settled.notify_all();
            }
        }
    }

    /// What a thread in madvise and the reader of its event do together.
    fn give_back(&self, range: Range<u64>) -> usize {
        let waiters = {
            let _gate = self.gate.write().unwrap();
            let mut claims = lock(&self.claims);
            let waiters = claims.remove(&self.pages, range.clone());
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
            let taken = lock(&self.claims).take(&self.pages, part, false, None);
            for run in taken.install {
                self.install(taken.id, run, HOST);
            }
            for run in taken.early {
                if lock(&self.claims).stash(run.clone(), Early::Zero).is_err() {
                    left.push(run);
                }
            }
        }
    }

    /// As `service::discard`, of the first page.
    fn discard(&self, removed: bool) {
        let mut claims = loop {
            let claims = lock(&self.claims);
            if !claims.installing(&(0..1)) {
                break claims;
            }
            drop(claims);
            thread::yield_now();
        };
        let begun = claims.begin_discard(&self.pages, 0..1, removed, false);
        drop(claims);
        let state = if removed { State::Removed } else { State::Absent };
        for run in begun.runs {
            self.kernel[0].store(EMPTY, Ordering::Release);
            lock(&self.claims).settle(&self.pages, run, begun.id, Some(state));
        }
    }

    fn content(&self, page: usize) -> u32 {
        self.kernel[page].load(Ordering::Acquire)
    }
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
                    // Too late to wait: then it has to be there.
                    lost.then(|| assert_eq!(slot.pages.get(0), State::Present)).is_some() as u32
                })
            })
            .collect();
        let late: u32 = threads.into_iter().map(|t| t.join().unwrap()).sum();
        assert_eq!(slot.content(0), SOURCE);
        assert_eq!(slot.exists.load(Ordering::Relaxed), 0);
        assert_eq!(slot.woken.load(Ordering::Relaxed) + late, 2, "each of them went on");
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
        let host = {
            let slot = slot.clone();
            thread::spawn(move || slot.resolve(0..2))
        };
        slot.give_back(0..1);
        filler.join().unwrap();
        host.join().unwrap();
        assert_eq!(slot.pages.get(0), State::Removed);
        assert_eq!(slot.content(0), EMPTY, "a page that was given back holds old bytes");
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
        let host = {
            let slot = slot.clone();
            thread::spawn(move || slot.resolve(0..1))
        };
        // The callback returns KUF_DEFERRED.
        let early = lock(&slot.claims).defer(run, id);
        for (run, _) in early {
            slot.install(id, run, HOST);
        }
        host.join().unwrap();
        assert_eq!(slot.pages.get(0), State::Present);
        assert_eq!(slot.content(0), HOST);
        assert_eq!(slot.exists.load(Ordering::Relaxed), 0);
    });
}

#[test]
fn a_deferred_page_that_is_resolved_and_given_back_holds_nothing_old() {
    loom::model(|| {
        let slot = Slot::new(1);
        let (id, run) = slot.claim(0, 1).unwrap();
        assert!(lock(&slot.claims).defer(run, id).is_empty());
        let host = {
            let slot = slot.clone();
            thread::spawn(move || slot.resolve(0..1))
        };
        slot.give_back(0..1);
        host.join().unwrap();
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
                claims.settle_cancelled(&slot.pages, run, id);
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
