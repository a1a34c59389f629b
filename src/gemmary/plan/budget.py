"""What a whole run comes to: days, chip-hours, electricity and emissions, from a step's time and published figures of chips and grids."""

from __future__ import annotations

from dataclasses import dataclass

from gemmary.hardware import GRIDS, PUE, Sourced, Topology

__all__ = ["TOKENS", "Budget", "budget"]

_REPORT_1 = "Gemma technical report, arXiv 2403.08295"
_REPORT_2 = "Gemma 2 technical report, arXiv 2408.00118"
_REPORT_3 = "Gemma 3 technical report, arXiv 2503.19786"
_CARD_3 = "Gemma 3 model card: 6 trillion tokens for the 270M model"

TOKENS: dict[str, Sourced] = {
    "gemma-2b": Sourced(3e12, f"{_REPORT_1}, later versions; the first has 2T"),
    "gemma-7b": Sourced(6e12, _REPORT_1),
    "gemma2-2b": Sourced(2e12, _REPORT_2),
    "gemma2-9b": Sourced(8e12, _REPORT_2),
    "gemma2-27b": Sourced(13e12, _REPORT_2),
    "gemma3-270m": Sourced(6e12, _CARD_3),
    "gemma3-1b": Sourced(2e12, _REPORT_3),
    "gemma3-4b": Sourced(4e12, _REPORT_3),
    "gemma3-12b": Sourced(12e12, _REPORT_3),
    "gemma3-27b": Sourced(14e12, _REPORT_3),
}
"""What each published model was trained on."""


@dataclass(frozen=True)
class Budget:
    """A run of `tokens` tokens. Energy is the chips' times the data centre's overhead (PUE); hosts and switches are not in it."""

    tokens: float
    steps: float
    days: float
    chip_hours: float
    watts: float
    """Of a chip."""
    megawatt_hours: float
    tonnes: float
    """Of CO2 equivalent."""
    grid: str
    kilograms_per_kwh: float
    pue: float
    sources: dict[str, str]


def budget(
    tokens: float, tokens_per_step: int, step_seconds: float, topology: Topology, slices: int, grid: str
) -> Budget:
    """What the run takes if every step takes as long and nothing is lost between them."""
    steps = tokens / tokens_per_step
    hours = steps * step_seconds / 3600
    chips = topology.chips * slices
    chip, intensity = topology.chip, GRIDS[grid]
    energy = hours * chips * chip.power / 1000 * PUE
    sources = {"power": chip.power.source, "pue": PUE.source, "grid": intensity.source}
    return Budget(
        tokens, steps, hours / 24, hours * chips, float(chip.power), energy / 1000, energy * intensity / 1000, grid,
        float(intensity), float(PUE), sources,
    )  # fmt: skip
