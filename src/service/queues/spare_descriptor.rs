//! A descriptor in reserve. Reading a fork event takes one, for the child's userfaultfd. Without a free descriptor the event
//! stays in the kernel, and the forking thread and every install stay blocked.

use std::os::fd::OwnedFd;

use rustix::event::{eventfd, EventfdFlags};

use rustix::io::Errno;

use crate::sync::{lock, Mutex};

/// Nothing here allocates with the lock held: `service::threads::fork` uses it while malloc is locked.
#[derive(Default)]
pub struct Reserve(Mutex<Option<OwnedFd>>);

impl Reserve {
    /// Takes a descriptor in reserve, unless there is one. False: there is none to be had.
    pub fn refill(&self) -> bool {
        if lock(&self.0).is_some() {
            return true;
        }
        // An eventfd and not a dup: the file table of the whole system may be full too.
        let Ok(fd) = eventfd(0, EventfdFlags::CLOEXEC) else { return false };
        let spare = lock(&self.0).replace(fd);
        drop(spare);
        true
    }

    /// Closes the reserve, so that another descriptor can be opened. False: the reserve was empty.
    pub fn use_up(&self) -> bool {
        let fd = lock(&self.0).take();
        fd.is_some()
    }
}

/// Whether a read that failed with `errno` can succeed later without an act of this process: the kernel had no descriptor or
/// memory for the userfaultfd of a forked child, and keeps the event.
pub fn is_shortage(errno: Errno) -> bool {
    matches!(errno, Errno::MFILE | Errno::NFILE | Errno::NOMEM)
}
