"""Two models side by side: a known win rate is found again, intervals hold, a judge's bias cancels, and raters' agreement is the published one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import beta

from gemmary.evaluate.side_by_side import (
    Outcome,
    agreement,
    by_category,
    from_orders,
    interval,
    position_bias,
    tally,
    written,
)
from gemmary.train.reward import interval as wilson

GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


# ---- The interval ----


@pytest.mark.parametrize("n", [1, 2, 7, 40, 500])
def test_of_wins_and_losses_alone_it_is_clopper_and_pearsons(n: int) -> None:
    for k in sorted({0, 1, n // 3, n - 1, n}):
        low, high = interval([1.0] * k + [0.0] * (n - k))
        assert low == pytest.approx(beta.ppf(0.025, k, n - k + 1) if k else 0, abs=3e-7)
        assert high == pytest.approx(beta.ppf(0.975, k + 1, n - k) if k < n else 1, abs=3e-7)


def test_values_between_are_weighted_means_under_uniform_weights() -> None:
    """Against the definition: many draws of weights."""
    rng = np.random.default_rng(0)
    values = [0.0] * 3 + [0.25] * 2 + [0.5] * 9 + [0.75] + [1.0] * 10
    low, high = interval(values)
    weights = rng.dirichlet(np.ones(len(values) + 1), 400_000)
    assert low == pytest.approx(np.quantile(weights @ [*values, 0.0], 0.025), abs=1e-3)
    assert high == pytest.approx(np.quantile(weights @ [*values, 1.0], 0.975), abs=1e-3)
    rng.shuffle(values)
    assert interval(values) == (low, high)
    mirrored = interval([1 - value for value in values])
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-6)


def test_an_interval_holds_its_mean_and_narrows_with_ties() -> None:
    for values in ([0.0], [1.0], [0.5], [0.25, 0.75], [0.0] * 9 + [0.25]):
        low, high = interval(values)
        assert 0 <= low <= sum(values) / len(values) <= high <= 1
    wide, narrow = interval([0.0, 1.0] * 20), interval([0.25, 0.75] * 20)
    assert narrow[1] - narrow[0] < 0.7 * (wide[1] - wide[0])
    assert interval([]) == (0.0, 1.0)
    assert interval([1.0] * 4) == (pytest.approx(0.025 ** (1 / 4), abs=1e-6), 1.0)


def _coverage(n: int, shares: tuple[float, ...], of: Callable[[list[float]], tuple[float, float]]) -> float:
    """Exact: every sample of n, with its probability."""
    mean, covered = sum(share * value for share, value in zip(shares, GRID, strict=True)), 0.0
    here = [i for i, share in enumerate(shares) if share]
    for cuts in itertools.combinations(range(n + len(here) - 1), len(here) - 1):
        edges = [-1, *cuts, n + len(here) - 1]
        counts = [b - a - 1 for a, b in itertools.pairwise(edges)]
        chance = float(math.factorial(n))
        for i, count in zip(here, counts, strict=True):
            chance *= shares[i] ** count / math.factorial(count)
        low, high = of([GRID[i] for i, count in zip(here, counts, strict=True) for _ in range(count)])
        covered += chance * (low - 1e-7 <= mean <= high + 1e-7)
    return covered


SHARES = [
    (0.02, 0, 0, 0, 0.98),
    (0.005, 0, 0, 0, 0.995),
    (0, 0, 0.03, 0.02, 0.95),
    (0.9, 0.05, 0.05, 0, 0),
    (0.96, 0, 0, 0.04, 0),
    (0.5, 0, 0, 0, 0.5),
    (0.3, 0, 0.4, 0, 0.3),
    (0.1, 0.2, 0.4, 0.2, 0.1),
    (0.2, 0.2, 0.2, 0.2, 0.2),
    (0.05, 0, 0.9, 0, 0.05),
    (0, 0.15, 0, 0, 0.85),
]


@pytest.mark.parametrize("shares", SHARES)
def test_coverage_holds_for_few_values_and_near_the_ends(shares: tuple[float, ...]) -> None:
    for n in (1, 3, 5, 12 if sum(map(bool, shares)) < 3 else 5):
        assert _coverage(n, shares, interval) >= 0.95, n


def test_the_usual_intervals_would_not_hold() -> None:
    """Why not Wilson's, which the package has, and not a normal one."""

    def normal(values: list[float]) -> tuple[float, float]:
        mean = sum(values) / len(values)
        half = 1.96 * math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)
        return mean - half, mean + half

    near_one = (0.013, 0, 0, 0, 0.987)
    assert _coverage(12, near_one, lambda values: wilson(sum(values), len(values))) < 0.87
    assert _coverage(12, near_one, normal) < 0.2
    assert _coverage(12, near_one, interval) >= 0.95


# ---- Simulated comparisons ----


def _simulated(rng: np.random.Generator, n: int, rate: float, ties: float, bias: float, noise: float) -> list[Outcome]:
    """Verdicts whose mean, without a bias, is `rate`. The first answer's chance is raised by `bias`; a share of verdicts are noise.

    Prompts differ: in each of them A is better or worse than on the whole.
    """
    own = np.clip(rate + rng.choice([-1, 1], n) * min(rate, 1 - rate) / 2, 0, 1)
    found = []
    for i in range(n):
        got = []
        for push in (bias, -bias):
            chance = min(max(own[i] + push, 0), 1)
            value = float(rng.random() < chance)
            if rng.random() < ties:
                value = 0.5
            if rng.random() < noise:
                value = float(rng.choice([0, 0.5, 1]))
            got.append(value)
        found.append(from_orders(str(i), "all", *got))
    return found


SETTINGS = [
    (rate, n, ties, bias, noise)
    for rate, n in [(0.5, 8), (0.5, 80), (0.612, 40), (0.9, 20), (0.2, 150), (0.97, 40), (1.0, 10)]
    for ties, bias, noise in [(0.0, 0.0, 0.0), (0.3, 0.0, 0.0), (0.0, 0.25, 0.0), (0.2, 0.1, 0.3)]
    if bias <= min(rate, 1 - rate) / 2
]


@pytest.mark.parametrize(("rate", "n", "ties", "bias", "noise"), SETTINGS)
def test_a_known_win_rate_is_found(rate: float, n: int, ties: float, bias: float, noise: float) -> None:
    """In at least 95 of 100 comparisons. Ties and noise draw the rate to one half by a known share; the bias must not move it."""
    true = (1 - noise) * ((1 - ties) * rate + ties / 2) + noise / 2
    rng = np.random.default_rng([int(1000 * rate), n, int(100 * ties), int(100 * bias)])
    found = 0
    for _ in range(100):
        low, high = tally(_simulated(rng, n, rate, ties, bias, noise))["interval"]
        found += low <= true <= high
    assert found >= 95


def test_swapping_is_what_cancels_the_bias() -> None:
    rng = np.random.default_rng(1)
    swapped, alone = [], []
    for _ in range(60):
        outcomes = _simulated(rng, 200, 0.5, 0.0, 0.25, 0.0)
        swapped.append(tally(outcomes)["rate"])
        alone.append(sum(one.orders[0] for one in outcomes if one.orders) / 200)
    assert np.mean(swapped) == pytest.approx(0.5, abs=0.01)
    assert np.mean(alone) == pytest.approx(0.75, abs=0.01)
    bias = position_bias(outcomes)
    assert bias["first"]["interval"][0] > bias["second"]["interval"][1]


# ---- Tallies by hand ----


def test_a_tally_by_hand() -> None:
    outcomes = [
        from_orders("1", "math", 1, 1),
        from_orders("2", "math", 1, 0.5),
        from_orders("3", "math", 1, 0),
        from_orders("4", "writing", 0, 0.5),
        from_orders("5", "writing", None, 1),
        Outcome("6", "writing", 0.5),
    ]
    found = tally(outcomes)
    assert {key: found[key] for key in ("pairs", "wins", "ties", "losses", "invalid")} == {
        "pairs": 6, "wins": 2, "ties": 2, "losses": 1, "invalid": 1,
    }  # fmt: skip
    assert found["rate"] == (1 + 0.75 + 0.5 + 0.25 + 0.5) / 5
    assert found["interval"] == interval([1, 0.75, 0.5, 0.25, 0.5])
    parts = by_category(outcomes)
    assert list(parts) == ["math", "writing"]
    assert (parts["math"]["rate"], parts["writing"]["rate"]) == (0.75, 0.375)
    assert (parts["math"]["invalid"], parts["writing"]["invalid"]) == (0, 1)
    bias = position_bias(outcomes)  # four pairs were seen in both orders
    assert bias["pairs"] == 4
    assert (bias["first"]["share"], bias["second"]["share"], bias["consistent"]["share"]) == (0.25, 0, 0.25)
    assert bias["second"]["interval"] == interval([0.0] * 4)


def test_places_are_told_apart() -> None:
    """`orders` says what A got: as the first and as the second. (1, 0): the first won twice; (0, 1): the second did."""
    bias = position_bias([from_orders("1", "", 1, 0), from_orders("2", "", 0, 1), from_orders("3", "", 0.5, 0.5)])
    shares = [bias[key]["share"] for key in ("first", "second", "consistent")]
    assert shares == [1 / 3, 1 / 3, 1 / 3]


def test_nothing_judged() -> None:
    found = tally([from_orders("1", "", None, None)])
    assert (found["rate"], found["interval"], found["invalid"]) == (None, (0.0, 1.0), 1)
    assert position_bias([])["first"] == {"share": None, "interval": (0.0, 1.0)}
    assert written(None, (0, 1)) == "none"


def test_the_reports_format() -> None:
    assert written(0.612, (0.593, 0.63)) == "61.2 [59.3, 63]"
    assert written(1.0, (0.9996, 1.0)) == "100 [100, 100]"
    assert written(0.0, (0.0, 0.0049)) == "0 [0, 0.5]"


# ---- Agreement ----

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, twelve units, gaps.
PUBLISHED = ["123321412...", "12332241 25.3".replace(" ", ""), ".33323422 51.".replace(" ", ""), "12332441251."]


def test_agreement_is_the_published_one() -> None:
    units = [[float(row[i]) for row in PUBLISHED if row[i] != "."] for i in range(12)]
    found = agreement(units)
    assert found["alpha"] == pytest.approx(0.849, abs=5e-4)
    assert found["pairs"] == 11


def test_agreement_by_hand() -> None:
    # Two raters, A or B: agree on three of four. Observed 2/8; expected 2*3*5/(8*7); alpha = 1 - (1/4)/(30/56).
    found = agreement([[1, 1], [0, 0], [1, 0], [1, 1]])
    assert found["alpha"] == pytest.approx(1 - (1 / 4) / (30 / 56))
    nearer = agreement([[1, 1], [0, 0], [1, 0.5], [1, 1]])  # a tie is half way
    assert nearer["alpha"] > found["alpha"]
    assert agreement([[1, 1, 1], [0, 0], [0.5, 0.5]])["alpha"] == 1
    assert agreement([[1, 0], [0, 1], [1, 0], [0, 1]])["alpha"] < 0
    assert agreement([[1], [0], [0.5]]) == {"alpha": None, "pairs": 0}
    assert agreement([[1, 1], [1, 1]]) == {"alpha": None, "pairs": 2}
