//! Threads: `std::thread`, or its counterpart in a model.

#[cfg(not(any(loom, shuttle)))]
pub use std::thread::{available_parallelism, panicking, yield_now};
#[cfg(all(test, not(any(loom, shuttle))))]
pub use std::thread::{scope, spawn, JoinHandle};

/// Sleeps as std's does, which panics where a filter refuses the call. This one returns at once then, and also when a
/// signal comes.
#[cfg(not(any(loom, shuttle)))]
pub fn sleep(time: std::time::Duration) {
    let time = libc::timespec { tv_sec: time.as_secs() as _, tv_nsec: time.subsec_nanos().into() };
    // SAFETY: reads `time`.
    unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &time, std::ptr::null_mut()) };
}

#[cfg(shuttle)]
pub use super::simulated::thread::*;

#[cfg(loom)]
pub use loom::thread::{spawn, yield_now, Builder, JoinHandle};
