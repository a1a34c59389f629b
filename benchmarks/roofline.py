"""How well a planned step time holds: a training step on this machine's own CPU, planned from its compiled program, beside the clock.

    python benchmarks/roofline.py

The machine's peak (a matrix product) and its memory's rate (a sum over a large array) are measured first, in the same run. Writes
benchmarks/results/roofline.json.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemmary.config import Config
from gemmary.data.packing import Batch
from gemmary.params import init, unstack
from gemmary.plan import read_program
from gemmary.plan.program_costs import Costs
from gemmary.plan.roofline import Limits, step_time
from gemmary.presets import nano
from gemmary.train.flops import peak_flops, train_flops
from gemmary.train.head import Head
from gemmary.train.memory import compile_lean
from gemmary.train.objectives import language_loss
from gemmary.train.optimizer import OptimizerSettings, optimizer
from gemmary.train.step import init_state, make_step

RESULTS = Path(__file__).parent / "results" / "roofline.json"
SIZES = ((4, 4, 512), (6, 4, 512), (8, 4, 512))  # dial, rows, tokens of a row
STEPS = 7


def memory_rate() -> float:
    """Bytes a second of a sum of two large arrays: two are read and one is written."""
    x = jnp.ones(1 << 26, jnp.float32)
    add = jax.jit(lambda x: x + 1.0)
    add(x).block_until_ready()
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        add(x).block_until_ready()
        best = max(best, 2 * x.nbytes / (time.perf_counter() - started))
    return best


def attention(config: Config, rows: int, length: int) -> dict[str, float]:
    """FLOPs of the CPU kernel's two calls, forward and backward, for one layer."""
    pairs = rows * config.num_heads * length * (length + 1) / 2
    return {"attend": 4 * config.head_dim * pairs, "attend_back": 10 * config.head_dim * pairs}


def measured(program: Any, state: Any, batch: Batch) -> float:
    """Seconds of a step, the median of several."""
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        state, means = program(state, batch)
        float(means["loss"])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def one(dial: int, rows: int, length: int) -> dict[str, Any]:
    """A size: planned and measured."""
    config = nano(dial, 4096).replace(context=length)
    rule = optimizer(OptimizerSettings(), 100)
    state = init_state(unstack(init(config, jax.random.key(0))), rule, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 4096, (rows, length + 1)).astype(np.int32)
    places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    batch = Batch(ids[:, :-1], ids[:, 1:], np.ones((rows, length), np.float32), places, np.zeros_like(places))
    step = make_step(language_loss(config, head=Head(256)), rule)
    program = compile_lean(step.lower(state, batch))
    limits = Limits(peak_flops(), memory_rate())
    read = read_program(program.as_text())
    costs = Costs(read)
    kernels, calls = {}, attention(config, rows, length)
    for instruction, _ in read.instructions("custom-call"):
        target = instruction.quoted("custom_call_target") or ""
        if "attend" in target:
            kernels[instruction.name] = calls["attend_back" if "back" in target or "grad" in target else "attend"]
    planned = step_time(read, costs, limits, [], kernels)
    done = costs.flops[read.entry] + sum(kernels.values())
    clock = measured(program, state, batch)
    used = program.memory_analysis()
    return {
        "dial": dial, "rows": rows, "length": length, "planned": planned.total, "measured": clock, "ratio": planned.total / clock,
        "compute": planned.compute, "memory": planned.memory, "flops": done, "model_flops": train_flops(config, length) * rows * length,
        "peak": limits.flops, "rate": limits.bytes, "temporary": used.temp_size_in_bytes,
    }  # fmt: skip


def main() -> None:
    """Print and keep."""
    found = [one(*size) for size in SIZES]
    for line in found:
        print(
            f"dial {line['dial']}, {line['rows']} x {line['length']}: planned {line['planned']:.3f} s, measured {line['measured']:.3f} s, "
            f"ratio {line['ratio']:.2f}; FLOPs {line['flops'] / line['model_flops']:.3f} of the model's"
        )
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
