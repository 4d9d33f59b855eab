"""Evaluates a run: restores it by its own saved config, decodes a split, prints, plots.

Usage:
    python eval.py --workdir=runs/toy_reverse [--split=test_longer] [--checkpoint=best]
    python eval.py --workdir=runs/toy_reverse --beam_size=4 [--length_penalty=0.6]
    python eval.py --workdir=runs/translate --data=other.tsv [--out=results]

The results are in the run's folder, or in `--out`: `eval_<split>.json`, `samples_<split>.tsv` and
`plots/`. What is not the default is part of a file's name: `eval_test_beam_size=4.json`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from transformer.data import datasets
from transformer.data.batches import Dataset
from transformer.data.config import DataConfig
from transformer.data.corpus import Corpus, Tokenizers
from transformer.data.tokenizer import BOS, EOS, PAD, Tokenizer
from transformer.errors import UserError
from transformer.inference import evaluation
from transformer.inference.decoding import Beams
from transformer.inference.generation import Decoding
from transformer.inference.text_metrics import TEXT_METRICS, bleu
from transformer.metrics import figure, finalize, mean_over, near_one, percent
from transformer.modules.model import Model, Params
from transformer.parallel import hosts
from transformer.parallel.mesh import check_batch, make_mesh, one_device_mesh, place, replicated
from transformer.training.metrics import by_replica
from transformer.training.step import each_replica
from transformer.training.trained import load
from transformer.workdir import Workdir, write_json

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
SPLIT = flags.DEFINE_string("split", None, "Which split; default the run's data.test.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "latest", "latest, best, or the number of a step.")
DATA = flags.DEFINE_string(
    "data",
    None,
    "A file of pairs (.tsv, .jsonl; or sources,targets) in the place of the run's data.",
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
OUT = flags.DEFINE_string("out", None, "The folder of the results; default the run's.")
BLEU_TOKENIZER = flags.DEFINE_string("bleu_tokenizer", None, "Of sacrebleu; default the run's.")
cli.define_decoding_flags()
cli.define_plugins_flag()
cli.define_host_flags()

SHOWN = 3  # examples whose attention is drawn
TOKENS = 64  # of a text whose attention is drawn, at most
SAMPLES = 50  # outputs written to the samples file
ROWS = 24  # of the table by source length, at most
STEPS = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]  # of those lengths


def main() -> None:
    """Restores, scores, decodes, writes, shows, draws."""
    workdir, decoding = Workdir(WORKDIR.value), cli.decoding()
    cfg = RunConfig.from_config_dict(workdir.read_config())
    own = replace(cfg.data, bleu_tokenizer=BLEU_TOKENIZER.value or cfg.data.bleu_tokenizer)
    split = SPLIT.value or ("test" if DATA.value else own.test)
    margin = cfg.decode_margin if decoding.decode_margin is None else decoding.decode_margin

    cli.set_up_jax(cfg)
    cli.join_hosts()
    mesh = evaluation_mesh(cfg)
    jax.set_mesh(mesh)

    _, tokenizers, model, step, variables, stopped = load(workdir, mesh, CHECKPOINT.value)
    corpus = open_corpus(own, workdir, tokenizers)
    data, references = corpus.load(split, cfg.batch_size), corpus.references(split)
    split = corpus.split(split)  # of a file that the config names
    cfg.model.check_length(data.longest(), f"the longest example of {split}")
    name = name_of(split, decoding, CHECKPOINT.value, DATA.value, corpus.name)
    if own.bleu_tokenizer != cfg.data.bleu_tokenizer:
        name += f"_bleu_tokenizer={own.bleu_tokenizer}"
    out = Path(OUT.value or workdir.path)
    hosts.once(partial(make_room, out))
    facts({"data": f"{corpus.name}, {split}: {len(data):,} examples"})
    facts({"left out": left_out} if (left_out := corpus.left_out()) else {})
    facts({"unknown": unknown} if (unknown := corpus.unknown(split)) else {})
    scores, found = computed(cfg, partial(decoding.decode, margin=margin), model, variables, data)
    replicas = []
    for seed, one, old in zip(
        np.atleast_1d(cfg.seeds()), by_replica((scores, found), cfg.replicas), stopped, strict=True
    ):
        came_to = results(split, data, *jax.tree.map(np.asarray, one))
        decode_text = tokenizers.target.decode
        texts = [decode_text(tokens) for tokens in np.asarray(one[1].tokens)[:, 0].tolist()]
        came_to |= {"text": scores_of_text(own, texts, references)}
        if old:  # stopped by a NaN: nothing is known of it but the counts
            came_to = jax.tree.map(lambda x: np.nan if isinstance(x, float) else x, came_to)
        replicas.append({"seed": int(seed)} | came_to)
    longer, needed = longer_than_outputs(data, margin)
    record = {"step": step, "split": split, "data": DATA.value or corpus.name}
    record |= {"examples": len(data), **decoding.describe(), "decode_margin": margin}
    record |= {"references_beyond_margin": longer, "replicas": replicas}
    write_json(out / f"eval_{name}.json", record)
    first, found = by_replica((variables, found), cfg.replicas)[0]
    if hosts.first():  # files first: whoever reads what is printed may be gone
        samples = out / f"samples_{name}.tsv"
        write_samples(samples, tokenizers, data, jax.tree.map(np.asarray, found))
    by_length = [
        mean_over(rows)
        for rows in zip(*(each["by_source_length"] for each in replicas), strict=True)
    ]
    title = f"{workdir.path}, step {step}, {split}"
    title += f", mean of {cfg.replicas} replicas" if cfg.replicas > 1 else ""
    show(title, split, mean_over([each["metrics"] for each in replicas]), by_length)
    show_text([each["text"] for each in replicas])
    show_limit(margin, longer, needed, [each["outputs_cut"] for each in replicas])
    draw(out / "plots", name, tokenizers, model, first, data, by_length)


def make_room(out: Path) -> None:
    """Makes the folder of the results, now and not after all is computed.

    Raises:
      UserError: it cannot be written to.
    """
    (out / "plots").mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"{out} cannot be written to; name another folder by --out")


def computed(
    cfg: RunConfig, decode: Callable[..., Beams], model: Model, variables: Params, data: Dataset
) -> tuple[evaluation.Totals, Beams]:
    """Scores and outputs of all examples, of all replicas."""
    everywhere = replicated(jax.sharding.get_mesh())
    data = place(data, everywhere)

    def run(function: Callable[..., Any], **options) -> Any:
        of_each = each_replica(partial(function, model), cfg.replicas, in_axes=(0, None))
        return jax.jit(of_each, out_shardings=everywhere, **options)(variables, data)

    options = evaluation.compiler_options()
    return run(evaluation.score), run(decode, compiler_options=options)


def open_corpus(own: DataConfig, workdir: Workdir, tokenizers: Tokenizers) -> Corpus:
    """The run's dataset as the run recorded it, or the file that `--data` names.

    Raises:
      UserError: it is not there, or another than the run's.
    """
    if DATA.value:
        opened = partial(datasets.evaluated_file, own, DATA.value, DATA_DIR.value)
        return Corpus(hosts.in_turn(opened), tokenizers)
    recorded = workdir.read_record()["corpus"]["dataset"]
    opened = partial(datasets.reopened, own, recorded, DATA_DIR.value)
    corpus = Corpus(hosts.in_turn(opened), tokenizers)
    workdir.check_corpus(corpus.identity())
    return corpus


def name_of(split: str, decoding: Decoding, checkpoint: str, data: str | None, dataset: str) -> str:
    """What the files of an evaluation are called: `test`, or `test_beam_size=4_checkpoint=best`.

    What is not the default is part of it, so that no evaluation takes the place of another kind;
    of `--data` also the beginning of the hash that is in the dataset's name.
    """
    usual, described = Decoding(), decoding.describe().items()
    said = [f"{name}={value}" for name, value in described if value != getattr(usual, name)]
    if checkpoint != "latest":
        said.append(f"checkpoint={checkpoint}")
    if data:
        names = ",".join(Path(each.strip()).name for each in data.split(","))
        said.append(f"data={names}-{dataset.split('/')[1][:6]}")
    return "_".join([split, *said])


def results(split: str, data: Dataset, scores: evaluation.Totals, found: Beams) -> dict[str, Any]:
    """What one replica came to, on the whole split and for each length."""
    outputs = np.asarray(found.tokens)[:, 0]
    exact = evaluation.exact_match(outputs, np.asarray(data.target))
    return {
        "outputs_cut": int((outputs != EOS).all(1).sum()),
        "metrics": finalize(scores, split) | {f"{split}/sequence_accuracy": float(exact.mean())},
        "by_source_length": accuracy_by_length(np.asarray(data.source), scores, exact),
    }


def longer_than_outputs(data: Dataset, margin: int) -> tuple[int, int]:
    """How many targets are longer than outputs may be, and the margin with room for all."""
    source, target = ((np.asarray(side) != PAD).sum(1) for side in (data.source, data.target))
    return int((target - source > margin).sum()), int((target - source).max())


def scores_of_text(
    own: DataConfig, outputs: list[str], references: list[list[str]]
) -> dict[str, Any]:
    """The metrics that a run names; where references are several, also against the first alone."""
    metrics = TEXT_METRICS | {"bleu": partial(bleu, tokenizer=own.bleu_tokenizer)}
    against = {"": references}
    if any(len(own) > 1 for own in references):
        against = {", any reference": references, ", first reference": [r[:1] for r in references]}
    return {
        f"{name}{which}": metrics[name](outputs, right)._asdict()
        for name in own.metrics
        for which, right in against.items()
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
    facts({name: each["warning"] for name, each in texts[0].items() if each["warning"]})


def show_limit(margin: int, longer: int, needed: int, cut: list[int]) -> None:
    """Says what the limit of outputs cut, of each replica, or would have to, if anything."""
    spread = f"{min(cut):,}" + (f" to {max(cut):,}" if min(cut) < max(cut) else "")
    said = [f"{spread} outputs were cut"] if any(cut) else []
    if longer:
        said += [f"{longer:,} targets are longer; --decode_margin={needed} has room for all"]
    if said:
        limit = f"{margin} tokens more than the source (decode_margin)"
        facts({"limit": f"an output has at most {limit}: {', '.join(said)}"})


def evaluation_mesh(cfg: RunConfig) -> Mesh:
    """The mesh that the run was trained on, or one device where that is not to be had.

    Several processes must have the mesh: each has a part in it.
    """
    try:
        mesh = make_mesh(cfg.mesh, cfg.replicas)
        check_batch(mesh, cfg.batch_size)
    except UserError:
        if hosts.several():
            raise
        mesh = one_device_mesh()
    return mesh


def accuracy_by_length(
    source: np.ndarray, scores: evaluation.Totals, exact: np.ndarray
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
        metrics = finalize({name: each[chosen] for name, each in scores.items()}, "length")
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
                near_one(np.exp(row["loss"])),
                percent(row["token_accuracy"]),
                percent(row["sequence_accuracy"]),
            )
            for row in (*by_length, whole)
        ],
    )


def write_samples(path: Path, tokenizers: Tokenizers, data: Dataset, found: Beams) -> None:
    r"""`samples_<split>.tsv`: source, target and output of the first examples.

    Of beam search each hypothesis has a line, the best first, with its score. In a text \t, \n, \r
    and \\ stand for a tab, the ends of lines and a backslash.
    """
    source_text, text = tokenizers.source.decode, tokenizers.target.decode
    scored = found.tokens.shape[1] > 1
    rows = [["source", "target", "output"] + ["score"] * scored]
    columns = (data.source, data.target, found.tokens, found.scores)
    for source, target, tokens, scores in zip(
        *(column[:SAMPLES].tolist() for column in columns), strict=True
    ):
        for output, score in zip(tokens, scores, strict=True):
            row = [source_text(source), text(target), text(output), f"{score:.4f}"]
            rows.append([escaped(field) for field in row[: len(rows[0])]])
    lines = ("\t".join(row) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def escaped(text: str) -> str:
    r"""`text` in a field of a TSV file: a\tb for an a, a tab and a b."""
    return text.translate({92: r"\\", 9: r"\t", 10: r"\n", 13: r"\r"})


def draw(
    plots_in: Path,
    name: str,
    tokenizers: Tokenizers,
    model: Model,
    params: Params,
    data: Dataset,
    by_length: list[dict[str, Any]],
) -> None:
    """Accuracy by length, and the attention maps of the first examples that are short enough."""
    sides = [np.asarray(side) for side in (data.source, data.target)]
    lengths = np.max([(side != PAD).sum(1) for side in sides], axis=0)
    shown = np.flatnonzero(lengths <= TOKENS)[:SHOWN]
    short = [side[shown, :TOKENS] for side in sides]
    if shown.tolist() != list(range(min(SHOWN, len(data)))):
        facts(
            {"plots": f"attention is drawn of texts of at most {TOKENS} tokens: {len(shown)} here"}
        )
    maps = {}
    with attempted("attention"):
        program = jax.jit(partial(evaluation.attention_maps, model))
        maps = hosts.fetch(program(params, Dataset(short[0], short[1], len(shown))))
    if not hosts.first():
        return
    from transformer.inference import plots  # matplotlib is not needed before

    with attempted("accuracy by length"):
        plots.accuracy_by_length(
            [row["length"] for row in by_length],
            [row["token_accuracy"] for row in by_length],
            [row["sequence_accuracy"] for row in by_length],
            plots_in / f"accuracy_by_length_{name}.png",
        )
    unknown = ""
    for i, example in enumerate(shown):
        source, lost = labels(tokenizers.source, short[0][i])
        target, lost_too = labels(tokenizers.target, short[1][i])
        unknown += lost + lost_too
        target_in = [tokenizers.target.symbol(BOS), *target[:-1]]
        axes = {
            "encoder": (source, source),
            "decoder": (target_in, target_in),
            "cross": (target_in, source),
        }
        for kind in (kind for kind in axes if maps.get(kind)):  # recurrence: no self-attention
            with attempted(f"{kind} attention of example {example + 1}"):
                panels = [layer[i] for layer in maps[kind]]
                title = f"{kind} attention, {(' ' * bool(lost)).join(source[:-1])}"
                file = plots_in / f"attention_{name}_{example}_{kind}.png"
                plots.attention(panels, *axes[kind], title, file)
    if unknown:
        characters = " ".join(map(repr, dict.fromkeys(unknown)))
        facts(
            {"plots": f"the font lacks {characters[:60]}: the numbers of tokens are drawn instead"}
        )


@contextlib.contextmanager
def attempted(what: str) -> Iterator[None]:
    """Turns a failure to draw into a line: no plot is worth an evaluation."""
    try:
        yield
    except Exception as error:  # whatever Matplotlib or a full memory may raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        facts({"plots": f"{what} is not drawn ({reason[:200]})"})


def labels(tokenizer: Tokenizer, tokens: np.ndarray) -> tuple[list[str], str]:
    """The tokens of a row as text, or as numbers if the font lacks characters of it: which."""
    from transformer.inference import plots

    own = [token for token in tokens.tolist() if token != PAD]
    symbols = [tokenizer.symbol(token) for token in own]
    lost = plots.without_glyph("".join(symbols))
    return ([str(token) for token in own] if lost else symbols), lost


if __name__ == "__main__":
    cli.run(main)
