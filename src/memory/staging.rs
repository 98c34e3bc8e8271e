//! A huge page to fill before it is moved to the guest whole (`KUF_MEMORY_HUGE`).
//!
//! UFFDIO_MOVE takes the page out of this buffer, so each stretch needs a new one: the kernel zeroes it at the first touch,
//! which costs about what UFFDIO_COPY spends on 512 single pages.

use std::ptr::NonNull;

use rustix::io::Errno;

use crate::alloc::try_push;
use crate::error::Result;
use crate::mapping::buffer::Buffer;
use crate::mapping::HUGE;
use crate::sync::{lock, Mutex};

/// Whether the kernel's huge pages are of [`HUGE`] bytes.
pub fn possible() -> bool {
    rustix::param::page_size() == 4096
}

/// Room for one huge page, aligned to its size.
pub struct Staging {
    room: Buffer,
    policy: Policy,
    /// A huge page is there, of undefined content.
    whole: bool,
}

impl Staging {
    fn new() -> Result<Self> {
        let room = Buffer::new(2 * HUGE as usize)?;
        let staging = Self { room, policy: Policy::default(), whole: false };
        let at = staging.at().as_ptr().cast();
        // SAFETY: this buffer's own memory. A refusal of either shows in `ready`. A page that a forked child shares could
        // not be moved.
        unsafe {
            libc::madvise(at, HUGE as usize, libc::MADV_HUGEPAGE);
            libc::madvise(at, HUGE as usize, libc::MADV_DONTFORK);
        }
        Ok(staging)
    }

    /// Its first byte.
    pub fn at(&self) -> NonNull<u8> {
        let start = self.room.at();
        let up = (start.addr().get() as u64).next_multiple_of(HUGE) - start.addr().get() as u64;
        // SAFETY: the room is twice as long.
        unsafe { start.add(up as usize) }
    }

    /// Makes sure that the buffer has a huge page, with the NUMA policy of the memory at `like`. False: the kernel has none.
    fn ready(&mut self, like: u64) -> bool {
        let Some(policy) = Policy::of(like) else { return false };
        if policy != self.policy {
            if !policy.set(self.at(), HUGE) {
                return false;
            }
            (self.policy, self.whole) = (policy, false);
        }
        if self.whole {
            return true;
        }
        // Drops single pages that a move left behind, or that mlockall made.
        if !self.drop_pages() || self.resident() {
            return false;
        }
        // SAFETY: this buffer's own memory.
        unsafe { self.at().as_ptr().write_volatile(0) };
        self.whole = self.resident();
        self.whole
    }

    fn drop_pages(&self) -> bool {
        const MADV_DONTNEED_LOCKED: libc::c_int = 24;
        let advise = |advice| {
            // SAFETY: this buffer's own memory, whose content is not needed.
            unsafe { libc::madvise(self.at().as_ptr().cast(), HUGE as usize, advice) == 0 }
        };
        advise(libc::MADV_DONTNEED) || advise(MADV_DONTNEED_LOCKED)
    }

    /// Whether the last base page is resident. When only the first was touched, that means one huge page.
    fn resident(&self) -> bool {
        let page = rustix::param::page_size();
        let mut resident = 0_u8;
        // SAFETY: looks up one base page of this buffer and writes one byte.
        unsafe {
            let last = self.at().add(HUGE as usize - page).as_ptr().cast();
            libc::mincore(last, page, &mut resident) == 0 && resident & 1 != 0
        }
    }
}

/// Staging that is used again.
#[derive(Default)]
pub struct Pool {
    free: Mutex<Vec<Staging>>,
}

impl Pool {
    /// A huge page of undefined content, for memory at `like` in this process. None: the kernel has none now.
    pub fn take(&self, like: u64) -> Option<Staging> {
        let used = lock(&self.free).pop();
        // Before Linux 6.14 a buffer whose page table was broken up gets no huge page any more; a new buffer does.
        for old in [used, None] {
            let mut staging = old.map_or_else(Staging::new, Ok).ok()?;
            if staging.ready(like) {
                return Some(staging);
            }
        }
        None
    }

    /// Gives it back. `moved`: its page, or part of it, is the guest's by now.
    pub fn put(&self, mut staging: Staging, moved: bool) {
        staging.whole &= !moved;
        // Without memory to remember it, it is unmapped.
        let _ = try_push(&mut lock(&self.free), staging);
    }
}

/// Whether the kernel has a huge page at this moment.
pub fn works() -> bool {
    possible() && Pool::default().take(0).is_some()
}

/// Most NUMA nodes of any kernel.
const NODES: usize = 1024;

/// The NUMA nodes that memory comes from. A moved page stays on the node where it was allocated, so staging has to follow
/// the policy of the memory that it is for.
#[derive(Clone, PartialEq, Eq)]
struct Policy {
    mode: libc::c_int,
    nodes: [libc::c_ulong; NODES / libc::c_ulong::BITS as usize],
}

impl Default for Policy {
    fn default() -> Self {
        Self { mode: libc::MPOL_DEFAULT, nodes: [0; NODES / libc::c_ulong::BITS as usize] }
    }
}

impl Policy {
    /// The policy of the memory at `hva`; 0: any. None: it cannot be followed, because it depends on the address.
    fn of(hva: u64) -> Option<Self> {
        const MPOL_F_ADDR: libc::c_ulong = 1 << 1;
        const MPOL_MODE_FLAGS: libc::c_int = 0b111 << 13;
        let mut policy = Self::default();
        if hva == 0 {
            return Some(policy);
        }
        // SAFETY: writes one int and `NODES` bits.
        let result = unsafe {
            libc::syscall(
                libc::SYS_get_mempolicy,
                &mut policy.mode,
                policy.nodes.as_mut_ptr(),
                NODES as libc::c_ulong,
                hva,
                MPOL_F_ADDR,
            )
        };
        if result != 0 {
            // SAFETY: errno of this thread.
            let errno = Errno::from_raw_os_error(unsafe { *libc::__errno_location() });
            // A kernel without NUMA.
            return (errno == Errno::NOSYS).then(Self::default);
        }
        const MPOL_PREFERRED_MANY: libc::c_int = 5;
        let follows =
            [libc::MPOL_DEFAULT, libc::MPOL_PREFERRED, libc::MPOL_BIND, libc::MPOL_LOCAL, MPOL_PREFERRED_MANY];
        follows.contains(&(policy.mode & !MPOL_MODE_FLAGS)).then_some(policy)
    }

    fn set(&self, at: NonNull<u8>, len: u64) -> bool {
        // The kernel takes one off the count: the last bit is no node's.
        // SAFETY: this buffer's own memory; reads `NODES` bits.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                at.as_ptr(),
                len,
                self.mode,
                self.nodes.as_ptr(),
                NODES as libc::c_ulong,
                0 as libc::c_uint,
            )
        };
        result == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_was_not_moved_is_used_again() {
        let pool = Pool::default();
        let Some(staging) = pool.take(0) else { return };
        assert_eq!(staging.at().addr().get() as u64 % HUGE, 0);
        // SAFETY: the staging's own memory.
        unsafe { staging.at().as_ptr().add(HUGE as usize - 1).write(7) };
        pool.put(staging, false);
        let again = pool.take(0).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { again.at().as_ptr().add(HUGE as usize - 1).read() }, 7);
        pool.put(again, true);
        let fresh = pool.take(0).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { fresh.at().as_ptr().add(HUGE as usize - 1).read() }, 0);
    }
}
