"""What a Gemma is, in numbers: one frozen dataclass for Gemma 1, 2 and 3.

A config is hashable, so it is a static argument under `jax.jit`. It is checked once, when made; the rooms above trust it.
Which layer sees how far, and how its positions turn, is data (`layer_kinds`), not a class of layer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from gemmary.errors import GemmaryError

__all__ = ["Config", "LayerKind"]

# Far above every published size, and small enough that a hostile file's header cannot ask for terabytes.
_BOUNDS = {
    "generation": 3,
    "vocab_size": 1 << 20,
    "num_tokens": 1 << 20,
    "embed_dim": 1 << 16,
    "num_layers": 1024,
    "num_heads": 1024,
    "num_kv_heads": 1024,
    "head_dim": 4096,
    "ffw_dim": 1 << 20,
    "context": 1 << 24,
}


class LayerKind(NamedTuple):
    """How one layer attends: `window` keys back (itself included; None sees all) and its rope base and factor."""

    window: int | None
    rope_base: float
    rope_factor: float


@dataclass(frozen=True, kw_only=True)
class Config:
    """A decoder-only Gemma transformer.

    `vocab_size` counts the rows of the embedding; `num_tokens` those that a tokenizer knows. Rows beyond are padding
    (256128 against 256000 in Gemma 1) and are never sampled. `window_pattern` is repeated over the layers: True for a
    sliding-window layer, False for one that sees everything. `query_scale` multiplies the queries before the scores.
    `score_head` adds what a reward model has and a language model has not: a score read off the last hidden state.

    Raises GemmaryError where the numbers contradict one another.
    """

    generation: int
    vocab_size: int
    num_tokens: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffw_dim: int
    context: int
    query_scale: float
    window: int | None = None
    window_pattern: tuple[bool, ...] = (False,)
    rope_base: float = 10_000.0
    rope_base_local: float = 10_000.0
    rope_factor: float = 1.0
    qk_norm: bool = False
    post_norms: bool = False
    attn_softcap: float | None = None
    final_softcap: float | None = None
    norm_eps: float = 1e-6
    score_head: bool = False

    def __post_init__(self) -> None:
        for name, most in _BOUNDS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise GemmaryError(f"config: {name} is {value!r}; it must be a whole number from 1 to {most}")
        for name in ("query_scale", "rope_base", "rope_base_local", "rope_factor", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, float) or not 0 < value < float("inf"):
                raise GemmaryError(f"config: {name} is {value!r}; it must be a positive number")
        for name in ("attn_softcap", "final_softcap", "window"):
            value = getattr(self, name)
            kind = int if name == "window" else (int, float)
            if value is not None and (not isinstance(value, kind) or not 0 < value < float("inf")):
                raise GemmaryError(f"config: {name} is {value!r}; it must be a positive number, or none")
        if self.num_heads % self.num_kv_heads:
            raise GemmaryError(
                f"config: {self.num_heads} query heads do not divide over {self.num_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise GemmaryError(f"config: head_dim is {self.head_dim}; rotary positions need an even one")
        if self.num_tokens > self.vocab_size:
            raise GemmaryError(f"config: {self.num_tokens} tokens do not fit {self.vocab_size} embedding rows")
        if any(self.window_pattern) and self.window is None:
            raise GemmaryError("config: the pattern has sliding-window layers but no window is given")

    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, in order; length L."""
        local = LayerKind(self.window, self.rope_base_local, 1.0)
        everywhere = LayerKind(None, self.rope_base, self.rope_factor)
        pattern = self.window_pattern
        return tuple(local if pattern[i % len(pattern)] else everywhere for i in range(self.num_layers))

    def replace(self, **changes: object) -> Config:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
