"""Devices to a mesh, and the one table that says how parameters are stored on it.

Mathematics knows nothing of this file: parameters are placed once, and GSPMD carries their sharding through the program.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gemmary.errors import GemmaryError

__all__ = ["STORAGE", "make_mesh", "storage_sharding"]

# Parameter axis -> mesh axis. Heads, ffw and vocabulary are split over `model`; the embedding width over `data`, which
# is what makes the stored state ZeRO-3-like. Axes not named here are never split.
STORAGE = {"vocab": "model", "heads": "model", "kv_heads": "model", "ffw": "model", "embed": "data"}


def make_mesh(*, data: int = 1, model: int = 1) -> Mesh:
    """A mesh of data x model devices, taken in the order JAX lists them.

    Raises GemmaryError where the process does not have that many devices.
    """
    have = jax.device_count()
    if data * model > have or data < 1 or model < 1:
        raise GemmaryError(f"a mesh of data={data} x model={model} needs {data * model} devices and there are {have}")
    # Auto: GSPMD decides how activations are spread, and the mathematics says nothing of it.
    return jax.make_mesh(
        (data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: data * model]
    )


def storage_sharding(axes: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """How a parameter with these named axes is stored on the mesh.

    An axis that the mesh axis does not divide is replicated (the single key/value head of the 2B, on any mesh), and so
    is every vector: norms are small and read by all.
    """
    if sum(axis != "layers" for axis in axes) < 2:
        return NamedSharding(mesh, PartitionSpec())
    names = [STORAGE.get(axis) for axis in axes]
    fits = [
        n is not None and n in mesh.shape and size % mesh.shape[n] == 0 for n, size in zip(names, shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*(n if ok else None for n, ok in zip(names, fits, strict=True))))
