"""Writes the outputs of a trained model for each line of its standard input, or scores targets.

    python scripts/predict.py --workdir=runs/x < in.txt > out.txt
    python scripts/predict.py --workdir=runs/x --beam_size=4 --n_best=4 --scores < in.txt
    python scripts/predict.py --workdir=runs/x --temperature=1 --top_p=0.9 --n_best=3 < in.txt
    python scripts/predict.py --workdir=runs/x --score < pairs.tsv > scores.tsv

Each input line gives one output line, or `--n_best` of them, in the order of the input. A line that
cannot be processed, such as one longer than the model's positions, gives empty outputs; standard
error has its number and the reason, and counts the lines that are not UTF-8 (undecodable bytes are
read as �), the symbols that are not in the vocabulary, and the outputs cut at their length limit.

With `--scores` an output line is the number of the input line, from 1, the score (log p in nats, of
beam search divided by the length penalty) and the text, separated by tabs. A line break in an
output, and with `--scores` a tab, is written as a space. `--json` keeps them. `--alignments` writes
an object per best output: the line's number, the tokens of source and output, and the
cross-attention of each layer, averaged over heads: [layers][output][source].

With `--score` an input line is a source, a tab and a target, and an output line is the target's log
p in nats, its number of tokens (EOS included) and its perplexity, separated by tabs; nan if it
cannot be processed. With `--tokens` outputs are written, and targets read, as token ids with EOS,
which a truncated output lacks.
"""

import io
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, cast

import numpy as np
from absl import flags

import transformer
from transformer import cli
from transformer.data.text import numbered
from transformer.errors import UserError, explained
from transformer.inference.decoding import DecodingConfig
from transformer.inference.generation import Output, Prepared, Score, Target, TrainedModel
from transformer.run import Run

WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or the number of a step.")
REPLICA = flags.DEFINE_integer("replica", 0, "Which replica of a population.")
N_BEST = flags.DEFINE_integer("n_best", 1, "Outputs per line.", lower_bound=1)
SCORES = flags.DEFINE_bool("scores", False, "Write line number, score and text.")
JSON = flags.DEFINE_bool("json", False, "Write an object per line, with its number.")
SCORE = flags.DEFINE_bool("score", False, "Read sources and targets; write the targets' log p.")
TOKENS = flags.DEFINE_bool("tokens", False, "Write outputs, or read targets, as token ids.")
STRICT = flags.DEFINE_bool("strict", False, "A line that cannot be processed is an error.")
ALIGNMENTS = flags.DEFINE_string("alignments", None, "A file to write alignments to.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Lines processed at once at most.")
SOURCE_PREFIX = flags.DEFINE_string(
    "source_prefix",
    None,
    "Of an imported model: tokens before each source, such as >>deu<<; text "
    "if it ends in a space. Default the run's.",
)
TARGET_PREFIX = flags.DEFINE_string(
    "target_prefix", None, "Of an imported model: the first token of outputs. Default the run's."
)
WINDOW = flags.DEFINE_integer("window", 10_000, "Lines read before any is written.", 1)
cli.define_decoding_flags()
cli.define_plugins_flag()

INVALID, UNKNOWN = "lines that are not UTF-8", "unknown symbols"
TRUNCATED, CAPPED = (f"outputs truncated (--{x})" for x in ("decode_margin", "max_length"))
MISSING = "empty lines in place of missing outputs"
ALIGNED = 16  # alignments computed at once
Report = dict[str, dict[int, int]]  # what is counted → line → count


def main() -> None:
    """Reads, processes and writes a window of lines at a time."""
    decoders = ("n_best", "scores", "alignments", *(each.name for each in fields(DecodingConfig)))
    if SCORE.value and (given := [name for name in decoders if flags.FLAGS[name].present]):
        raise UserError(f"--score decodes nothing: leave out --{given[0]}")
    config = Run.saved(WORKDIR.value).config
    decoding = cli.decoding(config.decoding)
    cli.set_up_jax(config)
    cast(io.TextIOWrapper, sys.stdout).reconfigure(encoding="utf-8")  # like the input
    report: Report = {what: {} for what in (INVALID, UNKNOWN, TRUNCATED, CAPPED, MISSING)}
    lines = enumerate(read_lines(sys.stdin.buffer, report[INVALID]), 1)
    with Path(ALIGNMENTS.value or os.devnull).open("w", encoding="utf-8") as alignments:
        prefixes = {each.name: each.value for each in (SOURCE_PREFIX, TARGET_PREFIX)}
        options = {"checkpoint": CHECKPOINT.value, "replica": REPLICA.value}
        model = transformer.load(WORKDIR.value, **options, **prefixes)
        try:
            while window := dict(itertools.islice(lines, WINDOW.value)):
                write(model, decoding, window, alignments, report)
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
    model: TrainedModel, decoding: DecodingConfig, window: dict[int, str], file: IO, report: Report
) -> None:
    """Processes a window of numbered lines; writes the results, and alignments into `file`."""
    numbers, texts = list(window), list(window.values())
    prepared = prepare_pairs(model, texts) if SCORE.value else model.prepare(texts)
    report[UNKNOWN] |= {numbers[index]: count for index, count in prepared.unknown.items()}
    if STRICT.value:
        show_refused(prepared, numbers)
    outputs: list[list[Output]] = []
    if SCORE.value:  # may refuse more
        results = [[score] for score in model.score(prepared, batch_size=BATCH_SIZE.value)]
    else:
        options = {"n_best": N_BEST.value, "batch_size": BATCH_SIZE.value, "offset": numbers[0] - 1}
        results = outputs = model.generate(prepared, **options, **asdict(decoding))
    show_refused(prepared, numbers)
    is_text = prepared.tokens.lengths() > 1
    for number, own, has_tokens in zip(numbers, results, is_text.tolist(), strict=True):
        sys.stdout.write("".join(formatted(number, each, has_tokens) + "\n" for each in own))
        for output in own:
            if isinstance(output, Output) and output.truncated:
                capped = len(output.tokens) == decoding.max_length
                report[CAPPED if capped else TRUNCATED][number] = 1
        missing = 0 if SCORE.value or SCORES.value or JSON.value else N_BEST.value - len(own)
        if missing:
            sys.stdout.write("\n" * missing)  # line numbers keep their meaning
            report[MISSING][number] = missing
    sys.stdout.flush()
    if ALIGNMENTS.value:
        kept = [k for k in np.flatnonzero(is_text).tolist() if k not in prepared.refused]
        write_alignments(model, {numbers[k]: (texts[k], outputs[k][0]) for k in kept}, file)


def prepare_pairs(model: TrainedModel, lines: Sequence[str]) -> Prepared:
    """Tokenizes sources and targets, which a tab separates."""
    sources, targets, wrong = [""] * len(lines), list[Target]([()] * len(lines)), {}
    for index, line in enumerate(lines):
        pair = line.rstrip("\r\n").split("\t")
        try:
            if len(pair) != 2:
                raise UserError(f"{len(pair) - 1} tabs instead of one, between source and target")
            with explained("the target is not a list of token ids, such as 5 4 2", ValueError):
                target = [*map(int, pair[1].split())] if TOKENS.value else pair[1]
            sources[index], targets[index] = pair[0], target
        except UserError as error:
            wrong[index] = str(error)
    prepared = model.prepare(sources, targets)
    prepared.refused.update(wrong)
    return prepared


def show_refused(prepared: Prepared, numbers: Sequence[int]) -> None:
    """Prints which lines were not processed, and why; with `--strict` that is an error."""
    for index, reason in sorted(prepared.refused.items()):
        if STRICT.value:
            raise UserError(f"line {numbers[index]}: {reason}")
        empty = "score is nan" if SCORE.value else "output is empty"
        print(f"line {numbers[index]}: {reason}; its {empty}", file=sys.stderr)


def formatted(number: int, result: Output | Score, has_tokens: bool) -> str:
    """An output, or a score, as a line of standard output; an empty text has no tokens."""
    if isinstance(result, Score):
        if JSON.value:  # which has no NaN
            values = {k: x if math.isfinite(x) else None for k, x in result._asdict().items()}
            return json.dumps({"line": number} | values)
        return f"{result.log_p:.6f}\t{result.tokens}\t{result.perplexity:.6f}"
    ids = result.ids() if has_tokens else []
    if JSON.value:
        body = {"tokens": ids} if TOKENS.value else {"text": result.text}
        return json.dumps({"line": number, "score": result.score} | body, ensure_ascii=False)
    text = " ".join(map(str, ids)) if TOKENS.value else " ".join(result.text.splitlines())
    if SCORES.value:
        return "\t".join((str(number), f"{result.score:.6f}", text.replace("\t", " ")))
    return text


def write_alignments(model: TrainedModel, pairs: dict[int, tuple[str, Output]], file: IO) -> None:
    """Writes the cross-attention of numbered texts and their outputs."""
    for first in range(0, len(pairs), ALIGNED):
        part = dict(itertools.islice(pairs.items(), first, first + ALIGNED))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown symbols are in the report
            found = model.attention(*zip(*part.values(), strict=True))
        for number, one in zip(part, found, strict=True):
            record = {"line": number, "source": one.source, "output": one.output}
            record |= {"weights": one.cross.mean(1).round(4).tolist()}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    cli.run(main, outlives_readers=False)
