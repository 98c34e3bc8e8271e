/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * A callback that returns a wrong value, or writes wrong values into its run, is a failed fill with -EPROTO: poison,
 * never wrong bytes. The event, the log and kuf_error() name the value and the rule.
 */
#include "harness.h"

#define BASE UINT64_C(0x10000000)
enum { PAGES = 20 };

static struct source source = SOURCE_INIT;
static _Atomic uint64_t filled;
static atomic_int answer;

static const void *_Atomic elsewhere;
static char logged[512];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void log_last(void *opaque, uint32_t level, const char *text)
{
    (void)opaque;
    pthread_mutex_lock(&lock);
    if (level == KUF_LOG_ERROR)
        snprintf(logged, sizeof(logged), "%s", text);
    pthread_mutex_unlock(&lock);
}

/* That the event, the log and kuf_ensure say the same of a page, with these words. */
static void says(struct kuf *kuf, uint64_t gpa, const char *words, const char *what)
{
    size_t page = page_size();
    char text[512];
    struct kuf_event event = last_event(&source, poison_event());
    ok(strstr(event.text, words) != NULL, "%s: the event says why (%s)", what, event.text);
    ok(strstr(event.text, "os error") == NULL, "%s: in words of C", what);
    pthread_mutex_lock(&lock);
    ok(strcmp(logged, event.text) == 0, "%s: and so does the log", what);
    pthread_mutex_unlock(&lock);
    is(kuf_ensure(kuf, gpa + page, page, -1), -EHWPOISON, "%s: kuf_ensure of the next page", what);
    snprintf(text, sizeof(text), "%s", kuf_error());
    ok(strstr(text, words) != NULL, "%s: kuf_error() says why too (%s)", what, text);
}

static int fill(void *opaque, struct kuf_fill *fill)
{
    (void)opaque;
    fill->src = atomic_load(&elsewhere);
    memset(fill->buf, 0xee, fill->len);
    if (atomic_load(&filled) != 1)
        fill->filled = atomic_load(&filled);
    return atomic_load(&answer);
}

int main(void)
{
    begin();
    size_t page = page_size();
    char lines[5][128];
    for (int i = 0; i < 5; i++) {
        const uint64_t wrong[] = {0, 100, 2 * page, UINT64_C(1) << 30, page + 1};
        snprintf(lines[i], sizeof(lines[i]), "`filled` to %" PRIu64 ": it has to be a multiple of page_size, %zu, above 0",
                 wrong[i], page);
    }
    const struct {
        int answer;
        uint64_t filled; /* 1: not changed */
        int error;
        const char *what, *words;
    } cases[] = {
        {77, 1, -EPROTO, "an unknown value", "returned 77, which is neither a KUF_FILL_* nor an -errno"},
        {KUF_FILL_LATER + 1, 1, -EPROTO, "the value after the last one", "returned 4,"},
        {INT32_MAX, 1, -EPROTO, "the largest value", "returned 2147483647,"},
        {INT32_MIN, 1, -EPROTO, "the smallest value", "returned -2147483648,"},
        {-4096, 1, -EPROTO, "no errno", "returned -4096,"},
        {KUF_FILL_DONE, 0, -EPROTO, "KUF_FILL_DONE of nothing", lines[0]},
        {KUF_FILL_DONE, 100, -EPROTO, "KUF_FILL_DONE of a part of a page", lines[1]},
        {KUF_FILL_DONE, 2 * page, -EPROTO, "KUF_FILL_DONE of more than was asked for", lines[2]},
        {KUF_FILL_ZERO, UINT64_C(1) << 30, -EPROTO, "KUF_FILL_ZERO of more than was asked for", lines[3]},
        {KUF_FILL_DONE, page + 1, -EPROTO, "KUF_FILL_DONE of more than a page", lines[4]},
        {KUF_FILL_LATER, 1, -EPROTO, "KUF_FILL_LATER for a blocked thread",
         "KUF_FILL_LATER for a run with KUF_RUN_DEMAND, for which a thread is blocked: return KUF_FILL_DEFERRED"},
        {-EAGAIN, 1, -EAGAIN, "-EAGAIN", "return KUF_FILL_DEFERRED and call kuf_resolve"},
        {-EIO, 1, -EIO, "-EIO", "EIO: Input/output error"},
        {-1, 1, -EPERM, "-1", "EPERM: Operation not permitted"},
    };
    enum { CASES = sizeof(cases) / sizeof(cases[0]) };
    unsigned char *ram = map_anonymous(PAGES * 2 * page);
    struct kuf *kuf = open_with((struct kuf_options){
        .fill = fill, .event = source_event, .log = log_last, .opaque = &source, .demand_run = page});
    add(kuf, BASE, ram, PAGES * 2 * page);
    int raised = 0;
    for (int i = 0; i < CASES; i++) {
        uint64_t gpa = BASE + 2 * i * page;
        atomic_store(&answer, cases[i].answer);
        atomic_store(&filled, cases[i].filled);
        is(touch(ram + 2 * i * page), poison_signal(), "%s: the page is poisoned", cases[i].what);
        wait_until(atomic_load(&source.events[poison_event()]) == ++raised);
        struct kuf_event event = last_event(&source, poison_event());
        is(event.error, cases[i].error, "%s: the error", cases[i].what);
        is(event.gpa, gpa, "%s: of that page", cases[i].what);
        says(kuf, gpa, cases[i].words, cases[i].what);
        raised++;
    }
    /* Bytes elsewhere that cannot be read. */
    char words[64];
    void *gone = map_anonymous(page);
    munmap(gone, page);
    atomic_store(&elsewhere, gone);
    atomic_store(&answer, KUF_FILL_DONE);
    atomic_store(&filled, 1);
    snprintf(words, sizeof(words), "src %p is not readable", gone);
    is(touch(ram + 2 * CASES * page), poison_signal(), "unreadable bytes: the page is poisoned");
    wait_until(atomic_load(&source.events[poison_event()]) == ++raised);
    is(last_event(&source, poison_event()).error, -EFAULT, "unreadable bytes: the error");
    says(kuf, BASE + 2 * CASES * page, words, "unreadable bytes");
    close_with(kuf, KUF_END_POISON);
    return done();
}
