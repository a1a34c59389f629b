"""What the stages after pre-training share: settings, what of a model is learnt (all of it, or adapters), and the compiled step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemmary.adapters import PROJECTIONS, adapt, join, merge, split
from gemmary.checkpoints.checkpoint import config_to_json
from gemmary.config import Config
from gemmary.data.batches import row_batches
from gemmary.data.packing import stacked
from gemmary.data.tokens import tokenizer_digest
from gemmary.data.turns import Rows
from gemmary.errors import GemmaryError, check_bounds
from gemmary.mesh import platform, using
from gemmary.model.transformer import Remat
from gemmary.params import Params, is_stacked, stack, undivided
from gemmary.quantization import quantize_weight
from gemmary.text.tokenizer import Tokenizer
from gemmary.train.endurance import Watched
from gemmary.train.head import Head, chunk_size
from gemmary.train.loop import Hook, LoopSettings, Report
from gemmary.train.memory import compile_lean
from gemmary.train.meshed import check_rows, fed, forms, local, made, on_host, placed, rows_here
from gemmary.train.model_files import AdapterFiles, ModelFiles, NativeFiles
from gemmary.train.optimizer import OptimizerSettings, learning_rate, optimizer
from gemmary.train.run import Ended, Say, keep_best, run
from gemmary.train.step import Loss, Step, TrainState, init_state, make_step
from gemmary.weights import Int4, Int8, dequantize, map_rows

__all__ = ["Learner", "LoraSettings", "TuneSettings", "compiled", "describe", "learner", "tune"]


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters instead of the whole model."""

    rank: int = 16
    alpha: float | None = None
    """The update is scaled by alpha / rank; by default 1."""
    targets: tuple[str, ...] = PROJECTIONS
    base_bits: Literal[8, 32] = 32
    """8: the model beneath is kept as Int8."""

    def __post_init__(self) -> None:
        check_bounds(self, "lora.", rank=(1, 4096))
        wrong = [name for name in self.targets if name not in PROJECTIONS]
        if wrong or not self.targets:
            raise GemmaryError(f"lora.targets: {', '.join(wrong) or 'none'}; they are among {', '.join(PROJECTIONS)}")


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """A run of tuning. A batch is `batch` rows of `length` tokens, filled with whole conversations."""

    steps: int | None = None
    epochs: float | None = None
    """Either steps, or times through the data."""
    length: int = 512
    batch: int = 8
    accumulate: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(learning_rate=1e-4, weight_decay=0.0)
    )
    lora: LoraSettings | None = None
    log_every: int = 10
    save_every: int = 100
    keep: int = 2
    spike: float = 5.0
    evaluate_every: int = 50
    tensorboard: bool = False
    watch: Watched = field(default_factory=Watched)

    def __post_init__(self) -> None:
        one, zero = (1, None), (0, None)
        check_bounds(
            self, length=(2, None), batch=one, accumulate=one, log_every=one, keep=one, save_every=zero, evaluate_every=zero,
            spike=zero,
        )  # fmt: skip
        if (self.steps is None) == (self.epochs is None) or not (self.steps or self.epochs or 0) > 0:
            raise GemmaryError("give either steps, at least 1, or epochs, above 0")
        if self.batch % self.accumulate:
            raise GemmaryError(f"batch is {self.batch}, which {self.accumulate} equal parts (accumulate) do not divide")

    def total(self, rows: float) -> int:
        """Steps, where an epoch has so many rows."""
        return self.steps or max(1, math.ceil((self.epochs or 1) * rows / self.batch))

    def decisive(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        bystanders = {"log_every", "save_every", "keep", "tensorboard", "watch"}
        return {name: value for name, value in asdict(self).items() if name not in bystanders}

    def loop(self, steps: int) -> LoopSettings:
        """For `fit`."""
        return LoopSettings(
            steps=steps, log_every=self.log_every, save_every=self.save_every, keep=self.keep, spike=self.spike,
            tensorboard=self.tensorboard, watch=self.watch,
        )  # fmt: skip

    def head(self, config: Config, *, rows: int | None = None) -> Head:
        """How logits are made: what a CPU's cache is good for, or an accelerator's memory."""
        most = 1 << 24 if platform() == "cpu" else 1 << 29
        chunk = chunk_size(rows or self.batch // self.accumulate, config.vocab_size, most)
        return Head(chunk, config.final_softcap, sparse=True)


@dataclass(frozen=True)
class Learner:
    """What is learnt of a model, what is not (None: all is learnt), and how the former lies on disk."""

    config: Config
    learnt: Params
    rest: Params | None
    files: ModelFiles
    tokenizer: Tokenizer
    mesh: Mesh | None = None

    def whole(self, learnt: Params) -> Params:
        """The model with this learnt, on this process's first device: to answer with. All processes call it alike."""
        return join(local(self.mesh, learnt), None if self.rest is None else local(self.mesh, self.rest))

    def identity(self, **more: Any) -> dict[str, Any]:
        """What a run of it was begun with."""
        return {"model": config_to_json(self.config), "tokenizer": tokenizer_digest(self.tokenizer), **more}


def learner(
    settings: TuneSettings,
    config: Config,
    params: Params,
    tokenizer: Tokenizer,
    *,
    seed: int,
    base: str,
    score: bool = False,
    mesh: Mesh | None = None,
) -> Learner:
    """The whole model in fp32, or adapters over it as `settings.lora` says; `base` names the model for those who load adapters.

    On a mesh its parts lie where the mesh stores them. With `score` the model has a reward model's head, and that is learnt in any case. Raises GemmaryError where the tokenizer
    is larger than the model, and for rows that are longer than its context.
    """
    if tokenizer.size > config.num_tokens:
        raise GemmaryError(f"the tokenizer has {tokenizer.size} pieces and the model takes {config.num_tokens}")
    if settings.length > config.context:
        raise GemmaryError(f"length is {settings.length} and the model's context is {config.context}")
    if score and not config.score_head:
        config = config.replace(score_head=True)
        params = {**params, "score": jnp.zeros(config.embed_dim, jnp.float32)}
    lora = settings.lora
    if lora is None:  # copied: a step takes the memory of what it changes
        with on_host(mesh):
            whole = map_rows(merge(params), lambda name, w: jnp.array(dequantize(w), jnp.float32), lambda spec: True)
        return Learner(config, placed(mesh, whole), None, NativeFiles(config, tokenizer), tokenizer, mesh)
    with on_host(mesh):
        learnt, rest = _adapters(lora, params, seed)
    return Learner(config, placed(mesh, learnt), placed(mesh, rest), AdapterFiles(config, base), tokenizer, mesh)


def _adapters(lora: LoraSettings, params: Params, seed: int) -> tuple[Params, Params]:
    """Those of these settings, and what they go over."""
    under = map_rows(params, _as_int8, lambda spec: bool(spec.reads)) if lora.base_bits == 8 else params
    if lora.base_bits == 8 and not is_stacked(under):
        # Scanned also on a CPU: of layers one after the other, XLA would keep every matrix in fp32 until the backward pass.
        under = stack(under)
    adapted = adapt(under, jax.random.key(seed), lora.rank, alpha=lora.alpha, targets=lora.targets)
    learnt, rest = split(adapted, also=("score",))
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), learnt), rest  # a copy: a step takes its state's memory


def _as_int8(name: str, w: Any) -> Any:
    return w if isinstance(w, Int8 | Int4) else quantize_weight(name, w, 8)


def compiled(step: Any, learner: Learner, state: TrainState, batch: Any, say: Say) -> Step:
    """The step for batches of that form, ready to run."""
    started = time.perf_counter()
    rows = len(jax.tree.leaves(batch)[0])
    with using(learner.mesh):
        program = compile_lean(step.lower(state, forms(learner.mesh, batch, rows), learner.rest))
    say(f"compiled in {time.perf_counter() - started:.0f} s")
    return lambda state, batch: program(state, batch, learner.rest)


def describe(
    settings: TuneSettings, steps: int, tokens: int, *, shares: Callable[[], Mapping[str, float]]
) -> Callable[[dict[str, float], float, int], dict[str, Any]]:
    """What a journal entry says: the means, pace in slots of rows, and shares of sources. `tokens` are a step's slots."""
    rate = learning_rate(settings.optimizer, steps)

    def entry(means: dict[str, float], seconds: float, step: int) -> dict[str, Any]:
        found = {name: value for name, value in means.items() if name != "weight"}
        return {
            **found,
            "learning_rate": settings.optimizer.learning_rate * float(rate(step - 1)),
            "tokens": step * tokens,
            "total_steps": steps,
            "tokens_per_second": tokens / seconds,
            "eta_seconds": (steps - step) * seconds,
            "shares": dict(shares()),
        }

    return entry


def tune(
    stage: str,
    settings: TuneSettings,
    pupil: Learner,
    packed: Mapping[str, Rows],
    digests: Mapping[str, Any],
    loss: Loss,
    folder: Path,
    *,
    weights: Mapping[str, float],
    seed: int,
    start: str,
    evaluate: Callable[[TrainState], dict[str, Any]],
    value: Callable[[dict[str, Any]], float] | None,
    prepared: Callable[[Any], Any] = lambda batch: batch,
    report: Report,
    say: Say,
) -> Ended:
    """A run over packed rows, or on from its newest checkpoint.

    `evaluate` is asked before the first step, every so many and after the last; the parameters of its least `value` are kept,
    where there is one. `prepared` makes of rows what the loss takes. `digests` are of each source, `start` of the model.
    """
    mesh = pupil.mesh
    check_rows(stage, settings.batch, settings.accumulate, mesh)
    for line in undivided(pupil.config, mesh):
        say(line)
    steps = settings.total(sum(rows.rows * weights[name] for name, rows in packed.items()))
    here = rows_here(mesh, settings.batch)
    order = {f"source {name}": digests[name] for name in packed}
    batches = row_batches(
        packed, weights, order, length=settings.length, batch=settings.batch, steps=steps, seed=seed, rows=here
    )
    rule = optimizer(settings.optimizer, steps)
    step = make_step(loss, rule, accumulate=settings.accumulate, mesh=mesh)
    example = stacked([next(iter(packed.values()))[0]] * settings.batch)

    def ready(batch: Any, rows: list[int] | None) -> Any:
        with using(mesh):
            return prepared(fed(mesh, batch, settings.batch, rows))

    def program(state: TrainState) -> Step:
        update = compiled(step, pupil, state, ready(example, None), say)
        return lambda state, batch: update(state, ready(batch, here))

    def begun(params: Params) -> TrainState:
        return init_state(params, rule, jax.random.key(seed))

    watch = Hook(settings.evaluate_every, evaluate)
    kept = keep_best(watch, folder, pupil.files, value) if value else watch
    return run(
        folder, made(mesh, begun, pupil.learnt), batches, program, files=pupil.files,
        identity=pupil.identity(seed=seed, start=start, **{stage: settings.decisive()}), settings=settings.loop(steps),
        describe=describe(settings, steps, settings.batch * settings.length, shares=batches.shares), before=evaluate,
        hooks=[kept], report=report, say=say,
    )  # fmt: skip
