"""One table of names and layouts for every format we read or write.

Each row says where a format keeps our tensors: its name there, which of ours it holds (several where a format fuses them,
one after the other along the first axis) and how each is laid out, as named axes with those folded into one dimension in
brackets. The transforms both ways follow from the axes; nothing else in the package knows a foreign name.

Sources: the formats' own files, and google-deepmind/gemma and google/gemma_pytorch for the last two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.params import TABLE, shape_of, table

__all__ = [
    "IGNORED",
    "LAYOUTS",
    "Stored",
    "check_names",
    "gate_is_transposed",
    "join",
    "layout",
    "split",
    "stored_shape",
]


@dataclass(frozen=True)
class Stored:
    """One tensor of a format. `name` has {i} where the layer's number goes; `one_plus` marks norms kept as 1 + w."""

    name: str
    members: tuple[str, ...]
    axes: tuple[str, ...]
    one_plus: bool = False

    @property
    def layered(self) -> bool:
        return TABLE[self.members[0]].layered

    def at(self, layer: int) -> str:
        """The name in that layer (or of the whole model)."""
        return self.name.format(i=layer)


def _one(name: str, ours: str, axes: str, one_plus: bool = False) -> Stored:
    return Stored(name, (ours,), (axes,), one_plus)


def _fused(name: str, ours: str, *axes: str) -> Stored:
    return Stored(name, tuple(ours.split()), axes)


_ROWS_Q = "(heads head_dim) embed"
_ROWS_KV = "(kv_heads head_dim) embed"


def _norms(config: Config, prefix: str, names: Mapping[str, str], suffix: str, one_plus: bool = False) -> list[Stored]:
    rows = []
    for ours, name in names.items():
        axes = "head_dim" if ours.startswith("attn.") else "embed"
        rows.append(_one(f"{prefix if TABLE[ours].layered else ''}{name}{suffix}", ours, axes, one_plus))
    return [row for row in rows if row.members[0] in table(config)]


def _hf_norms(config: Config, q_norm: str, k_norm: str) -> dict[str, str]:
    # post_attention_layernorm is the norm before the feed-forward in Gemma 1, and the one after attention from Gemma 2 on.
    before, after = "post_attention_layernorm", "pre_feedforward_layernorm"
    return {
        "pre_attn_norm": "input_layernorm",
        "post_attn_norm": "post_attention_layernorm",
        "pre_ffw_norm": after if config.post_norms else before,
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn.q_norm": f"self_attn.{q_norm}",
        "attn.k_norm": f"self_attn.{k_norm}",
        "final_norm": "model.norm",
    }


def _huggingface(config: Config) -> list[Stored]:
    layer = "model.layers.{i}."
    return [
        _one("model.embed_tokens.weight", "embed", "vocab embed"),
        _one(f"{layer}self_attn.q_proj.weight", "attn.q", _ROWS_Q),
        _one(f"{layer}self_attn.k_proj.weight", "attn.k", _ROWS_KV),
        _one(f"{layer}self_attn.v_proj.weight", "attn.v", _ROWS_KV),
        _one(f"{layer}self_attn.o_proj.weight", "attn.o", "embed (heads head_dim)"),
        _one(f"{layer}mlp.gate_proj.weight", "mlp.gate", "ffw embed"),
        _one(f"{layer}mlp.up_proj.weight", "mlp.up", "ffw embed"),
        _one(f"{layer}mlp.down_proj.weight", "mlp.down", "embed ffw"),
        *_norms(config, layer, _hf_norms(config, "q_norm", "k_norm"), ".weight"),
        *([_one("score.weight", "score", "1 embed")] if config.score_head else []),
    ]


def _torch(config: Config) -> list[Stored]:
    layer = "model.layers.{i}."
    return [
        _one("embedder.weight", "embed", "vocab embed"),
        _fused(f"{layer}self_attn.qkv_proj.weight", "attn.q attn.k attn.v", _ROWS_Q, _ROWS_KV, _ROWS_KV),
        _one(f"{layer}self_attn.o_proj.weight", "attn.o", "embed (heads head_dim)"),
        _one(f"{layer}mlp.gate_proj.weight", "mlp.gate", "ffw embed"),
        _one(f"{layer}mlp.up_proj.weight", "mlp.up", "ffw embed"),
        _one(f"{layer}mlp.down_proj.weight", "mlp.down", "embed ffw"),
        *_norms(config, layer, _hf_norms(config, "query_norm", "key_norm"), ".weight"),
    ]


def _gguf(config: Config) -> list[Stored]:
    layer = "blk.{i}."
    norms = {
        "pre_attn_norm": "attn_norm",
        "post_attn_norm": "post_attention_norm",
        "pre_ffw_norm": "ffn_norm",
        "post_ffw_norm": "post_ffw_norm",
        "attn.q_norm": "attn_q_norm",
        "attn.k_norm": "attn_k_norm",
        "final_norm": "output_norm",
    }
    return [
        _one("token_embd.weight", "embed", "vocab embed"),
        _one(f"{layer}attn_q.weight", "attn.q", _ROWS_Q),
        _one(f"{layer}attn_k.weight", "attn.k", _ROWS_KV),
        _one(f"{layer}attn_v.weight", "attn.v", _ROWS_KV),
        _one(f"{layer}attn_output.weight", "attn.o", "embed (heads head_dim)"),
        _one(f"{layer}ffn_gate.weight", "mlp.gate", "ffw embed"),
        _one(f"{layer}ffn_up.weight", "mlp.up", "ffw embed"),
        _one(f"{layer}ffn_down.weight", "mlp.down", "embed ffw"),
        *_norms(config, layer, norms, ".weight", one_plus=True),
    ]


def gate_is_transposed(config: Config) -> bool:
    """Whether Google's Flax checkpoint of this model keeps gate and up as [2, F, D].

    So in Gemma 3 and in Gemma 2 9B and 27B; [2, D, F] in Gemma 1 and Gemma 2 2B (google-deepmind/gemma, gm/nn/_gemma.py).
    """
    return config.generation == 3 or (config.generation == 2 and config.embed_dim != 2304)


def _kaggle(config: Config) -> list[Stored]:
    layer = "transformer/layer_{i}/"
    head_rows = "1 heads embed head_dim"
    kv_rows = "1 kv_heads embed head_dim"
    attention = (
        [_fused(f"{layer}attn/qkv_einsum/w", "attn.q attn.k attn.v", head_rows, kv_rows, kv_rows)]
        if config.num_heads == config.num_kv_heads
        else [
            _one(f"{layer}attn/q_einsum/w", "attn.q", "heads embed head_dim"),
            _fused(f"{layer}attn/kv_einsum/w", "attn.k attn.v", kv_rows, kv_rows),
        ]
    )
    norms = {
        "pre_attn_norm": "pre_attention_norm",
        "post_attn_norm": "post_attention_norm",
        "pre_ffw_norm": "pre_ffw_norm",
        "post_ffw_norm": "post_ffw_norm",
        "attn.q_norm": "attn/_query_norm",
        "attn.k_norm": "attn/_key_norm",
        "final_norm": "transformer/final_norm",
    }
    gate = "1 ffw embed" if gate_is_transposed(config) else "1 embed ffw"
    return [
        _one("transformer/embedder/input_embedding", "embed", "vocab embed"),
        *attention,
        _one(f"{layer}attn/attn_vec_einsum/w", "attn.o", "heads head_dim embed"),
        _fused(f"{layer}mlp/gating_einsum/w", "mlp.gate mlp.up", gate, gate),
        _one(f"{layer}mlp/linear/w", "mlp.down", "ffw embed"),
        *_norms(config, layer, norms, "/scale"),
    ]


LAYOUTS: dict[str, Callable[[Config], list[Stored]]] = {
    "hf": _huggingface,
    "gguf": _gguf,
    "kaggle": _kaggle,
    "torch": _torch,
}

# What a checkpoint of that format may carry beside the text model's weights, by prefix or suffix. Anything else that we
# do not know is an error: a tensor skipped in silence is a wrong model.
IGNORED: dict[str, tuple[str, ...]] = {
    "hf": ("model.vision_tower.", "model.multi_modal_projector.", "vision_tower.", "multi_modal_projector."),
    "gguf": ("rope_freqs.weight",),
    "kaggle": ("SigLiPFromPatches_0/", "transformer/embedder/mm_"),
    "torch": ("freqs_cis", "local_freqs_cis", "global_freqs_cis"),
}


def layout(format: str, config: Config) -> list[Stored]:
    """The tensors that a checkpoint of this config has in this format."""
    return LAYOUTS[format](config)


def _groups(axes: str) -> list[list[str]]:
    """ "(heads head_dim) embed" as [[heads, head_dim], [embed]]."""
    return [(folded or single).split() for folded, single in re.findall(r"\(([^)]*)\)|(\S+)", axes)]


def _sizes(ours: str, config: Config) -> dict[str, int]:
    spec = TABLE[ours]
    return {"1": 1, **dict(zip(spec.axes, shape_of(config, spec), strict=True))}


def _member_shape(ours: str, axes: str, config: Config) -> tuple[int, ...]:
    sizes = _sizes(ours, config)
    return tuple(math.prod(sizes[axis] for axis in group) for group in _groups(axes))


def stored_shape(row: Stored, config: Config) -> tuple[int, ...]:
    """The shape of the format's tensor."""
    shapes = [_member_shape(ours, axes, config) for ours, axes in zip(row.members, row.axes, strict=True)]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def join(row: Stored, config: Config, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Our tensors of one layer as the format's one. 1 + w is taken in fp32."""
    laid = []
    for ours, axes in zip(row.members, row.axes, strict=True):
        have = [axis for axis in TABLE[ours].axes if axis != "layers"]
        order = [have.index(axis) for group in _groups(axes) for axis in group if axis != "1"]
        laid.append(parts[ours].transpose(order).reshape(_member_shape(ours, axes, config)))
    whole = laid[0] if len(laid) == 1 else np.concatenate(laid)
    return np.ascontiguousarray(1 + whole.astype(np.float32) if row.one_plus else whole)


def split(row: Stored, config: Config, whole: np.ndarray) -> dict[str, np.ndarray]:
    """The format's tensor as ours of one layer: the inverse of `join`."""
    parts, start = {}, 0
    for ours, axes in zip(row.members, row.axes, strict=True):
        shape = _member_shape(ours, axes, config)
        part = whole[start : start + shape[0]]
        start += shape[0]
        names = [axis for group in _groups(axes) for axis in group if axis != "1"]
        sizes = _sizes(ours, config)
        wanted = [axis for axis in TABLE[ours].axes if axis != "layers"]
        part = part.reshape([sizes[axis] for axis in names]).transpose([names.index(axis) for axis in wanted])
        parts[ours] = part - np.float32(1) if row.one_plus else part
    return parts


def check_names(where: str, format: str, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor of the format there, of the right shape, and nothing unknown beside; else GemmaryError listing them."""
    wanted = {
        row.at(i): stored_shape(row, config)
        for row in layout(format, config)
        for i in range(config.num_layers if row.layered else 1)
    }
    ignored = IGNORED[format]
    unknown = [name for name in shapes if name not in wanted and not name.startswith(ignored)]
    missing = [name for name in wanted if name not in shapes]
    wrong = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    for what, names in (("lacks", missing), ("has unknown", unknown), ("has misshapen", wrong)):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise GemmaryError(
                f"{where} {what} tensors: {', '.join(names[:4])}{more}; is it a Gemma {config.generation} checkpoint?"
            )
