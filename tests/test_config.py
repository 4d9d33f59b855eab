"""The configs: every knob matters, every shipped file builds and takes a step."""

import hashlib
import importlib
import itertools
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import train
from configs import base
from tests.helpers import TOKENIZER, strings
from tests.test_programs import results
from transformer import evaluation, loop, plots, sharding
from transformer.config import RunConfig, differences, flat_knobs
from transformer.decoding import Decoded
from transformer.errors import UserError
from transformer.model import Model
from transformer.training import each_replica, init_state, make_train_step, make_train_steps
from transformer.workdir import Workdir

CONFIGS = sorted(path.stem for path in Path("configs").glob("*.py"))

# A run of seconds that the knobs are changed in.
SMALL = {
    "steps": 8,
    "batch_size": 16,
    "log_every": 4,
    "eval_every": 4,
    "save_every": 4,
    "keep_checkpoints": 1,
    "decode_margin": 2,
    "data.size": "tiny",
    "model.width": 16,
    "model.heads": 2,
    "model.ff_width": 32,
    "optimizer.warmup_steps": 2,
    "mesh.data": 1,
}

# Another value for each knob, and what must hold besides for it to matter.
OTHER = {
    "seed": 1,
    "replicas": 2,
    "steps": 9,
    "batch_size": 8,
    "accumulate": 2,
    "max_skipped_steps": 3,
    "debug_nans": True,
    "steps_per_call": 1,
    "log_every": 2,
    "eval_every": 2,
    "save_every": 2,
    "keep_checkpoints": 2,
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "decode_margin": 4,
    "data.dataset": "files",
    "data.source": "target",
    "data.target": "source",
    "data.tokenizer": "bytes",
    "data.target_tokenizer": "words",
    "data.vocab_size": 300,
    "data.longest": 4,
    "data.workers": 2,
    "data.task": "copy",
    "data.size": "small",
    "data.train": "train[:50%]",
    "data.validation": "test",
    "data.test": "validation",
    "data.pack": 32,
    "data.metrics": ("bleu",),
    "per_replica.seed": (5, 6),
    "per_replica.learning_rate": (1e-3, 2e-3),
    "per_replica.warmup_steps": (1, 4),
    "per_replica.weight_decay": (0.1, 0.2),
    "per_replica.label_smoothing": (0.1, 0.2),
    "per_replica.dropout": (0.1, 0.2),
    "per_replica.attention_dropout": (0.1, 0.2),
    "model.architecture": "recurrent",
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 4,
    "model.head_width": 4,
    "model.value_width": 4,
    "model.kv_heads": 1,
    "model.ff_width": 64,
    "model.feed_forward": "gelu",
    "model.cell": "gru",
    "model.init": "normal",
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.norm": "rms",
    "model.norm_placement": "post",
    "model.norm_epsilon": 1e-2,
    "model.position": "learned",
    "model.max_length": 16,
    "model.random_positions": 64,
    "model.window": 2,
    "model.tie_embeddings": False,
    "model.attention_bias": True,
    "model.qk_norm": True,
    "model.fused_qkv": True,
    "model.attention_backend": "xla",
    "model.scan_layers": True,
    "model.remat": "full",
    "model.dtype": "bfloat16",
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_steps": 3,
    "optimizer.beta1": 0.5,
    "optimizer.beta2": 0.9,
    "optimizer.epsilon": 1e-3,
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 0.1,
    "mesh.replica": 1,
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "mesh.context": 2,
}
BESIDES = {
    **{k: {"replicas": 2, "mesh.replica": 1} for k in OTHER if k.startswith("per_replica.")},
    "data.dataset": {
        "data.train": str(Path(__file__).parent / "pairs.tsv"),
        "data.validation": "train[:5]",
        "data.test": "train[5:10]",
    },
    "data.vocab_size": {"data.tokenizer": "bpe"},
    "data.target_tokenizer": {"model.tie_embeddings": False},
    "optimizer.name": {"optimizer.weight_decay": 0.1},
    "optimizer.weight_decay": {"optimizer.name": "adamw"},
    "model.max_length": {"model.position": "learned"},
    "model.random_positions": {"model.max_length": 16},
    "model.cell": {"model.architecture": "recurrent"},
    "mesh.replica": {"replicas": 2},
    "per_replica.weight_decay": {"replicas": 2, "mesh.replica": 1, "optimizer.name": "adamw"},
}
# adamw with a weight decay is compared with adamw without one, not with adam; files are no split
# of toy_strings.
CANNOT_STAND_ALONE = {"optimizer.name": {}, "data.dataset": {}}


def config_of(changes) -> ConfigDict:
    config = base.get_config()
    config.update_from_flattened_dict(SMALL | changes)
    return config


model_of = cache(Model)


def arguments(cfg):
    """What a run's program is called with: seeds, hyperparameters, and parameters by shape."""
    numbers = {name: np.asarray(values).tolist() for name, values in cfg.numbers().items()}
    shapes = {n: leaf.shape for n, leaf in model_of(cfg.model, TOKENIZER.vocab_size).shapes.items()}
    return np.asarray(cfg.seeds()).tolist(), numbers, shapes


def program(cfg):
    """The jaxpr of a run from the seed to the first step."""
    model, recipe = model_of(cfg.model, TOKENIZER.vocab_size), cfg.recipe()
    train_step = make_train_step(model, recipe)
    one = {name: np.float32(np.ravel(values)[0]) for name, values in cfg.numbers().items()}

    def first_step(seed, numbers, batch):
        return train_step(init_state(model, recipe, seed, numbers), batch)

    with jax.numpy_dtype_promotion("standard"):  # what a user has; jax.nn relies on it
        batch = strings(("ab", "ba"), ("cd", "dc"))
        return str(jax.make_jaxpr(first_step)(np.uint32(0), one, batch))


cached_program = cache(program)


# The knobs that the program itself is made of; the others are about what is done with it.
SINGLE = ("label_smoothing", "ema_decay", "accumulate", "max_skipped_steps")
SECTIONS = ("model.", "optimizer.", "per_replica.")
INSIDE = [knob for knob in OTHER if knob in SINGLE or knob.startswith(SECTIONS)]


@pytest.mark.parametrize("knob", INSIDE)
def test_every_knob_inside_changes_the_program(knob):
    besides = BESIDES.get(knob, {})
    before = RunConfig.resolve(config_of(CANNOT_STAND_ALONE.get(knob, besides)))
    after = RunConfig.resolve(config_of(besides | {knob: OTHER[knob]}))
    if arguments(after) == arguments(before):  # tracing takes longer
        assert program(after) != cached_program(before)


def test_the_same_config_gives_the_same_program():
    """Else every knob would seem to change something."""
    cfg, again = (RunConfig.resolve(config_of({"model.dropout": 0.1})) for _ in range(2))
    assert arguments(cfg) == arguments(again)
    assert program(cfg) == program(again)


class Dispatches:
    """Stands in for a run's compiled programs: computes nothing and notes what it is called with.

    Step i has a loss of i, so that an interval's loss names its steps. Later checkpoints
    are better.
    """

    def __init__(self, monkeypatch):
        self.calls, self.step = [], 0
        monkeypatch.setattr(train, "make_programs", self.make_programs)
        monkeypatch.setattr(train, "Model", model_of)
        monkeypatch.setattr(train.evaluation, "decode", self.decode)
        monkeypatch.setattr(train.costs, "step_flops", lambda *_: 1)
        monkeypatch.setattr(plots, "learning_curve", lambda *_: None)

    def make_programs(self, cfg, model, like):
        self.replicas = (cfg.replicas,) if cfg.replicas > 1 else ()
        self.like = like
        return loop.Programs(self.init, self, self.score)

    def trace(self, *_):
        """Nothing: there is no program to trace."""

    def init(self, seeds, numbers):
        self.calls.append(("init", np.asarray(seeds).tolist()))
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self.like)
        state = zeros._replace(seed=np.asarray(seeds), numbers=numbers)
        return sharding.place(state, jax.tree.map(lambda leaf: leaf.sharding, self.like))

    def __call__(self, state, sums, data, n):
        with jax.transfer_guard("allow"):
            first, n = state.taken(), int(n)
            self.calls.append(("train", n, digest(data)))
            self.step = first + n
            steps = np.full(state.step.shape, self.step, np.int32)
            added = {"loss": sum(range(first + 1, first + n + 1)), "tokens": n, "steps": n}
            sums = {k: jnp.asarray(np.asarray(v) + added.get(k, 0)) for k, v in sums.items()}
            return state._replace(step=sharding.place(steps, state.step.sharding)), sums

    def score(self, variables, data):
        self.calls.append(("score", digest(data)))
        ones = np.ones((*self.replicas, 1), np.float32)
        return evaluation.Scores((20.0 - self.step) * ones, ones, ones)

    def decode(self, model, variables, samples, *, length):
        self.calls.append(("decode", samples.source.shape, length))
        return Decoded(samples.target, jnp.zeros(len(samples)))


def digest(data):
    """Of the rows that a program is given."""
    rows = np.asarray(data.source).tobytes() + np.asarray(data.target).tobytes()
    of = getattr(data, "batch_size", None), data.packed  # the batches of a window are its shape
    return (*data.source.shape, *data.target.shape, *of, hashlib.sha256(rows).hexdigest())


def fingerprint(changes, path, data_dir, monkeypatch, capsys):
    """All that a person could notice of a run but its speed, its place and its arithmetic."""
    workdir = Workdir(str(path))
    capsys.readouterr()
    with monkeypatch.context() as patch:
        dispatches = Dispatches(patch)
        state = train.run(config_of(changes), workdir, data_dir)
    shown = capsys.readouterr().out
    return {
        "calls": dispatches.calls,
        "shardings": str({name: value.sharding for name, value in state.params.items()}),
        "metrics": results(workdir.path),
        "checkpoints": sorted(each.name for each in workdir.checkpoints.iterdir()),
        "results": shown[shown.index(f"\nafter {dispatches.step} steps") :],
    }


@pytest.fixture(scope="module")
def unchanged():
    """Fingerprints of the unchanged runs, made when first asked for."""
    return {}


# Tested where a run fails, and where text is scored: tests/test_health.py, tests/test_datasets.py.
ELSEWHERE = ["debug_nans", "data.metrics"]
OUTSIDE = [knob for knob in OTHER if knob not in INSIDE + ELSEWHERE]
SLOW = ["data.size", "data.vocab_size", "data.workers"]  # prepare much, or start processes


@pytest.mark.parametrize(
    "knob", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in OUTSIDE]
)
def test_every_other_knob_changes_the_run(knob, unchanged, tmp_path, data_dir, monkeypatch, capsys):
    besides = BESIDES.get(knob, {})
    before = CANNOT_STAND_ALONE.get(knob, besides)
    of = partial(fingerprint, data_dir=data_dir, monkeypatch=monkeypatch, capsys=capsys)
    if str(before) not in unchanged:
        unchanged[str(before)] = of(before, tmp_path / "before")
    after = of(besides | {knob: OTHER[knob]}, tmp_path / "after")
    assert after != unchanged[str(before)]


def test_the_table_above_holds_every_knob_of_base():
    assert OTHER.keys() == flat_knobs(base.get_config()).keys()


def test_the_same_config_gives_the_same_fingerprint(tmp_path, data_dir, monkeypatch, capsys):
    """Else every knob would seem to change something."""
    one, other = (
        fingerprint({"replicas": 2}, tmp_path / name, data_dir, monkeypatch, capsys)
        for name in "ab"
    )
    assert one == other


def test_the_step_is_traced_but_once_and_a_real_run_leaves_what_the_fingerprint_has(
    tmp_path, data_dir, monkeypatch, capsys
):
    """To find what is wrong with it, and then again by the compiler, would be twice."""
    expected = fingerprint({}, tmp_path / "fake", data_dir, monkeypatch, capsys)
    traced = []

    def counted(step):
        train_steps = make_train_steps(step)
        return lambda *given: traced.append(given) or train_steps(*given)

    monkeypatch.setattr(loop, "make_train_steps", counted)
    workdir = Workdir(str(tmp_path / "real"))
    with jax.numpy_dtype_promotion("standard"):
        state = train.run(config_of({}), workdir, data_dir)
    assert len(traced) == 1
    shardings = {name: value.sharding for name, value in state.params.items()}
    assert str(shardings) == expected["shardings"]
    names, expected_names = (
        [(row["step"], *row) for row in rows]
        for rows in (results(workdir.path), expected["metrics"])
    )
    assert names == expected_names
    found = sorted(each.name for each in workdir.checkpoints.iterdir())
    assert found == expected["checkpoints"]


@cache
def first_loss(cfg):
    """The step counter and the loss a token after one step."""
    model, recipe = model_of(cfg.model, TOKENIZER.vocab_size), cfg.recipe()
    init = each_replica(partial(init_state, model, recipe), cfg.replicas, in_axes=(0, 0))
    train_step = make_train_step(model, recipe)
    first = jax.jit(lambda seeds, numbers, batch: train_step(init(seeds, numbers), batch))
    state, sums = first(cfg.seeds(), cfg.numbers(), strings(("abc", "cba"), ("de", "ed")))
    return int(state.step), float(sums["loss"] / sums["tokens"])


# Like base or vaswani_base but for few knobs.
FURTHER = ["pronunciations", "translate", "vaswani_big", "wmt14_ende"]


def test_every_config_names_itself_and_builds():
    for name in CONFIGS:
        module = importlib.import_module(f"configs.{name}")
        assert f"python train.py --config=configs/{name}.py" in module.__doc__
        config = module.get_config()
        assert flat_knobs(config).keys() == flat_knobs(base.get_config()).keys()
        config.model.layers = 1
        model_of(RunConfig.resolve(config).model, TOKENIZER.vocab_size)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in FURTHER)) for name in CONFIGS]
)
def test_every_config_takes_a_step_at_reduced_size(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.model.update({"layers": 1, "width": 16, "heads": 2, "ff_width": 32})
    config.data = base.get_config().data  # the toy configs are then one program
    step, loss = first_loss(RunConfig.resolve(config))
    assert step == 1
    assert 1.0 < loss < 10.0


RECURRENT = {"model.architecture": "recurrent"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, r"steps=0: it must be at least 1"),
        ({"seed": -1}, r"seed=-1: it must be at least 0"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0"),
        ({"decode_margin": -1}, r"decode_margin=-1"),
        ({"steps": 10**9}, r"passes 2\*\*32 examples"),
        ({"optimizer.warmup_steps": 8}, r"warmup_steps=8 is not below steps=8"),
        ({"data.task": "revrse"}, r"data.task=revrse: choose one of .*did you mean reverse\?"),
        ({"data.pack": -1}, r"data.pack=-1: it must be at least 0"),
        (RECURRENT | {"data.pack": 64}, r"pack=64: model.architecture=recurrent reads one example"),
        (
            RECURRENT | {"mesh.fsdp": 2},
            r"fsdp=2, mesh.tensor=1, .*recurrent is split over the batch",
        ),
        (RECURRENT | {"mesh.context": 2}, r"context=2: .*recurrent is split over the batch alone"),
        ({"data.metrics": ("blue",)}, r"data.metrics=blue: .*did you mean bleu\?"),
        ({"data.size": "big"}, r"data.size=big: choose one of tiny, small"),
        ({"model.norm": "rmsnorm"}, r"model.norm=rmsnorm: choose one of layer, rms"),
        ({"model.norm_placement": "pos"}, r"choose one of pre, post, both .*mean post\?\)"),
        ({"model.position": "learnt"}, r"did you mean learned\?"),
        ({"model.feed_forward": "relux"}, r"did you mean relu\?"),
        ({"model.architecture": "rnn"}, r"choose one of transformer, recurrent"),
        ({"model.cell": "lstn"}, r"did you mean lstm\?"),
        ({"model.init": "glorot"}, r"did you mean glorot_"),
        ({"model.kv_heads": 3}, r"kv_heads=3 does not divide model.heads=2"),
        ({"model.window": 0}, r"model.window=0: it must be at least 1$"),
        ({"model.value_width": 4, "model.attention_backend": "xla"}, r"value_width=4.*einsum"),
        ({"model.attention_dropout": 0.1, "model.attention_backend": "xla"}, r"einsum drops"),
        (RECURRENT | {"model.attention_dropout": 0.1}, r"dropout=0.1: only the Transformer"),
        ({"model.attention_dropout": 1.0}, r"model.attention_dropout=1.0"),
        ({"model.position": "rotary", "model.head_width": 3}, r"head_width=3 is odd: rotary"),
        ({"model.random_positions": 64}, r"at least model.max_length=512"),
        ({"model.random_positions": 512, "model.position": "none"}, r"position other than none"),
        (RECURRENT | {"model.width": 15, "model.heads": 3}, r"model.width=15"),
        ({"accumulate": 3}, r"accumulate=3 does not divide batch_size="),
        ({"accumulate": 2, "model.norm": "batch"}, r"accumulate=2: model.norm=batch needs"),
        ({"model.remat": "half"}, r"model.remat=half: choose one of none, dots, full"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0: at least 0 and below 1"),
        ({"replicas": 0}, r"replicas=0: it must be at least 1"),
        ({"per_replica.dropout": (0.1,)}, r"per_replica.dropout has 1 values and replicas=1"),
        ({"per_replica.dropout": (0.1, 0.2, 0.3), "replicas": 2}, r"dropout has 3 values and rep"),
        (
            {"replicas": 2, "per_replica.dropout": (0, 1.5)},
            r"=1.5: it must be at least 0 and below 1",
        ),
        ({"per_replica.seed": ("a", "b"), "replicas": 2}, r"takes a whole number for each"),
        ({"per_replica.seed": (0, 0.5), "replicas": 2}, r"takes a whole number for each"),
        ({"optimizer.name": "sgd", "optimizer.weight_decay": 0.1}, r"for adamw, lion, muon"),
        ({"model.attention_backend": "flash"}, r"choose one of auto, einsum, xla"),
        ({"model.attention_backend": "cudnn"}, r"computes in bfloat16 alone; set model.dtype"),
        ({"model.dtype": "float16"}, r"choose one of float32, bfloat16"),
        ({"model.layers": 0}, r"model.layers=0"),
        ({"model.heads": 3}, r"heads=3 does not divide model.width=16.*or set model.head_width"),
        ({"model.head_width": 0}, r"model.head_width=0"),
        ({"model.width": 15, "model.heads": 3}, r"model.width=15 is odd"),
        ({"model.norm_epsilon": -5.0}, r"model.norm_epsilon=-5.0: it must be above 0"),
        ({"model.dropout": 1.0}, r"model.dropout=1.0"),
        ({"optimizer.name": "adm"}, r"did you mean adam"),
        ({"optimizer.schedule": "cos"}, r"did you mean cosine\?"),
        ({"optimizer.beta2": 1.0}, r"optimizer.beta2=1.0"),
        ({"optimizer.learning_rate": -1.0}, r"learning_rate=-1.0: it must be at least 0"),
        ({"optimizer.learning_rate": np.inf}, r"rate=inf: it must be at most 3.40282e\+38"),
        ({"optimizer.epsilon": 1e-300}, r"epsilon=1e-300: it must be above 0"),
        ({"max_skipped_steps": 2**31}, r"max_skipped_steps=2147483648: .* at most 2,147,483,646"),
        ({"model.layers": 10**9}, r"model.layers=1000000000: it must be at most 1,000"),
        ({"model.ff_width": 2**33}, r"model.ff_width=8589934592: it must be at most 1,048,576"),
        ({"data.pack": 2**40}, r"data.pack=1099511627776: it must be at most"),
        ({"decode_margin": 10**9}, r"decode_margin=1000000000: it must be at most"),
        ({"model.norm_epsilon": 1e-60}, r"model.norm_epsilon=1e-60: it must be above 0"),
        ({"optimizer.learning_rate": float("nan")}, r"learning_rate=nan"),
        ({"optimizer.weight_decay": 0.1}, r"weight_decay is for adamw"),
    ],
)
def test_a_config_that_contradicts_itself_is_explained(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        RunConfig.resolve(config_of(changes))
    assert "\n" not in str(caught.value)


def test_a_knob_that_does_not_exist_or_is_missing_is_named():
    config = base.get_config()
    config.unlock()
    config.model.nrm = "rms"
    with pytest.raises(UserError, match=r"model.nrm, which is no knob \(did you mean norm\?\)"):
        RunConfig.resolve(config)
    del config.model.nrm
    del config.mesh.fsdp
    with pytest.raises(UserError, match=r"lacks mesh\.fsdp"):
        RunConfig.resolve(config)


def test_differences_name_what_changes_a_result_and_leave_out_what_does_not():
    free = {"mesh.fsdp": 2, "steps_per_call": 1, "keep_checkpoints": 9}
    changes = free | {"model.norm": "rms", "optimizer.beta1": 0.5, "steps": 9, "data.pack": 8}
    assert differences(config_of({}), config_of(changes)) == [
        *("data.pack: 0 → 8", "model.norm: layer → rms", "optimizer.beta1: 0.9 → 0.5"),
        "steps: 8 → 9",
    ]


def test_a_replica_is_a_single_run_with_its_own_values():
    own = {"dropout": (0.1, 0.2), "learning_rate": (1.0, 2.0), "label_smoothing": (0.3, 0.4)}
    changes = {f"per_replica.{name}": values for name, values in own.items()}
    cfg = RunConfig.resolve(config_of(changes | {"replicas": 2, "seed": 7}))
    for k, one in enumerate(map(cfg.replica, range(2))):
        assert (one.seed, one.replicas) == (7 + k, 1)
        found = one.model.dropout, one.optimizer.learning_rate, one.label_smoothing
        assert found == tuple(values[k] for values in own.values())


@pytest.mark.parametrize("steps_per_call", [1, 3, 7, 100])
def test_dispatches_end_wherever_something_is_due(steps_per_call):
    every = {"log_every": 4, "eval_every": 6, "save_every": 10}
    cfg = RunConfig.resolve(config_of(every | {"steps": 25, "steps_per_call": steps_per_call}))
    stops = [0]
    while stops[-1] < 25:
        stops.append(loop.next_stop(cfg, stops[-1], steps_per_call))
    due = {step for each in every.values() for step in range(each, 26, each)}
    assert due | {25} <= set(stops)
    assert all(0 < b - a <= steps_per_call for a, b in itertools.pairwise(stops))
