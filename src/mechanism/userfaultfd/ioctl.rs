//! The userfaultfd ioctls, one safe function each. They are safe although they take addresses: the kernel touches only
//! memory registered with this userfaultfd, and reads buffers fault-safely.

use std::os::fd::BorrowedFd;

use rustix::io::Errno;

use crate::uapi::ioctl;
use crate::uapi::userfaultfd::*;

type Done = (u64, Option<Errno>);

/// UFFDIO_API: agrees on `features`; returns what the kernel offers.
pub fn api(fd: BorrowedFd<'_>, features: u64) -> Result<u64, Errno> {
    let mut api = uffdio_api { api: UFFD_API, features, ioctls: 0 };
    call(fd, UFFDIO_API, &mut api)?;
    Ok(api.features)
}

/// UFFDIO_REGISTER.
pub fn register(fd: BorrowedFd<'_>, start: u64, len: u64, mode: u64) -> Result<(), Errno> {
    call(fd, UFFDIO_REGISTER, &mut uffdio_register { range: uffdio_range { start, len }, mode, ioctls: 0 })
}

/// UFFDIO_UNREGISTER, then UFFDIO_WAKE of the same range. The only way to unregister, because UNREGISTER alone leaves
/// threads blocked: it wakes before it takes the mapping's lock, so that a fault which still sees the registration blocks
/// after the wake-up (CVE-2026-99660), and it wakes no thread where the range was not registered for missing pages.
pub fn unregister(fd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    let result = call(fd, UFFDIO_UNREGISTER, &mut uffdio_range { start, len });
    // Also when it failed: it may have unregistered a part.
    let _ = wake(fd, start, len);
    result
}

/// UFFDIO_WAKE.
pub fn wake(fd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    call(fd, UFFDIO_WAKE, &mut uffdio_range { start, len })
}

/// UFFDIO_COPY: bytes copied, and why it stopped.
pub fn copy(fd: BorrowedFd<'_>, dst: u64, src: u64, len: u64) -> Done {
    let mut copy = uffdio_copy { dst, src, len, mode: 0, copy: 0 };
    let result = call(fd, UFFDIO_COPY, &mut copy);
    done(result, copy.copy, len)
}

/// UFFDIO_MOVE: bytes whose pages are at `dst` now and no longer at `src`, and why it stopped.
pub fn move_pages(fd: BorrowedFd<'_>, dst: u64, src: u64, len: u64) -> Done {
    let mut moved = uffdio_move { dst, src, len, mode: 0, done: 0 };
    let result = call(fd, UFFDIO_MOVE, &mut moved);
    done(result, moved.done, len)
}

/// UFFDIO_ZEROPAGE.
pub fn zeropage(fd: BorrowedFd<'_>, start: u64, len: u64) -> Done {
    span(fd, UFFDIO_ZEROPAGE, start, len)
}

/// UFFDIO_CONTINUE.
pub fn cont(fd: BorrowedFd<'_>, start: u64, len: u64) -> Done {
    span(fd, UFFDIO_CONTINUE, start, len)
}

/// UFFDIO_POISON.
pub fn poison(fd: BorrowedFd<'_>, start: u64, len: u64) -> Done {
    span(fd, UFFDIO_POISON, start, len)
}

fn span(fd: BorrowedFd<'_>, request: u32, start: u64, len: u64) -> Done {
    let mut span = uffdio_span { range: uffdio_range { start, len }, mode: 0, done: 0 };
    let result = call(fd, request, &mut span);
    done(result, span.done, len)
}

/// The count field holds the bytes done, or -errno when there were none; the call itself then fails with that errno, or
/// with EAGAIN when some were done. A count that is an errno must never be taken for a length.
fn done(result: Result<(), Errno>, count: i64, len: u64) -> Done {
    match result {
        Ok(()) => (len, None),
        Err(errno) if count > 0 => {
            // Part was done. EAGAIN says only that; the next call shows the reason for the stop.
            (count as u64, (errno != Errno::AGAIN).then_some(errno))
        }
        Err(errno) => (0, Some(errno)),
    }
}

// Nothing of its own: a fault passes it.
#[inline(always)]
fn call<T>(fd: BorrowedFd<'_>, request: u32, argument: &mut T) -> Result<(), Errno> {
    // SAFETY: `argument` is the struct that `request` was computed from (asserted in uapi), valid for the call.
    unsafe { ioctl::call(fd, request, argument) }.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_that_is_an_errno_is_no_length() {
        assert_eq!(done(Err(Errno::AGAIN), -i64::from(libc::EAGAIN), 4096), (0, Some(Errno::AGAIN)));
        assert_eq!(done(Err(Errno::EXIST), -i64::from(libc::EEXIST), 4096), (0, Some(Errno::EXIST)));
        assert_eq!(done(Err(Errno::AGAIN), 4096, 8192), (4096, None));
        assert_eq!(done(Err(Errno::NOENT), 0, 8192), (0, Some(Errno::NOENT)));
        assert_eq!(done(Ok(()), 8192, 8192), (8192, None));
    }
}
