"""The real step of a job, made from shapes alone: for chips that are not there, where libtpu is installed, or for a mesh without any.

libtpu compiles for any TPU slice on any machine. Without it, and for GPUs, the step is traced on an abstract mesh, which shows
that it is sound, and what it would take is left to arithmetic.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from gemmary.adapters import adapt, split
from gemmary.data.packing import Batch
from gemmary.errors import GemmaryError
from gemmary.mesh import abstract_mesh, make_mesh, rows_sharding, using
from gemmary.params import abstract, placement
from gemmary.plan.job import Job
from gemmary.plan.serving import serving_step
from gemmary.train.head import Head, chunk_size
from gemmary.train.objectives import language_loss
from gemmary.train.optimizer import OptimizerSettings, optimizer
from gemmary.train.step import init_state, make_step, state_shardings

__all__ = ["Built", "MemoryUse", "TooLargeError", "build", "can_compile", "lowered", "program_of", "traced"]

_STEPS = 1000  # of the schedule, which no number of the plan depends on
_HEAD_BYTES = 1 << 29
# What it is asked for of a compiler whose program runs long: collectives behind products wherever it can.
_OPTIONS = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
    "xla_enable_async_all_gather": "true",
}


@dataclass(frozen=True)
class MemoryUse:
    """A chip's main memory as the compiler has laid it out, in bytes."""

    arguments: int
    results: int
    shared: int
    """Of the results, what takes the place of arguments."""
    temporary: int
    peak: int
    """The most that is taken at any moment, where the compiler says; else 0."""

    @property
    def total(self) -> int:
        """What a chip must have."""
        return self.peak or self.arguments + self.results - self.shared + self.temporary


@dataclass(frozen=True)
class Built:
    """A step as it was compiled: its HLO, its memory, and how long that took."""

    text: str
    memory: MemoryUse
    seconds: float
    executable: Any
    exported: bytes
    """StableHLO, before compiling."""

    def serialized(self) -> bytes:
        """The executable, for a runtime of the same version."""
        data: bytes = self.executable.runtime_executable().serialize()
        return data


class TooLargeError(Exception):
    """The compiler says that the step does not fit; `needed` are bytes of a chip."""

    def __init__(self, needed: float) -> None:
        super().__init__(f"it needs {needed / 2**30:.1f} GiB")
        self.needed = needed


def can_compile(job: Job) -> str | None:
    """None where the job's chips can be compiled for here; else why not."""
    if job.topology.chip.axes == 1:
        return "programs for GPUs are compiled where the GPUs are"
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed: pip install 'gemmary[tpu]'"
    return None


def build(job: Job) -> Built:
    """Compile the job's step. Raises TooLargeError where it does not fit, GemmaryError where libtpu will not."""
    mesh = _chips(job)
    started = time.perf_counter()
    with _platform():
        low = lowered(job, mesh)
        try:
            program = low.compile(compiler_options=_OPTIONS)
        except jax.errors.JaxRuntimeError as error:
            if found := re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds", str(error)):
                scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[found[2]]
                raise TooLargeError(float(found[1]) * scale) from None
            raise GemmaryError(f"the compiler refuses the step: {str(error).splitlines()[0][:300]}") from None
    used = program.memory_analysis()
    memory = MemoryUse(
        used.argument_size_in_bytes, used.output_size_in_bytes, used.alias_size_in_bytes, used.temp_size_in_bytes,
        getattr(used, "peak_memory_in_bytes", 0),
    )  # fmt: skip
    return Built(program.as_text(), memory, time.perf_counter() - started, program, low.as_text().encode())


def traced(job: Job) -> None:
    """Trace the job's step on a mesh of no devices, as a TPU's (a GPU's asks for cuDNN). Raises what is wrong with it."""
    mesh = abstract_mesh(job.mesh)
    with _platform(), using(mesh, "tpu"):
        step, arguments = program_of(job, mesh)
        step.trace(*arguments)


def lowered(job: Job, mesh: Mesh) -> Any:
    """The job's step, lowered for a mesh of devices."""
    with using(mesh):
        step, arguments = program_of(job, mesh)
        return step.lower(*arguments)


def program_of(job: Job, mesh: Mesh | AbstractMesh) -> tuple[Any, tuple[Any, ...]]:
    """The jitted step and its arguments as shapes, placed on the mesh."""
    if not job.trains:
        return serving_step(job, mesh)
    config = job.config
    rule = optimizer(OptimizerSettings(), _STEPS)
    chunk = chunk_size(max(job.rows_at_once, 1), config.vocab_size, _HEAD_BYTES)
    head = Head(chunk, config.final_softcap)
    loss = language_loss(config, head=head, dtype=jnp.bfloat16, remat=job.remat, int8=job.int8)
    step = make_step(loss, rule, accumulate=job.accumulate, mesh=mesh)
    learnt, rest = abstract(config), None
    if job.kind == "lora":
        base = abstract(config, jnp.bfloat16)
        learnt, rest = split(jax.eval_shape(lambda p: adapt(p, jax.random.key(0), job.rank), base))
    state = jax.eval_shape(lambda p: init_state(p, rule, jax.random.key(0)), learnt)
    rows = rows_sharding(mesh, job.rows)

    def row(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((job.rows, job.length), dtype, sharding=rows)

    ints: Any = row(jnp.int32)
    batch = Batch(ints, ints, row(jnp.float32), ints, ints)  # type: ignore[arg-type]
    placed = _placed(state, state_shardings(state, mesh))
    return step, (placed, batch, None if rest is None else _placed(rest, placement(rest, mesh)))


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings)


def _chips(job: Job) -> Mesh:
    """The mesh of chips that are not there."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-256")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")  # nothing runs on a chip here
    with _platform():
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=str(job.topology), num_slices=job.slices)
        except jax.errors.JaxRuntimeError as error:
            raise GemmaryError(f"libtpu knows no {job.topology}: {str(error).splitlines()[0][:200]}") from None
    if not job.trains:
        return make_mesh(model=job.model, devices=found.devices[: job.model])
    return make_mesh(slices=job.slices, data=job.data, model=job.model, devices=found.devices)


@contextmanager
def _platform() -> Iterator[None]:
    """JAX itself stays on the CPU: libtpu would look for chips."""
    before = jax.config.jax_platforms  # type: ignore[attr-defined]
    if before is None:
        jax.config.update("jax_platforms", "cpu")
    try:
        yield
    finally:
        jax.config.update("jax_platforms", before)
