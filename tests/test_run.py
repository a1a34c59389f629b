"""A run in its folder: its first entry, its best parameters, its link, and that a hook's word ends it for good."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemmary.errors import GemmaryError
from gemmary.params import Params
from gemmary.train.journal import read_entries
from gemmary.train.loop import Hook, LoopSettings
from gemmary.train.run import Ended, keep_best, run
from gemmary.train.step import TrainState

STEPS = 12


class Files:
    """Parameters as one file: after step n they are n."""

    name = "model"

    def write(self, path: Path, params: Params) -> None:
        path.mkdir()
        np.save(path / "final_norm.npy", params["final_norm"])

    def read(self, path: Path, like: Params) -> Params:
        return {"final_norm": jnp.asarray(np.load(path / "final_norm.npy"))}


class Numbers:
    """Batch i is the number i."""

    def __init__(self) -> None:
        self.next, self.closed = 0, False

    def __next__(self) -> int:
        self.next += 1
        return self.next - 1

    def state(self) -> dict[str, Any]:
        return {"next": self.next}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.next = state["next"]

    def close(self) -> None:
        self.closed = True


def begun() -> TrainState:
    return TrainState({"final_norm": jnp.zeros(2)}, (jnp.zeros(2),), jnp.zeros((), jnp.int32), jax.random.key(0))


def step(state: TrainState, batch: int) -> tuple[TrainState, dict[str, Any]]:
    assert batch == int(state.step)
    params = {"final_norm": state.params["final_norm"] + 1}
    return replace(state, params=params, step=state.step + 1), {
        "loss": jnp.float32(2.0),
        "gradient_norm": jnp.float32(1.0),
    }


def lived(folder: Path, *, steps: int = STEPS, **options: Any) -> Ended:
    """The run, from its newest checkpoint on."""
    settings = LoopSettings(steps=steps, save_every=4, log_every=2, **options.pop("settings", {}))
    batches = Numbers()
    # What it finds is not called a loss, so that no curve is drawn.
    ended = run(
        folder, begun(), batches, options.pop("program", lambda state: step), files=Files(), identity={"seed": 1},
        settings=settings, describe=lambda means, seconds, done: {"nats": means["loss"]}, **options,
    )  # fmt: skip
    assert batches.closed
    return ended


def broken(folder: Path, where: int, **options: Any) -> None:
    """The same, broken off while it reports a step: what was saved before is what is left."""

    def report(entry: dict[str, Any]) -> None:
        if entry["step"] == where:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lived(folder, report=report, **options)


def entries(folder: Path) -> list[dict[str, Any]]:
    return read_entries(folder / "metrics.jsonl")


def value_at(path: Path) -> float:
    return float(np.load(path / "final_norm.npy")[0])


def test_a_run_ends_where_its_newest_parameters_are(tmp_path: Path) -> None:
    ended = lived(tmp_path)
    assert ended.complete
    assert ended.parameters == tmp_path / "checkpoints" / "step_00000012" / "model"
    assert ended.last == {"nats": 2.0}
    assert (tmp_path / "model").is_symlink()
    assert not Path((tmp_path / "model").readlink()).is_absolute()  # the folder may be moved
    assert value_at(tmp_path / "model") == 12
    assert not (tmp_path / "best").exists()


def test_the_link_follows_the_newest(tmp_path: Path) -> None:
    lived(tmp_path, steps=4)
    assert value_at(tmp_path / "model") == 4
    lived(tmp_path)
    assert value_at(tmp_path / "model") == 12


# --- Before the first step --------------------------------------------------------------------------------------------


def test_what_is_found_before_is_step_0s_entry(tmp_path: Path) -> None:
    asked: list[int] = []
    lived(tmp_path, before=lambda state: {"before": asked.append(int(state.step))})
    assert asked == [0]
    assert entries(tmp_path)[0] == {"step": 0, "before": None}
    assert [entry["step"] for entry in entries(tmp_path)] == [0, 2, 4, 6, 8, 10, 12]


def test_going_on_asks_for_nothing_before(tmp_path: Path) -> None:
    asked: list[int] = []
    options: dict[str, Any] = {"before": lambda state: {"before": asked.append(1)}}
    broken(tmp_path, 6, **options)
    lived(tmp_path, **options)
    assert asked == [1]
    assert [entry["step"] for entry in entries(tmp_path)] == [0, 2, 4, 6, 8, 10, 12]


def test_begun_again_without_a_checkpoint_it_is_asked_again(tmp_path: Path) -> None:
    """A kill before the first save: the entry is written once all the same."""
    asked: list[int] = []
    options: dict[str, Any] = {"before": lambda state: {"before": asked.append(1)}}
    broken(tmp_path, 2, **options)
    lived(tmp_path, **options)
    assert asked == [1, 1]
    assert [entry["step"] for entry in entries(tmp_path)].count(0) == 1


def test_the_program_is_made_for_the_state_that_it_goes_on_from(tmp_path: Path) -> None:
    made: list[int] = []
    program = lambda state: (made.append(int(state.step)), step)[1]  # noqa: E731
    broken(tmp_path, 6, program=program)
    lived(tmp_path, program=program)
    assert made == [0, 4]


# --- The best parameters ----------------------------------------------------------------------------------------------

LOSSES = {2: 0.9, 4: 0.4, 6: 0.7, 8: 0.4, 10: 0.5, 12: 0.6}
"""By step; the least first at 4."""


def best_of(folder: Path, losses: Mapping[int, float] = LOSSES) -> Hook:
    hook = Hook(2, lambda state: {"found": losses[int(state.step)]})
    return keep_best(hook, folder, Files(), lambda found: found["found"])


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "best").iterdir())


def test_the_best_are_kept_alone_and_linked(tmp_path: Path) -> None:
    ended = lived(tmp_path, hooks=[best_of(tmp_path)])
    assert kept(tmp_path) == ["step_00000004"]
    assert json.loads((tmp_path / "best" / "step_00000004" / "best.json").read_text()) == {"step": 4, "value": 0.4}
    assert ended.parameters == tmp_path / "best" / "step_00000004" / "model"
    assert value_at(tmp_path / "model") == 4
    assert [entry["found"] for entry in entries(tmp_path)] == list(LOSSES.values())  # a hook that keeps still finds


def test_a_better_one_takes_the_place(tmp_path: Path) -> None:
    lived(tmp_path, hooks=[best_of(tmp_path, LOSSES | {10: 0.1})])
    assert kept(tmp_path) == ["step_00000010"]
    assert value_at(tmp_path / "model") == 10


def test_the_best_survive_going_on(tmp_path: Path) -> None:
    """Also where their step lies behind what is gone on from, and its checkpoint is gone."""
    options: dict[str, Any] = {"hooks": [best_of(tmp_path)], "settings": {"keep": 1}}
    broken(tmp_path, 10, **options)
    assert kept(tmp_path) == ["step_00000004"]
    lived(tmp_path, **options)
    assert kept(tmp_path) == ["step_00000004"]
    assert value_at(tmp_path / "model") == 4


def test_the_best_may_be_of_a_step_yet_to_come_again(tmp_path: Path) -> None:
    losses = LOSSES | {6: 0.1}
    broken(tmp_path, 6, hooks=[best_of(tmp_path, losses)])  # best at 6, gone on from 4
    assert kept(tmp_path) == ["step_00000006"]
    lived(tmp_path, hooks=[best_of(tmp_path, losses)])
    assert kept(tmp_path) == ["step_00000006"]
    assert value_at(tmp_path / "model") == 6


def test_a_kill_between_two_bests_leaves_the_better(tmp_path: Path) -> None:
    lived(tmp_path, hooks=[best_of(tmp_path)])
    older = tmp_path / "best" / "step_00000002"  # as it is where the newer one was written and this one not yet removed
    older.mkdir()
    Files().write(older / "model", {"final_norm": np.full(2, 2.0)})
    (older / "best.json").write_text(json.dumps({"step": 2, "value": 0.9}))
    lived(tmp_path, hooks=[best_of(tmp_path)])
    assert value_at(tmp_path / "model") == 4


def test_a_run_begun_anew_forgets_an_old_best(tmp_path: Path) -> None:
    lived(tmp_path, hooks=[best_of(tmp_path, LOSSES | {6: -9.0})])
    shutil.rmtree(tmp_path / "checkpoints")
    lived(tmp_path, hooks=[best_of(tmp_path)])
    assert kept(tmp_path) == ["step_00000004"]


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    lived(tmp_path, steps=4)
    with pytest.raises(GemmaryError, match="seed was 1 and is 2"):
        run(
            tmp_path, begun(), Numbers(), lambda state: step, files=Files(), identity={"seed": 2},
            settings=LoopSettings(steps=8), describe=lambda *_: {},
        )  # fmt: skip


# --- A hook that says why to stop -------------------------------------------------------------------------------------


def stops_at(where: int) -> Hook:
    return Hook(2, lambda state: {"stop": "enough"} if int(state.step) == where else {})


def never(*_: Any) -> Any:
    raise AssertionError("there is nothing left to do")


@pytest.mark.parametrize("where", [6, 8, 12])
def test_a_hooks_word_saves_and_completes(tmp_path: Path, where: int) -> None:
    """At a step that is not saved otherwise, at one that is, and at the last."""
    reported: list[dict[str, Any]] = []
    ended = lived(tmp_path, hooks=[stops_at(where)], report=reported.append)
    assert ended.complete
    assert int(ended.state.step) == where
    assert value_at(tmp_path / "checkpoints" / f"step_{where:08d}" / "model") == where
    assert ended.last["stop"] == reported[-1]["stop"] == "enough"
    assert entries(tmp_path)[-1]["step"] == where


@pytest.mark.parametrize("where", [6, 8])
def test_a_second_call_does_nothing_more(tmp_path: Path, where: int) -> None:
    lived(tmp_path, hooks=[stops_at(where)])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = lived(tmp_path, program=lambda state: never, hooks=[Hook(2, never)], before=never, report=never)
    assert again.complete
    assert int(again.state.step) == where
    assert again.last["stop"] == "enough"
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_stop_whose_save_was_lost_comes_again(tmp_path: Path) -> None:
    """Stopped at 6, its checkpoint damaged: it goes on from 4, whose entry says nothing of a stop."""
    lived(tmp_path, hooks=[stops_at(6)])
    (tmp_path / "checkpoints" / "step_00000006" / "state.json").write_text("{}")
    steps: list[int] = []
    ended = lived(tmp_path, hooks=[stops_at(6)], report=lambda entry: steps.append(entry["step"]))
    assert steps == [6]
    assert ended.complete


def test_a_stop_is_no_end_to_the_best(tmp_path: Path) -> None:
    lived(tmp_path, hooks=[best_of(tmp_path), stops_at(8)])
    assert kept(tmp_path) == ["step_00000004"]
    assert value_at(tmp_path / "model") == 4
