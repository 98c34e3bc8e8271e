//! One memory slot: its pages, their owners, and where its host mapping is now.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Instant;

use rustix::io::Errno;
use rustix::mm::Advice;

use super::shared::{exist, SharedFile};
use crate::ahead::Streams;
use crate::claims::{Claims, Owner, Terms, Waits};
use crate::mechanism::kvm_bitmap::Bitmap;
use crate::mechanism::userfaultfd::{Marker, Stripes};
use crate::mechanism::Mechanism;
use crate::pages::{Pages, State};
use crate::service::huge::Huge;
use crate::source::Source;
use crate::sync::{lock, Condvar, Mutex, MutexGuard};

/// A pointer of the host's that the library only hands back.
#[derive(Clone, Copy)]
pub struct Opaque(pub *mut c_void);

// SAFETY: the library never looks behind it; the header says that callbacks come on several threads.
unsafe impl Send for Opaque {}
// SAFETY: as above.
unsafe impl Sync for Opaque {}

/// A piece of a slot and the host address it is mapped at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the slot, in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Where.
    pub hva: u64,
}

/// A fault that waits for a page that somebody else is filling.
pub struct Waiter {
    /// The page it is for.
    pub page: u64,
    /// When it was read from the kernel.
    pub read_at: Instant,
    /// The toucher's thread id, or 0.
    pub thread: u32,
    /// KUF_FAULT_* bits.
    pub flags: u32,
    /// The view whose fault it is, when it is not the slot's own.
    pub fork: Option<Arc<Slot>>,
}

impl Waits for Waiter {
    fn page(&self) -> u64 {
        self.page
    }
}

/// What only the KVM mechanisms need to know of a slot.
#[derive(Default)]
pub struct ForKvm {
    /// KVM_MEMORY_ATTRIBUTE_* that the host has declared for it, other than USERFAULT.
    pub attributes: u64,
    /// The bitmap that its memslot has or is to have.
    pub bitmap: Option<Bitmap>,
    /// Pages that KVM itself uses, in its own right.
    pub owned: Mutex<Vec<Range<u64>>>,
    /// Poisoned pages for which somebody has been waiting inside KVM since, and whether kuf_quiesce has said so.
    pub parked: Mutex<BTreeMap<u64, bool>>,
}

/// A memory slot, or a forked child's view of one.
pub struct Slot {
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Page size in bytes: the unit of the states.
    pub granule: u64,
    /// The host's word for it.
    pub opaque: Opaque,
    /// How its pages are opened.
    pub mechanism: Arc<dyn Mechanism>,
    /// Its mapping is MAP_PRIVATE.
    pub private: bool,
    /// The file behind it, when its pages are filled in place.
    pub shared: Option<Arc<SharedFile>>,
    /// Where its pages come from; None: the fill callback, or kuf_read.
    pub source: Option<Arc<dyn Source>>,
    /// The slot this is a forked child's view of.
    pub parent: Option<Arc<Slot>>,
    /// What KVM mechanisms keep of it.
    pub kvm: ForKvm,
    /// Its pages may be huge ones.
    pub huge: Huge,
    /// How several userfaultfds share it; unset: one has it all.
    pub stripes: OnceLock<Stripes>,
    /// States: read freely, changed with `claims` locked.
    pub pages: Pages,
    /// What the host has been told about completion.
    pub complete: AtomicBool,
    /// 0, or the errno with which the memory or its process went away.
    pub gone: AtomicI32,
    /// How many calls are about to take it off the service: nothing is brought ahead of touchers meanwhile.
    pub leaving: AtomicU32,
    /// How many threads are in host code, or in host memory, on behalf of it or of a view of it.
    pub asking: AtomicU32,
    /// Where access to it is sequential. Locked after `claims`.
    pub streams: Mutex<Streams>,
    claims: Mutex<Claims<Waiter>>,
    settled: Condvar,
    extents: RwLock<Vec<Extent>>,
}

/// What a slot is made of.
pub struct Parts {
    pub gpa: u64,
    pub len: u64,
    pub granule: u64,
    pub opaque: Opaque,
    pub mechanism: Arc<dyn Mechanism>,
    pub private: bool,
    pub shared: Option<Arc<SharedFile>>,
    pub source: Option<Arc<dyn Source>>,
    pub parent: Option<Arc<Slot>>,
    pub kvm: ForKvm,
    pub huge: bool,
    pub extents: Vec<Extent>,
}

impl Slot {
    /// A slot with every page absent.
    pub fn new(parts: Parts) -> Self {
        let Parts { gpa, len, granule, opaque, mechanism, private, shared, source, parent, kvm, huge, extents } = parts;
        Self {
            gpa,
            len,
            granule,
            opaque,
            mechanism,
            private,
            shared,
            source,
            parent,
            kvm,
            huge: Huge::new(huge),
            stripes: OnceLock::new(),
            pages: Pages::new(len / granule),
            complete: AtomicBool::new(false),
            gone: AtomicI32::new(0),
            leaving: AtomicU32::new(0),
            asking: AtomicU32::new(0),
            streams: Mutex::default(),
            claims: Mutex::new(Claims::new(granule)),
            settled: Condvar::new(),
            extents: RwLock::new(extents),
        }
    }

    /// A forked child's view of `slot`. What is private and present now is the child's already; what is shared is
    /// filled in the root slot only, and mapped in the child when it is touched there.
    pub fn forked(slot: &Arc<Slot>, mechanism: Arc<dyn Mechanism>) -> Self {
        let view = Self::new(Parts {
            gpa: slot.gpa,
            len: slot.len,
            granule: slot.granule,
            opaque: slot.opaque,
            mechanism,
            private: slot.private,
            shared: slot.shared.clone(),
            source: slot.source.clone(),
            parent: Some(slot.parent.clone().unwrap_or_else(|| slot.clone())),
            kvm: ForKvm::default(),
            huge: false,
            extents: slot.extents(),
        });
        if slot.shared.is_none() {
            for state in [State::Present, State::Removed] {
                let mut from = 0;
                while let Some(run) = slot.pages.first_run(from..slot.pages.total(), state, u64::MAX) {
                    from = run.end;
                    view.pages.transition(run, State::Absent, state);
                }
            }
        }
        view
    }

    /// The owners of the pages being filled.
    pub fn claims(&self) -> MutexGuard<'_, Claims<Waiter>> {
        lock(&self.claims)
    }

    /// Sleeps until something settles or `deadline`. Returns false when time is up.
    pub fn sleep<'a>(
        &self,
        mut claims: MutexGuard<'a, Claims<Waiter>>,
        deadline: Option<Instant>,
    ) -> (MutexGuard<'a, Claims<Waiter>>, bool) {
        claims.sleepers += 1;
        let (mut claims, in_time) = match deadline {
            None => (self.settled.wait(claims).unwrap_or_else(PoisonError::into_inner), true),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let (claims, end) = self.settled.wait_timeout(claims, left).unwrap_or_else(PoisonError::into_inner);
                (claims, !end.timed_out())
            }
        };
        claims.sleepers -= 1;
        (claims, in_time)
    }

    /// Wakes the threads asleep in [`Slot::sleep`].
    pub fn wake_sleepers(&self, claims: &MutexGuard<'_, Claims<Waiter>>) {
        if claims.sleepers > 0 {
            self.settled.notify_all();
        }
    }

    /// The bytes of `pages`, as offsets in the slot.
    pub fn bytes_of(&self, pages: &Range<u64>) -> Range<u64> {
        pages.start * self.granule..pages.end * self.granule
    }

    /// Whether fills write to the pages themselves.
    pub fn in_place(&self) -> bool {
        self.shared.is_some() || self.mechanism.marks()
    }

    /// The terms on which a thread of the library claims pages here. `demand`: somebody waits.
    pub fn fill_terms(&self, demand: bool) -> Terms {
        Terms { owner: Owner::Fill, in_place: self.in_place(), demand, ahead: false, since: None }
    }

    /// Drops what a fill that is not used may have left in the place of `pages`, where fills write in place.
    pub fn scrub(&self, pages: &Range<u64>) {
        if let Some(shared) = &self.shared {
            let _ = shared.punch(&self.bytes_of(pages));
        } else if self.mechanism.marks() {
            let _ = self.drop_or_zero(pages);
        }
    }

    /// Where `pages` are mapped, as pages that exist and may be written. Err is an errno.
    pub fn own_place(&self, pages: &Range<u64>) -> Result<NonNull<u8>, i32> {
        let len = (pages.end - pages.start) * self.granule;
        let (hva, mapped) = self.hva_of(pages.start).ok_or(libc::ENOENT)?;
        if mapped * self.granule < len {
            return Err(libc::ENOENT);
        }
        let at = NonNull::new(hva as *mut u8).ok_or(libc::EFAULT)?;
        // Where the kernel cannot make them exist, before Linux 5.14, they are written without a net.
        exist(at, len as usize).map(|_| at).map_err(|e| e.raw_os_error())
    }

    /// Drops the bytes of `pages`, which are closed by marks; what cannot be dropped (locked shared memory) is zeroed.
    pub fn drop_or_zero(&self, pages: &Range<u64>) -> Result<(), i32> {
        self.drop_content(pages).or_else(|_| {
            let at = self.own_place(pages)?;
            // SAFETY: `own_place` made these bytes writable, and the caller's claim makes them its own.
            unsafe { at.write_bytes(0, ((pages.end - pages.start) * self.granule) as usize) };
            Ok(())
        })
    }

    /// Makes touching `pages` a memory error for this process, in a slot that is under no userfaultfd. What they hold is
    /// dropped. False: it could not be done, or not for all of them.
    pub fn poison(&self, pages: &Range<u64>) -> bool {
        let Ok(marker) = Marker::open() else { return false };
        self.drop_content(pages).is_ok()
            && self.each_mapped(pages, |at, len| marker.mark(at as u64, len as u64, self.granule)).is_ok()
    }

    /// Drops the bytes of `pages`, in this process's mapping and in the file if there is one. Err is an errno.
    pub fn drop_content(&self, pages: &Range<u64>) -> Result<(), i32> {
        let keep = self.private || self.shared.is_some();
        self.each_mapped(pages, |at, len| {
            // Also before punching a hole, which leaves poison marks where they are.
            match advise(at, len, libc::MADV_DONTNEED) {
                // Locked memory (mlock, mlockall).
                Err(Errno::INVAL) => advise(at, len, MADV_DONTNEED_LOCKED)?,
                other => other?,
            }
            if keep {
                Ok(())
            } else {
                advise(at, len, libc::MADV_REMOVE)
            }
        })
        .map_err(|e| e.raw_os_error())?;
        match &self.shared {
            Some(shared) => shared.punch(&self.bytes_of(pages)).map_err(|e| e.raw_os_error()),
            None => Ok(()),
        }
    }

    /// The pages that nobody could fill.
    pub fn poisoned(&self) -> crate::claims::Runs {
        self.claims().poisoned()
    }

    /// Makes `pages` inaccessible. False: it could not be done.
    pub fn protect(&self, pages: &Range<u64>) -> bool {
        let none = rustix::mm::MprotectFlags::empty();
        // SAFETY: guest memory of a slot; the pages hold nothing and may never be seen.
        self.each_mapped(pages, |at, len| unsafe { rustix::mm::mprotect(at, len, none) }).is_ok()
    }

    /// Calls `act` with each mapped piece of `pages`.
    fn each_mapped(
        &self,
        pages: &Range<u64>,
        act: impl Fn(*mut c_void, usize) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        self.mapped(pages).try_for_each(|(part, hva)| {
            let len = (part.end - part.start) * self.granule;
            act(hva as *mut c_void, len as usize)
        })
    }

    /// The mapped parts of `pages`, in order, and where they are. What the host has unmapped is left out.
    pub fn mapped(&self, pages: &Range<u64>) -> impl Iterator<Item = (Range<u64>, u64)> + '_ {
        let mut rest = pages.clone();
        std::iter::from_fn(move || {
            let (part, hva) = self.next_mapped(&rest)?;
            rest.start = part.end;
            Some((part, hva))
        })
    }

    fn next_mapped(&self, pages: &Range<u64>) -> Option<(Range<u64>, u64)> {
        let bytes = self.bytes_of(pages);
        let extents = self.extents.read().unwrap_or_else(PoisonError::into_inner);
        let first = extents.partition_point(|e| e.offset + e.len <= bytes.start);
        let extent = extents.get(first).filter(|e| e.offset < bytes.end && !bytes.is_empty())?;
        let (start, end) = (extent.offset.max(bytes.start), (extent.offset + extent.len).min(bytes.end));
        Some((start / self.granule..end / self.granule, extent.hva + (start - extent.offset)))
    }

    /// The pages that `offsets` (in bytes) touches.
    pub fn pages_of(&self, offsets: &Range<u64>) -> Range<u64> {
        offsets.start / self.granule..offsets.end.div_ceil(self.granule)
    }

    /// Guest physical range of `pages`.
    pub fn gpa_of(&self, pages: &Range<u64>) -> (u64, u64) {
        (self.gpa + pages.start * self.granule, (pages.end - pages.start) * self.granule)
    }

    /// Where `page` is mapped, and how many pages follow there without a gap. None when it was unmapped.
    pub fn hva_of(&self, page: u64) -> Option<(u64, u64)> {
        let offset = page * self.granule;
        let extents = self.extents.read().unwrap_or_else(PoisonError::into_inner);
        let after = extents.partition_point(|e| e.offset <= offset);
        let extent = extents.get(after.checked_sub(1)?)?;
        let within = offset - extent.offset;
        (within < extent.len).then(|| (extent.hva + within, (extent.len - within) / self.granule))
    }

    /// Where the slot is mapped now.
    pub fn extents(&self) -> Vec<Extent> {
        self.extents.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The kernel moved (`to` given) or unmapped what was at `hva`. Returns whether any of it was this slot's.
    pub fn moved(&self, hva: Range<u64>, to: Option<u64>) -> bool {
        let mut extents = self.extents.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = Vec::with_capacity(extents.len() + 2);
        let mut touched = false;
        for e in extents.iter() {
            let (start, end) = (hva.start.max(e.hva), hva.end.min(e.hva + e.len));
            if start >= end {
                next.push(*e);
                continue;
            }
            touched = true;
            if e.hva < start {
                next.push(Extent { len: start - e.hva, ..*e });
            }
            if let Some(to) = to {
                let offset = e.offset + (start - e.hva);
                next.push(Extent { offset, len: end - start, hva: to + (start - hva.start) });
            }
            if end < e.hva + e.len {
                next.push(Extent { offset: e.offset + (end - e.hva), len: e.hva + e.len - end, hva: end });
            }
        }
        next.sort_by_key(|e| e.offset);
        *extents = next;
        touched
    }

    /// The errno with which the memory went away, if it did.
    pub fn gone(&self) -> Option<i32> {
        match self.gone.load(Ordering::Acquire) {
            0 => None,
            errno => Some(errno),
        }
    }

    /// Drops the slot's pages from the mapping; a shared file keeps them.
    pub fn unmap_pages(&self) {
        for extent in self.extents() {
            // SAFETY: a shared mapping of a slot that the host has put in the library's hands; no byte is lost.
            let _ =
                unsafe { rustix::mm::madvise(extent.hva as *mut c_void, extent.len as usize, Advice::LinuxDontNeed) };
        }
    }

    /// Whether every page is present or removed.
    pub fn whole(&self) -> bool {
        self.pages.count(State::Absent) == 0 && self.pages.count(State::Filling) == 0
    }

    /// Whether no page needs a source any more: none absent and none on its way. Poisoned pages never will be present.
    pub fn settled_for_good(&self) -> bool {
        if self.pages.count(State::Absent) > 0 {
            return false;
        }
        self.pages.count(State::Filling) == 0 || {
            let tally = self.claims().tally();
            tally.filling + tally.deferred == 0
        }
    }
}

/// Since Linux 5.18; the C library may not know it.
const MADV_DONTNEED_LOCKED: libc::c_int = 24;

fn advise(at: *mut c_void, len: usize, advice: libc::c_int) -> Result<(), Errno> {
    // SAFETY: guest memory of a slot that the host has put in the library's hands, to be dropped as it asked.
    match unsafe { libc::madvise(at, len, advice) } {
        0 => Ok(()),
        // SAFETY: errno of this thread.
        _ => Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() })),
    }
}
