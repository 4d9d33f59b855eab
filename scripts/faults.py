"""Checks that the tests catch the small faults that `tests/faults.toml` lists.

    python scripts/faults.py               # the default suite, for every fault
    python scripts/faults.py --full        # also the slow tests, for what the default suite misses
    python scripts/faults.py --only=cache  # faults whose name, or whose file, contains a word
    python scripts/faults.py --draw=30     # draws random operator changes, as TOML

A fault is a text that occurs once in a file, its replacement, and the relevant test files. Each is
applied to a copy of the tree, and counts as caught if those tests fail there. The
exit status is 1 if too few are caught, and 2 if a fault no longer applies, so that the list
follows the code.
"""

import argparse
import ast
import concurrent.futures
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
WANTED = 0.95  # the share that the default suite must catch; the full suite must catch all
TIMEOUT = 900.0  # seconds; a fault that makes a test hang counts as caught


class Fault(NamedTuple):
    """A small change of the code that the tests should notice."""

    name: str
    file: str
    before: str
    after: str
    tests: list[str]

    def mutated(self) -> str:
        """The file's text with the fault in it."""
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
    with (ROOT / "tests" / "faults.toml").open("rb") as file:
        return [Fault(**fault) for fault in tomllib.load(file)["fault"]]


def tracked() -> list[str]:
    """The files of the working tree that Git tracks or would track."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.splitlines() if (ROOT / name).is_file()]


def fails(fault: Fault, marker: str) -> tuple[bool, str]:
    """Returns whether the relevant tests fail with the fault, and the first that does."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        for name in tracked():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        Path(folder, fault.file).write_text(fault.mutated(), encoding="utf-8")
        words = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-m", marker, *fault.tests]
        try:
            done = subprocess.run(
                words,
                cwd=folder,
                env=os.environ | {"PYTHONPATH": folder},
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return True, "a test hangs"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode in (1, 2):  # a test fails, or a test file cannot be imported
        return True, failed[0].split(" - ")[0] if failed else "collection"
    if not 0 <= done.returncode <= 5:  # which are pytest's own
        return True, "the test process ends"
    if done.returncode in (0, 5):  # 5: these files have no such tests
        return False, ""
    raise RuntimeError(done.stdout + done.stderr)


def check(fault: Fault, full: bool) -> tuple[str, str, float]:
    """Returns the suite that catches a fault (default, full or none), the test, and the seconds."""
    began = time.monotonic()
    for suite, marker in (("default", "not slow"), ("full", "slow")):
        if suite == "full" and not full:
            break
        caught, test = fails(fault, marker)
        if caught:
            return suite, test, time.monotonic() - began
    return "none", "", time.monotonic() - began


# Drawing

# Each operator, and its replacement.
PAIRS = """
Eq !=  NotEq ==  Lt <=  LtE <  Gt >=  GtE >  Is is_not  IsNot is  In not_in  NotIn in
Add -  Sub +  Mult /  Div *  FloorDiv *  Mod //  BitAnd |  And or  Or and
"""
OTHERS = {
    getattr(ast, name): other.replace("_", " ")
    for name, other in (pair.split() for pair in re.split(r"\s\s+|\n", PAIRS.strip()))
}
SKIPPED = ("annotation", "returns")  # `int | None` is not an operation


def operators(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr, str]]:
    """Yields the operands of each operator, and its replacement."""
    match node:
        case ast.JoinedStr():  # positions inside f-strings are not exact before Python 3.12
            return
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            yield left, right, OTHERS[type(op)]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OTHERS:
            yield left, right, OTHERS[type(op)]
        case ast.BoolOp(op=op, values=[left, right]):
            yield left, right, OTHERS[type(op)]
    for name, value in ast.iter_fields(node):
        if name not in SKIPPED:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from operators(child)


def draw(count: int, seed: int) -> None:
    """Prints random replacements of single operators, drawn from all of the code."""
    sites = []
    for name in sorted(tracked()):
        if name.endswith(".py") and not name.startswith(("tests/", "notebooks/")):
            lines = (ROOT / name).read_text(encoding="utf-8").splitlines(keepends=True)
            for left, right, other in operators(ast.parse("".join(lines))):
                if left.end_lineno == right.lineno:  # the operator is on one line
                    sites.append((name, lines, left, right, other))
    for name, lines, left, right, other in random.Random(seed).sample(sites, count):
        before = lines[right.lineno - 1].encode()
        start, end = before[: left.end_col_offset].decode(), before[right.col_offset :].decode()
        closing = before[left.end_col_offset : right.col_offset].decode()
        ahead, behind = closing.count(")"), closing.count("(")
        after = f"{start}{')' * ahead} {other} {'(' * behind}{end}"
        print("[[fault]]", f'file = "{name}"  # line {right.lineno}', sep="\n")
        print(f"before = '''{before.decode().rstrip()}'''\nafter = '''{after.rstrip()}'''\n")


def main() -> int:
    """Tries the faults of the command line, and prints how many are caught."""
    parser = argparse.ArgumentParser(description="Checks that the tests catch small faults.")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--draw", type=int, metavar="COUNT")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.draw:
        draw(args.draw, args.seed)
        return 0

    faults = [fault for fault in load() if args.only in fault.name or args.only in fault.file]
    for fault in faults:
        try:
            fault.mutated()
        except (ValueError, SyntaxError) as error:
            print(f"error: the fault {fault.name!r} does not apply: {error}")
            return 2
    found = {"default": 0, "full": 0, "none": 0}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(check, fault, args.full): fault for fault in faults}
        for future in concurrent.futures.as_completed(futures):
            suite, test, seconds = future.result()
            found[suite] += 1
            said = {"none": "NOT CAUGHT"}.get(suite, suite)
            print(f"{said:10}  {seconds:4.0f} s  {futures[future].name}  {test}", flush=True)
    print(f"default suite: {found['default']} of {len(faults)}", end="")
    print(f"; full suite: {found['default'] + found['full']}" if args.full else "")
    enough = found["default"] >= WANTED * len(faults)
    return int(not enough or (args.full and found["none"] > 0))


if __name__ == "__main__":
    sys.exit(main())
