//! Small files and links of /proc and /sys.

use std::ffi::CStr;
use std::io::Write;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::alloc::refusable;

/// Bytes per read.
const PIECE: usize = 16 << 10;

/// Reads a file to its end. ENOMEM: no memory, or no mapping, for it.
pub fn read(path: &CStr) -> Result<Vec<u8>, Errno> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let mut bytes = Vec::new();
    loop {
        let at = bytes.len();
        refusable(|| bytes.try_reserve(PIECE)).map_err(|_| Errno::NOMEM)?;
        bytes.resize(at + PIECE, 0);
        // A filter may refuse read(2). The file is read from its start to its end, so both calls read the same.
        let read = rustix::io::read(&file, &mut bytes[at..])
            .or_else(|errno| rustix::io::pread(&file, &mut bytes[at..], at as u64).map_err(|_| errno));
        match read {
            Ok(n) => bytes.truncate(at + n),
            Err(Errno::INTR) => {
                bytes.truncate(at);
                continue;
            }
            Err(errno) => return Err(errno),
        }
        if bytes.len() == at {
            return Ok(bytes);
        }
    }
}

/// A path that is formatted without allocating.
pub struct Path([u8; 96]);

impl Path {
    /// The path of a descriptor's link.
    pub fn of_fd(fd: i32) -> Self {
        Self::new(format_args!("/proc/self/fd/{fd}"))
    }

    /// Formats a path. A longer one than 95 bytes is cut.
    pub fn new(path: std::fmt::Arguments<'_>) -> Self {
        let mut room = [0; 96];
        // The last byte stays 0.
        let _ = (&mut room[..95]).write_fmt(path);
        Self(room)
    }
}

impl std::ops::Deref for Path {
    type Target = CStr;

    fn deref(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}

/// Whether a descriptor's link reads `what`.
pub fn is_linked_to(fd: i32, what: &[u8]) -> bool {
    let mut room = [0_u8; 64];
    // SAFETY: reads a C string and writes at most the length passed.
    let n = unsafe { libc::readlink(Path::of_fd(fd).as_ptr(), room.as_mut_ptr().cast(), room.len()) };
    usize::try_from(n).is_ok_and(|n| &room[..n] == what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_whole_and_a_link_is_known() {
        let text = read(c"/proc/self/maps").expect("there is one");
        assert!(text.len() > 100 && text.ends_with(b"\n"));
        assert_eq!(read(c"/proc/self/nothing"), Err(Errno::NOENT));
        let event = crate::service::eventfd().expect("a descriptor");
        let fd = std::os::fd::AsRawFd::as_raw_fd(&event);
        assert!(is_linked_to(fd, b"anon_inode:[eventfd]") && !is_linked_to(fd, b"anon_inode:[event]"));
        assert!(!is_linked_to(-1, b""));
        assert_eq!(&*Path::new(format_args!("{:200}", 1)), Path::new(format_args!("{:95}", "")).as_ref());
    }
}
