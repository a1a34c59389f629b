"""GGUF models, read and written: metadata to config, arrays to tokenizer, and the norms' 1 + w.

GGUF keeps norms as 1 + w in fp32. Taking the one off again is exact but for the smallest values (below 2^-16), so what we
write carries those norms' exact values in keys of our own (`gemmary.exact.<tensor>`), which other readers skip.
Architecture and key names are llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gemmary.checkpoints.checkpoint import Checkpoint, StoredCheckpoint, closed_on_error
from gemmary.checkpoints.gguf_file import GGUFReader
from gemmary.checkpoints.names import layout
from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.kernels import BLOCKS, serves_blocks
from gemmary.params import TABLE, shape_of
from gemmary.text.dialogue import chat_template
from gemmary.text.tokenizer import Tokenizer
from gemmary.text.vocabulary import Kind
from gemmary.weights import Blocks

__all__ = ["GGUFCheckpoint", "fields_for", "open_gguf"]

_ARCHITECTURES = {"gemma": 1, "gemma2": 2, "gemma3": 3}
_EXACT = "gemmary.exact."
# What GGUF has no key for and llama.cpp knows by heart: the 27B models do not scale queries by head_dim^-0.5, and which
# layers slide follows from the architecture. (layers, embed_dim) -> the number whose inverse root is the scale.
_QUERY_SCALARS = {(46, 4608): 144, (62, 5376): 168}
_PATTERNS = {1: (False,), 2: (True, False), 3: (True, True, True, True, True, False)}


class GGUFCheckpoint(StoredCheckpoint):
    """An opened GGUF."""

    def __init__(self, where: str, config: Config, file: GGUFReader) -> None:
        duplicate = "output.weight"
        names = {name: name for name in file.entries if name not in (duplicate, "rope_freqs.weight")}
        if duplicate in file.entries and not np.array_equal(file.read(duplicate), file.read("token_embd.weight")):
            raise GemmaryError(f"{where}: output.weight differs from the embedding; Gemma's output is tied to it")
        super().__init__(where, "gguf", config, file, names)
        self._gguf = file
        embed = file.entries["token_embd.weight"].dtype
        self._matrix_dtype = embed if embed in (np.float16, ml_dtypes.bfloat16) else np.dtype(np.float32)

    def weight(self, name: str, layer: int = 0) -> np.ndarray:
        row = self._rows[name]
        if not row.one_plus:
            return super().weight(name, layer)
        stored = self._tensor(row, layer).astype(np.float32)
        w = stored - np.float32(1)
        exact = self._gguf.fields.get(_EXACT + row.at(layer))
        if isinstance(exact, np.ndarray) and np.array_equal(1 + exact.astype(np.float32), stored):
            w = exact.astype(np.float32)
        # Norms are fp32 here whatever the model is; where that adds nothing, give back the model's own dtype.
        narrow = w.astype(self._matrix_dtype)
        return narrow if np.array_equal(narrow.astype(np.float32), w) else w

    def packed(self, name: str, layer: int = 0) -> Any:
        spec, entry = TABLE[name], self._entry(name, layer)
        if entry.type_name not in BLOCKS or not spec.reads or not serves_blocks():
            return super().packed(name, layer)
        shape = shape_of(self.config, spec)[1 if spec.layered else 0 :]
        data = self._gguf.read_blocks(self._names[self._rows[name].at(layer)])  # rows are outputs, of all our matrices
        return Blocks(data, entry.type_name, shape, spec.read_axes()[-1] != -1)

    def dtype(self, name: str) -> str:
        return str(self._entry(name).type_name)

    def tokenizer(self) -> Tokenizer | None:
        fields = self._gguf.fields
        tokens, scores, types = (fields.get(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type"))
        if tokens is None or scores is None or types is None:
            return None
        return Tokenizer.from_pieces(tokens, scores, types)


def open_gguf(paths: Path | Sequence[Path], where: str | None = None) -> GGUFCheckpoint:
    """Open a GGUF, whole or cut in parts. Raises GemmaryError for another architecture and for whatever is malformed."""
    where = where or str(paths)
    with closed_on_error(GGUFReader(paths)) as file:
        architecture = file.fields.get("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise GemmaryError(f"{where}: architecture {architecture!r:.60}; gemmary reads {', '.join(_ARCHITECTURES)}")
        try:
            config = _config(str(architecture), file)
        except GemmaryError as error:
            raise GemmaryError(f"{where}: {error}") from None
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise GemmaryError(f"{where}: missing or malformed key {error}") from None
        return GGUFCheckpoint(where, config, file)


def _config(architecture: str, file: GGUFReader) -> Config:
    generation = _ARCHITECTURES[architecture]

    def get(key: str, default: Any = None) -> Any:
        value = file.fields.get(f"{architecture}.{key}", default)
        if value is None:
            raise KeyError(f"{architecture}.{key}")
        return value

    if "token_embd.weight" not in file.entries:
        raise GemmaryError("there is no token_embd.weight")
    rows = file.entries["token_embd.weight"].shape[0]
    layers, embed, heads = int(get("block_count")), int(get("embedding_length")), int(get("attention.head_count"))
    head_dim = int(get("attention.key_length", 256))
    scalar = _QUERY_SCALARS.get((layers, embed), head_dim)
    factor = float(get("rope.scaling.factor", 1.0)) if get("rope.scaling.type", "none") == "linear" else 1.0
    base = _decimal(get("rope.freq_base", 1e6 if generation == 3 else 1e4))
    pattern = file.fields.get("gemmary.window_pattern")
    tokens = file.fields.get("tokenizer.ggml.tokens")
    return Config(
        generation=generation,
        vocab_size=rows,
        num_tokens=int(file.fields.get("gemmary.num_tokens", min(rows, len(tokens)) if tokens else rows)),
        embed_dim=embed,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        ffw_dim=int(get("feed_forward_length")),
        context=int(get("context_length")),
        query_scale=float(file.fields.get("gemmary.query_scale", float(scalar) ** -0.5)),
        window=int(get("attention.sliding_window")) if generation > 1 else None,
        window_pattern=tuple(bool(x) for x in pattern) if pattern is not None else _PATTERNS[generation],
        rope_base=base,
        rope_base_local=_decimal(get("rope.freq_base_swa", 1e4)) if generation == 3 else base,
        rope_factor=factor,
        qk_norm=generation == 3,
        post_norms=generation > 1,
        attn_softcap=_decimal(get("attn_logit_softcapping", 50.0)) if generation == 2 else None,
        final_softcap=_decimal(get("final_logit_softcapping", 30.0)) if generation == 2 else None,
        norm_eps=_decimal(get("attention.layer_norm_rms_epsilon", 1e-6)),
    )


def _decimal(value: Any) -> float:
    """A float32 key as the decimal it was written from: 1e-6, not 9.99999997e-07."""
    return float(str(np.float32(value)))


def fields_for(config: Config, tokenizer: Tokenizer | None, source: Checkpoint, name: str) -> dict[str, Any]:
    """The metadata of a GGUF of this model. NumPy scalars and arrays carry the type that the key is written with."""
    if config.generation == 1 and (config.window or config.qk_norm or config.post_norms):
        raise GemmaryError(
            "GGUF's gemma architecture has no windows, QK-norm or post-norms: this config cannot be written"
        )
    architecture = next(key for key, generation in _ARCHITECTURES.items() if generation == config.generation)
    values: dict[str, Any] = {
        "context_length": np.uint32(config.context),
        "embedding_length": np.uint32(config.embed_dim),
        "block_count": np.uint32(config.num_layers),
        "feed_forward_length": np.uint32(config.ffw_dim),
        "attention.head_count": np.uint32(config.num_heads),
        "attention.head_count_kv": np.uint32(config.num_kv_heads),
        "attention.key_length": np.uint32(config.head_dim),
        "attention.value_length": np.uint32(config.head_dim),
        "attention.layer_norm_rms_epsilon": np.float32(config.norm_eps),
        "rope.freq_base": np.float32(config.rope_base),
    }
    if config.generation > 1:
        values["attention.sliding_window"] = np.uint32(config.window or 0)
    if config.attn_softcap is not None:
        values["attn_logit_softcapping"] = np.float32(config.attn_softcap)
    if config.final_softcap is not None:
        values["final_logit_softcapping"] = np.float32(config.final_softcap)
    if config.generation == 3 and config.rope_factor != 1:
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": np.float32(config.rope_factor)}
    if config.generation == 3 and config.rope_base_local != 1e4:
        values["rope.freq_base_swa"] = np.float32(config.rope_base_local)
    fields: dict[str, Any] = {"general.architecture": architecture, "general.name": name}
    fields |= {f"{architecture}.{key}": value for key, value in values.items()}
    fields |= _own_fields(config)
    if tokenizer is not None:
        fields |= _tokenizer_fields(config, tokenizer)
    return fields | _exact_norms(config, source)


def _own_fields(config: Config) -> dict[str, Any]:
    """What GGUF cannot say, under our own prefix, and only where it is not what a reader would assume."""
    fields: dict[str, Any] = {"gemmary.num_tokens": np.uint32(config.num_tokens)}
    scalar = _QUERY_SCALARS.get((config.num_layers, config.embed_dim), config.head_dim)
    if config.query_scale != float(scalar) ** -0.5:
        fields["gemmary.query_scale"] = np.float64(config.query_scale)
    if config.window_pattern != _PATTERNS[config.generation]:
        fields["gemmary.window_pattern"] = np.array(config.window_pattern, np.uint8)
    return fields


def _tokenizer_fields(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    pieces = tokenizer.pieces
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        # llama.cpp matches literal pieces against the text as it is: with spaces, where all other pieces have ▁.
        "tokenizer.ggml.tokens": [
            piece.text.replace("▁", " ") if piece.kind is Kind.USER_DEFINED else piece.text for piece in pieces
        ],
        "tokenizer.ggml.scores": pieces.scores,
        "tokenizer.ggml.token_type": pieces.kinds,
        "tokenizer.ggml.bos_token_id": np.uint32(tokenizer.bos),
        "tokenizer.ggml.eos_token_id": np.uint32(tokenizer.eos),
        "tokenizer.ggml.unknown_token_id": np.uint32(tokenizer.unk),
        "tokenizer.ggml.padding_token_id": np.uint32(tokenizer.pad),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    # llama.cpp wants a piece for every row of the embedding.
    missing = config.vocab_size - len(pieces)
    if missing > 0:
        fields["tokenizer.ggml.tokens"] += [f"[PAD{len(pieces) + i}]" for i in range(missing)]
        scores, kinds = fields["tokenizer.ggml.scores"], fields["tokenizer.ggml.token_type"]
        fields["tokenizer.ggml.scores"] = np.append(scores, np.full(missing, -1e4, np.float32))
        fields["tokenizer.ggml.token_type"] = np.append(kinds, np.full(missing, 5, np.int32))
    if tokenizer.end_of_turn is not None:
        fields["tokenizer.ggml.eot_token_id"] = np.uint32(tokenizer.end_of_turn)
        fields["tokenizer.chat_template"] = chat_template(config.generation)
    return fields


def _exact_norms(config: Config, source: Checkpoint) -> dict[str, Any]:
    exact = {}
    for row in layout("gguf", config):
        if not row.one_plus:
            continue
        for layer in range(config.num_layers if row.layered else 1):
            w = np.asarray(source.weight(row.members[0], layer)).astype(np.float32)
            if not np.array_equal((1 + w) - np.float32(1), w):
                exact[_EXACT + row.at(layer)] = w
    return exact
