//! What went wrong: an errno for the program and words for its author.

use std::borrow::Cow;
use std::cell::UnsafeCell;
use std::ffi::c_char;

/// A failure as the C ABI reports it.
#[derive(Clone, Debug)]
pub struct Error {
    errno: i32,
    text: Cow<'static, str>,
}

/// Result of everything that can be refused.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// `errno` is positive; `text` says what to do about it.
    pub fn new(errno: i32, text: impl Into<Cow<'static, str>>) -> Self {
        Self { errno, text: text.into() }
    }

    /// A pointer argument is NULL.
    pub fn null(argument: &'static str) -> Self {
        Self::new(libc::EINVAL, format!("{argument} is NULL"))
    }

    /// A system call failed with `errno` while the library was at `what`.
    pub fn system(what: &str, errno: i32) -> Self {
        Self::new(errno, format!("{what}: {}", std::io::Error::from_raw_os_error(errno)))
    }

    /// The errno, positive.
    pub fn errno(&self) -> i32 {
        self.errno
    }

    /// The words.
    pub fn text(&self) -> &str {
        &self.text
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Error {}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::system("system call", errno.raw_os_error())
    }
}

/// Room for the words, the terminator included. Longer ones are cut.
const ROOM: usize = 1024;

thread_local! {
    // A place that stays where it is for the life of the thread: a pointer taken before a failing call shows that
    // failure. Without a destructor, so that it is there for thread-local destructors of the host's too.
    static LAST: UnsafeCell<[u8; ROOM]> = const { UnsafeCell::new([0; ROOM]) };
}

/// Keeps `error` as the calling thread's last failure.
pub fn remember(error: &Error) {
    let mut end = error.text().len().min(ROOM - 1);
    while !error.text().is_char_boundary(end) {
        end -= 1;
    }
    LAST.with(|last| {
        // SAFETY: this thread's own, and nothing here calls back while it is borrowed.
        let last = unsafe { &mut *last.get() };
        for (to, from) in last.iter_mut().zip(error.text().as_bytes()[..end].iter().chain([&0])) {
            *to = *from;
        }
    });
}

/// The calling thread's last failure as a C string, `""` if none; for the life of the thread.
pub fn last_text() -> *const c_char {
    LAST.with(|last| last.get().cast::<c_char>().cast_const())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    #[test]
    fn a_pointer_taken_before_shows_the_failure_and_long_ones_are_cut() {
        let text = last_text();
        // SAFETY: this thread's buffer, always terminated.
        let read = || unsafe { CStr::from_ptr(text) }.to_str().unwrap().to_owned();
        assert_eq!(read(), "");
        remember(&Error::new(libc::EINVAL, "first and longer"));
        assert_eq!(read(), "first and longer");
        remember(&Error::new(libc::EINVAL, "second"));
        assert_eq!(read(), "second");
        remember(&Error::new(libc::EINVAL, "ü".repeat(ROOM)));
        assert_eq!(read(), "ü".repeat((ROOM - 1) / 2));
    }
}
