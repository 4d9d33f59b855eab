"""This library with the parameters of a trained Marian, imported from a folder of Hugging Face."""

import dataclasses
import json
import tempfile
from functools import partial
from pathlib import Path

from lab.benchmark.contender import Contender, Schedule, Setting
from lab.benchmark.ours import Ours, run_config
from lab.benchmark.torch_peers import MarianNetwork, torch
from transformer.interop.importing import import_run


class FromMarian(Ours, Contender):
    """Decodes by the rules of `generate`, or as a model that was trained here."""

    def __init__(self, setting: Setting, *, trained_here: bool):
        super().__init__(setting)
        self.trained_here = trained_here

    def start(self, seed: int, schedule: Schedule) -> None:
        """Nothing: it is not trained."""

    def load(self, path: str) -> None:
        network, size = MarianNetwork(self.setting.size), self.setting.size
        network.load_state_dict(torch.load(path, map_location="cpu"))
        with tempfile.TemporaryDirectory() as name:
            theirs, workdir = Path(name, "theirs"), Path(name, "run")
            network.model.save_pretrained(theirs)
            words = {str(token): token for token in range(size.vocabulary)}
            (theirs / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
            run = import_run(theirs, workdir)
            self.variables, self.placed = dict(run.trained_model().variables), {}
        own = run_config(self.setting, self.schedule, self.batch_size)
        self.run = self.make_run(dataclasses.replace(own, model=run.config.model))
        if not self.trained_here:
            self.run.tokenizers = run.tokenizers
            self.rules = dataclasses.replace(run.config.decoding, max_length=None)


Imported = partial(FromMarian, trained_here=False)
Same = partial(FromMarian, trained_here=True)
