//! Poison marks in memory that is under no userfaultfd.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use super::{ioctl, open};
use crate::error::{Error, Result};
use crate::uapi::userfaultfd::*;

/// A userfaultfd for putting poison marks into memory that is under none. It serves no faults: memory is registered for the
/// moment of marking only, and the marks stay.
pub struct Marker(OwnedFd);

impl Marker {
    pub fn open() -> Result<Self> {
        let (fd, _) = open::open(true)?;
        ioctl::api(fd.as_fd(), UFFD_FEATURE_POISON).map_err(|e| Error::system("UFFDIO_API", e))?;
        Ok(Self(fd))
    }

    pub fn mark(&self, hva: u64, len: u64, granule: u64) -> std::result::Result<(), Errno> {
        let fd = self.0.as_fd();
        ioctl::register(fd, hva, len, UFFDIO_REGISTER_MODE_MISSING)?;
        let (mut done, mut result) = (0, Ok(()));
        while done < len && result.is_ok() {
            match ioctl::poison(fd, hva + done, len - done) {
                (bytes, None) => done += bytes,
                // The page is marked already, or exists: the caller has dropped the content before.
                (bytes, Some(Errno::EXIST)) => done += bytes + granule,
                (bytes, Some(Errno::AGAIN)) => done += bytes,
                (_, Some(errno)) => result = Err(errno),
            }
        }
        let _ = ioctl::unregister(fd, hva, len);
        result
    }
}
