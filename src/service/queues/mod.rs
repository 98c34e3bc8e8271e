//! The kernel's queues that a handle reads, and the state of each.

pub mod between;
pub mod children;
pub mod events;
pub mod leftovers;
pub mod overtaken;
pub mod quiet;
pub mod read;
pub mod spare_descriptor;
pub mod stray;
pub mod watch;

use std::collections::BTreeMap;
use std::ops::Range;

use crate::mechanism::{Mechanism, Message};
use crate::memory::ranges::take_within;
use crate::service::queues::leftovers::Leftovers;
use crate::service::queues::spare_descriptor::Reserve;
use crate::service::Work;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::time::Instant;
use crate::sync::{lock, read, write, Arc, Mutex, MutexGuard, RwLock};

/// A queue that is read.
pub struct KernelQueue {
    pub mechanism: Arc<dyn Mechanism>,
    /// Its number among the mechanism's queues.
    pub number: usize,
    /// The caller's descriptor it was made from.
    pub host_fd: Option<i32>,
    /// Its memory belongs to another process.
    pub remote: bool,
    /// It serves a forked child.
    pub fork: bool,
    /// The last read of it failed. Changed with the gate held.
    pub(in crate::service) unread: AtomicBool,
    /// The caller was told so.
    pub(super) told: AtomicBool,
    /// It may hold more than was read.
    pub(super) more: AtomicBool,
    /// It does not signal new messages: it is polled.
    pub(in crate::service) unwatched: AtomicBool,
    /// It is no longer read, even by a thread that still has a reference: its userfaultfd may be another mechanism's by now.
    pub(super) dropped: AtomicBool,
    /// Faults of an adopted userfaultfd in no slot, as (hva, thread) and (flags, when): their slot may still be added.
    pub(super) parked: Mutex<BTreeMap<(u64, u32), (u32, Instant)>>,
    /// Ranges that were given back and are in no slot: their slot may still be added. Sorted, not touching each other.
    pub(super) given_back: Mutex<Vec<Range<u64>>>,
    /// Ranges of slots that were removed while an event of theirs may have been on its way: such an event belongs to no
    /// later slot.
    pub(super) ended: Mutex<Vec<Range<u64>>>,
    pub(in crate::service) leftovers: Leftovers,
    /// Empty lists for the next read.
    pub(super) lists: Mutex<Lists>,
}

/// Messages and the work they make. They are kept so that a read allocates nothing.
#[derive(Default)]
pub struct Lists {
    pub(super) messages: Vec<Message>,
    pub(super) work: Vec<Work>,
}

impl KernelQueue {
    /// Whether there is something to be forgotten when no event is on its way.
    pub fn awaits_quiet(&self) -> bool {
        let Leftovers { owes, aside, .. } = &self.leftovers;
        self.has_ended() || owes.load(Ordering::Relaxed) || aside.load(Ordering::Relaxed)
    }

    /// Whether no event of this queue is on its way. It is asked twice: after one wrong answer an event would be taken for
    /// another mapping's.
    pub fn is_quiet(&self) -> bool {
        (0..2).all(|_| self.mechanism.is_quiet(self.number))
    }

    /// Whether an event of a slot that was taken off may be on its way.
    pub fn has_ended(&self) -> bool {
        self.mechanism.facts().adopted && !lock(&self.ended).is_empty()
    }

    /// `hva` is no longer registered: memory that was given back there has no effect on the next mapping. `quiet`: no event
    /// of it is on its way.
    pub fn forget_given_back(&self, hva: &Range<u64>, quiet: bool) {
        drop(take_within(&mut lock(&self.given_back), hva));
        if !quiet {
            lock(&self.ended).push(hva.clone());
        }
    }

    pub fn new(
        mechanism: Arc<dyn Mechanism>,
        number: usize,
        host_fd: Option<i32>,
        remote: bool,
        fork: bool,
    ) -> Arc<Self> {
        let (unread, told, more, unwatched, dropped) = Default::default();
        let (parked, given_back, ended, leftovers, lists) = Default::default();
        Arc::new(Self {
            mechanism,
            number,
            host_fd,
            remote,
            fork,
            unread,
            told,
            more,
            unwatched,
            dropped,
            parked,
            given_back,
            ended,
            leftovers,
            lists,
        })
    }
}

/// All queues of one handle.
#[derive(Default)]
pub struct Queues {
    list: RwLock<Arc<Vec<Arc<KernelQueue>>>>,
    /// Held from the lookup of the mechanism of a caller's userfaultfd until its slot is on the map, and while a
    /// userfaultfd is given up: one queue has one mechanism. Locked before any gate; no callback runs under it.
    adopting: Mutex<()>,
    /// For the userfaultfd of a forked child.
    pub spare: Reserve,
    /// Some queue could not be read, or not to its end, and is to be read again.
    unread: AtomicBool,
    /// The library's own queue cannot be read any more, and that was the end of the service.
    deaf: AtomicBool,
    /// A sweep is queued and has not begun.
    sweep_queued: AtomicBool,
    /// The caller was told of a queue whose signals go elsewhere.
    warned: AtomicBool,
}

impl Queues {
    /// The current queues.
    pub fn list(&self) -> Arc<Vec<Arc<KernelQueue>>> {
        read(&self.list).clone()
    }

    pub fn change(&self, change: impl FnOnce(&mut Vec<Arc<KernelQueue>>)) {
        let mut list = write(&self.list);
        change(Arc::make_mut(&mut list));
    }

    /// The first queue of a mechanism. It keeps the state that only adopted userfaultfds need; they have no other queue.
    pub fn first(&self, mechanism: u32) -> Option<Arc<KernelQueue>> {
        self.list().iter().find(|queue| queue.mechanism.id() == mechanism).cloned()
    }

    /// Whether the last read of a queue of `mechanism` failed.
    pub fn is_unread(&self, mechanism: &Arc<dyn Mechanism>) -> bool {
        let unread = |queue: &KernelQueue| queue.unread.load(Ordering::Relaxed);
        self.list().iter().any(|queue| queue.mechanism.id() == mechanism.id() && unread(queue))
    }

    /// Keeps other threads from adopting a userfaultfd, and from giving one up.
    pub fn lock_adopting(&self) -> MutexGuard<'_, ()> {
        lock(&self.adopting)
    }

    /// Some queue is to be read again.
    pub fn read_again_soon(&self) {
        self.unread.store(true, Ordering::SeqCst);
    }

    /// Whether some queue is to be read again.
    pub fn has_unread(&self) -> bool {
        self.unread.load(Ordering::SeqCst)
    }

    /// The same, for the one thread that reads it.
    pub fn take_unread(&self) -> bool {
        self.unread.load(Ordering::Relaxed) && self.unread.swap(false, Ordering::SeqCst)
    }

    /// The library's own queue cannot be read any more.
    pub fn go_deaf(&self) {
        self.deaf.store(true, Ordering::SeqCst);
    }

    pub fn is_deaf(&self) -> bool {
        self.deaf.load(Ordering::SeqCst)
    }

    /// True: a sweep is to be queued; none is.
    pub fn begin_sweep(&self) -> bool {
        !self.sweep_queued.swap(true, Ordering::AcqRel)
    }

    pub fn end_sweep(&self) {
        self.sweep_queued.store(false, Ordering::Release);
    }

    /// Whether the caller was told before of a queue whose signals go elsewhere.
    pub fn was_warned(&self) -> bool {
        self.warned.swap(true, Ordering::AcqRel)
    }
}
