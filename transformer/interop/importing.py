"""`import_run`, an ordinary run folder of the weights of another library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer.config import RunConfig, default_config
from transformer.errors import UserError
from transformer.interop import from_ctranslate2, huggingface, opennmt
from transformer.interop.layout import Imported, parameters
from transformer.parallel.mesh import one_device_mesh, place
from transformer.run import Run
from transformer.training.checkpoint import Checkpoints
from transformer.training.step import TrainState
from transformer.workdir import Workdir, commit, versions, write_json

FROZEN = ("*kernel", "*embedding")


class Format(NamedTuple):
    """How to recognise a format, and how to read it."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path, Path | None], Imported]  # of a path, and of a SentencePiece model


FORMATS = {
    "CTranslate2": Format(lambda path: (path / "model.bin").is_file(), from_ctranslate2.read),
    "Hugging Face": Format(lambda path: (path / "config.json").is_file(), huggingface.read),
    "OpenNMT-py": Format(Path.is_file, opennmt.read),
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
        lacking = " (it has no config.json)" if source.is_dir() else ""
        raise UserError(f"{source} is in none of the formats {', '.join(FORMATS)}{lacking}")
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
    rows = {side: getattr(run.tokenizers, side).theirs for side in ("source", "target")}
    for name, value in parameters(imported.tensors, imported.layout, shapes, rows):
        params[name] = jax.block_until_ready(place(value, like.params[name].sharding))

    def zeros(leaf: Any) -> jax.Array:
        return place(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    rest: TrainState = jax.tree.map(zeros, like._replace(params={}))
    never = place(np.array(-1, like.failed.dtype), like.failed.sharding)
    into.plots.mkdir(parents=True)
    with Checkpoints(into.checkpoints, 1, run.config.best_metric, small_files=True) as checkpoints:
        checkpoints.save(rest._replace(params=params, failed=never), {})
