"""Published figures of Gemma models, in percent, with the settings and the source that they were published with.

Names of benchmarks are those of `evaluate.suites`. A figure's shots are given where the source states them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.presets import PRESETS

__all__ = ["CARDS", "Card", "Figure", "card_of"]


class Figure(NamedTuple):
    """A percentage, and how many examples stood before each question, where that is stated."""

    value: float
    shots: int | None = None


class Card(NamedTuple):
    """One model's figures, by suite and benchmark. `preset` is its shape, `tuned` whether it was instruction-tuned."""

    name: str
    preset: str
    tuned: bool
    source: str
    suites: Mapping[str, Mapping[str, Figure]]


_REPORT = "Gemma Team, Gemma: Open Models Based on Gemini Research and Technology, arXiv 2403.08295"
_CARD_2 = "Gemma 2 model card (ai.google.dev/gemma/docs/core/model_card_2)"
_CARD_3 = "Gemma 3 model card (ai.google.dev/gemma/docs/core/model_card_3)"


def _column(names: str, *rows: tuple[str, int | None, str]) -> list[dict[str, Figure]]:
    """A table's columns, for as many models as there are names; a dash is no figure."""
    columns: list[dict[str, Figure]] = [{} for _ in names.split()]
    for benchmark, shots, values in rows:
        for column, value in zip(columns, values.split(), strict=True):
            if value != "-":
                column[benchmark] = Figure(float(value), shots)
    return columns


_GEMMA_1 = _column(
    "2b 7b",
    ("MMLU", 5, "42.3 64.3"), ("HellaSwag", 0, "71.4 81.2"), ("PIQA", 0, "77.3 81.2"), ("SIQA", 0, "49.7 51.8"),
    ("BoolQ", 0, "69.4 83.2"), ("Winogrande", None, "65.4 72.3"), ("CQA", 7, "65.3 71.3"), ("OBQA", None, "47.8 52.8"),
    ("ARC-e", None, "73.2 81.5"), ("ARC-c", None, "42.1 53.2"), ("TriviaQA", 5, "53.2 63.4"), ("NQ", 5, "12.5 23.0"),
    ("HumanEval", None, "22.0 32.3"), ("MBPP", 3, "29.2 44.4"), ("GSM8K", None, "17.7 46.4"), ("MATH", 4, "11.8 24.3"),
    ("AGIEval", None, "24.2 41.7"), ("BBH", None, "35.2 55.1"),
)  # fmt: skip
_LEADERBOARD_1 = _column(
    "7b",
    ("ARC-c", 25, "61.9"), ("HellaSwag", 10, "82.2"), ("MMLU", 5, "64.6"), ("TruthfulQA", 0, "44.8"),
    ("Winogrande", 5, "79.0"), ("GSM8K", 5, "50.9"),
)  # fmt: skip
_SAFETY_1 = _column(
    "1.0-2b 1.0-7b 1.1-2b 1.1-7b",
    ("RealToxicity", None, "6.86 7.90 7.03 8.04"), ("BOLD", None, "45.57 49.08 47.76 45.2"),
    ("CrowS-Pairs", None, "45.82 51.33 45.89 49.67"), ("BBQ ambiguous", 1, "62.58 92.54 58.97 86.06"),
    ("BBQ disambiguated", None, "54.62 71.99 53.9 85.08"), ("Winogender", None, "51.25 54.17 50.14 57.64"),
    ("TruthfulQA", None, "44.84 31.81 44.24 45.34"), ("Winobias 1_2", None, "56.12 59.09 55.93 59.22"),
    ("Winobias 2_2", None, "91.10 92.23 89.46 89.2"), ("Toxigen", None, "29.77 39.59 29.64 38.75"),
)  # fmt: skip
_GEMMA_2 = _column(
    "2b 9b 27b",
    ("MMLU", 5, "51.3 71.3 75.2"), ("HellaSwag", 10, "73.0 81.9 86.4"), ("PIQA", 0, "77.8 81.7 83.2"),
    ("SIQA", 0, "51.9 53.4 53.7"), ("BoolQ", 0, "72.5 84.2 84.8"), ("Winogrande", None, "70.9 80.6 83.7"),
    ("ARC-e", 0, "80.1 88.0 88.6"), ("ARC-c", 25, "55.4 68.4 71.4"), ("TriviaQA", 5, "59.4 76.6 83.7"),
    ("NQ", 5, "16.7 29.2 34.5"), ("HumanEval", None, "17.7 40.2 51.8"), ("MBPP", 3, "29.6 52.4 62.6"),
    ("GSM8K", 5, "23.9 68.6 74.0"), ("MATH", 4, "15.0 36.6 42.3"), ("AGIEval", None, "30.6 52.8 55.1"),
    ("BBH", 3, "41.9 68.2 74.9"),
)  # fmt: skip
_SAFETY_2 = _column(
    "2b 9b 27b",
    ("RealToxicity", None, "8.16 8.25 8.84"), ("CrowS-Pairs", None, "37.67 37.47 36.67"),
    ("BBQ ambiguous", 1, "83.20 88.58 85.99"), ("BBQ disambiguated", None, "69.31 82.67 86.94"),
    ("Winogender", None, "52.91 79.17 77.22"), ("TruthfulQA", None, "43.72 50.27 51.60"),
    ("Winobias 1_2", None, "59.28 78.09 81.94"), ("Winobias 2_2", None, "88.57 95.32 97.22"),
    ("Toxigen", None, "48.32 39.30 38.42"),
)  # fmt: skip
_GEMMA_3 = _column(
    "270m 1b 4b 12b 27b",
    ("HellaSwag", 10, "40.9 62.3 77.2 84.2 85.6"), ("BoolQ", 0, "61.4 63.2 72.3 78.8 82.4"),
    ("PIQA", 0, "67.7 73.8 79.6 81.8 83.3"), ("SIQA", 0, "- 48.9 51.9 53.4 54.9"),
    ("TriviaQA", 5, "15.4 39.8 65.8 78.2 85.5"), ("NQ", 5, "- 9.48 20.0 31.4 36.1"),
    ("ARC-c", 25, "29.0 38.4 56.2 68.9 70.6"), ("ARC-e", 0, "57.7 73.0 82.4 88.3 89.0"),
    ("Winogrande", 5, "52.0 58.2 64.7 74.3 78.8"), ("BBH", None, "- 28.4 50.9 72.6 77.7"),
    ("MMLU", 5, "- - 59.6 74.5 78.6"), ("AGIEval", None, "- - 42.1 57.4 66.2"), ("MATH", 4, "- - 24.2 43.3 50.0"),
    ("GSM8K", 8, "- - 38.4 71.0 82.6"), ("MBPP", 3, "- - 46.0 60.4 65.6"), ("HumanEval", 0, "- - 36.0 45.7 48.8"),
)  # fmt: skip
_GEMMA_3_TUNED = _column(
    "270m",
    ("HellaSwag", 0, "37.7"), ("PIQA", 0, "66.2"), ("ARC-c", 0, "28.2"), ("Winogrande", 0, "52.3"), ("BBH", None, "26.7"),
)  # fmt: skip

CARDS = (
    Card("gemma-2b", "gemma-2b", False, _REPORT, {"gemma": _GEMMA_1[0]}),
    Card("gemma-7b", "gemma-7b", False, _REPORT, {"gemma": _GEMMA_1[1], "leaderboard": _LEADERBOARD_1[0]}),
    Card("gemma-2b-it", "gemma-2b", True, _REPORT, {"safety": _SAFETY_1[0]}),
    Card("gemma-7b-it", "gemma-7b", True, _REPORT, {"safety": _SAFETY_1[1]}),
    Card("gemma-1.1-2b-it", "gemma-2b", True, _REPORT, {"safety": _SAFETY_1[2]}),
    Card("gemma-1.1-7b-it", "gemma-7b", True, _REPORT, {"safety": _SAFETY_1[3]}),
    *(
        Card(f"gemma-2-{size}", f"gemma2-{size}", False, _CARD_2, {"gemma": column})
        for size, column in zip(("2b", "9b", "27b"), _GEMMA_2, strict=True)
    ),
    *(
        Card(f"gemma-2-{size}-it", f"gemma2-{size}", True, _CARD_2, {"safety": column})
        for size, column in zip(("2b", "9b", "27b"), _SAFETY_2, strict=True)
    ),
    *(
        Card(f"gemma-3-{size}", f"gemma3-{size}", False, _CARD_3, {"gemma": column})
        for size, column in zip(("270m", "1b", "4b", "12b", "27b"), _GEMMA_3, strict=True)
    ),
    Card("gemma-3-270m-it", "gemma3-270m", True, _CARD_3, {"gemma": _GEMMA_3_TUNED[0]}),
)


def card_of(config: Config, *, tuned: bool, name: str | None = None) -> Card | None:
    """The card of a name; without one, the first of a model of that shape. None where nothing was published.

    Raises GemmaryError for a name that has no card.
    """
    if name is not None:
        found = {card.name: card for card in CARDS}
        if name not in found:
            raise GemmaryError(f"nothing is known to be published of {name!r}: {', '.join(found)}")
        return found[name]
    # Some checkpoints leave the unused rows of the embedding out; they are the same model.
    shapes = {preset for preset, one in PRESETS.items() if one.config == config}
    same = {shape.removesuffix("-256000") for shape in shapes}
    return next((card for card in CARDS if card.preset in same and card.tuned == tuned), None)
