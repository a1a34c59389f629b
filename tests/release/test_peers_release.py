"""Live peers: what is recorded is what they say, and they open what we export.

pytest tests/release/test_peers_release.py --peers PEERS/bin/python
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gemmary.checkpoints import convert, open_model

pytestmark = pytest.mark.release

ROOT = Path(__file__).parents[2]
RECORDED: dict[str, Any] = json.loads((ROOT / "tests" / "golden" / "sample.json").read_text(encoding="utf-8"))
GREEDY = {"what": "greedy", "prompts": [answer["prompt_ids"] for answer in RECORDED["greedy"]], "count": 24}


def _ask(python: str, peer: str, task: dict[str, Any], directory: Path) -> Any:
    (directory / "task.json").write_text(json.dumps(task))
    script = ROOT / "benchmarks" / "peers.py"
    subprocess.run([python, str(script), peer, "task.json", "out.json"], cwd=directory, check=True)
    return json.loads((directory / "out.json").read_text())["result"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sample weights, exported by us in fp32."""
    root = tmp_path_factory.mktemp("exports")
    with open_model("sample") as checkpoint:
        convert(checkpoint, root / "hf", "hf")
        convert(checkpoint, root / "m.gguf", "gguf")
    return {"transformers": root / "hf", "llama": root / "m.gguf"}


@pytest.mark.parametrize("peer", ["transformers", "llama"])
def test_peers_open_what_we_export_and_answer_the_same(
    peers: str, exports: dict[str, Path], tmp_path: Path, peer: str
) -> None:
    answers = _ask(peers, peer, {**GREEDY, "model": str(exports[peer])}, tmp_path)
    assert answers == [answer["ids"] for answer in RECORDED["greedy"]]


def test_what_is_recorded_is_what_transformers_says(peers: str, exports: dict[str, Path], tmp_path: Path) -> None:
    task = {"what": "nll", "windows": [RECORDED["likelihood"]["ids"]], "model": str(exports["transformers"])}
    nats = _ask(peers, "transformers", task, tmp_path)
    assert nats == pytest.approx(RECORDED["likelihood"]["transformers"], abs=2e-3)
