/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * kuf-kvm.h - the part of libkuf for two KVM interfaces that no released kernel has
 *
 * KVM_MEM_USERFAULT (the bitmap, v3 of June 2025) and KVM_READ_USERFAULT (the asynchronous RFC of July 2024) let a vCPU
 * that touches an absent page leave KVM_RUN, where kuf_vcpu_fault fills the page on its own thread. Both need a kernel with
 * the patches of tests/kernel. This header may change with the kernel: its calls have the symbol version KUF_EXPERIMENTAL,
 * and are not part of what libkuf.so.0 promises to keep.
 *
 * Set kuf_options.mechanism to one of the mechanisms below, and kuf_options.vm_fd to the VM. This file is generated from
 * the library's source.
 */

#ifndef KUF_KVM_H
#define KUF_KVM_H

#include "kuf.h"

/* KVM userfault bitmap (KVM_MEM_USERFAULT, v3 of June 2025), with userfaultfd underneath. A vCPU that touches an
 * absent page leaves KVM_RUN and fills the page on its own thread (kuf_vcpu_fault); all other accesses are caught
 * by userfaultfd. */
#define KUF_MECHANISM_KVM_BITMAP 2
/* KVM asynchronous userfault (KVM_READ_USERFAULT, RFC of July 2024). vCPUs as above; KVM's own accesses block
 * inside KVM, and service threads take them from its queue. Nothing else is caught. The caller must observe these
 * rules:
 *   - Add memory before a vCPU loads its MSRs: KVM keeps what it has looked up. Touched memory is refused (-EBUSY).
 *   - Change memslots only after kuf_kvm_quiesce, with all vCPUs stopped.
 *   - Leave KVM_SET_MEMORY_ATTRIBUTES to the library for these ranges (kuf_kvm_memory.attributes).
 *   - Report memory that the guest gives back with kuf_discard(..., KUF_DISCARD_ZERO); do not unmap or move it
 *     before kuf_remove_memory.
 *   - Put the memory in one memslot range only: a second gpa for it is not marked.
 *   - Call kuf_ensure for memory that threads of the VMM touch, or that any ioctl but KVM_RUN reads; otherwise they
 *     see pages without their bytes, or the ioctl fails with EFAULT or blocks.
 *   - Use the handle in the process that made the VM: KVM answers any other with EIO, which ends the service. */
#define KUF_MECHANISM_KVM_ASYNC 3

/* kuf_options.flags, with KUF_MECHANISM_KVM_ASYNC: the caller asserts that KVM_READ_USERFAULT on an empty queue
 * returns ENOENT (as posted, the RFC oopses there). The library then also looks into the queue twice a second (with
 * KUF_OPEN_DIRECT in kuf_read), so that a lost signal delays a fault and does not lose it
 * (KUF_KVM_EVENT_UNSIGNALLED). */
#define KUF_KVM_OPEN_DRAIN (1u << 31)

/* kuf_kvm_memory.flags, with KUF_MECHANISM_KVM_BITMAP: the library sets the memslot itself: with KVM_MEM_USERFAULT
 * when the slot is added and before kuf_discard, without it when every page is present and when the slot is
 * removed. Not with KUF_OPEN_DIRECT.
 *
 * From kuf_add_memory until kuf_remove_memory or kuf_close has returned the caller neither changes nor deletes the
 * memslot. KVM makes a change wait for every thread that is blocked on a page of the VM, so kuf_add_memory,
 * kuf_discard, kuf_remove_memory and kuf_close on such a slot wait too: call them neither from a callback or a
 * thread that resolves pages, nor with a lock held that resolving pages needs. */
#define KUF_KVM_MEMORY_MEMSLOT (1u << 0)

/* kuf_fault.flags: KVM itself is blocked on the page, in its own access and not in a vCPU's exit. */
#define KUF_KVM_FAULT (1u << 31)

/* KVM lost a fault; the page is unknown (KVM_READ_USERFAULT failed with EFAULT). The library fills the pages of
 * kuf_kvm_owned first and then everything else, and poisons what cannot be filled. On a caller-driven handle the
 * caller must resolve every absent page. */
#define KUF_KVM_EVENT_SWEEP 48
/* KVM itself is blocked on the page gpa..gpa+len, which is poisoned: a vCPU stays inside KVM_RUN until its thread
 * is killed, or the page is discarded and filled. Raised once for each page. */
#define KUF_KVM_EVENT_PARKED 49
/* KVM queued a fault without a signal, or another reader took the signal from the library's eventfd
 * (KUF_KVM_OPEN_DRAIN). Raised once. */
#define KUF_KVM_EVENT_UNSIGNALLED 50

/* What a memory slot says to the mechanisms of this header: kuf_memory.kvm. */
struct kuf_kvm_memory {
    uint32_t size; /* sizeof(struct kuf_kvm_memory), set by the caller. */
    uint32_t flags; /* KUF_KVM_MEMORY_MEMSLOT or 0. */
    /* KUF_MECHANISM_KVM_ASYNC: the memory attributes (KVM_MEMORY_ATTRIBUTE_PRIVATE, 1 << 3) that the range has
     * besides the library's mark, for the whole slot and for as long as it exists. KVM_SET_MEMORY_ATTRIBUTES
     * replaces all attributes. Else 0. */
    uint64_t attributes;
    uint32_t memslot; /* Number of the KVM memslot (and address space << 16) with KUF_KVM_MEMORY_MEMSLOT, else 0. */
    /* Flags of that memslot besides KVM_MEM_USERFAULT: KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY or 0. */
    uint32_t memslot_flags;
};

#ifdef __cplusplus
extern "C" {
#endif /* __cplusplus */

/*
 * Reports the address of the bitmap of the slot that starts at gpa, for
 * kvm_userspace_memory_region2.userfault_bitmap (offset 48) of the memslot that the caller sets with
 * KVM_MEM_USERFAULT (1 << 3).
 *
 * address: set on success.
 *
 * One bit for each 4 KiB, set where a vCPU is to exit; only the library writes it. After KUF_EVENT_COMPLETE the
 * caller may take the flag off the memslot, which makes huge mappings possible again, and set it again before
 * kuf_discard if it wants exits. It changes memslots on a thread of its own, not in a callback: KVM waits for the
 * threads that are blocked on pages. kuf_remove_memory and kuf_close unmap the bitmap: take the flag off first.
 *
 * Returns 0. Also from callbacks.
 * -EINVAL: address is NULL. -ENOENT: no slot starts at gpa. -ENOTSUP: another mechanism.
 * Kernel: KVM_SET_USER_MEMORY_REGION2 with KVM_MEM_USERFAULT.
 */
int kuf_kvm_bitmap(struct kuf *kuf, uint64_t gpa, uint64_t *address);

/*
 * Names pages that KVM itself reads or writes: kvmclock, steal time, PV EOI, interrupt controller tables. They are
 * filled first when a fault was lost (KUF_KVM_EVENT_SWEEP).
 *
 * gpa, len: of any alignment, within one slot; len not 0. Remembered until the slot is removed.
 *
 * Fill them before vCPUs run (kuf_ensure) where that is possible: a thread that is blocked on one stays inside KVM.
 * No effect with other mechanisms than KUF_MECHANISM_KVM_ASYNC.
 *
 * Returns 0. Also from callbacks.
 * -ENOENT: gpa is in no slot. -ERANGE: the range leaves its slot.
 */
int kuf_kvm_owned(struct kuf *kuf, uint64_t gpa, uint64_t len);

/*
 * Returns when no thread is known to be blocked on a page. For work that waits inside the kernel for such threads:
 * changes of memslots, ioeventfds and coalesced MMIO ranges with KUF_MECHANISM_KVM_ASYNC.
 *
 * timeout_ms: milliseconds at most; -1: no limit; 0 looks only.
 *
 * Stop the vCPUs first, and make no other call that has KVM touch guest memory until the change is made. Hold no
 * lock that the fill callback takes.
 *
 * Returns 0. Not from a callback, and on a caller-driven handle not on the thread that reads.
 * -ETIMEDOUT: threads are still blocked. -EHWPOISON: KVM is blocked on a poisoned page (KUF_KVM_EVENT_PARKED); once
 *   for each.
 */
int kuf_kvm_quiesce(struct kuf *kuf, int timeout_ms);

/* For #ifdef: this header has the call. */
#define KUF_HAVE_KUF_KVM_BITMAP 1
#define KUF_HAVE_KUF_KVM_OWNED 1
#define KUF_HAVE_KUF_KVM_QUIESCE 1

#ifdef __cplusplus
}  /* extern "C" */
#endif  /* __cplusplus */

#endif  /* KUF_KVM_H */
