//! Locks and condition variables of libpthread, for ThreadSanitizer. It knows these, but not std's, which use futexes
//! in code that is not instrumented. They have the part of std's interface that the crate uses.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::{LockResult, TryLockError, TryLockResult};
use std::time::{Duration, Instant};

// This one is compiled with the crate, and so instrumented.
pub use once_cell::sync::OnceCell as OnceLock;

/// An object of libpthread that a constant function makes, though it may not move: it is boxed at its first use.
struct Fixed<T>(OnceLock<Box<UnsafeCell<T>>>, T);

impl<T: Copy> Fixed<T> {
    const fn new(initial: T) -> Self {
        Self(OnceLock::new(), initial)
    }

    fn get(&self) -> *mut T {
        self.0.get_or_init(|| Box::new(UnsafeCell::new(self.1))).get()
    }
}

fn check(errno: i32) {
    assert_eq!(errno, 0, "a lock of libpthread answers {errno}");
}

/// `std::sync::Mutex`.
pub struct Mutex<T> {
    lock: Fixed<libc::pthread_mutex_t>,
    data: UnsafeCell<T>,
}

// SAFETY: the lock gives out the data to one thread at a time.
unsafe impl<T: Send> Send for Mutex<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Mutex<T> {}

impl<T> Mutex<T> {
    pub const fn new(data: T) -> Self {
        Self { lock: Fixed::new(libc::PTHREAD_MUTEX_INITIALIZER), data: UnsafeCell::new(data) }
    }

    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        // SAFETY: initialised, and at a fixed address until it is dropped.
        check(unsafe { libc::pthread_mutex_lock(self.lock.get()) });
        Ok(MutexGuard { mutex: self })
    }

    pub fn try_lock(&self) -> TryLockResult<MutexGuard<'_, T>> {
        // SAFETY: as in `lock`.
        match unsafe { libc::pthread_mutex_trylock(self.lock.get()) } {
            0 => Ok(MutexGuard { mutex: self }),
            _ => Err(TryLockError::WouldBlock),
        }
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> Drop for Mutex<T> {
    fn drop(&mut self) {
        // SAFETY: no guard can be left.
        unsafe { libc::pthread_mutex_destroy(self.lock.get()) };
    }
}

/// `std::sync::MutexGuard`.
pub struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock.
        unsafe { &*self.mutex.data.get() }
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this guard holds the lock.
        unsafe { &mut *self.mutex.data.get() }
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this guard holds the lock.
        check(unsafe { libc::pthread_mutex_unlock(self.mutex.lock.get()) });
    }
}

/// `std::sync::Condvar`.
pub struct Condvar(Fixed<libc::pthread_cond_t>);

// SAFETY: made for use by several threads.
unsafe impl Send for Condvar {}
// SAFETY: as above.
unsafe impl Sync for Condvar {}

/// `std::sync::WaitTimeoutResult`.
pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    pub fn timed_out(&self) -> bool {
        self.0
    }
}

impl Condvar {
    pub const fn new() -> Self {
        Self(Fixed::new(libc::PTHREAD_COND_INITIALIZER))
    }

    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        // SAFETY: both are initialised at fixed addresses, and this thread holds the lock.
        check(unsafe { libc::pthread_cond_wait(self.0.get(), guard.mutex.lock.get()) });
        Ok(guard)
    }

    pub fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        most: Duration,
    ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
        let mut until = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // PTHREAD_COND_INITIALIZER makes a condition variable with this clock.
        // SAFETY: writes the time to `until`.
        unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &mut until) };
        let ns = until.tv_nsec + i64::from(most.subsec_nanos());
        until.tv_sec = until.tv_sec.saturating_add(most.as_secs().min(i64::MAX as u64) as i64 + ns / 1_000_000_000);
        until.tv_nsec = ns % 1_000_000_000;
        // SAFETY: as in `wait`.
        let errno = unsafe { libc::pthread_cond_timedwait(self.0.get(), guard.mutex.lock.get(), &until) };
        assert!(matches!(errno, 0 | libc::ETIMEDOUT), "pthread_cond_timedwait answers {errno}");
        Ok((guard, WaitTimeoutResult(errno == libc::ETIMEDOUT)))
    }

    pub fn wait_timeout_while<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        most: Duration,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
        let end = Instant::now() + most;
        while condition(&mut guard) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok((guard, WaitTimeoutResult(true)));
            }
            guard = self.wait_timeout(guard, left).unwrap_or_else(|error| error.into_inner()).0;
        }
        Ok((guard, WaitTimeoutResult(false)))
    }

    pub fn notify_one(&self) {
        // SAFETY: initialised, and at a fixed address until it is dropped.
        check(unsafe { libc::pthread_cond_signal(self.0.get()) });
    }

    pub fn notify_all(&self) {
        // SAFETY: as above.
        check(unsafe { libc::pthread_cond_broadcast(self.0.get()) });
    }
}

impl Default for Condvar {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Condvar {
    fn drop(&mut self) {
        // SAFETY: `&mut self` shows that no thread waits for it.
        unsafe { libc::pthread_cond_destroy(self.0.get()) };
    }
}

/// `std::sync::RwLock`.
pub struct RwLock<T> {
    lock: Fixed<libc::pthread_rwlock_t>,
    data: UnsafeCell<T>,
}

// SAFETY: the lock gives out the data to one thread at a time, or to several that only read it.
unsafe impl<T: Send> Send for RwLock<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for RwLock<T> {}

impl<T> RwLock<T> {
    pub const fn new(data: T) -> Self {
        Self { lock: Fixed::new(libc::PTHREAD_RWLOCK_INITIALIZER), data: UnsafeCell::new(data) }
    }

    pub fn read(&self) -> LockResult<RwLockReadGuard<'_, T>> {
        // SAFETY: initialised, and at a fixed address until it is dropped.
        check(unsafe { libc::pthread_rwlock_rdlock(self.lock.get()) });
        Ok(RwLockReadGuard { lock: self })
    }

    pub fn write(&self) -> LockResult<RwLockWriteGuard<'_, T>> {
        // SAFETY: as above.
        check(unsafe { libc::pthread_rwlock_wrlock(self.lock.get()) });
        Ok(RwLockWriteGuard { lock: self })
    }

    pub fn try_read(&self) -> TryLockResult<RwLockReadGuard<'_, T>> {
        // SAFETY: as above.
        match unsafe { libc::pthread_rwlock_tryrdlock(self.lock.get()) } {
            0 => Ok(RwLockReadGuard { lock: self }),
            _ => Err(TryLockError::WouldBlock),
        }
    }

    pub fn try_write(&self) -> TryLockResult<RwLockWriteGuard<'_, T>> {
        // SAFETY: as above.
        match unsafe { libc::pthread_rwlock_trywrlock(self.lock.get()) } {
            0 => Ok(RwLockWriteGuard { lock: self }),
            _ => Err(TryLockError::WouldBlock),
        }
    }
}

impl<T: Default> Default for RwLock<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> Drop for RwLock<T> {
    fn drop(&mut self) {
        // SAFETY: no guard can be left.
        unsafe { libc::pthread_rwlock_destroy(self.lock.get()) };
    }
}

/// `std::sync::RwLockReadGuard`.
pub struct RwLockReadGuard<'a, T> {
    lock: &'a RwLock<T>,
}

/// `std::sync::RwLockWriteGuard`.
pub struct RwLockWriteGuard<'a, T> {
    lock: &'a RwLock<T>,
}

impl<T> Deref for RwLockReadGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock shared.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> Deref for RwLockWriteGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard holds the lock exclusively.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T> DerefMut for RwLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this guard holds the lock exclusively.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T> Drop for RwLockReadGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this guard holds the lock.
        check(unsafe { libc::pthread_rwlock_unlock(self.lock.lock.get()) });
    }
}

impl<T> Drop for RwLockWriteGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this guard holds the lock.
        check(unsafe { libc::pthread_rwlock_unlock(self.lock.lock.get()) });
    }
}
