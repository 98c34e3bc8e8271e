/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * KUF_OPEN_DEBUG_ENV: with KUF_DEBUG=1 in the environment log records go to standard error too. Without one of the two
 * the library prints nothing.
 */
#include "harness.h"

#define BASE UINT64_C(0x40000000)
enum { PAGES = 4 };

static struct source source = SOURCE_INIT;
static atomic_uint records, above_warn;

static void count(void *opaque, uint32_t level, const char *text)
{
    (void)opaque, (void)text;
    atomic_fetch_add(&records, 1);
    atomic_fetch_add(&above_warn, level > KUF_LOG_WARN);
}

/* Serves a guest whose last page cannot be filled and which gives a page back. */
static void serve(uint32_t flags, bool log)
{
    unsigned char *ram = map_anonymous(PAGES * page_size());
    struct kuf *kuf = open_with((struct kuf_options){.fill = source_fill, .event = source_event, .opaque = &source, .flags = flags,
                                                     .log = log ? count : NULL, .demand_run = page_size()});
    struct kuf_settings_info settings = {.size = sizeof(settings)};
    bool heard = flags & KUF_OPEN_DEBUG_ENV && getenv("KUF_DEBUG") != NULL && strcmp(getenv("KUF_DEBUG"), "1") == 0;
    must(kuf_settings(kuf, KUF_ALL, &settings) == 0 && !(settings.open_flags & KUF_OPEN_DEBUG_ENV) == !heard,
         "kuf_settings says whether it has an effect");
    add(kuf, BASE, ram, PAGES * page_size());
    must(holds_content(ram, BASE, page_size(), 1), "a page is read");
    must(madvise(ram, page_size(), MADV_DONTNEED) == 0, "and given back");
    atomic_store(&source.answer, -EIO);
    must(kuf_ensure(kuf, BASE + page_size(), page_size(), -1) == -EHWPOISON, "another is lost");
    must(kuf_close(&kuf, KUF_END_POISON) == 0, "closes");
}

/* The standard error of a child process that does so, terminated by a zero. */
static ssize_t errors_of(uint32_t flags, bool log, const char *value, char *out, size_t room)
{
    int pipes[2];
    must(pipe(pipes) == 0, "a pipe");
    pid_t child = fork();
    if (child == 0) {
        begin_child();
        dup2(pipes[1], STDERR_FILENO);
        close(pipes[0]);
        close(pipes[1]);
        if (value != NULL)
            setenv("KUF_DEBUG", value, 1);
        else
            unsetenv("KUF_DEBUG");
        serve(flags, log);
        if (log)
            ok(atomic_load(&records) > 0 && atomic_load(&above_warn) == 0, "the callback gets what it gets without");
        fflush(stdout);
        _exit(atomic_load(&harness_failures) != 0);
    }
    close(pipes[1]);
    ssize_t length = 0, got;
    while ((got = read(pipes[0], out + length, room - 1 - (size_t)length)) > 0)
        length += got;
    out[length] = 0;
    close(pipes[0]);
    is(end_of(child), 0, "the child has ended");
    return length;
}

/* Every line begins with the prefix, and each record is one line. */
static void check_lines(const char *text)
{
    unsigned lines = 0, wrong = 0;
    for (const char *end; (end = strchr(text, '\n')) != NULL; text = end + 1) {
        lines++;
        wrong += strncmp(text, "kuf: ", 5) != 0 || end - text < 6;
    }
    is(*text, 0, "the last line has an end");
    ok(lines >= 4, "userfaultfd, slot, page given back, poison: %u lines", lines);
    is(wrong, 0, "each begins with kuf:");
}

int main(void)
{
    static char out[1 << 16];
    begin();
    is(errors_of(0, true, NULL, out, sizeof(out)), 0, "neither: %s", out);
    is(errors_of(0, true, "1", out, sizeof(out)), 0, "the variable alone: %s", out);
    is(errors_of(KUF_OPEN_DEBUG_ENV, true, NULL, out, sizeof(out)), 0, "the flag alone: %s", out);
    is(errors_of(KUF_OPEN_DEBUG_ENV, true, "", out, sizeof(out)), 0, "an empty variable: %s", out);
    is(errors_of(KUF_OPEN_DEBUG_ENV, true, "0", out, sizeof(out)), 0, "a variable that says no: %s", out);
    ok(errors_of(KUF_OPEN_DEBUG_ENV, true, "1", out, sizeof(out)) > 0, "both");
    check_lines(out);
    ok(errors_of(KUF_OPEN_DEBUG_ENV, false, "1", out, sizeof(out)) > 0, "both, and no callback");
    check_lines(out);
    return done();
}
