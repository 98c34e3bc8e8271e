/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * example.h - common to the examples: exit, clocks, and the pattern that guest memory has to hold
 *
 * A program must #define _GNU_SOURCE before it includes this.
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

/* The host's page size, 4, 16 or 64 KiB, which the guest memory here uses too. */
#define PAGE ((uint64_t)sysconf(_SC_PAGESIZE))
#define PAGE_WORDS (PAGE / 8)

enum { PAGE_MAX = 65536, EXIT_SKIP = 77 };

#define MIB (UINT64_C(1) << 20)

static inline void example_say(const char *kind, const char *format, va_list args)
{
    fflush(stdout);
    fprintf(stderr, "%s: %s: ", program_invocation_short_name, kind);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
}

/* The example failed. Uses _exit because other threads may be blocked in faults that are never served. */
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

/* Checks the result of kuf_open: skips on a host without userfaultfd, and fails at any other error. */
static inline void check_open(int result, const char *why)
{
    if (result == -EPERM || result == -ENOSYS || result == -ENOTSUP)
        skip("kuf_open: %s", why);
    if (result < 0)
        fail("kuf_open: %s", why);
}

static inline void watchdog_fired(int signal)
{
    static const char text[] = "FAIL: the run exceeded its time limit\n";
    (void)signal;
    if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0)
        _exit(EXIT_FAILURE);
    _exit(EXIT_FAILURE);
}

/*
 * Each process calls this first. The process then fails after `seconds`, because an unserved fault would block for
 * ever. On a slow machine KUF_TEST_PATIENCE=N multiplies the limit by N.
 */
static inline void example_begin(unsigned seconds)
{
    const char *times = getenv("KUF_TEST_PATIENCE");
    signal(SIGALRM, watchdog_fired);
    alarm(times != NULL && atoi(times) > 0 ? seconds * (unsigned)atoi(times) : seconds);
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
 * The content of page n: a xorshift stream with its own seed, so that checks detect a page of zeroes, another page's
 * bytes and half a page.
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
    uint64_t word = pattern_seed(n), words = PAGE_WORDS;
    for (uint64_t i = 0; i < words; i++)
        at[i] = word = pattern_next(word);
}

static inline bool pattern_matches(const void *page, uint64_t n)
{
    const volatile uint64_t *at = page;
    uint64_t word = pattern_seed(n), wrong = 0, words = PAGE_WORDS;
    for (uint64_t i = 0; i < words; i++) {
        word = pattern_next(word);
        wrong |= at[i] ^ word;
    }
    return wrong == 0;
}

/* Returns the i-th page to touch. For i from 0 to pages - 1 this is each page once, with neighbours far apart. */
static inline uint64_t scattered(uint64_t i, uint64_t pages)
{
    return i * 1640531527 % pages;
}

#endif
