/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * Firecracker's side of its snapshot restore over userfaultfd, played against examples/c/firecracker_handler.c, which
 * has to be beside this program. It has guest memory as Firecracker makes it, the messages of its old and new versions,
 * vCPUs and the balloon. It kills and stops the handler and truncates its file, and sends every message that
 * Firecracker would not send. No page may be seen with bytes that are not its own, and nothing may hang.
 */
#define HARNESS_WITHOUT_LIBRARY
#include "uffd.h"
#include <poll.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/un.h>

/* The handler's, in its order. */
enum {
    ENDED, BROKEN, USAGE, SETUP, TIMED_OUT, STRANGER, CLOSED, MALFORMED, DESCRIPTOR, LAYOUT, NOT_SERVED, LOST, STOPPED,
    UNFILLED
};

enum { PAGE = 4096, REGIONS = 3, THREADS = 4, BLOCK = 16, GENERATION = 7 };

#define MIB (UINT64_C(1) << 20)
#define HUGE_PAGE (2 * MIB)

/* The regions of this guest's snapshot. With huge pages each is twice as large. */
static const uint64_t region_sizes[REGIONS] = {6 * MIB, 2 * MIB, 4 * MIB};
#define FILE_SIZE (12 * MIB)

/* A hole in the file: these bytes are zero, and so is all of a page that was given back. */
#define HOLE_FROM (3 * MIB)
#define HOLE_TO (HOLE_FROM + 256 * 1024)

/* Zeroes as well, that the file has as data. */
#define ZERO_FROM (4 * MIB)
#define ZERO_TO (ZERO_FROM + 256 * 1024)

static bool is_zero(uint64_t offset)
{
    return (offset >= HOLE_FROM && offset < HOLE_TO) || (offset >= ZERO_FROM && offset < ZERO_TO);
}

static char directory[64], memory_path[96], handler_path[4096];

/* ---- The memory file --------------------------------------------------------------------------------------------- */

static void write_memory_file(void)
{
    static unsigned char buffer[MIB];
    int file = open(memory_path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    must(file >= 0 && ftruncate(file, FILE_SIZE) == 0, "a memory file: %s", strerror(errno));
    for (uint64_t at = 0; at < FILE_SIZE; at += PAGE) {
        if (at >= HOLE_FROM && at < HOLE_TO)
            continue;
        if (is_zero(at))
            memset(buffer, 0, PAGE);
        else
            write_content(buffer, at, PAGE, GENERATION);
        must(pwrite(file, buffer, PAGE, (off_t)at) == PAGE, "the memory file is written");
    }
    close(file);
}

static bool is_snapshots(const unsigned char *page, uint64_t offset)
{
    return is_zero(offset) ? holds_zeroes(page, PAGE) : holds_content(page, offset, PAGE, GENERATION);
}

/* ---- The handler ------------------------------------------------------------------------------------------------- */

struct run {
    pid_t pid;
    int pidfd, out, errors;
    char socket[96], said[4096];
};

/* Until the handler has printed a line, or can print none any more. */
static bool hear(struct run *run, const char *word)
{
    while (strstr(run->said, word) == NULL) {
        size_t length = strlen(run->said);
        must(length + 1 < sizeof(run->said), "the handler is not talkative");
        ssize_t n = read(run->out, run->said + length, sizeof(run->said) - 1 - length);
        if (n <= 0)
            return false;
        run->said[length + (size_t)n] = '\0';
    }
    return true;
}

/* Starts a handler, with options up to a NULL, at a socket and with a memory file of the caller's. */
static void start_handler_at(struct run *run, const char *socket, const char *memory, const char *const *options)
{
    const char *arguments[16] = {handler_path};
    int count = 1, out[2];
    for (; options != NULL && *options != NULL; options++)
        arguments[count++] = *options;
    arguments[count++] = socket;
    arguments[count] = memory;
    memset(run, 0, sizeof(*run));
    snprintf(run->socket, sizeof(run->socket), "%.90s", socket);
    run->errors = memfd_create("stderr", MFD_CLOEXEC);
    must(pipe2(out, O_CLOEXEC) == 0 && run->errors >= 0, "a pipe and a file for what the handler says");
    run->pid = fork();
    if (run->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(out[1], STDOUT_FILENO);
        dup2(run->errors, STDERR_FILENO);
        execv(handler_path, (char *const *)(uintptr_t)arguments);
        _exit(126);
    }
    close(out[1]);
    run->out = out[0];
    run->pidfd = (int)syscall(SYS_pidfd_open, run->pid, 0);
}

static void start_handler(struct run *run, const char *const *options)
{
    static unsigned number;
    char socket[96];
    snprintf(socket, sizeof(socket), "%s/socket%u", directory, number++);
    start_handler_at(run, socket, memory_path, options);
    must(hear(run, "listening"), "the handler listens: %s", run->said);
}

/*
 * The handler's end: this exit status (-SIGNAL: killed), and one line on stderr that has these words (NULL: no line).
 */
static void end_handler(struct run *run, int wanted, const char *words, const char *what)
{
    int status;
    char text[2048] = "";
    must(waitpid(run->pid, &status, 0) == run->pid, "the handler ends");
    hear(run, "\n\n");
    ssize_t length = pread(run->errors, text, sizeof(text) - 1, 0);
    int got = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    is(got, wanted, "%s: the handler's status", what);
    char *line_end = strchr(text, '\n');
    if (words == NULL)
        ok(length == 0, "%s: no complaint: %s", what, text);
    else
        ok(line_end != NULL && line_end[1] == '\0' && strcasestr(text, words) != NULL, "%s: one line with \"%s\": %.*s",
           what, words, (int)strcspn(text, "\n"), text);
    if (got != wanted)
        printf("    it said: %s%s\n", run->said, text);
    ok(access(run->socket, F_OK) < 0 || wanted == SETUP || wanted < -1, "%s: its socket is gone", what);
    close(run->out);
    close(run->errors);
    close(run->pidfd);
}

/* The handler ends by itself; its parent will say how. */
static void wait_for_end(const struct run *run)
{
    struct pollfd end = {.fd = run->pidfd, .events = POLLIN};
    while (poll(&end, 1, -1) != 1)
        ;
}

/* ---- The connection ---------------------------------------------------------------------------------------------- */

static int connect_to(const struct run *run)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, run->socket, strlen(run->socket));
    int stream = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    must(stream >= 0 && connect(stream, (struct sockaddr *)&address, sizeof(address)) == 0, "connects to the handler");
    return stream;
}

/* May fail: the handler ends when it has read enough. */
static void send_with(int stream, const char *text, size_t length, const int *descriptors, size_t count)
{
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(32 * sizeof(int))];
    } control = {0};
    struct iovec part = {.iov_base = (void *)(uintptr_t)text, .iov_len = length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count > 0) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(&control.header), descriptors, count * sizeof(int));
    }
    while (length > 0) {
        ssize_t n = sendmsg(stream, &message, MSG_NOSIGNAL);
        if (n <= 0)
            return;
        length -= (size_t)n;
        part.iov_base = (char *)part.iov_base + n;
        part.iov_len = length;
        message.msg_control = NULL;
        message.msg_controllen = 0;
    }
}

/* ---- The guest --------------------------------------------------------------------------------------------------- */

static struct guest {
    struct {
        unsigned char *at;
        uint64_t size, offset;
    } region[REGIONS];
    uint64_t page_size;
    int uffd, stream;
    /* For each block of BLOCK pages: the balloon is about to take it, or has taken it. */
    atomic_int given[FILE_SIZE / PAGE / BLOCK];
    atomic_ulong looked_at, wrong;
} guest;

/* As Firecracker does: regions that do not touch each other, a userfaultfd with REMOVE events, all of it registered. */
static void make_guest(uint64_t page_size)
{
    uint64_t offset = 0;
    guest.page_size = page_size;
    guest.uffd = own_userfaultfd(UFFD_FEATURE_EVENT_REMOVE);
    for (int i = 0; i < REGIONS; i++) {
        uint64_t size = region_sizes[i], room = size + 4 * HUGE_PAGE;
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        unsigned char *at = mmap(NULL, room, PROT_NONE, flags, -1, 0);
        must(at != MAP_FAILED, "room for guest memory");
        at = (unsigned char *)(((uintptr_t)at + 2 * HUGE_PAGE) & ~(uintptr_t)(HUGE_PAGE - 1));
        if (page_size == HUGE_PAGE) /* reserved, unlike Firecracker's: another process that takes some cannot take these */
            flags = (flags & ~MAP_NORESERVE) | MAP_HUGETLB;
        flags |= MAP_FIXED;
        at = mmap(at, size, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (at == MAP_FAILED && page_size == HUGE_PAGE)
            skip("huge pages: another process has them");
        must(at != MAP_FAILED, "guest memory: %s", strerror(errno));
        guest.region[i].at = at;
        guest.region[i].size = size;
        guest.region[i].offset = offset;
        offset += size;
        struct uffdio_register registration = {
            .range = {.start = (uintptr_t)at, .len = size},
            .mode = UFFDIO_REGISTER_MODE_MISSING,
        };
        must(ioctl(guest.uffd, UFFDIO_REGISTER, &registration) == 0, "guest memory is registered");
    }
}

/* The address of a byte of the memory file. */
static unsigned char *host(uint64_t offset)
{
    int i = 0;
    while (offset - guest.region[i].offset >= guest.region[i].size)
        i++;
    return guest.region[i].at + (offset - guest.region[i].offset);
}

static uint64_t scattered(uint64_t i, uint64_t of)
{
    return i * 1640531527 % of;
}

static void look_at(uint64_t page)
{
    uint64_t offset = page * PAGE;
    int before = atomic_load(&guest.given[page / BLOCK]);
    bool old = is_snapshots(host(offset), offset), zero = holds_zeroes(host(offset), PAGE);
    int after = atomic_load(&guest.given[page / BLOCK]);
    /* Between the balloon's two marks the page may change during the read. */
    bool wrong = (before == 2 && !zero) || (after == 0 && !old);
    if (wrong && atomic_fetch_add(&guest.wrong, 1) == 0)
        printf("    page %" PRIu64 ": given back %d, %d; zero %d, the snapshot's %d\n", page, before, after, zero, old);
    atomic_fetch_add(&guest.looked_at, 1);
}

struct vcpu {
    pthread_t thread;
    uint64_t from, to, step;
};

static void *vcpu_body(void *argument)
{
    const struct vcpu *vcpu = argument;
    for (uint64_t i = vcpu->from; i < vcpu->to; i += vcpu->step)
        look_at(scattered(i, FILE_SIZE / PAGE));
    return NULL;
}

/* All pages, each by one thread, or each by every thread. */
static void start_vcpus(struct vcpu *vcpus, bool each)
{
    for (uint64_t i = 0; i < THREADS; i++) {
        vcpus[i] = (struct vcpu){.from = each ? 0 : i, .to = FILE_SIZE / PAGE, .step = each ? 1 : THREADS};
        vcpus[i].thread = start(vcpu_body, &vcpus[i]);
    }
}

static void run_vcpus(bool each, const char *what)
{
    struct vcpu vcpus[THREADS];
    start_vcpus(vcpus, each);
    for (int i = 0; i < THREADS; i++)
        pthread_join(vcpus[i].thread, NULL);
    is(atomic_load(&guest.wrong), 0, "%s: no page is wrong", what);
}

static void mark_given(uint64_t block, uint64_t blocks, int word)
{
    for (uint64_t i = 0; i < blocks; i++)
        atomic_store(&guest.given[block + i], word);
}

/* As the balloon device does when the driver asks for it. */
static void give_back(uint64_t block, uint64_t blocks)
{
    mark_given(block, blocks, 1);
    int got = madvise(host(block * BLOCK * PAGE), blocks * BLOCK * PAGE, MADV_DONTNEED);
    must(got == 0, "madvise: %s", strerror(errno));
    mark_given(block, blocks, 2);
}

/* ---- Firecracker's messages -------------------------------------------------------------------------------------- */

enum version { NOW, SINCE_1_7, SINCE_1_1, SOME_DAY };

static int region_text(char *text, size_t room, int i, enum version version)
{
    static const char *const formats[] = {
        [NOW] = "{\"base_host_virt_addr\":%" PRIu64 ",\"size\":%" PRIu64 ",\"offset\":%" PRIu64
                ",\"page_size\":%" PRIu64 ",\"page_size_kib\":%" PRIu64 "}",
        [SINCE_1_7] = "{\"base_host_virt_addr\":%" PRIu64 ",\"size\":%" PRIu64 ",\"offset\":%" PRIu64
                      ",\"page_size_kib\":%" PRIu64 "}",
        [SINCE_1_1] = "{\"base_host_virt_addr\":%" PRIu64 ",\"size\":%" PRIu64 ",\"offset\":%" PRIu64 "}",
        [SOME_DAY] = "\t{ \"numa\" : { \"node\" : [ -0.5e+3, {}, [] ], \"name\" : \"a\\\"}\\u00e9\" },\r\n"
                     " \"base_host_virt_addr\" : %" PRIu64 ", \"size\":%" PRIu64 " ,\"offset\":%" PRIu64
                     ",\"s\\u0069ze\":-1, \"page_size\":%" PRIu64 ",\"hot\":null,\"a\":true,\"b\":false,\"\":0}\n",
    };
    return snprintf(text, room, formats[version], (uint64_t)(uintptr_t)guest.region[i].at, guest.region[i].size,
                    guest.region[i].offset, guest.page_size, guest.page_size);
}

static size_t message_text(char *text, size_t room, enum version version)
{
    size_t length = (size_t)snprintf(text, room, version == SOME_DAY ? " [ " : "[");
    for (int i = 0; i < REGIONS; i++) {
        length += (size_t)snprintf(text + length, room - length, i == 0 ? "" : ",");
        length += (size_t)region_text(text + length, room - length, i, version);
    }
    return length + (size_t)snprintf(text + length, room - length, version == SOME_DAY ? "] \n" : "]");
}

static void announce(struct run *run, enum version version)
{
    char text[4096];
    size_t length = message_text(text, sizeof(text), version);
    guest.stream = connect_to(run);
    send_with(guest.stream, text, length, &guest.uffd, 1);
    /* Versions before 1.12 close the connection here, later ones when they end. */
    if (version == SINCE_1_1 || version == SINCE_1_7)
        close(guest.stream);
}

/* ---- Served ------------------------------------------------------------------------------------------------------ */

struct serving {
    const char *name;
    void (*body)(struct run *run);
    const char *options[8];
    int status;        /* the handler's */
    const char *words; /* on its stderr */
    int killed_by;     /* the end of Firecracker, if it is not its own */
    uint64_t page_size;
};

static void now_version(struct run *run)
{
    announce(run, NOW);
    run_vcpus(false, "each page by one vCPU");
    run_vcpus(true, "each page by every vCPU");
    memset(host(MIB), 0x5a, PAGE);
    ok(*host(MIB) == 0x5a && *host(MIB + PAGE - 1) == 0x5a, "the guest's writes stay");
}

static void every_vcpu_at_once(struct run *run)
{
    announce(run, SINCE_1_7);
    run_vcpus(true, "all vCPUs want the same pages");
}

static void version_1_1(struct run *run)
{
    announce(run, SINCE_1_1);
    run_vcpus(false, "a message without page sizes");
}

/* In small pieces, with the descriptor at the first of them. */
static void some_day(struct run *run)
{
    char text[4096];
    size_t length = message_text(text, sizeof(text), SOME_DAY);
    guest.stream = connect_to(run);
    for (size_t at = 0; at < length; at += 7) {
        send_with(guest.stream, text + at, length - at < 7 ? length - at : 7, &guest.uffd, at == 0);
        if (at % 63 == 0)
            sleep_ms(1);
    }
    run_vcpus(false, "a message of a later version, in pieces");
}

/*
 * Given back before the handler has taken over the region, before a touch and after, by a thread that races the vCPUs
 * and checks at once the memory that it gave back.
 */
static void balloon(struct run *run)
{
    struct vcpu vcpus[THREADS];
    announce(run, NOW);
    start_vcpus(vcpus, true);
    for (uint64_t i = 0; i < FILE_SIZE / PAGE / BLOCK; i += 3) {
        uint64_t block = scattered(i, FILE_SIZE / PAGE / BLOCK);
        give_back(block, 1);
        for (uint64_t page = 0; page < BLOCK; page++)
            look_at(block * BLOCK + page);
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(vcpus[i].thread, NULL);
    run_vcpus(false, "with the balloon");
}

/* Firecracker goes on without a handler, on ordinary memory. */
static void populated(struct run *run)
{
    announce(run, NOW);
    look_at(5);
    wait_for_end(run);
    for (int i = 0; i < REGIONS; i++)
        ok(!is_registered(guest.region[i].at), "region %d is off userfaultfd", i);
    give_back(HUGE_PAGE / PAGE / BLOCK, HUGE_PAGE / PAGE / BLOCK);
    run_vcpus(false, "populated");
}

static void populated_and_balloon(struct run *run)
{
    announce(run, SINCE_1_7);
    for (uint64_t block = 0; block < FILE_SIZE / PAGE / BLOCK; block += 2)
        give_back(FILE_SIZE / PAGE / BLOCK - 1 - block, 1);
    wait_for_end(run);
    run_vcpus(false, "populated behind the balloon");
}

/*
 * The vCPUs that still wait for a page wait for ever: Firecracker's own copy of the userfaultfd keeps the page absent.
 */
static void handler_killed(struct run *run)
{
    struct vcpu vcpus[THREADS];
    announce(run, NOW);
    start_vcpus(vcpus, false);
    wait_until(atomic_load(&guest.looked_at) > FILE_SIZE / PAGE / 8);
    must(kill(run->pid, SIGKILL) == 0, "the handler is killed");
    wait_for_end(run);
    sleep_ms(100);
    uint64_t looked_at = atomic_load(&guest.looked_at);
    sleep_ms(200);
    ok(looked_at < FILE_SIZE / PAGE && looked_at == atomic_load(&guest.looked_at),
       "the vCPUs stand after %" PRIu64 " pages", looked_at);
    is(atomic_load(&guest.wrong), 0, "killed: no page is wrong");
    _exit(atomic_load(&harness_failures) != 0);
}

/*
 * The file is truncated in the middle of a page. After that there are no bytes, and a touch raises SIGBUS: zeroes would
 * be wrong.
 */
static void file_cut(struct run *run)
{
    const uint64_t cut = 9 * MIB + 100;
    struct uffdio_api api = {.api = UFFD_API};
    int other = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    announce(run, NOW);
    look_at(0);
    look_at(8 * MIB / PAGE); /* the last region is served too */
    must(truncate(memory_path, (off_t)cut) == 0, "the memory file is cut");
    look_at(cut / PAGE - 1);
    is(atomic_load(&guest.wrong), 0, "cut: pages that the file still holds are served");
    /* UFFD_FEATURE_POISON, Linux 6.6. Without it a toucher of the page waits. */
    if (other >= 0 && ioctl(other, UFFDIO_API, &api) == 0 && (api.features & (UINT64_C(1) << 14)) == 0) {
        skip_part("this kernel cannot poison pages");
    } else {
        is(touch(host(cut)), SIGBUS, "cut: the page that is half there");
        is(touch(host(cut + MIB)), SIGBUS, "cut: a page that is not there");
    }
    look_at(cut / PAGE - 100);
    is(atomic_load(&guest.wrong), 0, "cut: they are served afterwards");
    _exit(atomic_load(&harness_failures) != 0);
}

static void handler_stopped(struct run *run)
{
    announce(run, NOW);
    look_at(1);
    give_back(4, 1);
    must(kill(run->pid, SIGTERM) == 0, "the handler is told to stop");
    wait_for_end(run);
    run_vcpus(false, "stopped");
}

static void firecracker_killed(struct run *run)
{
    struct vcpu vcpus[THREADS];
    announce(run, NOW);
    start_vcpus(vcpus, false);
    wait_until(atomic_load(&guest.looked_at) > 100);
    is(atomic_load(&guest.wrong), 0, "before the end: no page is wrong");
    kill(getpid(), atomic_load(&harness_failures) == 0 ? SIGKILL : SIGABRT);
}

static void killed_at_once(struct run *run)
{
    announce(run, NOW);
    kill(getpid(), SIGKILL);
}

/* The descriptor's flags are shared, and a hostile owner can make the handler's reads wait. */
static void made_blocking(struct run *run)
{
    announce(run, NOW);
    /* The handler has all regions when it serves the last. */
    look_at(FILE_SIZE / PAGE - 1);
    must(fcntl(guest.uffd, F_SETFL, 0) == 0, "the userfaultfd blocks");
    look_at(1000);
    is(atomic_load(&guest.wrong), 0, "blocking: no page is wrong");
}

/*
 * There is no time left, or both signals are pending when the handler looks: it ends at once, and the guest sees no
 * wrong page.
 */
static void stopped_at_once(struct run *run)
{
    announce(run, NOW);
    look_at(1);
    must(kill(run->pid, SIGSTOP) == 0 && kill(run->pid, SIGTERM) == 0 && kill(run->pid, SIGINT) == 0, "two signals");
    must(kill(run->pid, SIGCONT) == 0, "it goes on");
    wait_for_end(run);
    look_at(1);
    is(atomic_load(&guest.wrong), 0, "stopped at once: no page is wrong");
    _exit(atomic_load(&harness_failures) != 0);
}

/* Resident KiB of the mappings within a range; the shared page of zeroes counts as none. */
static uint64_t resident_kib(const unsigned char *at, uint64_t size)
{
    uint64_t from, to, kib, sum = 0;
    bool within = false;
    char line[512];
    FILE *smaps = fopen("/proc/self/smaps", "r");
    must(smaps != NULL, "smaps can be read");
    while (fgets(line, sizeof(line), smaps) != NULL) {
        if (sscanf(line, "%" SCNx64 "-%" SCNx64 " ", &from, &to) == 2)
            within = from >= (uintptr_t)at && to <= (uintptr_t)at + size;
        if (within && sscanf(line, "Rss: %" SCNu64, &kib) == 1)
            sum += kib;
    }
    fclose(smaps);
    return sum;
}

/* Pages of zeroes take no memory, whether the file has a hole there or data. */
static void zero_pages(struct run *run)
{
    announce(run, NOW);
    wait_for_end(run);
    is(resident_kib(guest.region[0].at, guest.region[0].size),
       (guest.region[0].size - (HOLE_TO - HOLE_FROM) - (ZERO_TO - ZERO_FROM)) / 1024, "zero pages take no memory");
    run_vcpus(false, "with zero pages");
}

static void refused_and_killed(struct run *run)
{
    guest.region[1].offset += PAGE;
    announce(run, NOW);
    pause();
}

static void refused_and_left(struct run *run)
{
    guest.region[1].offset += PAGE;
    announce(run, NOW);
    wait_for_end(run);
}

static const struct serving servings[] = {
    {"now", now_version, .status = ENDED},
    {"since 1.7", every_vcpu_at_once, .status = ENDED},
    {"since 1.1", version_1_1, .status = ENDED},
    {"some day", some_day, .status = ENDED},
    {"balloon", balloon, .status = ENDED},
    {"populate", populated, .options = {"--populate"}, .status = ENDED},
    {"populate and balloon", populated_and_balloon, .options = {"--populate=60"}, .status = ENDED},
    {"balloon and populate", balloon, .options = {"-p40"}, .status = ENDED},
    {"handler killed", handler_killed, .options = {"--populate=4"}, .status = -SIGKILL},
    {"handler stopped", handler_stopped, .status = ENDED},
    {"stopped twice", stopped_at_once, .status = UNFILLED, .words = "before all memory was filled"},
    {"stopped without time", stopped_at_once, .options = {"--stop=0"}, .status = UNFILLED,
     .words = "before all memory was filled"},
    {"zero pages", zero_pages, .options = {"--populate"}, .status = ENDED},
    {"Firecracker killed", firecracker_killed, .options = {"--populate=20"}, .status = ENDED, .killed_by = SIGKILL},
    {"killed at once", killed_at_once, .status = ENDED, .killed_by = SIGKILL},
    {"made blocking", made_blocking, .status = ENDED},
    {"refused and killed", refused_and_killed, .status = LAYOUT,
     .words = "overlap in the memory file", .killed_by = SIGKILL},
    {"refused and left", refused_and_left, .options = {"--no-kill"}, .status = LAYOUT, .words = "overlap in the memory file"},
    /* The events of two pages may come in any order. */
    {"file cut", file_cut, .status = LOST, .words = "memory file offset 0x"},
};

static void serve(const struct serving *serving)
{
    struct run run;
    int status;
    printf("# %s\n", serving->name);
    start_handler(&run, serving->options);
    fflush(stdout);
    pid_t firecracker = fork();
    if (firecracker == 0) {
        begin_child();
        make_guest(serving->page_size != 0 ? serving->page_size : PAGE);
        serving->body(&run);
        exit(atomic_load(&harness_failures) != 0);
    }
    must(waitpid(firecracker, &status, 0) == firecracker, "Firecracker ends");
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77) { /* and has said why */
        kill(run.pid, SIGKILL);
        waitpid(run.pid, &status, 0);
        unlink(run.socket);
        return;
    }
    if (!ok(serving->killed_by != 0 ? WIFSIGNALED(status) && WTERMSIG(status) == serving->killed_by : status == 0,
            "%s: Firecracker's end, %#x", serving->name, (unsigned)status))
        kill(run.pid, SIGTERM); /* it may not have connected at all */
    end_handler(&run, serving->status, serving->words, serving->name);
}

/* ---- Refused ----------------------------------------------------------------------------------------------------- */

enum what { USERFAULTFD, NOTHING, TWO, TWENTY, DEVICE, MEMFD, PIPE, SOCKET, NO_API, DEAD };

/* $0 to $2: a region as it should be. $a: the first one's address; $x: one with nothing there; $t: another one's. */
struct refusal {
    const char *message;
    int status;
    const char *words;
    enum what what;
};

#define TAIL ",$1,$2]"
#define FIELDS(base, size, offset) "{\"base_host_virt_addr\":" base ",\"size\":" size ",\"offset\":" offset "}"
#define PAGE_SIZE(...) "[{\"base_host_virt_addr\":$a,\"size\":6291456,\"offset\":0,\"page_size\":" __VA_ARGS__ "}" TAIL

static const struct refusal refusals[] = {
    /* Too little, too much, something else. */
    {"", CLOSED, "after 0 bytes", NOTHING},
    {"[", CLOSED, "middle", USERFAULTFD},
    {"[$0,$1,$2", CLOSED, "middle", USERFAULTFD},
    {"[{\"size\":1", CLOSED, "middle", USERFAULTFD},
    {"[{\"size\":1,\"base_host", CLOSED, "middle", USERFAULTFD},
    {"[$0" TAIL "x", MALFORMED, "behind the array", USERFAULTFD},
    {"[$0" TAIL "[$0" TAIL, MALFORMED, "behind the array", USERFAULTFD},
    {"GET / HTTP/1.1\r\n\r\n", MALFORMED, "an array was expected, at byte 0", USERFAULTFD},
    {"null", MALFORMED, "an array", USERFAULTFD},
    {"$0", MALFORMED, "an array", USERFAULTFD},
    {"[$0,]", MALFORMED, "an object", USERFAULTFD},
    {"[$0 $1]", MALFORMED, "',' or ']'", USERFAULTFD},
    {"[null]", MALFORMED, "an object", USERFAULTFD},
    {"[[$0]]", MALFORMED, "an object", USERFAULTFD},
    {"[$0}", MALFORMED, "',' or ']'", USERFAULTFD},
    {"[]", LAYOUT, "no region", USERFAULTFD},
    {"[{}]", MALFORMED, "without", USERFAULTFD},
    {"[{\"size\":4096,\"offset\":0}]", MALFORMED, "without", USERFAULTFD},
    {"[{\"base_host_virt_addr\":4096,\"offset\":0}]", MALFORMED, "without", USERFAULTFD},
    {"[{\"base_host_virt_addr\":4096,\"size\":4096}]", MALFORMED, "without", USERFAULTFD},
    {"[{\"size\" 1}]", MALFORMED, "':'", USERFAULTFD},
    {"[{size:1}]", MALFORMED, "a string", USERFAULTFD},
    {"[{\"size\":1,}]", MALFORMED, "a string", USERFAULTFD},
    {"[{\"a\nb\":1}]", MALFORMED, "control", USERFAULTFD},
    {"[{\"a\\x\":1}]", MALFORMED, "escape", USERFAULTFD},
    {"[{\"a\\u12g4\":1}]", MALFORMED, "escape", USERFAULTFD},
    {"[{\"a\":nul}]", MALFORMED, "a word", USERFAULTFD},
    {"[{\"a\":'b'}]", MALFORMED, "without digits", USERFAULTFD},
    {"[{\"a\":01}]", MALFORMED, "starts with 0", USERFAULTFD},
    {"[{\"a\":1.}]", MALFORMED, "without digits", USERFAULTFD},
    {"[{\"a\":[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]}]", MALFORMED, "too deep", USERFAULTFD},
    {"[{\"size\":4096,\"size\":4096}]", MALFORMED, "twice", USERFAULTFD},

    /* Numbers. */
    {"[" FIELDS("-4096", "4096", "0") "]", MALFORMED, "below zero", USERFAULTFD},
    {"[" FIELDS("$a", "-1", "0") "]", MALFORMED, "below zero", USERFAULTFD},
    {"[" FIELDS("$a", "4096", "-0") "]", MALFORMED, "below zero", USERFAULTFD},
    {"[" FIELDS("$a", "4096.0", "0") "]", MALFORMED, "whole", USERFAULTFD},
    {"[" FIELDS("$a", "4e3", "0") "]", MALFORMED, "whole", USERFAULTFD},
    {"[" FIELDS("$a", "0x1000", "0") "]", MALFORMED, "',' or '}'", USERFAULTFD},
    {"[" FIELDS("$a", "04096", "0") "]", MALFORMED, "starts with 0", USERFAULTFD},
    {"[" FIELDS("$a", "\"4096\"", "0") "]", MALFORMED, "a number", USERFAULTFD},
    {"[" FIELDS("$a", "null", "0") "]", MALFORMED, "a number", USERFAULTFD},
    {"[" FIELDS("$a", "18446744073709551616", "0") "]", MALFORMED, "64 bits", USERFAULTFD},
    {"[" FIELDS("$a", "99999999999999999999999999", "0") "]", MALFORMED, "64 bits", USERFAULTFD},

    /* Regions that cannot be. */
    {"[" FIELDS("$a", "0", "0") TAIL, LAYOUT, "is 0", USERFAULTFD},
    {"[" FIELDS("0", "6291456", "0") TAIL, LAYOUT, "is 0", USERFAULTFD},
    {"[" FIELDS("18446744073709547520", "6291456", "0") TAIL, LAYOUT, "64 bits", USERFAULTFD},
    {"[" FIELDS("$a", "18446744073709547520", "0") TAIL, LAYOUT, "64 bits", USERFAULTFD},
    {"[" FIELDS("$a", "6291456", "18446744073709547520") TAIL, LAYOUT, "64 bits", USERFAULTFD},
    {"[" FIELDS("4097", "6291456", "0") TAIL, LAYOUT, "multiple", USERFAULTFD},
    {"[" FIELDS("$a", "6291455", "0") TAIL, LAYOUT, "multiple", USERFAULTFD},
    {"[" FIELDS("$a", "6291456", "512") TAIL, LAYOUT, "multiple", USERFAULTFD},
    {"[" FIELDS("$a", "6291456", "12582912") TAIL, LAYOUT, "behind the end", USERFAULTFD},
    {"[" FIELDS("$a", "1099511627776", "0") TAIL, LAYOUT, "behind the end", USERFAULTFD},
    {"[$0" TAIL "", DESCRIPTOR, "no descriptor", NOTHING},
    {"[$0,$1]", LAYOUT, "the memory file has", USERFAULTFD},
    {"[$0,$1,$1]", LAYOUT, "overlap in memory", USERFAULTFD},
    {"[$0,$1,$2,$0]", LAYOUT, "overlap in memory", USERFAULTFD},
    {"[" FIELDS("$a", "6291456", "0") "," FIELDS("$a", "6291456", "6291456") "]", LAYOUT,
     "overlap in memory", USERFAULTFD},
    {"[" FIELDS("$a", "6291456", "0") "," FIELDS("$x", "6291456", "4194304") "]", LAYOUT,
     "overlap in the memory file", USERFAULTFD},

    /* Page sizes. */
    {PAGE_SIZE("0"), LAYOUT, "no page size", USERFAULTFD},
    {PAGE_SIZE("4"), LAYOUT, "no page size", USERFAULTFD},
    {PAGE_SIZE("12288"), LAYOUT, "no page size", USERFAULTFD},
    {PAGE_SIZE("9223372036854775808"), LAYOUT, "no page size", USERFAULTFD},
    {PAGE_SIZE("4194304"), LAYOUT, "multiple", USERFAULTFD},
    {PAGE_SIZE("4096,\"page_size_kib\":4"), MALFORMED, "differ", USERFAULTFD},

    /* Descriptors. */
    {"[$0" TAIL, DESCRIPTOR, "2 descriptors", TWO},
    {"[$0" TAIL, DESCRIPTOR, "descriptors came", TWENTY},
    {"[$0" TAIL, DESCRIPTOR, "no userfaultfd", DEVICE},
    {"[$0" TAIL, DESCRIPTOR, "no userfaultfd", MEMFD},
    {"[$0" TAIL, DESCRIPTOR, "no userfaultfd", PIPE},
    {"[$0" TAIL, DESCRIPTOR, "no userfaultfd", SOCKET},
    {"[$0" TAIL, NOT_SERVED, "region 0", NO_API},
    {"[$0" TAIL, NOT_SERVED, "gone", DEAD},

    /* Addresses that are not guest memory. */
    {"[" FIELDS("$x", "6291456", "0") TAIL, NOT_SERVED, "region 0", USERFAULTFD},
    {"[" FIELDS("18446603336221196288", "6291456", "0") TAIL, NOT_SERVED, "region 0", USERFAULTFD},
    {"[$0," FIELDS("$x", "2097152", "6291456") ",$2]", NOT_SERVED, "region 1", USERFAULTFD},
    {"[" FIELDS("$t", "6291456", "0") TAIL, NOT_SERVED, "region 0", USERFAULTFD},
};

/* Far from where the kernel puts mappings. */
static void *const nowhere = (void *)UINT64_C(0x210000000000);

static void *taken;

static size_t expand(char *text, size_t room, const char *message)
{
    size_t length = 0;
    for (; *message != '\0'; message++) {
        if (*message != '$') {
            text[length++] = *message;
            continue;
        }
        char c = *++message;
        if (c >= '0' && c <= '2') {
            length += (size_t)region_text(text + length, room - length, c - '0', SINCE_1_7);
            continue;
        }
        const void *address = c == 'x' ? nowhere : c == 't' ? taken : guest.region[c - 'a'].at;
        length += (size_t)snprintf(text + length, room - length, "%" PRIu64, (uint64_t)(uintptr_t)address);
    }
    return length;
}

/* The userfaultfd of a process that has ended. */
static int dead_userfaultfd(void)
{
    int pair[2], uffd = -1;
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0, "a socket pair");
    pid_t child = fork();
    if (child == 0) {
        int fd = own_userfaultfd(0);
        send_with(pair[1], "u", 1, &fd, 1);
        _exit(0);
    }
    char byte;
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    must(recvmsg(pair[0], &message, MSG_CMSG_CLOEXEC) == 1 && message.msg_controllen > 0, "its userfaultfd comes");
    memcpy(&uffd, CMSG_DATA(&control.header), sizeof(int));
    waitpid(child, NULL, 0);
    close(pair[0]);
    close(pair[1]);
    return uffd;
}

static void refuse(const struct refusal *refusal)
{
    int descriptors[20], pair[2] = {-1, -1}, own = -1;
    size_t count = refusal->what == NOTHING ? 0 : refusal->what == TWO ? 2 : refusal->what == TWENTY ? 20 : 1;
    for (int i = 0; i < 20; i++)
        descriptors[i] = guest.uffd;
    if (refusal->what == DEVICE)
        own = open("/dev/null", O_RDWR | O_CLOEXEC);
    else if (refusal->what == MEMFD)
        own = memfd_create("userfaultfd", MFD_CLOEXEC);
    else if (refusal->what == NO_API)
        own = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    else if (refusal->what == DEAD)
        own = dead_userfaultfd();
    else if (refusal->what == PIPE)
        must(pipe2(pair, O_CLOEXEC) == 0, "a pipe");
    else if (refusal->what == SOCKET)
        must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0, "a socket pair");
    if (own >= 0 || pair[0] >= 0)
        descriptors[0] = own >= 0 ? own : pair[0];

    char text[4096], name[64];
    struct run run;
    start_handler(&run, (const char *const[]){"--no-kill", NULL});
    int stream = connect_to(&run);
    size_t length = expand(text, sizeof(text), refusal->message);
    send_with(stream, text, length, descriptors, count);
    /*
     * The handler can see that a message ends too early only when nothing can follow; it refuses others while the
     * connection is open.
     */
    if (refusal->status == CLOSED)
        shutdown(stream, SHUT_WR);
    snprintf(name, sizeof(name), "%.60s", refusal->message);
    for (char *c = name; *c != '\0'; c++)
        *c = *c < ' ' ? '.' : *c;
    end_handler(&run, refusal->status, refusal->words, name);
    close(stream);
    close(own);
    close(pair[0]);
    close(pair[1]);
}

static void refuse_large(const char *name, const char *piece, size_t times, const char *words)
{
    struct run run;
    start_handler(&run, (const char *const[]){"--no-kill", NULL});
    int stream = connect_to(&run);
    send_with(stream, "[", 1, &guest.uffd, 1);
    for (size_t i = 0; i < times; i++)
        send_with(stream, piece, strlen(piece), NULL, 0);
    end_handler(&run, MALFORMED, words, name);
    close(stream);
}

/* Every message, cut anywhere. */
static void refuse_cut(void)
{
    char text[4096];
    size_t length = message_text(text, sizeof(text), SOME_DAY), right = 0, cuts = 0;
    /* Without its last bytes, which are space, it is whole. */
    while (text[length - 1] != ']')
        length--;
    for (size_t at = 1; at < length; at += 11, cuts++) {
        struct run run;
        int status;
        start_handler(&run, (const char *const[]){"--no-kill", NULL});
        int stream = connect_to(&run);
        send_with(stream, text, at, &guest.uffd, 1);
        close(stream);
        waitpid(run.pid, &status, 0);
        right += WIFEXITED(status) && WEXITSTATUS(status) == CLOSED;
        close(run.out);
        close(run.errors);
        close(run.pidfd);
    }
    is(right, cuts, "a message cut after n bytes is refused as one that ended too early");
}

/* Noise in a message: the handler refuses the message or, where the noise does not matter, serves. */
static void refuse_noise(void)
{
    static const char noise[] = "0123456789[]{},:\"\\-.eE \n\x80\xff" "abnu";
    int right = 0, tries = 60;
    uint64_t random = 1;
    for (int i = 0; i < tries; i++) {
        char text[4096];
        size_t length = message_text(text, sizeof(text), i % 2 ? NOW : SOME_DAY);
        for (int changes = 0; changes <= i % 3; changes++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            text[(random >> 33) % length] = noise[(random >> 20) % (sizeof(noise) - 1)];
        }
        struct run run;
        int status;
        start_handler(&run, (const char *const[]){"--no-kill", NULL});
        int stream = connect_to(&run);
        send_with(stream, text, length, &guest.uffd, 1);
        shutdown(stream, SHUT_WR);
        if (hear(&run, "serving"))
            kill(run.pid, SIGKILL);
        waitpid(run.pid, &status, 0);
        close(stream);
        int got = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
        bool good = got == -SIGKILL || got == CLOSED || got == MALFORMED || got == LAYOUT || got == NOT_SERVED;
        right += good;
        if (!good)
            printf("    status %d for: %.*s\n", got, (int)length, text);
        close(run.out);
        close(run.errors);
        close(run.pidfd);
    }
    is(right, tries, "messages with noise in them");
}

/* ---- Time and strangers ------------------------------------------------------------------------------------------ */

static void too_late(void)
{
    static const char *const options[] = {"--timeout=0.4", NULL};
    struct run unasked, silent, half, slow;
    start_handler(&unasked, options);
    start_handler(&silent, options);
    start_handler(&half, options);
    start_handler(&slow, options);
    int streams[] = {connect_to(&silent), connect_to(&half), connect_to(&slow)};
    send_with(streams[1], "[{\"size\":", 9, &guest.uffd, 1);
    send_with(streams[2], "[", 1, &guest.uffd, 1);
    /* Each byte comes in time, but the message never ends. */
    struct pollfd end = {.fd = slow.pidfd, .events = POLLIN};
    while (poll(&end, 1, 20) == 0)
        send_with(streams[2], " ", 1, NULL, 0);
    end_handler(&unasked, TIMED_OUT, "has not connected", "no process connects");
    end_handler(&silent, TIMED_OUT, "has not sent", "nothing is sent");
    end_handler(&half, TIMED_OUT, "has not sent", "half is sent");
    end_handler(&slow, TIMED_OUT, "has not sent", "byte after byte is sent");
    for (int i = 0; i < 3; i++)
        close(streams[i]);
}

static void strangers(void)
{
    struct run run;
    struct stat about;
    start_handler(&run, NULL);
    ok(stat(run.socket, &about) == 0 && (about.st_mode & 0777) == 0600, "the socket is its owner's only");
    must(kill(run.pid, SIGTERM) == 0, "told to stop");
    end_handler(&run, STOPPED, "stopped before", "stopped before a process connected");

    if (geteuid() != 0) {
        skip_part("the socket cannot be given to another user");
        return;
    }
    start_handler(&run, (const char *const[]){"--uid=12345", NULL});
    ok(stat(run.socket, &about) == 0 && about.st_uid == 12345, "the socket is given to the user that is named");
    int stream = connect_to(&run); /* root may connect to any user's socket */
    end_handler(&run, STRANGER, "only user 12345 may", "another user connects");
    close(stream);
}

static void command_lines(void)
{
    static char long_path[sizeof(((struct sockaddr_un *)NULL)->sun_path) + 1];
    memset(long_path, 'a', sizeof(long_path) - 1);
    static const struct {
        const char *options[3];
        const char *socket, *memory;
        int status;
        const char *words;
    } lines[] = {
        {{NULL}, "a", NULL, USAGE, NULL},
        {{"--timeout=x"}, "a", "b", USAGE, NULL},
        {{"--timeout=-1"}, "a", "b", USAGE, NULL},
        {{"--uid=-1"}, "a", "b", USAGE, NULL},
        {{"--stop=-1"}, "a", "b", USAGE, NULL},
        {{"--populate=no"}, "a", "b", USAGE, NULL},
        {{"--unknown"}, "a", "b", USAGE, NULL},
        {{"--"}, "a", "/nowhere/memory", SETUP, "No such file"},
        {{"--"}, "a", "/tmp", SETUP, "not a regular file"},
        {{"--"}, "a", "/dev/null", SETUP, "not a regular file"},
        {{"--"}, "/nowhere/socket", memory_path, SETUP, "No such file"},
        {{"--"}, memory_path, memory_path, SETUP, "in use"},
        {{"--"}, long_path, memory_path, SETUP, "too long"},
    };
    for (size_t i = 0; i < sizeof(lines) / sizeof(lines[0]); i++) {
        struct run run;
        int status;
        start_handler_at(&run, lines[i].socket, lines[i].memory, lines[i].options);
        if (lines[i].status == SETUP) {
            end_handler(&run, SETUP, lines[i].words, "command line");
            continue;
        }
        waitpid(run.pid, &status, 0);
        ok(WIFEXITED(status) && WEXITSTATUS(status) == USAGE, "command line %zu: the usage", i);
        close(run.out);
        close(run.errors);
        close(run.pidfd);
    }
    ok(access(memory_path, F_OK) == 0, "a file that is no socket of the handler's is left alone");
}

/* ---- Huge pages -------------------------------------------------------------------------------------------------- */

static long reserved_huge_pages(long set)
{
    long count = -1;
    FILE *file = fopen("/proc/sys/vm/nr_hugepages", set < 0 ? "r" : "r+");
    if (file == NULL)
        return -1;
    if (set >= 0 && fprintf(file, "%ld\n", set) > 0)
        rewind(file);
    if (fscanf(file, "%ld", &count) != 1)
        count = -1;
    fclose(file);
    return count;
}

static void huge_pages(void)
{
    static const struct serving huge[] = {
        {"huge pages", now_version, .status = ENDED, .page_size = HUGE_PAGE},
        {"huge pages, populate", populated, .options = {"--populate"}, .status = ENDED, .page_size = HUGE_PAGE},
    };
    const long wanted = FILE_SIZE / HUGE_PAGE + 1;
    long before = reserved_huge_pages(-1);
    bool enough = before >= 0 && reserved_huge_pages(before + wanted) >= before + wanted;
    if (!enough)
        skip_part("%ld huge pages cannot be reserved", wanted);
    for (size_t i = 0; enough && i < sizeof(huge) / sizeof(huge[0]); i++)
        serve(&huge[i]);
    if (before >= 0)
        reserved_huge_pages(before);
}

static int clean_up(void)
{
    unlink(memory_path);
    ok(rmdir(directory) == 0, "no handler leaves a file behind");
    return done();
}

/* With the name of a serving as argument: only that one. */
int main(int argc, char **argv)
{
    begin();
    ssize_t length = readlink("/proc/self/exe", handler_path, sizeof(handler_path) - 32);
    must(length > 0, "this program has a path");
    strcpy(strrchr(handler_path, '/') + 1, "firecracker_handler");
    snprintf(directory, sizeof(directory), "/tmp/kuf-firecracker-XXXXXX");
    must(mkdtemp(directory) != NULL, "a directory of its own");
    snprintf(memory_path, sizeof(memory_path), "%s/memory", directory);
    write_memory_file();

    for (size_t i = 0; argc > 1 && i < sizeof(servings) / sizeof(servings[0]); i++)
        if (strcmp(argv[1], servings[i].name) == 0)
            serve(&servings[i]);
    if (argc > 1)
        return clean_up();

    command_lines();
    strangers();

    make_guest(PAGE);
    taken = map_anonymous(6 * MIB);
    struct uffdio_register registration = {
        .range = {.start = (uintptr_t)taken, .len = 6 * MIB},
        .mode = UFFDIO_REGISTER_MODE_MISSING,
    };
    int other = own_userfaultfd(0);
    must(ioctl(other, UFFDIO_REGISTER, &registration) == 0, "another userfaultfd has memory");
    for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++)
        refuse(&refusals[i]);
    refuse_large("spaces without end", "                                ", 4000, "more than");
    refuse_large("regions without end",
                 "{\"base_host_virt_addr\":4096,\"size\":4096,\"offset\":0,\"page_size\":4096,\"later\":[1,2,3]},", 100,
                 "too many regions");
    refuse_large("a string without end", "{\"\\\"                             ", 4000, "");
    refuse_cut();
    refuse_noise();
    too_late();
    close(guest.uffd);

    for (size_t i = 0; i < sizeof(servings) / sizeof(servings[0]); i++) {
        if (servings[i].body == file_cut)
            huge_pages(); /* before there is no whole file any more */
        serve(&servings[i]);
    }
    return clean_up();
}
