//! Memory of the host's that may turn out unreadable: looked at by the kernel, which says so instead of faulting.

use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::Advice;

/// Copies `len` bytes. Err is an errno: EFAULT.
pub fn read_host(src: *const u8, to: NonNull<u8>, len: usize) -> std::result::Result<(), i32> {
    let mut done = 0;
    while done < len {
        // SAFETY: `done` is below `len`, for which `to` has room.
        let local = libc::iovec { iov_base: unsafe { to.add(done) }.as_ptr().cast(), iov_len: len - done };
        let remote = libc::iovec { iov_base: src.wrapping_add(done).cast_mut().cast(), iov_len: len - done };
        let me = rustix::process::getpid().as_raw_nonzero().get();
        // SAFETY: writes only where `local` says, which is this thread's for the time of the call.
        let n = unsafe { libc::process_vm_readv(me, &local, 1, &remote, 1, 0) };
        match usize::try_from(n) {
            Ok(0) | Err(_) => return Err(libc::EFAULT),
            Ok(n) => done += n,
        }
    }
    Ok(())
}

/// Has the kernel bring `src..src+len` in from wherever it is, so that a copy that holds locks need not wait for a disk.
/// Err is an errno: it is not readable (a file that ends before, a bad disk, nothing mapped there).
pub fn bring_in(src: *const u8, len: usize) -> std::result::Result<(), i32> {
    let page = rustix::param::page_size();
    let start = src.addr() & !(page - 1);
    let end = src.addr().checked_add(len).and_then(|end| end.checked_next_multiple_of(page)).ok_or(libc::EFAULT)?;
    let at = src.with_addr(start).cast_mut().cast();
    // SAFETY: reads into the page tables what is mapped there; changes no byte, and an address that is not mapped is an
    // error.
    match unsafe { rustix::mm::madvise(at, end - start, Advice::LinuxPopulateRead) } {
        // Before Linux 5.14, or memory of a device: the copy will find out.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(_) => Err(libc::EFAULT),
    }
}
