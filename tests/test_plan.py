"""Plans of runs, for simulated CPUs and, where its compiler is installed, for TPUs."""

import importlib.util
import math
import runpy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import program
from tests.test_programs import complaint, finish, start
from transformer import planning
from transformer.config import RunConfig
from transformer.console import figure
from transformer.errors import UserError
from transformer.model import Model
from transformer.planning import CHIPS, Chip, make_plan, meshes, open_topology, rank
from transformer.sharding import MeshConfig

CONFIGS = sorted(path.stem for path in Path("configs").glob("*.py") if path.stem != "__init__")
TPU_CASES = [  # those of ATTENTION_BACKENDS that are meant for TPUs, and a paper's config
    *(("toy_reverse", backend) for backend in ("einsum", "xla", "chunked", "splash")),
    *(("vaswani_base", backend) for backend in ("einsum", "splash")),
]

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU's compiler is not installed: pip install -e '.[plan]'",
)

# A chip on which compute takes a step's operations, in seconds, and so on.
UNIT = Chip(1.0, math.inf, 1.0, 1.0, ())


def load(name="toy_reverse", **changes):
    """A shipped config, with other knobs: `model__width=32`."""
    config = runpy.run_path(f"configs/{name}.py")["get_config"]()
    config.update_from_flattened_dict(
        {knob.replace("__", "."): value for knob, value in changes.items()}
    )
    return RunConfig.resolve(config)


@cache
def toy(topology="cpu:2x2", **changes):
    """The plan of a toy config."""
    return make_plan(load(**changes), open_topology(topology), vocab_size=96, length=16)


def on(chip, plan):
    """The same plan, had the devices been such chips."""
    return replace(plan, topology=replace(plan.topology, chip=chip))


def test_memory_by_kind_is_that_of_the_arrays():
    plan, parameters = toy(), 4 * Model(load().model, 96).count_parameters()
    assert plan.memory["parameters"] == parameters
    assert plan.memory["moments"] == 2 * parameters + 2 * 4  # Adam's, and two counts
    assert plan.memory["batch"] == 8 * 4 * (128 // 4) * 16  # eight arrays, a quarter of the rows
    assert plan.memory["other arguments, padding"] == 16  # step, seed, and two counts of bad steps
    assert plan.memory["activations, gradients, temporaries"] > 0
    assert "average" not in plan.memory
    assert toy(ema_decay=0.9).memory["average"] == parameters


def test_fsdp_splits_what_it_should():
    """All but norms and biases, which are small."""
    whole, split = toy(), toy(mesh__data=1, mesh__fsdp=4)
    assert whole.mesh == {"data": 4, "fsdp": 1, "tensor": 1, "context": 1}
    assert split.mesh == {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}
    for kind in ("parameters", "moments"):
        assert 0.25 < split.memory[kind] / whole.memory[kind] < 0.28
    assert split.memory["batch"] == whole.memory["batch"]
    assert "all-gather" in split.traffic.sent


def test_data_parallel_devices_send_their_gradients_once():
    """And a few scalars: in a ring of 4 each sends 2 · 3/4 of all gradients.

    (Of a tied table the compiler may add up the gradients of its three uses one by one.)
    """
    plan = toy(model__tie_embeddings=False)
    assert set(plan.traffic.sent) == {"all-reduce"}
    expected = 2 * 3 / 4 * plan.memory["parameters"]
    assert expected < plan.traffic.sent["all-reduce"] < 1.01 * expected


def test_one_device_sends_nothing():
    plan = toy("cpu:1")
    assert plan.traffic.sent == {}
    assert plan.chips == 1
    assert plan.tokens == 128 * 16


def test_the_compiler_counts_what_the_formula_counts_and_a_little_more():
    plan = toy()
    assert 1.0 < plan.flops * plan.chips / plan.model_flops < 1.25
    assert toy("cpu:1").model_flops == plan.model_flops


def test_the_roofline_is_the_slowest_unit():
    """With units that do one operation or byte a second."""
    plan = on(UNIT, toy())
    seconds = plan.seconds()
    assert seconds == {
        "compute": plan.flops,
        "memory": plan.traffic.memory,
        "interconnect": plan.traffic.sent["all-reduce"],
    }
    assert plan.step_seconds() == max(seconds.values())
    assert seconds[plan.bound()] == plan.step_seconds()
    assert plan.mfu() == plan.model_flops / 4 / plan.step_seconds()
    assert plan.hours() == plan.step_seconds() * 1_800 / 3600
    slow = on(replace(UNIT, interconnect=1e-6), toy())
    assert slow.bound() == "interconnect"
    assert slow.step_seconds() == pytest.approx(1e6 * seconds["interconnect"])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_shows_the_memory_the_roofline_and_the_cost_of_all_chips(capsys):
    plan = on(CHIPS["v5e"], toy())
    words = ("--config=configs/toy_reverse.py", "--topology=v5e:2x2", "--price=3")
    with program("scripts/plan.py", *words) as script:
        script.show(plan)
    shown = capsys.readouterr().out
    hours = f"{figure(plan.hours() * 4)} chip-hours, ${figure(plan.hours() * 4 * 3)}"
    for words in ("data 4", "all-reduce", "parameters", "into 16 GiB", plan.bound(), hours):
        assert words in shown


def test_without_figures_there_is_no_roofline():
    assert toy().seconds() == {}
    assert toy().step_seconds() == math.inf


def test_the_slower_ranks_later_and_what_does_not_fit_last():
    fast, slow = on(UNIT, toy()), on(replace(UNIT, bandwidth=1e-3), toy())
    refused = replace(fast, refusal="no room")
    assert refused.seconds() == {}
    assert rank([refused, slow, fast]) == [fast, slow, refused]


def test_a_sweep_tries_every_mesh_that_divides_devices_and_batch():
    found = [tuple(vars(cfg.mesh).values()) for cfg in meshes(load(batch_size=2), 4)]
    assert found == [(1, 1, 1, 4, 1), (1, 1, 2, 2, 1), (1, 2, 1, 2, 1)]
    long = [tuple(vars(cfg.mesh).values()) for cfg in meshes(load(mesh__context=2), 4)]
    assert long == [(1, 1, 1, 2, 2), (1, 1, 2, 1, 2), (1, 2, 1, 1, 2)]
    assert len(list(meshes(load(), 8))) == 10  # 8 = 2³: as many as (a, b, c) with a sum of 3
    recurrent = list(meshes(load(model__architecture="recurrent"), 8))
    assert [cfg.mesh for cfg in recurrent] == [
        MeshConfig(replica=1, data=8, fsdp=1, tensor=1, context=1)
    ]


def test_a_mesh_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="needs 8 devices and there are 4"):
        toy(mesh__data=8)
    with pytest.raises(UserError, match="batch_size=126 does not divide"):
        toy(batch_size=126)
    with pytest.raises(UserError, match=r"mesh.tensor=4 does not divide the 2 of axis 'heads'"):
        toy(mesh__tensor=4, model__heads=2)
    with pytest.raises(UserError, match="--length=16: 16 tokens"):
        toy(model__position="learned", model__max_length=8)
    with pytest.raises(UserError, match="replicas=2"):
        toy(replicas=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:4x5", r"did you mean v5e:4x\d"),
        ("v5x:4x4x4", r"did you mean v5p:4x4x4"),
        ("cpu:0", "choose one of"),
        ("cpu:64", "JAX simulates 8 CPUs; set JAX_NUM_CPU_DEVICES=64"),
    ],
)
def test_an_unknown_topology_is_refused(name, message):
    with pytest.raises(UserError, match=message) as error:
        open_topology(name)
    assert "\n" not in str(error.value)


def test_without_the_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[plan\]'"):
        open_topology("v5e:2x2")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "vaswani_base")) for name in CONFIGS],
)
def test_a_shipped_config_compiles_for_simulated_devices(name):
    """With a narrow layer of each kind: here it is about the config, not about size."""
    small = {"layers": 1, "width": 16, "heads": 2, "ff_width": 32}
    changes = {f"model__{knob}": value for knob, value in small.items()}
    cfg = load(name, **changes, batch_size=8)
    plan = make_plan(cfg, open_topology("cpu:2x2"), vocab_size=96, length=16)
    assert plan.chips == 4
    assert plan.flops > 0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), TPU_CASES)
def test_a_shipped_config_compiles_for_a_tpu(name, backend):
    cfg = load(name, model__attention_backend=backend, model__layers=1)
    plan = make_plan(cfg, open_topology("v5e:2x2"), vocab_size=37_000, length=32)
    assert plan.refusal == ""
    assert 0.0 < plan.mfu() < 1.0
    assert "all-reduce" in plan.traffic.sent


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_sends_its_gradients_once():
    plan = toy("v5e:2x2", model__tie_embeddings=False)
    expected = 2 * 3 / 4 * plan.memory["parameters"]
    assert expected < plan.traffic.sent["all-reduce"] < 1.01 * expected
    assert plan.topology.chip == CHIPS["v5e"]
    assert sum(plan.memory.values()) < CHIPS["v5e"].memory


@needs_libtpu
@pytest.mark.slow
def test_every_topology_of_the_table_is_known_to_the_compiler():
    for kind, chip in CHIPS.items():
        for shape in chip.topologies:
            name = f"{kind}:{shape}"
            assert len(open_topology(name).devices) == planning.count(name)


@needs_libtpu
@pytest.mark.slow
def test_the_compiler_refuses_what_does_not_fit():
    cfg = load(model__width=8192, model__ff_width=8192, model__heads=64, batch_size=4096)
    plan = make_plan(cfg, open_topology("v5e:1x1"), vocab_size=37_000, length=64)
    assert "HBM" in plan.refusal.upper()
    assert plan.seconds() == {}
    assert plan.step_seconds() == math.inf


@pytest.mark.slow
def test_the_command_prints_a_plan_and_ranks_meshes():
    toy_config = "--config=configs/toy_reverse.py"
    out = finish(start("scripts/plan.py", toy_config, "--topology=cpu:2x2"))
    assert "cpu:2x2, data 4" in out
    assert "activations, gradients, temporaries" in out
    assert "all-reduce" in out
    assert "37,000 pieces" in out
    out = finish(start("scripts/plan.py", toy_config, "--topology=cpu:4", "--sweep", "--vocab=90"))
    assert "left out: mesh.tensor=4 does not divide the 90" in out
    assert out.count("cpu:4 ") == 5  # of six meshes


@pytest.mark.slow
def test_what_the_command_cannot_do_is_one_line():
    line = complaint("scripts/plan.py", "--config=configs/toy_copy.py", "--topology=v5:4x4")
    assert "did you mean" in line
    line = complaint("scripts/plan.py", "--config=configs/toy_copy.py")
    assert "topology" in line
    line = complaint(
        *("scripts/plan.py", "--config=configs/toy_copy.py", "--topology=cpu:3", "--sweep")
    )
    assert "no mesh" in line
