"""Writes what a trained model makes of each line it reads.

Usage:
    python scripts/predict.py --workdir=runs/x < in.txt > out.txt
    python scripts/predict.py --workdir=runs/x --beam_size=4 --n_best=4 --scores < in.txt
    python scripts/predict.py --workdir=runs/x --temperature=1 --top_p=0.9 --n_best=3 < in.txt
    python scripts/predict.py --workdir=runs/x --alignments=looked.jsonl < in.txt > out.txt

A line of input gives a line of output, or `--n_best` of them, in the order of the input; an empty
line gives empty ones. With `--scores` a line is the input's number, from 1, the score (log p in
nats; of beam search over the length penalty), and the text, with tabs between. A line that is no
UTF-8 is read with � in the place of what is none, and is counted.

`--alignments` takes an object a line for each best output: its number, the tokens of source and
output, and for each layer the cross-attention, the mean of its heads: [layers][output][source].
"""

import io
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from absl import flags

from transformer import cli
from transformer.config import RunConfig
from transformer.generation import Decoding, Generator, Output
from transformer.workdir import Workdir

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or the number of a step.")
REPLICA = flags.DEFINE_integer("replica", 0, "Of a population, which one.")
N_BEST = flags.DEFINE_integer("n_best", 1, "Outputs of each line.", lower_bound=1)
SCORES = flags.DEFINE_bool("scores", False, "Whether to write number, score and text.")
ALIGNMENTS = flags.DEFINE_string("alignments", None, "A file that takes where outputs looked.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Lines that are decoded at once.")
WINDOW = flags.DEFINE_integer(
    "window", 10_000, "Lines that are read before the first is written; 1: each at once.", 1
)
cli.define_decoding_flags()


def main() -> None:
    """Reads, decodes, writes."""
    decoding = cli.decoding()
    cfg = RunConfig.resolve(Workdir(WORKDIR.value).read_config())
    cli.set_up_jax(cfg)
    cast(io.TextIOWrapper, sys.stdout).reconfigure(encoding="utf-8")  # as what is read
    broken: list[int] = []
    cut: list[int] = []
    numbered = enumerate(lines(sys.stdin.buffer, broken), 1)
    with Path(ALIGNMENTS.value or os.devnull).open("w", encoding="utf-8") as looked:
        generator = Generator(WORKDIR.value, checkpoint=CHECKPOINT.value, replica=REPLICA.value)
        try:
            while window := list(itertools.islice(numbered, WINDOW.value)):
                write(generator, decoding, window, looked, cut)
        except BrokenPipeError:  # `| head` has all that it wants
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for numbers, what in (
        (broken, "lines were no UTF-8"),
        (cut, "outputs were cut at their limit, which --decode_margin=N raises"),
    ):
        if numbers:
            first = ", ".join(map(str, numbers[:3])) + ", …" * (len(numbers) > 3)
            print(f"{len(numbers)} {what} (lines {first})", file=sys.stderr)


def lines(file: IO[bytes], broken: list[int]) -> Iterator[str]:
    """The lines, without their ends; the numbers of those that are no UTF-8 go to `broken`."""
    for number, line in enumerate(file, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError:
            broken.append(number)
            text = line.decode(errors="replace")
        yield text.strip()


def write(
    generator: Generator,
    decoding: Decoding,
    window: list[tuple[int, str]],
    looked: IO[str],
    cut: list[int],
) -> None:
    """Decodes some numbered lines, and writes what comes of them; `cut` takes the lines cut off."""
    numbers, texts = zip(*window, strict=True)
    found = generator.generate(
        texts, decoding, n_best=N_BEST.value, batch_size=BATCH_SIZE.value, first=numbers[0] - 1
    )
    for number, own in zip(numbers, found, strict=True):
        sys.stdout.write("".join(written(number, output) + "\n" for output in own))
        cut += [number] * any(output.cut for output in own)
    sys.stdout.flush()
    if ALIGNMENTS.value:
        for number, text, own in zip(numbers, texts, found, strict=True):
            if not text:
                continue
            (one,) = generator.align([text], own[:1])
            record = {"line": number, "source": one.source, "output": one.output}
            record |= {"weights": one.weights.round(4).tolist()}
            looked.write(json.dumps(record, ensure_ascii=False) + "\n")


def written(number: int, output: Output) -> str:
    """A line of output."""
    text = " ".join(output.text.splitlines())  # a line feed that a model made would be a line more
    return f"{number}\t{output.score:.4f}\t{text}" if SCORES.value else text


if __name__ == "__main__":
    cli.run(main, outlives_readers=False)
