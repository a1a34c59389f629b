"""A run's arrays on a mesh: made where they lie, fed row by row, copied out again. Without a mesh everything stays as it was given.

A run takes every function here with `mesh=None` where there is one device, and is then the program that it always was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding

from gemmary import processes
from gemmary.errors import GemmaryError, check_bounds
from gemmary.mesh import ROWS, make_mesh, replicated, rows_sharding
from gemmary.params import Params, placement
from gemmary.train.step import TrainState, state_shardings

__all__ = [
    "MeshSettings", "check_rows", "fed", "forms", "host", "local", "made", "on_host", "placed", "rows_here",
    "rows_of_a_device",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """How many devices share a model and a batch: slices x data x model. No result depends on it but by rounding."""

    slices: int = 1
    """Groups of devices with a slow network between them: gradients cross it once a step."""
    data: int | None = None
    """Devices that share a batch's rows, and the stored state; None: all that are left."""
    model: int = 1
    """Devices that share every matrix."""

    def __post_init__(self) -> None:
        check_bounds(self, "mesh.", slices=(1, None), model=(1, None))
        if self.data is not None:
            check_bounds(self, "mesh.", data=(1, None))

    def mesh(self) -> Mesh | None:
        """Of all processes' devices; None where one device is all. Raises GemmaryError, with what would do, where they do not fit."""
        have = len(jax.devices())
        group = self.slices * self.model
        data = self.data or have // group
        if (have % group and self.data is None) or data < 1:
            fits = max(n for n in range(1, min(self.model, have) + 1) if have % (n * self.slices) == 0 or n == 1)
            raise GemmaryError(
                f"mesh: slices={self.slices} x model={self.model} do not divide {have} devices: model={fits} would"
                if have % self.slices == 0
                else f"mesh: slices={self.slices} do not divide {have} devices: slices={math.gcd(self.slices, have)} would"
            )
        used = group * data
        if processes.count() > 1 and used != have:
            raise GemmaryError(
                f"mesh: slices={self.slices} x data={data} x model={self.model} are {used} devices and {processes.count()} processes "
                f"have {have}: leave mesh.data out, or set it to {max(1, have // group)}"
            )
        return make_mesh(slices=self.slices, data=data, model=self.model) if have > 1 and used > 1 else None


def check_rows(where: str, batch: int, accumulate: int, mesh: Mesh | None) -> None:
    """Raises GemmaryError, with the nearest batch that would do, where the mesh does not divide a batch or one of its parts."""
    if mesh is None:
        return
    over = math.prod(mesh.shape[axis] for axis in ROWS)
    if batch % (over * accumulate):
        fits = max(1, round(batch / (over * accumulate))) * over * accumulate
        parts = f", in {accumulate} parts (accumulate)," if accumulate > 1 else ""
        raise GemmaryError(
            f"{where}.batch is {batch}, which{parts} does not divide over the {over} of slices x data: {fits} would"
        )


def made(mesh: Mesh | None, make: Callable[..., TrainState], *given: Any) -> TrainState:
    """`make(*given)`, each part of it made where it lies: no device needs the whole of it. On a mesh it takes the memory of what is given."""
    if mesh is None:
        return make(*given)
    where = state_shardings(jax.eval_shape(make, *given), mesh)
    found: TrainState = jax.jit(make, out_shardings=where, donate_argnums=range(len(given)))(*given)
    return found


def placed(mesh: Mesh | None, params: Params) -> Params:
    """Parameters that every process has, where the mesh stores them; a copy of each device's part."""
    if mesh is None:
        return params
    found: Params = jax.tree.map(_lay, params, placement(params, mesh))
    return found


def _lay(leaf: Any, where: NamedSharding) -> jax.Array:
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, where, lambda at: whole[at])


def rows_here(mesh: Mesh | None, batch: int) -> list[int] | None:
    """The rows of a batch that this process's devices hold, in order; None: all, and no other process has any."""
    if mesh is None or processes.count() == 1:
        return None
    parts = rows_sharding(mesh, batch).addressable_devices_indices_map((batch,)).values()
    return sorted({row for part in parts if part for row in range(*part[0].indices(batch))})


def rows_of_a_device(mesh: Mesh | None, rows: int) -> int:
    """How many of so many rows one device has; at least 1."""
    return max(1, rows // (1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)))


def fed(mesh: Mesh | None, batch: Any, total: int, rows: Sequence[int] | None = None) -> Any:
    """A batch of `total` rows on the mesh, of which this process made `rows` (None: all)."""
    if mesh is None:
        return batch
    try:
        where = rows_sharding(mesh, total)
    except GemmaryError:  # a batch that nothing is learnt from may be of any size
        where = replicated(mesh)
    order = range(total) if rows is None else rows
    at = dict(zip(order, range(len(order)), strict=True))

    def one(array: Any) -> jax.Array:
        array = np.asarray(array)

        def part(index: Any) -> npt.NDArray[Any]:
            found: npt.NDArray[Any] = array[[at[row] for row in range(*index[0].indices(total))]]
            return found

        return jax.make_array_from_callback((total, *array.shape[1:]), where, part)

    return jax.tree.map(one, batch)


def forms(mesh: Mesh | None, batch: Any, total: int) -> Any:
    """Shapes and dtypes of such a batch, to compile for."""
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((total, *np.shape(x)[1:]), x.dtype), batch)
    rows = rows_sharding(mesh, total)

    def form(x: Any) -> Any:  # what was made on the mesh stays where it was made
        return jax.ShapeDtypeStruct((total, *x.shape[1:]), x.dtype, sharding=getattr(x, "sharding", rows))

    return jax.tree.map(form, batch)


def local(mesh: Mesh | None, params: Params) -> Params:
    """The same parameters on this process's first device, whole: to answer with. All processes call it alike."""
    if mesh is None:
        return params
    everywhere = jax.tree.map(lambda _: replicated(mesh), params)
    spread = jax.jit(lambda x: x, out_shardings=everywhere)(params)
    found: Params = jax.tree.map(lambda x: x.addressable_data(0), spread)
    return found


def host(array: Any) -> npt.NDArray[Any]:
    """An array whole on the host, wherever its parts are. All processes call it alike."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = process_allgather(array, tiled=True)
    return np.asarray(array)


def on_host(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Arrays that are made meanwhile stay in the host's memory: on a mesh, a model need not fit one device."""
    if mesh is None or jax.default_backend() == "cpu":
        return nullcontext()
    found: AbstractContextManager[Any] = jax.default_device(jax.local_devices(backend="cpu")[0])
    return found
