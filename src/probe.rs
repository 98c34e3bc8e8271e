//! What this host can do, and why not.

use std::ffi::{c_char, c_int};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::mechanism::userfaultfd::open;
use crate::service::duplicate_vm;
use crate::uapi::kvm::*;
use crate::uapi::userfaultfd::*;

/// Findings per mechanism: how it works, or the error that `kuf_open` would give.
pub struct Report {
    features: u64,
    found: [std::result::Result<String, Error>; KUF_MECHANISM_COUNT],
}

/// `kuf_probe`.
pub fn report(vm_fd: c_int) -> Result<Report> {
    let vm = if vm_fd == -1 { None } else { Some(duplicate_vm_checked(vm_fd)?) };
    let uffd = open::offered(false);
    let features = uffd.as_ref().map_or(0, |(features, _)| *features);
    let userfaultfd = match uffd {
        Ok((_, open::Way::UserMode)) => open::open(false).map(|(_, way)| way.text().to_owned()),
        other => other.map(|(_, way)| way.text().to_owned()),
    };
    let auto = userfaultfd.clone().map(|_| "userfaultfd".to_owned());
    Ok(Report { features, found: [auto, userfaultfd, Err(kvm_bitmap()), Err(kvm_async(vm.as_ref()))] })
}

fn duplicate_vm_checked(vm_fd: c_int) -> Result<OwnedFd> {
    if vm_fd < -1 {
        return Err(Error::new(libc::EINVAL, format!("vm_fd is {vm_fd}: -1 stands for no VM")));
    }
    duplicate_vm(vm_fd)
}

/// The asynchronous interface's capability number was given to another feature since, so a number proves nothing; a
/// refusal to *disable* what was never enabled does, and changes nothing.
fn kvm_async(vm: Option<&OwnedFd>) -> Error {
    let Some(vm) = vm else {
        return Error::new(libc::ENOTSUP, "KVM asynchronous userfaults: pass a VM descriptor to find out");
    };
    let cap =
        kvm_enable_cap { cap: KVM_CAP_USERFAULT_ASYNC, flags: 0, args: [KVM_USERFAULT_DISABLE, 0, 0, 0], pad: [0; 64] };
    let attributes = system_extension(KVM_CAP_MEMORY_ATTRIBUTES).unwrap_or(0);
    let marks = attributes as u64 & KVM_MEMORY_ATTRIBUTE_USERFAULT != 0;
    // SAFETY: the struct that the request was computed from.
    let disabled = marks && unsafe { libc::ioctl(vm.as_raw_fd(), libc::c_ulong::from(KVM_ENABLE_CAP) as _, &cap) } == 0;
    let text = if disabled {
        "this kernel has KVM asynchronous userfaults; this version of the library does not serve them"
    } else {
        "this kernel has no KVM asynchronous userfaults (KVM_READ_USERFAULT): no released kernel does"
    };
    Error::new(libc::ENOTSUP, text)
}

fn system_extension(extension: u32) -> Option<c_int> {
    let kvm = kvm_ioctls::Kvm::new().ok()?;
    Some(kvm.check_extension_raw(u64::from(extension)))
}

fn kvm_bitmap() -> Error {
    let text = "KVM userfault bitmap: not served by this version of the library, and in no released kernel";
    Error::new(libc::ENOTSUP, text)
}

impl Report {
    /// For the C ABI.
    pub fn to_c(&self, size: u32) -> kuf_probe {
        let mut probe = kuf_probe {
            size,
            recommended: KUF_MECHANISM_AUTO,
            mechanisms: 0,
            page_size: rustix::param::page_size() as u32,
            uffd_features: self.features,
            error: [0; KUF_MECHANISM_COUNT],
            why: [[0; 512]; KUF_MECHANISM_COUNT],
        };
        for (n, found) in self.found.iter().enumerate() {
            let text = match found {
                Ok(text) => {
                    probe.mechanisms |= 1 << n;
                    text
                }
                Err(error) => {
                    probe.error[n] = -error.errno();
                    error.text()
                }
            };
            // The last byte stays the terminator.
            let room = probe.why[n].len() - 1;
            for (to, from) in probe.why[n][..room].iter_mut().zip(text.bytes()) {
                *to = from as c_char;
            }
        }
        if self.found[KUF_MECHANISM_USERFAULTFD as usize].is_ok() {
            probe.recommended = KUF_MECHANISM_USERFAULTFD;
        }
        probe
    }
}

/// `kuf_has_feature`.
pub fn has_feature(feature: u32) -> Result<bool> {
    let offered = |bits: u64| open::offered(false).is_ok_and(|(features, _)| features & bits != 0);
    Ok(match feature {
        KUF_FEATURE_POISON => offered(UFFD_FEATURE_POISON),
        KUF_FEATURE_MINOR => offered(UFFD_FEATURE_MINOR_SHMEM),
        KUF_FEATURE_THREAD_ID => offered(UFFD_FEATURE_THREAD_ID),
        KUF_FEATURE_KERNEL_FAULTS => open::open(false).is_ok(),
        KUF_FEATURE_USER_FAULTS => open::open(true).is_ok(),
        other => return Err(Error::new(libc::EINVAL, format!("feature {other} is unknown to this version"))),
    })
}
