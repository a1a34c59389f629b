"""Two models side by side: from verdicts to a win rate with its interval, a judge's bias, and how far raters agree.

A verdict is worth 1 to A where A's answer is the better one, 0 where B's is, and one half for a tie. A judge sees each pair in
both orders and the two verdicts are averaged, so a pair comes to 0, 1/4, 1/2, 3/4 or 1; what a judge gives to an answer for
standing first goes to both models alike. The win rate of A is the mean over prompts: ties are split evenly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["Outcome", "agreement", "by_category", "from_orders", "interval", "position_bias", "tally", "written"]

_TAIL = 0.025
_STEP = 0.02
_NEGLIGIBLE = 25.0
"""Where an integrand has fallen to exp(-25), the rest of it is left out."""


@dataclass(frozen=True)
class Outcome:
    """What a pair came to. `value` is A's, from 0 to 1, or None without a valid verdict; `orders` what A got as the first and
    as the second answer, where a judge saw both orders."""

    prompt: str
    category: str
    value: float | None
    orders: tuple[float, float] | None = None


def from_orders(prompt: str, category: str, first: float | None, second: float | None) -> Outcome:
    """The outcome of two verdicts, each what A got: as the first answer, and as the second. One alone would let the judge's bias in."""
    if first is None or second is None:
        return Outcome(prompt, category, None)
    return Outcome(prompt, category, (first + second) / 2, (first, second))


def tally(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Counts of wins, ties and losses of A and of pairs without a verdict; the win rate and its interval.

    A pair is a win where its value is above one half, so 3/4 is one; the rate is the mean of values all the same. It is None
    where no pair has a verdict.
    """
    values = [one.value for one in outcomes]
    valid = [value for value in values if value is not None]
    return {
        "pairs": len(values),
        "wins": sum(value > 0.5 for value in valid),
        "ties": sum(value == 0.5 for value in valid),
        "losses": sum(value < 0.5 for value in valid),
        "invalid": len(values) - len(valid),
        "rate": sum(valid) / len(valid) if valid else None,
        "interval": interval(valid),
    }


def by_category(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """The tally of each category, in the order in which they first come."""
    names = dict.fromkeys(one.category for one in outcomes)
    return {name: tally(one for one in outcomes if one.category == name) for name in names}


def position_bias(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """How often the place decided: of pairs seen in both orders, the share where the first answer won both times, where the second
    did, and where both orders said the same. A judge without bias has as many of the first as of the second."""
    orders = [one.orders for one in outcomes if one.orders is not None]
    found = {
        "first": [float(orders_ == (1, 0)) for orders_ in orders],
        "second": [float(orders_ == (0, 1)) for orders_ in orders],
        "consistent": [float(a == b) for a, b in orders],
    }
    shares = {
        name: {"share": sum(some) / len(some) if some else None, "interval": interval(some)}
        for name, some in found.items()
    }
    return {"pairs": len(orders), **shares}


def written(rate: float | None, bounds: Sequence[float]) -> str:
    """In percent, as the Gemma report writes it: `61.2 [59.3, 63]`."""
    if rate is None:
        return "none"
    middle, low, high = (f"{100 * value:.1f}".removesuffix(".0") for value in (rate, *bounds))
    return f"{middle} [{low}, {high}]"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of independent values from 0 to 1.

    Gaffke's bounds (2005; Learned-Miller and Thomas, arXiv 1905.06208). With weights drawn uniformly from all that sum to one, the lower bound
    is the 2.5 % quantile of the weighted mean of the values and a 0, the upper one the 97.5 % quantile of that of the values and a 1.
    For values of 0 and 1 alone this is Clopper and Pearson's exact interval. Values between make it narrower, as they should, and no case
    is known in which it covers too little, where Wilson's or a bootstrap's cover too little near 0 and 1 or for few values.
    """
    if not values:
        return 0.0, 1.0
    lower, upper = (tuple(sorted(Counter([*map(float, values), extreme]).items())) for extreme in (0.0, 1.0))
    return _quantile(lower, _TAIL), _quantile(upper, 1 - _TAIL)


@lru_cache(1 << 14)
def _quantile(counts: tuple[tuple[float, int], ...], share: float) -> float:
    """Of the mean of these values (value, how often) under uniformly drawn weights."""
    low, high = counts[0][0], counts[-1][0]
    values, times = (np.array(column, float) for column in zip(*counts, strict=True))
    while high - low > 1e-7:
        middle = (low + high) / 2
        if _below(values - middle, times) < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _below(c: np.ndarray, times: np.ndarray) -> float:
    """P(Σ c G <= 0) for independent G ~ Gamma(times): Imhof's integral (Biometrika 48, 1961).

    With u = exp(y) the integrand falls off exponentially on both sides, where the trapezoid rule converges exponentially too.
    """
    if c.min() >= 0 or c.max() <= 0:
        return float(c.max() <= 0)
    start = -_NEGLIGIBLE - math.log(float(times @ np.abs(c)))
    end = start + _NEGLIGIBLE
    while times @ np.log1p((c * math.exp(end)) ** 2) < 2 * _NEGLIGIBLE:
        end += 1
    y = np.arange(start, end, _STEP)
    x = np.exp(y)[:, None] * c
    integrand = np.sin(np.arctan(x) @ times) * np.exp(np.log1p(x * x) @ times / -2)
    return 0.5 - _STEP * float(integrand.sum()) / math.pi


def agreement(units: Iterable[Sequence[float]]) -> dict[str, Any]:
    """Krippendorff's alpha of ratings, one list for each pair that was rated, whoever rated it.

    It takes any number of raters and any gaps. The difference of two ratings is squared (the interval metric), so a tie is half way
    between A and B, as in the tally. 1 is agreement, 0 what chance would give; None where fewer than two ratings meet on a pair, or
    all are the same. Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011).
    """
    rated = [list(unit) for unit in units if len(unit) > 1]
    every = [value for unit in rated for value in unit]
    expected = _spread(every)
    observed = sum(_spread(unit) * len(unit) for unit in rated) / max(len(every), 1)
    return {"alpha": 1 - observed / expected if expected else None, "pairs": len(rated)}


def _spread(values: Sequence[float]) -> float:
    """The mean squared difference of two different ones."""
    n = len(values)
    if n < 2 or min(values) == max(values):
        return 0.0
    mean = sum(values) / n
    return 2 * sum((value - mean) ** 2 for value in values) / (n - 1)
