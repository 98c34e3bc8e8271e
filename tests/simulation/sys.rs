//! The system calls of the process: those for the simulated kernel go there, the rest to the real one.
//!
//! The linker prefers these functions to the C library's. Under `--cfg rustix_no_linux_raw` every call of the library
//! goes through them.

use std::ffi::{c_char, c_int, c_long, c_ulong, c_void, CStr};

use ::kuf::sync::sim;
use libc::{off_t, size_t, ssize_t};

use crate::kernel::{self, with, Answer, By, Install, Target, FIRST_FD, PAGE};

type Call = unsafe extern "C" fn(c_long, ...) -> c_long;

/// The C library's syscall(2).
fn real() -> Call {
    static mut REAL: Option<Call> = None;
    // SAFETY: one thread, and the name is that of a function of this type.
    unsafe {
        if let Some(real) = REAL {
            return real;
        }
        let at = libc::dlsym(libc::RTLD_NEXT, c"syscall".as_ptr());
        let real = std::mem::transmute::<*mut c_void, Call>(at);
        REAL = Some(real);
        real
    }
}

macro_rules! real {
    ($number:expr $(, $argument:expr)*) => {
        // SAFETY: the caller's arguments.
        unsafe { real()($number $(, $argument)*) }
    };
}

fn ours(fd: c_int) -> bool {
    fd >= FIRST_FD
}

/// Whether calls go to the simulated kernel: there is one, and a run is in progress.
fn on() -> bool {
    sim::running() && kernel::on()
}

fn answer<T>(answer: Answer<T>) -> Option<T> {
    answer
        .map_err(|errno| {
            // SAFETY: errno of this thread.
            unsafe { *libc::__errno_location() = errno }
        })
        .ok()
}

fn zero(done: Answer<()>) -> c_int {
    answer(done).map_or(-1, |()| 0)
}

#[no_mangle]
extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut u64) -> c_int {
    const NEW: u32 = 0xaa00;
    if !ours(fd) {
        return real!(libc::SYS_ioctl, fd, request, argument) as c_int;
    }
    let word = |n: usize| {
        // SAFETY: the struct of the request, which is of words.
        unsafe { *argument.add(n) }
    };
    let set = |n: usize, value: u64| {
        // SAFETY: as above.
        unsafe { *argument.add(n) = value }
    };
    let install = |what: Install, len_at: usize, done_at: usize| {
        let (done, errno) = kernel::uffd_install_or_lie(fd, word(0), word(len_at), what);
        set(done_at, if done == 0 { (-i64::from(errno.unwrap_or(0))) as u64 } else { done });
        zero(errno.map_or(Ok(()), Err))
    };
    match request as u32 {
        NEW => -1,
        0xc018_aa3f => {
            sim::point();
            match answer(with(|kernel| kernel.uffd_api(fd, word(1)))) {
                Some(features) => {
                    set(1, features);
                    0
                }
                None => -1,
            }
        }
        0xc020_aa00 => zero(kernel::uffd_register(fd, word(0), word(1), word(2))),
        0x8010_aa01 => zero(kernel::uffd_unregister(fd, word(0), word(1))),
        0x8010_aa02 => zero(kernel::uffd_wake(fd, word(0), word(1))),
        0xc028_aa03 => install(Install::Copy { src: word(1) }, 2, 4),
        0xc020_aa04 => install(Install::Zero, 1, 3),
        0xc020_aa07 => install(Install::Continue, 1, 3),
        0xc020_aa08 => install(Install::Poison, 1, 3),
        // FIONBIO
        0x5421 => 0,
        _ => zero(Err(libc::ENOTTY)),
    }
}

#[no_mangle]
extern "C" fn read(fd: c_int, to: *mut u8, len: size_t) -> ssize_t {
    if !ours(fd) {
        return real!(libc::SYS_read, fd, to, len) as ssize_t;
    }
    // SAFETY: the caller's room.
    let room = unsafe { std::slice::from_raw_parts_mut(to, len) };
    answer(kernel::read(fd, room)).map_or(-1, |n| n as ssize_t)
}

#[no_mangle]
extern "C" fn write(fd: c_int, from: *const u8, len: size_t) -> ssize_t {
    if !ours(fd) {
        return real!(libc::SYS_write, fd, from, len) as ssize_t;
    }
    // SAFETY: the caller's bytes.
    let bytes = if len == 0 { &[][..] } else { unsafe { std::slice::from_raw_parts(from, len) } };
    answer(kernel::write(fd, bytes)).map_or(-1, |n| n as ssize_t)
}

#[no_mangle]
extern "C" fn close(fd: c_int) -> c_int {
    if !ours(fd) {
        return real!(libc::SYS_close, fd) as c_int;
    }
    zero(with(|kernel| kernel.close(fd)))
}

fn open_here(path: *const c_char) -> Option<c_int> {
    if !on() {
        return None;
    }
    // SAFETY: the caller's string.
    let path = unsafe { CStr::from_ptr(path) }.to_str().unwrap_or("");
    let number = path.strip_prefix("/proc/self/fd/").and_then(|fd| fd.parse::<c_int>().ok()).filter(|fd| ours(*fd));
    match path {
        "/dev/userfaultfd" => Some(answer(Err(libc::ENOENT)).unwrap_or(-1)),
        "/proc/self/maps" | "/proc/self/smaps" => {
            sim::point();
            Some(with(|kernel| {
                let text = kernel.maps();
                kernel.new_text(text)
            }))
        }
        "/proc/self/pagemap" => Some(with(|kernel| kernel.new_pagemap())),
        _ => number.map(|fd| answer(with(|kernel| kernel.dup(fd))).unwrap_or(-1)),
    }
}

#[no_mangle]
extern "C" fn open64(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    open_here(path).unwrap_or_else(|| real!(libc::SYS_openat, libc::AT_FDCWD, path, flags, mode) as c_int)
}

#[no_mangle]
extern "C" fn open(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    open64(path, flags, mode)
}

#[no_mangle]
extern "C" fn openat64(at: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    open_here(path).unwrap_or_else(|| real!(libc::SYS_openat, at, path, flags, mode) as c_int)
}

#[no_mangle]
extern "C" fn openat(at: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    openat64(at, path, flags, mode)
}

#[no_mangle]
extern "C" fn fcntl64(fd: c_int, command: c_int, argument: c_ulong) -> c_int {
    if !ours(fd) {
        return real!(libc::SYS_fcntl, fd, command, argument) as c_int;
    }
    let done = with(|kernel| match command {
        libc::F_DUPFD_CLOEXEC | libc::F_DUPFD => kernel.dup(fd),
        libc::F_GETFD | libc::F_GETFL | libc::F_SETFL | libc::F_SETFD => kernel.target(fd).map(|_| 0),
        _ => Err(libc::EINVAL),
    });
    answer(done).unwrap_or(-1)
}

#[no_mangle]
extern "C" fn fcntl(fd: c_int, command: c_int, argument: c_ulong) -> c_int {
    fcntl64(fd, command, argument)
}

#[no_mangle]
extern "C" fn readlink(path: *const c_char, to: *mut c_char, len: size_t) -> ssize_t {
    // SAFETY: the caller's string.
    let text = unsafe { CStr::from_ptr(path) }.to_str().unwrap_or("");
    let number = text.strip_prefix("/proc/self/fd/").and_then(|fd| fd.parse::<c_int>().ok()).filter(|fd| ours(*fd));
    let Some(fd) = number else { return real!(libc::SYS_readlink, path, to, len) as ssize_t };
    let Some(target) = answer(with(|kernel| kernel.target(fd))) else { return -1 };
    let name: &[u8] = match target {
        Target::Uffd(_) => b"anon_inode:[userfaultfd]",
        Target::File(_) => b"/memfd:ram (deleted)",
        _ => b"/elsewhere",
    };
    let len = len.min(name.len());
    // SAFETY: the caller's room.
    unsafe { std::ptr::copy_nonoverlapping(name.as_ptr().cast(), to, len) };
    len as ssize_t
}

#[no_mangle]
extern "C" fn fstat64(fd: c_int, to: *mut libc::stat64) -> c_int {
    if !ours(fd) {
        return real!(libc::SYS_fstat, fd, to) as c_int;
    }
    // SAFETY: plain numbers, in the caller's room.
    let stat = unsafe {
        to.write_bytes(0, 1);
        &mut *to
    };
    with(|kernel| {
        if let Ok(Target::File(n)) = kernel.target(fd) {
            stat.st_ino = 1000 + n as u64;
            stat.st_size = (kernel.files[n].pages.len() as u64 * PAGE) as i64;
            stat.st_blocks = kernel.files[n].pages.iter().filter(|page| **page).count() as i64 * 8;
            stat.st_mode = libc::S_IFREG | 0o600;
        }
    });
    0
}

#[no_mangle]
extern "C" fn fstat(fd: c_int, to: *mut libc::stat64) -> c_int {
    fstat64(fd, to)
}

#[no_mangle]
extern "C" fn fstatfs64(fd: c_int, to: *mut libc::statfs64) -> c_int {
    const TMPFS: i64 = 0x0102_1994;
    if !ours(fd) {
        return real!(libc::SYS_fstatfs, fd, to) as c_int;
    }
    // SAFETY: plain numbers, in the caller's room.
    unsafe {
        to.write_bytes(0, 1);
        if with(|kernel| matches!(kernel.target(fd), Ok(Target::File(_)))) {
            (*to).f_type = TMPFS;
        }
    }
    0
}

#[no_mangle]
extern "C" fn fstatfs(fd: c_int, to: *mut libc::statfs64) -> c_int {
    fstatfs64(fd, to)
}

#[no_mangle]
extern "C" fn lseek64(fd: c_int, to: off_t, whence: c_int) -> off_t {
    if !ours(fd) {
        return real!(libc::SYS_lseek, fd, to, whence);
    }
    let found = with(|kernel| {
        let Target::File(n) = kernel.target(fd)? else { return Err(libc::ESPIPE) };
        let pages = &kernel.files[n].pages;
        let first = to as u64 / PAGE;
        let rest = pages.iter().enumerate().skip(first as usize);
        let mut rest = rest.map(|(n, there)| (n as u64, *there));
        let at = match whence {
            libc::SEEK_DATA => rest.find(|(_, there)| *there).map(|(n, _)| n).ok_or(libc::ENXIO)?,
            libc::SEEK_HOLE => rest.find(|(_, there)| !*there).map_or(pages.len() as u64, |(n, _)| n),
            _ => return Err(libc::EINVAL),
        };
        Ok((at * PAGE).max(to as u64) as off_t)
    });
    answer(found).unwrap_or(-1)
}

#[no_mangle]
extern "C" fn lseek(fd: c_int, to: off_t, whence: c_int) -> off_t {
    lseek64(fd, to, whence)
}

#[no_mangle]
extern "C" fn fallocate64(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int {
    if !ours(fd) {
        return real!(libc::SYS_fallocate, fd, mode, offset, len) as c_int;
    }
    sim::point();
    let (first, count) = (offset as u64 / PAGE, len as u64 / PAGE);
    crate::trace!("fallocate {mode} page {first}+{count}");
    zero(with(|kernel| {
        let Target::File(n) = kernel.target(fd)? else { return Err(libc::ENODEV) };
        if mode & libc::FALLOC_FL_PUNCH_HOLE != 0 {
            kernel.punch(n, first, count);
            return Ok(());
        }
        kernel.allocate(n, first, count)
    }))
}

#[no_mangle]
extern "C" fn fallocate(fd: c_int, mode: c_int, offset: off_t, len: off_t) -> c_int {
    fallocate64(fd, mode, offset, len)
}

#[no_mangle]
extern "C" fn pread64(fd: c_int, to: *mut u8, len: size_t, offset: off_t) -> ssize_t {
    if !ours(fd) {
        return real!(libc::SYS_pread64, fd, to, len, offset) as ssize_t;
    }
    sim::point();
    with(|kernel| {
        for n in 0..len / 8 {
            let at = (offset as u64 / 8 + n as u64) * PAGE;
            let entry = match kernel.pages.get(&at).map(|page| page.entry) {
                Some(kernel::Entry::Word(_) | kernel::Entry::File) => 1_u64 << 63,
                Some(kernel::Entry::Poison) => 1 << 62,
                _ => 0,
            };
            // SAFETY: the caller's room.
            unsafe { to.add(n * 8).cast::<u64>().write_unaligned(entry) };
        }
    });
    (len / 8 * 8) as ssize_t
}

#[no_mangle]
extern "C" fn pread(fd: c_int, to: *mut u8, len: size_t, offset: off_t) -> ssize_t {
    pread64(fd, to, len, offset)
}

#[no_mangle]
extern "C" fn mmap64(at: *mut c_void, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> *mut c_void {
    if !ours(fd) {
        return real!(libc::SYS_mmap, at, len, prot, flags, fd, offset) as *mut c_void;
    }
    with(|kernel| match kernel.target(fd) {
        Ok(Target::File(n)) => kernel.files[n].at.wrapping_add(offset as usize).cast(),
        _ => libc::MAP_FAILED,
    })
}

#[no_mangle]
extern "C" fn mmap(at: *mut c_void, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> *mut c_void {
    mmap64(at, len, prot, flags, fd, offset)
}

#[no_mangle]
extern "C" fn munmap(at: *mut c_void, len: size_t) -> c_int {
    if on() && with(|kernel| kernel.file_at(at.cast(), len).is_some() || kernel.is_cut_off(at.cast())) {
        return 0;
    }
    real!(libc::SYS_munmap, at, len) as c_int
}

#[no_mangle]
extern "C" fn mremap(at: *mut c_void, len: size_t, to_len: size_t, flags: c_int, to: *mut c_void) -> *mut c_void {
    let file = if on() { with(|kernel| kernel.file_at(to.cast(), to_len)) } else { None };
    if let Some((file, ..)) = file {
        sim::point();
        with(|kernel| kernel.cut_off(file));
    } else if !on() || !with(|kernel| kernel.is_cut_off(to.cast())) {
        return real!(libc::SYS_mremap, at, len, to_len, flags, to) as *mut c_void;
    }
    real!(libc::SYS_munmap, at, len);
    to
}

#[no_mangle]
extern "C" fn madvise(at: *mut c_void, len: size_t, advice: c_int) -> c_int {
    if !on() {
        return real!(libc::SYS_madvise, at, len, advice) as c_int;
    }
    if with(|kernel| kernel.is_guest(at as u64)) {
        return zero(kernel::madvise(at as u64, len as u64, advice, By::Library));
    }
    if let Some((file, first, count)) = with(|kernel| kernel.file_at(at.cast(), len)) {
        sim::point();
        let made = with(|kernel| match advice {
            libc::MADV_POPULATE_WRITE | libc::MADV_POPULATE_READ => {
                // A fault that finds no room raises SIGBUS in a guest thread, and is EFAULT here.
                kernel.allocate(file, first, count).map_err(|_| libc::EFAULT)
            }
            _ => Ok(()),
        });
        return zero(made);
    }
    if matches!(advice, libc::MADV_POPULATE_READ) && crate::caller::is_unreadable(at as u64) {
        return zero(Err(libc::EFAULT));
    }
    real!(libc::SYS_madvise, at, len, advice) as c_int
}

#[no_mangle]
extern "C" fn mprotect(at: *mut c_void, len: size_t, prot: c_int) -> c_int {
    if on() && with(|kernel| kernel.is_guest(at as u64)) {
        sim::point();
        with(|kernel| {
            let (start, end) = (at as u64, at as u64 + len as u64);
            kernel.pages.range_mut(start..end).for_each(|(_, page)| page.closed = prot == 0);
        });
        return 0;
    }
    real!(libc::SYS_mprotect, at, len, prot) as c_int
}

#[no_mangle]
extern "C" fn mincore(at: *mut c_void, len: size_t, to: *mut u8) -> c_int {
    if let Some((file, first, count)) = if on() { with(|kernel| kernel.file_at(at.cast(), len)) } else { None } {
        sim::point();
        return zero(with(|kernel| {
            for (n, there) in kernel.files[file].pages[first as usize..(first + count) as usize].iter().enumerate() {
                // SAFETY: the caller's room, a byte for each page.
                unsafe { *to.add(n) = u8::from(*there) };
            }
            Ok(())
        }));
    }
    if !on() || !with(|kernel| kernel.is_guest(at as u64)) {
        if on() && crate::caller::is_unreadable(at as u64) {
            return zero(Err(libc::ENOMEM));
        }
        return real!(libc::SYS_mincore, at, len, to) as c_int;
    }
    sim::point();
    zero(with(|kernel| {
        for n in 0..(len as u64).div_ceil(PAGE) {
            let page = kernel.pages.get(&(at as u64 + n * PAGE)).ok_or(libc::ENOMEM)?;
            let cached = page.file.is_some_and(|(file, n)| kernel.files[file].pages[n as usize]);
            let there = matches!(page.entry, kernel::Entry::Word(_) | kernel::Entry::File) || cached;
            // SAFETY: the caller's room, a byte for each page.
            unsafe { *to.add(n as usize) = u8::from(there) };
        }
        Ok(())
    }))
}

#[no_mangle]
extern "C" fn epoll_create1(flags: c_int) -> c_int {
    if !on() {
        return real!(libc::SYS_epoll_create1, flags) as c_int;
    }
    with(|kernel| kernel.new_epoll())
}

#[no_mangle]
extern "C" fn epoll_ctl(epoll: c_int, op: c_int, fd: c_int, event: *const libc::epoll_event) -> c_int {
    if !ours(epoll) {
        return real!(libc::SYS_epoll_ctl, epoll, op, fd, event) as c_int;
    }
    sim::point();
    // SAFETY: the caller's, or NULL for EPOLL_CTL_DEL.
    let (events, data) = if event.is_null() { (0, 0) } else { unsafe { ((*event).events, (*event).u64) } };
    zero(with(|kernel| kernel.epoll_ctl(epoll, op, fd, events, data)))
}

#[no_mangle]
extern "C" fn epoll_wait(epoll: c_int, to: *mut libc::epoll_event, room: c_int, timeout_ms: c_int) -> c_int {
    if !ours(epoll) {
        return real!(libc::SYS_epoll_pwait, epoll, to, room, timeout_ms, std::ptr::null::<u8>(), 8) as c_int;
    }
    let timeout = u64::try_from(timeout_ms).ok().map(|ms| ms * 1_000_000);
    let Some(found) = answer(kernel::epoll_wait(epoll, room as usize, timeout)) else { return -1 };
    for (n, data) in found.iter().enumerate() {
        let event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: *data };
        // SAFETY: the caller's room.
        unsafe { to.add(n).write(event) };
    }
    found.len() as c_int
}

#[no_mangle]
extern "C" fn eventfd(count: u32, flags: c_int) -> c_int {
    if !on() {
        return real!(libc::SYS_eventfd2, count, flags) as c_int;
    }
    with(|kernel| kernel.new_eventfd(u64::from(count)))
}

fn poll_one(fds: *mut libc::pollfd, timeout_ns: Option<u64>) -> c_int {
    // SAFETY: the caller's array, of one.
    let fd = unsafe { &mut *fds };
    let Some(ready) = answer(kernel::poll(fd.fd, timeout_ns)) else { return -1 };
    fd.revents = if ready { libc::POLLIN } else { 0 };
    c_int::from(ready)
}

fn polls_here(fds: *const libc::pollfd, n: libc::nfds_t) -> bool {
    // SAFETY: the caller's array.
    n == 1 && ours(unsafe { (*fds).fd })
}

#[no_mangle]
extern "C" fn ppoll(
    fds: *mut libc::pollfd,
    n: libc::nfds_t,
    timeout: *const libc::timespec,
    mask: *const libc::sigset_t,
) -> c_int {
    if !polls_here(fds, n) {
        return real!(libc::SYS_ppoll, fds, n, timeout, mask, 8) as c_int;
    }
    // SAFETY: the caller's, or NULL.
    let timeout = unsafe { timeout.as_ref() }.map(|t| t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64);
    poll_one(fds, timeout)
}

#[no_mangle]
extern "C" fn poll(fds: *mut libc::pollfd, n: libc::nfds_t, timeout_ms: c_int) -> c_int {
    if !polls_here(fds, n) {
        return real!(libc::SYS_poll, fds, n, timeout_ms) as c_int;
    }
    poll_one(fds, u64::try_from(timeout_ms).ok().map(|ms| ms * 1_000_000))
}

#[no_mangle]
extern "C" fn process_vm_readv(
    pid: libc::pid_t,
    local: *const libc::iovec,
    n_local: c_ulong,
    remote: *const libc::iovec,
    n_remote: c_ulong,
    flags: c_ulong,
) -> ssize_t {
    // SAFETY: the caller's, at least one.
    let from = unsafe { (*remote).iov_base } as u64;
    if on() && (crate::caller::is_unreadable(from) || with(|kernel| kernel.is_guest(from))) {
        sim::point();
        return answer(Err::<ssize_t, _>(libc::EFAULT)).unwrap_or(-1);
    }
    real!(libc::SYS_process_vm_readv, pid, local, n_local, remote, n_remote, flags) as ssize_t
}

#[no_mangle]
extern "C" fn syscall(number: c_long, a: c_long, b: c_long, c: c_long, d: c_long, e: c_long, f: c_long) -> c_long {
    if on() {
        match number {
            libc::SYS_userfaultfd => {
                sim::point();
                return c_long::from(with(|kernel| kernel.new_uffd()));
            }
            libc::SYS_eventfd2 => return c_long::from(eventfd(a as u32, b as c_int)),
            libc::SYS_kcmp if ours(d as c_int) || ours(e as c_int) => {
                let same = with(|kernel| {
                    let (a, b) = (kernel.target(d as c_int)?, kernel.target(e as c_int)?);
                    Ok(c_long::from(a != b))
                });
                return answer(same).unwrap_or(-1);
            }
            _ => {}
        }
    }
    real!(number, a, b, c, d, e, f)
}

/// rustix calls this one. It returns the errno.
#[no_mangle]
extern "C" fn posix_madvise(at: *mut c_void, len: size_t, advice: c_int) -> c_int {
    match madvise(at, len, advice) {
        0 => 0,
        // SAFETY: errno of this thread.
        _ => unsafe { *libc::__errno_location() },
    }
}
