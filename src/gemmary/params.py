"""The table of parameters. Shapes, counts, initial values, shardings and checkpoint schemas all derive from it.

Parameters are a flat dict from these names to weights. A layer's parameters come in one of two forms: *stacked*, one
weight with a leading L axis, which training scans; or *unstacked*, a tuple of L weights, which inference unrolls (on a
CPU a scan would copy each layer's weights). `stack` and `unstack` go between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from gemmary.config import Config
from gemmary.mesh import STORAGE, replicated, storage_sharding, storage_spec

__all__ = [
    "TABLE",
    "Counts",
    "Params",
    "Spec",
    "abstract",
    "count",
    "init",
    "is_stacked",
    "layered_names",
    "placement",
    "shape_of",
    "shardings",
    "stack",
    "table",
    "undivided",
    "unstack",
]

Params = dict[str, Any]
"""Table name -> weight, or a tuple of L weights (see the module's first lines)."""


@dataclass(frozen=True)
class Spec:
    """One row: named axes in storage order, and which of them a product with this weight sums over.

    `reads` gives the fan-in of the initial values, the input side of a LoRA and the axes that share a quantization
    scale. A row without `reads` is a norm (applied as 1 + w) or the score head: zeros at first, never quantized or adapted.
    `when` names the switch of the config that the row depends on.
    """

    axes: tuple[str, ...]
    reads: tuple[str, ...] = ()
    when: str | None = None

    @property
    def layered(self) -> bool:
        """Whether every layer has its own."""
        return self.axes[0] == "layers"

    def read_axes(self) -> tuple[int, ...]:
        """Positions of `reads`, counted from the end, so that they hold for stacked and unstacked weights alike."""
        return tuple(self.axes.index(axis) - len(self.axes) for axis in self.reads)


def _row(axes: str, reads: str = "", when: str | None = None) -> Spec:
    return Spec(tuple(axes.split()), tuple(reads.split()), when)


TABLE: dict[str, Spec] = {
    "embed": _row("vocab embed", reads="embed"),
    "attn.q": _row("layers embed heads head_dim", reads="embed"),
    "attn.k": _row("layers embed kv_heads head_dim", reads="embed"),
    "attn.v": _row("layers embed kv_heads head_dim", reads="embed"),
    "attn.o": _row("layers heads head_dim embed", reads="heads head_dim"),
    "attn.q_norm": _row("layers head_dim", when="qk_norm"),
    "attn.k_norm": _row("layers head_dim", when="qk_norm"),
    "mlp.gate": _row("layers embed ffw", reads="embed"),
    "mlp.up": _row("layers embed ffw", reads="embed"),
    "mlp.down": _row("layers ffw embed", reads="ffw"),
    "pre_attn_norm": _row("layers embed"),
    "post_attn_norm": _row("layers embed", when="post_norms"),
    "pre_ffw_norm": _row("layers embed"),
    "post_ffw_norm": _row("layers embed", when="post_norms"),
    "final_norm": _row("embed"),
    "score": _row("embed", when="score_head"),
}

_SIZES = {
    "layers": "num_layers",
    "vocab": "vocab_size",
    "embed": "embed_dim",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "ffw": "ffw_dim",
}


class Counts(NamedTuple):
    """Parameters of a model. The tied embedding counts once."""

    embedding: int
    non_embedding: int

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding


def table(config: Config) -> dict[str, Spec]:
    """The rows that this config has."""
    return {name: spec for name, spec in TABLE.items() if spec.when is None or getattr(config, spec.when)}


def shape_of(config: Config, spec: Spec) -> tuple[int, ...]:
    """The stacked shape of a row."""
    return tuple(getattr(config, _SIZES[axis]) for axis in spec.axes)


def count(config: Config) -> Counts:
    """Parameters of the embedding and of all the rest."""
    sizes = {name: math.prod(shape_of(config, spec)) for name, spec in table(config).items()}
    return Counts(sizes["embed"], sum(sizes.values()) - sizes["embed"])


def layered_names(config: Config) -> list[tuple[str, int]]:
    """Every weight of the unstacked form as (row, layer), in table order; what the model has once has layer 0."""
    rows = table(config).items()
    return [(name, i) for name, spec in rows for i in range(config.num_layers if spec.layered else 1)]


def abstract(config: Config, dtype: Any = jnp.float32, mesh: Mesh | AbstractMesh | None = None) -> Params:
    """Stacked parameters as shapes and dtypes only (with shardings on a mesh): nothing is allocated."""
    placed = shardings(config, mesh) if mesh is not None else {}
    return {
        name: jax.ShapeDtypeStruct(shape_of(config, spec), dtype, sharding=placed.get(name))
        for name, spec in table(config).items()
    }


def shardings(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, NamedSharding]:
    """How each stacked parameter is stored on the mesh."""
    return {name: storage_sharding(spec.axes, shape_of(config, spec), mesh) for name, spec in table(config).items()}


def placement(params: Params, mesh: Mesh | AbstractMesh) -> Params:
    """How each weight of these parameters is stored on the mesh, stacked or not; what a leaf type adds is on every device."""

    def one(name: str, weight: Any) -> Any:
        axes = TABLE[name].axes
        if not hasattr(weight, "ndim"):
            return jax.tree.map(lambda _: replicated(mesh), weight)
        return storage_sharding(axes if weight.ndim == len(axes) else axes[1:], weight.shape, mesh)

    return {
        name: tuple(one(name, w) for w in weight) if type(weight) is tuple else one(name, weight)
        for name, weight in params.items()
    }


def undivided(config: Config, mesh: Mesh | AbstractMesh | None) -> list[str]:
    """A line for each parameter of which a mesh axis divides too little: what is kept on every device that could be split."""
    found, sizes = [], dict(mesh.shape) if mesh is not None else {}
    for name, spec in table(config).items():
        if sum(axis != "layers" for axis in spec.axes) < 2:
            continue
        shape = shape_of(config, spec)
        for axis, size, part in zip(spec.axes, shape, storage_spec(spec.axes, shape, sizes), strict=True):
            given = part if isinstance(part, tuple) else (part,)
            over = [one for one in STORAGE.get(axis, ()) if sizes.get(one, 1) > 1 and one not in given]
            found += [
                f"{name} is on every chip of `{one}`: {axis} {size} does not divide by {sizes[one]}" for one in over
            ]
    return found


def init(config: Config, key: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Random stacked parameters: normal with variance 1/fan-in, norms zero.

    The tied embedding is drawn with variance 1/D: its rows enter times sqrt(D), so activations and logits both start
    near one. Each row's draw depends on its name alone, so a switch turned on changes no other parameter.
    """
    params = {}
    for name, spec in table(config).items():
        shape = shape_of(config, spec)
        if not spec.reads:
            params[name] = jnp.zeros(shape, dtype)
            continue
        fan_in = math.prod(shape[axis] for axis in spec.read_axes())
        row_key = jax.random.fold_in(key, list(TABLE).index(name))
        params[name] = (jax.random.normal(row_key, shape) * fan_in**-0.5).astype(dtype)
    return params


def is_stacked(params: Params) -> bool:
    """Whether the layers' parameters carry a leading L axis."""
    return not isinstance(params["attn.q"], tuple)


def unstack(params: Params) -> Params:
    """Stacked to unstacked: every layer's weight on its own."""
    layers = jax.tree.leaves(params["attn.q"])[0].shape[0]
    return {
        name: tuple(jax.tree.map(lambda leaf, i=i: leaf[i], weight) for i in range(layers))
        if TABLE[name].layered
        else weight
        for name, weight in params.items()
    }


def stack(params: Params) -> Params:
    """Unstacked to stacked."""
    return {
        name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *weight) if TABLE[name].layered else weight
        for name, weight in params.items()
    }
