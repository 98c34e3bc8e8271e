/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * lazy_restore_guest.S - the guest of lazy_restore, run by each of its vCPUs in long mode without a stack
 *
 * On entry: rdi address of the first data page, rsi number of data pages, r8 number of this vCPU, r9 number of vCPUs.
 *
 * It fills the pages whose number is r8 modulo r9, reports PORT_BUILT and is snapshotted there. Restored, it goes on
 * behind that instruction: it checks a scattered choice of pages (all vCPUs together: all pages), writes to each, and
 * checks at the end that all it wrote is still there.
 */
#include "lazy_restore_guest.h"

#if defined(__x86_64__)
        .intel_syntax noprefix
        .section .rodata
        .code64
        .global guest_code, guest_code_end

/* rax: the state of the stream before the first word of page rbx. */
.macro SEED
        lea     rax, [rbx + 1]
        imul    rax, r15
.endm

/* rax: the next word of the stream. */
.macro NEXT
        mov     r14, rax
        shl     r14, 13
        xor     rax, r14
        mov     r14, rax
        shr     r14, 7
        xor     rax, r14
        mov     r14, rax
        shl     r14, 17
        xor     rax, r14
.endm

/* rbp: the address of page rbx. */
.macro ADDRESS
        mov     rbp, rbx
        shl     rbp, 12
        add     rbp, rdi
.endm

/* rbx: the page to check as number r10. */
.macro SCATTER
        imul    rax, r10, GUEST_SCATTER
        xor     edx, edx
        div     rsi
        mov     rbx, rdx
.endm

.macro REPORT port
        mov     dx, \port
        out     dx, eax
.endm

guest_code:
        movabs  r15, GUEST_SEED
        mov     rbx, r8
.Lbuild_page:
        cmp     rbx, rsi
        jae     .Lbuilt
        ADDRESS
        SEED
        mov     ecx, 512
.Lbuild_word:
        NEXT
        mov     [rbp], rax
        add     rbp, 8
        dec     ecx
        jnz     .Lbuild_word
        add     rbx, r9
        jmp     .Lbuild_page

.Lbuilt:
        REPORT  PORT_BUILT

        /* From here on it is the restored guest, with the registers it had and no memory. */
        REPORT  PORT_FIRST
        xor     r12d, r12d                      /* bad pages */
        xor     r13d, r13d                      /* sum of the words */
        mov     r10, r8
.Lcheck_page:
        cmp     r10, rsi
        jae     .Lchecked
        SCATTER
        ADDRESS
        SEED
        mov     rdx, rbp
        xor     r11d, r11d                      /* bits that differ in this page */
        mov     ecx, 512
.Lcheck_word:
        NEXT
        mov     r14, [rdx]
        add     r13, r14
        xor     r14, rax
        or      r11, r14
        add     rdx, 8
        dec     ecx
        jnz     .Lcheck_word
        test    r11, r11
        jz      .Lgood
        inc     r12
.Lgood:
        not     qword ptr [rbp]                 /* the guest's own data now: nobody may fill this page again */
        add     r10, r9
        jmp     .Lcheck_page

.Lchecked:
        mov     r10, r8
.Lcheck_write:
        cmp     r10, rsi
        jae     .Ldone
        SCATTER
        ADDRESS
        SEED
        NEXT
        not     rax
        cmp     [rbp], rax
        je      .Lkept
        inc     r12
.Lkept:
        add     r10, r9
        jmp     .Lcheck_write

.Ldone:
        mov     eax, r12d
        REPORT  PORT_BAD_PAGES
        mov     rax, r13
        REPORT  PORT_SUM_LOW
        shr     rax, 32
        REPORT  PORT_SUM_HIGH
        REPORT  PORT_DONE
        hlt
guest_code_end:
#endif

        .section .note.GNU-stack, "", %progbits
