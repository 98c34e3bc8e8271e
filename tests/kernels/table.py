#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""table.py DIRECTORY FILE: writes the probe's results of each kernel (NAME.json, as listed in `order`) between the marks."""
import json
import pathlib
import sys

BEGIN, END = "<!-- made by tests/kernels/table.sh -->\n", "<!-- end -->\n"
# include/uapi/linux/userfaultfd.h
BITS = ["PAGEFAULT_FLAG_WP", "EVENT_FORK", "EVENT_REMAP", "EVENT_REMOVE", "MISSING_HUGETLBFS", "MISSING_SHMEM", "EVENT_UNMAP",
        "SIGBUS", "THREAD_ID", "MINOR_HUGETLBFS", "MINOR_SHMEM", "EXACT_ADDRESS", "WP_HUGETLBFS_SHMEM", "WP_UNPOPULATED",
        "POISON", "WP_ASYNC", "MOVE", "RWP", "RWP_ASYNC"]

directory, file = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
order = [line.split() for line in (directory / "order").read_text().splitlines()]
found = [json.loads((directory / f"{name}.json").read_text()) for name, _ in order]


def row(title, cells):
    return "| " + " | ".join([title, *cells]) + " |\n"


def word(yes):
    return "yes" if yes else "-"


table = row("", [name for name, _ in order]) + "|---" * (len(order) + 1) + "|\n"
table += row("release", [release for _, release in order])
table += row("page size", [str(probe["page_size"]) for probe in found])
table += row("`/dev/kvm`", [probe["kvm"] for probe in found])
for n, mechanism in enumerate(found[0]["mechanisms"]):
    table += row(mechanism["name"], [word(probe["mechanisms"][n]["works"]) for probe in found])
for feature in found[0]["features"]:
    table += row(f"feature {feature}", [word(probe["features"][feature]) for probe in found])
for bit, name in enumerate(BITS):
    table += row(f"`UFFD_FEATURE_{name}`", [word(probe["uffd_features"] >> bit & 1) for probe in found])

text = file.read_text()
start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
file.write_text(text[:start] + "\n" + table + "\n" + text[end:])
