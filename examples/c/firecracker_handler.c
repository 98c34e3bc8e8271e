/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * firecracker_handler.c - serves the memory of a microVM that stock Firecracker restores from a snapshot
 *
 * Start it, then load the snapshot with {"mem_backend": {"backend_type": "Uffd", "backend_path": SOCKET}}. Firecracker
 * connects to the socket and sends one message: its userfaultfd (SCM_RIGHTS) and a JSON array, one object for each
 * region of guest memory. The handler accepts the message of all versions since 1.1:
 *
 *   base_host_virt_addr   the region's address in Firecracker's address space
 *   size, offset          its size, and its offset in the memory file
 *   page_size             in bytes, since 1.12
 *   page_size_kib         in bytes too, in spite of its name: the only field from 1.7 to 1.11, later next to page_size.
 *                         Without either field, pages have the host's page size
 *
 * The handler parses the message itself: the format is small, and a drop-in handler must not need a JSON library. It
 * trusts nothing in the message. It refuses what does not fit the memory file, the host or the protocol, with a line on
 * stderr and an exit status for each kind of error (enum status).
 *
 * The memory file is a built-in source (KUF_SOURCE_FILE): I/O errors and a file that shrinks do not end the handler, as
 * SIGBUS from a mapping would; the library poisons the pages that it cannot read. Holes in the file and pages of zeroes
 * become zero pages, which take no memory. Pages that the balloon takes read as zero from then on, whatever the
 * order in which the kernel reports them. With --populate the library fills the rest of the memory in the background;
 * when all of it is present, the handler unregisters it from userfaultfd and ends, and Firecracker continues alone.
 * Without, the handler ends when Firecracker does. At SIGTERM it fills the missing pages for a limited time, then ends;
 * at a second SIGTERM it ends at once.
 *
 * The protocol has no way to tell Firecracker that its memory is refused: PUT /snapshot/load would not return. So the
 * handler kills Firecracker if it ends before it has served the memory.
 *
 * One process serves one microVM, so that a hostile one cannot harm others through its userfaultfd.
 *
 * Build:  cc -O2 -pthread -o firecracker_handler firecracker_handler.c $(pkg-config --cflags --libs kuf)
 * Run:    ./firecracker_handler [OPTION...] SOCKET MEMORY_FILE
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <inttypes.h>
#include <kuf.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* Since Linux 6.5. */
#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

/* Firecracker has a few regions and sends a few hundred bytes. */
enum { MESSAGE_MAX = 64 * 1024, REGIONS_MAX = 64, DESCRIPTORS_MAX = 8, NESTING_MAX = 16 };

#define MIB (UINT64_C(1) << 20)

/* The exit status. From MALFORMED on, Firecracker blocks at the next missing page unless it is killed. */
enum status {
    ENDED = 0,       /* Firecracker ended, or all its memory is present */
    BROKEN = 1,      /* the host is out of memory, descriptors or threads */
    USAGE = 2,       /* the command line is wrong */
    SETUP = 3,       /* the socket or the memory file is not usable */
    TIMED_OUT = 4,   /* no process connected in time, or no message arrived */
    STRANGER = 5,    /* another user's process connected */
    CLOSED = 6,      /* the connection ended in the middle of the message */
    MALFORMED = 7,   /* the message does not have Firecracker's format */
    DESCRIPTOR = 8,  /* no descriptor, several, or no userfaultfd */
    LAYOUT = 9,      /* the regions are impossible, or do not fit this memory file */
    NOT_SERVED = 10, /* the library or the kernel refuses the memory */
    LOST = 11,       /* pages could not be filled; touching them raises SIGBUS */
    STOPPED = 12,    /* a signal arrived before the memory was served */
    UNFILLED = 13,   /* stopped before all memory was filled; touching the rest blocks for ever */
};

static const char usage[] =
    "usage: firecracker_handler [OPTION...] SOCKET MEMORY_FILE\n"
    "Serves a Firecracker microVM's memory from the memory file of its snapshot. Accepts one connection on SOCKET.\n"
    "  -p, --populate[=MIB]   also fill the rest in the background, at most MIB MiB a second; then end\n"
    "  -t, --timeout=SECONDS  the time limit for Firecracker to connect, and then to send its message (60)\n"
    "  -u, --uid=UID          the user that Firecracker runs as (this process's), who becomes the socket's owner\n"
    "  -s, --stop=SECONDS     the time limit to fill missing pages after SIGTERM (30); a second SIGTERM ends at once\n"
    "  -k, --kill             kill Firecracker also if pages are lost after its memory was served\n"
    "  -K, --no-kill          never kill Firecracker (default: kill it only if its memory was not served yet)\n"
    "  -h, --help             print this text\n";

struct region {
    uint64_t base, size, offset, page_size;
};

/* When the handler kills Firecracker because its memory is missing. */
enum kill { KILL_NEVER, KILL_UNTIL_SERVED, KILL_ALWAYS };

static struct handler {
    const char *socket_path;
    bool listening;
    int peer; /* Firecracker's pidfd, or -1 */
    enum kill kill;
    bool serving;

    int file;
    uint64_t file_size;
    struct region regions[REGIONS_MAX];
    size_t count;

    struct kuf *kuf;
    int wakeup; /* an eventfd: one of the following has changed */
    atomic_bool complete, gone, fatal, lost, stopped;
} handler = { .peer = -1, .file = -1, .kill = KILL_UNTIL_SERVED };

/* ---- The end ---- */

static void say(const char *format, va_list arguments)
{
    fflush(stdout);
    fprintf(stderr, "%s: ", program_invocation_short_name);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
}

/*
 * Uses _exit because the library's threads may still run. Firecracker has its own copy of the userfaultfd, so that
 * absent pages stay absent.
 */
static _Noreturn void leave(enum status status)
{
    if (handler.listening)
        unlink(handler.socket_path);
    bool blocked = status == BROKEN || (status >= MALFORMED && status != STOPPED);
    bool kill = handler.serving ? handler.kill == KILL_ALWAYS : handler.kill != KILL_NEVER;
    if (blocked && kill && handler.peer >= 0)
        syscall(SYS_pidfd_send_signal, handler.peer, SIGKILL, NULL, 0);
    fflush(stdout);
    _exit((int)status);
}

__attribute__((format(printf, 2, 3))) static _Noreturn void refuse(enum status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    say(format, arguments);
    va_end(arguments);
    leave(status);
}

__attribute__((format(printf, 1, 2))) static void note(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    say(format, arguments);
    va_end(arguments);
}

/* ---- The message ---- */

/* A position in JSON text. If reading stops, `wrong` is the reason, or NULL at the end of the text. */
struct reader {
    const char *start, *at, *end;
    const char *wrong;
};

static bool stop(struct reader *reader, const char *wrong)
{
    reader->wrong = wrong;
    return false;
}

static void skip_space(struct reader *reader)
{
    while (reader->at < reader->end && memchr(" \t\r\n", *reader->at, 4) != NULL)
        reader->at++;
}

/* Skips spaces. Returns the next character without taking it, or 0 at the end. */
static char next(struct reader *reader)
{
    skip_space(reader);
    return reader->at < reader->end ? *reader->at : '\0';
}

static bool is_next(struct reader *reader, char wanted)
{
    if (next(reader) != wanted || reader->at == reader->end)
        return false;
    reader->at++;
    return true;
}

static bool take(struct reader *reader, char wanted, const char *otherwise)
{
    return is_next(reader, wanted) || stop(reader, reader->at == reader->end ? NULL : otherwise);
}

static bool is_digit(const struct reader *reader)
{
    return reader->at < reader->end && *reader->at >= '0' && *reader->at <= '9';
}

static bool take_digits(struct reader *reader)
{
    if (!is_digit(reader))
        return stop(reader, reader->at == reader->end ? NULL : "a number without digits");
    while (is_digit(reader))
        reader->at++;
    return true;
}

/*
 * Takes a string without its quotes. It does not decode escapes: none of the keys needed here has one, and
 * Firecracker's serializer writes none.
 */
static bool take_string(struct reader *reader, const char **text, size_t *length)
{
    if (!take(reader, '"', "a string was expected"))
        return false;
    *text = reader->at;
    for (; reader->at < reader->end; reader->at++) {
        unsigned char c = (unsigned char)*reader->at;
        if (c == '"') {
            *length = (size_t)(reader->at++ - *text);
            return true;
        }
        if (c < ' ')
            return stop(reader, "a control character in a string");
        if (c != '\\')
            continue;
        if (++reader->at == reader->end)
            break;
        if (*reader->at == '\0' || strchr("\"\\/bfnrtu", *reader->at) == NULL)
            return stop(reader, "an unknown escape");
        for (int i = 0; *reader->at == 'u' && i < 4; i++)
            if (reader->end - reader->at > 1 + i && strchr("0123456789abcdefABCDEF", reader->at[1 + i]) == NULL)
                return stop(reader, "an unknown escape");
    }
    return stop(reader, NULL);
}

/* Takes a size or an address: a whole number from 0 on, of at most 64 bits. */
static bool take_unsigned(struct reader *reader, uint64_t *value)
{
    if (next(reader) == '-')
        return stop(reader, "a number below zero");
    if (reader->at < reader->end && !is_digit(reader))
        return stop(reader, "a number was expected");
    *value = 0;
    for (const char *first = reader->at; is_digit(reader); reader->at++) {
        if (reader->at == first + 1 && *first == '0')
            return stop(reader, "a number that starts with 0");
        if (__builtin_mul_overflow(*value, 10, value) || __builtin_add_overflow(*value, *reader->at - '0', value))
            return stop(reader, "a number of more than 64 bits");
    }
    if (reader->at < reader->end && strchr(".eE", *reader->at) != NULL)
        return stop(reader, "a number that is not written as a whole one");
    return true;
}

static bool skip_number(struct reader *reader)
{
    is_next(reader, '-');
    const char *first = reader->at;
    if (!take_digits(reader))
        return false;
    if (*first == '0' && reader->at > first + 1)
        return stop(reader, "a number that starts with 0");
    if (reader->at < reader->end && *reader->at == '.') {
        reader->at++;
        if (!take_digits(reader))
            return false;
    }
    if (reader->at < reader->end && (*reader->at == 'e' || *reader->at == 'E')) {
        reader->at++;
        if (reader->at < reader->end && (*reader->at == '+' || *reader->at == '-'))
            reader->at++;
        return take_digits(reader);
    }
    return true;
}

static bool skip_word(struct reader *reader, const char *word)
{
    for (; *word != '\0'; word++, reader->at++)
        if (reader->at == reader->end || *reader->at != *word)
            return stop(reader, reader->at == reader->end ? NULL : "a word that JSON does not have");
    return true;
}

/* Skips the value of an unknown field, which a later Firecracker may add. */
static bool skip_value(struct reader *reader, int nesting)
{
    const char *text;
    size_t length;
    /* At the end of the text the depth is not known to be wrong yet: the next byte may close a value. */
    if (nesting > NESTING_MAX && next(reader) != '\0')
        return stop(reader, "values nested too deep");
    switch (next(reader)) {
    case '"':
        return take_string(reader, &text, &length);
    case 't':
        return skip_word(reader, "true");
    case 'f':
        return skip_word(reader, "false");
    case 'n':
        return skip_word(reader, "null");
    case '[':
    case '{': {
        bool object = *reader->at++ == '{';
        if (is_next(reader, object ? '}' : ']'))
            return true;
        do {
            if (object && (!take_string(reader, &text, &length) || !take(reader, ':', "':' was expected")))
                return false;
            if (!skip_value(reader, nesting + 1))
                return false;
        } while (is_next(reader, ','));
        return take(reader, object ? '}' : ']', "',' or a closing bracket was expected");
    }
    default:
        return skip_number(reader);
    }
}

enum { BASE, SIZE, OFFSET, PAGE_SIZE, PAGE_SIZE_KIB, FIELDS };

static const char *const field_names[FIELDS] = {
    [BASE] = "base_host_virt_addr", [SIZE] = "size",
    [OFFSET] = "offset",            [PAGE_SIZE] = "page_size",
    [PAGE_SIZE_KIB] = "page_size_kib",
};

static bool take_region(struct reader *reader, struct region *region)
{
    uint64_t values[FIELDS] = { 0 };
    bool given[FIELDS] = { false };
    if (!take(reader, '{', "an object was expected"))
        return false;
    if (!is_next(reader, '}')) {
        do {
            const char *key;
            size_t length;
            if (!take_string(reader, &key, &length) || !take(reader, ':', "':' was expected"))
                return false;
            int field = 0;
            while (field < FIELDS &&
                   (strlen(field_names[field]) != length || memcmp(field_names[field], key, length) != 0))
                field++;
            if (field < FIELDS && given[field])
                return stop(reader, "a field that is given twice");
            if (field < FIELDS ? !take_unsigned(reader, &values[field]) : !skip_value(reader, 0))
                return false;
            if (field < FIELDS)
                given[field] = true;
        } while (is_next(reader, ','));
        if (!take(reader, '}', "',' or '}' was expected"))
            return false;
    }
    if (!given[BASE] || !given[SIZE] || !given[OFFSET])
        return stop(reader, "a region without base_host_virt_addr, size or offset");
    if (given[PAGE_SIZE] && given[PAGE_SIZE_KIB] && values[PAGE_SIZE] != values[PAGE_SIZE_KIB])
        return stop(reader, "a region whose page_size and page_size_kib differ (both are in bytes)");
    *region = (struct region){
        .base = values[BASE],
        .size = values[SIZE],
        .offset = values[OFFSET],
        .page_size = given[PAGE_SIZE]       ? values[PAGE_SIZE]
                     : given[PAGE_SIZE_KIB] ? values[PAGE_SIZE_KIB]
                                            : (uint64_t)sysconf(_SC_PAGESIZE),
    };
    return true;
}

/* Takes the whole message. Any text behind it is an error. */
static bool take_regions(struct reader *reader, struct region *regions, size_t *count)
{
    *count = 0;
    if (!take(reader, '[', "an array was expected"))
        return false;
    if (!is_next(reader, ']')) {
        do {
            if (*count == REGIONS_MAX)
                return stop(reader, "too many regions");
            if (!take_region(reader, &regions[*count]))
                return false;
            ++*count;
        } while (is_next(reader, ','));
        if (!take(reader, ']', "',' or ']' was expected"))
            return false;
    }
    skip_space(reader);
    return reader->at == reader->end || stop(reader, "something behind the array");
}

/* ---- The connection ---- */

static uint64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* Waits until the descriptor is readable. Ends the program at the deadline or at a signal. */
static void wait_for(int descriptor, int signals, uint64_t deadline, const char *what)
{
    struct pollfd polls[] = { { .fd = descriptor, .events = POLLIN }, { .fd = signals, .events = POLLIN } };
    do {
        uint64_t now = now_ms();
        if (now >= deadline)
            refuse(TIMED_OUT, "timed out: Firecracker has not %s", what);
        uint64_t left = deadline - now;
        if (poll(polls, 2, left > INT32_MAX ? INT32_MAX : (int)left) < 0 && errno != EINTR)
            refuse(BROKEN, "poll: %s", strerror(errno));
        if (polls[1].revents != 0)
            refuse(STOPPED, "stopped before Firecracker had %s", what);
    } while (polls[0].revents == 0);
}

/* Only Firecracker's user can connect, because the socket belongs to that user and has mode 0600. */
static int listen_at(const char *path, uid_t uid)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    if (strlen(path) >= sizeof(address.sun_path))
        refuse(SETUP, "%s: the path is too long for a socket", path);
    strcpy(address.sun_path, path);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (listener < 0)
        refuse(BROKEN, "socket: %s", strerror(errno));
    mode_t mask = umask(0177);
    if (bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0)
        refuse(SETUP, "%s: %s", path, strerror(errno));
    umask(mask);
    handler.listening = true;
    if (uid != geteuid() && lchown(path, uid, (gid_t)-1) < 0)
        refuse(SETUP, "%s: cannot change the owner to user %u: %s", path, uid, strerror(errno));
    if (listen(listener, 1) < 0)
        refuse(BROKEN, "listen: %s", strerror(errno));
    return listener;
}

static int accept_firecracker(int listener, int signals, uint64_t timeout_ms, uid_t uid)
{
    uint64_t deadline = now_ms() + timeout_ms;
    int stream;
    do {
        wait_for(listener, signals, deadline, "connected");
        stream = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    } while (stream < 0 && (errno == EAGAIN || errno == EINTR || errno == ECONNABORTED));
    if (stream < 0)
        refuse(BROKEN, "accept: %s", strerror(errno));
    unlink(handler.socket_path);
    handler.listening = false;
    close(listener);

    struct ucred peer;
    if (getsockopt(stream, SOL_SOCKET, SO_PEERCRED, &peer, &(socklen_t){ sizeof(peer) }) < 0)
        refuse(BROKEN, "SO_PEERCRED: %s", strerror(errno));
    if (peer.uid != uid)
        refuse(STRANGER, "process %d of user %u connected, but only user %u may", peer.pid, peer.uid, uid);
    /* Before Linux 6.5 only the process number is known. Another process has it if Firecracker has ended. */
    if (getsockopt(stream, SOL_SOCKET, SO_PEERPIDFD, &handler.peer, &(socklen_t){ sizeof(handler.peer) }) < 0)
        handler.peer = peer.pid > 0 ? (int)syscall(SYS_pidfd_open, peer.pid, 0) : -1;
    if (handler.peer < 0 && handler.kill != KILL_NEVER)
        note("process %d cannot be watched and will not be killed: %s", peer.pid, strerror(errno));
    printf("process %d of user %u has connected\n", peer.pid, peer.uid);
    return stream;
}

/* Receives text, which it appends at *length, and descriptors. Returns as recvmsg. */
static ssize_t receive(int stream, char *text, size_t *length, int *uffd, unsigned *descriptors)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
    } control;
    struct iovec bytes = { .iov_base = text + *length, .iov_len = MESSAGE_MAX + 1 - *length };
    struct msghdr message = {
        .msg_iov = &bytes,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    ssize_t n = recvmsg(stream, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (n < 0)
        return n;
    *length += (size_t)n;
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part != NULL; part = CMSG_NXTHDR(&message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
            continue;
        size_t here = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        if (here > 0 && *descriptors == 0)
            memcpy(uffd, CMSG_DATA(part), sizeof(int));
        *descriptors += (unsigned)here; /* more than one ends the process, which closes them */
    }
    if (message.msg_flags & MSG_CTRUNC)
        *descriptors += DESCRIPTORS_MAX;
    return n;
}

/* Returns the userfaultfd. */
static int receive_message(int stream, int signals, uint64_t timeout_ms, struct region *regions, size_t *count)
{
    static char text[MESSAGE_MAX + 1];
    size_t length = 0;
    int uffd = -1;
    unsigned descriptors = 0;
    uint64_t deadline = now_ms() + timeout_ms;
    for (bool whole = false;;) {
        ssize_t n = receive(stream, text, &length, &uffd, &descriptors);
        if (descriptors > 1)
            refuse(DESCRIPTOR, "%u descriptors came, but one userfaultfd was expected", descriptors);
        if (n < 0 && (errno == EAGAIN || errno == EINTR) && !whole) {
            wait_for(stream, signals, deadline, "sent its message");
            continue;
        }
        /* The message is whole, and no more bytes have arrived. */
        if (n <= 0 && whole)
            break;
        if (n <= 0)
            refuse(CLOSED, "the connection ended after %zu bytes, in the middle of the message", length);
        if (length > MESSAGE_MAX)
            refuse(MALFORMED, "the message has more than %d bytes", MESSAGE_MAX);
        struct reader reader = { .start = text, .at = text, .end = text + length };
        whole = take_regions(&reader, regions, count);
        if (!whole && reader.wrong != NULL)
            refuse(MALFORMED, "the message is not Firecracker's: %s, at byte %td", reader.wrong, reader.at - text);
    }
    if (uffd < 0)
        refuse(DESCRIPTOR, "no descriptor came with the message");
    return uffd;
}

/* ---- The layout ---- */

static bool overlap(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size)
{
    return a < b + b_size && b < a + a_size;
}

/* Checks each region alone, then in pairs, then all of them against the file. */
static void check_layout(const struct region *regions, size_t count)
{
    if (count == 0)
        refuse(LAYOUT, "no region of memory");
    uint64_t total = 0, end;
    for (size_t i = 0; i < count; i++) {
        const struct region *it = &regions[i];
        if (it->page_size < (uint64_t)sysconf(_SC_PAGESIZE) || it->page_size > 1024 * MIB ||
            (it->page_size & (it->page_size - 1)) != 0)
            refuse(LAYOUT, "region %zu: %" PRIu64 " is no page size", i, it->page_size);
        if (it->size == 0 || it->base == 0)
            refuse(LAYOUT, "region %zu: its size or its address is 0", i);
        if (it->base % it->page_size != 0 || it->size % it->page_size != 0 || it->offset % it->page_size != 0)
            refuse(LAYOUT, "region %zu: its address, size or offset is no multiple of its page size", i);
        if (__builtin_add_overflow(it->base, it->size, &end) || __builtin_add_overflow(it->offset, it->size, &end))
            refuse(LAYOUT, "region %zu: its address or offset, and its size, have more than 64 bits", i);
        if (end > handler.file_size)
            refuse(LAYOUT, "region %zu: ends %" PRIu64 " bytes behind the end of the memory file", i,
                   end - handler.file_size);
        for (size_t j = 0; j < i; j++) {
            if (overlap(it->base, it->size, regions[j].base, regions[j].size))
                refuse(LAYOUT, "regions %zu and %zu overlap in memory", j, i);
            if (overlap(it->offset, it->size, regions[j].offset, regions[j].size))
                refuse(LAYOUT, "regions %zu and %zu overlap in the memory file", j, i);
        }
        total += it->size;
    }
    /* Firecracker writes a file of exactly this size. A file of another size belongs to another microVM. */
    if (total != handler.file_size)
        refuse(LAYOUT, "the memory file has %" PRIu64 " bytes, the regions have %" PRIu64, handler.file_size, total);
}

/* ---- The memory file ---- */

static void open_memory_file(const char *path)
{
    handler.file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat about;
    if (handler.file < 0 || fstat(handler.file, &about) < 0)
        refuse(SETUP, "%s: %s", path, strerror(errno));
    if (!S_ISREG(about.st_mode) || about.st_size == 0)
        refuse(SETUP, "%s: empty, or not a regular file", path);
    handler.file_size = (uint64_t)about.st_size;
}

/* ---- Serving ---- */

/* Names lost pages by their offset in the memory file, because the handler does not know the guest's addresses. */
static void note_lost(const struct kuf_event *event)
{
    const struct region *region = handler.regions;
    if (event->len == 0) { /* of kuf_close: about all memory */
        note("%s; touching it raises SIGBUS", event->text);
        return;
    }
    while (event->gpa - region->offset >= region->size)
        region++;
    note("memory file offset %#" PRIx64 " (%#" PRIx64 " in Firecracker), %" PRIu64 " KiB: cannot be filled: %s; "
         "touching it raises SIGBUS",
         event->gpa, region->base + (event->gpa - region->offset), event->len / 1024, strerror(-event->error));
}

static void on_event(void *opaque, const struct kuf_event *event)
{
    (void)opaque;
    switch (event->kind) {
    case KUF_EVENT_COMPLETE:
        atomic_store(&handler.complete, true);
        break;
    case KUF_EVENT_GONE:
        if (event->error != -ESRCH)
            note("%s", event->text);
        atomic_store(event->error == -ESRCH ? &handler.gone : &handler.fatal, true);
        break;
    case KUF_EVENT_POISONED:
    case KUF_EVENT_INACCESSIBLE:
        if (event->error == -ESRCH)
            return; /* Firecracker has ended */
        if (!atomic_exchange(&handler.lost, true))
            note_lost(event);
        break;
    case KUF_EVENT_FATAL:
        note("%s", event->text);
        atomic_store(&handler.fatal, true);
        break;
    case KUF_EVENT_POPULATED:
        if (event->error < 0 && event->error != -ESRCH)
            note("populate ended early: %s", event->text);
        return;
    default:
        return;
    }
    if (write(handler.wakeup, &(uint64_t){ 1 }, sizeof(uint64_t)) < 0)
        note("eventfd: %s", strerror(errno));
}

static void open_service(void)
{
    struct kuf_options options = {
        .size = sizeof(options),
        /* The handler opens no userfaultfd and needs no privilege. */
        .flags = KUF_OPEN_ADOPT_ONLY | KUF_OPEN_SOURCES | KUF_OPEN_DETECT_ZERO,
        .event = on_event,
        .end_timeout_ms = UINT32_MAX, /* stop_serving has its own limit, and does not poison then */
    };
    if (access("/proc/self/fd", F_OK) < 0)
        refuse(SETUP, "/proc: %s (the library needs it to identify descriptors)", strerror(errno));
    handler.wakeup = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (handler.wakeup < 0)
        refuse(BROKEN, "eventfd: %s", strerror(errno));
    if (kuf_open(&options, &handler.kuf) < 0)
        refuse(NOT_SERVED, "kuf_open: %s", kuf_error());
}

/* Waits a moment, because a process loses its memory shortly before it ends. Without a pidfd, assumes that it ended. */
static bool peer_has_ended(void)
{
    struct pollfd polls = { .fd = handler.peer, .events = POLLIN };
    return handler.peer < 0 || poll(&polls, 1, 500) > 0;
}

/*
 * The message has no guest physical addresses, and the handler needs none: it uses the offset in the memory file in
 * their place.
 */
static void add_regions(int uffd)
{
    for (size_t i = 0; i < handler.count; i++) {
        const struct region *region = &handler.regions[i];
        struct kuf_source source = {
            .size = sizeof(source),
            .kind = KUF_SOURCE_FILE,
            .fd = handler.file,
            .offset = region->offset,
        };
        struct kuf_memory memory = {
            .size = sizeof(memory),
            .flags = KUF_MEMORY_REMOTE,
            .gpa = region->offset,
            .len = region->size,
            .hva = region->base,
            .page_size = region->page_size,
            .uffd = uffd,
            .source = &source,
        };
        int result = kuf_add_memory(handler.kuf, &memory);
        if (result == -EBADFD)
            refuse(DESCRIPTOR, "the descriptor of the message is no userfaultfd: %s", kuf_error());
        if (result == -ESRCH && peer_has_ended()) {
            printf("Firecracker ended before its memory was served\n");
            leave(ENDED);
        }
        if (result < 0)
            refuse(NOT_SERVED, "region %zu: %s", i, kuf_error());
    }
    printf("serving %" PRIu64 " KiB in %zu region(s), pages of %" PRIu64 " KiB\n", handler.file_size / 1024,
           handler.count, handler.regions[0].page_size / 1024);
    fflush(stdout);
    handler.serving = true;
}

static void populate(uint64_t rate)
{
    struct kuf_populate_request request = { .size = sizeof(request), .gpa = KUF_ALL, .rate = rate };
    if (kuf_populate(handler.kuf, &request) < 0)
        refuse(NOT_SERVED, "kuf_populate: %s", kuf_error());
}

/* Returns the bytes that are neither present nor removed. */
static uint64_t missing(void)
{
    struct kuf_progress_info progress = { .size = sizeof(progress) };
    if (kuf_progress(handler.kuf, KUF_ALL, &progress) < 0)
        return UINT64_MAX;
    return progress.total - progress.present - progress.removed;
}

static void report(const char *how)
{
    struct kuf_stats_info stats = { .size = sizeof(stats) };
    if (kuf_stats(handler.kuf, &stats) < 0)
        refuse(NOT_SERVED, "kuf_stats: %s", kuf_error());
    printf("%s: %" PRIu64 " faults; KiB copied %" PRIu64 ", zeroed %" PRIu64 ", given back %" PRIu64 "\n", how,
           stats.faults, stats.bytes_copied / 1024, stats.bytes_zeroed / 1024, stats.bytes_removed / 1024);
}

static void *close_filled(void *unused)
{
    (void)unused;
    if (kuf_close(&handler.kuf, KUF_END_POPULATE | KUF_END_POISON) < 0)
        refuse(NOT_SERVED, "kuf_close: %s", kuf_error());
    atomic_store(&handler.stopped, true);
    if (write(handler.wakeup, &(uint64_t){ 1 }, sizeof(uint64_t)) < 0)
        note("eventfd: %s", strerror(errno));
    return NULL;
}

/* Fills the missing pages until the next signal or the time limit. The library poisons pages that it cannot fill. */
static enum status stop_serving(int signals, uint64_t limit_ms)
{
    struct pollfd polls[] = {
        { .fd = handler.wakeup, .events = POLLIN },
        { .fd = signals, .events = POLLIN },
        { .fd = handler.peer, .events = POLLIN },
    };
    struct signalfd_siginfo signal;
    uint64_t deadline = now_ms() + limit_ms, at_first = missing(), count;
    pthread_t closing;
    if (read(signals, &signal, sizeof(signal)) < 0)
        refuse(BROKEN, "signalfd: %s", strerror(errno));
    int error = pthread_create(&closing, NULL, close_filled, NULL);
    if (error != 0)
        refuse(BROKEN, "pthread_create: %s", strerror(error));
    do {
        uint64_t now = now_ms();
        uint64_t left = now < deadline ? deadline - now : 0;
        if (poll(polls, 3, left > INT32_MAX ? INT32_MAX : (int)left) < 0 && errno != EINTR)
            refuse(BROKEN, "poll: %s", strerror(errno));
        if (polls[2].revents != 0)
            return ENDED;
        if (left == 0 || polls[1].revents != 0)
            refuse(UNFILLED, "ended before all memory was filled: %" PRIu64 " KiB were missing at the first signal; "
                             "touching the rest of them blocks", at_first / 1024);
        if (polls[0].revents != 0 && read(handler.wakeup, &count, sizeof(count)) < 0 && errno != EAGAIN)
            refuse(BROKEN, "eventfd: %s", strerror(errno));
    } while (!atomic_load(&handler.stopped));
    if (atomic_load(&handler.lost))
        return LOST;
    printf("stopped: all memory is present\n");
    return ENDED;
}

/* Serves until Firecracker ends or all its memory is present. */
static enum status serve(int signals, uint64_t stop_ms)
{
    struct pollfd polls[] = {
        { .fd = handler.wakeup, .events = POLLIN },
        { .fd = signals, .events = POLLIN },
        { .fd = handler.peer, .events = POLLIN }, /* poll ignores -1; KUF_EVENT_GONE is raised in any case */
    };
    for (;;) {
        if (poll(polls, 3, -1) < 0 && errno != EINTR)
            refuse(BROKEN, "poll: %s", strerror(errno));
        uint64_t count;
        if (polls[0].revents != 0 && read(handler.wakeup, &count, sizeof(count)) < 0 && errno != EAGAIN)
            refuse(BROKEN, "eventfd: %s", strerror(errno));

        if (polls[2].revents != 0 || atomic_load(&handler.gone)) {
            report("Firecracker has ended");
            return atomic_load(&handler.lost) ? LOST : ENDED; /* without kuf_close: no thread waits for a page */
        }
        if (atomic_load(&handler.fatal))
            return NOT_SERVED;
        if (atomic_load(&handler.lost) && handler.kill == KILL_ALWAYS)
            return LOST;
        if (atomic_load(&handler.complete) && missing() == 0) {
            report("all memory is present");
            if (kuf_close(&handler.kuf, 0) < 0)
                refuse(NOT_SERVED, "kuf_close: %s", kuf_error());
            return atomic_load(&handler.lost) ? LOST : ENDED;
        }
        if (polls[1].revents != 0)
            return stop_serving(signals, stop_ms);
    }
}

/* ---- The command line ---- */

static bool number(const char *text, double *value, double from, double to)
{
    char *end;
    errno = 0;
    *value = strtod(text, &end);
    return end != text && *end == '\0' && errno == 0 && *value >= from && *value <= to;
}

int main(int argc, char **argv)
{
    static const struct option names[] = {
        { "populate", optional_argument, NULL, 'p' }, { "timeout", required_argument, NULL, 't' },
        { "uid", required_argument, NULL, 'u' },      { "stop", required_argument, NULL, 's' },
        { "kill", no_argument, NULL, 'k' },           { "no-kill", no_argument, NULL, 'K' },
        { "help", no_argument, NULL, 'h' },           { NULL, 0, NULL, 0 },
    };
    bool populating = false;
    double rate = 0, timeout = 60, uid = geteuid(), stop_after = 30;
    for (int c; (c = getopt_long(argc, argv, "p::t:u:s:kKh", names, NULL)) != -1;) {
        bool good = c != '?';
        switch (c) {
        case 'p':
            populating = true;
            good = optarg == NULL || number(optarg, &rate, 0.001, 1e9);
            break;
        case 't':
            good = number(optarg, &timeout, 0.001, 1e6);
            break;
        case 'u':
            good = number(optarg, &uid, 0, UINT32_MAX - 1) && uid == (uid_t)uid;
            break;
        case 's':
            good = number(optarg, &stop_after, 0, 1e6);
            break;
        case 'k':
            handler.kill = KILL_ALWAYS;
            break;
        case 'K':
            handler.kill = KILL_NEVER;
            break;
        case 'h':
            fputs(usage, stdout);
            return ENDED;
        }
        if (!good) {
            fputs(usage, stderr);
            return USAGE;
        }
    }
    if (argc - optind != 2) {
        fputs(usage, stderr);
        return USAGE;
    }
    handler.socket_path = argv[optind];

    /* Block the signals before the library starts its threads, which inherit this. */
    sigset_t ending;
    sigemptyset(&ending);
    sigaddset(&ending, SIGTERM);
    sigaddset(&ending, SIGINT);
    sigprocmask(SIG_BLOCK, &ending, NULL);
    int signals = signalfd(-1, &ending, SFD_CLOEXEC);
    if (signals < 0)
        refuse(BROKEN, "signalfd: %s", strerror(errno));

    open_memory_file(argv[optind + 1]);
    open_service();
    int listener = listen_at(handler.socket_path, (uid_t)uid);
    printf("listening on %s\n", handler.socket_path);
    fflush(stdout);

    uint64_t timeout_ms = (uint64_t)(timeout * 1000);
    int stream = accept_firecracker(listener, signals, timeout_ms, (uid_t)uid);
    int uffd = receive_message(stream, signals, timeout_ms, handler.regions, &handler.count);
    close(stream); /* the protocol has no further messages */
    check_layout(handler.regions, handler.count);
    add_regions(uffd);
    close(uffd); /* the library has duplicated it */
    if (populating)
        populate((uint64_t)(rate * (double)MIB));
    leave(serve(signals, (uint64_t)(stop_after * 1000)));
}
