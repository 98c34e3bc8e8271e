//! What this host can do, and why not.

use std::ffi::{c_char, c_int};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use crate::capi::types::*;
use crate::error::{Error, Result};
use crate::mechanism::kvm_bitmap::set_memslot;
use crate::mechanism::kvm_ioctl;
use crate::mechanism::userfaultfd::open;
use crate::memory::buffer::Buffer;
use crate::memory::staging;
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
    let by_name = |works: Result<()>| works.map(|()| "works; to be asked for by name".to_owned());
    let (bitmap, asynchronous) = (by_name(kvm_bitmap()), by_name(kvm_async(vm.as_ref())));
    let auto = userfaultfd.clone().map(|_| "userfaultfd".to_owned());
    Ok(Report { features, found: [auto, userfaultfd, bitmap, asynchronous] })
}

fn duplicate_vm_checked(vm_fd: c_int) -> Result<OwnedFd> {
    if vm_fd < -1 {
        return Err(Error::new(libc::EINVAL, format!("vm_fd is {vm_fd}: -1 stands for no VM")));
    }
    duplicate_vm(vm_fd)
}

/// The asynchronous interface's capability number was given to another feature since, so a number proves nothing; not
/// being refused to *disable* what was never enabled does, and changes nothing.
pub fn kvm_async(vm: Option<&OwnedFd>) -> Result<()> {
    let Some(vm) = vm else {
        return Err(Error::new(libc::ENOTSUP, "KVM asynchronous userfaults: pass a VM descriptor to find out"));
    };
    let marks = |attributes: Option<c_int>| attributes.unwrap_or(0) as u64 & KVM_MEMORY_ATTRIBUTE_USERFAULT != 0;
    own_vm(vm)?;
    // A VM names the mark only while userfaults are enabled: disabling them would release somebody else's guest.
    if marks(vm_extension(vm, KVM_CAP_MEMORY_ATTRIBUTES)) {
        return Err(Error::new(libc::EEXIST, "userfaults are enabled on this VM already, by somebody else"));
    }
    let args = [KVM_USERFAULT_DISABLE, 0, 0, 0];
    let mut cap = kvm_enable_cap { cap: KVM_CAP_USERFAULT_ASYNC, flags: 0, args, pad: [0; 64] };
    let missing = || {
        let text = "this kernel has no KVM asynchronous userfaults (KVM_READ_USERFAULT): no released kernel does";
        Error::new(libc::ENOTSUP, text)
    };
    let system = system_extension(KVM_CAP_MEMORY_ATTRIBUTES).map_err(|e| no_kvm("KVM asynchronous userfaults", e))?;
    if !marks(Some(system)) {
        return Err(missing());
    }
    // SAFETY: the struct that the request was computed from.
    unsafe { kvm_ioctl::call(vm.as_fd(), KVM_ENABLE_CAP, &mut cap) }.map(drop).map_err(|_| missing())
}

/// KVM answers EIO to any process but the one that made the VM.
pub fn own_vm(vm: &OwnedFd) -> Result<()> {
    if vm_extension(vm, KVM_CAP_MEMORY_ATTRIBUTES).is_none()
        && std::io::Error::last_os_error().raw_os_error() == Some(libc::EIO)
    {
        let text = "this VM is another process's, or dead: only the process that made it can serve it";
        return Err(Error::new(libc::EIO, text));
    }
    Ok(())
}

fn vm_extension(vm: &OwnedFd, extension: u32) -> Option<c_int> {
    // SAFETY: takes a number, returns one.
    let value = unsafe { libc::ioctl(vm.as_raw_fd(), libc::c_ulong::from(KVM_CHECK_EXTENSION) as _, extension) };
    (value >= 0).then_some(value)
}

fn system_extension(extension: u32) -> std::result::Result<c_int, kvm_ioctls::Error> {
    Ok(kvm_ioctls::Kvm::new()?.check_extension_raw(u64::from(extension)))
}

fn no_kvm(what: &str, error: kvm_ioctls::Error) -> Error {
    let reason = std::io::Error::from_raw_os_error(error.errno());
    Error::new(libc::ENOTSUP, format!("{what}: cannot be found out without /dev/kvm ({reason})"))
}

/// Tried on a VM made for it: bit 3 of the memslot flags was proposed for other things too, so the kernel has to take a
/// bitmap that it can read and to refuse one that it cannot.
pub fn kvm_bitmap() -> Result<()> {
    let missing = || {
        let text = "this kernel has no KVM userfault bitmap (KVM_MEM_USERFAULT): no released kernel does";
        Error::new(libc::ENOTSUP, text)
    };
    let made = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
    let vm = made.map_err(|e| no_kvm("KVM userfault bitmap", e))?;
    // SAFETY: open for the life of `vm`.
    let vm = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }.try_clone_to_owned().map_err(|_| missing())?;
    let page = rustix::param::page_size();
    let (memory, bitmap) = (Buffer::new(page)?, Buffer::new(page)?);
    let mut region = kvm_userspace_memory_region2 {
        flags: KVM_MEM_USERFAULT,
        memory_size: page as u64,
        userspace_addr: memory.at().as_ptr() as u64,
        userfault_bitmap: bitmap.at().as_ptr() as u64,
        ..Default::default()
    };
    set_memslot(&vm, &mut region).map_err(|_| missing())?;
    (region.slot, region.guest_phys_addr) = (1, 1 << 30);
    region.userfault_bitmap = (page as u64).wrapping_neg();
    match set_memslot(&vm, &mut region) {
        Err(Errno::INVAL) => Ok(()),
        _ => Err(missing()),
    }
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
        KUF_FEATURE_HUGE => offered(UFFD_FEATURE_MOVE) && staging::works(),
        other => return Err(Error::new(libc::EINVAL, format!("feature {other} is unknown to this version"))),
    })
}
