"""CTranslate2, which decodes with the parameters of a trained Marian."""

import importlib
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lab.benchmark.contender import Contender, Setting
from lab.benchmark.task import BOS, EOS, PAD
from lab.benchmark.torch_peers import MarianNetwork, torch

ctranslate2: Any = importlib.import_module("ctranslate2")
loaders: Any = importlib.import_module("ctranslate2.converters.transformers")


class IdTokenizer:
    """Token ids as words, in place of a tokenizer, as far as the converter needs one."""

    bos_token, eos_token, unk_token = str(BOS), str(EOS), str(PAD)

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.vocabulary)}

    def convert_ids_to_tokens(self, token: int) -> str:
        return str(token)


class Converter(ctranslate2.converters.Converter):
    """Converts a Marian trained here.

    By the loader of Bart: that of Marian expects padding at the end of the vocabulary, and as
    the first token of every target, as in the models of Helsinki-NLP.
    """

    def __init__(self, model: Any):
        self.model = model

    def _load(self) -> Any:
        config = self.model.config
        config.normalize_before = config.normalize_embedding = False
        with torch.no_grad():
            return loaders.BartLoader()(self.model, IdTokenizer(config.vocab_size))


class CTranslate2(Contender):
    """One worker per thread, among which CTranslate2 divides a batch, sorted by length."""

    def __init__(self, setting: Setting):
        self.setting = setting

    def load(self, path: Path) -> None:
        network = MarianNetwork(self.setting.size)
        network.load_state_dict(torch.load(path, map_location="cpu"))
        gpu = self.setting.device == "gpu"
        with tempfile.TemporaryDirectory() as folder:
            Converter(network.model).convert(folder, force=True)
            self.translator = ctranslate2.Translator(
                folder,
                device="cuda" if gpu else "cpu",
                compute_type="bfloat16" if gpu else "float32",
                inter_threads=self.setting.threads,
                intra_threads=1,
            )

    def decode(self, source: np.ndarray, batch: int, beams: int, length: int) -> np.ndarray:
        words = [[str(token) for token in row[row != PAD]] for row in source]
        options = {
            "beam_size": beams,
            "max_batch_size": max(1, batch // self.setting.threads),
            "max_decoding_length": length,
            "return_end_token": True,
        }
        parts = [[each] for each in words] if batch == 1 else [words]
        results = [self.translator.translate_batch(part, **options) for part in parts]
        decoded = np.full((len(source), length), PAD, source.dtype)
        for row, result in zip(decoded, itertools.chain(*results), strict=True):
            tokens = [int(token) for token in result.hypotheses[0]]
            row[: len(tokens)] = tokens
        return decoded
