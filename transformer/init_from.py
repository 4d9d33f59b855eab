"""Starting from another run: its tokenizers, and those of its parameters that fit."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from transformer.config import differences, fixed_knobs
from transformer.console import facts
from transformer.errors import UserError
from transformer.knobs import match_names
from transformer.modules.model import Params
from transformer.training.step import TrainState

if TYPE_CHECKING:
    from transformer.run import Run

SHOWN = 3  # the most names in a message


def open_source(run: "Run") -> "Run | None":
    """The run that `init_from` names, on the mesh of `run`; None once `run` has a checkpoint."""
    folder, replicas = run.config.init_from, run.config.replicas
    if not folder or run.is_trained:
        return None
    try:
        source = type(run).saved(folder, mesh=run.mesh)
    except UserError as error:
        raise UserError(f"init_from: {error}") from error
    if not source.is_trained:
        raise UserError(f"init_from: {folder} has no checkpoint yet; name a run that has one")
    if source.config.replicas not in (1, replicas):
        found = f"init_from: {folder} has {source.config.replicas} replicas and this run {replicas}"
        raise UserError(f"{found}; name a single run, or one of as many replicas")
    return source


def tokenizer_folder(run: "Run") -> Path | None:
    """The tokenizers of `run.source`; None without it, or if the config asks for others."""
    if run.source is None:
        return None
    here, there = run.config, run.source.config
    knobs = [name.split(".") for name in fixed_knobs(here) | fixed_knobs(there)]
    same = all(getattr(here.data, k) == getattr(there.data, k) for s, k in knobs if s == "data")
    return run.source.workdir.tokenizers if same else None


def excluded_names(run: "Run", source: "Run") -> set[str]:
    """The variables of both runs that `init_new` matches; a UserError if others do not fit."""
    folder, here, there = run.config.init_from, run.model.shapes, source.model.shapes
    names = sorted(here.keys() | there.keys())
    excluded = match_names(run.config.init_new, names, "init_new")
    faults, foreign = [], foreign_tables(run, source)
    for name in [name for name in names if name not in excluded]:
        own, other = (list(x[name].shape) if name in x else None for x in (here, there))
        if other is None or own is None:
            faults.append(f"{name} is only {'there' if own is None else 'here'}")
        elif own != other:
            faults.append(f"{name} is {other} there and {own} here")
        elif name in foreign:
            faults.append(f"{name} is of another vocabulary")
    if faults:
        layers = [re.sub(r"(.*/layers/\d+)/.*", r"\1/*", fault.split()[0]) for fault in faults]
        patterns = [f"'{name}'" for name in dict.fromkeys(layers)]
        remedy = f"{', '.join(patterns[:SHOWN])}{', …' * (len(patterns) > SHOWN)}"
        remedy = f'make the configs agree, or initialise anew: --config.init_new="({remedy},)"'
        knobs = ("model.", "data.tokenizer", "data.target_tokenizer", "data.vocab")
        changed = differing(run, source, knobs)
        faults = f"{shorten(faults)}{f' ({changed})' if changed else ''}"
        raise UserError(f"init_from={folder} does not fit: {faults}; {remedy}")
    if here.keys() <= excluded:
        raise UserError(f"init_new leaves nothing of init_from={folder}; name fewer parameters")
    return excluded


def differing(run: "Run", source: "Run", knobs: tuple[str, ...]) -> str:
    """Says which of the knobs differ: `model.norm: layer → rms`."""
    old, new = (ConfigDict(asdict(each.config)) for each in (source, run))
    return "; ".join(each for each in differences(old, new) if each.startswith(knobs))


def foreign_tables(run: "Run", source: "Run") -> set[str]:
    """The embedding tables, and bias of the logits, whose tokens are not those in `source`."""
    here, there = (each.tokenizers.digests() for each in (run, source))
    source_differs, target_differs = (here[side] != there[side] for side in here)
    shared = run.config.model.tie_embeddings in ("all", "inputs") and target_differs
    names = {"embedding/embedding"} if source_differs or shared else set()
    of_target = {"target_embedding/embedding", "output_embedding/embedding", "logits_bias"}
    return names | of_target if target_differs else names


def initial_state(run: "Run") -> TrainState:
    """The state before the first step, with the variables of `run.source` if it has one."""
    config, source, own = run.config, run.source, run.model.shapes
    if source is None:
        return run.init(config.seeds(), config.hparams())
    excluded, saved = excluded_names(run, source), source.restore()
    given = {name: leaf for name, leaf in saved.variables().items() if name not in excluded}
    counts = f"{len(given)} of {len(own)} parameters from {config.init_from}"
    lists = {"new": own.keys() & excluded, "left behind": excluded - own.keys()}
    parts = [f"; {what}: {shorten(sorted(each))}" for what, each in lists.items() if each]
    facts({"init": f"{counts}, step {saved.taken():,}{''.join(parts)}"})
    facts({"differs": differing(run, source, ("model.",))})
    del saved  # frees the optimizer state before that of this run is allocated
    state, like = run.init(config.seeds(), config.hparams()), run.abstract_state
    likes = {name: (like.params | like.batch_stats)[name] for name in given}

    def copy(variables: Params) -> Params:  # to each replica
        return {name: jnp.broadcast_to(x, likes[name].shape) for name, x in variables.items()}

    where = {name: leaf.sharding for name, leaf in likes.items()}
    params, batch_stats = run.model.split(jax.jit(copy, out_shardings=where)(given))
    params = state.params | params
    ema_params = {name: jnp.copy(params[name]) for name in state.ema_params}  # both are donated
    batch_stats = state.batch_stats | batch_stats
    return state._replace(params=params, batch_stats=batch_stats, ema_params=ema_params)


def shorten(parts: Sequence[str]) -> str:
    """The first parts, and how many more there are."""
    more = len(parts) - SHOWN
    return ", ".join(parts[:SHOWN]) + f", and {more} more" * (more > 0)
