//! Errors: an errno for the program and a text for its author.

use std::borrow::Cow;
use std::cell::UnsafeCell;
use std::ffi::{c_char, CStr};
use std::fmt::Write;

use rustix::io::Errno;

use crate::alloc::{refusable, NoMemory};
use crate::errno;

/// A failure: an errno for the program, and a text for its author. The text has the names of `kuf.h`.
#[derive(Clone, Debug)]
pub struct Error {
    errno: Errno,
    text: Words,
}

/// A text for the author of the calling program.
pub type Words = Cow<'static, str>;

/// As `format!`, but a fixed text replaces one for which there is no memory.
macro_rules! words {
    ($($what:tt)*) => {
        $crate::error::put(format_args!($($what)*))
    };
}
pub(crate) use words;

/// See [`words!`].
pub fn put(what: std::fmt::Arguments<'_>) -> Words {
    struct Put(String);
    impl Write for Put {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            refusable(|| self.0.try_reserve(text.len())).map_err(|_| std::fmt::Error)?;
            self.0.push_str(text);
            Ok(())
        }
    }
    if let Some(text) = what.as_str() {
        return text.into();
    }
    let mut put = Put(String::new());
    match put.write_fmt(what) {
        Ok(()) => put.0.into(),
        Err(std::fmt::Error) => "there is no memory to say more".into(),
    }
}

/// An errno in words, with its name.
pub struct Reason(pub Errno);

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = [0_u8; 128];
        // SAFETY: writes a C string of at most the length passed.
        unsafe { libc::strerror_r(self.0.raw_os_error(), text.as_mut_ptr().cast(), text.len()) };
        let words = CStr::from_bytes_until_nul(&text).ok().and_then(|text| text.to_str().ok()).unwrap_or("");
        match errno::name(self.0.raw_os_error()) {
            Some(name) => write!(f, "{name}: {words}"),
            None => write!(f, "errno {}: {words}", self.0.raw_os_error()),
        }
    }
}

/// Why pages could not be filled: an errno, and words where the errno alone does not say it.
#[derive(Clone, Debug)]
pub struct Failure {
    errno: Errno,
    words: Words,
}

impl Failure {
    pub fn new(errno: Errno, words: impl Into<Words>) -> Self {
        Self { errno, words: words.into() }
    }

    pub fn errno(&self) -> Errno {
        self.errno
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::new(errno, "")
    }
}

impl From<NoMemory> for Failure {
    fn from(_: NoMemory) -> Self {
        Errno::NOMEM.into()
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { errno: error.errno, words: error.text }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match errno::name(self.errno.raw_os_error()).filter(|_| !self.words.is_empty()) {
            Some(name) => write!(f, "{name}: {}", self.words),
            None => Reason(self.errno).fmt(f),
        }
    }
}

/// The result of a call that can fail.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// `text` tells the author what to do about it.
    pub fn new(errno: Errno, text: impl Into<Words>) -> Self {
        Self { errno, text: text.into() }
    }

    /// A pointer argument is NULL.
    pub fn null(argument: &'static str) -> Self {
        Self::new(Errno::INVAL, words!("{argument} is NULL"))
    }

    /// A system call of the step `what` failed with `errno`.
    pub fn system(what: &str, errno: Errno) -> Self {
        Self::new(errno, words!("{what}: {}", Reason(errno)))
    }

    /// The same error, with the part of the argument that it is about.
    pub fn within(self, what: &str) -> Self {
        Self::new(self.errno, words!("{what}: {}", self.text()))
    }

    /// The errno.
    pub fn errno(&self) -> Errno {
        self.errno
    }

    /// The text.
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

impl From<Error> for std::io::Error {
    /// With the kind of the errno, and the same text.
    fn from(error: Error) -> Self {
        Self::new(Self::from(error.errno).kind(), error)
    }
}

impl From<NoMemory> for Error {
    fn from(_: NoMemory) -> Self {
        Self::new(Errno::NOMEM, "no memory for the library's records: nothing was changed, or only a part was done")
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::system("system call", errno)
    }
}

/// Bytes for the text, the terminator included. A longer text is cut.
const ROOM: usize = 1024;

thread_local! {
    // The buffer does not move while the thread lives, so a pointer taken before a failing call shows that failure. It
    // has no destructor, so that thread-local destructors of the caller can still read it.
    static LAST: UnsafeCell<[u8; ROOM]> = const { UnsafeCell::new([0; ROOM]) };
}

/// Keeps `error` as the calling thread's last failure.
pub fn remember(error: &Error) {
    let mut end = error.text().len().min(ROOM - 1);
    while !error.text().is_char_boundary(end) {
        end -= 1;
    }
    LAST.with(|last| {
        // SAFETY: only this thread uses the buffer, and no code here calls back while it is borrowed.
        let last = unsafe { &mut *last.get() };
        for (to, from) in last.iter_mut().zip(error.text().as_bytes()[..end].iter().chain([&0])) {
            *to = *from;
        }
    });
}

/// The calling thread's last failure as a C string, `""` if there is none. The pointer is valid while the thread lives.
pub fn last_text() -> *const c_char {
    LAST.with(|last| last.get().cast::<c_char>().cast_const())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_has_the_name_and_the_words_of_its_errno() {
        for (errno, name) in [(libc::EIO, "EIO"), (libc::EAGAIN, "EAGAIN"), (libc::EHWPOISON, "EHWPOISON")] {
            let std = std::io::Error::from_raw_os_error(errno).to_string();
            let words = std.split(" (os error").next().unwrap();
            assert_eq!(Reason(Errno::from_raw_os_error(errno)).to_string(), format!("{name}: {words}"));
        }
        assert!(Reason(Errno::from_raw_os_error(4000)).to_string().starts_with("errno 4000: "));
        assert_eq!(words!("{} is {:#x}", "gpa", 16), "gpa is 0x10");
        assert_eq!(Failure::from(Errno::IO).to_string(), Reason(Errno::IO).to_string());
        assert_eq!(Failure::new(Errno::PROTO, "returned 77").to_string(), "EPROTO: returned 77");
    }

    #[test]
    fn a_pointer_taken_before_shows_the_failure_and_a_long_text_is_cut() {
        let text = last_text();
        // SAFETY: this thread's buffer, always terminated.
        let read = || unsafe { CStr::from_ptr(text) }.to_str().unwrap().to_owned();
        assert_eq!(read(), "");
        remember(&Error::new(Errno::INVAL, "first and longer"));
        assert_eq!(read(), "first and longer");
        remember(&Error::new(Errno::INVAL, "second"));
        assert_eq!(read(), "second");
        remember(&Error::new(Errno::INVAL, "ü".repeat(ROOM)));
        assert_eq!(read(), "ü".repeat((ROOM - 1) / 2));
    }
}
