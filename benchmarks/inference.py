"""Prefill and decode of the sample weights beside transformers and llama.cpp, and beside what the memory can give.

    python benchmarks/inference.py --peers PEERS/bin/python [--prompt 512] [--new 32] [--repeats 5] [--json OUT]

gemmary and transformers run in float32 on the dequantized weights, llama.cpp on the file's own 4- to 8-bit types; two threads
each, one after the other. A decoded token reads every weight once, so its floor is the weights' bytes over the read
bandwidth, which is measured in the same run (NumPy's dot over 1 GB, a thread per core). Machines are noisy: compare
within a run only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from fidelity import ask, whole_gguf
from rich.console import Console
from rich.table import Table

from gemmary import Gemma, load


def read_bandwidth(repeats: int) -> float:
    """Bytes a second, all cores reading; the best of the repeats."""
    cores = os.cpu_count() or 1
    parts = [np.ones(256 << 20, np.float32)[: (256 << 20) // cores].copy() for _ in range(cores)]
    best = 0.0
    for _ in range(repeats):
        threads = [threading.Thread(target=np.dot, args=(part, part)) for part in parts]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - started))
    return best


def speed(gemma: Gemma, prompt: list[int], count: int) -> tuple[float, float]:
    """Seconds of prefill (to the first token), and per token after it."""
    started = time.perf_counter()
    steps = gemma.engine.generate([prompt], max_new_tokens=count + 1)
    next(steps)
    prefill = time.perf_counter() - started
    started = time.perf_counter()
    for _ in steps:
        pass
    return prefill, (time.perf_counter() - started) / count


def ours(prompt: list[int], count: int, repeats: int) -> dict[str, Any]:
    """The same measurement of gemmary."""
    gemma = load("sample")
    speed(gemma, prompt, count)
    runs = [speed(gemma, prompt, count) for _ in range(repeats)]
    prefill, decode = (statistics.median(run[i] for run in runs) for i in (0, 1))
    return {
        "prefill_seconds": prefill, "decode_seconds": decode,
        "weights_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(gemma.params)),
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="PYTHON")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens decoded")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    prompt = [2, *np.random.default_rng(0).integers(1000, 200_000, arguments.prompt - 1).tolist()]
    bandwidth = [read_bandwidth(5)]
    mine = ours(prompt, arguments.new, arguments.repeats)
    bandwidth.append(read_bandwidth(5))
    results: dict[str, Any] = {"gemmary, float32": mine}
    if arguments.peers:
        with tempfile.TemporaryDirectory() as name:
            task = {"model": whole_gguf(Path(name)), "what": "speed", "prompt": prompt, "count": arguments.new}
            task["repeats"] = arguments.repeats
            for peer in ("transformers", "llama"):
                answer = json.loads(ask(arguments.peers, peer, task, Path(name), f"{peer}.json").read_text())
                results[answer["version"]] = answer["result"]
    bandwidth.append(read_bandwidth(5))
    peak = statistics.median(bandwidth)
    share = mine["weights_bytes"] / mine["decode_seconds"] / peak
    table = Table("", "prefill, tokens/s", "decode, tokens/s", title=f"{arguments.prompt} tokens, then {arguments.new}")
    for name, result in results.items():
        numbers = f"{arguments.prompt / result['prefill_seconds']:.0f}", f"{1 / result['decode_seconds']:.1f}"
        table.add_row(name, *numbers)
    Console(width=110).print(table)
    print(f"read bandwidth {peak / 1e9:.1f} GB/s; float32 decode reads the weights at {share:.0%} of it")
    if arguments.json:
        result = {"prompt": arguments.prompt, "new": arguments.new, "results": results}
        result |= {"read_bytes_per_second": peak, "decode_share_of_bandwidth": share}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
