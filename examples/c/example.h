/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * example.h - what the examples share: how they end, what time it is, and what guest memory has to hold
 *
 * The first line of a program that includes this is #define _GNU_SOURCE.
 */
#ifndef EXAMPLE_H
#define EXAMPLE_H

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PAGE_WORDS = PAGE / 8, EXIT_SKIP = 77 };

#define MIB (UINT64_C(1) << 20)

static inline void example_say(const char *kind, const char *format, va_list args)
{
    fflush(stdout);
    fprintf(stderr, "%s: %s: ", program_invocation_short_name, kind);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
}

/* What the example is there to prove was not proved. _exit: other threads may stand in a fault that nobody will serve. */
__attribute__((format(printf, 1, 2))) static inline _Noreturn void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    example_say("FAIL", format, args);
    va_end(args);
    _exit(EXIT_FAILURE);
}

/* This host cannot run the example. */
__attribute__((format(printf, 1, 2))) static inline _Noreturn void skip(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    example_say("SKIP", format, args);
    va_end(args);
    _exit(EXIT_SKIP);
}

/* kuf_open's result, where a host without userfaultfd is a reason to skip and anything else a failure. */
static inline void check_open(int result, const char *why)
{
    if (result == -EPERM || result == -ENOSYS || result == -ENOTSUP)
        skip("kuf_open: %s", why);
    if (result < 0)
        fail("kuf_open: %s", why);
}

static inline void watchdog_fired(int signal)
{
    static const char text[] = "FAIL: still not done after the time a run may take\n";
    (void)signal;
    if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0)
        _exit(EXIT_FAILURE);
    _exit(EXIT_FAILURE);
}

/* The first call of a process. It ends with a failure after so many seconds: an unserved fault would wait for ever. */
static inline void example_begin(unsigned seconds)
{
    if (sysconf(_SC_PAGESIZE) != PAGE)
        skip("the examples are written for hosts with pages of %d bytes", PAGE);
    signal(SIGALRM, watchdog_fired);
    alarm(seconds);
}

static inline uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static inline void sleep_us(uint64_t us)
{
    struct timespec time = { (time_t)(us / 1000000), (long)(us % 1000000) * 1000 };
    nanosleep(&time, NULL);
}

/*
 * What page number n holds: a xorshift stream with a seed of its own, so that a page of zeroes, another page's bytes and
 * half a page are all noticed.
 */
static inline uint64_t pattern_seed(uint64_t n)
{
    return (n + 1) * UINT64_C(0x9e3779b97f4a7c15);
}

static inline uint64_t pattern_next(uint64_t word)
{
    word ^= word << 13;
    word ^= word >> 7;
    return word ^ word << 17;
}

static inline void pattern_write(void *page, uint64_t n)
{
    uint64_t *at = page;
    uint64_t word = pattern_seed(n);
    for (int i = 0; i < PAGE_WORDS; i++)
        at[i] = word = pattern_next(word);
}

static inline bool pattern_matches(const void *page, uint64_t n)
{
    const volatile uint64_t *at = page;
    uint64_t word = pattern_seed(n), wrong = 0;
    for (int i = 0; i < PAGE_WORDS; i++) {
        word = pattern_next(word);
        wrong |= at[i] ^ word;
    }
    return wrong == 0;
}

/* The page to touch as number i of so many: each page once, neighbours far apart. */
static inline uint64_t scattered(uint64_t i, uint64_t pages)
{
    return i * 1640531527 % pages;
}

#endif
