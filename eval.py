"""Evaluates a run: restores it by its own saved config, decodes a split, prints, plots.

Usage:
    python eval.py --workdir=runs/toy_reverse [--split=test_longer] [--checkpoint=best]
    python eval.py --workdir=runs/toy_reverse --beam_size=4 [--length_penalty=0.6]
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from transformer import cli, evaluation, hosts, sharding
from transformer.config import RunConfig
from transformer.console import facts, figure, percent, perplexity, table
from transformer.data.batches import Dataset
from transformer.data.load import Tokenizers, open_corpus
from transformer.data.tokenizer import BOS, PAD
from transformer.decoding import Beams
from transformer.errors import UserError
from transformer.metrics import by_replica, mean_over
from transformer.model import Model, Params
from transformer.text_metrics import METRICS
from transformer.trained import load
from transformer.training import each_replica
from transformer.workdir import Workdir, write_json

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
SPLIT = flags.DEFINE_string("split", None, "Which split; default the run's data.test.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or the number of a step.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
cli.define_decoding_flags()
cli.define_plugins_flag()
cli.define_host_flags()

SHOWN = 3  # examples whose attention is drawn
SAMPLES = 50  # outputs written to the samples file
ROWS = 24  # of the table by source length, at most
STEPS = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]  # of those lengths


def main() -> None:
    """Restores, scores, decodes, shows, writes."""
    workdir, decoding = Workdir(WORKDIR.value), cli.decoding()
    cfg = RunConfig.resolve(workdir.read_config())
    split = SPLIT.value or cfg.data.test

    cli.set_up_jax(cfg)
    cli.join_hosts()
    mesh = evaluation_mesh(cfg)
    jax.set_mesh(mesh)

    _, tokenizers, model, step, variables, stopped = load(workdir, mesh, CHECKPOINT.value)
    corpus = open_corpus(cfg.data, DATA_DIR.value, workdir.tokenizers)
    workdir.check_corpus(corpus.identity())
    data, references = corpus.load(split, cfg.batch_size), corpus.references(split)
    split = corpus.split(split)  # of a file that the config names
    cfg.model.check_length(data.longest(), f"the longest example of {split}")
    data = sharding.place(data, sharding.replicated(mesh))

    def each(function, **options):
        return jax.jit(
            each_replica(partial(function, model), cfg.replicas, in_axes=(0, None)),
            out_shardings=sharding.replicated(mesh),
            **options,
        )

    scores = each(evaluation.score)(variables, data)
    decode = each(
        partial(decoding.decode, margin=cfg.decode_margin),
        compiler_options=evaluation.compiler_options(),
    )
    found = decode(variables, data)
    data = jax.tree.map(np.asarray, data)
    replicas = []
    for seed, one, old in zip(
        np.atleast_1d(cfg.seeds()), by_replica((scores, found), cfg.replicas), stopped, strict=True
    ):
        came_to = results(split, data, *jax.tree.map(np.asarray, one))
        decode_text = tokenizers.target.decode
        texts = [decode_text(tokens) for tokens in np.asarray(one[1].tokens)[:, 0].tolist()]
        came_to |= {"text": scores_of_text(cfg.data.metrics, texts, references)}
        if old:  # stopped by a NaN: nothing is known of it but the counts
            came_to = jax.tree.map(lambda x: np.nan if isinstance(x, float) else x, came_to)
        replicas.append({"seed": int(seed)} | came_to)
    means = mean_over([each["metrics"] for each in replicas])
    by_length = [
        mean_over(rows)
        for rows in zip(*(each["by_source_length"] for each in replicas), strict=True)
    ]
    title = f"{workdir.path}, step {step}, {split}"
    title += f", mean of {cfg.replicas} replicas" if cfg.replicas > 1 else ""
    show(title, split, means, by_length)
    show_text([each["text"] for each in replicas])
    write_json(
        workdir.path / f"eval_{split}.json",
        {"step": step, "split": split, **decoding.describe(), "replicas": replicas},
    )
    first, found = by_replica((variables, found), cfg.replicas)[0]
    if hosts.first():
        write_samples(workdir, split, tokenizers, data, jax.tree.map(np.asarray, found))
    draw(workdir, split, tokenizers, model, first, data, by_length)


def results(split: str, data: Dataset, scores: evaluation.Scores, found: Beams) -> dict[str, Any]:
    """What one replica came to, on the whole split and for each length."""
    exact = evaluation.exact_match(np.asarray(found.tokens)[:, 0], np.asarray(data.target))
    return {
        "metrics": scores.metrics(split) | {f"{split}/sequence_accuracy": float(exact.mean())},
        "by_source_length": accuracy_by_length(np.asarray(data.source), scores, exact),
    }


def scores_of_text(
    names: Sequence[str], outputs: list[str], references: list[list[str]]
) -> dict[str, Any]:
    """Metrics of decoded text; where references are several, also against the first alone."""
    against = {"": references}
    if any(len(own) > 1 for own in references):
        against = {", any reference": references, ", first reference": [r[:1] for r in references]}
    return {
        f"{name}{which}": METRICS[name](outputs, own)._asdict()
        for name in names
        for which, own in against.items()
    }


def show_text(texts: list[dict[str, Any]]) -> None:
    """Prints the metrics of decoded text; of a population the mean, and the least and the most."""
    if not texts[0]:
        return
    rows = []
    for name, first in texts[0].items():
        values = [one[name]["value"] for one in texts]
        low, high = (first["low"], first["high"]) if len(texts) == 1 else (min(values), max(values))
        value = f"{np.mean(values):.2f}"
        rows.append((name.replace("_", " "), value, f"{low:.2f} to {high:.2f}"))
    spread = "95% interval" if len(texts) == 1 else f"of {len(texts)} replicas"
    table("decoded text, in percent", ("metric", "value", spread), rows)
    facts({name: each["signature"] for name, each in texts[0].items() if each["signature"]})


def evaluation_mesh(cfg: RunConfig) -> Mesh:
    """The mesh that the run was trained on, or one device where that is not to be had.

    Several processes must have the mesh: each has a part in it.
    """
    try:
        mesh = sharding.make_mesh(cfg.mesh, cfg.replicas)
        sharding.check_batch(mesh, cfg.batch_size)
    except UserError:
        if hosts.several():
            raise
        mesh = sharding.one_device()
    return mesh


def accuracy_by_length(
    source: np.ndarray, scores: evaluation.Scores, exact: np.ndarray
) -> list[dict[str, Any]]:
    """For each source length (without EOS): how many sequences, and how well they went.

    Where there are many lengths, several make a row, which is called by the longest.
    """
    lengths = (source != PAD).sum(1) - 1
    step = next(step for step in STEPS if lengths.max() <= ROWS * step)
    lengths = -(-lengths // step) * step
    rows = []
    for length in np.unique(lengths):
        chosen = lengths == length
        part = evaluation.Scores(*(each[chosen] for each in scores))
        metrics = part.metrics("length")
        rows.append(
            {
                "length": int(length),
                "sequences": int(chosen.sum()),
                "loss": metrics["length/loss"],
                "token_accuracy": metrics["length/token_accuracy"],
                "sequence_accuracy": float(exact[chosen].mean()),
            }
        )
    return rows


def show(
    title: str, split: str, metrics: dict[str, float], by_length: list[dict[str, Any]]
) -> None:
    """Prints the table: each source length, then the whole split."""
    columns = (
        "source length",
        "sequences",
        "loss",
        "perplexity",
        "tokens right",
        "sequences right",
    )
    whole: dict[str, Any] = {
        name.removeprefix(f"{split}/"): value for name, value in metrics.items()
    }
    whole |= {"length": "all", "sequences": sum(row["sequences"] for row in by_length)}
    table(
        title,
        columns,
        [
            (
                row["length"] if row["length"] == "all" else f"{row['length']:.0f}",
                f"{row['sequences']:,.0f}",
                figure(row["loss"]),
                perplexity(np.exp(row["loss"])),
                percent(row["token_accuracy"]),
                percent(row["sequence_accuracy"]),
            )
            for row in (*by_length, whole)
        ],
    )


def write_samples(
    workdir: Workdir, split: str, tokenizers: Tokenizers, data: Dataset, found: Beams
) -> None:
    """`samples_<split>.tsv`: source, target and output of the first examples.

    Of beam search each hypothesis has a line, the best first, with its score.
    """
    source_text, text = tokenizers.source.decode, tokenizers.target.decode
    scored = found.tokens.shape[1] > 1
    rows = [("source", "target", "output") + (("score",) if scored else ())]
    columns = (data.source, data.target, found.tokens, found.scores)
    for source, target, tokens, scores in zip(
        *(column[:SAMPLES].tolist() for column in columns), strict=True
    ):
        for output, score in zip(tokens, scores, strict=True):
            row = (source_text(source), text(target), text(output))
            rows.append(row + ((f"{score:.4f}",) if scored else ()))
    lines = ("\t".join(row) + "\n" for row in rows)
    (workdir.path / f"samples_{split}.tsv").write_text("".join(lines))


def draw(
    workdir: Workdir,
    split: str,
    tokenizers: Tokenizers,
    model: Model,
    params: Params,
    data: Dataset,
    by_length: list[dict[str, Any]],
) -> None:
    """Accuracy by length, and the attention maps of the first examples."""
    examples = data.head(SHOWN)
    maps = hosts.fetch(jax.jit(partial(evaluation.attention_maps, model))(params, examples))
    if not hosts.first():
        return
    from transformer import plots  # matplotlib is not needed before

    plots.accuracy_by_length(
        [row["length"] for row in by_length],
        [row["token_accuracy"] for row in by_length],
        [row["sequence_accuracy"] for row in by_length],
        workdir.plots / f"accuracy_by_length_{split}.png",
    )
    for i in range(len(examples)):
        source, target = (
            [tokenizer.symbol(token) for token in tokens[i] if token != PAD]
            for tokenizer, tokens in (
                (tokenizers.source, examples.source),
                (tokenizers.target, examples.target),
            )
        )
        target_in = [tokenizers.target.symbol(BOS), *target[:-1]]
        labels = {
            "encoder": (source, source),
            "decoder": (target_in, target_in),
            "cross": (target_in, source),
        }
        for kind in (kind for kind in labels if maps[kind]):  # recurrence has no self-attention
            queries, keys = labels[kind]
            plots.attention(
                [layer[i] for layer in maps[kind]],
                queries,
                keys,
                f"{kind} attention, {''.join(source[:-1])}",
                workdir.plots / f"attention_{split}_{i}_{kind}.png",
            )


if __name__ == "__main__":
    cli.run(main)
