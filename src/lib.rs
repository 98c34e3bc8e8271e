//! Guest page faults served for virtual machine monitors.
//!
//! The product is the C ABI (`include/kuf.h`, [`capi`]); Rust VMMs may use it through this crate as well. Where to
//! look:
//!
//! | module | what it is |
//! |---|---|
//! | [`capi`] | the door: every `extern "C"` function, argument checks, the panic guard |
//! | `service` | one handle's fault service: threads, demand, filling, installing, populate, resolve, discard, close |
//! | `pages` | page states: absent, filling, present, removed; two bits each |
//! | `claims` | who owns each page that is being filled |
//! | `memory` | memory slots, address translation, shared files and their second mapping |
//! | `ahead` | which pages a fault brings besides its own |
//! | `crew` | who of the service threads watches the kernel, who rests |
//! | `record` | the file of a recorded working set |
//! | `mechanism` | what differs between kernels, behind one trait: `userfaultfd`, `kvm_bitmap`, `kvm_async` |
//! | `source` | built-in page sources: files, memory, zero |
//! | `uapi` | the kernel's constants and structs; no logic |
//! | `probe`, `stats`, `overlap`, `error`, `panics`, `sync` | this host; counters; who stood still at once; failures in words; panics kept inside; std or loom |
//!
//! `docs/architecture.md` follows one fault through them.

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

#[cfg(not(loom))]
mod ahead;
#[cfg(not(loom))]
pub mod capi;
#[doc(hidden)]
pub mod claims;
#[doc(hidden)]
pub mod crew;
#[cfg(not(loom))]
mod error;
#[cfg(not(loom))]
mod mechanism;
#[cfg(not(loom))]
mod memory;
#[cfg(not(loom))]
mod overlap;
#[doc(hidden)]
pub mod pages;
#[cfg(not(loom))]
mod panics;
#[cfg(not(loom))]
mod probe;
#[cfg(not(loom))]
mod record;
#[cfg(not(loom))]
mod service;
#[cfg(not(loom))]
mod source;
#[cfg(not(loom))]
mod stats;
#[doc(hidden)]
pub mod sync;
#[cfg(test)]
mod testing;
#[cfg(not(loom))]
mod uapi;
