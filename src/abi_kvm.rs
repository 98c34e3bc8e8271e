//! The types of `kuf-kvm.h`: the two KVM interfaces that no released kernel has.

#![allow(non_camel_case_types)]

/// KVM userfault bitmap (KVM_MEM_USERFAULT, v3 of June 2025), with userfaultfd underneath. A vCPU that touches an
/// absent page leaves KVM_RUN and fills the page on its own thread (kuf_vcpu_fault); all other accesses are caught
/// by userfaultfd.
pub const KUF_MECHANISM_KVM_BITMAP: u32 = 2;
/// KVM asynchronous userfault (KVM_READ_USERFAULT, RFC of July 2024). vCPUs as above; KVM's own accesses block
/// inside KVM, and service threads take them from its queue. Nothing else is caught. The caller must observe these
/// rules:
///   - Add memory before a vCPU loads its MSRs: KVM keeps what it has looked up. Touched memory is refused (-EBUSY).
///   - Change memslots only after kuf_kvm_quiesce, with all vCPUs stopped.
///   - Leave KVM_SET_MEMORY_ATTRIBUTES to the library for these ranges (kuf_kvm_memory.attributes).
///   - Report memory that the guest gives back with kuf_discard(..., KUF_DISCARD_ZERO); do not unmap or move it
///     before kuf_remove_memory.
///   - Put the memory in one memslot range only: a second gpa for it is not marked.
///   - Call kuf_ensure for memory that threads of the VMM touch, or that any ioctl but KVM_RUN reads; otherwise they
///     see pages without their bytes, or the ioctl fails with EFAULT or blocks.
///   - Use the handle in the process that made the VM: KVM answers any other with EIO, which ends the service.
pub const KUF_MECHANISM_KVM_ASYNC: u32 = 3;
/// kuf_options.flags, with KUF_MECHANISM_KVM_ASYNC: the caller asserts that KVM_READ_USERFAULT on an empty queue
/// returns ENOENT (as posted, the RFC oopses there). The library then also looks into the queue twice a second (with
/// KUF_OPEN_DIRECT in kuf_read), so that a lost signal delays a fault and does not lose it
/// (KUF_KVM_EVENT_UNSIGNALLED).
pub const KUF_KVM_OPEN_DRAIN: u32 = 1 << 31;
/// kuf_kvm_memory.flags, with KUF_MECHANISM_KVM_BITMAP: the library sets the memslot itself: with KVM_MEM_USERFAULT
/// when the slot is added and before kuf_discard, without it when every page is present and when the slot is
/// removed. Not with KUF_OPEN_DIRECT.
///
/// From kuf_add_memory until kuf_remove_memory or kuf_close has returned the caller neither changes nor deletes the
/// memslot. KVM makes a change wait for every thread that is blocked on a page of the VM, so kuf_add_memory,
/// kuf_discard, kuf_remove_memory and kuf_close on such a slot wait too: call them neither from a callback or a
/// thread that resolves pages, nor with a lock held that resolving pages needs.
pub const KUF_KVM_MEMORY_MEMSLOT: u32 = 1 << 0;
/// kuf_fault.flags: KVM itself is blocked on the page, in its own access and not in a vCPU's exit.
pub const KUF_KVM_FAULT: u32 = 1 << 31;
/// KVM lost a fault; the page is unknown (KVM_READ_USERFAULT failed with EFAULT). The library fills the pages of
/// kuf_kvm_owned first and then everything else, and poisons what cannot be filled. On a caller-driven handle the
/// caller must resolve every absent page.
pub const KUF_KVM_EVENT_SWEEP: u32 = 48;
/// KVM itself is blocked on the page gpa..gpa+len, which is poisoned: a vCPU stays inside KVM_RUN until its thread
/// is killed, or the page is discarded and filled. Raised once for each page.
pub const KUF_KVM_EVENT_PARKED: u32 = 49;
/// KVM queued a fault without a signal, or another reader took the signal from the library's eventfd
/// (KUF_KVM_OPEN_DRAIN). Raised once.
pub const KUF_KVM_EVENT_UNSIGNALLED: u32 = 50;

/// What a memory slot says to the mechanisms of this header: kuf_memory.kvm.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct kuf_kvm_memory {
    /// sizeof(struct kuf_kvm_memory), set by the caller.
    pub size: u32,
    /// KUF_KVM_MEMORY_MEMSLOT or 0.
    pub flags: u32,
    /// KUF_MECHANISM_KVM_ASYNC: the memory attributes (KVM_MEMORY_ATTRIBUTE_PRIVATE, 1 << 3) that the range has
    /// besides the library's mark, for the whole slot and for as long as it exists. KVM_SET_MEMORY_ATTRIBUTES
    /// replaces all attributes. Else 0.
    pub attributes: u64,
    /// Number of the KVM memslot (and address space << 16) with KUF_KVM_MEMORY_MEMSLOT, else 0.
    pub memslot: u32,
    /// Flags of that memslot besides KVM_MEM_USERFAULT: KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY or 0.
    pub memslot_flags: u32,
}
