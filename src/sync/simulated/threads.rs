//! Threads, their local values, and time.

use std::any::Any;
use std::cell::Cell;
use std::marker::PhantomData;

use super::sim;

/// As `std::thread::LocalKey`.
pub struct LocalKey<T: 'static> {
    init: fn() -> T,
    _value: PhantomData<fn() -> T>,
}

impl<T: 'static> LocalKey<T> {
    pub const fn new(init: fn() -> T) -> Self {
        Self { init, _value: PhantomData }
    }

    pub fn with<R>(&'static self, act: impl FnOnce(&T) -> R) -> R {
        let value = sim::local(std::ptr::from_ref(self).addr(), &|| Box::new((self.init)()) as Box<dyn Any>);
        // SAFETY: it is dropped only when the run has ended, and never moved.
        let value = unsafe { &*value };
        match value.downcast_ref() {
            Some(value) => act(value),
            None => unreachable!("one key has one type"),
        }
    }

    pub fn try_with<R>(&'static self, act: impl FnOnce(&T) -> R) -> Result<R, std::convert::Infallible> {
        Ok(self.with(act))
    }
}

impl<T: 'static> LocalKey<Cell<T>> {
    pub fn set(&'static self, value: T) {
        self.with(|cell| cell.set(value));
    }

    pub fn replace(&'static self, value: T) -> T {
        self.with(|cell| cell.replace(value))
    }

    pub fn get(&'static self) -> T
    where
        T: Copy,
    {
        self.with(Cell::get)
    }

    pub fn take(&'static self) -> T
    where
        T: Default,
    {
        self.with(Cell::take)
    }
}

/// As `std::thread`.
pub mod thread {
    use std::num::NonZero;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use super::sim;
    pub use std::thread::{panicking, Result};

    /// How long a yielding thread lets others run.
    const YIELD_NS: u64 = 1000;

    struct Ended<T> {
        result: Option<Result<T>>,
        ended: bool,
        joiner: Option<usize>,
    }

    /// As in `std`.
    pub struct JoinHandle<T> {
        ended: Arc<Mutex<Ended<T>>>,
    }

    fn look<T>(ended: &Mutex<Ended<T>>) -> std::sync::MutexGuard<'_, Ended<T>> {
        ended.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    impl<T> JoinHandle<T> {
        pub fn is_finished(&self) -> bool {
            sim::point();
            look(&self.ended).ended
        }

        pub fn join(self) -> Result<T> {
            sim::point();
            loop {
                let mut ended = look(&self.ended);
                if ended.ended {
                    break;
                }
                ended.joiner = Some(sim::current());
                drop(ended);
                sim::block("a thread to end", None, false);
            }
            let result = look(&self.ended).result.take();
            result.unwrap_or_else(|| unreachable!("a thread is joined once"))
        }
    }

    /// As in `std`.
    #[derive(Default)]
    pub struct Builder {
        name: String,
    }

    impl Builder {
        pub fn new() -> Self {
            Self::default()
        }

        pub fn name(self, name: String) -> Self {
            Self { name }
        }

        pub fn spawn<T: Send + 'static>(
            self,
            body: impl FnOnce() -> T + Send + 'static,
        ) -> std::io::Result<JoinHandle<T>> {
            let ended = Arc::new(Mutex::new(Ended { result: None, ended: false, joiner: None }));
            let theirs = ended.clone();
            let name = self.name;
            shuttle::thread::spawn(move || {
                sim::call_it(name);
                let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
                let mut ended = look(&theirs);
                (ended.result, ended.ended) = (Some(result), true);
                if let Some(joiner) = ended.joiner {
                    sim::ready(joiner);
                }
            });
            sim::point();
            Ok(JoinHandle { ended })
        }
    }

    /// As in `std`.
    pub fn spawn<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        match Builder::new().spawn(body) {
            Ok(thread) => thread,
            Err(error) => unreachable!("{error}"),
        }
    }

    /// As in `std`.
    pub fn sleep(time: Duration) {
        let until = sim::now().saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        sim::block("time to pass", Some(until), false);
    }

    /// As in `std`: ready threads run first, for a moment.
    pub fn yield_now() {
        if sim::running() {
            sleep(Duration::from_nanos(YIELD_NS));
        }
    }

    /// As in `std`.
    pub fn available_parallelism() -> std::io::Result<NonZero<usize>> {
        NonZero::new(4).ok_or_else(|| std::io::ErrorKind::Unsupported.into())
    }

    /// The thread's identity in libc, one for all tasks.
    pub fn pthread<T>(_: &JoinHandle<T>) -> libc::pthread_t {
        // SAFETY: returns the calling thread.
        unsafe { libc::pthread_self() }
    }
}

/// As `std::time`, by the simulated clock.
pub mod time {
    use std::ops::{Add, AddAssign, Sub};

    pub use std::time::Duration;

    use super::sim;

    /// The time that reading the clock takes.
    const LOOK_NS: u64 = 30;

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    pub struct Instant(Duration);

    impl Instant {
        pub fn now() -> Self {
            sim::pass(LOOK_NS);
            Self(Duration::from_nanos(sim::now()))
        }

        pub fn elapsed(&self) -> Duration {
            Self::now().saturating_duration_since(*self)
        }

        pub fn saturating_duration_since(&self, earlier: Self) -> Duration {
            self.0.saturating_sub(earlier.0)
        }

        pub fn duration_since(&self, earlier: Self) -> Duration {
            self.saturating_duration_since(earlier)
        }

        pub fn checked_add(&self, time: Duration) -> Option<Self> {
            self.0.checked_add(time).map(Self)
        }

        pub fn checked_sub(&self, time: Duration) -> Option<Self> {
            self.0.checked_sub(time).map(Self)
        }
    }

    impl Add<Duration> for Instant {
        type Output = Self;

        fn add(self, time: Duration) -> Self {
            Self(self.0 + time)
        }
    }

    impl AddAssign<Duration> for Instant {
        fn add_assign(&mut self, time: Duration) {
            self.0 += time;
        }
    }

    impl Sub<Duration> for Instant {
        type Output = Self;

        fn sub(self, time: Duration) -> Self {
            Self(self.0.saturating_sub(time))
        }
    }

    impl Sub for Instant {
        type Output = Duration;

        fn sub(self, earlier: Self) -> Duration {
            self.saturating_duration_since(earlier)
        }
    }
}
