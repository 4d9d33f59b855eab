"""Evaluates a trained run: decodes a split with it, then prints and plots the results.

    python eval.py --workdir=runs/toy_reverse [--split=test_longer] [--checkpoint=best]
    python eval.py --workdir=runs/toy_reverse --beam_size=4 [--length_penalty=0.6]
    python eval.py --workdir=runs/translate --data=other.tsv [--out=results] [--plots=none]

Writes `eval_<split>.json`, `samples_<split>.tsv` and `plots/` to the run's folder or to `--out`.
File names contain the settings that differ from the run's: `eval_test_beam_size=4.json`.
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until `cli.run`: a quarter of the time of the imports

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from transformer import cli
from transformer.config import RunConfig
from transformer.console import facts, table
from transformer.errors import UserError
from transformer.inference import evaluation
from transformer.inference.decoding import DecodingConfig
from transformer.inference.search import Hypotheses
from transformer.inference.text_metrics import BLEU_TOKENIZERS, Texts, score_texts, show_scores
from transformer.metrics import PRINTED
from transformer.parallel import hosts
from transformer.parallel.mesh import check_batch, make_mesh, one_device_mesh
from transformer.parallel.replicas import is_stopped, mean_over_replicas, split_replicas
from transformer.run import Run
from transformer.workdir import write_json

WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder.", required=True)
SPLIT = flags.DEFINE_string("split", None, "The split; default the run's data.test.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or the number of a step.")
DATA = flags.DEFINE_string(
    "data", None, "A file of pairs (.tsv, .jsonl; or sources,targets) instead of the run's data."
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
OUT = flags.DEFINE_string("out", None, "The folder of the results; default the run's.")
PLOTS = flags.DEFINE_enum("plots", "summary", ["none", "summary", "all"], "Which plots to draw.")
BLEU_TOKENIZER = flags.DEFINE_enum("bleu_tokenizer", None, BLEU_TOKENIZERS, "Default the run's.")
cli.define_decoding_flags()
cli.define_plugins_flag()
cli.define_host_flags()


def main() -> None:
    """Restores the run, scores and decodes a split, then writes, prints and draws the results."""
    config = Run.saved(WORKDIR.value).config
    decoding = cli.decoding(config.decoding)
    cli.set_up_jax(config)
    cli.join_hosts()
    run = Run.saved(WORKDIR.value, data_dir=DATA_DIR.value, mesh=evaluation_mesh(config))
    jax.set_mesh(run.mesh)
    state, seeds = run.restore(CHECKPOINT.value), np.atleast_1d(config.seeds()).tolist()

    corpus = run.evaluation_corpus(DATA.value)
    split = SPLIT.value or ("test" if DATA.value else config.data.test)
    data, references = corpus.load(split, config.batch_size), corpus.references(split)
    split = corpus.dataset.split(split)  # its name in the dataset, where the config names a file
    config.model.check_length(data.longest(), f"the longest example of {split}")
    name = file_name(split, decoding, config.decoding, corpus.dataset.name)
    out = Path(OUT.value or run.workdir.path)
    hosts.once(partial(make_folder, out))
    facts({"data": f"{corpus.dataset.name}, {split}: {len(data):,} examples"})
    facts({"filtered": corpus.left_out(), "unknown": corpus.unknown(split)})

    variables = state.variables()
    found = run.decode(variables, data, decoding)
    arrays = split_replicas((run.totals(variables, data), found), config.replicas)
    replicas: list[dict[str, Any]] = [
        {"seed": seed}
        | evaluation.summarize(split, data, totals, found)
        | {"text": text_scores(run, found, references)}
        for seed, (totals, found) in zip(seeds, arrays, strict=True)
    ]
    stopped = is_stopped(state.skipped, config.max_skipped_steps)
    for k in np.flatnonzero(stopped):  # only the counts are valid
        replicas[k] = jax.tree.map(lambda x: np.nan if isinstance(x, float) else x, replicas[k])
    margin = decoding.margin(config.decode_margin)
    truncated = [each["outputs_cut"] for each in replicas]
    beyond, limit = evaluation.limit_report(decoding, margin, data, truncated)
    record = {"step": state.taken(), "split": split, "data": DATA.value or corpus.dataset.name}
    record |= {"examples": len(data), **decoding.describe(), "decode_margin": margin}
    record |= {"references_beyond_margin": beyond, "replicas": replicas}
    write_json(out / f"eval_{name}.json", record)
    samples = out / f"samples_{name}.tsv"
    if hosts.first():  # before anything is printed: its reader may be gone
        evaluation.write_samples(samples, run.tokenizers, data, arrays[0][1], decoding.distinct)
    lengths = (each["by_source_length"] for each in replicas)
    by_length = [mean_over_replicas(rows) for rows in zip(*lengths, strict=True)]
    show_metrics(f"{run.workdir.path}, step {state.taken()}, {split}", split, replicas, by_length)
    show_scores([each["text"] for each in replicas])
    facts({"limit": limit})
    evaluation.show_samples(run.tokenizers, data, arrays[0][1])
    facts({"results": str(out / f"eval_{name}.json"), "samples": str(samples)})

    if PLOTS.value != "none":
        from transformer.inference import plots  # imports Matplotlib

        options = evaluation.compiler_options(once=True)
        maps = jax.jit(partial(evaluation.attention_maps, run.model), compiler_options=options)
        maps = partial(maps, split_replicas(variables, config.replicas)[0])
        shown = out / "plots", name, by_length, maps, data, run.tokenizers
        title = f"{run.workdir.path.resolve().name}, {split}"
        plots.draw_evaluation(*shown, title=title, everything=PLOTS.value == "all")


def evaluation_mesh(config: RunConfig) -> Mesh:
    """The mesh of the config; on a single host that lacks its devices, one device."""
    try:
        mesh = make_mesh(config.mesh, config.replicas)
        check_batch(mesh, config.batch_size)
        return mesh
    except UserError:
        if hosts.several():
            raise
        return one_device_mesh()


def file_name(split: str, decoding: DecodingConfig, defaults: DecodingConfig, dataset: str) -> str:
    """The name of an evaluation's files: the split, and what differs from the run's defaults."""
    names = decoding.describe() | defaults.describe()
    differs = {name: getattr(decoding, name) for name in names}
    differs = {k: v for k, v in differs.items() if v != getattr(defaults, k)}
    if "prefix" in differs:  # of any length and characters
        differs["prefix"] = hashlib.sha256(decoding.prefix.encode(errors="replace")).hexdigest()[:6]
    parts = [split, *(f"{name}={value}" for name, value in differs.items())]
    if CHECKPOINT.value != "latest":
        parts.append(f"checkpoint={CHECKPOINT.value}")
    if DATA.value:
        names = ",".join(Path(file.strip()).name for file in DATA.value.split(","))
        parts.append(f"data={names}-{dataset.split('/')[1][:6]}")
    if BLEU_TOKENIZER.value:
        parts.append(f"bleu_tokenizer={BLEU_TOKENIZER.value}")
    return "_".join(parts)


def make_folder(out: Path) -> None:
    """Makes the folder of the results; raises a UserError if it cannot be written to."""
    (out / "plots").mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"{out} cannot be written to; name another folder with --out")


def text_scores(run: Run, found: Hypotheses, references: list[list[str]]) -> dict[str, Any]:
    """The text metrics of the best hypotheses that the config asks for."""
    settings = run.config.data
    outputs = [run.tokenizers.target.decode(tokens) for tokens in found.tokens[:, 0].tolist()]
    texts = Texts(outputs, references, BLEU_TOKENIZER.value or settings.bleu_tokenizer)
    return {name: score.record() for name, score in score_texts(settings.metrics, texts).items()}


def show_metrics(
    title: str, split: str, replicas: Sequence[dict[str, Any]], by_length: Sequence[dict[str, Any]]
) -> None:
    """Prints the metrics, averaged over replicas, by source length and for the whole split."""
    whole = mean_over_replicas([each["metrics"] for each in replicas])
    whole = {name.removeprefix(f"{split}/"): value for name, value in whole.items()}
    whole["sequences"] = sum(row["sequences"] for row in by_length)
    title += f", mean of {len(replicas)} replicas" if len(replicas) > 1 else ""
    labels = {name: name.replace("_", " ") for name in PRINTED}
    labels["sequence_accuracy"] = "exact match"  # of the decoded outputs
    rows = []
    for length, row in [*((f"{row['length']:.0f}", row) for row in by_length), ("all", whole)]:
        values = (metric.format(row[name]) for name, metric in PRINTED.items())
        rows.append((length, f"{row['sequences']:,.0f}", *values))
    table(title, ("source length", "sequences", *labels.values()), rows)


if __name__ == "__main__":
    cli.run(main)
