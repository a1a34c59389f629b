"""How long a collective takes, from what its axes' links carry.

On a ring of chips whose bytes together are V, a gathering or a scattering of all takes V over the ring's bandwidth, both ways round;
a sum is one of each; an exchange of all with all a quarter (How To Scale Your Model, sharding). Nothing is counted for starting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

from gemmary.hardware import Topology

__all__ = ["bandwidth", "seconds_of"]

_TIMES = {"all-gather": 1.0, "reduce-scatter": 1.0, "all-reduce": 2.0, "all-to-all": 0.25, "ragged-all-to-all": 0.25}


def bandwidth(axes: Sequence[str], group: int, topology: Topology) -> float:
    """Bytes a second that a chip sends and receives along these mesh axes.

    A group that fills whole axes of the torus has all their links; a smaller one is a line, which carries each way once. GPUs
    reach each other through a switch. Between slices every chip has its share of its host's network.
    """
    chip = topology.chip
    if "slice" in axes:
        return float(chip.network)
    if chip.axes == 1:
        return float(chip.link) * chip.links
    dims = list(zip(topology.dims, topology.wraps, strict=True))
    for count in range(1, len(dims) + 1):
        for some in combinations(dims, count):
            if math.prod(size for size, _ in some) == group:
                return float(chip.link) * sum(2 if wraps else 1 for _, wraps in some)
    return float(chip.link)


def seconds_of(kind: str, operand: float, result: float, group: int, axes: Sequence[str], topology: Topology) -> float:
    """One collective of one chip's program, from the bytes that each chip puts in and gets out."""
    if group < 2:
        return 0.0
    rate = bandwidth(axes, group, topology)
    if kind == "collective-permute":
        return operand / (rate if "slice" in axes else float(topology.chip.link))
    whole = operand * group if kind in ("all-to-all", "ragged-all-to-all") else max(operand, result)
    return _TIMES.get(kind, 1.0) * whole * (group - 1) / group / rate
