"""The page and the chart of the benchmark, from the numbers that its parts left."""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.benchmark.contender import CONTENDERS, OURS
from transformer.training.workdir import write_json

# A row of a table: the contender, and how its batches are made where that differs.
Row = tuple[str, str]


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, the lowest and the highest."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, round by round: what slows a whole round cancels."""
    return spread([own / other for own, other in zip(ours, theirs, strict=True)])


@dataclass(frozen=True)
class Quantity:
    """One thing that was measured of several contenders.

    title: what it is.
    values: row → a value for each round, the rounds being the same for all.
    higher: whether more is better.
    write: a value as text.
    """

    title: str
    values: Mapping[Row, Sequence[float]]
    higher: bool = True
    write: Callable[[float], str] = "{:,.0f}".format

    def ours(self) -> Sequence[float]:
        """This code's."""
        return next(each for (name, _), each in self.values.items() if name == OURS)

    def fastest(self) -> Row | None:
        """The peer with the best median."""
        peers = {row: statistics.median(v) for row, v in self.values.items() if row[0] != OURS}
        if not peers:
            return None
        return (max if self.higher else min)(peers, key=lambda row: peers[row])

    def cells(self, row: Row) -> tuple[str, str]:
        """The value with its range, and this code's over it; empty for what is not there."""
        if row not in self.values:
            return "", ""
        value = write_spread(spread(self.values[row]), self.write)
        if row[0] == OURS or all(name != OURS for name, _ in self.values):
            return value, ""
        ratio = write_spread(ratios(self.ours(), self.values[row]), "{:.2f}".format)
        return value, f"**{ratio}**" if row == self.fastest() else ratio


def write_spread(each: Spread, write: Callable[[float], str]) -> str:
    """`12 [10, 15]`"""
    return f"{write(each.median)} [{write(each.low)}, {write(each.high)}]"


def title(row: Row) -> str:
    """`PyTorch, bucketed`"""
    name, batching = row
    return CONTENDERS[name].title + (f", {batching}" if batching else "")


def training_quantities(part: Mapping[str, Any]) -> dict[str, Quantity]:
    """Steps and useful tokens a second."""
    rounds = {
        (name, batching): each
        for name, own in part["rounds"].items()
        for batching, each in own.items()
    }

    def rate(what: str) -> dict[Row, list[float]]:
        return {row: [r[what] / r["seconds"] for r in each] for row, each in rounds.items()}

    return {
        "tokens": Quantity("useful target tokens/s", rate("tokens")),
        "steps": Quantity("steps/s", rate("steps"), write="{:.2f}".format),
    }


def start_quantities(part: Mapping[str, Any]) -> dict[str, Quantity]:
    """Seconds to the end of the first step."""
    return {
        state: Quantity(
            f"seconds to the first step, {words}",
            {(name, ""): own[state] for name, own in part.items()},
            higher=False,
            write="{:.1f}".format,
        )
        for state, words in (("cold", "from cold"), ("again", "compiled before"))
    }


def decoding_quantities(part: Mapping[str, Any]) -> dict[str, Quantity]:
    """Sequences a second: one quantity for each width and batch."""
    found: dict[str, dict[Row, list[float]]] = {}
    for name, own in part.items():
        for what, each in own.items():
            rates = [r["sequences"] / r["seconds"] for r in each]
            found.setdefault(what, {})[name, ""] = rates
    return {what: Quantity(decoding_title(what), found[what]) for what in sorted(found)}


def decoding_title(what: str) -> str:
    """`4/128` → `beam 4, batch 128, sequences/s`"""
    beams, batch = what.split("/")
    return f"{'greedy' if beams == '1' else f'beam {beams}'}, batch {batch}, sequences/s"


def learning_quantities(part: Mapping[str, Any]) -> dict[str, Quantity]:
    """Seconds and steps to the target, of those whose seeds all reached it."""
    whole = {
        (name, ""): each
        for name, each in part["seeds"].items()
        if all(seed["reached"] for seed in each)
    }
    return {
        what: Quantity(
            f"{what} to {part['target']:.1%}",
            {row: [float(seed[what]) for seed in each] for row, each in whole.items()},
            higher=False,
            write=write,
        )
        for what, write in (("seconds", "{:.1f}".format), ("steps", "{:,.0f}".format))
    }


QUANTITIES: dict[str, Callable[[Mapping[str, Any]], dict[str, Quantity]]] = {
    "training": training_quantities,
    "time_to_accuracy": learning_quantities,
    "decoding": decoding_quantities,
    "start": start_quantities,
}


def store(path: Path, size: str, name: str, part: Any, about: Mapping[str, Any]) -> None:
    """Adds a part of a size, with what it was made with, to the numbers beside the page."""
    file = path.with_suffix(".json")
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    record.setdefault(size, {})[name] = {"about": dict(about), "found": part}
    write_json(file, record)


def write(path: Path) -> None:
    """Writes the page and its chart, of all parts that are stored."""
    record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))

    from lab.benchmark import chart  # matplotlib is not needed before

    chart.draw(panels(record), path.with_suffix(".png"))
    sections = [section(size, parts) for size, parts in record.items()]
    path.write_text(
        "\n".join([HEAD.format(chart=path.with_suffix(".png").name), *sections]), encoding="utf-8"
    )


HEAD = """# Benchmark

    python scripts/benchmark.py

This code beside what people would use instead: the same strings to reverse, sizes, precision and
threads. Contenders are processes of their own that take turns in random order, so that only one
works at a time. Figures are medians over the rounds with their lowest and highest; "this code / it"
is taken round by round, and **bold** where the peer is the fastest. Only what stands in one table
was measured in one run.

![Medians, and lines from the lowest to the highest round]({chart})
"""

NOTES = {
    "training": """Useful tokens are those of the targets and their ends; padding does not count. \
*Padded* batches come as drawn, *bucketed* ones hold strings of about one length, *packed* rows \
hold several strings; a step has as many strings in all of them. The shares are of \
the best product of two square matrices, {best_product:,.0f} GFLOP/s: what the model needs for \
the real tokens, by formula, and what this code carries out, counted from its program. Memory is, \
on a CPU, the most that the process has held.""",
    "time_to_accuracy": """Seconds of training until {target:.1%} of 1,000 held-out strings \
come out right, greedily, at a check; neither compilation nor checks count. Schedules are \
{found}.""",
    "decoding": """Held-out strings a second with trained parameters, batches sorted by length. \
*Right* is the share of them that come out right in every token, *tokens* how many an output has: \
speeds compare only where these do.""",
    "start": """Seconds from the start of a process to the end of its first training step: \
imports, reading the strings, building, compiling. *Compiled before*: with the compilation \
cache that an earlier process left.""",
}

TITLES = {
    "training": "Training",
    "time_to_accuracy": "Time to the target",
    "decoding": "Decoding",
    "start": "Time to the first step",
}


def section(size: str, parts: Mapping[str, Any]) -> str:
    """One size: its parts."""
    texts = [f"## {size}\n"]
    for name, heading in TITLES.items():
        if name not in parts:
            continue
        about, found = parts[name]["about"], parts[name]["found"]
        texts.append(f"### {heading}, {size}\n\n{note(name, found)}\n")
        texts += [TABLES[name](found), fastest(name, found), made_with(about)]
    return "\n".join(text for text in texts if text)


def note(name: str, found: Mapping[str, Any]) -> str:
    """How to read a part's table."""
    if name == "training":
        return NOTES[name].format(best_product=found["best_product"] / 1e9)
    if name == "time_to_accuracy":
        searched = found["searched"] == sorted(found["seeds"])
        words = "each contender's best of one grid" if searched else "not searched for: the default"
        return NOTES[name].format(target=found["target"], found=words)
    return NOTES[name]


def made_with(about: Mapping[str, Any]) -> str:
    """On what, with what, and who is missing and why."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    size = ", ".join(f"{name} {value}" for name, value in about["size"].items())
    absent = "".join(f" {CONTENDERS[n].title}: {why}." for n, why in about["absent"].items())
    return (
        f"`{about['command']}` on {about['device']}, {about['threads']} threads, load before "
        f"{about['load']}; {size}; {versions}; commit {about['commit'] or 'unknown'}.{absent}\n"
    )


def fastest(name: str, found: Mapping[str, Any]) -> str:
    """A line for each quantity: the fastest peer, and this code against it."""
    lines = []
    for each in QUANTITIES[name](found).values():
        row = each.fastest()
        if row is not None and each.cells(row)[1]:
            lines.append(f"- {each.title}: this code / {title(row)} {each.cells(row)[1]}")
    return "\n".join(lines) + "\n" if lines else ""


def training_table(found: Mapping[str, Any]) -> str:
    """Speed, work and memory."""
    quantities = training_quantities(found)
    tokens, steps = quantities["tokens"], quantities["steps"]
    rows = []
    for row in tokens.values:
        useful = statistics.median(tokens.values[row]) * found["useful_flops_per_token"]
        done = found["flops_per_step"].get(row[0])
        done = done and statistics.median(steps.values[row]) * done / found["best_product"]
        rows.append(
            (
                title(row),
                steps.cells(row)[0],
                *tokens.cells(row),
                f"{useful / found['best_product']:.1%}",
                f"{done:.1%}" if done else "",
                f"{found['memory'][row[0]] / 2**30:.2f} GiB",
            )
        )
    columns = ("", "steps/s", tokens.title, "this code / it", "FLOP/s, needed", "carried out")
    return table((*columns, "memory"), rows)


def learning_table(found: Mapping[str, Any]) -> str:
    """Who reached the target, and when."""
    quantities = learning_quantities(found)
    rows = []
    for name, seeds in found["seeds"].items():
        reached = sum(seed["reached"] for seed in seeds)
        last = statistics.median(seed["curve"][-1][2] for seed in seeds)
        rows.append(
            (
                title((name, "")),
                training_words(found["trainings"][name]),
                f"{reached} of {len(seeds)}",
                f"{last:.1%}",
                quantities["steps"].cells((name, ""))[0],
                *quantities["seconds"].cells((name, "")),
            )
        )
    columns = ("", "batches and schedule", "seeds there", "right at the end", "steps", "seconds")
    return table((*columns, "this code / it"), rows)


def training_words(training: Mapping[str, Any]) -> str:
    """`packed, linear over 1,500 steps, 0.002 after 100`"""
    schedule = training["schedule"]
    return (
        f"{training['batching']}, {schedule['name']} over {schedule['steps']:,} steps, "
        f"{schedule['learning_rate']:g} after {schedule['warmup_steps']}"
    )


def decoding_table(found: Mapping[str, Any]) -> str:
    """A table for each width and batch."""
    texts = []
    for what, quantity in decoding_quantities(found).items():
        rows = [
            (title(row), *quantity.cells(row), f"{last['exact']:.1%}", f"{last['tokens']:.1f}")
            for row in quantity.values
            for last in found[row[0]][what][-1:]
        ]
        texts.append(table(("", quantity.title, "this code / it", "right", "tokens"), rows))
    return "\n".join(texts)


def start_table(found: Mapping[str, Any]) -> str:
    """Both ways to start."""
    quantities = start_quantities(found)
    rows = [
        (
            title((name, "")),
            *quantities["cold"].cells((name, "")),
            *quantities["again"].cells((name, "")),
        )
        for name in found
    ]
    columns = ("", "from cold", "this code / it", "compiled before", "this code / it")
    return table(columns, rows)


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "training": training_table,
    "time_to_accuracy": learning_table,
    "decoding": decoding_table,
    "start": start_table,
}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column text, the others figures."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rule, *rows)) + "\n"


def panels(record: Mapping[str, Any]) -> dict[str, dict[str, tuple[Spread, bool]]]:
    """Of the chart: title → contender → its spread, and whether it is this code."""
    drawn = {}
    for size, parts in record.items():
        for name in ("training", "decoding", "time_to_accuracy"):
            if name not in parts:
                continue
            quantities = QUANTITIES[name](parts[name]["found"])
            quantities.pop("steps", None)
            for quantity in quantities.values():
                drawn[f"{size}: {quantity.title}"] = {
                    title(row): (spread(values), row[0] == OURS)
                    for row, values in quantity.values.items()
                }
    return {name: rows for name, rows in drawn.items() if rows}
