//! The loop of a service thread: it leads, rests, or works.

use crate::pages::State;
use crate::service::background::{prefetch, replay_window, sweep};
use crate::service::fault::demand;
use crate::service::queues::read;
use crate::service::threads::leader::{self, Lead, Stay};
use crate::service::threads::wait;
use crate::service::threads::wait::{next_events, Spin, WORK};
use crate::service::{Service, Work};
use crate::sync::atomic::Ordering;
use crate::sync::time::Duration;
use crate::sync::{thread, Arc};

/// The longest time for which the leader does not read the kernel's queues, so also the longest delay of a thread that
/// waits for its event to be read.
const NAP: Duration = Duration::from_micros(50);

pub fn serve_loop(service: &Arc<Service>) {
    while service.life.is_open() {
        if wants_help(service) {
            work_off(service, None);
        }
        match service.threads.leader.try_lead() {
            Some(lead) => watch(service, lead),
            None => {
                service.threads.leader.park(|| service.life.is_open() && !wants_help(service));
                look_for_lost_signals(service);
            }
        }
    }
}

/// Whether a thread without the lead should work. It should not if the leader is awake and soon done: two threads would
/// contend for every lock. The leader checks again before it sleeps.
fn wants_help(service: &Service) -> bool {
    let asleep = service.threads.lead_asleep.load(Ordering::SeqCst);
    let leave_it = || {
        !asleep
            && service.threads.leader.is_led()
            && service.threads.leader.fills_are_quick()
            && !service.threads.leader.worth_help(service.threads.queued())
    };
    service.threads.can_work() && !leave_it() || prefetch::can_prefetch(service, asleep)
}

/// Waits for the kernel and serves its faults, as long as this thread has the lead.
fn watch(service: &Service, lead: Lead) {
    let mut spin = Spin::new(service.config.spin);
    while service.life.is_open() && service.threads.leader.leads(lead) {
        let events = next_events(service, &mut spin);
        if !service.life.is_open() {
            break;
        }
        look_now_and_then(service);
        if !service.threads.leader.is_watched() {
            look_for_lost_signals(service);
        }
        read::read_again(service);
        if service.background.is_observed() {
            replay_window::serve_late(service);
        }
        if events.failed {
            read::drain_all(service);
        }
        for event in events.iter() {
            match event.data.u64() {
                WORK => service.threads.waking.clear(),
                data => read::drain_numbered(service, data as u32, (data >> 32) as usize),
            }
        }
        work_off(service, Some(lead));
        nap(service);
    }
    service.threads.leader.give_up(lead);
}

/// Sleeps while every filler is inside a slow fill and more fills are queued: reading each single fault then takes a
/// CPU from other threads, and starts no fill sooner.
fn nap(service: &Service) {
    if service.threads.fillers.load(Ordering::SeqCst) > 0 {
        return;
    }
    let busy = service.threads.leader.busy_for(service.threads.queued(), service.config.fill_threads);
    if busy >= NAP {
        thread::sleep(NAP);
    }
}

/// Works while there is work and a filler's place. `lead`: this thread's lead, kept over quick work and given up before
/// slow work.
fn work_off(service: &Service, lead: Option<Lead>) {
    'queue: while service.life.is_open() && service.threads.can_work() {
        let Some(place) = service.threads.take_place() else { return };
        let mut next = None;
        while let Some(work) = service.threads.next_work() {
            let inside = prepare(service, lead.filter(|lead| service.threads.leader.leads(*lead)), &work);
            match work {
                Work::Fault(fault) => {
                    next = demand::serve(service, fault);
                    service.threads.end_demand();
                }
                work => work_on(service, work),
            }
            if let Some(inside) = inside {
                service.threads.leader.leave(inside);
            }
            if !service.life.is_open() {
                return;
            }
            if next.is_some() {
                break;
            }
            if lead.is_some_and(|lead| !service.threads.leader.leads(lead)) && !wants_help(service) {
                // The present leader serves the remaining demand.
                break 'queue;
            }
        }
        // Free the place, so that a blocked fill there delays no fault.
        drop(place);
        if let Some(task) = next {
            prefetch::fill_dense(service, lead, task);
        }
    }
    prefetch::prefetch(service, lead);
}

/// Before `work` is done: keeps the lead over quick work, gives it up before slow work, and wakes a follower where one is
/// needed. Returns what to leave with afterwards.
fn prepare(service: &Service, lead: Option<Lead>, work: &Work) -> Option<Stay> {
    let leader = &service.threads.leader;
    let queued = service.threads.queued();
    let quick = match work {
        Work::Fault(fault) if !service.serviced() || leader.fills_are_quick() => Some(fault.wait.read_at),
        _ => None,
    };
    match (lead, quick) {
        (Some(lead), Some(since)) => {
            if leader.worth_help(queued) || !leader.is_watched() {
                leader.wake_follower();
            }
            Some(leader.enter(lead, since))
        }
        (lead, _) => {
            if let Some(lead) = lead {
                leader.give_up(lead);
            }
            // A thread has to lead and another to stand by, and others can take the rest of the work.
            let more = queued > 0 && (quick.is_none() || leader.worth_help(queued));
            if more || !leader.is_watched() {
                leader.wake_follower();
            }
            None
        }
    }
}

/// Does a piece of work. Of a fault, pages that are to be filled next are left for later.
pub fn work_on(service: &Service, work: Work) {
    let demand = work.is_demand();
    match work {
        Work::Fault(fault) => prefetch::put_off(service, demand::serve(service, fault)),
        Work::Sweep => sweep::sweep(service),
        Work::Log(level, text) => service.config.callbacks.log(level, || text),
        Work::Notice(notice) => notice.raise(service),
    }
    if demand {
        service.threads.end_demand();
    }
}

/// Does the periodic checks even between steady faults: those of one process must not hide the end of another.
fn look_now_and_then(service: &Service) {
    let threads = &service.threads;
    if threads.has_to_look() && threads.looked.is_due(service.life.age(), Duration::from_millis(wait::LOOK_MS as u64)) {
        read::look_after_processes(service);
        read::look_at_unwatched(service);
    }
}

/// Reads all queues now and then. They are watched by edge, so a queue whose signal was lost would not be read again
/// until more came. The thread that stands by does this rarely, for a lost signal is unlikely; the leader does it if no
/// thread stands by.
fn look_for_lost_signals(service: &Service) {
    if service.life.is_open() && service.threads.listened.is_due(service.life.age(), leader::LONG) {
        service.queues.list().iter().for_each(|queue| read::drain(service, queue, Service::push_counted));
    }
}

/// As [`read_at_the_end`], and serves the faults that need no source: a thread that still runs may be changing a
/// memslot, which KVM finishes only when no fault waits.
pub fn serve_at_the_end(service: &Service) {
    read_at_the_end(service);
    // Take only the work queued by now, for threads that are woken fault again.
    for work in std::iter::from_fn(|| service.threads.next_work()).take(service.threads.queued()) {
        match work {
            Work::Fault(fault) if fault.slot.pages.get(fault.page) != State::Absent => {
                let _ = demand::serve(service, fault);
            }
            _ => {}
        }
    }
}

/// Reads and applies events after the service threads have ended: a thread that waits in madvise, munmap or mremap for
/// its event to be read has no other reader. Faults find their pages poisoned, or present.
pub fn read_at_the_end(service: &Service) {
    read::drain_all(service);
}
