"""Which source when: shares that keep to the weights, stages that pass over smoothly, an order that a number gives."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from gemmary.data.mixture import Mixture, MixtureSettings, Stage
from gemmary.errors import GemmaryError

TOML = """
ramp = 0.1
[[stage]]
until = 0.8
weights = { prose = 3, code = 1 }
[[stage]]
weights = { prose = 0.25, code = 0.5, maths = 0.25 }
"""


def stages(*parts: tuple[float, Mapping[str, float]], ramp: float = 0.0) -> MixtureSettings:
    return MixtureSettings(stage=tuple(Stage(until=u, weights=dict(w)) for u, w in parts), ramp=ramp)


def random_settings(seed: int) -> MixtureSettings:
    """One to four stages of up to six sources, with weights from none over tiny to large."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 5))
    untils = [*np.sort(rng.uniform(0.1, 0.9, count - 1)).tolist(), 1.0]
    names = "abcdef"[: int(rng.integers(1, 7))]
    weights = [{n: float(rng.choice([0.0, 0.001, 1.0]) * rng.random()) for n in names} for _ in untils]
    for stage in weights:
        stage["a"] += 0.1
    room = min(np.diff([0, *untils, 1.0 + untils[0]])[:count])
    return stages(*zip(untils, weights, strict=True), ramp=float(rng.choice([0, 0.5, 0.99]) * room))


# --- Settings ---------------------------------------------------------------------------------------------------------


def test_settings_come_from_toml() -> None:
    settings = TypeAdapter(MixtureSettings).validate_python(tomllib.loads(TOML))
    assert settings == stages(
        (0.8, {"prose": 3, "code": 1}), (1.0, {"prose": 0.25, "code": 0.5, "maths": 0.25}), ramp=0.1
    )
    assert settings.names == ("code", "maths", "prose")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"stage": ()}, "mixture.stage:"),
    ({"stage": (Stage(weights={}),)}, "mixture.stage[0].weights:"),
    ({"stage": (Stage(weights={"a": 0.0}),)}, "mixture.stage[0].weights:"),
    ({"stage": (Stage(weights={"a": 1, "b": -1}),)}, "mixture.stage[0].weights.b"),
    ({"stage": (Stage(weights={"a": float("nan")}),)}, "mixture.stage[0].weights.a"),
    ({"stage": (Stage(weights={"a": float("inf")}),)}, "mixture.stage[0].weights.a"),
    ({"stage": (Stage(weights={"a": 1}, until=0.9),)}, "mixture.stage[0].until is 0.9; the last"),
    ({"stage": (Stage(weights={"a": 1}), Stage(weights={"a": 1}))}, "mixture.stage[1].until"),
    ({"stage": (Stage(weights={"a": 1}, until=0.0), Stage(weights={"a": 1}))}, "mixture.stage[0].until"),
    ({"stage": (Stage(weights={"a": 1}, until=1.5),)}, "mixture.stage[0].until"),
    ({"stage": (Stage(weights={"a": 1}, until=float("nan")),)}, "mixture.stage[0].until"),
    ({"stage": (Stage(weights={"a": 1}, until=0.9), Stage(weights={"b": 1})), "ramp": 0.3}, "mixture.ramp"),
    ({"stage": (Stage(weights={"a": 1}),), "ramp": -0.1}, "mixture.ramp"),
    ({"stage": (Stage(weights={"a": 1}),), "ramp": float("nan")}, "mixture.ramp"),
]


@pytest.mark.parametrize(("wrong", "named"), WRONG, ids=[named for _, named in WRONG])
def test_what_is_wrong_is_named(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(GemmaryError, match=re.escape(named)):
        MixtureSettings(**wrong)


def test_an_unknown_source_is_named() -> None:
    settings = stages((0.5, {"a": 1}), (1.0, {"a": 1, "typo": 0}))
    with pytest.raises(GemmaryError, match=r"mixture\.stage\[1\]\.weights\.typo: no such source; there are a, b"):
        settings.check_sources(["b", "a"])
    settings.check_sources(["a", "typo", "more"])


# --- Weights ----------------------------------------------------------------------------------------------------------


def test_weights_hold_in_stages_and_change_in_the_ramp() -> None:
    settings = TypeAdapter(MixtureSettings).validate_python(tomllib.loads(TOML))
    first, last = {"code": 0.25, "maths": 0, "prose": 0.75}, {"code": 0.5, "maths": 0.25, "prose": 0.25}
    half = {"code": 0.375, "maths": 0.125, "prose": 0.5}
    for progress, weights in ((0, first), (0.75, first), (0.8, half), (0.85, last), (1, last)):
        assert settings.weights(progress) == pytest.approx(weights)
    steep = 0.5 / 0.1
    points = np.linspace(0, 1, 1001)
    prose = np.array([settings.weights(x)["prose"] for x in points])
    assert np.abs(np.diff(prose)).max() <= steep * 0.001 + 1e-9  # it never jumps


@pytest.mark.parametrize("seed", range(10))
def test_the_integral_is_that_of_the_weights(seed: int) -> None:
    settings = random_settings(seed)
    points = (np.arange(4000) + 0.5) / 4000
    weights = np.array([list(settings.weights(x).values()) for x in points])
    assert weights.sum(axis=1) == pytest.approx(1)
    ends = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    summed = np.array([weights[: int(end * 4000)].sum(axis=0) / 4000 for end in ends])
    np.testing.assert_allclose(settings.integral(ends), summed, atol=3e-4)


# --- The order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_every_source_has_its_share_within_a_row_after_every_batch(seed: int) -> None:
    settings, steps, batch = random_settings(seed), 400, 7
    mixture = Mixture(settings, batch=batch, steps=steps, seed=seed)
    had, names = np.zeros(len(mixture.names), np.int64), range(len(mixture.names))
    for index in range(steps):
        assert mixture.before(index).tolist() == had.tolist()
        sources, numbers = mixture.rows(index)
        assert len(sources) == len(numbers) == batch
        for source in names:  # numbers go on without gap or repeat, in the order of delivery
            mine = numbers[sources == source].tolist()
            assert mine == list(range(had[source], had[source] + len(mine)))
        had += np.bincount(sources, minlength=len(mixture.names))
        ideal = settings.integral(np.array([(index + 1) / steps]))[0] * steps * batch
        assert np.abs(had - ideal).max() < 1 + 1e-5
    assert mixture.before(steps).tolist() == had.tolist()


@pytest.mark.parametrize("steps", [16_384, 16_385, 40_000])
def test_long_runs_have_blocks_of_several_batches(steps: int) -> None:
    settings = stages((0.5, {"a": 1, "b": 0.0003}), (1.0, {"a": 2, "b": 1}), ramp=0.2)
    mixture = Mixture(settings, batch=2, steps=steps, seed=0)
    had = np.zeros(2, np.int64)
    for index in (*range(8), steps // 2, *range(steps - 4, steps)):
        before, after = mixture.before(index), mixture.before(index + 1)
        sources, numbers = mixture.rows(index)
        assert len(sources) == 2
        assert (after - before).tolist() == np.bincount(sources, minlength=2).tolist()
        for source, number in zip(sources, numbers, strict=True):
            assert before[source] <= number < after[source]
        had = after
    assert had.tolist() == pytest.approx(settings.integral(np.array([1.0]))[0] * steps * 2, abs=1)


def test_a_source_without_weight_never_comes() -> None:
    mixture = Mixture(stages((0.5, {"a": 1, "b": 0}), (1.0, {"a": 1, "b": 1})), batch=4, steps=100, seed=0)
    assert mixture.before(50).tolist() == [200, 0]
    assert mixture.before(100).tolist() == [300, 100]


def test_the_order_depends_on_the_seed_and_nothing_else() -> None:
    settings = stages((0.5, {"a": 1, "b": 2}), (1.0, {"a": 1, "b": 1}))

    def order(seed: int) -> list[list[int]]:
        mixture = Mixture(settings, batch=16, steps=50, seed=seed)
        indices = np.random.default_rng(seed).permutation(50).tolist()
        rows = {index: mixture.rows(index) for index in indices}
        return [array.tolist() for index in range(50) for array in rows[index]]

    assert order(1) == order(1) != order(2)
