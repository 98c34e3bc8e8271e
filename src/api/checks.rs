//! Checks of arguments, for C and for Rust.

use rustix::io::Errno;

use crate::error::{words, Error, Result, Words};
use crate::sync::time::Duration;

/// The error of an argument.
pub fn invalid<T>(text: impl Into<Words>) -> Result<T> {
    Err(Error::new(Errno::INVAL, text))
}

/// The value of a number for which 0 stands for `default`.
pub fn in_range(what: &str, value: u64, default: u64, max: u64) -> Result<u64> {
    match value {
        0 => Ok(default),
        value if value <= max => Ok(value),
        value => invalid(words!("{what} is {value}: at most {max}")),
    }
}

/// A range of `kuf_populate`.
pub fn populate_range(gpa: u64, len: u64) -> Result<(u64, u64)> {
    let page = rustix::param::page_size() as u64;
    match (gpa, len) {
        (_, 0) => invalid("request->len is 0"),
        (gpa, len) if gpa % page != 0 || len % page != 0 => {
            invalid(words!("request->gpa and len have to be multiples of the page size {page:#x}"))
        }
        (gpa, len) if gpa.checked_add(len).is_none() => {
            invalid(words!("request->gpa {gpa:#x} + len {len:#x} overflows"))
        }
        range => Ok(range),
    }
}

/// A timeout as the C ABI has it, rounded up.
pub fn milliseconds(timeout: Option<Duration>) -> i32 {
    timeout.map_or(-1, |time| time.as_micros().div_ceil(1000).try_into().unwrap_or(i32::MAX))
}
