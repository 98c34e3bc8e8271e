//! The interface for Rust programs: a handle is a [`Kuf`], which Drop ends. Only the functions that declare memory to
//! be the guest's are `unsafe`. `capi` is a thin layer over the same types: it converts the structs of `kuf.h` to
//! [`Options`] and [`Memory`], and has the same handle inside (`door`).

#![deny(missing_docs, missing_debug_implementations)]

pub(crate) mod checks;
pub(crate) mod door;
mod end;
mod fault;
pub(crate) mod kuf;
pub(crate) mod memory;
pub(crate) mod options;
mod probe;
mod progress;
mod settings;
mod slot;
pub(crate) mod source;
#[cfg(feature = "vm-memory")]
mod vm_memory;

pub use end::{Discard, End};
pub use fault::Fault;
pub use kuf::Kuf;
pub use memory::Memory;
pub use options::Options;
pub use probe::{probe, Feature, Mechanism, Probe};
pub use progress::{BlockTime, Progress, Stats};
pub use settings::Settings;
pub use slot::Slot;
pub use source::Source;

pub use crate::abi::kuf_histogram as Histogram;
pub use crate::caller::{Event, EventKind, Fill, Filled, Keep, LogLevel, Run};
pub use crate::error::{Error, Result};
pub use rustix::io::Errno;
