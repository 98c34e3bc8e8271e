//! Panics of the library's own: caught, kept as text, and not printed. The library does not write to the host's stderr.

use std::any::Any;
use std::cell::Cell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs the library's own code; a panic comes back as its message.
///
/// The hook that would print it is replaced by one that passes on everything but these panics: nothing else in the
/// process sees a difference, also where the library is linked as a crate and shares its hook with the host.
pub fn quietly<T>(body: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.try_with(Cell::get).unwrap_or(false) {
                before(info);
            }
        }));
    });
    with(true, body).map_err(|panic| message(&*panic))
}

/// Runs the host's code: its panics are caught as well, but are its own to print. None: it panicked.
pub fn loudly<T>(body: impl FnOnce() -> T) -> Option<T> {
    with(false, body).ok()
}

fn with<T>(quiet: bool, body: impl FnOnce() -> T) -> std::thread::Result<T> {
    let before = QUIET.replace(quiet);
    let result = catch_unwind(AssertUnwindSafe(body));
    QUIET.set(before);
    result
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
