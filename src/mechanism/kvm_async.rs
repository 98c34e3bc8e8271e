//! KVM asynchronous userfaults: pages carry a mark (KVM_MEMORY_ATTRIBUTE_USERFAULT). A vCPU that touches a marked page
//! leaves KVM_RUN; KVM's own access queues the guest frame number, signals an eventfd and waits until the mark is gone.
//!
//! This file is the eventfd's only reader, and counts the entries of the queue: it never reads more entries than were
//! signalled, because a read of an empty queue is a kernel oops on the interface as it was posted. An entry that is
//! lost all the same (there, a failed read has consumed one) starts a sweep: the library's page states are the truth,
//! and the queue is only a hint that a thread waits.
//!
//! Bytes are written straight into the slot's own host mapping: the mark keeps the guest and KVM off them. It does not
//! keep the VMM's own threads off; they call `kuf_ensure`.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use rustix::event::EventfdFlags;
use rustix::io::Errno;

use super::gate::Gate;
use super::userfaultfd::Marker;
use crate::abi::KUF_KVM_FAULT;
use crate::error::{Error, Result};
use crate::mapping::Region;
use crate::mechanism::{Address, Binding, Content, Facts, ForKvm, Installed, Mechanism, Message, Reported, Stop};
use crate::pages::{Pages, State};
use crate::sync::atomic::{fence, AtomicBool, Ordering};
use crate::sync::time::{Duration, Instant};
use crate::sync::{lock, Arc, Mutex};
use crate::uapi::ioctl;
use crate::uapi::kvm::*;

/// How long after an entry was found its signal may still come.
const SIGNAL_PATIENCE: Duration = Duration::from_millis(250);

/// The kernel calls of this mechanism. They are a trait so that tests can give answers that a sound kernel does not.
pub trait Calls: Send + Sync {
    /// The eventfd's count since the last call; 0 when it was not signalled.
    fn signals(&self) -> std::result::Result<u64, Errno>;
    /// KVM_READ_USERFAULT: a guest frame number.
    fn read_fault(&self) -> std::result::Result<u64, Errno>;
    /// KVM_SET_MEMORY_ATTRIBUTES: replaces all attributes of the range.
    fn set_attributes(&self, gpa: u64, len: u64, attributes: u64) -> std::result::Result<(), Errno>;
    /// KVM_USERFAULT_DISABLE: releases every waiting thread.
    fn disable(&self);
    /// The descriptor to poll.
    fn event(&self) -> BorrowedFd<'_>;
}

/// A real VM.
struct Vm {
    fd: OwnedFd,
    event: OwnedFd,
}

impl Vm {
    fn ioctl<T>(&self, request: u32, argument: &mut T) -> std::result::Result<(), Errno> {
        // SAFETY: each caller passes the struct that its request was computed from (asserted in uapi).
        unsafe { ioctl::call(self.fd.as_fd(), request, argument) }.map(drop)
    }

    fn capability(&self, what: u64) -> std::result::Result<(), Errno> {
        let args = [what, self.event.as_raw_fd() as u64, 0, 0];
        self.ioctl(KVM_ENABLE_CAP, &mut kvm_enable_cap { cap: KVM_CAP_USERFAULT_ASYNC, flags: 0, args, pad: [0; 64] })
    }
}

impl Calls for Vm {
    fn signals(&self) -> std::result::Result<u64, Errno> {
        let mut count = [0_u8; 8];
        match rustix::io::read(&self.event, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(errno) => Err(errno),
        }
    }

    fn read_fault(&self) -> std::result::Result<u64, Errno> {
        let mut fault = kvm_fault::default();
        self.ioctl(KVM_READ_USERFAULT, &mut fault).map(|()| fault.address)
    }

    fn set_attributes(&self, gpa: u64, len: u64, attributes: u64) -> std::result::Result<(), Errno> {
        let mut range = kvm_memory_attributes { address: gpa, size: len, attributes, flags: 0 };
        self.ioctl(KVM_SET_MEMORY_ATTRIBUTES, &mut range)
    }

    fn disable(&self) {
        let _ = self.capability(KVM_USERFAULT_DISABLE);
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// The library's count of the kernel's queue.
#[derive(Default)]
struct Queue {
    /// Entries signalled and not read yet.
    credits: u64,
    /// Entries read whose signal has not been seen yet.
    ahead: u64,
    /// When `ahead` became more than zero.
    ahead_since: Option<Instant>,
}

impl Queue {
    fn signalled(&mut self, signals: u64) {
        let known = self.ahead.min(signals);
        self.ahead -= known;
        self.credits = self.credits.saturating_add(signals - known);
        if self.ahead == 0 {
            self.ahead_since = None;
        }
    }

    fn unsignalled(&mut self) {
        self.ahead += 1;
        self.ahead_since.get_or_insert_with(Instant::now);
    }

    /// Entries whose signal will not come any more.
    fn overdue(&mut self) -> u64 {
        match self.ahead_since {
            Some(since) if since.elapsed() >= SIGNAL_PATIENCE => {
                self.ahead_since = None;
                std::mem::take(&mut self.ahead)
            }
            _ => 0,
        }
    }
}

/// One VM's asynchronous userfaults.
pub struct KvmAsync {
    facts: Facts,
    calls: Box<dyn Calls>,
    gate: Gate,
    queue: Mutex<Queue>,
    /// Reading an empty queue is answered with ENOENT, so one may look without a signal.
    drain: bool,
    /// Some marked pages must stay inaccessible: disabling userfaults would expose them.
    keep: AtomicBool,
}

impl KvmAsync {
    /// Enables userfaults on the VM, with an eventfd of the library's own.
    pub fn open(vm: OwnedFd, drain: bool) -> Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::system("eventfd", e))?;
        let vm = Vm { fd: vm, event };
        vm.capability(KVM_USERFAULT_ENABLE).map_err(|errno| match errno {
            Errno::EXIST => Error::new(Errno::EXIST, "userfaults are enabled on this VM already, by another user"),
            Errno::IO => Error::new(Errno::IO, "this VM belongs to another process: only that one can serve it"),
            errno => Error::system("enabling KVM userfaults", errno),
        })?;
        Ok(Self::over(Box::new(vm), drain))
    }

    /// As `new`, over kernel calls that a test may supply.
    pub fn over(calls: Box<dyn Calls>, drain: bool) -> Self {
        let (gate, queue, keep) = (Gate::default(), Mutex::default(), AtomicBool::new(false));
        let facts = Facts {
            queue_name: "KVM's queue of userfaults (KVM_READ_USERFAULT)",
            gates_kvm_only: true,
            vcpu_exits: true,
            needs_polling: drain,
            ..Facts::new()
        };
        Self { facts, calls, gate, queue, drain, keep }
    }
}

impl Mechanism for KvmAsync {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn gate(&self) -> &Gate {
        &self.gate
    }

    fn fd(&self, _queue: usize) -> Option<BorrowedFd<'_>> {
        Some(self.calls.event())
    }

    fn read(&self, _queue: usize, room: usize, out: &mut Vec<Message>) -> std::result::Result<(), Errno> {
        let mut queue = lock(&self.queue);
        queue.signalled(self.calls.signals()?);
        out.extend((0..queue.overdue()).map(|_| Message::Unsignalled));
        let look = self.drain && queue.credits == 0;
        for _ in 0..room {
            if queue.credits == 0 && !look {
                return Ok(());
            }
            match self.calls.read_fault() {
                Ok(gfn) => {
                    let gpa = gfn.saturating_mul(rustix::param::page_size() as u64);
                    out.push(Message::Fault { at: Address::Gpa(gpa), flags: KUF_KVM_FAULT, thread: 0 });
                    match look {
                        true => queue.unsignalled(),
                        false => queue.credits -= 1,
                    }
                }
                // Fewer entries than signals: their threads have stopped waiting.
                Err(Errno::NOENT) => {
                    queue.credits = 0;
                    return Ok(());
                }
                // On the interface as it was posted, an entry was consumed and its page is unknown.
                Err(Errno::FAULT) => {
                    out.push(Message::Lost);
                    if look {
                        return Ok(());
                    }
                    queue.credits -= 1;
                }
                // EIO: the VM is another process's, or dead.
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn bind(self: Arc<Self>, region: Arc<Region>, kvm: ForKvm) -> Result<Box<dyn Binding>> {
        Ok(Box::new(Marked { kvm: self, region, attributes: kvm.attributes }))
    }
}

impl Drop for KvmAsync {
    fn drop(&mut self) {
        if !self.keep.load(Ordering::Relaxed) {
            self.calls.disable();
        }
    }
}

/// A slot whose pages carry marks.
struct Marked {
    kvm: Arc<KvmAsync>,
    region: Arc<Region>,
    /// The attributes that the caller has declared for it.
    attributes: u64,
}

impl Marked {
    /// KVM_SET_MEMORY_ATTRIBUTES replaces all attributes, so the caller's are set again.
    fn set(&self, pages: &Range<u64>, mark: u64) -> std::result::Result<(), Errno> {
        if pages.is_empty() {
            return Ok(());
        }
        let (gpa, len) = self.region.gpa_of(pages);
        self.kvm.calls.set_attributes(gpa, len, self.attributes | mark)
    }

    /// Makes touching `pages` a memory error for this process, in a slot that is under no userfaultfd. Their content is
    /// dropped. False: it could not be done, or not for all of them.
    fn poison(&self, pages: &Range<u64>) -> bool {
        let Ok(marker) = Marker::open() else { return false };
        self.region.drop_content(pages).is_ok()
            && self.region.each_mapped(pages, |at, len| marker.mark(at as u64, len as u64, self.region.granule)).is_ok()
    }
}

impl Reported for Marked {}

impl Binding for Marked {
    fn arm(&self, pages: &Pages) -> Result<()> {
        let all = 0..pages.total();
        let mut marked = self.set(&all, KVM_MEMORY_ATTRIBUTE_USERFAULT);
        let mut from = 0;
        while let Some(run) = pages.first_run(from..all.end, State::Present, u64::MAX).filter(|_| marked.is_ok()) {
            from = run.end;
            marked = self.set(&run, 0);
        }
        marked.map_err(|errno| {
            let _ = self.set(&all, 0);
            match errno {
                Errno::INVAL => Error::new(
                    Errno::INVAL,
                    "KVM_SET_MEMORY_ATTRIBUTES: this VM does not take kvm->attributes on this range",
                ),
                errno => Error::system("KVM_SET_MEMORY_ATTRIBUTES", errno),
            }
        })
    }

    fn detach(&self, pages: &Pages, poisoned: &mut dyn Iterator<Item = Range<u64>>, in_use: bool) {
        for state in [State::Present, State::Removed] {
            let mut from = 0;
            while let Some(run) = pages.first_run(from..pages.total(), state, u64::MAX) {
                from = run.end;
                let _ = self.set(&run, 0);
            }
        }
        // A page whose touch is a memory error needs no mark, and its waiters get that error instead of waiting for ever.
        for closed in poisoned {
            if in_use || !(self.poison(&closed) || self.region.protect(&closed)) {
                self.kvm.keep.store(true, Ordering::Relaxed);
            } else {
                let _ = self.set(&closed, 0);
            }
        }
    }

    fn in_place_buffer(&self, pages: &Range<u64>) -> std::result::Result<Option<NonNull<u8>>, Errno> {
        self.region.own_place(pages).map(Some)
    }

    fn install(&self, pages: &Range<u64>, content: Content) -> Installed {
        let all = pages.end - pages.start;
        let stop = match content {
            Content::Map => {
                // The bytes must be visible before the mark goes: this fence orders the writes before the call, the kernel's
                // locks order the reads after it.
                fence(Ordering::Release);
                match self.set(pages, 0) {
                    Ok(()) => None,
                    Err(Errno::NOMEM) => Some(Stop::NoMemory(Errno::NOMEM)),
                    Err(Errno::IO) => Some(Stop::Dead),
                    Err(errno) => Some(Stop::Other(errno)),
                }
            }
            // The mark stays. It does not keep the VMM's own threads off.
            Content::Poison { at_end: false } => {
                let _ = self.poison(pages);
                None
            }
            // The callback's buffer is the page itself: poisoned by `detach`.
            Content::Poison { at_end: true } => None,
            // Everything is written in place here.
            Content::Copy(_) | Content::Move(_) | Content::Zero | Content::Verify => Some(Stop::Unsupported),
        };
        Installed { pages: if stop.is_none() { all } else { 0 }, stop }
    }

    fn drop_pages(&self, pages: &Range<u64>) -> std::result::Result<(), Errno> {
        // The mark is set first: a vCPU that touches the page in between waits for its new bytes.
        self.set(pages, KVM_MEMORY_ATTRIBUTE_USERFAULT)?;
        self.region.drop_or_zero(pages)
    }

    fn make_inaccessible(&self, _pages: &Range<u64>) -> bool {
        // The mark does.
        true
    }
}
