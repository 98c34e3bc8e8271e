//! One memory slot: its pages, their owners, and where its host mapping is now.

use std::collections::BTreeMap;
use std::ops::{Deref, Range};

use super::huge::Huge;
use rustix::io::Errno;

use crate::abi::KUF_KVM_FAULT;
use crate::alloc::NoMemory;
use crate::caller::{Keep, Opaque};
use crate::error::{words, Error};
use crate::mapping::Region;
use crate::mechanism::{Binding, Content, Facts, ForKvm, Mechanism};
use crate::pages::claims::{Claims, Id, Owner, Terms, Waits};
use crate::pages::readahead::Streams;
use crate::pages::{Pages, State};
use crate::source::Source;
use crate::stats::all_blocked::Wait;
use crate::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use crate::sync::time::Instant;
use crate::sync::{lock, wait, wait_timeout, Arc, Condvar, Mutex, MutexGuard};

/// A fault that waits for a page that another thread is filling.
pub struct Waiter {
    /// The page it is for.
    pub page: u64,
    /// Its thread's wait.
    pub wait: Wait,
    /// KUF_FAULT_* bits.
    pub flags: u32,
    /// The forked view that faulted; None: the slot itself.
    pub fork: Option<Arc<Slot>>,
}

impl Waits for Waiter {
    fn page(&self) -> u64 {
        self.page
    }

    /// Unknown threads count as one: they wait for the same page. But a thread that is blocked inside KVM differs from one
    /// that has left KVM_RUN: poison does not end its wait.
    fn is_again(&self, earlier: &Self) -> bool {
        let of = |waiter: &Self| (waiter.page, waiter.wait.thread, waiter.flags & KUF_KVM_FAULT);
        let view = |waiter: &Self| waiter.fork.as_ref().map(Arc::as_ptr);
        of(self) == of(earlier) && view(self) == view(earlier)
    }
}

/// The pages of a slot for which threads inside KVM wait, or may wait.
#[derive(Default)]
pub struct KvmWaits {
    /// Pages that KVM itself uses, in its own right.
    pub owned: Mutex<Vec<Range<u64>>>,
    /// Poisoned pages for which a thread still waits inside KVM, and whether kuf_kvm_quiesce has reported them.
    pub parked: Mutex<BTreeMap<u64, bool>>,
}

/// A memory slot, or a forked child's view of one. Where it is mapped is its [`Region`], to which it dereferences.
pub struct Slot {
    region: Arc<Region>,
    /// kuf_memory.opaque, handed back in callbacks.
    pub opaque: Opaque,
    /// How faults on its pages are caught.
    pub mechanism: Arc<dyn Mechanism>,
    /// Existing pages that the library did not install are the guest's own.
    pub populated: bool,
    /// KUF_MEMORY_FILL_ALL: every page is asked for, also those that the file holds.
    pub fills_all: bool,
    /// Fills look for pages of zeroes.
    pub detects_zero: bool,
    /// The owner of the memory, if the caller has passed it to the slot.
    _keep: Option<Keep>,
    /// Where its pages come from; None: the fill callback, or kuf_read.
    pub source: Option<Arc<dyn Source>>,
    /// The slot this is a forked child's view of.
    pub parent: Option<Arc<Slot>>,
    /// Its binding to the mechanism.
    pub binding: Box<dyn Binding>,
    /// Its pages that threads inside KVM use or wait for.
    pub kvm: KvmWaits,
    /// Its pages may be huge ones.
    pub huge: Huge,
    /// Page states: any thread reads them, and changes them with `claims` locked.
    pub pages: Pages,
    /// 0, or the errno with which the memory or its process went away.
    pub gone: AtomicI32,
    /// A thread unregisters it, or has done so. No other thread may: the memory is the caller's again when that thread has
    /// returned.
    pub detached: AtomicBool,
    /// Some page of it was neither filled nor poisoned nor made inaccessible: the slot must stay registered for ever, for
    /// its pages would read as zeroes.
    pub stays: AtomicBool,
    /// How many calls are about to remove it: readahead stops meanwhile.
    pub removing: AtomicU32,
    /// How many threads are in a callback for it or a view of it, or read the caller's memory for it.
    pub pins: AtomicU32,
    /// Where access to it is sequential. Locked after `claims`.
    pub streams: Mutex<Streams>,
    claims: Mutex<Claims<Waiter>>,
    settled: Condvar,
}

/// The parts that a slot is made of.
pub struct Parts {
    pub region: Region,
    pub opaque: Opaque,
    pub mechanism: Arc<dyn Mechanism>,
    pub source: Option<Arc<dyn Source>>,
    pub parent: Option<Arc<Slot>>,
    pub kvm: ForKvm,
    pub huge: bool,
    pub populated: bool,
    pub fills_all: bool,
    pub detects_zero: bool,
    pub keep: Option<Keep>,
}

impl Deref for Slot {
    type Target = Region;

    fn deref(&self) -> &Region {
        &self.region
    }
}

impl Slot {
    /// A slot with every page absent. It has the entries to serve a fault when there is no more memory.
    pub fn new(parts: Parts) -> Result<Self, Error> {
        let Parts { region, opaque, mechanism, source, parent, kvm, huge, populated, fills_all, detects_zero, keep } =
            parts;
        let region = Arc::new(region);
        let binding = mechanism.clone().bind(region.clone(), kvm)?;
        let pages = Pages::new(region.all().end)?;
        let mut claims = Claims::new(region.granule);
        claims.reserve(&pages, &(0..0), false)?;
        Ok(Self {
            region,
            opaque,
            mechanism,
            populated,
            fills_all,
            detects_zero,
            _keep: keep,
            source,
            parent,
            binding,
            kvm: KvmWaits::default(),
            huge: Huge::new(huge),
            pages,
            gone: AtomicI32::new(0),
            detached: AtomicBool::new(false),
            stays: AtomicBool::new(false),
            removing: AtomicU32::new(0),
            pins: AtomicU32::new(0),
            streams: Mutex::default(),
            claims: Mutex::new(claims),
            settled: Condvar::new(),
        })
    }

    /// A forked child's view of `slot`. Private pages that are present now are the child's already. Shared pages are filled
    /// in the root slot only, and mapped in the child when it touches them.
    pub fn forked(slot: &Arc<Slot>, mechanism: Arc<dyn Mechanism>) -> Result<Self, Error> {
        let view = Self::new(Parts {
            region: slot.region.forked()?,
            opaque: slot.opaque,
            mechanism,
            source: slot.source.clone(),
            parent: Some(slot.parent.clone().unwrap_or_else(|| slot.clone())),
            kvm: ForKvm::default(),
            huge: false,
            populated: true,
            fills_all: false,
            detects_zero: slot.detects_zero,
            keep: None,
        })?;
        if slot.shared.is_none() {
            view.begin_as(slot)?;
        }
        Ok(view)
    }

    /// Whether pages of zeroes become holes, so that a thread that needs them present has to install them.
    pub fn leaves_zeroes(&self) -> bool {
        self.detects_zero && !self.private && !self.facts().gates_kvm_only
    }

    /// Books the pages that the child got with its copy of the memory. A page that was given back stays removed for the
    /// child while it is being made zero for the parent.
    fn begin_as(&self, parent: &Slot) -> Result<(), NoMemory> {
        let take = |run: Range<u64>, state| {
            self.pages.reserve_ends(&run)?;
            self.pages.transition(run, State::Absent, state);
            Ok::<(), NoMemory>(())
        };
        let claims = parent.claims();
        let all = 0..parent.pages.total();
        for state in [State::Present, State::Removed] {
            let mut from = 0;
            while let Some(run) = parent.pages.first_run(from..all.end, state, u64::MAX) {
                from = run.end;
                take(run, state)?;
            }
        }
        for run in claims.becoming_zero(all) {
            take(run, State::Removed)?;
        }
        Ok(())
    }

    /// The owners of the pages being filled.
    pub fn claims(&self) -> MutexGuard<'_, Claims<Waiter>> {
        lock(&self.claims)
    }

    /// The same, with room for claims in `pages` and for one waiter. `demand`: a thread waits.
    pub fn claims_for(&self, pages: &Range<u64>, demand: bool) -> Result<MutexGuard<'_, Claims<Waiter>>, NoMemory> {
        let mut claims = self.claims();
        claims.reserve(&self.pages, pages, demand).map(|()| claims)
    }

    /// Calls `each` with the runs that the claim `id` owns of `pages`, until it returns an error, with the claims unlocked.
    pub fn each_held<E>(
        &self,
        id: Id,
        pages: &Range<u64>,
        mut each: impl FnMut(Range<u64>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut from = pages.start;
        loop {
            let held = self.claims().held(&(from..pages.end), id);
            let Some(run) = held else { return Ok(()) };
            from = run.end;
            each(run)?;
        }
    }

    /// Sleeps until something settles or `deadline`. Returns false when time is up.
    pub fn sleep<'a>(
        &self,
        mut claims: MutexGuard<'a, Claims<Waiter>>,
        deadline: Option<Instant>,
    ) -> (MutexGuard<'a, Claims<Waiter>>, bool) {
        claims.sleepers += 1;
        let (mut claims, in_time) = match deadline {
            None => (wait(&self.settled, claims), true),
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                let (claims, expired) = wait_timeout(&self.settled, claims, left);
                (claims, !expired)
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

    /// Runs `change`, which ends claims, with the lock held.
    pub fn settle<T>(&self, change: impl FnOnce(&mut Claims<Waiter>) -> T) -> T {
        let mut claims = self.claims();
        let result = change(&mut claims);
        self.wake_sleepers(&claims);
        result
    }

    /// Stops catching touches of it: see [`Binding::detach`].
    pub fn detach(&self, in_use: bool) {
        let mut from = 0;
        let next = || self.next_poisoned(from).inspect(|run| from = run.end);
        self.binding.detach(&self.pages, &mut std::iter::from_fn(next), in_use);
    }

    /// The constants of its mechanism.
    pub fn facts(&self) -> &Facts {
        self.mechanism.facts()
    }

    /// The content to install for a fault on a present page, so that the toucher continues. None: no install is needed,
    /// because the fault is older than the page's present content.
    pub fn remap(&self) -> Option<Content> {
        let content = if self.shared.is_some() { Content::Map } else { Content::Zero };
        (!self.facts().gates_kvm_only).then_some(content)
    }

    /// Whether fills write to the pages themselves.
    pub fn in_place(&self) -> bool {
        self.shared.is_some() || self.facts().gates_kvm_only
    }

    /// The terms on which a thread of the library claims pages here. `demand`: a thread waits.
    pub fn fill_terms(&self, demand: bool) -> Terms {
        Terms { owner: Owner::Fill, in_place: self.in_place(), demand, speculative: false, since: None }
    }

    /// Drops the bytes that an unused fill may have left in the place of `pages`, where fills write in place. Drops nothing
    /// through a forked child's view: the file belongs to the parent's slot, which alone knows its content.
    pub fn scrub(&self, pages: &Range<u64>) {
        if self.parent.is_some() {
            return;
        }
        if let Some(shared) = &self.shared {
            let _ = shared.punch(&self.bytes_of(pages));
        } else if self.facts().gates_kvm_only {
            let _ = self.drop_or_zero(pages);
        }
    }

    /// Drops the bytes that a shared file holds in the place of absent pages of `pages`: they are not the source's, and must
    /// not turn up at a minor fault.
    pub fn scrub_absent(&self, pages: &Range<u64>) {
        let mut from = pages.start;
        let next = |from| self.pages.first_run(from..pages.end, State::Absent, u64::MAX);
        while let Some(run) = next(from).filter(|_| self.shared.is_some()) {
            from = run.end;
            self.scrub(&run);
        }
    }

    /// The first poisoned run from `page` on.
    pub fn next_poisoned(&self, page: u64) -> Option<Range<u64>> {
        self.claims().next_poisoned(&self.pages, page)
    }

    /// The errno with which the memory went away, if it did.
    pub fn gone(&self) -> Option<Errno> {
        match self.gone.load(Ordering::Acquire) {
            0 => None,
            errno => Some(Errno::from_raw_os_error(errno)),
        }
    }

    /// Refuses a call for memory that went away, or for a slot that was removed since the call has found it.
    pub fn check_there(&self) -> Result<(), Error> {
        match self.gone() {
            None => Ok(()),
            Some(Errno::NOENT) => Err(self.removed()),
            Some(errno) => Err(Error::new(errno, "the process behind this memory slot is gone")),
        }
    }

    /// The slot was removed meanwhile.
    pub fn removed(&self) -> Error {
        Error::new(Errno::NOENT, words!("the memory slot at gpa {:#x} was removed meanwhile", self.gpa))
    }

    /// Whether every page is present or removed.
    pub fn whole(&self) -> bool {
        let _claims = self.claims();
        self.pages.whole()
    }
}
