//! The caller's side of a handle: the traits that its callbacks implement, and the values they are given. The service knows
//! no others; the C function pointers are one implementation (`capi::callbacks`), closures are another.

#![deny(missing_docs)]

mod event;
mod fill;
pub(crate) mod text;

pub use event::{Event, EventKind, LogLevel, OnEvent, OnLog};
pub use fill::{Fill, Filled, Run};

/// A value that the library keeps for as long as it needs what the value owns.
pub type Keep = crate::sync::Arc<dyn std::any::Any + Send + Sync>;
