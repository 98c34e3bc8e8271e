//! What only the KVM mechanisms need of the service: a slot's bitmap, the pages that KVM itself uses, quiet times for
//! memslot changes, the sweep after a fault was lost, and who stays inside KVM for a page that cannot be filled.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::config::{NewMemory, NewPopulate, Which};
use super::fill::Run;
use super::host::{refuse_inside_callbacks, refuse_inside_quiet};
use super::{deadline, Fault, Service, Work};
use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::mechanism::kvm_bitmap::Bitmap;
use crate::memory::{ForKvm, Slot, Waiter};
use crate::pages::State;
use crate::sync::lock;

impl Service {
    /// Refuses slot options that do not go with the mechanism, and makes the bitmap where there is one.
    pub(super) fn for_kvm(&self, new: &NewMemory, granule: u64) -> Result<ForKvm> {
        let refuse = |text: &'static str| Err(Error::new(libc::EINVAL, text));
        let which = &self.config.mechanism;
        if !matches!(which, Which::Userfaultfd) && new.uffd.is_some() {
            return refuse("a slot of a KVM mechanism brings no userfaultfd of its own");
        }
        if new.kvm_attributes != 0 && !matches!(which, Which::KvmAsync { .. }) {
            return refuse("memory->kvm_attributes have to be 0 without KUF_MECHANISM_KVM_ASYNC");
        }
        if new.memslot.is_some() && (!matches!(which, Which::KvmBitmap(_)) || self.config.direct) {
            return refuse("KUF_MEMORY_MEMSLOT goes with KUF_MECHANISM_KVM_BITMAP, and not with KUF_OPEN_DIRECT");
        }
        let bitmap = match which {
            Which::KvmBitmap(_) => Some(Bitmap::new(new.len / granule, granule, new.memslot)?),
            _ => None,
        };
        Ok(ForKvm { attributes: new.kvm_attributes, bitmap, ..ForKvm::default() })
    }

    /// `kuf_kvm_bitmap`.
    pub fn kvm_bitmap(&self, gpa: u64) -> Result<u64> {
        self.check_open()?;
        let map = self.memory.map();
        let slot = map.slots().iter().find(|slot| slot.gpa == gpa);
        let slot = slot.ok_or_else(|| Error::new(libc::ENOENT, format!("no memory slot starts at gpa {gpa:#x}")))?;
        let bitmap = slot.kvm.bitmap.as_ref();
        bitmap.map(Bitmap::address).ok_or_else(|| Error::new(libc::ENOTSUP, "this handle's mechanism has no bitmaps"))
    }

    /// `kuf_kvm_owned`.
    pub fn kvm_owned(&self, gpa: u64, len: u64) -> Result<()> {
        refuse_inside_quiet("kuf_kvm_owned")?;
        self.check_open()?;
        let map = self.memory.map();
        let (slot, offsets) = map.range(gpa, len)?;
        let pages = slot.pages_of(&offsets);
        let mut owned = lock(&slot.kvm.owned);
        if !owned.contains(&pages) {
            owned.push(pages);
        }
        Ok(())
    }

    /// A slot's memslot cannot be changed by a thread that somebody inside KVM may be waiting for.
    pub(super) fn refuse_memslot_change(&self, slot: &Slot, call: &str) -> Result<()> {
        match slot.kvm.bitmap.as_ref().is_some_and(Bitmap::sets_memslot) {
            true => refuse_inside_callbacks(call),
            false => Ok(()),
        }
    }

    /// `kuf_quiesce`: returns when nobody is known to wait for a page.
    pub fn quiesce(&self, timeout_ms: i32) -> Result<()> {
        refuse_inside_callbacks("kuf_quiesce")?;
        let deadline = deadline(timeout_ms)?;
        loop {
            self.check_open()?;
            // What was queued before this call is known after this.
            for inlet in self.inlets().iter().filter(|inlet| inlet.queue == 0) {
                self.pump_events(&inlet.mechanism);
            }
            let map = self.memory.map();
            if let Some((slot, page)) = map.slots().iter().find_map(|slot| Some((slot, untold(slot)?))) {
                let text = format!(
                    "KVM waits for the poisoned page at gpa {:#x}: kuf_discard it so that it is filled again, or end \
                     the vCPU",
                    slot.gpa + page * slot.granule
                );
                return Err(Error::new(libc::EHWPOISON, text));
            }
            // First: what was demanded is a claim with a waiter, or served, before it counts as done.
            let queued = self.demanded.load(Ordering::SeqCst) > 0;
            let busy = map.all().find(|slot| slot.claims().waited_for());
            match busy {
                None if !queued => return Ok(()),
                _ if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    return Err(Error::new(libc::ETIMEDOUT, "pages are still waited for"));
                }
                Some(slot) => {
                    let claims = slot.claims();
                    drop(slot.sleep(claims, Some(Instant::now() + Duration::from_millis(1))));
                }
                None => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// A fault was lost.
    pub(super) fn begin_sweep(&self, work: &mut Vec<Work>) {
        if !self.sweep_queued.swap(true, Ordering::AcqRel) {
            work.push(Work::Sweep);
        }
    }

    /// Whatever is still closed may be waited for: KVM's own pages first, for who waits for those holds a vCPU; the
    /// rest is filled in the background.
    pub(super) fn sweep(&self) {
        self.sweep_queued.store(false, Ordering::Release);
        let text = "KVM lost a fault of an unknown page: every closed page may be waited for and has to be filled, \
                    those that KVM itself uses first";
        self.config.host.event(KUF_EVENT_SWEEP, 0, 0, 0, text);
        let map = self.memory.map();
        for slot in map.slots() {
            let owned = lock(&slot.kvm.owned).clone();
            owned.into_iter().for_each(|pages| self.demand(slot, pages));
        }
        for slot in map.slots().iter().filter(|slot| slot.mechanism.marks()) {
            // What the guest gave back is closed too, and needs no source.
            self.open_removed(slot, &(0..slot.pages.total()));
            // Who waits for a poisoned page may be the one whose fault was lost: served when it is discarded.
            for page in slot.poisoned().into_iter().flatten() {
                lock(&slot.kvm.parked).entry(page).or_insert(true);
            }
        }
        if self.serviced() {
            // Refused when there is no slot, and so nothing to sweep.
            let _ = self.populate(NewPopulate { stop: false, sweep: true, range: None, rate: 0 });
        }
    }

    /// Asks for what is absent of `pages` as if somebody waited.
    fn demand(&self, slot: &Arc<Slot>, pages: Range<u64>) {
        if slot.mechanism.marks() {
            self.open_removed(slot, &pages);
        }
        let mut from = pages.start;
        while let Some(run) = slot.pages.first_run(from..pages.end, State::Absent, 1) {
            from = run.end;
            let page = run.start;
            if !self.serviced() {
                self.ask(slot, page, Waiter { page, read_at: Instant::now(), thread: 0, flags: 0, fork: None });
                continue;
            }
            let terms = slot.fill_terms(true);
            let claimed = slot.claims().claim(&slot.pages, page, 1, State::Absent, terms);
            if let Some((id, pages)) = claimed {
                // A failure has poisoned the page and told the host.
                let _ = self.fill(&Run::demand(slot, id, pages, page, 0));
            }
        }
    }

    /// The kernel's queue held faults that the library was not told of.
    pub(super) fn warn_of_signals(&self, work: &mut Vec<Work>) {
        if self.warned.swap(true, Ordering::AcqRel) {
            return;
        }
        let text = "KVM queued a fault and its signal did not come: somebody else reads the library's eventfd, or KVM \
                    dropped it; faults are found by looking twice a second";
        let (kind, text) = (KUF_EVENT_UNSIGNALLED, text.to_owned());
        work.push(Work::Notice { kind, gpa: 0, len: 0, error: 0, text });
    }

    /// Somebody inside KVM waits for a page that is poisoned, and stays there.
    pub(super) fn parked(&self, slot: &Arc<Slot>, pages: Range<u64>) {
        if lock(&slot.kvm.parked).insert(pages.start, false).is_some() {
            return;
        }
        // A discard that came in between has found nobody to serve.
        if !slot.claims().is_poisoned(pages.start) {
            return self.serve_parked(slot, &pages);
        }
        let (gpa, len) = slot.gpa_of(&pages);
        let text = format!(
            "KVM itself waits for guest memory {gpa:#x}..{:#x}, which is poisoned: the vCPU stays in KVM_RUN until it \
             is killed or the page is discarded and filled",
            gpa + len
        );
        self.push(Work::Notice { kind: KUF_EVENT_PARKED, gpa, len, error: libc::EHWPOISON, text });
    }

    /// Pages that were poisoned can be filled again: so they are, for who stayed inside KVM for them.
    pub(super) fn serve_parked(&self, slot: &Arc<Slot>, pages: &Range<u64>) {
        let waited_for: Vec<u64> = {
            let mut parked = lock(&slot.kvm.parked);
            let here: Vec<u64> = parked.range(pages.clone()).map(|(page, _)| *page).collect();
            here.iter().for_each(|page| {
                parked.remove(page);
            });
            here
        };
        for page in waited_for {
            let (slot, flags, read_at) = (slot.clone(), KUF_FAULT_KVM, Instant::now());
            self.push(Work::Fault(Fault { slot, page, flags, thread: 0, read_at }));
        }
    }
}

/// A page that somebody inside KVM waits for in vain, which kuf_quiesce has not told of yet.
fn untold(slot: &Slot) -> Option<u64> {
    let mut parked = lock(&slot.kvm.parked);
    let (page, told) = parked.iter_mut().find(|(_, told)| !**told)?;
    *told = true;
    Some(*page)
}
