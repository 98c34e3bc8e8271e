//! The bitmap of a memslot, and whether KVM looks at it.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::alloc::refusable;
use crate::error::{Error, Result};
use crate::mapping::Region;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{lock, Arc, Mutex};
use crate::uapi::ioctl;
use crate::uapi::kvm::*;

/// Bytes of a guest frame in the bitmap, for every granule of the slot.
const FRAME: u64 = 4096;

/// A KVM memslot as the caller describes it.
#[derive(Clone, Copy)]
pub struct Memslot {
    pub id: u32,
    /// KVM_MEM_* other than KVM_MEM_USERFAULT.
    pub flags: u32,
}

/// Whether KVM looks at a bitmap.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Exits {
    Off,
    On,
    /// Off for good: the bitmap is about to be freed.
    Over,
}

/// The bitmap of one memslot.
pub struct Bitmap {
    /// Bit n set, frame n faults.
    pub bits: Bits,
    /// Whether KVM looks at it now, where the library knows. Held while that is changed.
    exits: Mutex<Exits>,
    /// The memslot, when the library sets it itself.
    memslot: Option<Memslot>,
    region: Arc<Region>,
    vm: Arc<OwnedFd>,
}

impl Bitmap {
    /// For `region`, every bit set. `vm`: the library's own descriptor of the VM.
    pub fn new(region: Arc<Region>, memslot: Option<Memslot>, vm: Arc<OwnedFd>) -> Result<Self> {
        let bits = Bits::new(region.all().end, region.granule)?;
        Ok(Self { bits, exits: Mutex::new(Exits::Off), memslot, region, vm })
    }

    /// The value for `kvm_userspace_memory_region2.userfault_bitmap`.
    pub fn address(&self) -> u64 {
        self.bits.words.as_ptr() as u64
    }

    /// Whether the library sets the memslot.
    pub fn sets_memslot(&self) -> bool {
        self.memslot.is_some()
    }

    /// Makes KVM look at the bitmap or not, where the library sets the memslot. KVM waits until no vCPU uses the old
    /// memslot, and so for vCPUs that wait for pages: the caller holds no lock that those need. Turning the bitmap on makes
    /// KVM drop its mappings of the memslot, so that bits that were set before take effect on all of it; turning it off lets
    /// KVM map huge pages again. `still` is called when no other thread can change the memslot.
    pub fn set_exits(&self, to: Exits, still: impl Fn() -> bool) -> std::result::Result<(), Errno> {
        let Some(memslot) = self.memslot else { return Ok(()) };
        let mut exits = lock(&self.exits);
        if *exits == to || *exits == Exits::Over || !still() {
            return Ok(());
        }
        let on = to == Exits::On;
        if !on && *exits == Exits::Off {
            *exits = to;
            return Ok(());
        }
        let region = &self.region;
        let mut memslot = kvm_userspace_memory_region2 {
            slot: memslot.id,
            flags: memslot.flags | if on { KVM_MEM_USERFAULT } else { 0 },
            guest_phys_addr: region.gpa,
            memory_size: region.len,
            userspace_addr: region.hva_of(0).map_or(0, |(hva, _)| hva),
            userfault_bitmap: if on { self.address() } else { 0 },
            ..Default::default()
        };
        set_memslot(&self.vm, &mut memslot)?;
        *exits = to;
        Ok(())
    }
}

/// KVM reads it; the library writes it.
pub struct Bits {
    words: NonNull<AtomicU64>,
    len: usize,
    frames_per_page: u64,
}

// SAFETY: memory of atomics that the bitmap owns.
unsafe impl Send for Bits {}
// SAFETY: as above.
unsafe impl Sync for Bits {}

impl Bits {
    /// For `pages` pages of `granule` bytes, all set.
    pub fn new(pages: u64, granule: u64) -> Result<Self> {
        let frames_per_page = granule / FRAME;
        let words = (pages * frames_per_page).div_ceil(64) as usize;
        let len = (words * 8).next_multiple_of(rustix::param::page_size());
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE) }
            .map_err(|e| Error::system("mapping a userfault bitmap", e))?;
        let words = NonNull::new(at.cast()).ok_or_else(|| Error::new(Errno::NOMEM, "no userfault bitmap"))?;
        let bits = Self { words, len, frames_per_page };
        bits.set(&(0..pages));
        Ok(bits)
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped with this length and zeroed at first; atomics are what is in it.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.len / 8) }
    }

    pub fn set(&self, pages: &Range<u64>) {
        self.each_word(pages, |word, mask| {
            word.fetch_or(mask, Ordering::Release);
        });
    }

    /// With release order: a reader that sees the bit clear sees the bytes.
    pub fn clear(&self, pages: &Range<u64>) {
        self.each_word(pages, |word, mask| {
            word.fetch_and(!mask, Ordering::Release);
        });
    }

    /// The runs of `pages` whose bits are set; none where there is no memory for them.
    pub fn marked(&self, pages: &Range<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let is_set = |page: u64| {
            let frame = page * self.frames_per_page;
            self.words()[(frame / 64) as usize].load(Ordering::Relaxed) >> (frame % 64) & 1 != 0
        };
        for page in pages.clone().filter(|page| is_set(*page)) {
            if let Some(run) = runs.last_mut().filter(|run| run.end == page) {
                run.end += 1;
            } else if refusable(|| runs.try_reserve(1)).is_ok() {
                runs.push(page..page + 1);
            } else {
                return Vec::new();
            }
        }
        runs
    }

    fn each_word(&self, pages: &Range<u64>, change: impl Fn(&AtomicU64, u64)) {
        let (mut frame, end) = (pages.start * self.frames_per_page, pages.end * self.frames_per_page);
        while frame < end {
            let n = (64 - frame % 64).min(end - frame);
            let mask = if n == 64 { u64::MAX } else { ((1 << n) - 1) << (frame % 64) };
            change(&self.words()[(frame / 64) as usize], mask);
            frame += n;
        }
    }
}

impl Drop for Bits {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length. A memslot that the library sets has been changed before, for good
        // (`Exits::Over`); a caller that sets its own was told to change it before.
        let _ = unsafe { rustix::mm::munmap(self.words.as_ptr().cast(), self.len) };
    }
}

/// KVM_SET_USER_MEMORY_REGION2.
pub fn set_memslot(vm: &OwnedFd, region: &mut kvm_userspace_memory_region2) -> std::result::Result<(), Errno> {
    // SAFETY: the struct that the request was computed from; what it points to outlives the memslot.
    unsafe { ioctl::call(vm.as_fd(), KVM_SET_USER_MEMORY_REGION2, region) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_follow_pages_across_words() {
        let bits = Bits::new(200, FRAME).unwrap();
        assert_eq!(bits.words()[0].load(Ordering::Relaxed), u64::MAX);
        assert_eq!(bits.words()[3].load(Ordering::Relaxed), 0xff);
        bits.clear(&(60..130));
        assert_eq!(bits.words()[0].load(Ordering::Relaxed), (1 << 60) - 1);
        assert_eq!(bits.words()[1].load(Ordering::Relaxed), 0);
        assert_eq!(bits.words()[2].load(Ordering::Relaxed), u64::MAX << 2);
        bits.set(&(64..65));
        assert_eq!(bits.words()[1].load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_huge_page_is_many_frames() {
        let bits = Bits::new(2, 2 << 20).unwrap();
        bits.clear(&(1..2));
        let ones: u32 = bits.words().iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum();
        assert_eq!(ones, 512);
    }
}
