//! A KVM whose queue of userfaults breaks the interface: the test double behind [`Calls`], at the ioctls and the
//! eventfd. All code above it is the library's.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use crate::abi::*;
use crate::mechanism::kvm_async::{Calls, KvmAsync};
use crate::service::background::populate::populate_now;
use crate::service::config::{Config, NewMemory, Which};
use crate::service::tests::rig::{
    self, address, byte_at, config, mapping, memory, pattern, Caller, PAGE, PAGES, PATIENCE,
};
use crate::sync::thread::JoinHandle;
use crate::sync::{thread, Arc, Condvar, Mutex, MutexGuard};
use crate::uapi::kvm::KVM_MEMORY_ATTRIBUTE_USERFAULT as MARK;

pub type Rig = rig::Rig<FakeKvm>;

/// Where the slot is, so that a gfn is never a page number by luck.
pub const GPA: u64 = 7 << 20;
/// An attribute of the caller's own, which the library keeps.
const PRIVATE: u64 = 1 << 3;

/// The faults of this kernel.
#[derive(Default, Clone, Copy)]
pub struct Wrong {
    pub newest_first: bool,
    /// Entries to be taken off with EFAULT and no answer.
    pub lose: u64,
    /// Signals to be left out.
    pub drop_signals: u64,
    /// Attribute changes to be refused with ENOMEM.
    pub no_memory: u64,
    /// Every read fails with this.
    pub fail: Option<Errno>,
}

#[derive(Default)]
pub struct State {
    pub wrong: Wrong,
    /// The gfns that KVM keeps closed.
    pub marked: BTreeSet<u64>,
    entries: VecDeque<u64>,
    /// Reads while the queue was empty and no signal was outstanding: an oops on the interface as it was posted.
    over_reads: u64,
    /// Signals that no read has used yet.
    outstanding: u64,
    may_look: bool,
    disabled: bool,
    /// Pages that took no memory when they were opened.
    pub empty: Vec<u64>,
    /// Violations of the interface.
    complaints: Vec<String>,
}

/// A KVM whose vCPUs are threads of the test.
pub struct FakeKvm {
    state: Mutex<State>,
    changed: Condvar,
    event: OwnedFd,
    hva: u64,
}

impl FakeKvm {
    fn new(hva: u64) -> Arc<Self> {
        let event = crate::service::eventfd().unwrap();
        Arc::new(Self { state: Mutex::default(), changed: Condvar::new(), event, hva })
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn goes_wrong(&self, wrong: Wrong) {
        self.state().wrong = wrong;
    }

    pub fn is_marked(&self, gfn: u64) -> bool {
        self.state().marked.contains(&gfn)
    }

    fn signal(&self, state: &mut State) {
        if state.wrong.drop_signals > 0 {
            state.wrong.drop_signals -= 1;
            return;
        }
        state.outstanding += 1;
        rustix::io::write(&self.event, &1_u64.to_ne_bytes()).unwrap();
    }

    /// An entry for which no vCPU waits.
    pub fn queue(&self, gfn: u64) {
        let mut state = self.state();
        state.entries.push_back(gfn);
        self.signal(&mut state);
    }

    /// A signal with no entry.
    pub fn signal_only(&self) {
        let mut state = self.state();
        self.signal(&mut state);
    }

    /// KVM's own access: the first byte of a page, when it may be read. None: the page stayed closed for too long.
    fn access(self: &Arc<Self>, gfn: u64) -> JoinHandle<Option<u8>> {
        let kvm = self.clone();
        let mut state = kvm.state();
        if state.marked.contains(&gfn) {
            state.entries.push_back(gfn);
            kvm.signal(&mut state);
        }
        drop(state);
        thread::spawn(move || {
            let closed = |state: &mut State| state.marked.contains(&gfn) && !state.disabled;
            let (_state, end) = kvm.changed.wait_timeout_while(kvm.state(), PATIENCE, closed).unwrap();
            if end.timed_out() {
                None
            } else {
                kvm.byte(gfn)
            }
        })
    }

    fn hva_of(&self, gfn: u64) -> u64 {
        self.hva + gfn * PAGE - GPA
    }

    fn resident(&self, gfn: u64) -> bool {
        let mut resident = 0;
        // SAFETY: looks up one page and writes one byte.
        let looked = unsafe { libc::mincore(address(self.hva_of(gfn)), PAGE as usize, &mut resident) } == 0;
        looked && resident & 1 != 0
    }

    /// None: the page is inaccessible.
    pub fn byte(&self, gfn: u64) -> Option<u8> {
        byte_at(self.hva_of(gfn))
    }
}

struct Handle(Arc<FakeKvm>);

impl Calls for Handle {
    fn signals(&self) -> std::result::Result<u64, Errno> {
        let mut count = [0_u8; 8];
        match rustix::io::read(&self.0.event, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN) => Ok(0),
            Err(errno) => Err(errno),
        }
    }

    fn read_fault(&self) -> std::result::Result<u64, Errno> {
        let mut state = self.0.state();
        if let Some(errno) = state.wrong.fail {
            return Err(errno);
        }
        if state.outstanding == 0 && state.entries.is_empty() {
            state.over_reads += 1;
        }
        state.outstanding = state.outstanding.saturating_sub(1);
        let entry = if state.wrong.newest_first { state.entries.pop_back() } else { state.entries.pop_front() };
        if entry.is_some() && state.wrong.lose > 0 {
            state.wrong.lose -= 1;
            return Err(Errno::FAULT);
        }
        entry.ok_or(Errno::NOENT)
    }

    fn set_attributes(&self, gpa: u64, len: u64, attributes: u64) -> std::result::Result<(), Errno> {
        let mut state = self.0.state();
        let gfns = gpa / PAGE..(gpa + len) / PAGE;
        let marks = attributes & MARK != 0;
        if !marks && state.wrong.no_memory > 0 {
            state.wrong.no_memory -= 1;
            return Err(Errno::NOMEM);
        }
        if attributes & !MARK != PRIVATE {
            state.complaints.push(format!("attributes {attributes:#x} on {gfns:?}"));
        }
        for gfn in gfns {
            if marks {
                state.marked.insert(gfn);
            } else if state.marked.remove(&gfn) {
                if !self.0.resident(gfn) {
                    state.empty.push(gfn);
                }
                if let Some(byte) = self.0.byte(gfn).filter(|byte| *byte != pattern(gfn)) {
                    state.complaints.push(format!("gfn {gfn:#x} opened holding {byte}"));
                }
            }
        }
        self.0.changed.notify_all();
        Ok(())
    }

    fn disable(&self) {
        self.0.state().disabled = true;
        self.0.changed.notify_all();
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

/// A service over a fake KVM with one slot at [`GPA`].
pub fn rig() -> Rig {
    open(false, |config| config)
}

/// As [`rig`], where the caller vouches for ENOENT on an empty queue, so that the library may look without a signal.
pub fn draining_rig() -> Rig {
    open(true, |config| config)
}

/// As [`rig`], with other options.
pub fn rig_with(change: impl FnOnce(Config) -> Config) -> Rig {
    open(false, change)
}

fn open(drain: bool, change: impl FnOnce(Config) -> Config) -> Rig {
    let hva = mapping();
    let (kvm, caller) = (FakeKvm::new(hva), Arc::new(Caller::default()));
    let config = Config {
        mechanism: Which::KvmAsync { vm: crate::service::eventfd().unwrap(), drain },
        user_mode_only: false,
        fill_threads: 1,
        populate_run: 4 * PAGE,
        ..config(&caller)
    };
    let mechanism = Arc::new(KvmAsync::over(Box::new(Handle(kvm.clone())), drain));
    let slot = NewMemory { gpa: GPA, kvm_attributes: PRIVATE, ..memory(hva) };
    Rig::new(caller, change(config), &kvm, mechanism, slot)
}

pub fn gfn(page: u64) -> u64 {
    GPA / PAGE + page
}

/// The gfn of a vCPU's access, and what it will read.
pub type Access = (u64, JoinHandle<Option<u8>>);

/// Fails unless every access ends with the right byte.
pub fn all_right(accesses: impl IntoIterator<Item = Access>) {
    for (gfn, access) in accesses {
        assert_eq!(access.join().unwrap(), Some(pattern(gfn)), "gfn {gfn:#x}");
    }
}

impl Rig {
    pub fn access(&self, page: u64) -> Access {
        (gfn(page), self.kernel.access(gfn(page)))
    }

    /// `kuf_close`, of which the kernel has nothing to complain about.
    pub fn close(&self) {
        self.end(KUF_END_POISON);
        let state = self.kernel.state();
        assert!(state.complaints.is_empty(), "{:?}", state.complaints);
        assert!(state.may_look || state.over_reads == 0, "the queue was read more often than it was signalled");
    }

    /// As [`Rig::close`], with every page filled, so that the bytes of all of them are compared.
    pub fn fill_and_close(&self) {
        assert!(populate_now(&self.service, None, None).is_ok());
        for page in 0..PAGES {
            assert_eq!(self.kernel.byte(gfn(page)), Some(pattern(gfn(page))), "page {page}");
        }
        assert!(self.kernel.state().marked.is_empty());
        self.close();
    }

    /// As [`Rig::fill_and_close`], where the library may look into an empty queue.
    pub fn fill_and_close_after_looking(&self) {
        self.kernel.state().may_look = true;
        self.fill_and_close();
    }
}
