"""transformers training a Gemma: run by training.py, in an environment that has torch.

    PEERS/bin/python benchmarks/training_peer.py TASK

TASK is a JSON file: `config` (of transformers' GemmaConfig), `compile`, `threads`, `rule` (AdamW's), `tokens` (an .npy of
[steps, B, T + 1]) and for comparable losses `model` (a Hugging Face directory to begin with). Then each line on stdin, a
number, takes so many steps and answers with a line of JSON: seconds, losses, peak resident bytes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    torch.set_num_threads(task["threads"])
    config = transformers.GemmaConfig(**task["config"])
    if "model" in task:
        model = transformers.GemmaForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    else:
        model = transformers.GemmaForCausalLM(config)
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    rule, decay = task["rule"], task["decay"]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}], fused=True, **rule
    )
    tokens = np.load(task["tokens"])

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    loss_of = torch.compile(loss_of) if task["compile"] else loss_of
    step = 0
    print(json.dumps({"version": f"transformers {transformers.__version__}, torch {torch.__version__}"}), flush=True)
    for line in sys.stdin:
        losses, started = [], time.perf_counter()
        for _ in range(int(line)):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(torch.from_numpy(tokens[step % len(tokens)].astype(np.int64)))
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
            step += 1
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
