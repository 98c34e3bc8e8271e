//! The backend of the simulation: locks, atomics, threads and time under a schedule that a seed decides.
//!
//! Every thread is a task of shuttle, all tasks run on one system thread, and they switch only at a [`sim::point`].
//! This backend, and not shuttle, keeps the states of tasks and the time: a blocked task may have a deadline, and time
//! goes on when no task can run.
//!
//! Memory is sequentially consistent: loom's models test weaker orders.

mod atomics;
pub mod channel;
mod locks;
pub mod sim;
mod threads;

pub use locks::{Condvar, Mutex, MutexGuard, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard, WaitTimeoutResult};
pub use threads::{thread, time, LocalKey};

/// As `std::sync::atomic`.
pub mod atomic {
    pub use super::atomics::*;
    pub use std::sync::atomic::Ordering;
}

/// As `std::thread_local`: one value for each task.
#[doc(hidden)]
#[macro_export]
macro_rules! simulated_thread_local {
    ($($(#[$attr:meta])* $vis:vis static $name:ident: $t:ty = const { $init:expr });* $(;)?) => {
        $($(#[$attr])* $vis static $name: $crate::sync::LocalKey<$t> = $crate::sync::LocalKey::new(|| $init);)*
    };
}
pub use crate::simulated_thread_local as thread_local;
