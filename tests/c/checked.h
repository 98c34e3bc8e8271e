/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The Makefile includes this file before each C test: a call that fails with an errno that its text in the header does
 * not name, or without a text in kuf_error(), fails the program. wrapped.h has a macro for each call. The address of a
 * function stays the library's.
 */
#ifndef KUF_TESTS_CHECKED_H
#define KUF_TESTS_CHECKED_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <kuf-kvm.h>

static const struct {
    const char *call;
    int error;
} harness_documented[] = {
#include "documented.h"
};

static inline void harness_check_errno(const char *call, int error, const char *words, const char *file, int line)
{
    for (size_t i = 0; i < sizeof(harness_documented) / sizeof(harness_documented[0]) && words[0] != 0; i++)
        if (harness_documented[i].error == error &&
            (strcmp(harness_documented[i].call, call) == 0 || strcmp(harness_documented[i].call, "*") == 0))
            return;
    printf("not ok - %s fails with %s, which its text does not name (%s:%d): %s\n", call, strerror(error), file, line,
           words);
    fflush(stdout);
    _exit(1);
}

#define HARNESS_CHECKED(name, call)                                                                                      \
    __extension__({                                                                                                       \
        __auto_type harness_got = (call);                                                                                 \
        if (harness_got < 0)                                                                                              \
            harness_check_errno(name, (int)-harness_got, kuf_error(), __FILE__, __LINE__);                                \
        harness_got;                                                                                                      \
    })

#include "wrapped.h"

#endif
