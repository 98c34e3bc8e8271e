//! The one way into KVM's ioctls.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// Makes a call whose argument is `argument`; again when a signal came first.
///
/// # Safety
/// `request` was computed from `T`, and what its fields point to is what the call expects.
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
