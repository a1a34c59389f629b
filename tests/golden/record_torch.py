"""Records a small file of `torch.save`: parameters, views, an int8 tensor, a nested state dict.

    pip install torch && python tests/golden/record_torch.py

Writes tests/golden/torch_small.ckpt; the values are said again in tests/test_torch_file.py. Recorded with torch 2.13.
"""

from __future__ import annotations

from pathlib import Path

import torch


def main() -> None:
    """Save the file."""
    base = torch.arange(12, dtype=torch.float32)
    state = torch.nn.ModuleDict({"layer": torch.nn.Linear(3, 2)}).state_dict()
    state["layer.weight"] = torch.nn.Parameter(base[:6].reshape(2, 3).clone())
    state["view"] = base.reshape(3, 4)[1:].T
    state["same_storage"] = base
    state["bf16"] = torch.tensor([[0.5, -3.0]], dtype=torch.bfloat16)
    state["rows"] = torch.tensor([[1, -128], [127, 0]], dtype=torch.int8)
    state["empty"] = torch.zeros((0, 4))
    state["scalar"] = torch.tensor(7, dtype=torch.int64)
    state["turns"] = torch.tensor([1 + 2j], dtype=torch.complex64)
    state.pop("layer.bias")
    torch.save({"model_state_dict": state, "step": 3, "args": None}, Path(__file__).parent / "torch_small.ckpt")


if __name__ == "__main__":
    main()
