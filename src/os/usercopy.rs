//! Reads the caller's memory through the kernel, so that an unmapped page is EFAULT and not SIGSEGV.

use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::Advice;

/// Copies `len` bytes. Err is an errno: EFAULT, or ENOMEM, which may pass.
pub fn copy_nofault(src: *const u8, to: NonNull<u8>, len: usize) -> Result<(), Errno> {
    let mut done = 0;
    while done < len {
        match read_own(src.wrapping_add(done), &mut Room { to, done, len }) {
            Ok(n) if n > 0 => done += n,
            Err(Errno::NOMEM) => return Err(Errno::NOMEM),
            // The call also answers EFAULT for device memory. Any other errno is not about the memory: this kernel
            // lacks the call, or a filter refuses it. A pipe works everywhere, and its EFAULT is reliable.
            Err(errno) => return through_pipe(src, &mut Room { to, done, len }, errno),
            Ok(_) => return Err(Errno::FAULT),
        }
    }
    Ok(())
}

/// The destination of a copy: `len` bytes from `to` on, of which `done` are copied.
struct Room {
    to: NonNull<u8>,
    done: usize,
    len: usize,
}

impl Room {
    fn left(&mut self) -> libc::iovec {
        // SAFETY: `done` is not beyond `len`, for which `to` has room.
        let at = unsafe { self.to.add(self.done) };
        libc::iovec { iov_base: at.as_ptr().cast(), iov_len: self.len - self.done }
    }
}

/// Copies by process_vm_readv of this process. Returns how many bytes.
fn read_own(src: *const u8, room: &mut Room) -> Result<usize, Errno> {
    let local = room.left();
    let remote = libc::iovec { iov_base: src.cast_mut().cast(), iov_len: local.iov_len };
    let me = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: writes only to `local`, which this thread alone uses during the call.
    let n = unsafe { libc::process_vm_readv(me, &local, 1, &remote, 1, 0) };
    usize::try_from(n).map_err(|_| errno())
}

/// Copies the rest to `room` through a pipe: write(2) answers EFAULT for memory that cannot be read. `why`: the errno
/// of the quicker way. It decides when no pipe can be made.
fn through_pipe(src: *const u8, room: &mut Room, why: Errno) -> Result<(), Errno> {
    let pipe = pipe().map_err(|errno| if why == Errno::FAULT { Errno::FAULT } else { errno });
    let (reader, writer) = pipe?;
    while room.done < room.len {
        let from = src.wrapping_add(room.done);
        // SAFETY: the kernel only reads `from`, as far as the pipe has room.
        let n = unsafe { libc::write(writer.as_raw_fd(), from.cast(), room.len - room.done) };
        let mut coming = match usize::try_from(n).map_err(|_| errno()) {
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno),
            Ok(n) => n,
        };
        while coming > 0 {
            // SAFETY: the pipe holds no more bytes than `room` has left.
            let n = unsafe { libc::read(reader.as_raw_fd(), room.left().iov_base, coming) };
            let n = match usize::try_from(n).map_err(|_| errno()) {
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
                Ok(0) => return Err(Errno::IO),
                Ok(n) => n,
            };
            (coming, room.done) = (coming - n, room.done + n);
        }
    }
    Ok(())
}

/// A pipe that one thread writes and reads in turn, so neither blocks. Err is ENOMEM: no descriptor is free now.
fn pipe() -> Result<(OwnedFd, OwnedFd), Errno> {
    let mut fds = [0; 2];
    // SAFETY: writes two descriptors.
    if unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } < 0 {
        return Err(Errno::NOMEM);
    }
    // SAFETY: just made, with no other owner.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Makes the kernel load `src..src+len` into memory, so that a copy that holds locks need not wait for a disk. Err is
/// an errno. EFAULT: the range is not readable (the file ends before, the disk fails, no mapping is there). ENOMEM:
/// there is no memory for it now.
pub fn populate_read(src: *const u8, len: usize) -> Result<(), Errno> {
    let pages = pages_of(src, len)?;
    let at = src.with_addr(pages.start).cast_mut().cast();
    // SAFETY: the call fills page tables and changes no byte; an address that is not mapped is an error.
    match unsafe { rustix::mm::madvise(at, pages.len(), Advice::LinuxPopulateRead) } {
        Err(Errno::FAULT | Errno::HWPOISON) => Err(Errno::FAULT),
        // ENOMEM may also mean that a part is not mapped.
        Err(Errno::NOMEM) => is_mapped(src, len).and(Err(Errno::NOMEM)),
        // The kernel is older than Linux 5.14, the memory is a device's, or a filter refuses the call: the copy reports
        // bad memory.
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Checks that all of `src..src+len` is mapped. Err is an errno: EFAULT.
pub fn is_mapped(src: *const u8, len: usize) -> Result<(), Errno> {
    let (page, pages) = (rustix::param::page_size(), pages_of(src, len)?);
    let mut bytes = [0_u8; 512];
    for at in pages.clone().step_by(bytes.len() * page) {
        let len = (pages.end - at).min(bytes.len() * page);
        // SAFETY: the call only looks up pages; `bytes` has one byte for each.
        let looked = unsafe { libc::mincore(at as *mut _, len, bytes.as_mut_ptr()) } == 0;
        // Any other errno is not about the memory: the copy reports bad memory.
        if !looked && errno() == Errno::NOMEM {
            return Err(Errno::FAULT);
        }
    }
    Ok(())
}

/// The addresses of the pages that hold `src..src+len`. Err is an errno: the range wraps around.
fn pages_of(src: *const u8, len: usize) -> Result<Range<usize>, Errno> {
    let page = rustix::param::page_size();
    let end = src.addr().checked_add(len).and_then(|end| end.checked_next_multiple_of(page)).ok_or(Errno::FAULT)?;
    Ok(src.addr() & !(page - 1)..end)
}

fn errno() -> Errno {
    // SAFETY: errno of this thread.
    Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unmapped_page_is_reported() {
        use rustix::mm::{mmap_anonymous, munmap, MapFlags, ProtFlags};
        let page = rustix::param::page_size();
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe { mmap_anonymous(std::ptr::null_mut(), 2 * page, ProtFlags::READ, MapFlags::PRIVATE) }.unwrap();
        let src = at.cast_const().cast::<u8>();
        assert_eq!((is_mapped(src, 2 * page), populate_read(src, 2 * page)), (Ok(()), Ok(())));
        // SAFETY: this test's own.
        unsafe { munmap(at.byte_add(page), page) }.unwrap();
        assert_eq!((is_mapped(src, 2 * page), populate_read(src, 2 * page)), (Err(Errno::FAULT), Err(Errno::FAULT)));
        // SAFETY: as above.
        unsafe { munmap(at, page) }.unwrap();
    }

    #[test]
    fn a_pipe_copies_and_says_where_memory_ends() {
        use rustix::mm::{mmap_anonymous, munmap, MapFlags, ProtFlags};
        let page = rustix::param::page_size();
        let len = 40 * page;
        // SAFETY: a new mapping where the kernel likes.
        let at =
            unsafe { mmap_anonymous(std::ptr::null_mut(), len + page, ProtFlags::READ, MapFlags::PRIVATE) }.unwrap();
        // SAFETY: this test's own.
        unsafe { munmap(at.byte_add(len), page) }.unwrap();
        let src = at.cast_const().cast::<u8>();
        let mut bytes = vec![1_u8; len + page];
        let to = NonNull::new(bytes.as_mut_ptr()).unwrap();
        // This copy starts and ends within pages.
        assert_eq!(through_pipe(src.wrapping_add(5), &mut Room { to, done: 0, len: len - 7 }, Errno::NOSYS), Ok(()));
        assert!(bytes[..len - 7].iter().all(|byte| *byte == 0) && bytes[len - 7..].iter().all(|byte| *byte == 1));
        assert_eq!(through_pipe(src, &mut Room { to, done: 0, len: len + 1 }, Errno::NOSYS), Err(Errno::FAULT));
        assert_eq!(copy_nofault(src, to, len), Ok(()));
        assert_eq!(copy_nofault(src, to, len + 1), Err(Errno::FAULT));
        // SAFETY: as above.
        unsafe { munmap(at, len) }.unwrap();
    }

    #[test]
    fn a_range_that_wraps_around_is_reported() {
        for (src, len) in [(usize::MAX, 1), (usize::MAX - 8, 4), (usize::MAX, 0), (8, usize::MAX)] {
            let src = std::ptr::without_provenance(src);
            assert_eq!((is_mapped(src, len), populate_read(src, len)), (Err(Errno::FAULT), Err(Errno::FAULT)));
        }
    }
}
