"""`gemmary plan`: a step of training or serving on chips that need not be there, what it takes, and what the whole run costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer
from rich.console import Console

from gemmary.errors import GemmaryError
from gemmary.hardware import GRIDS, parse_topology
from gemmary.model.transformer import Remat
from gemmary.plan.budget import TOKENS
from gemmary.plan.job import Job, Kind, amount, layout, training_job
from gemmary.plan.planned import plan
from gemmary.plan.saved import save
from gemmary.plan.search import nearest, search
from gemmary.plan_results import show, show_all
from gemmary.presets import preset

__all__ = ["add_plan", "job_of"]

_Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


def job_of(
    name: str, topology: str, *, slices: int, mesh: str | None, kind: str, tokens_per_step: str | None, batch: int, length: int,
    accumulate: int, remat: str, int8: bool, rank: int,
) -> Job:  # fmt: skip
    """The job that the options describe. Raises GemmaryError for what cannot be, naming the nearest that can."""
    config, place = preset(name).config, parse_topology(topology)
    for value, known, option in ((kind, get_args(Kind), "--step"), (remat, get_args(Remat), "--remat")):
        if value not in known:
            raise GemmaryError(f"{option} is {value!r}; it is one of {', '.join(known)}")
    data, model = layout(mesh, place)
    if kind in ("decode", "prefill"):
        return Job(
            name=name, config=replace(config, context=max(length, config.context)), topology=place, data=data, model=model,
            kind=cast(Kind, kind), rows=batch * data, length=length,
        )  # fmt: skip
    tokens = amount(tokens_per_step, "--tokens-per-step") if tokens_per_step else slices * data * accumulate * length
    return training_job(
        name, config, place, slices=slices, data=data, model=model, tokens=tokens, length=length, accumulate=accumulate,
        remat=cast(Remat, remat), int8=int8, kind=cast(Kind, kind), rank=rank,
    )  # fmt: skip


def add_plan(app: typer.Typer, progress: _Progress, err: Console) -> None:
    """Register the verb."""

    @app.command("plan")
    def plan_(
        model: Annotated[str, typer.Argument(metavar="PRESET", help="A published size, such as gemma-7b.")],
        topology: Annotated[str, typer.Option(help="Chips of one slice: v5e:16x16, v5p:4x4x8, h100:8.")],
        slices: Annotated[int, typer.Option(help="Slices, joined by the data centre's network.")] = 1,
        mesh: Annotated[str | None, typer.Option(help="model=16,data=16; what is left out is what is left.")] = None,
        step: Annotated[str, typer.Option(help="train, sft, lora, decode or prefill.")] = "train",
        tokens_per_step: Annotated[
            str | None, typer.Option(help="4Mi; by default a row for each data replica.")
        ] = None,
        batch: Annotated[int, typer.Option(help="Of decode and prefill: rows of a replica.")] = 32,
        seq: Annotated[int, typer.Option(help="Tokens of a row; of decode the context.")] = 8192,
        accumulate: Annotated[int, typer.Option(help="Parts that a step is taken in.")] = 1,
        remat: Annotated[str, typer.Option(help="What is made again: none, dots, ffw or layers.")] = "layers",
        int8: Annotated[bool, typer.Option("--int8", help="Training's products in 8 bits.")] = False,
        rank: Annotated[int, typer.Option(help="Of lora's adapters.")] = 16,
        tokens: Annotated[str | None, typer.Option(help="Of the whole run; by default the published number.")] = None,
        grid: Annotated[str, typer.Option(help="Whose electricity: us, iowa, oregon, …")] = "us",
        tries: Annotated[bool, typer.Option("--search", help="Try other layouts, and rank them.")] = False,
        most: Annotated[int, typer.Option(help="Layouts that --search compiles.")] = 6,
        no_compile: Annotated[bool, typer.Option("--no-compile", help="By arithmetic alone.")] = False,
        save_to: Annotated[Path | None, typer.Option("--save", help="A folder for the compiled step.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    ) -> None:
        """Show whether a step fits chips that need not be there, how long it takes, and what the whole run would cost."""
        if grid not in GRIDS:
            raise GemmaryError(f"--grid {grid!r} is not known: there are {', '.join(GRIDS)}")
        job = job_of(
            model, topology, slices=slices, mesh=mesh, kind=step, tokens_per_step=tokens_per_step, batch=batch, length=seq,
            accumulate=accumulate, remat=remat, int8=int8, rank=rank,
        )  # fmt: skip
        known = TOKENS.get(model.removesuffix("-256000"))
        whole = float(amount(tokens, "--tokens")) if tokens else None if known is None else float(known)
        options: dict[str, Any] = {"tokens": whole, "grid": grid, "compiling": not no_compile}
        say = (lambda line: None) if as_json else lambda line: err.print(line, highlight=False)
        if tries:
            with progress("compiling layouts") as bar:
                found = search(job, most=most, say=say, progress=bar, **options)
            print(json.dumps([one.to_json() for one in found])) if as_json else show_all(found)
            return
        made = plan(job, say=say, **options)
        if save_to is not None:
            save(made, save_to)
        if as_json:
            print(json.dumps(made.to_json()))
        else:
            show(made)
        if not made.fits:
            raise GemmaryError(
                f"a chip needs {made.memory.total / 2**30:.1f} GiB and has {made.memory.available / 2**30:.1f}: {nearest(job)}"
            )
