"""Devices to a mesh, and two rule tables: how parameters are stored on it, and how activations compute.

Mathematics knows nothing of this file. Parameters are placed once; products say by the letters of their equations what their
axes are, and `spread` puts those where the second table says. An axis that its mesh axis does not divide is replicated.

A mesh has four axes. `slice` is the data-centre network: gradients cross it once a step. `data` and `model` are the chips'
own network. `fold` is a part of the data axis: where no model axis splits the vocabulary, the last `fold` chips of the data
axis share it, so that none needs the whole of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gemmary.errors import GemmaryError

__all__ = [
    "AXES",
    "COMPUTE",
    "ROWS",
    "STORAGE",
    "abstract_mesh",
    "make_mesh",
    "mesh_shape",
    "platform",
    "replicated",
    "rows_sharding",
    "spec",
    "storage_sharding",
    "storage_spec",
    "using",
]

AXES = ("slice", "data", "fold", "model")

# Parameter axis -> mesh axes. Heads, ffw and vocabulary are split over `model`; the embedding width over the data axes,
# which is what makes the stored state ZeRO-3-like. Axes not named here are never split, and nothing is over slices.
STORAGE: dict[str, tuple[str, ...]] = {
    "vocab": ("model",),
    "heads": ("model",),
    "kv_heads": ("model",),
    "ffw": ("model",),
    "embed": ("data", "fold"),
}

ROWS = ("slice", "data", "fold")
"""The mesh axes that a batch's rows are split over."""

# Letter of an equation -> mesh axes, for activations. Between blocks a row's positions are split over `model`; within a block
# heads and ffw are, and a letter that comes later in a shape leaves `model` to one that comes here first.
COMPUTE: dict[str, tuple[str, ...]] = {
    "b": ROWS,
    "p": ROWS,
    "n": ("model",),
    "k": ("model",),
    "f": ("model",),
    "v": ("model",),
    "t": ("model",),
}

_FOLD, _FOLDED_FROM = 16, 16
_PLATFORM: ContextVar[str | None] = ContextVar("platform", default=None)


def mesh_shape(*, slices: int = 1, data: int = 1, model: int = 1, fold: int | None = None) -> dict[str, int]:
    """Sizes by axis. `data` counts the folded part; by default it is folded from 16 chips on, where there is no model axis.

    Raises GemmaryError for sizes below 1, and a fold that does not divide the data axis.
    """
    if min(slices, data, model) < 1:
        raise GemmaryError(f"a mesh of slices={slices}, data={data}, model={model}: each is at least 1")
    if fold is None:
        fits = [n for n in range(1, _FOLD + 1) if data % n == 0 and n * n <= data]
        fold = max(fits) if model == 1 and data >= _FOLDED_FROM else 1
    if fold < 1 or data % fold:
        raise GemmaryError(f"a data axis of {data} cannot be folded by {fold}: take a divisor")
    return {"slice": slices, "data": data // fold, "fold": fold, "model": model}


def make_mesh(
    *,
    slices: int = 1,
    data: int = 1,
    model: int = 1,
    fold: int | None = None,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of slices x data x model devices: those given, or the first of those that JAX lists.

    Slices are told apart by the devices' own `slice_index` where they have one. Raises GemmaryError where there are not that
    many devices, naming sizes that fit.
    """
    shape = mesh_shape(slices=slices, data=data, model=model, fold=fold)
    have = list(jax.devices() if devices is None else devices)
    need = math.prod(shape.values())
    if need > len(have):
        fits = f"slices={slices} data={len(have) // (slices * model)} model={model}"
        if len(have) < slices * model:
            fits = f"data={len(have)} model=1"
        raise GemmaryError(
            f"a mesh of slices={slices} x data={data} x model={model} needs {need} devices and there are {len(have)}: {fits} would do"
        )
    inside = (1, *list(shape.values())[1:])
    found = {getattr(device, "slice_index", 0) for device in have}
    if slices > 1 and len(found) == slices and need == len(have):
        placed = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1, 1), have, allow_split_physical_axes=True)
    elif have[0].platform == "tpu":
        placed = mesh_utils.create_device_mesh(tuple(shape.values()), have[:need], allow_split_physical_axes=True)
    else:
        placed = np.array(have[:need]).reshape(tuple(shape.values()))
    # Auto: the partitioner carries shardings through the program, and the mathematics says nothing of it.
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(shape: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices, for shapes alone."""
    return AbstractMesh(tuple(shape[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextmanager
def using(mesh: Mesh | AbstractMesh | None, platform: str | None = None) -> Iterator[None]:
    """What is traced meanwhile is traced for this mesh, and for its devices' platform (or the one given, for an abstract mesh)."""
    if isinstance(mesh, Mesh):
        platform = platform or mesh.devices.flat[0].platform
    token = _PLATFORM.set(platform or _PLATFORM.get())
    try:
        if mesh is None:
            yield
        elif isinstance(mesh, Mesh):
            with jax.set_mesh(mesh):
                yield
        else:
            with jax.sharding.use_abstract_mesh(mesh):
                yield
    finally:
        _PLATFORM.reset(token)


def platform() -> str:
    """What the program that is traced will run on: "cpu", "gpu" or "tpu"."""
    return _PLATFORM.get() or jax.default_backend()


def spec(wanted: Sequence[tuple[str, ...]], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """The mesh axes wanted for each axis, of them those that are there, free and divide it (the longest beginning that does)."""
    taken, parts = set[str](), list[Any]()
    for axes, size in zip(wanted, shape, strict=True):
        names: tuple[str, ...] = ()
        for axis in axes:
            more = math.prod(sizes[name] for name in names) * sizes.get(axis, 1)
            if sizes.get(axis, 1) > 1 and axis not in taken and size % more == 0:
                names += (axis,)
        taken |= set(names)
        parts.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*parts)


def storage_spec(axes: Sequence[str], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """How a parameter with these named axes is stored on a mesh of these sizes.

    An axis that the mesh axis does not divide is replicated (the single key/value head of the 2B, on any mesh), and so
    is every vector: norms are small and read by all.
    """
    if sum(axis != "layers" for axis in axes) < 2:
        return PartitionSpec()
    return spec([STORAGE.get(axis, ()) for axis in axes], shape, sizes)


def storage_sharding(axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """`storage_spec` on a mesh."""
    return NamedSharding(mesh, storage_spec(axes, shape, dict(mesh.shape)))


def rows_sharding(mesh: Mesh | AbstractMesh, rows: int) -> NamedSharding:
    """How a batch's arrays lie: their rows over slices and data. Raises GemmaryError where these do not divide the rows."""
    parts = math.prod(mesh.shape.get(axis, 1) for axis in ROWS)
    if rows % parts:
        near = max(rows // parts, 1) * parts
        raise GemmaryError(f"a batch of {rows} rows does not divide over {parts} (slices x data): {near} would")
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in ROWS if axis in mesh.shape)))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())
