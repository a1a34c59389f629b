"""What a run writes down: lines that survive a kill, and a picture."""

import json
import struct
from pathlib import Path

import pytest

from gemmary.train.journal import Journal


def entry(step: int) -> dict[str, object]:
    return {"step": step, "loss": 9.0 / step, "tokens": step * 100, "held_out": {"prose": 3.0 / step, "code": 2.0}}


def test_lines_after_the_step_gone_on_from_are_forgotten(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in (10, 20, 30):
        journal.write(entry(step))
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 40, "lo')  # cut off by a kill
    again = Journal(tmp_path)
    again.go_on_from(20)
    again.write(entry(25))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 25] == [one["step"] for one in again.entries]


def test_the_curve_is_a_picture(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.close()
    assert not (tmp_path / "curve.png").exists()
    for step in (10, 20):
        journal.write(entry(step))
    journal.close()
    data = (tmp_path / "curve.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (960, 540)
    assert len(data) > 10_000
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="the extra is installed by make test")
    journal = Journal(tmp_path, tensorboard=True)
    journal.write(entry(10))
    journal.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    written = file.read_bytes()
    for name in (b"loss", b"held_out/prose", b"held_out/code", b"tokens"):
        assert name in written
