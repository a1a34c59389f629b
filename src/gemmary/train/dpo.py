"""Direct preference optimization: the policy learns from pairs at once, with no reward model and no samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemmary.adapters import join
from gemmary.config import Config
from gemmary.data.packing import Batch, stacked
from gemmary.data.turns import PairBatch
from gemmary.errors import check_bounds
from gemmary.mesh import using
from gemmary.params import Params
from gemmary.text.tokenizer import Tokenizer
from gemmary.train.finetune import TuneSettings, learner, tune
from gemmary.train.head import Head
from gemmary.train.loop import Report
from gemmary.train.meshed import fed, host
from gemmary.train.objectives import dpo_loss, sequence_log_probs
from gemmary.train.reward import Pairs, judged, margins, packed_pairs, pair_digests
from gemmary.train.run import Ended, Say
from gemmary.train.step import TrainState

__all__ = ["DpoSettings", "dpo"]


@dataclass(frozen=True, kw_only=True)
class DpoSettings(TuneSettings):
    """A run on pairs."""

    beta: float = 0.1
    """How strongly the policy is held to the model it began from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, "dpo.", beta=(0, 1e3))


@partial(jax.jit, static_argnames=("config", "head", "dtype"))
def _log_probs(params: Params, batch: PairBatch, config: Config, head: Head, dtype: Any) -> jax.Array:
    return sequence_log_probs(params, config, Batch(*batch[:5]), head, dtype=dtype)


def dpo(
    settings: DpoSettings,
    config: Config,
    params: Params,
    tokenizer: Tokenizer,
    sources: Mapping[str, Pairs],
    held_out: Mapping[str, Pairs],
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
    """Run, or go on; the parameters of the least held-out loss are kept. Raises GemmaryError as `sft` does."""
    pupil = learner(settings, config, params, tokenizer, seed=seed, base=base, mesh=mesh)
    reference = join(jax.tree.map(jnp.array, pupil.learnt), pupil.rest)
    head, dtype = settings.head(config), jnp.dtype(settings.dtype)
    log_probs = partial(_log_probs, config=config, head=head, dtype=dtype)
    unseen = packed_pairs(held_out, dict.fromkeys(held_out, 1.0), settings, seed, tokenizer).values()

    def evaluate(state: TrainState) -> dict[str, Any]:
        policy = join(state.params, pupil.rest)

        def beyond(batch: PairBatch) -> list[float]:
            with using(mesh):
                given = fed(mesh, batch, 1)
                return margins(host(log_probs(policy, given) - log_probs(reference, given)), batch.partner)

        found = [
            margin for rows in unseen for items in rows.in_order() for margin in beyond(stacked([rows.row(items)]))
        ]  # fmt: skip
        return {"held_out_pairs": judged(settings.beta * np.array(found))} if found else {}

    return tune(
        "dpo", settings, pupil, packed_pairs(sources, weights, settings, seed, tokenizer), pair_digests(sources),
        dpo_loss(config, beta=settings.beta, head=head, dtype=dtype, remat=settings.remat), folder, weights=weights, seed=seed,
        start=digest, evaluate=evaluate, value=(lambda found: found["held_out_pairs"]["loss"]) if held_out else None,
        prepared=lambda batch: (batch, log_probs(reference, batch)), report=report, say=say,
    )  # fmt: skip
