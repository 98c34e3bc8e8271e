# SPDX-License-Identifier: MIT OR Apache-2.0
"""The tests of the QEMU fork: a Linux guest under load migrates by post-copy, with libkuf and with QEMU's own thread.

Prints a line for each test, a table that compares both, and the sum. run.sh sets the paths in the environment.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from vhost_user import VhostUser
from vm import Failed, Link, Vm

MIB = 1 << 20
QEMU = os.environ["KUF_QEMU"]
KERNEL = os.environ["KUF_KERNEL"]
INITRD = os.environ["KUF_INITRD"]
LIBDIR = os.environ["KUF_LIBDIR"]
# quiet: the kernel's messages do not matter. No watchdogs: a guest that waits for a page is not locked up.
APPEND = "console=ttyS0 panic=-1 quiet nowatchdog rcupdate.rcu_cpu_stall_suppress=1"


class Skip(Exception):
    """A requirement of a test is missing; the text names it."""


class Case:
    """The parameters of a migration."""

    def __init__(self, memory=640, mib=384, smp=2, step=1, accel="tcg,thread=multi", backend=None, preempt=False,
                 cuts=0, bandwidth=0, precopy=0.0, limit=4):
        self.memory, self.mib, self.smp, self.step = memory, mib, smp, step
        self.accel, self.backend, self.preempt, self.cuts = accel, backend, preempt, cuts
        # MiB per second after and before the switch to post-copy; the part of memory sent before it. 0 means no limit.
        # Only unlimited runs are comparable: a source of QEMU 7.2 at its limit answers no request for the rest of a
        # tenth of a second.
        self.bandwidth, self.limit, self.precopy = bandwidth, limit, precopy

    def arguments(self):
        machine = ["-machine", "pc", "-accel", self.accel, "-smp", str(self.smp), "-m", str(self.memory)]
        if self.backend:
            machine += ["-object", f"{self.backend},id=ram,size={self.memory}M", "-machine", "memory-backend=ram"]
        return machine + ["-kernel", KERNEL, "-initrd", INITRD, "-append",
                          f"{APPEND} kuf.mib={self.mib} kuf.step={self.step}"]

    @contextlib.contextmanager
    def needs(self):
        """Reserves enough huge pages of the host for a source and a destination."""
        if not self.backend or "hugetlb" not in self.backend:
            yield
            return
        knob = "/proc/sys/vm/nr_hugepages"
        with open(knob) as file:
            before = file.read()
        try:
            with open(knob, "w") as file:
                file.write(str(self.memory + 8))
            with open("/proc/meminfo") as file:
                free = int(re.search(r"HugePages_Free:\s+(\d+)", file.read()).group(1))
            if free < self.memory:
                raise Skip(f"{self.memory} huge pages of 2 MiB are needed, but only {free} are free")
            yield
        except PermissionError:
            raise Skip("huge pages are needed, but only root can reserve them") from None
        finally:
            try:
                with open(knob, "w") as file:
                    file.write(before)
            except OSError:
                pass

    def start(self, name, directory, incoming=False):
        extra = ["-incoming", "defer"] if incoming else []
        return Vm(name, QEMU, self.arguments() + extra, directory, {"LD_LIBRARY_PATH": LIBDIR})


def listening_ports(vm):
    """Returns the ports that migrate-incoming and migrate-recover have opened."""
    addresses = vm.qmp("query-migrate").get("socket-address", [])
    return [int(address["port"]) for address in addresses if address["type"] == "inet"]


def pages(source):
    ram = source.qmp("query-migrate").get("ram", {})
    return ram.get("normal", 0) + ram.get("duplicate", 0)


class Migration:
    """A source with a guest under load, and the destination of its migration."""

    def __init__(self, case, kuf, directory):
        self.case, self.kuf = case, kuf
        self.link = Link()
        self.source = case.start("source", directory)
        try:
            self.destination = case.start("destination", directory, incoming=True)
        except BaseException:
            self.source.kill()
            raise
        self.ports = set()
        self.uri = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.link.close()
        self.source.kill()
        self.destination.kill()

    def _listen(self, command):
        """Sets uri, to which the source connects: a socket of the destination, or the relay that can be cut."""
        if not self.case.cuts:
            self.uri = f"unix:{self.destination.directory}/migration"
            self.destination.qmp(command, uri=self.uri)
            return
        self.uri = f"tcp:127.0.0.1:{self.link.port}"
        self.destination.qmp(command, uri="tcp:127.0.0.1:0")
        deadline = time.monotonic() + 20
        while True:
            fresh = [port for port in listening_ports(self.destination) if port not in self.ports]
            if fresh:
                self.link.target = fresh[0]
                self.ports.update(fresh)
                return
            if time.monotonic() > deadline:
                raise Failed("the destination did not open a port")
            time.sleep(0.02)

    def begin(self):
        """Migrates until the guest runs at the destination, with most of its memory still at the source."""
        case, source, destination = self.case, self.source, self.destination
        source.line(f"READY .* threads={case.smp}$", 120)
        self.before, _ = source.check()
        source.capabilities(postcopy_ram=True, postcopy_preempt=case.preempt)
        destination.capabilities(postcopy_ram=True, postcopy_preempt=case.preempt, postcopy_blocktime=True,
                                 x_libkuf=self.kuf)
        source.qmp("migrate-set-parameters", max_bandwidth=case.limit * MIB,
                   max_postcopy_bandwidth=case.bandwidth * MIB)
        self._listen("migrate-incoming")
        source.qmp("migrate", uri=self.uri)
        source.wait_status(["active"], 60)
        while pages(source) < case.precopy * case.memory * 256:
            if source.status() != "active":
                raise Failed(f"precopy ended: {source.status()}")
            time.sleep(0.02)
        self.pushed_before = pages(source)
        source.qmp("migrate-start-postcopy")
        self.resumed = destination.wait_event("RESUME", 120)
        return self

    def settle(self):
        """
        Waits until the guest has handled interrupts for a while at the destination. An emulated CPU handles them with
        QEMU's big lock held: if a handler touches an absent page, the monitor does not answer until the page is
        present, in stock QEMU too. The pages of the handlers are soon present; after that the source may stop without
        blocking the monitor.
        """
        self.destination.line("BEAT [0-9]+ ", 60, count=4)

    def cut(self):
        """Cuts the link in the middle of the migration and restores it."""
        self.settle()
        if self.destination.status() != "postcopy-active":
            raise Failed("the migration ended before the link could be cut")
        self.link.cut()
        self.source.wait_status(["postcopy-paused"], 60)
        self.destination.wait_status(["postcopy-paused"], 60)
        # Requests for pages touched now cannot be sent, and must not be forgotten.
        time.sleep(1)
        self._listen("migrate-recover")
        self.source.qmp("migrate", uri=self.uri, resume=True)
        self.destination.wait_status(["postcopy-active", "completed"], 60)

    def end(self, timeout=300):
        """Waits until all memory is present, and returns the measurements."""
        case, source, destination = self.case, self.source, self.destination
        during, took = destination.check(timeout)
        source.wait_status(["completed"], timeout)
        destination.wait_status(["completed"], timeout)
        done = time.time()
        after, _ = destination.check()
        if not self.before["still"] == during["still"] == after["still"]:
            raise Failed("the half of memory that is never written has changed: "
                         f"{self.before['still']} {during['still']} {after['still']}")
        if int(after["writes"]) <= int(self.before["writes"]):
            raise Failed("the guest did not continue")
        at_source, here = source.qmp("query-migrate"), destination.qmp("query-migrate")
        moved = pages(source) - self.pushed_before
        if self.kuf:
            info = here.get("libkuf")
            if not info:
                raise Failed("the destination did not use libkuf")
            demand, faults = info["requested"] // 4096, info["faults"]
            if info["pending"]:
                raise Failed(f"{info['pending']} runs were never filled")
        else:
            if "libkuf" in here:
                raise Failed("the destination used libkuf although it was not enabled")
            size = 2 * MIB if case.backend and "hugetlb" in case.backend else 4096
            demand, faults = at_source["ram"]["postcopy-requests"] * size // 4096, None
        requests = at_source["ram"]["postcopy-requests"]
        if not requests:
            raise Failed("no page was requested")
        times = here["postcopy-vcpu-blocktime"]
        if "postcopy-blocktime" not in here:
            raise Failed("no block time in query-migrate")
        # QEMU rounds each down to whole milliseconds. A wait is booked a moment after its thread has gone on, or much later if
        # the booking thread has lost its CPU: then the thread's next wait has begun, and the sum of its waits counts that time
        # twice. The time of all vCPUs counts it once.
        still = here["postcopy-blocktime"]
        if self.kuf and (still > min(times) + 1 or case.smp == 1 and still < times[0] // 2):
            raise Failed(f"all vCPUs were blocked together for {still} ms, but each of them for {times}")
        return {
            "requests": requests,
            "demand": min(demand, moved),
            "push": max(moved - demand, 0),
            "faults": faults,
            "block": sum(times),
            "seconds": done - self.resumed,
            "check": took,
            "downtime": at_source.get("downtime", 0),
            "slowest": int(during["slowest_us"]) / 1000,
            "wait": sum(times) / requests,
        }


MIGRATION_TESTS = [f"{way}{by}" for by in ("plain", "libkuf")
                   for way in ("", "recovery/", "preempt/", "preempt/recovery/")]


class Suite:
    def __init__(self, directory, pattern):
        self.directory, self.pattern = directory, pattern
        self.passed = self.failed = self.skipped = 0
        self.table, self.starts = [], []

    def run(self, name, test, *arguments):
        if not re.search(self.pattern, name):
            return None
        begin = time.monotonic()
        try:
            result = test(*arguments)
        except Skip as why:
            self.skipped += 1
            print(f"SKIP {name}: {why}", flush=True)
        except (Failed, OSError, subprocess.SubprocessError) as why:
            self.failed += 1
            print(f"not ok {name}: {why}", flush=True)
        else:
            self.passed += 1
            print(f"ok {name} ({time.monotonic() - begin:.1f} s)", flush=True)
            return result
        return None

    def migrate(self, case, kuf):
        with case.needs(), Migration(case, kuf, self.directory) as migration:
            try:
                migration.begin()
                for _ in range(case.cuts):
                    migration.cut()
                return migration.end()
            except (Failed, OSError) as why:
                raise Failed(f"{why}; source: {migration.source.log()}; destination: {migration.destination.log()}") \
                    from None

    def tables(self):
        """Returns the table of measurements: libkuf / QEMU's own / their ratio."""

        def cell(ours, stock, form):
            ratio = f"{ours / stock:.2f}" if stock else "-"
            return f"{ours:{form}} / {stock:{form}} / {ratio}"

        text = ""
        if self.table:
            columns = (
                ("pages by demand", "demand", "d"), ("requests", "requests", "d"), ("pages by push", "push", "d"),
                ("block time, ms, sum of vCPUs", "block", "d"), ("the same for each request", "wait", ".2f"),
                ("until all is present, s", "seconds", ".2f"), ("guest reads all meanwhile, s", "check", ".2f"),
                ("longest stop the guest sees, ms", "slowest", ".0f"))
            text += f"| libkuf / QEMU's own / ratio | {' | '.join(title for title, _, _ in columns)} |\n"
            text += "|---" * (len(columns) + 1) + "|\n"
            for name, ours, stock in self.table:
                cells = [cell(ours[key], stock[key], form) for _, key, form in columns]
                text += f"| {name} | " + " | ".join(cells) + " |\n"
        if self.starts:
            text += ("\n| libkuf / plain -incoming / ratio | until the guest runs, ms "
                     "| until its first output, ms | guest then reads all, s |\n|---|---|---|---|\n")
            for name, ours, stock in self.starts:
                text += (f"| {name} | {cell(ours['run'] * 1000, stock['run'] * 1000, '.1f')} | "
                         f"{cell(ours['spoke'] * 1000, stock['spoke'] * 1000, '.0f')} | "
                         f"{cell(ours['check'], stock['check'], '.2f')} |\n")
        return text

    def both(self, name, make):
        """Runs the same migration with libkuf and with QEMU's own thread."""
        ours = self.run(f"{name}/libkuf", lambda: self.migrate(make(), True))
        stock = self.run(f"{name}/stock", lambda: self.migrate(make(), False))
        if ours and stock:
            self.table.append((name, ours, stock))

    def migration_test(self, name):
        """Runs a case of QEMU's own migration-test."""
        done = subprocess.run([os.environ["KUF_MIGRATION_TEST"], "-p", f"/x86_64/migration/postcopy/{name}"],
                              env=dict(os.environ, QTEST_QEMU_BINARY=QEMU, LD_LIBRARY_PATH=LIBDIR), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, check=False)
        if done.returncode or not re.search(rf"^ok 1 /x86_64/migration/postcopy/{name}$", done.stdout, re.MULTILINE):
            said = [line for line in done.stdout.splitlines() if not line.startswith("# ")]
            raise Failed(f"exit status {done.returncode}: {' | '.join(said[-6:])}")

    def on_kvm(self):
        """Checks that KVM works, so that migration-test has migrated KVM guests."""
        if not os.path.exists("/dev/kvm"):
            raise Skip("no /dev/kvm: the cases of migration-test ran emulated")
        with Vm("kvm", QEMU, ["-machine", "pc", "-accel", "kvm", "-accel", "tcg", "-m", "64"], self.directory) as vm:
            if not vm.qmp("query-kvm")["enabled"]:
                raise Skip(f"/dev/kvm does not work, the cases of migration-test ran emulated: {vm.log()}")

    def source_silent(self, kuf):
        """The source stops for a while: the guest waits, the destination reports the waiting time, then the guest continues."""
        case = Case(bandwidth=32, smp=1)
        with Migration(case, kuf, self.directory) as migration:
            migration.begin()
            source, destination = migration.source, migration.destination
            migration.settle()
            source.process.send_signal(signal.SIGSTOP)
            try:
                time.sleep(5)
                before = destination.beats()
                time.sleep(2)
                if destination.status() != "postcopy-active":
                    raise Failed(f"the destination is {destination.status()}: {destination.log()}")
                if destination.beats() != before:
                    raise Failed("the guest continued without its memory")
                text = destination.qmp("human-monitor-command", command_line="info migrate")
                said = re.search(r"^libkuf: version .* (\d+) runs pending\r?$", text, re.MULTILINE)
                if kuf and not (said and int(said.group(1))):
                    raise Failed(f"info migrate does not report pending runs: {text}")
                if not re.search(r"^postcopy blocktime: \d+", text, re.MULTILINE) and kuf:
                    raise Failed(f"info migrate has no block time: {text}")
            finally:
                source.process.send_signal(signal.SIGCONT)
            migration.end()
            still = destination.qmp("query-migrate").get("postcopy-blocktime", 0)
            if kuf and still < 2000:
                raise Failed(f"all vCPUs were blocked for seconds, but {still} ms were counted")

    def source_killed(self, kuf):
        """The source dies, and pages that only it had are lost. The guest must wait for them and get no other bytes."""
        case = Case(bandwidth=32)
        with Migration(case, kuf, self.directory) as migration:
            migration.begin()
            destination = migration.destination
            migration.settle()
            if destination.status() != "postcopy-active":
                raise Failed("the migration ended before the source could be killed")
            migration.source.kill()
            destination.wait_status(["postcopy-paused"], 60)
            # Long enough for each thread of the guest to touch an absent page.
            time.sleep(5)
            if destination.process.poll() is not None:
                raise Failed(f"the destination ended: {destination.log()}")
            if destination.status() != "postcopy-paused":
                raise Failed(f"the destination is {destination.status()}")
            wrong = [text for _, text in destination.console if re.search("BAD|FAIL|segfault|panic|BUG", text)]
            if wrong:
                raise Failed(f"the guest read wrong bytes: {wrong}")
            before = destination.beats()
            time.sleep(2)
            if destination.beats() != before:
                raise Failed("the guest continued although most of its memory is lost")
            if kuf and not destination.qmp("query-migrate")["libkuf"]["pending"]:
                raise Failed("no thread waits for a page")

    def refused(self, why, arguments=(), libdir=LIBDIR):
        """The destination must refuse, and give the reason, before any data is sent."""
        case = Case()
        with Vm("refused", QEMU, case.arguments() + list(arguments) + ["-incoming", "defer"], self.directory,
                {"LD_LIBRARY_PATH": libdir}) as vm:
            try:
                vm.capabilities(x_libkuf=True)
                vm.capabilities(postcopy_ram=True)
            except Failed as error:
                # The destination writes the reason to its log.
                said = f"{error} | {vm.log()}"
                if not re.search(why, said):
                    raise Failed(f"refused, but not because of '{why}': {said}") from None
                if any(state["state"] for state in vm.qmp("query-migrate-capabilities")
                       if state["capability"] == "postcopy-ram"):
                    raise Failed("refused, but enabled") from None
                return
        raise Failed("not refused")

    def library_too_old(self):
        libdir = tempfile.mkdtemp(dir=self.directory)
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", f"{libdir}/libkuf.so.0"], check=True,
                       input=b"unsigned int kuf_version(void) { return 0x000007; }")
        self.refused(r"too old: this is version 0\.0, and 0\.\d+ is needed", libdir=libdir)

    def private_file(self):
        path = os.path.join(self.directory, "ram")
        self.refused("private mapping of a file", [
            "-object", f"memory-backend-file,id=ram,size=640M,mem-path={path},share=off",
            "-machine", "memory-backend=ram"])

    def vhost_user(self):
        with VhostUser(self.directory) as back_end:
            self.refused("vhost-user back end has a mapping of its own", [
                "-object", "memory-backend-memfd,id=ram,size=640M,share=on", "-machine", "memory-backend=ram",
                "-chardev", f"socket,id=vu,path={back_end.path}", "-device", "vhost-user-rng-pci,chardev=vu"])

    def snapshot(self):
        """Saves a guest under load in both formats, and keeps the images and the result of the guest's check."""
        self.image = os.path.join(self.directory, "image.lazy")
        self.stream = os.path.join(self.directory, "image.stream")
        self.snapshot_case = Case(memory=1536, mib=1200, step=4)
        with self.snapshot_case.start("saved", self.directory) as vm:
            vm.line("READY", 180)
            self.saved, _ = vm.check()
            vm.qmp("stop")
            vm.capabilities(x_libkuf=True)
            vm.qmp("cont")
            vm.qmp("x-snapshot-lazy-save", filename=self.image, timeout=120)
            vm.qmp("stop")
            vm.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
            vm.qmp("migrate", uri=f"exec:cat >{self.stream}")
            vm.wait_status(["completed"], 120)

    def start(self, name, uri, lazy):
        """Starts the saved guest. Returns the seconds until it runs, until its first output, and for reading all memory."""
        if not os.path.exists(getattr(self, "stream", "")):
            raise Failed("no snapshot")
        with self.snapshot_case.start(name, self.directory, incoming=True) as vm:
            vm.capabilities(x_libkuf=lazy)
            begin = time.time()
            vm.qmp("migrate-incoming", uri=uri, timeout=120)
            if not lazy:
                # The stream of a stopped machine.
                vm.wait_status(["completed"], 120)
                vm.qmp("cont")
            resumed = vm.wait_event("RESUME", 120)
            spoke, _ = vm.line("BEAT", 60)
            during, took = vm.check()
            vm.wait_status(["completed"], 120)
            after, _ = vm.check()
            if not self.saved["still"] == during["still"] == after["still"]:
                raise Failed("the memory differs from the snapshot")
            if int(after["writes"]) < int(self.saved["writes"]):
                raise Failed("the guest is older than its snapshot")
            info = vm.qmp("query-migrate").get("libkuf")
            if lazy and not (info and info["requested"] and info["pushed"]):
                raise Failed(f"memory was not filled both on demand and by populate: {info}")
            return {"run": resumed - begin, "spoke": spoke - begin, "check": took, "info": info}

    def snapshots(self):
        if self.run("snapshot-save", self.snapshot) is None and not os.path.exists(getattr(self, "image", "")):
            return
        lazy = self.run("snapshot-start/libkuf", lambda: self.start("lazy", f"lazy:{self.image}", True))
        plain = self.run("snapshot-start/stock", lambda: self.start("plain", f"exec:cat {self.stream}", False))
        if lazy and plain:
            self.starts.append(("snapshot-start", lazy, plain))
        self.run("snapshot-cut-short", self.cut_short)
        self.run("snapshot-of-another", self.of_another)

    def cut_short(self):
        """The image loses its second half while the guest runs: no other bytes may replace the lost pages."""
        image = os.path.join(self.directory, "short.lazy")
        subprocess.run(["cp", "--sparse=always", self.image, image], check=True)
        with self.snapshot_case.start("short", self.directory, incoming=True) as vm:
            vm.capabilities(x_libkuf=True)
            vm.qmp("migrate-incoming", uri=f"lazy:{image}", timeout=120)
            os.truncate(image, os.path.getsize(image) // 2)
            deadline = time.monotonic() + 60
            try:
                while vm.qmp("query-status")["status"] != "internal-error":
                    if time.monotonic() > deadline:
                        raise Failed("the guest continued without its memory")
                    time.sleep(0.05)
                if not re.search("libkuf: |cannot read guest memory", vm.log()):
                    raise Failed(f"the guest stopped without a reason in the log: {vm.log()}")
            except Failed:
                # TCG cannot inject a machine check into the guest: a touch of a lost page ends QEMU.
                if vm.process.poll() != -signal.SIGBUS:
                    raise
            wrong = [text for _, text in vm.console if re.search("BAD|FAIL|segfault|panic|BUG", text)]
            if wrong:
                raise Failed(f"the guest has seen what is not its own: {wrong}")

    def of_another(self):
        """Images of another machine, and files that are no images, are refused."""
        nothing = os.path.join(self.directory, "nothing.lazy")
        with open(nothing, "wb") as file:
            file.write(bytes(1 << 16))
        for image, case, why in ((nothing, self.snapshot_case, "not a snapshot to start from lazily"),
                                 (self.image, Case(memory=1024), "another size in the snapshot")):
            with case.start("another", self.directory, incoming=True) as vm:
                vm.capabilities(x_libkuf=True)
                try:
                    vm.qmp("migrate-incoming", uri=f"lazy:{image}")
                except (Failed, OSError):
                    pass
                if vm.process.wait(20) != 1 or not re.search(why, vm.log()):
                    raise Failed(f"not refused because of '{why}': {vm.log()}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("pattern", nargs="?", default="")
    parser.add_argument("--table")
    options = parser.parse_args()
    directory = tempfile.mkdtemp(prefix="kuf-qemu-")
    suite = Suite(directory, options.pattern)
    try:
        suite.run("library-missing", suite.refused, "cannot load libkuf", (), directory)
        suite.run("library-too-old", suite.library_too_old)
        suite.run("private-file-refused", suite.private_file)
        suite.run("vhost-user-refused", suite.vhost_user)
        for name in MIGRATION_TESTS:
            suite.run(f"migration-test/{name}", suite.migration_test, name)
        suite.run("migration-test-on-kvm", suite.on_kvm)
        suite.both("postcopy", Case)
        suite.both("postcopy-preempt", lambda: Case(preempt=True))
        suite.both("postcopy-cut-twice", lambda: Case(cuts=2, bandwidth=64))
        suite.both("postcopy-preempt-cut-twice", lambda: Case(cuts=2, bandwidth=64, preempt=True))
        suite.both("postcopy-shared", lambda: Case(backend="memory-backend-memfd,share=on"))
        suite.both("postcopy-hugetlb", lambda: Case(backend="memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M"))
        suite.both("postcopy-half-precopied", lambda: Case(precopy=0.5, limit=128, smp=1))
        suite.both("postcopy-hugetlb-half-precopied", lambda: Case(
            precopy=0.5, limit=128, backend="memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M"))
        suite.both("postcopy-2g", lambda: Case(memory=2304, mib=1900, step=8))
        suite.run("source-silent/libkuf", suite.source_silent, True)
        suite.run("source-silent/stock", suite.source_silent, False)
        suite.run("source-killed/libkuf", suite.source_killed, True)
        suite.run("source-killed/stock", suite.source_killed, False)
        suite.snapshots()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    table = suite.tables()
    print(table, end="", flush=True)
    if options.table and table:
        with open(options.table, "w") as file:
            file.write(table)
    print(f"{suite.passed} passed, {suite.failed} failed" + (f", {suite.skipped} skipped" if suite.skipped else ""))
    return suite.failed != 0


if __name__ == "__main__":
    sys.exit(main())
