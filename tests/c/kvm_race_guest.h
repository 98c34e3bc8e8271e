/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The guest of kvm_race and its vCPUs. It executes the orders of its mailbox one after the other, reports, and begins anew.
 * A mailbox is the number of orders, the words of a page, and from byte 64 on the orders of 64 bytes each: address, factor,
 * summand, 1 to write and 0 to compare, and, from the guest, the words that differ and the first of them. The word at an
 * address is (address | 1) * factor + summand.
 */
#ifndef KUF_TESTS_KVM_RACE_GUEST_H
#define KUF_TESTS_KVM_RACE_GUEST_H

#include "harness.h"

#include <linux/kvm.h>
#include <stddef.h>

#define KVM_CALL(fd, request, argument) must(ioctl(fd, request, argument) >= 0, #request ": %s", strerror(errno))

extern const unsigned char race_guest[], race_guest_end[];

#if defined(__x86_64__)

#include "../../examples/c/long_mode.h"

enum { PML4 = 0x1000, PDPT = 0x2000, PD = 0x3000, CODE = 0x8000, MAILBOX = 0x10000, LOW = 0x20000 };

/* In long mode at CPL 3; r15: the mailbox. */
__asm__(".intel_syntax noprefix\n"
        "        .section .rodata\n"
        "        .global race_guest, race_guest_end\n"
        "race_guest:\n"
        "        mov     r14, [r15]\n"
        "        mov     r12, [r15 + 8]\n"
        "        lea     r13, [r15 + 64]\n"
        "1:      mov     rdi, [r13]\n"
        "        mov     r8, [r13 + 8]\n"
        "        mov     rsi, [r13 + 16]\n"
        "        mov     rdx, [r13 + 24]\n"
        "        xor     eax, eax\n"
        "        xor     ebx, ebx\n"
        "        mov     rcx, r12\n"
        "2:      mov     r9, rdi\n"
        "        or      r9, 1\n"
        "        imul    r9, r8\n"
        "        add     r9, rsi\n"
        "        test    rdx, rdx\n"
        "        jnz     4f\n"
        "        mov     r10, [rdi]\n"
        "        cmp     r10, r9\n"
        "        je      5f\n"
        "        test    eax, eax\n"
        "        jnz     3f\n"
        "        mov     rbx, r10\n"
        "3:      inc     eax\n"
        "        jmp     5f\n"
        "4:      mov     [rdi], r9\n"
        "5:      add     rdi, 8\n"
        "        dec     rcx\n"
        "        jnz     2b\n"
        "        mov     [r13 + 32], rax\n"
        "        mov     [r13 + 40], rbx\n"
        "        add     r13, 64\n"
        "        dec     r14\n"
        "        jnz     1b\n"
        "        mov     dx, 0x500\n"
        "        out     dx, eax\n"
        "        jmp     race_guest\n"
        "race_guest_end:\n"
        "        .text\n"
        "        .att_syntax prefix\n");

static void load_guest(unsigned char *low)
{
    long_mode_tables(low, PML4, PDPT, PD);
    memcpy(low + CODE, race_guest, (size_t)(race_guest_end - race_guest));
}

/* A vCPU in long mode, at the start of the guest. */
static void start_guest(int kvm, int vm, int vcpu, uint64_t mailbox)
{
    static struct {
        struct kvm_cpuid2 list;
        struct kvm_cpuid_entry2 room[256];
    } cpuid;
    (void)vm;
    cpuid.list.nent = 256;
    KVM_CALL(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
    KVM_CALL(vcpu, KVM_SET_CPUID2, &cpuid);
    struct kvm_sregs sregs;
    KVM_CALL(vcpu, KVM_GET_SREGS, &sregs);
    long_mode_enter(&sregs, PML4);
    KVM_CALL(vcpu, KVM_SET_SREGS, &sregs);
    struct kvm_regs regs = {
        .rip = CODE, .rflags = LONG_MODE_RFLAGS, .r15 = mailbox};
    KVM_CALL(vcpu, KVM_SET_REGS, &regs);
}

static bool guest_reports(const struct kvm_run *run)
{
    return run->exit_reason == KVM_EXIT_IO && run->io.port == 0x500;
}

#else

enum { TABLE = 0x1000, CODE = 0x8000, MAILBOX = 0x10000, LOW = 0x20000, REPORTS = 0x40000000 };

/* In EL1; x15: the mailbox, x16: where to report. */
__asm__("        .section .rodata\n"
        "        .balign 8\n"
        "        .global race_guest, race_guest_end\n"
        "race_guest:\n"
        "        ldp     x14, x12, [x15]\n"
        "        add     x13, x15, #64\n"
        "1:      ldp     x0, x8, [x13]\n"
        "        ldp     x1, x2, [x13, #16]\n"
        "        mov     x3, xzr\n"
        "        mov     x4, xzr\n"
        "        mov     x5, x12\n"
        "2:      orr     x9, x0, #1\n"
        "        madd    x9, x9, x8, x1\n"
        "        cbnz    x2, 4f\n"
        "        ldr     x10, [x0]\n"
        "        cmp     x10, x9\n"
        "        b.eq    5f\n"
        "        cbnz    x3, 3f\n"
        "        mov     x4, x10\n"
        "3:      add     x3, x3, #1\n"
        "        b       5f\n"
        "4:      str     x9, [x0]\n"
        "5:      add     x0, x0, #8\n"
        "        subs    x5, x5, #1\n"
        "        b.ne    2b\n"
        "        stp     x3, x4, [x13, #32]\n"
        "        add     x13, x13, #64\n"
        "        subs    x14, x14, #1\n"
        "        b.ne    1b\n"
        "        str     wzr, [x16]\n"
        "        b       race_guest\n"
        "race_guest_end:\n"
        "        .text\n");

/* A table that maps two GiB onto themselves, memory cached and what is reported to not, and the code. */
static void load_guest(unsigned char *low)
{
    enum { BLOCK = 1, DEVICE = 1 << 2, INNER_SHAREABLE = 3 << 8, ACCESSED = 1 << 10 };
    uint64_t *table = (uint64_t *)(low + TABLE);
    table[0] = BLOCK | INNER_SHAREABLE | ACCESSED;
    table[1] = REPORTS | BLOCK | DEVICE | ACCESSED | UINT64_C(3) << 53;
    memcpy(low + CODE, race_guest, (size_t)(race_guest_end - race_guest));
}

#define CORE(field)                                                                                                       \
    (KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | (offsetof(struct kvm_regs, field) / sizeof(uint32_t)))

static void set_register(int vcpu, uint64_t id, uint64_t value)
{
    struct kvm_one_reg reg = {.id = id, .addr = (uintptr_t)&value};
    KVM_CALL(vcpu, KVM_SET_ONE_REG, &reg);
}

/* A vCPU in EL1 with interrupts masked, with address translation and caches on. */
static void start_guest(int kvm, int vm, int vcpu, uint64_t mailbox)
{
    struct kvm_vcpu_init init;
    (void)kvm;
    KVM_CALL(vm, KVM_ARM_PREFERRED_TARGET, &init);
    KVM_CALL(vcpu, KVM_ARM_VCPU_INIT, &init);
    set_register(vcpu, ARM64_SYS_REG(3, 0, 10, 2, 0), 0xff | 0x04 << 8); /* MAIR_EL1: write-back, device */
    /* TCR_EL1: 39 bits of address, tables cached and shared, pages of 4 KiB, nothing in the upper half. */
    set_register(vcpu, ARM64_SYS_REG(3, 0, 2, 0, 2), 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | UINT64_C(2) << 30);
    set_register(vcpu, ARM64_SYS_REG(3, 0, 2, 0, 0), TABLE);          /* TTBR0_EL1 */
    set_register(vcpu, ARM64_SYS_REG(3, 0, 1, 0, 0), 0x30d00800 | 0x1005); /* SCTLR_EL1: on, with caches */
    set_register(vcpu, CORE(regs.pstate), 0x3c5);
    set_register(vcpu, CORE(regs.pc), CODE);
    set_register(vcpu, CORE(regs.regs[15]), mailbox);
    set_register(vcpu, CORE(regs.regs[16]), REPORTS);
}

static bool guest_reports(const struct kvm_run *run)
{
    return run->exit_reason == KVM_EXIT_MMIO && run->mmio.is_write && run->mmio.phys_addr == REPORTS;
}

#endif

#endif
