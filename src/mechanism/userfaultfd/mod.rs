//! userfaultfd: the kernel parks whoever touches an absent page and queues a message; UFFDIO_COPY, _CONTINUE, _ZEROPAGE
//! or _POISON puts the page there and wakes them. Every Linux has it.
//!
//! What needs care, and where it is taken: a count that is an errno (`ioctl::done`); EAGAIN while events are unread,
//! EEXIST without a wake, partial runs (`install`, its callers in `service::install`); messages in an order that is not
//! that of the events (`service::inlet` applies the removals of a batch before its faults).

mod ioctl;
pub mod open;
mod stripes;

use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use once_cell::sync::OnceCell;
use rustix::io::Errno;

use super::gate::Gate;
use super::{next_id, Address, Content, Installed, Left, Mechanism, Message, Stop};
use crate::capi::types::{KUF_FAULT_MINOR, KUF_FAULT_WRITE};
use crate::error::{Error, Result};
use crate::memory::buffer::Buffer;
use crate::memory::pagemap::Pagemap;
use crate::memory::staging::HUGE;
use crate::memory::Slot;
use crate::uapi::userfaultfd::*;
pub use stripes::Stripes;

/// Messages read by one system call.
const BATCH: usize = 64;

/// The library's own userfaultfd, or several of them that share the slots (`stripes`); or a duplicate of one that the
/// host has opened.
pub struct Userfaultfd {
    id: u32,
    /// At least one.
    fds: Vec<OwnedFd>,
    gate: Gate,
    adopted: bool,
    /// Its memory is another process's.
    remote: bool,
    /// What this process has mapped, once somebody wanted to know.
    pagemap: OnceCell<Pagemap>,
}

impl Userfaultfd {
    /// Opens `count` for this process's memory. `events`: hear of what is removed, moved and unmapped; `forks`: of
    /// children.
    pub fn open(user_mode_only: bool, events: bool, forks: bool, count: usize) -> Result<(Self, open::Way)> {
        let (first, way) = open::open(user_mode_only)?;
        let mut fds = vec![first];
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
            features |= UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP;
        }
        features &= offered;
        if forks {
            features |= UFFD_FEATURE_EVENT_FORK;
        }
        for fd in &fds {
            ioctl::api(fd.as_fd(), features).map_err(|e| match e {
                Errno::PERM if forks => Error::new(libc::EPERM, "following forks needs the capability CAP_SYS_PTRACE"),
                e => Error::system("UFFDIO_API", e.raw_os_error()),
            })?;
        }
        Ok((Self::new(fds, false, false), way))
    }

    /// Takes over one that the host has opened, as its only reader. `remote`: for another process's memory.
    pub fn adopt(fd: OwnedFd, remote: bool) -> Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true).map_err(|e| Error::system("O_NONBLOCK on uffd", e.raw_os_error()))?;
        // Which features were agreed on cannot be asked: any event may come, and a thread id that was not agreed on
        // reads as 0.
        Ok(Self::new(vec![fd], true, remote))
    }

    fn new(fds: Vec<OwnedFd>, adopted: bool, remote: bool) -> Self {
        Self { id: next_id(), fds, gate: Gate::default(), adopted, remote, pagemap: OnceCell::new() }
    }

    fn fd(&self, queue: usize) -> BorrowedFd<'_> {
        self.fds[queue].as_fd()
    }

    /// Which userfaultfd has what is at `offset` of a slot, and for how many bytes from there.
    fn queue_at(&self, slot: &Slot, offset: u64) -> (usize, u64) {
        slot.stripes.get().map_or((0, u64::MAX), |stripes| stripes.at(offset))
    }

    /// Puts the slot under the userfaultfds, as divided. Nothing has changed when it fails.
    fn register(&self, slot: &Slot, stripes: Option<&Stripes>) -> Result<()> {
        let minor = if slot.shared.is_some() { UFFDIO_REGISTER_MODE_MINOR } else { 0 };
        let extents = slot.extents();
        let pieces = || extents.iter().flat_map(|extent| Stripes::pieces(stripes, *extent));
        for (done, (queue, hva)) in pieces().enumerate() {
            let (start, len) = (hva.start, hva.end - hva.start);
            let Err(errno) = ioctl::register(self.fd(queue), start, len, UFFDIO_REGISTER_MODE_MISSING | minor) else {
                continue;
            };
            for (queue, hva) in pieces().take(done) {
                let _ = ioctl::unregister(self.fd(queue), hva.start, hva.end - hva.start);
            }
            return Err(register_error(errno, start, len, self.remote));
        }
        Ok(())
    }

    /// One kernel call: at most the pages of one mapping.
    fn install_at(
        &self,
        fd: BorrowedFd<'_>,
        slot: &Slot,
        hva: u64,
        len: u64,
        content: Content,
    ) -> (u64, Option<Errno>) {
        match content {
            Content::Data(from) => ioctl::copy(fd, hva, from as u64, len),
            Content::Staged(from) => Self::move_huge(fd, hva, from as u64, len),
            Content::InPlace | Content::ZeroInPlace | Content::Shown => ioctl::cont(fd, hva, len),
            Content::Poison | Content::PoisonAtEnd => ioctl::poison(fd, hva, len),
            Content::Zero if slot.granule == rustix::param::page_size() as u64 => ioctl::zeropage(fd, hva, len),
            // hugetlbfs has no UFFDIO_ZEROPAGE. A buffer that was never written is the kernel's zero page.
            Content::Zero => match Buffer::new(slot.granule as usize) {
                Ok(zeroes) => ioctl::copy(fd, hva, zeroes.at().as_ptr() as u64, slot.granule),
                Err(_) => (0, Some(Errno::NOMEM)),
            },
            // Nothing to be put there: see `install`.
            Content::There => (0, Some(Errno::INVAL)),
        }
    }

    /// Looks once more which pages are there, now that nobody else may put any there or drop them unheard of, and wakes
    /// who waits for those at the start.
    fn confirm(&self, slot: &Slot, pages: &Range<u64>) -> Installed {
        match self.there(slot, pages).as_deref() {
            Some([first, ..]) if first.start == pages.start => {
                self.wake(slot, first);
                Installed { pages: first.end - first.start, stop: None }
            }
            Some(_) => Installed { pages: 0, stop: Some(Stop::BadSource) },
            None => Installed { pages: 0, stop: Some(Stop::Unsupported) },
        }
    }

    /// Only a whole huge page is worth moving. Whatever is in the way, the pages that were not moved are where they were,
    /// to be copied; that no event is unread is true of a copy too.
    fn move_huge(fd: BorrowedFd<'_>, hva: u64, from: u64, len: u64) -> (u64, Option<Errno>) {
        if len != HUGE || hva % HUGE != 0 || from % HUGE != 0 {
            return (0, Some(Errno::INVAL));
        }
        let (bytes, errno) = ioctl::move_pages(fd, hva, from, len);
        (bytes, errno.map(|errno| if errno == Errno::AGAIN { errno } else { Errno::INVAL }))
    }

    /// Whether a private huge page that was said to be there is not: the kernel says so too when it has no page to give
    /// (Linux 6.18). In another process one cannot look; there the pool says whether that is the reason.
    fn is_missing(&self, slot: &Slot, hva: u64) -> bool {
        if slot.granule == page_size() || !slot.private {
            return false;
        }
        if self.remote {
            return free_huge_pages(slot.granule) == 0;
        }
        let mut resident = 0_u8;
        // SAFETY: looks up one base page and writes one byte.
        let looked = unsafe { libc::mincore(hva as *mut _, page_size() as usize, &mut resident) } == 0;
        looked && resident & 1 == 0
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

/// A userfaultfd for putting poison marks into memory that is under none. Nobody serves it: memory is registered for the
/// moment of marking only, and the marks stay.
pub struct Marker(OwnedFd);

impl Marker {
    pub fn open() -> Result<Self> {
        let (fd, _) = open::open(true)?;
        ioctl::api(fd.as_fd(), UFFD_FEATURE_POISON).map_err(|e| Error::system("UFFDIO_API", e.raw_os_error()))?;
        Ok(Self(fd))
    }

    pub fn mark(&self, hva: u64, len: u64, granule: u64) -> std::result::Result<(), Errno> {
        let fd = self.0.as_fd();
        ioctl::register(fd, hva, len, UFFDIO_REGISTER_MODE_MISSING)?;
        let (mut done, mut result) = (0, Ok(()));
        while done < len && result.is_ok() {
            match ioctl::poison(fd, hva + done, len - done) {
                (bytes, None) => done += bytes,
                // Marked already, or there: whoever calls has dropped what was there.
                (bytes, Some(Errno::EXIST)) => done += bytes + granule,
                (bytes, Some(Errno::AGAIN)) => done += bytes,
                (_, Some(errno)) => result = Err(errno),
            }
        }
        let _ = ioctl::unregister(fd, hva, len);
        result
    }
}

impl Mechanism for Userfaultfd {
    fn id(&self) -> u32 {
        self.id
    }

    fn gate(&self) -> &Gate {
        &self.gate
    }

    fn queues(&self) -> usize {
        self.fds.len()
    }

    fn inlet(&self, queue: usize) -> Option<BorrowedFd<'_>> {
        self.fds.get(queue).map(OwnedFd::as_fd)
    }

    fn read(&self, queue: usize, room: usize, out: &mut Vec<Message>) -> std::result::Result<Left, i32> {
        let fd = self.fd(queue).as_raw_fd();
        let mut batch = [const { MaybeUninit::<uffd_msg>::uninit() }; BATCH];
        let mut room = room;
        loop {
            let want = room.min(BATCH);
            if want == 0 {
                return Ok(Left::More);
            }
            // SAFETY: room for `want` messages.
            let n = unsafe { libc::read(fd, batch.as_mut_ptr().cast(), want * size_of::<uffd_msg>()) };
            if n < 0 {
                // SAFETY: errno of this thread.
                match Errno::from_raw_os_error(unsafe { *libc::__errno_location() }) {
                    Errno::AGAIN => return Ok(Left::Nothing),
                    Errno::INTR => continue,
                    errno => return Err(errno.raw_os_error()),
                }
            }
            let got = n as usize / size_of::<uffd_msg>();
            // SAFETY: the kernel has written `got` messages, which are plain words.
            out.extend(batch[..got].iter().filter_map(|msg| self.message(unsafe { msg.assume_init_ref() })));
            room -= got;
            // The kernel fills the buffer as far as it can: a short read has emptied the queue.
            if got < want {
                return Ok(Left::Nothing);
            }
        }
    }

    fn attach(&self, slot: &Slot) -> Result<()> {
        if let Some(first) = slot.extents().first().filter(|_| self.fds.len() > 1) {
            let stripes = Stripes::new(first.hva, slot.len, slot.granule, self.fds.len());
            match self.register(slot, Some(&stripes)) {
                // No more mappings to be had (vm.max_map_count): it stays one.
                Err(error) if error.errno() == libc::ENOMEM => {}
                result => {
                    // Nobody installs before the gate is free.
                    let _ = slot.stripes.set(stripes);
                    return result;
                }
            }
        }
        self.register(slot, None)
    }

    fn detach(&self, slot: &Slot, _in_use: bool) {
        for extent in slot.extents() {
            for (queue, hva) in Stripes::pieces(slot.stripes.get(), extent) {
                // What is unmapped by now needs no unregistering.
                let len = hva.end - hva.start;
                let _ = ioctl::unregister(self.fd(queue), hva.start, len);
                // The kernel wakes who waits before it is certain that nobody comes any more: a fault that has seen the
                // registration still, and took no lock but its mapping's, would wait for ever.
                let _ = ioctl::wake(self.fd(queue), hva.start, len);
            }
        }
    }

    fn place(&self, slot: &Slot, pages: &Range<u64>) -> std::result::Result<Option<NonNull<u8>>, i32> {
        let Some(shared) = &slot.shared else { return Ok(None) };
        shared.place(slot.bytes_of(pages)).map(Some).map_err(|e| e.raw_os_error())
    }

    fn moves(&self) -> bool {
        // A handler that may not open a userfaultfd itself, and adopts one, cannot ask: it finds out.
        !self.remote && open::offered(true).map_or(true, |(features, _)| features & UFFD_FEATURE_MOVE != 0)
    }

    fn install(&self, slot: &Slot, pages: &Range<u64>, content: Content) -> Installed {
        let Some((hva, mapped)) = slot.hva_of(pages.start) else {
            return Installed { pages: 0, stop: Some(Stop::Unmapped) };
        };
        if let Content::There = content {
            return self.confirm(slot, pages);
        }
        let (queue, same) = self.queue_at(slot, pages.start * slot.granule);
        let fd = self.fd(queue);
        let mut len = ((pages.end - pages.start).min(mapped) * slot.granule).min(same);
        loop {
            let (bytes, errno) = self.install_at(fd, slot, hva, len, content);
            // One call does not cross mappings, and mappings that look like one may be two: look for the border.
            if bytes == 0 && errno == Some(Errno::NOENT) && len > slot.granule {
                len = (len / 2).next_multiple_of(slot.granule);
                continue;
            }
            let mut stop = errno.map(stop);
            // A poison mark needs no page: what is there for that one is there.
            let needs_page = !content.is_poison();
            if stop == Some(Stop::Exists) && bytes == 0 && needs_page && self.is_missing(slot, hva) {
                stop = Some(Stop::NoMemory(libc::ENOMEM));
            }
            return Installed { pages: bytes / slot.granule, stop };
        }
    }

    fn there(&self, slot: &Slot, pages: &Range<u64>) -> Option<Vec<Range<u64>>> {
        (!self.remote).then(|| self.pagemap.get_or_init(Pagemap::open).there(slot, pages))
    }

    fn wake(&self, slot: &Slot, pages: &Range<u64>) {
        for (part, hva) in slot.mapped(pages) {
            let (Range { start, end }, mut done) = (slot.bytes_of(&part), 0);
            while start + done < end {
                let (queue, same) = self.queue_at(slot, start + done);
                let len = same.min(end - start - done);
                let _ = ioctl::wake(self.fd(queue), hva + done, len);
                done += len;
            }
        }
    }

    fn wake_range(&self, hva: Range<u64>) {
        let page = page_size();
        let start = hva.start & !(page - 1);
        // No slot says any more which of them it was.
        for fd in &self.fds {
            let _ = ioctl::wake(fd.as_fd(), start, hva.end.next_multiple_of(page) - start);
        }
    }

    fn drop_pages(&self, slot: &Slot, pages: &Range<u64>) -> std::result::Result<(), i32> {
        match (&slot.shared, self.remote) {
            (None, true) => return Err(libc::ENOTSUP),
            (Some(shared), true) => {
                return shared.punch(&slot.bytes_of(pages)).map_err(|e| e.raw_os_error());
            }
            (_, false) => {}
        }
        slot.drop_content(pages)
    }

    fn close_off(&self, slot: &Slot, pages: &Range<u64>) -> bool {
        if self.remote {
            return false;
        }
        let closed = slot.protect(pages);
        if closed {
            self.wake(slot, pages);
        }
        closed
    }

    fn alive(&self) -> bool {
        // The kernel looks for the process before it looks for the address, which is one that nobody can register: the
        // page below the guard page at the end of user space.
        const NOWHERE: u64 = (1 << 47) - 0x3000;
        ioctl::zeropage(self.fd(0), NOWHERE, rustix::param::page_size() as u64).1 != Some(Errno::SRCH)
    }

    fn remote(&self) -> bool {
        self.remote
    }

    fn adopted(&self) -> bool {
        self.adopted
    }

    fn child(&self, fd: OwnedFd) -> Option<Arc<dyn Mechanism>> {
        let _ = rustix::io::ioctl_fionbio(&fd, true);
        Some(Arc::new(Self::new(vec![fd], self.adopted, true)))
    }
}

/// How many huge pages of `size` the pool has left; 0 if it cannot be read.
fn free_huge_pages(size: u64) -> u64 {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/free_hugepages", size >> 10);
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

fn stop(errno: Errno) -> Stop {
    match errno {
        Errno::EXIST => Stop::Exists,
        Errno::AGAIN => Stop::Again,
        Errno::NOENT => Stop::Unmapped,
        Errno::SRCH => Stop::Dead,
        Errno::NOMEM | Errno::NOSPC => Stop::NoMemory(errno.raw_os_error()),
        Errno::FAULT => Stop::BadSource,
        Errno::INVAL | Errno::NOTTY => Stop::Unsupported,
        other => Stop::Other(other.raw_os_error()),
    }
}

fn register_error(errno: Errno, hva: u64, len: u64, remote: bool) -> Error {
    let range = format!("hva {hva:#x}..{:#x}", hva + len);
    match errno {
        Errno::BUSY => Error::new(libc::EBUSY, format!("{range} is registered with another userfaultfd")),
        Errno::SRCH | Errno::NOMEM if remote => {
            Error::new(libc::ESRCH, format!("{range}: the process that opened this userfaultfd is gone"))
        }
        Errno::NOTTY => Error::new(libc::EBADFD, "uffd is not a userfaultfd"),
        Errno::INVAL if remote => Error::new(
            libc::EFAULT,
            format!(
                "{range} is not mapped in the other process, or UFFDIO_API was not done on this userfaultfd, or \
                 userfaultfd cannot serve this kind of memory"
            ),
        ),
        Errno::INVAL => Error::new(
            libc::EINVAL,
            format!("{range}: UFFDIO_API was not done on this userfaultfd, or it cannot serve this kind of memory"),
        ),
        other => Error::system("UFFDIO_REGISTER", other.raw_os_error()),
    }
}
