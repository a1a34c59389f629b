"""transformers and peft tuning Gemma 3 270M by LoRA: run by tuning.py, in an environment that has both.

    PEERS/bin/python benchmarks/tuning_peer.py TASK

TASK is a JSON file: `model` (a GGUF or a Hugging Face directory), `rank`, `rate`, `threads`, `compile`, and `tokens`, an .npz of
`ids`, `targets` and `mask` [steps, B, T]. Then each line on stdin, a number, takes so many steps and answers with a line of
JSON: seconds, losses, peak resident bytes.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    torch.set_num_threads(task["threads"])
    path = Path(task["model"])
    where = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    base = transformers.AutoModelForCausalLM.from_pretrained(where[0], **where[1], dtype=torch.float32)
    config = peft.LoraConfig(r=task["rank"], lora_alpha=task["rank"], target_modules=LEAVES, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    model.train()
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=task["rate"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    with np.load(task["tokens"]) as file:
        ids, targets, mask = (torch.from_numpy(file[name]) for name in ("ids", "targets", "mask"))
    labels = torch.where(mask > 0, targets, -100)

    def loss_of(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=rows, use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)

    loss_of = torch.compile(loss_of) if task["compile"] else loss_of
    versions = f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    print(json.dumps({"version": versions}), flush=True)
    step = 0
    for line in sys.stdin:
        losses, started = [], time.perf_counter()
        for _ in range(int(line)):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(ids[step % len(ids)].long(), labels[step % len(ids)].long())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimizer.step()
            losses.append(float(loss))
            step += 1
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    main()
