"""Plans for simulated CPUs and, with their compiler, for TPUs; the traffic in optimized HLO."""

import importlib.util
import math
import runpy
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec
from lab.planning import plan as planning
from lab.planning.hlo import group_size, traffic
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
    assert plan.memory["batch"] == 8 * 4 * (load().batch_size // 4) * 16  # eight arrays
    assert plan.memory["other arguments, padding"] == 5 * 4  # scalars of the train state
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
    plan, alone = toy(model__tie_embeddings="none"), toy("cpu:1")
    assert set(plan.traffic.sent) == {"all-reduce"}
    check_gradients_are_sent_once(plan)
    assert (alone.traffic.sent, alone.chips, alone.tokens) == ({}, 1, load().batch_size * 16)
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
    assert found(8, model__architecture="recurrent", data__pack_length=0) == [(1, 8, 1, 1, 1)]


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
    # The compiler takes five times as long for the whole batch of the base model.
    cfg = load(name, model__attention_backend=backend, model__num_layers=1, batch_size=16)
    plan = make_plan(cfg, open_topology("v5e:2x2"), vocab_size=37_000, length=32)
    assert plan.refusal == ""
    assert 0.0 < plan.mfu() < 1.0
    assert "all-reduce" in plan.traffic.sent


@on_tpu
def test_a_tpu_sends_its_gradients_once_and_every_topology_of_the_table_is_known():
    plan = toy("v5e:2x2", model__tie_embeddings="none")
    check_gradients_are_sent_once(plan)
    assert sum(plan.memory.values()) < plan.topology.chip.memory == CHIPS["v5e"].memory
    for name in planning.TPUS:
        assert len(open_topology(name).devices) == planning.device_count(name)


@on_tpu
def test_the_compiler_refuses_what_does_not_fit():
    cfg = load(**NARROW, batch_size=2**19)  # one array of the residual stream takes half the memory
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


ROWS, BYTES = 8, 8 * 128 * 4  # each device's part of the array: float32 [8, 128]


def traffic_of(function, shape=(4,)):
    """Of `function`, called by each device of a mesh of axes a, b with its own [8, 128]."""
    axes = ("a", "b")[: len(shape)]
    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * len(axes))
    spec = PartitionSpec(axes)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    whole = jax.ShapeDtypeStruct((ROWS * mesh.size, 128), jnp.float32)
    return traffic(jax.jit(mapped).lower(whole).compile().as_text(), mesh.size)


RING = [(0, 1), (1, 2), (2, 3), (3, 0)]


@pytest.mark.parametrize(
    ("kind", "function", "sent"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "a"), 2 * 3 / 4),
        ("all-gather", lambda x: jax.lax.all_gather(x, "a"), 3),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "a", tiled=True), 3 / 4),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "a", 0, 0, tiled=True), 3 / 4),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "a", RING), 1),
    ],
)
def test_a_collective_over_four_devices(kind, function, sent):
    found = traffic_of(function)
    assert (found.sent, found.counts) == ({kind: sent * BYTES}, {kind: 1})


@pytest.mark.parametrize(("axis", "devices"), [("a", 2), ("b", 4)])
def test_a_group_is_a_subset_of_the_devices(axis, devices):
    found = traffic_of(lambda x: jax.lax.psum(x, axis), (2, 4))
    assert found.sent == {"all-reduce": 2 * (devices - 1) / devices * BYTES}


def test_a_loop_counts_once_per_iteration_and_once_if_their_number_is_unknown():
    def loop(x):
        body = lambda x, _: (jnp.sin(jax.lax.psum(x, "a")), None)  # noqa: E731
        return jax.lax.scan(body, x, length=7)[0]

    def unknown(x):
        return jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: jax.lax.psum(x, "a"), x)

    found, other = traffic_of(loop), traffic_of(unknown)
    assert (found.counts, found.unknown_loops) == ({"all-reduce": 7}, 0)
    assert found.sent == {"all-reduce": 7 * 2 * 3 / 4 * BYTES}
    assert found.memory >= 7 * 4 * BYTES  # the sum and the sine each read and write it
    assert (other.counts, other.unknown_loops) == ({"all-reduce": 1}, 1)


# Programs of the TPU compiler, reduced to what is read.
TPU = """HloModule step
%all-reduce-scatter.1 (input: f32[8,128]) -> f32[2,128] {
  %input = f32[8,128]{1,0} parameter(0)
  %all-reduce.1 = f32[8,128]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}
  ROOT %dynamic-slice.1 = f32[2,128]{1,0} dynamic-slice(%all-reduce.1, %index)
}
%first (p.1: bf16[4,128]) -> bf16[8,128] {
  %p.1 = bf16[4,128]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), \
replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, frontend_attributes={chain_id="7"}
}
%second (p.2: bf16[4,128]) -> bf16[8,128] {
  %p.2 = bf16[4,128]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,128]{1,0} all-gather(%p.2), \
replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}, frontend_attributes={chain_id="7"}
}
%below (state.1: (s32[], f32[2,128])) -> pred[] {
  %state.1 = (s32[], f32[2,128]{1,0:S(1)}) parameter(0)
  %bound = s32[]{:T(128)} constant(5)
  %at.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)S(6)} compare(%at.1, %bound), direction=LT
}
%body (state.2: (s32[], f32[2,128])) -> (s32[], f32[2,128]) {
  %state.2 = (s32[], f32[2,128]{1,0:S(1)}) parameter(0)
  %x = f32[2,128]{1,0:S(1)} get-tuple-element(%state.2), index=1
  %permuted = f32[2,128]{1,0:S(1)} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %tuple = (s32[], f32[2,128]{1,0:S(1)}) tuple(%at.2, %permuted)
}
ENTRY %main (a: f32[8,128], b: bf16[4,128]) -> f32[2,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = bf16[4,128]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %slice-start = ((f32[8,128]{1,0}), f32[1,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a)
  %fusion.1 = f32[2,128]{1,0:S(1)} fusion(%copy-done), calls=%all-reduce-scatter.1
  %fusion.2 = bf16[8,128]{1,0:S(1)} fusion(%b), kind=kOutput, calls=%first
  %fusion.3 = bf16[8,128]{1,0:S(1)} fusion(%b), kind=kOutput, calls=%second
  %carry = (s32[], f32[2,128]{1,0:S(1)}) tuple(%zero, %fusion.1)
  ROOT %while = (s32[], f32[2,128]{1,0:S(1)}) while(%carry), condition=%below, body=%body
}
"""


def test_programs_of_the_tpu_compiler():
    found = traffic(TPU, 4)
    scattered, permuted = {"reduce-scatter": 3 / 4 * 4096}, {"collective-permute": 5 * 1024}
    assert found.sent == {"all-gather": 1024} | scattered | permuted
    assert found.counts == {"reduce-scatter": 1, "all-gather": 1, "collective-permute": 5}
    # The copy's source, the slice's, %b twice, what the loop compares; all else is on the chip.
    assert (found.memory, found.unknown_loops) == (4096 + 512 + 2 * 1024 + 5 * 8, 0)


def test_asynchronous_forms_count_once():
    found = traffic("""ENTRY %main (a: f32[8,128]) -> f32[32,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %start = (f32[8,128]{1,0}, f32[32,128]{1,0}) all-gather-start(%a), replica_groups=[1,4]<=[4]
  ROOT %done = f32[32,128]{1,0} all-gather-done(%start)
}""", 4)  # fmt: skip
    assert (found.sent, found.counts) == ({"all-gather": 3 * 4096}, {"all-gather": 1})


# How a program writes groups, and how many of 8 devices are in each.
GROUPS = """
{{0,2},{1,3}} = 2
{{0,1,2,3,4,5,6,7}} = 8
[2,4]<=[8] = 4
[4,2]<=[2,4]T(1,0) = 2
mesh['axis_0'=2,'axis_1'=4] {'axis_1'} = 4
mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'} = 4
mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'} = 2
mesh['axis_0'=8] {'axis_0':(2)4} = 4
{} = 8
"""


@pytest.mark.parametrize("line", GROUPS.strip().splitlines())
def test_every_notation_of_groups(line):
    groups, size = line.rsplit(" = ")
    assert group_size(f", replica_groups={groups}, use_global=true", 8) == int(size)
