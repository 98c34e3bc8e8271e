/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* lazy_restore_arm64.h - the state and the reports of lazy_restore's vCPUs on arm64; part of lazy_restore.c */
#ifndef LAZY_RESTORE_ARM64_H
#define LAZY_RESTORE_ARM64_H

#include <stddef.h>

#define CORE(field) \
    (KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | (offsetof(struct kvm_regs, field) / sizeof(uint32_t)))
#define X(n) (CORE(regs.regs[0]) + (n) * sizeof(uint64_t) / sizeof(uint32_t))
#define SCTLR_EL1 ARM64_SYS_REG(3, 0, 1, 0, 0)
#define TTBR0_EL1 ARM64_SYS_REG(3, 0, 2, 0, 0)
#define TCR_EL1 ARM64_SYS_REG(3, 0, 2, 0, 2)
#define MAIR_EL1 ARM64_SYS_REG(3, 0, 10, 2, 0)

/* This is all state of a vCPU here, because the guest uses no interrupts and no vectors. A general VMM saves more. */
enum { GENERAL = 31, OTHERS = 6, STATE = GENERAL + OTHERS };
static const uint64_t other_registers[OTHERS] = {
    CORE(regs.pc), CORE(regs.pstate), MAIR_EL1, TCR_EL1, TTBR0_EL1, SCTLR_EL1,
};

struct vcpu_state {
    uint64_t value[STATE];
};

static uint64_t state_register(unsigned n)
{
    return n < GENERAL ? X(n) : other_registers[n - GENERAL];
}

static void kvm_set(const struct vcpu *vcpu, uint64_t id, uint64_t value)
{
    struct kvm_one_reg reg = { .id = id, .addr = (uintptr_t)&value };
    KVM_CALL(vcpu->fd, KVM_SET_ONE_REG, &reg);
}

/* Limits the guest physical address to the bits that the machine has; KVM's default is 40. */
static unsigned long kvm_machine_type(int kvm)
{
    int bits = ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_ARM_VM_IPA_SIZE);
    return bits > 0 && bits < 40 ? KVM_VM_TYPE_ARM_IPA_SIZE((unsigned)bits) : 0;
}

static void kvm_init_vcpu(const struct machine *machine, const struct vcpu *vcpu)
{
    struct kvm_vcpu_init init;
    KVM_CALL(machine->vm, KVM_ARM_PREFERRED_TARGET, &init);
    KVM_CALL(vcpu->fd, KVM_ARM_VCPU_INIT, &init);
}

/*
 * Writes a table that maps two GiB onto themselves: the memory, cached as in the VMM, which writes the snapshot; and
 * the addresses in place of ports.
 */
static void kvm_map_guest(uint8_t *memory)
{
    enum { BLOCK = 1, DEVICE = 1 << 2, INNER_SHAREABLE = 3 << 8, ACCESSED = 1 << 10 };
    const uint64_t never_executed = UINT64_C(3) << 53;
    uint64_t *table = (uint64_t *)(memory + GUEST_TABLE);
    table[0] = BLOCK | INNER_SHAREABLE | ACCESSED;
    table[1] = GUEST_PORTS | BLOCK | DEVICE | ACCESSED | never_executed;
}

/* Puts a new vCPU at the start of the guest: in EL1, interrupts masked, address translation and caches on. */
static void kvm_reset_vcpu(struct machine *machine, struct vcpu *vcpu)
{
    enum { EL1H_MASKED = 0x3c5, MMU = 1 << 0, CACHED = 1 << 2, INSTRUCTIONS_CACHED = 1 << 12, RESERVED_ONES = 0x30d00800 };
    enum { WRITE_BACK = 0xff, DEVICE_NGNRE = 0x04 };
    /* 39 address bits, tables cached and shared, 4 KiB pages, no table for the upper half. */
    const uint64_t tcr = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | UINT64_C(2) << 30;
    kvm_set(vcpu, MAIR_EL1, WRITE_BACK | DEVICE_NGNRE << 8);
    kvm_set(vcpu, TCR_EL1, tcr);
    kvm_set(vcpu, TTBR0_EL1, GUEST_TABLE);
    kvm_set(vcpu, SCTLR_EL1, RESERVED_ONES | MMU | CACHED | INSTRUCTIONS_CACHED);
    kvm_set(vcpu, CORE(regs.pstate), EL1H_MASKED);
    kvm_set(vcpu, CORE(regs.pc), GUEST_CODE);
    const uint64_t arguments[] = { GUEST_DATA, machine->data_pages, vcpu->index, machine->vcpus, GUEST_PORTS, PAGE };
    for (unsigned i = 0; i < sizeof(arguments) / sizeof(arguments[0]); i++)
        kvm_set(vcpu, X(i), arguments[i]);
}

static void kvm_get_state(struct vcpu *vcpu, struct vcpu_state *state)
{
    for (unsigned i = 0; i < STATE; i++) {
        struct kvm_one_reg reg = { .id = state_register(i), .addr = (uintptr_t)&state->value[i] };
        KVM_CALL(vcpu->fd, KVM_GET_ONE_REG, &reg);
    }
}

static void kvm_restore_vcpu(struct vcpu *vcpu, struct vcpu_state *state)
{
    for (unsigned i = 0; i < STATE; i++)
        kvm_set(vcpu, state_register(i), state->value[i]);
}

/* Whether the vCPU has stopped at a write to the addresses in place of ports. */
static bool kvm_port_write(const struct kvm_run *run, uint16_t *port, uint32_t *value)
{
    uint64_t at = run->exit_reason == KVM_EXIT_MMIO ? run->mmio.phys_addr - GUEST_PORTS : UINT64_MAX;
    if (at > (PORT_DONE - PORT_BUILT) * sizeof(*value) || !run->mmio.is_write || run->mmio.len != sizeof(*value))
        return false;
    *port = (uint16_t)(PORT_BUILT + at / sizeof(*value));
    memcpy(value, run->mmio.data, sizeof(*value));
    return true;
}

#endif
