/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The first process of the rig: runs the programs that /tests/list names, one
 * after the other, and reports.
 *
 * A line of the list is words, separated by blanks: first any number of
 * NAME=VALUE, which go to the environment (timeout=SECONDS is for us), then
 * the program and its arguments.
 *
 * What programs print goes to the console, where it mixes with what the kernel
 * prints.  What counts goes to a second serial line, undisturbed: a line for
 * every check, "ok", "not ok" or "skip", and "done" at the very end.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define EXIT_SKIP 77

static FILE *results;
static unsigned int passed, failed, skipped;
static long default_timeout = 60;

static void result(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vfprintf(results, fmt, ap);
	va_end(ap);
	fputc('\n', results);
	fflush(results);
}

static void mount_all(void)
{
	static const struct {
		const char *type, *dir, *data;
	} mounts[] = {
		{ "proc", "/proc", NULL },
		{ "sysfs", "/sys", NULL },
		{ "debugfs", "/sys/kernel/debug", NULL },
		{ "devtmpfs", "/dev", NULL },
		{ "tmpfs", "/dev/shm", NULL },
		{ "hugetlbfs", "/dev/hugepages", NULL },
		{ "tmpfs", "/tmp", NULL },
	};

	for (size_t i = 0; i < sizeof(mounts) / sizeof(mounts[0]); i++) {
		mkdir(mounts[i].dir, 0755);
		if (mount(mounts[i].type, mounts[i].dir, mounts[i].type, 0,
			  mounts[i].data))
			fprintf(stderr, "init: %s: %s\n", mounts[i].dir,
				strerror(errno));
	}
}

static long now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec;
}

struct run {
	const char *name;
	unsigned int ok, not_ok;
	char line[512];
	size_t len;
};

/* Some write "ok - NAME", as TAP does without its numbers. */
static const char *check_name(const char *s)
{
	return strncmp(s, "- ", 2) ? s : s + 2;
}

static void take_line(struct run *run)
{
	run->line[run->len] = 0;
	run->len = 0;
	if (!strncmp(run->line, "ok ", 3)) {
		run->ok++;
		if (strstr(run->line, "# SKIP")) {
			skipped++;
			result("skip %s: %s", run->name, check_name(run->line + 3));
		} else {
			passed++;
			result("ok %s: %s", run->name, check_name(run->line + 3));
		}
	} else if (!strncmp(run->line, "not ok ", 7)) {
		run->not_ok++;
		failed++;
		result("not ok %s: %s", run->name, check_name(run->line + 7));
	}
}

static void take(struct run *run, const char *buf, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		if (buf[i] == '\n')
			take_line(run);
		else if (run->len < sizeof(run->line) - 1)
			run->line[run->len++] = buf[i];
	}
}

/* What a program leaves behind would disturb the ones that follow. */
static void kill_all(void)
{
	kill(-1, SIGKILL);
}

/* The first line of a file of a thread's, or nothing. */
static void tell_file(pid_t pid, const char *tid, const char *file)
{
	char path[280], buf[256];
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/task/%s/%s", pid, tid, file);
	fd = open(path, O_RDONLY);
	if (fd < 0)
		return;
	n = read(fd, buf, sizeof(buf) - 1);
	close(fd);
	buf[n > 0 ? n : 0] = '\0';
	printf(" %.*s", (int)strcspn(buf, "\n"), buf);
}

/* Where each thread of a program that does not end is: its name, where it sleeps in the kernel, in which call. */
static void tell_threads(const char *name, pid_t pid)
{
	char path[64];
	struct dirent *entry;
	DIR *dir;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	dir = opendir(path);
	while (dir && (entry = readdir(dir))) {
		if (*entry->d_name == '.')
			continue;
		printf("# %s: %s", name, entry->d_name);
		tell_file(pid, entry->d_name, "comm");
		tell_file(pid, entry->d_name, "wchan");
		tell_file(pid, entry->d_name, "syscall");
		printf("\n");
	}
	if (dir)
		closedir(dir);
	fflush(stdout);
}

static void run_program(const char *name, char **argv, char **env, size_t nr_env,
			long timeout)
{
	struct run run = { .name = name };
	bool timed_out = false, gone = false, closed = false;
	long deadline = now() + timeout, started = now();
	int fds[2], status = 0;
	char buf[4096];
	pid_t pid;

	if (pipe2(fds, O_CLOEXEC)) {
		perror("init: pipe");
		return;
	}
	printf("# %s\n", run.name);

	pid = fork();
	if (!pid) {
		setsid();
		dup2(fds[1], 1);
		dup2(fds[1], 2);
		for (size_t i = 0; i < nr_env; i++)
			putenv(env[i]);
		execv(argv[0], argv);
		dprintf(2, "%s: %s\n", argv[0], strerror(errno));
		_exit(127);
	}
	close(fds[1]);

	for (;;) {
		struct pollfd pfd = { .fd = closed ? -1 : fds[0], .events = POLLIN };
		int r = poll(&pfd, 1, closed ? 10 : 100);

		if (r > 0) {
			ssize_t n = read(fds[0], buf, sizeof(buf));

			if (n > 0) {
				if (write(1, buf, n) < 0)
					break;
				take(&run, buf, n);
				continue;
			}
			closed = true;
		}
		if (!gone && waitpid(pid, &status, WNOHANG) == pid) {
			gone = true;
			/* Whoever else has the pipe open is not waited for. */
			kill(-pid, SIGKILL);
			continue;
		}
		if (gone)
			break;
		if (now() > deadline && !timed_out) {
			timed_out = true;
			tell_threads(name, pid);
			kill(-pid, SIGKILL);
			deadline = now() + 10;
		} else if (now() > deadline) {
			/* Not even SIGKILL helps. */
			break;
		}
	}
	close(fds[0]);
	if (run.len)
		take_line(&run);

	if (timed_out) {
		failed++;
		result("not ok %s: no end after %ld s%s", run.name, timeout,
		       gone ? "" : ", cannot be killed");
	} else if (WIFSIGNALED(status)) {
		failed++;
		result("not ok %s: killed by signal %d", run.name, WTERMSIG(status));
	} else if (WEXITSTATUS(status) == EXIT_SKIP) {
		if (!run.ok && !run.not_ok) {
			skipped++;
			result("skip %s", run.name);
		}
	} else if (WEXITSTATUS(status)) {
		if (!run.not_ok) {
			failed++;
			result("not ok %s: exit status %d", run.name,
			       WEXITSTATUS(status));
		}
	} else if (!run.ok && !run.not_ok) {
		passed++;
		result("ok %s", run.name);
	}
	printf("# %s: %ld s\n", run.name, now() - started);
	kill_all();
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
}

static void run_line(char *line)
{
	char *words[64], *save = NULL, name[512] = "";
	size_t n = 0, env = 0;
	long timeout = default_timeout;

	for (char *w = strtok_r(line, " \t\n", &save); w && n < 63;
	     w = strtok_r(NULL, " \t\n", &save)) {
		if (n == env && !strncmp(w, "timeout=", 8)) {
			timeout = strtol(w + 8, NULL, 10);
			continue;
		}
		const char *shown = w;

		if (n == env && strchr(w, '='))
			env++;
		else if (n == env && strrchr(w, '/'))
			shown = strrchr(w, '/') + 1;
		words[n++] = w;
		snprintf(name + strlen(name), sizeof(name) - strlen(name), "%s%s",
			 *name ? " " : "", shown);
	}
	words[n] = NULL;
	if (n == env || words[0][0] == '#')
		return;
	run_program(name, words + env, words, env, timeout);
}

int main(void)
{
	char line[1024];
	FILE *list;

	mount_all();

	/* Standard input and output are the console already, if there is one. */
	if (open("/dev/console", O_RDWR) >= 0) {
		dup2(open("/dev/null", O_RDONLY), 0);
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	results = fopen("/dev/ttyS1", "w");
	if (!results)
		results = stdout;

	setenv("PATH", "/bin:/tests", 1);
	setenv("HOME", "/tmp", 1);
	setenv("TMPDIR", "/tmp", 1);
	setenv("LD_LIBRARY_PATH", "/lib", 1);

	printf("# up after %ld s\n", now());
	result("up %ld", now());

	list = fopen("/tests/list", "r");
	while (list && fgets(line, sizeof(line), list))
		run_line(line);

	printf("# %u passed, %u failed, %u skipped\n", passed, failed, skipped);
	result("done %u %u %u", passed, failed, skipped);
	fflush(NULL);
	sync();
	sleep(1);
	reboot(RB_AUTOBOOT);
	return 1;
}
