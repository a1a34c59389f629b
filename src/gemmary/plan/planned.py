"""A job's plan: does it fit, what does it compute, move and send, how long does a step take, and what does the whole run cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gemmary.kernels.flash import FUSED
from gemmary.mesh import abstract_mesh
from gemmary.params import undivided
from gemmary.plan.arithmetic import (
    attention_flops,
    compute_estimate,
    made_again,
    memory_estimate,
    model_flops,
    traffic_estimate,
)
from gemmary.plan.budget import Budget, budget
from gemmary.plan.job import Job
from gemmary.plan.lowering import Built, TooLargeError, build, can_compile, traced
from gemmary.plan.program import Program, read_program
from gemmary.plan.program_costs import Costs
from gemmary.plan.roofline import Limits, StepTime, Traffic, step_time, traffic

__all__ = ["Memory", "Plan", "estimated", "plan"]

_RESERVED = 0.25 * 2**30  # of a TPU's memory, which programs do not get

Say = Callable[[str], None]


@dataclass(frozen=True)
class Memory:
    """A chip's memory by kind, in bytes. `available` is what programs get of the chip's."""

    parameters: float
    optimizer: float
    gradients: float
    activations: float
    temporaries: float
    available: float

    @property
    def total(self) -> float:
        """All that the step needs."""
        return self.parameters + self.optimizer + self.gradients + self.activations + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether it is there."""
        return self.total <= self.available


@dataclass(frozen=True)
class Plan:
    """What a step takes, on each chip and in all. Times are seconds of a step."""

    job: Job
    compiled: bool
    """By libtpu; else by arithmetic, and `why` says why."""
    why: str
    memory: Memory
    model_flops: float
    """Of a step on one chip: what the mathematics needs."""
    made_again: float
    """What is computed beyond that, on one chip."""
    sent: list[Traffic]
    time: StepTime
    replicated: list[str]
    """Axes of parameters that the mesh does not divide."""
    compile_seconds: float = 0.0
    spent: Budget | None = None
    built: Built | None = field(default=None, repr=False)
    program: Program | None = field(default=None, repr=False)

    @property
    def fits(self) -> bool:
        """Whether a chip has the memory."""
        return self.memory.fits

    @property
    def mfu(self) -> float:
        """Model FLOPs over what the chips could do in the step's time."""
        return self.model_flops / float(self.job.topology.chip.flops) / self.time.total

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        job = self.job
        return {
            "model": job.name, "kind": job.kind, "topology": str(job.topology), "slices": job.slices, "chips": job.chips,
            "mesh": job.mesh, "rows": job.rows, "length": job.length, "tokens_per_step": job.tokens, "accumulate": job.accumulate,
            "remat": job.remat, "int8": job.int8, "compiled": self.compiled, "why": self.why, "fits": self.fits,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "flops": {"model": self.model_flops, "made_again": self.made_again},
            "collectives": [asdict(part) for part in self.sent],
            "step_seconds": self.time.total, "bound": self.time.bound, "seconds": asdict(self.time), "mfu": self.mfu,
            "tokens_per_second": job.tokens / self.time.total, "replicated": self.replicated,
            "compile_seconds": self.compile_seconds, "budget": asdict(self.spent) if self.spent else None,
        }  # fmt: skip


def plan(
    job: Job, *, tokens: float | None = None, grid: str = "us", compiling: bool = True, say: Say = lambda line: None
) -> Plan:
    """Plan a job: by compiling it, where that can be done here and is wanted, else by arithmetic.

    `tokens` are of the whole run. A step that does not fit is planned all the same; its memory then says what it would need.
    Raises GemmaryError where the compiler refuses the step for another reason.
    """
    why = can_compile(job) if compiling else "compiling was not asked for"
    if why is None:
        say(f"compiling {job.name} for {job.slices} x {job.topology}")
        try:
            made = _compiled(job)
        except TooLargeError as error:
            made = estimated(job, "the compiler found no room for it", needed=error.needed)
    else:
        say(f"by arithmetic: {why}")
        traced(job)
        made = estimated(job, why)
    if tokens is None or not job.trains:
        return made
    spent = budget(tokens, job.tokens, made.time.total, job.topology, job.slices, grid)
    return replace(made, spent=spent)


def _available(job: Job) -> float:
    return float(job.topology.chip.memory) - _RESERVED


def _compiled(job: Job) -> Plan:
    built = build(job)
    program = read_program(built.text)
    costs = Costs(program)
    chip = job.topology.chip
    limits = Limits(float(chip.flops), float(chip.memory_rate))
    timed = Costs(program, eight=chip.int8 / chip.flops) if job.int8 else costs
    sent = traffic(program, timed, limits, job.mesh, job.topology)
    kernels = _kernels(job, program)
    time = step_time(program, timed, limits, sent, {name: flops for name, (flops, _) in kernels.items()})
    done = costs.flops[program.entry] + sum(flops * times for flops, times in kernels.values())
    needed = model_flops(job)
    guess = memory_estimate(job)
    state = guess["parameters"] + guess["optimizer"]
    kept = min(_carried(program, job), built.memory.temporary)
    gradients = min(guess["gradients"], max(built.memory.total - state - kept, 0.0))
    memory = Memory(
        guess["parameters"], guess["optimizer"], gradients, kept, max(built.memory.total - state - kept - gradients, 0.0), _available(job)
    )  # fmt: skip
    return Plan(
        job, True, "", memory, needed, max(done - needed, 0.0), sent, time, undivided(job.config, abstract_mesh(job.mesh)), built.seconds,
        built=built, program=program,
    )  # fmt: skip


def _kernels(job: Job, program: Program) -> dict[str, tuple[float, int]]:
    """FLOPs of one run, and how many runs, of every kernel that XLA does not know: attention's, forward and backward."""
    found = {}
    for name, times in program.times.items():
        for one in program.computations[name].instructions.values():
            if one.quoted("custom_call_target") == "tpu_custom_call":
                where = (one.quoted("op_name") or "") + one.name
                # The long rows' backward pass is two kernels, which both make the scores and their gradient.
                fused = job.length <= FUSED
                products = (5 if fused else 4) if "dkv" in where else 3 if "dq" in where else 2
                found[one.name] = attention_flops(job, products), times
    return found


def _carried(program: Program, job: Job) -> float:
    """What the loop over layers hands from the forward to the backward pass: arrays with an axis of layers that a loop writes."""
    rounds = set(range(2, job.config.num_layers + 1)) & set(program.trips.values()) | {job.config.num_layers}
    own = {
        tuple(shape.dims)
        for one, _ in program.instructions("parameter")
        if one in program.computations[program.entry].instructions.values()
        for shape in one.shapes
    }
    most = 0.0
    for one, _ in program.instructions("while"):
        carried = [
            s for s in one.shapes if s.dims and s.dims[0] in rounds and tuple(s.dims) not in own and s.elements > 10**6
        ]
        most = max(most, float(sum(shape.bytes for shape in carried)))
    return most


def estimated(job: Job, why: str = "", needed: float | None = None) -> Plan:
    """The plan by arithmetic alone. `needed` are bytes that a compiler has said the step needs."""
    chip = job.topology.chip
    guess = memory_estimate(job)
    if needed is not None:
        guess["temporaries"] = max(needed - guess["gradients"] - guess["activations"], guess["temporaries"])
    memory = Memory(**guess, available=_available(job))
    sent = traffic_estimate(job)
    compute, moved = compute_estimate(job)
    network: dict[str, float] = {}
    for part in sent:
        network[part.axes] = network.get(part.axes, 0.0) + part.seconds
    time = StepTime(
        compute / float(chip.flops), max(moved / float(chip.memory_rate) - compute / float(chip.flops), 0.0),
        sum(part.exposed for part in sent), network,
    )  # fmt: skip
    return Plan(
        job,
        False,
        why,
        memory,
        model_flops(job),
        made_again(job),
        sent,
        time,
        undivided(job.config, abstract_mesh(job.mesh)),
    )
