"""Direct preference optimization: it prefers what was chosen, from log 2 on, whole or as adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from tuning_runs import COLOURS, THINGS, config, pairs, params, saved, tokenizer, tuned

from gemmary.errors import GemmaryError
from gemmary.params import Params
from gemmary.train.dpo import DpoSettings, dpo
from gemmary.train.finetune import LoraSettings
from gemmary.train.run import Ended

ALL = [(f"say {thing} {c}", f"red {thing}", f"{c} {thing}") for thing in THINGS for c in COLOURS if c != "red"]
UNSEEN, SEEN = ALL[::4], [one for i, one in enumerate(ALL) if i % 4]


class Run(NamedTuple):
    ended: Ended
    folder: Path
    given: Params


def ran(folder: Path, *, base: str = "", **changes: Any) -> Run:
    train, held_out = pairs(folder / "train", SEEN), pairs(folder / "held_out", UNSEEN)
    given = params()
    ended = dpo(
        DpoSettings(**tuned(**changes)), config(), given, tokenizer(), {"likes": train}, {"likes": held_out}, folder / "run",
        weights={"likes": 1.0}, base=base,
    )  # fmt: skip
    return Run(ended, folder / "run", given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return ran(tmp_path_factory.mktemp("dpo"), steps=30, evaluate_every=10)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("adapted")
    base = saved(folder / "base", params())
    return ran(folder, base=str(base), steps=20, lora=LoraSettings(rank=2), beta=0.5, learning_rate=3e-2)


@pytest.fixture(params=["whole", "adapted"])
def either(request: pytest.FixtureRequest) -> Run:
    found: Run = request.getfixturevalue(request.param)
    return found


def test_it_begins_at_log_2(either: Run) -> None:
    """The policy is the reference: no pair is told apart, seen or not."""
    before, first = either.ended.entries[:2]
    assert before["step"] == 0
    assert before["held_out_pairs"]["accuracy"] == 0.5
    assert before["held_out_pairs"]["loss"] == pytest.approx(np.log(2))
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-5)


def test_loss_falls_and_accuracy_rises(either: Run) -> None:
    after = either.ended.last["held_out_pairs"]
    assert after["pairs"] == len(UNSEEN)
    assert after["loss"] < 0.6 * np.log(2)
    assert after["accuracy"] > 0.9
    assert either.ended.last["loss"] < 0.6 * np.log(2)
    assert either.ended.last["accuracy"] == 1.0


def test_the_parameters_of_the_least_loss_are_kept(whole: Run) -> None:
    losses = {e["step"]: e["held_out_pairs"]["loss"] for e in whole.ended.entries[1:] if "held_out_pairs" in e}
    best = json.loads(next((whole.folder / "best").glob("*/best.json")).read_text())
    assert best == {"step": min(losses, key=losses.__getitem__), "value": min(losses.values())}
    assert whole.ended.parameters.name == "model"


def test_the_given_weights_stay_as_they_were(either: Run) -> None:
    """They are the reference, too."""
    for a, b in zip(jax.tree.leaves(either.given), jax.tree.leaves(params()), strict=True):
        np.testing.assert_array_equal(a, b)


def test_adapters_are_written_alone(adapted: Run) -> None:
    folder = adapted.folder / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("beta", [-0.1, float("nan")])
def test_a_beta_that_cannot_be(beta: float) -> None:
    with pytest.raises(GemmaryError, match=r"dpo\.beta is"):
        DpoSettings(**tuned(beta=beta))


def test_beta_is_decisive() -> None:
    assert DpoSettings(**tuned()).decisive() != DpoSettings(**tuned(beta=0.2)).decisive()
