"""Writes what a trained model makes of each line it reads.

Usage:
    python scripts/predict.py --workdir=runs/x < in.txt > out.txt
    python scripts/predict.py --workdir=runs/x --beam_size=4 --n_best=4 --scores < in.txt
    python scripts/predict.py --workdir=runs/x --temperature=1 --top_p=0.9 --n_best=3 < in.txt
    python scripts/predict.py --workdir=runs/x --alignments=looked.jsonl < in.txt > out.txt

A line of input gives a line of output, or `--n_best` of them, in the order of the input; an empty
line gives empty ones. So does a line that cannot be processed, such as one longer than the model's
positions: standard error has its number and the reason. With `--strict` it is an error. Standard
error also counts the lines that are no UTF-8, which are read with � in the place of what is none,
and the symbols that the model never learned.

With `--scores` a line is the input's number, from 1, the score (log p in nats; of beam search over
the length penalty), and the text, with tabs between. A line break in an output, and with `--scores`
a tab, is written as a space. `--json` keeps them: an object a line with `line`, `score` and `text`.

`--alignments` takes an object a line for each best output: its number, the tokens of source and
output, and for each layer the cross-attention, the mean of its heads: [layers][output][source].
"""

import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

import numpy as np
from absl import flags

from transformer import cli
from transformer.config import RunConfig
from transformer.data.text import numbered
from transformer.errors import UserError
from transformer.inference.generation import Decoding, Generator, Output, Prepared
from transformer.workdir import Workdir

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or the number of a step.")
REPLICA = flags.DEFINE_integer("replica", 0, "Of a population, which one.")
N_BEST = flags.DEFINE_integer("n_best", 1, "Outputs of each line.", lower_bound=1)
SCORES = flags.DEFINE_bool("scores", False, "Whether to write number, score and text.")
JSON = flags.DEFINE_bool("json", False, "Whether to write number, score and text as JSON.")
STRICT = flags.DEFINE_bool("strict", False, "Whether a line that cannot be processed is an error.")
ALIGNMENTS = flags.DEFINE_string("alignments", None, "A file that takes where outputs looked.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Lines that are decoded at once.")
WINDOW = flags.DEFINE_integer(
    "window", 10_000, "Lines that are read before the first is written; 1: each at once.", 1
)
cli.define_decoding_flags()
cli.define_plugins_flag()


@dataclass
class Report:
    """What standard error is told of the lines, by their numbers.

    broken: those that are no UTF-8.
    unknown: how many of a line's symbols the tokenizer never learned.
    cut: those with an output that reached its limit.
    """

    broken: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    unknown: dict[int, int] = field(default_factory=dict)

    def refuse(self, prepared: Prepared, numbers: Sequence[int]) -> None:
        """Names the lines that cannot be processed; with `--strict` the first is an error."""
        for index, reason in sorted(prepared.refused.items()):
            if STRICT.value:
                raise UserError(f"line {numbers[index]}: {reason}")
            print(f"line {numbers[index]}: {reason}; its output is empty", file=sys.stderr)

    def finish(self) -> None:
        """Writes the counts."""
        for what, count, which in (
            ("lines that are no UTF-8", len(self.broken), self.broken),
            ("symbols that were never learned", sum(self.unknown.values()), self.unknown),
            ("outputs cut at their limit (--decode_margin)", len(self.cut), self.cut),
        ):
            if count:
                where = numbered("line", which, len(which))
                print(f"{what}: {count:,} ({where})", file=sys.stderr)


def main() -> None:
    """Reads, decodes, writes."""
    decoding = cli.decoding()
    cfg = RunConfig.from_config_dict(Workdir(WORKDIR.value).read_config())
    cli.set_up_jax(cfg)
    cast(io.TextIOWrapper, sys.stdout).reconfigure(encoding="utf-8")  # as what is read
    report = Report()
    enumerated = enumerate(lines(sys.stdin.buffer, report.broken), 1)
    with Path(ALIGNMENTS.value or os.devnull).open("w", encoding="utf-8") as looked:
        generator = Generator(WORKDIR.value, checkpoint=CHECKPOINT.value, replica=REPLICA.value)
        try:
            while window := list(itertools.islice(enumerated, WINDOW.value)):
                write(generator, decoding, window, looked, report)
        except BrokenPipeError:  # `| head` has all that it wants
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    report.finish()


def lines(file: IO[bytes], broken: list[int]) -> Iterator[str]:
    """The lines; the numbers of those that are no UTF-8 go to `broken`."""
    for number, line in enumerate(file, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            if STRICT.value:
                raise UserError(f"line {number}: no UTF-8; convert the input to it") from error
            broken.append(number)
            text = line.decode(errors="replace")
        yield text


def write(
    generator: Generator,
    decoding: Decoding,
    window: list[tuple[int, str]],
    looked: IO[str],
    report: Report,
) -> None:
    """Decodes some numbered lines, and writes what comes of them."""
    numbers, texts = zip(*window, strict=True)
    prepared = generator.prepare(texts)
    report.unknown |= {numbers[index]: count for index, count in prepared.unknown.items()}
    if STRICT.value:
        report.refuse(prepared, numbers)
    found = generator.generate(
        prepared, decoding, n_best=N_BEST.value, batch_size=BATCH_SIZE.value, first=numbers[0] - 1
    )
    report.refuse(prepared, numbers)
    for number, own in zip(numbers, found, strict=True):
        sys.stdout.write("".join(written(number, output) + "\n" for output in own))
        report.cut += [number] * any(output.cut for output in own)
    sys.stdout.flush()
    if ALIGNMENTS.value:
        for index in np.flatnonzero(prepared.tokens.lengths() > 1).tolist():
            if index in prepared.refused:
                continue
            (one,) = generator.align([texts[index]], found[index][:1])
            record = {"line": numbers[index], "source": one.source, "output": one.output}
            record |= {"weights": one.weights.round(4).tolist()}
            looked.write(json.dumps(record, ensure_ascii=False) + "\n")


def written(number: int, output: Output) -> str:
    """A line of output."""
    if JSON.value:
        record = {"line": number, "score": output.score, "text": output.text}
        return json.dumps(record, ensure_ascii=False)
    text = " ".join(output.text.splitlines())  # a line feed that a model made would be a line more
    if SCORES.value:
        return "\t".join((str(number), f"{output.score:.4f}", text.replace("\t", " ")))
    return text


if __name__ == "__main__":
    cli.run(main, outlives_readers=False)
