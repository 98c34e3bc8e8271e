//! Memory of the host's that may turn out unreadable: looked at by the kernel, which says so instead of faulting.

use std::ops::Range;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::Advice;

/// Copies `len` bytes. Err is an errno: EFAULT, or ENOMEM for the time being.
pub fn read_host(src: *const u8, to: NonNull<u8>, len: usize) -> Result<(), i32> {
    let mut done = 0;
    while done < len {
        // SAFETY: `done` is below `len`, for which `to` has room.
        let local = libc::iovec { iov_base: unsafe { to.add(done) }.as_ptr().cast(), iov_len: len - done };
        let remote = libc::iovec { iov_base: src.wrapping_add(done).cast_mut().cast(), iov_len: len - done };
        let me = rustix::process::getpid().as_raw_nonzero().get();
        // SAFETY: writes only where `local` says, which is this thread's for the time of the call.
        let n = unsafe { libc::process_vm_readv(me, &local, 1, &remote, 1, 0) };
        match usize::try_from(n) {
            Err(_) if errno() == Errno::NOMEM => return Err(libc::ENOMEM),
            Ok(0) | Err(_) => return Err(libc::EFAULT),
            Ok(n) => done += n,
        }
    }
    Ok(())
}

/// Has the kernel bring `src..src+len` in from wherever it is, so that a copy that holds locks need not wait for a disk.
/// Err is an errno. EFAULT: it is not readable (a file that ends before, a bad disk, nothing mapped there). ENOMEM: there
/// is no memory for it now.
pub fn bring_in(src: *const u8, len: usize) -> Result<(), i32> {
    let pages = pages_of(src, len)?;
    let at = src.with_addr(pages.start).cast_mut().cast();
    // SAFETY: reads into the page tables what is mapped there; changes no byte, and an address that is not mapped is an
    // error.
    match unsafe { rustix::mm::madvise(at, pages.len(), Advice::LinuxPopulateRead) } {
        // Before Linux 5.14, or memory of a device: the copy will find out.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        // Said of what is not mapped, too.
        Err(Errno::NOMEM) => mapped(src, len).and(Err(libc::ENOMEM)),
        Err(_) => Err(libc::EFAULT),
    }
}

/// That all of `src..src+len` is mapped. Err is an errno: EFAULT.
pub fn mapped(src: *const u8, len: usize) -> Result<(), i32> {
    let (page, pages) = (rustix::param::page_size(), pages_of(src, len)?);
    let mut bytes = [0_u8; 512];
    for at in pages.clone().step_by(bytes.len() * page) {
        let len = (pages.end - at).min(bytes.len() * page);
        // SAFETY: only looks up what is mapped; `bytes` has one for each page.
        if unsafe { libc::mincore(at as *mut _, len, bytes.as_mut_ptr()) } != 0 {
            return Err(libc::EFAULT);
        }
    }
    Ok(())
}

/// The pages that hold `src..src+len`, in bytes. Err is an errno: there are none.
fn pages_of(src: *const u8, len: usize) -> Result<Range<usize>, i32> {
    let page = rustix::param::page_size();
    let end = src.addr().checked_add(len).and_then(|end| end.checked_next_multiple_of(page)).ok_or(libc::EFAULT)?;
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
    fn what_is_not_mapped_is_told() {
        use rustix::mm::{mmap_anonymous, munmap, MapFlags, ProtFlags};
        let page = rustix::param::page_size();
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe { mmap_anonymous(std::ptr::null_mut(), 2 * page, ProtFlags::READ, MapFlags::PRIVATE) }.unwrap();
        let src = at.cast_const().cast::<u8>();
        assert_eq!((mapped(src, 2 * page), bring_in(src, 2 * page)), (Ok(()), Ok(())));
        // SAFETY: this test's own.
        unsafe { munmap(at.byte_add(page), page) }.unwrap();
        assert_eq!((mapped(src, 2 * page), bring_in(src, 2 * page)), (Err(libc::EFAULT), Err(libc::EFAULT)));
        // SAFETY: as above.
        unsafe { munmap(at, page) }.unwrap();
    }

    #[test]
    fn there_is_nothing_at_the_end_of_all_addresses() {
        for (src, len) in [(usize::MAX, 1), (usize::MAX - 8, 4), (usize::MAX, 0), (8, usize::MAX)] {
            let src = std::ptr::without_provenance(src);
            assert_eq!((mapped(src, len), bring_in(src, len)), (Err(libc::EFAULT), Err(libc::EFAULT)));
        }
    }
}
