"""The accelerators' attention, on a CPU: Pallas's kernel in its interpreter, and the form of cuDNN's that XLA serves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemmary.kernels import flash, serves_flash
from gemmary.mesh import abstract_mesh, mesh_shape, using
from gemmary.model.attention import Marks, attend_directly

LENGTH, HEAD = 256, 128


def arrays(heads: int, keys: int) -> Any:
    """Queries, keys and values, and marks of two documents and some padding."""
    q, k, v = (
        jax.random.normal(jax.random.key(i), (1, LENGTH, n, HEAD)) for i, n in ((0, heads), (1, keys), (2, keys))
    )
    positions = np.concatenate([np.arange(150), np.arange(90), np.full(16, -1)])[None].astype(np.int32)
    segments = np.repeat([0, 1, 1], [150, 90, 16])[None].astype(np.int32)
    return q * HEAD**-0.5, k, v, Marks(jnp.asarray(positions), jnp.asarray(segments))


def direct(q: Any, k: Any, v: Any, marks: Marks, window: int | None, softcap: float | None) -> Any:
    K = k.shape[2]
    grouped = q.reshape(1, LENGTH, K, -1, HEAD).transpose(0, 2, 3, 1, 4)
    found = attend_directly(grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), marks, marks, window=window, softcap=softcap)
    return found.transpose(0, 3, 1, 2, 4).reshape(q.shape)


@pytest.mark.parametrize(
    ("kind", "heads", "keys", "window", "softcap"),
    [("splash", 2, 1, None, None), ("splash", 4, 2, 40, 30.0), ("splash", 2, 2, 300, None), ("long", 2, 1, None, None), ("cudnn", 4, 2, None, None), ("cudnn", 2, 1, 40, None)],
)  # fmt: skip
def test_it_is_attention_and_so_is_its_gradient(
    kind: str, heads: int, keys: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "long":
        monkeypatch.setattr(flash, "FUSED", 0)
    q, k, v, marks = arrays(heads, keys)
    segments = jnp.where(marks.positions < 0, -1, marks.segments)
    real = (marks.positions >= 0)[..., None, None]
    pull = jax.random.normal(jax.random.key(3), q.shape) * real

    def ours(q: Any, k: Any, v: Any) -> Any:
        if kind != "cudnn":
            return flash._splash(q, k, v, segments, window, softcap, interpret=True)
        return flash._cudnn(q, k, v, segments, window, implementation="xla")

    expected, back = jax.vjp(lambda *x: direct(*x, marks, window, softcap), q, k, v)
    found, gradient = jax.vjp(ours, q, k, v)
    np.testing.assert_allclose(found * real, expected * real, atol=2e-5)
    for mine, true in zip(gradient(pull), back(pull), strict=True):
        np.testing.assert_allclose(mine, true, atol=2e-4)


def test_who_is_served() -> None:
    mesh = abstract_mesh(mesh_shape(data=2))
    with using(mesh, "tpu"):
        assert serves_flash(8192, 256, 50.0)
        assert not serves_flash(100, 256, None)
        assert not serves_flash(8192, 64, None)
    with using(mesh, "gpu"):
        assert serves_flash(100, 64, None)
        assert not serves_flash(100, 64, 50.0)
    assert not serves_flash(8192, 256, None)
