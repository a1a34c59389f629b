"""Records what transformers and llama.cpp make of the sample weights.

    PEERS/bin/python tests/golden/record_sample.py SAMPLE.gguf

SAMPLE.gguf is the packaged parts as one file. Writes tests/golden/sample.json: greedy answers (transformers, float32 on the
dequantized weights) and nats per token of a paragraph (both). Recorded with transformers 5.23, torch 2.13 and
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from peers import LlamaCpp, Transformers

PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):\n"]
PARAGRAPH = (
    "A lighthouse is a tower that carries a lamp. It stands where ships must be careful, and on a clear night its light "
    "is seen from twenty miles away. Keepers once lived in it, winding the clockwork and trimming the wick; now a small "
    "machine does their work, and the rooms are empty but for the sound of the sea."
)


def main() -> None:
    """Record."""
    gguf = sys.argv[1]
    llama, peer = LlamaCpp(gguf), Transformers(gguf)

    def ids_of(text: str) -> list[int]:
        return list(llama.model.tokenize(text.encode(), add_bos=True))

    paragraph = ids_of(PARAGRAPH)
    recorded = {
        "recorded_with": [peer.version, llama.version],
        "greedy": [
            {"prompt": text, "prompt_ids": ids_of(text), "ids": peer.greedy(ids_of(text), 24)} for text in PROMPTS
        ],
        "likelihood": {
            "text": PARAGRAPH,
            "ids": paragraph,
            "transformers": [round(value, 5) for value in peer.nll(paragraph)],
            "llama.cpp": [round(value, 5) for value in llama.nll(paragraph)],
        },
    }
    path = Path(__file__).parent / "sample.json"
    path.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
