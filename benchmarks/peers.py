"""transformers and llama.cpp on the sample weights: run by the other benchmarks, in an environment that has both.

    PEERS/bin/python benchmarks/peers.py PEER TASK OUT

PEER is transformers or llama; TASK a JSON file of {"model": path, "what": …} with what that needs; OUT is written.
The model is a GGUF, or for transformers also a Hugging Face directory.
`greedy`: prompts as ids -> ids. `nll`: windows of ids -> nats per token, each window alone. `logits`: windows of ids ->
an .npy of them all, transformers only. `speed`: seconds of prefill and per decoded token, medians.
transformers runs in float32 on the dequantized weights, llama.cpp on the file's own types; both with two threads.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2


class Transformers:
    """The model in transformers, float32."""

    def __init__(self, model: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(THREADS)
        self.torch = torch
        path = Path(model)
        where = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            where[0], **where[1], dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Exactly `count` tokens; an end is a token like any other."""
        ids, cache, out = self.torch.tensor([prompt]), None, []
        with self.torch.inference_mode():
            for _ in range(count):
                answer = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = answer.past_key_values
                ids = answer.logits[:, -1:].argmax(-1)
                out.append(int(ids))
        return out

    def logits(self, ids: list[int]) -> np.ndarray:
        """[T, V] of a window."""
        with self.torch.inference_mode():
            return np.asarray(self.model(self.torch.tensor([ids])).logits[0].numpy())

    def nll(self, ids: list[int]) -> list[float]:
        """Nats of every token but the first."""
        return _nats(self.logits(ids), ids)

    def speed(self, prompt: list[int], count: int) -> tuple[float, float]:
        """Seconds of prefill, and per token after the first."""
        with self.torch.inference_mode():
            started = time.perf_counter()
            answer = self.model(self.torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            prefill = time.perf_counter() - started
            started = time.perf_counter()
            for _ in range(count):
                answer = self.model(
                    answer.logits[:, -1:].argmax(-1), past_key_values=answer.past_key_values, use_cache=True
                )
            return prefill, (time.perf_counter() - started) / count


class LlamaCpp:
    """The model in llama.cpp."""

    def __init__(self, model: str, all_logits: bool = True) -> None:
        import llama_cpp

        self.model = llama_cpp.Llama(
            model,
            n_ctx=2048,
            n_batch=512,
            n_threads=THREADS,
            n_threads_batch=THREADS,
            logits_all=all_logits,
            verbose=False,
        )
        self.version = f"llama-cpp-python {llama_cpp.__version__}"

    def _last(self) -> int:
        return int(np.argmax(self.model.scores[self.model.n_tokens - 1]))

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Exactly `count` tokens."""
        self.model.reset()
        self.model.eval(prompt)
        out = [self._last()]
        while len(out) < count:
            self.model.eval([out[-1]])
            out.append(self._last())
        return out

    def nll(self, ids: list[int]) -> list[float]:
        """Nats of every token but the first."""
        self.model.reset()
        self.model.eval(ids)
        return _nats(np.asarray(self.model.scores[: len(ids)]), ids)

    def speed(self, prompt: list[int], count: int) -> tuple[float, float]:
        """Seconds of prefill, and per token after the first."""
        self.model.reset()
        started = time.perf_counter()
        self.model.eval(prompt)
        prefill = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(count):
            self.model.eval(prompt[-1:])  # which token it is does not change the work
        return prefill, (time.perf_counter() - started) / count


def _nats(logits: np.ndarray, ids: list[int]) -> list[float]:
    out = []
    for row, target in zip(logits, ids[1:], strict=False):
        wide = row.astype(np.float64)
        peak = wide.max()
        out.append(float(peak + np.log(np.exp(wide - peak).sum()) - wide[target]))
    return out


def main() -> None:
    """Do one task."""
    peer, task, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    model = task["model"]
    runner: Any = Transformers(model) if peer == "transformers" else LlamaCpp(model, task["what"] != "speed")
    if task["what"] == "logits":
        windows = [runner.logits(ids) for ids in task["windows"]]
        np.save(out, np.concatenate(windows))
        return
    if task["what"] == "greedy":
        result: Any = [runner.greedy(prompt, task["count"]) for prompt in task["prompts"]]
    elif task["what"] == "nll":
        result = [value for ids in task["windows"] for value in runner.nll(ids)]
    else:
        runner.speed(task["prompt"], 2)
        runs = [runner.speed(task["prompt"], task["count"]) for _ in range(task["repeats"])]
        result = {
            "prefill_seconds": statistics.median(r[0] for r in runs),
            "decode_seconds": statistics.median(r[1] for r in runs),
        }
    out.write_text(json.dumps({"version": runner.version, "result": result}))


if __name__ == "__main__":
    main()
