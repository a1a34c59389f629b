"""The oracle itself: against recorded answers of transformers, and against what must hold of any Gemma."""

from pathlib import Path

import numpy as np
import oracle
import pytest
from models import tokens

RECORDED = Path(__file__).parent / "golden" / "transformers_small.npz"


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_agrees_with_transformers(kind: str) -> None:
    # transformers runs in float64 there but takes rope angles and norms in float32, hence 1e-4 and not 1e-9.
    spec = oracle.small_spec(kind)
    weights = oracle.small_weights(spec)
    with np.load(RECORDED) as recorded:
        for length in oracle.lengths(8):
            ours = oracle.logits(spec, weights, list(tokens(length, spec.vocab)))
            np.testing.assert_allclose(
                ours[[-1, length // 2, length // 3]], recorded[f"{kind}/{length}"], atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("kind", oracle.KINDS)
def test_no_token_sees_what_follows(kind: str) -> None:
    spec = oracle.small_spec(kind)
    weights = oracle.small_weights(spec)
    ids = list(tokens(17, spec.vocab))
    changed = [*ids[:-1], (ids[-1] + 1) % spec.vocab]
    before, after = oracle.logits(spec, weights, ids), oracle.logits(spec, weights, changed)
    np.testing.assert_array_equal(before[:-1], after[:-1])
    assert np.abs(before[-1] - after[-1]).max() > 1e-3


def test_a_window_is_exactly_that_many_keys() -> None:
    full = oracle.small_spec("gemma2")
    spec = oracle.Spec(**{**vars(full), "windows": [8], "rope_bases": [1e4], "rope_factors": [1.0]})
    weights = oracle.small_weights(spec)
    ids = list(tokens(17, spec.vocab))
    at = oracle.logits(spec, weights, ids)[-1]

    def moved(position: int) -> float:
        changed = list(ids)
        changed[position] = (changed[position] + 1) % spec.vocab
        return float(np.abs(oracle.logits(spec, weights, changed)[-1] - at).max())

    assert moved(17 - 8) > 1e-6  # the eighth key back, the query itself counted
    assert moved(17 - 9) == 0


@pytest.mark.parametrize("position", [0, 2047, 4095, 8191, 131071])
def test_rope_angles(position: int) -> None:
    angles = oracle.rope_angles(position, 256, 1e4)
    assert angles[0] == position
    assert angles[64] == pytest.approx(position / 100)  # 10000^(128/256)
    assert oracle.rope_angles(position, 256, 1e6, 8.0)[0] == position / 8
