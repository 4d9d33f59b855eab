"""Checks that the tests catch the small faults that `tests/faults.toml` lists.

    python scripts/faults.py               # the default suite, for every fault
    python scripts/faults.py --full        # also the slow tests, for what the default suite misses
    python scripts/faults.py --only=cache  # faults whose name, or whose file, contains a word

A fault is a text that occurs once in a file, its replacement, and the test files that should detect
it. Each fault is applied to a copy of the tree, and is caught if one of its tests fails there. The
exit status is 1 if too few are caught, and 2 if a fault no longer applies.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
WANTED = 0.95  # the share that the default suite must catch; the full suite must catch all
TIMEOUT = 900.0  # seconds; a fault that makes a test hang is caught


class Fault(NamedTuple):
    """A small change of the code that the tests should notice."""

    name: str
    file: str
    before: str
    after: str
    tests: list[str]

    def mutated(self) -> str:
        """The file's text with the fault in it; a ValueError if the fault does not apply."""
        text = (ROOT / self.file).read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise ValueError(f"its text occurs {text.count(self.before)} times in {self.file}")
        if missing := [test for test in self.tests if not (ROOT / test).exists()]:
            raise ValueError(f"there is no {missing[0]}")
        changed = text.replace(self.before, self.after)
        if self.file.endswith(".py"):
            compile(changed, self.file, "exec")
        return changed


def load() -> list[Fault]:
    """The faults of `faults.toml`."""
    text = (ROOT / "tests" / "faults.toml").read_text(encoding="utf-8")
    return [Fault(**fault) for fault in tomllib.loads(text)["fault"]]


def fails(fault: Fault, marker: str) -> str:
    """The first test of a fault that fails with it; an empty string if none does."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(words, cwd=ROOT, text=True).splitlines()
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        for name in filter(lambda name: (ROOT / name).is_file(), names):
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(folder, name))
        Path(folder, fault.file).write_text(fault.mutated(), encoding="utf-8")
        words = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-m", marker, *fault.tests]
        where = {"cwd": folder, "env": os.environ | {"PYTHONPATH": folder}}
        try:
            done = subprocess.run(words, **where, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return "a test hangs"
    if done.returncode in (0, 5):  # 5: these files have no such tests
        return ""
    if done.returncode in (3, 4):  # of pytest itself
        raise RuntimeError(done.stdout + done.stderr)
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) \S+", done.stdout)
    return failed[0] if failed else f"pytest exits with status {done.returncode}"


def check(fault: Fault, full: bool) -> tuple[str, str]:
    """The suite that catches a fault (or NOT CAUGHT), and a line about it."""
    began, suite = time.monotonic(), "default"
    test = fails(fault, "not slow")
    if full and not test:
        suite, test = "full", fails(fault, "slow")
    suite = suite if test else "NOT CAUGHT"
    return suite, f"{suite:10}  {time.monotonic() - began:4.0f} s  {fault.name}  {test}"


def main() -> int:
    """Tries the faults, and prints how many are caught."""
    parser = argparse.ArgumentParser(description="Checks that the tests catch small faults.")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    faults = [fault for fault in load() if args.only in fault.name or args.only in fault.file]
    for fault in faults:
        try:
            fault.mutated()
        except (ValueError, SyntaxError) as error:
            parser.error(f"the fault {fault.name!r} does not apply: {error}")
    found = Counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        for suite, line in pool.map(partial(check, full=args.full), faults):
            found[suite] += 1
            print(line, flush=True)
    print(f"caught: {dict(found)}")
    enough = found["default"] >= WANTED * len(faults)
    return int(not enough or (args.full and found["NOT CAUGHT"] > 0))


if __name__ == "__main__":
    sys.exit(main())
