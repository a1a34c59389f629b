"""Mutated model files: no crash, no code run, refused soon and in bounded memory. `make test-release` runs many more."""

from __future__ import annotations

import sys
from pathlib import Path

import hostile
import pytest

from gemmary.text import Tokenizer

KINDS = ("gguf", "safetensors", "config", "tokenizer", "sentencepiece", "torch", "kaggle")
COUNT = 45


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_do_no_harm(tmp_path: Path, tiny: Tokenizer, kind: str) -> None:
    run: list[str] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("os.system", "subprocess.Popen", "exec", "os.exec", "pickle.find_class"):
            # Lazy imports execute module code from files; nothing else may.
            if event == "exec" and not str(getattr(arguments[0], "co_filename", "")).startswith("<string"):
                return
            run.append(event)

    watching = True
    sys.addaudithook(watch)
    try:
        refused = hostile.run(kind, tmp_path, tiny, COUNT, seed=1)
    finally:
        watching = False
    assert run == []
    assert refused > COUNT // 10
