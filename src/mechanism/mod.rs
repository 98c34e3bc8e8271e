//! What differs between kernels, behind one trait: how a fault arrives, and how a page is opened.
//!
//! The service calls a mechanism with page claims in hand and knows nothing of what is behind it. Where they differ in
//! what the service has to do, the trait has a question: [`Mechanism::marks`], [`Mechanism::vcpu_exits`],
//! [`Mechanism::reveal`].

pub mod gate;
pub mod kvm_async;
pub mod kvm_bitmap;
pub mod kvm_ioctl;
pub mod userfaultfd;

use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

use crate::error::Result;
use crate::memory::Slot;
use gate::Gate;

/// A number for [`Mechanism::id`].
fn next_id() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Where a fault is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// Host virtual address.
    Hva(u64),
    /// Guest physical address.
    Gpa(u64),
}

/// What a kernel queue had to say.
pub enum Message {
    /// Somebody waits for the page at this address.
    Fault {
        at: Address,
        /// KUF_FAULT_* bits the kernel knows.
        flags: u32,
        /// The toucher's thread id, or 0.
        thread: u32,
    },
    /// The range was given back (madvise): what was there is about to be dropped, or has been.
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
    /// A fault was taken off the kernel's queue and nobody knows of which page.
    Lost,
    /// A fault was in the queue that nobody had been told of.
    Unsignalled,
}

/// Where the bytes for a run come from.
#[derive(Clone, Copy)]
pub enum Content {
    /// A buffer that holds the whole run. It may be unreadable: then the install stops with [`Stop::BadSource`].
    Data(*const u8),
    /// The same in memory of the library's that may be moved to its place instead, if it is one huge page
    /// ([`Mechanism::moves`]). What cannot be moved stops with [`Stop::Unsupported`], and can be opened as `Data`.
    Staged(*const u8),
    /// Zeroes.
    Zero,
    /// They are where [`Mechanism::place`] pointed.
    InPlace,
    /// They are there, and zero.
    ZeroInPlace,
    /// The page is present; this mapping of it does not show it yet.
    Shown,
    /// The pages were there before anybody asked. What is not there after all ends the install with
    /// [`Stop::BadSource`].
    There,
    /// There are none: touching the pages is to be a memory error.
    Poison,
    /// The same at the end of a service, which does not wait for host code that may still be writing in place.
    PoisonAtEnd,
}

impl Content {
    /// Whether there are no bytes.
    pub fn is_poison(self) -> bool {
        matches!(self, Self::Poison | Self::PoisonAtEnd)
    }
}

/// Why an install ended before the end of its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The next page is there already. Whoever waits for it has to be woken by hand.
    Exists,
    /// An event is unread: read it and try again.
    Again,
    /// The next page is not mapped any more.
    Unmapped,
    /// The process is gone.
    Dead,
    /// No memory: ENOMEM or ENOSPC.
    NoMemory(i32),
    /// The buffer is not readable at the next page, or the page is not in place.
    BadSource,
    /// The kernel cannot do this to this memory.
    Unsupported,
    /// Anything else: an errno.
    Other(i32),
}

/// How far an install came.
#[derive(Clone, Copy, Debug)]
pub struct Installed {
    /// Pages from the start of the run that are open now and whose waiters were woken.
    pub pages: u64,
    /// None when there was nothing to stop for; the run may still be longer than `pages` (call again).
    pub stop: Option<Stop>,
}

/// Whether the queue was emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Yes: the next message is a new edge of the descriptor.
    Nothing,
    /// No: there was no room for more.
    More,
}

/// One way to catch a guest's touch of a page and to open the page.
pub trait Mechanism: Send + Sync {
    /// Unique among the mechanisms of this process.
    fn id(&self) -> u32;

    /// Held shared while installing, exclusively while reading events and applying them.
    fn gate(&self) -> &Gate;

    /// How many kernel queues it has. Each page has one for as long as it is attached.
    fn queues(&self) -> usize {
        1
    }

    /// Readable when there is something to [`Mechanism::read`] from that queue. None when faults arrive by other ways
    /// only.
    fn inlet(&self, queue: usize) -> Option<BorrowedFd<'_>>;

    /// What is read there, in words.
    fn queue_name(&self) -> &'static str {
        "the userfaultfd"
    }

    /// Pages are closed by marks that only KVM regards: bytes are written straight through the slot's own mapping, a
    /// poisoned page keeps its mark, and whoever waits inside KVM for one stays there.
    fn marks(&self) -> bool {
        false
    }

    /// A vCPU leaves KVM_RUN at a closed page, also one that the guest gave back, with an exit that names it.
    fn vcpu_exits(&self) -> bool {
        false
    }

    /// Whether [`Mechanism::read`] is to be called now and then although nothing was signalled.
    fn ticks(&self) -> bool {
        false
    }

    /// Reads up to `room` messages of a queue without waiting. The caller holds the gate exclusively. Err is an errno.
    ///
    /// Allocates nothing but space in `out`, where that has none left: `service::fork` reads while malloc is locked.
    fn read(&self, queue: usize, room: usize, out: &mut Vec<Message>) -> std::result::Result<Left, i32>;

    /// Starts catching touches of the slot's absent pages. The caller holds the gate exclusively.
    fn attach(&self, slot: &Slot) -> Result<()>;

    /// What follows it that may have to wait for those who wait for pages.
    fn attached(&self, _slot: &Slot) -> Result<()> {
        Ok(())
    }

    /// Stops it. Every page must be present, removed or poisoned. `in_use`: host code that was not waited for may still
    /// write to pages that are poisoned by now.
    fn detach(&self, slot: &Slot, in_use: bool);

    /// What follows it, when every slot that ends with this one is detached: it may have to wait for who waited for
    /// pages of those.
    fn detached(&self, _slot: &Slot) {}

    /// Every page of the slot is present or removed: what it costs to catch touches may be saved. Called where waiting
    /// for KVM harms nobody.
    fn completed(&self, _slot: &Slot) {}

    /// Where to write the bytes of `pages` directly; None when they have to be in a buffer. Err is an errno: no memory.
    fn place(&self, slot: &Slot, pages: &Range<u64>) -> std::result::Result<Option<NonNull<u8>>, i32>;

    /// Opens pages from the start of `pages`, which the caller has claimed, and wakes who waits for them. The caller
    /// holds the gate shared.
    fn install(&self, slot: &Slot, pages: &Range<u64>, content: Content) -> Installed;

    /// Whether pages can be moved into private memory of this process ([`Content::Staged`]).
    fn moves(&self) -> bool {
        false
    }

    /// The pages of `pages` that hold bytes already, in this process's memory. The caller holds the gate shared. None:
    /// that cannot be found out here.
    fn there(&self, _slot: &Slot, _pages: &Range<u64>) -> Option<Vec<Range<u64>>> {
        None
    }

    /// How to let somebody go on who touched a page that is present. None: nothing is to be done.
    fn reveal(&self, slot: &Slot) -> Option<Content> {
        Some(if slot.shared.is_some() { Content::Shown } else { Content::Zero })
    }

    /// Wakes who waits for `pages`, to look again.
    fn wake(&self, slot: &Slot, pages: &Range<u64>);

    /// Wakes who waits at addresses that are in no slot any more.
    fn wake_range(&self, hva: Range<u64>);

    /// To be called before pages are claimed to be dropped, with nothing held: it may have to wait for who waits for
    /// pages.
    fn before_drop(&self, _slot: &Slot) -> std::result::Result<(), i32> {
        Ok(())
    }

    /// Drops the content of `pages`, so that touching them is caught again. Err is an errno.
    fn drop_pages(&self, slot: &Slot, pages: &Range<u64>) -> std::result::Result<(), i32>;

    /// Makes touching `pages` fail without [`Content::Poison`]; false when there is no way.
    fn close_off(&self, slot: &Slot, pages: &Range<u64>) -> bool;

    /// Whether the memory's process still exists.
    fn alive(&self) -> bool {
        true
    }

    /// Whether its addresses are another process's.
    fn remote(&self) -> bool {
        false
    }

    /// Whether the host holds a descriptor of its own and could hand it to another handler.
    fn adopted(&self) -> bool {
        false
    }

    /// The mechanism for the child that `fd` serves. None: it reports no forks.
    fn child(&self, _fd: OwnedFd) -> Option<Arc<dyn Mechanism>> {
        None
    }
}
