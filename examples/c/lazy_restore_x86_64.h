/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* lazy_restore_x86_64.h - the state and the reports of lazy_restore's vCPUs on x86-64; part of lazy_restore.c */
#ifndef LAZY_RESTORE_X86_64_H
#define LAZY_RESTORE_X86_64_H

#include "long_mode.h"

/* This is all state of a vCPU here, because the guest uses no interrupts, SSE or MSRs. A general VMM saves more. */
struct vcpu_state {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_fpu fpu;
    struct kvm_vcpu_events events;
};

static unsigned long kvm_machine_type(int kvm)
{
    (void)kvm;
    return 0;
}

static void kvm_init_vcpu(const struct machine *machine, const struct vcpu *vcpu)
{
    union {
        struct kvm_cpuid2 list;
        uint8_t room[sizeof(struct kvm_cpuid2) + 256 * sizeof(struct kvm_cpuid_entry2)];
    } cpuid = { .list = { .nent = 256 } };
    KVM_CALL(machine->kvm, KVM_GET_SUPPORTED_CPUID, &cpuid);
    KVM_CALL(vcpu->fd, KVM_SET_CPUID2, &cpuid);
}

static void kvm_map_guest(uint8_t *memory)
{
    long_mode_tables(memory, GUEST_PML4, GUEST_PDPT, GUEST_PD);
}

/* Puts a new vCPU into long mode at the start of the guest. */
static void kvm_reset_vcpu(struct machine *machine, struct vcpu *vcpu)
{
    struct kvm_sregs sregs;
    KVM_CALL(vcpu->fd, KVM_GET_SREGS, &sregs);
    long_mode_enter(&sregs, GUEST_PML4);
    KVM_CALL(vcpu->fd, KVM_SET_SREGS, &sregs);

    struct kvm_regs regs = {
        .rip = GUEST_CODE,
        .rflags = LONG_MODE_RFLAGS,
        .rdi = GUEST_DATA,
        .rsi = machine->data_pages,
        .r8 = vcpu->index,
        .r9 = machine->vcpus,
    };
    KVM_CALL(vcpu->fd, KVM_SET_REGS, &regs);
}

static void kvm_get_state(struct vcpu *vcpu, struct vcpu_state *state)
{
    KVM_CALL(vcpu->fd, KVM_GET_REGS, &state->regs);
    KVM_CALL(vcpu->fd, KVM_GET_SREGS, &state->sregs);
    KVM_CALL(vcpu->fd, KVM_GET_FPU, &state->fpu);
    KVM_CALL(vcpu->fd, KVM_GET_VCPU_EVENTS, &state->events);
}

static void kvm_restore_vcpu(struct vcpu *vcpu, struct vcpu_state *state)
{
    KVM_CALL(vcpu->fd, KVM_SET_SREGS, &state->sregs);
    KVM_CALL(vcpu->fd, KVM_SET_REGS, &state->regs);
    KVM_CALL(vcpu->fd, KVM_SET_FPU, &state->fpu);
    KVM_CALL(vcpu->fd, KVM_SET_VCPU_EVENTS, &state->events);
}

/* Whether the vCPU has stopped at a 32-bit write to a port. */
static bool kvm_port_write(const struct kvm_run *run, uint16_t *port, uint32_t *value)
{
    if (run->exit_reason != KVM_EXIT_IO || run->io.size != sizeof(*value))
        return false;
    *port = run->io.port;
    memcpy(value, (const uint8_t *)run + run->io.data_offset, sizeof(*value));
    return true;
}

#endif
