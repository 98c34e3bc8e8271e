//! Static tracepoints (USDT) of the provider `kuf`, for bpftrace, perf, SystemTap and gdb: one for each act on the way of a
//! fault. Each is a nop in the code, and a note in the file that says where its arguments are. The names and the arguments are
//! documented in `examples/trace/README.md`.
//!
//! `handle` is the address of the handle's service: it tells the handles of one process apart, and means nothing else.

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

/// The callback or the source is about to be asked for the bytes of a run. `flags`: KUF_RUN_DEMAND, or 0.
#[inline(always)]
pub fn fill_begin<H>(handle: &H, (gpa, len): (u64, u64), flags: u32) {
    probe!(kuf, fill_begin, std::ptr::from_ref(handle), gpa, len, flags);
}

/// It has answered. `result`: how many bytes have come, 0 if the caller brings them later, else -errno.
#[inline(always)]
pub fn fill_end<H>(handle: &H, (gpa, len): (u64, u64), result: i64) {
    probe!(kuf, fill_end, std::ptr::from_ref(handle), gpa, len, result);
}

/// The kernel was asked to install a run. `kind`: from where. `result`: how many bytes are installed, from the start of the
/// run; where the kernel has refused the first page, -errno.
#[inline(always)]
pub fn install<H>(handle: &H, (gpa, len): (u64, u64), kind: u32, result: i64) {
    probe!(kuf, install, std::ptr::from_ref(handle), gpa, len, kind, result);
}
