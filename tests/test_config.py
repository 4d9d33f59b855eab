import importlib
import re
from dataclasses import fields
from functools import cache, cached_property, partial
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import train
from tests.helpers import TOKENIZER, logits_of, refused, strings
from tests.test_programs import results
from transformer.config import RunConfig, default_config, differences, flat_knobs, load_config
from transformer.inference import evaluation, plots
from transformer.inference.decoding import DecodingConfig
from transformer.inference.search import Hypotheses
from transformer.knobs import Choice
from transformer.modules.model import Model
from transformer.parallel.mesh import place
from transformer.parallel.replicas import add_replica_axis
from transformer.run import Run
from transformer.training import loop
from transformer.training.step import abstract_state, init_state, make_train_step, make_train_steps
from transformer.workdir import Workdir

CONFIGS = sorted(path.stem for path in Path("configs").glob("*.py"))


def of(section, **values):
    """The knobs of a section by their full names."""
    return {section + name: value for name, value in values.items()}


RECURRENT, ADAMW = {"model.architecture": "recurrent"}, {"optimizer.name": "adamw"}
DECAY, TWO = {"optimizer.weight_decay": 0.1}, {"replicas": 2, "mesh.replica": 1}
FILES = of("data.", train="tests/pairs.tsv", validation="train[:5]", test="train[5:10]")
RELATIVE, ROTARY = ({"model.position_encoding": name} for name in ("relative", "rotary"))
UNTIED, GATED = {"model.tie_embeddings": "none"}, {"model.feed_forward": "glu"}

# A run of seconds that the knobs are changed in.
SMALL = {
    **of("", steps=8, batch_size=16, log_every=4, eval_every=4, save_every=4),
    **of("", keep_checkpoints=1, decode_margin=2),
    **of("model.", d_model=16, num_heads=2, d_ff=32),
    **{"data.size": "tiny", "optimizer.warmup_steps": 2, "mesh.data": 1},
}

# Another value for each knob, and what must hold besides for it to matter.
OTHER = {
    **of("", seed=1, replicas=2, steps=9, batch_size=8, accumulation_steps=2, max_skipped_steps=3),
    **of("", debug_nans=True, best_metric="loss", log_every=2, eval_every=2, save_every=2),
    **of("", patience=1, decode_every=1, decode_examples=3),
    **of("", keep_checkpoints=2, label_smoothing=0.1, ema_decay=0.9, decode_margin=4),
    **of("data.", dataset="files", source="target", target="source", tokenizer="bytes"),
    **of("data.", target_tokenizer="words", vocab_size=300, max_length=4, num_workers=2),
    **of("data.", size="small", train="train[:50%]", validation="test", test="validation"),
    **of("data.", pack_length=32, metrics=("bleu",), bleu_tokenizer="char", task="copy"),
    **of("per_replica.", seed=(5, 6), learning_rate=(1e-3, 2e-3), warmup_steps=(1, 4)),
    **of("per_replica.", weight_decay=(0.1, 0.2), label_smoothing=(0.1, 0.2)),
    **of("per_replica.", dropout_rate=(0.1, 0.2), attention_dropout_rate=(0.1, 0.2)),
    **of("model.", architecture="recurrent", num_layers=2, d_model=32, num_heads=4, d_k=4),
    **of("model.", d_v=4, num_kv_heads=1, d_ff=64, feed_forward="gelu", cell="gru"),
    **of("model.", kernel_init="normal", dropout_rate=0.1, attention_dropout_rate=0.1, norm="rms"),
    **of("model.", norm_placement="post", norm_epsilon=1e-2, position_encoding="learned"),
    **of("model.", max_length=16, random_positions=64, tie_embeddings="none", ff_dropout_rate=0.1),
    **of("model.", attention_bias=True, normalize_qk=True, qk_norm_epsilon=1e-2, window=2),
    **of("model.", attention_backend="xla", scan_layers=True, remat="full", dtype="bfloat16"),
    **of("model.", separate_vocabularies=False, decoder_layers=3, final_norm=False),
    **of("model.", scale_gated=False, ff_bias=False, position_offset=2, rotary_base=100.0),
    **of("model.", sinusoid_layout="halves", sinusoid_rates="tensor2tensor", logits_scale=0.5),
    **of("model.", relative_buckets=8, relative_distance=20, relative_per_layer=True),
    **of("model.", embedding_scale=3.0, embedding_norm=True, attention_scale=1.0, logits_bias=True),
    **of("", plugins=("tests.helpers",), freeze=("encoder/*",), init_from="x", init_new=("*",)),
    **of("data.", tokenizer_model="x", target_tokenizer_model="x"),
    **of("optimizer.", name="adamw", learning_rate=1e-3, schedule="cosine", warmup_steps=3),
    **of("optimizer.", beta1=0.5, beta2=0.9, epsilon=1e-3, weight_decay=0.1, clip_norm=0.1),
    **of("mesh.", replica=1, data=2, fsdp=2, tensor=2, context=2),
    **of("decoding.", **{each.name: each.default for each in fields(DecodingConfig)}),
}
BESIDES = {
    **{knob: TWO for knob in OTHER if knob.startswith("per_replica.")},
    **of("", patience={"eval_every": 2}, decode_examples={"decode_every": 1}),
    **of("data.", dataset=FILES, vocab_size={"data.tokenizer": "bpe"}),
    **of("data.", target_tokenizer=UNTIED),
    **of("model.", max_length={"model.position_encoding": "learned"}, cell=RECURRENT),
    **dict.fromkeys(of("model.relative_", buckets=0, distance=0, per_layer=0), RELATIVE),
    **of("model.", qk_norm_epsilon={"model.normalize_qk": True}, rotary_base=ROTARY),
    **of("model.", random_positions={"model.max_length": 16}, scale_gated=GATED),
    **of("optimizer.", name=DECAY, weight_decay=ADAMW),
    "model.separate_vocabularies": of("data.", target_tokenizer="words") | UNTIED,
    **{"mesh.replica": {"replicas": 2}, "per_replica.weight_decay": TWO | ADAMW},
}
# adamw with a weight decay is compared with adam; files are no split of toy_strings.
CANNOT_STAND_ALONE = {"optimizer.name": {}, "data.dataset": {}}
model_of, state_of = cache(Model), cache(abstract_state)


def config_of(changes):
    config = default_config()
    config.update_from_flattened_dict(SMALL | changes)
    return config


def resolved(changes):
    return RunConfig.from_config_dict(config_of(changes))


def arguments(cfg):
    hparams = {name: np.asarray(values).tolist() for name, values in cfg.hparams().items()}
    shapes = {n: leaf.shape for n, leaf in model_of(cfg.model, TOKENIZER.vocab_size).shapes.items()}
    return np.asarray(cfg.seeds()).tolist(), hparams, shapes


@cache
def first_step(cfg):
    model = model_of(cfg.model, TOKENIZER.vocab_size)
    train_step, init = make_train_step(model, cfg), partial(init_state, model, cfg)
    return jax.jit(lambda seed, hparams, batch: train_step(init(seed, hparams), batch))


@cache
def program(cfg, whole=True):
    """The first step, or the model alone: its initialisation and its logits in training."""
    one = {name: np.float32(np.ravel(values)[0]) for name, values in cfg.hparams().items()}
    model, key = model_of(cfg.model, TOKENIZER.vocab_size), jax.random.key(0)
    with jax.numpy_dtype_promotion("standard"):  # what a user has; jax.nn relies on it
        batch = strings(("ab", "ba"), ("cd", "dc"))
        if whole:
            return str(jax.make_jaxpr(first_step.__wrapped__(cfg))(np.uint32(0), one, batch))
        return str(jax.make_jaxpr(lambda: logits_of(model, model.init(key), batch, key))())


# The knobs that the program itself is made of; the others are about what is done with it.
PARTS = ("label_smoothing", "ema_decay", "accumulation_steps", "max_skipped_steps")
PARTS += ("model.", "optimizer.", "per_replica.", "freeze")
INSIDE = [knob for knob in OTHER if knob.startswith(PARTS)]
INSIDE.remove("model.separate_vocabularies")


@pytest.mark.parametrize("knob", INSIDE)
def test_every_knob_inside_changes_the_program(knob):
    besides = BESIDES.get(knob, {})
    before = resolved(CANNOT_STAND_ALONE.get(knob, besides))
    after = resolved(besides | {knob: OTHER[knob]})
    whole = not knob.startswith("model.")
    assert arguments(after) != arguments(before) or program(after, whole) != program(before, whole)


class Dispatches:
    """Stands in for a run's compiled programs, and notes what it is called with.

    The loss of step i is i, which tells an interval's steps. Later checkpoints are better.
    """

    trace = staticmethod(lambda *_: None)  # there is no program to trace

    def __init__(self, monkeypatch):
        self.calls, self.step = [], 0
        state = cached_property(self.abstract_state)
        state.__set_name__(Run, "abstract_state")
        programs = {"init": self.init, "train_steps": self, "score": self.score, "step_flops": 1}
        for name, program in (programs | {"abstract_state": state}).items():
            monkeypatch.setattr(Run, name, program)
        monkeypatch.setattr(loop.DispatchSize, "seconds", 1e9)  # whatever time the calls take
        monkeypatch.setattr(Model, "of", partial(Model.of.__func__, model_of))
        monkeypatch.setattr(evaluation, "decode", self.decode)
        monkeypatch.setattr(plots, "learning_curve", lambda *_: None)

    def abstract_state(self, run):
        like = state_of(run.model, resolved({}), run.mesh)  # no knob outside changes it
        self.like = add_replica_axis(like, run.config.replicas)
        return self.like

    def init(self, seeds, hparams):
        self.calls.append(("init", np.asarray(seeds).tolist()))
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self.like)
        state = zeros._replace(seed=np.asarray(seeds), hparams=hparams)
        return place(state, jax.tree.map(lambda leaf: leaf.sharding, self.like))

    def __call__(self, state, sums, data, n):
        with jax.transfer_guard("allow"):
            first, n = state.taken(), int(n)
            self.calls.append(("train", n, digest(data)))
            self.step = first + n
            steps = np.full(state.step.shape, self.step, np.int32)
            added = {"train/objective": sum(range(first + 1, first + n + 1))}
            added |= {"tokens": n, "steps": n}
            sums = {k: jnp.asarray(np.asarray(v) + added.get(k, 0)) for k, v in sums.items()}
            return state._replace(step=place(steps, state.step.sharding)), sums

    def score(self, variables, data):
        self.calls.append(("score", digest(data)))
        ones = np.ones((*self.like.step.shape, len(data)), np.float32)
        names = ("uniform", "correct", "tokens")
        return {"nll": (20.0 - self.step) * ones} | dict.fromkeys(names, ones)

    def decode(self, model, variables, source, streams, prefix, decoding, *, margin, max_length):
        self.calls.append(("decode", source.shape, decoding, margin))
        tokens = jnp.zeros((len(source), 1, max_length), jnp.int32)
        return Hypotheses(
            tokens.at[:, 0, : source.shape[1]].set(source), jnp.zeros((len(source), 1))
        )


def digest(data):
    rows = hash((np.asarray(data.source).tobytes(), np.asarray(data.target).tobytes()))
    batch_size = getattr(data, "batch_size", None)  # the batches of a window are its shape
    return data.source.shape, data.target.shape, batch_size, data.packed, rows


@pytest.fixture
def fingerprint(data_dir, monkeypatch, capsys):
    """All that a person could notice of a run but its speed, its place and its arithmetic."""

    def made(changes, path):
        workdir = Workdir(str(path))
        capsys.readouterr()
        with monkeypatch.context() as patch:
            dispatches = Dispatches(patch)
            state = trained(changes, workdir, data_dir)
        shown = capsys.readouterr().out.replace(str(path), "")
        end = shown[shown.index(f"\nafter {dispatches.step} steps") :]
        return {"calls": dispatches.calls, "results": end} | left(workdir, state)

    return made


def trained(changes, workdir, data_dir):
    run = Run(resolved(changes), workdir.path, data_dir=data_dir)
    train.report(run, run.train())
    return run.state


def left(workdir, state):
    params = state.params.items()
    return {
        "shardings": str({name: (value.shape, value.sharding) for name, value in params}),
        "metrics": results(workdir.path),
        "checkpoints": sorted(each.name for each in workdir.checkpoints.iterdir()),
    }


# Tested in test_health.py, test_datasets.py, test_checkpoint.py, test_saved_runs.py,
# test_init_from.py, test_text.py and test_imported.py.
ELSEWHERE = ["debug_nans", "data.metrics", "data.bleu_tokenizer", "best_metric", "plugins"]
ELSEWHERE += ["init_from", "init_new", "data.tokenizer_model", "data.target_tokenizer_model"]
ELSEWHERE += [knob for knob in OTHER if knob.startswith("decoding.")]
OUTSIDE = [knob for knob in OTHER if knob not in INSIDE + ELSEWHERE]
SLOW = ["data.size", "data.vocab_size", "data.num_workers"]  # prepare much, or start processes
FURTHER = ["pronunciations", "translate", "vaswani_big", "wmt14_ende"]  # configs, slow ones
UNCHANGED = {}  # fingerprints of the unchanged runs, made when first asked for


def slow(names, those):
    return [pytest.param(n, marks=[pytest.mark.slow] * (n in those)) for n in names]


@pytest.mark.parametrize("knob", slow(OUTSIDE, SLOW))
def test_every_other_knob_changes_the_run(knob, fingerprint, tmp_path):
    besides = BESIDES.get(knob, {})
    before = CANNOT_STAND_ALONE.get(knob, besides)
    if (key := str(before)) not in UNCHANGED:
        UNCHANGED[key] = fingerprint(before, tmp_path / "before")
    assert fingerprint(besides | {knob: OTHER[knob]}, tmp_path / "after") != UNCHANGED[key]


def test_the_same_config_gives_the_same_program_and_fingerprint(fingerprint, tmp_path):
    cfg, again = (resolved({"model.dropout_rate": 0.1}) for _ in range(2))
    assert arguments(cfg) == arguments(again)
    assert program.__wrapped__(cfg) == program.__wrapped__(again)
    one, other = (fingerprint({"replicas": 2}, tmp_path / name) for name in "ab")
    assert one == other


def test_the_step_is_traced_but_once_and_a_real_run_leaves_what_the_fingerprint_has(
    fingerprint, tmp_path, data_dir, monkeypatch
):
    expected, workdir = fingerprint({}, tmp_path / "fake"), Workdir(str(tmp_path / "real"))
    traced = Mock(side_effect=lambda steps, *given: steps(*given))
    counted = lambda step: partial(traced, make_train_steps(step))  # noqa: E731
    monkeypatch.setattr("transformer.training.step.make_train_steps", counted)
    with jax.numpy_dtype_promotion("standard"):
        found = left(workdir, trained({}, workdir, data_dir))
    assert traced.call_count == 1
    for each in (found, expected):  # the values are made up
        each["metrics"] = [(row["step"], *row) for row in each["metrics"]]
    assert found == {name: expected[name] for name in found}


def test_every_config_names_itself_has_all_knobs_and_builds():
    assert OTHER.keys() == flat_knobs(default_config()).keys()
    for name in CONFIGS:
        module = importlib.import_module(f"configs.{name}")
        assert f"python train.py --config=configs/{name}.py" in module.__doc__
        config = module.get_config()
        assert flat_knobs(config).keys() == OTHER.keys()
        config.model.num_layers = 1
        model_of(RunConfig.from_config_dict(config).model, TOKENIZER.vocab_size)


@pytest.mark.parametrize("name", slow(CONFIGS, FURTHER))
def test_every_config_takes_a_step_at_reduced_size(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.model.update({"num_layers": 1, "d_model": 16, "num_heads": 2, "d_ff": 32})
    config.data = default_config().data  # the toy configs are then one program
    cfg, batch = RunConfig.from_config_dict(config), strings(("abc", "cba"), ("de", "ed"))
    state, sums = first_step(cfg)(cfg.seeds(), cfg.hparams(), batch)
    assert state.step == 1
    assert 1.0 < sums["train/objective"] / sums["tokens"] < 10.0


@pytest.mark.parametrize(("knob", "value", "constraint"), [*RunConfig().constrained()])
def test_every_constraint_is_checked(knob, value, constraint):
    is_choice = isinstance(constraint, Choice)
    wrong = "zzz" if is_choice else type(value)(constraint.least - 1)
    limit = "choose one of" if is_choice else "it must be at least"
    refused(f"^{knob}={wrong}: {limit}", resolved, {knob: wrong})


# What is said of a knob that is wrong, which begins with the knob and its value. Before a `&`
# stands what must hold besides.
MISTAKES = r"""
model.architecture=recurrent & model.num_heads=3 & model.position_encoding=none &
  model.d_model=15: each direction
model.position_encoding=none & model.random_positions=512: .*none | optimizer.warmup_steps=8 is not
model.architecture=recurrent & data.pack_length=64: model.architecture=recurrent reads one example
model.architecture=recurrent & model.decoder_layers=2: model.architecture=recurrent has num_layers
model.architecture=recurrent & model.attention_dropout_rate=0.1: only the Transformer | model.d_k=0
model.attention_backend=xla & model.attention_dropout_rate=0.1: .*einsum drops
model.attention_backend=cudnn computes only in bfloat16 | model.num_kv_heads=3 does not divide
model.num_heads=3 does not divide model.d_model=16.*or set model.d_k | optimizer.learning_rate=nan
optimizer.learning_rate=inf: it must be at most 3.4 | model.random_positions=64: .*at least model.m
model.position_encoding=rotary & model.d_k=3 is odd: rotary | model.cell=lstn: .*did you mean lstm\?
model.norm_epsilon=1e-60: it must be at least 1.17549e-38 | model.window=0: it must be at least 1$
max_skipped_steps=2147483648: .* at most 2,147,483,646 | model.num_heads=3 & model.d_model=15 is odd
label_smoothing=1.0: it must be at least 0 and below 1 | steps=1000000000 .* passes 2\*\*32 examples
model.attention_backend=xla & model.d_v=4 .*einsum | accumulation_steps=3 does not divide batch
model.norm=batch & accumulation_steps=2: model.norm=batch needs | model.relative_buckets=3: .* 4
model.position_encoding=relative & model.relative_distance=16 is not above half of model.relative_b
"""


def mistakes():
    knobs = flat_knobs(config_of({}))
    for each in MISTAKES.strip().replace("&\n ", "&").replace("\n", " | ").split(" | "):
        pairs = [re.match(r"([\w.]+)=([^:\s]+)", part).groups() for part in each.split(" & ")]
        read = {knob: {str: str, float: float}.get(type(knobs[knob]), int) for knob, _ in pairs}
        yield {knob: read[knob](value) for knob, value in pairs}, "^" + each.split(" & ")[-1]


INPUTS = {"model.tie_embeddings": "inputs", "data.target_tokenizer": "bytes"}
ONLY_DATA = r"model.architecture=recurrent is sharded by mesh.data alone; set all"
RATES, WHOLE = "per_replica.dropout_rate", r"takes a whole number for each"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *mistakes(),
        ({"data.metrics": ("blue",)}, r"data.metrics=blue: .*did you mean bleu\?"),
        (DECAY | {"optimizer.name": "sgd"}, r"weight_decay is for adamw, lion, muon"),
        *((RECURRENT | {f"mesh.{a}": 2}, f"mesh.{a}=2.*{ONLY_DATA}") for a in ("fsdp", "context")),
        ({"data.target_tokenizer_model": "x"}, r"target_tokenizer_model=x: model.tie_embeddings"),
        (of("model.", relative_per_layer=True), r"layer=True needs .*=relative or transformer_xl"),
        (INPUTS, r"=bytes: model.tie_embeddings=inputs needs one vocabulary; set .*target_output"),
        ({"init_new": ("*",)}, r"init_new=.*there is no init_from; set it"),
        ({RATES: (0.1,)}, r"per_replica.dropout_rate has 1 values and replicas=1"),
        (TWO | {RATES: (0.1, 0.2, 0.3)}, r"per_replica.dropout_rate has 3 values and replicas=2"),
        (TWO | {RATES: (0.1, 1.5)}, r"dropout_rate=1.5: it must be at least 0 and below 1"),
        *((TWO | {"per_replica.seed": each}, WHOLE) for each in (("a", "b"), (0, 0.5))),
    ],
)
def test_a_config_that_contradicts_itself_is_explained(changes, message):
    refused(message, resolved, changes)


def test_a_knob_that_does_not_exist_or_is_missing_is_named():
    config = default_config()
    config.unlock()
    config.model.nrm = "rms"
    unknown = r"model.nrm: unknown option \(did you mean model.norm\?\)"
    refused(unknown, RunConfig.from_config_dict, config)
    refused(r"^wxyz: unknown option$", RunConfig.from_config_dict, ConfigDict({"wxyz": 1}))
    construct = Run.__init__.__wrapped__  # without the type checks of the tests
    refused(r"RunConfig\.from_config_dict", construct, None, config)
    refused("helpers.py does not define a function get_config", load_config, "tests/helpers.py")
    del config.model.nrm, config.mesh.fsdp
    assert RunConfig.from_config_dict(config).mesh.fsdp == 1  # as it is by default


def test_differences_name_what_changes_a_result_and_leave_out_what_does_not():
    free = {"mesh.fsdp": 2, "keep_checkpoints": 9, "decoding.beam_size": 4}
    changes = free | {"model.norm": "rms", "optimizer.beta1": 0.5, "data.pack_length": 8}
    found = differences(config_of({}), config_of(changes))
    expected = "data.pack_length: 0 → 8", "model.norm: layer → rms", "optimizer.beta1: 0.9 → 0.5"
    assert tuple(found) == expected
