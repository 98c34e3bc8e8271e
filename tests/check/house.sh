#!/usr/bin/env bash
# SPDX-License-Identifier: MIT OR Apache-2.0
#
# house.sh [--all] [--list] [--cuts] [--goals]: counts that the layout of the source keeps, each with its ceiling (house.py has
# the table).

. "$(dirname "$0")/common.sh"

needs python3=python3
tests/check/house.py "$@" | tee "$work/counts"
code=${PIPESTATUS[0]}
n_passed=$(grep -c '^ok    house: ' "$work/counts")
n_failed=$(grep -c '^FAIL  house: ' "$work/counts")
# A script that dies prints no such line for it.
if [ "$code" -ne 0 ] && [ "$n_failed" -eq 0 ]; then failed "house.py ended with $code"; fi
finish
