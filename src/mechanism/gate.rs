//! The gate of a mechanism: a reader-writer lock that can be handed to a thread that wants it exclusively.
//!
//! A thread that reads the kernel's queue takes it exclusively for a moment; a thread that installs holds it shared.
//! With a plain lock, a thread that installs stretch after stretch would take it again and again before the woken
//! reader is on a CPU: faults would wait for several stretches before they are read.

use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{
    lock, read, thread, try_read, try_write, write, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
};

/// How often [`Gate::let_pass`] looks before it sleeps. While it spins, the exclusive holder needs no futex wake.
const PATIENCE: u32 = 50;

/// Held shared while installing, exclusively while reading events and applying them.
#[derive(Default)]
pub struct Gate {
    lock: RwLock<()>,
    /// Threads that wait to hold it exclusively.
    wanted: AtomicUsize,
    /// Held by the next of those threads until it has released the gate. Taken before `lock`.
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
    pub fn read(&self) -> RwLockReadGuard<'_, ()> {
        read(&self.lock)
    }

    /// Takes it exclusively, as `RwLock::write`.
    pub fn write(&self) -> Exclusive<'_> {
        if let Some(guard) = try_write(&self.lock) {
            return Exclusive { _lock: guard, _turn: None };
        }
        self.wanted.fetch_add(1, Ordering::Relaxed);
        let turn = Some(lock(&self.turn));
        let guard = write(&self.lock);
        self.wanted.fetch_sub(1, Ordering::Relaxed);
        Exclusive { _lock: guard, _turn: turn }
    }

    /// Lets the threads that want it exclusively go first. For a thread that does not hold the gate and is about to
    /// take it shared again.
    pub fn let_pass(&self) {
        for _ in 0..PATIENCE {
            let free = self.wanted.load(Ordering::Relaxed) == 0;
            if free && try_read(&self.lock).is_some() {
                return;
            }
            // The other thread may need this very CPU.
            thread::yield_now();
        }
        drop(lock(&self.turn));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_installs_all_the_while_lets_others_pass() {
        let (gate, passed) = (Gate::default(), AtomicUsize::new(0));
        for round in 1..=50 {
            let stretch = gate.read();
            thread::scope(|scope| {
                scope.spawn(|| {
                    let _gate = gate.write();
                    passed.fetch_add(1, Ordering::Relaxed);
                });
                // It waits for the stretch to end.
                while gate.turn.try_lock().is_ok() {
                    thread::yield_now();
                }
                drop(stretch);
                gate.let_pass();
                assert_eq!(passed.load(Ordering::Relaxed), round, "the next stretch would have come first");
            });
        }
    }

    #[test]
    fn a_panic_of_the_holder_leaves_a_gate_that_can_be_taken() {
        let gate = Gate::default();
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _gate = gate.write();
            std::panic::resume_unwind(Box::new(()));
        }));
        gate.let_pass();
        drop(gate.read());
        drop(gate.write());
    }
}
