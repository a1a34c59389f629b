"""Training speed and losses beside transformers: same architecture, batch, dtype (float32), optimizer (AdamW) and data.

    python benchmarks/training.py --peers PEERS/bin/python [--wide 1 2] [--repeats 5] [--steps 3] [--json OUT]

Six layers, 256 wide (times `--wide`), ffw four times that, heads of 64 with one key/value head, vocabulary 8192, 8 x 512
tokens a step. Each contender is a process of its own; they take turns of `--steps` steps, `--repeats` times, after a warm-up.
Losses: a small model on the Python reference's text, the same initial weights and rows, 200 steps; the largest difference of
any step is shown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from gemmary.checkpoints import convert, open_model
from gemmary.checkpoints.native import NativeWriter
from gemmary.config import Config
from gemmary.data.packing import Batch
from gemmary.params import init, layered_names, unstack
from gemmary.presets import nano
from gemmary.text.training import TokenizerSettings, train_tokenizer
from gemmary.train.head import Head, chunk_size
from gemmary.train.memory import compile_lean
from gemmary.train.objectives import language_loss
from gemmary.train.optimizer import OptimizerSettings, optimizer
from gemmary.train.step import init_state, make_step

HERE, RATE, DECAY = Path(__file__).parent, 1e-3, 0.1


def shape(wide: int) -> Config:
    """The architecture that is timed."""
    return nano(1, 8192).replace(num_layers=6, embed_dim=256 * wide, ffw_dim=1024 * wide, num_heads=4 * wide)


def worker(task: dict[str, Any]) -> None:
    """gemmary's side of what `training_peer.py` does."""
    config, tokens = Config(**task["ours"] | {"window_pattern": (False,)}), np.load(task["tokens"])
    rows, length = tokens.shape[1], tokens.shape[2] - 1
    settings = OptimizerSettings(
        learning_rate=RATE, schedule="constant", warmup=0, decay=0, beta2=0.999, weight_decay=DECAY, clip=0
    )
    rule = optimizer(settings, 10**6)
    state = init_state(unstack(init(config, jax.random.key(0))), rule, jax.random.key(0))
    step = make_step(language_loss(config, head=Head(chunk_size(rows, config.vocab_size, 1 << 24))), rule)
    place = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))

    def batch(i: int) -> Batch:
        ids = tokens[i % len(tokens)].astype(np.int32)
        return Batch(ids[:, :-1], ids[:, 1:], np.ones_like(place, np.float32), place, np.zeros_like(place))

    program: Any = compile_lean(step.lower(state, batch(0)))
    print(json.dumps({"version": f"gemmary, jax {jax.__version__}"}), flush=True)
    done = 0
    for line in sys.stdin:
        losses, started = [], time.perf_counter()
        for _ in range(int(line)):
            state, means = program(state, batch(done))
            losses.append(float(means["loss"]))
            done += 1
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_bytes": peak}), flush=True)


class Contender:
    """A process that takes steps when told to."""

    def __init__(self, command: list[str], task: dict[str, Any], folder: Path, name: str) -> None:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(task))
        self._process = subprocess.Popen(
            [*command, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.version = self._answer()["version"]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def steps(self, count: int) -> Any:
        """Take so many steps."""
        assert self._process.stdin is not None
        print(count, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def theirs(config: Config) -> dict[str, Any]:
    """The config in transformers' words."""
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.embed_dim, "intermediate_size": config.ffw_dim,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "max_position_embeddings": config.context,
        "hidden_activation": "gelu_pytorch_tanh", "attn_implementation": "sdpa",
    }  # fmt: skip


def tasks(config: Config, tokens: Path) -> dict[str, Any]:
    """What each contender is told."""
    rule = {"lr": RATE, "betas": [0.9, 0.999], "eps": 1e-8}
    task = {"config": theirs(config), "tokens": str(tokens), "rule": rule, "decay": DECAY, "threads": os.cpu_count()}
    return {**task, "compile": False, "ours": {k: v for k, v in vars(config).items() if k != "window_pattern"}}


def speed(wide: int, peers: str, repeats: int, steps: int, folder: Path) -> dict[str, Any]:
    """Tokens a second and peak memory of each, in turns."""
    config = shape(wide)
    tokens = folder / "random.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, config.vocab_size, (4, 8, 513)).astype(np.uint16))
    task = tasks(config, tokens)
    peer = [peers, str(HERE / "training_peer.py")]
    contenders = {
        "gemmary": Contender([sys.executable, __file__, "--worker"], task, folder, "gemmary"),
        "torch.compile": Contender(peer, {**task, "compile": True}, folder, "compile"),
        "eager": Contender(peer, task, folder, "eager"),
    }
    for contender in contenders.values():
        contender.steps(2)
    pace: dict[str, list[float]] = {name: [] for name in contenders}
    peak = dict.fromkeys(contenders, 0)
    for _ in range(repeats):
        for name, contender in contenders.items():
            answer = contender.steps(steps)
            pace[name].append(steps * 8 * 512 / answer["seconds"])
            peak[name] = answer["peak_bytes"]
    found = {
        contender.version + (f", {name}" if name != "gemmary" else ""): {
            "tokens_per_second": statistics.median(pace[name]), "all": pace[name], "peak_bytes": peak[name],
        }
        for name, contender in contenders.items()
    }  # fmt: skip
    for contender in contenders.values():
        contender.close()
    ratios = [a / b for a, b in zip(pace["gemmary"], pace["torch.compile"], strict=True)]
    return {"wide": wide, "contenders": found, "ratio_to_compile": statistics.median(ratios)}


def agreement(peers: str, folder: Path, steps: int = 200) -> dict[str, float]:
    """The largest difference of losses over steps, as a share of the loss."""
    from pydoc_data.topics import topics

    texts = list(topics.values())
    tokenizer = train_tokenizer(texts, TokenizerSettings(vocab_size=1024, threads=1))
    ids = np.array([i for text in texts for i in tokenizer.encode(text)], np.uint16)
    rows = ids[: len(ids) // 129 * 129].reshape(-1, 129)
    order = np.random.default_rng(0).permutation(len(rows))
    np.save(folder / "text.npy", rows[order][: steps * 4].reshape(-1, 4, 129))
    config = nano(2, 1024)
    params = unstack(init(config, jax.random.key(0)))
    (folder / "start").mkdir()
    writer = NativeWriter(folder / "start", config, tokenizer)
    writer.write(
        {(n, i): params[n][i] if isinstance(params[n], tuple) else params[n] for n, i in layered_names(config)}
    )
    writer.close()
    with open_model(folder / "start") as checkpoint:
        convert(checkpoint, folder / "hf", "hf")
    task = tasks(config, folder / "text.npy") | {"model": str(folder / "hf")}
    ours = Contender([sys.executable, __file__, "--worker"], task, folder, "ours")
    peer = Contender([peers, str(HERE / "training_peer.py")], task, folder, "theirs")
    a, b = np.array(ours.steps(steps)["losses"]), np.array(peer.steps(steps)["losses"])
    ours.close()
    peer.close()
    return {"steps": steps, "largest": float(np.abs(a / b - 1).max()), "first": float(b[0]), "last": float(b[-1])}


def main() -> None:
    """Measure and print."""
    if sys.argv[1] == "--worker":
        worker(json.loads(Path(sys.argv[2]).read_text()))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", metavar="PYTHON", required=True)
    parser.add_argument("--wide", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"cores": os.cpu_count(), "speed": []}
    with tempfile.TemporaryDirectory() as name:
        for wide in arguments.wide:
            found = speed(wide, arguments.peers, arguments.repeats, arguments.steps, Path(name))
            result["speed"].append(found)
            table = Table("", "tokens/s", "peak memory, GB", title=f"{256 * wide} wide, 8 x 512 tokens")
            for contender, one in found["contenders"].items():
                table.add_row(contender, f"{one['tokens_per_second']:.0f}", f"{one['peak_bytes'] / 1e9:.2f}")
            Console(width=100).print(table)
            print(f"median ratio to torch.compile: {found['ratio_to_compile']:.2f}")
        result["losses"] = agreement(arguments.peers, Path(name))
        losses = result["losses"]
        print(
            f"losses over {losses['steps']} steps ({losses['first']:.2f} to {losses['last']:.2f}): "
            f"at most {losses['largest']:.3%} apart"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
