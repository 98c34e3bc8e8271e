//! Tests all interleavings of the service threads that pass the lead, on loom's scheduler: if there is work, a thread that
//! can do it is awake or is woken. A lost wake-up is a deadlock here, which loom reports.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom_leader`

#![cfg(loom)]

use kuf::leader::{Lead, LeaderFollowers};
use loom::sync::atomic::{fence, AtomicBool, AtomicU32, Ordering};
use loom::sync::Arc;
use loom::thread;
use std::time::{Duration, Instant};

/// Runs a service thread until it has the lead.
fn until_it_leads(leader: &LeaderFollowers) -> Lead {
    loop {
        if let Some(lead) = leader.try_lead() {
            return lead;
        }
        leader.park(|| true);
    }
}

#[test]
fn a_released_lead_is_taken_by_another_thread() {
    loom::model(|| {
        let leader = Arc::new(LeaderFollowers::default());
        let first = leader.try_lead().unwrap();
        let other = {
            let leader = leader.clone();
            thread::spawn(move || {
                let lead = until_it_leads(&leader);
                assert!(leader.leads(lead));
            })
        };
        // The leader enters a slow fill and never returns.
        leader.give_up(first);
        leader.ensure_watched();
        other.join().unwrap();
    });
}

#[test]
fn of_two_that_rest_one_takes_the_lead() {
    let mut model = loom::model::Builder::new();
    // Three threads have too many interleavings to try them all.
    model.preemption_bound = Some(2);
    model.check(|| {
        let leader = Arc::new(LeaderFollowers::default());
        let first = leader.try_lead().unwrap();
        let (ended, led) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (leader, ended, led) = (leader.clone(), ended.clone(), led.clone());
                thread::spawn(move || {
                    while !ended.load(Ordering::SeqCst) {
                        match leader.try_lead() {
                            Some(_) => {
                                led.fetch_add(1, Ordering::SeqCst);
                                ended.store(true, Ordering::SeqCst);
                                leader.wake_all();
                            }
                            None => {
                                leader.park(|| !ended.load(Ordering::SeqCst));
                            }
                        }
                    }
                })
            })
            .collect();
        leader.give_up(first);
        leader.ensure_watched();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(led.load(Ordering::SeqCst), 1);
    });
}

#[test]
fn work_that_is_queued_finds_a_thread() {
    loom::model(|| {
        let leader = Arc::new(LeaderFollowers::default());
        // A thread that sleeps in the kernel holds the lead all the time.
        let _lead = leader.try_lead().unwrap();
        let queued = Arc::new(AtomicBool::new(false));
        let worker = {
            let (leader, queued) = (leader.clone(), queued.clone());
            thread::spawn(move || {
                while !queued.load(Ordering::SeqCst) {
                    assert!(leader.try_lead().is_none());
                    leader.park(|| !queued.load(Ordering::SeqCst));
                }
            })
        };
        queued.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // Returns false if no thread rests; a thread about to rest checks the queue first.
        leader.wake_follower();
        worker.join().unwrap();
    });
}

#[test]
fn a_leader_in_a_callback_wakes_the_standby_thread() {
    loom::model(|| {
        let leader = Arc::new(LeaderFollowers::default());
        let lead = leader.try_lead().unwrap();
        let looked = Arc::new(AtomicBool::new(false));
        let other = {
            let (leader, looked) = (leader.clone(), looked.clone());
            thread::spawn(move || {
                leader.park(|| true);
                looked.store(true, Ordering::SeqCst);
            })
        };
        // The leader stays in a callback for ever: the standby thread must wake to check the time periodically.
        leader.enter(lead, Instant::now());
        other.join().unwrap();
        assert!(looked.load(Ordering::SeqCst));
    });
}

/// Returns the time after `stays` times the limit for a stay in a callback.
fn after(start: Instant, stays: u32) -> Instant {
    start + stays * Duration::from_secs(1)
}

/// The leader enters a callback and stays there, at any point of the other threads' work.
#[test]
fn a_thread_takes_the_lead_from_one_that_stays_inside_whatever_wakes_it_before_the_time() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(|| {
        let start = Instant::now();
        let leader = Arc::new(LeaderFollowers::default());
        let lead = leader.try_lead().unwrap();
        let stands_by = {
            let leader = leader.clone();
            thread::spawn(move || {
                // It is woken twice before the time limit, and checks the time too early.
                let (mut early, mut late) = (2, 0);
                while leader.try_lead_at(|| after(start, late)).is_none() {
                    // Without a time limit it must be woken, or loom reports a deadlock.
                    if leader.park(|| true) {
                        late += u32::from(early == 0);
                        early = u32::saturating_sub(early, 1);
                    }
                }
            })
        };
        let calls = {
            let leader = leader.clone();
            thread::spawn(move || {
                leader.wake_follower();
                leader.wake_follower();
            })
        };
        leader.enter(lead, start);
        calls.join().unwrap();
        stands_by.join().unwrap();
        assert!(!leader.leads(lead));
    });
}

/// After the leader has left the callback, the standby thread checks once more and then sleeps at no cost.
#[test]
fn a_thread_that_stands_by_rests_without_a_time_limit_when_the_lead_is_out_again() {
    loom::model(|| {
        let leader = Arc::new(LeaderFollowers::default());
        let lead = leader.try_lead().unwrap();
        let inside = leader.enter(lead, Instant::now());
        leader.leave(inside);
        assert!(leader.park(|| true), "the standby thread did not check once more");
        let calls = {
            let leader = leader.clone();
            thread::spawn(move || {
                while !leader.wake_follower() {
                    thread::yield_now();
                }
            })
        };
        assert!(!leader.park(|| true), "the standby thread keeps checking without need");
        calls.join().unwrap();
    });
}

/// A thread that lost the lead inside a callback cannot hide that the next leader is inside one.
#[test]
fn a_late_thread_takes_nothing_from_the_one_that_leads_now() {
    loom::model(|| {
        let start = Instant::now();
        let leader = Arc::new(LeaderFollowers::default());
        let first = leader.try_lead().unwrap();
        let late = {
            let leader = leader.clone();
            thread::spawn(move || {
                // It still believes that it leads: it leaves the callback and enters the next.
                let inside = leader.enter(first, start);
                leader.leave(inside);
                let inside = leader.enter(first, start);
                leader.leave(inside);
                leader.give_up(first);
            })
        };
        let second = loop {
            if let Some(second) = leader.try_lead_at(|| after(start, 1)) {
                break second;
            }
            thread::yield_now();
        };
        // The second leader stays in its callback for ever.
        leader.enter(second, after(start, 1));
        late.join().unwrap();
        assert!(leader.leads(second));
        assert!(leader.try_lead_at(|| after(start, 1)).is_none());
        assert!(leader.try_lead_at(|| after(start, 2)).is_some());
    });
}
