"""Who exchanges with whom in a collective, and which axes of the mesh that is."""

from __future__ import annotations

import math
import re
from functools import lru_cache

import numpy as np

from gemmary.errors import GemmaryError

__all__ = ["axes_along", "members_of"]

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


_LIST = r"\{(?:\{[\d,]*\},?)*\}"
_GROUPS = re.compile(rf"\breplica_groups=({_LIST}|\[[^\]]*\]<=\[[^\]]*\](?:T\([^)]*\))?|mesh\[.*?\{{[^}}]*\}})")
_PAIRS = re.compile(rf"\bsource_target_pairs=({_LIST})")
_MESH = re.compile(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? ?\{([^}]*)\}")
_TURNED = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")

Members = tuple[tuple[int, ...], ...]


def members_of(attributes: str, devices: int) -> Members:
    """The groups of a collective of a program for so many devices, from its attributes; a permute's are pairs of source and target.

    XLA prints lists `{{0,1},{2,3}}` (`{}`: all), `[2,2]<=[4]` and `[2,2]<=[2,2]T(1,0)` (numbers in order, laid out as the second
    shape, turned, and read as groups), or `mesh['x'=2,'y'=2] {'x'}` (axes of a mesh, or with `:(1)2` a part of one).
    Raises GemmaryError for others.
    """
    if pairs := _PAIRS.search(attributes):
        return _listed(pairs[1])
    if groups := _GROUPS.search(attributes):
        return _groups(groups[1], devices)
    at = attributes.find("replica_groups=")
    if at >= 0:
        raise GemmaryError(f"this HLO module has replica groups of an unknown form: {attributes[at : at + 80]}")
    return (tuple(range(devices)),)


@lru_cache(maxsize=4096)
def axes_along(members: Members, sizes: tuple[tuple[str, int], ...], order: tuple[int, ...] | None) -> tuple[str, ...]:
    """The mesh axes, given with their sizes from the slowest to the fastest, along which members of a group differ.

    A member is a device's place in the mesh, or where `order` is given the number under which it has that.
    """
    found = set()
    for group in members:
        ids = np.array(group if order is None else [order[i] for i in group])
        places = np.unravel_index(ids, [size for _, size in sizes])
        found |= {name for (name, _), place in zip(sizes, places, strict=True) if (place != place[0]).any()}
    return tuple(name for name, _ in sizes if name in found)


@lru_cache(maxsize=4096)
def _groups(text: str, devices: int) -> Members:
    if text.startswith("{"):
        return _listed(text) or (tuple(range(devices)),)
    if iota := _IOTA.fullmatch(text):
        return _rows(_laid_out(iota[2], iota[3]).reshape([int(n) for n in iota[1].split(",")]))
    if named := _MESH.fullmatch(text):
        axes = [(name, int(size)) for name, size in re.findall(r"'?([\w.\-]+)'?=(\d+)", named[1])]
        return _rows(_along(_mesh_ids(named[2], math.prod(size for _, size in axes)), axes, named[3]))
    raise GemmaryError(f"this HLO module has replica groups of an unknown form: {text[:80]}")


def _laid_out(dims: str, turned: str | None) -> np.ndarray:
    sizes = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in turned.split(",")]) if turned else ids


def _mesh_ids(text: str | None, count: int) -> np.ndarray:
    if not text:
        return np.arange(count)
    if iota := _IOTA.search(text):
        return _laid_out(iota[2], iota[3]).reshape(-1)
    if turned := _TURNED.fullmatch(text):
        return _laid_out(turned[1], turned[2]).reshape(-1)
    return np.array([int(n) for n in re.findall(r"\d+", text)])


def _along(ids: np.ndarray, axes: list[tuple[str, int]], wanted: str) -> np.ndarray:
    """Groups along the axes of `wanted`, each a name or `name:(before)size`, which is a part of one."""
    parts = {name: [(1, size)] for name, size in axes}
    asked = []
    for name, before, size in re.findall(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?", wanted):
        whole = dict(axes)[name]
        low, span = (int(before), int(size)) if size else (1, whole)
        if size:
            parts[name] = [(1, low), (low, span), (low * span, whole // (low * span))]
        asked.append((name, low, span))
    split = [(name, low, size) for name, _ in axes for low, size in parts[name]]
    cube = ids.reshape([size for _, _, size in split])
    last = [split.index(one) for one in asked]
    first = [i for i in range(len(split)) if i not in last]
    return cube.transpose(first + last).reshape(-1, math.prod(split[i][2] for i in last))


def _rows(ids: np.ndarray) -> Members:
    return tuple(map(tuple, ids.tolist()))


def _listed(text: str) -> Members:
    return tuple(tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text))
