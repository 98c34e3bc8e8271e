//! The guard around every call: no panic leaves the library, and every failure leaves its errno and its text.

use std::ffi::c_int;

use libc::ssize_t;

use rustix::io::Errno;

use crate::error::{remember, words, Error, Result};
use crate::panics::quietly;

/// Runs a call that returns 0 or a small number.
pub fn guard(body: impl FnOnce() -> Result<c_int>) -> c_int {
    run(body).unwrap_or_else(|error| -error.errno().raw_os_error())
}

/// Runs a call that returns a count.
pub fn guard_count(body: impl FnOnce() -> Result<usize>) -> ssize_t {
    match run(body) {
        Ok(count) => ssize_t::try_from(count).unwrap_or(ssize_t::MAX),
        Err(error) => -(error.errno().raw_os_error() as ssize_t),
    }
}

fn run<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    let result = quietly(body).unwrap_or_else(|what| {
        let text = words!("the library failed inside (a bug: {what}): close the handle and report it");
        Err(Error::new(Errno::NOTRECOVERABLE, text))
    });
    if let Err(error) = &result {
        remember(error);
    }
    result
}
