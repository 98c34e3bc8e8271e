//! Memory slots come and go.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError};

use super::config::NewMemory;
use super::host::refuse_inside_callbacks;
use super::{huge, Service};
use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::mechanism::userfaultfd::{open, Userfaultfd};
use crate::mechanism::Mechanism;
use crate::memory::maps::{self, Mapping};
use crate::memory::shared::{huge_page_size, SharedFile};
use crate::memory::{Extent, Parts, Slot};
use crate::pages::State;
use crate::source;
use crate::sync::lock;
use crate::uapi::userfaultfd::{UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM};

impl Service {
    /// `kuf_add_memory`.
    pub fn add_memory(&self, new: NewMemory) -> Result<()> {
        refuse_inside_callbacks("kuf_add_memory")?;
        self.check_open()?;
        self.check_source(&new)?;
        let file = new.file.map(|(fd, offset)| Ok::<_, Error>((shared_file(fd)?, offset))).transpose()?;
        let huge_file = file.as_ref().and_then(|(file, _)| huge_page_size(file));
        let mappings = if new.remote { Vec::new() } else { maps::covering(new.hva..new.hva + new.len)? };
        let granule = granule(&new, huge_file, &mappings)?;
        let marks = self.own.as_ref().is_some_and(|own| own.marks());
        for (what, value) in
            [("gpa", new.gpa), ("len", new.len), ("hva", new.hva), ("fd_offset", file.as_ref().map_or(0, |f| f.1))]
        {
            if value % granule != 0 {
                let text = format!("{what} {value:#x} is not a multiple of the granule {granule:#x}");
                return Err(Error::new(libc::EINVAL, text));
            }
        }
        if let Some(mapping) = mappings.iter().find(|m| !m.shared && m.inode != 0 && !m.anonymous_huge) {
            let text = format!(
                "hva {:#x} is a private mapping of a file: what the file holds there would be read without a fault",
                mapping.hva.start
            );
            return Err(Error::new(libc::EINVAL, text));
        }
        if let Some(mapping) = mappings.iter().find(|mapping| marks && !mapping.writable) {
            let text = format!("hva {:#x} is not writable: pages are written straight to it", mapping.hva.start);
            return Err(Error::new(libc::EINVAL, text));
        }
        let private = match (&file, mappings.first()) {
            (Some((file, offset)), Some(_)) => {
                check_file_is_mapped(file, *offset, &new, &mappings)?;
                false
            }
            (Some(_), None) => false,
            (None, first) => first.is_none_or(|mapping| !mapping.shared),
        };
        let in_place = file.filter(|_| marks || minor_works(huge_file.is_some()));
        let shared = in_place.map(|(file, offset)| SharedFile::new(file, offset, new.len).map(Arc::new)).transpose()?;
        let present = match &shared {
            Some(shared) if !new.fill_all => shared.data()?,
            None if marks => {
                maps::refuse_resident(new.hva..new.hva + new.len)?;
                Vec::new()
            }
            _ => Vec::new(),
        };
        // Marks keep the guest off the slot's own mapping, which is then the way in.
        let shared = shared.filter(|_| !marks);
        let kvm = self.for_kvm(&new, granule)?;
        let source = new.source.map(|source| source::open(source, new.len)).transpose()?;
        let adopting = new.uffd.map(|_| lock(&self.adopting));
        let (mechanism, fresh) = self.mechanism_for(&new)?;
        let huge = new.huge && huge::possible(granule, private) && mechanism.moves();
        let slot = Arc::new(Slot::new(Parts {
            gpa: new.gpa,
            len: new.len,
            granule,
            opaque: new.opaque,
            mechanism: mechanism.clone(),
            private,
            shared,
            source,
            parent: None,
            kvm,
            huge,
            extents: vec![Extent { offset: 0, len: new.len, hva: new.hva }],
        }));
        for range in present {
            slot.pages.transition(slot.pages_of(&range), State::Absent, State::Present);
        }
        if new.fill_all && !new.remote {
            // What is mapped already would never be asked for. The file keeps it; only the mapping is dropped.
            slot.unmap_pages();
        }
        // With the gate held: no event of this address range is half applied, and nothing is installed before the range is
        // registered.
        let gate = mechanism.gate().write().unwrap_or_else(PoisonError::into_inner);
        // Known before it is armed: the first fault may come before attach returns.
        let added = self.memory.update(|map| map.add(slot.clone()));
        let attached = added.and_then(|()| {
            mechanism.attach(&slot).inspect_err(|_| {
                let _ = self.memory.update(|map| {
                    map.remove(&slot);
                    Ok(())
                });
            })
        });
        let mut given_back = Vec::new();
        if attached.is_ok() && mechanism.adopted() {
            self.apply_given_back(&slot, &mut given_back);
        }
        drop(gate);
        given_back.into_iter().for_each(|work| self.push(work));
        if attached.is_err() && fresh {
            self.give_up(&mechanism);
        }
        drop(adopting);
        attached?;
        if let Err(error) = mechanism.attached(&slot) {
            // The memory is the host's as it was before the call. Another thread may have removed the slot already.
            if self.take_out(&slot, &[]).is_ok() {
                slot.wake_sleepers(&slot.claims());
                mechanism.detach(&slot, false);
            }
            return Err(error);
        }
        self.withdraw_at_the_end(&slot)?;
        self.unpark(mechanism.id(), false);
        if mechanism.adopted() {
            // An earlier reader of this userfaultfd may have taken faults with it: who waits asks again.
            mechanism.wake(&slot, &(0..slot.pages.total()));
        }
        self.config.host.log(KUF_LOG_INFO, || {
            let how = match (slot.in_place(), huge) {
                (true, _) => "filled in place",
                (false, true) => "filled by copy, or by moving huge pages",
                (false, false) => "filled by copy",
            };
            format!("memory slot {:#x}..{:#x}, granule {granule:#x}, {how}", new.gpa, new.gpa + new.len)
        });
        if let Some(work) = self.completion(&slot) {
            self.push(work);
        }
        Ok(())
    }

    /// A kuf_close that does not wait for calls may have gone through the map before `slot`, which was just added, came onto
    /// it: then nobody else sees to it that no absent page of it reads as zeroes. If it has not, it finds the slot there:
    /// the map's lock has one of the two see the other.
    fn withdraw_at_the_end(&self, slot: &Arc<Slot>) -> Result<()> {
        match self.check_open() {
            Err(ended) if ended.errno() == libc::ECANCELED => {
                let adopted = slot.mechanism.adopted();
                if !adopted {
                    self.poison_rest(slot);
                }
                if self.take_out(slot, &[]).is_ok() {
                    slot.wake_sleepers(&slot.claims());
                    if adopted {
                        // It stays under the host's own userfaultfd. What was read here is asked again there.
                        slot.mechanism.wake(slot, &(0..slot.pages.total()));
                    } else {
                        slot.mechanism.detach(slot, true);
                        slot.mechanism.detached(slot);
                    }
                }
                Err(ended)
            }
            _ => Ok(()),
        }
    }

    /// Every slot has somebody to ask, and one only.
    fn check_source(&self, new: &NewMemory) -> Result<()> {
        let text = match (&new.source, self.serviced(), self.config.host.fill) {
            (Some(_), false, _) => "memory->source: the handle has neither a fill callback nor KUF_OPEN_SOURCES",
            (None, true, None) => {
                "memory->source is NULL: with KUF_OPEN_SOURCES and no fill callback each slot needs one"
            }
            _ => return Ok(()),
        };
        Err(Error::new(libc::EINVAL, text))
    }

    /// The mechanism a slot asks for, and whether it was made for it.
    fn mechanism_for(&self, new: &NewMemory) -> Result<(Arc<dyn Mechanism>, bool)> {
        let Some(fd) = new.uffd else {
            let own = self.own.clone().ok_or_else(|| {
                Error::new(libc::EINVAL, "opened with KUF_OPEN_ADOPT_ONLY: each slot has to bring a uffd")
            })?;
            return Ok((own, false));
        };
        let host_fd = borrow(fd, "uffd")?;
        let known = self.inlets().iter().find_map(|inlet| {
            let brought_as = inlet.host_fd?;
            let same = same_file(inlet.mechanism.inlet(inlet.queue)?, host_fd).unwrap_or(brought_as == fd);
            same.then(|| inlet.mechanism.clone())
        });
        if let Some(known) = known {
            return Ok((known, false));
        }
        if !is_userfaultfd(fd) {
            return Err(Error::new(libc::EBADFD, format!("uffd {fd} is not a userfaultfd")));
        }
        let own = duplicate(host_fd, "uffd")?;
        let mechanism: Arc<dyn Mechanism> = Arc::new(Userfaultfd::adopt(own, new.remote)?);
        self.add_inlet(mechanism.clone(), Some((fd, new.remote)))?;
        Ok((mechanism, true))
    }

    /// Stops reading an adopted userfaultfd, which has no slot any more. The caller holds `adopting`.
    pub(super) fn give_up(&self, mechanism: &Arc<dyn Mechanism>) {
        self.drop_inlet(mechanism.id());
        // Who is reading it is through by then: a fault of the mechanism that adopts it next is not lost here.
        drop(mechanism.gate().write());
    }
}

fn granule(new: &NewMemory, huge: Option<u64>, mappings: &[Mapping]) -> Result<u64> {
    let page = rustix::param::page_size() as u64;
    let found = match huge {
        Some(huge) => Some(huge),
        // Shared memory that came without its descriptor may be hugetlbfs too.
        None if mappings.iter().any(|m| m.anonymous_huge || m.shared && new.file.is_none()) => {
            Some(mapped_page_size(new.hva)?)
        }
        None if new.remote && new.file.is_none() => None,
        None => Some(page),
    };
    let granule = match (new.granule, found) {
        (0, found) => found.unwrap_or(page),
        (given, Some(found)) if given != found => {
            let text = format!("granule {given:#x} is not the mapping's page size, {found:#x}");
            return Err(Error::new(libc::EINVAL, text));
        }
        (given, _) => given,
    };
    if granule < page || !granule.is_power_of_two() {
        return Err(Error::new(libc::EINVAL, format!("granule {granule:#x} is no page size")));
    }
    Ok(granule)
}

/// The page size of a mapping of which no file says it.
fn mapped_page_size(hva: u64) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps")
        .map_err(|e| Error::system("reading /proc/self/smaps", e.raw_os_error().unwrap_or(libc::EIO)))?;
    let mut here = false;
    for line in text.lines() {
        let head = line.split_ascii_whitespace().next().unwrap_or("");
        if let Some((start, end)) = head.split_once('-') {
            let hex = |word| u64::from_str_radix(word, 16).unwrap_or(0);
            here = hex(start) <= hva && hva < hex(end);
        } else if here && head == "KernelPageSize:" {
            let kib = line.split_ascii_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
            return kib.map(|kib| kib << 10).ok_or_else(|| Error::new(libc::EINVAL, "unreadable KernelPageSize"));
        }
    }
    Err(Error::new(libc::EINVAL, "the granule could not be found out: set it"))
}

fn minor_works(huge: bool) -> bool {
    let needed = if huge { UFFD_FEATURE_MINOR_HUGETLBFS } else { UFFD_FEATURE_MINOR_SHMEM };
    // A handler that may not open a userfaultfd itself, and adopts one, cannot ask: kernels since 5.14 have both.
    open::offered(false).map_or(true, |(features, _)| features & needed != 0)
}

fn borrow(fd: i32, what: &str) -> Result<BorrowedFd<'static>> {
    // SAFETY: looks up the descriptor and nothing else.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(Error::new(libc::EBADF, format!("{what} {fd} is not an open descriptor")));
    }
    // SAFETY: open, and the host keeps it open for the time of the call; used only to duplicate and to look at it.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

pub(super) fn duplicate(fd: BorrowedFd<'_>, what: &str) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(|e| Error::system(&format!("duplicating {what}"), e.raw_os_error()))
}

fn shared_file(fd: i32) -> Result<OwnedFd> {
    const TMPFS_MAGIC: u32 = 0x0102_1994;
    let host = borrow(fd, "fd")?;
    let kind = rustix::fs::fstatfs(host).map(|stat| stat.f_type as u32).unwrap_or(0);
    if kind != TMPFS_MAGIC && huge_page_size(host).is_none() {
        let text = format!("fd {fd} is not shared memory (a memfd, or a file on tmpfs or hugetlbfs)");
        return Err(Error::new(libc::EBADFD, text));
    }
    duplicate(host, "fd")
}

fn check_file_is_mapped(file: &OwnedFd, offset: u64, new: &NewMemory, mappings: &[Mapping]) -> Result<()> {
    let stat = rustix::fs::fstat(file).map_err(|e| Error::system("fstat of fd", e.raw_os_error()))?;
    for mapping in mappings {
        let wanted = offset.wrapping_add(mapping.hva.start).wrapping_sub(new.hva);
        // hugetlbfs and memfd show no device number one could compare on every kernel; the inode and place say enough.
        if !mapping.shared || mapping.inode != stat.st_ino || mapping.offset != wanted {
            let text = format!("hva {:#x} is not a MAP_SHARED mapping of fd at fd_offset {offset:#x}", new.hva);
            return Err(Error::new(libc::EBADFD, text));
        }
    }
    if stat.st_size >= 0 && (stat.st_size as u64) < offset.saturating_add(new.len) {
        let text = format!("fd holds {:#x} bytes, fewer than fd_offset + len", stat.st_size);
        return Err(Error::new(libc::EBADFD, text));
    }
    Ok(())
}

fn is_userfaultfd(fd: i32) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{fd}")).is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
}

/// Whether two descriptors are of one open file; None where the kernel does not tell (kcmp).
fn same_file(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Option<bool> {
    use std::os::fd::AsRawFd;
    const KCMP_FILE: libc::c_int = 0;
    let me = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: compares, touches nothing.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, me, me, KCMP_FILE, a.as_raw_fd(), b.as_raw_fd()) };
    (order >= 0).then_some(order == 0)
}

/// A duplicate of the VM descriptor of `kuf_open`.
pub fn duplicate_vm(fd: i32) -> Result<OwnedFd> {
    let host = borrow(fd, "vm_fd")?;
    let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
    if link.as_os_str() != "anon_inode:kvm-vm" {
        return Err(Error::new(libc::EINVAL, format!("vm_fd {fd} is not a KVM VM")));
    }
    duplicate(host.as_fd(), "vm_fd")
}
