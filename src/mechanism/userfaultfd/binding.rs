//! One slot under a userfaultfd, or under several that share it ([`Stripes`]).

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::io::Errno;

use super::stripes::Stripes;
use super::{ioctl, is_mapped, open, page_size, Userfaultfd};
use crate::error::{words, Error, Result};
use crate::mapping::buffer::Buffer;
use crate::mapping::{Region, HUGE};
use crate::mechanism::{Binding, Content, Installed, Mechanism, Reported, Stop};
use crate::os::resident::{self, Pagemap};
use crate::pages::Pages;
use crate::sync::{Arc, OnceLock};
use crate::uapi::userfaultfd::*;

/// A region that is registered, or about to be.
pub struct Registered {
    uffd: Arc<Userfaultfd>,
    region: Arc<Region>,
    /// How several userfaultfds share it; unset: one userfaultfd has all of it.
    stripes: OnceLock<Stripes>,
}

impl Registered {
    pub fn new(uffd: Arc<Userfaultfd>, region: Arc<Region>) -> Self {
        Self { uffd, region, stripes: OnceLock::new() }
    }

    /// Does something with the mapped parts of `pages`, each under one userfaultfd.
    fn each_piece(&self, pages: &Range<u64>, act: fn(BorrowedFd<'_>, u64, u64) -> std::result::Result<(), Errno>) {
        for (part, hva) in self.region.mapped(pages) {
            let (Range { start, end }, mut done) = (self.region.bytes_of(&part), 0);
            while start + done < end {
                let (queue, same) = self.queue_at(start + done);
                let len = same.min(end - start - done);
                let _ = act(self.uffd.queue_fd(queue), hva + done, len);
                done += len;
            }
        }
    }

    /// Puts the region under the userfaultfds, as divided. Nothing has changed when it fails.
    fn register(&self, stripes: Option<&Stripes>) -> Result<()> {
        let minor = if self.region.shared.is_some() { UFFDIO_REGISTER_MODE_MINOR } else { 0 };
        let extents = self.region.extents()?;
        let pieces = || extents.iter().flat_map(|extent| Stripes::pieces(stripes, *extent));
        for (done, (queue, hva)) in pieces().enumerate() {
            let (start, len) = (hva.start, hva.end - hva.start);
            let Err(errno) = self.register_piece(queue, start, len, UFFDIO_REGISTER_MODE_MISSING | minor) else {
                continue;
            };
            for (queue, hva) in pieces().take(done) {
                let _ = ioctl::unregister(self.uffd.queue_fd(queue), hva.start, hva.end - hva.start);
            }
            // ENOMEM: the process has ended, or memory is short.
            let dead =
                self.uffd.facts.remote && (errno == Errno::SRCH || errno == Errno::NOMEM && !self.uffd.is_alive());
            return Err(register_error(if dead { Errno::SRCH } else { errno }, start, len, self.uffd.facts.remote));
        }
        Ok(())
    }

    /// Puts the region under all userfaultfds, if it can be divided.
    fn register_all(&self) -> Result<()> {
        if let Some(first) = self.region.next_extent(0).filter(|_| self.uffd.fds.len() > 1) {
            let stripes = Stripes::new(first.hva, self.region.len, self.region.granule, self.uffd.fds.len());
            match self.register(Some(&stripes)) {
                // The process has no mapping left (vm.max_map_count): the region stays undivided.
                Err(error) if error.errno() == Errno::NOMEM => {}
                result => {
                    // No thread installs before the gate is free.
                    let _ = self.stripes.set(stripes);
                    return result;
                }
            }
        }
        self.register(None)
    }

    /// Whether the kernel may put a huge page in the place of shared pages of which some are missing, and map it
    /// without a fault: before Linux 6.4. A feature that 6.4 added shows this.
    fn collapse_fills(&self) -> bool {
        open::offered(true).is_ok_and(|(features, _)| features & UFFD_FEATURE_WP_UNPOPULATED == 0)
    }

    /// From Linux 7.3 on, registering memory again cannot remove a mode, and the caller may have registered the memory
    /// of an adopted userfaultfd for more modes.
    fn register_piece(&self, queue: usize, start: u64, len: u64, modes: u64) -> std::result::Result<(), Errno> {
        let register = |more| ioctl::register(self.uffd.queue_fd(queue), start, len, modes | more);
        let callers = [UFFDIO_REGISTER_MODE_WP, UFFDIO_REGISTER_MODE_RWP];
        match register(0) {
            Err(Errno::BUSY) if self.uffd.facts.adopted && callers.into_iter().any(|more| register(more).is_ok()) => {
                Ok(())
            }
            result => result,
        }
    }

    /// One kernel call: at most the pages of one mapping.
    fn install_at(&self, fd: BorrowedFd<'_>, hva: u64, len: u64, content: Content) -> (u64, Option<Errno>) {
        match content {
            Content::Copy(from) => ioctl::copy(fd, hva, from as u64, len),
            Content::Move(from) => Self::move_huge(fd, hva, from as u64, len),
            Content::Map => ioctl::cont(fd, hva, len),
            Content::Poison { .. } => ioctl::poison(fd, hva, len),
            Content::Zero if self.region.granule == page_size() => match ioctl::zeropage(fd, hva, len) {
                // A filter refuses it.
                (0, Some(Errno::PERM | Errno::ACCESS | Errno::NOSYS)) => self.copy_zeroes(fd, hva),
                done => done,
            },
            // hugetlbfs has no UFFDIO_ZEROPAGE.
            Content::Zero => self.copy_zeroes(fd, hva),
            // Nothing to be put there: see `install`.
            Content::Verify => (0, Some(Errno::INVAL)),
        }
    }

    /// Installs one page of zeroes. A buffer that was never written is the kernel's zero page.
    fn copy_zeroes(&self, fd: BorrowedFd<'_>, hva: u64) -> (u64, Option<Errno>) {
        match Buffer::new(self.region.granule as usize) {
            Ok(zeroes) => ioctl::copy(fd, hva, zeroes.at().as_ptr() as u64, self.region.granule),
            Err(_) => (0, Some(Errno::NOMEM)),
        }
    }

    /// Looks once more which pages exist, now that no other thread may install them or drop them without an event, and wakes
    /// the waiters of the pages at the start.
    fn confirm(&self, pages: &Range<u64>) -> Installed {
        let found = self.resident(pages);
        if !self.uffd.is_quiet(self.queue_at(pages.start * self.region.granule).0) {
            // The look may have seen another mapping, if the pages were moved.
            return Installed { pages: 0, stop: Some(Stop::Again) };
        }
        match found.as_deref() {
            Some([first, ..]) if first.start == pages.start => {
                self.wake(first);
                Installed { pages: first.end - first.start, stop: None }
            }
            Some(_) => Installed { pages: 0, stop: Some(Stop::BadSource) },
            None => Installed { pages: 0, stop: Some(Stop::Unsupported) },
        }
    }

    /// Only a whole huge page is worth moving. On any failure but EAGAIN the pages that were not moved are still in the
    /// source, to be copied; an unread event would stop the copy too.
    fn move_huge(fd: BorrowedFd<'_>, hva: u64, from: u64, len: u64) -> (u64, Option<Errno>) {
        if len != HUGE || hva % HUGE != 0 || from % HUGE != 0 {
            return (0, Some(Errno::INVAL));
        }
        let (bytes, errno) = ioctl::move_pages(fd, hva, from, len);
        (bytes, errno.map(|errno| if errno == Errno::AGAIN { errno } else { Errno::INVAL }))
    }

    /// The kernel has reported that the page at `hva` exists. It reports the same when it has no huge page to give (Linux
    /// 6.18). Pages of another process cannot be looked up; there the pool of huge pages shows whether that is the reason.
    fn existing(&self, fd: BorrowedFd<'_>, hva: u64, content: Content) -> Stop {
        let huge = self.region.private && self.region.granule != page_size() && !content.is_poison();
        if self.uffd.facts.remote {
            return match (huge, self.uffd.facts.adopted) {
                (true, _) => self.existing_huge(fd, hva, self.region.granule),
                (false, false) if self.region.private => self.existing_in_child(fd, hva),
                // A page of shared memory may be in the way without being in this page table.
                (false, _) => Stop::Exists,
            };
        }
        // Where the page cannot be looked up, the kernel's answer is believed.
        match self.is_there(hva, content).unwrap_or(true) {
            true => Stop::Exists,
            false if huge => Stop::NoMemory(Errno::NOMEM),
            false => Stop::Untrue,
        }
    }

    /// The same for a huge page of another process, which cannot be looked up. The kernel first takes a huge page from
    /// the pool, then reads the bytes to copy, and only then looks whether a page is there. So a copy of unreadable
    /// bytes fails for the bytes if the pool has a page.
    fn existing_huge(&self, fd: BorrowedFd<'_>, hva: u64, size: u64) -> Stop {
        match ioctl::copy(fd, hva, self.uffd.unreadable, size).1 {
            Some(Errno::FAULT) => Stop::Exists,
            Some(Errno::EXIST) => Stop::NoMemory(Errno::NOMEM),
            errno => errno.map_or(Stop::Untrue, stop),
        }
    }

    /// As [`Registered::existing`], for a forked child's private memory: a poison mark goes only where no page is. The
    /// child's removals are reported before they happen, so no existing page disappears meanwhile.
    fn existing_in_child(&self, fd: BorrowedFd<'_>, hva: u64) -> Stop {
        match ioctl::poison(fd, hva, self.region.granule) {
            (0, Some(Errno::AGAIN)) => Stop::Again,
            (0, _) => Stop::Exists,
            _ => Stop::Marked,
        }
    }

    /// The kernel has reported that the page to map is not in its file. This can be looked up for another process too,
    /// because the library has the file.
    fn missing(&self, pages: &Range<u64>) -> Stop {
        let page = pages.start..pages.start + 1;
        match self
            .region
            .shared
            .as_ref()
            .and_then(|shared| shared.holds(&self.region.bytes_of(&page), self.region.granule))
        {
            Some(true) => Stop::Untrue,
            _ => Stop::BadSource,
        }
    }

    /// Whether something is in the place of the page at `hva`. A new page of shared memory may be in the way without
    /// being in this page table: after MADV_DONTNEED, or where another mapping has made it. None: the library cannot
    /// see it.
    fn is_there(&self, hva: u64, content: Content) -> Option<bool> {
        if content.is_poison() && self.region.granule != page_size() {
            // pagemap does not show a mark in the place of a huge page. Here it is usually a mark, put back for another
            // thread that touched the page.
            return None;
        }
        let makes = matches!(content, Content::Copy(_) | Content::Move(_) | Content::Zero);
        let mapped = self.uffd.pagemap.get_or_init(Pagemap::open).mapped(hva);
        match makes && !self.region.private && mapped != Some(true) {
            true => resident::exists(hva, self.region.granule),
            false => mapped,
        }
    }

    /// The kernel has said that nothing is mapped at `hva`, or not under this userfaultfd. Believed if another request,
    /// which installs no page, gets the same answer: a page that counts as unmapped reads as zero from then on.
    fn unmapped(&self, fd: BorrowedFd<'_>, hva: u64) -> Stop {
        let asked = match &self.region.shared {
            Some(_) => ioctl::copy(fd, hva, self.uffd.unreadable, self.region.granule).1,
            // Before Linux 5.13 there is no other request.
            None if !open::offered(true).map_or(true, |(features, _)| features & UFFD_FEATURE_MINOR_SHMEM != 0) => {
                Some(Errno::NOENT)
            }
            None => ioctl::cont(fd, hva, self.region.granule).1,
        };
        match asked {
            // An event would have reported a mapping that went away.
            Some(Errno::NOENT) if self.uffd.events && is_mapped(hva) => Stop::Untrue,
            Some(Errno::NOENT) => Stop::Unmapped,
            Some(Errno::AGAIN) => Stop::Again,
            _ => Stop::Untrue,
        }
    }
}

impl Reported for Registered {
    fn queue_at(&self, offset: u64) -> (usize, u64) {
        self.stripes.get().map_or((0, u64::MAX), |stripes| stripes.at(offset))
    }
}

impl Binding for Registered {
    fn arm(&self, _pages: &Pages) -> Result<()> {
        self.register_all()?;
        if self.collapse_fills()
            && !self.uffd.facts.remote
            && !self.region.private
            && self.region.granule == page_size()
        {
            self.region.refuse_collapse();
        }
        Ok(())
    }

    fn detach(&self, _pages: &Pages, _poisoned: &mut dyn Iterator<Item = Range<u64>>, _in_use: bool) {
        self.release(&self.region.all());
    }

    fn release(&self, pages: &Range<u64>) {
        // Pages that are unmapped by now need no unregistering.
        self.each_piece(pages, ioctl::unregister);
    }

    fn in_place_buffer(&self, pages: &Range<u64>) -> std::result::Result<Option<NonNull<u8>>, Errno> {
        let Some(shared) = &self.region.shared else { return Ok(None) };
        shared.place(self.region.bytes_of(pages)).map(Some)
    }

    fn install(&self, pages: &Range<u64>, content: Content) -> Installed {
        let Some((hva, mapped)) = self.region.hva_of(pages.start) else {
            return Installed { pages: 0, stop: Some(Stop::Unmapped) };
        };
        if let Content::Verify = content {
            return self.confirm(pages);
        }
        let (queue, same) = self.queue_at(pages.start * self.region.granule);
        let fd = self.uffd.queue_fd(queue);
        let mut len = ((pages.end - pages.start).min(mapped) * self.region.granule).min(same);
        loop {
            let (bytes, errno) = self.install_at(fd, hva, len, content);
            // One call does not cross mappings, and mappings that look like one may be two: look for the border.
            if bytes == 0 && errno == Some(Errno::NOENT) && len > self.region.granule {
                len = (len / 2).next_multiple_of(self.region.granule);
                continue;
            }
            let stop = match errno.map(stop) {
                // The next call shows the reason for the stop.
                _ if bytes > 0 => None,
                Some(Stop::Exists) => Some(self.existing(fd, hva, content)),
                Some(Stop::BadSource) if is_in_file(content) => Some(self.missing(pages)),
                Some(Stop::Unmapped) => Some(self.unmapped(fd, hva)),
                Some(Stop::Dead) if self.uffd.is_alive() => Some(Stop::Untrue),
                stop => stop,
            };
            return Installed { pages: bytes / self.region.granule, stop };
        }
    }

    fn resident(&self, pages: &Range<u64>) -> Option<Vec<Range<u64>>> {
        let kind = resident::Kind {
            granule: self.region.granule,
            private: self.region.private,
            in_place: self.region.shared.is_some(),
        };
        (!self.uffd.facts.remote)
            .then(|| self.uffd.pagemap.get_or_init(Pagemap::open).there(self.region.mapped(pages), kind))
            .flatten()
    }

    fn wake(&self, pages: &Range<u64>) {
        self.each_piece(pages, ioctl::wake);
    }

    fn drop_pages(&self, pages: &Range<u64>) -> std::result::Result<(), Errno> {
        match (&self.region.shared, self.uffd.facts.remote) {
            (None, true) => return Err(Errno::NOTSUP),
            (Some(shared), true) => {
                return shared.punch(&self.region.bytes_of(pages));
            }
            (_, false) => {}
        }
        self.region.drop_content(pages)
    }

    fn make_inaccessible(&self, pages: &Range<u64>) -> bool {
        if self.uffd.facts.remote {
            return false;
        }
        let closed = self.region.protect(pages);
        if closed {
            self.wake(pages);
        }
        closed
    }
}

fn is_in_file(content: Content) -> bool {
    matches!(content, Content::Map)
}

fn stop(errno: Errno) -> Stop {
    match errno {
        Errno::EXIST => Stop::Exists,
        Errno::AGAIN => Stop::Again,
        Errno::NOENT => Stop::Unmapped,
        Errno::SRCH => Stop::Dead,
        Errno::NOMEM | Errno::NOSPC => Stop::NoMemory(errno),
        Errno::FAULT => Stop::BadSource,
        Errno::INVAL | Errno::NOTTY => Stop::Unsupported,
        other => Stop::Other(other),
    }
}

fn register_error(errno: Errno, hva: u64, len: u64, remote: bool) -> Error {
    let range = words!("hva {hva:#x}..{:#x}", hva + len);
    match errno {
        Errno::BUSY => Error::new(Errno::BUSY, words!("{range} is registered with another userfaultfd")),
        Errno::SRCH => Error::new(Errno::SRCH, words!("{range}: the process that opened this userfaultfd is gone")),
        Errno::NOTTY => Error::new(Errno::BADFD, "uffd is not a userfaultfd"),
        Errno::INVAL if remote => Error::new(
            Errno::FAULT,
            words!(
                "{range} is not mapped in the other process, or UFFDIO_API was not done on this userfaultfd, or \
                 userfaultfd cannot serve this kind of memory"
            ),
        ),
        Errno::INVAL => Error::new(
            Errno::INVAL,
            words!("{range}: UFFDIO_API was not done on this userfaultfd, or it cannot serve this kind of memory"),
        ),
        other => Error::system("UFFDIO_REGISTER", other),
    }
}
