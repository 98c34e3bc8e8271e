/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * lazy_restore_guest.S - the guest of lazy_restore; each vCPU runs it without a stack, on x86-64 in long mode, on arm64
 * in EL1
 *
 * On entry: rdi (x0) address of the first data page, rsi (x1) number of data pages, r8 (x2) number of this vCPU,
 * r9 (x3) number of vCPUs; on arm64 also x4 address of the ports, x5 size of a page.
 *
 * The vCPU fills each page whose number equals its own modulo the number of vCPUs, and reports PORT_BUILT, where the
 * snapshot is taken. The restored vCPU continues behind that instruction: it checks a scattered part of the pages (the
 * vCPUs together check all pages), writes to each, and verifies all its writes at the end.
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
        not     qword ptr [rbp]                 /* now the guest's own data: the page must not be filled again */
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

#elif defined(__aarch64__)
        .section .rodata
        .balign 8
        .global guest_code, guest_code_end

/* x6: the page; x7: its address; x8: the state of its stream, or the word; x14: GUEST_SEED; x15: GUEST_SCATTER. */
.macro SEED
        add     x8, x6, #1
        mul     x8, x8, x14
.endm

/* x8: the next word of the stream. */
.macro NEXT
        eor     x8, x8, x8, lsl #13
        eor     x8, x8, x8, lsr #7
        eor     x8, x8, x8, lsl #17
.endm

.macro ADDRESS
        madd    x7, x6, x5, x0
.endm

/* x6: the page to check as number x10. */
.macro SCATTER
        mul     x9, x10, x15
        udiv    x6, x9, x1
        msub    x6, x6, x1, x9
.endm

.macro REPORT port, register
        str     \register, [x4, #((\port - PORT_BUILT) * 4)]
.endm

guest_code:
        movz    x14, #(GUEST_SEED & 0xffff)
        movk    x14, #((GUEST_SEED >> 16) & 0xffff), lsl #16
        movk    x14, #((GUEST_SEED >> 32) & 0xffff), lsl #32
        movk    x14, #((GUEST_SEED >> 48) & 0xffff), lsl #48
        movz    x15, #(GUEST_SCATTER & 0xffff)
        movk    x15, #(GUEST_SCATTER >> 16), lsl #16
        mov     x6, x2
.Lbuild_page:
        cmp     x6, x1
        b.hs    .Lbuilt
        ADDRESS
        SEED
        add     x9, x7, x5
.Lbuild_word:
        NEXT
        str     x8, [x7]
        add     x7, x7, #8
        cmp     x7, x9
        b.lo    .Lbuild_word
        add     x6, x6, x3
        b       .Lbuild_page

.Lbuilt:
        REPORT  PORT_BUILT, wzr

        /* From here on it is the restored guest, with the registers it had and no memory. */
        REPORT  PORT_FIRST, wzr
        mov     x12, xzr                        /* bad pages */
        mov     x13, xzr                        /* sum of the words */
        mov     x10, x2
.Lcheck_page:
        cmp     x10, x1
        b.hs    .Lchecked
        SCATTER
        ADDRESS
        SEED
        mov     x16, x7
        add     x9, x7, x5
        mov     x11, xzr                        /* bits that differ in this page */
.Lcheck_word:
        NEXT
        ldr     x17, [x16]
        add     x13, x13, x17
        eor     x17, x17, x8
        orr     x11, x11, x17
        add     x16, x16, #8
        cmp     x16, x9
        b.lo    .Lcheck_word
        cmp     x11, xzr
        cinc    x12, x12, ne
        ldr     x17, [x7]                       /* now the guest's own data: the page must not be filled again */
        mvn     x17, x17
        str     x17, [x7]
        add     x10, x10, x3
        b       .Lcheck_page

.Lchecked:
        mov     x10, x2
.Lcheck_write:
        cmp     x10, x1
        b.hs    .Ldone
        SCATTER
        ADDRESS
        SEED
        NEXT
        mvn     x8, x8
        ldr     x17, [x7]
        cmp     x17, x8
        cinc    x12, x12, ne
        add     x10, x10, x3
        b       .Lcheck_write

.Ldone:
        REPORT  PORT_BAD_PAGES, w12
        REPORT  PORT_SUM_LOW, w13
        lsr     x13, x13, #32
        REPORT  PORT_SUM_HIGH, w13
        REPORT  PORT_DONE, wzr
        b       .
guest_code_end:
#endif

        .section .note.GNU-stack, "", %progbits
