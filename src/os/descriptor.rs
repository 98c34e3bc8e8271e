//! Descriptors that the caller passes.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::proc;
use rustix::io::Errno;

use crate::error::{words, Error, Result};

pub fn borrow(fd: i32, what: &str) -> Result<BorrowedFd<'static>> {
    // SAFETY: looks up the descriptor and nothing else.
    if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(Error::new(Errno::BADF, words!("{what} {fd} is not an open descriptor")));
    }
    // SAFETY: open, and the caller keeps it open during the call, which only duplicates it and looks at it.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

pub fn duplicate(fd: BorrowedFd<'_>, what: &str) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(|e| Error::system(&words!("duplicating {what}"), e))
}

pub fn is_userfaultfd(fd: i32) -> bool {
    proc::is_linked_to(fd, b"anon_inode:[userfaultfd]")
}

/// Whether two descriptors refer to one open file. None: the kernel cannot tell (kcmp).
pub fn same_file(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Option<bool> {
    use std::os::fd::AsRawFd;
    const KCMP_FILE: libc::c_int = 0;
    let me = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: compares, touches nothing.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, me, me, KCMP_FILE, a.as_raw_fd(), b.as_raw_fd()) };
    (order >= 0).then_some(order == 0)
}

/// Duplicates the VM descriptor of `kuf_open`.
pub fn duplicate_vm(fd: i32) -> Result<OwnedFd> {
    let host = borrow(fd, "vm_fd")?;
    if !proc::is_linked_to(fd, b"anon_inode:kvm-vm") {
        return Err(Error::new(Errno::INVAL, words!("vm_fd {fd} is not a KVM VM")));
    }
    duplicate(host.as_fd(), "vm_fd")
}
