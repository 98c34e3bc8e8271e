//! Remembers the callback that a thread is in, so that a call back into the library knows it.

use std::cell::Cell;

use rustix::io::Errno;

use crate::caller::Keep;
use crate::error::{words, Error, Result};
use crate::memory::Slot;
use crate::pages::claims::Id;
use crate::panics::loudly;
use crate::sync::{thread_local, Arc};

/// The callback that a thread is in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Inside {
    Fill {
        slot: *const Slot,
        id: Id,
    },
    /// NULL: an event of no slot.
    Event {
        slot: *const Slot,
    },
    Quiet,
}

thread_local! {
    static INSIDE: Cell<Option<Inside>> = const { Cell::new(None) };
}

/// Refuses a call in any callback, where it would wait for its own thread.
pub fn refuse_inside_callbacks(call: &str) -> Result<()> {
    match INSIDE.get() {
        None => Ok(()),
        Some(_) => Err(deadlock(call)),
    }
}

/// As [`refuse_inside_callbacks`], but allowed in an event callback.
pub fn refuse_inside_fill(call: &str) -> Result<()> {
    match INSIDE.get() {
        None | Some(Inside::Event { .. }) => Ok(()),
        Some(_) => Err(deadlock(call)),
    }
}

/// Refuses any call from a log or release callback.
pub fn refuse_inside_quiet(call: &str) -> Result<()> {
    match INSIDE.get() {
        Some(Inside::Quiet) => Err(deadlock(call)),
        _ => Ok(()),
    }
}

fn deadlock(call: &str) -> Error {
    Error::new(
        Errno::DEADLK,
        words!("{call} may not be called from this callback: it would wait for the callback itself"),
    )
}

/// The claim of the fill callback that this thread is in, if it is for `slot`.
pub fn filling_here(slot: &Arc<Slot>) -> Option<Id> {
    match INSIDE.get() {
        Some(Inside::Fill { slot: here, id }) if here == Arc::as_ptr(slot) => Some(id),
        _ => None,
    }
}

/// Whether this thread is in an event callback about `slot`.
pub fn telling_here(slot: &Slot) -> bool {
    matches!(INSIDE.get(), Some(Inside::Event { slot: here }) if std::ptr::eq(here, slot))
}

/// Runs the caller's code. None: it panicked.
pub fn call<T>(inside: Inside, body: impl FnOnce() -> T) -> Option<T> {
    // Restore the value instead of clearing it: kuf_resolve inside a fill callback may raise an event.
    let before = INSIDE.replace(Some(inside));
    let result = loudly(body);
    INSIDE.set(before);
    result
}

/// A value of the caller's, whose destructor is run as a callback is: the last user of it may be any thread, in any call.
pub fn kept(value: Keep) -> Keep {
    struct Kept(Option<Keep>);
    impl Drop for Kept {
        fn drop(&mut self) {
            call(Inside::Quiet, || drop(self.0.take()));
        }
    }
    Arc::new(Kept(Some(value)))
}
