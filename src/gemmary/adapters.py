"""Low-rank adapters over a model (LoRA, Hu et al., arXiv 2106.09685): put on, learnt apart from what they adapt, folded in.

What is learnt is a tree of its own, without the weights beneath: gradients, optimizer state and checkpoints are then as small
as the adapters, and the base may be anything that `weights` knows, Int8 included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gemmary.errors import GemmaryError
from gemmary.params import TABLE, Params
from gemmary.weights import LoRA, dequantize, map_rows, weight_shape

__all__ = ["PROJECTIONS", "adapt", "join", "merge", "split"]

PROJECTIONS = tuple(name for name, spec in TABLE.items() if spec.reads and spec.layered)
"""Every matrix of a layer."""


def adapt(
    params: Params,
    key: jax.Array,
    rank: int,
    *,
    alpha: float | None = None,
    targets: Collection[str] = PROJECTIONS,
    dtype: Any = jnp.float32,
) -> Params:
    """Every target as a LoRA of that rank over what it was, `a` random and `b` zero, so that nothing changes yet.

    The update is scaled by alpha / rank (alpha defaults to rank). Raises GemmaryError for a target that the table
    does not have or that is already adapted.
    """
    wrong = [name for name in targets if name not in TABLE or not TABLE[name].reads]
    if wrong or rank < 1:
        raise GemmaryError(
            f"cannot adapt {', '.join(wrong) or 'anything'} with rank {rank}: "
            f"the rank is at least 1 and targets are among embed, {', '.join(PROJECTIONS)}"
        )
    keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(TABLE)}

    def wrap(name: str, w: Any) -> LoRA:
        if isinstance(w, LoRA):
            raise GemmaryError(f"{name} is already adapted: merge it first")
        spec = TABLE[name]
        full = weight_shape(w)
        lead = full[: len(full) - len([a for a in spec.axes if a != "layers"])]
        reads = tuple(full[axis] for axis in spec.read_axes())
        writes = tuple(full[i] for i in range(-len(full) + len(lead), 0) if i not in spec.read_axes())
        a = jax.random.normal(keys[name], (*lead, *reads, rank)) * math.prod(reads) ** -0.5
        keys[name] = jax.random.fold_in(keys[name], 0)  # unstacked layers draw in turn
        return LoRA(w, a.astype(dtype), jnp.zeros((*lead, rank, *writes), dtype), (alpha or rank) / rank)

    return map_rows(params, wrap, lambda spec: True, names=targets)


def merge(params: Params) -> Params:
    """Every LoRA folded into one array; the rest untouched. Over a quantized base the result is fp32."""
    return map_rows(params, lambda name, w: _merged(name, w) if isinstance(w, LoRA) else w, lambda spec: True)


def _merged(name: str, w: LoRA) -> Array:
    """base + scale * a b, in the base's dtype (fp32 over a quantized base)."""
    spec, base = TABLE[name], dequantize(w.base)
    letter = dict(zip(spec.axes, "uvwxyz", strict=False))
    axes = "".join(letter[axis] for axis in spec.axes[-base.ndim :])
    reads = "".join(letter[axis] for axis in spec.reads)
    lead = axes[0] if spec.layered and base.ndim == len(spec.axes) else ""
    writes = "".join(c for c in axes if c not in reads + lead)
    update = jnp.einsum(f"{lead}{reads}r,{lead}r{writes}->{axes}", w.a, w.b, preferred_element_type=jnp.float32)
    return (base + w.scale * update).astype(w.base.dtype if isinstance(w.base, jax.Array) else jnp.float32)


def split(params: Params, also: Collection[str] = ()) -> tuple[Params, Params]:
    """What is learnt (the adapters, without what they adapt, and the rows named in `also`), and all the rest."""
    learnt, rest = {}, {}
    for name, weight in params.items():
        first = weight[0] if isinstance(weight, tuple) else weight
        if name in also:
            learnt[name] = weight
        elif isinstance(first, LoRA):
            learnt[name] = _each(weight, lambda w: dataclasses.replace(w, base=None))
            rest[name] = _each(weight, lambda w: w.base)
        else:
            rest[name] = weight
    return learnt, rest


def join(learnt: Params, rest: Params | None) -> Params:
    """The model that `split` took apart; without a rest all of it is learnt."""
    if rest is None:
        return learnt
    whole = dict(rest)
    for name, weight in learnt.items():
        if name not in rest:
            whole[name] = weight
        elif isinstance(weight, tuple):
            pairs = zip(weight, rest[name], strict=True)
            whole[name] = tuple(dataclasses.replace(w, base=base) for w, base in pairs)
        else:
            whole[name] = dataclasses.replace(weight, base=rest[name])
    return {name: whole[name] for name in TABLE if name in whole}


def _each(weight: Any, change: Any) -> Any:
    return tuple(change(w) for w in weight) if isinstance(weight, tuple) else change(weight)
