//! Static tracepoints (USDT) of the provider `kuf`, for bpftrace, perf, SystemTap and gdb: one for each act on the path of a
//! fault. Each is a nop in the code, and a note in the file with the places of its arguments. `examples/trace/README.md`
//! documents the names and the arguments.
//!
//! `handle` is the address of the handle's service: it distinguishes the handles of one process, and means nothing else.

// Miri has no inline assembly.
#[cfg(not(miri))]
use sdt::probe;

#[cfg(miri)]
macro_rules! probe {
    (kuf, $name:ident, $($argument:expr),*) => { let _ = ($($argument),*); };
}

/// A fault was read from the kernel. `thread`: the one that is blocked, or 0.
#[inline(always)]
pub fn fault_read<H>(handle: &H, gpa: u64, flags: u32, thread: u32) {
    probe!(kuf, fault_read, std::ptr::from_ref(handle), gpa, flags, thread);
}

/// The library is about to ask the callback or the source for the bytes of a run. `flags`: KUF_RUN_DEMAND, or 0.
#[inline(always)]
pub fn fill_begin<H>(handle: &H, (gpa, len): (u64, u64), flags: u32) {
    probe!(kuf, fill_begin, std::ptr::from_ref(handle), gpa, len, flags);
}

/// The callback or the source has returned. `result`: the number of bytes filled, 0 if deferred or left for later, else
/// -errno.
#[inline(always)]
pub fn fill_end<H>(handle: &H, (gpa, len): (u64, u64), result: i64) {
    probe!(kuf, fill_end, std::ptr::from_ref(handle), gpa, len, result);
}

/// The kernel was asked to install a run. `kind`: the origin of the bytes. `result`: the number of bytes installed, from the
/// start of the run; -errno if the kernel has refused the first page.
#[inline(always)]
pub fn install<H>(handle: &H, (gpa, len): (u64, u64), kind: u32, result: i64) {
    probe!(kuf, install, std::ptr::from_ref(handle), gpa, len, kind, result);
}
