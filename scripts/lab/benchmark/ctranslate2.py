"""CTranslate2, which decodes with the parameters of a trained Marian."""

import importlib
import itertools
import tempfile
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
    convert_ids_to_tokens = staticmethod(str)

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.vocabulary)}


class CTranslate2(Contender):
    """One worker per thread, among which CTranslate2 divides a batch, sorted by length."""

    def __init__(self, setting: Setting):
        self.setting = setting

    def load(self, path: str) -> None:
        network = MarianNetwork(self.setting.size)
        network.load_state_dict(torch.load(path, map_location="cpu"))
        config = network.model.config
        config.normalize_before = config.normalize_embedding = False
        # The loader of Bart: that of Marian expects padding at the end of the vocabulary, and as
        # the first token of every target, as in the models of Helsinki-NLP.
        with torch.no_grad():
            model = loaders.BartLoader()(network.model, IdTokenizer(config.vocab_size))
        model.validate()
        model.optimize()
        gpu = self.setting.device == "gpu"
        device, dtype = ("cuda", "bfloat16") if gpu else ("cpu", "float32")
        threads = {"inter_threads": self.setting.threads, "intra_threads": 1}
        with tempfile.TemporaryDirectory() as folder:
            model.save(folder)
            options = {"device": device, "compute_type": dtype} | threads
            self.translator = ctranslate2.Translator(folder, **options)

    def decode(self, source: np.ndarray, batch: int, beams: int, length: int) -> np.ndarray:
        words = [[str(token) for token in row[row != PAD]] for row in source]
        options = {"beam_size": beams, "max_decoding_length": length, "return_end_token": True}
        options["max_batch_size"] = max(1, batch // self.setting.threads)
        parts = [[each] for each in words] if batch == 1 else [words]
        results = [self.translator.translate_batch(part, **options) for part in parts]
        decoded = np.full((len(source), length), PAD, source.dtype)
        for row, result in zip(decoded, itertools.chain(*results), strict=True):
            row[: len(result.hypotheses[0])] = list(map(int, result.hypotheses[0]))
        return decoded
