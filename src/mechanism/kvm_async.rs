//! KVM asynchronous userfaults: pages carry a mark (KVM_MEMORY_ATTRIBUTE_USERFAULT). A vCPU that touches a marked page
//! leaves KVM_RUN; KVM's own access queues the guest frame number, signals an eventfd and waits until the mark is gone.
//!
//! The eventfd has one owner, this file, and counts the entries of the queue: never more are read than were signalled,
//! because reading an empty queue is a kernel oops on the interface as it was posted. What is lost all the same (there,
//! a read that fails has consumed an entry) starts a sweep: the library's page states are the truth, the queue only a
//! hint that somebody waits.
//!
//! Bytes are written straight into the slot's own host mapping: the mark keeps the guest and KVM off them. It does not
//! keep the VMM's own threads off; they call `kuf_ensure`.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{fence, AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;
use rustix::io::Errno;

use super::gate::Gate;
use super::{kvm_ioctl, next_id, Address, Content, Installed, Left, Mechanism, Message, Stop};
use crate::capi::types::KUF_FAULT_KVM;
use crate::error::{Error, Result};
use crate::memory::Slot;
use crate::pages::State;
use crate::sync::{lock, Mutex};
use crate::uapi::kvm::*;

/// How long the signal of an entry that was found without one may be on its way.
const SIGNAL_PATIENCE: Duration = Duration::from_millis(250);

/// The kernel calls of this mechanism, apart from it so that tests can give what a sound kernel does not.
pub trait Calls: Send + Sync {
    /// The eventfd's count since the last call; 0 when it was not signalled.
    fn signals(&self) -> std::result::Result<u64, Errno>;
    /// KVM_READ_USERFAULT: a guest frame number.
    fn read_fault(&self) -> std::result::Result<u64, Errno>;
    /// KVM_SET_MEMORY_ATTRIBUTES: replaces all attributes of the range.
    fn set_attributes(&self, gpa: u64, len: u64, attributes: u64) -> std::result::Result<(), Errno>;
    /// KVM_USERFAULT_DISABLE: releases everybody who waits.
    fn disable(&self);
    /// What to poll.
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
        unsafe { kvm_ioctl::call(self.fd.as_fd(), request, argument) }.map(drop)
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

/// What is known of the kernel's queue.
#[derive(Default)]
struct Queue {
    /// Entries signalled and not read yet.
    credits: u64,
    /// Entries read whose signal has not been seen yet.
    ahead: u64,
    /// Since when there are some.
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
    id: u32,
    calls: Box<dyn Calls>,
    gate: Gate,
    queue: Mutex<Queue>,
    /// Reading an empty queue is answered with ENOENT, so one may look without a signal.
    drain: bool,
    /// Pages are marked that may never be opened: disabling would open them.
    keep: AtomicBool,
}

impl KvmAsync {
    /// Enables userfaults on the VM, with an eventfd of the library's own.
    pub fn open(vm: OwnedFd, drain: bool) -> Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|e| Error::system("eventfd", e.raw_os_error()))?;
        let vm = Vm { fd: vm, event };
        vm.capability(KVM_USERFAULT_ENABLE).map_err(|errno| match errno {
            Errno::EXIST => Error::new(libc::EEXIST, "userfaults are enabled on this VM already, by somebody else"),
            Errno::IO => Error::new(libc::EIO, "this VM belongs to another process: only that one can serve it"),
            errno => Error::system("enabling KVM userfaults", errno.raw_os_error()),
        })?;
        Ok(Self::over(Box::new(vm), drain))
    }

    /// Over calls that may be a test's.
    pub fn over(calls: Box<dyn Calls>, drain: bool) -> Self {
        let (gate, queue, keep) = (Gate::default(), Mutex::default(), AtomicBool::new(false));
        Self { id: next_id(), calls, gate, queue, drain, keep }
    }

    /// KVM_SET_MEMORY_ATTRIBUTES replaces all attributes: what the host declared stays.
    fn set(&self, slot: &Slot, pages: &Range<u64>, mark: u64) -> std::result::Result<(), Errno> {
        if pages.is_empty() {
            return Ok(());
        }
        let (gpa, len) = slot.gpa_of(pages);
        self.calls.set_attributes(gpa, len, slot.kvm.attributes | mark)
    }
}

impl Mechanism for KvmAsync {
    fn id(&self) -> u32 {
        self.id
    }

    fn gate(&self) -> &Gate {
        &self.gate
    }

    fn inlet(&self, _queue: usize) -> Option<BorrowedFd<'_>> {
        Some(self.calls.event())
    }

    fn queue_name(&self) -> &'static str {
        "KVM's queue of userfaults (KVM_READ_USERFAULT)"
    }

    fn marks(&self) -> bool {
        true
    }

    fn vcpu_exits(&self) -> bool {
        true
    }

    fn ticks(&self) -> bool {
        self.drain
    }

    fn read(&self, _queue: usize, room: usize, out: &mut Vec<Message>) -> std::result::Result<Left, i32> {
        let mut queue = lock(&self.queue);
        queue.signalled(self.calls.signals().map_err(|e| e.raw_os_error())?);
        out.extend((0..queue.overdue()).map(|_| Message::Unsignalled));
        let look = self.drain && queue.credits == 0;
        for _ in 0..room {
            if queue.credits == 0 && !look {
                return Ok(Left::Nothing);
            }
            match self.calls.read_fault() {
                Ok(gfn) => {
                    let gpa = gfn.saturating_mul(rustix::param::page_size() as u64);
                    out.push(Message::Fault { at: Address::Gpa(gpa), flags: KUF_FAULT_KVM, thread: 0 });
                    match look {
                        true => queue.unsignalled(),
                        false => queue.credits -= 1,
                    }
                }
                // Fewer entries than signals: who waited has stopped waiting.
                Err(Errno::NOENT) => {
                    queue.credits = 0;
                    return Ok(Left::Nothing);
                }
                // On the interface as it was posted, an entry was consumed and nobody knows which.
                Err(Errno::FAULT) => {
                    out.push(Message::Lost);
                    if look {
                        return Ok(Left::Nothing);
                    }
                    queue.credits -= 1;
                }
                // EIO: the VM is another process's, or dead.
                Err(errno) => return Err(errno.raw_os_error()),
            }
        }
        Ok(if queue.credits == 0 && !look { Left::Nothing } else { Left::More })
    }

    fn attach(&self, slot: &Slot) -> Result<()> {
        let all = 0..slot.pages.total();
        let mut marked = self.set(slot, &all, KVM_MEMORY_ATTRIBUTE_USERFAULT);
        let mut from = 0;
        while let Some(run) = slot.pages.first_run(from..all.end, State::Present, u64::MAX).filter(|_| marked.is_ok()) {
            from = run.end;
            marked = self.set(slot, &run, 0);
        }
        marked.map_err(|errno| {
            let _ = self.set(slot, &all, 0);
            match errno {
                Errno::INVAL => Error::new(
                    libc::EINVAL,
                    "KVM_SET_MEMORY_ATTRIBUTES: this VM does not take memory->kvm_attributes on this range",
                ),
                errno => Error::system("KVM_SET_MEMORY_ATTRIBUTES", errno.raw_os_error()),
            }
        })
    }

    fn detach(&self, slot: &Slot, in_use: bool) {
        for state in [State::Present, State::Removed] {
            let mut from = 0;
            while let Some(run) = slot.pages.first_run(from..slot.pages.total(), state, u64::MAX) {
                from = run.end;
                let _ = self.set(slot, &run, 0);
            }
        }
        // What touching makes an error needs no mark, and who waits for it gets that error instead of waiting for ever.
        for closed in slot.poisoned() {
            if in_use || !(slot.poison(&closed) || slot.protect(&closed)) {
                self.keep.store(true, Ordering::Relaxed);
            } else {
                let _ = self.set(slot, &closed, 0);
            }
        }
    }

    fn place(&self, slot: &Slot, pages: &Range<u64>) -> std::result::Result<Option<NonNull<u8>>, i32> {
        slot.own_place(pages).map(Some)
    }

    fn install(&self, slot: &Slot, pages: &Range<u64>, content: Content) -> Installed {
        let all = pages.end - pages.start;
        let stop = match content {
            Content::InPlace | Content::ZeroInPlace | Content::Shown => {
                // The bytes before the mark: the kernel's locks order what follows, this orders what came before.
                fence(Ordering::Release);
                match self.set(slot, pages, 0) {
                    Ok(()) => None,
                    Err(Errno::NOMEM) => Some(Stop::NoMemory(libc::ENOMEM)),
                    Err(Errno::IO) => Some(Stop::Dead),
                    Err(errno) => Some(Stop::Other(errno.raw_os_error())),
                }
            }
            // The mark stays. It does not keep the VMM's own threads off.
            Content::Poison => {
                let _ = slot.poison(pages);
                None
            }
            // The callback's buffer is the page itself: poisoned by `detach`.
            Content::PoisonAtEnd => None,
            // Everything is written in place here.
            Content::Data(_) | Content::Staged(_) | Content::Zero | Content::There => Some(Stop::Unsupported),
        };
        Installed { pages: if stop.is_none() { all } else { 0 }, stop }
    }

    fn reveal(&self, _slot: &Slot) -> Option<Content> {
        // The mark is gone already, or the entry is of an earlier life of the page.
        None
    }

    fn wake(&self, _slot: &Slot, _pages: &Range<u64>) {}

    fn wake_range(&self, _hva: Range<u64>) {}

    fn drop_pages(&self, slot: &Slot, pages: &Range<u64>) -> std::result::Result<(), i32> {
        // The mark first: a vCPU that touches the page in between waits for what it will be.
        self.set(slot, pages, KVM_MEMORY_ATTRIBUTE_USERFAULT).map_err(|e| e.raw_os_error())?;
        slot.drop_or_zero(pages)
    }

    fn close_off(&self, _slot: &Slot, _pages: &Range<u64>) -> bool {
        // The mark does.
        true
    }
}

impl Drop for KvmAsync {
    fn drop(&mut self) {
        if !self.keep.load(Ordering::Relaxed) {
            self.calls.disable();
        }
    }
}
