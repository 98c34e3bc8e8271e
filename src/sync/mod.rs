//! The source of locks, atomics, condition variables, threads and time for the whole crate. A build chooses:
//!
//! | `--cfg` | purpose | backend |
//! |---|---|---|
//! | none | the library | std, and nothing in between |
//! | `loom` | the exhaustive models, `tests/loom_*.rs` | loom; time is std's |
//! | `shuttle` | the simulation, `tests/simulation` | shuttle, with a clock of its own |
//! | `kuf_tsan` | ThreadSanitizer, `tests/check/sanitize.sh` | libpthread's locks, which it knows |
//!
//! No other file of the crate names `std::sync`, `std::thread`, `std::thread_local` or `std::time::Instant`.
//!
//! Another backend adds one line to each of the three choices: here, in `thread.rs` and in `time.rs`.

pub mod thread;
pub mod time;

// All backends use these types of std: they do not influence the schedule.
pub use std::sync::{Arc, Once, PoisonError, TryLockError};

#[cfg(kuf_tsan)]
mod pthread;

#[cfg(kuf_tsan)]
mod backend {
    pub use super::pthread::*;
    pub use crossbeam_channel as channel;
    pub use std::sync::atomic;
    pub use std::thread_local;
}

#[cfg(shuttle)]
mod simulated;

#[cfg(not(any(loom, shuttle, kuf_tsan)))]
mod backend {
    pub use crossbeam_channel as channel;
    pub use std::sync::{atomic, Condvar, Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
    pub use std::thread_local;
}

#[cfg(loom)]
mod backend {
    pub use loom::sync::{atomic, Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
    pub use loom::thread_local;
    pub use std::sync::OnceLock;
}

#[cfg(shuttle)]
mod backend {
    pub use super::simulated::*;
}

pub use backend::*;

// A panic while a lock was held has already failed the service, and the data behind the lock is still right. So each of
// these functions takes the guard out of the error.

/// Locks `mutex`.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes `lock` shared.
pub fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

/// Takes `lock` exclusively.
pub fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// Takes `lock` exclusively if it is free for that now.
pub fn try_write<T>(lock: &RwLock<T>) -> Option<RwLockWriteGuard<'_, T>> {
    taken(lock.try_write())
}

/// Takes `lock` shared if it is free for that now.
pub fn try_read<T>(lock: &RwLock<T>) -> Option<RwLockReadGuard<'_, T>> {
    taken(lock.try_read())
}

fn taken<G>(result: Result<G, TryLockError<G>>) -> Option<G> {
    match result {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Waits on `condvar`; it may return with no notification.
pub fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// As [`wait`], but for `most` at the longest. The second value says whether that time has passed.
pub fn wait_timeout<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    most: time::Duration,
) -> (MutexGuard<'a, T>, bool) {
    let (guard, end) = condvar.wait_timeout(guard, most).unwrap_or_else(PoisonError::into_inner);
    (guard, end.timed_out())
}
