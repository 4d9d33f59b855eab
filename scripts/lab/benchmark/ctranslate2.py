"""CTranslate2, which decodes with a trained Marian's parameters."""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lab.benchmark.contender import Contender, Setting
from lab.benchmark.marian import Network
from lab.benchmark.torch_peer import torch
from transformer.data.tokenizer import BOS, EOS, PAD

ctranslate2: Any = importlib.import_module("ctranslate2")
converting: Any = importlib.import_module("ctranslate2.converters.transformers")


class Numbers:
    """The tokens' numbers in the place of a tokenizer, as far as the converter asks for one."""

    bos_token, eos_token, unk_token = str(BOS), str(EOS), str(PAD)

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.vocabulary)}

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)


class Converter(ctranslate2.converters.Converter):
    """From a Marian that was trained here.

    The loader is Bart's, of which Marian's is a special case for the models of Helsinki: with
    their padding at the end of the vocabulary, as the first token of every target.
    """

    def __init__(self, model: Any):
        self.model = model

    def _load(self) -> Any:
        config = self.model.config
        config.normalize_before = config.normalize_embedding = False
        with torch.no_grad():
            return converting.BartLoader()(self.model, Numbers(config.vocab_size))


class OneWorker(Contender):
    """One batch at a time, each on all threads."""

    def __init__(self, setting: Setting):
        self.setting = setting

    def threading(self) -> dict[str, int]:
        return {"inter_threads": 1, "intra_threads": self.setting.threads}

    def load(self, path: Path) -> None:
        network = Network(self.setting.size)
        network.load_state_dict(torch.load(path, map_location="cpu"))
        gpu = self.setting.device == "gpu"
        with tempfile.TemporaryDirectory() as folder:
            Converter(network.model).convert(folder, force=True)
            self.translator = ctranslate2.Translator(
                folder,
                device="cuda" if gpu else "cpu",
                compute_type="bfloat16" if gpu else "float32",
                **self.threading(),
            )

    def decode(self, source: np.ndarray, batch: int, beams: int, length: int) -> np.ndarray:
        words = [[str(token) for token in row[row != PAD]] for row in source]
        decoded = np.full((len(source), length), PAD, source.dtype)
        # One after another where the batch is 1; otherwise it sorts by length and divides itself.
        calls = [[each] for each in words] if batch == 1 else [words]
        results = [
            result
            for call in calls
            for result in self.translator.translate_batch(
                call,
                beam_size=beams,
                max_batch_size=self.share(batch),
                max_decoding_length=length,
                return_end_token=True,
            )
        ]
        for row, result in zip(decoded, results, strict=True):
            tokens = [int(token) for token in result.hypotheses[0]]
            row[: len(tokens)] = tokens
        return decoded

    def share(self, batch: int) -> int:
        """How many sources a worker gets of a batch."""
        return batch


class WorkerAThread(OneWorker):
    """A worker on each thread, among which the batch is divided."""

    def threading(self) -> dict[str, int]:
        return {"inter_threads": self.setting.threads, "intra_threads": 1}

    def share(self, batch: int) -> int:
        return max(1, batch // self.setting.threads)
