"""Our harness beside lm-eval's own `hf` model: the same scores of every answer, and how long each takes.

    python benchmarks/evaluation.py --data HUB --peers .venv-peers/bin/python --json benchmarks/results/evaluation.json

HUB is a folder that mirrors data sets of the hub. Both read the sample's weights, dequantized to fp32, from one Hugging Face directory,
on the same cores, one after the other; of each task the first `--limit` questions, without examples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gemmary.checkpoints import convert, open_model

TASKS = (
    "piqa", "boolq", "winogrande", "arc_challenge", "hellaswag", "commonsense_qa", "crows_pairs_english", "bbq",
    "mmlu_professional_psychology", "agieval_aqua_rat",
)  # fmt: skip


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peers", type=Path, required=True, help="a Python that has lm_eval[hf] and torch")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument(
        "--batch", type=int, default=4, help="of the hf model: with 16 the logits of BoolQ alone take over 24 GB"
    )
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TQDM_DISABLE"):
        os.environ[name] = "1"  # before lm-eval is imported, here and there
    names = asked.tasks.split(",")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "sample"
        with open_model("sample") as checkpoint:
            convert(checkpoint, weights, "hf", dtype="float32")
        theirs = peers(asked, weights, names)
        mine = ours(asked, weights, Path(folder), names)
    lines = [compared(name, mine[name], theirs["tasks"][name]) for name in names]
    totals = {key: sum(line[key] for line in lines) for key in ("ours_seconds", "theirs_seconds", "answers")}
    found = {
        "limit": asked.limit, "batch": asked.batch, "threads": theirs["threads"], "tasks": lines, **totals,
        "ratio": totals["theirs_seconds"] / totals["ours_seconds"], "worst": max(line["worst"] for line in lines),
    }  # fmt: skip
    show(found)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def peers(asked: argparse.Namespace, weights: Path, names: list[str]) -> Any:
    """What lm-eval's hf model says, and how long it takes."""
    script = Path(__file__).parent / "ask_lm_eval.py"
    given = {
        "model": str(weights),
        "data": str(asked.data.resolve()),
        "tasks": names,
        "limit": asked.limit,
        "batch": asked.batch,
    }
    done = subprocess.run([asked.peers, script, json.dumps(given)], stdout=subprocess.PIPE, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def ours(asked: argparse.Namespace, weights: Path, folder: Path, names: list[str]) -> dict[str, Any]:
    """The same of ours. Nothing is kept between tasks, and what must be compiled is part of the time."""
    from gemmary.evaluate.lm_eval import GemmaryLM
    from gemmary.evaluate.running import Settings, known_tasks, run
    from gemmary.evaluate.suites import Benchmark

    lm = GemmaryLM(str(weights), on_progress=lambda done, total: None)
    settings = Settings(asked.data, folder / "data", limit=asked.limit)
    found = {}
    for name in names:
        started = time.perf_counter()
        done = run(lm, known_tasks(), Benchmark(name, name, 0, metric="", filter=""), settings, "no programs here")
        seconds = time.perf_counter() - started
        scores = [[list(answer[0]) for answer in record["answers"]] for record in done.records]
        found[name] = {"seconds": seconds, "scores": scores, "value": done.value, "metric": done.metric}
    return found


def compared(name: str, mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The greatest difference of a log-probability, how often one of two answers is greedy for one side only, and the best answer another."""
    differences, greedy, best, count = [0.0], 0, 0, 0
    for a, b in zip(mine["scores"], theirs["scores"], strict=True):
        for (one, one_greedy), (other, other_greedy) in zip(a, b, strict=True):
            differences.append(abs(one - other))
            greedy += one_greedy != other_greedy
            count += 1
        best += max(range(len(a)), key=lambda i, a=a: a[i][0]) != max(range(len(b)), key=lambda i, b=b: b[i][0])
    return {
        "task": name, "questions": len(mine["scores"]), "answers": count, "worst": max(differences), "greedy_differs": greedy,
        "best_differs": best, "ours": mine["value"], "metric": mine["metric"],
        "ours_seconds": mine["seconds"], "theirs_seconds": theirs["seconds"],
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """As a table."""
    columns = (
        "task",
        "questions",
        "answers",
        "greatest difference",
        "greedy differs",
        "best differs",
        "ours, s",
        "hf, s",
        "ratio",
    )
    table = Table(*columns, title=f"lm-eval with our engine and with its hf model, fp32, {found['threads']} threads")
    for line in found["tasks"]:
        ratio = line["theirs_seconds"] / line["ours_seconds"]
        table.add_row(
            line["task"], str(line["questions"]), str(line["answers"]), f"{line['worst']:.1e}", str(line["greedy_differs"]),
            str(line["best_differs"]), f"{line['ours_seconds']:.1f}", f"{line['theirs_seconds']:.1f}", f"{ratio:.2f}",
        )  # fmt: skip
    totals = f"{found['ours_seconds']:.1f}", f"{found['theirs_seconds']:.1f}", f"{found['ratio']:.2f}"
    table.add_row("all", "", str(found["answers"]), f"{found['worst']:.1e}", "", "", *totals, style="bold")
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)


if __name__ == "__main__":
    main()
