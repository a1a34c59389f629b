"""Pre-training: tokenized sources and a mixture go in, a model comes out, in one folder that can be gone on from (see `run`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemmary.checkpoints.checkpoint import config_to_json
from gemmary.config import Config
from gemmary.data.batches import Batches, mixture_batches
from gemmary.data.mixture import MixtureSettings
from gemmary.data.packing import Batch, held_out_batches
from gemmary.data.tokens import Tokens, tokenizer_digest
from gemmary.errors import GemmaryError, check_bounds
from gemmary.mesh import platform, using
from gemmary.model.transformer import Remat
from gemmary.params import count, init, undivided, unstack
from gemmary.text.tokenizer import Tokenizer
from gemmary.train.endurance import Watched
from gemmary.train.flops import peak_flops, train_flops
from gemmary.train.head import Head, chunk_size
from gemmary.train.held_out import bits_per_byte
from gemmary.train.loop import Hook, LoopSettings, Report
from gemmary.train.memory import compile_lean
from gemmary.train.meshed import check_rows, fed, forms, made, rows_here, rows_of_a_device
from gemmary.train.model_files import NativeFiles
from gemmary.train.objectives import language_loss
from gemmary.train.optimizer import OptimizerSettings, learning_rate, optimizer
from gemmary.train.run import Say, run
from gemmary.train.step import Step, TrainState, init_state, make_step

__all__ = ["PretrainSettings", "Pretrained", "pretrain"]


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """A pre-training run. A batch is `batch` rows of `length` tokens. "Every" counts steps; 0 is only at the end.

    Master weights and optimizer state are float32; `dtype` is what the step computes in.
    """

    steps: int
    length: int = 512
    batch: int = 8
    accumulate: int = 1
    """Parts that a batch is taken in, for memory; the result is the same."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    z_loss: float = 0.0
    int8: bool = False
    """The layers' products in eight bits, forward and back to the activations: for chips that do those twice as fast."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    workers: int = 0
    """Processes that make batches ahead; 0: a thread, which is enough nearly always."""
    log_every: int = 10
    save_every: int = 200
    keep: int = 2
    spike: float = 3.0
    evaluate_every: int = 0
    sample_every: int = 0
    prompt: tuple[str, ...] = ()
    """What samples continue."""
    sample_tokens: int = 48
    tensorboard: bool = False
    watch: Watched = field(default_factory=Watched)

    def __post_init__(self) -> None:
        one, zero = (1, None), (0, None)
        check_bounds(
            self, steps=one, length=one, batch=one, accumulate=one, log_every=one, keep=one, sample_tokens=one, workers=zero,
            save_every=zero, evaluate_every=zero, sample_every=zero, z_loss=zero, spike=zero,
        )  # fmt: skip
        if self.batch % self.accumulate:
            raise GemmaryError(f"batch is {self.batch}, which {self.accumulate} equal parts (accumulate) do not divide")

    def decisive(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        bystanders = {
            "workers", "log_every", "save_every", "keep", "evaluate_every", "sample_every", "prompt", "sample_tokens",
            "tensorboard", "watch",
        }  # fmt: skip
        return {name: value for name, value in asdict(self).items() if name not in bystanders}


@dataclass(frozen=True)
class Pretrained:
    """How a run ended: whether all its steps are done, its last checkpoint, and what there is to say of it."""

    complete: bool
    checkpoint: Path
    results: dict[str, Any]


def pretrain(
    settings: PretrainSettings,
    config: Config,
    tokenizer: Tokenizer,
    mixture: MixtureSettings,
    sources: Mapping[str, Tokens],
    held_out: Mapping[str, Tokens],
    folder: Path,
    *,
    mesh: Mesh | None = None,
    seed: int = 0,
    hooks: Sequence[Hook] = (),
    report: Report = lambda entry: None,
    say: Say = lambda line: None,
) -> Pretrained:
    """Run, or go on from the newest checkpoint that verifies. `report` gets each journal entry, `say` what else people should know.

    On a mesh the state is spread over its devices, and each process makes the rows of its own; it may be another one than before.
    Raises GemmaryError where model, tokenizer, data and mesh do not fit together, where the folder's run was begun with other
    settings or data, and where the loss is no number or leaps.
    """
    _fits(settings, config, tokenizer)
    check_rows("pretrain", settings.batch, settings.accumulate, mesh)
    for line in undivided(config, mesh):
        say(line)
    ids = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    batches = mixture_batches(
        mixture, sources, length=settings.length, batch=settings.batch, steps=settings.steps, seed=seed,
        workers=settings.workers, rows=rows_here(mesh, settings.batch), **ids,
    )  # fmt: skip
    identity = {"model": config_to_json(config), "tokenizer": tokenizer_digest(tokenizer), "seed": seed}
    identity["pretrain"] = settings.decisive()
    rule = optimizer(settings.optimizer, settings.steps)
    state = made(mesh, lambda: init_state(_first_params(config, seed), rule, jax.random.key(seed)))
    head = Head(_chunk(config, settings, mesh), config.final_softcap, settings.z_loss)
    dtype = jnp.dtype(settings.dtype)
    loss = language_loss(config, head=head, dtype=dtype, remat=settings.remat, int8=settings.int8)
    step = make_step(loss, rule, accumulate=settings.accumulate, mesh=mesh)
    evaluated = _evaluation(config, head._replace(z_loss=0.0), held_out, settings, ids, mesh)
    ended = run(
        folder, state, batches, lambda state: _compiled(step, state, settings, mesh, say), files=NativeFiles(config, tokenizer),
        identity=identity, settings=_loop(settings), describe=_describe(settings, config, batches, sources),
        hooks=[evaluated, *hooks], report=report, say=say,
    )  # fmt: skip
    checkpoint = ended.parameters.parent
    results = {
        "checkpoint": checkpoint.relative_to(folder).as_posix(), "steps": int(ended.state.step),
        "parameters": count(config).total, "padding": batches.padding(), "shares": batches.shares(),
        "epochs": batches.epochs(), **ended.last, "goodput": ended.goodput,
    }  # fmt: skip
    return Pretrained(ended.complete, checkpoint, results)


def _fits(settings: PretrainSettings, config: Config, tokenizer: Tokenizer) -> None:
    if tokenizer.size > config.num_tokens:
        raise GemmaryError(f"the tokenizer has {tokenizer.size} pieces and the model takes {config.num_tokens}")
    if settings.length > config.context:
        raise GemmaryError(f"pretrain.length is {settings.length} and the model's context is {config.context}")


def _first_params(config: Config, seed: int) -> Any:
    """Stacked for an accelerator, whose compiler scans well; unstacked for a CPU, where a scan costs half the speed."""
    params = init(config, jax.random.key(seed))
    return unstack(params) if platform() == "cpu" else params


def _chunk(config: Config, settings: PretrainSettings, mesh: Mesh | None) -> int:
    """Positions whose logits are made at once: what a CPU's cache is good for, or an accelerator's memory."""
    most = 1 << 24 if platform() == "cpu" else 1 << 29
    return chunk_size(rows_of_a_device(mesh, settings.batch // settings.accumulate), config.vocab_size, most)


def _compiled(step: Any, state: TrainState, settings: PretrainSettings, mesh: Mesh | None, say: Say) -> Step:
    ints, floats = np.zeros((1, settings.length), np.int32), np.zeros((1, settings.length), np.float32)
    started = time.perf_counter()
    with using(mesh):
        program = compile_lean(step.lower(state, forms(mesh, Batch(ints, ints, floats, ints, ints), settings.batch)))
    say(f"compiled in {time.perf_counter() - started:.0f} s")
    if mesh is None:
        return program  # type: ignore[no-any-return]
    rows = rows_here(mesh, settings.batch)
    return lambda state, batch: program(state, fed(mesh, batch, settings.batch, rows))


def _loop(settings: PretrainSettings) -> LoopSettings:
    return LoopSettings(
        steps=settings.steps,
        log_every=settings.log_every,
        save_every=settings.save_every,
        keep=settings.keep,
        spike=settings.spike,
        tensorboard=settings.tensorboard,
        watch=settings.watch,
    )


def _describe(
    settings: PretrainSettings, config: Config, batches: Batches, sources: Mapping[str, Tokens]
) -> Callable[[dict[str, float], float, int], dict[str, Any]]:
    """What a journal entry says beside the means: pace, use of the device, shares, and what a loss is in bits per byte."""
    peak, rate = peak_flops(), learning_rate(settings.optimizer, settings.steps)
    tokens, flops = settings.batch * settings.length, train_flops(config, settings.length)

    def describe(means: dict[str, float], seconds: float, step: int) -> dict[str, Any]:
        shares = batches.shares()
        # EOS is a token without bytes of its own.
        per_token = sum(s * sources[n].bytes / (sources[n].info.tokens + len(sources[n])) for n, s in shares.items())
        pace = tokens / seconds
        return {
            "loss": means["loss"],
            "bits_per_byte": means["loss"] / math.log(2) / per_token,
            "gradient_norm": means["gradient_norm"],
            "learning_rate": settings.optimizer.learning_rate * float(rate(step - 1)),
            "tokens": step * tokens,
            "total_steps": settings.steps,
            "tokens_per_second": pace,
            "mfu": pace * flops / peak,
            "eta_seconds": (settings.steps - step) * seconds,
            "shares": shares,
        }

    return describe


def _evaluation(
    config: Config,
    head: Head,
    held_out: Mapping[str, Tokens],
    settings: PretrainSettings,
    ids: dict[str, int],
    mesh: Mesh | None,
) -> Hook:
    rows = min(settings.batch, 8)
    put = partial(fed, mesh, total=rows)

    def run(state: TrainState) -> dict[str, Any]:
        sources = {
            name: (map(put, held_out_batches(tokens, length=settings.length, batch=rows, **ids)), tokens.bytes)
            for name, tokens in held_out.items()
        }
        dtype = jnp.dtype(settings.dtype)
        if not sources:
            return {}
        with using(mesh):
            return {"held_out": bits_per_byte(state.params, config, sources, head=head, dtype=dtype)}

    return Hook(settings.evaluate_every, run)
