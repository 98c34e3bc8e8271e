//! The gate of a mechanism: a reader-writer lock that can be handed to who wants it exclusively.
//!
//! Who reads the kernel's queue takes it exclusively, for a moment; who installs holds it shared. A thread that installs
//! one stretch after another takes a plain lock back before the thread that it has woken is on a CPU, again and again:
//! faults then wait for several stretches to be read.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LockResult, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

use crate::sync::lock;

/// How often [`Gate::let_pass`] looks before it sleeps. To wake it would be up to who has no time for that.
const PATIENCE: u32 = 50;

/// Held shared while installing, exclusively while reading events and applying them.
#[derive(Default)]
pub struct Gate {
    lock: RwLock<()>,
    /// Threads that wait to hold it exclusively.
    wanted: AtomicUsize,
    /// One of those has it, until it is through. Taken before `lock`.
    turn: Mutex<()>,
}

/// Holds the gate exclusively.
pub struct Exclusive<'a> {
    // In the order in which they are released.
    _lock: RwLockWriteGuard<'a, ()>,
    _turn: Option<MutexGuard<'a, ()>>,
}

impl Gate {
    /// Takes it shared, as `RwLock::read`.
    pub fn read(&self) -> LockResult<RwLockReadGuard<'_, ()>> {
        self.lock.read()
    }

    /// Takes it exclusively, as `RwLock::write`.
    pub fn write(&self) -> LockResult<Exclusive<'_>> {
        match self.lock.try_write() {
            Ok(guard) => return Ok(Exclusive { _lock: guard, _turn: None }),
            Err(TryLockError::Poisoned(guard)) => {
                return Err(PoisonError::new(Exclusive { _lock: guard.into_inner(), _turn: None }))
            }
            Err(TryLockError::WouldBlock) => {}
        }
        self.wanted.fetch_add(1, Ordering::Relaxed);
        let turn = Some(lock(&self.turn));
        let guard = self.lock.write();
        self.wanted.fetch_sub(1, Ordering::Relaxed);
        match guard {
            Ok(guard) => Ok(Exclusive { _lock: guard, _turn: turn }),
            Err(guard) => Err(PoisonError::new(Exclusive { _lock: guard.into_inner(), _turn: turn })),
        }
    }

    /// Lets who wants it exclusively go first. For a thread that is about to take it shared once more and holds nothing
    /// of it.
    pub fn let_pass(&self) {
        for _ in 0..PATIENCE {
            let free = self.wanted.load(Ordering::Relaxed) == 0;
            if free && !matches!(self.lock.try_read(), Err(TryLockError::WouldBlock)) {
                return;
            }
            // It may want this very CPU.
            std::thread::yield_now();
        }
        drop(lock(&self.turn));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_installs_all_the_while_lets_others_pass() {
        let (gate, passed) = (Gate::default(), AtomicUsize::new(0));
        for round in 1..=50 {
            let stretch = gate.read();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let _gate = gate.write();
                    passed.fetch_add(1, Ordering::Relaxed);
                });
                // It waits for the stretch to end.
                while gate.turn.try_lock().is_ok() {
                    std::thread::yield_now();
                }
                drop(stretch);
                gate.let_pass();
                assert_eq!(passed.load(Ordering::Relaxed), round, "the next stretch would have come first");
            });
        }
    }

    #[test]
    fn a_panic_of_the_holder_is_told_as_by_a_plain_lock() {
        let gate = Gate::default();
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _gate = gate.write();
            std::panic::resume_unwind(Box::new(()));
        }));
        gate.let_pass();
        assert!(gate.read().is_err());
        assert!(gate.write().is_err());
        drop(gate.write().unwrap_or_else(PoisonError::into_inner));
    }
}
