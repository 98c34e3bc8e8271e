/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * The first process of the emulated machine: runs the programs of /tests/list
 * one after another and reports their results.
 *
 * A line of the list has words separated by blanks: any number of NAME=VALUE,
 * which go to the environment (timeout=SECONDS is for init), then the program
 * and its arguments.
 *
 * Programs print to the console, together with the kernel.  The results go to
 * a second serial line, which nothing else uses: a line for each check, "ok",
 * "not ok" or "skip", and "done" at the end.
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
#include <sys/syscall.h>
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
		/* Set the size, because 2 MiB is not always the default on arm64. */
		{ "hugetlbfs", "/dev/hugepages", "pagesize=2M" },
		{ "tmpfs", "/tmp", NULL },
		{ "tmpfs", "/var/tmp", NULL },
	};

	mkdir("/var", 0755);
	for (size_t i = 0; i < sizeof(mounts) / sizeof(mounts[0]); i++) {
		mkdir(mounts[i].dir, 0755);
		if (mount(mounts[i].type, mounts[i].dir, mounts[i].type, 0,
			  mounts[i].data))
			fprintf(stderr, "init: %s: %s\n", mounts[i].dir,
				strerror(errno));
	}
}

/* Loads the modules, if the kernel has any, in the order of the list. */
static void load_modules(void)
{
	char name[128], path[160];
	FILE *list = fopen("/modules/list", "r");

	while (list && fscanf(list, "%127s", name) == 1) {
		snprintf(path, sizeof(path), "/modules/%s", name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0))
			fprintf(stderr, "init: %s: %s\n", name, strerror(errno));
		close(fd);
	}
	if (list)
		fclose(list);
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

/* Some programs print "ok - NAME", as TAP does without numbers. */
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

/* Processes left by a program would disturb the next ones. */
static void kill_all(void)
{
	kill(-1, SIGKILL);
}

/* Prints the first line of a thread's file in /proc, if there is one. */
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

/* Prints for each thread of a hanging program its name, where it sleeps in the kernel, and its system call. */
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
			/* Do not wait for other processes that have the pipe open. */
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
			/* SIGKILL did not end it. */
			break;
		}
	}
	close(fds[0]);
	if (run.len)
		take_line(&run);

	if (timed_out) {
		failed++;
		result("not ok %s: did not end within %ld s%s", run.name, timeout,
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

	/* If there is a console, standard input and output already are the console. */
	if (open("/dev/console", O_RDWR) >= 0) {
		dup2(open("/dev/null", O_RDONLY), 0);
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	load_modules();
	/* The kernel's command line names the serial line for results. */
	results = fopen(getenv("results") ? getenv("results") : "/dev/ttyS1", "w");
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
