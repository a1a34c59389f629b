"""What is to be planned: a model, the chips, how they are laid out, and what a step takes. Checked whole before anything is compiled."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Literal

from gemmary.config import Config
from gemmary.errors import GemmaryError
from gemmary.hardware import Topology
from gemmary.mesh import mesh_shape
from gemmary.model.transformer import Remat

__all__ = ["Job", "Kind", "amount", "layout", "training_job"]

Kind = Literal["train", "sft", "lora", "decode", "prefill"]
"""A step of pre-training (sft is the same, and lora of adapters alone), or of serving: one token of each row, or a prompt's."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One program for many chips. `rows` are of all chips together, `length` tokens each (of decoding: the context so far)."""

    name: str
    config: Config
    topology: Topology
    slices: int = 1
    data: int = 1
    model: int = 1
    kind: Kind = "train"
    rows: int = 1
    length: int = 8192
    accumulate: int = 1
    remat: Remat = "layers"
    int8: bool = False
    """Products of training in 8 bits."""
    rank: int = 16
    """Of lora's adapters."""

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes by mesh axis. Of serving: of one replica."""
        if not self.trains:
            return mesh_shape(model=self.model)
        return mesh_shape(slices=self.slices, data=self.data, model=self.model)

    @property
    def chips(self) -> int:
        """All of them."""
        return self.slices * self.topology.chips

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * (1 if self.kind == "decode" else self.length)

    @property
    def replicas(self) -> int:
        """Groups of chips that each take rows of their own."""
        return self.slices * self.data

    @property
    def rows_at_once(self) -> int:
        """Rows that one group has at a time."""
        return self.rows // self.replicas // self.accumulate

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass."""
        return self.kind in ("train", "sft", "lora")


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def amount(text: str, what: str) -> int:
    """A whole number as people write it: 4194304, 4Mi, 2T, 1.5B. Raises GemmaryError for others."""
    found = re.fullmatch(r"\s*(\d+(?:[._]\d+)*)\s*([KMBGT]i?)?\s*", text)
    unit = (found[2] or "") if found else ""
    scale = {**_UNITS, **_BINARY}.get(unit)
    if found is None or scale is None:
        raise GemmaryError(f"{what} is {text!r}: write a number such as 4194304, 4Mi or 2T")
    value = float(found[1].replace("_", "")) * scale
    if value != int(value) or value < 1:
        raise GemmaryError(f"{what} is {text!r}, which is not a whole number of at least 1")
    return int(value)


def layout(text: str | None, topology: Topology) -> tuple[int, int]:
    """`model=16,data=16` as (data, model); one of them may be left out, and is then what is left of a slice.

    Raises GemmaryError where they do not come to the slice's chips, naming the nearest that do.
    """
    sizes: dict[str, int] = {}
    for part in (text or "").split(",") if text else []:
        found = re.fullmatch(r"\s*(data|model)\s*=\s*(\d+)\s*", part)
        if not found or found[1] in sizes or int(found[2]) < 1:
            raise GemmaryError(f"--mesh {text!r}: write it as model=16,data=16")
        sizes[found[1]] = int(found[2])
    chips = topology.chips
    model = sizes.get("model") or (
        chips // sizes["data"] if chips % sizes.get("data", 1) == 0 and "data" in sizes else 1
    )
    data = sizes.get("data") or chips // model
    if data * model == chips:
        return data, model
    fits = min((n for n in range(1, chips + 1) if chips % n == 0), key=lambda n: (abs(math.log(n / max(model, 1))), n))
    raise GemmaryError(
        f"a mesh of data={data} x model={model} is {data * model} chips and {topology} has {chips}: "
        f"data={chips // fits},model={fits} would do"
    )


def training_job(
    name: str,
    config: Config,
    topology: Topology,
    *,
    slices: int = 1,
    data: int,
    model: int,
    tokens: int,
    length: int,
    accumulate: int = 1,
    remat: Remat = "layers",
    int8: bool = False,
    kind: Kind = "train",
    rank: int = 16,
) -> Job:
    """A step of `tokens` tokens in rows of `length`. Raises GemmaryError where they do not divide, naming the nearest that do."""
    if slices < 1 or length < 1 or accumulate < 1:
        raise GemmaryError("slices, --seq and --accumulate are at least 1")
    parts = slices * data * accumulate
    whole = parts * length
    if tokens % whole:
        near = max(round(tokens / whole), 1) * whole
        raise GemmaryError(
            f"{tokens} tokens a step are not whole rows of {length} over {slices} slices x {data} data"
            + (f" x {accumulate} parts" if accumulate > 1 else "")
            + f": {near} would do"
        )
    if length > config.context:
        config = dataclasses.replace(config, context=length)
    return Job(
        name=name, config=config, topology=topology, slices=slices, data=data, model=model, kind=kind, rows=tokens // length,
        length=length, accumulate=accumulate, remat=remat, int8=int8, rank=rank,
    )  # fmt: skip
