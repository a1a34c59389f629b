"""Sampling against what is written about each filter, one row at a time, and against the exact distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemmary.errors import GemmaryError
from gemmary.infer.sampling import Rows, Sampling, recorded, rows_of, sample, seen_in

LOGITS = np.random.default_rng(0).normal(size=300).astype(np.float32) * 3


def _draw(logits: np.ndarray, setting: Sampling, count: int, num_tokens: int = 10**6, seen: object = ()) -> np.ndarray:
    """`count` draws, each at another position."""
    size = logits.shape[-1]
    marks = np.zeros((count, size), bool)
    marks[:, list(seen)] = True  # type: ignore[call-overload]
    wide = jnp.broadcast_to(jnp.asarray(logits), (count, size))
    history = jnp.asarray(marks.astype(np.int32))

    @jax.jit
    def draw(logits: jax.Array, rows: Rows) -> jax.Array:
        return sample(logits, rows, lambda: history, jnp.arange(count, dtype=jnp.int32), num_tokens).ids

    return np.asarray(draw(wide, rows_of([setting] * count)))


def _expected(logits: np.ndarray, setting: Sampling) -> np.ndarray:
    """The distribution by its definition: sort, cut, normalize; float64."""
    x = logits.astype(np.float64) / setting.temperature
    keep = np.ones(len(x), bool)
    order = np.argsort(-x, kind="stable")
    if setting.top_k:
        keep[order[setting.top_k :]] = False
    p = np.where(keep, np.exp(x - x.max()), 0)
    p /= p.sum()
    if setting.top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= setting.top_p]] = False
    keep &= p >= setting.min_p * p.max()
    p = np.where(keep, p, 0)
    return np.asarray(p / p.sum())


@pytest.mark.parametrize(
    "setting",
    [
        Sampling(1.0),
        Sampling(0.7),
        Sampling(1.5, top_k=5),
        Sampling(1.0, top_p=0.8),
        Sampling(1.0, min_p=0.1),
        Sampling(1.2, top_k=40, top_p=0.9, min_p=0.02),
        Sampling(1.0, top_k=1),
    ],
)
def test_draws_follow_the_distribution(setting: Sampling) -> None:
    count = 20_000
    drawn = np.bincount(_draw(LOGITS, setting, count), minlength=len(LOGITS))
    expected = _expected(LOGITS, setting) * count
    assert drawn[expected == 0].sum() == 0
    likely = expected > 5
    square = ((drawn - expected)[likely] ** 2 / expected[likely]).sum()
    # Pearson's statistic has mean k and variance 2k: five deviations.
    degrees = likely.sum()
    assert square < degrees + 5 * np.sqrt(2 * degrees) + 5


def test_greedy_is_the_largest_and_needs_no_seed() -> None:
    for seed in (0, 1):
        assert set(_draw(LOGITS, Sampling(0.0, seed=seed), 5)) == {LOGITS.argmax()}


def test_the_same_seed_and_place_draw_the_same() -> None:
    first = _draw(LOGITS, Sampling(1.0, seed=3), 50)
    np.testing.assert_array_equal(first, _draw(LOGITS, Sampling(1.0, seed=3), 50))
    assert (first != _draw(LOGITS, Sampling(1.0, seed=4), 50)).any()
    assert len(set(first)) > 5


def test_neighbours_do_not_change_a_row() -> None:
    alone = _draw(LOGITS, Sampling(1.0, seed=3), 1)[0]
    rows = rows_of([Sampling(1.0, seed=3), Sampling(0.0), Sampling(2.0, top_k=3, top_p=0.5, seed=9)])
    wide = jnp.broadcast_to(jnp.asarray(LOGITS), (3, 300))
    ids = sample(wide, rows, lambda: jnp.zeros((3, 300), jnp.int32), jnp.zeros(3, jnp.int32), 300).ids
    assert int(ids[0]) == alone
    assert int(ids[1]) == LOGITS.argmax()


def test_padding_rows_are_never_drawn() -> None:
    """A hundred thousand draws at temperature 10, the padding's logits highest."""
    logits = np.concatenate([np.zeros(256, np.float32), np.full(128, 50, np.float32)])
    for setting in (Sampling(10.0), Sampling(0.0), Sampling(10.0, top_k=300, top_p=0.99, repetition_penalty=3.0)):
        assert _draw(logits, setting, 100_000 if setting.top_k == 0 else 1000, num_tokens=256).max() < 256


def test_the_repetition_penalty_holds_down_what_was_seen() -> None:
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    assert _draw(logits, Sampling(0.0, repetition_penalty=1.2), 1, seen=[0])[0] == 1
    negative = np.array([-1.0, -1.1], np.float32)
    assert _draw(negative, Sampling(0.0, repetition_penalty=1.2), 1, seen=[0])[0] == 1


def test_log_probs_are_the_models_own() -> None:
    rows = rows_of([Sampling(0.3, top_k=2, repetition_penalty=2.0)])
    seen = jnp.ones((1, 300), jnp.int32)
    drawn = sample(jnp.asarray(LOGITS)[None], rows, lambda: seen, jnp.zeros(1, jnp.int32), 300, top=5)
    wanted = jax.nn.log_softmax(jnp.asarray(LOGITS))
    np.testing.assert_allclose(drawn.logprobs[0], wanted[drawn.ids[0]], atol=1e-5)
    np.testing.assert_allclose(drawn.top_logprobs[0], np.sort(wanted)[::-1][:5], atol=1e-5)
    assert drawn.top_ids[0].tolist() == np.argsort(-wanted)[:5].tolist()


def test_penalties_count_what_was_drawn_and_not_the_prompt() -> None:
    """OpenAI's two: one for being there, one for each time; the repetition penalty also counts the prompt."""
    logits = np.array([2.0, 1.7, 1.0, 0.0], np.float32)
    history = jnp.asarray(seen_in([1, 3], 4))[None]
    for token in (0, 0, 2):
        history = recorded(history, jnp.asarray([token]))

    def greedy(**penalties: float) -> int:
        rows = rows_of([Sampling(**penalties)])
        return int(sample(jnp.asarray(logits)[None], rows, lambda: history, jnp.zeros(1, jnp.int32), 4).ids[0])

    assert greedy() == 0
    assert greedy(presence_penalty=0.2) == 0
    assert greedy(presence_penalty=0.4) == 1  # the prompt's 1 is not held down
    assert greedy(frequency_penalty=0.1) == 0
    assert greedy(frequency_penalty=0.2) == 1  # twice 0.2
    assert greedy(repetition_penalty=3.0) == 0  # 2/3, 1.7/3, 1/3, 0


def test_a_bias_bans_and_forces() -> None:
    bias = np.zeros((1, 300), np.float32)
    bias[0, LOGITS.argmax()] = -np.inf
    nothing = jnp.zeros((1, 300), jnp.int32)
    for setting in (Sampling(), Sampling(1.0, seed=4)):
        rows = rows_of([setting])
        drawn = sample(
            jnp.asarray(LOGITS)[None], rows, lambda: nothing, jnp.zeros(1, jnp.int32), 300, bias=jnp.asarray(bias)
        )
        assert int(drawn.ids[0]) != LOGITS.argmax()
        forced = jnp.asarray(np.where(np.arange(300) == 7, 0, -np.inf)[None], jnp.float32)
        drawn = sample(jnp.asarray(LOGITS)[None], rows, lambda: nothing, jnp.zeros(1, jnp.int32), 300, bias=forced)
        assert int(drawn.ids[0]) == 7
        np.testing.assert_allclose(drawn.logprobs[0], jax.nn.log_softmax(jnp.asarray(LOGITS))[7], atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
        {"min_p": -0.1}, {"min_p": 1.5}, {"repetition_penalty": 0.0}, {"seed": -1}, {"seed": 1 << 32},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(GemmaryError, match=f"{next(iter(wrong))} is .*; it must be"):
        Sampling(**wrong)  # type: ignore[arg-type]
