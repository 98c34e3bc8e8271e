//! Locks and condition variables.

use std::cell::{Cell, RefCell, UnsafeCell};
use std::ops::{Deref, DerefMut};
use std::sync::{LockResult, PoisonError, TryLockError, TryLockResult};
use std::time::Duration;

use super::sim::{self, block, point, ready};

/// Tasks that wait for a lock.
#[derive(Default)]
struct Waiting(RefCell<Vec<usize>>);

impl Waiting {
    const fn new() -> Self {
        Self(RefCell::new(Vec::new()))
    }

    fn wait(&self, what: &'static str) {
        self.0.borrow_mut().push(sim::current());
        block(what, None, false);
    }

    /// Wakes all of them; each tries the lock again.
    fn wake(&self) {
        self.0.borrow_mut().drain(..).for_each(ready);
    }
}

fn poisoned<G>(poison: &Cell<bool>, guard: G) -> LockResult<G> {
    if poison.get() {
        Err(PoisonError::new(guard))
    } else {
        Ok(guard)
    }
}

/// As in `std`.
#[derive(Default)]
pub struct Mutex<T> {
    locked: Cell<bool>,
    poison: Cell<bool>,
    waiting: Waiting,
    data: UnsafeCell<T>,
}

// SAFETY: tasks run one at a time, and the flag gives the data to one of them.
unsafe impl<T: Send> Sync for Mutex<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Mutex<T> {}

/// As in `std`.
pub struct MutexGuard<'a, T> {
    lock: &'a Mutex<T>,
    panicking: bool,
}

impl<T> Mutex<T> {
    pub const fn new(data: T) -> Self {
        let (locked, poison) = (Cell::new(false), Cell::new(false));
        Self { locked, poison, waiting: Waiting::new(), data: UnsafeCell::new(data) }
    }

    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        point();
        self.take()
    }

    fn take(&self) -> LockResult<MutexGuard<'_, T>> {
        while self.locked.get() {
            self.waiting.wait("a mutex");
        }
        self.locked.set(true);
        poisoned(&self.poison, MutexGuard { lock: self, panicking: std::thread::panicking() })
    }

    pub fn try_lock(&self) -> TryLockResult<MutexGuard<'_, T>> {
        point();
        if self.locked.get() {
            return Err(TryLockError::WouldBlock);
        }
        self.take().map_err(TryLockError::Poisoned)
    }

    pub fn get_mut(&mut self) -> LockResult<&mut T> {
        let poison = self.poison.clone();
        poisoned(&poison, self.data.get_mut())
    }

    pub fn into_inner(self) -> LockResult<T> {
        let poison = self.poison.clone();
        poisoned(&poison, self.data.into_inner())
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the guard's task has the lock.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        if !self.panicking && std::thread::panicking() {
            self.lock.poison.set(true);
        }
        self.lock.locked.set(false);
        self.lock.waiting.wake();
    }
}

/// As in `std`, whose readers wait when a writer does.
#[derive(Default)]
pub struct RwLock<T> {
    readers: Cell<usize>,
    written: Cell<bool>,
    /// Writers that wait.
    writers: Cell<usize>,
    poison: Cell<bool>,
    waiting: Waiting,
    data: UnsafeCell<T>,
}

// SAFETY: as for Mutex; readers share the data.
unsafe impl<T: Send + Sync> Sync for RwLock<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for RwLock<T> {}

/// As in `std`.
pub struct RwLockReadGuard<'a, T>(&'a RwLock<T>);

/// As in `std`.
pub struct RwLockWriteGuard<'a, T> {
    lock: &'a RwLock<T>,
    panicking: bool,
}

impl<T> RwLock<T> {
    pub const fn new(data: T) -> Self {
        Self {
            readers: Cell::new(0),
            written: Cell::new(false),
            writers: Cell::new(0),
            poison: Cell::new(false),
            waiting: Waiting::new(),
            data: UnsafeCell::new(data),
        }
    }

    fn readable(&self) -> bool {
        !self.written.get() && self.writers.get() == 0
    }

    fn writable(&self) -> bool {
        !self.written.get() && self.readers.get() == 0
    }

    pub fn read(&self) -> LockResult<RwLockReadGuard<'_, T>> {
        point();
        while !self.readable() {
            self.waiting.wait("a lock, to read");
        }
        self.readers.set(self.readers.get() + 1);
        poisoned(&self.poison, RwLockReadGuard(self))
    }

    pub fn write(&self) -> LockResult<RwLockWriteGuard<'_, T>> {
        point();
        while !self.writable() {
            self.writers.set(self.writers.get() + 1);
            self.waiting.wait("a lock, to write");
            self.writers.set(self.writers.get() - 1);
        }
        self.written.set(true);
        poisoned(&self.poison, RwLockWriteGuard { lock: self, panicking: std::thread::panicking() })
    }

    pub fn try_read(&self) -> TryLockResult<RwLockReadGuard<'_, T>> {
        point();
        if !self.readable() {
            return Err(TryLockError::WouldBlock);
        }
        self.readers.set(self.readers.get() + 1);
        poisoned(&self.poison, RwLockReadGuard(self)).map_err(TryLockError::Poisoned)
    }

    pub fn try_write(&self) -> TryLockResult<RwLockWriteGuard<'_, T>> {
        point();
        if !self.writable() {
            return Err(TryLockError::WouldBlock);
        }
        self.written.set(true);
        let guard = RwLockWriteGuard { lock: self, panicking: std::thread::panicking() };
        poisoned(&self.poison, guard).map_err(TryLockError::Poisoned)
    }
}

impl<T> Deref for RwLockReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the guard's task has the lock, with other readers at most.
        unsafe { &*self.0.data.get() }
    }
}

impl<T> Drop for RwLockReadGuard<'_, T> {
    fn drop(&mut self) {
        self.0.readers.set(self.0.readers.get() - 1);
        self.0.waiting.wake();
    }
}

impl<T> Deref for RwLockWriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the guard's task has the lock.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> DerefMut for RwLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for RwLockWriteGuard<'_, T> {
    fn drop(&mut self) {
        if !self.panicking && std::thread::panicking() {
            self.lock.poison.set(true);
        }
        self.lock.written.set(false);
        self.lock.waiting.wake();
    }
}

/// As in `std`: a wait may end without a notification.
#[derive(Default)]
pub struct Condvar {
    waiting: RefCell<Vec<usize>>,
}

// SAFETY: tasks run one at a time.
unsafe impl Sync for Condvar {}
// SAFETY: as above.
unsafe impl Send for Condvar {}

/// As in `std`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    pub fn timed_out(&self) -> bool {
        self.0
    }
}

impl Condvar {
    pub const fn new() -> Self {
        Self { waiting: RefCell::new(Vec::new()) }
    }

    /// Returns whether it was notified.
    fn sleep<T>(&self, guard: MutexGuard<'_, T>, deadline: Option<u64>) -> bool {
        let me = sim::current();
        self.waiting.borrow_mut().push(me);
        drop(guard);
        block("a condition variable", deadline, true);
        let mut waiting = self.waiting.borrow_mut();
        let still = waiting.iter().position(|task| *task == me);
        still.map(|at| waiting.remove(at)).is_none()
    }

    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        point();
        let lock = guard.lock;
        self.sleep(guard, None);
        lock.take()
    }

    pub fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        most: Duration,
    ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
        point();
        let lock = guard.lock;
        let until = sim::now().saturating_add(u64::try_from(most.as_nanos()).unwrap_or(u64::MAX));
        let notified = self.sleep(guard, Some(until));
        let end = WaitTimeoutResult(!notified && sim::now() >= until);
        match lock.take() {
            Ok(guard) => Ok((guard, end)),
            Err(poisoned) => Err(PoisonError::new((poisoned.into_inner(), end))),
        }
    }

    pub fn notify_one(&self) {
        point();
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.is_empty() {
            let at = sim::draw(waiting.len() as u64) as usize;
            ready(waiting.remove(at));
        }
    }

    pub fn notify_all(&self) {
        point();
        self.waiting.borrow_mut().drain(..).for_each(ready);
    }
}

/// As in `std`.
#[derive(Default)]
pub struct OnceLock<T> {
    making: Mutex<()>,
    value: std::sync::OnceLock<T>,
}

impl<T> OnceLock<T> {
    pub const fn new() -> Self {
        Self { making: Mutex::new(()), value: std::sync::OnceLock::new() }
    }

    pub fn get(&self) -> Option<&T> {
        point();
        self.value.get()
    }

    pub fn set(&self, value: T) -> Result<(), T> {
        point();
        self.value.set(value)
    }

    pub fn get_or_init(&self, init: impl FnOnce() -> T) -> &T {
        let _making = self.making.lock();
        match self.value.get() {
            Some(value) => value,
            None => {
                let value = init();
                self.value.get_or_init(|| value)
            }
        }
    }
}
