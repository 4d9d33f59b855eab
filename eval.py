"""Evaluates a run: restores it by its own saved config, decodes a split, prints, plots.

Usage:
    python eval.py --workdir=runs/toy_reverse [--split=test_longer] [--checkpoint=best]
    python eval.py --workdir=runs/toy_reverse --beam_size=4 [--length_penalty=0.6]
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from transformer import cli, evaluation, hosts, sharding
from transformer.config import RunConfig
from transformer.console import figure, percent, perplexity, table
from transformer.data.batches import Dataset
from transformer.data.load import Corpus
from transformer.data.tokenizer import BOS, PAD
from transformer.decoding import Beams, beam_search, greedy
from transformer.errors import UserError
from transformer.metrics import by_replica, mean_over
from transformer.model import Model, Params
from transformer.trained import load
from transformer.training import each_replica
from transformer.workdir import Workdir, write_json

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
SPLIT = flags.DEFINE_string("split", None, "Which split; default the run's data.test.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or the number of a step.")
BEAM_SIZE = flags.DEFINE_integer("beam_size", 1, "Hypotheses; 1: greedy decoding.", lower_bound=1)
LENGTH_PENALTY = flags.DEFINE_float(
    "length_penalty", 0.6, "Of beam search; 0: none, more favours longer outputs.", lower_bound=0.0
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
cli.define_host_flags()

SHOWN = 3  # examples whose attention is drawn
SAMPLES = 50  # outputs written to the samples file


def main() -> None:
    """Restores, scores, decodes, shows, writes."""
    workdir = Workdir(WORKDIR.value)
    cfg = RunConfig.resolve(workdir.read_config())
    split = SPLIT.value or cfg.data.test

    cli.set_up_jax(cfg)
    cli.join_hosts()
    mesh = evaluation_mesh(cfg)
    jax.set_mesh(mesh)

    _, corpus, model, step, variables, stopped = load(
        workdir, mesh, CHECKPOINT.value, DATA_DIR.value
    )
    data = corpus.load(split, cfg.batch_size)
    cfg.model.check_length(data.longest(), f"the longest example of {split}")
    data = sharding.place(data, sharding.replicated(mesh))

    def each(function, **options):
        return jax.jit(
            each_replica(partial(function, model), cfg.replicas, in_axes=(0, None)),
            out_shardings=sharding.replicated(mesh),
            **options,
        )

    scores = each(evaluation.score)(variables, data)
    length = cfg.model.reach(data.source.shape[1] + cfg.decode_margin)
    decode = each(
        partial(evaluation.decode, length=length, search=search()),
        compiler_options=evaluation.compiler_options(),
    )
    found = decode(variables, data)
    data = jax.tree.map(np.asarray, data)
    replicas = []
    for seed, one, old in zip(
        np.atleast_1d(cfg.seeds()), by_replica((scores, found), cfg.replicas), stopped, strict=True
    ):
        came_to = results(split, data, *jax.tree.map(np.asarray, one))
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
    decoding = {"beam_size": BEAM_SIZE.value}
    decoding |= {"length_penalty": LENGTH_PENALTY.value} if BEAM_SIZE.value > 1 else {}
    write_json(
        workdir.path / f"eval_{split}.json",
        {"step": step, "split": split, **decoding, "replicas": replicas},
    )
    first, found = by_replica((variables, found), cfg.replicas)[0]
    if hosts.first():
        write_samples(workdir, split, corpus, data, jax.tree.map(np.asarray, found))
    draw(workdir, split, corpus, model, first, data, by_length)


def search() -> Callable[..., Beams]:
    """How outputs are looked for."""
    if BEAM_SIZE.value > 1:
        return partial(beam_search, beam_size=BEAM_SIZE.value, length_penalty=LENGTH_PENALTY.value)
    return lambda *args: Beams(greedy(*args)[:, None], jnp.zeros((len(args[1]), 1)))


def results(split: str, data: Dataset, scores: evaluation.Scores, found: Beams) -> dict[str, Any]:
    """What one replica came to, on the whole split and for each length."""
    exact = evaluation.exact_match(np.asarray(found.tokens)[:, 0], np.asarray(data.target))
    return {
        "metrics": scores.metrics(split) | {f"{split}/sequence_accuracy": float(exact.mean())},
        "by_source_length": accuracy_by_length(np.asarray(data.source), scores, exact),
    }


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
    """For each source length (without EOS): how many sequences, and how well they went."""
    lengths = (source != PAD).sum(1) - 1
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
    workdir: Workdir, split: str, corpus: Corpus, data: Dataset, found: Beams
) -> None:
    """`samples_<split>.tsv`: source, target and output of the first examples.

    Of beam search each hypothesis has a line, the best first, with its score.
    """
    text = corpus.tokenizer.decode
    rows = [("source", "target", "output") + (("score",) if BEAM_SIZE.value > 1 else ())]
    columns = (data.source, data.target, found.tokens, found.scores)
    for source, target, tokens, scores in zip(
        *(column[:SAMPLES].tolist() for column in columns), strict=True
    ):
        for output, score in zip(tokens, scores, strict=True):
            row = (text(source), text(target), text(output))
            rows.append(row + ((f"{score:.4f}",) if BEAM_SIZE.value > 1 else ()))
    lines = ("\t".join(row) + "\n" for row in rows)
    (workdir.path / f"samples_{split}.tsv").write_text("".join(lines))


def draw(
    workdir: Workdir,
    split: str,
    corpus: Corpus,
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
            [corpus.tokenizer.symbol(token) for token in tokens[i] if token != PAD]
            for tokens in (examples.source, examples.target)
        )
        target_in = [corpus.tokenizer.symbol(BOS), *target[:-1]]
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
