"""What a compiled program costs a device: products, and bytes to and from its main memory.

XLA's own `cost_analysis` counts a loop's body once. Here a body counts as often as it runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gemmary.plan.program import Program, calls_of
from gemmary.plan.program_memory import Memory
from gemmary.plan.program_text import Computation, Instruction, Shape

__all__ = ["Costs", "CustomCall", "custom_calls", "matmul_flops", "memory_bytes", "shapes_of"]

_MATMUL = re.compile(r"matmul|gemm", re.IGNORECASE)  # __onednn$matmul, __cublas$gemm, __cublas$lt$matmul$f8


@dataclass(frozen=True)
class CustomCall:
    """A kernel that XLA knows nothing of (Pallas' have the target `tpu_custom_call`). `name` is where it comes from in the source."""

    target: str
    name: str
    times: int
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]


class Costs:
    """Products and traffic of every instruction and computation, what they call included, for one run of each.

    Products of int8 count for 1 / `eight`: with how much faster a chip makes them, they are what takes the time of others.
    """

    def __init__(self, program: Program, *, eight: float = 1.0) -> None:
        self._program, self._eight = program, eight
        self._memory = Memory(program)
        self.flops: dict[str, float] = {}
        """By computation."""
        self.bytes: dict[str, float] = {}
        """By computation; a fused one's are its fusion's."""
        for name, computation in program.computations.items():
            if name in program.times:
                each = [self.of(computation, one) for one in computation.instructions.values()]
                self.flops[name] = sum(flops for flops, _ in each)
                self.bytes[name] = sum(moved for _, moved in each)

    def of(self, computation: Computation, instruction: Instruction) -> tuple[float, float]:
        """An instruction's FLOPs and bytes."""
        flops = float(_products(computation, instruction))
        if flops and self._eight != 1.0 and _is_int8(computation, instruction):
            flops /= self._eight
        moved = (
            0.0 if computation.name in self._program.fused else float(self._memory.traffic(computation, instruction))
        )
        for callee, count in calls_of(instruction, self._program.trips):
            flops += count * self.flops.get(callee, 0.0)
            moved += count * self.bytes.get(callee, 0.0)
        return flops, moved


def matmul_flops(program: Program) -> float:
    """Of one device's dots and convolutions (a TPU's program has these for dots), a multiply and an add being two.

    Kernels that XLA does not know are not in it: `custom_calls` lists them.
    """
    return Costs(program).flops[program.entry]


def memory_bytes(program: Program) -> float:
    """To and from one device's main memory, roughly: what each kernel reads and writes, once each.

    A kernel that takes a slice out of an array, or puts one in, counts the slice. What lies nearer than main memory costs nothing.
    """
    return Costs(program).bytes[program.entry]


def custom_calls(program: Program) -> list[CustomCall]:
    """Those that are not products of a library, which `matmul_flops` has."""
    found = []
    for name, times in program.times.items():
        computation = program.computations[name]
        for one in computation.instructions.values():
            target = one.quoted("custom_call_target") or ""
            if one.opcode == "custom-call" and not _MATMUL.search(target):
                given = (computation.operand(one, i) for i in range(len(one.operands)))
                shapes = tuple(shape for each in given if each for shape in each.shapes)
                found.append(CustomCall(target, one.quoted("op_name") or "", times, shapes, one.shapes))
    return found


def shapes_of(program: Program, *opcodes: str, fused: bool = True) -> Iterator[tuple[Instruction, Shape]]:
    """Every array that an instruction makes (of the given opcodes, or of all). Without `fused`, only those that a kernel leaves in memory."""
    for name in program.times:
        if fused or name not in program.fused:
            for one in program.computations[name].instructions.values():
                if not opcodes or one.opcode in opcodes:
                    yield from ((one, shape) for shape in one.shapes)


def _is_int8(computation: Computation, one: Instruction) -> bool:
    made = [computation.operand(one, i) for i in (0, 1)]
    return all(each is not None and each.shapes[0].dtype == "s8" for each in made)


def _products(computation: Computation, one: Instruction) -> int:
    if one.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    left, right = computation.operand(one, 0), computation.operand(one, 1)
    if left is None or right is None:
        return 0
    a, b, out = left.shapes[0], right.shapes[0], one.shapes[0]
    if one.opcode == "dot":
        summed = [int(axis) for axis in re.findall(r"\d+", one.attribute("lhs_contracting_dims") or "")]
        return 2 * out.elements * math.prod(a.dims[axis] for axis in summed)
    if one.opcode == "convolution":
        return 2 * _convolution(a.dims, b.dims, out.dims, one)
    if not _MATMUL.search(one.quoted("custom_call_target") or "") or not out.elements:
        return 0
    batch = math.prod(out.dims[:-2])
    return 2 * out.elements * math.isqrt(a.elements * b.elements // (out.elements * max(batch, 1)))


def _convolution(a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...], one: Instruction) -> int:
    """Multiplications, those with padding and with the holes of a dilation left out.

    That matters: a TPU's program has a batched product as a convolution whose input is so dilated that each window has one element.
    """
    labels = re.fullmatch(r"([\w?]+)_([\w?]+)->([\w?]+)", one.attribute("dim_labels") or "")
    if not labels:
        return 0
    size = {f"a{c}": n for c, n in zip(labels[1], a, strict=True)}
    size |= {f"b{c}": n for c, n in zip(labels[2], b, strict=True)}
    size |= {f"o{c}": n for c, n in zip(labels[3], out, strict=True)}
    window = one.attribute("window") or ""
    parts = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\w\-]+)", window)}
    seen = 1
    for axis in range(len(labels[1]) - 2):

        def said(key: str, default: str, axis: int = axis) -> str:
            return parts[key][axis] if key in parts else default

        low, high = (int(n) for n in said("pad", "0_0").split("_"))
        seen *= _positions(
            size[f"a{axis}"], size[f"b{axis}"], size[f"o{axis}"],
            int(said("stride", "1")), low, high, int(said("lhs_dilate", "1")), int(said("rhs_dilate", "1")),
        )  # fmt: skip
    groups = int(one.attribute("batch_group_count") or 1)
    return size["bi"] * size["bo"] * (size["ab"] // groups) * seen


@lru_cache(maxsize=4096)
def _positions(length: int, taps: int, out: int, stride: int, low: int, high: int, spread: int, apart: int) -> int:
    """How many pairs of an output position and a tap of the window meet an element of the input."""
    at = np.arange(out)[:, None] * stride + np.arange(taps)[None, :] * apart - low
    return int(((at >= 0) & (at <= (length - 1) * spread) & (at % spread == 0)).sum())
