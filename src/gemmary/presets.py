"""Every published size as a `Config`, each with its published parameter counts and where they were published.

Counts are facts of the sources, kept beside the shapes so that a test can set one against the other; nothing computes
them. `exact` tells whether the source gives every digit or rounds to millions.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from gemmary.config import Config
from gemmary.errors import GemmaryError

__all__ = ["PRESETS", "Preset", "nano", "preset"]

_REPORT_1 = "Gemma technical report, arXiv 2403.08295, tables 1 and 2"
_REPORT_2 = "Gemma 2 technical report, arXiv 2408.00118, tables 1 and 2"
_REPORT_3 = "Gemma 3 technical report, arXiv 2503.19786, table 1"
_CARD_270M = "Gemma 3 270M announcement and model card: 170 million embedding, 100 million transformer parameters"


@dataclass(frozen=True)
class Preset:
    """One published model: its shape, its published counts (None: not published) and their source."""

    config: Config
    embedding: int | None
    non_embedding: int | None
    exact: bool
    source: str


def _gemma1(layers: int, embed: int, heads: int, kv: int, ffw: int, vocab: int = 256128) -> Config:
    return Config(
        generation=1,
        vocab_size=vocab,
        num_tokens=256000,
        embed_dim=embed,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=256,
        ffw_dim=ffw,
        context=8192,
        query_scale=256**-0.5,
    )


def _gemma2(layers: int, embed: int, heads: int, kv: int, head: int, ffw: int, scale: float) -> Config:
    return Config(
        generation=2,
        vocab_size=256128,
        num_tokens=256000,
        embed_dim=embed,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head,
        ffw_dim=ffw,
        context=8192,
        query_scale=scale**-0.5,
        window=4096,
        window_pattern=(True, False),
        post_norms=True,
        attn_softcap=50.0,
        final_softcap=30.0,
    )


def _gemma3(
    layers: int,
    embed: int,
    heads: int,
    kv: int,
    ffw: int,
    *,
    head: int = 256,
    scale: float = 256,
    window: int = 1024,
    factor: float = 8.0,
    context: int = 131072,
) -> Config:
    return Config(
        generation=3,
        vocab_size=262144,
        num_tokens=262144,
        embed_dim=embed,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv,
        head_dim=head,
        ffw_dim=ffw,
        context=context,
        query_scale=scale**-0.5,
        window=window,
        window_pattern=(True, True, True, True, True, False),
        rope_base=1_000_000.0,
        rope_factor=factor,
        qk_norm=True,
        post_norms=True,
    )


def nano(dial: int, vocab_size: int = 4096, generation: int = 1) -> Config:
    """A small Gemma of our own: one dial from 1 to 32 gives its layers and heads, and 64 times it its width.

    Generation 3 has that generation's norms (of queries and keys, and of each sub-layer's output).
    """
    if not 1 <= dial <= 32:
        raise GemmaryError(f"the dial is {dial}; it goes from 1 to 32")
    if generation not in (1, 3):
        raise GemmaryError(f"there is no nano Gemma of generation {generation}: choose 1 or 3")
    return Config(
        generation=generation,
        qk_norm=generation == 3,
        post_norms=generation == 3,
        vocab_size=vocab_size,
        num_tokens=vocab_size,
        embed_dim=64 * dial,
        num_layers=dial,
        num_heads=dial,
        num_kv_heads=1,
        head_dim=64,
        ffw_dim=256 * dial,
        context=512,
        query_scale=64**-0.5,
    )


_OURS = "gemmary's own smallest shape: not a published model"

PRESETS: dict[str, Preset] = {
    "gemma-2b": Preset(_gemma1(18, 2048, 8, 1, 16384), 524_550_144, 1_981_884_416, True, _REPORT_1),
    "gemma-7b": Preset(_gemma1(28, 3072, 16, 16, 24576), 786_825_216, 7_751_248_896, True, _REPORT_1),
    # The same models as the Hugging Face and PyTorch checkpoints hold them: without the 128 padding rows.
    "gemma-2b-256000": Preset(_gemma1(18, 2048, 8, 1, 16384, vocab=256000), None, 1_981_884_416, True, _REPORT_1),
    "gemma-7b-256000": Preset(_gemma1(28, 3072, 16, 16, 24576, vocab=256000), None, 7_751_248_896, True, _REPORT_1),
    "gemma2-2b": Preset(_gemma2(26, 2304, 8, 4, 256, 9216, 256), 590_118_912, 2_024_517_888, True, _REPORT_2),
    "gemma2-9b": Preset(_gemma2(42, 3584, 16, 8, 256, 14336, 256), 917_962_752, 8_324_201_984, True, _REPORT_2),
    "gemma2-27b": Preset(_gemma2(46, 4608, 32, 16, 128, 36864, 144), 1_180_237_824, 26_047_480_320, True, _REPORT_2),
    "gemma3-270m": Preset(
        _gemma3(18, 640, 4, 1, 2048, window=512, factor=1.0, context=32768), 170_000_000, 100_000_000, False, _CARD_270M
    ),
    "gemma3-1b": Preset(
        _gemma3(26, 1152, 4, 1, 6912, window=512, factor=1.0, context=32768), 302_000_000, 698_000_000, False, _REPORT_3
    ),
    "gemma3-4b": Preset(_gemma3(34, 2560, 8, 4, 10240), 675_000_000, 3_209_000_000, False, _REPORT_3),
    "gemma3-12b": Preset(_gemma3(48, 3840, 16, 8, 15360), 1_012_000_000, 10_759_000_000, False, _REPORT_3),
    "gemma3-27b": Preset(
        _gemma3(62, 5376, 32, 16, 21504, head=128, scale=168), 1_416_000_000, 25_600_000_000, False, _REPORT_3
    ),
    "nano": Preset(nano(4), None, None, True, _OURS),
}


def preset(name: str) -> Preset:
    """The preset of that name; an unknown one raises GemmaryError with the nearest names."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(PRESETS)}"
    raise GemmaryError(f"no preset is called {name!r}: {hint}")
