/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* long_mode.h - sets up the small x86-64 guests of the examples: long mode with the first GiB mapped, no interrupts */
#ifndef LONG_MODE_H
#define LONG_MODE_H

#include <linux/kvm.h>
#include <stdint.h>

/* This I/O privilege level lets user mode write to ports. */
enum { LONG_MODE_USER = 3, LONG_MODE_RFLAGS = 1 << 1 | LONG_MODE_USER << 12 };

/* Writes page tables at these offsets of guest memory. They map the first GiB onto itself with large pages. */
static inline void long_mode_tables(uint8_t *memory, uint64_t pml4, uint64_t pdpt, uint64_t pd)
{
    enum { PRESENT_WRITABLE_USER = 7, LARGE = 0x80 };
    *(uint64_t *)(memory + pml4) = pdpt | PRESENT_WRITABLE_USER;
    *(uint64_t *)(memory + pdpt) = pd | PRESENT_WRITABLE_USER;
    for (uint64_t i = 0; i < 512; i++)
        ((uint64_t *)(memory + pd))[i] = i << 21 | LARGE | PRESENT_WRITABLE_USER;
}

/*
 * Puts a vCPU's special registers into long mode and user mode. A KVM that has to emulate a guest's kernel mode still
 * runs its user mode natively.
 */
static inline void long_mode_enter(struct kvm_sregs *sregs, uint64_t pml4)
{
    enum { CR0_PE = 1, CR0_ET = 1 << 4, CR0_NE = 1 << 5, CR0_WP = 1 << 16, CR4_PAE = 1 << 5 };
    enum { EFER_LME = 1 << 8, EFER_LMA = 1 << 10 };
    struct kvm_segment code = {
        .limit = ~0u, .selector = 8 | LONG_MODE_USER, .type = 11, .present = 1, .dpl = LONG_MODE_USER, .s = 1, .l = 1,
        .g = 1,
    };
    struct kvm_segment data = {
        .limit = ~0u, .selector = 16 | LONG_MODE_USER, .type = 3, .present = 1, .dpl = LONG_MODE_USER, .s = 1, .db = 1,
        .g = 1,
    };
    sregs->cs = code;
    sregs->ds = sregs->es = sregs->fs = sregs->gs = sregs->ss = data;
    sregs->cr0 = UINT64_C(1) << 31 | CR0_WP | CR0_NE | CR0_ET | CR0_PE;
    sregs->cr3 = pml4;
    sregs->cr4 = CR4_PAE;
    sregs->efer = EFER_LMA | EFER_LME;
}

#endif
