/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The program's malloc, which the library uses too. It wraps glibc's: it fails the n-th request of the library and keeps
 * a list of the library's allocations.
 */
#include "faults.h"

#include <errno.h>
#include <execinfo.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void __libc_free(void *);

/* ---- The library's allocations ------------------------------------------------------------------------------------- */

enum { ROOM = 1 << 16, FRAMES = 12 };

static struct {
    void *at;
    size_t size;
    void *frames[FRAMES];
    int depth;
} held[ROOM];
static atomic_flag held_lock = ATOMIC_FLAG_INIT;
/* The thread is inside this file: its allocations belong to the list itself. */
static _Thread_local bool busy;

static void *const GONE = (void *)1;

static void lock(void)
{
    while (atomic_flag_test_and_set_explicit(&held_lock, memory_order_acquire))
        ;
}

static void unlock(void)
{
    atomic_flag_clear_explicit(&held_lock, memory_order_release);
}

static size_t slot_of(const void *at)
{
    return (uintptr_t)at / 16 * UINT64_C(0x9e3779b97f4a7c15) >> 48;
}

static bool is_inside(void)
{
    return shared != NULL && !busy && own_mark() != NULL && atomic_load_explicit(&own_mark()->inside, memory_order_relaxed);
}

static void *keep(void *at, size_t size)
{
    if (at == NULL || !is_inside())
        return at;
    busy = true;
    void *frames[FRAMES];
    int depth = shared->kind == KIND_NONE || getenv("FAULTS_TRACE") != NULL ? backtrace(frames, FRAMES) : 0;
    lock();
    for (size_t i = slot_of(at);; i = (i + 1) % ROOM) {
        if (held[i].at == NULL || held[i].at == GONE) {
            held[i].at = at;
            held[i].size = size;
            held[i].depth = depth;
            memcpy(held[i].frames, frames, (size_t)depth * sizeof(*frames));
            break;
        }
    }
    unlock();
    busy = false;
    return at;
}

static void forget(const void *at)
{
    if (at == NULL || shared == NULL)
        return;
    lock();
    for (size_t i = slot_of(at); held[i].at != NULL; i = (i + 1) % ROOM) {
        if (held[i].at == at) {
            held[i].at = GONE;
            break;
        }
    }
    unlock();
}

void allocations_left(long *count, long *bytes)
{
    *count = *bytes = 0;
    lock();
    for (size_t i = 0; i < ROOM; i++) {
        if (held[i].at != NULL && held[i].at != GONE) {
            ++*count;
            *bytes += (long)held[i].size;
        }
    }
    unlock();
}

void print_allocations(void)
{
    for (size_t i = 0; i < ROOM; i++) {
        if (held[i].at == NULL || held[i].at == GONE)
            continue;
        printf("    %zu bytes from:\n", held[i].size);
        fflush(stdout);
        backtrace_symbols_fd(held[i].frames, held[i].depth, STDOUT_FILENO);
    }
}

/* ---- Failing requests ---------------------------------------------------------------------------------------------- */

static bool fails(void)
{
    if (!is_inside() || !atomic_load_explicit(&shared->armed, memory_order_relaxed))
        return false;
    long n = atomic_fetch_add(&shared->occurrences, 1) + 1;
    if (shared->kind != KIND_ALLOC || n < shared->first || (n > shared->first && !shared->good))
        return false;
    if (atomic_fetch_add(&shared->injected, 1) == 0) {
        busy = true;
        shared->depth = backtrace(shared->stack, sizeof(shared->stack) / sizeof(*shared->stack));
        busy = false;
    }
    errno = ENOMEM;
    return true;
}

void *malloc(size_t size)
{
    return fails() ? NULL : keep(__libc_malloc(size), size);
}

void *calloc(size_t count, size_t size)
{
    return fails() ? NULL : keep(__libc_calloc(count, size), count * size);
}

void *realloc(void *at, size_t size)
{
    if (fails())
        return NULL;
    forget(at);
    void *now = __libc_realloc(at, size);
    return now == NULL && size > 0 ? (keep(at, size), NULL) : keep(now, size);
}

void *memalign(size_t alignment, size_t size)
{
    return fails() ? NULL : keep(__libc_memalign(alignment, size), size);
}

void *aligned_alloc(size_t alignment, size_t size)
{
    return memalign(alignment, size);
}

int posix_memalign(void **to, size_t alignment, size_t size)
{
    void *at = memalign(alignment, size);
    if (at == NULL)
        return ENOMEM;
    *to = at;
    return 0;
}

void free(void *at)
{
    forget(at);
    __libc_free(at);
}
