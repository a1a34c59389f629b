"""A compiled step as files for the chips it was compiled for.

step.pjrt         the executable as libtpu serializes it: a TPU runtime of the same version loads it without compiling
step.stablehlo    the step before compiling, as text, for any version
plan.json         what it was compiled for, and by which versions
"""

from __future__ import annotations

import json
from pathlib import Path

import jax

from gemmary.checkpoints.checkpoint import staged
from gemmary.errors import GemmaryError
from gemmary.plan.planned import Plan

__all__ = ["save"]


def save(plan: Plan, folder: Path) -> None:
    """Write a compiled plan's step into a new folder, whole or not at all. Raises GemmaryError where it was not compiled."""
    if plan.built is None:
        raise GemmaryError(f"there is no compiled step to save: {plan.why}")
    if folder.exists():
        raise GemmaryError(f"{folder} is there already: give a new folder")
    data = plan.built.serialized()
    with staged(folder, len(data)) as stage:
        (stage / "step.pjrt").write_bytes(data)
        (stage / "step.stablehlo").write_bytes(plan.built.exported)
        about = {"jax": jax.__version__, "libtpu": _libtpu(), "plan": plan.to_json()}
        (stage / "plan.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _libtpu() -> str:
    from importlib.metadata import version

    return version("libtpu")
