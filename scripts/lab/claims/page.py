"""What a claim is, how its verdict follows from its checks, and the page that shows them."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer.training.workdir import write_json

NAMED = 4  # exceptions that a verdict names; it counts more of them


@dataclass(frozen=True)
class Setting:
    """Where the claims find and leave things.

    root: of the sweeps' folders.
    data_dir: where TFDS keeps datasets; None for its own place.
    jobs: programs of a sweep at a time.
    folder: takes the pictures and the numbers; the page is beside it.
    """

    root: Path
    data_dir: str | None
    jobs: int
    folder: Path


@dataclass(frozen=True)
class Check:
    """A case in which a claim is put to the test.

    case: which.
    found: the number, with its spread.
    holds: whether the claim is true of it; None: these numbers do not tell.
    """

    case: str
    found: str
    holds: bool | None


@dataclass(frozen=True)
class Claim:
    """A claim of the text and what became of it.

    name: of its picture and of the file with its numbers.
    title: of its section.
    says: what the text says.
    method: what was measured and how, and when a check holds, in sentences.
    checks: the cases.
    tables: Markdown, below the checks.
    data: the numbers behind it.
    """

    name: str
    title: str
    says: str
    method: str
    checks: Sequence[Check]
    tables: Sequence[str] = ()
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def verdict(checks: Sequence[Check]) -> str:
    """What the checks come to: `holds` if all are true, `with a condition` if some are.

    The exceptions are named, or counted where they are many.
    """
    cases = {
        answer: [check.case for check in checks if check.holds is answer]
        for answer in (True, False, None)
    }
    exceptions = len(checks) - len(cases[True])
    if not checks:
        return "could not be measured here"
    if not cases[True]:
        return "does not hold here"
    if not exceptions:
        return "holds"
    if exceptions > NAMED:
        return (
            f"holds with a condition: in {len(cases[True])} of {len(checks)} cases, not in "
            f"{len(cases[False])}, undecided in {len(cases[None])}"
        )
    parts = [
        f"{words}: {'; '.join(cases[answer])}"
        for answer, words in ((False, "not for"), (None, "undecided"))
        if cases[answer]
    ]
    return f"holds with a condition; {'; '.join(parts)}"


def store(claim: Claim, folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes a claim with its numbers and `facts` to its own file, as soon as it is measured."""
    write_json(folder / f"{claim.name}.json", {**facts, **dataclasses.asdict(claim)})


def write(folder: Path, names: Sequence[str]) -> Path:
    """Writes the page of all claims that `folder` has numbers of, in the order of `names`."""
    found = [folder / f"{name}.json" for name in names]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]
    for each in records:
        each["verdict"] = verdict([Check(**check) for check in each["checks"]])
    path = folder.with_suffix(".md")
    path.write_text(text(records, folder), encoding="utf-8")
    return path


def text(records: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """The page."""
    head = """# The claims of the text, checked

    python scripts/claims.py --jobs=4

Each claim is put to the test in several cases, of each of which it is true, or is not, or the
numbers do not tell. It *holds* if it is true of all of them, *holds with a condition* if of some,
and *does not hold here* if of none. Brackets are 95% intervals (Student's t). The toy task is
small: what does not show on it may show elsewhere.
"""
    rows = [(link(each["title"]), each["says"], f"**{each['verdict']}**") for each in records]
    summary = table(("claim", "the text", "verdict"), rows)
    return "\n".join((head, summary, *(section(each, folder) for each in records)))


def link(title: str) -> str:
    """To the section of that title."""
    anchor = "".join(c for c in title.lower() if c.isalnum() or c in " -").replace(" ", "-")
    return f"[{title}](#{anchor})"


def section(record: Mapping[str, Any], folder: Path) -> str:
    """A claim with its cases, its picture and its tables."""
    answers = {True: "yes", False: "**no**", None: "undecided"}
    rows = [(each["case"], each["found"], answers[each["holds"]]) for each in record["checks"]]
    picture = f"{record['name']}.png"
    parts = [
        f"## {record['title']}\n\n> {record['says']}\n\n{record['method']}\n",
        f"**{record['verdict']}**\n",
        table(("case", "found", "true"), rows) if rows else "",
        f"![{record['title']}]({folder.name}/{picture})\n" if (folder / picture).exists() else "",
        *record["tables"],
        f"On {record['devices']}; JAX {record['jax']}; commit {record['commit'] or 'unknown'}.\n",
    ]
    return "\n".join(part for part in parts if part)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, text to the left."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
