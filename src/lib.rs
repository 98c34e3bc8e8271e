//! Guest page faults served for virtual machine monitors.
//!
//! A VMM that restores a snapshot lazily, receives a post-copy migration or keeps guest memory elsewhere must catch the
//! guest's first access to each page, get the page's bytes, install them and let the guest continue. A [`Kuf`] does that for
//! one VM:
//!
//! ```
//! use kuf::{End, Filled, Kuf, Memory, Options, Run};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let options = Options::serviced(|run: &mut Run<'_>| {
//!     run.buf().fill(7);
//!     Filled::Done
//! });
//! // Without `user_mode_only`, accesses of KVM are served too, which needs a privilege.
//! let kuf = Kuf::open(options.user_mode_only())?;
//!
//! # let (len, access) = (1 << 20, libc::PROT_READ | libc::PROT_WRITE);
//! # let guest = unsafe { libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
//! # let guest = guest.cast::<u8>();
//! // SAFETY: `guest` is mapped for as long as the process lives, and the program uses it by raw pointers only.
//! let memory = unsafe { Memory::new(0, len as u64, guest) };
//! let slot = kuf.add_memory(memory)?;
//!
//! // ... run the guest: the closure is called for each page that it touches first ...
//! # // SAFETY: as above.
//! # assert_eq!(unsafe { guest.add(5000).read_volatile() }, 7);
//! slot.ensure(None)?;
//! assert!(slot.progress()?.is_complete());
//!
//! kuf.close(End::Populate)?;
//! # Ok(())
//! # }
//! ```
//!
//! Words: a memory slot is a guest physical range with the host mapping behind it. A page is absent, being filled, present, or
//! removed (the guest gave it back: it reads as zero). To resolve a page is to make it present and wake the threads that are
//! blocked on it. A demand fault has a blocked thread; populate fills pages in the background. Touching a poisoned page raises
//! SIGBUS.
//!
//! The same service has a C ABI (`include/kuf.h`); [`sys`] has its functions and structs. With the feature `vm-memory`, a program
//! adds the regions of that crate without `unsafe`.
//!
//! The modules of the source:
//!
//! | module | content |
//! |---|---|
//! | `abi`, `abi_kvm` | the structs and constants of `kuf.h` and `kuf-kvm.h`: the lowest layer |
//! | `capi` | every `extern "C"` function, the structs of `kuf.h` converted, the panic guard |
//! | `api` | the interface for Rust programs, over which `capi` is a layer; the handle |
//! | `caller` | the trait of the fill callback, and the values that callbacks get |
//! | `service` | one handle: `queues` and `fault` (the path of a fault), `threads`, `background`, `calls` |
//! | `mechanism` | the differences between kernels, behind two traits: `userfaultfd`, `kvm_bitmap`, `kvm_async` |
//! | `memory` | memory slots, address translation, huge pages to fill |
//! | `mapping` | where guest memory is mapped in the host; shared files and their second mapping, fill buffers |
//! | `pages` | page states, two bits each; `claims`, the owner of each page that is being filled; `readahead`, the policy |
//! | `source` | built-in page sources: files, memory, zero |
//! | `os` | questions to Linux about this process: mappings, CPUs, resident pages; copies that do not fault |
//! | `uapi` | the kernel's constants and structs, and the one way into ioctl(2) |
//! | `alloc` | allocations that may be refused, a reserve for those that may not, a table whose room is reserved |
//! | `record_file` | the file of a recorded working set |
//! | `probe`, `stats`, `error`, `panics`, `sync` | this host; counters; failures in words; panics kept inside; std, or a model of it |
//!
//! `docs/architecture.md` follows a fault through them.

#![deny(unsafe_op_in_unsafe_fn)]
#![warn(clippy::undocumented_unsafe_blocks)]

#[cfg(not(loom))]
mod abi;
#[cfg(not(loom))]
mod abi_kvm;
// The models and the simulation, in tests/, use these three modules.
#[cfg(not(loom))]
mod alloc;
#[cfg(loom)]
pub mod alloc;
#[cfg(not(loom))]
mod api;
#[cfg(not(loom))]
mod caller;
#[cfg(not(loom))]
mod capi;
#[cfg(not(loom))]
mod errno;
#[cfg(not(loom))]
mod error;
#[cfg(all(not(loom), any(test, fuzzing)))]
#[doc(hidden)]
pub mod fuzz;
/// The loom model of the leader takes the file alone.
#[cfg(loom)]
#[path = "service/threads/leader.rs"]
pub mod leader;
#[cfg(not(loom))]
mod mapping;
#[cfg(not(loom))]
mod mechanism;
#[cfg(not(loom))]
mod memory;
#[cfg(not(loom))]
mod os;
#[cfg(not(loom))]
mod pages;
#[cfg(loom)]
pub mod pages;
#[cfg(not(loom))]
mod panics;
#[cfg(not(loom))]
mod probe;
#[cfg(not(loom))]
mod record_file;
#[cfg(not(loom))]
mod service;
#[cfg(not(loom))]
mod source;
#[cfg(not(loom))]
mod stats;
#[cfg(not(any(loom, shuttle)))]
mod sync;
#[cfg(any(loom, shuttle))]
pub mod sync;
/// The functions, structs and constants of `kuf.h`, as they are in C. Each struct has a `Default` with its `size` set.
#[cfg(not(loom))]
pub mod sys {
    pub use crate::abi::*;
    pub use crate::capi::*;
}
#[cfg(test)]
mod testing;
#[cfg(not(loom))]
mod uapi;

#[cfg(not(loom))]
pub use api::*;

/// A Rust program that links this crate has an allocator of its own, so this is for the C library only.
#[cfg(all(feature = "reserve", not(any(loom, shuttle))))]
#[global_allocator]
static RESERVE: alloc::reserve::Reserve = alloc::reserve::Reserve::new();
