"""The page of the claims, written from the stored data of each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lab.claims.claim import Check, Claim, verdict
from lab.tables import markdown
from transformer.workdir import write_json

HEAD = """# The claims, checked

    python scripts/claims.py --jobs=4

Each claim is tested in several cases, in each of which it is true, or not, or the measurements do
not decide. A claim *holds* if it is true in all cases, *holds with a condition* if in some, and
*does not hold here* if in none. Brackets are 95% confidence intervals (Student's t). The toy task
is small: effects that it does not show may exist elsewhere.
"""


def store(name: str, claim: Claim, folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes a claim, its data and `facts` to `name.json`, as soon as it is measured."""
    write_json(folder / f"{name}.json", {**facts, **asdict(claim)})


def write(folder: Path, names: Sequence[str]) -> Path:
    """Writes the page of all claims that are stored in `folder`, in the order of `names`."""
    sections, rows = [], []
    for name in names:
        if (path := folder / f"{name}.json").exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            words = verdict([Check(**check) for check in record["checks"]])
            title = record["title"]
            anchor = "".join(c for c in title.lower() if c.isalnum() or c in " -")
            link = f"[{title}](#{anchor.replace(' ', '-')})"
            rows.append((link, record["says"], f"**{words}**"))
            sections.append(section(name, record, words, folder))
    summary = markdown(("claim", "the text", "verdict"), rows, align="lll")
    path = folder.with_suffix(".md")
    path.write_text("\n".join((HEAD, summary, *sections)), encoding="utf-8")
    return path


def section(name: str, record: Mapping[str, Any], words: str, folder: Path) -> str:
    """A claim with its cases, its figure and its tables."""
    answers = {True: "yes", False: "**no**", None: "undecided"}
    rows = [(each["case"], each["found"], answers[each["holds"]]) for each in record["checks"]]
    picture = f"{name}.png"
    parts = [
        f"## {record['title']}\n\n> {record['says']}\n\n{record['method']}\n\n**{words}**\n",
        markdown(("case", "found", "true"), rows, align="lll") if rows else "",
        f"![{record['title']}]({folder.name}/{picture})\n" if (folder / picture).exists() else "",
        *record["tables"],
        f"On {record['devices']}; JAX {record['jax']}; commit {record['commit'] or 'unknown'}.\n",
    ]
    return "\n".join(part for part in parts if part)
