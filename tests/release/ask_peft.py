"""PEFT over a model on disk: run by test_adapter_release.py, in an environment that has torch, transformers and peft.

    PEERS/bin/python tests/release/ask_peft.py TASK OUT

TASK is a JSON file of {"model": path, "adapter": path, "ids": ids}, and OUT an .npy that is written: logits [T, V], or [1] of
an adapter of a reward model. With "settings", keywords of peft.LoraConfig, a random adapter is made and saved first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers


def main() -> None:
    """Do one task."""
    task, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    settings = task.get("settings") or json.loads((Path(task["adapter"]) / "adapter_config.json").read_text())
    if settings["task_type"] == "SEQ_CLS":
        kind, options = transformers.AutoModelForSequenceClassification, {"num_labels": 1}
    else:
        kind, options = transformers.AutoModelForCausalLM, {}
    torch.manual_seed(0)

    def base() -> transformers.PreTrainedModel:
        return kind.from_pretrained(task["model"], dtype=torch.float32, attn_implementation="eager", **options)

    if "settings" in task:
        made = peft.get_peft_model(base(), peft.LoraConfig(**settings))
        for parameter in made.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        made.save_pretrained(task["adapter"])
    model = peft.PeftModel.from_pretrained(base(), task["adapter"]).eval()
    with torch.inference_mode():
        np.save(out, model(torch.tensor([task["ids"]])).logits[0].numpy())


if __name__ == "__main__":
    main()
