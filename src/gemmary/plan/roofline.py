"""A step's time from its compiled program: what every kernel computes and moves, and the collectives that nothing hides.

A kernel takes as long as the slower of its products at the chip's peak and its bytes at the memory's rate; kernels follow each other.
A collective is hidden where the schedule has it under way while kernels run; what is left of it is waited for. Links are no quicker
than all that goes over them. So it is the time of a chip that does each thing at its best: real kernels stay below, and start-up
costs and waits between chips come on top.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from gemmary.hardware import Topology
from gemmary.plan.network import seconds_of
from gemmary.plan.program import Program
from gemmary.plan.program_collectives import collectives
from gemmary.plan.program_costs import Costs

__all__ = ["Limits", "StepTime", "Traffic", "step_time", "traffic"]

# Their parts are counted by themselves.
_HOLDING = {"while", "conditional", "call"}
_SENDING = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast", "send",
    "recv", "async",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one device does in a second: products (FLOPs) and bytes to and from its memory."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind along the same axes: how many run in a step, their bytes on a chip, and their time."""

    kind: str
    axes: str
    count: int
    bytes: int
    seconds: float
    exposed: float
    """Seconds that nothing hides."""
    crosses_slices: bool


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and what they are made of. `compute` has kernels that products bound, `memory` those that bytes do."""

    compute: float
    memory: float
    exposed: float
    network: dict[str, float]
    """How long each set of links is busy, hidden or not."""

    @property
    def total(self) -> float:
        return max(self.compute + self.memory + self.exposed, *self.network.values(), 0.0)

    @property
    def bound(self) -> str:
        """What takes the largest part."""
        parts = {"products": self.compute, "memory": self.memory, "collectives": self.exposed}
        busiest = max(self.network, key=lambda axes: self.network[axes], default="")
        if busiest and self.network[busiest] >= self.total:
            return f"the network along {busiest}"
        return max(parts, key=lambda part: parts[part])


def step_time(
    program: Program, costs: Costs, limits: Limits, sent: list[Traffic], kernels: dict[str, float]
) -> StepTime:
    """From a program and what it sends. `kernels` has the FLOPs of one run of each custom call that XLA knows nothing of, by name."""
    compute = memory = 0.0
    for name, times in program.times.items():
        if name in program.fused:
            continue
        computation = program.computations[name]
        for one in computation.instructions.values():
            if one.opcode in _HOLDING or one.opcode.startswith(_SENDING):
                continue
            flops, moved = costs.of(computation, one)
            by_products = (flops + kernels.get(one.name, 0.0)) / limits.flops
            by_bytes = moved / limits.bytes
            if by_products >= by_bytes:
                compute += by_products * times
            else:
                memory += by_bytes * times
    network: dict[str, float] = defaultdict(float)
    for part in sent:
        network[part.axes] += part.seconds
    return StepTime(compute, memory, sum(part.exposed for part in sent), dict(network))


def traffic(program: Program, costs: Costs, limits: Limits, mesh: dict[str, int], topology: Topology) -> list[Traffic]:
    """What a program sends, by kind and axes, the longest first."""
    sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0, 0.0])
    for one in collectives(program, mesh, costs=costs):
        seconds = seconds_of(one.kind, one.operand_bytes, one.result_bytes, one.group, one.axes, topology)
        hidden = max(one.overlapped_flops / limits.flops, one.overlapped_bytes / limits.bytes)
        sum_ = sums[one.kind, one.along]
        sum_[0] += one.times
        sum_[1] += one.times * max(one.operand_bytes, one.result_bytes)
        sum_[2] += one.times * seconds
        sum_[3] += one.times * max(seconds - (hidden if one.asynchronous else 0.0), 0.0)
    made = [
        Traffic(kind, along, int(count), int(size), seconds, exposed, "slice" in along.split("+"))
        for (kind, along), (count, size, seconds, exposed) in sums.items()
    ]
    return sorted(made, key=lambda part: -part.seconds)
