"""`import_run`, an ordinary run folder of the weights of another library."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer.config import RunConfig, default_config
from transformer.data.corpus import Tokenizers
from transformer.data.imported import ImportedTokenizer, TokenIds
from transformer.errors import UserError, explained
from transformer.interop import from_ctranslate2, huggingface
from transformer.interop.huggingface_tokenizers import read_tokenizers
from transformer.interop.layout import TABLES, check_names, to_ours
from transformer.parallel.mesh import one_device_mesh, place
from transformer.run import Run
from transformer.training.checkpoint import Checkpoints
from transformer.training.step import TrainState
from transformer.workdir import Workdir, commit, versions, write_json

FROZEN = ("*kernel", "*embedding")
Shapes = Mapping[str, tuple[int, ...]]  # of parameters


@dataclass(frozen=True)
class Imported:
    """A model of another library in our terms."""

    family: str
    knobs: dict[str, Any]  # of ModelConfig
    decoding: dict[str, Any]  # knobs of DecodingConfig
    tokenizers: Tokenizers
    params: Callable[[Shapes], Iterator[tuple[str, np.ndarray]]]  # names and values, in turn


class Format(NamedTuple):
    """How to recognise a format, and how to read it."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path, Path | None], Imported]  # of a path, and of a SentencePiece model


def read_huggingface(folder: Path, tokenizer: Path | None) -> Imported:
    """Reads a folder of Hugging Face Transformers."""
    model = huggingface.read_model(folder)
    check_names(model.tensors, model.layout, model.ignored)
    tokenizers = read_tokenizers(folder, model, tokenizer)
    rows = {"source": tokenizers.source.theirs, "target": tokenizers.target.theirs}

    def params(shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
        for theirs, (name,) in model.layout.items():
            tokens = rows[TABLES[name]] if name in TABLES else None
            yield name, to_ours(model.tensors[theirs], name, shapes[name], tokens)

    return Imported(model.family, model.knobs, model.decoding, tokenizers, params)


def read_ctranslate2(folder: Path, tokenizer: Path | None) -> Imported:
    """Reads a model folder of CTranslate2, which holds a vocabulary; see `import_run`."""
    model, made = from_ctranslate2.read(folder), []
    kind, data = "pieces", b""
    if tokenizer is not None:
        with explained(f"{tokenizer}: name a SentencePiece model that can be read", OSError):
            kind, data = "sentencepiece", tokenizer.read_bytes()
    for side in ("target", "source"):
        ids, pieces = TokenIds(**model.ids[side]), model.pieces[side]
        size = len(pieces)
        made.append(ImportedTokenizer.make(kind, data, pieces=pieces, ids=ids, size=size).sides())
    shared = model.pieces["source"] is model.pieces["target"]
    tokenizers = Tokenizers(made[0 if shared else 1][0], made[0][1])
    rows = {"source": tokenizers.source.theirs, "target": tokenizers.target.theirs}
    params = partial(model.params, rows=rows)
    return Imported("Transformer", model.knobs, model.decoding, tokenizers, params)


FORMATS = {
    "CTranslate2": Format(lambda path: (path / "model.bin").is_file(), read_ctranslate2),
    "Hugging Face": Format(lambda path: (path / "config.json").is_file(), read_huggingface),
}


def import_run(
    source: Path,
    workdir: Path,
    *,
    tokenizer: Path | None = None,
    source_prefix: str | None = None,
    target_prefix: str | None = None,
) -> Run:
    """Writes the run folder `workdir` of the weights in `source`; returns its run.

    Args:
      source: a folder or file in one of `FORMATS`.
      workdir: a new folder.
      tokenizer: a SentencePiece model, for a folder that holds only a vocabulary.
      source_prefix, target_prefix: see `ImportedTokenizer.prefixed`.
    """
    if workdir.exists():
        raise UserError(f"{workdir} already exists; choose another --workdir, or delete it")
    if not source.exists():
        raise UserError(f"{source}: there is no such folder; name one that holds a model")
    found = [name for name, each in FORMATS.items() if each.recognises(source)]
    if not found:
        formats = ", ".join(FORMATS)
        lacking = " (it has no config.json)" if source.is_dir() else ""
        raise UserError(f"{source} is in none of the formats {formats}{lacking}")
    imported = FORMATS[found[0]].read(source, tokenizer)
    tokenizers = imported.tokenizers.prefixed(source_prefix, target_prefix)
    config = _config(imported, shared=tokenizers.shared())
    into = Workdir(str(workdir))
    run = Run(RunConfig.from_config_dict(config), workdir, mesh=one_device_mesh())
    run.tokenizers = tokenizers
    _write_checkpoint(run, into, imported)
    tokenizers.save(into.tokenizers)
    # Last: a folder without it holds no run.
    record = {"config": config.to_dict(), "corpus": {"dataset": ""} | tokenizers.digests()}
    origin = {"from": str(source), "format": found[0], "family": imported.family}
    record |= {"versions": versions(), "commit": commit(), "imported": origin}
    write_json(into.config, record)
    return run


def _config(imported: Imported, *, shared: bool) -> Any:
    """The config of the run, in which large parameters are frozen: they have no optimizer state."""
    config = default_config()
    config.model.update(imported.knobs)
    config.decoding.update(imported.decoding)
    config.data.tokenizer = "imported"
    if not shared:
        config.data.target_tokenizer = "imported"
    config.optimizer.name, config.freeze = "sgd", FROZEN
    return config


def _write_checkpoint(run: Run, into: Workdir, imported: Imported) -> None:
    """Writes the state before the first step, with the imported parameters, read one by one."""
    like = run.abstract_state
    shapes = {name: leaf.shape for name, leaf in like.params.items()}
    params = {}
    for name, value in imported.params(shapes):
        params[name] = place(value, like.params[name].sharding)
    if lacking := sorted(shapes.keys() - params.keys()):
        raise UserError(f"the weights lack what {lacking[0]} holds: check the config file")

    def zeros(leaf: Any) -> jax.Array:
        return place(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    rest: TrainState = jax.tree.map(zeros, like._replace(params={}))
    never = place(np.array(-1, like.failed.dtype), like.failed.sharding)
    into.plots.mkdir(parents=True)
    with Checkpoints(into.checkpoints, 1, run.config.best_metric) as checkpoints:
        checkpoints.save(rest._replace(params=params, failed=never), {})
