//! What went wrong: an errno for the program and words for its author.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ffi::{c_char, CString};

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

thread_local! {
    static LAST: RefCell<Option<CString>> = const { RefCell::new(None) };
}

/// Keeps `error` as the calling thread's last failure. Does nothing in a thread that is past its thread-local
/// destructors: the errno is still returned.
pub fn remember(error: &Error) {
    let text = CString::new(error.text().replace('\0', " ")).unwrap_or_default();
    let _ = LAST.try_with(|last| {
        if let Ok(mut last) = last.try_borrow_mut() {
            *last = Some(text);
        }
    });
}

/// The calling thread's last failure as a C string, `""` if none; valid until the next [`remember`] of this thread.
pub fn last_text() -> *const c_char {
    LAST.try_with(|last| last.try_borrow().ok().and_then(|text| text.as_ref().map(|t| t.as_ptr())))
        .ok()
        .flatten()
        .unwrap_or(c"".as_ptr())
}
