//! Events and log records.

use rustix::io::Errno;

use super::Opaque;
use crate::abi::*;

/// An event callback. It runs on the thread that detected the event, and the library holds no lock.
pub type OnEvent = Box<dyn Fn(&Event<'_>) + Send + Sync>;

/// A log callback.
pub type OnLog = Box<dyn Fn(LogLevel, &str) + Send + Sync>;

/// An event, as the event callback gets it.
#[derive(Clone, Copy, Debug)]
pub struct Event<'a> {
    pub(crate) kind: u32,
    pub(crate) gpa: u64,
    pub(crate) len: u64,
    pub(crate) error: Option<Errno>,
    pub(crate) text: &'a str,
    /// kuf_memory.opaque of the slot. None: it concerns the handle.
    pub(crate) opaque: Option<Opaque>,
}

/// The kind of an [`Event`]. More kinds may be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EventKind {
    /// Pages could not be filled and are poisoned: a touch raises SIGBUS.
    Poisoned,
    /// Pages could not be filled, and the kernel cannot poison them: they were made PROT_NONE.
    Inaccessible,
    /// Every page of a slot is present or removed.
    Complete,
    /// A populate request has ended.
    Populated,
    /// The process behind a slot is gone.
    Gone,
    /// The service of this handle has failed. Unresolved pages stay inaccessible, and calls fail with EIO: end the
    /// handle.
    Fatal,
    /// The process forked, and the library serves the child's memory too; with an error, it does not.
    Forked,
    /// A replay has ended.
    Replayed,
    /// A userfaultfd cannot be read now. The library tries again every millisecond and loses nothing.
    Unreadable,
    /// Another kind, with its number in `kuf.h` or `kuf-kvm.h`: of a KVM mechanism, or newer than this enum.
    Other(u32),
}

/// The level of a log record, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum LogLevel {
    /// A failure.
    Error,
    /// A condition on which the caller may want to act.
    Warn,
    /// Once for each open, slot or request.
    Info,
    /// Once for each kernel event other than a page fault.
    Debug,
}

impl<'a> Event<'a> {
    /// The kind of the event.
    pub fn kind(&self) -> EventKind {
        match self.kind {
            KUF_EVENT_POISONED => EventKind::Poisoned,
            KUF_EVENT_INACCESSIBLE => EventKind::Inaccessible,
            KUF_EVENT_COMPLETE => EventKind::Complete,
            KUF_EVENT_POPULATED => EventKind::Populated,
            KUF_EVENT_GONE => EventKind::Gone,
            KUF_EVENT_FATAL => EventKind::Fatal,
            KUF_EVENT_FORKED => EventKind::Forked,
            KUF_EVENT_REPLAYED => EventKind::Replayed,
            KUF_EVENT_UNREADABLE => EventKind::Unreadable,
            other => EventKind::Other(other),
        }
    }

    /// The first guest physical address concerned; 0 when the event concerns the handle.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Bytes concerned; 0 when the event concerns the handle.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the event concerns no range of guest memory.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `Memory::tag` of the slot. None: the event concerns the handle.
    pub fn tag(&self) -> Option<usize> {
        self.opaque.map(|opaque| opaque.0.addr())
    }

    /// The error behind the event, if there is one.
    pub fn error(&self) -> Option<Errno> {
        self.error
    }

    /// The event in words.
    pub fn text(&self) -> &'a str {
        self.text
    }
}

impl LogLevel {
    /// The level of `kuf.h`.
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Error => KUF_LOG_ERROR,
            Self::Warn => KUF_LOG_WARN,
            Self::Info => KUF_LOG_INFO,
            Self::Debug => KUF_LOG_DEBUG,
        }
    }

    pub(crate) fn of(number: u32) -> Self {
        match number {
            KUF_LOG_ERROR => Self::Error,
            KUF_LOG_WARN => Self::Warn,
            KUF_LOG_INFO => Self::Info,
            _ => Self::Debug,
        }
    }
}
