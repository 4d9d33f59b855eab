"""Plans for simulated CPUs and, where its compiler is installed, for TPUs."""

import importlib.util
import math
import runpy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from lab.planning import plan as planning
from lab.planning.plan import CHIPS, Chip, make_plan, meshes, open_topology, rank

from tests.helpers import program, refused
from tests.test_programs import complaint, finish, start
from transformer.config import RunConfig
from transformer.metrics import figure
from transformer.modules.model import Model

CONFIGS = [
    pytest.param(path.stem, marks=[pytest.mark.slow] * (path.stem != "vaswani_base"))
    for path in sorted(Path("configs").glob("*.py"))
]
NARROW = {"model__num_layers": 1, "model__d_model": 16, "model__num_heads": 2, "model__d_ff": 32}
TOY = "--config=configs/toy_reverse.py"
# A chip whose units need as many seconds as a step has operations or bytes.
UNIT = Chip(1.0, math.inf, 1.0, 1.0, "")


def on_tpu(test):
    """Marks a test that compiles for TPUs."""
    missing, reason = importlib.util.find_spec("libtpu") is None, "pip install -e '.[plan]'"
    return pytest.mark.slow(pytest.mark.skipif(missing, reason=reason)(test))


def load(name="toy_reverse", **changes):
    """A shipped config, with other knobs: `model__d_model=32`."""
    config = runpy.run_path(f"configs/{name}.py")["get_config"]()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return RunConfig.from_config_dict(config)


@cache
def toy(topology="cpu:2x2", **changes):
    return make_plan(load(**changes), open_topology(topology), vocab_size=96, length=16)


def on(chip):
    """The plan of a toy config, had the devices been such chips."""
    return replace(toy(), topology=toy().topology._replace(chip=chip))


def test_memory_by_kind_is_that_of_the_arrays():
    plan, parameters = toy(), 4 * Model(load().model, 96).count_parameters()
    assert plan.memory["parameters"] == parameters
    assert plan.memory["opt_state"] == 2 * parameters + 2 * 4  # Adam's, and two counts
    assert plan.memory["batch"] == 8 * 4 * (128 // 4) * 16  # eight arrays, a quarter of the rows
    assert plan.memory["other arguments, padding"] == 16  # step, seed, and two counts of bad steps
    assert plan.memory["activations, gradients, temporaries"] > 0
    assert "ema_params" not in plan.memory
    assert toy(ema_decay=0.9).memory["ema_params"] == parameters


def test_fsdp_shards_all_but_the_small_norms_and_biases():
    whole, split = toy(), toy(mesh__data=1, mesh__fsdp=4)
    assert [*whole.mesh.values(), *split.mesh.values()] == [4, 1, 1, 1, 1, 4, 1, 1]
    for kind in ("parameters", "opt_state"):
        assert 0.25 < split.memory[kind] / whole.memory[kind] < 0.28
    assert split.memory["batch"] == whole.memory["batch"]
    assert "all-gather" in split.traffic.sent


def check_gradients_are_sent_once(plan):
    """And a few scalars. Of a tied table those of its three uses may be sent one by one."""
    expected = 2 * 3 / 4 * plan.memory["parameters"]  # of each device in a ring of 4
    assert expected < plan.traffic.sent["all-reduce"] < 1.01 * expected


def test_devices_send_their_gradients_once_and_a_single_device_sends_nothing():
    plan, alone = toy(model__tie_embeddings=False), toy("cpu:1")
    assert set(plan.traffic.sent) == {"all-reduce"}
    check_gradients_are_sent_once(plan)
    assert (alone.traffic.sent, alone.chips, alone.tokens) == ({}, 1, 128 * 16)
    # The compiler counts what the formula counts and a little more.
    assert 1.0 < toy().flops * toy().chips / toy().model_flops < 1.25
    assert toy("cpu:1").model_flops == toy().model_flops


def test_the_roofline_is_the_slowest_unit():
    """With units of one operation or byte per second; without figures there is no estimate."""
    plan = on(UNIT)
    seconds, memory, sent = plan.seconds(), plan.traffic.memory, plan.traffic.sent["all-reduce"]
    assert seconds == {"compute": plan.flops, "memory": memory, "interconnect": sent}
    assert plan.roofline() == max((each, unit) for unit, each in seconds.items())
    assert plan.mfu() == plan.model_flops / 4 / plan.roofline()[0]
    slow = on(UNIT._replace(interconnect=1e-6))
    assert slow.roofline() == (pytest.approx(1e6 * sent), "interconnect")
    assert (toy().seconds(), toy().roofline()) == ({}, (math.inf, ""))
    # The slower ranks later, and what does not fit last.
    slow, refused = on(UNIT._replace(bandwidth=1e-3)), replace(plan, refusal="no room")
    assert slow.seconds()["memory"] == pytest.approx(1e3 * memory)
    assert refused.seconds() == {}
    assert rank([refused, slow, plan]) == [plan, slow, refused]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_shows_the_memory_the_roofline_and_the_cost_of_all_chips(capsys):
    plan = on(CHIPS["v5e"])
    with program("scripts/plan.py", TOY, "--topology=v5e:2x2", "--price=3") as script:
        script.show([plan])
    shown, (seconds, bound) = capsys.readouterr().out, plan.roofline()
    hours = 4 * seconds * plan.steps / 3600
    cost = f"{figure(hours)} chip-hours, ${figure(3 * hours)}"
    assert all(words in shown for words in ("data 4", "all-reduce", "parameters", bound, cost))


def test_a_sweep_tries_every_mesh_that_divides_devices_and_batch():
    def found(devices, **changes):
        return [tuple(vars(cfg.mesh).values()) for cfg in meshes(load(**changes), devices)]

    assert found(4, batch_size=2) == [(1, 1, 1, 4, 1), (1, 1, 2, 2, 1), (1, 2, 1, 2, 1)]
    assert found(4, mesh__context=2) == [(1, 1, 1, 2, 2), (1, 1, 2, 1, 2), (1, 2, 1, 1, 2)]
    assert len(found(8)) == 10  # 8 = 2³: as many as (a, b, c) with a sum of 3
    assert found(8, model__architecture="recurrent") == [(1, 8, 1, 1, 1)]


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("needs 8 devices and there are 4", {"mesh__data": 8}),
        ("batch_size=126 does not divide", {"batch_size": 126}),
        (r"tensor=4 does not divide the 2 of", {"mesh__tensor": 4, "model__num_heads": 2}),
        ("--length=16: 16 tokens", {"model__position_encoding": "learned", "model__max_length": 8}),
        ("replicas=2", {"replicas": 2}),
        (r"did you mean v5e:4x\d", {"topology": "v5e:4x5"}),
        ("choose one of", {"topology": "cpu:0"}),
        ("JAX simulates 8 CPUs; set JAX_NUM_CPU_DEVICES=64", {"topology": "cpu:64"}),
        (r"pip install -e '\.\[plan\]'", {"topology": "v5e:2x2"}),
    ],
)
def test_what_cannot_be_planned_is_refused(message, changes, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(message, toy, **changes)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_compiles_for_simulated_devices(name):
    cfg = load(name, **NARROW, batch_size=8)
    plan = make_plan(cfg, open_topology("cpu:2x2"), vocab_size=96, length=16)
    assert plan.chips == 4
    assert plan.flops > 0


@on_tpu
@pytest.mark.parametrize(
    "case", ["toy_reverse:splash", "toy_reverse:einsum", "vaswani_base:einsum"]
)
def test_a_shipped_config_compiles_for_a_tpu(case):
    name, backend = case.split(":")
    cfg = load(name, model__attention_backend=backend, model__num_layers=1)
    plan = make_plan(cfg, open_topology("v5e:2x2"), vocab_size=37_000, length=32)
    assert plan.refusal == ""
    assert 0.0 < plan.mfu() < 1.0
    assert "all-reduce" in plan.traffic.sent


@on_tpu
def test_a_tpu_sends_its_gradients_once_and_every_topology_of_the_table_is_known():
    plan = toy("v5e:2x2", model__tie_embeddings=False)
    check_gradients_are_sent_once(plan)
    assert sum(plan.memory.values()) < plan.topology.chip.memory == CHIPS["v5e"].memory
    for name in planning.TPUS:
        assert len(open_topology(name).devices) == planning.device_count(name)


@on_tpu
def test_the_compiler_refuses_what_does_not_fit():
    """Narrow layers, whose logits alone would fill the memory."""
    cfg = load(**NARROW, batch_size=4096)
    plan = make_plan(cfg, open_topology("v5e:1x1"), vocab_size=37_000, length=64)
    assert "HBM" in plan.refusal.upper()
    assert (plan.seconds(), plan.roofline()) == ({}, (math.inf, ""))


@pytest.mark.slow
def test_the_command_prints_a_plan_and_ranks_meshes():
    out = finish(start("scripts/plan.py", TOY, "--topology=cpu:2x2"))
    for words in ("cpu:2x2, data 4", "activations, gradients", "all-reduce", "vocabulary 37,000"):
        assert words in out
    out = finish(start("scripts/plan.py", TOY, "--topology=cpu:4", "--sweep", "--vocab=90"))
    assert "skipped: mesh.tensor=4 does not divide the 90" in out
    assert out.count("cpu:4, ") == 2 * 5  # of six meshes, in the log and in the table
    assert "did you mean" in complaint("scripts/plan.py", TOY, "--topology=v5:4x4")
    assert "topology" in complaint("scripts/plan.py", TOY)
    assert "no mesh" in complaint("scripts/plan.py", TOY, "--topology=cpu:3", "--sweep")
