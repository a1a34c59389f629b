"""Records what Hugging Face transformers computes for the small models of tests/oracle.py, in float64.

    pip install torch transformers && python tests/golden/record_transformers.py

Writes tests/golden/transformers_small.npz: for each model and prompt length, the logits at the last position and at two
before it. Recorded with transformers 5 and torch 2.13.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import oracle


def peer(kind: str, spec: oracle.Spec, weights: oracle.Weights) -> transformers.PreTrainedModel:
    """The transformers model of that spec, with those weights, in float64."""
    shape = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.embed,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffw,
        "rms_norm_eps": spec.eps,
        "tie_word_embeddings": True,
        "attn_implementation": "eager",
        "max_position_embeddings": 4096,
    }
    types = ["full_attention" if window is None else "sliding_attention" for window in spec.windows]
    if kind.startswith("gemma1"):
        model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**shape))
    elif kind == "gemma2":
        config = transformers.Gemma2Config(
            **shape,
            sliding_window=8,
            layer_types=types,
            query_pre_attn_scalar=13,
            attn_logit_softcapping=spec.attn_cap,
            final_logit_softcapping=spec.final_cap,
        )
        model = transformers.Gemma2ForCausalLM(config)
    else:
        rope = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        }
        config = transformers.Gemma3TextConfig(
            **shape, sliding_window=8, layer_types=types, query_pre_attn_scalar=17, rope_parameters=rope
        )
        model = transformers.Gemma3ForCausalLM(config)
    model = model.double().eval()
    state = {name: torch.from_numpy(value).double() for name, value in weights.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


def main() -> None:
    recorded = {}
    for kind in oracle.KINDS:
        spec = oracle.small_spec(kind)
        weights = oracle.small_weights(spec)
        model = peer(kind, spec, weights)
        for length in oracle.lengths(8):
            ids = np.random.RandomState(length).randint(0, spec.vocab, length)
            with torch.no_grad():
                out = model(torch.from_numpy(ids)[None]).logits[0].numpy()
            recorded[f"{kind}/{length}"] = out[[-1, length // 2, length // 3]]
            ours = oracle.logits(spec, weights, list(ids))
            print(kind, length, "largest difference from the oracle", np.abs(ours - out).max())
    np.savez_compressed(Path(__file__).parent / "transformers_small.npz", **recorded)


if __name__ == "__main__":
    main()
