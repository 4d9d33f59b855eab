"""Texts a second of `scripts/predict.py`'s generator beside Hugging Face's `generate`.

A trained run's model, on its own test split, and a Marian of the same width, layers, heads and
vocabulary take turns: one text at a time, and 128. What is timed goes from text to text, by the
same tokenizer. Marian's parameters are random, for its time does not depend on them: it is told to
make as many tokens as the longest of this code's outputs in each batch has, and gets its batches
sorted by length. Both search greedily; it needs `pip install -e '.[bench]'`.

Usage:
    python scripts/measure_predict.py --workdir=runs/pronunciations [--rounds=7]
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from lab.benchmark.task import SIZES
from lab.claims.measuring import interleaved

from transformer import cli
from transformer.config import RunConfig
from transformer.console import facts, table
from transformer.data.load import open_corpus
from transformer.data.ragged import Ragged
from transformer.errors import UserError, needs
from transformer.inference.generation import Generator
from transformer.parallel.sharding import cores
from transformer.training.workdir import Workdir

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the run.", required=True)
DATA_DIR = flags.DEFINE_string("data_dir", None, "Where TFDS keeps datasets; default its own.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each.", lower_bound=1)

TEXTS = {1: 32, 128: 512}  # texts at a time → texts in a turn


def main() -> None:
    """Both take turns at each size of a batch; the table has the ratios."""
    cfg = RunConfig.resolve(Workdir(WORKDIR.value).read_config())
    cli.set_up_jax(cfg)
    generator = Generator(WORKDIR.value)
    if cfg.model.architecture != "transformer" or cfg.model.num_kv_heads or cfg.model.d_k:
        raise UserError(f"{WORKDIR.value}: Marian has no such model; choose a plain Transformer's")
    corpus = open_corpus(cfg.data, DATA_DIR.value, Workdir(WORKDIR.value).tokenizers)
    texts = corpus.texts(cfg.data.test)[0]
    peer = marian(cfg, generator)
    calls: dict[tuple[int, str], Callable[[], Any]] = {}
    for batch, count in TEXTS.items():
        some = texts[:count]
        parts = [some[k : k + 1] for k in range(count)] if batch == 1 else [some]
        found = generator.generate(some)
        longest = [len(own[0].tokens) + 1 for own in found]

        def ours(parts=parts, batch=batch):
            return [generator.generate(part, batch_size=batch) for part in parts]

        calls[batch, "this code"] = ours
        calls[batch, "Hugging Face Marian"] = peer(some, longest, batch)
    seconds = interleaved(calls, ROUNDS.value, 0.0)
    rows = []
    for batch, count in TEXTS.items():
        own, other = (np.array(seconds[batch, who]) for who in ("this code", "Hugging Face Marian"))
        ratio = other / own
        spread = f"{np.median(ratio):.1f} [{ratio.min():.1f}, {ratio.max():.1f}]"
        rows.append(
            (str(batch), *(f"{count / np.median(each):,.0f}" for each in (own, other)), spread)
        )
    facts({"run": f"{WORKDIR.value}, step {generator.step}", "cores": str(cores())})
    columns = ("at a time", "this code", "Hugging Face Marian", "times as fast")
    table(f"texts a second, greedy, {ROUNDS.value} rounds", columns, rows)


def marian(cfg: RunConfig, generator: Generator) -> Callable[..., Callable[[], list[str]]]:
    """(texts, lengths of their outputs, batch size) → a call that generates as many tokens."""
    with needs("bench"):
        import torch
        from lab.benchmark.marian import Network
    source, target = generator.tokenizers
    size = dataclasses.replace(
        SIZES["cpu"]["tiny"],
        width=cfg.model.d_model,
        heads=cfg.model.num_heads,
        ff_width=cfg.model.d_ff,
        layers=cfg.model.num_layers,
        vocabulary=max(source.vocab_size, target.vocab_size),
        longest=512,
    )
    torch.set_num_threads(cores())
    model = Network(size).eval().model

    def generate(texts: list[str], lengths: list[int], batch: int) -> list[str]:
        order = np.argsort([len(text) for text in texts], kind="stable")
        outputs = [""] * len(texts)
        for begin in range(0, len(texts), batch):
            rows = order[begin : begin + batch].tolist()
            tokens = Ragged.of(source.encode_all([texts[row] for row in rows]))
            ids = torch.from_numpy(tokens.padded(int(tokens.lengths().max()))).long()
            room = max(lengths[row] for row in rows)
            with torch.inference_mode():
                found = model.generate(
                    input_ids=ids,
                    attention_mask=(ids != 0).long(),
                    min_new_tokens=room,
                    max_new_tokens=room,
                    num_beams=1,
                    do_sample=False,
                )
            for row, own in zip(rows, found[:, 1:].tolist(), strict=True):
                outputs[row] = target.decode(own)
        return outputs

    return lambda texts, lengths, batch: lambda: generate(list(texts), lengths, batch)


if __name__ == "__main__":
    cli.run(main)
