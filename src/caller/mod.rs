//! The caller's side of a handle: the trait of the fill callback, and the values that callbacks get. The service knows no
//! other callbacks; the C function pointers are one implementation (`capi::callbacks`), closures are another.

#![deny(missing_docs, missing_debug_implementations)]

mod event;
mod fill;
pub(crate) mod text;

pub use event::{Event, EventKind, LogLevel, OnEvent, OnLog};
pub use fill::{Fill, Filled, Run};

/// A pointer of the caller's which the library only passes back.
#[derive(Clone, Copy, Debug)]
pub struct Opaque(pub *mut std::ffi::c_void);

// SAFETY: the library never dereferences it; the header says that several threads call the callbacks.
unsafe impl Send for Opaque {}
// SAFETY: as above.
unsafe impl Sync for Opaque {}

/// An owner of memory, such as a mapping. The library keeps it for as long as it uses that memory.
pub type Keep = crate::sync::Arc<dyn std::any::Any + Send + Sync>;
