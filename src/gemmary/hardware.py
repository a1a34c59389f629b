"""What chips can do, how they are joined, and what their electricity costs the air: published figures, each with its source.

Where a maker publishes nothing, an estimate stands in its place; it says that it is one, and what it was taken from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

from gemmary.errors import GemmaryError

__all__ = ["CHIPS", "GRIDS", "PUE", "Chip", "Sourced", "Topology", "chip_of", "parse_topology"]

_DOC = "cloud.google.com/tpu/docs/"
_BOOK = "How To Scale Your Model, jax-ml.github.io/scaling-book/tpus, TPU specs (2025)"
_NO_POWER = "Google publishes none for this chip. "
_V2 = "46 TFLOP/s at a TDP of 280 W for TPU v2 (Jouppi et al., Ten Lessons From Three Generations, ISCA 2021)"


class Sourced(float):
    """A number that says where it is from. `assumed`: nobody published it, and the source says what it was derived from."""

    source: str
    assumed: bool

    def __new__(cls, value: float, source: str, *, assumed: bool = False) -> Sourced:
        """A float in all else: arithmetic with it gives plain floats."""
        made = super().__new__(cls, value)
        made.source = source
        made.assumed = assumed
        return made


@dataclass(frozen=True)
class Chip:
    """One accelerator. Rates are a second's.

    `flops` is the peak of dense bf16 products with fp32 sums, `int8` that of int8 products. `link` is the bytes
    that one of a chip's `links` carries one way; a torus has two links along each axis. `network` is a chip's share of its host's way
    out to the data centre. `power` is in watts, of a busy chip with its memory: hosts, switches and cooling are not in it.
    `host_chips` share a host. `kinds` are what JAX may call the device, in lower case.
    """

    name: str
    kinds: tuple[str, ...]
    axes: int  # of the torus; 1 for GPUs, whose switch joins each to each
    most: int  # chips of the largest slice, or of one NVLink domain
    flops: Sourced
    int8: Sourced
    memory: Sourced
    memory_rate: Sourced
    link: Sourced
    links: int
    network: Sourced
    power: Sourced
    host_chips: int


def _tpu(
    name: str,
    kinds: tuple[str, ...],
    axes: int,
    most: int,
    *,
    flops: float,
    int8: float,
    memory: float,
    rate: float,
    link: float,
    network: float,
    power: Sourced,
) -> Chip:
    page = f"{_DOC}{name}"
    host = 8 if axes == 2 else 4
    return Chip(
        name, kinds, axes, most,
        flops=Sourced(flops, page),
        int8=Sourced(int8, _BOOK if name == "v5p" else page),  # its page has none
        memory=Sourced(memory * 2**30, page),
        memory_rate=Sourced(rate, page),
        link=Sourced(link, f"{_BOOK}; nine tenths of what the data sheet has"),
        links=2 * axes,
        network=Sourced(network, _BOOK),
        power=power,
        host_chips=host,
    )  # fmt: skip


def _gpu(
    name: str, sheet: str, *, flops: float, int8: float, memory: float, rate: float, links: int, network: Sourced, power: float
) -> Chip:  # fmt: skip
    return Chip(
        name, (name,), 1, 8 if links > 1 else 1,
        flops=Sourced(flops, sheet),
        int8=Sourced(int8, sheet),
        memory=Sourced(memory, sheet),
        memory_rate=Sourced(rate, sheet),
        link=Sourced(25e9, sheet) if links > 1 else Sourced(32e9, f"{sheet}: PCIe 4.0, 16 lanes; no NVLink"),
        links=links,
        network=network,
        power=Sourced(power, f"{sheet}: the most that it may draw"),
        host_chips=8,
    )  # fmt: skip


# A GPU's way out depends on the machine around it: these are NVIDIA's own, and for the L4 Google's.
_NDR = Sourced(50e9, "NVIDIA DGX H100 and H200 data sheets: a port of 400 Gbit/s for each GPU", assumed=True)
_HDR = Sourced(25e9, "NVIDIA DGX A100 data sheet: a port of 200 Gbit/s for each GPU", assumed=True)
_G2 = Sourced(100e9 / 8 / 8, "Google Cloud g2-standard-96: 100 Gbit/s for 8 GPUs", assumed=True)

# What products a watt buys, in FLOP/s, where Google gives only ratios: the chain that the sources of `power` below tell.
_V6E_PER_WATT = 30 / 2 * 46e12 / 280
_V5E_PER_WATT = _V6E_PER_WATT / 1.67
_V6E_POWER = Sourced(
    round(918e12 / _V6E_PER_WATT),
    f"{_NO_POWER}Its peak at half of Ironwood's, which is 30 times TPU v2's per watt of TDP (Google, Ironwood announcement, April 2025); {_V2}",
    assumed=True,
)
_V5E_POWER = Sourced(
    round(197e12 / _V5E_PER_WATT),
    f"{_NO_POWER}Its peak where v6e does 1.67 times as much per watt (Google, Trillium announcement, May 2024), v6e being estimated too",
    assumed=True,
)
_V5P_POWER = Sourced(
    round(459e12 / _V5E_PER_WATT), f"{_NO_POWER}Its peak at v5e's estimated products per watt, which are also v4's", assumed=True
)  # fmt: skip

# In the order in which a device's name is compared: "v5" alone is a v5p.
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu(
            "v5e", ("v5 lite", "v5e"), 2, 256,
            flops=197e12, int8=393e12, memory=16, rate=819e9, link=4.5e10, network=3.125e9, power=_V5E_POWER,
        ),
        _tpu(
            "v5p", ("v5p", "v5"), 3, 6144,
            flops=459e12, int8=918e12, memory=95, rate=2765e9, link=9e10, network=6.25e9, power=_V5P_POWER,
        ),
        _tpu(
            "v6e", ("v6",), 2, 256,
            flops=918e12, int8=1836e12, memory=32, rate=1640e9, link=9e10, network=12.5e9, power=_V6E_POWER,
        ),
        _tpu(
            "v4", ("v4",), 3, 4096,
            flops=275e12, int8=275e12, memory=32, rate=1200e9, link=4.5e10, network=6.25e9,
            power=Sourced(192, f"{_DOC}v4: the most that was measured (the mean was 170 W)"),
        ),
        _gpu(
            "h200", "NVIDIA H200 data sheet, SXM",
            flops=989e12, int8=1979e12, memory=141e9, rate=4.8e12, links=18, network=_NDR, power=700,
        ),
        _gpu(
            "h100", "NVIDIA H100 data sheet, SXM",
            flops=989e12, int8=1979e12, memory=80e9, rate=3.35e12, links=18, network=_NDR, power=700,
        ),
        _gpu(
            "a100", "NVIDIA A100 data sheet, 80 GB SXM",
            flops=312e12, int8=624e12, memory=80e9, rate=2.039e12, links=12, network=_HDR, power=400,
        ),
        _gpu(
            "l4", "NVIDIA L4 data sheet",
            flops=121e12, int8=242e12, memory=24e9, rate=300e9, links=1, network=_G2, power=72,
        ),
    )
}  # fmt: skip
"""Every chip by its short name."""

PUE = Sourced(1.09, "Google Environmental Report 2025: the fleet's average of 2024")
"""What a data centre draws for each unit that its machines do."""

_REGIONS = (
    "Google Cloud, region-carbon-info (github.com/GoogleCloudPlatform), 2024: Electricity Maps' life-cycle average"
)
GRIDS: dict[str, Sourced] = {
    "us": Sourced(0.367, "US Energy Information Administration, FAQ 74, 2023: 0.81 pounds of CO2 per kWh"),
    "world": Sourced(0.473, "Ember, Global Electricity Review 2025: the average of 2024"),
    "iowa": Sourced(0.41272, f"{_REGIONS}; us-central1"),
    "oregon": Sourced(0.07923, f"{_REGIONS}; us-west1"),
    "south-carolina": Sourced(0.57577, f"{_REGIONS}; us-east1"),
    "belgium": Sourced(0.10337, f"{_REGIONS}; europe-west1"),
    "netherlands": Sourced(0.20881, f"{_REGIONS}; europe-west4"),
    "finland": Sourced(0.03932, f"{_REGIONS}; europe-north1"),
    "taiwan": Sourced(0.43929, f"{_REGIONS}; asia-east1"),
}
"""Kilograms of CO2 equivalent for a kWh, by region. It is what the grid's power plants emit; bought certificates change nothing here."""


def chip_of(kind: str) -> Chip | None:
    """The chip that a JAX device's `device_kind` is; None where it is none of `CHIPS`."""
    kind = kind.lower()
    return next((chip for chip in CHIPS.values() if any(name in kind for name in chip.kinds)), None)


@dataclass(frozen=True)
class Topology:
    """Chips of one kind joined by their own links: a TPU slice, or the GPUs of one NVLink domain."""

    chip: Chip
    dims: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.dims)

    @property
    def hosts(self) -> int:
        """How many machines they sit in."""
        return math.ceil(self.chips / self.chip.host_chips)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether an axis' last chip is joined to its first, so that a ring along it uses both of an axis' links.

        On v5e and v6e at 16 only; on v4 and v5p in slices of whole 4x4x4 cubes (How To Scale Your Model; Google's TPU pages).
        """
        if self.chip.axes == 2:
            return tuple(dim == 16 for dim in self.dims)
        return (self.chip.axes == 1 or all(dim % 4 == 0 for dim in self.dims),) * len(self.dims)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.dims))}"


_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_WITHIN_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


def _shapes(chip: Chip) -> Iterator[tuple[int, ...]]:
    if chip.axes == 1:
        yield from ((n,) for n in range(1, chip.most + 1))
    elif chip.axes == 2:
        yield from _FLAT
    else:
        yield from _WITHIN_A_CUBE
        for dims in combinations_with_replacement(range(4, 129, 4), 3):
            if math.prod(dims) <= chip.most:
                yield dims


def parse_topology(name: str) -> Topology:
    """`v5e:16x16`, `v5p:4x4x8` or `h100:8` as a topology.

    Shapes are those that Google's pages list for slices: two axes up to 16x16 for v5e and v6e; for v4 and v5p parts of a 4x4x4 cube
    and whole cubes, the smallest axis first. Raises GemmaryError for others, with the nearest that exists.
    """
    found = re.fullmatch(r"\s*([a-z0-9]+):(\d+(?:x\d+)*)\s*", name.lower())
    if not found:
        raise GemmaryError(f"the topology {name!r} is not CHIP:SHAPE, like v5e:16x16 or h100:8")
    chip = CHIPS.get(found[1])
    if chip is None:
        raise GemmaryError(f"there is no chip {found[1]!r} for a topology; there are {', '.join(CHIPS)}")
    dims = tuple(int(part) for part in found[2].split("x"))
    shapes = list(_shapes(chip))
    if dims in shapes:
        return Topology(chip, dims)
    wanted = math.log(max(math.prod(dims), 1))
    order = sorted(dims)

    def far(shape: tuple[int, ...]) -> tuple[float, int]:
        return abs(math.log(math.prod(shape)) - wanted), sum(
            abs(a - b) for a, b in zip(sorted(shape), order, strict=False)
        )

    raise GemmaryError(
        f"there is no {chip.name}:{found[2]}; the nearest that exists is {Topology(chip, min(shapes, key=far))}"
    )
