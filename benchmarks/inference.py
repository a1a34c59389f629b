"""Prefill and decode beside llama.cpp, in turns, and beside what the memory can give; and what the CPU kernels cost in quality.

    python benchmarks/inference.py --peers PEERS/bin/python [--prompt 512] [--new 64] [--repeats 5] [--tokens 20000] [--two-b]
        [--json OUT]

Both read the same GGUF and its blocks as they are, with two threads: the packaged Gemma 3 270M (Q4_K_M), and with `--two-b` the 2B's
shape with random weights, in Q8_0 and in Q4_0 with a Q8_0 embedding. A decoded token reads every weight once, so its floor is
the weights' bytes over the read bandwidth, which is measured in the same run (NumPy's dot over 1 GB, a thread per core).
Quality is the mean negative log-likelihood of `--tokens` tokens of Python's reference (its `pydoc_data.topics`), read 16 tokens at a
time, as decoding multiplies, beside the same weights dequantized to float32. Machines are noisy: compare within a run only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fidelity import ask, whole_gguf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gemmary import Gemma, load
from gemmary.checkpoints import open_model
from gemmary.checkpoints.gguf import fields_for
from gemmary.checkpoints.gguf_file import GGUFWriter
from gemmary.checkpoints.names import layout, stored_shape
from gemmary.config import Config
from gemmary.infer.engine import Engine
from gemmary.presets import preset

WINDOW, NARROW = 512, 16


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


def beside_llama(model: str, path: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Turns of both, medians; `model` is how we open what lies at `path`."""
    prompt = [2, *np.random.default_rng(0).integers(1000, 200_000, arguments.prompt - 1).tolist()]
    gemma = load(model)
    speed(gemma, prompt, arguments.new)
    task = {"model": path, "what": "speed", "prompt": prompt, "count": arguments.new, "repeats": 1}
    ours, theirs, bandwidth, version = list[Any](), list[Any](), [read_bandwidth(3)], "llama.cpp"
    for _ in range(arguments.repeats):
        speed(gemma, prompt, 2)  # a turn begins with a run that does not count, on either side
        ours.append(speed(gemma, prompt, arguments.new))
        answer = json.loads(ask(arguments.peers, "llama", task, folder, "llama.json").read_text())
        version = answer["version"]
        theirs.append((answer["result"]["prefill_seconds"], answer["result"]["decode_seconds"]))
        bandwidth.append(read_bandwidth(3))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(gemma.params))
    found: dict[str, Any] = {"version": version, "weights_bytes": size, "read_bytes_per_second": max(bandwidth)}
    for i, what in enumerate(("prefill", "decode")):
        mine, other = ([run[i] for run in runs] for runs in (ours, theirs))
        tokens = arguments.prompt if what == "prefill" else 1
        found[what] = {
            "gemmary": tokens / statistics.median(mine),
            "llama.cpp": tokens / statistics.median(other),
            "ratio": statistics.median(b / a for a, b in zip(mine, other, strict=True)),
        }
    found["share_of_bandwidth"] = found["decode"]["gemmary"] * size / max(bandwidth)
    return found


def first_token(repeats: int) -> float:
    """Seconds from the command to its first token, everything that was compiled once being kept; the median."""
    command = [str(Path(sys.executable).with_name("gemmary")), "generate", "sample", "The capital of France is"]
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with subprocess.Popen([*command, "--max-new-tokens", "8"], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)  # the prompt is printed with the first token
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first one may compile


def quality(tokens: int) -> dict[str, float]:
    """Nats a token, as decoding multiplies and with dequantized weights."""
    gemma = load("sample")
    with open_model("sample") as checkpoint:
        wide = Engine(checkpoint.params(jnp.float32), gemma.config, chunk=WINDOW)
    ids = gemma.tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))
    windows = [[2, *ids[at : at + WINDOW - 1]] for at in range(0, tokens, WINDOW - 1)]
    narrow = Engine(gemma.params, gemma.config, chunk=NARROW)
    found = {}
    for name, engine in (("kernels", narrow), ("dequantized", wide)):
        found[name] = -float(np.concatenate([engine.log_probs(one) for one in track(windows, name)]).mean())
    return {"tokens": sum(map(len, windows)), **found, "off": found["kernels"] / found["dequantized"] - 1}


def write_random(path: Path, config: Config, kind: str) -> None:
    """A GGUF of random weights: the same few rows over and over, since values change no time."""
    rng = np.random.default_rng(0)
    rows = [(row, i) for row in layout("gguf", config) for i in range(config.num_layers if row.layered else 1)]
    kinds = {row.name: "F32" if row.one_plus else "Q8_0" if "embed" in row.members else kind for row, _ in rows}
    plan = [(row.at(i), stored_shape(row, config), kinds[row.name]) for row, i in rows]
    with open_model("sample") as sample:
        tokenizer = sample.tokenizer()

    class Norms:
        """What the metadata asks of a checkpoint."""

        def weight(self, name: str, layer: int) -> np.ndarray:
            return np.zeros(1, np.float32)

    fields = fields_for(config, tokenizer, Norms(), "random")  # type: ignore[arg-type]
    with GGUFWriter(path, fields, plan) as writer:
        for name, shape, _ in track(plan, f"writing {kind}"):
            if len(shape) == 1:
                writer.write(name, np.ones(shape, np.float32))
                continue
            few = rng.normal(0, shape[-1] ** -0.5, (64, shape[-1])).astype(np.float32)
            writer.write(name, np.tile(few, (-(-shape[0] // 64), 1))[: shape[0]])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="PYTHON", required=True)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20_000, help="of the quality; 0: none")
    parser.add_argument("--two-b", action="store_true")
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"prompt": arguments.prompt, "new": arguments.new, "models": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results["models"]["270M, Q4_K_M"] = beside_llama("sample", whole_gguf(folder), arguments, folder)
        if arguments.two_b:
            config = preset("gemma-2b").config.replace(vocab_size=262144, num_tokens=262144)
            for kind in ("Q8_0", "Q4_0"):
                path = folder / f"{kind}.gguf"
                write_random(path, config, kind)
                results["models"][f"2B, {kind}"] = beside_llama(str(path), str(path), arguments, folder)
                path.unlink()
    table = Table("", "", "gemmary", "llama.cpp", "ratio", title=f"{arguments.prompt} tokens, then {arguments.new}")
    for model, found in results["models"].items():
        for what in ("prefill", "decode"):
            one = found[what]
            table.add_row(
                model, f"{what}, tokens/s", f"{one['gemmary']:.1f}", f"{one['llama.cpp']:.1f}", f"{one['ratio']:.2f}"
            )
        share = f"{found['share_of_bandwidth']:.0%} of {found['read_bytes_per_second'] / 1e9:.1f} GB/s"
        table.add_row(model, "weights are read at", share, "", "")
    Console(width=110).print(table)
    results["first_token_seconds"] = first_token(arguments.repeats)
    print(f"from the command to the first token: {results['first_token_seconds']:.2f} s")
    if arguments.tokens:
        results["quality"] = quality(arguments.tokens)
        q = results["quality"]
        print(
            f"{q['tokens']} tokens: {q['kernels']:.5f} nats each, dequantized {q['dequantized']:.5f} ({q['off']:+.3%})"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
