"""Records the files that Hugging Face's PEFT saves for small adapters: every tensor's name and shape, and the settings.

    pip install torch transformers peft && python tests/golden/record_peft.py

Writes tests/golden/peft_small.json: a language model with all seven projections adapted, and a reward model with two of
them and its score. Recorded with peft 0.21 and transformers 5.24.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import transformers
from safetensors import safe_open

# As in tests/test_peft.py.
SIZES = {
    "vocab_size": 100,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "intermediate_size": 56,
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def saved(model: transformers.PreTrainedModel, **settings: Any) -> dict[str, Any]:
    """What PEFT saves for an adapter of that model."""
    model.name_or_path = "base"
    with tempfile.TemporaryDirectory() as directory:
        peft.get_peft_model(model, peft.LoraConfig(r=5, lora_alpha=10, **settings)).save_pretrained(directory)
        data = json.loads((Path(directory) / "adapter_config.json").read_text())
        data["target_modules"] = sorted(data["target_modules"])  # a set: its order changes from run to run
        with safe_open(Path(directory) / "adapter_model.safetensors", "pt") as file:
            return {"config": data, "tensors": {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}}


def main() -> None:
    """Save both."""
    config = transformers.Gemma3TextConfig(**SIZES, sliding_window=8, num_labels=1)
    recorded = {
        "language": saved(transformers.Gemma3ForCausalLM(config), task_type="CAUSAL_LM", target_modules=PROJECTIONS),
        "reward": saved(
            transformers.Gemma3TextForSequenceClassification(config),
            task_type="SEQ_CLS",
            target_modules=["q_proj", "o_proj"],
        ),
    }
    out = Path(__file__).parent / "peft_small.json"
    out.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
