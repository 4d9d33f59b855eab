"""What a claim is, how its verdict follows from its checks, and the page that shows them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer.workdir import write_json


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
    holds: whether the claim is true of it.
    """

    case: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Claim:
    """A claim of the text and what became of it.

    title: of its section.
    says: what the text says.
    method: what was measured and how, and when a check holds, in sentences.
    checks: the cases.
    picture: the file in the setting's folder; None where nothing could be measured.
    tables: Markdown, below the checks.
    data: the numbers behind it, for JSON.
    """

    title: str
    says: str
    method: str
    checks: Sequence[Check]
    picture: str | None
    tables: Sequence[str] = ()
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def verdict(self) -> str:
        """`holds` in all cases, in some (which those are not), or in none."""
        if not self.checks:
            return "could not be measured here"
        failed = [check.case for check in self.checks if not check.holds]
        if not failed:
            return "holds"
        if len(failed) == len(self.checks):
            return "does not hold here"
        return f"holds with a condition; not for: {'; '.join(failed)}"


def write(claims: Iterable[Claim], folder: Path, facts: Mapping[str, Any]) -> Path:
    """Writes the page beside `folder` and the numbers into it; returns the page."""
    claims = list(claims)
    record = [dataclasses.asdict(each) | {"verdict": each.verdict()} for each in claims]
    write_json(folder / "claims.json", {**facts, "claims": record})
    path = folder.with_suffix(".md")
    path.write_text(text(claims, facts, folder.name))
    return path


def text(claims: Sequence[Claim], facts: Mapping[str, Any], folder: str) -> str:
    """The page."""
    head = f"""# The claims of the text, checked

    {facts["command"]}

On {facts["devices"]}; commit {facts["commit"] or "unknown"}; JAX {facts["jax"]}.

Each claim is put to the test in several cases. It *holds* if it is true of every case, *holds with
a condition* if of some, which is then said, and *does not hold here* if of none. Brackets are 95%
intervals (Student's t). The toy task is small: what does not show on it may show elsewhere.
"""
    rows = [(link(each.title), each.says, f"**{each.verdict()}**") for each in claims]
    return "\n".join(
        (
            head,
            table(("claim", "the text", "verdict"), rows),
            *(section(each, folder) for each in claims),
        )
    )


def link(title: str) -> str:
    """To the section of that title."""
    anchor = "".join(c for c in title.lower() if c.isalnum() or c in " -").replace(" ", "-")
    return f"[{title}](#{anchor})"


def section(claim: Claim, folder: str) -> str:
    """A claim with its cases, its picture and its tables."""
    rows = [(each.case, each.found, "yes" if each.holds else "**no**") for each in claim.checks]
    parts = (
        f"## {claim.title}\n\n> {claim.says}\n\n{claim.method}\n\n**{claim.verdict()}**\n",
        table(("case", "found", "true"), rows) if rows else "",
        f"![{claim.title}]({folder}/{claim.picture})\n" if claim.picture else "",
        *claim.tables,
    )
    return "\n".join(parts)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, text to the left."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
