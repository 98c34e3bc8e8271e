//! Catches panics of the library's own code and keeps them as text. They are not printed, because the library does not
//! write to the caller's standard error.

use std::any::Any;
use std::cell::Cell;
use std::panic::{catch_unwind, AssertUnwindSafe};

use crate::alloc::has_room;
use crate::sync::{thread_local, Once};

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs the library's own code, and returns a panic as its message.
///
/// The panic hook is replaced by one that passes on all other panics. So the rest of the process sees no difference,
/// even where the library is linked as a crate and shares the hook with the caller.
pub fn quietly<T>(body: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    // Without memory for the hook, a later call sets it.
    if !HOOK.is_completed() && has_room().is_err() {
        return with(true, body, message);
    }
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.try_with(Cell::get).unwrap_or(false) {
                before(info);
            }
        }));
    });
    with(true, body, message)
}

/// Runs the caller's code: its panics are caught too, but printed as the caller wants. None: it panicked.
pub fn loudly<T>(body: impl FnOnce() -> T) -> Option<T> {
    with(false, body, |_| ()).ok()
}

fn with<T, E>(quiet: bool, body: impl FnOnce() -> T, error: impl FnOnce(&(dyn Any + Send)) -> E) -> Result<T, E> {
    let before = QUIET.replace(quiet);
    let result = caught(body, error);
    QUIET.set(before);
    result
}

/// Runs `body`, whose panic goes no further: not even where what it panicked with panics when it is dropped.
pub fn caught<T, E>(body: impl FnOnce() -> T, error: impl FnOnce(&(dyn Any + Send)) -> E) -> Result<T, E> {
    catch_unwind(AssertUnwindSafe(body)).map_err(|panic| {
        let error = error(&*panic);
        if let Err(another) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
            // This one might panic too, and so on.
            std::mem::forget(another);
        }
        error
    })
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
