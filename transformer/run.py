"""A run: the mesh, data, model, state and compiled functions that a config describes."""

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transformer import init_from, run_training
from transformer.config import RunConfig
from transformer.data import datasets
from transformer.data.batches import Dataset
from transformer.data.corpus import Corpus, Tokenizers, open_corpus, saved_tokenizers
from transformer.data.packing import TokenRows, filter_by_length, pack_rows, unpacked_rows
from transformer.data.streaming import StreamedDataset
from transformer.data.tokenizer import EOS, PAD
from transformer.errors import UserError, choose
from transformer.inference import evaluation
from transformer.inference.decoding import DecodingConfig
from transformer.inference.generation import TrainedModel
from transformer.inference.search import Hypotheses
from transformer.knobs import Range
from transformer.metrics import finalize
from transformer.modules.model import Model
from transformer.parallel import hosts, replicas
from transformer.parallel.mesh import check_batch, check_memory, make_mesh, place, replicated
from transformer.training import costs, step
from transformer.training.checkpoint import Checkpoints
from transformer.training.metrics import zero_sums
from transformer.training.step import TrainState
from transformer.training.text_validation import TextValidation
from transformer.workdir import Workdir


class Run:
    """The mesh, data, model, state and compiled functions of a config, each built on first use.

        run = Run(RunConfig(steps=500), "runs/mine")
        run.train()
        run.evaluate("test")

    Call the compiled functions `init`, `train_steps` and `score` in `jax.set_mesh(run.mesh)`.

    Args:
      config: the run's typed config.
      workdir: the run's folder; None: the run cannot be trained, saved or restored.
      data_dir: where TFDS keeps datasets; None: its default.
      mesh: the devices; None: those of `config.mesh`.
      model: the model; None: built from the config and the tokenizers' vocabularies.
    """

    def __init__(
        self,
        config: RunConfig,
        workdir: str | Path | None = None,
        *,
        data_dir: str | None = None,
        mesh: Mesh | None = None,
        model: Model | None = None,
    ):
        if not isinstance(config, RunConfig):
            raise UserError("Run takes a RunConfig; make one by RunConfig.from_config_dict(config)")
        self.config, self.data_dir = config, data_dir
        self._workdir = None if workdir is None else Workdir(str(workdir))
        self._mesh, self._model = mesh, model
        self.allow_changes = False
        self.state: TrainState | None = None  # the newest in memory, if any
        self._decoders: dict[tuple, Any] = {}  # compiled functions of `decode`

    @classmethod
    def saved(cls, workdir: str | Path, **options: Any) -> "Run":
        """The run that was trained in a folder, with its saved config; `options` as of `Run`."""
        config = Workdir(str(workdir)).read_config()
        return cls(RunConfig.from_config_dict(config), workdir, **options)

    @property
    def workdir(self) -> Workdir:
        if self._workdir is None:
            raise UserError("this run has no folder: give one, Run(config, workdir)")
        return self._workdir

    @property
    def is_trained(self) -> bool:
        """Whether the folder holds checkpoints."""
        return self._workdir is not None and self._workdir.trained()

    @cached_property
    def mesh(self) -> Mesh:
        return self._mesh or make_mesh(self.config.mesh, self.config.replicas)

    @cached_property
    def source(self) -> "Run | None":
        """The run that `init_from` names; None if this one has a checkpoint."""
        return init_from.open_source(self)

    @cached_property
    def corpus(self) -> Corpus:
        """The dataset with its tokenizers; prepares the dataset if necessary."""
        saved = self.workdir.tokenizers if self.is_trained else init_from.tokenizer_folder(self)
        corpus = open_corpus(self.config.data, self.data_dir, saved)
        if self.is_trained and not self.allow_changes:
            self.workdir.check_corpus(corpus.identity())
        return corpus

    def evaluation_corpus(self, file: str | None = None) -> Corpus:
        """The run's dataset, found by its recorded name; or a file of pairs, as split `test`."""
        recorded = self.workdir.read_record()["corpus"]["dataset"]
        if not (file or recorded):
            fault = f"{self.workdir.path} is an imported model without a dataset"
            raise UserError(f"{fault}: name a file of pairs by --data=FILE")
        opened = datasets.open_test_files if file else datasets.reopen_dataset
        dataset = hosts.in_turn(partial(opened, self.config.data, file or recorded, self.data_dir))
        corpus = Corpus(dataset, self.tokenizers)
        if not file:
            self.workdir.check_corpus(corpus.identity())
        return corpus

    @cached_property
    def tokenizers(self) -> Tokenizers:
        """The tokenizers; those of a trained run come from its folder, without the dataset."""
        if not self.is_trained:
            return self.corpus.tokenizers
        tokenizers = saved_tokenizers(self.config.data, self.workdir.tokenizers)
        self.workdir.check_corpus(tokenizers.digests())
        return tokenizers

    @cached_property
    def examples(self) -> tuple[TokenRows, str]:
        """Training examples, one per row, and a text that counts those filtered out."""
        pairs = self.corpus.tokens(self.config.data.train)
        kept, excluded = filter_by_length(pairs, self.config.data.max_length)
        rows = unpacked_rows(pairs, kept)
        self.config.model.check_length(max(rows.widths), "the longest example of data.train")
        return rows, excluded

    @cached_property
    def rows(self) -> TokenRows:
        """The training rows, packed if `data.pack_length` is set."""
        rows, length = self.examples[0], self.config.data.pack_length
        if length and [*self.tokenizers.source.end] != [EOS]:
            where = "packed rows need sources that end with EOS, and those of this tokenizer do not"
            raise UserError(f"data.pack_length={length}: {where}; set it to 0")
        return pack_rows(rows, length) if length else rows

    @cached_property
    def data(self) -> dict[str, Dataset]:
        """`validation` and `test` → their examples, on the host."""
        config, data = self.config, {}
        for name in ("validation", "test"):
            data[name] = self.corpus.load(getattr(config.data, name), config.batch_size)
            config.model.check_length(data[name].longest(), f"the longest example of data.{name}")
        return data

    @cached_property
    def feed(self) -> Dataset | StreamedDataset:
        """The source of batches: rows on the devices, or a stream from worker processes."""
        config, workers = self.config, self.config.data.num_workers
        start = self.model.outputs.start
        if not workers:
            return self.place(Dataset.from_rows(self.rows, config.batch_size, start))
        options = {"num_steps": config.steps, "num_workers": workers, "mesh": self.mesh}
        options |= {"start": start}
        keys = step.data_keys(config.seeds())
        return StreamedDataset(self.rows, config.batch_size, keys, **options)

    @cached_property
    def model(self) -> Model:
        """The model as pure functions of its variables."""
        return self._model or Model.of(self.config.model, *self.tokenizers)

    @cached_property
    def abstract_state(self) -> TrainState:
        """The shapes, dtypes and shardings of the train state."""
        state = step.abstract_state(self.model, self.config, self.mesh)
        return replicas.add_replica_axis(state, self.config.replicas)

    def _jit(self, function: Callable, *axes: int | None, **options: Any) -> Any:
        """Compiles `function` of a single run for all replicas; its results are replicated."""
        function = replicas.vmap_replicas(function, self.config.replicas, axes)
        options = {"out_shardings": replicated(self.mesh)} | options
        return jax.jit(function, compiler_options=evaluation.compiler_options(), **options)

    @cached_property
    def init(self) -> Any:
        """jit-compiled (seeds, hparams) → state before the first step; see `init_state`."""
        init = partial(step.init_state, self.model, self.config)
        return self._jit(init, 0, 0, out_shardings=self._state_shardings)

    @cached_property
    def train_steps(self) -> Any:
        """jit-compiled (state, sums, data, n) → (state, sums) n steps later; donates the state."""
        train_step = step.make_train_step(self.model, self.config)
        axes = 0, 0, 0 if self.config.data.num_workers else None, None  # streamed: a batch for each
        where = self._state_shardings, replicated(self.mesh)
        options = {"out_shardings": where, "donate_argnums": 0}
        return self._jit(step.make_train_steps(train_step), *axes, **options)

    @cached_property
    def text_validation(self) -> TextValidation:
        """Decodes a sample of validation while the run trains."""
        return TextValidation(self)

    @cached_property
    def score(self) -> Any:
        """jit-compiled (variables, data) → totals of each example under teacher forcing."""
        return self._jit(partial(evaluation.score, self.model), 0, None, **self._to_read)

    @property
    def _to_read(self) -> dict[str, Any]:
        """The options of `_jit` for results that hosts read: one host gathers them by itself."""
        return {} if hosts.several() else {"out_shardings": None}

    @property
    def _state_shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def zero_sums(self) -> Any:
        """Zero sums, on the host, for `train_steps` to add to."""
        return jax.device_get(zero_sums(self.config.replicas))

    def place(self, tree: Any) -> Any:
        """Replicates host arrays over the devices."""
        return place(tree, replicated(self.mesh))

    @cached_property
    def step_flops(self) -> int:
        """Floating-point operations of the matrix products in one step of one replica."""
        sides = self.rows.take(np.zeros(1, int))
        batch = Dataset(*sides, self.config.batch_size, self.rows.packed)
        return costs.step_flops(self.model, self.config, batch)

    def check(self) -> None:
        """Raises a UserError if config or data are invalid, or the state exceeds the memory."""
        check_batch(self.mesh, self.config.batch_size, self.config.accumulation_steps)
        _ = self.examples, self.data, self.rows
        check_memory(self.abstract_state)
        if self.source is not None:
            init_from.excluded_names(self, self.source)
        if self.config.decode_every:
            _ = self.text_validation

    def trace(self) -> None:
        """Traces the train step, which finds errors before compilation."""
        sums, steps = self.place((self.zero_sums(), np.array(0, np.int32)))
        # Placed as in training, so that compilation reuses this trace.
        self.train_steps.trace(self.abstract_state, sums, self.feed.empty_window(), steps)

    def train(
        self, *, allow_changes: bool = False, profile: int = 0, exits: bool = False
    ) -> list[dict[str, Any]]:
        """Trains, resuming from the newest checkpoint; returns and writes each replica's results.

        Args:
          allow_changes: whether to resume from a checkpoint of another config.
          profile: number of steps to trace with the profiler before training; 0: none.
          exits: whether a request to stop may end the process if there is nothing to save.

        Raises:
          UserError: the config, the data or the folder is invalid, or the loss is NaN or Inf.
          Interrupted: on request; the state is saved.
        """
        return run_training.train(self, allow_changes=allow_changes, profile=profile, exits=exits)

    def restore(self, checkpoint: str = "latest") -> TrainState:
        """The state saved as `latest`, as `best` or at a step number, placed on the mesh.

        Raises:
          UserError: there is no such checkpoint, or it is damaged.
        """
        with Checkpoints(self.workdir.checkpoints, None, self.config.best_metric) as checkpoints:
            return checkpoints.restore(checkpoints.find(checkpoint), self.abstract_state)

    def trained_model(self, checkpoint: str = "latest", replica: int = 0) -> TrainedModel:
        """The model of a checkpoint (see `restore`) on the run's mesh, for texts.

        `replica` is the index of the model in a population.
        """
        config = self.config
        Range(0, config.replicas - 1).check("replica", replica)
        with jax.set_mesh(self.mesh), jax.enable_x64(False):
            all_variables = self.restore(checkpoint).variables()
            variables = replicas.split_replicas(all_variables, config.replicas)[replica]
        return TrainedModel(self, variables)

    def decode(self, variables: Any, data: Dataset, decoding: DecodingConfig) -> Hypotheses:
        """Decodes every source in `data`, which is on the host, with every replica."""
        config, margin = self.config, decoding.margin(self.config.decode_margin)
        source, axis = np.asarray(data.source), int(config.replicas > 1)
        rows = self.rows_at_once(data, decoding)
        widths = np.array([(source != PAD).sum(1).min(), source.shape[1]])
        least, most = map(config.model.reach, decoding.limits(widths, margin).tolist())
        decoding, prefix = decoding.split_prefix(self.tokenizers.target, least)
        options = {"margin": margin, "decoding": decoding, "max_length": most}
        if (key := tuple(options.values())) not in self._decoders:
            decode = partial(evaluation.decode, self.model, **options)
            self._decoders[key] = self._jit(decode, 0, None, None, None, **self._to_read)
        decode = self._decoders[key]

        def decode_batch(*batch: np.ndarray) -> Hypotheses:
            return decode(variables, *self.place((*batch, prefix)))

        return evaluation.decode_in_batches(decode_batch, source, rows, axis)

    def rows_at_once(self, data: Dataset, decoding: DecodingConfig) -> int:
        """The number of examples that `decode` gives to its program."""
        return evaluation.rows_at_once(self.model, self._examples(data), decoding.beam_size)

    def totals(
        self, variables: Any, data: Dataset, between: Callable = lambda: None
    ) -> dict[str, Any]:
        """The totals of each example in `data`, which is on the host, for every replica.

        `between` is called before each batch; an exception ends it all.
        """
        score, axis = lambda x: self.score(variables, self.place(x)), int(self.config.replicas > 1)
        return evaluation.in_batches(score, data, self._examples(data), axis, between)

    def _examples(self, data: Dataset) -> int:
        """How many examples, one a row, have as many tokens as a batch of training."""
        packed = data.batch_size * self.config.data.pack_length // data.source.shape[1]
        return max(packed, data.batch_size)

    def evaluate(self, split: str = "validation") -> dict[str, float]:
        """Metrics of `validation` or `test` under teacher forcing; of a population, the means.

        Evaluates the last state of `train`, otherwise the latest checkpoint.
        """
        return replicas.mean_over_replicas(self.evaluate_replicas(split))

    def evaluate_replicas(
        self, split: str, state: TrainState | None = None, between: Callable = lambda: None
    ) -> list[dict[str, float]]:
        """`evaluate` for each replica; NaN for one that a NaN or Inf has stopped.

        `state` is on the mesh; see `totals` for `between`.
        """
        config, data = self.config, choose(self.data, split, "split")
        state = state or self.state or self.restore()
        with jax.set_mesh(self.mesh):
            totals = self.totals(state.variables(), data, between)
        split_totals = replicas.split_replicas(totals, config.replicas)
        each = zip(split_totals, config.single_runs(), strict=True)
        metrics = [finalize(sums, split, single.label_smoothing) for sums, single in each]
        stopped = replicas.is_stopped(state.skipped, config.max_skipped_steps)
        return replicas.mask_stopped(metrics, stopped)
