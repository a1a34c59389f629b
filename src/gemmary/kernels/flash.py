"""Attention for training on accelerators, where no scores are kept: Pallas's splash attention on TPUs, cuDNN's on GPUs.

Both come with JAX. They see rows whose documents stand one after the other, each in the order of its positions; what is
padding sees and is seen by padding alone, and its results mean nothing.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemmary.mesh import platform
from gemmary.spread import by_heads

__all__ = ["CONTEXT", "FUSED", "flash_attention", "serves_flash"]

CONTEXT = "context"
"""The name (`checkpoint_name`) under which a backward pass finds what attention gave, where it was kept."""

_LANES = 128
_BLOCK = 512
FUSED = 8192
"""Rows to which one kernel makes the whole backward pass: it keeps the queries' gradient for each block of keys, too much for longer ones."""


def serves_flash(length: int, head_dim: int, softcap: float | None) -> bool:
    """Whether `flash_attention` takes rows of this length. cuDNN's has no soft-caps."""
    if platform() == "tpu":
        return length % _LANES == 0 and head_dim % _LANES == 0
    return platform() == "gpu" and softcap is None and head_dim % 8 == 0 and head_dim <= 256


def flash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    window: int | None,
    softcap: float | None,
) -> Float[Array, "B T N H"]:
    """Attention of scaled, rotated queries among themselves, and its gradient."""
    segments = jnp.where(positions < 0, -1, segments)
    if platform() == "tpu":

        def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
            return _splash(q, k, v, segments, window, softcap)

    else:

        def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
            return _cudnn(q, k, v, segments, window)

    return by_heads(local, q, k, v, segments)


def _splash(
    q: Array, k: Array, v: Array, segments: Array, window: int | None, softcap: float | None, *, interpret: bool = False
) -> Array:
    """By key/value head: its group of query heads reads it as in multi-query attention."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, T, N, H = q.shape
    K = k.shape[2]
    kernel = _kernel(T, N // K, window, softcap, interpret)
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    keys, values = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        ids = splash.SegmentIds(segments, segments)
        found: Array = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(q, k, v)
        return found

    out = jax.vmap(row)(grouped, keys, values, segments)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)


def _kernel(length: int, heads: int, window: int | None, softcap: float | None, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (_BLOCK, 256, _LANES) if length % size == 0)
    fused = length <= FUSED
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=None if fused else block, block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )  # fmt: skip
    return splash.make_splash_mqa_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=CONTEXT,
        interpret=interpret,
    )


def _cudnn(
    q: Array, k: Array, v: Array, segments: Array, window: int | None, *, implementation: Any = "cudnn"
) -> Array:
    """Documents that share a row are told apart by a mask of bits, which cuDNN reads block by block."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, mask=same, scale=1.0, is_causal=True, local_window_size=local, implementation=implementation
    )
