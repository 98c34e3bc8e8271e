/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * postcopy.c - guest memory arrives over a connection while the guest runs, and the connection breaks
 *
 * There are two processes. The source has the memory. The destination has none and runs at once: threads, in place of
 * vCPUs, touch and check each page. Its fill callback requests the run from the source and returns KUF_FILL_DEFERRED; a
 * receiver thread passes all pages that arrive to kuf_resolve, requested or not, because the source also pushes all
 * memory in the background. The connection breaks several times, with unanswered requests and half a message in flight.
 * The destination connects again and repeats the requests that kuf_pending lists. When the source has pushed all
 * memory, kuf_populate requests the pages that were lost with a connection and never touched. At the end both sides
 * compare a checksum of all memory.
 *
 * Build:  cc -O2 -pthread -o postcopy postcopy.c $(pkg-config --cflags --libs kuf)
 * Run:    ./postcopy [--cuts N]
 */
#define _GNU_SOURCE
#include <getopt.h>
#include <kuf.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "example.h"

enum { PAGES_MAX = 8192, TOUCHERS = 2, PUSH_PAGES = 16, PUSH_PAUSE_US = 300, OVERDUE_NS = 500000000 };
enum { CUTS_MAX = 16, WATCHDOG_S = 30 };

#define MEMORY (32 * MIB)
#define PAGES (MEMORY / PAGE)
#define RUN_MAX MIB

static const char usage[] =
    "usage: postcopy [--cuts N]\n"
    "Receives a guest's memory over a socket while the guest runs.\n"
    "  --cuts N   the number of times the connection is lost, 0 to 16 (default 3)\n";

/* ---- The protocol: a header, followed by the bytes for CONTENT ---- */

enum kind {
    REQUEST = 1, /* destination: send me len bytes at gpa */
    CONTENT,     /* source: len bytes follow, for gpa */
    PUSHED,      /* source: all memory was sent once */
    CHECKSUM,    /* both: gpa is the checksum of the sender's memory */
};

struct message {
    uint32_t magic;
    uint32_t kind;
    uint64_t gpa;
    uint64_t len;
};

static const uint32_t message_magic = 0x50435059;

/* Returns false if the connection is lost. */
static bool send_fully(int link, const void *bytes, uint64_t len)
{
    const uint8_t *at = bytes;
    while (len > 0) {
        ssize_t n = send(link, at, len, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        at += n;
        len -= (uint64_t)n;
    }
    return true;
}

/* Returns false if the connection is lost, also in the middle. */
static bool receive_fully(int link, void *bytes, uint64_t len)
{
    uint8_t *at = bytes;
    while (len > 0) {
        ssize_t n = recv(link, at, len, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        at += n;
        len -= (uint64_t)n;
    }
    return true;
}

static bool send_message(int link, enum kind kind, uint64_t gpa, uint64_t len)
{
    struct message message = { .magic = message_magic, .kind = kind, .gpa = gpa, .len = len };
    return send_fully(link, &message, sizeof(message));
}

/* Checks a message from the other side before it is used as an address. */
static bool receive_message(int link, struct message *message)
{
    if (!receive_fully(link, message, sizeof(*message)))
        return false;
    if (message->magic != message_magic || message->kind < REQUEST || message->kind > CHECKSUM)
        fail("the other side does not speak this protocol");
    if (message->kind != REQUEST && message->kind != CONTENT)
        return true;
    if (message->len == 0 || message->len > RUN_MAX || message->len % PAGE != 0 || message->gpa % PAGE != 0 ||
        message->gpa > MEMORY - message->len)
        fail("the other side sent a range outside the memory");
    return true;
}

static uint64_t checksum(const void *memory)
{
    const uint64_t *words = memory;
    uint64_t sum = 0;
    for (uint64_t i = 0; i < MEMORY / sizeof(*words); i++)
        sum = (sum ^ words[i]) * UINT64_C(0x100000001b3);
    return sum;
}

static void *map_memory(void)
{
    void *memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap: %s", strerror(errno));
    return memory;
}

/* ---- The source ---- */

struct source {
    uint8_t *memory;
    int link;
    uint64_t cursor;      /* the end of the pushed memory */
    pthread_mutex_t lock; /* held for whole messages; guards the fields below */
    uint64_t sent;
    unsigned cuts, cuts_done;
    bool stopped; /* no more messages are sent on this connection */
};

/* Whether to break the connection at the next request. Pushing stops until then, so that a request does follow. */
static bool cut_is_due(struct source *source)
{
    pthread_mutex_lock(&source->lock);
    uint64_t next = MEMORY / (source->cuts + 1) * (source->cuts_done + 1);
    bool due = !source->stopped && source->cuts_done < source->cuts && source->sent >= next;
    pthread_mutex_unlock(&source->lock);
    return due;
}

/* Breaks the connection in the middle of an answer; the requests behind it are lost. */
static void cut(struct source *source, const struct message *request)
{
    pthread_mutex_lock(&source->lock);
    send_message(source->link, CONTENT, request->gpa, request->len);
    send_fully(source->link, source->memory + request->gpa, request->len / 2);
    shutdown(source->link, SHUT_RDWR);
    source->stopped = true;
    source->cuts_done++;
    pthread_mutex_unlock(&source->lock);
}

/* Returns whether the bytes were sent. */
static bool send_content(struct source *source, uint64_t gpa, uint64_t len)
{
    pthread_mutex_lock(&source->lock);
    bool sent = !source->stopped && send_message(source->link, CONTENT, gpa, len) &&
                send_fully(source->link, source->memory + gpa, len);
    source->sent += len;
    pthread_mutex_unlock(&source->lock);
    return sent;
}

/* Pushes all memory in address order. It does not repeat pages that were in flight when the connection broke. */
static void *push_main(void *argument)
{
    struct source *source = argument;
    const uint64_t len = PUSH_PAGES * PAGE;
    while (source->cursor < MEMORY) {
        uint64_t gpa = source->cursor;
        source->cursor += len;
        while (cut_is_due(source))
            sleep_us(PUSH_PAUSE_US);
        if (!send_content(source, gpa, len))
            return NULL;
        sleep_us(PUSH_PAUSE_US);
    }
    pthread_mutex_lock(&source->lock);
    send_message(source->link, PUSHED, 0, 0);
    pthread_mutex_unlock(&source->lock);
    return NULL;
}

static void stop_pushing(struct source *source)
{
    pthread_mutex_lock(&source->lock);
    source->stopped = true;
    pthread_mutex_unlock(&source->lock);
}

/* Serves one connection. Returns true if the destination has all memory, false if the connection was lost. */
static bool serve_connection(struct source *source, uint64_t sum)
{
    struct message message;
    pthread_t pusher;
    bool done = false;
    source->stopped = false;
    if (pthread_create(&pusher, NULL, push_main, source) != 0)
        fail("cannot start a thread");
    while (!done && !source->stopped && receive_message(source->link, &message)) {
        if (message.kind == REQUEST && cut_is_due(source))
            cut(source, &message);
        else if (message.kind == REQUEST)
            send_content(source, message.gpa, message.len);
        else if (message.kind == CHECKSUM && message.gpa == sum)
            done = true;
        else
            fail("source: the destination has different bytes");
    }
    stop_pushing(source);
    pthread_join(pusher, NULL);
    if (done)
        send_message(source->link, CHECKSUM, sum, 0);
    close(source->link);
    return done;
}

static _Noreturn void source_main(int listener, unsigned cuts)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    example_begin(WATCHDOG_S);
    struct source source = { .memory = map_memory(), .cuts = cuts };
    pthread_mutex_init(&source.lock, NULL);
    for (uint64_t page = 0; page < PAGES; page++)
        pattern_write(source.memory + page * PAGE, page);
    uint64_t sum = checksum(source.memory);
    do {
        source.link = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (source.link < 0)
            fail("accept: %s", strerror(errno));
    } while (!serve_connection(&source, sum));
    _exit(EXIT_SUCCESS);
}

/* ---- The destination ---- */

struct destination {
    struct kuf *kuf;
    uint8_t *memory;
    struct sockaddr_un address;
    socklen_t address_len;
    pthread_mutex_t lock; /* guards the fields below; held while a request is sent, so that requests stay whole */
    pthread_cond_t changed;
    int link;             /* -1: lost */
    uint64_t sum;         /* the checksum of all memory, or 0 while memory is missing */
    uint64_t source_sum;
    unsigned connections;
    uint64_t requests, requests_again;
    uint64_t received, new_bytes; /* used by the receiver thread only */
    atomic_uint next_toucher;
    atomic_uint bad_pages;
};

/* Sends if there is a connection. kuf_pending later lists a request that was not sent or was lost. */
static void tell_source(struct destination *destination, enum kind kind, uint64_t gpa, uint64_t len)
{
    pthread_mutex_lock(&destination->lock);
    if (destination->link >= 0)
        send_message(destination->link, kind, gpa, len);
    destination->requests += kind == REQUEST;
    pthread_mutex_unlock(&destination->lock);
}

/* The fill callback. The answer may be resolved before it returns. */
static int fill_from_source(void *opaque, struct kuf_fill *fill)
{
    tell_source(opaque, REQUEST, fill->gpa, fill->len);
    return KUF_FILL_DEFERRED;
}

/* Repeats the requests that are older than age_ns. */
static void ask_again(struct destination *destination, uint64_t age_ns)
{
    static struct kuf_fault pending[PAGES_MAX];
    ssize_t n = kuf_pending(destination->kuf, pending, PAGES_MAX);
    if (n < 0)
        fail("kuf_pending: %s", kuf_error());
    for (ssize_t i = 0; i < n; i++) {
        if (pending[i].age_ns < age_ns)
            continue;
        for (uint64_t done = 0; done < pending[i].len; done += RUN_MAX) {
            uint64_t rest = pending[i].len - done;
            tell_source(destination, REQUEST, pending[i].gpa + done, rest < RUN_MAX ? rest : RUN_MAX);
            destination->requests_again++;
        }
    }
    pthread_mutex_lock(&destination->lock);
    uint64_t sum = destination->sum;
    pthread_mutex_unlock(&destination->lock);
    if (sum != 0)
        tell_source(destination, CHECKSUM, sum, 0);
}

/* Waits for ns or until the connection is lost. Returns whether it still exists. */
static bool stays_connected(struct destination *destination, uint64_t ns)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    uint64_t end = (uint64_t)until.tv_nsec + ns;
    until.tv_sec += (time_t)(end / 1000000000);
    until.tv_nsec = (long)(end % 1000000000);
    int result = 0;
    pthread_mutex_lock(&destination->lock);
    while (destination->link >= 0 && result == 0)
        result = pthread_cond_timedwait(&destination->changed, &destination->lock, &until);
    bool connected = destination->link >= 0;
    pthread_mutex_unlock(&destination->lock);
    return connected;
}

/*
 * Runs as long as a connection. First it repeats all requests that the last connection lost; later those that are
 * overdue, because kuf_pending did not list a run whose callback had sent the request but not returned. It is a
 * separate thread because the receiver must read answers while requests are sent; otherwise both sides would wait for
 * each other.
 */
static void *ask_again_main(void *argument)
{
    struct destination *destination = argument;
    uint64_t age_ns = 0;
    do {
        ask_again(destination, age_ns);
        age_ns = OVERDUE_NS;
    } while (stays_connected(destination, OVERDUE_NS));
    return NULL;
}

/* The source has pushed all memory once. Requests the pages that lost connections left absent. */
static void ask_for_the_rest(struct destination *destination)
{
    struct kuf_populate_request everything = { .size = sizeof(everything), .gpa = KUF_ALL };
    if (kuf_populate(destination->kuf, &everything) < 0)
        fail("kuf_populate: %s", kuf_error());
}

/* Receives on one connection. Returns true if the source confirmed the checksum, false if the connection was lost. */
static bool receive(struct destination *destination, int link)
{
    static uint8_t content[RUN_MAX];
    struct message message;
    while (receive_message(link, &message)) {
        if (message.kind == CONTENT) {
            if (!receive_fully(link, content, message.len))
                return false;
            ssize_t resolved = kuf_resolve(destination->kuf, message.gpa, content, message.len, 0);
            if (resolved < 0)
                fail("kuf_resolve: %s", kuf_error());
            destination->received += message.len;
            destination->new_bytes += (uint64_t)resolved;
        } else if (message.kind == PUSHED) {
            ask_for_the_rest(destination);
        } else if (message.kind == CHECKSUM) {
            destination->source_sum = message.gpa;
            return true;
        } else {
            fail("the source sent a request");
        }
    }
    return false;
}

static int connect_to_source(const struct destination *destination)
{
    int link = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (link < 0 || connect(link, (const struct sockaddr *)&destination->address, destination->address_len) < 0)
        fail("connect: %s", strerror(errno));
    return link;
}

static void set_link(struct destination *destination, int link)
{
    pthread_mutex_lock(&destination->lock);
    destination->link = link;
    pthread_cond_signal(&destination->changed);
    pthread_mutex_unlock(&destination->lock);
}

/* The receiver thread: connects again after each loss. */
static void *receiver_main(void *argument)
{
    struct destination *destination = argument;
    bool done = false;
    while (!done) {
        pthread_t asker;
        int link = connect_to_source(destination);
        set_link(destination, link);
        destination->connections++;
        if (pthread_create(&asker, NULL, ask_again_main, destination) != 0)
            fail("cannot start a thread");
        done = receive(destination, link);
        shutdown(link, SHUT_RDWR); /* unblocks threads that send */
        set_link(destination, -1);
        pthread_join(asker, NULL);
        close(link);
    }
    return NULL;
}

static void *toucher_main(void *argument)
{
    struct destination *destination = argument;
    uint64_t start = atomic_fetch_add(&destination->next_toucher, 1) * (PAGES / TOUCHERS);
    for (uint64_t i = 0; i < PAGES; i++) {
        uint64_t page = scattered(start + i, PAGES);
        if (!pattern_matches(destination->memory + page * PAGE, page))
            atomic_fetch_add(&destination->bad_pages, 1);
    }
    return NULL;
}

static void on_event(void *opaque, const struct kuf_event *event)
{
    (void)opaque;
    if (event->kind == KUF_EVENT_POISONED || event->kind == KUF_EVENT_INACCESSIBLE || event->kind == KUF_EVENT_FATAL)
        fail("lost: %s", event->text);
}

static void open_service(struct destination *destination)
{
    /* USER_MODE_ONLY needs no privilege and is enough for threads. A VMM with a KVM guest must leave it out. */
    struct kuf_options options = {
        .size = sizeof(options),
        .flags = KUF_OPEN_USER_MODE_ONLY,
        .fill = fill_from_source,
        .event = on_event,
        .opaque = destination,
    };
    int result = kuf_open(&options, &destination->kuf);
    check_open(result, kuf_error());
    struct kuf_memory memory = { .size = sizeof(memory), .len = MEMORY, .hva = (uintptr_t)destination->memory };
    if (kuf_add_memory(destination->kuf, &memory) < 0)
        fail("kuf_add_memory: %s", kuf_error());
}

/* Runs the guest until it has touched all memory, then sends the checksum to the source. */
static void run_guest(struct destination *destination)
{
    pthread_t touchers[TOUCHERS];
    for (int i = 0; i < TOUCHERS; i++)
        if (pthread_create(&touchers[i], NULL, toucher_main, destination) != 0)
            fail("cannot start a thread");
    for (int i = 0; i < TOUCHERS; i++)
        pthread_join(touchers[i], NULL);

    uint64_t sum = checksum(destination->memory);
    pthread_mutex_lock(&destination->lock);
    destination->sum = sum;
    pthread_mutex_unlock(&destination->lock);
    tell_source(destination, CHECKSUM, sum, 0);
}

static void report(const struct destination *destination, unsigned cuts)
{
    struct kuf_stats_info stats = { .size = sizeof(stats) };
    if (kuf_stats(destination->kuf, &stats) < 0)
        fail("kuf_stats: %s", kuf_error());
    printf("connections   %u, of which %u were lost\n", destination->connections, cuts);
    printf("requests      %llu, of which %llu repeated after a loss\n", (unsigned long long)destination->requests,
           (unsigned long long)destination->requests_again);
    printf("received      %.1f MiB, of which %.1f MiB were new; %llu faults\n",
           (double)destination->received / (double)MIB, (double)destination->new_bytes / (double)MIB,
           (unsigned long long)stats.faults);
    printf("checksum      here %016llx, source %016llx; bad pages: %u\n", (unsigned long long)destination->sum,
           (unsigned long long)destination->source_sum, atomic_load(&destination->bad_pages));
    if (destination->sum != destination->source_sum || atomic_load(&destination->bad_pages) != 0)
        fail("the memory differs from the source's");
    if (destination->new_bytes != MEMORY)
        fail("%llu bytes became present, not all", (unsigned long long)destination->new_bytes);
    if (destination->connections != cuts + 1)
        fail("the number of lost connections is wrong");
}

static void destination_main(struct destination *destination, unsigned cuts)
{
    pthread_t receiver;
    destination->memory = map_memory();
    destination->link = -1;
    pthread_mutex_init(&destination->lock, NULL);
    pthread_cond_init(&destination->changed, NULL);
    open_service(destination);
    if (pthread_create(&receiver, NULL, receiver_main, destination) != 0)
        fail("cannot start a thread");
    run_guest(destination);
    pthread_join(receiver, NULL);
    report(destination, cuts);
    if (kuf_close(&destination->kuf, 0) < 0) /* needs no flag, because all pages are present */
        fail("kuf_close: %s", kuf_error());
    munmap(destination->memory, MEMORY);
}

/* ---- */

/* Returns a listening socket with a name that the kernel chooses. */
static int listen_anywhere(struct destination *destination)
{
    struct sockaddr_un any = { .sun_family = AF_UNIX };
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    destination->address_len = sizeof(destination->address);
    if (listener < 0 || bind(listener, (struct sockaddr *)&any, sizeof(any.sun_family)) < 0 || listen(listener, 1) < 0 ||
        getsockname(listener, (struct sockaddr *)&destination->address, &destination->address_len) < 0)
        fail("listening socket: %s", strerror(errno));
    return listener;
}

int main(int argc, char **argv)
{
    static const struct option names[] = {
        { "cuts", required_argument, NULL, 'c' },
        { "help", no_argument, NULL, 'h' },
        { NULL, 0, NULL, 0 },
    };
    unsigned cuts = 3;
    for (int c; (c = getopt_long(argc, argv, "h", names, NULL)) != -1;) {
        switch (c) {
        case 'c': cuts = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'h': fputs(usage, stdout); return EXIT_SUCCESS;
        default: fputs(usage, stderr); return EXIT_FAILURE;
        }
    }
    if (cuts > CUTS_MAX)
        fail("--cuts is at most %d", CUTS_MAX);
    example_begin(WATCHDOG_S);

    struct destination destination = { .link = -1 };
    int listener = listen_anywhere(&destination);
    pid_t source = fork(); /* before kuf_open: a handle belongs to the process that opened it */
    if (source < 0)
        fail("fork: %s", strerror(errno));
    if (source == 0)
        source_main(listener, cuts);
    close(listener);
    destination_main(&destination, cuts);

    int status;
    if (waitpid(source, &status, 0) < 0 || !WIFEXITED(status) || WEXITSTATUS(status) != 0)
        fail("the source failed");
    return EXIT_SUCCESS;
}
