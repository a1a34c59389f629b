"""What a compiled program sends between devices: which collective, over which axes of the mesh, how much, how often, behind what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gemmary.errors import GemmaryError
from gemmary.plan.program import Program
from gemmary.plan.program_costs import Costs
from gemmary.plan.program_groups import axes_along, members_of
from gemmary.plan.program_memory import is_part_of_async
from gemmary.plan.program_text import Computation, Instruction, Shape

__all__ = ["SLICE", "Collective", "collectives"]

SLICE = "slice"
"""The mesh axis that runs over TPU slices: what goes along it leaves the chips' own links for the data centre's network."""

_KINDS = {
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast",
}  # fmt: skip
_SENDING = {*_KINDS, "send", "recv", "async"}
# Between slices a TPU's program hands buffers to its host, whose runtime does what these attributes say.
_HOST_KIND = {"ONE_TO_ONE": "collective-permute"}


@dataclass(frozen=True)
class Collective:
    """One collective of one device's program.

    Bytes are of one run, on one device. `axes` are the mesh axes along which devices exchange, in the mesh's order, and `group` how
    many do so with each other (of a permute: 2). Where it is `asynchronous`, `overlapped_flops` and `overlapped_bytes` are the
    products and the memory traffic that are scheduled between its start and its end.
    """

    kind: str
    name: str
    axes: tuple[str, ...]
    group: int
    operand_bytes: int
    result_bytes: int
    times: int
    asynchronous: bool
    overlapped_flops: float
    overlapped_bytes: float
    results: tuple[Shape, ...]
    source: str

    @property
    def along(self) -> str:
        """The axes as one name: `model`, `data+model`."""
        return "+".join(self.axes)

    @property
    def crosses_slices(self) -> bool:
        """Whether it leaves the slice."""
        return SLICE in self.axes


@dataclass(frozen=True)
class _Found:
    kind: str
    sent: Instruction  # what says who exchanges with whom
    operand_bytes: int
    results: tuple[Shape, ...]
    start: int
    end: int | None  # None: it is over when the next instruction begins


def collectives(
    program: Program, mesh_shape: Mapping[str, int], order: Sequence[int] | None = None, *, costs: Costs | None = None
) -> list[Collective]:
    """Every collective that runs and has more than one device in a group.

    `mesh_shape` has the mesh's axes from the slowest to the fastest. The program's device i is the mesh's i-th in that order, or
    where `order` is given the `order[i]`-th. A TPU's program over several slices is one slice's: the axis `slice` is then left out
    of what devices are numbered by. Raises GemmaryError where the program was compiled for another number of devices.
    """
    sizes = dict(mesh_shape)
    if program.devices != math.prod(sizes.values()) and SLICE in sizes:
        sizes.pop(SLICE)
    if program.devices != math.prod(sizes.values()):
        raise GemmaryError(
            f"the program was compiled for {program.devices} devices; a mesh of {dict(mesh_shape)} has another number"
        )
    costs = costs or Costs(program)
    wrapped = {name for one, _ in program.instructions("async-start") for name in one.called}
    found = []
    for name, times in program.times.items():
        if name in program.fused or name in wrapped:
            continue
        computation = program.computations[name]
        each = list(_in_order(program, computation))
        passed = _passed(costs, computation) if any(one.end is not None for one in each) else None
        for one in each:
            axes, group = _reach(one, sizes, mesh_shape, program.devices, order)
            if group < 2 or not axes:
                continue
            hidden = (
                passed[one.end] - passed[one.start + 1] if passed is not None and one.end is not None else (0.0, 0.0)
            )
            found.append(
                Collective(
                    one.kind, one.sent.name, axes, group, one.operand_bytes, sum(s.bytes for s in one.results), times,
                    one.end is not None, float(hidden[0]), float(hidden[1]), one.results, one.sent.quoted("op_name") or "",
                )
            )  # fmt: skip
    return found


def _passed(costs: Costs, computation: Computation) -> np.ndarray:
    """Products and traffic of all instructions before each; what collectives themselves read and write is left out."""
    each = [
        (0.0, 0.0) if one.opcode.removesuffix("-start") in _SENDING else costs.of(computation, one)
        for one in computation.instructions.values()
    ]
    return np.concatenate([np.zeros((1, 2)), np.cumsum(np.array(each), axis=0)])


def _in_order(program: Program, computation: Computation) -> Iterator[_Found]:
    every = list(computation.instructions.values())
    ends = _ends(program, computation, every)
    for at, one in enumerate(every):
        kind = one.opcode.removesuffix("-start")
        last = ends.get(one.name, len(every))  # one that ends in a loop's next round is hidden to this one's end
        if one.opcode == "async-start":
            for inner in _inside(program, one):
                yield _Found(inner.opcode, inner, _given(computation, one), inner.shapes, at, last)
        elif kind in _KINDS:
            done = every[last] if last < len(every) else None
            given = _given(computation, one, 1 if kind.startswith("ragged") else None)  # its others say what goes where
            if one.opcode == kind:
                yield _Found(kind, one, given, one.shapes, at, None)
            else:
                yield _Found(kind, one, given, done.shapes if done else one.shapes[len(one.shapes) // 2 :], at, last)
        elif one.opcode == "fusion":
            yield from _fused(program, computation, one, at, ends.get(one.name, len(every)))
        elif one.opcode == "send" and (said := one.quoted("_xla_megascale_transfer_type")):
            kind = _HOST_KIND.get(said, said.lower().replace("_", "-"))
            back = _answer(one, every)
            results = back.shapes[:1] if back else one.shapes[:1]
            yield _Found(kind, one, one.shapes[0].bytes, results, at, ends.get(back.name, len(every)) if back else last)


def _fused(program: Program, computation: Computation, one: Instruction, at: int, last: int) -> Iterator[_Found]:
    """Collectives inside a fusion: a TPU's asynchronous ones, and those with the slice that makes a reduce-scatter of an all-reduce."""
    inner = program.computations.get(one.called[0]) if one.called else None
    if inner is None:
        return
    starts = any(
        i.quoted("custom_call_target") == "AsyncCollectiveStart"
        for i in inner.instructions.values()
        if i.opcode == "custom-call"
    )
    for sent in _inside(program, one):
        kind, results = sent.opcode, sent.shapes
        if kind == "all-reduce":
            cut = [
                i for i in inner.instructions.values() if i.opcode == "dynamic-slice" and sent.name in i.operands[:1]
            ]
            if cut:
                kind, results = "reduce-scatter", cut[0].shapes
        yield _Found(kind, sent, _given(inner, sent), results, at, last if starts else None)


def _inside(program: Program, one: Instruction) -> Iterator[Instruction]:
    for name in one.called:
        if inner := program.computations.get(name):
            yield from (i for i in inner.instructions.values() if i.opcode in _KINDS and not is_part_of_async(i))


def _given(computation: Computation, one: Instruction, first: int | None = None) -> int:
    return sum(made.bytes for i in range(len(one.operands[:first])) if (made := computation.operand(one, i)))


def _ends(program: Program, computation: Computation, every: Sequence[Instruction]) -> dict[str, int]:
    """Where each start ends, by the start's name."""
    ends: dict[str, int] = {}
    open_chains: dict[tuple[str | None, str | None], str] = {}
    for at, one in enumerate(every):
        if one.opcode.endswith("-done"):
            begun = computation.operand(one, 0)
            while begun is not None and begun.opcode.endswith("-update"):
                begun = computation.operand(begun, 0)
            if begun is not None:
                ends[begun.name] = at
        elif one.opcode == "fusion" and one.called and (inner := program.computations.get(one.called[0])):
            targets = [i.quoted("custom_call_target") for i in inner.instructions.values() if i.opcode == "custom-call"]
            chains = [
                (i.attribute("channel_id"), i.quoted("chain_id"))
                for i in inner.instructions.values()
                if i.opcode in _KINDS
            ]
            if "AsyncCollectiveStart" in targets:
                open_chains |= dict.fromkeys(chains, one.name)
            elif "AsyncCollectiveDone" in targets:
                ends |= {open_chains.pop(chain): at for chain in chains if chain in open_chains}
    return ends


def _answer(send: Instruction, every: Sequence[Instruction]) -> Instruction | None:
    meeting = send.quoted("_xla_host_transfer_rendezvous")
    return next((i for i in every if i.opcode == "recv" and i.quoted("_xla_host_transfer_rendezvous") == meeting), None)


def _reach(
    one: _Found, sizes: dict[str, int], mesh_shape: Mapping[str, int], devices: int, order: Sequence[int] | None
) -> tuple[tuple[str, ...], int]:
    if one.sent.opcode == "send":
        return (SLICE,), mesh_shape.get(SLICE, 0) or 2
    members = members_of(one.sent.attributes, devices)
    axes = axes_along(members, tuple(sizes.items()), None if order is None else tuple(order))
    return axes, len(members[0]) if members else 0
