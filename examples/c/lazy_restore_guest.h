/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* lazy_restore_guest.h - constants shared by lazy_restore and its guest, for the C compiler and the assembler */
#ifndef LAZY_RESTORE_GUEST_H
#define LAZY_RESTORE_GUEST_H

/* Guest physical memory: page tables, code, data. */
#if defined(__aarch64__)
#define GUEST_TABLE 0x1000
/* Addresses behind all memory in place of ports: four bytes each, from PORT_BUILT on. */
#define GUEST_PORTS 0x40000000
#else
#define GUEST_PML4 0x1000
#define GUEST_PDPT 0x2000
#define GUEST_PD 0x3000
#endif
#define GUEST_CODE 0x8000
#define GUEST_DATA 0x200000

/* The 32-bit ports that the guest writes to: ports of a PC, or words at GUEST_PORTS. */
#define PORT_BUILT 0x500    /* the data is built: take the snapshot now */
#define PORT_FIRST 0x501    /* the first action of a restored guest */
#define PORT_BAD_PAGES 0x502
#define PORT_SUM_LOW 0x503  /* sum of all words read, two halves */
#define PORT_SUM_HIGH 0x504
#define PORT_DONE 0x505

/* The content of the pages and the order of the checks, as in example.h. */
#define GUEST_SEED 0x9e3779b97f4a7c15
#define GUEST_SCATTER 1640531527

#endif
