//! The one way into ioctl(2).

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// Calls ioctl with `argument`, and repeats the call when a signal interrupts it.
///
/// # Safety
/// `request` was computed from `T`, and the fields of `argument` point to what the call expects.
pub unsafe fn call<T>(fd: BorrowedFd<'_>, request: u32, argument: &mut T) -> Result<c_int, Errno> {
    loop {
        // SAFETY: the caller's promise; the reference outlives the call.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::c_ulong::from(request) as _, &raw mut *argument) };
        if result >= 0 {
            return Ok(result);
        }
        // SAFETY: errno of this thread.
        match Errno::from_raw_os_error(unsafe { *libc::__errno_location() }) {
            Errno::INTR => {}
            errno => return Err(errno),
        }
    }
}
