"""Writes the outputs of a trained model for each line of its standard input.

    python scripts/predict.py --workdir=runs/x < in.txt > out.txt
    python scripts/predict.py --workdir=runs/x --beam_size=4 --n_best=4 --scores < in.txt
    python scripts/predict.py --workdir=runs/x --temperature=1 --top_p=0.9 --n_best=3 < in.txt

Each input line gives one output line, or `--n_best` of them, in the order of the input. A line that
cannot be processed, such as one longer than the model's positions, gives empty outputs; standard
error has its number and the reason, and counts the lines that are not UTF-8 (undecodable bytes are
read as �), the symbols that are not in the vocabulary, and the outputs cut at their length limit.

With `--scores` an output line is the number of the input line, from 1, the score (log p in nats, of
beam search divided by the length penalty) and the text, separated by tabs. A line break in an
output, and with `--scores` a tab, is written as a space. `--json` keeps them. `--alignments` writes
an object per best output: the line's number, the tokens of source and output, and the
cross-attention of each layer, averaged over heads: [layers][output][source].
"""

import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np
from absl import flags

import transformer
from transformer import cli
from transformer.data.text import numbered
from transformer.errors import UserError
from transformer.inference.decoding import DecodingConfig
from transformer.inference.generation import Generator, Output
from transformer.run import Run

WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or the number of a step.")
REPLICA = flags.DEFINE_integer("replica", 0, "Which replica of a population.")
N_BEST = flags.DEFINE_integer("n_best", 1, "Outputs per line.", lower_bound=1)
SCORES = flags.DEFINE_bool("scores", False, "Write line number, score and text.")
JSON = flags.DEFINE_bool("json", False, "Write line number, score and text as JSON.")
STRICT = flags.DEFINE_bool("strict", False, "A line that cannot be processed is an error.")
ALIGNMENTS = flags.DEFINE_string("alignments", None, "A file to write alignments to.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Lines decoded at once at most.")
WINDOW = flags.DEFINE_integer("window", 10_000, "Lines read before any is written.", 1)
cli.define_decoding_flags()
cli.define_plugins_flag()

INVALID, UNKNOWN = "lines that are not UTF-8", "unknown symbols"
TRUNCATED, CAPPED = (f"outputs truncated (--{x})" for x in ("decode_margin", "max_length"))
MISSING = "empty lines in place of outputs of the same text (--distinct)"
Report = dict[str, dict[int, int]]  # what is counted → line → count


def main() -> None:
    """Reads, decodes and writes a window of lines at a time."""
    decoding = cli.decoding()
    cli.set_up_jax(Run.saved(WORKDIR.value).config)
    cast(io.TextIOWrapper, sys.stdout).reconfigure(encoding="utf-8")  # like the input
    report: Report = {what: {} for what in (INVALID, UNKNOWN, TRUNCATED, CAPPED, MISSING)}
    lines = enumerate(read_lines(sys.stdin.buffer, report[INVALID]), 1)
    with Path(ALIGNMENTS.value or os.devnull).open("w", encoding="utf-8") as alignments:
        options = {"checkpoint": CHECKPOINT.value, "replica": REPLICA.value}
        generator = transformer.load(WORKDIR.value, **options)
        try:
            while window := dict(itertools.islice(lines, WINDOW.value)):
                write(generator, decoding, window, alignments, report)
        except BrokenPipeError:  # the reader has ended, like `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for what, counts in report.items():
        if counts:
            where = numbered("line", counts, len(counts))
            print(f"{what}: {sum(counts.values()):,} ({where})", file=sys.stderr)


def read_lines(file: IO[bytes], invalid: dict[int, int]) -> Iterator[str]:
    """Yields the lines of `file`; adds the numbers of those that are not UTF-8 to `invalid`."""
    for number, line in enumerate(file, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            if STRICT.value:
                raise UserError(f"line {number}: not UTF-8; convert the input") from error
            invalid[number], text = 1, line.decode(errors="replace")
        yield text


def write(
    generator: Generator, decoding: DecodingConfig, window: dict[int, str], file: IO, report: Report
) -> None:
    """Decodes a window of numbered lines and writes the outputs, and alignments into `file`."""
    numbers, texts = list(window), list(window.values())
    prepared = generator.prepare(texts)
    report[UNKNOWN] |= {numbers[index]: count for index, count in prepared.unknown.items()}
    options = {"n_best": N_BEST.value, "batch_size": BATCH_SIZE.value, "offset": numbers[0] - 1}
    found = []
    if not (STRICT.value and prepared.refused):
        found = generator.generate(prepared, decoding, **options)  # may refuse more
    for index, reason in sorted(prepared.refused.items()):
        if STRICT.value:
            raise UserError(f"line {numbers[index]}: {reason}")
        print(f"line {numbers[index]}: {reason}; its output is empty", file=sys.stderr)
    for number, outputs in zip(numbers, found, strict=True):
        sys.stdout.write("".join(formatted(number, output) + "\n" for output in outputs))
        for output in outputs:
            if output.truncated:
                capped = len(output.tokens) == decoding.max_length
                report[CAPPED if capped else TRUNCATED][number] = 1
        if (missing := N_BEST.value - len(outputs)) and not (SCORES.value or JSON.value):
            sys.stdout.write("\n" * missing)  # line numbers keep their meaning
            report[MISSING][number] = missing
    sys.stdout.flush()
    for index in np.flatnonzero(prepared.tokens.lengths() > 1) if ALIGNMENTS.value else ():
        if index in prepared.refused:
            continue
        (one,) = generator.align([texts[index]], found[index][:1])
        record = {"line": numbers[index], "source": one.source, "output": one.output}
        record |= {"weights": one.weights.round(4).tolist()}
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def formatted(number: int, output: Output) -> str:
    """An output as a line of standard output."""
    if JSON.value:
        record = {"line": number, "score": output.score, "text": output.text}
        return json.dumps(record, ensure_ascii=False)
    text = " ".join(output.text.splitlines())
    if SCORES.value:
        return "\t".join((str(number), f"{output.score:.4f}", text.replace("\t", " ")))
    return text


if __name__ == "__main__":
    cli.run(main, outlives_readers=False)
