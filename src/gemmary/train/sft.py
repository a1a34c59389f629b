"""Supervised fine-tuning: the next token of what the model says and of `<end_of_turn>`, in whole conversations packed into rows.

The held-out loss is taken before the first step, every so many, and after the last; the parameters of the best are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemmary.adapters import join
from gemmary.config import Config
from gemmary.data.packing import Batch, stacked
from gemmary.data.tokens import Tokens
from gemmary.data.turns import PackedDialogues, lay_out, pack
from gemmary.mesh import using
from gemmary.params import Params
from gemmary.text.tokenizer import Tokenizer
from gemmary.train.finetune import Learner, TuneSettings, learner, tune
from gemmary.train.head import Head
from gemmary.train.loop import Report
from gemmary.train.losses import packed_loss
from gemmary.train.meshed import fed, rows_of_a_device
from gemmary.train.objectives import language_loss
from gemmary.train.run import Ended, Say
from gemmary.train.step import TrainState

__all__ = ["held_out_loss", "sft"]


def sft(
    settings: TuneSettings,
    config: Config,
    params: Params,
    tokenizer: Tokenizer,
    sources: Mapping[str, Tokens],
    held_out: Mapping[str, Tokens],
    folder: Path,
    *,
    weights: Mapping[str, float],
    seed: int = 0,
    base: str = "",
    digest: str = "",
    mesh: Mesh | None = None,
    report: Report = lambda entry: None,
    say: Say = lambda line: None,
) -> Ended:
    """Run, or go on. Sources are conversations (`write_dialogues`), by name; `weights` say how often each is gone through.

    Raises GemmaryError as `learner` and `run` do, and for a conversation longer than a row.
    """
    pupil = learner(settings, config, params, tokenizer, seed=seed, base=base, mesh=mesh)
    packed = {
        name: PackedDialogues(tokens, name, length=settings.length, seed=seed, pad=tokenizer.pad)
        for name, tokens in sources.items()
        if weights[name] > 0
    }
    head = settings.head(config, rows=rows_of_a_device(pupil.mesh, settings.batch // settings.accumulate))
    loss = language_loss(config, head=head, dtype=jnp.dtype(settings.dtype), remat=settings.remat)

    def evaluate(state: TrainState) -> dict[str, Any]:
        found = held_out_loss(pupil, state.params, held_out, settings)
        return {"held_out_loss": found} if found else {}

    return tune(
        "sft", settings, pupil, packed, {name: tokens.digest for name, tokens in sources.items()}, loss, folder,
        weights=weights, seed=seed, start=digest, evaluate=evaluate,
        value=(lambda found: found["held_out_loss"]["all"]) if held_out else None, report=report, say=say,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("config", "head", "dtype"))
def _nats(learnt: Params, rest: Params | None, batch: Batch, config: Config, head: Head, dtype: Any) -> jax.Array:
    return packed_loss(join(learnt, rest), config, batch, head, dtype=dtype)[1]


def held_out_loss(
    pupil: Learner, learnt: Params, held_out: Mapping[str, Tokens], settings: TuneSettings
) -> dict[str, float]:
    """Mean nats for each token that is learnt, of every source and of all; every conversation once."""
    nats, counts = dict[str, float](), dict[str, float]()
    rows = min(settings.batch, 4)
    head = settings.head(pupil.config, rows=rows)
    for name, tokens in held_out.items():
        for batch in _in_rows(tokens, settings.length, rows, pupil.tokenizer.pad):
            with using(pupil.mesh):
                given = fed(pupil.mesh, batch, rows)
                found = _nats(learnt, pupil.rest, given, pupil.config, head, jnp.dtype(settings.dtype))
            nats[name] = nats.get(name, 0.0) + float(found)
            counts[name] = counts.get(name, 0.0) + float(batch.mask.sum())
    if not counts:
        return {}
    return {"all": sum(nats.values()) / sum(counts.values()), **{name: nats[name] / counts[name] for name in nats}}


def _in_rows(tokens: Tokens, length: int, rows: int, pad: int) -> Any:
    packed = pack(tokens.lengths.tolist(), length)
    packed += [[]] * (-len(packed) % rows)
    made = [lay_out([(tokens[i], tokens.learnt(i)) for i in row], length, pad) for row in packed]  # type: ignore[misc]
    return (stacked(made[at : at + rows]) for at in range(0, len(made), rows))
