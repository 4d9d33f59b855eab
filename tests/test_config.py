"""The configs: every knob matters, every shipped file builds and takes a step."""

import hashlib
import importlib
import itertools
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import train
from configs import base
from tests.helpers import TOKENIZER, strings
from transformer import evaluation, loop
from transformer.config import RunConfig, differences, flat_knobs
from transformer.data.batches import Dataset
from transformer.errors import UserError
from transformer.metrics import read_metrics
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
    **{
        f"per_replica.{name}": {"replicas": 2, "mesh.replica": 1}
        for name in (
            "seed",
            "learning_rate",
            "warmup_steps",
            "label_smoothing",
            "dropout",
            "attention_dropout",
        )
    },
}
# adamw with a weight decay is compared with adamw without one, not with adam; files are no split
# of toy_strings.
CANNOT_STAND_ALONE = {"optimizer.name": {}, "data.dataset": {}}


def config_of(changes) -> ConfigDict:
    config = base.get_config()
    config.update_from_flattened_dict(SMALL | changes)
    return config


def test_the_step_is_traced_but_once(tmp_path, data_dir, monkeypatch):
    """To find what is wrong with it, and then again by the compiler, would be twice."""
    traced = []

    def counted(step):
        train_steps = make_train_steps(step)
        return lambda *given: traced.append(given) or train_steps(*given)

    monkeypatch.setattr(loop, "make_train_steps", counted)
    with jax.numpy_dtype_promotion("standard"):
        train.run(config_of({}), Workdir(str(tmp_path)), data_dir)
    assert len(traced) == 1


def fingerprint(changes, path, data_dir, capsys):
    """All that a person could notice of a run but its speed and its place."""
    config = config_of(changes)
    cfg, workdir = RunConfig.resolve(config), Workdir(str(path))
    capsys.readouterr()
    with jax.numpy_dtype_promotion("standard"):
        state = train.run(config, workdir, data_dir)
    shown = capsys.readouterr().out
    digest = hashlib.sha256()
    for name, value in sorted(state.params.items()):
        digest.update(name.encode() + np.asarray(value).tobytes())
    rows = [
        {name: value for name, value in row.items() if not name.endswith("per_second")}
        for row in read_metrics(workdir.metrics)
    ]
    return {
        "parameters": digest.hexdigest(),
        "shardings": str({name: value.sharding for name, value in state.params.items()}),
        "metrics": rows,
        "checkpoints": sorted(each.name for each in workdir.checkpoints.iterdir()),
        "dispatches": [loop.next_stop(cfg, step, cfg.steps_per_call) for step in range(cfg.steps)],
        "results": shown[shown.index("after") :],
    }


@pytest.fixture(scope="module")
def unchanged():
    """Fingerprints of the unchanged runs, made when first asked for."""
    return {}


def program(changes):
    """A run's computation as it is traced, from the seed to the first step and to the scores."""
    cfg = RunConfig.resolve(config_of(changes))
    model, recipe = Model(cfg.model, TOKENIZER.vocab_size), cfg.recipe()
    train_step = make_train_step(model, recipe)
    batch = strings(("ab", "ba"), ("cd", "dc"))
    data = Dataset(batch.source, batch.target_out, 1)
    numbers = cfg.numbers()
    one = {name: np.float32(np.ravel(values)[0]) for name, values in numbers.items()}

    def first_step(seed, numbers, batch):
        return train_step(init_state(model, recipe, seed, numbers), batch)

    with jax.numpy_dtype_promotion("standard"):  # what a user has; jax.nn relies on it
        return {
            "step": str(jax.make_jaxpr(first_step)(np.uint32(0), one, batch)),
            "score": str(jax.make_jaxpr(partial(evaluation.score, model))(model.shapes, data)),
            "seeds": np.asarray(cfg.seeds()).tolist(),
            "numbers": {name: np.asarray(values).tolist() for name, values in numbers.items()},
        }


# The knobs that the program itself is made of; the others are about what is done with it.
INSIDE = [
    knob
    for knob in OTHER
    if knob.split(".")[0]
    in (
        "model",
        "optimizer",
        "per_replica",
        "label_smoothing",
        "ema_decay",
        "accumulate",
        "max_skipped_steps",
    )
]


@pytest.mark.parametrize("knob", INSIDE)
def test_every_knob_inside_changes_the_program(knob):
    besides = BESIDES.get(knob, {})
    before = program(CANNOT_STAND_ALONE.get(knob, besides))
    assert program(besides | {knob: OTHER[knob]}) != before


def test_the_same_config_gives_the_same_program():
    """Else every knob would seem to change something."""
    changes = {"model.dropout": 0.1, "replicas": 2}
    assert program(changes) == program(changes)


# Tested where a run fails: tests/test_health.py.
OF_FAILURES = ["debug_nans"]
# Tested where text is scored: tests/test_datasets.py.
OF_EVALUATION = ["data.metrics"]
OUTSIDE = [knob for knob in OTHER if knob not in INSIDE + OF_FAILURES + OF_EVALUATION]


@pytest.mark.slow
@pytest.mark.parametrize("knob", OUTSIDE)
def test_every_other_knob_changes_the_run(knob, unchanged, tmp_path, data_dir, capsys):
    besides = BESIDES.get(knob, {})
    before = CANNOT_STAND_ALONE.get(knob, besides)
    if str(before) not in unchanged:
        unchanged[str(before)] = fingerprint(before, tmp_path / "before", data_dir, capsys)
    after = fingerprint(besides | {knob: OTHER[knob]}, tmp_path / "after", data_dir, capsys)
    assert after != unchanged[str(before)]


def test_the_table_above_holds_every_knob_of_base():
    assert OTHER.keys() == flat_knobs(base.get_config()).keys()


@pytest.mark.slow
def test_the_same_config_gives_the_same_fingerprint(tmp_path, data_dir, capsys):
    """Else every knob would seem to change something."""
    one, other = (
        fingerprint({"model.dropout": 0.1}, tmp_path / name, data_dir, capsys) for name in "ab"
    )
    assert one == other


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_and_takes_a_step_at_reduced_size(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert flat_knobs(config).keys() == flat_knobs(base.get_config()).keys()
    Model(RunConfig.resolve(config).model, TOKENIZER.vocab_size)
    config.model.update({"layers": 1, "width": 16, "heads": 2, "ff_width": 32})
    cfg = RunConfig.resolve(config)
    model = Model(cfg.model, TOKENIZER.vocab_size)
    init = each_replica(partial(init_state, model, cfg.recipe()), cfg.replicas, in_axes=(0, 0))
    state = jax.jit(init)(cfg.seeds(), cfg.numbers())
    step = jax.jit(make_train_step(model, cfg.recipe()))
    state, sums = step(state, strings(("abc", "cba"), ("de", "ed")))
    assert int(state.step) == 1
    assert 1.0 < float(sums["loss"] / sums["tokens"]) < 10.0


def test_every_config_names_itself_in_its_docstring():
    for name in CONFIGS:
        module = importlib.import_module(f"configs.{name}")
        assert f"python train.py --config=configs/{name}.py" in module.__doc__


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
        (
            {"data.pack": 64, "model.architecture": "recurrent"},
            r"data.pack=64: model.architecture=recurrent reads one example a row",
        ),
        (
            {"mesh.fsdp": 2, "model.architecture": "recurrent"},
            r"mesh.fsdp=2, mesh.tensor=1, .*: model.architecture=recurrent is split over the batch",
        ),
        (
            {"mesh.context": 2, "model.architecture": "recurrent"},
            r"mesh.context=2: model.architecture=recurrent is split over the batch alone; set all",
        ),
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
        (
            {"model.attention_dropout": 0.1, "model.architecture": "recurrent"},
            r"attention_dropout=0.1: only the Transformer",
        ),
        ({"model.attention_dropout": 1.0}, r"model.attention_dropout=1.0"),
        ({"model.position": "rotary", "model.head_width": 3}, r"head_width=3 is odd: rotary"),
        ({"model.random_positions": 64}, r"at least model.max_length=512"),
        (
            {"model.random_positions": 512, "model.position": "none"},
            r"need a model.position other than none",
        ),
        (
            {"model.architecture": "recurrent", "model.width": 15, "model.heads": 3},
            r"model.width=15",
        ),
        ({"accumulate": 3}, r"accumulate=3 does not divide batch_size="),
        ({"accumulate": 2, "model.norm": "batch"}, r"accumulate=2: model.norm=batch needs"),
        ({"model.remat": "half"}, r"model.remat=half: choose one of none, dots, full"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0: at least 0 and below 1"),
        ({"replicas": 0}, r"replicas=0: it must be at least 1"),
        ({"per_replica.dropout": (0.1,)}, r"per_replica.dropout has 1 values and replicas=1"),
        (
            {"per_replica.dropout": (0.1, 0.2, 0.3), "replicas": 2},
            r"per_replica.dropout has 3 values and replicas=2",
        ),
        (
            {"per_replica.dropout": (0.1, 1.5), "replicas": 2},
            r"dropout=1.5: it must be at least 0 and below 1",
        ),
        ({"per_replica.seed": ("a", "b"), "replicas": 2}, r"takes a whole number for each"),
        ({"per_replica.seed": (0, 0.5), "replicas": 2}, r"takes a whole number for each"),
        (
            {"optimizer.name": "sgd", "optimizer.weight_decay": 0.1},
            r"weight_decay is for adamw, lion, muon",
        ),
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
        (
            {"optimizer.learning_rate": float("inf")},
            r"rate=inf: it must be at most 3.40282e\+38",
        ),
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
    changes = {"model.norm": "rms", "mesh.fsdp": 2, "steps_per_call": 1, "keep_checkpoints": 9}
    assert differences(config_of({}), config_of(changes)) == ["model.norm: layer → rms"]


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
