//! Memory slots.

use std::os::fd::{AsFd, AsRawFd};

use crate::api::checks::invalid;
use crate::api::source::Source;
use crate::caller::{Keep, Opaque};
use crate::error::{words, Result};
use crate::service::config::NewMemory;
use crate::service::inside::kept;
use crate::sync::Arc;
use crate::uapi::kvm::{KVM_MEMORY_ATTRIBUTE_USERFAULT, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};

/// The flags that a memslot set by the library may have besides KVM_MEM_USERFAULT.
const MEMSLOT_FLAGS: u32 = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;

/// A memory slot to add with [`Kuf::add_memory`](crate::Kuf::add_memory): a guest physical range and the mapping behind
/// it. Descriptors are borrowed; the library duplicates them.
pub struct Memory<'a> {
    pub(crate) new: NewMemory,
    pub(crate) source: Option<Source<'a>>,
}

impl<'a> Memory<'a> {
    /// `len` bytes of guest memory at the guest physical address `gpa`, mapped in this process at `host`. All three are
    /// multiples of the page size of the mapping.
    ///
    /// # Safety
    /// The library may write to this memory at any time from [`Kuf::add_memory`](crate::Kuf::add_memory) on, until
    /// [`Slot::remove`](crate::Slot::remove) or the end of the handle has returned (after
    /// [`Kuf::close_without_waiting`](crate::Kuf::close_without_waiting), or if the handle is dropped in a callback:
    /// until the fill callback is dropped; after `mem::forget` of the handle: always). During that time:
    /// - The memory stays mapped. madvise(2), munmap(2) and mremap(2) of a guest's memory are allowed. [`Memory::keep`] can keep
    ///   its owner alive.
    /// - The program uses it by raw pointers only, and no reference to its bytes exists: they change at any time.
    pub unsafe fn new(gpa: u64, len: u64, host: *mut u8) -> Self {
        Self::at(gpa, len, host.expose_provenance() as u64)
    }

    /// As [`Memory::new`], for memory of another process: the one that opened `userfaultfd`, in which the memory is at
    /// the address `host`.
    ///
    /// # Safety
    /// As for [`Memory::new`], in the process of the userfaultfd, which may be this one.
    pub unsafe fn remote(gpa: u64, len: u64, host: u64, userfaultfd: &'a impl AsFd) -> Self {
        let mut memory = Self::at(gpa, len, host).userfaultfd(userfaultfd);
        memory.new.remote = true;
        memory
    }

    pub(crate) fn at(gpa: u64, len: u64, hva: u64) -> Self {
        Self { new: NewMemory::at(gpa, len, hva), source: None }
    }

    /// The shared file (memfd, tmpfs, hugetlbfs) that is mapped MAP_SHARED, from byte `offset` on. Pages are then
    /// filled in place where the kernel has minor faults: [`Run::buf`](crate::Run::buf) is a page of the file.
    ///
    /// # Safety
    /// - Only this slot touches pages of the file that it has not filled yet: no other mapping, slot or process does.
    /// - While the slot exists, the file does not become shorter.
    /// - A callback does not use [`Run::buf`](crate::Run::buf), which is the guest's page, after it has resolved that page itself,
    ///   or after [`Kuf::close_without_waiting`](crate::Kuf::close_without_waiting) in another thread.
    pub unsafe fn file(mut self, file: &'a impl AsFd, offset: u64) -> Self {
        self.new.file = Some((file.as_fd().as_raw_fd(), offset));
        self
    }

    /// The userfaultfd that serves the slot, instead of one of the library's own. UFFDIO_API is done on it. The library
    /// sets O_NONBLOCK on it and must be its only reader.
    pub fn userfaultfd(mut self, userfaultfd: &'a impl AsFd) -> Self {
        self.new.uffd = Some(userfaultfd.as_fd().as_raw_fd());
        self
    }

    /// The page size of the mapping in bytes. Needed only for memory of another process without a file, if it is not
    /// the base page size; the library detects all others.
    pub fn page_size(mut self, bytes: u64) -> Self {
        self.new.granule = bytes;
        self
    }

    /// A number for the caller's use, which [`Run::tag`](crate::Run::tag), [`Fault::tag`](crate::Fault::tag) and
    /// [`Event::tag`](crate::Event::tag) return.
    pub fn tag(mut self, tag: usize) -> Self {
        self.new.opaque = Opaque(std::ptr::without_provenance_mut(tag));
        self
    }

    /// Where the slot's pages come from, instead of the fill callback. The slot's first byte is at the start of the
    /// source.
    pub fn source(mut self, source: Source<'a>) -> Self {
        self.source = Some(source);
        self
    }

    /// Prefer transparent huge pages for private memory that is filled ahead of demand. Best effort; needs
    /// [`Feature::Huge`](crate::Feature::Huge). The guest physical address and the host address agree modulo 2 MiB.
    pub fn huge(mut self) -> Self {
        self.new.huge = true;
        self
    }

    /// The memory may hold pages already, and their bytes are the guest's own: they count as present. Without this,
    /// memory that holds pages is refused with EBUSY.
    pub fn populated(mut self) -> Self {
        self.new.populated = true;
        self
    }

    /// Ask for every page, whatever the file holds already: after a handler that died and may have left half-filled
    /// pages. Needs [`Memory::file`] and [`Feature::Minor`](crate::Feature::Minor); not with [`Memory::populated`].
    pub fn fill_all(mut self) -> Self {
        self.new.fill_all = true;
        self
    }

    /// A value to keep for as long as the library uses the memory, such as the owner of the mapping. Any thread may
    /// drop it, as if in a callback: a call of its destructor that could wait fails with EDEADLK, and a panic there is
    /// caught.
    pub fn keep(mut self, owner: Keep) -> Self {
        let owner = kept(owner);
        self.new.keep = Some(match self.new.keep.take() {
            Some(other) => Arc::new((other, owner)),
            None => owner,
        });
        self
    }

    /// Makes the checks that need no system call.
    pub(crate) fn check(self) -> Result<NewMemory> {
        let Self { mut new, source } = self;
        if new.fill_all && new.file.is_none() {
            return invalid("KUF_MEMORY_FILL_ALL needs the file of the memory (memory->fd)");
        }
        if new.fill_all && new.populated {
            return invalid("memory->flags: KUF_MEMORY_FILL_ALL and KUF_MEMORY_POPULATED contradict each other");
        }
        let memslot_flags = new.memslot.as_ref().map_or(0, |memslot| memslot.flags);
        if memslot_flags & !MEMSLOT_FLAGS != 0 {
            return invalid(words!("kvm->memslot_flags has unknown bits {:#x}", memslot_flags & !MEMSLOT_FLAGS));
        }
        if new.kvm_attributes & KVM_MEMORY_ATTRIBUTE_USERFAULT != 0 {
            return invalid("kvm->attributes: only the library sets KVM_MEMORY_ATTRIBUTE_USERFAULT");
        }
        if new.len == 0 {
            return invalid("memory->len is 0");
        }
        if new.hva == 0 {
            return invalid("memory->hva is 0: set it to the address of the mapping");
        }
        // The sum also keeps addresses below KUF_ALL, which is no address.
        let offset = new.file.map_or(0, |(_, offset)| offset);
        for (what, start) in [("gpa", new.gpa), ("hva", new.hva), ("fd_offset", offset)] {
            if start.checked_add(new.len).is_none() {
                return invalid(words!("memory->{what} {start:#x} + len {:#x} overflows", new.len));
            }
        }
        new.source = source.map(|source| source.check(new.len)).transpose()?;
        Ok(new)
    }
}

impl std::fmt::Debug for Memory<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory")
            .field("gpa", &format_args!("{:#x}", self.new.gpa))
            .field("len", &format_args!("{:#x}", self.new.len))
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}
