"""What the tests of tuning begin from: a tokenizer of few words, a small model, and conversations, pairs and prompts in them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemmary.checkpoints.native import NativeWriter
from gemmary.config import Config
from gemmary.data.tokens import Tokens, write_dialogues
from gemmary.params import Params, init, layered_names, unstack
from gemmary.presets import nano
from gemmary.text import Tokenizer
from gemmary.text.dialogue import Dialogue, encode_dialogue
from gemmary.text.training import TokenizerSettings, train_tokenizer
from gemmary.train.optimizer import OptimizerSettings
from gemmary.train.reward import Pairs
from gemmary.train.rollouts import Prompt

COLOURS = ("red", "blue", "green", "black", "white", "grey")
THINGS = ("hats", "boats", "doors", "birds")
LENGTH = 48


@functools.cache
def tokenizer() -> Tokenizer:
    """Every word in these tests is one piece or two."""
    words = [*COLOURS, *THINGS, "paint", "say", "user", "model"]
    text = "\n".join(f"{a} {b} {c}" for a in words for b in words for c in words)
    return train_tokenizer([text], TokenizerSettings(vocab_size=584, threads=1))


@functools.cache
def config() -> Config:
    return nano(1, tokenizer().size).replace(num_layers=2, embed_dim=32, ffw_dim=64, head_dim=16, context=LENGTH)


def params(seed: int = 0) -> Params:
    """Random weights."""
    return unstack(init(config(), jax.random.key(seed)))


def saved(folder: Path, weights: Params, of: Config | None = None) -> Path:
    """The model as a native checkpoint."""
    folder.mkdir(parents=True)
    writer = NativeWriter(folder, of or config(), tokenizer())
    rows = layered_names(of or config())
    writer.write({
        (name, i): jax.tree.map(np.asarray, weights[name][i] if isinstance(weights[name], tuple) else weights[name])
        for name, i in rows
    })  # fmt: skip
    writer.close()
    return folder


def dialogue(*turns: str) -> Dialogue:
    """A conversation, the user's turn first."""
    roles = ["user", "model"] * len(turns)
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return encode_dialogue(tokenizer(), messages, generation=1, open_turn=len(turns) % 2 == 1)


def ended(*turns: str) -> Dialogue:
    """The same up to the mark that ends the model's last turn, as it is learnt from: the newline behind is never generated."""
    whole = dialogue(*turns)
    end = max(i for i, learnt in enumerate(whole.loss_mask) if learnt) + 1
    return Dialogue(whole.ids[:end], whole.loss_mask[:end])


def said(path: Path, conversations: Iterable[Sequence[str]]) -> Tokens:
    """Conversations, tokenized."""
    write_dialogues(path, [ended(*turns) for turns in conversations], tokenizer())
    return Tokens(path)


def pairs(path: Path, preferences: Sequence[tuple[str, str, str]]) -> Pairs:
    """(asked, preferred, the other), tokenized."""
    chosen = said(path / "chosen", [(asked, better) for asked, better, _ in preferences])
    return Pairs(chosen, said(path / "rejected", [(asked, worse) for asked, _, worse in preferences]))


def prompt(asked: str, answer: str | None = None, where: str = "") -> Prompt:
    return Prompt(tuple(dialogue(asked).ids), asked, answer, where=where)


def tuned(steps: int = 30, **changes: Any) -> dict[str, Any]:
    """Settings of a short run that learns fast."""
    rate = changes.pop("learning_rate", 1e-2)
    return {
        "steps": steps, "length": LENGTH, "batch": 2, "log_every": 1, "save_every": 0, "evaluate_every": 0,
        "optimizer": OptimizerSettings(learning_rate=rate, weight_decay=0.0), **changes,
    }  # fmt: skip
