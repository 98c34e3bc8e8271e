//! The mechanisms and features of this host, and the reasons why one is missing.

use std::ffi::{c_char, c_int};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use crate::abi::*;
use crate::error::{words, Error, Reason, Result, Words};
use crate::mapping::buffer::Buffer;
use crate::mechanism::bitmap::set_memslot;
use crate::mechanism::userfaultfd::open;
use crate::memory::staging;
use crate::os::descriptor::duplicate_vm;
use crate::uapi::ioctl;
use crate::uapi::kvm::*;
use crate::uapi::userfaultfd::*;

/// The findings per mechanism: how it works, or the error that `kuf_open` would return.
pub struct Report {
    features: u64,
    found: [std::result::Result<Words, Error>; KUF_MECHANISM_COUNT],
}

/// `kuf_probe`.
pub fn report(vm_fd: Option<c_int>) -> Result<Report> {
    let vm = vm_fd.map(duplicate_vm).transpose()?;
    let uffd = open::offered(false);
    let features = uffd.as_ref().map_or(0, |(features, _)| *features);
    let userfaultfd = match uffd {
        Ok((_, open::Way::UserMode)) => open::open(false).map(|(_, way)| way.text().into()),
        other => other.map(|(_, way)| way.text().into()),
    };
    let by_name = |works: Result<()>| works.map(|()| "works; ask for it by name".into());
    let (bitmap, asynchronous) = (by_name(kvm_bitmap()), by_name(kvm_async(vm.as_ref())));
    let auto = userfaultfd.clone().map(|_| "userfaultfd".into());
    Ok(Report { features, found: [auto, userfaultfd, bitmap, asynchronous] })
}

/// Linux has since given the asynchronous interface's capability number to another feature, so the number proves
/// nothing. The probe *disables* the interface, which was never enabled: success proves that it exists and changes
/// nothing.
pub fn kvm_async(vm: Option<&OwnedFd>) -> Result<()> {
    let Some(vm) = vm else {
        return Err(Error::new(Errno::NOTSUP, "KVM asynchronous userfaults: pass a VM descriptor to find out"));
    };
    let marks = |attributes: Option<c_int>| attributes.unwrap_or(0) as u64 & KVM_MEMORY_ATTRIBUTE_USERFAULT != 0;
    own_vm(vm)?;
    // A VM names the mark only while userfaults are enabled. Another user has enabled them then, and disabling them
    // would release that user's guest.
    if marks(vm_extension(vm, KVM_CAP_MEMORY_ATTRIBUTES)) {
        return Err(Error::new(Errno::EXIST, "userfaults are enabled on this VM already, by another user"));
    }
    let args = [KVM_USERFAULT_DISABLE, 0, 0, 0];
    let mut cap = kvm_enable_cap { cap: KVM_CAP_USERFAULT_ASYNC, flags: 0, args, pad: [0; 64] };
    let missing = || {
        let text = "this kernel has no KVM asynchronous userfaults (KVM_READ_USERFAULT): no released kernel does";
        Error::new(Errno::NOTSUP, text)
    };
    let system = system_extension(KVM_CAP_MEMORY_ATTRIBUTES).map_err(|e| no_kvm("KVM asynchronous userfaults", e))?;
    if !marks(Some(system)) {
        return Err(missing());
    }
    // SAFETY: the struct that the request was computed from.
    unsafe { ioctl::call(vm.as_fd(), KVM_ENABLE_CAP, &mut cap) }.map(drop).map_err(|_| missing())
}

/// Checks that this process made the VM: KVM answers EIO to any other.
pub fn own_vm(vm: &OwnedFd) -> Result<()> {
    if vm_extension(vm, KVM_CAP_MEMORY_ATTRIBUTES).is_none()
        && std::io::Error::last_os_error().raw_os_error() == Some(Errno::IO.raw_os_error())
    {
        let text = "this VM is another process's, or dead: only the process that made it can serve it";
        return Err(Error::new(Errno::IO, text));
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
    let reason = Reason(Errno::from_raw_os_error(error.errno()));
    Error::new(Errno::NOTSUP, words!("{what}: not known without /dev/kvm ({reason})"))
}

/// Tests the bitmap on a VM made for it. Other features were proposed for bit 3 of the memslot flags too, so the kernel
/// has to accept a readable bitmap and to refuse an unreadable one.
pub fn kvm_bitmap() -> Result<()> {
    let missing = || {
        let text = "this kernel has no KVM userfault bitmap (KVM_MEM_USERFAULT): no released kernel does";
        Error::new(Errno::NOTSUP, text)
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
    /// How a mechanism (KUF_MECHANISM_*) works, or why it does not.
    pub fn found(&self, mechanism: u32) -> std::result::Result<&str, &Error> {
        self.found[mechanism as usize].as_deref()
    }

    /// KUF_FEATURE_*.
    pub fn features(&self) -> u32 {
        features(self.features)
    }

    /// For the C ABI.
    pub fn to_c(&self, size: u32) -> kuf_probe_info {
        let mut probe = kuf_probe_info {
            size,
            recommended: KUF_MECHANISM_AUTO,
            mechanisms: 0,
            page_size: rustix::param::page_size() as u32,
            features: self.features(),
            reserved: 0,
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
                    probe.error[n] = -error.errno().raw_os_error();
                    error.text()
                }
            };
            // The last byte stays 0, the terminator.
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

/// The KUF_FEATURE_* bits of this process; `offered` has the UFFD_FEATURE_* bits of the kernel.
fn features(offered: u64) -> u32 {
    let has = |bits: u64| offered & bits != 0;
    let found = [
        (has(UFFD_FEATURE_POISON), KUF_FEATURE_POISON),
        (has(UFFD_FEATURE_MINOR_SHMEM), KUF_FEATURE_MINOR),
        (has(UFFD_FEATURE_THREAD_ID), KUF_FEATURE_THREAD_ID),
        (open::open(false).is_ok(), KUF_FEATURE_KERNEL_FAULTS),
        (open::open(true).is_ok(), KUF_FEATURE_USER_FAULTS),
        (has(UFFD_FEATURE_MOVE) && staging::works(), KUF_FEATURE_HUGE),
    ];
    found.iter().filter(|(works, _)| *works).fold(0, |bits, (_, bit)| bits | bit)
}
