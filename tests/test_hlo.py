"""Traffic read from optimized HLO, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec
from lab.planning.hlo import group_size, traffic

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
