"""Gemma in float64 NumPy: the reference that every implementation here is held to.

Written from the published papers and the formats' Hugging Face names, not from gemmary's model: full masks, one sequence,
loops where they are clearer. Sources: arXiv 2403.08295 (Gemma), 2408.00118 (Gemma 2), 2503.19786 (Gemma 3), 2104.09864 (RoPE),
1910.07467 (RMSNorm), 2002.05202 (GeGLU).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Spec:
    """A model in plain numbers. Windows (None: all), rope bases and factors are listed layer by layer."""

    vocab: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    ffw: int
    windows: list[int | None]
    rope_bases: list[float]
    rope_factors: list[float]
    query_scale: float
    post_norms: bool = False
    qk_norm: bool = False
    attn_cap: float | None = None
    final_cap: float | None = None
    eps: float = 1e-6
    embed_factor: type = field(default=np.float32)  # the dtype that sqrt(D) is rounded to

    @property
    def layers(self) -> int:
        return len(self.windows)


def lengths(window: int) -> list[int]:
    """Prompt lengths at which windows and caches show their mistakes."""
    return [1, 2, 17, window - 1, window, window + 1, 2 * window + 3, 3 * window + 17]


def rope_angles(position: int, head_dim: int, base: float, factor: float = 1.0) -> np.ndarray:
    """The H/2 angles at a position, in radians."""
    return np.array([position / (factor * base ** (2 * i / head_dim)) for i in range(head_dim // 2)])


def norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """x / rms(x) * (1 + w)."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * (1 + w)


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU by its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def turn(x: np.ndarray, positions: np.ndarray, base: float, factor: float) -> np.ndarray:
    """Rotary embedding of [T, heads, H]: value i and value i + H/2 are a point in a plane."""
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for t, position in enumerate(positions):
        angle = rope_angles(int(position), x.shape[-1], base, factor)
        a, b = x[t, :, :half], x[t, :, half:]
        out[t, :, :half] = a * np.cos(angle) - b * np.sin(angle)
        out[t, :, half:] = a * np.sin(angle) + b * np.cos(angle)
    return out


def attention(
    spec: Spec, w: Weights, x: np.ndarray, layer: int, positions: np.ndarray, segments: np.ndarray
) -> np.ndarray:
    """Softmax attention; query head n reads key/value head n // (heads / kv_heads)."""
    name = f"model.layers.{layer}.self_attn."
    length = len(x)
    q = (x @ w[name + "q_proj.weight"].T).reshape(length, spec.heads, spec.head_dim)
    k = (x @ w[name + "k_proj.weight"].T).reshape(length, spec.kv_heads, spec.head_dim)
    v = (x @ w[name + "v_proj.weight"].T).reshape(length, spec.kv_heads, spec.head_dim)
    if spec.qk_norm:
        q = norm(q, w[name + "q_norm.weight"], spec.eps)
        k = norm(k, w[name + "k_norm.weight"], spec.eps)
    q = turn(q, positions, spec.rope_bases[layer], spec.rope_factors[layer]) * spec.query_scale
    k = turn(k, positions, spec.rope_bases[layer], spec.rope_factors[layer])
    window = spec.windows[layer] or length + 1
    out = np.zeros((length, spec.heads, spec.head_dim))
    for n in range(spec.heads):
        shared = n // (spec.heads // spec.kv_heads)
        for t in range(length):
            seen = [s for s in range(t + 1) if t - s < window and segments[s] == segments[t]]
            scores = k[seen, shared] @ q[t, n]
            if spec.attn_cap is not None:
                scores = spec.attn_cap * np.tanh(scores / spec.attn_cap)
            p = np.exp(scores - scores.max())
            out[t, n] = (p / p.sum()) @ v[seen, shared]
    return out.reshape(length, -1) @ w[name + "o_proj.weight"].T


def logits(
    spec: Spec,
    weights: Weights,
    ids: list[int],
    positions: np.ndarray | None = None,
    segments: np.ndarray | None = None,
) -> np.ndarray:
    """Next-token logits [T, V] in float64. `positions` restart and `segments` differ from document to document."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    positions = np.arange(len(ids)) if positions is None else positions
    segments = np.zeros(len(ids), int) if segments is None else segments
    table = w["model.embed_tokens.weight"]
    x = table[ids] * float(spec.embed_factor(np.sqrt(spec.embed)))
    for layer in range(spec.layers):
        name = f"model.layers.{layer}."
        after_attention = name + "post_attention_layernorm.weight"
        h = attention(spec, w, norm(x, w[name + "input_layernorm.weight"], spec.eps), layer, positions, segments)
        x = x + (norm(h, w[after_attention], spec.eps) if spec.post_norms else h)
        before = name + "pre_feedforward_layernorm.weight" if spec.post_norms else after_attention
        h = norm(x, w[before], spec.eps)
        h = (gelu(h @ w[name + "mlp.gate_proj.weight"].T) * (h @ w[name + "mlp.up_proj.weight"].T)) @ w[
            name + "mlp.down_proj.weight"
        ].T
        x = x + (norm(h, w[name + "post_feedforward_layernorm.weight"], spec.eps) if spec.post_norms else h)
    out = norm(x, w["model.norm.weight"], spec.eps) @ table.T
    return spec.final_cap * np.tanh(out / spec.final_cap) if spec.final_cap is not None else out


def small_spec(kind: str) -> Spec:
    """Small models with every dimension distinct, so that no transpose can hide. W is 8."""
    if kind in ("gemma1-mqa", "gemma1-mha"):
        kv = 1 if kind.endswith("mqa") else 5
        return Spec(73, 26, 5, kv, 8, 44, [None] * 3, [1e4] * 3, [1.0] * 3, 8**-0.5)
    if kind == "gemma2":
        return Spec(
            79, 30, 6, 2, 10, 46, [8, None, 8, None], [1e4] * 4, [1.0] * 4, 13**-0.5,
            post_norms=True, attn_cap=5.0, final_cap=4.0,
        )  # fmt: skip
    return Spec(
        83, 36, 9, 3, 12, 50, [8, 8, 8, 8, 8, None, 8], [1e4] * 5 + [1e6] + [1e4], [1.0] * 5 + [8.0] + [1.0], 17**-0.5,
        post_norms=True, qk_norm=True,
    )  # fmt: skip


KINDS = ("gemma1-mqa", "gemma1-mha", "gemma2", "gemma3")


def small_weights(spec: Spec, seed: int = 0) -> Weights:
    """Random weights in float32 under Hugging Face names, from a stream that NumPy has frozen.

    Queries and keys are large enough that attention is far from uniform and caps bite; norms are around zero, not at it.
    """
    rng = np.random.RandomState(seed)
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

    def draw(*shape: int, scale: float) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    w: Weights = {"model.embed_tokens.weight": draw(spec.vocab, spec.embed, scale=0.5)}
    for layer in range(spec.layers):
        name = f"model.layers.{layer}."
        w |= {
            name + "self_attn.q_proj.weight": draw(q, spec.embed, scale=0.5),
            name + "self_attn.k_proj.weight": draw(kv, spec.embed, scale=0.5),
            name + "self_attn.v_proj.weight": draw(kv, spec.embed, scale=0.3),
            name + "self_attn.o_proj.weight": draw(spec.embed, q, scale=0.3),
            name + "mlp.gate_proj.weight": draw(spec.ffw, spec.embed, scale=0.3),
            name + "mlp.up_proj.weight": draw(spec.ffw, spec.embed, scale=0.3),
            name + "mlp.down_proj.weight": draw(spec.embed, spec.ffw, scale=0.2),
        }
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if spec.post_norms else []
        w |= {f"{name}{norm}.weight": draw(spec.embed, scale=0.3) for norm in norms}
        if spec.qk_norm:
            w |= {f"{name}self_attn.{norm}.weight": draw(spec.head_dim, scale=0.3) for norm in ("q_norm", "k_norm")}
    return w | {"model.norm.weight": draw(spec.embed, scale=0.3)}
