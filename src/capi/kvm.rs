//! The calls of `kuf-kvm.h`.

use std::ffi::c_int;

use super::guard::guard;
use super::handle::Handle;
use crate::abi::*;
use crate::error::Error;
use crate::service::calls::kvm;

/// Reports the address of the bitmap of the slot that starts at gpa, for
/// kvm_userspace_memory_region2.userfault_bitmap (offset 48) of the memslot that the caller sets with
/// KVM_MEM_USERFAULT (1 << 3).
///
/// address: set on success.
///
/// One bit for each 4 KiB, set where a vCPU is to exit; only the library writes it. After KUF_EVENT_COMPLETE the
/// caller may take the flag off the memslot, which makes huge mappings possible again, and set it again before
/// kuf_discard if it wants exits. It changes memslots on a thread of its own, not in a callback: KVM waits for the
/// threads that are blocked on pages. kuf_remove_memory and kuf_close unmap the bitmap: take the flag off first.
///
/// Returns 0. Also from callbacks.
/// -EINVAL: address is NULL. -ENOENT: no slot starts at gpa. -ENOTSUP: another mechanism.
/// Kernel: KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_USERFAULT.
///
/// # Safety
/// `kuf` came from kuf_open; `address` is NULL or writable.
#[no_mangle]
pub unsafe extern "C" fn kuf_kvm_bitmap(kuf: *mut kuf_handle, gpa: u64, address: *mut u64) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        if address.is_null() {
            return Err(Error::null("address"));
        }
        let at = kvm::kvm_bitmap(handle.service(), gpa)?;
        // SAFETY: checked for NULL; the caller promises that it is writable.
        unsafe { *address = at };
        Ok(0)
    })
}

/// Names pages that KVM itself reads or writes: kvmclock, steal time, PV EOI, interrupt controller tables. They are
/// filled first when a fault was lost (KUF_KVM_EVENT_SWEEP).
///
/// gpa, len: of any alignment, within one slot; len not 0. Remembered until the slot is removed.
///
/// Fill them before vCPUs run (kuf_ensure) where that is possible: a thread that is blocked on one stays inside KVM.
/// No effect with other mechanisms than KUF_MECHANISM_KVM_ASYNC.
///
/// Returns 0. Also from callbacks.
/// -ENOENT: gpa is in no slot. -ERANGE: the range leaves its slot.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_kvm_owned(kuf: *mut kuf_handle, gpa: u64, len: u64) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        let handle = unsafe { Handle::enter(kuf) }?;
        kvm::kvm_owned(handle.service(), gpa, len)?;
        Ok(0)
    })
}

/// Returns when no thread is known to be blocked on a page. For work that waits inside the kernel for such threads:
/// changes of memslots, ioeventfds and coalesced MMIO ranges with KUF_MECHANISM_KVM_ASYNC.
///
/// timeout_ms: milliseconds at most; -1: no limit; 0 looks only.
///
/// Stop the vCPUs first, and make no other call that has KVM touch guest memory until the change is made. Hold no
/// lock that the fill callback takes.
///
/// Returns 0. Not from a callback, and on a caller-driven handle not on the thread that reads.
/// -ETIMEDOUT: threads are still blocked. -EHWPOISON: KVM is blocked on a poisoned page (KUF_KVM_EVENT_PARKED); once
///   for each.
///
/// # Safety
/// `kuf` came from kuf_open.
#[no_mangle]
pub unsafe extern "C" fn kuf_kvm_quiesce(kuf: *mut kuf_handle, timeout_ms: c_int) -> c_int {
    guard(|| {
        // SAFETY: the caller promises that it came from kuf_open.
        kvm::quiesce(unsafe { Handle::enter(kuf) }?.service(), timeout_ms)?;
        Ok(0)
    })
}
