//! The end of a slot and of a handle. No thread gets zeroes for a page that was not filled.

use rustix::io::Errno;

use crate::abi::*;
use crate::alloc::{refusable, try_push};
use crate::error::{words, Error, Result};
use crate::mechanism::Mechanism;
use crate::memory::Slot;
use crate::service::background::{populate, Stopped};
use crate::service::calls::end_slot::{cut_off_if_written, Toll};
use crate::service::calls::{end_slot, known_flags, take_out, unresolved};
use crate::service::fault::exits;
use crate::service::inside::refuse_inside_callbacks;
use crate::service::queues::{quiet, read};
use crate::service::threads::{fork, serve, start};
use crate::service::Service;
use crate::sync::atomic::Ordering;
use crate::sync::time::{Duration, Instant};
use crate::sync::{thread, Arc};

/// How long the end of a handle waits for a userfaultfd of its own to be readable again.
const READABLE: Duration = Duration::from_secs(2);

/// The part of `kuf_close` that can still be refused, while the handle is in full use.
pub fn prepare_close(service: &Service, flags: u32) -> Result<()> {
    refuse_inside_callbacks("kuf_close")?;
    known_flags(flags, KUF_END_POISON | KUF_END_POPULATE | KUF_END_NOWAIT | KUF_END_HANDOVER)?;
    if flags & KUF_END_HANDOVER != 0 {
        if flags & (KUF_END_POISON | KUF_END_POPULATE) != 0 {
            let text = "KUF_END_HANDOVER leaves pages to another handler: it goes with no other way to settle them";
            return Err(Error::new(Errno::INVAL, text));
        }
        if service.memory.map().slots().iter().any(|slot| !slot.facts().adopted) {
            let text = "KUF_END_HANDOVER needs every slot to have been added with memory->uffd";
            return Err(Error::new(Errno::INVAL, text));
        }
        return Ok(());
    }
    if service.life.is_dead() {
        return Ok(());
    }
    if flags & KUF_END_POPULATE != 0 {
        populate_before_end(service, None, flags)?;
    }
    unless_unresolved(service, flags, || ())
}

/// Runs `act`, or refuses to because pages are unresolved and no flag says how to settle them. Until `act` is done, no
/// slot is added and no claim begins or ends.
fn unless_unresolved(service: &Service, flags: u32, act: impl Fn()) -> Result<()> {
    if flags & (KUF_END_POISON | KUF_END_HANDOVER) != 0 || service.life.is_dead() {
        act();
        return Ok(());
    }
    loop {
        let acted = service.memory.hold(|map| {
            let mut held = Vec::new();
            refusable(|| held.try_reserve_exact(map.slots().len()))
                .map_err(|_| Error::new(Errno::NOMEM, "out of memory"))?;
            held.extend(map.slots().iter().map(|slot| (slot, slot.claims())));
            let alive = || held.iter().filter(|(slot, _)| slot.gone().is_none());
            if let Some((slot, _)) = alive().find(|(slot, claims)| claims.unresolved(&slot.pages)) {
                return Err(unresolved(slot));
            }
            // A page whose waiter has gone on may not be settled yet: wait for that. Pages that were given back do not
            // count: they are zero already, and the guest may touch them all the time.
            let booked = alive().all(|(_, claims)| !claims.to_be_poisoned());
            if booked {
                act();
            }
            Ok(booked)
        })?;
        if acted {
            return Ok(());
        }
        thread::yield_now();
    }
}

pub fn populate_before_end(service: &Service, range: Option<(u64, u64)>, flags: u32) -> Result<()> {
    if !service.serviced() {
        return Err(Error::new(Errno::NOTSUP, "KUF_END_POPULATE needs a fill callback to ask, or sources"));
    }
    let limit = service.config.end_timeout;
    let stopped = match populate::populate_now(service, range, limit.map(|limit| Instant::now() + limit)) {
        _ if flags & KUF_END_POISON != 0 => return Ok(()),
        Ok(()) => return Ok(()),
        Err(stopped) => stopped,
    };
    let (errno, why) = match stopped {
        // A kuf_close has begun, or the service has failed.
        Stopped::Canceled => return service.check_open(),
        Stopped::Failed(failure) => (Errno::IO, words!("could be filled ({failure})")),
        Stopped::Later => {
            (Errno::IO, "could be filled: the fill callback left pages absent with KUF_FILL_LATER".into())
        }
        Stopped::GaveUp => (Errno::IO, "could be filled, for other threads give memory back all the while".into()),
        Stopped::TimedOut => {
            let limit = limit.unwrap_or_default().as_millis();
            (Errno::TIMEDOUT, words!("was filled within kuf_options.end_timeout_ms, {limit}"))
        }
    };
    Err(Error::new(errno, words!("not everything {why}: nothing was ended")))
}

/// The last part of `kuf_close` that can be refused. From here on no page becomes absent any more, and waiting calls
/// return.
pub fn begin_end(service: &Service, flags: u32) -> Result<()> {
    if flags & KUF_END_HANDOVER != 0 {
        service.life.hand_over();
    }
    unless_unresolved(service, flags, || {
        service.life.close();
    })?;
    service.wake_all();
    Ok(())
}

/// Poisons the remaining pages, before any step that may take time.
pub fn settle_rest(service: &Service, flags: u32, toll: &mut Toll) {
    if flags & KUF_END_HANDOVER != 0 {
        return;
    }
    end_slot::poison_all(service, service.memory.map().all(), toll);
    toll.tell(service, None, None);
    let_unread_go(service);
}

/// Closes a userfaultfd that cannot be read. A thread in madvise(2) or munmap(2) whose event cannot be read goes on
/// only then, and it may be in a kuf_discard that the close has to wait for. This is not done where forks are followed:
/// a child whose event is unread would have zeroes in place of its absent pages.
fn let_unread_go(service: &Service) {
    let Some(own) = service.own.as_ref().filter(|_| service.forks.is_none()) else { return };
    if !is_deaf(service, own) {
        return;
    }
    // No install is in progress, and none follows: late owners find no claim of theirs.
    let _gate = own.gate().write();
    let map = service.memory.map();
    let its = || map.all().filter(|slot| slot.mechanism.id() == own.id());
    let stays = |slot: &&Arc<Slot>| slot.stays.load(Ordering::SeqCst);
    let (mut settled, mut listed) = (Vec::new(), true);
    its().filter(|slot| !stays(slot)).for_each(|slot| {
        slot.each_extent(|extent| listed &= try_push(&mut settled, extent.hva..extent.hva + extent.len).is_ok());
    });
    settled.sort_unstable_by_key(|hva| hva.start);
    if listed && own.give_up(&settled, service.threads.waking.fd()) {
        // A slot whose pages could not be closed has moved, and is inaccessible where it is now; or it was unmapped.
        its().filter(stays).for_each(|slot| slot.stays.store(false, Ordering::SeqCst));
    }
}

/// Whether the queues of `mechanism` cannot be read. Waits for a possible shortage to end.
fn is_deaf(service: &Service, mechanism: &Arc<dyn Mechanism>) -> bool {
    let since = Instant::now();
    read::drain_all(service);
    while service.queues.is_unread(mechanism) && !service.queues.is_deaf() && since.elapsed() < READABLE {
        thread::sleep(Duration::from_millis(1));
        read::drain_all(service);
    }
    service.queues.is_unread(mechanism)
}

/// Ends the threads and releases the memory.
pub fn end(service: &Arc<Service>, flags: u32, toll: &mut Toll) {
    start::stop_threads(service, flags & KUF_END_NOWAIT != 0);
    if flags & KUF_END_HANDOVER != 0 {
        service.memory.map().all().for_each(leave_to_next);
    } else {
        let_go(service, flags & KUF_END_NOWAIT != 0, toll);
    }
    service
        .queues
        .list()
        .iter()
        .filter(|queue| queue.mechanism.facts().adopted)
        .for_each(|queue| read::forget_parked(service, queue));
    fork::end_forks(service);
}

/// Leaves a slot to the next handler. Drops from the file the pages that were not filled, which a fill may have begun
/// or left when it failed: the kernel would report a touch of one as a minor fault of a present page. Bytes that a fill
/// has brought whole stay although the kernel refused to install them, for the caller may have recorded that the page is
/// whole. So does all that the file of a slot with KUF_MEMORY_FILL_ALL holds: the next handler may still have to name
/// it. Faults that were read here and not served are raised again.
fn leave_to_next(slot: &Arc<Slot>) {
    let all = 0..slot.pages.total();
    let (id, _waiters) = {
        let mut claims = slot.claims();
        cut_off_if_written(slot, &claims);
        claims.shut(&slot.pages)
    };
    if !slot.fills_all {
        let mut from = 0;
        let next = |from| slot.claims().half_filled(&(from..all.end), id);
        while let Some(run) = next(from) {
            from = run.end;
            slot.scrub(&run);
        }
        slot.scrub_absent(&all);
    }
    slot.binding.wake(&all);
}

fn let_go(service: &Service, in_use: bool, toll: &mut Toll) {
    // Every page is present, removed or poisoned now, so no thread that unregistering wakes gets a wrong page. Slots
    // added since the pages were settled are settled here.
    let map = service.memory.map();
    end_slot::poison_all(service, map.all(), toll);
    toll.tell(service, None, None);
    let mine = |slot: &&Arc<Slot>| !slot.detached.swap(true, Ordering::AcqRel);
    map.all().filter(mine).for_each(|slot| {
        // An adopted userfaultfd stays open: memory that mremap has just moved has to be unregistered at its new place.
        let _gate = slot.facts().adopted.then(|| slot.mechanism.gate().write());
        take_out::detach(slot, in_use);
        quiet::end_events(service, slot);
    });
    map.all().for_each(|slot| exits::end(slot));
    serve::read_at_the_end(service);
    for queue in service.queues.list().iter().filter(|queue| queue.mechanism.facts().adopted) {
        quiet::read_out(service, &queue.mechanism);
    }
    // A thread that is still in a callback finds later that its slot has gone. The gate is not taken, for a thread of a
    // failed service may never release it.
    map.all().for_each(|slot| slot.gone.store(Errno::CANCELED.raw_os_error(), Ordering::Release));
}
