//! userfaultfd: the kernel blocks a thread that touches an absent page and queues a message; UFFDIO_COPY, _CONTINUE,
//! _ZEROPAGE or _POISON installs the page and wakes the thread. Every Linux has it.
//!
//! Pitfalls, and where they are handled: a count that is an errno (`ioctl::done`); EAGAIN while events are unread, EEXIST
//! without a wake, partial runs (`binding`, and `service::fault::install`); messages in an order that is not that of the
//! events (`service::queues::events` applies the removals of a batch before its faults).

mod binding;
mod ioctl;
mod marker;
mod moved;
pub mod open;
mod stripes;

use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::mm::{mmap_anonymous, MapFlags, ProtFlags};

use super::gate::Gate;
use super::{Address, Binding, Facts, ForKvm, Mechanism, Message, Stray};
use crate::abi::{KUF_FAULT_MINOR, KUF_FAULT_WRITE};
use crate::alloc::{refusable, NoMemory};
use crate::error::{Error, Result};
use crate::mapping::Region;
use crate::os::resident::Pagemap;
use crate::sync::{Arc, OnceLock};
use crate::uapi::userfaultfd::*;
pub use binding::Registered;
pub use marker::Marker;

/// An address of user space on every architecture, and a multiple of every page size that is not a huge one.
const ANYWHERE: u64 = 1 << 20;

/// A page of this process that cannot be read, made once. Where there is no room for it, an address where the kernel maps
/// nothing by itself.
fn unreadable() -> u64 {
    static PAGE: OnceLock<u64> = OnceLock::new();
    *PAGE.get_or_init(|| {
        // SAFETY: a new mapping where the kernel likes.
        let page = unsafe {
            mmap_anonymous(std::ptr::null_mut(), page_size() as usize, ProtFlags::empty(), MapFlags::PRIVATE)
        };
        page.map_or(ANYWHERE, |page| page as u64)
    })
}

/// The events that report changes of the guest's addresses.
const CHANGES: u64 = UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_UNMAP;

/// No huge page is larger.
const LARGEST_PAGE: u64 = 1 << 34;

/// Messages read by one system call.
const BATCH: usize = 64;

/// The library's own userfaultfd, or several of them that share the slots (`stripes`); or a duplicate of one that the caller
/// has opened.
pub struct Userfaultfd {
    facts: Facts,
    /// At least one.
    fds: Vec<OwnedFd>,
    gate: Gate,
    /// It reports moved and unmapped mappings.
    events: bool,
    /// It may report forks.
    forks: bool,
    /// A page that cannot be read, as a source of copies that must fail.
    unreadable: u64,
    /// The page tables of this process, opened at the first look-up.
    pagemap: OnceLock<Pagemap>,
}

impl Userfaultfd {
    /// Opens `count` for this process's memory. `events`: report removed, moved and unmapped ranges; `forks`: report
    /// children.
    pub fn open(user_mode_only: bool, events: bool, forks: bool, count: usize) -> Result<(Self, open::Way)> {
        let (first, way) = open::open(user_mode_only)?;
        let mut fds = Vec::new();
        refusable(|| fds.try_reserve_exact(count.max(1))).map_err(NoMemory::from)?;
        fds.push(first);
        while fds.len() < count {
            fds.push(open::open(user_mode_only)?.0);
        }
        let (offered, _) = open::offered(user_mode_only)?;
        let mut features = UFFD_FEATURE_THREAD_ID
            | UFFD_FEATURE_MISSING_HUGETLBFS
            | UFFD_FEATURE_MISSING_SHMEM
            | UFFD_FEATURE_MINOR_HUGETLBFS
            | UFFD_FEATURE_MINOR_SHMEM
            | UFFD_FEATURE_POISON;
        if events {
            features |= CHANGES | UFFD_FEATURE_EVENT_REMOVE;
        }
        features &= offered;
        if forks {
            features |= UFFD_FEATURE_EVENT_FORK;
        }
        for fd in &fds {
            ioctl::api(fd.as_fd(), features).map_err(|e| match e {
                Errno::PERM if forks => Error::new(Errno::PERM, "following forks needs the capability CAP_SYS_PTRACE"),
                e => Error::system("UFFDIO_API", e),
            })?;
        }
        let events = features & CHANGES == CHANGES;
        Ok((Self { events, ..Self::new(fds, false, false, forks) }, way))
    }

    /// Takes over one that the caller has opened, as its only reader. `remote`: for another process's memory.
    pub fn adopt(fd: OwnedFd, remote: bool) -> Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| Error::system("O_NONBLOCK on uffd", e))?;
        // Which features were agreed on cannot be asked: any event may come, and a thread id that was not agreed on
        // reads as 0.
        Ok(Self::new(vec![fd], true, remote, true))
    }

    /// For the child whose copy of the memory `fd` serves. `adopted`: the parent's was.
    pub fn of_child(fd: OwnedFd, adopted: bool) -> Self {
        let _ = rustix::io::ioctl_fionbio(&fd, true);
        Self::new(vec![fd], adopted, true, true)
    }

    fn new(fds: Vec<OwnedFd>, adopted: bool, remote: bool, forks: bool) -> Self {
        Self {
            facts: Facts { queues: fds.len(), can_move: !remote, remote, adopted, ..Facts::new() },
            fds,
            gate: Gate::default(),
            events: false,
            forks,
            unreadable: unreadable(),
            pagemap: OnceLock::new(),
        }
    }

    fn queue_fd(&self, queue: usize) -> BorrowedFd<'_> {
        self.fds[queue].as_fd()
    }

    /// Takes the page at `hva` off that queue.
    fn unregister_page(&self, queue: usize, hva: u64) {
        let fd = self.queue_fd(queue);
        // Part of a huge page cannot be unregistered.
        let mut size = page_size();
        while size <= LARGEST_PAGE {
            match ioctl::unregister(fd, hva & !(size - 1), size) {
                // The kernel says EINVAL also where nothing is mapped any more, and a larger piece would be other memory.
                Err(Errno::INVAL) if self.facts.remote || is_mapped(hva & !(page_size() - 1)) => size *= 2,
                // To divide a mapping takes another one, of which there may be none: then it gets a page of zeroes, as it
                // would from the kernel.
                Err(Errno::NOMEM) => {
                    let _ = ioctl::zeropage(fd, hva, page_size());
                    break;
                }
                _ => break,
            }
        }
    }

    /// Makes a request that installs nothing: it shows the errno that the kernel returns before it looks at any address.
    fn ask(&self, queue: usize) -> Option<Errno> {
        ioctl::copy(self.queue_fd(queue), ANYWHERE, self.unreadable, page_size()).1
    }

    fn message(&self, msg: &uffd_msg) -> Option<Message> {
        Some(match msg.event {
            UFFD_EVENT_PAGEFAULT => {
                let minor = if msg.a & UFFD_PAGEFAULT_FLAG_MINOR != 0 { KUF_FAULT_MINOR } else { 0 };
                let write = if msg.a & UFFD_PAGEFAULT_FLAG_WRITE != 0 { KUF_FAULT_WRITE } else { 0 };
                Message::Fault { at: Address::Hva(msg.b), flags: minor | write, thread: msg.c as u32 }
            }
            UFFD_EVENT_REMOVE => Message::Removed(msg.a..msg.b),
            UFFD_EVENT_UNMAP => Message::Unmapped(msg.a..msg.b),
            UFFD_EVENT_REMAP => Message::Moved { from: msg.a..msg.a.saturating_add(msg.c), to: msg.b },
            // SAFETY: the kernel has just installed this descriptor for the reader of the message.
            UFFD_EVENT_FORK => Message::Forked(unsafe { OwnedFd::from_raw_fd(msg.a as u32 as libc::c_int) }),
            _ => return None,
        })
    }
}

impl Mechanism for Userfaultfd {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn gate(&self) -> &Gate {
        &self.gate
    }

    fn fd(&self, queue: usize) -> Option<BorrowedFd<'_>> {
        self.fds.get(queue).map(OwnedFd::as_fd)
    }

    fn read(&self, queue: usize, room: usize, out: &mut Vec<Message>) -> std::result::Result<(), Errno> {
        let fd = self.queue_fd(queue).as_raw_fd();
        let mut batch = [const { MaybeUninit::<uffd_msg>::uninit() }; BATCH];
        let mut room = room;
        loop {
            let want = room.min(BATCH);
            if want == 0 {
                return Ok(());
            }
            // SAFETY: room for `want` messages.
            let n = unsafe { libc::read(fd, batch.as_mut_ptr().cast(), want * size_of::<uffd_msg>()) };
            if n < 0 {
                // SAFETY: errno of this thread.
                match Errno::from_raw_os_error(unsafe { *libc::__errno_location() }) {
                    Errno::AGAIN => return Ok(()),
                    Errno::INTR => continue,
                    errno => return Err(errno),
                }
            }
            let got = n as usize / size_of::<uffd_msg>();
            // SAFETY: the kernel has written `got` messages, which are plain words.
            out.extend(batch[..got].iter().filter_map(|msg| self.message(unsafe { msg.assume_init_ref() })));
            room -= got;
            // The kernel fills the buffer as far as it can: a short read has emptied the queue, unless it stopped at a fork
            // for whose child there is no room. Only the next read reports that.
            if got < want && !(self.forks && is_readable(self.queue_fd(queue))) {
                return Ok(());
            }
        }
    }

    fn bind(self: Arc<Self>, region: Arc<Region>, _kvm: ForKvm) -> Result<Box<dyn Binding>> {
        Ok(Box::new(Registered::new(self, region)))
    }

    fn wake_range(&self, hva: Range<u64>) {
        let page = page_size();
        let start = hva.start & !(page - 1);
        // The address is in no slot, so its userfaultfd is unknown: all are woken.
        for fd in &self.fds {
            let _ = ioctl::wake(fd.as_fd(), start, hva.end.next_multiple_of(page) - start);
        }
    }

    fn is_quiet(&self, queue: usize) -> bool {
        // From before a mapping changes until its event was read and the thread has gone on, the kernel refuses installs.
        self.ask(queue) != Some(Errno::AGAIN)
    }

    fn disown(&self, stray: Stray) {
        match stray {
            Stray::Page { queue, hva } => {
                self.unregister_page(queue, hva);
                self.wake_range(hva..hva + 1);
            }
            Stray::Range(hva) => {
                for fd in &self.fds {
                    let _ = ioctl::unregister(fd.as_fd(), hva.start, hva.end - hva.start);
                }
            }
        }
    }

    fn give_up(&self, settled: &[Range<u64>], instead: BorrowedFd<'_>) -> bool {
        if !self.hide_outside(settled) {
            return false;
        }
        for fd in self.fds.iter().filter(|_| !self.facts.adopted) {
            // In one step, so that no other thread finds the number free, or another descriptor in its place.
            // SAFETY: both are open, and `fd` still owns a descriptor to be closed.
            unsafe { libc::dup3(instead.as_raw_fd(), fd.as_raw_fd(), libc::O_CLOEXEC) };
        }
        true
    }

    fn is_alive(&self) -> bool {
        // Two requests have to agree: a process that counts as gone loses its slots, and a wrong answer for a process that
        // is gone would keep its userfaultfd for ever.
        let zeropage = || ioctl::zeropage(self.queue_fd(0), ANYWHERE, page_size()).1;
        let cont = || ioctl::cont(self.queue_fd(0), ANYWHERE, page_size()).1;
        let gone = |errno| errno == Some(Errno::SRCH);
        match (gone(self.ask(0)), gone(zeropage())) {
            (true, true) => false,
            (false, false) => true,
            _ => !gone(cont()),
        }
    }
}

/// Whether a read returns at once. Another process may have made an adopted userfaultfd blocking, which poll(2) calls an
/// error.
fn is_readable(fd: BorrowedFd<'_>) -> bool {
    use rustix::event::{poll, PollFd, PollFlags, Timespec};
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents() == PollFlags::IN
}

fn is_mapped(hva: u64) -> bool {
    let mut resident = 0_u8;
    // SAFETY: looks up one base page and writes one byte.
    unsafe { libc::mincore(hva as *mut _, page_size() as usize, &mut resident) == 0 }
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}
