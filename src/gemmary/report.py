"""What a life came to, as one page and one model card: made of the files that its stages wrote, which know nothing of it.

RUN/report.html    self-contained: no scripts, nothing from elsewhere
RUN/README.md      the model card
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemmary.checkpoints.checkpoint import write_whole
from gemmary.errors import GemmaryError
from gemmary.report_judgements import judgements
from gemmary.report_pages import Section, Table, html_page, markdown_page
from gemmary.report_sections import SECTIONS, RunFiles
from gemmary.train.goodput import LOST, Goodput

__all__ = ["report"]

_WATTS = 8.0
"""Of a busy core of a laptop or server, about: an assumption, which the report states."""


def report(folder: Path, *, watts: float = _WATTS) -> dict[str, Any]:
    """Write both files and give what they say as plain data. `watts` are those of a busy core, for the estimate of energy.

    Raises GemmaryError where the folder holds no run.
    """
    run = RunFiles(folder)
    if not run.stages:
        raise GemmaryError(f"{folder} holds no run: no stage of a recipe has been lived there")
    if not 0 < watts < 1e5:
        raise GemmaryError(f"watts is {watts}; it is above 0")
    parts = [make(run) for make in SECTIONS]
    sections = [
        part for part in (*parts, *judgements(run.folder), _costs(run, watts), _origin(run)) if part is not None
    ]
    title = f"{run.folder.resolve().name}: a Gemma and its life"
    write_whole(folder / "report.html", html_page(title, sections).encode())
    write_whole(folder / "README.md", markdown_page(title, sections).encode())
    return {
        "page": str(folder / "report.html"), "card": str(folder / "README.md"),
        "sections": [{"title": s.title, "tables": [{"columns": t.columns, "rows": t.rows} for t in s.tables]} for s in sections],
    }  # fmt: skip


def _costs(run: RunFiles, watts: float) -> Section:
    about = run.data("run.json") or {}
    cores = about.get("cores", 1)
    rows, total = [], 0.0
    for name, stage in run.stages.items():
        seconds = float(stage.get("seconds", 0.0))
        total += seconds
        rows.append([name, f"{seconds:.1f}"])
    energy = total * cores * watts / 3600
    rows.append(["all", f"{total:.1f}"])
    return Section(
        "Time and energy",
        f"Seconds of each stage's last run. About {energy:.1f} Wh, if each of {cores} cores took {watts:g} W all the time: an estimate, not a measurement; "
        "neither idle parts of the machine nor its cooling are counted.",
        [Table("Time", ["stage", "seconds"], rows), *_endurance(run)],
    )


def _endurance(run: RunFiles) -> list[Table]:
    """Where the time of stages that learn went, over all their sittings."""
    rows = []
    for name in run.stages:
        if found := Goodput(run.folder / name / "goodput.json").figures():
            slow = sum(entry["slow_steps"]["count"] for entry in run.entries(name) if "slow_steps" in entry)
            shares = [f"{100 * found[share]:.1f} %" for share in ("of_all", "of_running")]
            seconds = [f"{found[cause]:.1f}" for cause in ("steps", *LOST)]
            rows.append([name, *shares, *seconds, str(slow)])
    columns = ["stage", "goodput", "without down", "steps", *LOST, "slow steps"]
    return (
        [Table("Goodput: seconds since a stage's first beginning, by what they went into", columns, rows)]
        if rows
        else []
    )


def _origin(run: RunFiles) -> Section:
    about = run.data("run.json") or {}
    rows = [[name, str(value) if not isinstance(value, list) else " ".join(value)] for name, value in about.items()]
    digests = [[name, stage["digest"]] for name, stage in run.stages.items()]
    return Section(
        "Where it comes from",
        "The same command makes it again; on other hardware or with more threads, sums are rounded otherwise.",
        [
            Table("Command", ["", ""], rows),
            Table("Digests of stages (SHA-256 of what went in and came out)", ["stage", "digest"], digests),
        ],
    )
