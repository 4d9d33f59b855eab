"""Metrics of decoded text while a run trains."""

from typing import TYPE_CHECKING

import jax
import numpy as np

from transformer.console import facts
from transformer.data.batches import Dataset
from transformer.inference.decoding import GREEDY
from transformer.inference.text_metrics import TEXT_METRICS, Texts
from transformer.parallel import hosts
from transformer.parallel.replicas import is_stopped, mask_stopped, split_replicas
from transformer.training.step import TrainState

if TYPE_CHECKING:
    from transformer.run import Run


class TextValidation:
    """Decodes evenly spaced examples of validation, and computes the text metrics of the config."""

    def __init__(self, run: "Run"):
        self.run, config, data = run, run.config, run.data["validation"]
        count = min(config.decode_examples, len(data))
        rows = np.arange(count) * len(data) // count
        self.data = Dataset(data.source[rows], data.target[rows], config.batch_size)
        references = run.corpus.references(config.data.validation)
        self.references = [references[row] for row in rows]
        # Finds now, and not during training, that a package is missing.
        perfect = self.texts([own[0] for own in self.references])
        scores = {name: TEXT_METRICS[name].score(perfect) for name in config.text_metrics()}
        facts({name: score.warning for name, score in scores.items()})

    def texts(self, outputs: list[str]) -> Texts:
        return Texts(outputs, self.references, self.run.config.data.bleu_tokenizer)

    def metrics(self, state: TrainState) -> list[dict[str, float]]:
        """`validation/name` → value in percent, of the greedy outputs of each replica."""
        run, config = self.run, self.run.config
        with jax.set_mesh(run.mesh):
            found = run.decode(state.variables(), self.data, GREEDY)

        def score(tokens: np.ndarray) -> dict[str, float]:
            texts = self.texts([run.tokenizers.target.decode(row) for row in tokens[:, 0].tolist()])
            names = config.text_metrics()
            return {f"validation/{name}": TEXT_METRICS[name].score(texts).value for name in names}

        replicas = split_replicas(found.tokens, config.replicas)
        metrics = hosts.once(lambda: [score(tokens) for tokens in replicas])
        return mask_stopped(metrics, is_stopped(state.skipped, config.max_skipped_steps))
