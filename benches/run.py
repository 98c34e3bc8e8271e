#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Runs pairs of sides of the bench, interleaved, and compares them with the goals.

    run.py [NAME...]      rows by name, by the beginning of a name or by the number of a goal; all by default
      --list              prints the names of the rows
      --check             runs each row once, tiny and verified byte by byte, to test the bench itself
      --calls             counts the system calls per page of both sides by strace (with kuf_open, without kuf_close)
      --publish           writes the last results into docs/performance.md, and the plots next to it
      --pairs N  --out DIR

Environment: QUICK=1 takes two minutes instead of many; BENCH=name,... selects rows like NAME. The exit status is 1 when
a side failed; a missed goal is no failure.
"""
import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
DOCUMENT = ROOT / "docs" / "performance.md"
MARKS = ("<!-- bench: begin -->", "<!-- bench: end -->")
EXIT_SKIP = 77
QUICK_SECONDS = 105

FULL, QUICK, CHECK = range(3)


class Failed(Exception):
    pass


class Skipped(Exception):
    pass


# ---- Values ---------------------------------------------------------------------------------------------------------


def us(value):
    return f"{value:.1f} µs" if value < 1000 else f"{value / 1000:.2f} ms"


def milliseconds(value):
    return f"{value:.2f} ms"


def nanoseconds(value):
    return f"{value:.0f} ns"


def seconds(value):
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def rate(value):
    return f"{value / 1000:.1f} k/s"


def speed(value):
    return f"{value / 1e9:.2f} GB/s"


def percent(value):
    return f"{value * 100:.2f} %"


def mebibytes(value):
    return f"{value / 2 ** 20:.2f} MiB"


def count(value):
    return f"{value:.0f}"


def ratio(value):
    return f"{value:.3f}" if abs(value) < 0.1 else f"{value:.2f}"


class Measure:
    """A number of each side, and the value compared with the goal: by default the ratio of the two numbers."""

    def __init__(self, what, key, show, goal=None, value=None, form=ratio, of=None):
        self.what, self.show, self.form = what, show, form
        self.of = of or (lambda side: side.get(key))
        self.value = value or (lambda a, b: self.of(b) / self.of(a))
        # ("<=" or ">=", limit), or None if the row has no goal.
        self.goal = goal

    def goal_text(self):
        if not self.goal:
            return ""
        return ("≤ " if self.goal[0] == "<=" else "≥ ") + self.form(self.goal[1])

    def met(self, value):
        if not self.goal:
            return None
        return value <= self.goal[1] if self.goal[0] == "<=" else value >= self.goal[1]


class Row:
    def __init__(self, name, goal, work, a, b, measures, prepare=None, plots=(), labels=("baseline", "libkuf")):
        self.name, self.goal, self.work, self.measures = name, goal, work, measures
        self.a, self.b, self.prepare, self.plots, self.labels = a, b, prepare, plots, labels


# ---- The rows -------------------------------------------------------------------------------------------------------


def rows(scale, images, scratch):
    """Returns the table of goals. Sizes are (full, quick, check)."""
    image, zeroes, scattered, holes = images

    def by(*sizes):
        return sizes[scale]

    whole = by("1G", "128M", "4M")
    verify = [] if scale != CHECK else ["verify=full"]

    def side(program, name, *arguments, of=image):
        return [program, name, f"image={of}", *verify, *arguments]

    latency = [f"pages={by('32K', '4K', 200)}"]
    p50, p99 = "p50 of a touch", "p99 of a touch"
    # "No worse" for a tail that varies by more than 5 % from run to run.
    no_worse = ("<=", 1.05)
    result = []

    def latency_row(name, work, pin, kuf, goal_p50, goal_p99):
        result.append(Row(
            name, 1, work, side("faults", "poll", f"pin={pin}", *latency),
            side("faults", "kuf", f"pin={pin}", *latency, *kuf),
            [Measure(p50, "p50_us", us, goal_p50), Measure(p99, "p99_us", us, goal_p99),
             Measure("service CPU a page", "service_cpu_us_per_page", us)],
            plots=("latency",), labels=("poll + read + copy", "libkuf")))

    latency_row("latency-spin", "one toucher, service on the second CPU, spinning", "split", ["spin=100"],
                ("<=", 0.35), no_worse)
    result.append(Row(
        "latency-spin-limit", 1, "limit: a loop that only spins on read(2), on the second CPU",
        side("faults", "poll", "pin=split", *latency), side("faults", "spin", "pin=split", *latency),
        [Measure(p50, "p50_us", us), Measure(p99, "p99_us", us),
         Measure("service CPU a page", "service_cpu_us_per_page", us)],
        plots=("latency",), labels=("poll + read + copy", "spinning on read")))
    latency_row("latency", "one toucher, service on the second CPU", "split", [], ("<=", 1.05), no_worse)
    latency_row("latency-unpinned", "one toucher, placed by the kernel", "none", [], None, None)
    latency_row("latency-one-cpu", "one toucher, service on the same CPU", "same", [], None, None)

    for touchers in (8, 64):
        sizes = [f"touchers={touchers}", f"pages={by('256K', '16K', 256)}"]
        result.append(Row(
            f"touchers-{touchers}", 2, f"{touchers} touchers, random pages", side("faults", "drain", *sizes),
            side("faults", "kuf", *sizes),
            [Measure("pages/s", "pages_per_second", rate, (">=", 1.5)),
             Measure("service CPU a page", "service_cpu_us_per_page", us, ("<=", 0.7)),
             Measure(p99, "p99_us", us)],
            plots=("latency", "pages"), labels=("drain, one message a read", "libkuf")))

        result.append(Row(
            f"uffds-{touchers}", "", f"{touchers} touchers, random pages: one userfaultfd or four",
            side("faults", "kuf", *sizes, "uffds=1"), side("faults", "kuf", *sizes, "uffds=4"),
            [Measure("pages/s", "pages_per_second", rate), Measure("service CPU a page", "service_cpu_us_per_page", us),
             Measure(p99, "p99_us", us)],
            labels=("one", "four")))

    runs = ("UFFDIO_COPY in 2 MiB runs", "libkuf")
    copy = side("limits", "copy", f"size={whole}")
    for name, work, extra in (
            ("sequential", "sequential touch, default options", []),
            ("sequential-2M", "sequential touch, demand_run of 2 MiB, callback resolves from the mapped image",
             ["demand_run=2M", "fill=resolve"])):
        result.append(Row(
            name, 3, work, copy, side("faults", "kuf", f"size={whole}", "order=sequential", *extra),
            [Measure("bytes/s", "bytes_per_second", speed, (">=", 0.8)),
             Measure("faults / pages", None, percent, ("<=", 0.01), of=lambda s: s["faults"] / s["pages"],
                     value=lambda a, b: b["faults"] / b["pages"], form=percent)],
            plots=("speed",), labels=runs))

    for name, work, extra in (
            ("populate", "populate from the page cache, default options", []),
            ("populate-2M", "the same, populate_run of 2 MiB, callback resolves from the mapped image",
             ["populate_run=2M", "fill=resolve"])):
        result.append(Row(
            name, 4, work, copy, side("populate", "kuf", f"size={whole}", *extra),
            [Measure("bytes/s", "bytes_per_second", speed, (">=", 0.95))], plots=("speed",), labels=runs))
    paced = [f"size={whole}", f"touches={by(2000, 800, 50)}", f"interval_us={by(200, 100, 100)}",
             f"window={by('64M', '8M', '1M')}"]
    result.append(Row(
        "populate-demand", 4, "demand faults while populate runs", side("populate", "demand", "background=0", *paced),
        side("populate", "demand", "background=1", *paced),
        [Measure(p99, "p99_us", us, ("<=", 2)), Measure(p50, "p50_us", us)],
        plots=("latency",), labels=("idle service", "with populate")))

    result.append(Row(
        "shared", 5, "shared memory filled in place by populate", side("limits", "place", f"size={whole}"),
        side("shared", "populate", f"size={whole}"),
        [Measure("bytes/s", "bytes_per_second", speed, (">=", 0.9))],
        plots=("speed",), labels=("memcpy + UFFDIO_CONTINUE in 2 MiB runs", "libkuf")))
    result.append(Row(
        "shared-open", 5, "shared memory that holds its bytes, installed in 2 MiB runs",
        side("limits", "continue", f"size={whole}"), side("shared", "resolve", f"size={whole}"),
        [Measure("bytes/s", "bytes_per_second", speed, (">=", 0.9))],
        plots=("open",), labels=("UFFDIO_CONTINUE in 2 MiB runs", "libkuf")))

    reads = f"reads={by('4M', '512K', 1000)}"
    populated = ("populate", "kuf", f"size={whole}", "want_huge=1", reads)
    for name, work, baseline, what in (
            ("huge", "huge pages wanted: populate, then random reads", populated, "populate, 4 KiB pages"),
            ("huge-copy", "the same, against no service at all",
             ("populate", "copy", f"size={whole}", "want_huge=1", reads), "UFFDIO_COPY, 4 KiB pages")):
        result.append(Row(
            name, 6, work, side(*baseline), side(*populated, "huge=1"),
            [Measure("bytes/s", "bytes_per_second", speed, (">=", 1) if name == "huge" else None),
             Measure("on huge pages", "huge_part", percent, (">=", 0.95), value=lambda a, b: b["huge_part"],
                     form=percent),
             Measure("a random read", "read_ns", nanoseconds, ("<=", 0.95))],
            plots=("speed",), labels=(what, "libkuf")))

    def zero_row(name, work, cluster, a, b, of, of_b, labels=("without detection", "with detection")):
        form = [f"size={whole}", "zero=50", f"cluster={cluster}"]
        result.append(Row(
            name, 7, f"populate of an image that is {work}", side("populate", "kuf", *form, *a, of=of),
            side("populate", "kuf", *form, *b, of=of_b),
            [Measure("zero page / copied page", None, us, ("<=", 0.1), of=lambda s: s["us_per_page"],
                     value=lambda a, b: (b["us_per_page"] / a["us_per_page"] - (1 - b["zero_part"])) / b["zero_part"]),
             Measure("memory", "resident_part", percent, ("<=", 0.01), form=percent,
                     value=lambda a, b: b["resident_part"] - (1 - b["zero_part"]))],
            plots=("speed",), labels=labels))

    clusters, chance, detect = "half zero, in clusters of 256 KiB", "half zero, each page by chance", "detect=1"
    file = "source=file"
    zero_row("zero", clusters, 64, [], [detect], zeroes, zeroes)
    zero_row("zero-scattered", chance, 1, [], [detect], scattered, scattered)
    zero_row("zero-src", clusters + "; the callback points to its mapping", 64, ["fill=src"], ["fill=src", detect],
             zeroes, zeroes)
    zero_row("zero-file", clusters + "; a file as a source", 64, [file], [file, detect], zeroes, zeroes)
    zero_row("zero-holes", clusters + ", which are holes of a file as a source", 64, [file], [file], zeroes, holes,
             ("no holes", "holes"))
    result.append(Row(
        "zero-limit", 7, "limit: each byte of the image of zero is only read once, against populate of it",
        side("populate", "kuf", f"size={whole}", "zero=50", "cluster=64", of=zeroes),
        side("limits", "scan", f"size={whole}", "zero=50", "cluster=64", of=zeroes),
        [Measure("a page read / copied page", "us_per_page", us)], labels=("populate", "reading")))

    for latency_us, inflight, pages in ((100, 8, by(40000, 16000, 200)), (1000, 8, by(8000, 1200, 100)),
                                        (10000, 64, by(6400, 1280, 64))):
        for how in ("workers", "deferred"):
            form = [f"latency_us={latency_us}", f"inflight={inflight}", f"pages={pages}"]
            text = us(latency_us) if latency_us < 1000 else f"{latency_us // 1000} ms"
            result.append(Row(
                f"slow-{how}-{latency_us}us", 8, f"source of {text}, {inflight} at a time; 64 touchers; {how}",
                side("slow", "ideal", *form), side("slow", how, *form),
                [Measure("part of ideal", "pages_per_second", rate, (">=", 0.9)),
                 Measure("of a source with exact timers", "pages_per_second", rate,
                         value=lambda a, b: b["nominal_seconds"] / b["seconds"])],
                plots=("slow",), labels=("the source alone", "libkuf")))

    record = f"file={scratch / 'working-set'}"
    result.append(Row(
        "working-set", 9, "10 % of the memory, scattered: replayed", side("working_set", "demand", f"size={whole}"),
        side("working_set", "replay", f"size={whole}", record),
        [Measure("demand faults", "faults", count, ("<=", 0.03)),
         Measure("time to done", "seconds", seconds, ("<=", 0.1))],
        prepare=side("working_set", "record", f"size={whole}", record), labels=("demand only", "replayed")))

    # With one CPU for both, no wake-up crosses CPUs, so that the library's own time has the largest share.
    touched = ["pin=same", f"pages={by('64K', '8K', 200)}"]
    small = ["size=" + whole, *touched]
    # Closing would poison a terabyte, page by page.
    sparse = ["size=1T", "close=0", *touched]
    cost = [Measure(p50, "p50_us", us, ("<=", 1.05)),
            Measure("service CPU a page", "service_cpu_us_per_page", us, ("<=", 1.05))]
    result.append(Row(
        "sparse", 10, "1 TiB sparse slot, the same touches in its middle", side("faults", "kuf", *small),
        side("faults", "kuf", "window=" + whole, *sparse),
        [*cost,
         Measure("open + add", "open_ms", milliseconds, ("<=", 50), value=lambda a, b: b["open_ms"],
                 form=milliseconds),
         Measure("bookkeeping besides a small slot's", "bookkeeping_bytes", mebibytes, ("<=", 2 ** 20), form=mebibytes,
                 value=lambda a, b: b["bookkeeping_bytes"] - a["bookkeeping_bytes"])],
        labels=("small slot", "1 TiB slot")))
    result.append(Row(
        "sparse-scattered", 10, "1 TiB sparse slot, touched all over", side("faults", "kuf", *small),
        side("faults", "kuf", *sparse),
        [Measure(p50, "p50_us", us), Measure("service CPU a page", "service_cpu_us_per_page", us),
         Measure("bookkeeping / 2 bits a page", "bookkeeping_bytes", mebibytes, ("<=", 1), form=percent,
                 value=lambda a, b: (b["bookkeeping_bytes"] - a["bookkeeping_bytes"]) / (b["slot_pages"] / 4))],
        labels=("small slot", "1 TiB slot")))
    result.append(Row(
        "sparse-scattered-poll", 10, "the same without the library: what the kernel's page tables cost",
        side("faults", "poll", *small), side("faults", "poll", "size=1T", *touched),
        [Measure(p50, "p50_us", us), Measure("service CPU a page", "service_cpu_us_per_page", us)],
        labels=("small slot", "1 TiB slot")))

    dose = 16
    result.append(Row(
        "stats-dose", "", f"what statistics cost: done {dose} times more, divided by {dose}",
        side("faults", "kuf", *touched), side("faults", "kuf", f"dose={dose}", *touched),
        [Measure("of a fault", "p50_us", us, ("<=", 0.01), form=percent,
                 value=lambda a, b: (b["p50_us"] - a["p50_us"]) / dose / a["p50_us"])],
        labels=("as it is", f"{dose} times more")))
    result.append(Row(
        "stats-asked", "", "kuf_stats asked for 1000 times a second", side("faults", "kuf", *touched),
        side("faults", "kuf", "stats_hz=1000", *touched),
        [Measure(p50, "p50_us", us, ("<=", 1.02))], labels=("not asked", "asked")))

    for waiting in (16, 64):
        result.append(Row(
            f"waiting-{waiting}", "", f"UFFDIO_COPY page by page: no thread or {waiting} threads wait for other pages",
            side("limits", "copy", f"size={by('256M', '64M', '2M')}", "run=4K"),
            side("limits", "copy", f"size={by('256M', '64M', '2M')}", "run=4K", f"waiting={waiting}"),
            [Measure("CPU a page", "cpu_us_per_page", lambda v: f"{v:.3f} µs")], labels=("none", f"{waiting} threads")))
    for name, work in (("memcpy", "memcpy into resident memory"), ("copy", "UFFDIO_COPY"),
                       ("zeropage", "UFFDIO_ZEROPAGE"), ("continue", "UFFDIO_CONTINUE"),
                       ("place", "memcpy into a shared file + UFFDIO_CONTINUE"),
                       ("eager", "read(2) of the whole image into fresh memory")):
        result.append(Row(f"limit-{name}", "", f"limit: {work}, 2 MiB runs, no faults",
                          side("limits", name, f"size={whole}"), None,
                          [Measure("bytes/s", "bytes_per_second", speed),
                           Measure("a page", "us_per_page", lambda v: f"{v:.3f} µs")]))
    return result


def chosen(every, names):
    def named(row, name):
        return row.name == name or row.name.startswith(name + "-") or str(row.goal) == name

    for name in names:
        if not any(named(row, name) for row in every):
            raise Failed(f"no row {name}; there are: " + " ".join(row.name for row in every))
    return [row for row in every if not names or any(named(row, name) for name in names)]


# ---- Running --------------------------------------------------------------------------------------------------------


def environment():
    paths = [str(BUILD / "stage" / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    return dict(os.environ, LD_LIBRARY_PATH=":".join(filter(None, paths)))


def run(command):
    """Runs one side once and returns its result."""
    program = BUILD / "bench" / command[0]
    if not program.exists():
        raise Failed(f"{program} is not built: make bench-programs")
    try:
        done = subprocess.run([str(program), *command[1:]], env=environment(), stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise Failed("did not end within 300 s: " + " ".join(command))
    if done.returncode not in (0, EXIT_SKIP):
        raise Failed(f"{' '.join(command)}: ended with {done.returncode}: {done.stderr.strip()}")
    try:
        result = json.loads(done.stdout)
    except ValueError:
        raise Failed(f"{' '.join(command)}: not a line of JSON: {done.stdout[:200]}")
    if done.returncode == EXIT_SKIP:
        raise Skipped(result["skip"])
    return result


def busy_ticks():
    """Returns the ticks since boot in which the machine's CPUs were not idle."""
    fields = [int(field) for field in open("/proc/stat").readline().split()[1:]]
    return sum(fields[:8]) - fields[3] - fields[4]


class Noise:
    """Measures the CPU time that other processes of the machine use."""

    def __init__(self):
        self.began, self.busy, self.ours = time.monotonic(), busy_ticks(), self.children()

    @staticmethod
    def children():
        used = os.times()
        return used.children_user + used.children_system + used.user + used.system

    def others(self):
        """Returns the part of all CPU time that other processes used since this object was made."""
        busy = (busy_ticks() - self.busy) / os.sysconf("SC_CLK_TCK") - (self.children() - self.ours)
        return max(0.0, busy / ((time.monotonic() - self.began) * os.cpu_count()))


IMAGES = (("image", []), ("image-zero", ["zero=50", "cluster=64"]), ("image-zero-scattered", ["zero=50", "cluster=1"]),
          ("image-zero-holes", ["zero=50", "cluster=64", "sparse=1"]))
IMAGE_SIZE = {FULL: 2 ** 30, QUICK: 2 ** 27, CHECK: 2 ** 22}


def image_paths(scale, out):
    return [out / f"{name}-{IMAGE_SIZE[scale] >> 20}M" for name, _ in IMAGES]


def make_images(scale, out, picked):
    """Makes the images that the rows need, or reads them into the page cache."""
    size = IMAGE_SIZE[scale]
    needed = {word for row in picked for word in [*row.a, *(row.b or [])]}
    for path, (_, form) in zip(image_paths(scale, out), IMAGES):
        if f"image={path}" not in needed:
            continue
        # An image older than its maker may have another pattern.
        maker = BUILD / "bench" / "image"
        if path.exists() and path.stat().st_size == size and maker.exists() and \
                path.stat().st_mtime > maker.stat().st_mtime:
            with open(path, "rb", buffering=0) as file:
                while file.read(2 ** 24):
                    pass
            continue
        run(["image", "make", f"path={path}", f"size={size}", *form])


def measure(row, pairs, seconds_for_it):
    """Runs the pairs of a row. Returns the results {"a": [...], "b": [...]}, and "skip" if a side cannot run."""
    noise, began = Noise(), time.monotonic()
    result = {"name": row.name, "goal": row.goal, "work": row.work, "labels": row.labels, "a": [], "b": [],
              "command_a": " ".join(row.a), "command_b": " ".join(row.b or []), "skip": None}
    b = row.b
    try:
        run(row.a)
        try:
            if row.prepare:
                run(row.prepare)
            if b:
                run(b)
        except Skipped as reason:
            result["skip"], b = str(reason), None
        # If b cannot run, two runs of a are enough: no ratio is computed.
        for pair in range(pairs if b or not row.b else min(pairs, 2)):
            spent = time.monotonic() - began
            if seconds_for_it and pair >= 2 and spent * (pair + 2) / (pair + 1) > seconds_for_it:
                break
            result["a"].append(run(row.a))
            if b:
                result["b"].append(run(b))
    except Skipped as reason:
        result["skip"] = str(reason)
    result["others"] = noise.others()
    return result


def judge(row, result):
    """Returns a line of the table for each measure of the row."""
    lines = []
    for m in row.measures:
        line = {"what": m.what, "goal": m.goal_text(), "a": "", "b": "", "value": "", "spread": "", "met": None}
        for name in "ab":
            values = [v for v in map(m.of, result[name]) if v is not None]
            if values:
                line[name] = m.show(statistics.median(values))
                line[name + "_spread"] = f"{m.show(min(values))} – {m.show(max(values))}"
        if result["b"]:
            values = [m.value(a, b) for a, b in zip(result["a"], result["b"])]
            middle = statistics.median(values)
            line.update(value=m.form(middle), spread=f"{m.form(min(values))} – {m.form(max(values))}",
                        number=middle, values=values, met=m.met(middle))
        lines.append(line)
    return lines


def verdict(line, result):
    if result["skip"]:
        return "SKIP"
    return {None: "", True: "met", False: "MISSED"}[line["met"]]


# ---- The report -----------------------------------------------------------------------------------------------------


def machine():
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
    return {"kernel": platform.release(), "machine": platform.machine(), "cpus": os.cpu_count(),
            "cpus_allowed": len(os.sched_getaffinity(0)), "cpu": model, "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "load_average": os.getloadavg()}


def table(report):
    heads = ["row", "goal", "measure", "baseline", "libkuf", "ratio", "spread", "wanted", ""]
    cells, notes = [], []
    for result in report["rows"]:
        for n, line in enumerate(result["lines"]):
            cells.append([result["name"] if n == 0 else "", str(result["goal"]) if n == 0 else "", line["what"],
                          line["a"], line["b"], line["value"], line["spread"], line["goal"], verdict(line, result)])
        if result["skip"]:
            notes.append(f"SKIP {result['name']}: {result['skip']}")
        if result["b"] and len(result["a"]) < 5:
            notes.append(f"SHORT {result['name']}: only {len(result['a'])} pairs in the time available")
    noisy = [f"{r['name']} {r['others']:.0%}" for r in report["rows"] if r["others"] > 0.1]
    if noisy:
        notes.append("NOISY, part of the machine used by other processes: " + ", ".join(noisy))
    widths = [max(len(row[n]) for row in [heads, *cells]) for n in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [heads, *cells]]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines + notes)


def markdown(report):
    """Returns the table for docs/performance.md, which also names what each row compares."""
    host = report["machine"]
    text = [f"Measured {host['date'][:10]} on {host['cpu'] or host['machine']}, {host['cpus']} CPUs, "
            f"Linux {host['kernel']}, load average {host['load_average'][0]:.2f} at the start, "
            + ("an idle machine" if report["idle"] else "**a machine that was not idle**")
            + f", {report['pairs']} pairs" + (", QUICK=1 (small sizes)." if report["quick"] else "."), "",
            "| row | work | measure | against | libkuf | ratio (spread) | wanted | |",
            "|---|---|---|---|---|---|---|---|"]
    for result in report["rows"]:
        for n, line in enumerate(result["lines"]):
            value = f"{line['value']} ({line['spread']})" if line["value"] else ""
            against = f"{line['a']}<br>{result['labels'][0]}" if n == 0 and result["command_b"] else line["a"]
            text.append(" | ".join(["| " + (f"`{result['name']}`" if n == 0 else ""), result["work"] if n == 0 else "",
                                    line["what"], against, line["b"], value, line["goal"],
                                    f"**{verdict(line, result)}**" if line["met"] is False else verdict(line, result)])
                        + " |")
    skips = [f"- `{r['name']}` was left out: {r['skip']}." for r in report["rows"] if r["skip"]]
    return "\n".join(text + ([""] + skips if skips else []))


def publish(report, out, document):
    text = document.read_text()
    try:
        before, rest = text.split(MARKS[0])
        _, after = rest.split(MARKS[1])
    except ValueError:
        raise Failed(f"{document}: expected one line {MARKS[0]} and one line {MARKS[1]} after it")
    plots = []
    for name in sorted(report["plots"]):
        shutil.copy(out / name, document.parent / f"performance-{name}")
        plots.append(f"![{report['plots'][name]}](performance-{name})")
    body = "\n\n".join([markdown(report), *plots])
    document.write_text(f"{before}{MARKS[0]}\n{body}\n{MARKS[1]}{after}")


# ---- Plots ----------------------------------------------------------------------------------------------------------

# Without custom properties, which viewers other than browsers do not support.
COLOURS = (("text", "fill", "#1f2328", "#e6edf3"), (".back", "fill", "#ffffff", "#0d1117"),
           (".grid", "stroke", "#d0d7de", "#30363d"), (".axis", "stroke", "#1f2328", "#e6edf3"),
           (".a", "stroke", "#9a6700", "#d8a836"), (".fill-a", "fill", "#c99a2e", "#a47f25"),
           (".b", "stroke", "#0969da", "#58a6ff"), (".fill-b", "fill", "#4f93e6", "#3f7fd0"),
           (".mark", "stroke", "#cf222e", "#ff7b72"))
STYLE = """
text { font: 12px system-ui, "DejaVu Sans", sans-serif; }
.title { font-weight: 600; } .small { font-size: 11px; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .dash { stroke-dasharray: 6 3; }
.mark { stroke-width: 2; }
""" + "".join(f"{what} {{ {how}: {light}; }}\n" for what, how, light, _ in COLOURS) + \
    "@media (prefers-color-scheme: dark) {\n" + \
    "".join(f"  {what} {{ {how}: {dark}; }}\n" for what, how, _, dark in COLOURS) + "}\n"


class Svg:
    def __init__(self, width, height, title):
        self.width, self.height, self.title, self.parts = width, height, title, []

    def line(self, x1, y1, x2, y2, kind):
        self.parts.append(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')

    def rect(self, x, y, width, height, kind):
        self.parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" '
                          f'height="{height:.1f}"/>')

    def text(self, x, y, text, anchor="start", kind="", turn=False):
        rotate = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{rotate}>'
                          f'{escape(text)}</text>')

    def path(self, points, kind):
        at = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path class="{kind}" d="M{at}"/>')

    def write(self, path):
        body = "\n".join(self.parts)
        path.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                        f'width="{self.width}" height="{self.height}" role="img">\n'
                        f'<title>{escape(self.title)}</title>\n'
                        f'<style>{STYLE}</style>\n<rect class="back" width="100%" height="100%"/>\n{body}\n</svg>\n',
                        encoding="utf-8")


def merged(runs):
    """Merges the histograms of all runs of a side: [(upper end in ns, touches)], in order."""
    total = {}
    for one in runs:
        for end, touches in one.get("histogram", []):
            total[end] = total.get(end, 0) + touches
    return sorted(total.items())


def draw_latencies(results, path):
    """Draws a panel for each row: the cumulative distribution of the time of a touch."""
    panels = [r for r in results if "latency" in r["plots"] and r["a"]]
    if not panels:
        return None
    columns, width, height, left, top, across, down = 2, 490, 300, 70, 46, 390, 190
    lines = math.ceil(len(panels) / columns)
    svg = Svg(columns * width, lines * height + 10, "Time of a touch of an absent page")
    ends = [end for r in panels for side in "ab" for end, _ in merged(r[side])]
    low, high = math.floor(math.log10(min(ends))), math.ceil(math.log10(max(ends)))
    # A scale by the number of nines, because a linear scale would hide the tail.
    nines = 3.3

    def height_of(part):
        return down * min(1.0, -math.log10(max(1 - part, 10 ** -nines)) / nines)

    for n, r in enumerate(panels):
        x0, y0 = n % columns * width + left, n // columns * height + top
        svg.text(x0, y0 - 26, f"{r['name']}: {r['work']}"[:60], kind="title small")
        for part in (0, 0.5, 0.9, 0.99, 0.999):
            y = y0 + down - height_of(part)
            svg.line(x0, y, x0 + across, y, "grid")
            svg.text(x0 - 6, y + 4, f"{part * 100:g} %", "end", "small")
        for decade in range(low, high + 1):
            x = x0 + across * (decade - low) / (high - low)
            svg.line(x, y0, x, y0 + down, "grid")
            value = 10 ** decade
            name = f"{value} ns" if value < 1000 else f"{value // 1000} µs" if value < 10 ** 6 else \
                f"{value // 10 ** 6} ms" if value < 10 ** 9 else f"{value // 10 ** 9} s"
            svg.text(x, y0 + down + 16, name, "middle", "small")
        svg.text(x0 + across / 2, y0 + down + 34, "time of a touch at most, log scale", "middle", "small")
        svg.text(x0 - 56, y0 + down / 2, "touches done, log of the rest", "middle", "small", turn=True)
        for side, dash in (("a", " dash"), ("b", "")):
            histogram = merged(r[side])
            if not histogram:
                continue
            total, seen, points = sum(touches for _, touches in histogram), 0, []
            for end, touches in histogram:
                x = x0 + across * (math.log10(end) - low) / (high - low)
                if not points:
                    points.append((x, y0 + down))
                seen += touches
                points.append((x, y0 + down - height_of(seen / total)))
            svg.path(points, f"line {side}{dash}")
        for side, dash, x in (("a", " dash", x0), ("b", "", x0 + 200)):
            svg.line(x, y0 - 12, x + 22, y0 - 12, f"line {side}{dash}")
            text = r["labels"][0 if side == "a" else 1] + ("" if r[side] else " (left out)")
            svg.text(x + 28, y0 - 8, text, kind="small")
    svg.write(path)
    return svg.title


def nice_step(high):
    """Returns a round step that divides an axis up to `high` into about five parts."""
    raw = high / 5
    power = 10 ** math.floor(math.log10(raw))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw)


def draw_bars(results, path):
    """Draws the throughput of both sides, by kind of work, with a mark at the goal."""
    groups = [("pages", "pages_per_second", 1e3, "random faults, thousand pages/s"),
              ("speed", "bytes_per_second", 1e9, "runs, GB/s"),
              ("open", "bytes_per_second", 1e9, "installing shared pages, GB/s"),
              ("slow", "pages_per_second", 1e3, "slow source, thousand pages/s")]
    groups = [(title, key, unit, [r for r in results if plot in r["plots"] and r["a"]])
              for plot, key, unit, title in groups]
    groups = [group for group in groups if group[3]]
    if not groups:
        return None
    left, across, bar = 190, 560, 15
    height = 40 + sum(70 + len(group[3]) * (2 * bar + 14) for group in groups)
    svg = Svg(left + across + 200, height, "Throughput")
    y = 24
    for kind, x, text in (("a", left, "baseline or limit"), ("b", left + 160, "libkuf")):
        svg.rect(x, y - 10, 14, 12, f"fill-{kind}")
        svg.text(x + 20, y, text)
    svg.line(left + 260, y - 12, left + 260, y + 4, "mark")
    svg.text(left + 268, y, "goal; thin lines: lowest and highest run")
    y += 36
    for title, key, unit, members in groups:
        high = max(one[key] * (r["goal_part"] or 1 if side == "a" else 1)
                   for r in members for side in "ab" for one in r[side]) / unit
        step = nice_step(high)
        end = math.ceil(high / step) * step
        svg.text(left, y, title, kind="title")
        y += 10
        bottom = y + len(members) * (2 * bar + 14)
        for n in range(round(end / step) + 1):
            x = left + across * n * step / end
            svg.line(x, y, x, bottom, "grid")
            svg.text(x, bottom + 14, f"{n * step:g}", "middle", "small")
        for r in members:
            y += 6
            svg.text(left - 8, y + bar + 3, r["name"], "end")
            for side in "ab":
                values = [one[key] / unit for one in r[side]]
                if values:
                    middle = statistics.median(values)
                    svg.rect(left, y, across * middle / end, bar - 2, f"fill-{side}")
                    svg.line(left + across * min(values) / end, y + bar / 2 - 1, left + across * max(values) / end,
                             y + bar / 2 - 1, "axis")
                    label = r["labels"][0 if side == "a" else 1]
                    svg.text(left + across * max(values) / end + 6, y + bar - 4, f"{middle:.3g}  {label}", kind="small")
                else:
                    svg.text(left + 6, y + bar - 4, "left out", kind="small")
                y += bar
            if r["goal_part"]:
                x = left + across * statistics.median(one[key] for one in r["a"]) / unit * r["goal_part"] / end
                svg.line(x, y - 2 * bar - 2, x, y, "mark")
            y += 8
        y = bottom + 56
    svg.write(path)
    return svg.title


def draw(report, out):
    report["plots"] = {}
    for name, how in (("latency.svg", draw_latencies), ("throughput.svg", draw_bars)):
        (out / name).unlink(missing_ok=True)
        title = how(report["rows"], out / name)
        if title:
            report["plots"][name] = title


# ---- The two ways to run --------------------------------------------------------------------------------------------


def finish_report(report, every, out):
    by_name = {row.name: row for row in every}
    for result in report["rows"]:
        row = by_name[result["name"]]
        result["lines"] = judge(row, result)
        result["plots"] = row.plots
        first = row.measures[0]
        result["goal_part"] = first.goal[1] if first.goal and first.goal[0] == ">=" else None
    draw(report, out)
    (out / "results.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")


def bench(names, pairs, out):
    quick = os.environ.get("QUICK", "") not in ("", "0")
    pairs = pairs or (5 if quick else 7)
    scale, began = QUICK if quick else FULL, time.monotonic()
    noise = Noise()
    time.sleep(1)
    busy, host = noise.others(), machine()
    idle = busy < 0.1 and host["load_average"][0] / host["cpus"] <= 0.5
    print(f"Linux {host['kernel']}, {host['cpus']} CPUs ({host['cpu']}), load average {host['load_average'][0]:.2f}, "
          f"other processes use {percent(busy)}", flush=True)
    if not idle:
        print("WARNING: this machine is not idle: the numbers are noisy; do not judge a goal by them",
              flush=True)
    every = rows(scale, image_paths(scale, out), out)
    picked = chosen(every, names)
    make_images(scale, out, picked)
    report = {"machine": host, "idle": idle, "busy_before": busy, "quick": quick, "pairs": pairs, "rows": []}
    failures = []
    for n, row in enumerate(picked):
        left = QUICK_SECONDS - (time.monotonic() - began)
        limit = max(1.0, left / (len(picked) - n) * 1.5) if quick else None
        print(f"[{n + 1}/{len(picked)}] {row.name}: {row.work} ...", file=sys.stderr, flush=True)
        try:
            report["rows"].append(measure(row, pairs, limit))
        except Failed as why:
            failures.append(f"FAIL {row.name}: {why}")
            print(failures[-1], file=sys.stderr, flush=True)
    report["failures"], report["seconds"] = failures, time.monotonic() - began
    finish_report(report, every, out)
    print(table(report))
    if not names or "11" in names:
        print("SKIP goal 11: make check-kernel measures vCPU exits, because they need the patched kernel")
    for failure in failures:
        print(failure)
    print(f"{report['seconds']:.0f} s; {out / 'results.json'}" + "".join(f", {out / p}" for p in report["plots"]))
    return 1 if failures else 0


def check_result(result):
    for key in ("side", "seconds", "pages") if "populate_seconds" not in result else ("side", "pages"):
        if key not in result and not (key == "seconds" and result["side"] == "demand"):
            raise Failed(f"the result has no {key}")
    for key, value in result.items():
        if isinstance(value, (int, float)) and not math.isfinite(value):
            raise Failed(f"{key} is {value}")
    if "histogram" in result and sum(touches for _, touches in result["histogram"]) != result["pages"]:
        raise Failed("the histogram does not add up to the pages")


def check(names, out):
    """Runs each row once, without regard to times."""
    images, failures = image_paths(CHECK, out), 0
    every = rows(CHECK, images, out)
    make_images(CHECK, out, every)
    report = {"machine": machine(), "idle": False, "busy_before": 0, "quick": True, "pairs": 1, "rows": []}

    def tell(name, body):
        nonlocal failures
        try:
            body()
            print(f"ok {name}", flush=True)
        except Skipped as why:
            print(f"SKIP {name}: {why}", flush=True)
        except (Failed, ValueError, KeyError, OSError, xml.etree.ElementTree.ParseError) as why:
            failures += 1
            print(f"FAIL {name}: {why!r}", flush=True)

    def once(row):
        result = {"name": row.name, "goal": row.goal, "work": row.work, "labels": row.labels, "a": [], "b": [],
                  "command_a": "", "command_b": "", "skip": None, "others": 0.0}
        report["rows"].append(result)
        try:
            result["a"].append(run(row.a))
            check_result(result["a"][0])
            if row.prepare:
                run(row.prepare)
            if row.b:
                result["b"].append(run(row.b))
                check_result(result["b"][0])
        except Skipped as why:
            result["skip"] = str(why)
            raise

    def wrong_byte():
        for side in ("faults poll", "faults drain", "faults spin", "faults kuf", "limits copy", "limits place",
                     "populate copy", "populate kuf", "shared populate"):
            command = [*side.split(), f"image={images[0]}"]
            run(command)
            try:
                run([*command, "corrupt=3"])
            except Failed as why:
                if "page 3 holds wrong bytes" not in str(why):
                    raise
            else:
                raise Failed(f"{side}: did not detect a falsified byte")

    def output():
        finish_report(report, every, out)
        table(report)
        json.loads((out / "results.json").read_text(encoding="utf-8"))
        if not names and set(report["plots"]) != {"latency.svg", "throughput.svg"}:
            raise Failed("a plot is missing")
        for name in report["plots"]:
            root = xml.etree.ElementTree.parse(out / name).getroot()
            if root.tag != "{http://www.w3.org/2000/svg}svg" or len(root) < 10:
                raise Failed(f"{name} is not a plot")
            if "nan" in (out / name).read_text(encoding="utf-8"):
                raise Failed(f"{name} has a coordinate that is not a number")

    def document():
        copy = out / "performance.md"
        shutil.copy(DOCUMENT, copy)
        publish(report, out, copy)
        publish(report, out, copy)
        text = copy.read_text(encoding="utf-8")
        if any(text.count(mark) != 1 for mark in MARKS) or report["rows"][0]["name"] not in text:
            raise Failed("the table is not between its marks")

    for row in chosen(every, names):
        tell(row.name, lambda: once(row))
    tell("a wrong byte is noticed", wrong_byte)
    tell("results and plots are well-formed", output)
    tell("the table goes into the document", document)
    return 1 if failures else 0


def calls(names, out):
    """Prints the system calls per page, counted by strace. strace slows the programs, so that times mean nothing."""
    every = rows(QUICK, image_paths(QUICK, out), out)
    picked = chosen(every, names)
    make_images(QUICK, out, picked)
    for row in picked:
        for label, command in zip(row.labels, (row.a, row.b)):
            if not command:
                continue
            try:
                result = run(command)
            except Skipped:
                continue
            if "pages" not in result:
                continue
            program = [str(BUILD / "bench" / command[0]), *command[1:]]
            if command[1] in ("kuf", "demand", "populate", "resolve", "workers", "deferred", "replay"):
                program.append("close=0")
            done = subprocess.run(["strace", "-f", "-c", "-U", "name,calls", "-o", str(out / "calls"), *program],
                                  env=environment(), capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                raise Failed(f"strace {' '.join(command)}: {done.stderr.strip()}")
            counted = [line.split() for line in (out / "calls").read_text().splitlines()[2:-2]]
            each = {name: int(times) / result["pages"] for name, times in counted}
            some = ", ".join(f"{name} {part:.2f}" for name, part in sorted(each.items(), key=lambda e: -e[1])
                             if part >= 0.01)
            line = f"{row.name}, {label}: a page takes {some or 'next to no system calls'}"
            if "service_waits" in result:
                waits, preemptions = (result[f"service_{key}"] / result["pages"] for key in ("waits", "preemptions"))
                line += f"; without strace, service threads wait {waits:.2f} and are preempted {preemptions:.2f} times"
            print(line)
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--calls", action="store_true")
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--pairs", type=int, default=None)
    parser.add_argument("--out", type=Path, default=BUILD / "bench")
    options = parser.parse_args()
    names = options.names + [name for name in os.environ.get("BENCH", "").replace(",", " ").split()]
    out = options.out.resolve()
    if options.list:
        print("\n".join(f"{row.name:24} {row.goal!s:3} {row.work}" for row in rows(CHECK, [""] * len(IMAGES), out)))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    if options.publish:
        publish(json.loads((out / "results.json").read_text(encoding="utf-8")), out, DOCUMENT)
        return 0
    if options.calls:
        return calls(names, out)
    if options.check:
        return check(names, out)
    return bench(names, options.pairs, out)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Failed, Skipped) as why:
        print(f"run.py: {why}", file=sys.stderr)
        sys.exit(1)
