# SPDX-License-Identifier: MIT OR Apache-2.0
"""A QEMU process with its monitor and console, and a link between two processes that can be cut."""

import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time


class Failed(Exception):
    """A test failed; the text is the reason."""


class Qmp:
    def __init__(self, path, process):
        self.events = []
        self.buffer = b""
        self.process = process
        self.lock = threading.Lock()
        deadline = time.monotonic() + 20
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(path)
                break
            except OSError:
                self.socket.close()
                if process.poll() is not None:
                    raise Failed("QEMU ended at once") from None
                if time.monotonic() > deadline:
                    raise Failed("QEMU does not answer") from None
                time.sleep(0.02)
        self._message(20)
        self("qmp_capabilities")

    def ended(self):
        try:
            return self.process.wait(10)
        except subprocess.TimeoutExpired:
            return "still running"

    def _message(self, timeout):
        deadline = time.monotonic() + timeout
        while b"\n" not in self.buffer:
            left = max(deadline - time.monotonic(), 0)
            if not select.select([self.socket], [], [], left)[0]:
                return None
            try:
                data = self.socket.recv(65536)
            except ConnectionError:
                data = b""
            if not data:
                raise Failed(f"the monitor was closed (QEMU: {self.ended()})")
            self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        message = json.loads(line)
        if "event" in message:
            self.events.append(message)
        return message

    def __call__(self, command, timeout=60, **arguments):
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        with self.lock:
            request = {"execute": command, "arguments": arguments}
            try:
                self.socket.sendall(json.dumps(request).encode() + b"\n")
            except OSError:
                raise Failed(f"the monitor is closed (QEMU: {self.ended()})") from None
            while True:
                message = self._message(timeout)
                if message is None:
                    raise Failed(f"{command} got no answer")
                if "error" in message:
                    raise Failed(f"{command}: {message['error']['desc']}")
                if "return" in message:
                    return message["return"]

    def drain(self):
        with self.lock:
            while self._message(0):
                pass
        return self.events


class Vm:
    """A QEMU process with no default devices: `arguments` describe the whole machine."""

    def __init__(self, name, binary, arguments, directory, env=None):
        self.name = name
        self.directory = tempfile.mkdtemp(prefix=name + "-", dir=directory)
        self.console = []
        self.started = time.time()
        self.log_path = os.path.join(self.directory, "stderr")
        command = [binary, "-nodefaults", "-display", "none", "-no-reboot", "-no-user-config",
                   "-qmp", f"unix:{self.directory}/qmp,server=on,wait=off",
                   "-chardev", f"socket,id=tty,path={self.directory}/tty,server=on,wait=off",
                   "-serial", "chardev:tty"] + arguments
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env=dict(os.environ, **(env or {})))
        try:
            self.qmp = Qmp(f"{self.directory}/qmp", self.process)
        except Failed as why:
            self.kill()
            raise Failed(f"{self.name}: {why}: {self.log()}") from None
        self.tty = socket.socket(socket.AF_UNIX)
        self.tty.connect(f"{self.directory}/tty")
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        data = b""
        while True:
            try:
                got = self.tty.recv(65536)
            except OSError:
                return
            if not got:
                return
            data += got
            *lines, data = data.split(b"\n")
            for line in lines:
                self.console.append((time.time(), line.decode(errors="replace").strip()))

    def log(self):
        with open(self.log_path, errors="replace") as log:
            return " | ".join(log.read().strip().splitlines()[-4:])

    def line(self, pattern, timeout=60, after=0, count=1):
        """Waits for the `count`th console line since `after` that matches. Returns its time and the match."""
        deadline = time.monotonic() + timeout
        while True:
            found = ((when, re.search(pattern, text)) for when, text in self.console[after:])
            matches = [one for one in found if one[1]]
            if len(matches) >= count:
                return matches[count - 1]
            if time.monotonic() > deadline:
                tail = [text for _, text in self.console[-3:]]
                raise Failed(f"{self.name}: no '{pattern}' on the console in {timeout} s, which ends with {tail}")
            if self.process.poll() is not None:
                raise Failed(f"{self.name} has ended: {self.log()}")
            time.sleep(0.01)

    def check(self, timeout=180):
        """Makes the guest check all its memory. Returns its report and the seconds it took."""
        after = len(self.console)
        begin = time.time()
        self.tty.sendall(b"check\n")
        when, match = self.line(r"CHECK (.*)$", timeout, after)
        found = dict(word.split("=") for word in match.group(1).split())
        if found["bad"] != "0" or found["early"] != "0" or found["lost"] != "0":
            bad = [text for _, text in self.console[after:] if text.startswith("BAD")]
            raise Failed(f"{self.name}: guest memory has changed: {match.group(1)} {bad}")
        return found, when - begin

    def beats(self):
        """Returns the number of writes that the guest's load has reported."""
        for _, text in reversed(self.console):
            match = re.search(r"BEAT \d+ writes=(\d+)", text)
            if match:
                return int(match.group(1))
        return 0

    def status(self):
        return self.qmp("query-migrate").get("status", "none")

    def wait_status(self, wanted, timeout=120, never=("failed",)):
        deadline = time.monotonic() + timeout
        while True:
            status = self.status()
            if status in wanted:
                return status
            if status in never:
                raise Failed(f"{self.name}: migration is '{status}', not {wanted}: {self.log()}")
            if time.monotonic() > deadline:
                raise Failed(f"{self.name}: migration is still '{status}' after {timeout} s, not {wanted}")
            time.sleep(0.01)

    def wait_event(self, name, timeout=60):
        deadline = time.monotonic() + timeout
        while True:
            for event in self.qmp.drain():
                if event["event"] == name:
                    stamp = event["timestamp"]
                    return stamp["seconds"] + stamp["microseconds"] / 1e6
            if time.monotonic() > deadline:
                raise Failed(f"{self.name}: no {name} in {timeout} s")
            time.sleep(0.005)

    def capabilities(self, **states):
        self.qmp("migrate-set-capabilities", capabilities=[
            {"capability": name.replace("_", "-"), "state": state} for name, state in states.items()])

    def kill(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


class Link:
    """A TCP relay between two QEMU processes that can be cut."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.target = None
        self.sockets = []
        self.lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            with self.lock:
                self.sockets += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._relay, args=(one, other), daemon=True).start()

    @staticmethod
    def _relay(one, other):
        buffer = bytearray(1 << 20)
        try:
            while True:
                n = one.recv_into(buffer)
                if not n:
                    break
                other.sendall(memoryview(buffer)[:n])
        except OSError:
            pass
        for end in (one, other):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def cut(self):
        with self.lock:
            for end in self.sockets:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()
            self.sockets = []

    def close(self):
        self.listener.close()
        self.cut()
