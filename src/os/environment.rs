//! Requests in the environment of the process.

use std::ffi::{c_char, CStr};

extern "C" {
    // Not in the libc crate. NULL in a program that gained privileges when it was started (set-user-ID).
    fn secure_getenv(name: *const c_char) -> *mut c_char;
}

/// Whether KUF_DEBUG is 1.
pub fn is_debugged() -> bool {
    // SAFETY: a C string. As for any getenv, the program sets no variable meanwhile.
    let value = unsafe { secure_getenv(c"KUF_DEBUG".as_ptr()) };
    // SAFETY: NULL was excluded, and the value is a C string.
    !value.is_null() && unsafe { CStr::from_ptr(value) } == c"1"
}
