"""The whole life of a recipe over several seeds: what each stage came to on held-out tasks, means and spread.

    python benchmarks/life.py [--recipe runs/nano.toml] [--seeds 3] [--out out/lives] [--json OUT]

Each life is a `gemmary run` in a process of its own. Seeds are of all runs: initial weights, orders, samples; the lessons, and
which of their facts are held out, are the same. A life that is there already is read, not lived again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def live(recipe: Path, seed: int, folder: Path) -> dict[str, Any]:
    """One life's figures."""
    started = time.perf_counter()
    if not (folder / "report.html").is_file():
        command = [str(Path(sys.executable).with_name("gemmary")), "run", str(recipe)]
        subprocess.run([*command, "--set", f"seed={seed}", "--out", str(folder)], check=True)
    seconds = time.perf_counter() - started
    tasks = json.loads((folder / "evaluate" / "results.json").read_text())["models"]
    pairs = json.loads((folder / "reward" / "stage.json").read_text())["results"]["held_out_pairs"]
    watched = json.loads((folder / "rlhf" / "stage.json").read_text())["results"]["before"]["watched"]
    return {
        "seed": seed,
        "seconds": seconds,
        "success": {
            model: {how: {task: one["success"] for task, one in found["tasks"].items()} for how, found in hows.items()}
            for model, hows in tasks.items()
        },
        "reward_accuracy": pairs["accuracy"],
        "reward_interval": pairs["interval"],
        "watched_before": watched["success"],
    }


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in points."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * deviation:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path("runs/nano.toml"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/lives"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lives = [live(arguments.recipe, seed, arguments.out / str(seed)) for seed in range(arguments.seeds)]
    models = list(lives[0]["success"])
    table = Table("held-out task", *models, "RLHF - SFT", title=f"answers that are right, %, over {len(lives)} seeds")
    for how in ("greedy", "sampled"):
        table.add_section()
        for task in lives[0]["success"]["sft"][how]:
            by_model = {m: [one["success"][m][how][task] for one in lives] for m in models}
            gain = [b - a for a, b in zip(by_model["sft"], by_model["rlhf"], strict=True)]
            name = "mean of tasks" if task == "all" else task
            table.add_row(f"{name}, {how}", *(spread(by_model[m]) for m in models), spread(gain))
    console = Console(width=120)
    console.print(table)
    console.print(f"reward model on held-out pairs: {spread([one['reward_accuracy'] for one in lives])} %")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    took = [one["seconds"] for one in lives]
    console.print(f"a life took {statistics.mean(took) / 60:.1f} minutes, the largest process {peak:.2f} GB")
    if arguments.json:
        found = {"cores": os.cpu_count(), "peak_gb": peak, "lives": lives}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
