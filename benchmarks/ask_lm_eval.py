"""lm-eval's own `hf` model, asked as benchmarks/evaluation.py asks ours: run there by the peers' Python. JSON in as its argument, JSON out."""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any


def main() -> None:
    """{"model", "data", "tasks", "limit", "batch"} to {task: {"seconds", "scores": [[[log-probability, greedy], …] of each question]}}."""
    asked = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    import datasets
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    plain = datasets.load_dataset
    with tempfile.TemporaryDirectory() as cache:

        def load(path: str, name: str | None = None, **options: Any) -> Any:
            return plain(str(Path(asked["data"]) / path), name, **{**options, "cache_dir": cache})

        datasets.load_dataset = load
        lm = HFLM(
            pretrained=asked["model"], dtype="float32", device="cpu", batch_size=asked["batch"], add_bos_token=True
        )
        found: dict[str, Any] = {"threads": torch.get_num_threads(), "tasks": {}}
        tasks = TaskManager()
        for name in asked["tasks"]:
            loaded = tasks.load([name])
            for task in loaded["tasks"].values():
                task.set_config("num_fewshot", 0)
                task.set_fewshot_seed(1234)
            started = time.perf_counter()
            samples = evaluate(lm, loaded, limit=asked["limit"], bootstrap_iters=0, log_samples=True)["samples"]
            seconds = time.perf_counter() - started
            scores = [[list(answer[0]) for answer in one["resps"]] for some in samples.values() for one in some]
            found["tasks"][name] = {"seconds": seconds, "scores": scores}
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
