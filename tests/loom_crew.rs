//! Every interleaving of the service threads' handing on of the lead, on loom's scheduler: whatever there is to do, somebody
//! who can do it is awake or is woken. A wake-up that is lost is a deadlock here, and loom reports it.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --test loom_crew`

#![cfg(loom)]

use kuf::crew::{Crew, Lead};
use loom::sync::atomic::{fence, AtomicBool, AtomicU32, Ordering};
use loom::sync::Arc;
use loom::thread;

/// A service thread until it has the lead.
fn until_it_leads(crew: &Crew) -> Lead {
    loop {
        if let Some(lead) = crew.take_lead() {
            return lead;
        }
        crew.rest(|| true);
    }
}

#[test]
fn who_lets_go_of_the_lead_leaves_somebody_who_takes_it() {
    loom::model(|| {
        let crew = Arc::new(Crew::default());
        let first = crew.take_lead().unwrap();
        let other = {
            let crew = crew.clone();
            thread::spawn(move || {
                let lead = until_it_leads(&crew);
                assert!(crew.leads(lead));
            })
        };
        // Into a fill that takes its time: never to come back.
        crew.let_go(first);
        crew.have_watched();
        other.join().unwrap();
    });
}

#[test]
fn of_two_that_rest_one_takes_the_lead() {
    let mut model = loom::model::Builder::new();
    // Three threads are too many for every interleaving.
    model.preemption_bound = Some(2);
    model.check(|| {
        let crew = Arc::new(Crew::default());
        let first = crew.take_lead().unwrap();
        let (ended, led) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (crew, ended, led) = (crew.clone(), ended.clone(), led.clone());
                thread::spawn(move || {
                    while !ended.load(Ordering::SeqCst) {
                        match crew.take_lead() {
                            Some(_) => {
                                led.fetch_add(1, Ordering::SeqCst);
                                ended.store(true, Ordering::SeqCst);
                                crew.call_all();
                            }
                            None => crew.rest(|| !ended.load(Ordering::SeqCst)),
                        }
                    }
                })
            })
            .collect();
        crew.let_go(first);
        crew.have_watched();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(led.load(Ordering::SeqCst), 1);
    });
}

#[test]
fn work_that_is_queued_finds_a_thread() {
    loom::model(|| {
        let crew = Arc::new(Crew::default());
        // Held all the while by a thread that is asleep in the kernel.
        let _lead = crew.take_lead().unwrap();
        let queued = Arc::new(AtomicBool::new(false));
        let worker = {
            let (crew, queued) = (crew.clone(), queued.clone());
            thread::spawn(move || {
                while !queued.load(Ordering::SeqCst) {
                    assert!(crew.take_lead().is_none());
                    crew.rest(|| !queued.load(Ordering::SeqCst));
                }
            })
        };
        queued.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        // False: nobody rests, and who is about to looks at the queue first.
        crew.call();
        worker.join().unwrap();
    });
}

#[test]
fn who_stands_by_hears_that_there_is_something_to_look_after() {
    loom::model(|| {
        let crew = Arc::new(Crew::default());
        let lead = crew.take_lead().unwrap();
        let looked = Arc::new(AtomicBool::new(false));
        let other = {
            let (crew, looked) = (crew.clone(), looked.clone());
            thread::spawn(move || {
                crew.rest(|| true);
                looked.store(true, Ordering::SeqCst);
            })
        };
        // Inside host code for good: whoever stands by has to wake up, to look at the time now and then.
        crew.enter(lead, std::time::Instant::now());
        other.join().unwrap();
        assert!(looked.load(Ordering::SeqCst));
    });
}
