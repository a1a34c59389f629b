"""Adapters that were learnt, merged and exported: the same greedy tokens here, in transformers and in llama.cpp."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import jax.numpy as jnp
import pytest

import gemmary
from gemmary.checkpoints import convert, open_model
from gemmary.data.lessons import lessons
from gemmary.data.tokens import Tokens, write_dialogues
from gemmary.gemma import Gemma
from gemmary.text.dialogue import encode_dialogue
from gemmary.train.finetune import LoraSettings, TuneSettings
from gemmary.train.optimizer import OptimizerSettings
from gemmary.train.sft import sft

PEERS = Path(__file__).parent.parent.parent / "benchmarks" / "peers.py"
NEW = 24


def learnt(folder: Path) -> Path:
    """Adapters of the packaged Gemma 3 270M, after a few steps on lessons."""
    with open_model("sample") as checkpoint:
        config, tokenizer, params = checkpoint.config, checkpoint.own_tokenizer(), checkpoint.params(jnp.float32)
    asked = [
        [{"role": "user", "content": one.question}, {"role": "model", "content": one.answer}]
        for one in lessons("hedging", 60, 0)
    ]
    said = [encode_dialogue(tokenizer, turns, generation=3, open_turn=False) for turns in asked]
    write_dialogues(folder / "tokens", said, tokenizer)
    settings = TuneSettings(
        steps=4, length=256, batch=2, evaluate_every=0, lora=LoraSettings(rank=8),
        optimizer=OptimizerSettings(learning_rate=2e-3, schedule="constant", warmup=0, decay=0, weight_decay=0.0),
    )  # fmt: skip
    ended = sft(
        settings, config, params, tokenizer, {"hedging": Tokens(folder / "tokens")}, {}, folder / "run",
        weights={"hedging": 1.0}, base="sample",
    )  # fmt: skip
    return ended.parameters


def greedy(gemma: Gemma, prompts: list[list[int]]) -> list[list[int]]:
    """Exactly `NEW` tokens each."""
    return [[step[0].id for step in gemma.engine.generate([prompt], max_new_tokens=NEW)] for prompt in prompts]


@pytest.mark.release
def test_merged_adapters_answer_alike_everywhere(peers: str, tmp_path: Path) -> None:
    adapter = learnt(tmp_path)
    adapted = gemmary.load(adapter)
    topics = ("hedging", "arithmetic", "attribution", "refusal")
    prompts = [
        adapted.dialogue_ids([{"role": "user", "content": one.question}])
        for topic in topics
        for one in list(lessons(topic, 5, 9))[:5]
    ]
    wanted = greedy(adapted, prompts)
    assert wanted != greedy(gemmary.load("sample"), prompts)  # something was learnt
    with open_model(adapter) as checkpoint:
        convert(checkpoint, tmp_path / "hf", "hf")
        convert(checkpoint, tmp_path / "merged.gguf", "gguf")
    assert greedy(gemmary.load(tmp_path / "hf"), prompts) == wanted
    for peer, model in (("transformers", tmp_path / "hf"), ("llama", tmp_path / "merged.gguf")):
        task = {"model": str(model), "what": "greedy", "prompts": prompts, "count": NEW}
        (tmp_path / "task.json").write_text(json.dumps(task))
        command = [peers, str(PEERS), peer, str(tmp_path / "task.json"), str(tmp_path / "answer.json")]
        subprocess.run(command, check=True)
        answered = json.loads((tmp_path / "answer.json").read_text())["result"]
        alike = sum(mine == theirs for mine, theirs in zip(wanted, answered, strict=True))
        print(f"{peer}: {alike} of {len(prompts)} prompts alike")
        assert alike == len(prompts)
