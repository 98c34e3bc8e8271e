/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The patched kernel's additions to a distribution's <linux/kvm.h>, which may be older
 * than the kernel that the patches apply to.
 */
#ifndef KUF_UAPI_H
#define KUF_UAPI_H

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>

#define UF_CAP_MEMORY_FAULT_INFO 232
#define UF_CAP_MEMORY_ATTRIBUTES 233
#define UF_CAP_GUEST_MEMFD 234
#define UF_CAP_VM_TYPES 235
#define UF_CAP_USERFAULT 236
#define UF_CAP_USERFAULT_BITMAP 243

#define UF_ENABLE (1ULL << 0)
#define UF_DISABLE (1ULL << 1)

#define UF_ATTR_PRIVATE (1ULL << 3)
#define UF_ATTR_USERFAULT (1ULL << 4)

#define UF_EXIT_MEMORY_FAULT 39
#define UF_EXIT_FLAG_PRIVATE (1ULL << 3)
#define UF_EXIT_FLAG_USERFAULT (1ULL << 4)

#define UF_MEM_LOG_DIRTY (1U << 0)
#define UF_MEM_READONLY (1U << 1)
#define UF_MEM_GUEST_MEMFD (1U << 2)
#define UF_MEM_USERFAULT (1U << 3)

#define UF_VM_TYPE_SW_PROTECTED 1

struct uf_fault {
	uint64_t gfn;
};

struct uf_memory_region2 {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
	uint64_t guest_memfd_offset;
	uint32_t guest_memfd;
	uint32_t pad1;
	uint64_t userfault_bitmap;
	uint64_t pad2[13];
};

struct uf_memory_attributes {
	uint64_t address;
	uint64_t size;
	uint64_t attributes;
	uint64_t flags;
};

struct uf_create_guest_memfd {
	uint64_t size;
	uint64_t flags;
	uint64_t reserved[6];
};

struct uf_pre_fault_memory {
	uint64_t gpa;
	uint64_t size;
	uint64_t flags;
	uint64_t padding[5];
};

struct uf_exit_memory_fault {
	uint64_t flags;
	uint64_t gpa;
	uint64_t size;
};

#define UF_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct uf_memory_region2)
#define UF_SET_MEMORY_ATTRIBUTES _IOW(KVMIO, 0xd2, struct uf_memory_attributes)
#define UF_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct uf_create_guest_memfd)
#define UF_READ_USERFAULT _IOR(KVMIO, 0xd5, struct uf_fault)
#define UF_PRE_FAULT_MEMORY _IOWR(KVMIO, 0xd5, struct uf_pre_fault_memory)

_Static_assert(sizeof(struct uf_memory_region2) == 160, "size");
_Static_assert(offsetof(struct uf_memory_region2, userfault_bitmap) == 48, "offset");
_Static_assert(UF_SET_USER_MEMORY_REGION2 == 0x40A0AE49, "number");
_Static_assert(UF_SET_MEMORY_ATTRIBUTES == 0x4020AED2, "number");
_Static_assert(UF_READ_USERFAULT == 0x8008AED5, "number");
_Static_assert(UF_PRE_FAULT_MEMORY == 0xC040AED5, "number");

#endif
