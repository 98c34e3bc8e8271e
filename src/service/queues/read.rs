//! Reading the kernel: messages in, faults out, with the removals of a batch applied before its faults.
//!
//! The kernel hands out page faults before other events, and a thread in madvise or munmap continues as soon as its
//! event has been read. So reading and applying happen with the gate held exclusively: no earlier install can reach the
//! kernel afterwards. A page that was given back is then filled with zeroes, never with old bytes.

use rustix::io::Errno;

use crate::abi::*;
use crate::error::{words, Error};
use crate::mechanism::{Mechanism, Message, Stray};
use crate::memory::Slot;
use crate::service::fault::notice::Notice;
use crate::service::fault::shortage;
use crate::service::queues::{children, events, spare_descriptor, stray, watch, KernelQueue, Lists};
use crate::service::{Service, Work};
use crate::sync::atomic::Ordering;
use crate::sync::{lock, Arc};

/// How many messages are read at a time at most. Threads that give memory back without pause refill the queue as fast as it
/// is read; one thread would read for ever with the gate held, and its list would grow without bound.
const MOST: usize = 1 << 12;

/// Reads the queues that do not signal new messages.
pub fn look_at_unwatched(service: &Service) {
    for queue in service.queues.list().iter() {
        let unwatched = queue.unwatched.load(Ordering::Relaxed);
        if unwatched && watch::watch_queue(service, queue).is_ok() {
            queue.unwatched.store(false, Ordering::Relaxed);
        }
        if unwatched || queue.mechanism.facts().needs_polling {
            drain_numbered(service, queue.mechanism.id(), queue.number);
        }
    }
}

/// Wakes faults of memory in no slot, so that they reach the next reader of the userfaultfd. This handle no longer reads it
/// by then.
pub fn forget_parked(service: &Service, queue: &KernelQueue) {
    queue.dropped.store(true, Ordering::SeqCst);
    // A thread that was reading the queue has finished now, and its faults are in `parked`.
    drop(queue.mechanism.gate().write());
    // These addresses are still registered, and no handle reads their faults any more.
    stray::unregister_moved(service, queue);
    let left = stray::in_no_slot(service, queue, queue.leftovers.take());
    left.into_iter().for_each(|range| queue.mechanism.disown(Stray::Range(range)));
    for (hva, _) in std::mem::take(&mut *lock(&queue.parked)).into_keys() {
        queue.mechanism.wake_range(hva..hva + 1);
    }
}

/// Reads all messages of a queue, or as many as one look takes. A faulting thread is blocked, so there are at most as many
/// faults as threads, and a thread in madvise(2) or munmap(2) waits for its event to be read.
pub fn drain_numbered(service: &Service, mechanism: u32, number: usize) {
    let queues = service.queues.list();
    if let Some(queue) = queues.iter().find(|queue| queue.number == number && queue.mechanism.id() == mechanism) {
        drain(service, queue, Service::send);
    }
}

/// Reads all queues of a mechanism: an install waits for their events. One munmap(2) sends an event to each queue, one after
/// the other, and all queues refuse installs meanwhile.
pub fn drain_mechanism(service: &Service, mechanism: &Arc<dyn Mechanism>) {
    for queue in service.queues.list().iter().filter(|queue| queue.mechanism.id() == mechanism.id()) {
        drain(service, queue, Service::push_counted);
    }
}

/// Reads every queue: the caller's thread is the only reader.
pub fn drain_all(service: &Service) {
    for queue in service.queues.list().iter() {
        drain(service, queue, Service::send);
    }
}

pub fn drain(service: &Service, queue: &Arc<KernelQueue>, push: fn(&Service, Work)) {
    let mut batch = Batch::begin(queue);
    {
        let _gate = queue.mechanism.gate().write();
        batch.read_more(service);
        batch.apply(service);
        // No other thread has messages that it has not applied.
        batch.end_aside(service);
    }
    batch.end(service, push);
}

/// Messages that were read from a queue and are not yet handed on.
pub struct Batch {
    queue: Arc<KernelQueue>,
    lists: Lists,
    read: std::result::Result<(), Errno>,
    more: bool,
}

impl Batch {
    pub fn begin(queue: &Arc<KernelQueue>) -> Self {
        // Another thread may have the lists at this moment, and then they are new ones.
        let lists = std::mem::take(&mut *lock(&queue.lists));
        Self { queue: queue.clone(), lists, read: Ok(()), more: false }
    }

    /// Reads the queue. The gate is held exclusively from here until the messages have been applied.
    pub fn read_more(&mut self, service: &Service) {
        if self.queue.dropped.load(Ordering::SeqCst) {
            return;
        }
        let before = self.lists.messages.len();
        self.read = read_queue(service, &self.queue, MOST, &mut self.lists.messages);
        self.more |= self.lists.messages.len() - before >= MOST;
    }

    /// The messages that were read and are not yet applied.
    pub fn messages(&self) -> &[Message] {
        &self.lists.messages
    }

    /// Applies the messages.
    pub fn apply(&mut self, service: &Service) {
        let (queue, Lists { messages, work }) = (&self.queue, &mut self.lists);
        let before = work.len();
        events::apply(service, queue, messages, work);
        if queue.awaits_quiet() && queue.is_quiet() {
            stray::no_event_is_late(service, queue);
        }
        work[before..].iter().for_each(|work| service.threads.count(work));
    }

    /// See [`events::unmap_aside`].
    fn end_aside(&mut self, service: &Service) {
        let before = self.lists.work.len();
        events::unmap_aside(service, &self.queue, &mut self.lists.work);
        self.lists.work[before..].iter().for_each(|work| service.threads.count(work));
    }

    /// Hands the work on, with the gate released.
    pub fn end(self, service: &Service, push: fn(&Service, Work)) {
        let Self { queue, lists: Lists { messages, mut work }, read, more } = self;
        // An event that is awaited may not come.
        if more || queue.awaits_quiet() {
            queue.more.store(true, Ordering::Relaxed);
            service.queues.read_again_soon();
            service.threads.wake_lead();
        }
        hand_on(service, &queue, work.drain(..), read, push);
        *lock(&queue.lists) = Lists { messages, work };
    }
}

/// Hands the work of a read on and deals with its error, with the gate released.
pub fn hand_on(
    service: &Service,
    queue: &Arc<KernelQueue>,
    work: impl IntoIterator<Item = Work>,
    read: std::result::Result<(), Errno>,
    push: fn(&Service, Work),
) {
    for work in work {
        push(service, work);
    }
    shortage::end_if_lost(service);
    match read {
        Ok(()) => queue.told.store(false, Ordering::Relaxed),
        Err(errno) => unreadable(service, queue, errno),
    }
}

/// A queue could not be read. Its messages stay in the kernel, and it is read again soon: a shortage passes, and an
/// unreadable adopted userfaultfd does not harm other slots. Any other failure of the library's own queue ends the service.
fn unreadable(service: &Service, queue: &KernelQueue, errno: Errno) {
    let mechanism = queue.mechanism.as_ref();
    let text = Error::system(&words!("reading {}", mechanism.facts().queue_name), errno);
    if !spare_descriptor::is_shortage(errno) && !mechanism.facts().adopted && !queue.fork {
        service.queues.go_deaf();
        return service.fail(text.text());
    }
    service.queues.read_again_soon();
    service.threads.wake_lead();
    if queue.told.swap(true, Ordering::Relaxed) {
        return;
    }
    let map = service.memory.map();
    let slot = map.slots().iter().find(|slot| mechanism.facts().adopted && slot.mechanism.id() == mechanism.id());
    let (gpa, len) = slot.map_or((0, 0), |slot| (slot.gpa, slot.len));
    let text = words!("{text}: the library tries again, and serves nothing under it until then");
    service.push(Work::Notice(Notice { slot: None, kind: KUF_EVENT_UNREADABLE, gpa, len, error: Some(errno), text }));
}

/// Reads the queues again that could not be read, or not to their end.
pub fn read_again(service: &Service) {
    if !service.queues.take_unread() {
        return;
    }
    let has_rest =
        |queue: &KernelQueue| queue.more.swap(false, Ordering::Relaxed) || queue.unread.load(Ordering::Relaxed);
    for queue in service.queues.list().iter().filter(|queue| has_rest(queue)) {
        drain_numbered(service, queue.mechanism.id(), queue.number);
    }
}

/// Nothing in the kernel reports that another process has ended: look now and then.
pub fn look_after_processes(service: &Service) {
    children::forget_dead_children(service);
    service.queues.spare.refill();
    for queue in service.queues.list().iter().filter(|queue| queue.remote && !queue.fork) {
        if !queue.mechanism.is_alive() {
            lose(service, queue.mechanism.as_ref());
        }
    }
}

fn lose(service: &Service, mechanism: &dyn Mechanism) {
    let lost: Vec<_> = {
        // A slot that is being added is in the map before the kernel has accepted it. When the kernel refuses it, the call
        // tells the caller, and no slot is lost.
        let _gate = mechanism.gate().read();
        let map = service.memory.map();
        let its = map.slots().iter().filter(|slot| slot.mechanism.id() == mechanism.id());
        its.filter_map(gone).collect()
    };
    lost.into_iter().for_each(|work| service.push(work));
}

/// The process behind a slot has ended: the kernel has said ESRCH, and nothing else means that. Returns the notice for the
/// caller, the first time.
pub fn gone(slot: &Arc<Slot>) -> Option<Work> {
    slot.gone.compare_exchange(0, Errno::SRCH.raw_os_error(), Ordering::AcqRel, Ordering::Acquire).ok()?;
    let mut claims = slot.claims();
    drop(claims.take_waiters());
    slot.wake_sleepers(&claims);
    let text = words!("the process behind the memory slot at gpa {:#x} is gone", slot.gpa);
    (slot.parent.is_none()).then_some(Work::Notice(Notice {
        slot: Some(slot.clone()),
        kind: KUF_EVENT_GONE,
        gpa: slot.gpa,
        len: slot.len,
        error: Some(Errno::SRCH),
        text,
    }))
}

/// [`crate::mechanism::Mechanism::read`]; when the child's userfaultfd finds no free descriptor, the reserve is closed and
/// the read tried once more.
pub fn read_queue(
    service: &Service,
    queue: &KernelQueue,
    room: usize,
    out: &mut Vec<Message>,
) -> std::result::Result<(), Errno> {
    let read = match queue.mechanism.read(queue.number, room, out) {
        Err(Errno::MFILE | Errno::NFILE) if service.queues.spare.use_up() => {
            queue.mechanism.read(queue.number, room, out)
        }
        read => read,
    };
    queue.unread.store(read.is_err(), Ordering::Relaxed);
    read
}
