"""From the folders of a sweep's programs to a table with its uncertainty.

Seeds are what varies by chance: the same seeds serve every variant, so that differences from
the baseline are taken seed by seed, which takes out what a seed does to all variants alike.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lab.sweeps import runner
from lab.sweeps.statistics import (
    Difference,
    Interval,
    holm,
    mean_interval,
    paired,
    verdict,
)
from lab.sweeps.sweep import PaperRow, Program, Run, Sweep, all_runs
from transformer.config import load_config
from transformer.modules.config import ModelConfig
from transformer.modules.model import Model
from transformer.strict_json import numbers
from transformer.training.metrics import read_metrics
from transformer.training.workdir import Workdir, write_json

LEVEL = 0.95

# With which the paper's formula comes nearest to its column; see scripts/parameters.py.
PAPER_VOCABULARY = 37_000


@dataclass(frozen=True)
class Record:
    """What one seed of one variant came to.

    accuracy, loss: on the test split; whole sequences right, and nats a token.
    steps, seconds: to the target on the validation split, at the evaluation that first
      saw it; None if it was not reached. Seconds are of training alone, and a replica's
      are its program's divided by their number.
    tokens_per_second: useful target tokens, of this replica alone times their number.
    curve: (step, validation sequence accuracy).
    by_length: split → (source length, sequence accuracy, token accuracy).
    """

    run: Run
    accuracy: float
    loss: float
    steps: int | None
    seconds: float | None
    tokens_per_second: float
    parameters: int
    flops_per_step: int
    curve: list[tuple[int, float]]
    by_length: dict[str, list[tuple[int, float, float]]]


def read(sweep: Sweep, program: Program, replica: int, run: Run, root: Path) -> Record:
    """The record of one replica of a finished program.

    Raises:
      UserError: a file is missing or damaged.
    """
    folder = Workdir(str(root / program.name))
    results = runner.read_results(folder.path)
    own = numbers(results["replicas"][replica])
    rows = [row for row in read_metrics(folder.metrics) if row.get("replica", 0) == replica]
    trained = [row for row in rows if "train/loss" in row]
    curve = [
        (row["step"], row["validation/sequence_accuracy"])
        for row in rows
        if "validation/sequence_accuracy" in row
    ]
    reached = next((step for step, accuracy in curve if accuracy >= sweep.target), None)
    share = len(program.members)
    seconds = seconds_until(trained, reached) / share if reached is not None else None
    tokens = [row["train/target_tokens_per_second"] for row in trained]
    return Record(
        run=run,
        accuracy=own["test/sequence_accuracy"],
        loss=own["test/loss"],
        steps=reached,
        seconds=seconds,
        tokens_per_second=share * sum(tokens) / len(tokens),
        parameters=results["parameters"],
        flops_per_step=results["flops_per_step"],
        curve=curve,
        by_length={split: lengths(folder, split, replica) for split in program.splits},
    )


def seconds_until(trained: Sequence[Mapping[str, Any]], step: int) -> float:
    """Seconds of training that the logged intervals up to `step` took."""
    total, before = 0.0, 0
    for row in trained:
        if row["step"] > step:
            break
        total += (row["step"] - before) / row["train/steps_per_second"]
        before = row["step"]
    return total


def lengths(folder: Workdir, split: str, replica: int) -> list[tuple[int, float, float]]:
    """(source length, sequence accuracy, token accuracy) of a replica on a split."""
    record = json.loads((folder.path / f"eval_{split}.json").read_text(encoding="utf-8"))
    return [
        (row["length"], row["sequence_accuracy"], row["token_accuracy"])
        for row in map(numbers, record["replicas"][replica]["by_source_length"])
    ]


@dataclass(frozen=True)
class Outcome:
    """A metric of each variant, compared with the baseline's.

    title: what it is.
    write: a value of it as text.
    unit: a magnitude of a difference as text.
    better: which sign is the better one.
    """

    title: str
    name: str
    write: Callable[[float], str]
    unit: Callable[[float], str]
    better: Literal["higher", "lower"]


OUTCOMES = (
    Outcome(
        "Sequences right",
        "accuracy",
        lambda x: f"{x:.2%}".replace("-", "−"),
        lambda x: f"{100 * x:.2g} points" if x < 0.1 else f"{100 * x:.0f} points",
        "higher",
    ),
    Outcome("Loss", "loss", "{:.4g}".format, lambda x: f"{x:.2g} nats a token", "lower"),
    Outcome("Steps to the target", "steps", "{:,.0f}".format, lambda x: f"{x:,.0f} steps", "lower"),
)


@dataclass(frozen=True)
class Comparison:
    """One variant on one outcome: its own interval, and its difference from the baseline.

    values: of each seed, in order; None where there is none.
    interval: of the mean, over the seeds that have a value.
    difference, p, verdict: against the baseline; None for the baseline itself.
    """

    values: list[float | None]
    interval: Interval | None
    difference: Difference | None
    p: float | None
    verdict: str


def compare(
    records: Mapping[str, Sequence[Record]], baseline: str, outcome: Outcome
) -> dict[str, Comparison]:
    """Each variant against the baseline, p-values corrected by Holm for all of them.

    Where a seed has no value, because it did not reach the target, there is no comparison: to
    leave it out would flatter.
    """
    values: dict[str, list[Any]] = {
        name: [
            None if (value := getattr(record, outcome.name)) is None else float(value)
            for record in each
        ]
        for name, each in records.items()
    }
    complete = {name for name, each in values.items() if None not in each}
    others = [name for name in values if name != baseline and {name, baseline} <= complete]
    # Holm's most severe step, which the smallest of all differences would have to pass.
    strict = 1.0 - (1.0 - LEVEL) / max(len(others), 1)
    differences = {
        name: dataclasses.replace(
            paired(values[name], values[baseline], LEVEL),
            detectable=paired(values[name], values[baseline], strict).detectable,
        )
        for name in others
    }
    corrected = dict(zip(others, holm([differences[name].p for name in others]), strict=True))
    result = {}
    for name, each in values.items():
        known = [float(value) for value in each if value is not None]
        interval = mean_interval(known, LEVEL) if known else None
        difference, p = differences.get(name), corrected.get(name)
        if name == baseline:
            words = "baseline"
        elif difference is None or p is None:
            words = f"not compared: {missing(each, values[baseline])}"
        else:
            words = verdict(
                difference, p, unit=outcome.unit, better=outcome.better, alpha=1.0 - LEVEL
            )
        result[name] = Comparison(each, interval, difference, p, words)
    return result


def missing(values: Sequence[Any], baseline: Sequence[Any]) -> str:
    """Which seeds have no value."""
    own, theirs = (sum(value is not None for value in each) for each in (values, baseline))
    if own < len(values):
        return f"{own} of {len(values)} seeds reach the target"
    return f"of the baseline {theirs} of {len(baseline)} seeds reach the target"


def make(
    sweep: Sweep, programs: Sequence[Program], failures: Mapping[str, str], root: Path, command: str
) -> Path:
    """Writes `report.md`, `report.json` and the pictures; returns the first.

    Args:
      sweep: what was compared.
      programs: all of its programs.
      failures: program → why it failed.
      root: the folder of the sweep.
      command: that made it.
    """
    records: dict[str, list[Record]] = {}
    for program, replica, run in all_runs(programs):
        if program.name not in failures:
            records.setdefault(run.variant, []).append(read(sweep, program, replica, run, root))
    # A variant of which a seed is missing cannot be paired.
    whole = {
        name: sorted(records[name], key=lambda record: record.run.seed)
        for name in sweep.variants
        if len(records.get(name, ())) == sweep.seeds
    }
    lost = [name for name in sweep.variants if name not in whole]
    path = root / "report.md"
    if sweep.baseline not in whole:
        path.write_text(
            f"# {root.name}\n\nThe baseline, {sweep.baseline}, failed: no report.\n",
            encoding="utf-8",
        )
        return path
    compared = {outcome.name: compare(whole, sweep.baseline, outcome) for outcome in OUTCOMES}
    finished = [root / each.name for each in programs if each.name not in failures]
    devices = runner.read_results(finished[0])["devices"]

    from lab.sweeps import pictures  # matplotlib is not needed before

    drawn = pictures.draw(sweep, whole, compared, root)
    facts = {
        "command": command,
        "commit": ", ".join(commits(finished)),
        "devices": devices,
        "config": sweep.config,
        "overrides": dict(sweep.overrides),
        "seeds": sweep.seeds,
        "target": sweep.target,
        "interval": f"{LEVEL:.0%}, Student's t",
    }
    write_json(
        root / "report.json",
        facts
        | {
            "baseline": sweep.baseline,
            "failed": dict(failures),
            "variants": {
                name: {
                    "overrides": dict(sweep.variants[name]),
                    "seeds": [dataclasses.asdict(record) for record in each],
                    "outcomes": {
                        outcome: dataclasses.asdict(by_variant[name])
                        for outcome, by_variant in compared.items()
                    },
                }
                for name, each in whole.items()
            },
        },
    )
    parts = [
        heading(sweep, root, facts),
        *(f"![{title}]({file})\n" for title, file in drawn.items()),
        *(table_of(outcome, compared[outcome.name]) for outcome in OUTCOMES),
        cost_table(whole),
        *(length_table(split, whole) for split in sweep.splits),
        paper_table(sweep.paper),
        *([f"Failed: {', '.join(lost)}. See `log.txt` in their folders.\n"] if lost else []),
    ]
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return path


def commits(folders: Iterable[Path]) -> list[str]:
    """The commits that the runs were made with, by their own record."""
    records = (
        json.loads(Workdir(str(folder)).config.read_text(encoding="utf-8")) for folder in folders
    )
    return sorted({record["commit"] or "unknown" for record in records})


def heading(sweep: Sweep, root: Path, facts: Mapping[str, Any]) -> str:
    """The title, what was done, and how to read it."""
    overrides = ", ".join(f"`{name}={value}`" for name, value in sweep.overrides.items())
    return f"""# {root.name.replace("_", " ").capitalize()}

{sweep.note.strip()}

    {facts["command"]}

{sweep.seeds} seeds a variant, from `{sweep.config}`{f" with {overrides}" if overrides else ""}; \
baseline **{sweep.baseline}**; {facts["devices"]} a program; commit {facts["commit"]}.

Brackets are 95% intervals of the mean over seeds (Student's t). Differences are from the
baseline, seed by seed; p is of the paired t-test, corrected by Holm for the
comparisons of its table. "Smallest detectable" is the true difference that would be found with
power 0.8 after that correction, if seeds scatter as they did here. The target is
{sweep.target:.0%} of validation sequences right, at an evaluation.
"""


def table_of(outcome: Outcome, by_variant: Mapping[str, Comparison]) -> str:
    """One outcome of every variant."""
    lines = [
        f"## {outcome.title}\n",
        "| variant | mean | difference | p | verdict |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, each in by_variant.items():
        difference = "" if each.difference is None else interval_text(outcome, each.difference, "+")
        p = "" if each.p is None else ("< 0.001" if each.p < 0.001 else f"{each.p:.3f}")
        lines.append(
            f"| {name} | {mean_text(outcome, each)} | {difference} | {p} | {each.verdict} |"
        )
    return "\n".join(lines) + "\n"


def mean_text(outcome: Outcome, comparison: Comparison) -> str:
    """The mean and its interval, and of how many seeds where not of all."""
    if comparison.interval is None:
        return f"not reached (0/{len(comparison.values)})"
    text = interval_text(outcome, comparison.interval)
    if comparison.interval.n < len(comparison.values):
        text += f" ({comparison.interval.n}/{len(comparison.values)})"
    return text


def interval_text(outcome: Outcome, interval: Any, sign: str = "") -> str:
    """`99.10% [98.52%, 99.68%]`; with `+` as a sign, signed."""

    def text(value: float) -> str:
        shown = outcome.write(abs(value) if sign else value)
        return f"{'−' if value < 0 else sign}{shown}" if sign else shown

    if interval.n == 1:
        return text(interval.mean)
    return f"{text(interval.mean)} [{text(interval.low)}, {text(interval.high)}]"


def cost_table(records: Mapping[str, Sequence[Record]]) -> str:
    """Parameters, work and speed of every variant."""
    lines = [
        "## Cost\n",
        "| variant | parameters | FLOPs a step | seconds to the target | target tokens/s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, each in records.items():
        seconds = [record.seconds for record in each if record.seconds is not None]
        shown = "not reached"
        if seconds:
            mean = mean_interval(seconds, LEVEL)
            shown = f"{mean.mean:.1f}"
            shown += f" [{mean.low:.1f}, {mean.high:.1f}]" if mean.n > 1 else ""
        if seconds and len(seconds) < len(each):
            shown += f" ({len(seconds)}/{len(each)})"
        speed = sum(record.tokens_per_second for record in each) / len(each)
        lines.append(
            f"| {name} | {each[0].parameters:,} | {each[0].flops_per_step:,} | {shown} "
            f"| {speed:,.0f} |"
        )
    lines.append(
        "\nFLOPs are those of the matrix products of a step, from its jaxpr. Seconds are of "
        "training alone, without compilation and evaluation, the program's divided by its "
        "replicas; programs may have run side by side, so compare them within this table "
        "only, and roughly."
    )
    return "\n".join(lines) + "\n"


def length_table(split: str, records: Mapping[str, Sequence[Record]]) -> str:
    """Mean accuracy over seeds by source length."""
    sizes = [length for length, _, _ in next(iter(records.values()))[0].by_length[split]]
    lines = [
        f"## {split}: sequences right (tokens right) by source length\n",
        "| variant | " + " | ".join(map(str, sizes)) + " |",
        "| --- | " + " | ".join("---:" for _ in sizes) + " |",
    ]
    for name, each in records.items():
        cells = []
        for i in range(len(sizes)):
            rows = [record.by_length[split][i] for record in each]
            sequences, tokens = (sum(row[k] for row in rows) / len(rows) for k in (1, 2))
            cells.append(f"{sequences:.1%} ({tokens:.1%})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def paper_table(rows: Mapping[str, PaperRow]) -> str:
    """The exact parameters at the paper's size, beside the paper's column."""
    if not rows:
        return ""
    lines = [
        f"## Parameters at the paper's size, {PAPER_VOCABULARY:,} shared pieces\n",
        "| variant | parameters | the paper's column | difference |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        count = paper_parameters(row)
        printed, difference = "", ""
        if row.millions is not None:
            printed = f"{row.millions:.0f}M"
            difference = f"{count / 1e6 - row.millions:+.1f}M"
        lines.append(f"| {name} | {count:,} | {printed} | {difference} |")
    lines.append(
        "\nExact, by shapes alone. The paper's column (Vaswani et al. 2017, Table 3) is "
        "rounded, is empty where it prints nothing, and does not state its vocabulary."
    )
    return "\n".join(lines) + "\n"


def paper_parameters(row: PaperRow) -> int:
    """The parameters of a row of the paper's table."""
    config = load_config(str(runner.ROOT / "configs" / "vaswani_base.py"))
    config.update_from_flattened_dict(dict(row.overrides))
    return Model(ModelConfig(**config.model), PAPER_VOCABULARY).count_parameters()
