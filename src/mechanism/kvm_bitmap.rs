//! KVM userfault bitmap: a memslot with KVM_MEM_USERFAULT has a bitmap, and a vCPU that touches a page whose bit is set
//! leaves KVM_RUN at once. KVM's own accesses and the VMM's threads are not caught by it: they meet the userfaultfd
//! underneath, which also keeps everybody off a page whose bit is clear already and whose bytes are not there yet.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use super::gate::Gate;
use super::userfaultfd::Userfaultfd;
use super::{kvm_ioctl, Content, Installed, Left, Mechanism, Message};
use crate::error::{Error, Result};
use crate::memory::Slot;
use crate::pages::State;
use crate::sync::{lock, Mutex};
use crate::uapi::kvm::*;

/// Guest frames are of this size in the bitmap, whatever the slot's granule.
const FRAME: u64 = 4096;

/// A KVM memslot as the host describes it.
#[derive(Clone, Copy)]
pub struct Memslot {
    pub id: u32,
    /// KVM_MEM_* other than KVM_MEM_USERFAULT.
    pub flags: u32,
}

/// The bitmap of one memslot: bit n set, frame n faults. KVM reads it; the library writes it.
pub struct Bitmap {
    words: NonNull<AtomicU64>,
    len: usize,
    frames_per_page: u64,
    /// The memslot, when the library sets it itself.
    memslot: Option<Memslot>,
    /// Whether KVM looks at the bitmap now, where the library knows. Held while that is changed.
    armed: Mutex<Armed>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Armed {
    Off,
    On,
    /// Off for good: the bitmap is about to go.
    Over,
}

// SAFETY: memory of atomics that the bitmap owns.
unsafe impl Send for Bitmap {}
// SAFETY: as above.
unsafe impl Sync for Bitmap {}

impl Bitmap {
    /// For `pages` pages of `granule` bytes, all set.
    pub fn new(pages: u64, granule: u64, memslot: Option<Memslot>) -> Result<Self> {
        let frames_per_page = granule / FRAME;
        let words = (pages * frames_per_page).div_ceil(64) as usize;
        let len = (words * 8).next_multiple_of(rustix::param::page_size());
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, prot, MapFlags::PRIVATE) }
            .map_err(|e| Error::system("mapping a userfault bitmap", e.raw_os_error()))?;
        let words = NonNull::new(at.cast()).ok_or_else(|| Error::new(libc::ENOMEM, "no userfault bitmap"))?;
        let bitmap = Self { words, len, frames_per_page, memslot, armed: Mutex::new(Armed::Off) };
        bitmap.set(&(0..pages));
        Ok(bitmap)
    }

    /// What goes into `kvm_userspace_memory_region2.userfault_bitmap`.
    pub fn address(&self) -> u64 {
        self.words.as_ptr() as u64
    }

    /// Whether the memslot is the library's to change.
    pub fn sets_memslot(&self) -> bool {
        self.memslot.is_some()
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped with this length and zeroed at first; atomics are what is in it.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), self.len / 8) }
    }

    fn set(&self, pages: &Range<u64>) {
        self.each_word(pages, |word, mask| {
            word.fetch_or(mask, Ordering::Release);
        });
    }

    /// With release order: who sees the bit clear sees the bytes.
    fn clear(&self, pages: &Range<u64>) {
        self.each_word(pages, |word, mask| {
            word.fetch_and(!mask, Ordering::Release);
        });
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

impl Drop for Bitmap {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length. A memslot that the library sets has been changed before, for good
        // (`Armed::Over`); a host that sets its own was told to change it before.
        let _ = unsafe { rustix::mm::munmap(self.words.as_ptr().cast(), self.len) };
    }
}

/// A VM's bitmaps, with a userfaultfd underneath.
pub struct KvmBitmap {
    under: Userfaultfd,
    vm: OwnedFd,
}

impl KvmBitmap {
    /// `vm` is the library's own descriptor of the VM.
    pub fn new(under: Userfaultfd, vm: OwnedFd) -> Self {
        Self { under, vm }
    }

    /// Makes KVM look at the slot's bitmap or not, where the memslot is the library's to set. Waits for KVM to be done
    /// with the memslot as it was. Turning it on makes KVM drop what it has mapped of the memslot, so that bits that
    /// were set before count for all of it; turning it off lets it map huge pages again. `still` is asked when nobody
    /// else can be changing it any more.
    fn arm(&self, slot: &Slot, to: Armed, still: impl Fn(&Slot) -> bool) -> std::result::Result<(), Errno> {
        let Some(bitmap) = &slot.kvm.bitmap else { return Ok(()) };
        let Some(memslot) = bitmap.memslot else { return Ok(()) };
        let mut armed = lock(&bitmap.armed);
        if *armed == to || *armed == Armed::Over || !still(slot) {
            return Ok(());
        }
        let on = to == Armed::On;
        if !on && *armed == Armed::Off {
            *armed = to;
            return Ok(());
        }
        let mut region = kvm_userspace_memory_region2 {
            slot: memslot.id,
            flags: memslot.flags | if on { KVM_MEM_USERFAULT } else { 0 },
            guest_phys_addr: slot.gpa,
            memory_size: slot.len,
            userspace_addr: slot.hva_of(0).map_or(0, |(hva, _)| hva),
            userfault_bitmap: if on { bitmap.address() } else { 0 },
            ..Default::default()
        };
        set_memslot(&self.vm, &mut region)?;
        *armed = to;
        Ok(())
    }
}

/// KVM_SET_USER_MEMORY_REGION2.
pub fn set_memslot(vm: &OwnedFd, region: &mut kvm_userspace_memory_region2) -> std::result::Result<(), Errno> {
    // SAFETY: the struct that the request was computed from; what it points to outlives the memslot.
    unsafe { kvm_ioctl::call(vm.as_fd(), KVM_SET_USER_MEMORY_REGION2, region) }.map(drop)
}

impl Mechanism for KvmBitmap {
    fn id(&self) -> u32 {
        self.under.id()
    }

    fn gate(&self) -> &Gate {
        self.under.gate()
    }

    fn queues(&self) -> usize {
        self.under.queues()
    }

    fn inlet(&self, queue: usize) -> Option<BorrowedFd<'_>> {
        self.under.inlet(queue)
    }

    fn vcpu_exits(&self) -> bool {
        true
    }

    fn read(&self, queue: usize, room: usize, out: &mut Vec<Message>) -> std::result::Result<Left, i32> {
        self.under.read(queue, room, out)
    }

    fn attach(&self, slot: &Slot) -> Result<()> {
        if let Some(bitmap) = &slot.kvm.bitmap {
            let mut from = 0;
            while let Some(run) = slot.pages.first_run(from..slot.pages.total(), State::Present, u64::MAX) {
                from = run.end;
                bitmap.clear(&run);
            }
        }
        self.under.attach(slot)
    }

    fn attached(&self, slot: &Slot) -> Result<()> {
        // Until now vCPUs are caught by the userfaultfd. What is whole by now needs no exits.
        self.arm(slot, Armed::On, |slot| !slot.whole())
            .map_err(|e| Error::system("KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_USERFAULT", e.raw_os_error()))
    }

    fn detach(&self, slot: &Slot, in_use: bool) {
        self.under.detach(slot, in_use);
    }

    fn detached(&self, slot: &Slot) {
        let _ = self.arm(slot, Armed::Over, |_| true);
    }

    fn completed(&self, slot: &Slot) {
        // A page may have been discarded since.
        let _ = self.arm(slot, Armed::Off, Slot::whole);
    }

    fn place(&self, slot: &Slot, pages: &Range<u64>) -> std::result::Result<Option<NonNull<u8>>, i32> {
        self.under.place(slot, pages)
    }

    fn install(&self, slot: &Slot, pages: &Range<u64>, content: Content) -> Installed {
        if let Some(bitmap) = slot.kvm.bitmap.as_ref().filter(|_| !content.is_poison()) {
            // The userfaultfd still holds the pages until they are whole. A vCPU that comes now waits there for a
            // moment.
            bitmap.clear(pages);
        }
        self.under.install(slot, pages, content)
    }

    fn there(&self, slot: &Slot, pages: &Range<u64>) -> Option<Vec<Range<u64>>> {
        self.under.there(slot, pages)
    }

    fn wake(&self, slot: &Slot, pages: &Range<u64>) {
        self.under.wake(slot, pages);
    }

    fn wake_range(&self, hva: Range<u64>) {
        self.under.wake_range(hva);
    }

    fn before_drop(&self, slot: &Slot) -> std::result::Result<(), i32> {
        self.arm(slot, Armed::On, |_| true).map_err(|e| e.raw_os_error())
    }

    fn drop_pages(&self, slot: &Slot, pages: &Range<u64>) -> std::result::Result<(), i32> {
        // A bit has no effect on what KVM has mapped; dropping the page takes it out of KVM's mappings, so the bit
        // first.
        if let Some(bitmap) = &slot.kvm.bitmap {
            bitmap.set(pages);
        }
        self.under.drop_pages(slot, pages).inspect_err(|_| {
            // Whatever is there now, the userfaultfd knows of it.
            if let Some(bitmap) = &slot.kvm.bitmap {
                bitmap.clear(pages);
            }
        })
    }

    fn close_off(&self, slot: &Slot, pages: &Range<u64>) -> bool {
        self.under.close_off(slot, pages)
    }

    fn alive(&self) -> bool {
        self.under.alive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_follow_pages_across_words() {
        let bitmap = Bitmap::new(200, FRAME, None).unwrap();
        assert_eq!(bitmap.words()[0].load(Ordering::Relaxed), u64::MAX);
        assert_eq!(bitmap.words()[3].load(Ordering::Relaxed), 0xff);
        bitmap.clear(&(60..130));
        assert_eq!(bitmap.words()[0].load(Ordering::Relaxed), (1 << 60) - 1);
        assert_eq!(bitmap.words()[1].load(Ordering::Relaxed), 0);
        assert_eq!(bitmap.words()[2].load(Ordering::Relaxed), u64::MAX << 2);
        bitmap.set(&(64..65));
        assert_eq!(bitmap.words()[1].load(Ordering::Relaxed), 1);
    }

    #[test]
    fn a_huge_page_is_many_frames() {
        let bitmap = Bitmap::new(2, 2 << 20, None).unwrap();
        bitmap.clear(&(1..2));
        let ones: u32 = bitmap.words().iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum();
        assert_eq!(ones, 512);
    }
}
