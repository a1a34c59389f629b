"""Runs on a mesh, in one process and in several: what one device comes to; lost, stopped and started again. The kills in short.

The rest is in tests/release/test_processes_release.py.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import process_runs as programs
import pytest
import training_runs
import tuning_runs
from process_runs import LOST_AFTER, came_to, ended, losses, start
from training_runs import checkpoints_of, make_inputs

from gemmary import processes
from gemmary.checkpoints import open_model
from gemmary.checkpoints.manifest import verify_manifest
from gemmary.errors import GemmaryError
from gemmary.params import undivided
from gemmary.presets import nano
from gemmary.train.dpo import DpoSettings, dpo
from gemmary.train.finetune import LoraSettings, TuneSettings
from gemmary.train.meshed import MeshSettings, check_rows, fed, rows_here
from gemmary.train.parts import Pieces, opened, pieces_here, write_pieces
from gemmary.train.sft import sft

STEPS, BATCH = 6, 8
SHORT = {"set": [f"steps={STEPS}", f"batch={BATCH}"]}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("processes") / "inputs")


@pytest.fixture(scope="session")
def alone(inputs: Path) -> list[float]:
    """Losses of one process with one device: the program without a mesh."""
    folder = inputs.parent / "alone"
    training_runs.run(inputs, folder, steps=STEPS, batch=BATCH)
    return losses(folder)


@pytest.fixture(scope="session")
def four(inputs: Path) -> tuple[Path, str]:
    """A run of four processes with a device each, and what it came to."""
    folder = inputs.parent / "four"
    return folder, came_to(inputs, folder, 4, **SHORT)


@pytest.mark.parametrize("sizes", [{}, {"slices": 2, "model": 2}])
def test_a_mesh_of_eight_devices_learns_as_one(
    inputs: Path, alone: list[float], tmp_path: Path, sizes: dict[str, int]
) -> None:
    said: list[str] = []
    mesh = MeshSettings(**sizes).mesh()
    assert mesh is not None
    assert mesh.size == 8
    training_runs.run(inputs, tmp_path, steps=STEPS, batch=BATCH, mesh=mesh, say=said.append)
    assert losses(tmp_path) == pytest.approx(alone, abs=1e-5)
    told = "attn.k is on every chip of `model`: kv_heads 1 does not divide by 2"
    assert (said.count(told) == 1) == ("model" in sizes)


def test_four_processes_learn_as_one(alone: list[float], four: tuple[Path, str]) -> None:
    folder, word = four
    assert word.startswith("complete")
    assert losses(folder) == pytest.approx(alone, abs=1e-5)
    newest = checkpoints_of(folder)[-1]
    verify_manifest(newest)
    names = sorted(path.name for path in (newest / "parts").iterdir())
    assert names == [f"process_{i:05d}.{end}" for i in range(4) for end in ("json", "safetensors")]
    sizes = [(newest / "parts" / name).stat().st_size for name in names if name.endswith("safetensors")]
    assert max(sizes) < 2.5 * min(sizes)  # each writes its share
    with opened(newest) as pieces, open_model(folder / "model") as model:
        assert (pieces.read("params['attn.q'][1]") == model.weight("attn.q", 1)).all()
        assert (pieces.read("params['embed']") == model.weight("embed")).all()


def test_other_processes_go_on_from_the_same_bits(inputs: Path, four: tuple[Path, str], tmp_path: Path) -> None:
    folder, word = four
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(folder, one, symlinks=True)
    assert came_to(inputs, one, **SHORT) == word  # read back on one device
    shutil.copytree(folder, two, symlinks=True)
    shutil.rmtree(checkpoints_of(two)[-1])
    assert came_to(inputs, two, 2, devices=2, **SHORT) == word  # and gone on with, by others
    assert losses(two) == losses(folder)


def test_many_go_on_from_what_one_wrote(inputs: Path, alone: list[float], tmp_path: Path) -> None:
    training_runs.run(inputs, tmp_path, steps=STEPS, batch=BATCH)
    shutil.rmtree(checkpoints_of(tmp_path)[-1])
    mesh = MeshSettings(model=2).mesh()
    training_runs.run(inputs, tmp_path, steps=STEPS, batch=BATCH, mesh=mesh)
    assert losses(tmp_path) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("stage", ["sft", "rlhf"])
def test_two_processes_tune_as_one(inputs: Path, tmp_path: Path, stage: str) -> None:
    steps = 2
    training_runs.tune(inputs, tmp_path / "one", stage, steps=steps)
    came_to(inputs, tmp_path / "two", 2, stage=stage, set=[f"steps={steps}"])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4 if stage == "rlhf" else 1e-5)
    one, two = (json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in ("one", "two"))
    if stage == "rlhf":
        assert one["watched"] == two["watched"]
        assert one["reward"] == two["reward"]
    else:
        assert one["held_out_loss"]["all"] == pytest.approx(two["held_out_loss"]["all"], abs=1e-5)
    with open_model(tmp_path / "two" / "model") as model:
        assert model.weight("embed").shape[0] == model.config.vocab_size


@pytest.mark.parametrize("kind", ["lora", "dpo"])
def test_adapters_and_pairs_on_a_mesh(tmp_path: Path, kind: str) -> None:
    found = {}
    for name, mesh in (("one", None), ("mesh", MeshSettings(data=2, model=2).mesh())):
        base = tuning_runs.params(), tuning_runs.tokenizer()
        common: dict[str, Any] = {"weights": {"a": 1.0}, "mesh": mesh}
        if kind == "dpo":
            pairs = tuning_runs.pairs(tmp_path / name, [("say red", "red", "blue"), ("say blue", "blue", "red")])
            settings: Any = DpoSettings(**tuning_runs.tuned(3))
            run = dpo(
                settings, tuning_runs.config(), *base, {"a": pairs}, {"a": pairs}, tmp_path / f"{name}_run", **common
            )
        else:
            tokens = tuning_runs.said(tmp_path / name, [("say red", "red"), ("say blue", "blue")])
            lora = LoraSettings(rank=2, base_bits=8 if kind == "int8" else 32)
            settings = TuneSettings(**tuning_runs.tuned(3), lora=lora)
            run = sft(
                settings, tuning_runs.config(), *base, {"a": tokens}, {"a": tokens}, tmp_path / f"{name}_run", **common
            )
        found[name] = [entry["loss"] for entry in run.entries if "loss" in entry]
    assert len(found["one"]) == 3
    assert found["mesh"] == pytest.approx(found["one"], abs=1e-5)


def killed_runs(
    inputs: Path, folder: Path, word: str, kills: int, seed: int, count: int = 4, **options: Any
) -> Counter[str]:
    """A run of several processes, one of which is killed at an instant of chance; and again, until it comes to `word` all the same."""
    rng, counts = random.Random(seed), Counter[str]()
    while counts["kills"] < kills:
        often = {"set": [*SHORT["set"], "save_every=1"]}
        runs, victim = start(inputs, folder, count, pause=0.5, **options, **often), rng.randrange(count)
        training_runs.until(runs[0], "step")
        time.sleep(rng.uniform(0, 2.0))
        if any(run.poll() is not None for run in runs):
            ended(runs)
            shutil.rmtree(folder)  # done before: begin anew
            continue
        runs[victim].kill()
        killed = time.monotonic()
        for code, said in ended([run for i, run in enumerate(runs) if i != victim]):
            assert code == processes.EXIT_CODE, said
            lost = f"error: process {victim} of {count} is lost: start all of them again, and the run goes on from"
            assert said.splitlines()[-1].startswith(lost), said
        assert time.monotonic() - killed < 2 * LOST_AFTER + 5
        ended([runs[victim]])
        counts["kills"] += 1
        counts[f"of process {victim}"] += 1
        counts["with a checkpoint to go on from"] += bool(checkpoints_of(folder))
    assert came_to(inputs, folder, count, **options, **SHORT) == word
    return counts


def test_a_lost_process_ends_the_others_and_all_start_again(
    inputs: Path, four: tuple[Path, str], tmp_path: Path
) -> None:
    counts = killed_runs(inputs, tmp_path / "run", four[1], 1, 3, 2, devices=2)
    print(f"\nkilled {dict(counts)}, seed 3, 0 mismatches")


def test_one_asked_to_stop_stops_all(inputs: Path, tmp_path: Path) -> None:
    runs = start(inputs, tmp_path, 2, pause=0.05, set=["steps=1000", "batch=8", "save_every=1000", "log_every=2"])
    training_runs.until(runs[0], "step")
    runs[1].send_signal(signal.SIGTERM)
    found = ended(runs, 40)
    assert [code for code, _ in found] == [0, 0], found
    words = [said.splitlines()[-1] for _, said in found]
    assert words[0] == words[1]
    assert words[0].startswith("stopped")
    assert len(checkpoints_of(tmp_path)) == 1


def test_every_process_makes_the_rows_that_its_devices_hold() -> None:
    mesh = MeshSettings(data=4, model=2).mesh()
    assert mesh is not None
    assert rows_here(mesh, 8) is None  # one process has all
    batch = np.arange(16).reshape(8, 2)
    whole = fed(mesh, batch, 8)
    assert (np.asarray(whole) == batch).all()
    order = [6, 7, 0, 1, 4, 5, 2, 3]
    assert (np.asarray(fed(mesh, batch[order], 8, order)) == batch).all()


def test_pieces_are_read_box_by_box_whatever_cut_them(tmp_path: Path) -> None:
    mesh = MeshSettings(data=2, model=4).mesh()
    assert mesh is not None
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model", "data"))
    values = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    tree = {"a": jax.device_put(values, where), "b": jax.device_put(np.float32(3), jax.devices()[0])}
    tree["copied"] = jax.device_put(values, rows)
    pieces = pieces_here("x", tree)
    assert len(pieces) == 8 + 1 + 4  # of what two devices hold one is written
    write_pieces(tmp_path / "parts", 0, pieces[:4])
    write_pieces(tmp_path / "parts", 1, pieces[4:])
    with opened(tmp_path) as found:
        assert (found.read("x['a']") == values).all()
        assert (found.read("x['a']", [slice(1, 7), slice(2, 5)]) == values[1:7, 2:5]).all()
        assert found.read("x['b']") == 3
        again = found.fill("x", tree)
        assert again["a"].sharding == where
        assert (np.asarray(again["a"]) == values).all()
        with pytest.raises(GemmaryError, match=r"another state than this run \(x\['c'\]"):
            found.fill("x", {**tree, "c": tree["b"]})
    (tmp_path / "parts" / "process_00001.safetensors").unlink()
    with opened(tmp_path) as found, pytest.raises(GemmaryError, match="parts of it are missing"):
        _whole(found)


def _whole(found: Pieces) -> None:
    found.read("x['a']")


def test_what_does_not_fit_is_said_with_what_would() -> None:
    for settings, line in (
        ({"model": 3}, "slices=1 x model=3 do not divide 8 devices: model=2 would"),
        ({"slices": 3}, "slices=3 do not divide 8 devices: slices=1 would"),
        (
            {"data": 16},
            "a mesh of slices=1 x data=16 x model=1 needs 16 devices and there are 8: slices=1 data=8 model=1",
        ),
        ({"model": 16}, "model=16 do not divide 8 devices: model=8 would"),
    ):
        with pytest.raises(GemmaryError) as error:
            MeshSettings(**settings).mesh()
        assert line in str(error.value)
    mesh = MeshSettings(data=4, model=2).mesh()
    with pytest.raises(
        GemmaryError, match=r"sft.batch is 10, which does not divide over the 4 of slices x data: 8 would"
    ):
        check_rows("sft", 10, 1, mesh)
    with pytest.raises(GemmaryError, match=r"in 2 parts \(accumulate\), .*: 8 would"):
        check_rows("pretrain", 4, 2, mesh)
    check_rows("sft", 10, 1, None)
    assert undivided(nano(2).replace(num_kv_heads=2), mesh) == undivided(nano(2), None) == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--coordinator", "here:1"], "go together"),
        (["--coordinator", "here", "--process-id", "0", "--processes", "2"], "write HOST:PORT"),
        (["--coordinator", "here:1", "--process-id", "2", "--processes", "2"], "of 2 processes it is 0 to 1"),
        (["--distributed", "--process-id", "2"], "--distributed finds out by itself"),
        (["--distributed"], "no cluster was found"),
        (
            ["--coordinator", "here:1", "--process-id", "0", "--processes", "2", "--lost-after", "1"],
            "--lost-after is 1",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: list[str], line: str) -> None:
    command = [sys.executable, "-m", "gemmary.cli", "sft", str(tmp_path / "none.toml"), *options]
    found = subprocess.run(command, capture_output=True, text=True, env=programs.quiet_environment(), timeout=60)
    assert found.returncode == 2
    assert found.stderr.startswith("error: ")
    assert len(found.stderr.splitlines()) == 1
    assert line in found.stderr
