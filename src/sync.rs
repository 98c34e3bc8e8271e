//! The synchronisation primitives of the page state machine: std's, or loom's when the models in `tests/loom_*.rs` are
//! built with `--cfg loom`. Nothing else in the crate needs the switch.

#[cfg(loom)]
pub use loom::sync::{atomic, Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
pub use std::sync::{atomic, Condvar, Mutex, MutexGuard};

/// Locks `mutex`. A panic while it was held has made the service fatal already; the data behind it is still the truth.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
