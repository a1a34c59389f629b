"""Compiled programs read back: small ones of this machine's compiler against arithmetic, and forms that the TPU's compiler prints.

The TPU's lines are as libtpu 0.0.52 printed them for v5e, without layouts' tilings, metadata and most of `backend_config`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemmary.errors import GemmaryError
from gemmary.plan import (
    Collective,
    Costs,
    Program,
    Shape,
    collectives,
    custom_calls,
    matmul_flops,
    memory_bytes,
    read_program,
    shapes_of,
)
from gemmary.plan.program_groups import members_of

SIZES = {"data": 2, "model": 4}
P = PartitionSpec


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def compiled(function: Callable[..., Any], *arguments: Any) -> Program:
    return read_program(jax.jit(function).lower(*arguments).compile().as_text())


def array(*dims: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def test_products_of_a_step_in_a_scan_under_a_mesh(mesh: Mesh) -> None:
    layers, batch, width, inner = 6, 16, 64, 256

    def on(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, P(*axes))

    def layer(x: jax.Array, ab: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden = jax.lax.with_sharding_constraint(jnp.tanh(x @ ab[0]), on("data", "model"))
        return jax.lax.with_sharding_constraint(x + hidden @ ab[1], on("data", None)), None

    def loss(weights: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
        return jax.lax.scan(layer, x, weights)[0].sum()

    weights = (
        jax.ShapeDtypeStruct((layers, width, inner), jnp.float32, sharding=on(None, "data", "model")),
        jax.ShapeDtypeStruct((layers, inner, width), jnp.float32, sharding=on(None, "model", "data")),
    )
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=on("data"))
    program = compiled(jax.grad(loss), weights, x)
    assert program.devices == 8
    assert program.scheduled
    assert set(program.trips.values()) == {layers}
    assert not program.unknown_loops
    # Two products, each made once forward and twice backward.
    assert matmul_flops(program) == 2 * 3 * layers * 2 * batch * width * inner / 8
    found = collectives(program, SIZES)
    assert {(one.kind, one.along, one.group, one.times) for one in found} == {
        ("all-gather", "data", 2, layers),
        ("all-reduce", "model", 4, layers),
        ("all-reduce", "data", 2, layers),
    }
    # A layer's weights are put together over `data` before their products, in halves of what each device then holds.
    gathered = [one for one in found if one.kind == "all-gather"]
    assert {one.result_bytes for one in gathered} == {4 * width * inner // 4}
    assert {one.operand_bytes for one in gathered} == {4 * width * inner // 8}


KINDS: list[tuple[str, Callable[..., Any], str, int, int, int]] = [
    # What is asked for; kind, axes, group, bytes in and out of a device that holds [8, 16] of float32.
    ("all-gather", lambda x: jax.lax.all_gather(x, "data"), "data", 2, 512, 1024),
    ("all-gather", lambda x: jax.lax.all_gather(x, ("data", "model")), "data+model", 8, 512, 4096),
    ("all-reduce", lambda x: jax.lax.psum(x, "model"), "model", 4, 512, 512),
    ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "model", tiled=True), "model", 4, 512, 128),
    ("all-to-all", lambda x: jax.lax.all_to_all(x, "model", 0, 1, tiled=True), "model", 4, 512, 512),
    ("collective-permute", lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), "data", 2, 512, 512),
]


@pytest.mark.parametrize(("kind", "asked", "along", "group", "into", "out"), KINDS)
def test_collectives_in_a_loop(
    mesh: Mesh, kind: str, asked: Callable[..., Any], along: str, group: int, into: int, out: int
) -> None:
    @partial(jax.shard_map, mesh=mesh, in_specs=P(None, "data", "model"), out_specs=P(), check_vma=False)
    def program(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda sum_, one: (sum_ + asked(jnp.tanh(one)).sum(), None), jnp.float32(0), x)[0]

    (found,) = collectives(compiled(program, array(3, 16, 64)), SIZES)
    assert (found.kind, found.along, found.group) == (kind, along, group)
    assert (found.operand_bytes, found.result_bytes, found.times) == (into, out, 3)
    assert not found.asynchronous
    assert not found.crosses_slices


def test_a_mesh_in_another_order(mesh: Mesh) -> None:
    program = compiled(
        jax.shard_map(lambda x: jax.lax.psum(x, "model"), mesh=mesh, in_specs=P("data", "model"), out_specs=P("data")),
        array(16, 64),
    )
    places = np.arange(8).reshape(4, 2).T.reshape(-1)  # of the same devices in a mesh whose `model` is the slower axis
    (found,) = collectives(program, {"model": 4, "data": 2}, order=places.tolist())
    assert found.axes == ("model",)
    with pytest.raises(GemmaryError, match="compiled for 8 devices"):
        collectives(program, {"data": 4, "model": 4})


def test_loops_in_loops() -> None:
    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        def micro(total: jax.Array, part: jax.Array) -> tuple[jax.Array, None]:
            return total + jax.lax.scan(lambda h, a: (jnp.tanh(h @ a), None), part, w)[0], None

        return jax.lax.scan(micro, jnp.zeros(x.shape[1:]), x)[0]

    program = compiled(step, array(5, 32, 32), array(3, 16, 32))
    assert sorted(program.trips.values()) == [3, 5]
    assert matmul_flops(program) == 3 * 5 * 2 * 16 * 32 * 32
    assert sum(times for _, times in program.instructions("dot")) == 15


def test_a_loop_of_unknown_length_counts_once_and_says_so() -> None:
    program = compiled(
        lambda n, x: jax.lax.fori_loop(0, n, lambda _, y: jnp.tanh(y @ y), x), array(dtype=jnp.int32), array(32, 32)
    )
    (name,) = program.unknown_loops
    assert program.trips[name] == 1
    assert matmul_flops(program) == 2 * 32**3


def test_all_branches_count() -> None:
    def either(which: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.cond(which, lambda y: y @ y, lambda y: (y @ y) @ y, x)

    assert matmul_flops(compiled(either, array(dtype=jnp.bool_), array(32, 32))) == 3 * 2 * 32**3


def test_products_over_several_axes() -> None:
    program = compiled(partial(jnp.einsum, "bthd,bshd->bhts"), array(2, 16, 4, 8), array(2, 32, 4, 8))
    assert matmul_flops(program) == 2 * 2 * 4 * 16 * 32 * 8


def test_what_a_kernel_leaves_in_memory() -> None:
    program = compiled(lambda x: jnp.tanh(x[:, None] * x[None, :]).sum(), array(256))
    inside = {shape.dims for _, shape in shapes_of(program)}
    left = {shape.dims for _, shape in shapes_of(program, fused=False)}
    assert (256, 256) in inside
    assert (256, 256) not in left
    assert {one.opcode for one, _ in shapes_of(program, "multiply")} == {"multiply"}


def test_traffic_of_a_scan_is_a_slice_a_turn() -> None:
    layers, size = 16, 4096
    program = compiled(
        lambda x, w: jax.lax.scan(lambda h, a: (jnp.tanh(h * a), None), x, w)[0], array(size), array(layers, size)
    )
    once = 4 * size
    # Of each layer its own slice, the state read and written, and perhaps a copy; not all layers' weights in each.
    assert 3 * layers * once <= memory_bytes(program) <= 8 * layers * once


@pytest.mark.parametrize(
    ("dtype", "dims", "size"), [("bf16", (3, 5), 30), ("s4", (3,), 2), ("pred", (7,), 7), ("f8e4m3fn", (9,), 9), ("token", (), 0), ("u32", (), 4)]
)  # fmt: skip
def test_bytes_of_shapes(dtype: str, dims: tuple[int, ...], size: int) -> None:
    assert Shape(dtype, dims).bytes == size


LOOP = """HloModule loop, is_scheduled=true

%body (p: (s32[], s32[])) -> (s32[], s32[]) {{
  %p = (s32[]{{:T(128)}}, s32[]{{:T(128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %copy.1 = s32[]{{:T(128)S(6)}} copy(%i)
  %other = s32[] get-tuple-element(%p), index=1
  %by = s32[] constant({by})
  %next = s32[] {move}(%copy.1, %by)
  ROOT %tuple.1 = (s32[], s32[]) tuple(%next, %other)
}}

%condition (p.1: (s32[], s32[])) -> pred[] {{
  %p.1 = (s32[], s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %carried = s32[] get-tuple-element(%p.1), index=1
  %written = s32[] constant({bound})
  ROOT %test = pred[] compare({test})
}}

ENTRY %main () -> s32[] {{
  %from = s32[] constant({start})
  %copy.2 = s32[] copy(%from)
  %held = s32[] constant({bound})
  %tuple.2 = (s32[], s32[]) tuple(%copy.2, %held)
  %while.1 = (s32[], s32[]) while(%tuple.2), condition=%condition, body=%body
  ROOT %end = s32[] get-tuple-element(%while.1), index=0
}}
"""


@pytest.mark.parametrize(
    ("start", "bound", "move", "by", "test", "trips"),
    [
        (0, 18, "add", 1, "%i.1, %written), direction=LT", 18),
        (1, 18, "add", 1, "%i.1, %written), direction=LT", 17),  # its first turn was peeled off
        (0, 18, "add", 4, "%i.1, %written), direction=LT", 5),
        (0, 18, "add", 1, "%i.1, %written), direction=LE", 19),
        (0, 18, "add", 1, "%i.1, %written), direction=NE", 18),
        (0, 18, "add", 1, "%i.1, %carried), direction=LT", 18),
        (0, 18, "add", 1, "%written, %i.1), direction=GT", 18),
        (17, 0, "subtract", 1, "%i.1, %written), direction=GE", 18),
        (17, -1, "add", -1, "%i.1, %written), direction=GT", 18),
        (20, 18, "add", 1, "%i.1, %written), direction=LT", 0),
    ],
)
def test_turns_from_the_condition(start: int, bound: int, move: str, by: int, test: str, trips: int) -> None:
    program = read_program(LOOP.format(start=start, bound=bound, move=move, by=by, test=test))
    assert program.trips == {"while.1": trips}
    assert not program.unknown_loops
    assert program.times.get("body", 0) == trips
    assert program.times["condition"] == trips + 1


def test_a_counter_that_jumps_is_not_guessed() -> None:
    program = read_program(LOOP.format(start=1, bound=18, move="multiply", by=2, test="%i.1, %written), direction=LT"))
    assert program.unknown_loops == ("while.1",)


# v5e:4x4: in rings of four, a product each turn while the next part is on its way.
RING = """HloModule jit_ring, is_scheduled=true, num_partitions=16

%bitcast_fusion (bitcast_input.5: bf16[512,1024]) -> bf16[512,1024] {
  %bitcast_input.5 = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %bitcast.5 = bf16[512,1024]{1,0:T(8,128)(2,1)} bitcast(%bitcast_input.5)
}

%fused_computation.clone.1 (param_0.3: bf16[512,1024], param_1.4: bf16[1024,1024], param_2.5: bf16[512,1024]) -> bf16[512,1024] {
  %param_0.3 = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %fusion.4 = bf16[512,1024]{1,0:T(8,128)(2,1)} fusion(%param_0.3), kind=kLoop, calls=%bitcast_fusion
  %param_1.4 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %param_2.5 = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(2)
  %convolution.3 = bf16[512,1024]{1,0:T(8,128)(2,1)} convolution(%fusion.4, %param_1.4), dim_labels=bf_io->bf, metadata={op_name="jit(ring)/shard_map/while/body/closed_call/dot_general" stack_frame_id=6}
  ROOT %add.12 = bf16[512,1024]{1,0:T(8,128)(2,1)} add(%convolution.3, %param_2.5)
}

%wide.region_0.1_spmd.clone.sunk (wide.param.0: (s32[], bf16[512,1024], bf16[512,1024], bf16[1024,1024])) -> (s32[], bf16[512,1024], bf16[512,1024], bf16[1024,1024]) {
  %constant.0 = s32[]{:T(128)} constant(1)
  %wide.param.0 = (s32[]{:T(128)}, bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.80 = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.0), index=1
  %collective-permute-start = (bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%get-tuple-element.80), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4},{8,9},{9,10},{10,11},{11,8},{12,13},{13,14},{14,15},{15,12}}, metadata={op_name="jit(ring)/shard_map/while/body/closed_call/ppermute" stack_frame_id=8}
  %get-tuple-element.79 = s32[]{:T(128)} get-tuple-element(%wide.param.0), index=0
  %add.13 = s32[]{:T(128)} add(%get-tuple-element.79, %constant.0)
  %get-tuple-element.88 = bf16[1024,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.0), index=3
  %get-tuple-element.81 = bf16[512,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.0), index=2
  %convolution_add_fusion.2 = bf16[512,1024]{1,0:T(8,128)(2,1)} fusion(%get-tuple-element.80, %get-tuple-element.88, %get-tuple-element.81), kind=kOutput, calls=%fused_computation.clone.1
  %collective-permute-done = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} collective-permute-done(%collective-permute-start), metadata={op_name="jit(ring)/shard_map/while/body/closed_call/ppermute" stack_frame_id=8}
  ROOT %tuple.23 = (s32[]{:T(128)}, bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) tuple(%add.13, %collective-permute-done, %convolution_add_fusion.2, %get-tuple-element.88)
}

%wide.region_1.2_spmd.clone (wide.param.6: (s32[], bf16[512,1024], bf16[512,1024], bf16[1024,1024])) -> pred[] {
  %constant.1.clone.2 = s32[]{:T(128)} constant(4), metadata={op_name="jit(ring)/shard_map" stack_frame_id=2}
  %wide.param.6 = (s32[]{:T(128)}, bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.52 = s32[]{:T(128)} get-tuple-element(%wide.param.6), index=0
  ROOT %lt.4 = pred[]{:T(512)} compare(%get-tuple-element.52, %constant.1.clone.2), direction=LT
}

ENTRY %main.4_spmd (param.4: bf16[512,1024], param.5: bf16[1024,1024]) -> bf16[512,1024] {
  %constant.2.clone.1 = s32[]{:T(128)} constant(0), metadata={op_name="jit(ring)/shard_map" stack_frame_id=2}
  %param.5 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="w"}
  %param.4 = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %copy.13 = bf16[512,1024]{1,0:T(8,128)(2,1)S(1)} copy(%param.4)
  %copy.3 = s32[]{:T(128)} copy(%constant.2.clone.1)
  %custom-call = bf16[512,1024]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %tuple.24 = (s32[]{:T(128)}, bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) tuple(%copy.3, %copy.13, %custom-call, %param.5)
  %while.13 = (s32[]{:T(128)}, bf16[512,1024]{1,0:T(8,128)(2,1)S(1)}, bf16[512,1024]{1,0:T(8,128)(2,1)}, bf16[1024,1024]{1,0:T(8,128)(2,1)}) while(%tuple.24), condition=%wide.region_1.2_spmd.clone, body=%wide.region_0.1_spmd.clone.sunk, metadata={op_name="jit(ring)/shard_map/while" stack_frame_id=4}
  ROOT %get-tuple-element.93 = bf16[512,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%while.13), index=2
}
"""


def test_a_ring_on_a_tpu() -> None:
    program = read_program(RING)
    assert (program.devices, program.trips, program.unknown_loops) == (16, {"while.13": 4}, ())
    once = 2 * 512 * 1024 * 1024
    assert matmul_flops(program) == 4 * once
    (found,) = collectives(program, {"data": 4, "model": 4})
    part, weights = 2 * 512 * 1024, 2 * 1024 * 1024
    assert (found.kind, found.along, found.group, found.times) == ("collective-permute", "model", 2, 4)
    assert (found.operand_bytes, found.result_bytes) == (part, part)
    assert found.asynchronous
    # Between start and end: the product, which reads weights and sum and writes the sum; its other input lies nearer.
    assert found.overlapped_flops == once
    assert found.overlapped_bytes == pytest.approx(weights + 2 * part, abs=16)
    # A turn's product, and the copy of the first part into near memory; besides, only counters and a flag.
    assert memory_bytes(program) == pytest.approx(4 * (weights + 2 * part) + part + part, abs=256)


# v5e:4x4, two slices: a gather that goes on inside another product's kernel, a reduce-scatter that is a fusion, the sum over slices.
FUSED = """HloModule jit_step, is_scheduled=true, num_partitions=16

%fused_computation.104 (param_0.253: bf16[1,1024,256]) -> (bf16[1,1024,256], bf16[1,1024,1024], s32[2], u32[]) {
  %param_0.253 = bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.36 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.253), channel_id=16, replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, dimensions={2}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={"flag_configs":[],"barrier_config":{"barrier_type":"CUSTOM","id":"0"},"scoped_memory_configs":[],"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"},"used_scoped_memory_configs":[]}
  ROOT %custom-call.6 = (bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) custom-call(%all-gather.36), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.142 (param_0.257: bf16[1,1024,256], param_1.264: bf16[1,1024,1024], param_2.216: s32[2], param_3.153: u32[], param_9.2: bf16[1024,1024], param_10.3: bf16[2048,1024]) -> (bf16[2048,1024], bf16[1,1024,256], bf16[1,1024,1024], bf16[1,1024,1024], s32[2], /*index=5*/u32[]) {
  %param_10.3 = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(5)
  %param_9.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(4)
  %convolution.43 = bf16[2048,1024]{1,0:T(8,128)(2,1)} convolution(%param_10.3, %param_9.2), dim_labels=bf_io->bf
  %param_0.257 = bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.264 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.38 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.257), channel_id=16, replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, dimensions={2}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={"flag_configs":[],"barrier_config":{"barrier_type":"CUSTOM","id":"0"},"scoped_memory_configs":[],"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"},"used_scoped_memory_configs":[]}
  %param_2.216 = s32[2]{0:S(4)} parameter(2)
  %param_3.153 = u32[]{:S(2)} parameter(3)
  ROOT %tuple.64 = (bf16[2048,1024]{1,0:T(8,128)(2,1)}, bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)}, bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, /*index=5*/u32[]{:S(2)}) tuple(%convolution.43, %param_0.257, %param_1.264, %all-gather.38, %param_2.216, /*index=5*/%param_3.153)
}

%fused_computation.106 (param_0.259: bf16[1,1024,256], param_1.265: bf16[1,1024,1024], param_2.218: s32[2], param_3.155: u32[]) -> bf16[1,1024,1024] {
  %param_0.259 = bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param_1.265 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.40 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.259), channel_id=16, replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, dimensions={2}, use_global_device_ids=true, frontend_attributes={chain_id="0"}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  %param_2.218 = s32[2]{0:S(4)} parameter(2)
  %param_3.155 = u32[]{:S(2)} parameter(3)
  ROOT %custom-call.8 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} custom-call(%param_0.259, %param_1.265, %all-gather.40, %param_2.218, %param_3.155), custom_call_target="AsyncCollectiveDone"
}

%add.2.clone (x.7: bf16[], y.5: bf16[]) -> bf16[] {
  %x.7 = bf16[]{:T(256)} parameter(0)
  %y.5 = bf16[]{:T(256)} parameter(1)
  ROOT %add.57 = bf16[]{:T(256)} add(%x.7, %y.5)
}

%all-reduce-scatter.2 (input.2: bf16[1024,1024]) -> bf16[256,1024] {
  %input.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.29 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%input.2), channel_id=10, replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, use_global_device_ids=true, to_apply=%add.2.clone, frontend_attributes={from-cross-replica-sharding="true"}
  %constant.shard_id_table.2 = u32[16]{0:T(128)} constant({...})
  %partition-id.13 = u32[] partition-id()
  %dynamic-slice.54 = u32[1]{0:T(128)} dynamic-slice(%constant.shard_id_table.2, %partition-id.13), dynamic_slice_sizes={1}
  %bitcast.41 = u32[]{:T(128)} bitcast(%dynamic-slice.54)
  %constant.212 = u32[] constant(256)
  %multiply.10 = u32[]{:T(128)} multiply(%bitcast.41, %constant.212)
  %constant.213 = u32[] constant(0)
  ROOT %dynamic-slice.55 = bf16[256,1024]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.29, %multiply.10, %constant.213), dynamic_slice_sizes={256,1024}
}

ENTRY %main.6_spmd (param.5: bf16[1,1024,256], param.6: bf16[1024,1024], param.4: bf16[2048,1024]) -> bf16[256,1024] {
  %param.5 = bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %param.6 = bf16[1024,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %param.4 = bf16[2048,1024]{1,0:T(8,128)(2,1)} parameter(2)
  %after-all.7 = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce.15_0"}
  %async-collective-start = (bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, u32[]{:S(2)}) fusion(%param.5), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.104
  %get-tuple-element.383 = u32[]{:S(2)} get-tuple-element(%async-collective-start), index=3
  %get-tuple-element.382 = s32[2]{0:S(4)} get-tuple-element(%async-collective-start), index=2
  %get-tuple-element.381 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=1
  %get-tuple-element.380 = bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%async-collective-start), index=0
  %fusion.142 = (bf16[2048,1024]{1,0:T(8,128)(2,1)}, bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)}, bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)}, s32[2]{0:S(4)}, /*index=5*/u32[]{:S(2)}) fusion(%get-tuple-element.380, %get-tuple-element.381, %get-tuple-element.382, %get-tuple-element.383, %param.6, /*index=5*/%param.4), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {}), {4}: (2, {}), {5}: (3, {})}, calls=%async_collective_fusion.142
  %get-tuple-element.390 = bf16[1,1024,256]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%fusion.142), index=1
  %get-tuple-element.391 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%fusion.142), index=2
  %get-tuple-element.393 = s32[2]{0:S(4)} get-tuple-element(%fusion.142), index=4
  %get-tuple-element.394 = u32[]{:S(2)} get-tuple-element(%fusion.142), index=5
  %async-collective-done = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} fusion(%get-tuple-element.390, %get-tuple-element.391, %get-tuple-element.393, %get-tuple-element.394), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%fused_computation.106
  %bitcast.1 = bf16[1024,1024]{1,0:T(8,128)(2,1)} bitcast(%async-collective-done)
  %fusion.2 = bf16[256,1024]{1,0:T(8,128)(2,1)} fusion(%bitcast.1), kind=kCustom, calls=%all-reduce-scatter.2, frontend_attributes={is_spmd_generated="true"}
  %bitcast.139 = bf16[256,8,128]{2,1,0:T(8,128)(2,1)} bitcast(%fusion.2)
  %send.7 = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%bitcast.139, %after-all.7), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.15_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE",is_spmd_generated="true"}
  %recv.7 = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after-all.7), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.15_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE",is_spmd_generated="true"}
  %convolution.9 = bf16[2048,1024]{1,0:T(8,128)(2,1)} convolution(%param.4, %param.6), dim_labels=bf_io->bf
  %send-done.7 = token[] send-done(%send.7), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",is_spmd_generated="true"}
  %recv-done.7 = (bf16[256,8,128]{2,1,0:T(8,128)(2,1)}, token[]) recv-done(%recv.7), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",is_spmd_generated="true"}
  %get-tuple-element.9 = bf16[256,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%recv-done.7), index=0
  ROOT %bitcast.140 = bf16[256,1024]{1,0:T(8,128)(2,1)} bitcast(%get-tuple-element.9)
}
"""


def test_collectives_inside_a_tpus_kernels_and_between_slices() -> None:
    program = read_program(FUSED)
    product = 2 * 2048 * 1024 * 1024
    assert matmul_flops(program) == 2 * product
    found = {one.kind: one for one in collectives(program, {"slice": 2, "data": 4, "model": 4})}
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
    whole, quarter = 2 * 1024 * 1024, 2 * 1024 * 256

    def said(one: Collective) -> tuple[str, int, int, int, int, bool, bool, float]:
        return (one.along, one.group, one.operand_bytes, one.result_bytes, one.times, one.asynchronous,
                one.crosses_slices, one.overlapped_flops)  # fmt: skip

    assert said(found["all-gather"]) == ("data", 4, quarter, whole, 1, True, False, product)
    assert said(found["reduce-scatter"]) == ("data", 4, whole, quarter, 1, False, False, 0)
    assert said(found["all-reduce"]) == ("slice", 2, quarter, quarter, 1, True, True, product)
    # What a kernel carries on for another is not its traffic: a product of 2048 x 1024 and 1024 x 1024.
    assert found["all-gather"].overlapped_bytes == 2 * 2 * 2048 * 1024 + whole


def test_a_gather_that_is_not_over_yet_counts_what_is_left_of_its_computation() -> None:
    endless = RING.replace("collective-permute-done(%collective-permute-start)", "copy(%get-tuple-element.80)")
    (found,) = collectives(read_program(endless), {"data": 4, "model": 4})
    assert found.asynchronous
    assert found.overlapped_flops == 2 * 512 * 1024 * 1024


def one_line(line: str, *operands: str, head: str = "") -> Program:
    given = "\n".join(f"  %p{i} = {shape} parameter({i})" for i, shape in enumerate(operands))
    return read_program(
        f"HloModule m, is_scheduled=true{head}\n\nENTRY %main () -> f32[] {{\n{given}\n  ROOT %r = {line}\n}}\n"
    )


@pytest.mark.parametrize(
    ("line", "a", "b", "flops"),
    [
        # Batched products as the TPU's compiler has them: each window meets one element of an input with holes.
        (
            "bf16[2,4,256,256]{3,2,1,0} convolution(%p0, %p1), window={size=2x4 stride=1x3 lhs_dilate=2x4}, dim_labels=0b1f_0o1i->01bf",
            "bf16[2,256,4,128]", "bf16[2,256,4,128]", 2 * 2 * 4 * 256 * 256 * 128,
        ),
        (
            "bf16[2,256,256,8]{2,1,3,0} convolution(%p0, %p1), window={size=2x8 pad=0_0x7_7 lhs_dilate=2x1 rhs_reversal=0x1}, dim_labels=0bf1_0o1i->0bf1",
            "bf16[2,256,128,1]", "bf16[2,256,8,128]", 2 * 2 * 8 * 256 * 256 * 128,
        ),
        # A sum over two axes: one of them is the window.
        (
            "bf16[1024,1024,1]{1,0,2} convolution(%p0, %p1), window={size=4}, dim_labels=0fb_0io->bf0",
            "bf16[4,512,1024]", "bf16[4,512,1024]", 2 * 4 * 512 * 1024 * 1024,
        ),
        # An ordinary one, its border left out: 3 taps over 8 elements padded by 1.
        ("f32[2,8,5] convolution(%p0, %p1), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", "f32[2,8,4]", "f32[3,4,5]", 2 * 2 * 4 * 5 * 22),
        ("f32[7,9] dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}", "f32[7,5]", "f32[5,9]", 2 * 7 * 5 * 9),
        ('f32[3,7,9] custom-call(%p0, %p1), custom_call_target="__onednn$matmul"', "f32[3,7,5]", "f32[3,5,9]", 2 * 3 * 7 * 5 * 9),
        ('f32[7,9] custom-call(%p0, %p1), custom_call_target="__cublas$gemm"', "f32[7,5]", "f32[5,9]", 2 * 7 * 5 * 9),
        ('f32[7,9] custom-call(%p0, %p1), custom_call_target="tpu_custom_call"', "f32[7,5]", "f32[5,9]", 0),
    ],
)  # fmt: skip
def test_operations_of_one_product(line: str, a: str, b: str, flops: int) -> None:
    assert matmul_flops(one_line(line, a, b)) == flops


def test_kernels_that_xla_does_not_know_are_listed() -> None:
    line = 'bf16[8,16]{1,0} custom-call(%p0, %p1), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/splash_mha_fwd"}'
    (found,) = custom_calls(one_line(line, "bf16[8,4]", "s32[4]"))
    assert (found.target, found.name, found.times) == ("tpu_custom_call", "jit(step)/splash_mha_fwd", 1)
    assert found.operands == (Shape("bf16", (8, 4)), Shape("s32", (4,)))
    assert found.results == (Shape("bf16", (8, 16)),)
    assert custom_calls(read_program(RING))[0].target == "AllocateBuffer"


@pytest.mark.parametrize(
    ("line", "given", "moved"),
    [
        ("f32[100] add(%p0, %p1)", ("f32[100]", "f32[100]"), 1200),
        ("f32[100]{0:S(1)} add(%p0, %p1)", ("f32[100]", "f32[100]{0:S(1)}"), 400),
        ("f32[1,100] dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,100}", ("f32[18,100]", "s32[]"), 800),
        ("f32[18,100] dynamic-update-slice(%p0, %p1, %p2)", ("f32[18,100]", "f32[1,100]", "s32[]"), 800),
        ("f32[100] bitcast(%p0)", ("f32[10,10]",), 0),
        ("(f32[100]{0:S(1)}, f32[100], u32[]{:S(2)}) copy-start(%p0)", ("f32[100]",), 400),
        ("f32[100] copy-done(%p0)", ("(f32[100], f32[100], u32[]{:S(2)})",), 0),
    ],
)  # fmt: skip
def test_traffic_of_one_instruction(line: str, given: tuple[str, ...], moved: int) -> None:
    assert memory_bytes(one_line(line, *given)) == moved


@pytest.mark.parametrize(("place", "moved"), [("", 4 * 100 + 4 * 7 + 4 * 100), ("S(1)", 4 * 100 + 4 * 7)])
def test_traffic_of_a_fusion(place: str, moved: int) -> None:
    program = read_program(f"""HloModule m, is_scheduled=true

%fused (q: f32[100], r: f32[18,7], i: s32[]) -> f32[100] {{
  %q = f32[100]{{0}} parameter(0)
  %r = f32[18,7]{{1,0}} parameter(1)
  %i = s32[]{{:S(6)}} parameter(2)
  %cut = f32[1,7] dynamic-slice(%r, %i, %i), dynamic_slice_sizes={{1,7}}
  %sum = f32[] fusion(%cut), kind=kLoop, calls=%nothing_known
  %wide = f32[100] broadcast(%sum), dimensions={{}}
  ROOT %out = f32[100]{{0:{place}}} add(%q, %wide)
}}

ENTRY %main (p: f32[100], w: f32[18,7], at: s32[]) -> f32[100] {{
  %p = f32[100]{{0}} parameter(0)
  %w = f32[18,7]{{1,0}} parameter(1)
  %at = s32[]{{:S(6)}} parameter(2)
  ROOT %fusion.1 = f32[100]{{0:{place}}} fusion(%p, %w, %at), kind=kLoop, calls=%fused
}}
""")
    assert memory_bytes(program) == moved


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh[a=2,b=2], device_ids=(3,2,1,0) {b}", ((3, 2), (1, 0))),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([2,4]T(1,0)) {'b'}", ((0, 2), (4, 6), (1, 3), (5, 7))),
    ],
)  # fmt: skip
def test_groups_in_every_form(text: str, groups: tuple[tuple[int, ...], ...]) -> None:
    assert (
        members_of(f", channel_id=1, replica_groups={text}, dimensions={{0}}, use_global_device_ids=true", 8) == groups
    )


def test_pairs_of_a_permute_and_groups_left_out() -> None:
    assert members_of(", channel_id=1, source_target_pairs={{0,1},{1,0}}", 2) == ((0, 1), (1, 0))
    assert members_of(", channel_id=1", 3) == ((0, 1, 2),)


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(GemmaryError, match="not the text of an HLO module"):
        read_program("module @jit_f {}")
    with pytest.raises(GemmaryError, match="no entry computation"):
        read_program(RING[: RING.index("ENTRY")])
    with pytest.raises(GemmaryError, match="unknown form"):
        members_of(", replica_groups=<something new>", 8)


def test_ragged_and_wrapped_forms() -> None:
    ragged = one_line(
        "bf16[64] ragged-all-to-all(%p0, %p1, %p2), channel_id=1, replica_groups={{0,1}}",
        "bf16[32]", "bf16[64]", "s32[2]", head=", num_partitions=2",
    )  # fmt: skip
    (found,) = collectives(ragged, {"data": 2})
    assert (found.kind, found.operand_bytes, found.result_bytes) == ("ragged-all-to-all", 64, 128)
    wrapped = read_program(
        """HloModule m, is_scheduled=true, num_partitions=2

%async_computation (q: bf16[32]) -> bf16[64] {
  %q = bf16[32] parameter(0)
  ROOT %all-gather.1 = bf16[64] all-gather(%q), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
}

ENTRY %main (p: bf16[32], a: f32[8,8]) -> bf16[64] {
  %p = bf16[32] parameter(0)
  %a = f32[8,8] parameter(1)
  %async-start = ((bf16[32]), bf16[64], u32[]) async-start(%p), calls=%async_computation
  %dot.1 = f32[8,8] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %async-update = ((bf16[32]), bf16[64], u32[]) async-update(%async-start), calls=%async_computation
  %async-done = bf16[64] async-done(%async-update), calls=%async_computation
  %dot.2 = f32[8,8] dot(%a, %dot.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %copy.1 = bf16[64] copy(%async-done)
}
"""
    )
    (found,) = collectives(wrapped, {"data": 2})
    assert (found.kind, found.operand_bytes, found.result_bytes, found.times) == ("all-gather", 64, 128, 1)
    assert found.overlapped_flops == 2 * 8**3
    assert wrapped.times["async_computation"] == 1


def test_products_of_int8_can_count_for_less() -> None:
    a, b = jax.ShapeDtypeStruct((8, 16), jnp.int8), jax.ShapeDtypeStruct((16, 4), jnp.int8)
    product = jax.jit(lambda a, b: jax.lax.dot(a, b, preferred_element_type=jnp.int32))
    text = """HloModule m, is_scheduled=true

ENTRY %main (a: s8[8,16], b: s8[16,4]) -> s32[8,4] {
  %a = s8[8,16]{1,0} parameter(0)
  %b = s8[16,4]{1,0} parameter(1)
  ROOT %dot = s32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    program = read_program(text)
    assert Costs(program).flops[program.entry] == 2 * 8 * 16 * 4
    assert Costs(program, eight=2.0).flops[program.entry] == 8 * 16 * 4
    assert matmul_flops(read_program(product.lower(a, b).compile().as_text())) == 2 * 8 * 16 * 4
