//! Opens a userfaultfd, or says why it cannot.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use once_cell::sync::OnceCell;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::ioctl;
use crate::error::{words, Error, Result};
use crate::uapi::userfaultfd::*;

/// Which way a userfaultfd was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `/dev/userfaultfd`: the file's permissions decide.
    Device,
    /// The system call, with privilege or by sysctl.
    Syscall,
    /// The system call, for user-mode faults only.
    UserMode,
}

impl Way {
    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Way::Device => "opened through /dev/userfaultfd",
            Way::Syscall => "opened through userfaultfd(2)",
            Way::UserMode => "opened through userfaultfd(2) for user-mode faults only: it cannot serve KVM",
        }
    }
}

/// A new userfaultfd without UFFDIO_API: the device first, then the system call. One for user mode only if the caller
/// has asked for it and nothing better is granted.
pub fn open(user_mode_only: bool) -> Result<(OwnedFd, Way)> {
    let device = from_device();
    if let Ok(fd) = device {
        return Ok((fd, Way::Device));
    }
    let refused = match from_syscall(0) {
        Ok(fd) => return Ok((fd, Way::Syscall)),
        Err(errno) => errno,
    };
    if user_mode_only && refused == Errno::PERM {
        if let Ok(fd) = from_syscall(UFFD_USER_MODE_ONLY) {
            return Ok((fd, Way::UserMode));
        }
    }
    Err(refusal(device.err().unwrap_or(Errno::NOENT), refused))
}

fn from_device() -> std::result::Result<OwnedFd, Errno> {
    let device = rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: takes flags, returns a descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), libc::c_ulong::from(USERFAULTFD_IOC_NEW) as _, flags) };
    owned(fd)
}

fn from_syscall(extra: libc::c_int) -> std::result::Result<OwnedFd, Errno> {
    // SAFETY: takes flags, returns a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | extra) };
    owned(fd as libc::c_int)
}

fn owned(fd: libc::c_int) -> std::result::Result<OwnedFd, Errno> {
    if fd < 0 {
        // SAFETY: errno of this thread.
        return Err(Errno::from_raw_os_error(unsafe { *libc::__errno_location() }));
    }
    // SAFETY: just returned by the kernel, with no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn refusal(device: Errno, syscall: Errno) -> Error {
    let seen = words!("/dev/userfaultfd: {device}; userfaultfd(2): {syscall}");
    match syscall {
        Errno::NOSYS => {
            let text = words!("this kernel has no userfaultfd (CONFIG_USERFAULTFD), or seccomp hides it ({seen})");
            Error::new(Errno::NOSYS, text)
        }
        Errno::PERM => Error::new(
            Errno::PERM,
            words!(
                "userfaultfd is not allowed for this process ({seen}). Any one of these grants it: read and write \
                 permission on /dev/userfaultfd; the capability CAP_SYS_PTRACE; the sysctl vm.unprivileged_userfaultfd=1"
            ),
        ),
        other => Error::new(other, words!("userfaultfd could not be opened ({seen})")),
    }
}

/// The UFFD_FEATURE_* bits this kernel offers, and the way that worked. Probed once; after a failure the next call probes
/// again, for permissions change.
pub fn offered(user_mode_only: bool) -> Result<(u64, Way)> {
    static OFFERED: OnceCell<(u64, Way)> = OnceCell::new();
    OFFERED
        .get_or_try_init(|| {
            let (fd, way) = open(user_mode_only)?;
            let features = ioctl::api(fd.as_fd(), 0).map_err(|e| Error::system("UFFDIO_API", e))?;
            Ok((features, way))
        })
        .copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_three_ways_to_grant_it() {
        let error = refusal(Errno::ACCESS, Errno::PERM);
        assert_eq!(error.errno(), Errno::PERM);
        for way in ["/dev/userfaultfd", "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd"] {
            assert!(error.text().contains(way), "{error}");
        }
        assert_eq!(refusal(Errno::NOENT, Errno::NOSYS).errno(), Errno::NOSYS);
        assert_eq!(refusal(Errno::NOENT, Errno::MFILE).errno(), Errno::MFILE);
    }
}
