//! The differences between kernels, behind two traits: how a fault arrives ([`Mechanism`]: the kernel's queues), and how a
//! page is installed ([`Binding`]: one slot under a mechanism).
//!
//! The service calls them with page claims in hand and does not know the implementations. Where these differ in what the
//! service has to do, the mechanism's [`Facts`] tell it. A mechanism knows the region that a slot maps and the states of its
//! pages, and no slots.

pub mod bitmap;
pub mod gate;
pub mod kvm_async;
pub mod kvm_bitmap;
pub mod over;
pub mod userfaultfd;

use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::io::Errno;

use crate::error::Result;
use crate::mapping::Region;
use crate::pages::Pages;
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::Arc;
use bitmap::{Bitmap, Memslot};
use gate::Gate;

/// The constants of a mechanism.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Unique among the mechanisms of this process.
    pub id: u32,
    /// How many kernel queues it has. Each page has one for as long as its slot is armed.
    pub queues: usize,
    /// The name of these queues in error texts.
    pub queue_name: &'static str,
    /// Only KVM regards the marks on absent pages. So bytes are written straight through the slot's own mapping, a poisoned
    /// page keeps its mark for KVM, and a vCPU that waits inside KVM for a poisoned page stays there.
    pub gates_kvm_only: bool,
    /// A vCPU leaves KVM_RUN at an absent page, or at one that the guest gave back, with an exit that names the page.
    pub vcpu_exits: bool,
    /// [`Mechanism::read`] is to be called now and then without a signal.
    pub needs_polling: bool,
    /// Pages of this process can be moved to their place ([`Content::Move`]), if the kernel offers that.
    pub can_move: bool,
    /// Its addresses are another process's.
    pub remote: bool,
    /// The caller holds its own descriptor and could hand it to another handler.
    pub adopted: bool,
}

impl Facts {
    /// The facts of a new mechanism with one userfaultfd of this process's own.
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            queues: 1,
            queue_name: "the userfaultfd",
            gates_kvm_only: false,
            vcpu_exits: false,
            needs_polling: false,
            can_move: false,
            remote: false,
            adopted: false,
        }
    }
}

/// Where a fault is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// Host virtual address.
    Hva(u64),
    /// Guest physical address.
    Gpa(u64),
}

/// A message from a kernel queue.
pub enum Message {
    /// A thread waits for the page at this address.
    Fault {
        at: Address,
        /// KUF_FAULT_* bits the kernel knows.
        flags: u32,
        /// The toucher's thread id, or 0.
        thread: u32,
    },
    /// The range was given back (madvise): its content is about to be dropped, or has been.
    Removed(Range<u64>),
    /// The range was unmapped.
    Unmapped(Range<u64>),
    /// The mapping moved.
    Moved {
        /// From here,
        from: Range<u64>,
        /// to here.
        to: u64,
    },
    /// The process forked; this descriptor serves the child's copy.
    Forked(OwnedFd),
    /// A fault was taken off the kernel's queue and its page is unknown.
    Lost,
    /// A fault was in the queue without a signal.
    Unsignalled,
}

/// Where the bytes for a run come from.
#[derive(Clone, Copy)]
pub enum Content {
    /// Copied from a buffer that holds the whole run. It may be unreadable: then the install stops with
    /// [`Stop::BadSource`].
    Copy(*const u8),
    /// Moved from memory of the library's, if it is one huge page ([`Facts::can_move`]). An install that cannot move stops
    /// with [`Stop::Unsupported`]; its bytes can be copied.
    Move(*const u8),
    /// Zeroes.
    Zero,
    /// The bytes are where [`Binding::in_place_buffer`] pointed, or the page is present and this mapping does not show it
    /// yet.
    Map,
    /// The pages hold their bytes already. A page that does not exist after all ends the install with [`Stop::BadSource`].
    Verify,
    /// There are no bytes: touching the pages is to be a memory error.
    Poison {
        /// At the end of a service, which does not wait for a callback that may still be writing in place.
        at_end: bool,
    },
}

impl Content {
    /// Whether there are no bytes.
    pub fn is_poison(self) -> bool {
        matches!(self, Self::Poison { .. })
    }

    /// Its number in the tracepoint `install`.
    pub fn traced(self) -> u32 {
        match self {
            Self::Copy(_) => 0,
            Self::Move(_) => 1,
            Self::Zero => 2,
            Self::Map => 3,
            Self::Verify => 4,
            Self::Poison { .. } => 5,
        }
    }
}

/// Why an install ended before the end of its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The next page exists already. Its waiters have to be woken explicitly.
    Exists,
    /// The kernel has reported that the next page exists and it did not: it is poisoned now.
    Marked,
    /// An event is unread: read it and try again.
    Again,
    /// The next page is not mapped any more.
    Unmapped,
    /// The process is gone.
    Dead,
    /// No memory: ENOMEM or ENOSPC.
    NoMemory(Errno),
    /// A look-up has shown that the kernel's answer on the next page is wrong.
    Untrue,
    /// The buffer is not readable at the next page, or the page is not in place.
    BadSource,
    /// The kernel cannot do this to this memory.
    Unsupported,
    /// Anything else: an errno.
    Other(Errno),
}

impl Stop {
    /// As the kernel says it.
    #[cold]
    fn errno(self) -> Errno {
        match self {
            Self::Exists | Self::Marked => Errno::EXIST,
            Self::Again => Errno::AGAIN,
            Self::Unmapped => Errno::NOENT,
            Self::Dead => Errno::SRCH,
            Self::Untrue => Errno::PROTO,
            Self::BadSource => Errno::FAULT,
            Self::Unsupported => Errno::OPNOTSUPP,
            Self::NoMemory(errno) | Self::Other(errno) => errno,
        }
    }
}

/// Memory that is registered with a queue and in no slot.
pub enum Stray {
    /// The page at `hva`; that queue has reported a touch of it.
    Page { queue: usize, hva: u64 },
    /// Addresses that slots have moved away from.
    Range(Range<u64>),
}

/// How far an install came.
#[derive(Clone, Copy, Debug)]
pub struct Installed {
    /// Pages from the start of the run that are installed now and whose waiters were woken.
    pub pages: u64,
    /// None: the kernel met no obstacle; the run may still be longer than `pages` (call again).
    pub stop: Option<Stop>,
}

impl Installed {
    /// The result in the tracepoint `install`.
    pub fn traced(&self, granule: u64) -> i64 {
        let errno = match self.stop {
            Some(stop) if self.pages == 0 => stop.errno(),
            _ => return (self.pages * granule) as i64,
        };
        -i64::from(errno.raw_os_error())
    }
}

/// A slot as KVM has it, where its mechanism is one of KVM's.
#[derive(Clone, Copy, Default)]
pub struct ForKvm {
    /// KVM_MEMORY_ATTRIBUTE_* that the caller has declared for it, other than USERFAULT.
    pub attributes: u64,
    /// Its memslot, when the library sets it.
    pub memslot: Option<Memslot>,
}

/// One way to catch a guest's touch of a page: the kernel's queues, and the operations on them.
pub trait Mechanism: Send + Sync {
    /// Its constants.
    fn facts(&self) -> &Facts;

    /// Held shared while installing, exclusively while reading events and applying them.
    fn gate(&self) -> &Gate;

    /// Readable when there is something to [`Mechanism::read`] from that queue. None when faults arrive by other ways
    /// only.
    fn fd(&self, queue: usize) -> Option<BorrowedFd<'_>>;

    /// Reads a queue without waiting, until it is empty: the next message is a new edge of the descriptor then. The caller
    /// holds the gate exclusively. Err is an errno.
    ///
    /// Stops after `room` messages, and allocates nothing but space in `out`, where that has none left: `service::threads::fork`
    /// reads while malloc is locked.
    fn read(&self, queue: usize, room: usize, out: &mut Vec<Message>) -> std::result::Result<(), Errno>;

    /// Makes the binding of the slot that maps `region`. No touch is caught before [`Binding::arm`].
    fn bind(self: Arc<Self>, region: Arc<Region>, kvm: ForKvm) -> Result<Box<dyn Binding>>;

    /// Wakes the threads that wait at addresses that are in no slot any more.
    fn wake_range(&self, _hva: Range<u64>) {}

    /// Whether no thread is in the middle of an event of that queue: each was read, and the thread that made it has gone
    /// on.
    fn is_quiet(&self, _queue: usize) -> bool {
        true
    }

    /// Stops catching touches there, and wakes the threads that wait: it becomes ordinary memory.
    fn disown(&self, _stray: Stray) {}

    /// Lets go of the kernel's queues, which cannot be read: a thread that waits for an event of theirs to be read, or for a
    /// page, goes on. Every page at the addresses `settled`, which are in order, must be present, removed, poisoned or
    /// inaccessible. What is registered at other addresses has moved there without a message, and is made inaccessible
    /// first. `instead` takes the place of the descriptors. False: that failed, and the queues are as they were.
    fn give_up(&self, _settled: &[Range<u64>], _instead: BorrowedFd<'_>) -> bool {
        true
    }

    /// Whether the memory's process still exists.
    fn is_alive(&self) -> bool {
        true
    }
}

/// A slot whose events the queues of a mechanism report.
pub trait Reported {
    /// Which queue reports the byte at this offset of the slot, and for how many bytes from there.
    fn queue_at(&self, _offset: u64) -> (usize, u64) {
        (0, u64::MAX)
    }
}

/// One slot under a mechanism, by the pages of its region. It keeps the mechanism.
pub trait Binding: Reported + Send + Sync {
    /// Starts catching touches of absent pages. The caller holds the gate exclusively. `pages` tells which pages are present
    /// already.
    fn arm(&self, pages: &Pages) -> Result<()>;

    /// Stops catching touches. Every page must be present, removed or poisoned. `poisoned`: the poisoned runs. `in_use`: a
    /// callback that the end did not wait for may still write to them.
    fn detach(&self, pages: &Pages, poisoned: &mut dyn Iterator<Item = Range<u64>>, in_use: bool);

    /// Stops catching touches of `pages`, which were given back and are no longer served.
    fn release(&self, _pages: &Range<u64>) {}

    /// Where to write the bytes of `pages` directly; None when they have to be in a buffer. Err is an errno: no memory.
    fn in_place_buffer(&self, pages: &Range<u64>) -> std::result::Result<Option<NonNull<u8>>, Errno>;

    /// Installs pages from the start of `pages`, which the caller has claimed, and wakes their waiters. The caller holds the
    /// gate shared.
    fn install(&self, pages: &Range<u64>, content: Content) -> Installed;

    /// The pages of `pages` that hold bytes already, in this process's memory. The caller holds the gate shared. None:
    /// that cannot be found out here.
    fn resident(&self, _pages: &Range<u64>) -> Option<Vec<Range<u64>>> {
        None
    }

    /// Wakes the waiters of `pages`, which then touch them again.
    fn wake(&self, _pages: &Range<u64>) {}

    /// Drops the content of `pages`, so that touching them is caught again. Err is an errno.
    fn drop_pages(&self, pages: &Range<u64>) -> std::result::Result<(), Errno>;

    /// Makes touching `pages` fail without [`Content::Poison`]; false when there is no way.
    fn make_inaccessible(&self, pages: &Range<u64>) -> bool;

    /// The bitmap that KVM reads to let vCPUs exit at absent pages. Where the library sets the memslot, the caller switches
    /// the exits on and off ([`Bitmap::set_exits`]).
    fn bitmap(&self) -> Option<&Bitmap> {
        None
    }
}

impl dyn Mechanism + '_ {
    /// [`Facts::id`].
    pub fn id(&self) -> u32 {
        self.facts().id
    }

    /// Whether no thread is in the middle of an event of any queue.
    pub fn is_all_quiet(&self) -> bool {
        (0..self.facts().queues).all(|queue| self.is_quiet(queue))
    }
}
