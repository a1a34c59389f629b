"""5000 mutated model files, by the same rules as the few of tests/test_hostile.py."""

from __future__ import annotations

from pathlib import Path

import hostile
import pytest

from gemmary.text import Tokenizer

pytestmark = pytest.mark.release

COUNTS = {"gguf": 1500, "torch": 1500, "safetensors": 1000, "tokenizer": 400, "sentencepiece": 300, "config": 300}


@pytest.mark.parametrize("kind", COUNTS)
def test_mutated_files_do_no_harm(tmp_path: Path, tiny: Tokenizer, kind: str) -> None:
    assert sum(COUNTS.values()) == 5000
    assert hostile.run(kind, tmp_path, tiny, COUNTS[kind], seed=2) > COUNTS[kind] // 2
