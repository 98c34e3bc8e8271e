/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/* Records which threads are inside the library. */
#include "faults.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

struct shared *shared;
static _Thread_local struct mark *mine;

struct mark *own_mark(void)
{
    return mine;
}

static struct mark *enlist(void)
{
    if (mine == NULL) {
        int n = atomic_fetch_add(&shared->marks_used, 1);
        if (n >= MARKS)
            abort();
        atomic_store(&shared->marks[n].tid, (int)syscall(SYS_gettid));
        mine = &shared->marks[n];
    }
    return mine;
}

struct place mark_place(bool inside, const char *what)
{
    struct mark *mark = enlist();
    struct place before = {.inside = atomic_load(&mark->inside), .what = atomic_load(&mark->what)};
    atomic_store(&mark->what, what);
    atomic_store(&mark->inside, inside);
    return before;
}

void mark_back(struct place before)
{
    mark_place(before.inside, before.what);
}

void mark_anew(void)
{
    mine = NULL;
}

/* A thread that the library starts is inside it from its start. */
struct begun {
    void *(*body)(void *);
    void *argument;
};

void *__libc_malloc(size_t);
void __libc_free(void *);

static void *begin_inside(void *argument)
{
    struct begun begun = *(struct begun *)argument;
    __libc_free(argument);
    mark_place(true, "a thread of its own");
    return begun.body(begun.argument);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*body)(void *), void *argument)
{
    typedef int create(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    create *next = (create *)dlsym(RTLD_NEXT, "pthread_create");
    if (mine == NULL || !atomic_load(&mine->inside))
        return next(thread, attributes, body, argument);
    struct begun *begun = __libc_malloc(sizeof(*begun));
    *begun = (struct begun){body, argument};
    int got = next(thread, attributes, begin_inside, begun);
    if (got != 0)
        __libc_free(begun);
    return got;
}
